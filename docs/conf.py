"""Sphinx's settings; `docs/build.py` copies them beside the pages it writes."""

import importlib.metadata
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

project = "halos_nb"
copyright = "the authors of halos_nb"
html_title = "halos_nb"
extensions = ["myst_nb"]
suppress_warnings = ["myst.header"]  # a notebook's first heading may be followed by any other

nb_execution_mode = "off"
nb_mime_priority_overrides = [("*", "text/html", 0), ("*", "image/png", 1)]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

highlight_language = "text"
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
toc_object_entries = False

html_theme = "furo"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_js_files = [("figures.js", {"defer": "defer"})]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_search_summary = False  # summaries fetch pages, which a browser refuses from a folder
html_theme_options: dict[str, Any] = {
    "light_css_variables": {"color-foreground-muted": "#5a5c63"},
    "dark_css_variables": {"color-foreground-muted": "#a3a6ad"},
}


def mathml(self: Any, node: nodes.math | nodes.math_block) -> None:
    "An equation as MathML, which browsers draw without a script."
    block = isinstance(node, nodes.math_block)
    text = convert(node.astext(), display="block" if block else "inline")
    self.body.append(f'<div class="math">{text}</div>' if block else text)
    raise nodes.SkipNode


def with_plotly(app: Any) -> None:
    "The figures' script, as the installed package has it."
    package = importlib.metadata.distribution("plotly")
    script = Path(str(package.locate_file("plotly/package_data/plotly.min.js")))
    shutil.copy(script, Path(app.srcdir) / "_static" / "plotly.min.js")


def needed(app: Any, page: str, template: str, context: dict, doctree: Any) -> None:
    "Five megabytes only where there is a figure."
    if re.search(r'<div class="figure"', context.get("body", "")):
        app.add_js_file("plotly.min.js", defer="defer", priority=400)


def setup(app: Any) -> None:
    app.connect("builder-inited", with_plotly)
    app.connect("html-page-context", needed)
    for node in (nodes.math, nodes.math_block):
        app.add_node(node, override=True, html=(mathml, None))

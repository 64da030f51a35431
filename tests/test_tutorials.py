"""The first hour: what a tutorial promises. That each runs to its end, with its assertions, is
the first part of `make test`: `nbdev-test` takes every notebook with a number.
"""

import ast
import json
import re
from pathlib import Path

import pytest
from nbdev.doclinks import nbglob
from test_house import own_imports

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))
FIGURE = "application/vnd.plotly.v1+json"
each = pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)


def cells(path, kind):
    found = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def source(path):
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "code"))
    return re.sub(r"^%%writefile .*\n", "", text, flags=re.M)  # what a cell writes is read too


def test_they_are_numbered_and_run_with_the_rooms():
    assert [path.stem[:2] for path in TUTORIALS] == ["01", "02", "03", "04"]
    run = {Path(path).resolve() for path in nbglob(file_re="^[0-9]")}
    assert run >= set(TUTORIALS)


@each
def test_a_tutorial_says_what_to_expect_and_holds_it(path):
    first = "".join(cells(path, "markdown")[0]["source"])
    assert re.match(r"# \S.*\n\n> \S.{20,}\n", first) and "**What to expect.**" in first
    asserted = [n for n in ast.walk(ast.parse(source(path))) if isinstance(n, ast.Assert)]
    assert asserted, "nothing of it is checked"


@each
def test_a_tutorial_has_its_figures_and_no_place_of_a_machine(path):
    "Stored outputs, as `python docs/execute.py --keep` leaves them: whole, small, of anywhere."
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    figures = [o for o in outputs if FIGURE in o.get("data", {})]
    assert figures and not [o for o in outputs if o["output_type"] == "error"]
    text = path.read_text("utf-8")
    assert len(text) < 150_000 and "image/png" not in text
    assert not re.search(r"/(tmp|home|root)/\w", text)


@each
def test_a_tutorial_s_figures_have_no_paper_of_their_own(path):
    "A dark notebook has no white slab in it, and letters in the page's ink."
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            if figure := output.get("data", {}).get(FIGURE):
                layout = figure["layout"]
                own = layout.get("template", {}).get("layout", {}) | layout
                assert own.get("paper_bgcolor") == own.get("plot_bgcolor") == "rgba(0,0,0,0)"
                assert "--jp-ui-font-color1" in json.dumps(layout["yaxis"])


def test_the_round_by_hand_imports_nothing_of_ours_but_the_playground():
    "And is about as long as it says: what is not shown or asserted."
    tree = ast.parse(source(TUTORIALS[0]))
    assert {module for module, _ in own_imports(tree)} == {"playground"}
    lines = [line for line in source(TUTORIALS[0]).splitlines() if line.strip()]
    assert len(lines) < 200

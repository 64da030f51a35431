"""What is shown without a kernel, of forty hostile texts, in a real Chromium: nothing runs and
nothing is asked for. The live views have tests of their own in test_browser_widgets.py and
test_browser_monitor.py.
"""

import pytest
from hostile import PAYLOADS
from test_report import turns
from test_show import pair
from test_widgets import make_run

from halos_nb.compare import csv_cell, same_prompt, word_diff
from halos_nb.figures import chart, chart_html, chart_line
from halos_nb.monitor import Folded
from halos_nb.show import CHOSEN, escape, pairs_table, paragraphs, render
from halos_nb.show import samples_table, summary_table
from halos_nb.widgets import browse_pairs

pytestmark = pytest.mark.browser
PICTURE = "img[src^='data:image/svg+xml;base64,']"  # of a chart, which holds no word
ACTIVE = f"script, img:not({PICTURE}), svg, iframe, object, embed, a"
COUNT = f"() => document.querySelectorAll(`{ACTIVE}`).length"
TOUCH = """() => {
  for (const part of document.querySelectorAll('*')) {
    if (part.tagName === 'DETAILS') part.open = true
    for (const kind of ['click', 'mouseover', 'focus', 'toggle', 'error', 'load'])
      part.dispatchEvent(new Event(kind, {bubbles: true}))
  }
}"""


def board(text):
    "The panel without a kernel, where all that it is told is this text."
    said = dict(state=text, warning=text, told=text, note=[text], log=[text])
    folded = [Folded(text, escape(text))]
    return render("board.html", charts="", table="", pairs="", folded=folded, **said)


def views_of(text):
    "What every view without a kernel makes of a text."
    sample = dict(prompt_id=text, prompt=turns(text, "user"), output=text, reward=1.0)
    other = sample | dict(output=f"{text} more")
    yield pairs_table([pair(text, text, prompt=text)], title=text).html
    yield samples_table([sample], title=text).html
    yield summary_table([{text: text, "n": 1}], title=text).html
    yield render("table.html", title=text, heads=[text], cells=[[text]], right=[False])
    yield paragraphs([text]).html
    line = chart_line(text, CHOSEN, [0, 1], [0.5, 1.0])
    yield chart_html([chart(text, [line], unit=text, x=text, names=[text, "b"], suffix=text)])
    yield board(text)
    yield same_prompt([(text, [sample]), ("b", [other])]).html
    yield from word_diff(text, f"{text} more")


def test_texts_are_forty():
    assert len(set(PAYLOADS)) == 40


@pytest.mark.parametrize("text", [text for text in PAYLOADS if text[0] in "=+-@"])
def test_no_cell_of_a_spreadsheet_is_a_formula(text):
    assert str(csv_cell(text)).startswith("'")


def test_no_text_runs_in_a_view_without_a_kernel(page, tmp_path):
    asked = []
    page.goto("about:blank")  # an earlier test's page may still ask its server
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
    parts = [part for text in PAYLOADS for part in views_of(text)]
    for number, text in enumerate(PAYLOADS):
        plain = text.replace("{", "").replace("}", "").replace("\x00", "")
        run = make_run(tmp_path / f"run-{number}", rounds=(1,), prompt=plain, output=plain)
        parts.append(browse_pairs(run, "static").parts[0].html)
    file = tmp_path / "views.html"
    body = "\n".join(f"<section>{part}</section>" for part in parts)
    file.write_text(f"<!doctype html><meta charset=utf-8><body>{body}", "utf-8")
    page.goto(file.as_uri())
    assert page.locator("section").count() == len(parts)
    page.evaluate(TOUCH)
    page.wait_for_timeout(1000)
    assert page.evaluate("window.hit") is None
    assert asked == [file.as_uri()]
    assert page.evaluate(COUNT) == 0

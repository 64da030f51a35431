"""How a page looks, measured in the page (`looks.js`): parts that are cut or lie on each other,
text that is hard to read, rings of the focus that are cut. For any view; each complaint a line.
"""

from pathlib import Path

LOOKS = Path(__file__).with_name("looks.js").read_text("utf-8")


def complaints(view):
    "What is wrong with how a part of a page (a locator) looks; it has the keyboard then."
    wrong = view.evaluate(LOOKS)
    view.evaluate("view => view.focus({ preventScroll: true })")
    return wrong


def look_at(page, selector):
    "An error that says what is wrong with the parts of a page that a selector finds."
    assert not (wrong := page.evaluate(LOOKS, selector)), "\n".join(wrong)

"""How a page looks, measured in the page (`looks.js`): parts that are cut or lie on each other,
text that is hard to read, rings of the focus that are cut. For any view; each complaint a line.
"""

from pathlib import Path

LAPTOP, SCREEN = (1366, 768), (1920, 1080)
# a window at 200% has half of the laptop's pixels
WINDOWS = [(*LAPTOP, "light"), (*SCREEN, "dark"), (683, 384, "light"), (390, 844, "dark")]
LOOKS = Path(__file__).with_name("looks.js").read_text("utf-8")


def set_window(page, width, height, scheme="light"):
    "The window that a page is looked at in."
    page.set_viewport_size(dict(width=width, height=height))
    page.emulate_media(color_scheme=scheme)


def complaints(view):
    "What is wrong with how a part of a page (a locator) looks; it has the keyboard then."
    wrong = view.evaluate(LOOKS)
    view.evaluate("view => view.focus({ preventScroll: true })")
    return wrong


def complaints_of(page, selector):
    "What is wrong with the parts of a page that a selector finds."
    return page.evaluate(LOOKS, selector)


def look_at(page, selector):
    "An error that says what is wrong with the parts of a page that a selector finds."
    assert not (wrong := complaints_of(page, selector)), "\n".join(wrong)

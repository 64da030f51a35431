"""How the site looks that `make docs` builds, opened from its folder in a real Chromium: every
page, at both sizes, at 200% and on a telephone, light and dark. `make test-every`.
"""

from pathlib import Path

import pytest
from conftest import every, missing
from looks import WINDOWS, complaints_of, look_at, set_window

SITE = Path(__file__).resolve().parent.parent / "build/docs"
pytestmark = [pytest.mark.browser, every]
KINDS = [  # for all windows; every other page is looked at in one of them
    "index",
    "search",
    "docs/mistakes",
    "docs/views",
    "docs/gallery",
    "nbs/tutorials/01_one_round_by_hand",  # they have figures
    "nbs/tutorials/02_your_own_reward_model",
    "nbs/tutorials/03_a_new_method",
    "nbs/tutorials/04_label_by_hand",
    "nbs/online_loop",
    "nbs/20_losses",
    "floors/2",
    "api/index",
    "api/losses",
]
DRAWN = """() => [...document.querySelectorAll('div.figure')]
  .every((figure) => figure.querySelector('.main-svg'))"""


@pytest.fixture(autouse=True)
def built():
    if not (SITE / "index.html").exists():
        missing("no site in build/docs: make docs")


def show(page, name):
    "A page with all that is drawn when it comes into view."
    page.goto((SITE / f"{name}.html").as_uri())
    for figure in page.locator("div.figure").all():
        figure.scroll_into_view_if_needed()
        figure.locator(".main-svg").first.wait_for(timeout=60_000)
    page.wait_for_function(DRAWN)
    page.evaluate("scrollTo(0, 0)")


def pages_for(place):
    "Those that are looked at in the window of this place."
    names = sorted(p.relative_to(SITE).with_suffix("").as_posix() for p in SITE.rglob("*.html"))
    return KINDS + [name for name in names[place :: len(WINDOWS)] if name not in KINDS]


@pytest.mark.parametrize(
    "place", range(len(WINDOWS)), ids=lambda i: "{}x{} {}".format(*WINDOWS[i])
)
def test_every_page_looks_well(place, quiet):
    set_window(quiet, *WINDOWS[place])
    wrong = []
    for name in pages_for(place):
        show(quiet, name)
        wrong += [f"{name}: {said}" for said in complaints_of(quiet, "body")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("window", WINDOWS[2:], ids=str)
@pytest.mark.parametrize(
    "button, drawer",
    [("nav-overlay-icon", "sidebar-drawer"), ("toc-overlay-icon", "toc-drawer")],
)
def test_a_drawer_looks_well_and_opens_by_keyboard(button, drawer, window, quiet):
    "In a narrow window the contents lie beside it, until they are asked for."
    set_window(quiet, *window)
    show(quiet, "docs/mistakes")
    part = quiet.locator(f".{drawer}")
    quiet.locator(f"label.{button}:visible").first.click()
    quiet.wait_for_timeout(500)  # it slides
    look_at(quiet, f".{drawer}")
    show(quiet, "docs/mistakes")
    assert part.evaluate("d => getComputedStyle(d).opacity") == "0"
    part.locator("a:visible").first.focus()
    box = part.bounding_box()
    assert 0 <= box["x"] and box["x"] + box["width"] <= window[0] + 1
    assert part.evaluate("d => getComputedStyle(d).opacity") == "1"


def test_what_is_found_looks_well(quiet):
    set_window(quiet, *WINDOWS[0])
    quiet.goto((SITE / "index.html").as_uri())
    quiet.get_by_placeholder("Search").fill("threshold")
    quiet.keyboard.press("Enter")
    quiet.locator("#search-results li").nth(2).wait_for(timeout=60_000)
    look_at(quiet, "body")

"Pairs to look through and to label by hand, in a real JupyterLab in headless Chromium."

import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlparse

import pytest
from conftest import every
from test_browser import (
    DONE,
    FAILED,
    ROOT,
    open_notebook,
    outputs,
    run_all,
    with_parameters,
    write_notebook,
)
from hostile import IN_A_SOAK, PAYLOADS
from looks import complaints
from test_widgets import HOSTILE, make_round, make_run, tell_tokens, turns

from halos_nb.show import visible
from halos_nb.records import as_text, read_records, write_records
from halos_nb.pairs import pick, read_pairs
from halos_nb.widgets import page_code

shots = os.environ.get("SHOTS")  # a folder for pictures of the widgets
pytestmark = pytest.mark.browser
BROWSE = "from halos_nb.widgets import browse_pairs\nbrowser = browse_pairs({!r})\nbrowser"


@pytest.fixture
def watched(page):
    "The page; a console error, an exception, a dialog or a request elsewhere fails it."
    seen = []

    def request(r):
        if (
            urlparse(r.url).scheme in ("http", "https", "ws", "wss")
            and urlparse(r.url).hostname != "127.0.0.1"
        ):
            seen.append(f"request: {r.url}")

    def console(m):
        if m.type == "error":
            seen.append(f"console: {m.text} {m.location}")

    def dialog(d):
        if d.type != "beforeunload":
            seen.append(f"dialog: {d.message}")
        d.accept()

    def error(e):
        seen.append(f"exception: {e}")

    page.goto("about:blank")  # the page of the test before would miss its server
    handlers = dict(request=request, console=console, dialog=dialog, pageerror=error)
    for name, handler in handlers.items():
        page.on(name, handler)
    yield page
    title = page.title()
    was_hit = page.evaluate("window.hit")
    page.goto("about:blank")
    for name, handler in handlers.items():
        page.remove_listener(name, handler)
    assert not seen, "\n".join(seen)
    assert title != "ran" and was_hit is None, "a text was run"


def widget(page):
    return outputs(page).locator(".hnb")


def cells(page):
    return page.locator(".jp-NotebookPanel .jp-Cell").count()


def kept(page):
    return int(widget(page).get_attribute("data-kept"))


def here(page):
    return int(page.locator(".hnb .detail").get_attribute("data-i"))


def wait_kept(page, n):
    page.wait_for_function(
        f"document.querySelector('.hnb')?.dataset.kept === '{n}'", timeout=20_000
    )


def wait_here(page, i):
    page.wait_for_function(
        f"document.querySelector('.hnb .detail')?.dataset.i === '{i}'", timeout=20_000
    )


def sides(page):
    "The two texts on the screen."
    return {s: page.locator(f".hnb .side[data-side='{s}'] pre").inner_text() for s in "AB"}


def open_browser(page, lab, folder, source="run"):
    write_notebook(folder / "browse.ipynb", BROWSE.format(source), DONE)
    open_notebook(page, lab(), "browse.ipynb")
    run_all(page)
    page.locator(".hnb .detail[data-i]").wait_for(timeout=20_000)


def test_browse_filter_click_and_export(lab, watched, tmp_path):
    page = watched
    pairs = read_pairs(make_run(tmp_path / "run"))
    open_browser(page, lab, tmp_path)
    assert kept(page) == len(pairs) == 32
    assert here(page) == 0
    assert sides(page) == {s: as_text(pairs.records[0][f"output_{s}"]) for s in "AB"}

    # a point of the scatter: the pair with the widest margin stands alone
    canvas = page.locator(".hnb canvas")
    far = int(pick(pairs, sort="margin", down=True)[0])
    x, y = canvas.evaluate(f"c => c.place({far})")
    canvas.click(position=dict(x=x, y=y))
    wait_here(page, far)
    assert sides(page) == {s: as_text(pairs.records[far][f"output_{s}"]) for s in "AB"}

    # the keyboard is the widget's: b and d d are JupyterLab's keys for a new cell and for
    # deleting one
    before = cells(page)
    for key in ("b", "d"):
        page.keyboard.press(key)
    assert cells(page) == before
    assert page.locator(".hnb del").count() and page.locator(".hnb ins").count(), (
        "the words that differ are marked"
    )
    page.keyboard.press("j")
    wait_here(page, far + 1)
    page.keyboard.press("f")
    page.locator(".hnb .row.here", has_text="⚑").wait_for(timeout=10_000)
    page.keyboard.press("n")
    page.keyboard.type("jkdf <b>odd</b>")  # no keys of ours while a note is written
    page.keyboard.press("Enter")
    page.locator(".hnb .row.here", has_text="✎").wait_for(timeout=10_000)
    assert read_pairs(tmp_path / "run").notes == {far + 1: "jkdf <b>odd</b>"}
    page.keyboard.press("k")
    wait_here(page, far)

    # the same prompt in another round
    page.locator(".hnb .below button", has_text="round-3").click()
    page.wait_for_function(f"document.querySelector('.hnb .detail').dataset.i !== '{far}'")
    assert pairs.rounds[here(page)] == "round-3"
    assert pairs.records[here(page)]["prompt_id"] == pairs.records[far]["prompt_id"]

    page.locator(".hnb select[name=round]").select_option("round-2")
    page.locator(".hnb input[name=low]").fill("1")  # as it is typed, like the search
    expected = pick(pairs, round="round-2", margin=(1, None))
    wait_kept(page, len(expected))
    wait_here(page, int(expected[0]))
    page.locator(".hnb button.export").click()
    page.locator(".hnb .status", has_text="written to").wait_for()
    assert read_records(tmp_path / "run/selection.json", "pairwise_feedback") == [
        pairs.records[i] for i in expected
    ]

    page.locator(".hnb button", has_text="clear").click()  # a bar of the histogram: its pairs
    wait_kept(page, 32)
    page.locator(".hnb select[name=picture]").select_option("margins")
    at = int(pick(pairs, sort="near", down=True)[0])
    x, y = canvas.evaluate(f"c => c.place({at})")
    canvas.click(position=dict(x=x - 1, y=y))
    page.wait_for_function("document.querySelector('.hnb').dataset.kept < 32", timeout=10_000)
    low, high = (
        float(page.locator(f".hnb input[name={n}]").input_value()) for n in ("low", "high")
    )
    assert kept(page) == len(pick(pairs, margin=(low, high))) > 0
    assert low <= pairs.columns["margin"][at] <= high + 1e-6

    page.locator(".hnb button", has_text="clear").click()
    page.locator(".hnb input[name=text]").fill("prompt 3 of ROUND-1")
    wait_kept(page, 1)
    page.locator(".hnb input[name=mark]").fill("answer \\d")
    page.locator(".hnb mark").first.wait_for()
    if shots:
        page.locator(".hnb").screenshot(path=f"{shots}/browser.png")
    assert page.locator(".hnb mark").all_inner_texts()[0].startswith("Answer ")
    assert {f.name for f in (tmp_path / "run").glob("flags.jsonl")}
    assert read_pairs(tmp_path / "run").flags == {far + 1}


SIZES = {  # width and height of the page, of which a zoom of 200% leaves half
    "small screen": (1366, 768, 1),
    "large screen, dark": (1920, 1080, 1),
    "zoom 200%": (1366, 768, 2),
    "390 pixels": (390, 844, 1),
}


def set_theme(page, name):
    menu = page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Settings$"))
    if not menu.is_visible():
        return
    menu.click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Theme$")).hover()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^JupyterLab {name}$")).click()
    page.wait_for_function(f"document.body.dataset.jpThemeName === 'JupyterLab {name}'")


def show_files(page, shown):
    "On a narrow page the list of files leaves no room; whoever works there closes it."
    tab = page.locator(".jp-SideBar.jp-mod-left [data-id=filebrowser]")
    if (tab.get_attribute("aria-selected") == "true") != shown:
        tab.click()


# what is cut depends on the size, what is hard to read on the theme: CI has each of both
THEMES = {"Light": ["small screen", "390 pixels"], "Dark": ["large screen, dark", "zoom 200%"]}
if os.environ.get("HALOS_NB_LONG") == "every":
    THEMES = dict.fromkeys(THEMES, SIZES)


def in_all_sizes(page, look):
    "Call look(kind) at each size and theme; the page is as before afterwards."
    before = page.viewport_size
    try:
        for theme, kinds in THEMES.items():
            set_theme(page, theme)
            for kind in kinds:
                width, height, zoom = SIZES[kind]
                # a zoom of 200% is half as many pixels of a page
                page.set_viewport_size(dict(width=width // zoom, height=height // zoom))
                show_files(page, width > 1000)
                page.locator(".hnb").evaluate("w => w.scrollIntoView()")
                page.wait_for_timeout(250)
                look(f"{kind}, {theme}")
            page.set_viewport_size(before)
    finally:
        page.set_viewport_size(before)
        show_files(page, True)


def look_at(page, name):
    "A function that says what is wrong with the widget at one size, and keeps a picture."
    widget = page.locator(".hnb")

    def look(kind):
        if shots:
            page.screenshot(path=f"{shots}/{name} {kind}.png")
        found = "\n".join(complaints(widget))
        assert not found, f"{name}, {kind}:\n{found}"

    return look


LONG = (
    """# A title

Some **bold** words, *soft* ones, `code`, [a link](http://203.0.113.7/x) and a list:

1. one
   - inner
2. two

| a | b |
|---|---|
| 1 | 2 |

```
x = "<b>code</b>"
```
"""
    + "And a paragraph that goes on about the matter, as answers of models do. " * 12
)


def markdown_round(folder):
    make_round(folder, 12, output=f"{LONG}In {folder.name} answer {{}} to {{}}.")


def test_pair_browser_at_all_sizes(lab, watched, tmp_path):
    "Nothing cut, on each other or hard to read; on a small screen all of it, keys too."
    page = watched
    for name in ("round-1", "round-2"):
        markdown_round(tmp_path / "run" / name)
    tell_tokens(tmp_path / "run", [0, 1])
    open_browser(page, lab, tmp_path)
    page.locator(".hnb").evaluate("w => w.focus()")
    plain = look_at(page, "pairs")

    def look(kind):
        plain(kind)
        if kind.startswith("small"):
            box = page.locator(".hnb").bounding_box()
            keys = page.locator(".hnb .foot").bounding_box()
            assert box["height"] <= 647 and keys["y"] + keys["height"] <= 768 - 24
            assert page.locator(".hnb .side .more").first.is_visible()

    in_all_sizes(page, look)
    page.keyboard.press("m")
    page.locator(".hnb .side .markdown table").first.wait_for()
    assert page.locator(".hnb .side .markdown ol > li > ul").count() == 2
    assert page.locator(".hnb .side .markdown a").count() == 0
    assert "(http://203.0.113.7/x)" in page.locator(".hnb .side .markdown").first.inner_text()
    look_at(page, "pairs as Markdown")("as it is")
    # the keys scroll both answers, and the sign goes at the end
    for _ in range(8):
        page.keyboard.press(" ")
    page.locator(".hnb .side .more").first.wait_for(state="hidden")
    page.keyboard.press("c")
    page.locator(".hnb .step").nth(1).wait_for()
    assert page.locator(".hnb .step b").all_inner_texts() == ["round-1", "round-2"]
    assert page.locator(".hnb .step ins").count()
    look_at(page, "one prompt")("as it is")
    shades_of_tokens(page, read_pairs(tmp_path / "run").records[0])
    # their sampler told nothing: that is not shaded, and the reason is told
    page.keyboard.press("t")
    page.locator(".hnb .wrong", has_text="its sampler told none").wait_for()


def shades_of_tokens(page, record):
    "What training changed: shades with their numbers in words, of pairs that were asked about."
    page.keyboard.press("g")
    tokens = page.locator(".hnb .side[data-side='A'] .gains > span")
    tokens.first.wait_for()
    assert "".join(tokens.all_text_contents()) == as_text(record["output_A"])
    told = "−3.00 nats: log-prob −3.00 before, −6.00 now"
    assert tokens.first.get_attribute("title") == told
    assert page.get_by_role("img", name=f"#: {told}", exact=True).first.is_visible()
    looks = [
        tokens.nth(k).evaluate("t => getComputedStyle(t).textDecoration") for k in (0, 3, 6)
    ]
    assert ["underline" in look for look in looks] == [True, False, True]
    assert "wavy" in looks[0] and "wavy" not in looks[2]
    words = page.locator(".hnb .gains .legend").first.inner_text()
    assert "gained: “" in words and "lost: “#” −3.00" in words
    scale = page.locator(".hnb .scale")
    assert "−2 or less" in scale.inner_text() and "under round-1 minus" in scale.inner_text()
    for theme in ("Dark", "Light"):
        set_theme(page, theme)
        look_at(page, "changed")(theme)
    # the next pair is shaded too; one that nobody asked about says how it can be
    page.locator(".hnb").evaluate("w => w.focus()")
    page.keyboard.press("j")
    wait_here(page, 1)
    tokens.first.wait_for()
    page.keyboard.press("j")
    wait_here(page, 2)
    page.locator(".hnb .status", has_text="no policy was asked of this pair").wait_for()
    assert tokens.count() == 0
    page.keyboard.press("k")
    wait_here(page, 1)
    tokens.first.wait_for()
    page.keyboard.press("g")
    tokens.first.wait_for(state="detached")


def test_the_chosen_row_is_in_sight_and_nothing_is_said_to_be_nothing(lab, watched, tmp_path):
    "In a low window too; answers that are empty or blank say so."
    page = watched
    make_round(tmp_path / "run/round-1", 20)
    pairs = read_records(tmp_path / "run/round-1/feedback.json", "pairwise_feedback")
    for pair, a, b in zip(pairs, ("", "x"), (" \n\t ", "")):
        pair |= dict(output_A=turns(a), output_B=turns(b))
    write_records(tmp_path / "run/round-1/feedback.json", pairs)
    write_notebook(tmp_path / "n.ipynb", BROWSE.format(str(tmp_path / "run")), DONE)
    page.set_viewport_size(dict(width=1366, height=681))
    open_notebook(page, lab(), "n.ipynb")
    run_all(page)
    texts = widget(page).locator(".side .text")
    found = [text.strip() for text in texts.all_inner_texts()]
    assert found == ["(empty)", "(only white space, 4 characters)"]
    widget(page).focus()
    for i in range(14):
        if i:
            page.keyboard.press("j")
        here = widget(page).locator(f".row.here[data-i='{i}']")
        here.wait_for()
        row, box = here.bounding_box(), widget(page).locator(".list").bounding_box()
        assert row["y"] >= box["y"] - 1, i
        assert row["y"] + row["height"] <= box["y"] + box["height"] + 1, i
    page.set_viewport_size(dict(width=1400, height=1600))


def test_answers_of_three_hundred_thousand_letters(lab, watched, tmp_path):
    page = watched
    make_round(tmp_path / "run/round-1", 3, output="{} {} " + "a *word* and `more` " * 15_000)
    open_browser(page, lab, tmp_path)
    for i, key in enumerate(("j", "j", "m", "d")):
        page.keyboard.press(key) if i else page.locator(".hnb").evaluate("w => w.focus()")
    page.keyboard.press("j")
    wait_here(page, 2)
    # the page lays out what is in view; all of it is there
    text = page.locator(".hnb .side[data-side='A'] .text").text_content()
    assert len(text) > 290_000
    page.keyboard.press(" ")
    page.keyboard.press("m")


def test_hostile_text_is_text_in_the_pair_browser(lab, watched, tmp_path):
    page = watched
    for k, text in enumerate([*HOSTILE, *IN_A_SOAK], 1):
        make_round(
            tmp_path / f"run/round-{k}",
            1,
            prompt=text.replace("{", "{{").replace("}", "}}"),
            output=text.replace("{", "{{").replace("}", "}}"),
        )
    labels = tmp_path / "run/round-1/feedback.labels.jsonl"
    labels.write_text(labels.read_text().replace("rm:small", "rm:" + HOSTILE[1]))
    tell_tokens(tmp_path / "run", words=HOSTILE[:2])
    open_browser(page, lab, tmp_path)
    pairs = read_pairs(tmp_path / "run")
    for i in range(len(pairs)):
        wait_here(page, i)
        page.locator(".hnb").evaluate("r => r.focus()")
        page.keyboard.press("g")
        page.locator(".hnb .gains").first.wait_for()
        for key in "ddm":
            page.keyboard.press(key)  # drawn with differences, plain again, as Markdown
        page.keyboard.press("j")
    assert (
        page.locator(
            ".hnb .detail :is(img, script, iframe, svg, a, object, embed, form, style)"
        ).count()
        == 0
    )
    assert page.title() != "ran"


# what Markdown may become; everything else of a text stays text
WHITE_LIST = {
    *("div", "p", "pre", "code", "strong", "em", "s", "span", "hr", "blockquote"),
    *("ul", "ol", "li", "table", "tr", "th", "td"),
}
MARKED = [
    "# <b>x</b>\n\n> quoted <script>window.hit=1</script>\n\n- [x](javascript:window.hit=1)",
    "|<img src=x onerror=window.hit=1>| b |\n|---|---|\n| `<i>` | ![p](http://203.0.113.7/p)|",
    "```html\n<script>window.hit=1</script>\n",
    "**<svg onload=window.hit=1>** *a **b ~~c `d` ~~ e** f* __g _h_ i__",
    "> " * 300 + "deep\n" + "  - " * 300 + "deeper",
]


def test_markdown_becomes_elements_of_the_white_list_alone(page, tmp_path):
    "Forty hostile texts and some of ours, rendered: nothing runs, nothing is asked for."
    asked = []
    page.goto("about:blank")
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
    code = page_code("label").replace("export default", "window.ours =")
    page.add_script_tag(content=code + "\nwindow.show = markdown;")
    for text in [*PAYLOADS, *HOSTILE, *MARKED]:
        tags = page.evaluate(
            """text => {
                const box = show(text);
                document.body.replaceChildren(box);
                const all = [...box.querySelectorAll('*')];
                const kinds = ['click', 'mouseover', 'focus', 'error', 'load'];
                for (const e of all) for (const k of kinds) e.dispatchEvent(new Event(k));
                const odd = e => [...e.attributes].filter(a =>
                    !['class', 'start', 'role', 'aria-level', 'dir'].includes(a.name));
                return all.flatMap(e => [e.tagName.toLowerCase(), ...odd(e).map(a => a.name)]);
            }""",
            text,
        )
        assert set(tags) <= WHITE_LIST, text
    page.wait_for_timeout(300)
    assert page.evaluate("window.hit") is None
    assert asked == []
    # and it is Markdown
    page.evaluate("text => document.body.replaceChildren(show(text))", LONG)
    for tag, number in dict(table=1, strong=1, em=1, ol=1, ul=1, pre=1, a=0).items():
        assert page.locator(tag).count() == number, tag
    assert page.locator("ol > li > ul > li").inner_text() == "inner"


def wait_time(page, name):
    return page.evaluate(
        f"async () => {{ while (!window.times[{name!r}]) await new Promise(r => "
        f"setTimeout(r, 5)); return window.times[{name!r}] }}"
    )


# when the first pair was shown, and when each number of pairs was kept first
NOTE_TIMES = """() => {
    window.times = {};
    const note = () => {
        const widget = document.querySelector('.hnb');
        const now = Date.now() / 1000;
        if (widget?.querySelector('.detail[data-i]')) window.times.open ??= now;
        if (widget?.dataset.kept) window.times[widget.dataset.kept] ??= now;
    };
    const all = {subtree: true, childList: true, attributes: true};
    new MutationObserver(note).observe(document.body, all);
}"""
# types a search; when that was
SEARCH = """text => {
    const box = document.querySelector('.hnb input[name=text]');
    box.value = text;
    const now = Date.now() / 1000;
    box.dispatchEvent(new Event('input', {bubbles: true}));
    return now;
}"""


@every  # it has a time, and times are for idle machines
def test_many_pairs_are_quick(lab, watched, tmp_path):
    "20,000 pairs: open in 2 s, a filter in 0.3 s, longer where processes share a core; < 3 MB."
    page = watched
    make_round(
        tmp_path / "run/round-1",
        20_000,
        output="Answer {} to {}. " + "Some words that make it as long as answers are. " * 8,
        samples=2,
    )
    write_notebook(
        tmp_path / "browse.ipynb",
        "import halos_nb.widgets",
        "import time\nprint('began', time.time())\n" + BROWSE.format("run"),
        DONE,
    )
    open_notebook(page, lab(), "browse.ipynb")
    page.evaluate(NOTE_TIMES)
    run_all(page)
    opened = wait_time(page, "open") - float(
        outputs(page).locator(".jp-OutputArea-output", has_text="began").inner_text().split()[1]
    )
    pairs, filtered = read_pairs(tmp_path / "run"), []
    # three searches that keep different numbers of pairs
    for text in ("to 10.", "to 123", "word word"):
        start = page.evaluate(
            SEARCH,
            text,
        )
        filtered.append(wait_time(page, str(len(pick(pairs, text=text)))) - start)
    page.keyboard.press("Control+s")
    page.wait_for_timeout(2000)
    saved, crowd = (
        (tmp_path / "browse.ipynb").read_text(),
        max(1, os.getloadavg()[0] / os.cpu_count()),
    )
    print(
        f"opened in {opened:.2f} s, filtered in "
        f"{', '.join(f'{x:.3f}' for x in filtered)} s, notebook {len(saved):,} bytes; "
        f"{crowd:.1f} processes per core"
    )
    assert opened < 2 * crowd
    assert min(filtered) < 0.3 * crowd
    assert len(saved) < 3e6
    assert "widget-view+json" in saved


# ---- labelling by hand

LABEL = """from halos_nb.people import Session, choose_pairs
from halos_nb.records import read_records
from halos_nb.widgets import SessionView, label_pairs
samples = read_records("round/samples.json", "sample")
session = Session("journal.jsonl", samples, choose_pairs(samples, 20), "human:test")
view = SessionView(session, "feedback.json", "Take the better answer.")
label_pairs(view)"""
CHOSEN = {"1": "left", "2": "right"}


def item(page):
    return page.locator(".hnb").get_attribute("data-item")


def shown(page):
    return tuple(
        page.locator(f".hnb .side[data-side='{s}'] .text").inner_text()
        for s in ("left", "right")
    )


def press(page, key):
    "A key; until the answer to it is on the screen."
    was = item(page)
    page.keyboard.press(key)
    page.wait_for_function(
        f"document.querySelector('.hnb').dataset.item !== '{was}'", timeout=20_000
    )
    return was


def take_keyboard(page):
    "After Run All the box is in view and has the keyboard; nothing needs be clicked."
    page.locator(".hnb[data-item]").wait_for(timeout=20_000)
    page.wait_for_function("document.activeElement?.matches('.hnb')", timeout=10_000)
    box = page.locator(".hnb").bounding_box()
    assert box["y"] >= 0 and box["y"] + 200 < page.viewport_size["height"]


def open_labeller(page, server, folder):
    write_notebook(folder / "label.ipynb", LABEL, DONE)
    open_notebook(page, server, "label.ipynb")
    run_all(page)
    take_keyboard(page)


def label(page, keys, pressed):
    "Press keys; what they mean is noted from the screen alone."
    for key in keys:
        if key == "u":
            press(page, "u")
            pressed.pop(item(page))
        else:
            texts = shown(page)
            pressed[press(page, key)] = (key, *texts)


def kernel_of(server):
    import psutil

    return next(
        p
        for p in psutil.Process(server.process.pid).children(recursive=True)
        if "ipykernel_launcher" in " ".join(p.cmdline())
    )


def test_keys_are_in_sight_where_the_box_begins_below_its_cell(lab, watched, tmp_path):
    "A short notebook on a laptop: nothing is scrolled, the box would end below the window."
    page = watched
    make_round(tmp_path / "round", 10)
    page.set_viewport_size(dict(width=1366, height=768))
    open_labeller(page, lab(), tmp_path)
    page.wait_for_timeout(1000)
    for name in ("left is better, key 1", "note on this pair"):
        box = page.locator(".hnb").get_by_label(name).bounding_box()
        assert box["y"] > 90 and box["y"] + box["height"] < 740, (name, box)
    page.set_viewport_size(dict(width=1400, height=1600))


def test_label_twenty_pairs_by_keyboard(lab, watched, tmp_path):
    page, server, pressed = watched, lab(), {}
    make_round(tmp_path / "round", 10)
    open_labeller(page, server, tmp_path)
    for text in ("reward", "rm:small", "api:judge"):
        assert text not in page.locator(".hnb").inner_text()
    before = cells(page)
    # a and b: new cells in JupyterLab; d: here the differences
    for key in "bad":
        page.keyboard.press(key)
    assert cells(page) == before
    assert page.locator(".hnb del").count() > 0
    label(page, "12", pressed)
    page.keyboard.press("n")  # a note; its text is no key
    page.keyboard.type("12340u <b>note</b>")
    page.keyboard.press("Enter")
    while b"<b>note</b>" not in (tmp_path / "journal.jsonl").read_bytes():
        page.wait_for_timeout(50)
    page.wait_for_timeout(200)  # and the page has heard of it
    assert page.locator(".hnb input.note").input_value() == "12340u <b>note</b>"
    label(page, "13u2u304", pressed)
    page.keyboard.press("ArrowLeft")  # back to an answered one, and there another answer
    page.locator(".hnb", has_text="answered: both bad").wait_for()
    texts, name = shown(page), item(page)
    pressed[press(page, "1")] = ("1", *texts)
    assert name in pressed
    assert len(pressed) == 6
    label(page, "212", pressed)
    if shots:
        page.locator(".hnb").screenshot(path=f"{shots}/label.png")
    n, journal = len(pressed), (tmp_path / "journal.jsonl").read_bytes()
    kernel_of(server).kill()
    page.locator(".jp-Dialog", has_text="appears to have died").locator("button").click(
        timeout=30_000
    )
    page.locator(".hnb .side").first.click()
    page.keyboard.press("1")  # nobody hears it; it must not look saved
    page.locator(".hnb .wrong", has_text="does not answer").wait_for(timeout=15_000)
    assert (tmp_path / "journal.jsonl").read_bytes() == journal
    assert len(pressed) == n

    page.goto("about:blank")
    open_notebook(page, server, "label.ipynb")  # reopened: the journal says where it was
    run_all(page)
    take_keyboard(page)
    assert item(page) == f"{n + 1:04d}"
    assert page.locator(".hnb", has_text=f"{n} of 21").count()
    label(page, "1213012321124"[: 21 - n], pressed)
    page.locator(".hnb", has_text="All pairs are answered").wait_for()
    assert len(pressed) == 21
    assert page.locator(".hnb th", has_text="second look").count() == 1
    check_feedback(tmp_path, pressed)
    train_on(tmp_path)


def check_feedback(folder, pressed):
    "The file holds what was pressed: of each pair with one verdict the preferred answer."
    verdicts = {}
    for key, left, right in pressed.values():
        said = verdicts.setdefault(frozenset((left, right)), [])
        if key in "1234":
            said.append(dict(zip("12", (left, right))).get(key, "tie"))
    wanted = {
        pair: said[0]
        for pair, said in verdicts.items()
        if said and len(set(said)) == 1 and said[0] != "tie"
    }
    records = read_records(folder / "feedback.json", "pairwise_feedback")
    got = {
        frozenset((as_text(r["output_A"]), as_text(r["output_B"]))): as_text(
            r["output_A" if r["label"] else "output_B"]
        )
        for r in records
    }
    assert got == wanted
    assert len(records) == len(wanted) > 8
    assert len(verdicts) == 20
    for r in records:
        assert r["reward_A"] - r["reward_B"] == (1 if r["label"] else -1)


def train_on(folder):
    "One step of DPO on what was labelled, by a tiny model made here."
    from halos_nb.configs import TrainConfig
    from halos_nb.settings import Profile
    from halos_nb.jobs import launch
    from halos_nb.models import start_from_scratch

    texts = [
        as_text(r[k])
        for r in read_records(folder / "feedback.json")
        for k in ("prompt", "output_A", "output_B")
    ]
    start_from_scratch(folder / "tiny", texts, vocab_size=300, hidden_size=16, layers=1)
    cfg = TrainConfig(
        loss="dpo",
        model=str(folder / "tiny"),
        train_datasets=[str(folder / "feedback.json")],
        cache_dir=str(folder / "models"),
        batch_size=32,
        max_length=128,
        max_prompt_length=64,
    )
    launch("train", cfg, Profile(), folder / "job").wait(show=False)
    assert (folder / "models/policy/FINAL/model.safetensors").exists()
    assert json.loads((folder / "models/policy/counts.json").read_text())


def test_labeller_at_all_sizes(lab, watched, tmp_path):
    "All of it on a small screen: both answers, keys, note and guidelines; nothing cut."
    page = watched
    markdown_round(tmp_path / "round")
    guide = LABEL.replace("Take the better answer.", "Take the **better** answer.\\n\\n- one")
    write_notebook(tmp_path / "label.ipynb", guide, DONE)
    open_notebook(page, lab(), "label.ipynb")
    run_all(page)
    take_keyboard(page)
    assert page.locator(".hnb .guidelines strong").inner_text() == "better"
    plain = look_at(page, "label")

    def look(kind):
        plain(kind)
        if kind.startswith("small"):
            widget = page.locator(".hnb").bounding_box()
            assert widget["height"] <= 647
            for part in (".note", ".foot", ".choices button", ".side", ".guidelines"):
                box = page.locator(f".hnb {part}").first.bounding_box()
                assert box["y"] + box["height"] <= 768 - 24, part

    in_all_sizes(page, look)
    assert page.locator(".hnb .side .markdown table").count() == 2
    page.keyboard.press("m")
    page.locator(".hnb .side pre", has_text="# A title").first.wait_for()
    signs = page.locator(".hnb .side .more")
    assert signs.first.is_visible()
    for _ in range(8):
        page.keyboard.press(" ")
    signs.first.wait_for(state="hidden")
    page.keyboard.press("b")
    signs.first.wait_for(state="visible")
    page.keyboard.press("g")
    page.locator(".hnb .guidelines").wait_for(state="hidden")


def test_hostile_text_is_text_in_the_labeller(lab, watched, tmp_path):
    page = watched
    texts = [*HOSTILE, *IN_A_SOAK]
    write_records(
        tmp_path / "round/samples.json",
        [
            dict(
                prompt_id=f"p{i}",
                sample_id=k,
                prompt=[dict(role="user", content=t)],
                output=t + " end" * k,
                type="sample",
            )
            for i, t in enumerate(texts)
            for k in range(2)
        ],
    )
    open_labeller(page, lab(), tmp_path)
    while page.locator(".hnb").get_attribute("data-item"):
        page.keyboard.press("m")  # raw, as Markdown again, then the differences
        page.keyboard.press("m")
        page.keyboard.press("d")
        assert {x.removesuffix(" end") for x in shown(page)} <= set(map(visible, texts))
        press(page, "3")
        assert page.locator(".hnb :is(img, script, iframe, svg, a, b b)").count() == 0


def test_driver_from_samples_to_a_trained_step(lab, watched, tmp_path):
    "The driver, with six pairs: it stops where somebody should label, and goes on afterwards."
    page, server = watched, lab()
    with_parameters(
        ROOT / "nbs/label_by_hand.ipynb",
        tmp_path / "driver.ipynb",
        run_name="lab_by_hand",
        num_pairs=6,
    )
    folder = Path(os.environ["HALOS_NB_RUNS_DIR"]) / "lab_by_hand"
    shutil.rmtree(folder, ignore_errors=True)
    open_notebook(page, server, "driver.ipynb")
    menu(page, "Run", "Run All Cells")
    outputs(page).locator(".jp-OutputArea-output", has_text="6 of 6 pairs are open").or_(
        outputs(page).locator(FAILED)
    ).first.wait_for(timeout=400_000)
    assert outputs(page).locator(FAILED).count() == 0, "one line, no traceback"
    take_keyboard(page)
    for key in "121324":
        press(page, key)
    page.locator(".hnb", has_text="All pairs are answered").wait_for()
    page.keyboard.press("Enter")  # one key: feedback, training, what changed
    result = page.locator(".hnb .result")
    result.or_(page.locator(".hnb .wrong")).wait_for(timeout=400_000)
    assert result.locator("b").inner_text().startswith("Held out: ")
    assert "right" in result.inner_text() and "[" in result.inner_text()
    trained = (folder / "policy/FINAL/model.safetensors").stat().st_mtime_ns
    page.locator(".jp-CodeCell .jp-InputArea-editor", has_text="changed, rows = train").click()
    menu(page, "Run", "Run Selected Cell and All Below")
    outputs(page).locator(".jp-OutputArea-output", has_text="alldone").or_(
        outputs(page).locator(FAILED)
    ).first.wait_for(timeout=400_000)
    assert outputs(page).locator(FAILED).count() == 0
    assert len(read_records(folder / "feedback.json")) == 4
    assert (folder / "policy/FINAL/model.safetensors").stat().st_mtime_ns == trained
    assert [
        json.loads(row)["answer"]
        for row in (folder / "feedback.labels.jsonl").read_text().splitlines()
    ] == ["left", "right", "left", "tie", "right", "bad"]


def menu(page, name, entry):
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{name}$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()

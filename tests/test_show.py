"""Tables show text and nothing else, whatever a model wrote; colours can be read and mean the
same everywhere."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from halos_nb import show
from halos_nb.show import (
    number_text,
    pairs_table,
    render,
    samples_table,
    spread,
    summary_table,
    visible,
)
from halos_nb.stats import share_interval

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></td></table><iframe src='//x'>",
    '" onmouseover="alert(1)',
    "' style='x' autofocus onfocus='y",
    "<!-- ",
    "<![CDATA[",
    "&lt;b&gt; &#60;script&#62;",
    "[x](javascript:alert(1)) **bold** $x$ `c`",
    "{{ 7 * 7 }} {% raw %}",
    "\x1b]8;;http://x\x07link\x1b]8;;\x07",
    "a\u202eb\u2066c\u200bd\ufeff\x00\x85\u2028",
    "\ud800",
    "<details open ontoggle=alert(1)>",
    "<svg/onload=alert(1)>",
    "\n\n  indented\r\n\ttab",
]
TAGS = {
    "div",
    "p",
    "b",
    "details",
    "summary",
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "pre",
}
ATTRIBUTES = {"class", "style", "open", "dir"}


class Page(HTMLParser):
    "Tags, attributes, texts of <pre>, and all text of a page."

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags = []
        self.attributes = set()
        self.values = set()
        self.boxes = []
        self.text = ""
        self.stack = []
        self.feed(str(page))  # a Markup would escape what is added to it
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.stack.append(tag)
        self.attributes |= {k for k, _ in attrs}
        self.values |= {v for _, v in attrs}
        if tag == "pre":
            self.boxes.append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"unbalanced {tag}"

    def handle_comment(self, data):
        pytest.fail(f"a comment: {data}")

    def handle_decl(self, decl):
        pytest.fail(f"a declaration: {decl}")

    def unknown_decl(self, data):
        pytest.fail(f"a declaration: {data}")

    def handle_pi(self, data):
        pytest.fail(f"an instruction: {data}")

    def handle_data(self, data):
        self.text += data
        if "pre" in self.stack:
            self.boxes[-1] += data


def turns(text, role="assistant"):
    return [dict(role=role, content=text)]


def pair(a, b, prompt="p", label=1, **more):
    return dict(
        prompt_id=prompt,
        prompt=turns(prompt, "user"),
        output_A=turns(a),
        output_B=turns(b),
        label=label,
        reward_A=1.0,
        reward_B=0.5,
        **more,
    )


def acts(character):
    "Would the character do something instead of appearing?"
    if character in "\n\t":
        return False
    return ord(character) < 32 or character in "\x7f\x85\u202e\u2066\u200b\u2028\ufeff\ud800"


def check_inert(shown, like, texts):
    "The page has the structure of a harmless one, and each text stands in it as itself."
    page, plain = Page(shown.html), Page(like.html)
    assert not page.stack
    assert page.tags == plain.tags
    assert page.attributes == plain.attributes
    assert page.values == plain.values
    assert set(page.tags) <= TAGS
    assert page.attributes <= ATTRIBUTES
    for text in texts:
        assert "\n" + visible(text) in page.boxes
    for out in (shown.html, shown.text):
        assert not any(acts(character) for character in out)
        out.encode()


def shape(text):
    "A harmless text with the same words and lines: a short prompt stands in one line."
    return re.sub(r"\S", "x", visible(text))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert_in_pairs(text):
    shown = pairs_table([pair(text, text, prompt=text)], title=text)
    check_inert(shown, pairs_table([pair("a", "b", prompt=shape(text))]), [text] * 3)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert_in_samples(text):
    conversation = [*turns("s", "system"), *turns(text, text)]
    sample = dict(prompt_id=text, prompt=conversation, output=text, reward=1.0)
    plain = dict(prompt_id="x", prompt=conversation, output="o", reward=1.0)
    plain["prompt"] = [turn | dict(content=shape(turn["content"])) for turn in conversation]
    check_inert(samples_table([sample], title=text), samples_table([plain]), [text])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert_in_tables(text):
    shown = summary_table([{text: text, "n": 1}], title=text)
    check_inert(shown, summary_table([{"k": "v", "n": 1}], title="t"), [])


@pytest.mark.parametrize("text", HOSTILE)
def test_a_template_escapes_what_it_is_given(text):
    "Whoever renders a template need not remember to."
    made = render("table.html", title=text, heads=[text], cells=[[text]], right=[False])
    page = Page(made)
    assert set(page.tags) <= TAGS
    assert page.text.replace("\r", "").count(visible(text)) == 3


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_stands_as_itself(text):
    check_inert(pairs_table([pair(text, "b")]), pairs_table([pair("a", "b")]), [text])
    assert visible(text).count("\n") == text.count("\n")


def test_preferred_is_marked_and_missing_is_a_dash():
    page = Page(pairs_table([pair("a", "b", label=0)]).html)
    assert "B ✓ preferred" in page.text and "A ✓" not in page.text
    assert any(value and f"solid {show.CHOSEN}" in value for value in page.values)
    human = pairs_table([pair("a", "b") | dict(reward_A=None, reward_B=None)])
    assert "reward –" in human.text and "margin –" in human.text
    samples = [dict(prompt_id=1, prompt="p", output="o", reward=r) for r in (1.0, None)]
    answers = samples_table(samples).text.split("---")[1:]
    assert [answer.count("reward") for answer in answers] == [1, 1]
    bundle = pairs_table([pair("a", "b")])._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_word_diff_keeps_both_texts(a, b):
    """Without the marked insertions and deletions both sides are the same text; with them each
    side is its own, escaped."""
    left, right = show.word_diff(a, b)
    for marked, text in ((left, a), (right, b)):
        page = Page(f"<div>{marked}</div>")
        assert set(page.tags) <= {"div", "ins", "del"}
        assert page.text.replace("\r", "") == visible(text).replace("\r", "")
    kept_left = re.sub("<del>.*?</del>", "", left, flags=re.S)
    kept_right = re.sub("<ins>.*?</ins>", "", right, flags=re.S)
    assert kept_left == kept_right
    assert "<ins>" not in left and "<del>" not in right
    assert a != b or "<del>" not in left


def test_display_mode_is_decided_in_one_place(monkeypatch):
    monkeypatch.delenv("HALOS_NB_MODE", raising=False)
    assert show.display_mode() == "static"  # no kernel here
    monkeypatch.setenv("HALOS_NB_MODE", "widget")
    assert show.display_mode() == "widget"
    assert show.display_mode("static") == "static"
    monkeypatch.setenv("HALOS_NB_MODE", "film")
    with pytest.raises(ValueError, match="film"):
        show.display_mode()


def luminance(colour):
    "WCAG 2.1: relative luminance of #rrggbb."
    parts = []
    for i in (1, 3, 5):
        c = int(colour[i : i + 2], 16) / 255
        parts.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


MEANINGS = ["CHOSEN", "REJECTED", "REFERENCE", "TRUTH", "SCORE", "HELD_OUT", "DISTANCE"]


def test_colours_can_be_read_on_light_and_dark():
    """WCAG: 4.5 for text, 3 for lines and areas; what means something keeps its colour on both
    pages."""
    dark = show.DARK[show.PAPER]
    assert contrast(show.INK, "#FFFFFF") > 7
    assert contrast(show.DARK[show.INK], dark) > 7
    assert contrast(show.CAPTION, "#FFFFFF") > 4.5
    assert contrast(show.DARK[show.CAPTION], dark) > 4.5
    for name in MEANINGS:
        colour = getattr(show, name)
        assert contrast(colour, "#FFFFFF") >= 3 and contrast(colour, dark) >= 3, name
        assert colour not in show.DARK


def test_spread_covers_the_margins():
    pairs = [pair("a", "b") | dict(reward_A=float(m), reward_B=0.0) for m in range(101)]
    pairs.append(pair("a", "b") | dict(reward_A=None))
    found = [p["reward_A"] for p in spread(pairs, 5)]
    assert len(found) == 5
    assert found[0] == 100 and found[-1] is None
    assert spread(pairs[:2], 9) == [pairs[1], pairs[0]]


def test_summary_table():
    accuracy = share_interval(8, 10)
    rows = [
        dict(name="a", n=12345, accuracy=0.932, lr=5e-7),
        dict(name="b", n=np.int64(3), accuracy=accuracy, kl=None),
    ]
    text = summary_table(rows, formats={"accuracy": ".1%"}).text
    # 8 of 10: the published ends, see test_stats
    for expected in ("12,345", "93.2%", "80.0% [44.4%, 97.5%]", "5e-07", "–", "kl"):
        assert expected in text
    assert summary_table([]).text == ""
    assert number_text(share_interval(0, 0)) == "–"

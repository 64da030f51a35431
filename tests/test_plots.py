"""Figures show the numbers they were given, tables show text and nothing else, and a saved notebook keeps both."""

import json, os, re, subprocess, sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from halos_nb import figures, show
from halos_nb.stats import share_interval, mean_interval
from halos_nb.show import pairs_table, samples_table, spread, summary_table, visible
from halos_nb.figures import (
    margin_histogram,
    reward_distributions,
    score_distributions,
    training_curves,
)
from halos_nb.stats import calibration_table
from halos_nb.rewards import calibration_curve, kl_curve, reward_scatter, reward_vs_true

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
        self.tags, self.attributes, self.boxes, self.text, self.stack, self.values = (
            [],
            set(),
            [],
            "",
            [],
            set(),
        )
        self.feed(page)
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


def check_inert(shown, like, texts):
    "The page has the structure of one made of harmless text, and each text stands in it as itself."
    page, plain = Page(shown.html), Page(like.html)
    assert (
        not page.stack
        and page.tags == plain.tags
        and page.attributes == plain.attributes
        and page.values == plain.values
    )
    assert set(page.tags) <= TAGS and page.attributes <= ATTRIBUTES
    for t in texts:
        assert "\n" + visible(t) in page.boxes
    for out in (shown.html, shown.text):
        assert not any(
            ord(c) < 32
            and c not in "\n\t"
            or c in "\x7f\x85\u202e\u2066\u200b\u2028\ufeff\ud800"
            for c in out
        )
    shown.html.encode(), shown.text.encode()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert(text):
    check_inert(
        pairs_table([pair(text, text, prompt=text)], title=text),
        pairs_table([pair("a", "b")]),
        [text] * 3,
    )
    sample = dict(
        prompt_id=text,
        prompt=[*turns("s", "system"), *turns(text, text)],
        output=text,
        reward=1.0,
    )
    check_inert(
        samples_table([sample], title=text),
        samples_table([dict(prompt_id="x", prompt=turns("q"), output="o", reward=1.0)]),
        [text],
    )
    check_inert(
        summary_table([{text: text, "n": 1}], title=text),
        summary_table([{"k": "v", "n": 1}]),
        [],
    )
    for fig in (
        reward_distributions({text: [1.0, 2.0]}),
        training_curves({text: [dict(loss=1.0)], "b": [dict(loss=1.0)]}),
        kl_curve({text: [dict(policy_logps=1, reference_logps=0)]}),
    ):
        strings = json.dumps(json.loads(fig.to_json()))
        assert (
            "<script" not in strings
            and "<img" not in strings
            and "<svg" not in strings
            and "\\u202e" not in strings
        )


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_stands_as_itself(text):
    check_inert(pairs_table([pair(text, "b")]), pairs_table([pair("a", "b")]), [text])
    assert "\n" not in text or visible(text).count("\n") == text.count("\n")


def test_preferred_is_marked_and_missing_is_a_dash():
    page = Page(pairs_table([pair("a", "b", label=0)]).html).text
    assert "B ✓ preferred" in page and "A ✓" not in page
    human = pairs_table([pair("a", "b") | dict(reward_A=None, reward_B=None)])
    assert "reward –" in human.text and "margin –" in human.text
    assert [
        s.count("reward")
        for s in samples_table(
            [dict(prompt_id=1, prompt="p", output="o", reward=r) for r in (1.0, None)]
        ).text.split("---")
    ][1:] == [1, 1]
    assert set(pairs_table([pair("a", "b")])._repr_mimebundle_()) == {"text/html", "text/plain"}


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_word_diff_keeps_both_texts(a, b):
    "Without the marked insertions and deletions both sides are the same text; with them each side is its own, escaped."
    left, right = show.word_diff(a, b)
    for marked, text in ((left, a), (right, b)):
        page = Page(f"<div>{marked}</div>")
        assert set(page.tags) <= {"div", "ins", "del"} and page.text.replace(
            "\r", ""
        ) == visible(text).replace("\r", "")
    assert re.sub("<del>.*?</del>", "", left, flags=re.S) == re.sub(
        "<ins>.*?</ins>", "", right, flags=re.S
    )
    assert "<ins>" not in left and "<del>" not in right and (a != b or "<del>" not in left)


def test_display_mode_is_decided_in_one_place(monkeypatch):
    monkeypatch.delenv("HALOS_NB_MODE", raising=False)
    assert show.display_mode() == "static"  # no kernel here
    monkeypatch.setenv("HALOS_NB_MODE", "widget")
    assert show.display_mode() == "widget" and show.display_mode("static") == "static"
    monkeypatch.setenv("HALOS_NB_MODE", "film")
    with pytest.raises(ValueError, match="film"):
        show.display_mode()


def luminance(colour):  # WCAG 2.1, relative luminance of #rrggbb
    r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a, b):
    hi, lo = sorted((luminance(a), luminance(b)), reverse=True)
    return (hi + 0.05) / (lo + 0.05)


def test_colours_can_be_read_on_light_and_dark():
    "WCAG: 4.5 for text, 3 for lines and areas; what means something keeps its colour on both pages."
    dark = show.DARK["white"]
    assert contrast(show.INK, "#FFFFFF") > 7 and contrast(show.DARK[show.INK], dark) > 7
    assert contrast(show.PALE, "#FFFFFF") > 4.5 and contrast(show.DARK[show.PALE], dark) > 4.5
    for c in (show.CHOSEN, show.REJECTED, show.REFERENCE, show.TRUTH):
        assert contrast(c, "#FFFFFF") >= 3 and contrast(c, dark) >= 3, c


def test_a_colour_means_the_same_everywhere():
    assert figures.LINES["chosen"] == show.CHOSEN and figures.LINES["rejected"] == show.REJECTED
    both = score_distributions([1.0, 2.0], [0.0, 1.0])
    assert [t.line.color for t in both.data] == [show.CHOSEN, show.REJECTED]
    assert len({show.CHOSEN, show.REJECTED, show.REFERENCE, show.TRUTH}) == 4


def test_spread_covers_the_margins():
    pairs = [pair("a", "b") | dict(reward_A=float(m), reward_B=0.0) for m in range(101)] + [
        pair("a", "b") | dict(reward_A=None)
    ]
    got = [p["reward_A"] for p in spread(pairs, 5)]
    assert got[0] == 100 and got[-1] is None and len(got) == 5
    assert spread(pairs[:2], 9) == [pairs[1], pairs[0]]


def test_summary_table():
    rows = [
        dict(name="a", n=12345, accuracy=0.932, lr=5e-7),
        dict(name="b", n=np.int64(3), accuracy=share_interval(8, 10), kl=None),
    ]
    text = summary_table(rows, formats={"accuracy": ".1%"}).text
    assert all(
        t in text for t in ("12,345", "93.2%", "80.0% [44.4%, 97.5%]", "5e-07", "–", "kl")
    )
    assert summary_table([]).text == ""


def test_bootstrap_covers():
    rng, hits, hits_by_prompt = np.random.default_rng(0), 0, 0
    prompts = np.repeat(np.arange(40), 4)
    for seed in range(200):
        hits += (i := mean_interval(rng.normal(size=60), seed=seed, draws=400)).low < 0 < i.high
        clustered = np.repeat(rng.normal(size=40), 4) + 0.3 * rng.normal(size=160)
        hits_by_prompt += (
            (i := mean_interval(clustered, prompts, seed=seed, draws=400)).low < 0 < i.high
        )
    assert 180 <= hits <= 200 and 178 <= hits_by_prompt <= 200
    assert mean_interval([1.0, 2.0, None]).value == 1.5 and np.isnan(
        mean_interval([None]).value
    )
    assert mean_interval([0.0, 1.0] * 50) == mean_interval([0.0, 1.0] * 50)


def test_figures_show_the_numbers_given():
    v = np.random.default_rng(0).normal(size=300)
    fig = reward_distributions({"a": list(v), "b": [1.0, None, float("nan")]})
    assert list(fig.data[0].y) == list(v) and list(fig.data[1].y) == [1.0]
    assert (
        list(fig.data[2].y) == [np.median(v), 1.0]
        and fig.data[2].customdata[:, 5].tolist() == [0, 2]
        and "2 unscored" in fig.layout.title.subtitle.text
    )
    hist = margin_histogram(v).data[0]
    assert hist.customdata[:, 2].sum() == 300 and 0.0 in hist.customdata[:, 0]
    assert hist.y[hist.x > 0].sum() == pytest.approx(100 * np.mean(v >= 0))
    both = score_distributions(v, v + 1)
    assert both.data[0].customdata[:, 1].sum() == both.data[1].customdata[:, 1].sum() == 300
    rows = [
        dict(step=i, loss=float(x), **{"rewards_train/chosen": 1.0})
        for i, x in enumerate(v[:30], 1)
    ]
    np.testing.assert_allclose(training_curves(rows).data[0].y, v[:30], rtol=1e-6)
    samples = [
        dict(
            prompt_id=i // 4,
            reward=float(x),
            true_reward=float(-x),
            policy_logps=float(x),
            reference_logps=0.0,
        )
        for i, x in enumerate(v)
    ]
    score, true = reward_vs_true({"r": samples}).data
    assert (
        score.y[0]
        == pytest.approx(v.mean())
        == -true.y[0]
        == kl_curve({"r": samples}).data[0].y[0]
    )
    assert "Spearman -1.000" in reward_scatter(samples).layout.title.subtitle.text


def test_training_curves_over_rounds():
    fig = training_curves(
        {
            f"round {r}": [dict(step=s, loss=1.0, eval_loss=2.0) for s in (1, 2, 3)]
            for r in range(3)
        }
    )
    assert fig.data[0].x.tolist() == list(range(1, 10)) and [
        s.x0 for s in fig.layout.shapes if s.xref == "x"
    ] == [3.5, 6.5]
    assert {t.name for t in fig.data if t.showlegend} == {"train", "held out"}
    long = training_curves([dict(loss=float(i == 31_337)) for i in range(100_000)])
    assert all(len(t.x) <= 2000 for t in long.data) and long.data[0].y.max() == 1


def test_figures_stay_small():
    rng = np.random.default_rng(0)
    big = rng.normal(size=100_000)
    samples = [
        dict(prompt_id=i // 4, reward=x, true_reward=x) for i, x in enumerate(big.tolist())
    ]
    lines = [
        {k: float(x) for panel in figures.CURVES.values() for k in panel.values()}
        for x in big[:20_000]
    ]
    for fig in (
        reward_distributions({str(i): big for i in range(12)}),
        score_distributions(big, -big),
        margin_histogram(big),
        calibration_curve(big),
        reward_vs_true({"r": samples}),
        reward_scatter(samples),
    ):
        assert len(fig.to_json()) < 150_000
    assert len(training_curves(lines).to_json()) < 700_000
    assert (
        "shapes from 501 quantiles"
        in reward_distributions({"a": big}).layout.title.subtitle.text
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: reward_distributions({}),
        lambda: reward_distributions({"a": []}),
        lambda: margin_histogram([]),
        lambda: margin_histogram([0.0] * 3),
        lambda: score_distributions([], [None]),
        lambda: training_curves([]),
        lambda: training_curves({"a": [], "b": [dict(loss=1)]}),
        lambda: kl_curve({}),
        lambda: kl_curve({"a": [{}]}),
        lambda: reward_vs_true({"a": [{}], "b": []}, best=1),
        lambda: reward_scatter([]),
        lambda: reward_scatter([dict(reward=1, true_reward=1)]),
        lambda: calibration_curve([]),
        lambda: calibration_curve([1.0]),
    ],
)
def test_nothing_to_show_is_a_figure(make):
    fig = make()
    assert (
        fig.layout.title.text
        and fig.layout.title.subtitle.text
        and fig.layout.template.layout.modebar.remove == ("sendChartToCloud",)
    )
    json.loads(fig.to_json())


def test_calibration():
    rng = np.random.default_rng(0)
    m = rng.normal(0, 2, 5000)
    m = np.where(rng.random(5000) < 1 / (1 + np.exp(-np.abs(m))), np.abs(m), -np.abs(m))
    rows = calibration_table(m)
    assert (
        sum(r["n"] for r in rows) == 5000
        and sum(r["observed"].low <= r["predicted"] <= r["observed"].high for r in rows) >= 8
    )
    fig = calibration_curve(m)
    assert list(fig.data[1].y) == [r["observed"].value for r in rows] and list(
        fig.data[1].x
    ) == [r["predicted"] for r in rows]


def saved_outputs(tmp_path, **env):
    "The outputs of a two-cell notebook after it was executed and saved."
    import nbformat

    path = tmp_path / "two.ipynb"
    cells = [
        "from halos_nb.figures import setup_display, margin_histogram\nprint(setup_display())",
        "margin_histogram([1, 2, -1])",
    ]
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), path
    )
    run = (
        "import nbformat, nbclient, sys; nb = nbformat.read(sys.argv[1], 4); "
        "nbclient.NotebookClient(nb, timeout=120, kernel_name='python3').execute(); "
        "nbformat.write(nb, sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", run, path], check=True, env=os.environ | env, timeout=180
    )
    return [c["outputs"] for c in json.loads(path.read_text())["cells"]]


def browser() -> bool:
    from choreographer.browsers.chromium import Chromium

    return bool(Chromium.find_browser(skip_local=False))


def test_saved_notebook_shows_its_figures(tmp_path):
    if not browser() and os.environ.get("CI") != "true":
        pytest.skip("no Chromium for kaleido on this machine (CI=true makes this an error)")
    first, second = saved_outputs(tmp_path)
    assert "plotly_mimetype+png" in "".join(first[0]["text"]) and not [
        o for o in first + second if o.get("name") == "stderr"
    ]
    assert {"image/png", "application/vnd.plotly.v1+json"} <= set(second[0]["data"]) and len(
        second[0]["data"]["image/png"]
    ) > 5000


def test_without_a_browser_it_says_so(tmp_path):
    first, second = saved_outputs(tmp_path, BROWSER_PATH=str(tmp_path / "none"))
    assert "No browser" in "".join(first[0]["text"]) and "apt-get install chromium" in "".join(
        first[0]["text"]
    )
    assert (
        "application/vnd.plotly.v1+json" in second[0]["data"]
        and "image/png" not in second[0]["data"]
    )

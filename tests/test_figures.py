"""Figures show the numbers they were given and stay small, and a saved notebook keeps them."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import plotly.graph_objects as go
import pytest
from test_show import HOSTILE

from halos_nb import figures, show
from halos_nb.figures import (
    NotebookRenderer,
    margin_histogram,
    reward_distributions,
    score_distributions,
    training_curves,
    within,
)
from halos_nb.rewards import (
    agreement_figure,
    calibration_curve,
    kl_curve,
    reward_scatter,
    reward_vs_true,
)
from halos_nb.stats import calibrate, compare_labellers, share_interval


def subtitle(fig):
    return fig.layout.title.subtitle.text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert_in_figures(text):
    pair = ("p", 0, 1)
    for fig in (
        reward_distributions({text: [1.0, 2.0]}),
        training_curves({text: [dict(loss=1.0)], "b": [dict(loss=1.0)]}),
        kl_curve({text: [dict(policy_logps=1, reference_logps=0)]}),
        agreement_figure(compare_labellers({text: {pair: 1.0}, "b": {pair: 2.0}}, draws=2)),
    ):
        strings = json.dumps(json.loads(fig.to_json()))
        for active in ("<script", "<img", "<svg", "\\u202e"):
            assert active not in strings


def test_a_colour_means_the_same_everywhere():
    assert figures.LINES["chosen"] == show.CHOSEN
    assert figures.LINES["rejected"] == show.REJECTED
    both = score_distributions([1.0, 2.0], [0.0, 1.0])
    assert [t.line.color for t in both.data] == [show.CHOSEN, show.REJECTED]
    kl = kl_curve({"a": [dict(policy_logps=1, reference_logps=0)]})
    assert kl.data[0].line.color == show.DISTANCE
    assert len({show.CHOSEN, show.REJECTED, show.REFERENCE, show.TRUTH}) == 4


def test_rewards_shown_are_those_given():
    v = np.random.default_rng(0).normal(size=300)
    fig = reward_distributions({"a": list(v), "b": [1.0, None, float("nan")]})
    first, second, medians = fig.data
    assert list(first.y) == list(v)
    assert list(second.y) == [1.0]
    assert list(medians.y) == [np.median(v), 1.0]
    assert medians.customdata[:, 5].tolist() == [0, 2]
    assert "2 unscored" in subtitle(fig)


def test_histograms_count_everything():
    v = np.random.default_rng(0).normal(size=300)
    histogram = margin_histogram(v).data[0]
    assert histogram.customdata[:, 2].sum() == 300
    assert 0.0 in histogram.customdata[:, 0]
    assert histogram.y[histogram.x > 0].sum() == pytest.approx(100 * np.mean(v >= 0))
    assert f"{share_interval((v > 0).sum(), 300):.1%}" in subtitle(margin_histogram(v))
    chosen, rejected = score_distributions(v, v + 1).data
    assert chosen.customdata[:, 1].sum() == rejected.customdata[:, 1].sum() == 300


def test_means_shown_are_those_of_the_samples():
    v = np.random.default_rng(0).normal(size=300)
    samples = []
    for i, x in enumerate(v.tolist()):
        sample = dict(prompt_id=i // 4, reward=x, true_reward=-x)
        samples.append(sample | dict(policy_logps=x, reference_logps=0.0))
    score, true = reward_vs_true({"r": samples}).data
    assert score.y[0] == pytest.approx(v.mean())
    assert true.y[0] == -score.y[0]
    assert kl_curve({"r": samples}).data[0].y[0] == score.y[0]
    assert "Spearman −1.000" in subtitle(reward_scatter(samples))


def test_training_curves_show_the_metrics():
    v = np.random.default_rng(0).normal(size=30)
    rows = []
    for i, x in enumerate(v.tolist(), 1):
        rows.append({"step": i, "loss": x, "rewards_train/chosen": 1.0})
    np.testing.assert_allclose(training_curves(rows).data[0].y, v, rtol=1e-6)


def test_training_curves_over_rounds():
    rows = [dict(step=s, loss=1.0, eval_loss=2.0) for s in (1, 2, 3)]
    fig = training_curves({f"round {r}": rows for r in range(3)})
    assert fig.data[0].x.tolist() == list(range(1, 10))
    assert [s.x0 for s in fig.layout.shapes if s.xref == "x"] == [3.5, 6.5]
    assert [t.name for t in fig.data if t.showlegend] == ["train", "held out"]
    long = training_curves([dict(loss=float(i == 31_337)) for i in range(100_000)])
    assert all(len(t.x) <= 2000 for t in long.data)
    assert long.data[0].y.max() == 1


def test_figures_stay_small():
    big = np.random.default_rng(0).normal(size=100_000)
    samples = []
    for i, x in enumerate(big.tolist()):
        samples.append(dict(prompt_id=i // 4, reward=x, true_reward=x))
    for fig in (
        reward_distributions({str(i): big for i in range(12)}),
        score_distributions(big, -big),
        margin_histogram(big),
        calibration_curve(big),
        reward_vs_true({"r": samples}),
        reward_scatter(samples),
    ):
        assert len(fig.to_json()) < 150_000
    assert "shapes from 501 quantiles" in subtitle(reward_distributions({"a": big}))


def test_training_curves_stay_small():
    keys = [key for panel in figures.CURVES.values() for key in panel.values()]
    values = np.random.default_rng(0).normal(size=20_000).tolist()
    lines = [dict.fromkeys(keys, value) for value in values]
    assert len(training_curves(lines).to_json()) < 700_000


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
        lambda: agreement_figure([]),
    ],
)
def test_nothing_to_show_is_a_figure(make):
    fig = make()
    assert fig.layout.title.text
    assert subtitle(fig)
    assert fig.layout.template.layout.modebar.remove == ("sendChartToCloud",)
    json.loads(fig.to_json())


def test_calibration_curve_shows_the_calibration():
    rng = np.random.default_rng(0)
    m = np.abs(rng.normal(0, 2, 5000))
    m = np.where(rng.random(5000) < 1 / (1 + np.exp(-m)), m, -m)
    found = calibrate(m)
    assert sum(b.pairs for b in found.bins) == 5000
    assert sum(b.right.low <= b.claimed <= b.right.high for b in found.bins) >= 8
    fig = calibration_curve(m)
    curve = fig.data[1]
    assert list(curve.y) == [b.right.value for b in found.bins]
    assert list(curve.x) == [b.claimed for b in found.bins]
    lower = curve.y - curve.error_y.arrayminus
    np.testing.assert_allclose(lower, [b.right.low for b in found.bins])
    assert f"Brier {found.brier.value:.3f}" in subtitle(fig)


RUN = """
import nbformat, nbclient, sys
nb = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(nb, timeout=120, kernel_name="python3").execute()
nbformat.write(nb, sys.argv[1])
"""


def saved_outputs(tmp_path, **env):
    "The outputs of a two-cell notebook after it was executed and saved."
    import nbformat

    path = tmp_path / "two.ipynb"
    sources = [
        "from halos_nb.figures import setup_display, margin_histogram\nprint(setup_display())",
        "margin_histogram([1, 2, -1])",
    ]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    command = [sys.executable, "-c", RUN, path]
    subprocess.run(command, check=True, env=os.environ | env, timeout=180)
    return [cell["outputs"] for cell in json.loads(path.read_text())["cells"]]


def browser() -> bool:
    from choreographer.browsers.chromium import Chromium

    return bool(Chromium.find_browser(skip_local=False))


def test_saved_notebook_shows_its_figures(tmp_path):
    if not browser() and os.environ.get("CI") != "true":
        pytest.skip("no Chromium for kaleido on this machine (CI=true makes this an error)")
    first, second = saved_outputs(tmp_path)
    assert "halos_nb_png" in "".join(first[0]["text"])
    assert not [o for o in first + second if o.get("name") == "stderr"]
    data = second[0]["data"]
    assert {"text/html", "application/vnd.plotly.v1+json"} <= set(data)
    assert "image/png" not in data  # JupyterLab would show it first, cut at the right
    page = "".join(data["text/html"])
    assert len(page) > 5000
    assert "max-width: 100%" in page and 'alt="Margin of chosen over rejected' in page


def test_without_a_browser_it_says_so(tmp_path):
    first, second = saved_outputs(tmp_path, BROWSER_PATH=str(tmp_path / "none"))
    said = "".join(first[0]["text"])
    assert "No browser" in said
    assert "apt-get install chromium" in said
    assert "application/vnd.plotly.v1+json" in second[0]["data"]
    assert "text/html" not in second[0]["data"]


class BrowserFailedError(RuntimeError):
    "As choreographer's."


@pytest.mark.parametrize("failures, pictures", [(1, 2), (4, 0)])
def test_a_browser_that_dies_is_started_once_more(failures, pictures, monkeypatch, capsys):
    "Then the figure stays without its PNG, which is said once, and nothing is lost."
    tried = []

    def draw(self, kind, **size):
        tried.append(kind)
        if len(tried) <= failures:
            raise BrowserFailedError("The browser seemed to close immediately")
        return b"picture"

    monkeypatch.setattr(go.Figure, "to_image", draw)
    renderer = NotebookRenderer(900)
    figure = margin_histogram([1, 2, -1]).to_dict()
    bundles = [renderer.to_mimebundle(figure) for _ in range(2)]
    assert all("application/vnd.plotly.v1+json" in bundle for bundle in bundles)
    assert sum("text/html" in bundle for bundle in bundles) == pictures
    assert len(tried) == (3 if pictures else 2)  # after two failures nobody waits again
    said = capsys.readouterr().out
    assert said.count("BrowserFailedError") == (0 if pictures else 1), said


def test_a_browser_that_never_answers_is_left(monkeypatch):
    gate = threading.Event()
    with pytest.raises(TimeoutError, match="0.1 s"):
        within(0.1, gate.wait)
    gate.set()
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"])

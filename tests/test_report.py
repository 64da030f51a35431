"Reward views, comparer and report page: the files' numbers, nothing lost, model text is text."

import csv
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_show import HOSTILE, turns

from halos_nb import rewards
from halos_nb.compare import (
    RunComparer,
    csv_cell,
    differing,
    flatten,
    same_prompt,
    shared_prompts,
)
from halos_nb.configs import LoopConfig
from halos_nb.settings import Settings
from halos_nb.loop import run_rounds
from halos_nb.runs import read_runs, run_summary
from halos_nb.page import report
from halos_nb.show import visible, word_diff
from halos_nb.records import read_jsonl
from halos_nb.stats import slope
from halos_nb.rewards import (
    chosen_rejected,
    length_and_reward,
    reward_against_kl,
    win_rate,
    win_rates,
)

HERE = Path(__file__).resolve().parent
PAYLOADS = [
    *HOSTILE,
    "![x](http://203.0.113.7/a.png)",
    "</textarea><script>window.hit=1</script>",
    "</script><script>window.hit=1</script>",
    "<img src=x onerror='window.hit=1'>",
    "<details open ontoggle='window.hit=1'>x</details>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Runs of the loop over stages without a model: two seeds, another threshold; and no run."
    from halos_nb import ledger

    tmp, patch = tmp_path_factory.mktemp("compared"), pytest.MonkeyPatch()
    real = ledger.launch
    patch.setattr(
        ledger,
        "launch",
        lambda stage, cfg, profile, folder, module, **k: real(
            stage, cfg, profile, folder, "pretend", **k
        ),
    )
    # nothing is preloaded
    patch.setattr(ledger, "prepare", lambda *asked: True)
    patch.setenv("PYTHONPATH", str(HERE))
    for name in ("sft", "rm"):
        (tmp / name).mkdir()
        (tmp / name / "weights").write_text(name)
    (tmp / "prompts.json").write_text("[]")
    for name, more in (
        ("one", {}),
        ("two", dict(seed=1)),
        ("wide", dict(threshold=0.9, train_options="gamma_beta_ratio=0.3")),
    ):
        cfg = LoopConfig(
            run_name=name,
            lr=3e-4,
            total_prompts=8,
            prompts_per_round=4,
            num_samples_per_prompt=3,
            sft_checkpoint=str(tmp / "sft"),
            reward_checkpoint=str(tmp / "rm"),
            prompts=str(tmp / "prompts.json"),
            **more,
        )
        list(
            run_rounds(
                cfg,
                Settings(runs_dir=str(tmp / "runs")),
                watch=lambda job, **k: job.wait(show=False),
            )
        )
    (tmp / "runs/playground").mkdir()
    yield tmp / "runs"
    patch.undo()


def rows(prompt, *scores):
    return [dict(prompt_id=prompt, reward=s, output="x") for s in scores]


def test_win_rate_is_the_share_of_pairs_won():
    rng = np.random.default_rng(0)
    a, b = (
        [
            dict(prompt_id=f"{side}{i // 3}", reward=float(x))
            for i, x in enumerate(rng.integers(0, 5, 900))
        ]
        for side in "ab"
    )
    x, y = (np.array([r["reward"] for r in rs]) for rs in (a, b))
    expected = (x[:, None] > y).mean() + 0.5 * (x[:, None] == y).mean()
    assert win_rate(a, b).value == pytest.approx(expected, abs=1e-12)
    assert win_rate(a, b).value + win_rate(b, a).value == pytest.approx(1)
    paired = [dict(prompt_id=i // 2, reward=float(v)) for i, v in enumerate(x)]
    other = [dict(prompt_id=i // 2, reward=float(v)) for i, v in enumerate(y)]
    by_hand = np.mean(
        [
            np.mean([(p > q) + 0.5 * (p == q) for p in x[i : i + 2] for q in y[i : i + 2]])
            for i in range(0, 900, 2)
        ]
    )
    assert win_rate(paired, other).value == pytest.approx(by_hand)


def test_win_rate_interval_covers():
    "Of 200 draws about 95% of the intervals hold the truth; answers of a prompt are alike."
    # P(N(0.5, 2) > N(0, 2)) = Phi(0.5 / sqrt(2 * 2))
    rng, truth, hits = np.random.default_rng(1), 0.6382, 0
    from math import erf

    truth = 0.5 * (1 + erf(0.5 / 2 / 2**0.5))

    def draw(shift, side):
        return [
            dict(prompt_id=f"{side}{i // 3}", reward=float(v))
            for i, v in enumerate(
                shift + np.repeat(rng.normal(size=60), 3) + rng.normal(size=180)
            )
        ]

    for seed in range(200):
        hits += (
            (i := win_rate(draw(0.5, "a"), draw(0.0, "b"), seed=seed, draws=300)).low
            < truth
            < i.high
        )
    assert 180 <= hits <= 199


def test_many_prompts_are_grouped_without_changing_the_result():
    rng = np.random.default_rng(2)
    a, b = (
        [
            dict(prompt_id=f"{s}{i}", reward=float(v))
            for i, v in enumerate(rng.normal(m, 1, 3000))
        ]
        for s, m in (("a", 0.3), ("b", 0))
    )
    x, y = np.array([r["reward"] for r in a]), np.sort([r["reward"] for r in b])
    i = win_rate(a, b)
    # 2 * 1.96 * sqrt(1 / (12 n) * 2) = 0.029
    assert i.value == pytest.approx(np.searchsorted(y, x).mean() / 3000)
    assert 0.02 < i.high - i.low < 0.04
    assert win_rates({"r0": b, "r1": a}).data[0].y[1] == i.value


def test_slopes_are_least_squares_and_their_intervals_cover():
    rng = np.random.default_rng(0)
    x = rng.normal(size=300)
    y = 2 + 0.7 * x + rng.normal(size=300)
    assert slope(x, y, range(300), False).value == pytest.approx(np.polyfit(x, y, 1)[0])
    g, hits = np.repeat(np.arange(50), 4), 0
    for seed in range(200):
        effect = np.repeat(rng.normal(size=50), 4)
        x = effect + rng.normal(size=200)
        y = 0.5 * x + 3 * effect + rng.normal(size=200)
        hits += (i := slope(x, y, g, True, seed, 300)).low < 0.5 < i.high
    assert 180 <= hits <= 199  # 0.5 is the slope within groups; the raw one is about 2
    same = slope([3.0] * 8, range(8), [0, 0, 1, 1, 2, 2, 3, 3], True)
    assert np.isnan(same.value)  # all of one length: no slope, and no error


def test_length_control_takes_out_what_length_gave():
    "Scores that are length alone: with the first round's length nothing was gained."
    rng = np.random.default_rng(0)
    made = lambda r: [
        dict(prompt_id=f"{r}{i // 4}", output="w " * n, reward=0.1 * n)
        for i, n in enumerate(rng.poisson(10 + 5 * r, 200))
    ]
    as_it_is, equal = (
        t.y for t in length_and_reward({f"round {r}": made(r) for r in range(3)}).data[-2:]
    )
    assert as_it_is[2] - as_it_is[0] > 0.8
    assert np.ptp(equal) < 1e-9


def test_the_legend_names_what_colours_mean_and_nothing_else():
    pair = dict(output_A=[], output_B=[], label=1, reward_A=2.0, reward_B=1.0)
    fig = rewards.chosen_rejected_all({"a": (rows("p", 1.0, 2.0), [pair])})
    named = [trace.name for trace in fig.data if trace.showlegend is not False]
    assert named == ["all samples", "chosen", "rejected"]


def test_views_count_what_they_leave_out():
    rounds = {
        "a": [*rows("p", 1.0, None), dict(prompt_id="q", output="y", reward=2.0)],
        "b": rows("r", None),
    }
    assert "2 unscored left out" in win_rates(rounds).layout.title.subtitle.text
    assert "2 unscored left out" in length_and_reward(rounds).layout.title.subtitle.text
    assert (
        "4 samples without log-probabilities left out"
        in reward_against_kl(rounds).layout.title.subtitle.text
    )
    pair = dict(output_A=[], output_B=[], label=0, reward_A=1.0, reward_B=2.0)
    assert chosen_rejected([pair, pair | dict(label=1)]) == ([2.0, 1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: win_rates({}),
        lambda: win_rates({"a": []}),
        lambda: length_and_reward({"a": [], "b": [dict(output="", reward=None)]}),
        lambda: reward_against_kl({}),
        lambda: reward_against_kl({"a": []}),
        lambda: rewards.chosen_rejected_all({}),
        lambda: rewards.chosen_rejected_all({"a": ([], [])}),
    ],
)
def test_nothing_to_show_is_a_figure(make):
    fig = make()
    assert fig.layout.title.text
    assert fig.layout.template.layout.modebar.remove == ("sendChartToCloud",)
    json.loads(fig.to_json())


def test_views_stay_small():
    rng = np.random.default_rng(0)
    big = {
        f"round {r}": [
            dict(
                prompt_id=f"{r}-{i // 8}",
                output="w " * int(n),
                reward=float(x),
                true_reward=float(x),
                policy_logps=1.0,
                reference_logps=0.0,
            )
            for i, (n, x) in enumerate(zip(rng.poisson(20, 8000), rng.normal(r, 1, 8000)))
        ]
        for r in range(5)
    }
    for fig in (
        win_rates(big),
        length_and_reward(big),
        reward_against_kl(big),
        rewards.chosen_rejected_all({n: (r, []) for n, r in big.items()}),
    ):
        assert len(fig.to_json()) < 200_000


def test_comparer_reads_what_the_loop_wrote(runs):
    both = RunComparer(runs, mode="static")
    assert [r.name for r in both.runs] == ["one", "two", "wide"]
    assert list(both.left_out) == ["playground"]
    for run, row in zip(both.runs, both.rows()):
        summary = run_summary(runs / run.name)
        between = [one for one in summary if one["round"] not in ("start", "final")]
        assert row["rounds"] == len(between) < len(summary)
        assert row["reward"] == summary[-1]["reward"]
        assert row["kl"] == summary[-1]["kl"]
        assert row["gain"] == summary[-1]["reward"] - summary[0]["reward"]
    assert set(both.rows()[0]) - {"run", "rounds", "reward", "kl", "gain", "seconds"} == {
        "seed",
        "threshold",
        "train_options.gamma_beta_ratio",
    }
    assert "playground (no params.json: not a run of the loop)" in both.table().text
    assert "playground" in both.table().html
    assert both.rows(only_differences=False)[2]["train_options.gamma_beta_ratio"] == "0.3"
    assert [t.name for t in both.curves("loss").data] == ["one", "two", "wide"]
    assert list(both.progress("reward").data[0].y) == [
        r["reward"] for r in run_summary(runs / "one")
    ]


def test_table_goes_to_csv_and_back(runs, tmp_path):
    both = RunComparer(runs, mode="static")
    with open(both.to_csv(tmp_path / "t.csv"), newline="") as f:
        read = list(csv.DictReader(f))
    for row, line in zip(both.rows(only_differences=False), read, strict=True):
        assert set(row) <= set(line)
        for k, v in row.items():
            assert line[k] == ("" if v is None else str(csv_cell(v))), k
    assert csv_cell("=HYPERLINK(1)") == "'=HYPERLINK(1)"
    assert csv_cell(-1.5) == -1.5
    assert csv_cell("a,b\n") == "a,b\n"


def test_same_prompt_across_runs(runs):
    shared = shared_prompts(read_runs(runs)[0])
    assert len(shared) == 4
    assert all([n for n, _ in a] == ["one", "two", "wide"] for a in shared.values())
    first = next(iter(shared.values()))
    assert {s["prompt_id"] for _, ss in first for s in ss} == {first[0][1][0]["prompt_id"]}
    shown = same_prompt(first)
    assert shown.text.count("reward 1.000 (median of 3)") == 3
    assert shown.html.count("<td") == 3


def test_every_view_of_a_damaged_run_shows_it_or_names_the_file(runs, tmp_path):
    from damage_views import look

    n = 1000 if os.environ.get("HALOS_NB_LONG") == "soak" else 20
    assert look(runs / "one", tmp_path, n) == []


def test_damaged_runs_are_named_not_fatal(runs, tmp_path):
    import shutil

    shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    (tmp_path / "runs/two/params.json").write_text("{")
    (tmp_path / "runs/wide/final/samples.json").unlink()
    both = RunComparer(tmp_path / "runs", mode="static")
    assert [r.name for r in both.runs] == ["one"]
    assert "params.json cannot be read" in both.left_out["two"]
    assert "missing or damaged" in both.left_out["wide"]
    both.frontier().to_json()
    both.static()
    with pytest.raises(ValueError, match="no run to compare"):
        RunComparer(tmp_path / "runs", ["two"])


@pytest.mark.parametrize(
    "d, expected",
    [({}, {}), ({"a": {"b": {"c": 1}}, "d": 2}, {"a.b.c": 1, "d": 2}), ({"a": {}}, {})],
)
def test_flatten(d, expected):
    assert flatten(d) == expected


def test_differing_sees_type_and_absence():
    assert differing([dict(a=1, b=1, c=[1]), dict(a=True, b=1, c=[1])]) == [
        dict(a=1),
        dict(a=True),
    ]
    assert differing([dict(a=None), {}]) == [dict(a=None), dict(a=None)]


class Seen(HTMLParser):
    "Tags, attributes and text of a page outside scripts and styles."

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], set(), ""
        self.feed(str(page))  # a Markup would escape what is added to it
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {k for k, _ in attrs}

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", PAYLOADS)
def test_hostile_text_is_inert(text):
    "In a diff, side by side, in names of runs: the same elements as of harmless text."
    a, b = word_diff(text, f"{text} more"), word_diff("x", "x more")
    for hostile, plain in zip(a, b):
        assert set(Seen(hostile).tags) <= {"ins", "del"}
        assert set(Seen(plain).tags) <= {
            "ins",
            "del",
        }
    assert Seen(a[1]).text == visible(f"{text} more")

    def page(t):
        return same_prompt(
            [
                (t, [dict(prompt=turns(t), output=t, reward=1.0)]),
                ("b", [dict(prompt=turns(t), output=f"{t} other words", reward=None)]),
            ]
        )

    hostile, plain = Seen(page(text).html), Seen(page("x").html)
    assert [t for t in hostile.tags if t not in ("ins", "del")] == [
        t for t in plain.tags if t not in ("ins", "del")
    ]
    assert hostile.attributes == plain.attributes
    for fig in (
        win_rates({text: rows("a", 1.0), "b": rows("b", 1.0)}),
        length_and_reward({text: rows("a", 1.0, 2.0)}),
        reward_against_kl({text: rows("a", 1.0)}),
    ):
        strings = fig.to_json()
        assert not re.search(r"<(script|img|svg|iframe|details|!--)", strings)
        assert "\\u202e" not in strings


def hostile_run(runs, tmp_path):
    "A run in which all that a model, a file name or a person could have written is hostile."
    import shutil

    run = tmp_path / "runs" / "<img src=x onerror=hit=1>"
    shutil.copytree(runs / "one", run, symlinks=True)
    for i, folder in enumerate(["round-1", "round-2", "final"]):
        samples = json.loads((run / folder / "samples.json").read_text())
        for k, s in enumerate(samples):
            s["output"], s["prompt"] = (
                PAYLOADS[(i + k) % len(PAYLOADS)].encode(errors="replace").decode(),
                turns(PAYLOADS[k % 3], "user"),
            )
        (run / folder / "samples.json").write_text(json.dumps(samples))
        feedback = json.loads((run / folder / "feedback.json").read_text())
        for k, r in enumerate(feedback if folder != "final" else []):
            r["output_A"], r["output_B"] = turns(PAYLOADS[k % 5]), turns(PAYLOADS[-1 - k % 5])
        (run / folder / "feedback.json").write_text(json.dumps(feedback))
    params = json.loads((run / "params.json").read_text())
    params["parameters"]["profile"], params["revision"], params["ended"] = (
        PAYLOADS[0],
        PAYLOADS[-2],
        PAYLOADS[-3],
    )
    (run / "params.json").write_text(json.dumps(params))
    return run


def test_report_stands_alone(runs, tmp_path):
    page = report(
        hostile_run(runs, tmp_path),
        truth=lambda prompt, output: float(len(output) % 3),
        best=2.0,
    )
    text = page.read_text()
    assert page.name == "report.html"
    assert page.stat().st_size < 8e6
    from plotly.offline import get_plotlyjs

    assert text.count(get_plotlyjs()) == 1
    rest = text.replace(get_plotlyjs(), "")
    seen = Seen(re.sub(r"<script.*?</script>", "", rest, flags=re.S))
    assert not {"script", "img", "iframe", "svg", "link", "object", "textarea"} & set(seen.tags)
    assert not any(a.startswith("on") for a in seen.attributes)
    assert "src" not in seen.attributes
    assert set(re.findall(r'href="([^"]*)"', rest)) == set(re.findall(r'href="(#s\d+)"', rest))
    assert "connect-src" not in rest
    assert "default-src 'none'" in rest
    # the two with the page's word
    assert len(re.findall("<script", rest)) == rest.count('<script type="application/json"') + 2
    nonces = set(re.findall(r'nonce="([^"]+)"', rest))
    assert len(nonces) == 1
    assert nonces != set(
        re.findall(
            r'nonce="([^"]+)"', report(runs / "one", tmp_path / "other.html").read_text()
        )
    )
    for heading in (
        "Rounds",
        "Rewards",
        "Margins",
        "Length",
        "Training",
        "KL to the reference",
        "Score and truth",
        "Pairs",
        "Answers of final",
        "What was counted",
        "Parameters",
        "Ledger",
    ):
        assert f">{heading}</h2>" in rest
    for block in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', rest, re.S):
        json.loads(block)


def test_report_says_what_the_files_say(runs, tmp_path):
    page = Seen(report(runs / "wide", tmp_path / "r.html").read_text()).text
    for r in run_summary(runs / "wide"):
        assert f"{r['reward']:.4g}" in page
    assert "gamma_beta_ratio" in page
    assert "0.3" in page
    assert f"{len(read_jsonl(runs / 'wide/ledger.jsonl'))} events" in page
    assert "finished" in page
    with pytest.raises(ValueError, match="report: .*playground: no params.json"):
        report(runs / "playground")


def test_report_of_a_large_run_stays_small(runs, tmp_path):
    "Long texts are cut and say so; a thousand prompts a round do not make the page endless."
    import shutil

    shutil.copytree(runs / "one", tmp_path / "big", symlinks=True)
    for folder in ("round-1", "round-2", "final"):
        samples = json.loads((tmp_path / "big" / folder / "samples.json").read_text())
        many = [
            s | dict(prompt_id=f"{s['prompt_id']}-{i}", output="word " * 4000)
            for i in range(250)
            for s in samples
        ]
        (tmp_path / "big" / folder / "samples.json").write_text(json.dumps(many))
        said = dict(labeller="function:pretend", score=0.5, reason="")
        labels = [said | {key: s[key] for key in ("prompt_id", "sample_id")} for s in many]
        (tmp_path / "big" / folder / "feedback.labels.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in labels)
        )
    page = report(tmp_path / "big")
    assert page.stat().st_size < 8e6
    assert "more characters]" in page.read_text()


def test_package_offers_report_and_stays_light():
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import sys, halos_nb; a = set(sys.modules); print('plotly' in a); "
                "print(callable(halos_nb.report)); print('torch' in sys.modules)"
            ),
        ],
        capture_output=True,
        text=True,
    )
    assert out.stdout.split() == ["False", "True", "False"], out.stderr


def test_driver_runs_and_converts_with_every_figure(runs, tmp_path):
    "Papermill, then nbconvert: each figure is a picture, each text is there, without scripts."
    env = os.environ | {"HALOS_NB_RUNS_DIR": str(runs)}
    driver = HERE.parent / "nbs/compare_runs.ipynb"
    subprocess.run(
        [
            "papermill",
            driver,
            tmp_path / "out.ipynb",
            "-p",
            "csv",
            tmp_path / "t.csv",
            "--no-progress-bar",
        ],
        check=True,
        capture_output=True,
        env=env,
        timeout=180,
    )
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    figures = [
        o["data"]
        for c in cells
        for o in c.get("outputs", [])
        if "application/vnd.plotly.v1+json" in o.get("data", {})
    ]
    assert len(figures) == 4
    assert (tmp_path / "t.csv").exists()
    assert (tmp_path / "out.ipynb").stat().st_size < 3e6
    if not all("data:image/png" in "".join(d.get("text/html", "")) for d in figures):
        pytest.skip("no browser to draw pictures with")
    subprocess.run(
        ["jupyter", "nbconvert", "--to", "html", tmp_path / "out.ipynb"],
        check=True,
        capture_output=True,
        env=env,
        timeout=120,
    )
    page = (tmp_path / "out.html").read_text()
    assert len(re.findall(r"<img[^>]*data:image/png", page)) == 4
    assert "only parameters that differ" in page
    assert page.count("(median of 3)") == 9


def test_runs_are_named_in_one_text_or_in_a_list(runs):
    for names in ("one, wide", ["one", "wide"], "[!t]*e"):
        assert [r.name for r in RunComparer(runs, names, mode="static").runs] == ["one", "wide"]
    with pytest.raises(ValueError, match="no run is called won; did you mean"):
        RunComparer(runs, "won")

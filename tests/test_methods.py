"Every form of feedback goes round online, started as a user starts it."

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import every

from halos_nb.health import Health, alarms
from halos_nb.loop import AlarmError, Breakage
from halos_nb.records import read_jsonl
from halos_nb.runs import last_session

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path(os.environ["HALOS_NB_RUNS_DIR"])  # the playground in it is built once for all tests
# the form of feedback that each method of playground.SWEEP learns from
FORMS = {
    "kto": "binary_feedback",
    "grpo": "scalar_feedback",
    "dpo + LoRA": "pairwise_feedback",
}
# CI has each form of feedback once
if os.environ.get("HALOS_NB_LONG") == "every":
    FORMS |= {"ppo": "binary_feedback", "dpo + humanline": "pairwise_feedback"}


def sweep(out, **parameters):
    "The driver as somebody starts it who wants as little as possible; its table, and its text."
    given = dict(total_prompts=16, prompts_per_round=8, num_samples_per_prompt=4)
    given |= dict(run_name="methods-test") | parameters
    command = ["papermill", "nbs/compare_methods.ipynb", str(out), "--no-progress-bar"]
    for name, value in given.items():
        command += ["-p", name, str(value)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((RUNS / "methods-test/table.json").read_text()), out.read_text()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    "Two rounds of eight prompts for each method."
    out = tmp_path_factory.mktemp("methods") / "out.ipynb"
    for old in RUNS.glob("methods-test-*-s1"):
        shutil.rmtree(old)
    table, _ = sweep(out, methods=", ".join(FORMS), fresh="true")
    for method in FORMS:
        params = json.loads((run_of(method) / "params.json").read_text())["parameters"]
        assert params["fresh"] and params["seed"] == 0
    return table


def run_of(method):
    "The folder of a method's first run."
    return RUNS / f"methods-test-{method.replace(' + ', '-').lower()}"


def test_every_method_is_in_the_table(swept):
    rows = {r["method"]: r for r in swept}
    assert rows.keys() == FORMS.keys()
    starts = {(r["true reward at start"], r["RM score at start"]) for r in swept}
    assert len(starts) == 1, "all begin with the same samples of the same policy"
    for row in swept:
        assert 0 <= row["true reward"] <= 1
        assert row["KL"] != 0
        way, low, high = row["share of the way"]
        assert low <= way <= high <= 1
        assert (way > 0) == (row["true reward"] > row["true reward at start"])
        gain, low, high = row["gain"]
        assert low <= gain <= high
        assert gain == pytest.approx(row["true reward"] - row["true reward at start"])
        assert (row["above the start"] == "yes (1 of 1)") == (low > 0)
        assert row["seconds"] > 0
        assert (row["seeds"], row["stopped by the alarm"]) == ("1 of 1", "0 of 1")


@pytest.mark.parametrize("method", FORMS)
def test_rounds_of(swept, method):
    """The feedback is what the method learns from.

    The second round goes on from the first, with its counters, and moves the policy.
    """
    run = run_of(method)
    logs = []
    for round_folder in (run / "round-1", run / "round-2"):
        feedback = json.loads((round_folder / "feedback.json").read_text())
        assert feedback[0]["type"] == FORMS[method]
        lines = read_jsonl(round_folder / "metrics.jsonl")
        logs.append([line for line in lines if "loss" in line])
    first, second = logs
    assert second[0]["total_steps"] == first[-1]["total_steps"] + 1
    assert (run / "policy/model.safetensors").exists()
    assert (run / "policy/adapter").exists() == ("LoRA" in method)
    params = json.loads((run / "params.json").read_text())["parameters"]
    assert (params["beta"] is None) == (method == "ppo")


def stages_done(run):
    "All stages that a run has ever done."
    events = read_jsonl(run / "ledger.jsonl")
    return [(e["folder"], e["stage"]) for e in events if e["event"] == "finished"]


def finished(run):
    "The stages that a run's newest session had to do."
    return [
        e for e in last_session(read_jsonl(run / "ledger.jsonl")) if e["event"] == "finished"
    ]


@every
def test_a_sweep_is_widened_to_more_seeds(swept, tmp_path):
    "The first seed's run stands; the second differs in its samples, and both are in the table."
    first = run_of("dpo + humanline")
    second = first.with_name(f"{first.name}-s1")
    done = stages_done(first)
    asked = dict(methods="dpo + humanline", seeds=2, slots=2)
    (row,), text = sweep(tmp_path / "out.ipynb", **asked)
    assert "2 of 2 runs done" in text
    # side by side, then read: what stood was not done again, what was done is done once
    assert stages_done(first) == done and not finished(second)
    assert 0 < len(stages_done(second)) == len({*stages_done(second)})
    asked = [
        json.loads((run / "params.json").read_text())["parameters"] for run in (first, second)
    ]
    assert [p["seed"] for p in asked] == [0, 1]
    assert {p: asked[1][p] for p in asked[0] if p not in ("seed", "run_name")} == {
        p: asked[0][p] for p in asked[0] if p not in ("seed", "run_name")
    }
    texts = []
    for run in (first, second):
        samples = json.loads((run / "start/samples.json").read_text())
        texts.append([s["output"] for s in samples])
    assert texts[0] != texts[1]

    assert (row["seeds"], row["stopped by the alarm"], row["failed"]) == (
        "2 of 2",
        "0 of 2",
        "0 of 2",
    )
    assert [run["seed"] for run in row["runs"]] == [0, 1]
    before = {r["method"]: r for r in swept}["dpo + humanline"]
    assert row["runs"][0] == before["runs"][0]
    gains = [run["gain"][0] for run in row["runs"]]
    assert (row["smallest gain"], row["largest gain"]) == (min(gains), max(gains))
    for name in ("true reward", "true reward at start", "RM score", "KL", "seconds"):
        mean = sum(run[name] for run in row["runs"]) / 2
        assert row[name] == pytest.approx(mean), name
    assert row["gain"][0] == pytest.approx(sum(gains) / 2)
    assert "dpo + humanline, seed 1: true reward" in text
    assert "each seed faintly behind" in text


def an_alarm():
    "What the loop raises where a training has broken a policy."
    now = Health(answers=8, kl=99.0, cut=0.0, unreadable=0.0, entropy=1.0, score=0.0)
    found = alarms(now, None)
    return AlarmError(Breakage("p", "round 1's training", Path("s"), "none", found, now, None))


def test_runs_that_did_not_end_are_counted_in_the_table(swept, monkeypatch, tmp_path):
    "The driver's own cells: one method has lost a seed to the alarm, the other has none left."
    ends = {
        ("kto", 0): None,
        ("kto", 1): an_alarm(),
        ("ppo", 0): ValueError("no such thing"),
        ("ppo", 1): an_alarm(),
    }

    def run_rounds(run, settings):
        if ends[run.key]:
            raise ends[run.key]
        yield SimpleNamespace(note="prompts ran out")

    def sweep_configs(cfg, settings):
        about = dict(method="kto", lr=1, beta=1, batch_size=1, feedback_type="binary")
        runs = {}
        for name, seed in ends:
            run_name = f"methods-test-{name}"
            about |= dict(train_options={}, run_name=run_name, key=(name, seed), fresh=True)
            runs[name, seed] = SimpleNamespace(**about)
        return runs

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("halos_nb.loop.run_rounds", run_rounds)
    monkeypatch.setattr("halos_nb.playground.sweep_configs", sweep_configs)
    monkeypatch.setattr("halos_nb.figures.setup_display", lambda: None)
    cells = json.loads((ROOT / "nbs/compare_methods.ipynb").read_text())["cells"]
    *most, last = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    here = {}
    for i, source in enumerate(most):
        exec(source, here)
        if not i:
            here |= dict(run_name="methods-broken-test", seeds=2)
    with pytest.raises(RuntimeError, match="3 of 4 runs did not end") as told:
        exec(last, here)
    assert "kto, seed 1 (stopped by the alarm)" in str(told.value)
    assert "ppo, seed 0 (failed)" in str(told.value)

    table = json.loads((RUNS / "methods-broken-test/table.json").read_text())
    kto, ppo = table
    assert (kto["method"], kto["seeds"], kto["stopped by the alarm"]) == (
        "kto",
        "1 of 2",
        "1 of 2",
    )
    same = {r["method"]: r for r in swept}["kto"]
    assert kto["gain"] == same["gain"] and kto["runs"][0] == same["runs"][0]
    assert kto["above the start"].endswith(" of 2)")
    assert "round 1's training" in kto["runs"][1]["stopped"]
    assert (ppo["seeds"], ppo["stopped by the alarm"], ppo["failed"]) == (
        "0 of 2",
        "1 of 2",
        "1 of 2",
    )
    assert ppo["gain"] is ppo["KL"] is None and ppo["above the start"] == "not shown (0 of 2)"
    assert ppo["runs"][1]["failed"] == "ValueError: no such thing"
    assert "ppo" in here["doubted"]


@every
def test_headline_follows_a_run_on_held_out_prompts(monkeypatch):
    "The run is made longer round by round: what stands is not done again."
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import headline

    shutil.rmtree(RUNS / "headline-0", ignore_errors=True)
    played = headline.play(seed=0, rounds=2, prompts=4)
    assert [point.after for point in played.points] == ["start", "1", "2"]
    start, one, two = played.points
    assert (start.way, start.kl) == (0, 0) and two.kl
    assert start.truth != one.truth or one.truth != two.truth
    assert 0.8 < played.accuracy <= 1
    events = read_jsonl(played.folder / "ledger.jsonl")
    trained = [e["folder"] for e in events if e["event"] == "started" and e["stage"] == "train"]
    assert trained == ["round-1", "round-2"]
    head, _, *rows = headline.table([played.points, played.points]).splitlines()
    assert len(rows) == 3 and f"{two.truth:.3f} ± 0.000" in rows[-1]

"Every form of feedback goes round online, started as a user starts it."

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from halos_nb.records import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path(os.environ["HALOS_NB_RUNS_DIR"])  # the playground in it is built once for all tests
# the form of feedback that each method of playground.SWEEP learns from
FORMS = {
    "kto": "binary_feedback",
    "grpo": "scalar_feedback",
    "ppo": "binary_feedback",
    "dpo + LoRA": "pairwise_feedback",
    "dpo + humanline": "pairwise_feedback",
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    "Two rounds of eight prompts for each method."
    out = tmp_path_factory.mktemp("methods") / "out.ipynb"
    parameters = dict(
        run_name="methods-test",
        methods=", ".join(FORMS),
        total_prompts="16",
        prompts_per_round="8",
        num_samples_per_prompt="4",
        fresh="true",
    )
    command = ["papermill", "nbs/compare_methods.ipynb", str(out), "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-p", name, value]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((RUNS / "methods-test/table.json").read_text())


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
        assert row["seconds"] > 0


@pytest.mark.parametrize("method", FORMS)
def test_rounds_of(swept, method):
    """The feedback is what the method learns from.

    The second round goes on from the first, with its counters, and moves the policy.
    """
    run = RUNS / f"methods-test-{method.replace(' + ', '-').lower()}"
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
    assert params["fresh"]
    assert (params["beta"] is None) == (method == "ppo")


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

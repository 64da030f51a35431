"Every form of feedback goes round online, started as a user starts it."

import json
import os
import subprocess
from pathlib import Path

import pytest

from halos_nb.records import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path(os.environ["HALOS_NB_RUNS_DIR"])  # the playground in it is built once for all tests
METHODS = {
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
    done = subprocess.run(
        [
            "papermill",
            "nbs/compare_methods.ipynb",
            str(out),
            "--no-progress-bar",
            "-p",
            "run_name",
            "methods-test",
            "-p",
            "methods",
            ", ".join(METHODS),
            "-p",
            "total_prompts",
            "16",
            "-p",
            "prompts_per_round",
            "8",
            "-p",
            "num_samples_per_prompt",
            "4",
            "-p",
            "fresh",
            "true",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((RUNS / "methods-test/table.json").read_text())


def test_every_method_is_in_the_table(swept):
    rows = {r["method"]: r for r in swept}
    assert rows.keys() == METHODS.keys()
    starts = {(r["true reward at start"], r["RM score at start"]) for r in swept}
    assert len(starts) == 1, "all begin with the same samples of the same policy"
    assert all(0 <= r["true reward"] <= 1 and r["KL"] != 0 and r["seconds"] > 0 for r in swept)


@pytest.mark.parametrize("method", METHODS)
def test_rounds_of(swept, method):
    "The feedback is what the method learns from; the second round goes on from the first, with its counters, and moves the policy."
    run = RUNS / f"methods-test-{method.replace(' + ', '-').lower()}"
    for n in (1, 2):
        assert (
            json.loads((run / f"round-{n}/feedback.json").read_text())[0]["type"]
            == METHODS[method]
        )
    first, second = (
        [r for r in read_jsonl(run / f"round-{n}/metrics.jsonl") if "loss" in r] for n in (1, 2)
    )
    assert second[0]["total_steps"] == first[-1]["total_steps"] + 1
    assert (run / "policy/model.safetensors").exists() and (
        run / "policy/adapter"
    ).exists() == ("LoRA" in method)
    params = json.loads((run / "params.json").read_text())["parameters"]
    assert params["fresh"] and params["beta"] is not None or method == "ppo"

"The loop: whole rounds, with stages that pretend."

import json
import os
from pathlib import Path

import pytest
from job_helpers import NEEDS_LINUX, quiet

from halos_nb import ledger
from halos_nb.configs import LoopConfig
from halos_nb.failures import StageError
from halos_nb.loop import run_rounds
from halos_nb.records import read_jsonl
from halos_nb.runs import run_summary
from halos_nb.settings import Settings

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("stages_on_path"),
    NEEDS_LINUX,
]


@pytest.fixture
def pretend(tmp_path, monkeypatch, stages_on_path):
    "`pretend(look=..., **parameters)`: the rounds of a run, each looked at when it is yielded."
    launch = ledger.launch

    def launch_pretend(stage, cfg, profile, folder, module, **more):
        return launch(stage, cfg, profile, folder, "pretend", **more)

    monkeypatch.setattr(ledger, "launch", launch_pretend)
    for name in ("sft", "rm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "prompts.json").write_text("[]")
    given = dict(
        run_name="r",
        sft_checkpoint=str(tmp_path / "sft"),
        reward_checkpoint=str(tmp_path / "rm"),
        prompts=str(tmp_path / "prompts.json"),
    )
    settings = Settings(runs_dir=str(tmp_path / "runs"))

    def rounds(look=None, **more):
        seen = []
        for this in run_rounds(LoopConfig(**given | more), settings, watch=quiet):
            if look:
                look(this)
            seen.append(this)
        return seen

    return rounds


def stage_configs(rounds, stage):
    return [json.loads((r.folder / f"{stage}.config.json").read_text()) for r in rounds]


def params(tmp_path):
    return json.loads((tmp_path / "runs/r/params.json").read_text())


@pytest.fixture
def three_rounds(pretend):
    "25 prompts, 10 a round."
    return pretend(total_prompts=25, prompts_per_round=10)


def test_rounds_share_the_prompts(three_rounds):
    prompts = [r.counts["sample"]["prompts"] for r in three_rounds]
    assert [r.number for r in three_rounds] == [1, 2, 3, None]
    assert [r.name for r in three_rounds] == ["round-1", "round-2", "round-3", "final"]
    assert prompts == [10, 10, 5, 10]
    assert [r.note for r in three_rounds] == [""] * 4
    # every round, the final one too, has prompts of its own
    seen = []
    for r in three_rounds:
        seen.append({s["prompt_id"] for s in json.loads(r.samples_file.read_text())})
    assert sum(map(len, seen)) == len(set.union(*seen)) == 35


def test_rounds_follow_each_other(three_rounds, tmp_path):
    sft = str(tmp_path / "sft")
    policies = [str(r.policy) for r in three_rounds[:3]]
    trained = stage_configs(three_rounds[:3], "train")
    assert [c["from_checkpoint"] for c in trained] == [None, *policies[:2]]
    assert {c["load_from"] for c in trained} == {sft}
    assert all(c["online"] for c in trained)
    sampled = stage_configs(three_rounds, "sample")
    assert [c["model"] for c in sampled] == [sft, *policies]
    assert len({c["seed"] for c in sampled}) == 4
    assert {c["reference"] for c in sampled} == {sft}


def test_a_run_keeps_its_last_policy_and_its_first(three_rounds, tmp_path):
    run = tmp_path / "runs/r"
    assert [r.policy.exists() for r in three_rounds] == [False, False, True, True]
    assert (tmp_path / "sft/weights").exists()
    assert (run / "policy").resolve() == three_rounds[2].policy
    assert not Path(os.readlink(run / "policy")).is_absolute()


def test_a_run_says_what_it_was(three_rounds, tmp_path):
    known = params(tmp_path)
    assert (known["ended"], known["rounds"]) == ("as planned", 3)
    assert known["parameters"]["beta"] == 0.1
    summary = run_summary(tmp_path / "runs/r")
    assert [row["round"] for row in summary] == ["1", "2", "3", "final"]
    assert summary[0]["kl"] == 0.5


ALL = ["sample", "label", "train"]


def test_rounds_resume_shrink_and_start_afresh(pretend, tmp_path):
    pretend(total_prompts=30, prompts_per_round=10)
    again = pretend(total_prompts=30, prompts_per_round=10)
    assert [r.skipped for r in again] == [ALL, ALL, ALL, ["sample", "label"]]
    # round 2's pruned policy is needed for other final samples
    shorter = pretend(total_prompts=20, prompts_per_round=10)
    assert [len(r.skipped) for r in shorter] == [3, 3, 0]
    assert shorter[1].policy.exists()
    summary = run_summary(tmp_path / "runs/r")
    assert [row["round"] for row in summary] == ["1", "2", "final"]
    fresh = pretend(total_prompts=20, prompts_per_round=10, fresh=True)
    assert [r.skipped for r in fresh] == [[], [], []]
    assert not (tmp_path / "runs/r/round-3").exists()


def test_the_next_round_samples_while_the_last_is_looked_at(pretend, tmp_path):
    seen = []

    def look(this):
        rows = read_jsonl(tmp_path / "runs/r/ledger.jsonl")
        started = [row["folder"] for row in rows if row["event"] == "started"]
        seen.append(started[-1])

    pretend(look, total_prompts=30, prompts_per_round=10)
    assert seen == ["round-2", "round-3", "final", "final"]


def test_prompts_that_run_out_exactly_end_the_run(pretend, tmp_path):
    rounds = pretend(total_prompts=60, prompts_per_round=20)
    assert [r.name for r in rounds] == ["round-1", "round-2", "final"]
    assert rounds[1].note == "prompts ran out: 40 of 60, so this is the last round"
    assert "last round's again" in rounds[2].note
    assert "prompts ran out" in params(tmp_path)["ended"]


def test_a_round_that_fails_is_continued_when_the_cause_is_gone(pretend):
    with pytest.raises(StageError, match="no pairs; lower `threshold`"):
        pretend(total_prompts=10, prompts_per_round=10, threshold=50.0)
    rounds = pretend(total_prompts=10, prompts_per_round=10)
    assert [r.skipped for r in rounds] == [["sample"], []]

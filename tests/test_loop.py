"The loop: whole rounds, with stages that pretend."

import json
import math
import os
from pathlib import Path

import pytest
from conftest import every, put_stages_on_path
from job_helpers import NEEDS_LINUX, quiet

from halos_nb import ledger
from halos_nb.compare import RunComparer
from halos_nb.configs import LoopConfig
from halos_nb.failures import StageError
from halos_nb.loop import AuditError, run_rounds
from halos_nb.page import outcome, report
from halos_nb.records import read_jsonl, read_records
from halos_nb.runs import read_run, run_summary
from halos_nb.settings import Settings

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("stages_on_path"),
    NEEDS_LINUX,
]


@pytest.fixture
def pretend(tmp_path, monkeypatch, stages_on_path):
    "`pretend(look=..., **parameters)`: the rounds of a run, each looked at when it is yielded."
    return pretending(tmp_path, monkeypatch)


def pretending(folder, monkeypatch):
    "As `pretend`, with its files in a folder."
    launch = ledger.launch

    def launch_pretend(stage, cfg, profile, where, module, **more):
        return launch(stage, cfg, profile, where, "pretend", **more)

    monkeypatch.setattr(ledger, "launch", launch_pretend)
    for name in ("sft", "rm"):
        (folder / name).mkdir()
        (folder / name / "weights").write_text(name)
    (folder / "prompts.json").write_text("[]")
    given = dict(
        run_name="r",
        sft_checkpoint=str(folder / "sft"),
        reward_checkpoint=str(folder / "rm"),
        prompts=str(folder / "prompts.json"),
        audit="skip",
        lr=3e-4,
        alarm="skip",  # tests/test_alarm.py has runs that look
    )
    settings = Settings(runs_dir=str(folder / "runs"))

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


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    "A folder, and the rounds that a run there has had: 25 prompts, 10 a round."
    folder = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch:
        put_stages_on_path(patch)
        return folder, pretending(folder, patch)(total_prompts=25, prompts_per_round=10)


@pytest.fixture
def three_rounds(three):
    "Looked at by several tests, and changed by none."
    return three[1]


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


def test_rounds_follow_each_other(three, three_rounds):
    sft = str(three[0] / "sft")
    policies = [str(r.policy) for r in three_rounds[:3]]
    trained = stage_configs(three_rounds[:3], "train")
    assert [c["from_checkpoint"] for c in trained] == [None, *policies[:2]]
    assert {c["load_from"] for c in trained} == {sft}
    assert all(c["online"] for c in trained)
    sampled = stage_configs(three_rounds, "sample")
    assert [c["model"] for c in sampled] == [sft, *policies]
    assert len({c["seed"] for c in sampled}) == 4
    assert {c["reference"] for c in sampled} == {sft}


def test_a_run_keeps_its_last_policy_and_its_first(three, three_rounds):
    run = three[0] / "runs/r"
    assert [r.policy.exists() for r in three_rounds] == [False, False, True, True]
    assert (three[0] / "sft/weights").exists()
    assert (run / "policy").resolve() == three_rounds[2].policy
    assert not Path(os.readlink(run / "policy")).is_absolute()


def test_a_run_says_what_it_was(three):
    known = params(three[0])
    assert (known["ended"], known["rounds"]) == ("as planned", 3)
    assert known["parameters"]["beta"] == 0.1
    summary = run_summary(three[0] / "runs/r")
    assert [row["round"] for row in summary] == ["1", "2", "3", "final"]
    assert summary[0]["kl"] == 0.5


# ---- held-out prompts


@pytest.fixture
def held_out(tmp_path):
    "A file of prompts that no round asks."
    path = tmp_path / "heldout.json"
    path.write_text("[]")
    return str(path)


def asked(this):
    return {s["prompt_id"] for s in json.loads(this.samples_file.read_text())}


@pytest.fixture
def with_held_out(pretend, held_out):
    "Two rounds of ten prompts, and ten that are held out."
    return pretend(total_prompts=20, prompts_per_round=10, heldout_prompts=held_out)


def test_first_and_last_policy_answer_the_held_out_prompts(with_held_out, tmp_path):
    start, first, second, final = with_held_out
    names = [r.name for r in with_held_out]
    assert names == ["start", "round-1", "round-2", "final"]
    assert asked(start) == asked(final) == {f"h{i}" for i in range(10)}
    assert asked(first) | asked(second) == {f"p{i}" for i in range(20)}
    models = [c["model"] for c in stage_configs(with_held_out, "sample")]
    sft = str(tmp_path / "sft")
    assert models == [sft, sft, str(first.policy), str(second.policy)]
    assert (start.number, start.note, final.note) == (None, "", "")
    for this in (start, final):
        assert {row["reward"] for row in read_records(this.feedback_file)} == set(range(8))
        assert not (this.folder / "policy").exists()

    # the share of the way is told on the prompts that both answered, and on no others
    seed = stage_configs([final], "sample")[0]["seed"]

    def truth(prompt, output):
        "The final policy's answers are better."
        return 0.7 if str(seed) in output else 0.4

    rows = read_run(tmp_path / "runs/r", truth, best=1.0).rounds
    assert [row["round"] for row in rows] == ["start", "1", "2", "final"]
    ways = [row["share_of_way"].value for row in rows]
    assert ways == pytest.approx([0, math.nan, math.nan, 0.5], nan_ok=True)
    assert "share_of_way" not in read_run(tmp_path / "runs/r", truth).rounds[-1]

    # and shown: in the comparison of runs, its file, and the run's page
    compared = RunComparer(tmp_path / "runs", truth=truth, mode="static", best=1.0)
    assert "50% (no interval)" in compared.table().text  # the same on every prompt
    assert "0.5 (no interval)" in compared.to_csv(tmp_path / "runs.csv").read_text()
    page = report(tmp_path / "runs/r", truth=truth, best=1.0).read_text()
    assert "50% (no interval)" in page and "share_of_way" in page


def test_held_out_prompts_that_a_round_asks_too_are_told(pretend, tmp_path):
    same = str(tmp_path / "prompts.json")
    given = dict(total_prompts=10, prompts_per_round=10, heldout_prompts=same)
    rounds = pretend(**given)
    assert rounds[-1].note == "10 of 10 held-out prompts were also asked in a round"
    assert params(tmp_path)["ended"] == rounds[-1].note
    assert [r.skipped for r in pretend(**given)] == [ALL[:2], ALL, ALL[:2]]


def test_held_out_prompts_that_are_not_there_stop_the_run(pretend, tmp_path):
    with pytest.raises(FileNotFoundError, match="^heldout_prompts: "):
        pretend(heldout_prompts=str(tmp_path / "none.json"))
    assert not (tmp_path / "runs").exists()


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


def test_a_run_looks_at_its_models_first(pretend, tmp_path):
    rounds = pretend(audit="run", total_prompts=4, prompts_per_round=4)
    run = tmp_path / "runs/r"
    events = [e for e in read_jsonl(run / "ledger.jsonl") if e["event"] == "started"]
    assert events[0]["stage"] == "audit"
    assert [r.name for r in rounds] == ["round-1", "final"]
    assert json.loads((run / "audit.json").read_text())["checks"][0]["verdict"] == "ok"
    # its result stands, and is no part of a round
    pretend(audit="run", total_prompts=4, prompts_per_round=4)
    last = [e for e in read_jsonl(run / "ledger.jsonl") if e.get("stage") == "audit"][-1]
    assert last["event"] == "skipped"
    assert [row["round"] for row in run_summary(run)] == ["1", "final"]


def test_a_wrong_check_stops_a_run_unless_it_is_only_told(pretend, tmp_path):
    (tmp_path / "sft/wrong").write_text("twice")
    few = dict(total_prompts=4, prompts_per_round=4)
    with pytest.raises(AuditError, match=r"(?s)bos: twice.*audit\.json.*audit=warn"):
        pretend(audit="run", **few)
    assert not (tmp_path / "runs/r/round-1/samples.json").exists()
    # asked again it is not computed again, and still wrong
    with pytest.raises(AuditError, match="bos: twice"):
        pretend(audit="run", **few)
    assert len(pretend(audit="warn", **few)) == 2
    # mended, it is looked at anew
    (tmp_path / "sft/wrong").unlink()
    assert len(pretend(audit="run", **few)) == 2


@pytest.fixture
def evaluated(pretend, tmp_path):
    "Five rounds of a policy that is best after two, evaluated after each; how to run them."
    (tmp_path / "heldout.json").write_text("[]")
    more = dict(total_prompts=25, prompts_per_round=5, evaluate_every=1, eval_num_prompts=6)
    more |= dict(heldout_prompts=str(tmp_path / "heldout.json"), keep="best")
    return lambda **other: pretend(**more | other)


def evaluations_run(tmp_path):
    "Which stages of evaluations the run has started, in order."
    events = read_jsonl(tmp_path / "runs/r/ledger.jsonl")
    started = [event for event in events if event["event"] == "started"]
    return [e["folder"] for e in started if e["folder"].startswith("evaluate-")]


def test_the_best_policy_is_the_one_that_evaluations_say(evaluated, tmp_path):
    rounds = evaluated()
    assert [r.name for r in rounds][-2:] == ["round-5", "final"]
    run = tmp_path / "runs/r"
    best = params(tmp_path)["best"]
    assert (best["by"], best["value"]) == ("round-2", 1.0)
    assert best["measured"].startswith("mean score by rm of its own answers in evaluate-2")
    assert (run / "best").resolve() == (run / "round-2/policy/FINAL").resolve()
    assert (run / "policy").resolve() == (run / "round-5/policy/FINAL").resolve()
    lines = rounds[1].evaluated.splitlines()  # the first policy's, and that of round 1
    assert [line.partition(":")[0] for line in lines] == ["evaluate-0", "evaluate-1"]
    asked = json.loads((run / "evaluate-3/sample.config.json").read_text())
    first = json.loads((run / "evaluate-0/sample.config.json").read_text())
    assert asked["seed"] == first["seed"]
    assert (asked["num_skip"], asked["num_prompts"]) == (
        5,
        6,
    )  # start and final have the first 5
    # a second session finds all of it; with patience it ends two evaluations after the best
    before = len(evaluations_run(tmp_path))
    assert before == 6 * 3
    again = evaluated(patience=2)
    assert [r.name for r in again][1:] == ["round-1", "round-2", "round-3", "round-4", "final"]
    assert len(evaluations_run(tmp_path)) == before
    assert "stopped early: 2 evaluations (patience) without" in again[-2].note
    assert "the policy of round-2 (mean score by rm 1 [0.9, 1.1]" in again[-2].note
    assert params(tmp_path)["ended"].startswith("stopped early")
    told = "\n".join(outcome(run))  # what an unattended run leaves in its terminal
    assert "how it ended: stopped early: 2 evaluations (patience) without" in told
    page = report(run).read_text()
    assert "Evaluation on prompts that no round trains on" in page


def test_the_best_policy_of_one_prompt_has_no_interval(pretend, tmp_path):
    pretend(total_prompts=2, prompts_per_round=1, keep="best")
    best = params(tmp_path)["best"]
    assert "(no interval)" in best["words"]
    assert best["low"] is None and best["high"] is None


@every
def test_a_policy_that_is_gone_is_not_trained_again_to_be_evaluated(evaluated, tmp_path):
    evaluated(total_prompts=10, evaluate_every=0, eval_num_prompts=128, keep="last")
    rounds = evaluated(total_prompts=10, keep="last")
    assert "not evaluated: " in rounds[1].note and "keep=all" in rounds[1].note
    assert rounds[2].evaluated.startswith("evaluate-2")
    assert set(evaluations_run(tmp_path)) == {"evaluate-0", "evaluate-2"}
    assert "not on disk" not in params(tmp_path)["best"]["words"]


def test_an_evaluation_needs_prompts_of_its_own(pretend):
    with pytest.raises(ValueError, match="eval_prompts: an evaluation needs prompts that no"):
        pretend(evaluate_every=1)

"""The alarm: a policy that is breaking stops its run, and the last good one is kept. First with
stages that pretend, then with real collapses.
"""

import json
import os
from pathlib import Path

import collapses
import pytest
from conftest import every
from job_helpers import NEEDS_LINUX, quiet

from halos_nb import ledger, playground
from halos_nb.configs import LoopConfig
from halos_nb.loop import AlarmError, run_rounds
from halos_nb.monitor import look
from halos_nb.page import report
from halos_nb.records import read_jsonl
from halos_nb.runs import run_summary
from halos_nb.settings import Settings, load_settings

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("stages_on_path"),
    NEEDS_LINUX,
]


class Pretended:
    "Runs of two rounds, ten prompts each, whose training breaks the policy when it is told."

    def __init__(self, folder):
        self.folder = folder
        self.run = folder / "runs/r"
        self.seen = []  # the rounds that were yielded
        for name in ("sft", "rm"):
            (folder / name).mkdir()
            (folder / name / "weights").write_text(name)
        (folder / "prompts.json").write_text("[]")

    def __call__(self, look=None, **more):
        given = dict(run_name="r", total_prompts=20, prompts_per_round=10, audit="skip")
        given |= dict(lr=3e-4)
        given |= dict(sft_checkpoint="sft", reward_checkpoint="rm", prompts="prompts.json")
        for name in ("sft_checkpoint", "reward_checkpoint", "prompts"):
            given[name] = str(self.folder / given[name])
        settings = Settings(runs_dir=str(self.folder / "runs"))
        self.seen = []
        for this in run_rounds(LoopConfig(**given | more), settings, watch=quiet):
            self.seen.append(this)
            if look:
                look(this)
        return self.seen

    def breaks(self, look=None, **more):
        "The alarm of a run, which there must be."
        with pytest.raises(AlarmError) as caught:
            self(look, **more)
        return caught.value

    def policy(self, round):
        return self.run / f"round-{round}/policy/FINAL"

    def ended(self):
        return json.loads((self.run / "params.json").read_text())["ended"]

    def started(self):
        "Which stages the last session has started."
        events = read_jsonl(self.run / "ledger.jsonl")
        begun = [i for i, e in enumerate(events) if e["event"] == "run"][-1]
        last = [e for e in events[begun:] if e["event"] == "started"]
        return [f"{e['folder']} {e['stage']}" for e in last]


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    launch = ledger.launch

    def launch_pretend(stage, cfg, profile, folder, module, **more):
        return launch(stage, cfg, profile, folder, "pretend", **more)

    monkeypatch.setattr(ledger, "launch", launch_pretend)
    return Pretended(tmp_path)


def test_a_breaking_policy_stops_its_round_and_the_last_good_one_is_kept(pretended):
    error = pretended.breaks(beta=2.0)
    run = pretended.run
    assert [r.name for r in pretended.seen] == ["round-1"]
    assert (run / "policy").resolve() == pretended.policy(1)
    assert not Path(os.readlink(run / "policy")).is_absolute()
    assert pretended.policy(1).exists() and pretended.policy(2).exists()
    assert not (run / "final/samples.json").exists()
    first, *lines = str(error).splitlines()
    assert first.startswith("round 2's training has left a policy that is breaking: unreadable")
    assert "100% (0% at the start), limit 10%" in first and "check.json" in first
    assert "Try: a smaller lr" in lines[0]
    assert lines[1].startswith("  the first policy: unreadable 0%")
    assert str(pretended.policy(1)) in lines[2] and str(pretended.policy(2)) in lines[2]
    assert error._render_traceback_()[0] == f"AlarmError: {first}"
    assert pretended.ended().startswith("stopped by the alarm: round 2's training")
    assert look(run).state == "stopped" and "round 2's training" in str(look(run))
    assert str(pretended.policy(1)) in pretended.ended()
    # asked again nothing is done again, and it fires at once
    assert str(pretended.breaks(beta=2.0)) == str(error)
    assert pretended.started() == []
    assert (run / "policy").resolve() == pretended.policy(1)
    # what is told to other rooms
    assert [row["round"] for row in run_summary(run)] == ["1", "2"]
    page = report(run).read_text()
    assert "stopped by the alarm: round 2" in page and "round-2, after its training" in page


def test_before_the_first_training_there_is_the_model_that_the_run_began_with(pretended):
    pretended.breaks(beta=1.0)
    assert pretended.seen == []
    assert (pretended.run / "policy").resolve() == pretended.folder / "sft"
    assert pretended.policy(1).exists()
    assert not (pretended.run / "round-2/samples.json").exists()


@pytest.mark.parametrize("round, where", [(1, "round-2"), (2, "final")])
def test_what_a_check_did_not_show_the_next_samples_do(pretended, round, where):
    "Then the policy of two rounds before is needed, and is there."
    error = pretended.breaks(beta=round + 0.5)
    assert f"round {round}'s training" in str(error) and f"{where}/samples.json" in str(error)
    good = pretended.policy(1) if round == 2 else pretended.folder / "sft"
    assert (pretended.run / "policy").resolve() == good
    assert good.exists() and pretended.policy(round).exists()
    assert not (pretended.run / where / "feedback.json").exists()  # nothing was paid for
    pretended.breaks(beta=round + 0.5)
    assert pretended.started() == []
    assert (pretended.run / "policy").resolve() == good


def test_what_a_few_answers_leave_in_doubt_is_asked_again(pretended):
    "Two prompts of ten are no proof; they are seen, shown, and the run goes on."
    rounds = pretended(beta=1.3, total_prompts=10)
    assert [r.name for r in rounds] == ["round-1", "final"]
    again = json.loads((pretended.run / "round-1/recheck.json").read_text())
    assert (
        len(again) >= 512 > len(json.loads((pretended.run / "round-1/check.json").read_text()))
    )
    assert "unreadable 20% (limit 10%; may be chance)" in rounds[0].health
    assert list(rounds[0].seconds) == ["sample", "label", "train", "check", "recheck"]


def test_scores_far_beyond_their_range(pretended):
    error = pretended.breaks(beta=1.7)
    assert "score 102.50 (3.50 at the start), limit 10.50" in str(error)
    assert "the reward model" in str(error) and "by hand" in str(error)
    assert (pretended.run / "policy").resolve() == pretended.folder / "sft"
    assert not (pretended.run / "round-2/policy").exists()


def test_a_reference_that_has_changed_is_named(pretended):
    def spoil(this):
        if this.number == 1:
            (pretended.folder / "sft/weights").write_text("noise")

    error = pretended.breaks(spoil)
    assert "KL/token 28.50, limit 0.75" in str(error)
    assert str(error).startswith(f"the reference, {pretended.folder / 'sft'}, has changed")
    # it is not the policy that is to blame
    assert (pretended.run / "policy").resolve() == pretended.policy(1)
    assert not (pretended.run / "round-2/feedback.json").exists()


def test_an_alarm_that_is_only_told(pretended):
    rounds = pretended(beta=2.0, alarm="warn")
    assert [r.name for r in rounds] == ["round-1", "round-2", "final"]
    told = [r.note.startswith("alarm: round 2's training has left") for r in rounds]
    assert told == [False, True, True]  # what it says later is no better
    assert "alarm: round 2's training" in str(rounds[1])
    assert "alarm: round 2's training" in pretended.ended()
    assert (pretended.run / "policy").resolve() == pretended.policy(2)
    events = [e for e in read_jsonl(pretended.run / "ledger.jsonl") if e["event"] == "alarm"]
    assert events[0]["folder"] == "round-2" and "unreadable 100%" in events[0]["why"]
    assert "alarm: round 2" in report(pretended.run).read_text()
    # with the alarm on, the same run stops where it broke
    assert "round 2" in str(pretended.breaks(beta=2.0))
    assert pretended.started() == []


def test_a_healthy_run_is_shown_and_keeps_its_last_policy(pretended):
    rounds = pretended()
    assert [r.policy.exists() for r in rounds] == [False, True, True]
    assert (pretended.run / "policy").resolve() == rounds[1].policy
    assert "health after it: unreadable 0% (limit 10%)" in str(rounds[0])
    assert "health: unreadable 0% (limit 10%), score 3.50 (may be" in str(rounds[2])
    everything = ["sample", "label", "train", "check"]
    assert [r.skipped for r in pretended()] == [everything] * 2 + [everything[:2]]
    assert all("check" in r.seconds for r in rounds[:2])


def test_without_an_alarm_nothing_is_looked_at(pretended):
    rounds = pretended(beta=2.0, alarm="skip")
    assert [r.note for r in rounds] == [""] * 3 and [r.health for r in rounds] == [""] * 3
    assert not list(pretended.run.glob("*/check*"))
    assert pretended.ended() == "as planned"


def test_a_run_of_before_is_shown_without_new_work(pretended):
    "Its first policy is gone; its samples are there."
    pretended(alarm="skip")
    assert [r.name for r in pretended()] == ["round-1", "round-2", "final"]
    assert pretended.started() == []


# ---- real models


@pytest.fixture
def settings():
    "The playground in the tests' runs folder is built once for all tests."
    return load_settings()


@pytest.mark.timeout(900)
def test_thirty_times_the_learning_rate(settings):
    "`make test-alarm` has the collapses that take longer."
    alarm, rounds = collapses.high_rate(settings)
    assert [r.name for r in rounds] == ["start"]
    assert str(alarm).startswith("round 1's training has left")
    assert "kl" in {found.name for found in alarm.seen.found}
    run = Path(settings.runs_dir) / "collapse-high-rate"
    assert not (run / "round-2").exists() or not (run / "round-2/samples.json").exists()
    assert (run / "policy").resolve() == playground.locate(settings).policy.resolve()


@every
@pytest.mark.timeout(900)
def test_a_reference_of_noise(settings):
    alarm, rounds = collapses.corrupted(settings)
    assert [r.name for r in rounds] == ["start", "round-1"]
    assert "has changed since the run began: KL/token" in str(alarm)
    run = Path(settings.runs_dir) / "collapse-corrupted"
    assert not (run / "round-2/feedback.json").exists()
    assert (run / "policy").resolve() == (run / "round-1/policy/FINAL").resolve()

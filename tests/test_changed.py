"""A run whose parameters, or whose files, are not what they were: nothing sealed is thrown away
unasked, and what is damaged is named and set aside.
"""

import errno
import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import long_runs
import pytest
from job_helpers import NEEDS_LINUX
from long_runs import Pretended, wait

from halos_nb import identity, ledger, loop, records
from halos_nb.compare import RunComparer
from halos_nb.configs import AuditConfig, LoopConfig
from halos_nb.handover import card_text
from halos_nb.ledger import NotOurs, RunChanged, read_journal
from halos_nb.loop import check_before, choose_run, run_rounds
from halos_nb.monitor import RunMonitor, is_active, look, stop_run
from halos_nb.page import report
from halos_nb.records import RecordError, temporary, write_json, write_records
from halos_nb.runs import health_rows, kept_as_made, read_run, run_summary
from halos_nb.settings import Profile, Settings

pytestmark = [pytest.mark.timeout(300), NEEDS_LINUX]

ALL = ["sample", "label", "train"]


class Home:
    "Models, prompts and runs of a folder, with stages that pretend."

    def __init__(self, folder):
        self.runs = folder / "runs"
        self.settings = Settings(runs_dir=str(self.runs))
        self.given = dict(
            run_name="r",
            sft_checkpoint=str(folder / "sft"),
            reward_checkpoint=str(folder / "rm"),
            prompts=str(folder / "prompts.json"),
            total_prompts=20,
            prompts_per_round=10,
            lr=3e-4,
            beta=0.2,
            audit="skip",
            alarm="skip",
        )

    def config(self, **more):
        return LoopConfig(**self.given | more)

    def go(self, **more):
        "The rounds of a run."
        return list(run_rounds(self.config(**more), self.settings, watch=wait))


@pytest.fixture(scope="module")
def pretending():
    "Every stage is a call that pretends."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Ledger", Pretended)
        yield


@pytest.fixture(scope="module")
def ended(pretending, tmp_path_factory):
    "A run of two rounds that has ended; nobody writes there."
    folder = tmp_path_factory.mktemp("ended")
    for name in ("sft", "rm"):
        (folder / name).mkdir()
        (folder / name / "weights").write_text(name)
    (folder / "prompts.json").write_text("[]")
    Home(folder).go()
    return folder


@pytest.fixture
def home(ended, tmp_path):
    "A copy of it."
    shutil.copytree(ended, tmp_path / "home", symlinks=True)
    return Home(tmp_path / "home")


def test_a_run_goes_on_with_prompts_that_are_put_behind_its_own(
    pretending, tmp_path, monkeypatch, capsys
):
    for name in ("sft", "rm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)

    def ask(*questions):
        rows = [{"prompt": str(q)} for q in questions]
        (tmp_path / "prompts.json").write_text(json.dumps(rows), "utf-8")
        monkeypatch.setattr(long_runs.pretend, "PROMPTS", len(rows))
        return Home(tmp_path).go(total_prompts=30)

    ask(*range(20))
    assert "r: prompts ran out: 20 of 30" in capsys.readouterr().out
    (tmp_path / "runs/r/round-1/sample.manifest.json").write_text("null")
    more = ask(*range(30))
    assert "round-1/sample.manifest.json: sealed again" in capsys.readouterr().err
    assert [r.name for r in more] == ["round-1", "round-2", "round-3", "final"]
    assert [len(r.skipped) for r in more] == [3, 3, 0, 0]
    assert "ran out" not in more[1].note and not (tmp_path / "runs/r-2").exists()
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)  # a relative path is no difference
    Home(tmp_path).go(total_prompts=30, sft_checkpoint="sft")
    assert "would be done again" not in capsys.readouterr().out
    ask("another", *range(1, 30))
    told = capsys.readouterr().out
    named = f"  datasets ({tmp_path}/prompts.json) contents "
    (changed,) = [line for line in told.splitlines() if line.startswith("  ")]
    assert changed.startswith(named) and "round-1 sample" in told
    assert (tmp_path / "runs/r-2").exists()


def files_in(folder):
    "What lies in a run, by name; its lock is opened by whoever looks."
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def skipped(rounds):
    return [this.skipped for this in rounds]


# ---- parameters, libraries, code


def test_a_changed_parameter_goes_on_beside(home, capsys):
    "And the same command goes on there the next time; the run itself stays, byte for byte."
    run = home.runs / "r"
    before = files_in(run)
    rounds = home.go(beta=0.4)
    assert skipped(rounds) == [["sample", "label"], [], []]
    assert {this.folder.parent for this in rounds} == {home.runs / "r-2"}
    assert files_in(run) == before
    said = capsys.readouterr().out
    for words in (
        "r: what is sealed there was made otherwise, from round-1 train on",
        "  beta 0.2 -> 0.4\n",
        "(round-1 train; round-2 label, sample, train; final label, sample)",
        "would stand: 2 sealed stages",
        "on_change=redo",
        "on_change=stop",
        "fresh=True",
    ):
        assert words in said
    whose = json.loads((home.runs / "r-2/run.json").read_text())
    assert (whose["made_by"], whose["branch_of"]) == ("online_loop", "r")
    told = json.loads((home.runs / "r-2/params.json").read_text())["parameters"]
    assert (told["run_name"], told["beta"]) == ("r-2", 0.4)

    assert skipped(home.go(beta=0.4)) == [ALL, ALL, ["sample", "label"]]
    assert "goes on in" in capsys.readouterr().out
    assert sorted(p.name for p in home.runs.iterdir()) == ["r", "r-2"]
    # a third value has a run of its own, also if the second one's name is given
    for name in ("r", "r-2"):
        assert choose_run(home.config(beta=0.8, run_name=name), home.settings).run_name == "r-3"
    # and the first is still what it was
    assert skipped(home.go()) == [ALL, ALL, ["sample", "label"]]


def test_who_says_so_has_it_done_again(home, capsys):
    rounds = home.go(beta=0.4, on_change="redo")
    # the trainings come out as they were, so what rests on them stands
    assert skipped(rounds) == [["sample", "label"]] * 3
    rounds = home.go(beta=1.3, on_change="redo")
    assert skipped(rounds) == [["sample", "label"], [], []]
    assert [p.name for p in home.runs.iterdir()] == ["r"]
    said = capsys.readouterr().out
    assert "beta 0.2 -> 0.4" in said and "beta 0.4 -> 1.3" in said


def made_with(patch, torch, processes=1):
    "Other versions, and another number of processes."
    versions = {"torch": torch}
    patch.setattr(identity, "versions", lambda config, python="": versions)
    by = Profile(name="cpu1", cpu=True, num_processes=processes, launcher="accelerate")
    patch.setattr(Settings, "get_profile", lambda self, name="": by)


def test_on_other_machines_it_stands_as_it_was_made_if_that_is_wished(
    home, monkeypatch, capsys
):
    run = home.runs / "r"
    made = {
        k: v for k, v in files_in(run).items() if re.match("round.*(samples|metrics).json", k)
    }
    made_with(monkeypatch, "9", 2)
    assert choose_run(home.config(), home.settings).run_name == "r-2"
    assert "on_change=keep lets it stand there as it was made" in capsys.readouterr().out
    shutil.rmtree(home.runs / "r-2")

    rounds = home.go(on_change="keep", total_prompts=30)
    assert skipped(rounds) == [ALL, ALL, [], []]
    assert len(made) == 4 and made.items() <= files_in(run).items()
    [told] = [line for line in kept_as_made(run) if "num_processes" in line]
    assert re.search(
        r"num_processes 1 -> 2; torch \S+ -> 9.*\): round-1 train; round-2 train", told
    )
    for place in (report(run).read_text("utf-8"), card_text(read_run(run))):
        assert "ept as made before (num_processes 1" in html.unescape(place).replace("\\", "")
    sealed = json.loads((run / "round-1/train.manifest.json").read_text())
    assert sealed["identity"]["config"]["num_processes"] == 2
    assert sealed["made"][0]["identity"]["config"]["num_processes"] == 1

    # it is the run's own from now on, also where a manifest is lost
    (run / "round-1/train.manifest.json").unlink()
    assert skipped(home.go(total_prompts=30)) == [ALL, ALL, ALL, ["sample", "label"]]
    assert [p.name for p in home.runs.iterdir()] == ["r"]
    made_with(monkeypatch, "10", 2)
    home.go(on_change="keep", total_prompts=30)
    sealed = json.loads((run / "round-1/train.manifest.json").read_text())
    assert sealed["identity"]["libraries"] == {"torch": "10"}


def made_how(run):
    "How results were made otherwise, by which these are."
    told = [line.rpartition(": ") for line in kept_as_made(run)]
    return {which: how for how, _, which in told}


def test_who_made_a_result_stays_the_same_wherever_the_run_goes_on(home):
    run = home.runs / "r"
    with pytest.MonkeyPatch.context() as patch:
        made_with(patch, "9", 2)
        home.go(on_change="keep", total_prompts=30)
        made_with(patch, "10", 4)
        home.go(on_change="keep", total_prompts=30)
        how = made_how(run)
        assert "num_processes 1 -> 4; " in how["round-1 train; round-2 train"]
        assert "(num_processes 2 -> 4; torch 9 -> 10)" in how["round-3 train"]
        # a run beside knows it of what it has taken
        home.go(beta=0.4, total_prompts=30)
        first = how["round-1 sample, label; round-2 sample, label"]
        assert made_how(home.runs / "r-2") == {"round-1 sample, label": first}
    home.go(on_change="keep", total_prompts=30)
    made = ["round-3 sample, label; final sample, label", "round-3 train"]
    assert sorted(made_how(run)) == sorted(made)


def test_what_will_not_be_kept_is_refused_before_a_job_waits(home, monkeypatch):
    before = files_in(home.runs)
    made_with(monkeypatch, "9", 2)
    check_before(home.config(on_change="keep"), home.settings)
    with pytest.raises(RunChanged, match="(?s)beta 0.2 -> 0.4.*on_change=keep is for other"):
        check_before(home.config(beta=0.4, on_change="keep"), home.settings)
    assert files_in(home.runs) == before


def test_another_question_is_not_kept(home, monkeypatch):
    "Nor where machines have changed as well; and all stays as it was."
    before = files_in(home.runs)
    made_with(monkeypatch, "9")
    with pytest.raises(RunChanged, match="(?s)beta 0.2 -> 0.4.*on_change=keep is for other"):
        home.go(beta=0.4, on_change="keep")
    (Path(home.given["reward_checkpoint"]) / "weights").write_text("other")
    with pytest.raises(RunChanged, match="(?s)rm\\) contents .*on_change=keep is for other"):
        home.go(on_change="keep")
    assert files_in(home.runs) == before


def test_who_says_stop_finds_all_as_it_was(home):
    before = files_in(home.runs)
    with pytest.raises(RunChanged, match="(?s)beta 0.2 -> 0.4.*nothing was started"):
        home.go(beta=0.4, on_change="stop")
    assert files_in(home.runs) == before


@pytest.mark.parametrize("answer, runs", [("branch", ["r", "r-2"]), ("redo", ["r"])])
def test_somebody_who_is_there_is_asked(home, answer, runs):
    asked = []

    def ask(told):
        asked.append(told)
        return answer

    chosen = choose_run(home.config(beta=0.4), home.settings, ask)
    assert chosen.run_name == runs[-1]
    assert sorted(p.name for p in home.runs.iterdir()) == runs
    # what was answered holds, and is not asked twice
    assert choose_run(chosen, home.settings, pytest.fail) == chosen
    assert len(asked) == 1
    with pytest.raises(RunChanged):
        choose_run(home.config(beta=0.6), home.settings, lambda told: "stop")


def test_the_keyboard_is_asked_in_jupyterlab_alone(monkeypatch):
    said = iter(["what?", "re"])
    monkeypatch.setattr("builtins.input", lambda text: next(said))
    assert loop.ask_person("beta") == "branch"  # no kernel
    monkeypatch.setattr(loop, "in_kernel", lambda: True)
    assert loop.ask_person("beta") == "branch"  # papermill's
    monkeypatch.setenv("JPY_SESSION_NAME", "lab")
    assert loop.ask_person("beta") == "redo"

    def no_keyboard(text):
        raise NotImplementedError

    monkeypatch.setattr("builtins.input", no_keyboard)
    assert loop.ask_person("beta") == "branch"


@pytest.mark.parametrize("what", ["libraries", "modules", "model", "prompts"])
def test_what_has_changed_is_named(home, monkeypatch, capsys, what):
    with monkeypatch.context() as patch:
        if what == "libraries":
            patch.setattr(identity, "versions", lambda config, python: {"torch": "9"})
        if what == "modules":
            manifest = home.runs / "r/round-1/sample.manifest.json"
            sealed = json.loads(manifest.read_text())
            sealed["identity"]["code"] = "of before"
            sealed["identity"]["modules"]["halos_nb.generate"] = "of before"
            manifest.write_text(json.dumps(sealed))
        if what == "model":
            (Path(home.given["reward_checkpoint"]) / "weights").write_text("other")
        if what == "prompts":
            Path(home.given["prompts"]).write_text('[{"prompt": "another"}]')
        chosen = choose_run(home.config(), home.settings)
    assert chosen.run_name == "r-2"
    said = capsys.readouterr().out
    expected = dict(
        libraries="torch .* -> 9",
        modules="halos_nb.generate of before -> ",
        model=r"reward_model_path \(.*/rm\) contents \w{8} -> contents \w{8}",
        prompts=r"datasets \(.*prompts.json\) contents \w{8} -> contents \w{8}",
    )
    assert re.search(expected[what], said), said


@pytest.mark.parametrize("text", ["", "[]", '[{"prompt": "ano', '[{"prompt": 7}]'])
def test_prompts_that_cannot_be_read_are_told_before_a_run_beside_is_made(home, text):
    "Somebody is just writing them, say."
    file = Path(home.given["prompts"])
    file.write_text(json.dumps([dict(prompt=str(n)) for n in range(20)]))
    run = home.runs / "r"
    shutil.rmtree(run)
    home.go()
    file.write_text(text)
    with pytest.raises(RecordError, match="prompts.json"):
        choose_run(home.config(), home.settings)
    assert [p.name for p in home.runs.iterdir()] == ["r"]


def test_all_parameters_that_have_changed_are_named(home, capsys):
    "Also those of stages behind the first that would be done again."
    chosen = choose_run(home.config(temperature=0.5, beta=0.3, total_prompts=40), home.settings)
    said = capsys.readouterr().out
    assert chosen.run_name == "r-2"
    assert "temperature 1.0 -> 0.5" in said and "beta 0.2 -> 0.3" in said
    assert said.count("temperature") == 1 and "total_prompts" not in said


def test_more_prompts_simply_go_on(home, capsys):
    "A shorter last round stays, and so does the final of the shorter run."
    home.go(total_prompts=25)
    final = files_in(home.runs / "r/final")
    assert skipped(home.go(total_prompts=40))[:3] == [ALL, ALL, ALL]
    counts = [json.loads(p.read_text())["prompts"] for p in sampled(home)]
    assert counts == [10, 10, 5, 10, 5]
    assert files_in(home.runs / "r/final-after-3") == final
    # asked for the old length, what was there is found again
    assert skipped(home.go(total_prompts=25)) == [ALL, ALL, ALL, ["sample", "label"]]
    assert files_in(home.runs / "r/final") == final
    assert [p.name for p in home.runs.iterdir()] == ["r"]
    assert "made otherwise" not in capsys.readouterr().out


def sampled(home):
    return sorted((home.runs / "r").glob("round-*/samples.counts.json"))


@pytest.fixture(scope="module")
def evaluated(ended, tmp_path_factory):
    "The run, with evaluations that were asked for later: they change nothing of it."
    here = tmp_path_factory.mktemp("evaluated") / "home"
    shutil.copytree(ended, here, symlinks=True)
    write_records(here / "heldout.json", answers("h", 1))
    before = files_in(here / "runs/r/round-2")
    more = EVALUATING | dict(eval_prompts=str(here / "heldout.json"))
    assert skipped(Home(here).go(**more)) == [ALL, ALL, ["sample", "label"]]
    assert files_in(here / "runs/r/round-2") == before
    assert [p.name for p in (here / "runs").iterdir()] == ["r"]
    return here


# of the two rounds the first one's policy is not on disk any more
EVALUATING = dict(evaluate_every=1, eval_num_prompts=6, eval_samples=2, keep="all")


def answers(kind, n):
    "Samples of somebody else's."
    turns = [dict(role="user", content="0?")]
    row = dict(prompt_id=f"{kind}0", prompt=turns, output="yes", type="sample")
    return [row | dict(sample_id=k) for k in range(n)]


@pytest.fixture
def evaluating(evaluated, tmp_path):
    "A copy of it."
    shutil.copytree(evaluated, tmp_path / "home", symlinks=True)
    home = Home(tmp_path / "home")
    home.given |= EVALUATING | dict(eval_prompts=str(tmp_path / "home/heldout.json"))
    return home


def test_evaluations_are_taken_over(evaluating, capsys):
    "Nothing of them is done again in a run beside, up to the change."
    home = evaluating
    assert skipped(home.go()) == [ALL, ALL, ["sample", "label"]]
    assert skipped(home.go(beta=1.3)) == [["sample", "label"], [], []]
    assert [p.name for p in sorted(home.runs.iterdir())] == ["r", "r-2"]
    assert done_in(home.runs / "r-2") == ["evaluate-1"] * 3 + ["evaluate-2"] * 3
    said = capsys.readouterr().out
    assert "evaluate-2 evaluate, rm, sample" in said and "evaluate-0" not in said


def done_in(run):
    "Of which evaluations stages were done in a run, and not taken over."
    events = [event for event in ledger.read_events(run) if event["event"] == "started"]
    return [e["folder"] for e in events if e["folder"].startswith("evaluate-")]


def test_a_change_of_evaluations_alone_keeps_every_round(evaluating, capsys):
    "It stopped in the middle, when all that comes before was done."
    home = evaluating
    before = files_in(home.runs / "r")
    more = dict(eval_num_prompts=5)
    assert skipped(home.go(**more)) == [ALL, ALL, ["sample", "label"]]
    assert files_in(home.runs / "r") == before
    assert done_in(home.runs / "r-2") == ["evaluate-0"] * 3 + ["evaluate-2"] * 3
    said = capsys.readouterr().out
    assert "made otherwise, from evaluate-0 sample on:\n  num_prompts 6 -> 5\n" in said
    assert "4 sealed stages" in said
    assert "(evaluate-0 sample, rm; evaluate-2 sample, rm)" in said
    # once more it goes on there, and asks nothing again
    assert skipped(home.go(**more)) == [ALL, ALL, ["sample", "label"]]
    assert len(done_in(home.runs / "r-2")) == 6
    assert [p.name for p in sorted(home.runs.iterdir())] == ["r", "r-2"]


def test_another_file_to_compare_with_is_arithmetic_until_it_changes(evaluating):
    "What was computed before stays, renamed; what a labeller has said is never done again."
    home = evaluating
    theirs = home.runs.parent / "theirs.json"
    more = dict(eval_against=str(theirs))
    write_records(theirs, answers("h", 1))
    first = home.runs / "r/evaluate-0/evaluation.json"
    was = first.read_bytes()
    home.go(**more)
    assert first.with_name("evaluation.before-1.json").read_bytes() == was
    assert [p.name for p in home.runs.iterdir()] == ["r"]
    write_records(theirs, answers("h", 2))
    before = files_in(home.runs / "r")
    home.go(**more)
    assert files_in(home.runs / "r") == before
    assert [p.name for p in sorted(home.runs.iterdir())] == ["r", "r-2"]


def test_a_dry_run_leaves_a_run_as_it_was(home):
    before = (home.runs / "r/params.json").read_bytes()
    home.go(beta=0.4, dry_run=True)
    assert (home.runs / "r/params.json").read_bytes() == before
    assert [p.name for p in home.runs.iterdir()] == ["r"]


# ---- whose it is


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_another_driver_is_left_alone(home, fresh):
    run = home.runs / "r"
    whose = run / "run.json"
    for owner in ("reward_model", "label_by_hand", "playground"):
        whose.write_text(json.dumps(dict(made_by=owner)))
        before = files_in(run)
        with pytest.raises(NotOurs, match=f"was made by {owner}, and this is online_loop"):
            home.go(fresh=fresh)
        assert files_in(run) == before
    # folders of before do not say it, and are known by what lies in them
    whose.unlink()
    with pytest.raises(NotOurs, match="made by online_loop, and this is reward_model"):
        ledger.check_owner(run, "reward_model")
    (run / "pairs_train.json").write_text("[]")
    with pytest.raises(NotOurs, match="made by playground"):
        home.go(fresh=fresh)


# ---- damaged state

WRONG = {
    "empty": b"",
    "half": b'{"stage": "sam',
    "a list": b"[1, 2]",
    "a number": b"7",
    "no object": b"null",
    "other fields": b'{"a": 1}',
    "wrong types": b'{"identity": {"config": {}, "inputs": []}, "outputs": [], "pruned": 3}',
    "binary": bytes(range(256)),
    "deep": b"[" * 20_000,
}


def summaries(home):
    "Everything that tells of a run."
    run = home.runs / "r"
    rows = [row["round"] for row in run_summary(run)]
    health_rows(run)
    state = look(run).state
    table = RunComparer(home.runs, mode="static").table().text
    return rows, state, "r" in table, report(run).exists()


TOLD = (["1", "2", "final"], "finished", True, True)


@pytest.mark.parametrize("kind", WRONG)
def test_a_damaged_manifest_is_set_aside_and_its_stage_stands(home, capsys, kind):
    "The journal knows what the stage has made; nothing is done again."
    manifest = home.runs / "r/round-1/label.manifest.json"
    sealed = json.loads(manifest.read_text())
    manifest.write_bytes(WRONG[kind])
    assert summaries(home) == TOLD
    assert skipped(home.go()) == [ALL, ALL, ["sample", "label"]]
    assert json.loads(manifest.read_text()) == sealed
    aside = manifest.with_name("label.manifest.broken-1.json")
    assert aside.read_bytes() == WRONG[kind]
    said = capsys.readouterr().err
    assert "round-1/label.manifest.json" in said and aside.name in said
    assert summaries(home) == TOLD


@pytest.mark.parametrize("what", ["*/*.manifest.json", "round-1/sample.manifest.json"])
def test_a_manifest_that_is_gone_is_written_again(home, capsys, what):
    sealed = {path: json.loads(path.read_text()) for path in (home.runs / "r").glob(what)}
    assert sealed
    for path in sealed:
        path.unlink()
    assert skipped(home.go()) == [ALL, ALL, ["sample", "label"]]
    assert {path: json.loads(path.read_text()) for path in sealed} == sealed
    told = "round-1/sample.manifest.json: its manifest is gone, and sealed again"
    assert told in capsys.readouterr().err


def test_what_a_sealed_stage_is_done_again_for_is_said(home, capsys):
    (home.runs / "r/round-1/samples.counts.json").unlink()
    assert skipped(home.go())[0] == ["label", "train"]
    told = "r: round-1 sample is done again: round-1/samples.counts.json is not there"
    assert capsys.readouterr().err.count(told) == 1


@pytest.mark.parametrize("kind", ["no outputs", "another hash", "another output"])
def test_a_manifest_that_is_not_its_stages_is_named(home, capsys, kind):
    "It can be read, and says of the stage's files what is not so."
    manifest = home.runs / "r/round-1/label.manifest.json"
    sealed = json.loads(manifest.read_text())
    outputs = sealed["outputs"]
    if kind == "another hash":
        wrong = {name: "0" * 64 for name in outputs}
    else:
        wrong = {"round-1/other.json": "0" * 64} if kind == "another output" else {}
    write_json(manifest, sealed | dict(outputs=wrong))
    assert skipped(home.go()) == [ALL, ALL, ["sample", "label"]]
    assert json.loads(manifest.read_text()) == sealed
    said = capsys.readouterr().err
    assert "round-1/label.manifest.json: field `outputs`" in said and "sealed again" in said


OF_ANOTHER_KIND = {  # a field of a manifest or its identity, and what stands there
    "a path of the machine": ("outputs", {"THESIS": "0"}),
    "a way out": ("outputs", {"round-1/../../../thesis.txt": "0"}),
    "pruned and no output": ("pruned", ["round-1/other.json"]),
    "no libraries": ("libraries", None),
    "libraries of another kind": ("libraries", [None]),
    "modules": ("modules", 5),
    "inputs": ("inputs", [1]),
    "code": ("code", ["x"]),
    "function": ("function", 7),
    "made by nobody": ("made", [{"why": []}]),
}


@pytest.mark.parametrize("kind", OF_ANOTHER_KIND)
def test_a_manifest_of_another_kind_moves_nothing(home, capsys, kind):
    "It is named and set aside; what it names outside the run is left alone."
    thesis = home.runs.parent / "thesis.txt"
    thesis.write_text("years of work")
    manifest = home.runs / "r/round-1/label.manifest.json"
    sealed = json.loads(manifest.read_text())
    name, value = OF_ANOTHER_KIND[kind]
    if name == "outputs":
        value = sealed[name] | {k.replace("THESIS", str(thesis)): v for k, v in value.items()}
    (sealed if name in sealed or name == "made" else sealed["identity"])[name] = value
    write_json(manifest, sealed)
    summaries(home)
    assert skipped(home.go()) == [ALL, ALL, ["sample", "label"]]
    assert thesis.read_text() == "years of work"
    said = capsys.readouterr().err
    assert "round-1/label.manifest.json" in said and "sealed again" in said


@pytest.mark.parametrize(
    "counts", [dict(prompts=-1), dict(prompts="a"), dict(prompts_left=None)]
)
def test_damaged_counts_of_a_sealed_stage_are_named(home, counts):
    file = home.runs / "r/round-1/samples.counts.json"
    write_json(file, json.loads(file.read_text()) | counts)
    with pytest.raises(RecordError, match=r"round-1/samples.counts.json: field `prompts"):
        home.go()


LINES = {name: text for name, text in WRONG.items() if name not in ("empty", "binary")}
LINES |= {"bytes": b"\xff\xfe\x00", "a stage's": b'{"event": "finished", "stage": 1}'}
LINES |= {"a total": b'{"event": "run", "total_prompts": "a", "prompts_per_round": 8}'}
LINES |= {"endless": b'{"event": "run", "total_prompts": Infinity, "prompts_per_round": 8}'}
LINES |= {"a far time": b'{"event": "run", "time": 1e300}'}
LINES |= {"pruned": b'{"event": "pruned", "stage": "train", "folder": "round-1", "outputs": 1}'}
LINES |= {"a time": b'{"event": "run", "time": "now"}', "no seconds": b'{"event": "skipped"}'}


@pytest.mark.filterwarnings("ignore:.*passed over")
@pytest.mark.parametrize("kind", LINES)
def test_a_damaged_line_of_the_journal_is_set_aside(home, capsys, kind):
    journal = home.runs / "r/ledger.jsonl"
    first, *more = journal.read_bytes().splitlines(keepends=True)
    damaged = b"".join([first, LINES[kind], b"\n", *more])
    journal.write_bytes(damaged)
    assert summaries(home) == TOLD
    assert journal.read_bytes() == damaged  # who only looks changes nothing
    assert skipped(home.go()) == [ALL, ALL, ["sample", "label"]]
    assert (home.runs / "r/ledger.broken-1.jsonl").read_bytes() == damaged
    assert "ledger.jsonl: line 2" in capsys.readouterr().err
    assert read_journal(journal).lines[: 1 + len(more)] == [
        line.rstrip(b"\n") for line in (first, *more)
    ]


def test_files_of_writers_that_were_killed_are_cleaned(home):
    "Those of the dead alone."
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine = temporary(home.runs / "r/round-1/samples.json")
    left = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    theirs = mine.with_name(".samples.json.tmp")
    for path in (mine, left, theirs):
        path.write_text("half")
    home.go()
    assert [path.exists() for path in (mine, left, theirs)] == [True, False, True]


def test_a_clock_that_was_set_back_gives_no_negative_time(home):
    journal = home.runs / "r/ledger.jsonl"
    rows = []
    for number, line in enumerate(journal.read_text().splitlines()):
        row = json.loads(line)
        row["time"] -= 1e6 * number
        if "seconds" in row:
            row["seconds"] = -5.0
        rows.append(json.dumps(row) + "\n")
    journal.write_text("".join(rows))
    assert [row["seconds"] for row in run_summary(home.runs / "r")] == [0, 0, 0]
    assert look(home.runs / "r").elapsed == 0


def test_a_clock_that_was_set_ahead_gives_no_absurd_time(home):
    "The container had no clock when it began, say."
    took = look(home.runs / "r").elapsed
    journal = home.runs / "r/ledger.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    for row in rows[len(rows) // 2 :]:
        row["time"] += 56 * 365 * 86_400
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 0 <= look(home.runs / "r").elapsed <= took + 1


# ---- ways to lose what was paid for


def test_policies_that_were_to_be_kept_stay(home, capsys):
    "`keep` is no part of a result, and a later session's default removed what was asked for."
    home.go(keep="all", fresh=True)
    run = home.runs / "r"
    policies = sorted(run.glob("round-*/policy/FINAL"))
    before = files_in(run / "round-1")
    for _ in range(2):  # also when the last session was to keep as few as this one
        assert skipped(home.go()) == [ALL, ALL, ["sample", "label"]]
        assert sorted(run.glob("round-*/policy/FINAL")) == policies
        assert files_in(run / "round-1") == before
        assert "2 policies of sessions with keep=all stay" in capsys.readouterr().out
    home.go(on_change="redo")
    assert sorted(run.glob("round-*/policy/FINAL")) == policies[1:]


@pytest.mark.parametrize("taken", [0, 1])
def test_a_run_beside_that_was_killed_while_it_was_made_is_gone_on_with(
    home, monkeypatch, taken
):
    real, left = loop.take_stage, [taken]

    def killed(stage, run, other):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(stage, run, other)

    before = files_in(home.runs / "r")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_stage", killed)
        with pytest.raises(KeyboardInterrupt):
            home.go(beta=1.3)
    assert skipped(home.go(beta=1.3)) == [["sample", "label"], [], []]
    assert files_in(home.runs / "r") == before
    assert sorted(p.name for p in home.runs.iterdir()) == ["r", "r-2"]


def test_a_file_is_taken_over_whole_or_not_at_all(tmp_path, monkeypatch):
    "Half a manifest beside would have had its stage done again."
    (tmp_path / "a").write_text("whole")

    def half(source, target):
        Path(target).write_text("wh")
        raise OSError("killed")

    monkeypatch.setattr(ledger, "take_file", half)
    with pytest.raises(OSError, match="killed"):
        ledger.take_path(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_two_that_start_at_once_have_a_run_each(home):
    run = home.runs / "r"
    assert [loop.next_branch(run).name for _ in range(2)] == ["r-2", "r-3"]
    (home.runs / "r-4").write_text("a file")
    assert loop.next_branch(run).name == "r-5"


@pytest.mark.parametrize("told", ["null", "7", '""', '"../x"', '"a/b"', "[]"])
def test_a_damaged_origin_of_a_run_is_not_followed(home, told):
    run = home.runs / "r"
    (run / "run.json").write_text(f'{{"branch_of": {told}}}')
    assert loop.next_branch(run) == home.runs / "r-2"


@pytest.mark.parametrize("name", ["x" * 150, "\N{GREEK SMALL LETTER ALPHA}" * 75])
def test_a_run_beside_has_a_name_however_long_the_first_is(home, name):
    (home.runs / "r").rename(home.runs / name)
    chosen = [choose_run(home.config(run_name=name, beta=b), home.settings) for b in (1, 2, 1)]
    names = [one.run_name for one in chosen]
    assert names[0] == names[2] != names[1]
    assert all(n.endswith(("-2", "-3")) and len(n.encode()) <= 150 for n in names)


@pytest.mark.parametrize("kind", ["file", "link", "file above"])
def test_a_file_where_a_run_is_to_be_stays(tmp_path, kind):
    place = tmp_path / "runs/r"
    place.parent.mkdir()
    if kind == "link":
        place.symlink_to("nowhere")
    elif kind == "file":
        place.write_text("mine")
    else:
        place.parent.rmdir()
        place.parent.write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ValueError, match="and a run needs a folder there"):
            ledger.RunFolder(place, Profile(), fresh)
    assert os.path.lexists(place.parent)
    assert kind == "link" or next(tmp_path.rglob("r*")).exists()
    assert not (tmp_path / "runs/nowhere").exists()


def test_a_linked_run_is_the_same_run(home):
    "Who comes by another name goes on there; whoever works on it has it alone."
    (home.runs / "s").symlink_to("r")
    with ledger.RunFolder(home.runs / "r", Profile(), fresh=False):
        with pytest.raises(ledger.RunBusy):
            home.go(run_name="s")
    before = (home.runs / "r/round-1/policy/counts.json").read_bytes()
    with pytest.raises(ValueError, match="fresh: .*a link"):
        home.go(run_name="s", fresh=True)
    assert (home.runs / "r/round-1/policy/counts.json").read_bytes() == before


def test_a_folder_that_somebody_has_made_there_is_not_taken(home):
    "By its name alone a folder is no run beside."
    (home.runs / "r-2").mkdir()
    (home.runs / "r-2/thesis.txt").write_text("mine")
    assert choose_run(home.config(beta=0.4), home.settings).run_name == "r-3"
    assert files_in(home.runs / "r-2") == {"thesis.txt": b"mine"}


def test_a_run_beside_outlives_the_run_that_it_left(home):
    "Its files are its own."
    home.go(beta=1.3)
    shutil.rmtree(home.runs / "r")
    assert skipped(home.go(beta=1.3, run_name="r-2")) == [ALL, ALL, ["sample", "label"]]


def test_what_somebody_has_altered_is_not_lost_beside(home):
    "A feedback file that was mended by hand."
    file = home.runs / "r/round-1/feedback.json"
    file.write_text(file.read_text().replace('"prompt_id"', '"prompt_id" '))
    altered = file.read_bytes()
    home.go(beta=1.3)
    assert file.read_bytes() == altered
    kept = home.runs / "r-2/round-1/feedback.before-1.json"
    assert kept.read_bytes() == altered


def test_labels_made_by_hand_and_their_training_stay(tmp_path):
    "`label_by_hand` asks nobody: what a session trains anew has the first model beside it."
    for name, text in (("old", "1"), ("new", "2")):
        config = AuditConfig(model=name, json="x")
        stage = ledger.Stage("train", tmp_path, config, [], [tmp_path / "x/FINAL"])
        with Pretended(tmp_path, Profile(), aside=True) as made:
            made.job_for = lambda stage, clear, text=text: finished(stage, clear, text)
            made.run(stage)
    assert (tmp_path / "x/FINAL/weights").read_text() == "2"
    assert (tmp_path / "x/FINAL.before-1/weights").read_text() == "1"


def finished(stage, clear, text):
    "A job that has made a model."
    for path in clear:
        loop.remove(path)
    stage.outputs[0].mkdir(parents=True)
    (stage.outputs[0] / "weights").write_text(text)
    job = loop.Job(stage.name, stage.folder)
    job.poll, job.stop, job.wait = lambda: 0, lambda: None, lambda **shown: None
    job.file("status.json").write_text("{}")
    return job


def test_a_journal_in_another_encoding_is_set_aside(tmp_path):
    "As an editor may save it; a mark at its beginning changes nothing."
    path = tmp_path / "ledger.jsonl"
    text = '{"event": "x"}\n{"event": "y"}\n'
    path.write_text(text, "utf-8-sig")
    assert ledger.mend_journal(tmp_path) == "" and len(read_journal(path).events) == 2
    path.write_text(text, "utf-16")
    assert "set aside as ledger.broken-1.jsonl" in ledger.mend_journal(tmp_path)
    assert path.read_text() == "" and (tmp_path / "ledger.broken-1.jsonl").exists()


def test_a_copy_that_has_a_folder_for_the_link_goes_on(tmp_path, capsys):
    "`cp -rL` and many a cloud write what the link to the last policy led to."
    (tmp_path / "round-1/FINAL").mkdir(parents=True)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/weights").write_text("1")
    for _ in range(2):
        loop.point_to(tmp_path / "policy", tmp_path / "round-1/FINAL")
    assert os.readlink(tmp_path / "policy") == "round-1/FINAL"
    assert (tmp_path / "policy.before-1/weights").read_text() == "1"
    assert capsys.readouterr().err.count("policy.before-1") == 1


@pytest.mark.parametrize("name", ["ledger.jsonl", "params.json", "run.json", ".lock"])
def test_a_folder_where_a_file_of_the_run_belongs_is_set_aside(home, capsys, name):
    "Nothing in it is lost, and the run goes on."
    place = home.runs / "r" / name
    place.unlink()
    place.mkdir()
    (place / "thesis").write_text("years of work")
    assert skipped(home.go()) == [ALL, ALL, ["sample", "label"]]
    assert place.is_file()
    aside = place.with_name(f"{place.stem}.broken-1{place.suffix}")
    assert (aside / "thesis").read_text() == "years of work"
    if name != ".lock":
        assert (
            f"{name}: is a folder; it is set aside as {aside.name}" in capsys.readouterr().err
        )
    assert summaries(home) == TOLD


@pytest.mark.parametrize("name", ["samples.json", "samples.counts.json", "feedback.json"])
def test_a_folder_where_an_output_was_is_kept_beside(home, capsys, name):
    place = home.runs / "r/round-1" / name
    place.unlink()
    place.mkdir()
    (place / "thesis").write_text("years of work")
    home.go()
    aside = place.with_name(f"{place.stem}.before-1{place.suffix}")
    assert (aside / "thesis").read_text() == "years of work"
    assert place.is_file() and f"it is {aside.name} now" in capsys.readouterr().err
    assert summaries(home) == TOLD


@pytest.mark.parametrize("name", ["samples.json", "feedback.counts.json"])
def test_a_pipe_where_an_output_was_is_made_again(home, name):
    place = home.runs / "r/round-1" / name
    place.unlink()
    os.mkfifo(place)
    home.go()
    assert place.is_file() and summaries(home) == TOLD


# what is damaged, how, and where on the page that is said
PARTS = [
    ("audit.json", "[1]", "What the models see"),
    ("audit.json", '{"checks": 7}', "What the models see"),
    ("round-1/judge.counts.json", '{"prompts": -1}', "What was counted"),
    ("round-1/feedback.counts.json", "{", "What was counted"),
    ("round-1/samples.counts.json", None, "What was counted"),
    ("round-1/policy/counts.json", "7", "What was counted"),
    ("round-1/metrics.jsonl", '{"loss": "a"}\n', "Training"),
    ("round-1/feedback.json", "{}", "Margins"),
    ("round-1/label.config.json", "[1]", "Rounds"),
]


def text_of_section(page, heading):
    "What a page says under a heading."
    page = re.sub(r"(?s)<(script|style)\b.*?</\1>", "", page)
    return re.search(rf"(?s)<h2[^>]*>{heading}</h2>(.*?)(<h2|$)", page)[1]


@pytest.mark.parametrize("file, content, heading", PARTS)
def test_a_damaged_file_takes_its_own_part_away_alone(home, tmp_path, file, content, heading):
    "Summary, report, panel, comparison and card show the rest, and name the file."
    run = home.runs / "r"
    whole = run_summary(run)
    said = dict(prompt_id="p0", sample_id=0, labeller="function:other", score=1.0, reason="")
    for name in ("function.labels.jsonl",):  # so that label.config.json is read
        (run / "round-1" / name).write_text(json.dumps(said) + "\n")
    (run / file).unlink(missing_ok=True)
    (run / file).mkdir() if content is None else (run / file).write_text(content)
    rows = run_summary(run)
    assert rows[1:] == whole[1:]
    for name in ("round", "samples", "reward", "kl", "seconds"):
        assert rows[0][name] == whole[0][name]
    page = report(run, tmp_path / "report.html").read_text("utf-8")
    assert Path(file).name in text_of_section(page, heading)
    both = RunComparer(home.runs, mode="static")
    assert [one.name for one in both.runs] == ["r"]
    both.static()
    shown = RunMonitor(run, mode="static").static().text
    card_text(read_run(run))
    if "/" in file:
        assert file in rows[0]["damaged"] and file in shown and file in both.title(True)
    assert not any("damaged" in row for row in rows[1:])


def test_a_run_on_a_disk_without_locks_is_seen_to_run(home, monkeypatch):
    "A network disk without locks: the process that has the run is alive, or it is not."
    run = home.runs / "r"

    def none(file, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    driver = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (run / ".lock").write_text(f"process {driver.pid} on {socket.gethostname()}")
        assert not is_active(run)  # nobody has the lock
        monkeypatch.setattr(records.fcntl, "flock", none)
        assert is_active(run)
        assert "held by process" in stop_run(run, patience=0)
    finally:
        driver.communicate()
    assert not is_active(run)
    (run / ".lock").write_text(f"process {driver.pid} on another-host")
    assert not is_active(run)

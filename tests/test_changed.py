"""A run whose parameters, or whose files, are not what they were: nothing sealed is thrown away
unasked, and what is damaged is named and set aside.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from job_helpers import NEEDS_LINUX
from long_runs import Pretended, wait

from halos_nb import identity, ledger, loop
from halos_nb.compare import RunComparer
from halos_nb.configs import LoopConfig
from halos_nb.ledger import NotOurs, RunChanged, read_journal
from halos_nb.loop import choose_run, run_rounds
from halos_nb.monitor import look
from halos_nb.page import report
from halos_nb.records import temporary
from halos_nb.runs import health_rows, run_summary
from halos_nb.settings import Settings

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
    assert skipped(rounds) == [["sample", "label"], ["label"], ["label"]]
    assert [p.name for p in home.runs.iterdir()] == ["r"]
    assert "beta 0.2 -> 0.4" in capsys.readouterr().out


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
            Path(home.given["prompts"]).write_text("[ ]")
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


LINES = {name: text for name, text in WRONG.items() if name not in ("empty", "binary")}
LINES |= {"bytes": b"\xff\xfe\x00", "a stage's": b'{"event": "finished", "stage": 1}'}
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

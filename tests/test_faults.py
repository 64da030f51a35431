"""Everything that is killed goes on to the same bits, and no damage is passed over.

A part of it, seeded, is in CI; `make soak` does all of it and prints the tables.
"""

import os
import random
import shutil
import time

import pytest
from faults import (
    DAMAGES,
    Table,
    as_anybody,
    changes_of,
    copy_of,
    in_child,
    killed_at_call,
    killed_at_change,
    killed_behind,
    leftovers,
    outputs,
    traced,
    two_rounds,
)
from job_helpers import LAUNCHERS, NEEDS_LINUX, alive, until

from halos_nb.configs import EvaluateConfig, LabelConfig, SampleConfig
from halos_nb.failures import StageError
from halos_nb.jobs import launch, prepare
from halos_nb.preload import SERVERS
from halos_nb.records import as_turns, file_hash, write_records
from halos_nb.settings import Profile

SOAK = os.environ.get("HALOS_NB_LONG") == "soak"
soak = pytest.mark.skipif(not SOAK, reason="takes minutes: make soak")
pytestmark = [pytest.mark.timeout(7200 if SOAK else 1800), NEEDS_LINUX]


def some(numbers, count):
    "All of them in a soak, else a part that is always the same."
    numbers = list(numbers)
    return numbers if SOAK else random.Random(0).sample(numbers, count)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Two rounds that nobody disturbed: where, a copy, their outputs, their changes in order."
    home = tmp_path_factory.mktemp("whole") / "home"
    work = two_rounds(home)
    changes = changes_of(work, home / "runs", home.with_name("log"))
    copy = copy_of(home, home.with_name("copy"))
    return home, copy, outputs(home / "runs/long"), changes


def goes_on(home, table, row, made):
    "Start a run again; what became of it is one more in the table."
    log = home.with_name("log")
    code = in_child(two_rounds(home), log)
    run = home / "runs/long"
    said = log.read_text()
    if code == 0:
        found = "the same" if outputs(run) == made else "ANOTHER"
    else:
        found = "refused, with the path" if str(run) in said else "NO PATH"
    table.add(row, found)
    if found.isupper():
        print(f"{row}: {found}\n{said[-1500:]}")
    if left := leftovers(run):
        table.add(row, "files left behind")
        print(f"{row}: left {left}")


def no_loss(table):
    table.show()
    assert table.total("files left behind") == 0
    assert table.total("ANOTHER") == 0
    assert table.total("NO PATH") == 0


def test_two_rounds_killed_at_their_file_operations(whole):
    home, _, made, changes = whole
    table = Table("killed before")
    numbers = some(range(1, len(changes) + 1), 4)
    for number in numbers:
        shutil.rmtree(home)
        work = two_rounds(home)
        log = home.with_name("log")
        assert killed_at_change(work, home / "runs", number, log) == -9
        goes_on(home, table, changes[number - 1].split()[0], made)
    no_loss(table)
    assert table.total("the same") == len(numbers)


@soak
def test_two_rounds_killed_at_their_system_calls(whole):
    home, _, made, _ = whole
    log = home.with_name("log")
    shutil.rmtree(home)
    code, calls = traced(two_rounds(home), log)
    assert code == 0
    table = Table("killed within")
    for number in range(1, len(calls) + 1):
        shutil.rmtree(home)
        kind = killed_at_call(two_rounds(home), calls, number, log)
        assert kind, f"call {number} never came: {calls[number - 1]}"
        goes_on(home, table, kind, made)
    no_loss(table)
    assert table.total("the same") == len(calls)


# what a soak has found: these were errors without a path
FOUND = {("label.config.json", "is_half"), ("sample.config.json", "has_another_bit")}


def test_two_rounds_of_which_a_file_is_damaged(whole):
    "Any file of a run that is over: it is made again, or named."
    home, copy, made, _ = whole
    files = sorted(p.relative_to(copy) for p in (copy / "runs").rglob("*") if p.is_file())
    files = [file for file in files if not (copy / file).is_symlink()]
    cases = [(file, damage) for file in files for damage in DAMAGES]
    found = [(f, d) for f, d in cases if (f.name, d.__name__) in FOUND and "round-1" in f.parts]
    assert len(found) == len(FOUND)
    table = Table("a file of a run")
    for file, damage in some(cases, 5) + found * (not SOAK):
        copy_of(copy, home)
        damage(home / file)
        with as_anybody():
            goes_on(home, table, f"{damage.__name__} {file.name}", made)
    no_loss(table)


# ---- stages of a tiny model, each in a child of this process


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A tiny policy and reward model, pairs, and samples to be scored."
    from test_resume import make_home

    from halos_nb.models import load_reward_model, load_tokenizer

    home = make_home(tmp_path_factory.mktemp("start"))
    load_reward_model(str(home / "start")).save_pretrained(home / "rm")
    load_tokenizer(str(home / "start")).save_pretrained(home / "rm")
    rows = []
    for i in range(12):
        for k in range(3):
            prompt = as_turns(f"Say {i}", "user")
            row = dict(prompt_id=f"p{i}", sample_id=k, prompt=prompt, output="Yes" + "!" * k)
            rows.append(row | dict(type="sample"))
    write_records(home / "samples.json", rows)
    return home


def stage_config(start, stage, folder):
    "The config of a stage that writes into a folder."
    if stage == "train":
        from test_resume import config

        return config(start, cache_dir=str(folder), save_every=2, batch_size=4)
    if stage == "sample":
        return SampleConfig(
            model=str(start / "start"),
            reference=str(start / "start"),
            datasets=[str(start / "pairs.jsonl")],
            output_file=str(folder / "samples.json"),
            num_samples_per_prompt=2,
            max_new_tokens=5,
            batch_size=2,
        )
    return LabelConfig(
        samples_file=str(start / "samples.json"),
        output_file=str(folder / "feedback.json"),
        reward_model_path=str(start / "rm"),
        feedback_type="scalar",
        token_budget=60,
    )


def stage_work(start, stage, folder):
    "What a stage does, as its own process would."
    import importlib

    def work():
        os.environ["HALOS_NB_PROGRESS"] = str(folder / "progress.jsonl")
        folder.mkdir(exist_ok=True)
        cfg = stage_config(start, stage, folder)
        importlib.import_module(f"halos_nb.{stage}").main(cfg)

    return work


def made_by(stage, folder):
    "What a stage has made: the same bits each time."
    if stage == "train":
        from test_resume import lines

        files = sorted((folder / "run/FINAL").rglob("*"))
        return [file_hash(p) for p in files if p.is_file()], lines(folder / "run")
    names = dict(sample=["samples.json"], label=["feedback.json", "feedback.labels.jsonl"])
    return [(folder / name).read_bytes() for name in names[stage]]


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    "Of each stage: what it makes if nobody disturbs it, and how many seconds it takes."
    found = {}
    for stage in ("train", "sample", "label"):
        folder = tmp_path_factory.mktemp("undisturbed") / stage
        work = stage_work(start, stage, folder)
        began = time.monotonic()
        assert in_child(work, folder.parent / "log") == 0, (folder.parent / "log").read_text()
        found[stage] = made_by(stage, folder), time.monotonic() - began
    return found


def stage_goes_on(start, stage, folder, table, row, made):
    "Start a stage again; what became of it is one more in the table."
    log = folder.parent / "log"
    code = in_child(stage_work(start, stage, folder), log)
    said = log.read_text()
    if code == 0 and (left := leftovers(folder)):
        table.add(row, "files left behind")
        print(f"{row}: left {left}")
    if code == 0:
        found = "the same" if made_by(stage, folder) == made else "ANOTHER"
    else:
        found = "refused, with the path" if str(folder) in said else "NO PATH"
    table.add(row, found)
    if found.isupper():
        print(f"{row}: {found}\n{said[-1500:]}")


@soak
def test_stages_killed_at_their_system_calls(start, undisturbed, tmp_path):
    table = Table("stage, killed within")
    rng = random.Random(1)
    for stage, (made, _) in undisturbed.items():
        folder = tmp_path / stage
        code, calls = traced(stage_work(start, stage, folder), tmp_path / "log")
        assert code == 0
        numbers = sorted(rng.sample(range(1, len(calls) + 1), min(40, len(calls))))
        kills = 0
        for number in numbers:
            shutil.rmtree(folder)
            work = stage_work(start, stage, folder)
            kind = killed_at_call(work, calls, number, tmp_path / "log")
            kills += bool(kind)
            stage_goes_on(start, stage, folder, table, f"{stage}, {kind or 'whole'}", made)
        assert kills > len(numbers) * 0.8
    no_loss(table)


@soak
def test_stages_killed_at_200_moments(start, undisturbed, tmp_path):
    "Each attempt is killed up to four times on its way."
    table = Table("stage, killed times")
    rng = random.Random(2)
    kills = dict(train=100, sample=50, label=50)
    for stage, (made, seconds) in undisturbed.items():
        folder = tmp_path / stage
        while kills[stage] > 0:
            shutil.rmtree(folder, ignore_errors=True)
            times = 0
            for _ in range(rng.randrange(1, 5)):
                work = stage_work(start, stage, folder)
                moment = rng.uniform(0, seconds)
                times += killed_behind(work, moment, tmp_path / "log") == -9
            kills[stage] -= times
            folder.mkdir(exist_ok=True)
            stage_goes_on(start, stage, folder, table, f"{stage}, {times}", made)
    no_loss(table)


def before_its_end(changes):
    "The number of the change by which a stage's result gets its name."
    ends = ("FINAL", "samples.json", "feedback.json")
    named = [n for n, what in enumerate(changes, 1) if any(end in what for end in ends)]
    return max(n for n in named if changes[n - 1].startswith("os.rename"))


@soak
def test_a_killed_stage_of_which_a_file_is_damaged(start, undisturbed, tmp_path):
    "Checkpoints of steps, shards, journals: it goes on without them, or names them."
    for stage, (made, _) in undisturbed.items():
        table = Table(f"{stage}, damaged")
        killed, folder, log = tmp_path / "killed", tmp_path / stage, tmp_path / "log"
        work = stage_work(start, stage, folder)
        number = before_its_end(changes_of(work, folder, log))
        shutil.rmtree(folder)
        assert killed_at_change(work, folder, number, log) == -9
        shutil.rmtree(killed, ignore_errors=True)
        folder.rename(killed)
        files = sorted(p.relative_to(killed) for p in killed.rglob("*") if p.is_file())
        assert files, f"{stage}: nothing is left to be damaged"
        for file in files:
            for damage in DAMAGES:
                copy_of(killed, folder)
                damage(folder / file)
                with as_anybody():
                    row = f"{damage.__name__} {file}"
                    stage_goes_on(start, stage, folder, table, row, made)
        no_loss(table)


@soak
def test_an_evaluation_names_what_is_damaged(start, tmp_path):
    "Its reward model is a folder without a seal, made one here."
    from halos_nb.checkpoints import seal
    from halos_nb.evaluate import main as evaluate

    folder = copy_of(start / "rm", tmp_path / "rm")
    seal(folder)
    cfg = EvaluateConfig(
        samples_file=str(start / "samples.json"),
        output_file=str(tmp_path / "out.json"),
        reward_model_path=str(tmp_path / "broken"),
    )
    out = tmp_path / "out.json"
    copy_of(folder, tmp_path / "broken")
    assert in_child(lambda: evaluate(cfg), tmp_path / "log") == 0
    whole = out.read_bytes()
    out.unlink()
    table = Table("evaluate, a file of the reward model")
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        for damage in DAMAGES:
            copy_of(folder, tmp_path / "broken")
            damage(tmp_path / "broken" / path.name)
            with as_anybody():
                code = in_child(lambda: evaluate(cfg), tmp_path / "log")
            named = str(tmp_path / "broken" / path.name) in (tmp_path / "log").read_text()
            found = "refused, with the path" if named else "NO PATH"
            if (
                not code
            ):  # without its seal a folder is as one that never had any, and said to be
                told = "no manifest, so only what can be seen" in (tmp_path / "log").read_text()
                same = out.read_bytes() == whole
                found = "told, the same" if told and same else "ANOTHER"
                out.unlink()
            table.add(damage.__name__, found)
    no_loss(table)


# ---- ranks

FAULTS = ("raise", "kill", "stop", "exit 0", "exit 3", "hang", "grab", "close")
IN_TRAINING = ("hang while loading", "hang while saving", "kill while saving")


@soak
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_rank_that_fails_is_named_in_every_stage(start, launcher, tmp_path, stages_on_path):
    "In time, and nothing of the job is alive."
    patience = 30  # seconds
    two = Profile(num_processes=2, launcher=launcher, timeout_minutes=patience / 60)
    if prepare(two):  # copies of a server begin in a moment
        assert SERVERS[0].is_ready(600)
    print(f"\n| {launcher} | rank | seconds | said |\n|---|---|---|---|")
    for stage in ("sample", "label", "train"):
        for fault in FAULTS + IN_TRAINING * (stage == "train"):
            folder = tmp_path / f"{stage}-{fault.replace(' ', '-')}"
            folder.mkdir()
            fault_file = folder / "fault"
            fault_file.write_text(fault)
            cfg = stage_config(start, stage, folder)
            job = launch(stage, cfg, two, folder, module="faulty_stage")
            until(lambda file=fault_file: not file.exists(), 240, "the fault")
            began = time.monotonic()
            with pytest.raises(StageError) as raised:
                job.wait(show=False)
            seconds = time.monotonic() - began
            said = str(raised.value).splitlines()[0]
            print(f"| {stage}, {fault} | {raised.value.rank} | {seconds:.1f} | {said} |")
            assert raised.value.rank == 1, job.file("log").read_text()
            assert seconds < patience + 15
            assert not alive(folder)

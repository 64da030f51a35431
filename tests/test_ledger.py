"""The ledger: what is sealed stands, what is not is redone, and a run that is killed anywhere
ends in the same bits.
"""

import json
import ast
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from job_helpers import HERE, NEEDS_LINUX, ONE, maps_torch, quiet, until

from halos_nb import identity, jobs, preload
from halos_nb.configs import SampleConfig
from halos_nb.failures import StageError
from halos_nb.identity import Stage, code_hash
from halos_nb.ledger import Ledger, Running
from halos_nb.preload import ForkedProcess
from halos_nb.records import file_hash, read_jsonl
from halos_nb.settings import Profile

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("stages_on_path"),
    NEEDS_LINUX,
]


def chain(run, n=3, word="b"):
    "Stages that each read the output of the one before."
    stages = []
    source = run.parent / "start"
    for i in range(n):
        folder = run / f"round-{i + 1}"
        out = folder / "out"
        mode = f"append:{word}{i}"
        cfg = SampleConfig(model=mode, datasets=[str(source)], output_file=str(out))
        stages.append(Stage("sample", folder, cfg, [source], [out], i + 1, "tiny_stage"))
        source = out
    return stages


def in_order(ledger, stages):
    "Run stages, each told which comes next; whether each was run."
    return [ledger.run(stage, then=then) for stage, then in pairwise([*stages, None])]


def go(run, stages, profile=ONE):
    with Ledger(run, profile, watch=quiet) as ledger:
        return in_order(ledger, stages)


def test_what_was_drawn_is_scored_as_its_own_profile_says(run):
    "That of `score`, which may share models out, though the stage's name is another's."
    [stage] = chain(run, 1)
    scoring = dict(model="variables", reference="sft", drawn=str(run.parent / "start"))
    stage.config = SampleConfig(**vars(stage.config) | scoring)
    said = dict(accelerate_config="fsdp2_cpu2")
    go(run, [stage], Profile(stages=dict(score=said)))
    told = json.loads(stage.outputs[0].read_text())
    assert (told["ACCELERATE_USE_FSDP"], told["WORLD_SIZE"]) == ("true", "2")


def other_mode(stage, mode):
    "The stage, told to do something else."
    stage.config = SampleConfig(**{**vars(stage.config), "model": mode})
    return stage


def events(run, kind="started"):
    return [row for row in read_jsonl(run / "ledger.jsonl") if row["event"] == kind]


def hashes(run, n):
    return [file_hash(stage.outputs[0]) for stage in chain(run, n)]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "start").write_text("a\n")
    return tmp_path / "run"


# ---- what stands and what is redone


def flip_bit(file):
    "A flipped bit that hides: size and time stay."
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_sealed_stands_and_reasons_are_told(run):
    assert go(run, chain(run)) == [True] * 3
    assert go(run, chain(run)) == [False] * 3
    same_bits = Profile(num_processes=1, threads=2, timeout_minutes=3)
    assert go(run, chain(run), same_bits) == [False] * 3
    out = run / "round-2/out"
    flip_bit(out)
    assert go(run, chain(run)) == [False, True, False]
    out.unlink()
    assert go(run, chain(run)) == [False, True, False]
    # the journal knows what was written, so a damaged manifest costs nothing
    (run / "round-3/sample.manifest.json").write_text('{"stage": "sam')
    assert go(run, chain(run)) == [False] * 3
    assert json.loads((run / "round-3/sample.manifest.json").read_text())["stage"]
    assert [row["why"] for row in events(run)] == [
        "not finished before",
        "not finished before",
        "not finished before",
        "round-2/out is not what was written",
        "round-2/out is not there",
    ]


def test_what_changed_is_redone_and_what_follows(run, monkeypatch):
    go(run, chain(run))
    changed = chain(run)
    other_mode(changed[1], "append:other")
    assert go(run, changed) == [False, True, True]
    (run.parent / "start").write_text("A\n")
    assert go(run, changed) == [True] * 3
    monkeypatch.setattr(identity, "versions", lambda config, python: {"torch": "9"})
    assert go(run, changed) == [True] * 3
    assert [row["why"] for row in events(run)][-3:] == ["changed: libraries"] * 3


def test_another_number_of_processes(run):
    "Samples are the same bytes for any number; of training that holds only to rounding."
    go(run, chain(run, 2))
    two = Profile(name="cpu2", num_processes=2)
    assert go(run, chain(run, 2), two) == [False] * 2
    with Ledger(run, two, watch=quiet) as ledger:
        trained = chain(run, 1)[0]
        trained.name = "train"
        assert ledger.look(trained)["config"]["num_processes"] == 2


def test_a_moved_run_still_stands(run, tmp_path):
    go(run, chain(run))
    (tmp_path / "elsewhere").mkdir()
    moved = run.rename(tmp_path / "elsewhere/run")
    (tmp_path / "elsewhere/start").write_text("a\n")
    assert go(moved, chain(moved)) == [False] * 3


def test_code_is_the_closure_of_our_imports():
    rooms = ("records", "feedback", "data")
    assert len({code_hash(f"halos_nb.{room}") for room in rooms}) == 3
    source = identity.module_file("halos_nb.sample").read_text()
    needed = identity.our_modules(ast.parse(source))
    assert "halos_nb.records" in needed
    assert "halos_nb.jobs" not in needed


def test_code_that_changes_while_a_notebook_lives_is_noticed(tmp_path, monkeypatch):
    "The hash is kept for a file that stays as it was, and for no other."
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(text, at):
        (tmp_path / "a_stage.py").write_text(text)
        os.utime(tmp_path / "a_stage.py", ns=(at, at))
        return code_hash("a_stage")

    first = written("x = 1\n", 1)
    assert written("x = 1 # one\n", 2) == first  # a comment is no change
    assert written("x = 2\n", 3) != first
    assert written("from halos_nb import records\nx = 1\n", 4) != first


def test_a_failed_stage_is_not_sealed_and_an_output_that_is_missing_is_an_error(run):
    bad = other_mode(chain(run, 1)[0], "early")
    with pytest.raises(StageError, match="broken before joining"):
        go(run, [bad])
    assert not bad.manifest.exists()
    assert [row["event"] for row in read_jsonl(run / "ledger.jsonl")] == ["started"]
    with pytest.raises(RuntimeError, match="did not write .*round-1/out"):
        go(run, [other_mode(bad, "nothing")])
    assert go(run, chain(run, 1)) == [True]


def test_pruned_outputs_are_made_again_only_when_needed(run):
    stages = chain(run, 4)
    go(run, stages)
    bits = file_hash(run / "round-4/out")
    with Ledger(run, ONE, watch=quiet) as ledger:
        for stage in stages:
            ledger.run(stage)
        for stage in stages[:3]:
            ledger.prune(stage.outputs[0])
    assert [stage.outputs[0].exists() for stage in stages] == [False, False, False, True]
    assert go(run, stages) == [False] * 4
    (run / "round-4/out").unlink()
    assert go(run, stages) == [False] * 3 + [True]  # and the first three on the way
    assert file_hash(run / "round-4/out") == bits
    assert [row["round"] for row in events(run)] == [1, 2, 3, 4, 1, 2, 3, 4]


def test_two_ledgers_in_one_process_the_later_takes_over(run):
    first = Ledger(run, ONE, watch=quiet)
    first.run(chain(run)[0])
    assert go(run, chain(run)) == [False, True, True]
    with pytest.raises(RuntimeError, match="taken the run over"):
        first.run(chain(run)[0])


# ---- what is preloaded or started before its turn


# as with a GPU: no stage is a copy of a server
APART = Profile(launcher="accelerate")


def test_the_next_stage_is_preloaded_before_its_turn(run):
    seen = []

    def watch(job, **shown):
        seen.append((job, ledger.waiting and ledger.waiting[1]))
        quiet(job)

    with Ledger(run, APART, watch=watch) as ledger:
        assert in_order(ledger, chain(run)) == [True] * 3
    (_, first_waits), (second, second_waits), (third, nobody_waits) = seen
    assert second is first_waits
    assert third is second_waits
    assert nobody_waits is None
    changed = chain(run, word="c")
    with Ledger(run, APART, watch=watch) as ledger:
        assert ledger.run(changed[0], then=changed[1])
    assert seen[-1][1] is None  # it was finished before and may be skipped


@pytest.mark.parametrize("case", ["another comes", "it dies", "nothing comes", "interrupt"])
def test_who_waits_in_vain_is_gone(run, case):
    one, two, three = chain(run)

    def watch(job, **shown):
        quiet(job)
        if case == "interrupt":
            raise KeyboardInterrupt

    ledger = Ledger(run, APART, watch=watch)
    try:
        ledger.run(one, then=three if case == "another comes" else two)
    except KeyboardInterrupt:
        assert case == "interrupt"
    _, waiting = ledger.waiting
    assert waiting.poll() is None
    if case == "it dies":
        until(lambda: maps_torch(waiting), 300, "importing")
        os.kill(waiting.process.pid, signal.SIGKILL)
        waiting.process.wait()
    if case in ("another comes", "it dies"):
        assert ledger.run(two)
        assert (run / "round-2/out").exists()
    else:
        Ledger(run, APART, watch=quiet).close()  # a later cell takes the run over
    assert waiting.poll() is not None
    assert waiting.process.poll() is not None
    ledger.close()
    assert go(run, chain(run))[2]


def test_a_stage_that_was_started_while_somebody_looked(run):
    one, two, three = chain(run)
    with Ledger(run, ONE, watch=quiet) as ledger:
        assert ledger.run(one)
        ledger.start(two)
        job = ledger.running.job
        assert job.poll() is None
        assert not two.manifest.exists()
        looked = until(lambda: job.poll() is not None, 300, "at work")
        time.sleep(2)  # somebody looks for longer than it takes
        assert ledger.run(two)
        assert two.sealed()["seconds"] < looked + 1.5
        assert [row["folder"] for row in events(run)] == ["round-1", "round-2"]
        ledger.start(two)
        assert ledger.running is None  # its result stands
        assert not ledger.run(two)
        ledger.start(three)
    # closed while it ran: once more
    assert go(run, chain(run)) == [False, False, True]
    assert len(events(run)) == 4


@pytest.mark.parametrize("change", ["config", "input", "another"])
def test_a_stage_that_was_started_on_what_is_no_longer_true(run, change):
    one, two, _ = chain(run)
    with Ledger(run, ONE, watch=quiet) as ledger:
        assert ledger.run(one)
        ledger.start(two)
        early = ledger.running.job
        if change == "config":
            other_mode(two, "append:other")
        if change == "input":
            (run / "round-1/out").write_text("something else\n")
        if change == "another":
            assert not ledger.run(one)
        assert ledger.run(two)
        assert early.poll() is not None
        assert len(events(run)) == 3
    text = (run / "round-2/out").read_text()
    assert text.startswith("something else") == (change == "input")
    assert text.endswith("other\n") == (change == "config")


def test_copies_of_a_server_end_in_the_same_bits(run):
    with Ledger(run, APART, watch=quiet) as ledger:  # each a process of its own
        assert all([ledger.run(stage) for stage in chain(run, 4)])
    bits = hashes(run, 4)
    jobs.prepare(ONE)
    assert preload.SERVERS[0].is_ready(600)
    kinds = []

    def watch(job, **shown):
        kinds.append(type(job.process))
        quiet(job)

    with Ledger(run, ONE, fresh=True, watch=watch) as ledger:
        assert all([ledger.run(stage, then=stage) for stage in chain(run, 4)])
    assert kinds == [ForkedProcess] * 4
    assert hashes(run, 4) == bits


# ---- deaths

DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_ledger import chain, go
run = Path({run!r})
print(sum(go(run, chain(run, 5))))
"""


def drive(run):
    "A process that works on a run."
    code = DRIVER.format(tests=str(HERE), run=str(run))
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_after(process, seconds):
    "Whether it had to be killed; an error if it failed by itself."
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    assert process.returncode == 0, err
    return False


def test_killed_anywhere_it_ends_in_the_same_bits(run):
    go(run, chain(run, 5))
    bits = hashes(run, 5)
    rng = random.Random(0)
    kills = 0
    for _ in range(3):
        with Ledger(run, ONE, fresh=True):
            pass
        for attempt in range(6):
            seconds = rng.uniform(0.5, 2.0) if attempt < 5 else 120
            if not kill_after(drive(run), seconds):
                break
            kills += 1
        assert hashes(run, 5) == bits
        assert go(run, chain(run, 5)) == [False] * 5
    print(f"{kills} kills in 3 runs")
    assert kills >= 3


def test_second_process_is_refused(run):
    with Ledger(run, ONE):
        second = drive(run)
        _, err = second.communicate(timeout=60)
    assert second.returncode != 0
    assert f"process {os.getpid()}" in err
    assert "choose another run_name" in err


def test_interrupt_leaves_the_stage_unsealed_and_the_run_free(run):
    driver = drive(run)
    until((run / "round-2/sample.log").exists, 300, "the second stage")
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode != 0
    assert "KeyboardInterrupt" in err
    assert not (run / "round-3/out").exists()
    assert sum(go(run, chain(run, 5))) >= 3


class Impatient:
    "A job that is told to end, and is interrupted while it is waited for."

    def __init__(self):
        self.told = False

    def tell_to_end(self):
        self.told = True

    def stop(self):
        self.tell_to_end()
        raise KeyboardInterrupt


def test_a_second_interrupt_leaves_no_job_untold_and_the_run_free(run):
    "Ctrl-C twice: the second comes while the first job is waited for."
    ledger = Ledger(run, ONE)
    [stage] = chain(run, 1)
    running, beside, waiting, engine = (Impatient() for _ in range(4))
    ledger.running = Running(stage, {}, running, 0.0, 0.0)
    ledger.beside = Running(stage, {}, beside, 0.0, 0.0)
    ledger.waiting = stage, waiting
    ledger.engine = engine
    with pytest.raises(KeyboardInterrupt):
        ledger.close()
    assert all(job.told for job in (running, beside, waiting, engine))
    assert ledger.lock.closed
    Ledger(run, ONE).close()

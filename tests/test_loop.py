"""The loop: what is sealed stands, what is not is redone, and a run that is killed anywhere ends in the same bits."""

import json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest

from halos_nb import jobs, ledger, preload
from halos_nb.configs import LoopConfig, SampleConfig
from halos_nb.settings import Profile, Settings
from halos_nb.jobs import StageError
from halos_nb.ledger import Ledger, Stage, code_hash
from halos_nb.loop import run_rounds
from halos_nb.runs import run_summary
from halos_nb.records import file_hash, read_jsonl

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        sys.platform != "linux", reason="the supervisor's guarantee needs Linux"
    ),
]


@pytest.fixture(autouse=True)
def stages(monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    )
    monkeypatch.syspath_prepend(str(HERE))


def quiet(job, **shown):
    job.wait(show=False)


def chain(run, n=3, word="b"):
    "Stages that each read the output of the one before."
    found, source = [], run.parent / "start"
    for i in range(n):
        folder = run / f"round-{i + 1}"
        cfg = SampleConfig(
            model=f"append:{word}{i}", datasets=[str(source)], output_file=str(folder / "out")
        )
        found.append(
            Stage("sample", folder, cfg, [source], [folder / "out"], i + 1, "tiny_stage")
        )
        source = folder / "out"
    return found


def go(run, stages, profile=Profile()):  # noqa: B008
    with Ledger(run, profile, watch=quiet) as ledger:
        return [ledger.run(s, then=t) for s, t in zip(stages, [*stages[1:], None])]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "start").write_text("a\n")
    return tmp_path / "run"


def test_sealed_stands_and_reasons_are_told(run):
    assert go(run, chain(run)) == [True] * 3
    assert go(run, chain(run)) == [False] * 3
    # these do not change bits
    assert (
        go(run, chain(run), Profile(num_processes=1, threads=2, timeout_minutes=3))
        == [False] * 3
    )
    out = run / "round-2/out"
    data = bytearray(out.read_bytes())
    data[0] ^= 1
    # a flipped bit that hides
    stat = out.stat()
    out.write_bytes(data)
    os.utime(out, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert go(run, chain(run)) == [False, True, False]
    out.unlink()
    assert go(run, chain(run)) == [False, True, False]
    (run / "round-3/sample.manifest.json").write_text('{"stage": "sam')
    assert go(run, chain(run)) == [False, False, True]
    reasons = [e["why"] for e in read_jsonl(run / "ledger.jsonl") if e["event"] == "started"]
    assert reasons == ["not finished before"] * 3 + [
        "round-2/out is not what was written",
        "round-2/out is not there",
        "not finished before",
    ]


def test_what_changed_is_redone_and_what_follows(run, monkeypatch):
    go(run, chain(run))
    changed = chain(run)
    changed[1].config = SampleConfig(**{**vars(changed[1].config), "model": "append:other"})
    assert go(run, changed) == [False, True, True]
    (run.parent / "start").write_text("A\n")
    assert go(run, changed) == [True] * 3
    monkeypatch.setattr(ledger, "versions", lambda: {"torch": "9"})
    assert go(run, changed) == [True] * 3
    assert [e["why"] for e in read_jsonl(run / "ledger.jsonl") if e["event"] == "started"][
        -3:
    ] == ["changed: libraries"] * 3


def test_a_moved_run_still_stands(run, tmp_path):
    go(run, chain(run))
    (tmp_path / "elsewhere").mkdir()
    moved = run.rename(tmp_path / "elsewhere/run")
    (tmp_path / "elsewhere/start").write_text("a\n")
    assert go(moved, chain(moved)) == [False] * 3


def test_code_is_the_closure_of_our_imports():
    code = {m: code_hash(f"halos_nb.{m}") for m in ("records", "feedback", "data")}
    assert len(set(code.values())) == 3
    needed = ledger.our_modules(
        __import__("ast").parse(ledger.source("halos_nb.sample").read_text())
    )
    assert "halos_nb.records" in needed and "halos_nb.jobs" not in needed


def test_a_failed_stage_is_not_sealed_and_an_output_that_is_missing_is_an_error(run):
    bad = chain(run, 1)[0]
    bad.config = SampleConfig(**{**vars(bad.config), "model": "early"})
    with pytest.raises(StageError, match="broken before joining"):
        go(run, [bad])
    assert not bad.manifest.exists() and [
        e["event"] for e in read_jsonl(run / "ledger.jsonl")
    ] == ["started"]
    bad.config = SampleConfig(**{**vars(bad.config), "model": "nothing"})
    with pytest.raises(RuntimeError, match="did not write .*round-1/out"):
        go(run, [bad])
    assert go(run, chain(run, 1)) == [True]


def test_pruned_outputs_are_made_again_only_when_needed(run):
    stages = chain(run, 4)
    go(run, stages)
    bits = file_hash(run / "round-4/out")
    with Ledger(run, Profile(), watch=quiet) as ledger:
        for s in stages:
            ledger.run(s)
        for s in stages[:3]:
            ledger.prune(s.outputs[0])
    assert [s.outputs[0].exists() for s in stages] == [False, False, False, True]
    assert go(run, stages) == [False] * 4
    (run / "round-4/out").unlink()
    assert go(run, stages) == [False] * 3 + [True]  # and the first three on the way
    assert file_hash(run / "round-4/out") == bits
    assert [
        e["round"] for e in read_jsonl(run / "ledger.jsonl") if e["event"] == "started"
    ] == [1, 2, 3, 4, 1, 2, 3, 4]


def test_two_ledgers_in_one_process_the_later_takes_over(run):
    first = Ledger(run, Profile(), watch=quiet)
    first.run(chain(run)[0])
    assert go(run, chain(run)) == [False, True, True]
    with pytest.raises(RuntimeError, match="taken the run over"):
        first.run(chain(run)[0])


def test_code_that_changes_while_a_notebook_lives_is_noticed(tmp_path, monkeypatch):
    "The hash is kept for a file that stays as it was, and for no other; comments are no change."
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(text, at):
        (tmp_path / "a_stage.py").write_text(text)
        os.utime(tmp_path / "a_stage.py", ns=(at, at))
        return code_hash("a_stage")

    first = written("x = 1\n", 1)
    assert (
        written("x = 1 # one\n", 2) == first
        and written("x = 2\n", 3) != first
        and written("from halos_nb import records\nx = 1\n", 4) != first
    )


@pytest.fixture
def no_nursery(monkeypatch):
    "As with several processes, or a GPU."
    monkeypatch.setattr(ledger, "prepare", lambda profile: False)


def test_the_next_stage_is_ready_before_its_turn(run, no_nursery):
    seen = []

    def watch(job, **shown):
        seen.append((job, ledger.ahead and ledger.ahead.job))
        quiet(job)

    with Ledger(run, Profile(), watch=watch) as ledger:
        made = [ledger.run(s, then=t) for s, t in zip(chain(run), [*chain(run)[1:], None])]
    (one, ahead), (two, later), (three, last) = seen
    assert made == [True] * 3 and two is ahead and three is later and last is None
    changed = chain(run, word="c")
    with Ledger(run, Profile(), watch=watch) as ledger:
        assert ledger.run(changed[0], then=changed[1])
    assert seen[-1][1] is None  # it was finished before and may be skipped, so nothing waits


@pytest.mark.parametrize(
    "case", ["another comes", "it dies", "the code changes", "nothing comes", "interrupt"]
)
def test_who_waits_in_vain_is_gone(run, case, no_nursery):
    one, two, three = chain(run)

    def watch(job, **shown):
        quiet(job)
        if case == "interrupt":
            raise KeyboardInterrupt

    ledger = Ledger(run, Profile(), watch=watch)
    try:
        ledger.run(one, then=three if case == "another comes" else two)
    except KeyboardInterrupt:
        assert case == "interrupt"
    waiting = ledger.ahead.job
    assert waiting.poll() is None
    if case == "it dies":
        os.kill(waiting.process.pid, signal.SIGKILL)
        waiting.process.wait()
    if case == "the code changes":
        ledger.ahead = ledger.ahead._replace(code="older")
    if case in ("another comes", "it dies", "the code changes"):
        assert ledger.run(two) and (run / "round-2/out").exists()
    else:
        Ledger(run, Profile(), watch=quiet).close()  # a later cell takes the run over
    assert waiting.poll() is not None and waiting.process.poll() is not None
    ledger.close()
    assert go(run, chain(run))[2]


def started(run):
    return [e["folder"] for e in read_jsonl(run / "ledger.jsonl") if e["event"] == "started"]


def test_a_stage_that_was_started_while_somebody_looked(run):
    one, two, three = chain(run)
    with Ledger(run, Profile(), watch=quiet) as ledger:
        assert ledger.run(one)
        ledger.start(two)
        job = ledger.begun.job
        assert job.poll() is None and not two.manifest.exists()
        while job.poll() is None:
            time.sleep(0.02)
        time.sleep(1)  # somebody looks for longer than it takes
        assert (
            ledger.run(two)
            and two.sealed()["seconds"] < 3
            and started(run) == ["round-1", "round-2"]
        )
        ledger.start(two)
        assert ledger.begun is None and not ledger.run(two)  # its result stands
        ledger.start(three)
    # closed while it ran: once more
    assert go(run, chain(run)) == [False, False, True] and len(started(run)) == 4


@pytest.mark.parametrize("change", ["config", "input", "another"])
def test_a_stage_that_was_started_on_what_is_no_longer_true(run, change):
    one, two, three = chain(run)
    with Ledger(run, Profile(), watch=quiet) as ledger:
        assert ledger.run(one)
        ledger.start(two)
        early = ledger.begun.job
        if change == "config":
            two.config = SampleConfig(**{**vars(two.config), "model": "append:other"})
        if change == "input":
            (run / "round-1/out").write_text("something else\n")
        if change == "another":
            assert not ledger.run(one)
        assert ledger.run(two) and early.poll() is not None
        assert len(started(run)) == 3
    text = (run / "round-2/out").read_text()
    assert text.startswith("something else") == (change == "input") and text.endswith(
        "other\n"
    ) == (change == "config")


def test_copies_of_a_nursery_end_in_the_same_bits(run, monkeypatch):
    kinds = []
    with monkeypatch.context() as m:
        m.setattr("halos_nb.ledger.prepare", lambda profile: False)
        m.setattr(preload, "KEPT", [])
        assert all(go(run, chain(run, 4)))
    bits = [file_hash(s.outputs[0]) for s in chain(run, 4)]
    jobs.prepare(Profile())
    assert preload.KEPT[0].waits(60)
    with Ledger(
        run,
        Profile(),
        fresh=True,
        watch=lambda job, **shown: (kinds.append(type(job.process)), quiet(job)),
    ) as ledger:
        assert all([ledger.run(s, then=s) for s in chain(run, 4)])
    assert kinds == [preload.Forked] * 4 and bits == [
        file_hash(s.outputs[0]) for s in chain(run, 4)
    ]


DRIVER = """
import sys; from pathlib import Path; from halos_nb.settings import Profile
sys.path.insert(0, {tests!r})
from test_loop import chain, go
run = Path({run!r})
print(sum(go(run, chain(run, 5))))
"""


def drive(run):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(tests=str(HERE), run=str(run))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_anywhere_it_ends_in_the_same_bits(run):
    go(run, chain(run, 5))
    bits = [file_hash(s.outputs[0]) for s in chain(run, 5)]
    rng, kills = random.Random(0), 0
    for _ in range(3):
        with Ledger(run, Profile(), fresh=True):
            pass
        for attempt in range(6):
            p = drive(run)
            try:
                _, err = p.communicate(timeout=rng.uniform(0.5, 2.0) if attempt < 5 else 60)
            except subprocess.TimeoutExpired:
                p.kill()
                p.communicate()
                kills += 1
            else:
                assert p.returncode == 0, err
                break
        assert [file_hash(s.outputs[0]) for s in chain(run, 5)] == bits
        assert go(run, chain(run, 5)) == [False] * 5
    print(f"{kills} kills in 3 runs")
    assert kills >= 3


def test_second_process_is_refused(run):
    with Ledger(run, Profile()):
        p = drive(run)
        _, err = p.communicate(timeout=30)
    assert (
        p.returncode != 0
        and f"process {os.getpid()}" in err
        and "choose another run_name" in err
    )


def test_interrupt_leaves_the_stage_unsealed_and_the_run_free(run):
    p = drive(run)
    until = time.monotonic() + 20
    while not (run / "round-2/sample.log").exists() and time.monotonic() < until:
        time.sleep(0.02)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=20)
    assert p.returncode != 0 and "KeyboardInterrupt" in err
    assert not (run / "round-3/out").exists()
    assert sum(go(run, chain(run, 5))) >= 3


# --- whole rounds, with stages that pretend
# --------------------------------------------------------------------------


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ledger, "launch", lambda *a, real=ledger.launch, **k: real(*a[:4], "pretend", **k)
    )
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

    def rounds(look=lambda r: None, **more):
        return [
            (look(r), r)[1]
            for r in run_rounds(
                LoopConfig(**given | more),
                Settings(runs_dir=str(tmp_path / "runs")),
                watch=quiet,
            )
        ]

    return rounds


def test_rounds_follow_each_other(pretend, tmp_path):
    rounds, run = pretend(total_prompts=25, prompts_per_round=10), tmp_path / "runs/r"
    assert [(r.number, r.name, r.counts["sample"]["prompts"], r.note) for r in rounds] == [
        (1, "round-1", 10, ""),
        (2, "round-2", 10, ""),
        (3, "round-3", 5, ""),
        (None, "final", 10, ""),
    ]
    seen = [{s["prompt_id"] for s in json.loads(r.samples_file.read_text())} for r in rounds]
    # every round, the final one too, has prompts of its own
    assert sum(map(len, seen)) == len(set.union(*seen)) == 35
    configs = [json.loads((r.folder / "train.config.json").read_text()) for r in rounds[:3]]
    assert [c["from_checkpoint"] for c in configs] == [
        None,
        str(rounds[0].policy),
        str(rounds[1].policy),
    ]
    assert {c["load_from"] for c in configs} == {str(tmp_path / "sft")} and all(
        c["online"] for c in configs
    )
    sampled = [json.loads((r.folder / "sample.config.json").read_text()) for r in rounds]
    assert [c["model"] for c in sampled] == [
        str(tmp_path / "sft"),
        *(str(r.policy) for r in rounds[:3]),
    ]
    assert len({c["seed"] for c in sampled}) == 4 and {c["reference"] for c in sampled} == {
        str(tmp_path / "sft")
    }
    assert [r.policy.exists() for r in rounds] == [False, False, True, True] and (
        tmp_path / "sft/weights"
    ).exists()
    assert (run / "policy").resolve() == rounds[2].policy and not Path(
        os.readlink(run / "policy")
    ).is_absolute()
    params = json.loads((run / "params.json").read_text())
    assert (params["ended"], params["rounds"], params["parameters"]["beta"]) == (
        "as planned",
        3,
        0.1,
    )
    assert [row["round"] for row in run_summary(run)] == [
        "1",
        "2",
        "3",
        "final",
    ] and run_summary(run)[0]["kl"] == 0.5


def test_rounds_resume_shrink_and_start_afresh(pretend, tmp_path):
    pretend(total_prompts=30, prompts_per_round=10)
    assert [r.skipped for r in pretend(total_prompts=30, prompts_per_round=10)] == [
        ["sample", "label", "train"]
    ] * 3 + [["sample", "label"]]
    # round 2's pruned policy is needed for other final samples
    shorter = pretend(total_prompts=20, prompts_per_round=10)
    assert [len(r.skipped) for r in shorter] == [3, 3, 0] and shorter[1].policy.exists()
    assert [row["round"] for row in run_summary(tmp_path / "runs/r")] == ["1", "2", "final"]
    assert [r.skipped for r in pretend(total_prompts=20, prompts_per_round=10, fresh=True)] == [
        [],
        [],
        [],
    ]
    assert not (tmp_path / "runs/r/round-3").exists()


def test_the_next_round_samples_while_the_last_is_looked_at(pretend, tmp_path):
    seen = []

    def looked(r):
        seen.append(
            [
                e["folder"]
                for e in read_jsonl(tmp_path / "runs/r/ledger.jsonl")
                if e["event"] == "started"
            ][-1]
        )

    pretend(looked, total_prompts=30, prompts_per_round=10)
    assert seen == ["round-2", "round-3", "final", "final"]


def test_prompts_that_run_out_exactly_end_the_run(pretend, tmp_path):
    rounds = pretend(total_prompts=60, prompts_per_round=20)
    assert [r.name for r in rounds] == ["round-1", "round-2", "final"]
    assert (
        rounds[1].note == "prompts ran out: 40 of 60, so this is the last round"
        and "last round's again" in rounds[2].note
    )
    assert (
        "prompts ran out" in json.loads((tmp_path / "runs/r/params.json").read_text())["ended"]
    )


def test_a_round_that_fails_is_continued_when_the_cause_is_gone(pretend):
    with pytest.raises(StageError, match="no pairs; lower `threshold`"):
        pretend(total_prompts=10, prompts_per_round=10, threshold=50.0)
    assert [r.skipped for r in pretend(total_prompts=10, prompts_per_round=10)] == [
        ["sample"],
        [],
    ]

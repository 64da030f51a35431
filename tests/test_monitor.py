"The monitor tells from files where a run is, reads each line once, and stops only what runs."

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from halos_nb.configs import LoopConfig, SampleConfig
from halos_nb.settings import Profile, Settings
from halos_nb.failures import StageError
from halos_nb.figures import end_to_end
from halos_nb.jobs import launch
from halos_nb.progress import last_line
from halos_nb.loop import run_rounds
from halos_nb.monitor import (
    RoundView,
    RunMonitor,
    RunState,
    Stopped,
    Tail,
    is_active,
    log_tail,
    look,
    metric_charts,
    panels,
    session_seconds,
    stop_run,
    supervisors,
    time_left,
)
from halos_nb.records import append_jsonl, is_locked
from halos_nb.stats import floats

HERE = Path(__file__).resolve().parent
SLOW = (
    "import json, sys, time\nfrom halos_nb.records import Progress\nwith Progress(600, "
    "'prompts', 'sampling') as p:\n    for i in range(600): time.sleep(0.1); p.update(); "
    "print('line', i, flush=True)\n"
)


@pytest.fixture(autouse=True)
def stages(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{HERE}")


def until(true, seconds=30):
    late = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < late, "it did not happen"
        time.sleep(0.02)


def running(run, folder="round-1"):
    "A stage that works, with the ledger's line about it."
    (run / folder).mkdir(parents=True, exist_ok=True)
    append_jsonl(
        run / "ledger.jsonl",
        dict(event="started", time=time.time(), stage="sample", round=1, folder=folder),
    )
    job = launch("sample", SampleConfig(model="m"), Profile(), run / folder, module="slow")
    until(lambda: last_line(job.file("progress.jsonl")).get("done"))
    return job


def test_tail_reads_what_read_jsonl_reads_however_it_is_cut(tmp_path):
    lines = b"".join(
        json.dumps(dict(step=i, text="é" * (i % 7))).encode() + b"\n" for i in range(50)
    )
    path, tail, at = tmp_path / "m.jsonl", Tail(tmp_path / "m.jsonl"), 0
    with open(path, "wb", buffering=0) as f:
        for size in [1, 2, 3, 5, 8, 13, 21, 34, 55] * 20:
            f.write(lines[at : at + size])
            at += size
            assert [r["step"] for r in tail.read()] == list(range(lines[:at].count(b"\n")))
    path.unlink()
    assert tail.read() == []
    path.write_bytes(b'{"step": 9}\n[1]\nnull\n\n')
    assert tail.read() == [dict(step=9)]
    assert tail.bad == 2


def test_log_tail_takes_the_end_only(tmp_path):
    (tmp_path / "a.log").write_bytes(
        b"x" * 100_000
        + b"\n"
        + b"".join(b"line %d\n" % i for i in range(100))
        + b"\xff\xfe broken\n\x1b]0;title\x07bell"
    )
    lines = log_tail(tmp_path / "a.log")
    assert len(lines) == 20
    assert lines[0] == "line 82"
    assert "\x1b" not in "".join(lines)
    assert "\x07" not in "".join(lines)
    assert len(log_tail(tmp_path / "a.log", 3)) == 3


def test_stop_ends_this_run_within_two_seconds_and_no_other(tmp_path):
    # a name that begins like the other
    mine, other = running(tmp_path / "runs/a"), running(tmp_path / "runs/ab")
    try:
        start = time.monotonic()
        assert stop_run(tmp_path / "runs/a") == "stopped"
        assert time.monotonic() - start < 2
        mine.process.wait()
        assert json.loads(mine.file("status.json").read_text()) == {
            "exit": -signal.SIGTERM,
            "stopped": True,
        }
        assert look(tmp_path / "runs/a").state == "stopped"
        assert look(tmp_path / "runs/ab").state == "running"
        assert supervisors(tmp_path / "runs/ab") == {
            other.process.pid: other.file("status.json")
        }
        assert is_locked(other.file("log"))
    finally:
        other.stop()


def test_a_number_that_is_used_again_is_not_told_to_end(tmp_path):
    "Of a killed supervisor its number stays; who has it now does not write to the stage's log."
    job, bystander = running(tmp_path / "run"), subprocess.Popen(["sleep", "60"])
    try:
        job.file("status.json.pid").write_text(str(bystander.pid))
        assert not supervisors(tmp_path / "run")
        assert bystander.poll() is None
        job.file("status.json.pid").write_text("")
        assert not supervisors(tmp_path / "run")
        job.file("status.json.pid").write_text(str(job.process.pid))
        assert supervisors(tmp_path / "run") == {job.process.pid: job.file("status.json")}
    finally:
        job.stop()
        bystander.kill()
        bystander.wait()


def test_stop_reaches_a_run_of_another_process_between_two_stages(tmp_path):
    "Its lock is held and no stage is there: the next one is ended as it starts."
    script = f"""
import sys, time
from pathlib import Path
from halos_nb.configs import SampleConfig
from halos_nb.ledger import Ledger, Stage
from halos_nb.settings import Profile
run = Path({str(tmp_path / "run")!r})
with Ledger(run, Profile()) as ledger:
    print('held', flush=True); time.sleep(1.5)
    config, made = SampleConfig(model='m'), [run / 'round-1/out']
    ledger.run(Stage('sample', run / 'round-1', config, [], made, 1, 'slow'))
"""
    p = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert p.stdout.readline() == "held\n"
    assert is_active(tmp_path / "run")
    assert not supervisors(tmp_path / "run")
    assert stop_run(tmp_path / "run", patience=20) == "stopped"
    assert "its supervisor was ended by SIGTERM" in p.communicate(timeout=20)[1]
    assert not is_active(tmp_path / "run")
    assert stop_run(tmp_path / "run") == "nothing was running"


def test_looking_never_hinders_a_run_that_starts(tmp_path):
    "A hundred looks a second while jobs start in the same folder and its lock is taken often."
    from halos_nb.ledger import Ledger

    over, run = threading.Event(), tmp_path / "run"

    def watch():
        while not over.is_set():
            look(run)
            is_active(run)
            time.sleep(0.01)

    with Ledger(run, Profile()):
        pass
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(3):
            running(run).stop()
        for _ in range(200):
            with Ledger(run, Profile()):
                pass
    finally:
        over.set()
        watcher.join()


def pretend_run(tmp_path, **more):
    "Config and settings of the loop over stages without a model."
    for name in ("sft", "rm"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "prompts.json").write_text("[]")
    cfg = LoopConfig(
        run_name="pretended",
        lr=3e-4,
        total_prompts=6,
        prompts_per_round=2,
        num_samples_per_prompt=2,
        sft_checkpoint=str(tmp_path / "sft"),
        reward_checkpoint=str(tmp_path / "rm"),
        prompts=str(tmp_path / "prompts.json"),
        audit="skip",
        **more,
    )
    return cfg, Settings(runs_dir=str(tmp_path / "runs"))


@pytest.fixture
def pretend(monkeypatch):
    "The loop starts the pretended stages; from now on in place of `slowly` the slow one."
    from halos_nb import ledger

    real, slowly = ledger.launch, []
    monkeypatch.setattr(
        ledger,
        "launch",
        lambda stage, cfg, profile, folder, module, **k: real(
            stage,
            cfg,
            profile,
            folder,
            "slow" if (stage, Path(folder).name) in slowly else "pretend",
            **k,
        ),
    )
    return slowly


def test_a_run_of_the_loop_from_start_to_end(tmp_path, pretend):
    cfg, settings = pretend_run(tmp_path)
    run, seen = tmp_path / "runs/pretended", []
    watching = RunMonitor(run, mode="static")
    assert watching.look().state == "nothing yet"
    assert watching.summary() == []
    assert watching.metrics() == {}

    def watch(job, title="", next=""):
        s = watching.look()
        seen.append((s.state, s.round, s.stage, s.left is not None))
        watching.wait(job, title, next)

    names = [r.name for r in run_rounds(cfg, settings, watch=watch)]
    assert names == ["round-1", "round-2", "round-3", "final"]
    stages = ["sample", "label", "train"]
    assert [s[:3] for s in seen] == [
        ("running", f"round {r} of 3", s) for r in (1, 2, 3) for s in [*stages, "check"]
    ] + [("running", "final", s) for s in stages[:2]]
    # a time is told once every kind of stage has been seen
    assert [s[3] for s in seen] == [False] * 4 + [True] * 10
    s = watching.look()
    assert s.state == "finished"
    assert s.left is None
    assert s.stage == ""
    assert [r["round"] for r in watching.summary()] == ["1", "2", "3", "final"]
    assert [p["title"] for p in panels(watching.metrics(), watching.shown_rounds())] == [
        "Reward per round",
        "KL to the reference",
        "Scores of the last policy",
        "Loss",
        "Accuracy (share of pairs)",
    ]
    assert "round" in watching.static().text
    assert "final" in watching.static().html


def test_stopped_and_continued(tmp_path, pretend):
    "Stop in round 2: one line, no error page; started again the run ends as it should."
    cfg, settings = pretend_run(tmp_path)
    run = tmp_path / "runs/pretended"
    watching = RunMonitor(run, mode="static")
    pretend.append(("label", "round-2"))
    said = []

    def stop_when_there():
        until(
            lambda: (
                (s := look(run)).round == "round 2 of 3"
                and s.stage == "label"
                and s.row.get("done")
            ),
            60,
        )
        said.append(watching.stop())

    thread = threading.Thread(target=stop_when_there)
    thread.start()
    done = []
    with pytest.raises(
        Stopped, match="pretended, round 2 of 3 · label; run this again"
    ) as stopped:
        for r in run_rounds(cfg, settings, watch=watching.wait):
            done.append(r.name)
    thread.join()
    assert said == ["stopped"]
    assert done == ["round-1"]
    assert stopped.value._render_traceback_() == [f"Stopped: {stopped.value}"]
    assert look(run).state == "stopped"
    assert not watching.stopping
    assert not is_active(run)
    pretend.clear()
    rounds = list(run_rounds(cfg, settings, watch=watching.wait))
    assert [r.name for r in rounds] == ["round-1", "round-2", "round-3", "final"]
    assert rounds[0].skipped == ["sample", "label", "train", "check"]
    assert rounds[1].skipped == ["sample"]
    assert look(run).state == "finished"


def test_stop_between_two_stages_of_this_process(tmp_path, pretend):
    "Pressed while the notebook draws: the next stage is not run."
    cfg, settings = pretend_run(tmp_path)
    watching = RunMonitor(tmp_path / "runs/pretended", mode="static")
    rounds = run_rounds(cfg, settings, watch=watching.wait)
    next(rounds)
    thread = threading.Thread(target=watching.stop)
    thread.start()
    until(lambda: watching.stopping)
    with pytest.raises(Stopped):
        next(rounds)
    thread.join()
    assert not watching.stopping
    assert not supervisors(tmp_path / "runs/pretended")


def test_a_failure_is_told_and_not_hidden_as_a_stop(tmp_path, pretend):
    cfg, settings = pretend_run(tmp_path)
    watching = RunMonitor(tmp_path / "runs/pretended", mode="static")
    with pytest.raises(StageError, match="no pairs; lower"):
        list(run_rounds(replace(cfg, threshold=99.0), settings, watch=watching.wait))
    s = watching.look()
    assert s.state == "failed"
    assert "no pairs; lower" in s.note
    assert "no pairs" in watching.warning(s)
    assert "Traceback" in "".join(s.log)


def test_a_killed_process_leaves_a_run_that_says_so(tmp_path):
    run = tmp_path / "run"
    script = f"""
import time
from pathlib import Path
from halos_nb.configs import SampleConfig
from halos_nb.ledger import Ledger, Stage
from halos_nb.settings import Profile
run = Path({str(run)!r})
config, made = SampleConfig(model='m'), [run / 'round-1/out']
with Ledger(run, Profile()) as ledger:
    ledger.run(Stage('sample', run / 'round-1', config, [], made, 1, 'slow'))
"""
    p = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until(lambda: look(run).row.get("done"))
    assert look(run).state == "running"
    assert is_active(run)
    p.kill()
    p.wait()
    until(lambda: look(run).state != "running")
    # its supervisor saw the pipe close and said so
    assert look(run).state in ("stopped", "killed")
    assert not is_active(run)
    (run / "round-1/sample.status.json").unlink(missing_ok=True)
    assert look(run).state == "killed"


def test_stale_warning_after_a_minute_and_gone_with_news(tmp_path):
    job = running(tmp_path / "run")
    try:
        watching = RunMonitor(tmp_path / "run", mode="static")
        assert watching.warning(watching.look()) == ""
        assert "nothing new for 1:" in watching.warning(
            look(tmp_path / "run", now=time.time() + 65)
        )
    finally:
        job.stop()
    # it does not run, so nothing is awaited
    assert "nothing new" not in watching.warning(look(tmp_path / "run", now=time.time() + 65))


def test_damaged_files_are_told(tmp_path):
    run = tmp_path / "run"
    (run / "round-1").mkdir(parents=True)
    (run / "ledger.jsonl").write_text(
        '{"event": "run", "time": 1.0}\n{"event": "started", "time": 2.0, "stage": '
        '"train", "folder": "round-1"}\n'
    )
    (run / "round-1/train.config.json").write_text(
        json.dumps(dict(metrics_file=str(run / "round-1/metrics.jsonl")))
    )
    (run / "round-1/metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n!!\n')
    (run / "params.json").write_text("{")
    watching = RunMonitor(run, mode="static")
    assert watching.metrics() == {"round-1": [dict(step=1, loss=0.7)]}
    assert "1 lines of metrics cannot be read" in watching.warning(watching.look())
    assert watching.look().state == "killed"


def test_curves_of_earlier_looks_are_kept_and_are_those_of_all_lines():
    "Steps that go on or begin anew, values that are missing, a file that was begun again."
    rng = random.Random(0)
    known, metrics, step = {}, {}, 0
    for number in range(12):
        rows = metrics[f"round-{number}"] = []
        step = step if number % 3 else 0
        for _ in range(rng.choice([0, 1, 5])):
            step += 1
            row = dict(step=step, loss=rng.random(), grad_norm=rng.choice([None, 2.0]))
            rows.append(row if rng.random() < 0.8 else dict(step=step, lr=1e-3))
            charts = metric_charts(metrics, known)
            assert charts == metric_charts(metrics)
        if number == 6:  # the training was done again: other lines, as many
            metrics["round-4"] = [row | dict(loss=9.0) for row in metrics["round-4"]]
    rows, ends = end_to_end(metrics)
    [loss] = [chart for chart in charts if chart["title"] == "Loss"]
    told = [row for row in rows if "loss" in row]
    assert loss["lines"][0]["x"] == floats(told, "step").tolist()
    assert loss["lines"][0]["y"] == [round(row["loss"], 6) for row in told]
    assert loss["ends"] == ends[1:-1]


def test_time_left_follows_progress_and_history():
    done = [
        dict(event="finished", folder=f, stage=s, seconds=t)
        for f in ("round-1", "round-2")
        for s, t in (("sample", 10), ("label", 2), ("train", 20))
    ]
    # longer than usual already: any moment
    assert time_left(done, 3, {}, 30.0) == 0 + 2 + 20 + 10 + 2
    assert time_left(done, 3, dict(done=0, total=9, rate=0.0), 1.0) == 9 + 2 + 20 + 10 + 2
    # made again after pruning: not one step further
    again = [*done, dict(event="finished", folder="round-1", stage="train", seconds=20)]
    assert time_left(again, 3, {}, 0.0) == time_left(done, 3, {}, 0.0)
    # the first policy's samples come before all rounds
    first = [
        dict(event="finished", folder="start", stage=s, seconds=t)
        for s, t in (("sample", 10), ("label", 2))
    ]
    assert time_left(first + done, 3, {}, 30.0) == time_left(done, 3, {}, 30.0)


def test_panel_gets_json_only(tmp_path):
    "What goes to the page is strict JSON: no NaN, at most 400 points, whatever the numbers."
    rows = [
        dict(step=i, loss=[0.5, None, float("inf"), float("nan")][i % 4], grad_norm=1e300)
        for i in range(5000)
    ]
    nothing = [math.nan] * 3
    means = [
        dict(reward=nothing, kl=[0.0, math.nan, math.inf], true_reward=nothing),
        dict(reward=[1.0, 0.5, 1.5], kl=nothing, true_reward=nothing),
    ]
    views = [
        RoundView(name, found, np.array([0.5, 1.5]), [], 0, None, [])
        for name, found in zip(("1", "final"), means)
    ]
    got = panels({"round-1": rows, "<b>": rows[:3]}, views)
    json.dumps(got, allow_nan=False)
    assert all(len(c["x"]) == len(c["y"]) <= 400 for p in got for c in p["lines"])
    assert len(got) == 5


def test_thread_ends_and_second_panel_replaces_first(tmp_path, monkeypatch):
    shown = []
    import IPython.display

    monkeypatch.setattr(IPython.display, "display", lambda *a, **kw: shown.extend(a))
    first, second = (RunMonitor(tmp_path / "run", mode="widget", every=0.05) for _ in range(2))
    first.show()
    second.show()
    until(lambda: first.closed.is_set())
    assert len(shown) == 4  # each a panel, and what stands below it
    assert RunMonitor.followers[second.run] is second
    assert not second.closed.is_set()
    job = running(tmp_path / "run")
    try:
        until(
            lambda: second.panel.status["state"] == "running" and second.panel.status["share"]
        )
    finally:
        second.stop()
    until(lambda: second.panel.status["state"] == "stopped")
    assert job.process.wait(10) == 0
    assert second.panel.status["stopping"] is False
    second.close()


def test_nothing_heavy_is_loaded():
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import sys, halos_nb.monitor, halos_nb.runs, halos_nb.page, "
                "halos_nb.rewards; print(*{m.split('.')[0] for m in sys.modules})"
            ),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "transformers", "accelerate", "datasets"} & set(out.stdout.split())


def test_state_is_one_line():
    s = RunState(
        "r",
        state="running",
        round="round 1 of 2",
        stage="train",
        row=dict(label="a\nb", done=1, total=4, unit="steps", rate=2.0),
        spent=3,
        elapsed=70,
        left=30,
        note="x\x1b[2J",
    )
    assert str(s) == (
        "r: running · round 1 of 2 · train · a b 1/4 steps · 2 steps/s · 0:03, 0:02 left "
        "· 1:10 since the start · about 0:30 left in all · x␛[2J"
    )


def test_a_clock_that_is_set_while_a_stage_runs_adds_no_day():
    "Either way and again; the stage knows how long it took. A run that rests may rest."

    def event(name, time, stage, **more):
        return dict(event=name, time=time, stage=stage, folder="round-1", **more)

    day = 86_400
    events = [
        event("started", 1000, "sample"),
        event("finished", 1010 + day, "sample", seconds=10.0),
        event("started", 1011 + day, "label"),
        event("finished", 1021 - day, "label", seconds=10.0),
        event("started", 1022 - day, "train"),
        event("finished", 1032 + 2 * day, "train", seconds=10.0),
    ]
    done = RunState("r", "finished")
    assert session_seconds(done, events, now=0) == 32
    for late in events[4:]:
        late["time"] += 3 * day  # nobody was here for that long before it began
    assert session_seconds(done, events, now=0) == 32 + 3 * day
    assert session_seconds(done, events[:1], now=0) == session_seconds(done, [], 0) == 0
    # others may begin in the meantime, and a large model is long in being sealed
    events = [
        event("started", 0, "train"),
        event("started", 50, "sample"),
        event("finished", 1000, "train", seconds=990.0),
        event("finished", 1010, "sample", seconds=960.0),
    ]
    assert session_seconds(done, events, now=0) == 1010
    sealed = [events[0], event("finished", 1900, "train", seconds=990.0)]
    assert session_seconds(done, sealed, now=0) == 1900

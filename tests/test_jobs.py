"""Jobs: real processes, real deaths. Nothing outlives its notebook, and no failure may look
like success.
"""

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import every
from job_helpers import CELL, LAUNCHERS, NEEDS_LINUX, ONE, alive, papermill, start, until

from halos_nb import jobs
from halos_nb.configs import SampleConfig
from halos_nb.failures import StageError
from halos_nb.identity import RunFiles, Stage, identity, versions
from halos_nb.jobs import ask_python, check_launch, launch, prepare
from halos_nb.preload import LAUNCHER_SAYS, SERVERS, ForkedProcess
from halos_nb.settings import Profile

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("stages_on_path"),
    NEEDS_LINUX,
]


@pytest.mark.parametrize(
    "n, launcher",
    [
        (2, "fork"),
        (2, "accelerate"),
        # CI has one in test_preload
        pytest.param(1, "fork", marks=every),
        pytest.param(1, "accelerate", marks=every),
    ],
)
def test_runs_the_processes_asked_for(n, launcher, tmp_path):
    job = start("gather", tmp_path, Profile(num_processes=n, launcher=launcher, threads=1))
    job.wait()
    total, found, asked, device, threads = json.loads((tmp_path / "out").read_text())
    assert total == n * (n + 1) // 2
    assert (found, asked) == (n, n)
    assert device.split(":")[0] == "cpu"
    assert threads == "1"
    assert job.poll() == 0
    assert not alive(tmp_path)
    assert json.loads(job.file("config.json").read_text())["num_processes"] == n


def told_variables(folder, **more):
    profile = Profile(accelerate_config="fsdp2_cpu2", **more)
    cfg = SampleConfig(model="variables", output_file=str(folder / "out"))
    launch("train", cfg, profile, folder, module="tiny_stage").wait()
    return json.loads((folder / "out").read_text())


def test_a_rank_does_not_know_who_started_it(tmp_path, monkeypatch):
    """What Accelerate is told is the profile's, by both launchers alike; what this user has
    exported or configured is not.
    """
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    monkeypatch.setenv("ACCELERATE_DOWNCAST_BF16", "true")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    theirs = tmp_path / "home/accelerate/default_config.yaml"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("distributed_type: MULTI_GPU\ndebug: true\nnum_processes: 7\n")
    with pytest.warns(UserWarning) as warned:
        forked, launched = (
            told_variables(tmp_path / name, launcher=name) for name in LAUNCHERS
        )
    assert forked == launched
    assert forked["ACCELERATE_USE_FSDP"] == "true" and forked["FSDP_VERSION"] == "2"
    assert forked["FSDP_OFFLOAD_PARAMS"] == "false" and forked["WORLD_SIZE"] == "2"
    assert not forked.keys() & {"ACCELERATE_DOWNCAST_BF16", "ACCELERATE_DEBUG_MODE"}
    told = [str(w.message) for w in warned if "profile" in str(w.message)]
    assert len(told) == 2, "the file and the variables, each once"
    assert str(theirs) in told[0] and "FSDP_OFFLOAD_PARAMS" in told[1]


@pytest.fixture
def other_python(tmp_path):
    "A Python of another environment, which has our packages and one that we have not."
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text("\n".join(path for path in sys.path if "site-p" in path))
    found = site / "vllm-0.99.0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0\n")
    return venv / "bin/python"


def test_a_stage_runs_in_a_python_of_its_own(tmp_path, other_python):
    "No fork of ours, and its libraries are those of its result."
    profile = Profile(stages={"sample": {"python": str(other_python)}})
    assert not prepare(profile, "sample")
    (tmp_path / "job").mkdir()
    job = start("variables", tmp_path / "job", profile)
    job.wait()
    assert not isinstance(job.process, ForkedProcess)
    assert json.loads((tmp_path / "job/out").read_text())["python"] == str(other_python)
    cfg = SampleConfig(model="m", backend="vllm")
    stage = Stage("sample", tmp_path, cfg, [], [])
    libraries = identity(RunFiles(tmp_path, profile), stage)["libraries"]
    assert libraries == versions() | {"vllm": "vllm 0.99.0"}


def test_a_python_that_cannot_run_a_stage_is_told(tmp_path, other_python, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    for file in other_python.parent.parent.glob("lib/python*/site-packages/*.pth"):
        file.unlink()
    monkeypatch.chdir(tmp_path)
    for python, wrong in [
        (tmp_path / "none", "nothing is at .*none"),
        (other_python, "cannot import halos_nb .*pip install -e"),
    ]:
        profile = Profile(stages={"train": {"python": str(python)}})
        with pytest.raises((FileNotFoundError, RuntimeError), match=wrong):
            check_launch(profile, "float32")
    package = tmp_path / "halos_nb"
    package.mkdir()
    (package / "__init__.py").write_text("")
    ask_python.cache_clear()
    with pytest.raises(RuntimeError, match=f"has another halos_nb, at {package}"):
        check_launch(profile, "float32")


KILLED = "killed by SIGKILL (out of memory, or by hand)"


ENDS = [
    (1, "early", "RuntimeError: broken before joining", 1),
    (1, "die", KILLED, -9),
    (2, "early", "RuntimeError: broken before joining", 1),
    (2, "raise", "ValueError: record 7: no reward", 1),
    (2, "die", KILLED, -9),
    (2, "segfault", "killed by SIGSEGV", -11),
    (2, "quiet", "exit code 7", 7),
]
# CI has all of them as copies of a server (test_preload), and here one of each kind
IN_CI = dict(fork=[ENDS[0], ENDS[3], ENDS[5]], accelerate=[ENDS[3], ENDS[4]])


def ends_by_both():
    "How a job ends, and by which launcher it was started."
    for launcher in LAUNCHERS:
        for end in ENDS:
            marks = [] if end in IN_CI[launcher] else every
            yield pytest.param(*end, launcher, marks=marks)


@pytest.mark.parametrize("n, mode, says, code, launcher", ends_by_both())
def test_failure_is_raised_with_its_cause(n, mode, says, code, launcher, tmp_path):
    job = start(mode, tmp_path, Profile(num_processes=n, launcher=launcher))
    with pytest.raises(StageError, match=re.escape(says)) as raised:
        job.wait()
    error = raised.value
    first_line = str(error).splitlines()[0]
    assert first_line.startswith("sample failed")
    assert says in first_line
    assert str(job.file("log")) in str(error)
    assert error.code == code
    assert mode == "early" or error.rank == n - 1
    assert "ChildFailedError" not in str(error)
    if code > 0:
        assert "Connection" not in error.traceback
    if mode == "raise":
        assert error.traceback.count("Traceback") == 2
        assert "KeyError: 'reward'" in error.traceback
    says_ours = LAUNCHER_SAYS in job.file("log").read_text()
    assert says_ours == (n == 2 and launcher == "fork")
    assert not alive(tmp_path)


@pytest.fixture(scope="module")
def copies():
    "A profile of two ranks that are copies of a server; they wait six seconds for each other."
    two = Profile(name="cpu2", num_processes=2, timeout_minutes=0.1)
    prepare(two)
    assert SERVERS[0].is_ready(600)
    yield two
    SERVERS.pop().close()


@pytest.mark.parametrize(
    "mode, why, where",
    [
        ("stop", "it was stopped by a signal (SIGSTOP or the like)", "in end_badly"),
        ("grab", "it runs, and none of its threads gets Python's lock", "Current thread"),
        ("hang", "has not come to where rank 0 waited 6 s for it", "in hang"),
        ("leave", "exit code 0 before its work was done", ""),
    ],
)
def test_a_rank_that_others_wait_for_is_named(mode, why, where, copies, tmp_path):
    "Not the one that waited in vain, and in time; with where it was."
    job = start(mode, tmp_path, copies)
    with pytest.raises(StageError) as raised:
        job.wait(show=False)
    error = raised.value
    assert error.rank == 1
    assert why in str(error).splitlines()[0]
    assert where in error.traceback
    assert "Timed out" not in job.file("log").read_text()  # nobody else has given up before
    assert not alive(tmp_path)


@pytest.mark.parametrize(
    "mode, why",
    [
        ("close", "exit code 1"),  # it has closed its stdout and stderr
        ("both", "ValueError: record 7: no reward"),  # and the other rank hangs
    ],
)
def test_a_rank_that_raises_is_named_by_that(mode, why, copies, tmp_path):
    job = start(mode, tmp_path, replace(copies, timeout_minutes=10))
    with pytest.raises(StageError) as raised:
        job.wait(show=False)
    assert raised.value.rank == 1
    assert why in str(raised.value).splitlines()[0]
    assert not alive(tmp_path)


def test_a_child_of_a_rank_does_not_stay(copies, tmp_path):
    "Not even one in a session of its own, deaf to TERM, of a job that has succeeded."
    job = start("stays", tmp_path, replace(copies, timeout_minutes=10))
    job.wait(show=False)
    assert job.poll() == 0
    assert not alive(tmp_path)


def test_a_stopped_supervisor_is_woken(copies, tmp_path):
    "By who waits for it, and by who ends it."
    for name in ("waited", "ended"):
        folder = tmp_path / name
        folder.mkdir()
        job = start("hang", folder, copies)
        until((folder / "out").exists, 300, "both ranks running")
        os.kill(job.process.pid, signal.SIGSTOP)
        with pytest.warns(UserWarning, match="a signal had stopped its supervisor"):
            if name == "waited":
                with pytest.raises(StageError, match="has not come to where rank 0"):
                    job.wait(show=False)
            else:
                job.stop()
        assert not alive(folder)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_no_rank_is_named_where_none_failed(how, copies, tmp_path):
    "Somebody, or a machine without memory, has ended the supervisor."
    job = start("hang", tmp_path, replace(copies, timeout_minutes=10))
    until((tmp_path / "out").exists, 300, "both ranks running")
    os.kill(job.process.pid, getattr(signal, how))
    with pytest.raises(
        StageError, match=f"no rank, its supervisor was ended by {how}"
    ) as error:
        job.wait(show=False)
    assert error.value.rank == -1
    until(lambda: not alive(tmp_path), 15, "all gone")


def test_who_listens_is_told_and_is_nobody_but_loopback(copies, tmp_path):
    job = start("hang", tmp_path, replace(copies, timeout_minutes=10))
    until((tmp_path / "out").exists, 300, "both ranks running")
    found = job.listening()
    job.stop()
    assert {listener.process for listener in found} == {"rank 0", "rank 1"}
    assert {listener.address for listener in found} == {"127.0.0.1"}
    assert job.listening() == []


def test_secrets_are_in_no_file_and_no_argument_list(tmp_path, monkeypatch):
    secret = b"sk-very-secret"
    monkeypatch.setenv("OPENAI_API_KEY", secret.decode())
    job = start("deaf", tmp_path, ONE)
    until((tmp_path / "out").exists, 300, "start")
    for pid in alive(tmp_path):
        assert secret not in Path(f"/proc/{pid}/cmdline").read_bytes()
    job.stop()
    for file in tmp_path.iterdir():
        assert secret not in file.read_bytes()
    assert not alive(tmp_path)  # three of them were deaf to TERM


def test_second_attempt_waits_for_the_first_to_be_gone(tmp_path):
    first = start("deaf", tmp_path, ONE)
    until((tmp_path / "out").exists, 300, "start")
    first.process.stdin.close()  # dying takes it a second
    stale = tmp_path / "stale"
    stale.write_text("of the first attempt")
    cfg = SampleConfig(model="nothing", output_file=str(tmp_path / "out"))
    second = launch("sample", cfg, ONE, tmp_path, module="tiny_stage", clear=[stale])
    assert first.process.wait(1) == 0
    assert first.poll() is not None
    assert not stale.exists()
    second.wait()


def test_log_line_when_there_is_no_terminal(tmp_path, capfd):
    job = start("gather", tmp_path, ONE)
    job.wait(title="round 1 of 2 · sample", next="label")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("round 1 of 2 · sample: starting")
    assert lines[0].endswith("next: label")
    assert "done" in lines[-1]
    assert "5/5 prompts" in lines[-1]
    seconds = 10 * (len(lines) - 2)  # a line every ten seconds, on a slow machine
    assert len(lines) <= 3 or seconds < 240


# ---- deaths


def pid_of(folder, what):
    "The launcher, or rank 0, of a job: below the supervisor, and below that."
    supervisor = min(map(psutil.Process, alive(folder)), key=lambda p: p.create_time())
    (launcher,) = supervisor.children()
    return launcher.pid if what == "launcher" else min(p.pid for p in launcher.children())


DEATHS = ["papermill KILL", "papermill INT", "launcher KILL", "rank KILL", "papermill TERM"]
# CI has each death by the faster launcher, or, KILL, by the other; it has TERM in test_preload
SLOW = [(DEATHS[i], LAUNCHERS[0]) for i in (0, 4)]
SLOW += [(DEATHS[i], LAUNCHERS[1]) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "death, launcher",
    [
        pytest.param(death, launcher, marks=every if (death, launcher) in SLOW else [])
        for death in DEATHS
        for launcher in LAUNCHERS
    ],
)
def test_nothing_outlives_its_notebook(death, launcher, tmp_path):
    notebook = papermill(tmp_path, launcher=launcher)
    until((tmp_path / "out").exists, 300, "both ranks running")
    assert len(alive(tmp_path)) == 4  # supervisor, launcher, two ranks
    who, how = death.split()
    pid = notebook.pid if who == "papermill" else pid_of(tmp_path, who)
    os.kill(pid, getattr(signal, f"SIG{how}"))
    seconds = until(lambda: not alive(tmp_path), 15, "all gone")
    _, said = notebook.communicate(timeout=300)
    print(f"{death}: all gone after {seconds:.1f} s")
    assert notebook.returncode != 0
    assert not (tmp_path / "next").exists()
    if who != "papermill":
        assert "killed by SIGKILL" in said


@pytest.fixture
def kernel():
    "A kernel's manager and client."
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel()
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def reply_to(client, request):
    "The answer to a request, whatever else comes before it."
    while True:
        reply = client.get_shell_msg(timeout=300)
        if reply["parent_header"]["msg_id"] == request:
            return reply["content"]


@pytest.mark.parametrize(
    "death, launcher",
    [
        ("interrupt", "fork"),
        ("KILL", "accelerate"),
        pytest.param("interrupt", "accelerate", marks=every),
        pytest.param("KILL", "fork", marks=every),
    ],
)
def test_nothing_outlives_its_kernel(death, launcher, tmp_path, kernel):
    manager, client = kernel
    cell = CELL.format(out=tmp_path / "out", folder=tmp_path, launcher=launcher)
    request = client.execute(cell, stop_on_error=False)  # else the next request may be aborted
    until((tmp_path / "out").exists, 300, "both ranks running")
    if death == "interrupt":
        manager.interrupt_kernel()
    else:
        os.kill(manager.provisioner.pid, signal.SIGKILL)
    seconds = until(lambda: not alive(tmp_path), 15, "all gone")
    print(f"kernel {death}: all gone after {seconds:.1f} s")
    if death == "interrupt":
        assert reply_to(client, request)["ename"] == "KeyboardInterrupt"
        asked = client.execute("assert job.poll() == -15")
        assert reply_to(client, asked)["status"] == "ok"


def test_a_notebook_keeps_one_line(tmp_path, kernel):
    _, client = kernel
    said = []
    cell = CELL.format(out=tmp_path / "out", folder=tmp_path, launcher="auto")
    cell = cell.replace("hang", "gather")
    client.execute_interactive(
        cell,
        timeout=600,
        output_hook=lambda m: said.append((m["msg_type"], m["content"])),
    )
    outputs = ("display_data", "update_display_data", "stream")
    kinds = [kind for kind, _ in said if kind in outputs]
    assert kinds[0] == "display_data"
    assert set(kinds[1:]) == {"update_display_data"}
    texts = [m["data"]["text/plain"] for kind, m in said if kind in outputs]
    assert "done" in texts[-1]


def test_more_processes_than_the_machine_carries_are_told(monkeypatch):
    "Thousands are refused before any is started; a few too many are said, once."
    monkeypatch.setattr(jobs, "processors", lambda: 2)
    monkeypatch.setattr(jobs, "SAID", set())
    with pytest.raises(
        ValueError, match=r"crowd.* 5,000 processes.* has 2 processors .* 32 at"
    ):
        check_launch(Profile(name="crowd", num_processes=5000), "float32")
    with pytest.warns(UserWarning, match="4 processes, which take turns on the 2 processors"):
        check_launch(Profile(name="four", num_processes=4), "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_launch(Profile(name="four", num_processes=4), "float32")
        check_launch(Profile(name="two", num_processes=2), "float32")

"Preloading: a copy ends as any process does, knows its own surroundings, and outlives nobody."

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import every
from job_helpers import NEEDS_LINUX, ONE, TWO, alive, maps_torch, papermill, start, until

from halos_nb import preload
from halos_nb.configs import SampleConfig
from halos_nb.failures import StageError
from halos_nb.jobs import launch, prepare
from halos_nb.preload import ForkedProcess
from halos_nb.settings import Profile

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("stages_on_path"),
    NEEDS_LINUX,
]


def ready_server(profile=ONE):
    "The server of such stages, once it waits for requests."
    prepare(profile)
    assert preload.SERVERS[0].is_ready(600)
    return preload.SERVERS[0]


@pytest.fixture
def server(stages_on_path):
    "A server that waits; kept from test to test."
    return ready_server()


@pytest.fixture
def old_server(stages_on_path):
    "A server that a test before has left, whatever its environment."
    return preload.SERVERS[0] if preload.SERVERS else ready_server()


@pytest.fixture
def module(tmp_path, monkeypatch):
    "Writes a module that stages can import; servers made before do not fit any more."
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    return write


def run_module(name, folder, stage="sample", profile=ONE):
    "A job of a module that reads no config."
    return launch(stage, SampleConfig(model="m"), profile, folder, module=name)


# ---- copies of a server


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "mode, says, code",
    [
        ("early", "RuntimeError: broken before joining", 1),
        ("raise", "ValueError: record 7: no reward", 1),
        ("die", "killed by SIGKILL", -9),
        ("segfault", "killed by SIGSEGV", -11),
        ("quiet", "exit code 7", 7),
        ("gather", "", 0),
    ],
)
def test_a_copy_ends_as_a_process_of_its_own_does(n, mode, says, code, tmp_path, server):
    # the time-out may differ between the stages of a server
    job = start(mode, tmp_path, Profile(num_processes=n, timeout_minutes=11))
    assert isinstance(job.process, ForkedProcess)
    if code == 0:
        job.wait()
        assert json.loads((tmp_path / "out").read_text())[:3] == [n * (n + 1) // 2, n, n]
        return
    with pytest.raises(StageError, match=re.escape(says)) as raised:
        job.wait()
    error = raised.value
    assert error.code == code
    assert mode == "early" or error.rank == n - 1
    if mode == "raise":
        assert error.traceback.count("Traceback") == 2
        assert "KeyError: 'reward'" in error.traceback
    assert not alive(tmp_path)


# CI has two of its ranks in test_jobs
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=every)])
def test_who_asks_for_accelerate_gets_no_copy(n, tmp_path, server):
    apart = Profile(num_processes=n, launcher="accelerate")
    assert not prepare(apart)
    job = start("gather", tmp_path, apart)
    job.wait()
    assert not isinstance(job.process, ForkedProcess)
    assert json.loads((tmp_path / "out").read_text())[:3] == [n * (n + 1) // 2, n, n]
    assert preload.SERVERS == [server]


def test_a_server_computes_nothing_and_holds_no_gpu(server):
    "What threads hold at a fork stays locked in the copy."
    process = Path(f"/proc/{server.process.pid}")
    threads = [(task / "comm").read_text().strip() for task in (process / "task").iterdir()]
    # pyarrow's allocator has a thread, and knows how to be copied
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1
    assert not any("nvidia" in os.readlink(file) for file in (process / "fd").iterdir())


MUCH = """
import numpy, pyarrow.compute, torch
x = torch.ones(700, 700)
print(int((x @ x).max()), int((x.numpy() @ x.numpy()).max()))
print(torch.get_num_threads(), pyarrow.compute.sum(pyarrow.array(range(9))))
"""


def test_a_copy_computes_with_its_threads(tmp_path, module):
    "numpy and torch start their threads anew in a copy."
    module("much", MUCH)
    two = Profile(threads=2)
    ready_server(two)
    for _ in range(2):
        job = run_module("much", tmp_path, profile=two)
        job.wait()
        assert isinstance(job.process, ForkedProcess)
        assert job.file("log").read_text().split() == ["700", "700", "2", "36"]


TELL = """
import json, os, signal, sys
of_supervisor = os.getsid(0) == os.getppid()
progress = os.environ["HALOS_NB_PROGRESS"]
print(json.dumps([sys.argv[1:], progress, sys.stdin.read(), of_supervisor, __name__]))
is_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
print(is_default, len(os.listdir("/proc/self/task")), "torch" in sys.modules)
"""


def test_copies_get_their_own_surroundings(tmp_path, old_server, module):
    module("tell", TELL)
    folder = tmp_path / "run"
    jobs = [run_module("tell", folder, stage) for stage in ("a", "b")]
    for job in jobs:
        job.wait()
        assert not isinstance(job.process, ForkedProcess)  # another environment
    ready_server()
    jobs = [run_module("tell", folder, stage) for stage in ("a", "b")]
    for job in jobs:
        job.wait()
        assert isinstance(job.process, ForkedProcess)
        told, state = job.file("log").read_text().splitlines()
        args = ["--config", str(job.file("config.json"))]
        progress = str(job.file("progress.jsonl"))
        assert json.loads(told) == [args, progress, "", True, "__main__"]
        assert state == "True 1 True"


def test_secrets_reach_a_copy_and_are_in_no_file_and_no_argument_list(
    tmp_path, monkeypatch, old_server, module
):
    secret = "sk-very-secret"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    module("tells", "import os; print(len(os.environ['OPENAI_API_KEY']))")
    new = ready_server()  # the server that was there is older than the key
    assert new is not old_server
    assert secret.encode() not in Path(f"/proc/{new.process.pid}/cmdline").read_bytes()
    job = run_module("tells", tmp_path / "run")
    job.wait()
    assert isinstance(job.process, ForkedProcess)
    assert job.file("log").read_text() == f"{len(secret)}\n"
    for file in (tmp_path / "run").iterdir():
        assert secret.encode() not in file.read_bytes()


# ---- the protocol


@pytest.fixture
def own_server(stages_on_path, tmp_path, monkeypatch):
    "Makes a server of one small module; gives our end of its channel."
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    processes = []

    def made(text):
        (tmp_path / "small.py").write_text(text)
        os.utime(tmp_path / "small.py", (1, 1))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(300)
        code = "from halos_nb.preload import serve; serve('small')"
        with theirs:
            processes.append(subprocess.Popen([sys.executable, "-c", code], stdin=theirs))
        return ours

    yield made
    for process in processes:
        process.kill()
        process.wait()


def test_a_file_that_changes_while_it_is_imported_makes_no_server(own_server):
    assert own_server("x = 1").recv(16) == b"ready"
    assert own_server("import os; os.utime(__file__)").recv(16) == b""  # it has ended


def test_a_request_that_nobody_waits_for_starts_nothing(own_server, tmp_path):
    channel = own_server("x = 1")
    assert channel.recv(16) == b"ready"
    parent_pipe, ours = os.pipe()
    os.close(ours)
    status = tmp_path / "status"
    with open(tmp_path / "log", "wb") as log:
        request = preload.Request(str(status), "this", [], 1, {}, parent_pipe, log.fileno())
        request.send(channel)
    assert channel.recv(16) == b""
    assert not status.exists()


# ---- deaths


@pytest.mark.parametrize("who", ["job", "server", "pipe", "deaf"])
def test_nothing_of_a_copy_is_left(who, tmp_path, server):
    job = start("deaf" if who == "deaf" else "hang", tmp_path, ONE)
    until((tmp_path / "out").exists, 300, "start")
    assert len(alive(tmp_path)) == (5 if who == "deaf" else 2)
    if who == "job":
        os.kill(max(alive(tmp_path)), signal.SIGKILL)
    elif who == "server":
        server.process.kill()
    else:
        job.process.stdin.close()
    seconds = until(lambda: not alive(tmp_path), 10, "all gone")
    print(f"{who}: all gone after {seconds:.1f} s")
    assert job.process.wait(5) == 0  # its files are closed a moment before it has ended
    assert job.poll() == (-9 if who == "job" else -15)


FORKING_CELL = """
from halos_nb.configs import SampleConfig
from halos_nb.settings import Profile
from halos_nb.jobs import launch, prepare
from halos_nb.preload import SERVERS
prepare(Profile())
assert SERVERS[0].is_ready(600)
open('{folder}/server', 'w').write(str(SERVERS[0].process.pid))
cfg = SampleConfig(model="hang", output_file="{out}")
job = launch("sample", cfg, Profile(), "{folder}", module="tiny_stage")
job.wait()
"""


# CI has INT in test_jobs
@pytest.mark.parametrize("death", ["TERM", "KILL", pytest.param("INT", marks=every)])
def test_no_copy_outlives_its_notebook(death, tmp_path):
    notebook = papermill(tmp_path, FORKING_CELL)
    until((tmp_path / "out").exists, 300, "running")
    server = psutil.Process(int((tmp_path / "server").read_text()))
    assert len(alive(tmp_path)) == 2
    assert server.is_running()
    os.kill(notebook.pid, getattr(signal, f"SIG{death}"))
    until(lambda: not alive(tmp_path) and not server.is_running(), 15, "all gone")
    notebook.communicate(timeout=60)
    assert notebook.returncode != 0


def test_a_server_that_is_not_needed_ends(tmp_path, server):
    job = start("hang", tmp_path, ONE)
    until((tmp_path / "out").exists, 300, "start")
    preload.SERVERS.pop().close()
    time.sleep(0.5)
    assert server.process.poll() is None  # its job goes on
    assert job.poll() is None
    job.stop()
    server.process.wait(10)


# ---- processes that wait for their config

WHICH = """
import json, sys
import lent
print("torch" in sys.modules, lent.x, json.load(open(sys.argv[2]))["model"])
"""


@pytest.fixture
def waiting(tmp_path, module):
    "A job that has preloaded a small module of ours, and waits."
    module("lent", "x = 1")
    os.utime(tmp_path / "lent.py", (1, 1))
    module("which", WHICH)
    # what every Python imports at its start, here and in the waiting process
    module("sitecustomize", "import lent")
    job = launch("sample", None, ONE, tmp_path / "run", module="which")
    yield job
    job.stop()


def test_a_waiting_process_has_imported_what_its_stage_needs(waiting):
    time.sleep(1)
    assert waiting.poll() is None
    waiting.give_config(SampleConfig(model="good"), ONE)
    waiting.wait(show=False)
    assert waiting.file("log").read_text() == "True 1 good\n"


def test_a_waiting_process_whose_code_was_changed_begins_anew(waiting, tmp_path):
    until(lambda: maps_torch(waiting), 300, "importing")
    (tmp_path / "lent.py").write_text("x = 2")
    waiting.give_config(SampleConfig(model="good"), ONE)
    waiting.wait(show=False)
    assert waiting.file("log").read_text() == "False 2 good\n"


@pytest.mark.parametrize(
    "launcher, changed, said",
    [
        pytest.param("fork", False, "True 1 good", marks=every),
        ("fork", True, "True 2 good"),
        ("accelerate", False, "True 1 good"),
        # a rank of its own begins anew by itself
        pytest.param("accelerate", True, "False 2 good", marks=every),
    ],
)
def test_ranks_have_imported_before_their_turn(launcher, changed, said, tmp_path, module):
    "Fresh code, if it was changed meanwhile."
    two = Profile(num_processes=2, launcher=launcher)
    module("lent", "x = 1")
    os.utime(tmp_path / "lent.py", (1, 1))
    module("which", WHICH)
    module("sitecustomize", "import lent")
    job = launch("sample", None, two, tmp_path / "run", module="which")
    # the one that will fork, or a launcher and its two ranks
    until(lambda: maps_torch(job, 1 if two.forks else 3), 300, "importing")
    if changed:
        (tmp_path / "lent.py").write_text("x = 2")
    job.give_config(SampleConfig(model="good"), two)
    job.wait(show=False)
    assert job.file("log").read_text() == f"{said}\n" * 2


def test_two_jobs_side_by_side_meet_at_ports_of_their_own(tmp_path, server):
    jobs = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        jobs.append(start("gather", tmp_path / name, TWO))
    for job in jobs:
        job.wait()
        assert json.loads((job.folder / "out").read_text())[:3] == [3, 2, 2]


@pytest.mark.parametrize("launcher, importing, there", [("fork", 1, 2), ("accelerate", 3, 4)])
def test_nothing_of_a_waiting_job_is_left(launcher, importing, there, tmp_path):
    "There are no forked ranks before their turn."
    two = Profile(num_processes=2, launcher=launcher)
    job = launch("sample", None, two, tmp_path, module="tiny_stage")
    until(lambda: maps_torch(job, importing), 300, "importing")
    assert len(alive(tmp_path)) == there
    job.process.stdin.close()
    until(lambda: not alive(tmp_path), 15, "all gone")
    assert job.process.wait(5) == 0
    assert job.poll() == -15


def test_what_waits_ends_with_its_supervisor(tmp_path):
    "It looks for its parent itself, since nobody watches over a supervisor."
    job = launch("sample", None, ONE, tmp_path, module="tiny_stage")
    until(lambda: maps_torch(job), 300, "one that imports")
    job.process.kill()
    until(lambda: not alive(tmp_path), 30, "all gone")


def test_who_finds_its_supervisor_dead_does_not_begin_to_wait(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    env = os.environ | {"HALOS_NB_SUPERVISOR": str(dead.pid)}
    late = [sys.executable, "-m", "halos_nb.preload", "1", "tiny_stage"]
    late += ["--config", str(tmp_path / "never.json")]
    ended = subprocess.run(late, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "who started this process is gone" in ended.stderr

"""Launching: real processes, real deaths. Nothing of a job may outlive its notebook, and no failure may look like success."""

import json, os, re, signal, socket, subprocess, sys, time
from pathlib import Path

import pytest

from halos_nb import preload
from halos_nb.configs import SampleConfig
from halos_nb.settings import Profile
from halos_nb.failures import StageError
from halos_nb.jobs import launch, prepare

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        sys.platform != "linux", reason="the supervisor's guarantee needs Linux"
    ),
]
TWO = Profile(name="cpu2", num_processes=2)


@pytest.fixture(autouse=True)
def stages(monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    )


def start(mode, folder, profile=TWO):
    return launch(
        "sample",
        SampleConfig(model=mode, output_file=str(folder / "out")),
        profile,
        folder,
        module="tiny_stage",
    )


def alive(folder):
    "Processes of a job: they inherit its log as their stdout, however they were started."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(p / "fd/1").startswith(f"{folder}/"):
                found.append(int(p.name))
        except OSError:
            pass
    return found


def until(condition, seconds, what):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - start


@pytest.mark.parametrize("n", [1, 2])
def test_runs_the_processes_asked_for(n, tmp_path):
    job = start("gather", tmp_path, Profile(num_processes=n, threads=1))
    job.wait()
    total, found, asked, device, threads = json.loads((tmp_path / "out").read_text())
    assert (total, found, asked, device.split(":")[0], threads) == (
        n * (n + 1) // 2,
        n,
        n,
        "cpu",
        "1",
    )
    assert job.poll() == 0 and not alive(tmp_path)
    assert json.loads(job.file("config.json").read_text())["num_processes"] == n


@pytest.mark.parametrize(
    "n, mode, says, code",
    [
        (1, "early", "RuntimeError: broken before joining", 1),
        (1, "die", "killed by SIGKILL (out of memory, or by hand)", -9),
        (2, "early", "RuntimeError: broken before joining", 1),
        (2, "raise", "ValueError: record 7: no reward", 1),
        (2, "die", "killed by SIGKILL (out of memory, or by hand)", -9),
        (2, "segfault", "killed by SIGSEGV", -11),
        (2, "quiet", "exit code 7", 7),
    ],
)
def test_failure_is_raised_with_its_cause(n, mode, says, code, tmp_path):
    job = start(mode, tmp_path, Profile(num_processes=n))
    with pytest.raises(StageError, match=re.escape(says)) as error:
        job.wait()
    e, first = error.value, str(error.value).splitlines()[0]
    assert (
        says in first and first.startswith("sample failed") and str(job.file("log")) in str(e)
    )
    assert e.code == code and (mode == "early" or e.rank == n - 1)
    assert "ChildFailedError" not in str(e) and "Connection" not in (
        e.traceback if code > 0 else ""
    )
    if mode == "raise":
        assert e.traceback.count("Traceback") == 2 and "KeyError: 'reward'" in e.traceback
    assert not alive(tmp_path)


def test_secrets_are_in_no_file_and_no_argument_list(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    job = start("deaf", tmp_path, Profile())
    until((tmp_path / "out").exists, 20, "start")
    assert all(
        b"sk-very-secret" not in Path(f"/proc/{p}/cmdline").read_bytes()
        for p in alive(tmp_path)
    )
    job.stop()
    assert all(b"sk-very-secret" not in f.read_bytes() for f in tmp_path.iterdir())
    assert not alive(tmp_path)  # three of them were deaf to TERM


def test_second_attempt_waits_for_the_first_to_be_gone(tmp_path):
    first = start("deaf", tmp_path, Profile())
    until((tmp_path / "out").exists, 20, "start")
    first.process.stdin.close()  # dying takes it a second
    stale = tmp_path / "stale"
    stale.write_text("of the first attempt")
    second = launch(
        "sample",
        SampleConfig(model="nothing", output_file=str(tmp_path / "out")),
        Profile(),
        tmp_path,
        module="tiny_stage",
        clear=[stale],
    )
    assert first.poll() is not None or first.process.wait(1) == 0
    assert not stale.exists()
    second.wait()


def test_log_line_when_there_is_no_terminal(tmp_path, capfd):
    start("gather", tmp_path, Profile()).wait(title="round 1 of 2 · sample", next="label")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("round 1 of 2 · sample: starting") and lines[0].endswith(
        "next: label"
    )
    assert "done" in lines[-1] and "5/5 prompts" in lines[-1] and len(lines) <= 3


# --- deaths -----------------------------------------------------------------------------------
# --------------------

CELL = """
from halos_nb.configs import SampleConfig
from halos_nb.settings import Profile
from halos_nb.jobs import launch
job = launch("sample", SampleConfig(model="hang", output_file="{out}"), Profile(num_processes=2), "{folder}", module="tiny_stage")
job.wait()
"""


def notebook(folder, cell=CELL):
    cells = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata={},
            source=s,
            outputs=[],
            execution_count=None,
        )
        for i, s in enumerate(
            [cell.format(out=folder / "out", folder=folder), f"open('{folder}/next', 'w')"]
        )
    ]
    (folder / "nb.ipynb").write_text(
        json.dumps(
            dict(
                cells=cells,
                nbformat=4,
                nbformat_minor=5,
                metadata=dict(
                    kernelspec=dict(name="python3", display_name="python3", language="python")
                ),
            )
        )
    )
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "papermill",
            "--no-progress-bar",
            folder / "nb.ipynb",
            folder / "out.ipynb",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def pid_of(folder, what):
    "The launcher, or a rank, of the job."
    for p in alive(folder):
        args, environ = (
            Path(f"/proc/{p}/cmdline").read_bytes(),
            Path(f"/proc/{p}/environ").read_bytes(),
        )
        if (
            what == "launcher"
            and b"accelerate.commands.launch" in args
            and b"halos_nb.supervise" not in args
            and b"halos_nb.preload" not in args
            and b"LOCAL_RANK=" not in environ
        ):
            return p
        if what == "rank" and b"LOCAL_RANK=0" in environ:
            return p


@pytest.mark.parametrize(
    "death", ["papermill TERM", "papermill KILL", "papermill INT", "launcher KILL", "rank KILL"]
)
def test_nothing_outlives_its_notebook(death, tmp_path):
    papermill = notebook(tmp_path)
    until((tmp_path / "out").exists, 60, "both ranks running")
    assert len(alive(tmp_path)) == 4  # supervisor, launcher, two ranks
    who, how = death.split()
    os.kill(
        papermill.pid if who == "papermill" else pid_of(tmp_path, who),
        getattr(signal, f"SIG{how}"),
    )
    seconds = until(lambda: not alive(tmp_path), 15, "all gone")
    _, said = papermill.communicate(timeout=30)
    print(f"{death}: all gone after {seconds:.1f} s, papermill returned {papermill.returncode}")
    assert papermill.returncode != 0 and not (tmp_path / "next").exists()
    if who != "papermill":
        assert "killed by SIGKILL" in said


@pytest.mark.parametrize("death", ["interrupt", "KILL"])
def test_nothing_outlives_its_kernel(death, tmp_path):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel()
    try:
        request = client.execute(CELL.format(out=tmp_path / "out", folder=tmp_path))
        until((tmp_path / "out").exists, 60, "both ranks running")
        if death == "interrupt":
            manager.interrupt_kernel()
        else:
            os.kill(manager.provisioner.pid, signal.SIGKILL)
        seconds = until(lambda: not alive(tmp_path), 15, "all gone")
        print(f"kernel {death}: all gone after {seconds:.1f} s")
        if death == "interrupt":
            while (reply := client.get_shell_msg(timeout=10))["parent_header"][
                "msg_id"
            ] != request:
                pass
            assert reply["content"]["ename"] == "KeyboardInterrupt"
            assert (
                client.execute_interactive(
                    "assert job.poll() == -15", timeout=10, output_hook=lambda m: None
                )["content"]["status"]
                == "ok"
            )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_notebook_keeps_one_line(tmp_path):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel()
    said = []
    try:
        client.execute_interactive(
            CELL.format(out=tmp_path / "out", folder=tmp_path).replace("hang", "gather"),
            timeout=60,
            output_hook=lambda m: said.append((m["msg_type"], m["content"])),
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    kinds = [
        kind for kind, _ in said if kind in ("display_data", "update_display_data", "stream")
    ]
    assert kinds[0] == "display_data" and set(kinds[1:]) == {"update_display_data"}
    assert "done" in said[-2][1]["data"]["text/plain"] or "done" in str(said)


# --- copies of a nursery
# ------------------------------------------------------------------------------------------

ONE = Profile()


@pytest.fixture
def nursery(stages):
    "A nursery that waits; kept from test to test."
    prepare(ONE)
    assert preload.SERVERS[0].is_ready(60)
    return preload.SERVERS[0]


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
def test_a_copy_ends_as_a_process_of_its_own_does(mode, says, code, tmp_path, nursery):
    # which may differ between the stages of a nursery
    job = start(mode, tmp_path, Profile(timeout_minutes=11))
    assert isinstance(job.process, preload.ForkedProcess)
    if not code:
        job.wait()
        assert json.loads((tmp_path / "out").read_text())[:3] == [1, 1, 1]
        return
    with pytest.raises(StageError, match=re.escape(says)) as error:
        job.wait()
    assert (error.value.code, error.value.rank) == (code, 0)
    if mode == "raise":
        assert (
            error.value.traceback.count("Traceback") == 2
            and "KeyError: 'reward'" in error.value.traceback
        )
    assert not alive(tmp_path)


def test_a_nursery_computes_nothing_and_holds_no_gpu(nursery):
    "What threads hold at a fork stays locked in the copy. pyarrow's allocator has one, and knows how to be copied."
    tasks = Path(f"/proc/{nursery.process.pid}/task")
    assert (
        len(
            [
                p
                for p in tasks.iterdir()
                if (p / "comm").read_text().strip() != "jemalloc_bg_thd"
            ]
        )
        == 1
    )
    assert not any(
        "nvidia" in os.readlink(f) for f in Path(f"/proc/{nursery.process.pid}/fd").iterdir()
    )


def test_a_copy_computes_with_its_threads(tmp_path, monkeypatch):
    "numpy and torch start their threads anew in a copy."
    (tmp_path / "much.py").write_text(
        "import numpy, pyarrow.compute, torch\nx = torch.ones(700, 700)\nprint(int((x @ x).max()), int((x.numpy() @ x.numpy()).max()), torch.get_num_threads(), pyarrow.compute.sum(pyarrow.array(range(9))))"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    two = Profile(threads=2)
    prepare(two)
    assert preload.SERVERS[0].is_ready(60)
    for _ in range(2):
        job = launch("sample", SampleConfig(model="m"), two, tmp_path, module="much")
        job.wait()
        assert isinstance(job.process, preload.ForkedProcess) and job.file(
            "log"
        ).read_text().split() == ["700"] * 2 + ["2", "36"]


def test_copies_get_their_own_surroundings(tmp_path, nursery, monkeypatch):
    (tmp_path / "tell.py").write_text(
        "import json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ['HALOS_NB_PROGRESS'], sys.stdin.read(), os.getsid(0) == os.getppid(), __name__]))\n"
        "import signal; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, len(os.listdir('/proc/self/task')), 'torch' in sys.modules)"
    )
    # read at import: this nursery does not fit any more
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    jobs = [
        launch(s, SampleConfig(model="m"), ONE, tmp_path / "run", module="tell")
        for s in ("a", "b")
    ]
    for j in jobs:
        j.wait()
    assert not any(isinstance(j.process, preload.ForkedProcess) for j in jobs)
    prepare(ONE)
    assert preload.SERVERS[0].is_ready(60)
    jobs = [
        launch(s, SampleConfig(model="m"), ONE, tmp_path / "run", module="tell")
        for s in ("a", "b")
    ]
    for j in jobs:
        j.wait()
        told, state = j.file("log").read_text().splitlines()
        assert json.loads(told) == [
            ["--config", str(j.file("config.json"))],
            str(j.file("progress.jsonl")),
            "",
            True,
            "__main__",
        ]
        assert state == "True 1 True" and isinstance(j.process, preload.ForkedProcess)


def test_secrets_reach_a_copy_and_are_in_no_file_and_no_argument_list(
    tmp_path, monkeypatch, nursery
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    (tmp_path / "tells.py").write_text("import os; print(len(os.environ['OPENAI_API_KEY']))")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    prepare(ONE)  # the nursery that was there is older than the key
    new = preload.SERVERS[0]
    assert new is not nursery and new.is_ready(60)
    assert b"sk-very-secret" not in Path(f"/proc/{new.process.pid}/cmdline").read_bytes()
    job = launch("sample", SampleConfig(model="m"), ONE, tmp_path / "run", module="tells")
    job.wait()
    assert (
        isinstance(job.process, preload.ForkedProcess)
        and job.file("log").read_text() == f"{len('sk-very-secret')}\n"
    )
    assert all(b"sk-very-secret" not in f.read_bytes() for f in (tmp_path / "run").iterdir())


@pytest.fixture
def own_nursery(stages, tmp_path, monkeypatch):
    "A nursery of one small module, and our end of its line."
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    processes = []

    def made(text):
        (tmp_path / "small.py").write_text(text)
        os.utime(tmp_path / "small.py", (1, 1))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(30)
        with theirs:
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        "from halos_nb.preload import serve; serve('small')",
                    ],
                    stdin=theirs,
                )
            )
        return ours

    yield made
    for p in processes:
        p.kill()
        p.wait()


def test_a_file_that_changes_while_it_is_imported_makes_no_nursery(own_nursery):
    assert own_nursery("x = 1").recv(16) == b"ready"
    assert own_nursery("import os; os.utime(__file__)").recv(16) == b""  # it has ended


def test_a_request_that_nobody_waits_for_starts_nothing(own_nursery, tmp_path):
    line = own_nursery("x = 1")
    assert line.recv(16) == b"ready"
    leash, ours = os.pipe()
    os.close(ours)
    with open(tmp_path / "log", "wb") as log:
        request = preload.Request(str(tmp_path / "status"), "this", [], {}, leash, log.fileno())
        request.send(line)
    assert line.recv(16) == b"" and not (tmp_path / "status").exists()


@pytest.mark.parametrize("who", ["job", "nursery", "leash", "deaf"])
def test_nothing_of_a_copy_is_left(who, tmp_path, nursery):
    job = start("deaf" if who == "deaf" else "hang", tmp_path, ONE)
    until((tmp_path / "out").exists, 30, "start")
    assert len(alive(tmp_path)) == (5 if who == "deaf" else 2)
    if who == "job":
        os.kill(max(alive(tmp_path)), signal.SIGKILL)
    elif who == "nursery":
        nursery.process.kill()
    else:
        job.process.stdin.close()
    seconds = until(lambda: not alive(tmp_path), 10, "all gone")
    print(f"{who}: all gone after {seconds:.1f} s")
    assert job.process.wait(5) == 0  # its files are closed a moment before it has ended
    assert job.poll() == (-9 if who == "job" else -15)


@pytest.mark.parametrize("death", ["TERM", "KILL", "INT"])
def test_no_copy_outlives_its_notebook(death, tmp_path):
    cell = CELL.replace(
        "import launch\n",
        "import launch, prepare\nfrom halos_nb.preload import SERVERS\nprepare(Profile())\nassert SERVERS[0].is_ready(60)\nopen('{folder}/nursery', 'w').write(str(SERVERS[0].process.pid))\n",
    ).replace("num_processes=2", "")
    papermill = notebook(tmp_path, cell)
    until((tmp_path / "out").exists, 60, "running")
    assert (
        len(alive(tmp_path)) == 2
        and Path(f"/proc/{(tmp_path / 'nursery').read_text()}").exists()
    )
    os.kill(papermill.pid, getattr(signal, f"SIG{death}"))
    until(
        lambda: (
            not alive(tmp_path)
            and not Path(f"/proc/{(tmp_path / 'nursery').read_text()}").exists()
        ),
        15,
        "all gone",
    )
    papermill.communicate(timeout=30)
    assert papermill.returncode != 0


def test_a_nursery_that_is_not_needed_ends(tmp_path, nursery):
    job = start("hang", tmp_path, ONE)
    until((tmp_path / "out").exists, 30, "start")
    preload.SERVERS.pop().close()
    time.sleep(0.5)
    assert nursery.process.poll() is None and job.poll() is None  # its job goes on
    job.stop()
    nursery.process.wait(5)

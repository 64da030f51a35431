"What the tests share: a runs folder of their own, and a browser with a JupyterLab in it."

import gc
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from halos_nb import preload

# how fast a busy machine makes its examples says nothing of what is tested
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ROOT = Path(__file__).resolve().parent.parent
# a user's runs and caches are never touched
os.environ.setdefault("HALOS_NB_RUNS_DIR", str(ROOT / "build/test-runs"))
os.environ.setdefault("HALOS_NB_CACHE_DIR", str(ROOT / "build/test-cache"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
preload.PER_JOB += (
    "PYTEST_CURRENT_TEST",
)  # it changes from test to test, and no stage reads it
# papermill, accelerate, jupyter of this environment
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]


# started in the background by a shell, a process and all that it starts are deaf to interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)

# what CI has another one like it of, and not the minutes for
every = pytest.mark.skipif(os.environ.get("HALOS_NB_LONG") != "every", reason="make test-every")


# files that take minutes begin first, so that no process waits at the end for one of them
LONG = "trainers browser_widgets jobs sample preload ledger browser judge methods labellers"
LONG = f"{LONG} browser_monitor loop alarm gallery bench audit notebooks"
LONG = [f"test_{name}" for name in LONG.split()]


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


# A training ends with a look for garbage. Through all that is imported it takes longer than the
# training of a tiny model, and finds nothing there: what is imported is set aside.


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    "While everything is imported nobody looks for garbage, and afterwards no longer there."
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        set_aside()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    "What a test was the first to import is set aside after it."
    known = len(sys.modules)
    try:
        return (yield)
    finally:
        if len(sys.modules) > known + 50:
            set_aside()


def set_aside():
    "What is alive now is not looked through again."
    gc.collect()
    gc.freeze()


def missing(what):
    "What a test cannot do without: its absence skips it on a laptop and fails it in CI."
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(what)


def pytest_terminal_summary(terminalreporter):
    "Where the time goes: files with their seconds, of all processes together."
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    longest = [f"{file} {took:.0f}" for file, took in seconds.most_common(20) if took >= 10]
    if longest:
        terminalreporter.write_line("seconds by file: " + ", ".join(longest))


@pytest.fixture
def stages_on_path(monkeypatch):
    "Jobs find the stages of this folder (tiny_stage, pretend), and so does this process."
    put_stages_on_path(monkeypatch)


def put_stages_on_path(monkeypatch):
    "As `stages_on_path`, for what is set up for a whole file."
    here = str(Path(__file__).parent)
    known = [here, str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(known))
    monkeypatch.syspath_prepend(here)


# ---- models of two blocks


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    "The folder of a model with fresh weights, by architecture; nothing is written there."
    from tiny_models import CONFIGS, save_small

    return {arch: save_small(arch, tmp_path_factory.mktemp(arch)) for arch in CONFIGS}


@pytest.fixture(scope="session")
def llama(folders):
    return folders["llama"]


# ---- a browser with a JupyterLab in it

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
# no look-ups on the network; every cell in the page, also those that are scrolled away
LAB_SETTINGS = {
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "notebook-extension/tracker": '{"windowingMode": "none"}',
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Lab:
    """A JupyterLab server over `folder` that knows nothing of the user's own Jupyter;
    `kernels=False` gives it none to start.
    """

    def __init__(self, folder: Path, kernels=True):
        self.folder, self.token, self.port = folder, secrets.token_hex(16), free_port()
        self.state = state = folder / f".lab-{self.port}"
        self.forget_settings()
        env = os.environ | {
            "JUPYTERLAB_SETTINGS_DIR": str(state / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(state / "workspaces"),
            "JUPYTER_CONFIG_DIR": str(state / "config"),
            "JUPYTER_DATA_DIR": str(state / "data"),
            "JUPYTER_RUNTIME_DIR": str(state / "runtime"),
            "IPYTHONDIR": str(state / "ipython"),
        }
        no_kernels = (
            []
            if kernels
            else [
                "--KernelSpecManager.allowed_kernelspecs=none",
                "--KernelSpecManager.ensure_native_kernel=False",
            ]
        )
        self.log = open(state / "server.log", "w+")
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--allow-root",
                "--no-browser",
                "--ip=127.0.0.1",
                f"--port={self.port}",
                "--ServerApp.port_retries=0",
                f"--IdentityProvider.token={self.token}",
                f"--ServerApp.root_dir={folder}",
                "--LabApp.news_url=",
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                *no_kernels,
            ],
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.wait_ready()

    def wait_ready(self, seconds=60):
        for _ in range(seconds * 5):
            if self.process.poll() is not None:
                break
            try:
                return urllib.request.urlopen(
                    f"http://127.0.0.1:{self.port}/api?token={self.token}", timeout=2
                ).close()
            except OSError:
                time.sleep(0.2)
        self.close()
        self.log.seek(0)
        raise RuntimeError(f"JupyterLab did not start:\n{self.log.read()[-3000:]}")

    def forget_settings(self):
        "What a page has set, such as its theme, is as at the beginning."
        shutil.rmtree(self.state / "settings", ignore_errors=True)
        for name, text in LAB_SETTINGS.items():
            file = self.state / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def url(self, name):
        return f"http://127.0.0.1:{self.port}/lab/tree/{name}?token={self.token}&reset"

    def ask(self, method, path):
        "What the server answers to a request of its own interface."
        url = f"http://127.0.0.1:{self.port}/api/{path}?token={self.token}"
        with urllib.request.urlopen(urllib.request.Request(url, method=method)) as answer:
            return json.loads(answer.read() or b"null")

    def end_kernels(self):
        "Shut down what the notebooks of a test have started."
        for kind in ("sessions", "kernels"):
            for known in self.ask("GET", kind):
                with suppress(urllib.error.HTTPError):  # it went with its session
                    self.ask("DELETE", f"{kind}/{known['id']}")

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="session")
def chromium():
    "Path of the browser."
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        missing(
            f"no browser: none of {', '.join(names)} is installed (as root on Debian or "
            "Ubuntu, `make chromium` installs one)"
        )
    return path


@pytest.fixture(scope="module")
def page(chromium, tmp_path_factory):
    "A blank page of a headless browser; while there is one, no other event loop can run."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("chromium")),
            executable_path=chromium,
            headless=True,
            args=CHROMIUM_FLAGS,
            viewport={"width": 1400, "height": 1600},
        )
        yield context.pages[0]
        context.close()


LOOPBACK = r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|file:///|about:"


@pytest.fixture
def quiet(page):
    "The page; at the end nothing of a run was executed or asked elsewhere, and no error said."
    page.goto("about:blank")  # an earlier test's page asks for its server, which is gone
    errors, asked = [], []

    def said(message):
        if message.type == "error":
            errors.append(f"{message.text} ({message.location.get('url', '')})")

    def failed(error):
        errors.append(str(error))

    def request(asks):
        asked.append(asks.url)

    handlers = dict(console=said, pageerror=failed, request=request)
    for name, handler in handlers.items():
        page.on(name, handler)
    yield page
    for name, handler in handlers.items():
        page.remove_listener(name, handler)
    outside = [url for url in asked if not re.match(LOOPBACK, url)]
    assert not outside, outside
    assert page.evaluate("window.hit") is None, "something a model wrote was executed"
    assert not errors, "\n".join(errors)


@pytest.fixture(scope="module")
def labs(chromium, tmp_path_factory):
    "The servers of a file's tests, by whether they have kernels, and their environment."
    servers = {}
    yield servers
    for server in servers.values():
        server.close()


@pytest.fixture
def lab(labs, tmp_path):
    """`lab(kernels=True)`: a JupyterLab over the test's folder, with this checkout's settings.

    One serves all tests of a file that have the same environment; their kernels end with them.
    """
    shutil.copy(ROOT / "settings.ini", tmp_path)

    def start(kernels=True):
        env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
        known = kernels, tuple(sorted(env.items()))
        if known not in labs:
            labs[known] = Lab(tmp_path.parent, kernels=kernels)
        return LabOver(tmp_path.name, labs[known])

    yield start
    for server in labs.values():
        server.end_kernels()
        server.forget_settings()


class LabOver(NamedTuple):
    "A server as seen from one of the folders below its own."

    folder: str
    lab: Lab

    def url(self, name):
        return self.lab.url(f"{self.folder}/{name}")

    @property
    def process(self):
        return self.lab.process

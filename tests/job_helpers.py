"""What the tests of jobs, preloading, the ledger and the loop share: small stages and a look at
their processes.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from halos_nb.configs import SampleConfig
from halos_nb.jobs import launch
from halos_nb.settings import Profile

HERE = Path(__file__).parent
ONE = Profile()
TWO = Profile(name="cpu2", num_processes=2)
LAUNCHERS = ("fork", "accelerate")
NEEDS_LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="the supervisor's guarantee needs Linux"
)


def start(mode, folder, profile=TWO):
    "A job of `tiny_stage` that does what `mode` says."
    cfg = SampleConfig(model=mode, output_file=str(folder / "out"))
    return launch("sample", cfg, profile, folder, module="tiny_stage")


def quiet(job, **shown):
    "Wait for a job and show nothing."
    job.wait(show=False)


def alive(folder):
    "Processes of a job: they inherit its log as their stdout, however they were started."
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            stdout = os.readlink(process / "fd/1")
        except OSError:
            continue
        if stdout.startswith(f"{folder}/"):
            found.append(int(process.name))
    return found


def maps_torch(job, processes=1):
    "Whether so many processes of the job have begun to import torch."
    found = 0
    for child in psutil.Process(job.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a launcher asks commands that are soon over
            found += any("torch" in m.path for m in child.memory_maps())
    return found >= processes


def until(condition, seconds, what):
    "Wait for a condition; the seconds that it took."
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - start


CELL = """
from halos_nb.configs import SampleConfig
from halos_nb.settings import Profile
from halos_nb.jobs import launch
cfg = SampleConfig(model="hang", output_file="{out}")
two = Profile(num_processes=2, launcher="{launcher}")
job = launch("sample", cfg, two, "{folder}", module="tiny_stage")
job.wait()
"""


def code_cell(number, source):
    cell = dict(cell_type="code", id=f"c{number}", metadata={}, source=source)
    return cell | dict(outputs=[], execution_count=None)


def papermill(folder, cell=CELL, launcher="auto"):
    "A notebook under papermill: this cell, and one that leaves a file `next`."
    filled = cell.format(out=folder / "out", folder=folder, launcher=launcher)
    sources = [filled, f"open('{folder}/next', 'w')"]
    kernel = dict(name="python3", display_name="python3", language="python")
    notebook = dict(
        cells=[code_cell(i, source) for i, source in enumerate(sources)],
        nbformat=4,
        nbformat_minor=5,
        metadata=dict(kernelspec=kernel),
    )
    (folder / "nb.ipynb").write_text(json.dumps(notebook))
    command = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    return subprocess.Popen(
        [*command, folder / "nb.ipynb", folder / "out.ipynb"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

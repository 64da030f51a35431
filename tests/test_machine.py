"""What a machine may be like: its locale, its environment, its startup files, its paths."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import nbformat
import plotly.graph_objects as go
import pytest
from papermill.inspection import inspect_notebook

from halos_nb import configs, paper, printing
from halos_nb.compare import RunComparer
from halos_nb.handover import model_card
from halos_nb.jobs import environment
from halos_nb.monitor import RunMonitor
from halos_nb.page import report
from halos_nb.pairs import flag_pair, read_pairs
from halos_nb.settings import Profile, notebook_config, set_aside
from halos_nb.widgets import browse_pairs

ROOT = Path(__file__).resolve().parent.parent
# of this Python's file system too: ASCII, whatever is installed here
OTHER_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


# ---- UTF-8, whatever the locale

STARTS = ("run", "Popen", "check_output", "check_call", "call")
OPENS = ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile", "TextIOWrapper")
OWN = ("self.open", "os.open", "safe_open")  # those that open something else


def mode_of(call):
    "The mode of a call that opens a file."
    given = [*call.args, *(k.value for k in call.keywords)]
    given = [node.body if isinstance(node, ast.IfExp) else node for node in given]
    packed = ast.unparse(call.func) in ("gzip.open", "bz2.open", "lzma.open")
    return next((node.value for node in given if is_mode(node)), "rb" if packed else "r")


def is_mode(node):
    return isinstance(node, ast.Constant) and bool(re.fullmatch("[rwxabt+]+", str(node.value)))


def leaves_encoding_open(call):
    "Whether a call reads or writes text in whatever the locale says."
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    named = {k.arg for k in call.keywords}
    if "encoding" in named or name in OWN:
        return False
    if last == "read_text":
        return not call.args
    if last == "write_text":
        return len(call.args) < 2
    if last in OPENS:
        return "b" not in mode_of(call)
    return last in STARTS and bool(named & {"text", "universal_newlines"})


def texts_in_the_locale(source):
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"{c.lineno}: {ast.unparse(c)[:80]}" for c in calls if leaves_encoding_open(c)]


@pytest.mark.parametrize("file", sorted((ROOT / "halos_nb").glob("*.py")), ids=lambda f: f.name)
def test_every_text_names_its_encoding(file):
    assert texts_in_the_locale(file.read_bytes()) == []


@pytest.mark.parametrize(
    "line, found",
    [
        ("p.read_text()", True),
        ("p.read_text('utf-8')", False),
        ("p.write_text(x)", True),
        ("p.write_text(x, encoding='utf-8')", False),
        ("open(p)", True),
        ("open(p, 'a')", True),
        ("open(p, 'rb')", False),
        ("open(p, 'wb' if new else 'ab')", False),
        ("p.open('w')", True),
        ("gzip.open(p)", False),
        ("gzip.open(p, 'rt')", True),
        ("os.open(p, 0)", False),
        ("subprocess.run(x, text=True)", True),
        ("subprocess.run(x, encoding='utf-8')", False),
        ("go.Scatter(x=x, text=names)", False),
    ],
)
def test_texts_in_the_locale_are_seen(line, found):
    assert bool(texts_in_the_locale(line)) == found


IN_ANOTHER_LOCALE = """
import sys
from pathlib import Path
from halos_nb.identity import function_hash
from halos_nb.records import file_hash, prompt_id, read_records, write_records
from halos_nb.settings import load_settings
sys.path.insert(0, ".")
turn = dict(role="user", content="Größe? 🦉")
row = dict(type="sample", prompt_id=prompt_id([turn]), sample_id=0, prompt=[turn], output="é")
write_records("out.json", [row])
print(ascii([read_records("out.json"), file_hash("out.json"), function_hash("rule:score")]))
print(load_settings(Path("settings.ini"), env={}).profile)
try:
    print(load_settings(Path("other.ini"), env={}).runs_dir)
except ValueError as error:
    print(ascii(str(error)))
"""


def test_nothing_is_another_in_another_locale(tmp_path):
    "Files, hashes and settings are the same; a path that would be another is refused."
    (tmp_path / "rule.py").write_text('def score(x):\n    "Größe"\n    return 1.0\n', "utf-8")
    ini = "[halos_nb]\nprofile = mine  # für uns\n[profile mine]\nenv.WHO = Jürgen\n"
    (tmp_path / "settings.ini").write_text(ini, "utf-8")
    (tmp_path / "other.ini").write_text("[halos_nb]\nruns_dir = Läufe\n", "utf-8")
    (tmp_path / "look.py").write_text(IN_ANOTHER_LOCALE, "utf-8")
    said = []
    for own in ({"LC_ALL": "C.UTF-8"}, OTHER_LOCALE):
        env = os.environ | {"PYTHONPATH": str(ROOT)} | own
        command = [sys.executable, "look.py"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        said.append(done.stdout.decode().splitlines())
    assert said[0][:2] == said[1][:2]
    assert said[0][2] == "Läufe"
    assert "export PYTHONUTF8=1" in said[1][2]


def test_a_stage_is_started_with_utf8():
    assert environment(Profile(), Path("p"))["PYTHONUTF8"] == "1"


# ---- what others have exported

FOREIGN = """
RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID PET_NNODES
ACCELERATE_USE_FSDP ACCELERATE_TORCH_DEVICE FSDP_VERSION FP8_BACKEND
PMI_RANK PMIX_RANK OMPI_COMM_WORLD_RANK OMPI_UNIVERSE_SIZE MV2_COMM_WORLD_SIZE I_MPI_INFO_NP
SLURM_PROCID SLURM_LOCALID SLURM_NTASKS
""".split()


def test_what_tells_of_another_launch_stays_away_and_is_said(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in FOREIGN:
        monkeypatch.setenv(name, "7")
    given = environment(Profile(env={"OMPI_MCA_btl": "tcp"}), Path("p"))
    assert not {*FOREIGN} & {*given}
    assert given["OMPI_MCA_btl"] == "tcp" and given["SLURM_JOB_ID"] == "7"
    [told] = [
        line for line in set_aside(Profile(), dict.fromkeys(FOREIGN, "7")) if "RANK" in line
    ]
    assert "not handed on" in told and f"and {len(FOREIGN) - 12} more" in told


# ---- notebooks under papermill

DRIVERS = sorted(ROOT.glob("nbs/[a-z]*.ipynb"))


@pytest.mark.parametrize("path", DRIVERS, ids=lambda p: p.stem)
def test_papermill_reads_every_parameter_of_a_driver(path, caplog):
    "A line with a second = is not read, and papermill calls its parameter unknown."
    cells = nbformat.read(path, 4).cells
    [cell] = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    [config] = re.findall(r"notebook_config\((\w+), globals", "".join(c.source for c in cells))
    given = {}
    exec(cell.source, given)
    given = {k: v for k, v in given.items() if not k.startswith("__")}
    assert inspect_notebook(str(path)).keys() == given.keys()
    assert "Unable to parse" not in caplog.text
    notebook_config(getattr(configs, config), given)


STARTUP = """
import math
beta = 7.0
greeting = "hello"
print(greeting)
"""
DRIVER = [
    'run_name = "mine"\nlr = 1e-5\n',
    "from halos_nb.configs import LoopConfig\n",
    "from halos_nb.settings import notebook_config\n",
    "cfg = notebook_config(LoopConfig, globals())\nprint('cfg', cfg.run_name, cfg.beta)\n",
]


@pytest.fixture(scope="module")
def papermill(tmp_path_factory):
    "Runs a small driver, in a kernel with a startup file: what it printed, or the error."
    folder = tmp_path_factory.mktemp("Über uns")
    startup = folder / "ipython/profile_default/startup/00-mine.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(STARTUP, "utf-8")
    cells = [nbformat.v4.new_code_cell(text) for text in DRIVER]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = dict(name="python3", display_name="python3", language="python")
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, folder / "driver.ipynb")

    def run(*words):
        command = [sys.executable, "-m", "papermill", "driver.ipynb", "out.ipynb", *words]
        env = os.environ | {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True)
        if done.returncode:
            return done.stderr.decode()
        return json.dumps(nbformat.read(folder / "out.ipynb", 4).cells[-1].outputs)

    return run


def test_what_papermill_and_a_startup_file_put_there_is_no_parameter(papermill):
    beta = configs.LoopConfig().beta
    assert f"cfg 007 {beta}" in papermill("--inject-paths", "-r", "run_name", "007")


def test_a_number_for_a_text_is_told(papermill):
    said = papermill("-p", "run_name", "1e5")
    assert "run_name: should be a text, got 100000.0" in said and "-r run_name TEXT" in said


# ---- a folder that may only be read


@contextmanager
def only_read(folder):
    "Nothing can be written in a folder, not by root either."
    if os.getuid():
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555)
        yield
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
        return
    bound = subprocess.run(["mount", "--bind", folder, folder], capture_output=True)
    if bound.returncode:
        pytest.skip("root without mounts writes everywhere")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_what_is_printed_names_a_folder_that_may_only_be_read(tmp_path, monkeypatch):
    "Whatever prints it; and where it can be written, an older one is replaced as a whole."
    browser = tmp_path / "browser"
    browser.write_text(
        '#!/bin/sh\nfor word; do case "$word" in --print-to-pdf=*) '
        'printf %%PDF-1 > "${word#*=}";; esac; done\n'
    )
    browser.chmod(0o755)
    monkeypatch.setattr(printing, "find_browser", lambda: str(browser))
    monkeypatch.setattr(paper, "print_figure", lambda *sizes: go.Figure())
    monkeypatch.setattr(paper, "image_of", lambda *page, **size: b"<svg/>")
    page = tmp_path / "runs/run/report.html"
    page.parent.mkdir(parents=True)
    page.write_text("<p>a run</p>", "utf-8")
    with only_read(tmp_path / "runs"):
        with pytest.raises(OSError, match="report.pdf.*may only be read.*path="):
            printing.pdf(page)
        with pytest.raises(OSError, match="kl.svg.*may only be read.*another path"):
            paper.save_figure(go.Figure(), page.parent / "kl")
    assert printing.pdf(page).read_bytes() == b"%PDF-1"
    assert [file.name for file in paper.save_figure(None, page.parent / "kl")] == [
        "kl.svg",
        "kl.pdf",
    ]
    monkeypatch.setattr("os.replace", lambda *names: os.link(*names))  # it ends before that
    browser.write_text(browser.read_text().replace("PDF-1", "PDF-2"))
    with pytest.raises(OSError):
        printing.pdf(page)
    assert page.with_suffix(".pdf").read_bytes() == b"%PDF-1"
    assert not list(page.parent.glob(".*"))


def test_a_finished_run_is_looked_at_where_nothing_can_be_written(tmp_path):
    run = shutil.copytree(ROOT / "tests/data/2026-11/run", tmp_path / "runs/run", symlinks=True)
    with only_read(tmp_path / "runs"):
        with pytest.raises(OSError):
            (run / "x").touch()
        assert [this.name for this in RunComparer(tmp_path / "runs", mode="static").runs]
        RunMonitor(run, mode="static").show()
        assert browse_pairs(run, mode="static").parts
        with pytest.raises(OSError, match="may only be read.*flags"):
            flag_pair(read_pairs(run), 1)
        with pytest.raises(OSError, match="report.*may only be read.*path="):
            report(run)
        assert "Ledger" in report(run, tmp_path / "report.html").read_text("utf-8")
        with pytest.raises(OSError, match="README.*may only be read; copy the run's folder"):
            model_card(run)

"""The drivers' promise: a parameter is what the config says it is, and a wrong one stops the
notebook before anything starts.
"""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import every
from test_house import NOTEBOOKS, default_exp

from halos_nb.configs import (
    AuditConfig,
    CompareConfig,
    HandConfig,
    LoopConfig,
    RewardConfig,
    RoundLabelConfig,
    RunsConfig,
)
from halos_nb.settings import notebook_config

ROOT = Path(__file__).resolve().parent.parent
DRIVERS = {p.stem: p for p in NOTEBOOKS if default_exp(p) is None}
CONFIG = {
    "online_loop": LoopConfig,
    "reward_model": RewardConfig,
    "compare_methods": CompareConfig,
    "label_by_hand": HandConfig,
    "label_round": RoundLabelConfig,
    "compare_runs": RunsConfig,
    "audit": AuditConfig,
}
# parameter and value that must be refused by name: a misspelling, a wrong type, a value out of
# range
WRONG = {
    "online_loop": [("bta", "0.1"), ("beta", "hello"), ("total_prompts", "0")],
    "reward_model": [("epoch", "1"), ("lr", "hello"), ("batch_size", "0")],
    "compare_methods": [("method", "dpo"), ("seed", "hello"), ("total_prompts", "0")],
    "label_by_hand": [("pendng", "skip"), ("num_pairs", "0"), ("lr", "hello")],
    "label_round": [("run", "x"), ("mode", "hello"), ("guidelins", "x")],
    "compare_runs": [("run", "x"), ("only_differences", "maybe"), ("prompts", "0")],
    "audit": [("modl", "x"), ("num_examples", "0")],
}
drivers = pytest.mark.parametrize("name", DRIVERS)


HIDDEN = {"source_hidden": True}  # imports that a reader may open


def code_cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def tags(cell):
    return cell["metadata"].get("tags", [])


@drivers
def test_driver_is_known(name):
    assert name in CONFIG and name in WRONG, (
        f"{name}.ipynb: give it a line in CONFIG and in WRONG"
    )


@drivers
def test_parameters_are_the_config(name):
    cells = [c for c in code_cells(DRIVERS[name]) if "parameters" in tags(c)]
    assert len(cells) == 1, f"{name}: exactly one cell has the tag `parameters`"
    source, fields = "".join(cells[0]["source"]), dataclasses.fields(CONFIG[name])
    body = ast.parse(source).body
    assert all(isinstance(s, ast.Assign) and len(s.targets) == 1 for s in body), (
        f"{name}: the parameters cell holds plain assignments only"
    )
    assert [s.targets[0].id for s in body] == [f.name for f in fields], (
        f"{name}: the parameters are {CONFIG[name].__name__}'s fields, in their order"
    )
    values = {s.targets[0].id: ast.literal_eval(s.value) for s in body}
    for f in fields:
        assert (type(values[f.name]), values[f.name]) == (type(f.default), f.default), (
            f"{name}: default of {f.name}"
        )
    notebook_config(CONFIG[name], values)


@drivers
def test_guard_is_the_first_cell_after_the_parameters(name):
    cells = code_cells(DRIVERS[name])
    i = next(i for i, c in enumerate(cells) if "parameters" in tags(c))
    assert "notebook_config(" in "".join(cells[i + 1]["source"]), (
        f"{name}: wrong parameters must stop before anything starts"
    )


def started(path):
    "A driver's parameters cell and its guard, as one would run them."
    cells = code_cells(path)
    i = next(i for i, c in enumerate(cells) if "parameters" in tags(c))
    return ["".join(c["source"]) for c in cells[i : i + 2]]


MISTAKES = [(name, *wrong) for name in DRIVERS for wrong in WRONG.get(name, [])]


@pytest.mark.parametrize("name, parameter, value", MISTAKES)
def test_wrong_parameter_is_refused_by_the_guard(name, parameter, value, monkeypatch):
    "The first lines of the driver itself, with the parameter as papermill would set it."
    monkeypatch.chdir(ROOT)
    parameters, guard = started(DRIVERS[name])
    here = {}
    exec(parameters, here)
    here[parameter] = int(value) if value.isdigit() else value
    with pytest.raises(ValueError, match=rf"^{CONFIG[name].__name__}: {parameter}: "):
        exec(guard, here)


def through_papermill():
    "CI has all mistakes in one driver, and a misspelling in each of the others."
    for name, wrong in WRONG.items():
        for i, (parameter, value) in enumerate(wrong):
            ci = i == 0 or name == "online_loop"
            yield pytest.param(name, parameter, value, marks=[] if ci else every)


@pytest.mark.parametrize("name, parameter, value", through_papermill())
def test_wrong_parameter_stops_at_once(name, parameter, value, tmp_path):
    "As a user types it, from the repository's root."
    done = subprocess.run(
        ["papermill", str(DRIVERS[name]), str(tmp_path / "out.ipynb"), "-p", parameter, value],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HALOS_NB_RUNS_DIR": str(tmp_path / "runs")},
    )
    assert done.returncode != 0
    assert re.search(
        rf"^ValueError: {CONFIG[name].__name__}: {parameter}: ", done.stderr, re.M
    ), done.stderr[-2000:]
    assert not (tmp_path / "runs").exists(), "something was started"
    ran = [
        c
        for c in code_cells(tmp_path / "out.ipynb")
        if c["execution_count"] and "papermill-error-cell-tag" not in tags(c)
    ]
    assert "notebook_config(" in "".join(ran[-1]["source"]), "cells after the guard were run"


def test_cleaning_keeps_the_parameters_tag(tmp_path):
    """nbdev-clean drops cell metadata; without the tag papermill would run with the defaults
    and only warn.
    """
    for path in DRIVERS.values():
        shutil.copy(path, tmp_path)
    cell = dict(
        cell_type="code",
        id="a",
        metadata={"tags": ["parameters"], "trusted": True},
        source=["beta = 0.1"],
        execution_count=3,
        outputs=[],
    )
    (tmp_path / "small.ipynb").write_text(
        json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5))
    )
    subprocess.run(["nbdev-clean", "--fname", str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    small = code_cells(tmp_path / "small.ipynb")[0]
    assert (small["metadata"], small["execution_count"]) == ({"tags": ["parameters"]}, None)
    for name in DRIVERS:
        assert sum("parameters" in tags(c) for c in code_cells(tmp_path / f"{name}.ipynb")) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean_and_small(path):
    """What is committed has no execution counts or stray metadata, no script in its outputs,
    and stays readable in a diff.
    """
    assert path.stat().st_size < 1_000_000, (
        f"{path.name}: {path.stat().st_size / 1e6:.1f} MB; is a figure saved as HTML?"
    )
    for cell in code_cells(path):
        kept = {"tags", "nbdev", "hide_input", "jupyter"}
        assert cell["execution_count"] is None, f"{path.name}: run nbdev-clean"
        assert set(cell["metadata"]) <= kept, f"{path.name}: run nbdev-clean"
        assert cell["metadata"].get("jupyter", HIDDEN) == HIDDEN, path.name
        for out in cell["outputs"]:
            assert out["output_type"] != "error", f"{path.name}: a saved error"
            assert "<script" not in "".join(out.get("data", {}).get("text/html", "")), (
                f"{path.name}: a script in an output"
            )


def test_other_kernels_do_not_get_in_the_way(tmp_path):
    """`papermill` uses this environment's Python even where the user has another kernel named
    python3.
    """
    other = tmp_path / "home/.local/share/jupyter/kernels/python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(
        json.dumps(
            dict(
                argv=["/bin/false", "{connection_file}"],
                display_name="other",
                language="python",
            )
        )
    )
    cell = dict(
        cell_type="code",
        id="a",
        metadata={},
        source=["import sys; print(sys.prefix)"],
        execution_count=None,
        outputs=[],
    )
    meta = {"kernelspec": dict(name="python3", display_name="python3", language="python")}
    (tmp_path / "in.ipynb").write_text(
        json.dumps(dict(cells=[cell], metadata=meta, nbformat=4, nbformat_minor=5))
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")} | {
        "HOME": str(tmp_path / "home")
    }
    subprocess.run(
        ["papermill", "in.ipynb", "out.ipynb"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=120,
        env=env,
    )
    import sys

    assert (
        "".join(code_cells(tmp_path / "out.ipynb")[0]["outputs"][0]["text"]).strip()
        == sys.prefix
    )

"What somebody finds who types `import halos_nb`."

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_house import HEAVY, loaded

import halos_nb

ROOT = Path(__file__).resolve().parent.parent
PROMISED = [
    "run_rounds",
    "LoopConfig",
    "load_settings",
    "RunMonitor",
    "browse_pairs",
    "compare_runs",
    "report",
    "pdf",
    "load_data",
    "plan",
    "model_card",
    "push",
]


def test_tab_completion_shows_the_names_without_loading_anything():
    assert set(PROMISED) <= set(dir(halos_nb)) and set(PROMISED) == set(halos_nb.__all__)
    light = loaded("import halos_nb; dir(halos_nb)")
    assert not light & (HEAVY | {"numpy", "pandas", "plotly", "pydantic", "IPython", "scipy"})


@pytest.mark.parametrize("name", PROMISED)
def test_a_name_is_the_rooms_own(name):
    value = getattr(halos_nb, name)
    assert callable(value) and value.__doc__
    if isinstance(value, ModuleType):  # imported before: a room of that name is called as it is
        assert name == "plan" and callable(value.plan)
        return
    assert getattr(sys.modules[value.__module__], value.__name__) is value
    assert vars(halos_nb)[name] is value, "the second use does not import again"


def test_the_loop_at_the_prompt_needs_no_torch():
    names = "halos_nb.run_rounds, halos_nb.LoopConfig, halos_nb.load_settings"
    assert not loaded(f"import halos_nb; {names}") & HEAVY


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'run_round'"):
        halos_nb.run_round  # noqa: B018


def test_the_docstring_names_them_all():
    for name in PROMISED:
        assert name in halos_nb.__doc__


def test_python_m_halos_nb_prints_the_commands_and_the_map():
    command = [sys.executable, "-m", "halos_nb"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for stage in ("train", "sample", "label"):
        assert f"python -m halos_nb.{stage}" in out
    for driver in (ROOT / "nbs").glob("[a-z]*.ipynb"):
        assert f"nbs/{driver.name}" in out
    assert "README.md" in out and "CONTRIBUTING.md" in out

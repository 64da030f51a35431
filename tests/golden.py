"""Reference values for tests: recorded outputs of HALOs, in a folder beside the repository that is not part of it."""

import json, os
from pathlib import Path

import pytest

FOLDER = (
    Path(os.environ.get("HALOS_NB_SHARED") or Path(__file__).parents[2] / "shared") / "golden"
)
ABSENT = (
    f"no reference values: {FOLDER.name}/ is not beside the repository (HALOS_NB_SHARED may "
    "name the folder that holds it)"
)
needs_golden = pytest.mark.skipif(not FOLDER.is_dir(), reason=ABSENT)


def numbers(x):
    "The value with 'NaN', 'Infinity' and '-Infinity' as floats."
    if isinstance(x, list):
        return [numbers(v) for v in x]
    if isinstance(x, dict):
        return {k: numbers(v) for k, v in x.items()}
    return float(x) if x in ("NaN", "Infinity", "-Infinity") else x


def load(name):
    "The whole file `name`.json; the test is skipped where there is none."
    if not (FOLDER / f"{name}.json").is_file():
        pytest.skip(ABSENT)
    return numbers(json.loads((FOLDER / f"{name}.json").read_text()))


def cases(name, keep=lambda case: True):
    "`parametrize` over the cases of `name`.json; one skipped test where there is none."
    if not (FOLDER / f"{name}.json").is_file():
        return pytest.mark.parametrize(
            "case",
            [pytest.param(None, marks=pytest.mark.skip(reason=ABSENT), id="golden-absent")],
        )
    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=c["id"]) for c in load(name)["cases"] if keep(c)]
    )

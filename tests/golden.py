"""Reference values for tests: recorded outputs of HALOs, in `tests/golden` (its README says
what is in them).
"""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "golden"


def numbers(x):
    "The value with 'NaN', 'Infinity' and '-Infinity' as floats."
    if isinstance(x, list):
        return [numbers(v) for v in x]
    if isinstance(x, dict):
        return {k: numbers(v) for k, v in x.items()}
    return float(x) if x in ("NaN", "Infinity", "-Infinity") else x


def load(name):
    "The whole file `name`.json."
    return numbers(json.loads((FOLDER / f"{name}.json").read_text()))


def cases(name, keep=lambda case: True):
    "`parametrize` over the cases of `name`.json."
    kept = [c for c in load(name)["cases"] if keep(c)]
    return pytest.mark.parametrize("case", [pytest.param(c, id=c["id"]) for c in kept])


def without_ids(records):
    "Feedback without the ids of its samples, which the predecessor does not keep."
    ids = ("sample_id", "sample_id_A", "sample_id_B")
    return [{k: v for k, v in r.items() if k not in ids} for r in records]

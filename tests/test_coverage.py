"""Every kind of interval holds the truth about 95 times in 100, at 60 and at 128 prompts: the
table of `bench/coverage.py` with few studies. What takes rows of a prompt for independent
does not."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from halos_nb.stats import length_controlled, share_over_prompts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import coverage

STUDIES = 160
NOISE = math.sqrt(0.95 * 0.05 / STUDIES)  # standard error of a share of 0.95


@pytest.mark.parametrize("prompts", [60, 128])
@pytest.mark.parametrize("name", coverage.STUDIES)
def test_intervals_hold_the_truth(name, prompts):
    "Between 0.93 and 0.97, and three errors of so few studies beyond."
    held = coverage.coverage(coverage.STUDIES[name], prompts, STUDIES, draws=300, seed=11)
    assert 0.93 - 3 * NOISE <= held <= min(0.97 + 3 * NOISE, 1 - 0.5 / STUDIES)


def alone(prompts, draws, rng):
    "`clustered_share`, told that every row stands alone."
    truth = rng.uniform(0.5, 0.9)
    level = rng.beta(truth, 1 - truth, prompts)
    hits = (rng.random((prompts, 4)) < level[:, None]).ravel()
    return share_over_prompts(hits.tolist(), range(len(hits))), truth


def test_a_wrong_interval_is_seen():
    assert coverage.coverage(alone, 60, STUDIES, draws=300, seed=11) < 0.93 - 3 * NOISE


def test_lengths_that_decide_everything_have_no_interval():
    longer = np.arange(-30, 30) + 0.5
    found = length_controlled((longer > 0).astype(float), longer, list(range(60)))
    assert math.isnan(found.low) and math.isnan(found.high)

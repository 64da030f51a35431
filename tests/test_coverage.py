"""Every kind of interval holds the truth about 95 times in 100, at 60 and at 128 prompts: the
table of `bench/coverage.py` with few studies. What takes rows of a prompt for independent
does not."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from halos_nb.figures import margin_histogram
from halos_nb.rewards import reward_scatter
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


@pytest.mark.parametrize("prompts", [60, 128])
@pytest.mark.parametrize("name", coverage.HARD)
def test_intervals_hold_the_truth_where_it_is_hard(name, prompts):
    "Exact and bounded ones more often than they promise, none less."
    held = coverage.coverage(coverage.HARD[name], prompts, STUDIES, draws=100, seed=11)
    assert held >= 0.93 - 3 * NOISE


def test_ties_are_no_coins():
    "Of win rates with ties the truth lies within, and outside as often as it should."
    held = coverage.coverage(coverage.with_ties(0.6), 128, 600, draws=0, seed=3)
    assert 0.92 <= held <= 0.98


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


def test_copies_of_a_row_tell_no_more_than_the_row():
    "The scatter of score and truth and the histogram of margins, with four rows a prompt."
    rng = np.random.default_rng(5)
    once = []
    for i, (score, noise) in enumerate(rng.normal(size=(80, 2)).tolist()):
        once.append(dict(prompt_id=i, reward=score, true_reward=score + noise))
    copies = [row for row in once for _ in range(4)]
    few, many = [reward_scatter(rows).data[1].error_y for rows in (once, copies)]
    assert sum(many.array) > 0.8 * sum(few.array)  # half of it, were they independent
    pairs = []
    for row in copies:
        sides = dict(output_A="a", output_B="b", label=1, reward_B=0.0)
        pairs.append(sides | dict(prompt_id=row["prompt_id"], reward_A=row["reward"]))
    hits, prompts = [row["reward"] > 0 for row in copies], [row["prompt_id"] for row in copies]
    shown = margin_histogram(pairs).layout.title.subtitle.text
    assert f"{share_over_prompts(hits, prompts):.1%}" in shown

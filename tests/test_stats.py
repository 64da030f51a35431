"""Statistics: against published values, against scipy, against the definitions written out,
and on real pairs that a model, a judge and a person have labelled."""

import math
import os
from collections import Counter
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from halos_nb.stats import (
    agree,
    best_of_n,
    bootstrap,
    bootstrap_sums,
    calibrate,
    cohen_kappa,
    compare_labellers,
    effective_prompts,
    hits_difference,
    hits_of,
    krippendorff,
    length_controlled,
    mean_gain,
    mean_interval,
    mean_over_seeds,
    mean_share_of_way,
    rate_interval,
    share_interval,
    share_of_parts,
    share_of_way,
    share_over_prompts,
    sign,
    slope,
    spearman,
    spearman_of,
    win_rate,
    without_length,
)
from halos_nb.verdicts import pair_table

# ---- published values


@pytest.mark.parametrize(
    "both_yes, first_yes, second_yes, both_no, kappa",
    [(20, 5, 10, 15, 0.4), (45, 15, 25, 15, 0.1304), (25, 35, 5, 35, 0.2593)],
)
def test_kappa_of_published_tables(both_yes, first_yes, second_yes, both_no, kappa):
    "The three tables of Wikipedia's article on Cohen's kappa."
    x = "y" * both_yes + "y" * first_yes + "n" * second_yes + "n" * both_no
    y = "y" * both_yes + "n" * first_yes + "y" * second_yes + "n" * both_no
    assert cohen_kappa(x, y) == pytest.approx(kappa, abs=5e-5)


def test_alpha_of_krippendorff_2011():
    """Computing Krippendorff's Alpha-Reliability, sections A (binary, two observers) and B
    (nominal, two); C (four, with missing values) stands in the notebook."""
    binary = [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
    assert krippendorff(binary) == pytest.approx(0.095, abs=5e-4)
    letters = [["abcde".index(c) for c in said] for said in ("aabbdcccedda", "babbbccceddd")]
    assert krippendorff(letters) == pytest.approx(0.692, abs=5e-4)


def test_spearman_of_published_and_tied_values():
    """Wikipedia's IQ against hours of television: -29/165. And ranks 1, 2.5, 2.5, 4 against
    1, 2, 3.5, 3.5: 3.75 / 4.5."""
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 3]) == pytest.approx(3.75 / 4.5)
    assert math.isnan(spearman([], [])) and math.isnan(spearman([1], [1]))


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-9, 9)), min_size=2, max_size=30))
@settings(deadline=None)
def test_spearman_is_that_of_scipy(rows):
    from scipy.stats import spearmanr

    x, y = [list(column) for column in zip(*rows)]
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)


@pytest.mark.parametrize(
    "k, n, low, high",
    [(8, 10, 0.4439, 0.9748), (5, 10, 0.1871, 0.8129), (0, 20, 0, 0.1684), (20, 20, 0.8316, 1)],
)
def test_share_interval_of_published_values(k, n, low, high):
    assert share_interval(k, n)[1:] == pytest.approx((low, high), abs=6e-5)


def chance(counts, n, p):
    "That one of these counts comes up in n trials of chance p."
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in counts)


@given(st.integers(1, 60), st.data())
@settings(deadline=None)
def test_share_interval_by_its_definition(n, data):
    """At its ends, what was seen or more (or less) has a chance of 2.5%; and scipy's is the
    same.
    """
    from scipy.stats import binomtest

    k = data.draw(st.integers(0, n))
    value, low, high = share_interval(k, n)
    if k:
        assert chance(range(k, n + 1), n, low) == pytest.approx(0.025, rel=1e-6)
    if k < n:
        assert chance(range(k + 1), n, high) == pytest.approx(0.025, rel=1e-6)
    theirs = binomtest(k, n).proportion_ci(method="exact")
    assert (value, low, high) == pytest.approx((k / n, theirs.low, theirs.high))


@pytest.mark.parametrize("n", [1, 10, 37])
def test_share_interval_keeps_its_promise(n):
    "Whatever the true share, at least 95% of the counts have an interval that holds it."
    intervals = [share_interval(k, n) for k in range(n + 1)]
    for p in np.linspace(0.001, 0.999, 333):
        holds = [k for k in range(n + 1) if intervals[k].low <= p <= intervals[k].high]
        assert chance(holds, n, p) >= 0.95


def test_share_interval_refuses_what_is_no_share():
    for k in (-1, 11):
        with pytest.raises(ValueError, match=f"{k} of 10"):
            share_interval(k, 10)


# ---- the definitions, written out


def apart(a, b, n, level):
    "The disagreement of two values; n: how often each value was said."
    if level == "nominal":
        return float(a != b)
    if level == "interval":
        return float((a - b) ** 2)
    between = [v for v in n if min(a, b) <= v <= max(a, b)]
    return (sum(n[v] for v in between) - (n[a] + n[b]) / 2) ** 2


def alpha_by_definition(units, level):
    "Observed over expected disagreement, from the matrix of coincidences."
    coincidences = Counter()
    for said in units:
        for a, b in permutations(said, 2):
            coincidences[a, b] += 1 / (len(said) - 1)
    n = Counter()
    for (a, _), count in coincidences.items():
        n[a] += count
    total = sum(n.values())
    if total <= 1:
        return math.nan
    observed = sum(c * apart(a, b, n, level) for (a, b), c in coincidences.items()) / total
    expected = sum(n[a] * n[b] * apart(a, b, n, level) for a in n for b in n)
    expected /= total * (total - 1)
    return 1 - observed / expected if expected > 1e-12 else math.nan


rated = st.lists(st.one_of(st.none(), st.integers(-2, 2)), min_size=3, max_size=3)
ratings = st.lists(rated, min_size=1, max_size=12)


@given(ratings, st.sampled_from(["nominal", "ordinal", "interval"]))
@settings(deadline=None, max_examples=200)
def test_alpha_by_its_definition(units, level):
    ours = krippendorff([list(labeller) for labeller in zip(*units)], level)
    said = [[value for value in unit if value is not None] for unit in units]
    assert ours == pytest.approx(alpha_by_definition(said, level), abs=1e-9, nan_ok=True)


def rho_by_definition(x, y):
    "Correlation of ranks, each counted out."

    def centred_rank(v, values):
        lower = sum(u < v for u in values)
        return lower + sum(u == v for u in values) / 2 - len(values) / 2

    a = [centred_rank(v, x) for v in x]
    b = [centred_rank(v, y) for v in y]
    below = math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
    return sum(p * q for p, q in zip(a, b)) / below if below > 1e-9 else math.nan


def kappa_by_definition(x, y):
    same = sum(p == q for p, q in zip(x, y)) / len(x)
    chance = sum(x.count(v) * y.count(v) for v in set(x)) / len(x) ** 2
    return (same - chance) / (1 - chance) if chance < 1 - 1e-9 else math.nan


small = st.integers(0, 3)


@given(st.lists(st.tuples(small, small, small), min_size=2, max_size=15))
@settings(deadline=None, max_examples=200)
def test_weights_are_repetitions(rows):
    "An item of weight 3 is the item three times; kappa and rho as sums over items."
    x = [a for a, _, weight in rows for _ in range(weight)]
    y = [b for _, b, weight in rows for _ in range(weight)]
    if not x:
        return
    rho = spearman_of([a for a, _, _ in rows], [b for _, b, _ in rows])
    found = rho(np.array([weight for _, _, weight in rows], float))
    assert found == pytest.approx(rho_by_definition(x, y), abs=1e-9, nan_ok=True)
    assert cohen_kappa(x, y) == pytest.approx(kappa_by_definition(x, y), abs=1e-9, nan_ok=True)


# ---- intervals


def test_intervals_of_shares_hold_the_truth():
    """250 studies of 60 prompts with four alike pairs each: about 95% of the intervals hold the
    true share, and those that take the pairs for independent do not."""
    rng = np.random.default_rng(0)
    prompts = [p for p in range(60) for _ in range(4)]
    inside = naive = 0
    for _ in range(250):
        level = rng.beta(2, 1, 60)  # the prompts' own shares; 2/3 on average
        hits = (rng.random((60, 4)) < level[:, None]).ravel().tolist()
        over_prompts = share_over_prompts(hits, prompts)
        alone = share_over_prompts(hits, range(240))
        inside += over_prompts.low <= 2 / 3 <= over_prompts.high
        naive += alone.low <= 2 / 3 <= alone.high
    assert 0.93 * 250 <= inside <= 0.99 * 250
    assert naive < inside


def test_intervals_of_shares_near_the_edge_hold_the_truth():
    "97% right, 80 prompts of three items: Student's t alone holds it 89 times in 100."
    rng = np.random.default_rng(1)
    prompts = [p for p in range(80) for _ in range(3)]
    inside = plain = 0
    for _ in range(300):
        level = rng.beta(3.88, 0.12, 80)
        hits = (rng.random((80, 3)) < level[:, None]).ravel().astype(float)
        found = share_over_prompts(hits.tolist(), prompts)
        inside += found.low <= 0.97 <= found.high
        by_t = mean_interval(hits, prompts)
        plain += by_t.low <= 0.97 <= by_t.high
    assert 0.93 * 300 <= inside
    assert plain < inside


def test_intervals_of_a_reward_model_on_pairs_hold_the_truth():
    """Pairs whose margins go with length and whose prompts are alike: the gain over the longer,
    what is left without length, and how sure it is, each of 60 prompts."""
    rng = np.random.default_rng(2)

    def pairs_of(prompts):
        number = np.repeat(np.arange(prompts), 1 + rng.poisson(1.85, prompts))
        longer = rng.normal(0.6, 0.8, len(number)) + rng.normal(0, 0.4, prompts)[number]
        own = rng.normal(0.6, 1.2, len(number)) + rng.normal(0, 0.6, prompts)[number]
        return number, longer, 2 * longer + own

    def found_in(number, longer, margins, draws):
        hits = hits_of(margins)
        return [
            hits_difference(hits, hits_of(longer), number),
            without_length(margins, longer, number, draws=draws).share,
            calibrate(margins, number.tolist(), draws=2).too_sure,
        ]

    truth = [one.value for one in found_in(*pairs_of(100_000), draws=1)]
    inside = np.zeros(3)
    for _ in range(150):
        found = found_in(*pairs_of(60), draws=200)
        inside += [one.low <= true <= one.high for one, true in zip(found, truth)]
    assert (inside >= 0.89 * 150).all() and (inside <= 0.99 * 150).all(), inside


def test_an_error_of_calibration_is_judged_beside_what_chance_gives():
    "Claims that all come true as often as they say: the error lies where chance puts it."
    rng = np.random.default_rng(4)
    inside = loud = 0
    for study in range(100):
        claims = np.abs(rng.normal(0, 2, 228))
        came_true = rng.random(228) < 1 / (1 + np.exp(-claims))
        margins = np.where(came_true, claims, -claims)
        found = calibrate(margins, draws=200, seed=study)
        inside += found.chance.low <= found.error <= found.chance.high
        loud += calibrate(4 * margins, draws=200).error > found.chance.high
    assert 88 <= inside
    assert loud >= 90
    assert 0.04 < found.chance.value < 0.09  # never 0


def test_intervals_of_means_hold_the_truth():
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 4)
    alone = by_prompt = 0
    for _ in range(200):
        interval = mean_interval(rng.normal(size=60))
        alone += interval.low < 0 < interval.high
        alike = np.repeat(rng.normal(size=40), 4) + 0.3 * rng.normal(size=160)
        interval = mean_interval(alike, prompts)
        by_prompt += interval.low < 0 < interval.high
    assert 180 <= alone <= 200
    assert 178 <= by_prompt <= 200


def answers_of(means, rng, noise=0.1):
    "Four answers to each prompt."
    return [
        dict(prompt_id=i, true_reward=float(mean + x))
        for i, mean in enumerate(means)
        for x in rng.normal(0, noise, 4)
    ]


def test_intervals_of_the_share_of_the_way_hold_the_truth():
    "Of 200 studies about 95%: prompts differ much more than answers, early and late alike."
    rng = np.random.default_rng(0)
    held = 0
    for study in range(200):
        means = rng.uniform(0, 0.8, 60)  # 0.4 on average
        early, late = answers_of(means, rng), answers_of(means + 0.15, rng)
        way = share_of_way(late, early, best=1.0, draws=200, seed=study)
        held += way.low <= 0.15 / 0.6 <= way.high
    assert 178 <= held <= 199


def test_the_share_of_the_way_is_paired_by_prompt():
    rng = np.random.default_rng(1)
    means = rng.uniform(0, 0.8, 60)
    early, late = answers_of(means, rng), answers_of(means + 0.15, rng)
    way = share_of_way(late, early, best=1.0)
    rise = mean_interval([r["true_reward"] for r in late], [r["prompt_id"] for r in late])
    assert way.high - way.low < (rise.high - rise.low) / 0.6 / 2
    # whatever the reward's scale, and whatever stands where there is no number
    scaled = [
        [r | dict(true_reward=5 + 2 * r["true_reward"]) for r in x] for x in (late, early)
    ]
    assert share_of_way(*scaled, best=7.0) == pytest.approx(way)
    lost = [dict(prompt_id=0, true_reward=None)]
    assert share_of_way(late + lost, early + lost, best=1.0) == pytest.approx(way)
    with_score = [
        [dict(prompt_id=r["prompt_id"], score=r["true_reward"]) for r in x]
        for x in (late, early)
    ]
    assert share_of_way(*with_score, best=1.0, key="score") == way


RISES = np.array([0.05, 0.15, 0.25])  # of three seeds


def study_of_seeds(rng):
    "Three runs from one policy; on some prompts all of them gain more than on others."
    means = rng.uniform(0, 0.8, 60)
    easier = rng.normal(0, 0.12, 60)
    return [(answers_of(means + r + easier, rng), answers_of(means, rng)) for r in RISES]


def test_intervals_of_the_mean_gain_over_seeds_hold_the_truth():
    "Of 200 studies about 95%; as if each seed had had prompts of its own, far fewer."
    rng = np.random.default_rng(2)
    held = alone = 0
    for _ in range(200):
        runs = study_of_seeds(rng)
        gain = mean_gain(runs)
        held += gain.low <= RISES.mean() <= gain.high
        own = []
        for i, run in enumerate(runs):
            own.append([[r | dict(prompt_id=(i, r["prompt_id"])) for r in x] for x in run])
        gain = mean_gain(own)
        alone += gain.low <= RISES.mean() <= gain.high
    assert 178 <= held <= 199
    assert alone <= 160


def test_the_mean_gain_is_that_of_each_run_against_its_own_start():
    runs = study_of_seeds(np.random.default_rng(3))
    gain = mean_gain(runs)
    gains, prompts = [], []
    for late, early in runs:
        for i in range(60):
            ends = [[r["true_reward"] for r in x if r["prompt_id"] == i] for x in (late, early)]
            gains.append(np.mean(ends[0]) - np.mean(ends[1]))
            prompts.append(i)
    of_means = [np.mean(gains[i::60]) for i in range(60)]  # of a prompt, over the runs
    assert gain == pytest.approx(mean_interval(of_means))
    each = [mean_gain([run]) for run in runs]
    assert gain.value == pytest.approx(np.mean([one.value for one in each]))
    assert [one.value for one in each] == pytest.approx(RISES, abs=0.04)
    ways = [share_of_way(*run, best=1.0).value for run in runs]
    assert mean_share_of_way(runs, 1.0).value == pytest.approx(np.mean(ways))
    # a run that has a prompt less counts as much as the others
    late, early = runs[0]
    short = [(late[:-4], early), *runs[1:]]
    first = mean_gain(short[:1]).value
    assert mean_gain(short).value == pytest.approx((first + each[1].value + each[2].value) / 3)


@pytest.mark.parametrize("side", [0, 1])
def test_a_prompt_unscored_on_one_side_is_compared_on_neither(side):
    "Else an easy prompt without a score would look like a fall."
    rng = np.random.default_rng(0)
    means = rng.uniform(0, 0.8, 60)
    ends = [answers_of(means + 0.15, rng), answers_of(means, rng)]
    kept = tuple([r for r in x if r["prompt_id"] >= 20] for x in ends)
    ends[side] = [r | dict(true_reward=None) if r["prompt_id"] < 20 else r for r in ends[side]]
    assert mean_gain([tuple(ends)]) == pytest.approx(mean_gain([kept]))
    assert share_of_way(*ends, best=1.0) == pytest.approx(share_of_way(*kept, best=1.0))


def test_bootstrap_is_seeded():
    prompts = [i // 3 for i in range(60)]

    def mean(w):
        return float(w @ np.arange(60.0) / w.sum())

    first = bootstrap(mean, prompts, seed=1)
    assert first == bootstrap(mean, prompts, seed=1) != bootstrap(mean, prompts, seed=2)
    assert mean_interval([0.0, 1.0] * 50) == mean_interval([0.0, 1.0] * 50)


def test_there_is_one_bootstrap():
    "A mean and a slope of few items: the same draws, whichever way they are added up."
    rng = np.random.default_rng(3)
    prompts = [f"p{i // 3}" for i in range(60)]
    x, y = rng.normal(size=(2, 60))

    def weighted_mean(values):
        return bootstrap(lambda w: w @ values / w.sum(), prompts)

    ones = np.ones(60)
    by_sums = bootstrap_sums(lambda total, n: total / n, [x, ones], prompts)
    assert by_sums == pytest.approx(weighted_mean(x))

    def weighted_slope(w):
        return np.polyfit(x, y, 1, w=np.sqrt(w))[0]

    by_sums = slope(x, y, prompts, within=False)
    assert by_sums == pytest.approx(bootstrap(weighted_slope, prompts), abs=1e-9)


def test_many_prompts_are_drawn_in_groups():
    """The interval of 20,000 values: that of a normal mean; also where half of them are a
    prompt.
    """
    x = np.random.default_rng(0).normal(size=20_000)
    width = 2 * 1.96 / math.sqrt(20_000)
    found = mean_interval(x)
    assert found.value == pytest.approx(x.mean())
    assert found.high - found.low == pytest.approx(width, rel=0.15)
    in_pairs = mean_interval(np.repeat(x, 2), np.repeat(np.arange(20_000), 2))
    assert in_pairs.high - in_pairs.low == pytest.approx(width, rel=0.15)


def test_one_prompt_has_no_interval():
    for found in (
        mean_interval([1.0, 2.0], ["p", "p"]),
        bootstrap(lambda w: w.sum(), ["p", "p"]),
        bootstrap_sums(lambda total: total, [np.ones(2)], ["p", "p"]),
    ):
        assert math.isfinite(found.value)
        assert math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize(
    "found, value",
    [
        (lambda: mean_interval([2.0] * 60), 2.0),  # no bounds, no spread
        (lambda: mean_interval([0.1 + 0.2, 0.3, 0.3]), None),  # but for rounding
        (lambda: mean_over_seeds([0.5, 0.5, 0.5]), 0.5),
        (lambda: mean_over_seeds([0.1 + 0.2, 0.3]), None),
        (lambda: calibrate([0.0] * 20).too_sure, 0.0),  # no claim, so no bounds
        (lambda: bootstrap(lambda w: 1.0, range(60)), 1.0),
        (lambda: bootstrap(lambda w: float(w @ np.arange(4.0)), range(4)), 6.0),  # few
        (lambda: length_controlled([1, 0, 1, 0], [3, 1, -2, 2], "abcd"), None),
        (lambda: win_rate([dict(prompt_id="a", reward=2)], [dict(prompt_id="b", reward=1)]), 1),
    ],
)
def test_what_the_data_do_not_tell_has_no_interval(found, value):
    found = found()
    assert value is None or found.value == value
    assert math.isnan(found.low) and math.isnan(found.high)
    assert f"{found:.1f}".endswith(" (no interval)")


@pytest.mark.parametrize("n", [1, 2, 3, 60])
def test_what_is_all_alike_between_bounds_is_no_point(n):
    "Ties, pairs on which nobody differs, and shares that are all right."
    for found in (
        rate_interval([0.5] * n),
        length_controlled([0.5] * n, [0] * n, range(n)),
        hits_difference([1.0] * n, [1.0] * n, range(n)),
        share_of_parts([1.0] * n, range(n), ["p"] * n, dict(p=1.0)) if n > 1 else None,
        rate_interval([1.0] * n),
    ):
        if found is not None:
            assert found.high - found.low > 1.5 / (n + 2)


def test_a_point_of_best_of_n_is_of_the_same_prompts():
    "Ten prompts with four answers and ten with one, which scores high."
    rows = []
    for i in range(20):
        rewards = range(4) if i < 10 else [50]
        rows += [dict(prompt_id=i, reward=float(x)) for x in rewards]
    curve = [best_of_n(rows, n, fewest=4).value for n in (1, 2, 4)]
    assert curve == pytest.approx([1.5, 7 / 3, 3.0])


def test_an_interval_at_equal_length_holds_its_value():
    "Of few prompts, where length nearly tells who wins."
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(5, 14))
        won = (rng.random(n) < 0.9).astype(float)
        won[rng.random(n) < 0.2] = 0.5
        found = length_controlled(won, rng.normal(0, 50, n).round(), range(n))
        assert math.isnan(found.low) or found.low <= found.value <= found.high


def test_what_is_no_number_is_told():
    with pytest.raises(ValueError, match="1 of 3 values are no numbers"):
        share_over_prompts([1.0, float("nan"), 0.0], "abc")
    with pytest.raises(ValueError, match="1 of 2 comparisons are no numbers"):
        length_controlled([1.0, 0.0], [3.0, float("nan")], "ab")
    assert math.isnan(spearman([1, 2, float("nan")], [1, 2, 3]))


def test_a_heavy_prompt_widens_the_interval():
    "Half of the rows are one prompt's: as many effective prompts as four."
    number = [0] * 200 + [1 + i // 3 for i in range(177)]
    assert effective_prompts(number) == pytest.approx(3.5, abs=0.1)
    rng = np.random.default_rng(0)
    hits = (rng.random(377) < 0.5).tolist()
    heavy, even = (
        share_over_prompts(hits, number),
        share_over_prompts(hits, np.arange(377) // 6),
    )
    assert heavy.high - heavy.low > 1.3 * (even.high - even.low)


# ---- two labellers of pairs

pairs = st.tuples(st.integers(0, 4), st.just(0), st.integers(1, 3))
margins = st.tuples(st.floats(-3, 3), st.floats(-3, 3))


@given(st.dictionaries(pairs, margins, min_size=1, max_size=15))
@settings(deadline=None, max_examples=60)
def test_agreement_of_pairs(said):
    """By hand; and without ties kappa is 2 rate - 1, because chance is a fair coin whatever
    sample is called first."""
    table = {name: {k: v[i] for k, v in said.items()} for i, name in enumerate("ab")}
    chosen = [(sign(x), sign(y)) for x, y in said.values()]
    found = agree("a", "b", table, draws=20)
    assert found.items == len(said)
    assert found.rate.value == pytest.approx(sum(x == y for x, y in chosen) / len(chosen))
    met = Counter(chosen)
    values = (-1, 0, 1)
    assert found.confusion == [[met[x, y] for y in values] for x in values]
    if all(x and y for x, y in chosen):
        assert found.kappa.value == pytest.approx(2 * found.rate.value - 1)
    # both orders at half a weight: n/2 ratings, so Krippendorff's n - 1 is n/2 - 1
    n = 4 * len(chosen)
    whole = alpha_by_definition(chosen + [(-x, -y) for x, y in chosen], "ordinal")
    expected = 1 - (1 - whole) * (n - 2) / (n - 1)
    assert found.alpha.value == pytest.approx(expected, abs=1e-9, nan_ok=True)


@given(st.dictionaries(pairs, margins, min_size=1, max_size=15))
@settings(deadline=None, max_examples=60)
def test_agreement_is_mutual(said):
    table = {name: {k: v[i] for k, v in said.items()} for i, name in enumerate("ab")}
    there = agree("a", "b", table, draws=20)
    back = agree("b", "a", table, draws=20)
    for coefficient in ("rate", "kappa", "alpha", "rho"):
        one, other = getattr(there, coefficient), getattr(back, coefficient)
        assert one.value == pytest.approx(other.value, nan_ok=True)


# ---- calibration


def test_calibration_by_hand():
    "Margins log 3 and log 9 claim 3/4 and 9/10; the first comes true, the second does not."
    found = calibrate([math.log(3), -math.log(9), None])
    assert (found.pairs, found.left_out) == (2, 1)
    assert found.brier.value == pytest.approx((0.25**2 + 0.9**2) / 2)
    assert found.log_loss.value == pytest.approx(-(math.log(0.75) + math.log(0.1)) / 2)
    assert found.error == pytest.approx(abs((0.75 + 0.9) / 2 - 0.5))


def test_one_rule_for_ties():
    "A margin of 0 counts as half right whichever answer was preferred; no margin, no claim."
    tie = dict(prompt_id=1, reward_A=2.0, reward_B=2.0)
    unscored = dict(prompt_id=2, reward_A=None, reward_B=1.0, label=1)
    right = dict(prompt_id=3, reward_A=2.0, reward_B=1.0, label=1)
    first = calibrate([tie | dict(label=1), unscored, right])
    second = calibrate([tie | dict(label=0), unscored, right])
    assert first == second
    assert (first.pairs, first.left_out) == (2, 1)
    assert first.bins[0].right == share_over_prompts([0.5, 1.0], "ab")
    claims = [0.5, 1 / (1 + math.exp(-1))]
    assert first.bins[0].claimed == pytest.approx(sum(claims) / 2)
    # a claim of a half is wrong by a half, whatever happens
    assert first.brier.value == pytest.approx((0.25 + (1 - claims[1]) ** 2) / 2)
    assert first.log_loss.value == pytest.approx((math.log(2) - math.log(claims[1])) / 2)


def test_calibration_finds_the_scale():
    """Choices drawn from sigmoid(margin): slope 1, and 1/3 when the model shouts three times as
    loud; nearly all intervals of the bins hold their claims."""
    rng = np.random.default_rng(3)
    true = rng.normal(0, 2, 4000)
    margins = np.where(rng.random(4000) < 1 / (1 + np.exp(-true)), true, -true)
    honest = calibrate(margins, draws=50)
    loud = calibrate(3 * margins, draws=50)
    assert honest.slope == pytest.approx(1, abs=0.1)
    assert loud.slope == pytest.approx(honest.slope / 3)
    assert honest.error < 0.03 < loud.error
    assert honest.log_loss.value < loud.log_loss.value
    assert sum(b.right.low <= b.claimed <= b.right.high for b in honest.bins) >= 8
    assert sum(b.pairs for b in honest.bins) == 4000


def test_slope_is_the_most_likely_one():
    margins = np.random.default_rng(0).normal(0.7, 1.5, 300)
    best = calibrate(margins).slope

    def surprise(k):
        return np.logaddexp(0, -k * margins).sum()

    assert surprise(best) < min(surprise(best * 0.99), surprise(best * 1.01))
    assert calibrate([3.0, 1.0]).slope == math.inf
    assert calibrate([-3.0, -1.0]).slope == -math.inf


def test_pairs_of_a_prompt_are_alike_in_calibration_too():
    "Records with a prompt_id: 40 prompts with five copies of a pair are 40 pairs, not 200."
    rng = np.random.default_rng(0)
    rewards = rng.normal(0.5, 1, 40)
    pair = dict(reward_B=0.0, label=1)
    rows = [pair | dict(prompt_id=i // 5, reward_A=rewards[i // 5]) for i in range(200)]
    by_prompt, alone = calibrate(rows).brier, calibrate(rows, prompts=range(200)).brier
    assert by_prompt.value == pytest.approx(alone.value)
    width = (by_prompt.high - by_prompt.low) / (alone.high - alone.low)
    assert width == pytest.approx(math.sqrt(5), rel=0.1)


# ---- a model, a judge and a person on the same real pairs

SHARED = os.environ.get("HALOS_NB_SHARED") or Path(__file__).resolve().parents[2] / "shared"
DATA = Path(SHARED) / "data/pairs_test.json"
MISSING = (
    f"no real pairs: {DATA.parent.name}/ is not beside the repository (HALOS_NB_SHARED may "
    "name the folder that holds it)"
)


def small_reward_model(folder):
    "A small random model, saved."
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from halos_nb.templates import byte_tokenizer

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        num_labels=2,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def labels_of_model(folder, samples):
    "What the label command writes about the samples."
    from halos_nb.configs import LabelConfig
    from halos_nb.label import main
    from halos_nb.records import read_jsonl, write_records

    small_reward_model(folder / "rm")
    blind = [{k: v for k, v in sample.items() if k != "reward"} for sample in samples]
    write_records(folder / "samples.json", blind)
    config = LabelConfig(
        samples_file=str(folder / "samples.json"),
        output_file=str(folder / "feedback.json"),
        reward_model_path=str(folder / "rm"),
        max_length=256,
        feedback_type="scalar",
    )
    main(config)
    return read_jsonl(folder / "feedback.labels.jsonl")


def longer(left, right):
    "The person's rule: 1 if the left is longer, -1 the right, 0 if they are nearly as long."
    near = abs(left - right) < 0.1 * max(left, right)
    return 0 if near else sign(left - right)


def labels_of_person(session):
    "Press a key for each pair; now and then a skip."
    keys = {1: "left", 0: "tie", -1: "right"}
    while item := session.current:
        view = session.show(item)
        skip = int(item.name) % 20 == 0 and not item.again
        choice = keys[longer(len(view["left"]), len(view["right"]))]
        session.choose("skip" if skip else choice)


@pytest.mark.skipif(not DATA.is_file(), reason=MISSING)
def test_three_kinds_of_labellers_on_real_pairs(tmp_path):
    """The judge's preference is the file's; the model is a small random one, whose scores the
    label command writes; the person is a rule whose keys go through a session. Counts and rates
    are counted again here from the texts."""
    from halos_nb.people import Session, comparisons, samples_of_pairs
    from halos_nb.records import read_records

    found = samples_of_pairs(read_records(DATA)[:60])
    model = labels_of_model(tmp_path, found.samples)
    journal = tmp_path / "person.jsonl"
    person = Session(journal, found.samples, found.pairs, "human:rule", seed=1)
    labels_of_person(person)
    told = comparisons(person)
    table = pair_table(told, model, found.pairs) | {"api:judge": found.margins}
    agreements = compare_labellers(table, draws=200)

    keys = [(s["prompt_id"], s["sample_id"]) for s in found.samples]
    length = dict(zip(keys, [len(s["output"]) for s in found.samples]))
    score = dict(zip(keys, [r["score"] for r in model]))
    answered = [r for r in told if r["winner"] is not None]
    seen = {(r["prompt_id"], frozenset((r["sample_id_A"], r["sample_id_B"]))) for r in answered}
    rm = model[0]["labeller"]
    said = {"human:rule": {}, rm: {}, "api:judge": {}}  # labeller -> pair -> choice
    for pair, margin in found.margins.items():
        p, a, b = pair
        said["api:judge"][pair] = sign(margin)
        said[rm][pair] = sign(score[p, a] - score[p, b])
        if (p, frozenset((a, b))) in seen:
            said["human:rule"][pair] = longer(length[p, a], length[p, b])
    assert 40 < len(said["human:rule"]) == len(seen) < 60 == len(found.pairs)

    assert {(a.first, a.second) for a in agreements} == set(combinations(said, 2))
    for a in agreements:
        first, second = said[a.first], said[a.second]
        both = [(first[pair], second[pair]) for pair in first if pair in second]
        assert a.items == len(both)
        assert a.rate.value == pytest.approx(sum(x == y for x, y in both) / len(both))
        assert a.rate.low <= a.rate.value <= a.rate.high
        assert -1 <= a.kappa.value <= a.rate.value
        assert abs(a.rho.value) <= 1


def test_agreement_needs_no_comparison():
    """Scores of two labellers: all pairs of each prompt. They disagree on the first prompt
    alone.
    """
    rows = []
    for labeller in "ab":
        for prompt in range(3):
            turned = labeller == "b" and prompt == 0
            for i in range(3):
                row = dict(prompt_id=prompt, sample_id=i, labeller=labeller, reason="")
                rows.append(row | dict(score=float(-i if turned else i), type="label"))
    (found,) = compare_labellers(pair_table(labels=rows), draws=50)
    assert found.items == 9
    assert found.rate.value == pytest.approx(6 / 9)

"""Statistics beside implementations that others wrote: statsmodels, scikit-learn, krippendorff
and scipy, to 1e-6, on data with ties, gaps and prompts that have several rows."""

import math
from itertools import combinations

import krippendorff as peers
import numpy as np
import pytest
import statsmodels.api as sm

from halos_nb.stats import (
    best_of_n,
    bounded_mean,
    bootstrap_sums,
    calibrate,
    cohen_kappa,
    drawn_weights,
    krippendorff,
    length_controlled,
    mean_difference,
    mean_interval,
    mean_over_seeds,
    order_accuracy,
    reach,
    share_interval,
    share_over_prompts,
    slope,
    spearman,
    win_rate,
    without_length,
)

SAME = dict(abs=1e-6)
RNG = np.random.default_rng(7)
# 60 prompts, one to four rows each, 150 rows
NUMBER = np.repeat(np.arange(60), RNG.permutation(np.tile([1, 2, 3, 4], 15)))
LEVEL = RNG.normal(size=60)[NUMBER]  # what the rows of a prompt have in common
NOISE = RNG.normal(size=(3, len(NUMBER)))


def clustered(y, x=None):
    "Ordinary least squares with errors that are clustered by prompt."
    x = np.ones(len(y)) if x is None else x
    return sm.OLS(y, x).fit(cov_type="cluster", cov_kwds=dict(groups=NUMBER))


# ---- shares


@pytest.mark.parametrize("k, n", [(0, 60), (37, 60), (52.5, 60), (128, 128)])
def test_a_share(k, n):
    from statsmodels.stats.proportion import proportion_confint

    theirs = proportion_confint(k, n, method="beta")
    assert share_interval(k, n) == pytest.approx((k / n, *theirs), **SAME)


def bell_mccaffrey(y):
    "Mean and CR2 error by its matrices: each prompt's residuals by (I - H)^(-1/2)."
    from scipy.linalg import fractional_matrix_power

    meat = 0.0
    for prompt in range(60):
        rest = y[NUMBER == prompt] - y.mean()
        hat = np.full((len(rest), len(rest)), 1 / len(y))
        meat += (fractional_matrix_power(np.eye(len(rest)) - hat, -0.5) @ rest).sum() ** 2
    return y.mean(), math.sqrt(meat) / len(y)


def kish(rows):
    return rows.sum() ** 2 / (rows**2).sum()


def test_a_share_over_prompts():
    "Korn and Graubard: Clopper and Pearson's interval of as many trials as the errors allow."
    from scipy.stats import t
    from statsmodels.stats.proportion import proportion_confint

    hits = (LEVEL + NOISE[0] > -0.5).astype(float)
    share, error = bell_mccaffrey(hits)
    prompts = kish(np.bincount(NUMBER))
    fewer = t.ppf(0.975, len(hits) - 1) / t.ppf(0.975, prompts - 1)
    trials = share * (1 - share) / error**2 * fewer**2
    assert trials < len(hits)  # rows of a prompt are alike
    low, high = proportion_confint(share * trials, trials, method="beta")
    found = share_over_prompts(hits.tolist(), NUMBER.tolist())
    assert found == pytest.approx((share, low, high), **SAME)


# ---- means and differences


def test_a_draw_of_prompts_is_a_weighted_mean():
    "Each replicate of the bootstrap is the weighted fit of that draw."
    y = LEVEL + NOISE[0]
    seen = []

    def mean(total, n):
        seen.append(total / n)
        return total / n

    bootstrap_sums(mean, [y, np.ones(len(y))], NUMBER, seed=3, draws=5)
    replicates = next(one for one in seen if np.ndim(one))
    weights = drawn_weights(60, 5, np.random.default_rng(3))
    theirs = [sm.WLS(y, np.ones(len(y)), weights=w[NUMBER]).fit().params[0] for w in weights]
    assert replicates == pytest.approx(theirs, **SAME)


@pytest.mark.parametrize("paired", [False, True])
def test_an_interval_of_means_by_its_matrices(paired):
    "Prompts of one to four rows: Bell and McCaffrey's error, t of Kish's effective prompts."
    from scipy.stats import t

    y = LEVEL + NOISE[0]
    other = LEVEL + NOISE[1] if paired else np.zeros(len(y))
    mean, error = bell_mccaffrey(y - other)
    off = t.ppf(0.975, kish(np.bincount(NUMBER)) - 1) * error
    found = mean_difference(y, other, NUMBER)
    assert found == pytest.approx((mean, mean - off, mean + off), **SAME)


def test_an_interval_of_means_of_equal_prompts():
    "There both corrections are the usual one: statsmodels' clustered errors, t of 60 - 1."
    y = (LEVEL[:, None] + NOISE[:, : len(NUMBER)].T).ravel()
    owners = np.arange(len(y)) // 9  # 50 prompts of nine rows
    fit = sm.OLS(y, np.ones(len(y))).fit(
        cov_type="cluster", cov_kwds=dict(groups=owners), use_t=True
    )
    theirs = (fit.params[0], *fit.conf_int()[0])
    assert mean_interval(y, owners) == pytest.approx(theirs, **SAME)


def test_a_mean_between_bounds():
    "The t interval of 60 differences and one at either bound; of three kinds by hand."
    from scipy.stats import ttest_1samp

    values = np.array([1.0] * 4 + [-1.0] + [0.0] * 55)
    theirs = ttest_1samp([*values, -1, 1], 0).confidence_interval()
    found = bounded_mean(values, range(60), -1, 1)
    assert found == pytest.approx((0.05, theirs.low, theirs.high), **SAME)
    # Bonett and Price's own form, but for t instead of z and n - 1 instead of n
    more, less = 5 / 62, 2 / 62
    error = math.sqrt((more + less - (more - less) ** 2) / 61)
    off = (theirs.high - theirs.low) / 2
    assert error * reach(62) == pytest.approx(off, **SAME)


def test_a_mean_over_seeds():
    from scipy.stats import t

    values = [0.61, 0.58, 0.7]
    error = np.std(values, ddof=1) / math.sqrt(3)
    theirs = t.interval(0.95, 2, loc=np.mean(values), scale=error)
    assert mean_over_seeds(values) == pytest.approx((np.mean(values), *theirs), **SAME)


def test_slopes():
    x, y = NOISE[0], 0.4 * NOISE[0] + LEVEL + NOISE[1]
    plain = clustered(y, sm.add_constant(x)).params[1]
    assert slope(x, y, NUMBER, within=False, draws=2).value == pytest.approx(plain, **SAME)
    of_prompts = np.eye(60)[NUMBER]  # a constant for each
    within = sm.OLS(y, np.column_stack([x, of_prompts])).fit().params[0]
    assert slope(x, y, NUMBER, within=True, draws=2).value == pytest.approx(within, **SAME)
    left = without_length(y, x, NUMBER.tolist(), draws=2)
    through_zero = sm.OLS(y, x).fit()
    assert left.slope.value == pytest.approx(through_zero.params[0], **SAME)
    assert left.share.value == pytest.approx(np.mean(through_zero.resid > 0), **SAME)


# ---- win rates


def test_a_win_rate_at_equal_length():
    "A binomial GLM with errors clustered by prompt; ties count half."
    from scipy.special import expit
    from scipy.stats import t

    longer = np.round(30 * NOISE[0])
    won = (0.4 + 0.03 * longer + LEVEL + NOISE[1] > 0).astype(float)
    won[::9] = 0.5
    x = sm.add_constant(np.tanh(longer / longer.std(ddof=1)))
    alike = 1 / np.bincount(NUMBER)[NUMBER]  # prompts weigh alike
    family = sm.families.Binomial()
    value = sm.GLM(won, x, family=family, var_weights=alike).fit(tol=1e-12).params[0]
    # for the interval a prompt won and one lost, of equal length
    more = sm.GLM(
        [*won, 0, 1],
        [*x, [1, 0], [1, 0]],
        family=family,
        var_weights=[*alike, 1, 1],
    )
    groups = np.array([*NUMBER, 60, 61])
    fit = more.fit(cov_type="cluster", cov_kwds=dict(groups=groups), tol=1e-12)
    off = t.ppf(0.975, 61) * fit.bse[0]
    theirs = expit([value, fit.params[0] - off, fit.params[0] + off])
    found = length_controlled(won.tolist(), longer.tolist(), NUMBER.tolist())
    assert found == pytest.approx(tuple(theirs), **SAME)


def test_a_win_rate_is_mann_and_whitneys_u():
    from scipy.stats import mannwhitneyu

    a, b = np.round(NOISE[0], 1), np.round(NOISE[1] + 0.3, 1)
    ours = [dict(prompt_id=f"a{i}", reward=x) for i, x in enumerate(a)]
    theirs = [dict(prompt_id=f"b{i}", reward=x) for i, x in enumerate(b)]
    u = mannwhitneyu(a, b).statistic
    assert win_rate(ours, theirs, draws=2).value == pytest.approx(u / a.size / b.size, **SAME)


def test_best_of_n_is_the_mean_over_all_draws():
    "Every choice of 3 of the answers, one by one."
    rows, means = [], []
    for prompt in range(4):
        scores = np.round(RNG.normal(size=6), 1)
        values = RNG.normal(size=6)
        for score, value in zip(scores, values):
            rows.append(dict(prompt_id=prompt, reward=score, true=value))
        best = []
        for drawn in combinations(range(6), 3):
            highest = [i for i in drawn if scores[i] == scores[list(drawn)].max()]
            best.append(values[highest].mean())
        means.append(np.mean(best))
    assert best_of_n(rows, 3, "true").value == pytest.approx(np.mean(means), **SAME)


# ---- agreement


def test_kappa():
    from sklearn.metrics import cohen_kappa_score

    x = np.digitize(LEVEL + NOISE[0], [-1, 0, 1])
    y = np.digitize(LEVEL + NOISE[1], [-1, 0, 1])
    assert cohen_kappa(x, y) == pytest.approx(cohen_kappa_score(x, y), **SAME)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha(level):
    "Three labellers, a fifth of their ratings missing."
    said = np.round(LEVEL + 0.7 * NOISE)
    said[RNG.random(said.shape) < 0.2] = np.nan
    theirs = peers.alpha(reliability_data=said, level_of_measurement=level)
    assert krippendorff(said.tolist(), level) == pytest.approx(theirs, **SAME)


def test_rank_correlations():
    from scipy.stats import somersd, spearmanr

    x, y = np.round(LEVEL + NOISE[0], 1), np.round(LEVEL + NOISE[1], 1)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, **SAME)
    rows = [dict(prompt_id=0, reward=b, true_reward=a) for a, b in zip(x, y)]
    share = (1 + somersd(x, y).statistic) / 2  # of the pairs that x tells apart, ties half
    assert order_accuracy(rows).share.value == pytest.approx(share, **SAME)


# ---- calibration


def test_calibration():
    "Brier score, log loss, expected calibration error in equal bins, and the slope."
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss, log_loss

    margins = LEVEL + NOISE[0] + 0.5
    found = calibrate(margins, NUMBER.tolist(), draws=2)
    right, claims = (margins > 0).astype(int), 1 / (1 + np.exp(-np.abs(margins)))
    assert found.brier.value == pytest.approx(brier_score_loss(right, claims), **SAME)
    assert found.log_loss.value == pytest.approx(log_loss(right, claims), **SAME)
    true, claimed = calibration_curve(right, claims, n_bins=10, strategy="quantile")
    assert found.error == pytest.approx(np.abs(true - claimed).mean(), **SAME)
    logit = sm.GLM(right, np.abs(margins), family=sm.families.Binomial()).fit(tol=1e-12)
    assert found.slope == pytest.approx(logit.params[0], **SAME)

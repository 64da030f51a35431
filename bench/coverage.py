"""Do the intervals hold the truth? `python bench/coverage.py --studies 1000`

Each study draws prompts with rows that are alike, asks for an interval as the tables and
figures do, and looks whether the truth is in it. Of 95% intervals about 95 in 100 hold it. The
last column is the noise of the share itself. The hard studies sit where intervals go wrong:
shares near 1, ties, pairs that hardly differ, one prompt with half of the rows. There the exact
and the bounded intervals hold the truth more often than they promise, never much less.
"""

import argparse
import math
from collections.abc import Callable, Iterator

import numpy as np

from halos_nb.stats import (
    Interval,
    calibrate,
    hits_difference,
    length_controlled,
    mean_gain,
    mean_interval,
    rate_interval,
    share_interval,
    share_of_parts,
    share_over_prompts,
    slope,
)

# a study: how many prompts, draws of the bootstrap, dice -> the interval and the truth
Study = Callable[[int, int, np.random.Generator], tuple[Interval, float]]


def rows_of(prompts: int, rng: np.random.Generator) -> np.ndarray:
    "The prompt of each row: one to six rows each."
    return np.repeat(np.arange(prompts), rng.integers(1, 7, prompts))


def share(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "One yes or no a prompt; the share of yes lies anywhere from 0.5 to 0.9."
    truth = rng.uniform(0.5, 0.9)
    return share_interval(rng.binomial(prompts, truth), prompts), truth


def clustered_share(
    prompts: int, draws: int, rng: np.random.Generator
) -> tuple[Interval, float]:
    "Several a prompt, whose own shares differ."
    truth = rng.uniform(0.5, 0.9)
    level = rng.beta(3 * truth, 3 * (1 - truth), prompts)
    number = rows_of(prompts, rng)
    hits = rng.random(len(number)) < level[number]
    return share_over_prompts(hits.tolist(), number.tolist()), truth


def clustered_mean(
    prompts: int, draws: int, rng: np.random.Generator
) -> tuple[Interval, float]:
    "Rewards with a tail to one side, as sums of good parts have."
    number = rows_of(prompts, rng)
    level = rng.gamma(4, 0.25, prompts)  # 1 on average
    found = mean_interval(level[number] + rng.normal(0, 0.5, len(number)), number)
    return found, 1.0


def paired(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "Two labellers on the same rows: one is right 0.1 more often."
    number = rows_of(prompts, rng)
    level = rng.uniform(0.4, 0.8, prompts)[number]
    dice = rng.random((2, len(number)))
    found = hits_difference(dice[0] < level + 0.1, dice[1] < level, number)
    return found, 0.1


def paired_gain(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "Three runs, each against its own start, on the same prompts."
    means = rng.uniform(0, 0.8, prompts)
    runs = []
    for of_run in rng.normal(0.15, 0.1, (3, prompts)):
        ends = []
        for mean in (means + of_run, means):
            noise = rng.normal(0, 0.2, (4, prompts))
            rewards = (mean + noise).ravel().tolist()
            owners = [*range(prompts)] * 4
            ends.append([dict(prompt_id=p, r=x) for p, x in zip(owners, rewards)])
        runs.append((ends[0], ends[1]))
    return mean_gain(runs, "r"), 0.15


def win_rates(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "Prompts' win rates of four comparisons each."
    truth = rng.uniform(0.5, 0.85)
    level = rng.beta(3 * truth, 3 * (1 - truth), prompts)
    return rate_interval(rng.binomial(4, level) / 4), truth


def even_of(truth: float) -> Study:
    "A win rate at equal length that is high."

    def study(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
        return at_equal_length(prompts, draws, rng, truth)

    return study


def at_equal_length(
    prompts: int, draws: int, rng: np.random.Generator, truth: float = 0.0
) -> tuple[Interval, float]:
    "The model's own win rate where both are as long; the longer wins more often."
    truth = truth or rng.uniform(0.5, 0.75)
    number = rows_of(prompts, rng)
    longer = np.round(rng.normal(20, 40, len(number)) + rng.normal(0, 20, prompts)[number])
    odds = math.log(truth / (1 - truth)) + np.tanh(longer / longer.std(ddof=1))
    won = rng.random(len(number)) < 1 / (1 + np.exp(-odds))
    return length_controlled(won.astype(float), longer, number.tolist()), truth


def slopes(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "A score's slope on length, inside prompts."
    number = rows_of(prompts, rng)
    x = rng.normal(size=len(number))
    level = rng.normal(size=prompts)[number]
    y = 0.3 * x + level + rng.normal(size=len(number)) * (1 + 0.3 * np.abs(x))
    return slope(x, y, number, within=True, draws=draws), 0.3


def rate_of(truth: float, comparisons: int) -> Study:
    "Win rates near 1, of so many comparisons a prompt."

    def study(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
        level = np.full(prompts, truth)
        if comparisons > 1:
            level = rng.beta(3 * truth, 3 * (1 - truth), prompts)
        return rate_interval(rng.binomial(comparisons, level) / comparisons), truth

    return study


def with_ties(ties: float) -> Study:
    "One comparison a prompt; of those that are no ties 60% are won."

    def study(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
        won = np.where(rng.random(prompts) < 0.6, 1.0, 0.0)
        won = np.where(rng.random(prompts) < ties, 0.5, won)
        return rate_interval(won), 0.5 * ties + 0.6 * (1 - ties)

    return study


def few_differ(more: float, less: float) -> Study:
    "Two models of the same pairs, who differ in few."

    def study(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
        dice = rng.random(prompts)
        first, second = dice < more, (dice > more) & (dice < more + less)
        return hits_difference(first, second, range(prompts)), more - less

    return study


def copies_differ(share: float) -> Study:
    "The same, but four pairs a prompt that go alike."

    def study(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
        first = np.repeat(rng.random(prompts) < share, 4)
        found = hits_difference(first, np.zeros(len(first)), np.arange(len(first)) // 4)
        return found, share

    return study


def heavy_prompt(prompts: int, rng: np.random.Generator) -> np.ndarray:
    "The prompt of each row: 200 rows of the first, one to six of the others."
    return np.repeat(np.arange(prompts), [200, *rng.integers(1, 7, prompts - 1)])


def heavy_share(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "One prompt has a third to a half of the rows."
    number = heavy_prompt(prompts, rng)
    hits = rng.random(len(number)) < rng.beta(2, 2, prompts)[number]
    return share_over_prompts(hits.tolist(), number.tolist()), 0.5


def heavy_mean(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "The same of rewards."
    number = heavy_prompt(prompts, rng)
    values = rng.normal(size=prompts)[number] + rng.normal(size=len(number))
    return mean_interval(values, number), 0.0


def pareto_share(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "Rows of a prompt as a power law has them."
    number = np.repeat(np.arange(prompts), np.ceil(rng.pareto(1.2, prompts)).astype(int))
    hits = rng.random(len(number)) < rng.beta(2, 2, prompts)[number]
    return share_over_prompts(hits.tolist(), number.tolist()), 0.5


def over_seeds(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "The share of three seeds' models that are right, a pair a prompt."
    right = rng.random((3, prompts)) < rng.uniform(0.6, 1, prompts)
    return share_over_prompts(right.mean(0).tolist(), range(prompts)), 0.8


def sure_claims(prompts: int, rng: np.random.Generator) -> np.ndarray:
    "Margins that claim 99%, and are right as often."
    sure = math.log(99)
    return np.where(rng.random(prompts) < 0.99, sure, -sure)


def log_loss(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "The log loss of a labeller who is sure, and right: rare large values."
    truth = -0.99 * math.log(0.99) - 0.01 * math.log(0.01)
    return calibrate(sure_claims(prompts, rng), draws=2).log_loss, truth


def slope_of_claims(
    prompts: int, draws: int, rng: np.random.Generator
) -> tuple[Interval, float]:
    "What margins should be multiplied by, of a labeller who is twice too sure."
    number = rows_of(prompts, rng)
    true = np.abs(rng.normal(0, 1, prompts))[number]
    went = rng.random(len(number)) < 1 / (1 + np.exp(-true))
    found = calibrate(np.where(went, 2 * true, -2 * true), number.tolist(), draws=2)
    return found.slope_interval, 0.5


def calibrated(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "Whether chance holds the error of true claims, four pairs a prompt that go alike."
    claims = np.abs(rng.normal(0, 1, prompts))
    went = rng.random(prompts) < 1 / (1 + np.exp(-claims))
    margins = np.repeat(np.where(went, claims, -claims), 4)
    found = calibrate(margins, np.repeat(np.arange(prompts), 4).tolist(), draws=draws)
    return found.chance, found.error


def weighted_parts(
    prompts: int, draws: int, rng: np.random.Generator
) -> tuple[Interval, float]:
    "A benchmark's section: a half of its weight is on a quarter of its pairs, 95% right."
    parts = ["small"] * (prompts // 4) + ["large"] * (prompts - prompts // 4)
    right = (rng.random(prompts) < 0.95).astype(float)
    found = share_of_parts(right, range(prompts), parts, dict(small=1, large=1))
    return found, 0.95


STUDIES: dict[str, Study] = {
    "share, a row a prompt": share,
    "share over prompts": clustered_share,
    "mean over prompts": clustered_mean,
    "paired difference": paired,
    "paired gain, three seeds": paired_gain,
    "win rate": win_rates,
    "win rate at equal length": at_equal_length,
    "slope inside prompts": slopes,
    "best slope of claims": slope_of_claims,
    "error of calibration by chance": calibrated,
}

# their intervals may hold the truth more often than they promise
HARD: dict[str, Study] = {
    "win rate 0.95, one comparison": rate_of(0.95, 1),
    "win rate 0.97, one comparison": rate_of(0.97, 1),
    "win rate 0.98, four comparisons": rate_of(0.98, 4),
    "win rate, 30% ties": with_ties(0.3),
    "win rate, 60% ties": with_ties(0.6),
    "win rate, 90% ties": with_ties(0.9),
    "difference, 2% differ": few_differ(0.02, 0.0),
    "difference, 5% differ": few_differ(0.05, 0.0),
    "difference, 5% differ and 1% back": few_differ(0.05, 0.01),
    "difference, 3% of the prompts differ": copies_differ(0.03),
    "share, one prompt of 200 rows": heavy_share,
    "mean, one prompt of 200 rows": heavy_mean,
    "share, rows by a power law": pareto_share,
    "mean over seeds": over_seeds,
    "log loss of sure claims": log_loss,
    "share of weighted parts": weighted_parts,
    "win rate at equal length 0.9": even_of(0.9),
}


def coverage(study: Study, prompts: int, studies: int, draws: int, seed: int = 0) -> float:
    "The share of studies whose interval holds the truth."
    rng = np.random.default_rng(seed)
    held = 0
    for _ in range(studies):
        found, truth = study(prompts, draws, rng)
        held += found.low <= truth <= found.high
    return held / studies


def table(sizes: list[int], studies: int, draws: int, names: list[str]) -> Iterator[str]:
    "Lines of a table in Markdown, one as soon as it is known."
    yield "| interval | " + " | ".join(f"{n} prompts" for n in sizes) + " | noise |"
    yield "|---" * (len(sizes) + 2) + "|"
    noise = math.sqrt(0.95 * 0.05 / studies)
    for name in names:
        shares = [coverage((STUDIES | HARD)[name], n, studies, draws) for n in sizes]
        yield f"| {name} | " + " | ".join(f"{x:.3f}" for x in shares) + f" | {noise:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--prompts", type=int, nargs="+", default=[60, 128])
    names = [*STUDIES, *HARD]
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    a = parser.parse_args()
    for line in table(a.prompts, a.studies, a.draws, a.only):
        print(line, flush=True)


if __name__ == "__main__":
    main()

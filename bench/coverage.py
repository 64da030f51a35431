"""Do the intervals hold the truth? `python bench/coverage.py --studies 1000`

Each study draws prompts with rows that are alike, asks for an interval as the tables and
figures do, and looks whether the truth is in it. Of 95% intervals about 95 in 100 hold it. The
last column is the noise of the share itself.
"""

import argparse
import math
from collections.abc import Callable, Iterator

import numpy as np

from halos_nb.stats import (
    Interval,
    length_controlled,
    mean_difference,
    mean_gain,
    mean_interval,
    rate_interval,
    share_interval,
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
    found = mean_interval(level[number] + rng.normal(0, 0.5, len(number)), number, draws=draws)
    return found, 1.0


def paired(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "Two labellers on the same rows: one is right 0.1 more often."
    number = rows_of(prompts, rng)
    level = rng.uniform(0.4, 0.8, prompts)[number]
    dice = rng.random((2, len(number)))
    found = mean_difference(dice[0] < level + 0.1, dice[1] < level, number, draws=draws)
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
    return mean_gain(runs, "r", draws=draws), 0.15


def win_rates(prompts: int, draws: int, rng: np.random.Generator) -> tuple[Interval, float]:
    "Prompts' win rates of four comparisons each."
    truth = rng.uniform(0.5, 0.85)
    level = rng.beta(3 * truth, 3 * (1 - truth), prompts)
    return rate_interval((rng.binomial(4, level) / 4).tolist(), draws=draws), truth


def at_equal_length(
    prompts: int, draws: int, rng: np.random.Generator
) -> tuple[Interval, float]:
    "The model's own win rate where both are as long; the longer wins more often."
    truth = rng.uniform(0.5, 0.75)
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


STUDIES: dict[str, Study] = {
    "share, a row a prompt": share,
    "share over prompts": clustered_share,
    "mean over prompts": clustered_mean,
    "paired difference": paired,
    "paired gain, three seeds": paired_gain,
    "win rate": win_rates,
    "win rate at equal length": at_equal_length,
    "slope inside prompts": slopes,
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
        shares = [coverage(STUDIES[name], n, studies, draws) for n in sizes]
        yield f"| {name} | " + " | ".join(f"{x:.3f}" for x in shares) + f" | {noise:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--prompts", type=int, nargs="+", default=[60, 128])
    parser.add_argument("--only", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    a = parser.parse_args()
    for line in table(a.prompts, a.studies, a.draws, a.only):
        print(line, flush=True)


if __name__ == "__main__":
    main()

"""What the demo gives, over seeds: `python bench/headline.py --seeds 0 1 2 3 4 --rounds 4`.

Each seed is a playground of its own and a run of its own in it: other data, other held-out
questions, other first weights, other samples. After each round the policy answers held-out
questions; mean and spread (standard deviation) over the seeds are printed as a table. A run
that is there is continued, so a script that was killed goes on where it was.

A run of k rounds ends with the samples of its k-th policy on held-out prompts. So the run is
made longer round by round: the rounds that are there stand, and only the last samples are new.
"""

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

# what is counted of answers that are not trained as they were said, or did not end
TOLD = ("reencoded", "broken_characters", "unfinished", "outputs_cut")


class Point(NamedTuple):
    "A policy's samples on held-out prompts."

    after: str  # start, or how many rounds it was trained for
    truth: float  # mean true reward
    way: float  # share of the way from the first policy to the best answer
    score: float  # mean score of the reward model
    kl: float  # nats per sample, to the first policy


def as_point(after: str, row: dict) -> Point:
    "A row of a run's summary."
    way = row["share_of_way"].value
    return Point(after, row["true_reward"], way, row["reward"], row["kl"])


class Played(NamedTuple):
    "The demo with one seed."

    points: list[Point]
    folder: Path
    accuracy: float  # of its reward model, on pairs of held-out questions


def play(seed: int, rounds: int, runs_dir: Path | None = None, prompts: int = 128) -> Played:
    "Run the demo with a seed; prompts: of each round, and held-out ones."
    from halos_nb.configs import LoopConfig
    from halos_nb.ledger import run_folder
    from halos_nb.loop import run_rounds
    from halos_nb.playground import BEST, into_playground, true_reward
    from halos_nb.records import read_jsonl
    from halos_nb.runs import read_run
    from halos_nb.settings import load_settings

    settings = load_settings()
    if runs_dir:
        settings.runs_dir = str(runs_dir)
    name = f"headline-{seed}"
    points: list[Point] = []
    for k in range(1, rounds + 1):
        given = LoopConfig(
            run_name=name,
            seed=seed,
            world_seed=seed,
            total_prompts=prompts * k,
            prompts_per_round=prompts,
        )
        cfg = into_playground(given, settings)
        list(run_rounds(cfg, settings))
        found = read_run(run_folder(settings, name), true_reward, BEST).rounds
        if not points:
            points.append(as_point("start", found[0]))
        points.append(as_point(f"{k}", found[-1]))
    metrics = read_jsonl(Path(cfg.reward_checkpoint).parent / "metrics.jsonl")
    return Played(points, run_folder(settings, name), metrics[-1]["rewards_eval/accuracies"])


def told_counts(run: Path) -> str:
    "Those of TOLD that a run's stages counted, over all its rounds."
    from halos_nb.loop import round_counts

    total: dict[str, int] = {}
    for folder in sorted(run.iterdir()):
        for stage, counts in round_counts(folder).items():
            for key, value in counts.items():
                if isinstance(value, int) and any(word in key for word in TOLD):
                    label = f"{stage}: {key}"
                    total[label] = total.get(label, 0) + value
    return ", ".join(f"{label} {value}" for label, value in total.items())


def spread(values: list[float]) -> str:
    "Mean and standard deviation, in words."
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def table(runs: list[list[Point]]) -> str:
    "One row for each round, over all seeds."
    lines = [
        "| after round | true reward | share of the way | RM score | KL (nats) |",
        "|---|---|---|---|---|",
    ]
    for points in zip(*runs):
        cells = [points[0].after]
        for key in ("truth", "way", "score", "kl"):
            cells.append(spread([getattr(point, key) for point in points]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--rounds", type=int, default=4)
    p.add_argument("--runs", type=Path, help="the runs' folder (default: settings.ini's)")
    a = p.parse_args()
    runs, accuracies = [], []
    for seed in a.seeds:
        points, folder, accuracy = play(seed, a.rounds, a.runs)
        runs.append(points)
        accuracies.append(accuracy)
        print(
            f"seed {seed}: reward model right on {accuracy:.1%} of pairs of held-out questions"
        )
        print(table([points]))
        print("counted:", told_counts(folder) or "nothing of the kind", flush=True)
    print(f"\n{len(runs)} seeds, held-out questions; mean ± standard deviation over seeds")
    print(table(runs))
    print(f"reward model's accuracy: {spread(accuracies)}")


if __name__ == "__main__":
    main()

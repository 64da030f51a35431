"""A million scored samples to feedback, from file to file: seconds and peak memory of each
form, each in a process of its own.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

FORMS = ("random", "max", "min", "binary", "scalar")


def make(path: Path, n: int, per_prompt: int = 4):
    "Samples of made-up words, 20 in a prompt and 60 in an answer."
    from halos_nb.records import write_records

    rng, words = random.Random(0), [f"word{i}" for i in range(2000)]
    say = lambda k: " ".join(rng.choices(words, k=k))

    def rows():
        for p in range(n // per_prompt):
            prompt = [dict(role="user", content=say(20))]
            for i in range(per_prompt):
                yield dict(
                    prompt_id=f"{p:016x}",
                    sample_id=i,
                    prompt=prompt,
                    output=say(60),
                    generator="m",
                    dataset="d",
                    split="train",
                    type="sample",
                    reward=round(rng.gauss(0, 1), 4),
                )

    write_records(path, rows())


def convert(path: Path, form: str) -> dict:
    "One form, and what it took."
    from halos_nb.feedback import (
        Tally,
        feedback_counts,
        iter_binary_feedback,
        iter_pairwise_feedback,
        iter_scalar_feedback,
    )
    from halos_nb.records import read_rows, write_records

    clock = lambda: (time.perf_counter(), time.process_time())
    start = clock()
    samples, tally = read_rows(path), Tally()
    read = clock()
    records = (
        iter_binary_feedback(samples, "median")
        if form == "binary"
        else iter_scalar_feedback(samples)
        if form == "scalar"
        else iter_pairwise_feedback(samples, 0, form)
    )
    write_records(path.with_name(f"{form}.json"), tally.count(records))
    end = clock()
    counts = feedback_counts(samples, tally, form)
    path.with_name(f"{form}.json").unlink()
    took = lambda a, b: dict(zip(("wall_s", "cpu_s"), (round(y - x, 1) for x, y in zip(a, b))))
    return dict(
        form=form,
        read=took(start, read),
        convert_and_write=took(read, end),
        peak_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        **counts,
    )


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--n", type=int, default=1_000_000, help="samples, four to a prompt")
    a.add_argument(
        "--folder",
        type=Path,
        default=Path("build/bench"),
        help="where the samples are made (about 0.9 GB for a million) and removed again",
    )
    a.add_argument(
        "--form",
        choices=FORMS,
        help="this one only, in this process, on a samples file that exists",
    )
    a = a.parse_args()
    path = a.folder / f"samples-{a.n}.json"
    if a.form:
        print(json.dumps(convert(path, a.form)))
    else:
        make(path, a.n)
        print(f"{a.n:,} samples, {path.stat().st_size / 2**30:.2f} GiB", flush=True)
        for form in FORMS:
            subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "--n",
                    str(a.n),
                    "--folder",
                    str(a.folder),
                    "--form",
                    form,
                ],
                check=True,
            )
        path.unlink()

"""Every job of ours beside its peers in one run, alternated; a table and a figure for the
README: `make bench`, or `python bench/run.py --only DPO --n 32`; the same on a real model:
`make bench-real`.

Each case is a process of its own. Rounds go forwards and backwards through a job's cases, and a
ratio is taken within a round, per CPU second of one thread, so that what else the machine does
at that time falls out. Peers run in an environment with trl (--trl), with the scripts of
../shared/peers where they are present and with bench/peers.py elsewhere. What was asked for
stands beside each ratio; how operations are counted, in bench/work.py.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from inputs import REAL_FILES, SMALL_FILES, is_whole
from jobs import HERE, Case, Jobs, real_jobs, small_jobs
from tables import Result, Table, draw, markdown, summaries

# one thread, and nothing written beside the sources
QUIET = dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", TRL_EXPERIMENTAL_SILENCE="1")


def run_script(*command: str | Path):
    "One of the scripts here, an error if it fails."
    subprocess.run([sys.executable, *command], check=True, env=os.environ | QUIET)


def measure(case: Case, trl: str, timeout: int) -> Result:
    "The JSON line of a case, or its error."
    python = trl if case.peer else sys.executable
    try:
        done = subprocess.run(
            [python, *shlex.split(case.command)],
            env=os.environ | QUIET,
            cwd=HERE.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return dict(error=f"no result in {timeout} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{") and '"per_cpu_s"' in line:
            return json.loads(line)
    return dict(error=(done.stderr or done.stdout)[-600:])


def tell(job: str, case: Case, number: int, got: Result):
    "What a case said, on stderr."
    said = got.get("error")
    if said is None:
        said = f"{got['per_cpu_s']:.3f} {got['unit']} per CPU second"
    print(f"  {job}: {case.label}, round {number + 1}: {said}", file=sys.stderr, flush=True)


def alternate(job: str, cases: list[Case], a: argparse.Namespace) -> list[list[Result]]:
    "Results of each round, one per case; each is also a line of results.jsonl."
    results = []
    for number in range(a.rounds):
        row = {}
        for case in cases[::-1] if number % 2 else cases:
            got = measure(case, a.trl, a.timeout)
            row[case.label] = got
            where = dict(job=job, label=case.label, round=number, load=os.getloadavg()[0])
            with open(a.out / "results.jsonl", "a") as file:
                file.write(json.dumps(where | got) + "\n")
            tell(job, case, number, got)
        results.append([row[case.label] for case in cases])
    return results


def measured_ceiling() -> dict[str, float]:
    "Operations per CPU second of this machine, by dtype."
    done = subprocess.run(
        [sys.executable, HERE / "work.py"],
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def prepare(a: argparse.Namespace) -> Jobs:
    "Make what is missing of the inputs; all jobs."
    inputs = a.out / "inputs"
    if not a.real:
        if not is_whole(inputs, SMALL_FILES):
            run_script(HERE / "inputs.py", inputs)
        return small_jobs(inputs, a.n)
    model = Path(a.real).resolve()
    if not (model / "config.json").exists():
        raise SystemExit(f"--real {model}: no model there; `make bench-real` makes one")
    if not is_whole(inputs, REAL_FILES):
        run_script(HERE / "inputs.py", inputs, "--real", model)
    return real_jobs(inputs, model, a.n)


def choose(jobs: Jobs, a: argparse.Namespace) -> Jobs:
    "The jobs that are asked for, without peers where there is no TRL."
    wanted = tuple(a.only.split(",")) if a.only else ("",)
    chosen = {job: cases for job, cases in jobs.items() if job.startswith(wanted)}
    if not chosen:
        raise SystemExit(f"--only {a.only}: no such job; there are {', '.join(jobs)}")
    if Path(a.trl).exists():
        return chosen
    print(
        f"no TRL at {a.trl}: `make build/trl-venv/installed` makes it; until then ours is "
        "measured alone",
        file=sys.stderr,
    )
    return {job: [case for case in cases if not case.peer] for job, cases in chosen.items()}


def without_slow(jobs: Jobs, ceilings: dict[str, float]) -> Jobs:
    "The jobs without what computes in bfloat16 where this machine has no products in it."
    slow = ceilings["bfloat16"] < 0.2 * ceilings["float32"]
    if not slow:
        return jobs
    kept, left = {}, 0
    for job, cases in jobs.items():
        here = [case for case in cases if case.precision != "bfloat16"]
        left += len(cases) - len(here)
        if here and here[0] is cases[0]:  # ours among them
            kept[job] = here
    print(
        f"{left} cases in bfloat16 are left out: this machine multiplies in it at "
        f"{ceilings['bfloat16'] / ceilings['float32']:.0%} of its float32 rate",
        file=sys.stderr,
    )
    return kept


def write_table(table: Table, ceilings: dict[str, float], a: argparse.Namespace):
    "What is known by now."
    source = (a.out / "inputs/source.txt").read_text()
    rates = [f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in ceilings.items()]
    head = (
        f"Texts: {source}; {a.n} pairs, medians of {a.rounds} rounds, one thread, "
        f"{os.cpu_count()} CPUs; matmul ceiling {', '.join(rates)}.\n\n"
    )
    (a.out / "table.md").write_text(head + markdown(table))
    (a.out / "table.json").write_text(json.dumps(dict(ceilings=ceilings, jobs=table)))


def read_arguments() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--n", type=int, help="pairs (32; of a real model 16); other units follow")
    add("--rounds", type=int, default=3)
    add("--only", default="", help="jobs whose name begins with one of these, by commas")
    add("--real", default="", help="folder of a real language model, in float32")
    add("--trl", default=HERE.parent / "build/trl-venv/bin/python", help="Python with trl")
    add("--out", type=Path, help="folder of inputs and results (build/bench)")
    add("--timeout", type=int, default=1800, help="seconds for one case")
    a = parser.parse_args()
    if a.out is None:
        a.out = HERE.parent / ("build/bench-real" if a.real else "build/bench")
    a.out = a.out.resolve()
    a.trl = str(a.trl)
    a.n = a.n or (16 if a.real else 32)
    return a


def main():
    a = read_arguments()
    jobs = choose(prepare(a), a)
    ceilings = measured_ceiling()
    jobs = without_slow(jobs, ceilings)
    table: Table = {}
    for job, cases in jobs.items():
        table[job] = summaries(cases, alternate(job, cases, a), ceilings)
        write_table(table, ceilings, a)
    draw(table, a.out / "bench.png")
    print((a.out / "table.md").read_text())


if __name__ == "__main__":
    main()

"""One GPU, at most eight minutes: `make bench-gpu`, or

    python bench/gpu.py --out FOLDER [--wheels FOLDER] [--only 'dpo llama,label']

Attention by flex_attention beside pieces, DPO and reward models of two architectures beside
TRL, scores beside padded batches, answers beside `generate`, each with its peak memory and its
share of the matmul ceiling, which is measured first. Needs PyTorch 2.11 and transformers 5.17;
what else is missing can be brought as wheels (`make bench-gpu-wheels`), for which no network is
needed. Models have fresh weights, texts are made up.

Each case is a process of its own that is ended when its time is over; its results are lines of
results.jsonl as soon as they are there, table.md is written anew behind each case, and the
ends of what cases said are in log.txt. The most important cases come first, those for which no
time is left are named. --smoke runs all of it tiny on a CPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
STARTING = 8  # seconds under which no case is started


class Case(NamedTuple):
    "A process."

    name: str
    seconds: int  # after which it begins nothing more; it is ended a quarter later


CASES = (
    Case("inputs", 40),
    Case("attention", 70),
    Case("dpo llama halos_nb", 65),
    Case("dpo llama TRL", 45),
    Case("dpo gemma halos_nb", 70),
    Case("dpo gemma TRL", 45),
    Case("label", 40),
    Case("rm llama halos_nb", 45),
    Case("rm llama TRL", 40),
    Case("sample", 40),
    Case("rm gemma halos_nb", 45),
    Case("rm gemma TRL", 40),
)
ALWAYS = ("inputs",)  # without it there is nothing to measure on


# ---- a case, in its own process


def run_case(a: argparse.Namespace):
    from gpu_meter import place_of
    from gpu_models import make_inputs

    place = place_of(a, a.work / "inputs")
    job, *more = a.case.split()
    if job == "inputs":
        make_inputs(place.inputs, place.size)
    elif job == "attention":
        import gpu_attention

        gpu_attention.main(place)
    elif job in ("label", "sample"):
        import gpu_answers

        getattr(gpu_answers, job)(place)
    else:
        import gpu_training

        kind, side = more
        run = gpu_training.ours if side == "halos_nb" else gpu_training.theirs
        run(job, kind, place)


# ---- all of them


def environment(a: argparse.Namespace) -> dict[str, str]:
    "Of a case: this checkout, the wheels, nothing from a network and no progress bars."
    paths = [str(HERE.parent), *([str(a.site)] if a.wheels else [])]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    threads = dict(OMP_NUM_THREADS="1") if a.smoke else {}
    return (
        os.environ
        | threads
        | dict(
            PYTHONPATH=os.pathsep.join(paths),
            PYTHONUNBUFFERED="1",
            PYTHONDONTWRITEBYTECODE="1",
            TOKENIZERS_PARALLELISM="false",
            HF_HUB_OFFLINE="1",
            TQDM_DISABLE="1",
            HF_DATASETS_DISABLE_PROGRESS_BARS="1",
            TRL_EXPERIMENTAL_SILENCE="1",
            HALOS_NB_PROGRESS=os.devnull,
            HF_HOME=str(a.work / "hf"),  # what others have cached is not found
        )
    )


def install(a: argparse.Namespace):
    "The wheels into a folder of their own; an error if that fails."
    wheels = sorted(map(str, a.wheels.glob("*.whl")))
    if not wheels:
        raise SystemExit(f"--wheels {a.wheels}: no wheels there; `make bench-gpu-wheels`")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--upgrade", "--target", str(a.site), *wheels], check=True)


def end(process: subprocess.Popen):
    "Of a case and of all that it started."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def start(case: Case, limit: float, a: argparse.Namespace) -> str:
    "Run a case; what went wrong, empty if nothing did."
    log = a.work / f"{case.name.replace(' ', '-')}.log"
    command = [sys.executable, str(HERE / "gpu.py"), "--case", case.name, "--out", str(a.out)]
    command += ["--limit", str(limit), "--device", a.device, "--work", str(a.work)]
    command += ["--smoke"] * a.smoke
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=environment(a),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit * 1.25)
        except subprocess.TimeoutExpired:
            code = None
        end(process)
    said = log.read_text(errors="replace").strip()
    with (a.out / "log.txt").open("a") as file:
        file.write(f"== {case.name}\n{said[-20_000:]}\n")
    fault = "" if code == 0 else f"ended with {code}: {said[-500:]}"
    if code is None:
        fault = f"ended after {limit * 1.25:.0f} s"
    if "recompile_limit" in said:
        fault += " torch.compile gave up (recompile_limit): attention ran unfused"
    return fault


def add_line(a: argparse.Namespace, **line: Any):
    with a.lines.open("a") as file:
        file.write(json.dumps(line) + "\n")


def run_all(cases: list[Case], a: argparse.Namespace):
    from gpu_table import write_table

    ends = time.monotonic() + a.seconds
    for case in cases:
        begun = time.monotonic()
        limit = min(case.seconds, (ends - begun) / 1.25)
        fault = "not begun: no time was left"
        if limit >= STARTING:
            fault = start(case, limit, a)
        took = round(time.monotonic() - begun, 1)
        add_line(a, case=case.name, side="", took_s=took, **({"error": fault} if fault else {}))
        print(f"{case.name}: {took} s {fault}", file=sys.stderr, flush=True)
        write_table(a.lines, a.out / "table.md", about(a))
        if fault and case.name in ALWAYS:
            raise SystemExit(f"{case.name}: {fault}")


def about(a: argparse.Namespace) -> str:
    "The machine and the versions, in words."
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = []
    for name in ("torch", "transformers", "triton", "trl", "liger-kernel"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    where = torch.cuda.get_device_name() if a.device == "cuda" else "a CPU, tiny models"
    return f"{where}; {', '.join(found)}"


def read_arguments() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=os.environ.get("OUT", HERE.parent / "build/bench-gpu"))
    add("--wheels", type=Path, help="folder of wheels to use beside what is installed")
    add("--only", default="", help="cases whose name begins with one of these, by commas")
    add("--seconds", type=float, default=465, help="of all together")
    add("--smoke", action="store_true", help="tiny, on the CPU")
    add("--work", type=Path, help="folder for inputs and wheels, kept (a new one, removed)")
    add("--case", help=argparse.SUPPRESS)
    add("--limit", type=float, default=600, help=argparse.SUPPRESS)
    add("--device", help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.out = Path(a.out).resolve()
    a.lines = a.out / "results.jsonl"
    a.work = a.work and a.work.resolve()
    a.device = a.device or ("cpu" if a.smoke else "cuda")
    return a


def main():
    a = read_arguments()
    if a.case:
        return run_case(a)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        a.work = a.work or Path(folder)
        measure(a)


def measure(a: argparse.Namespace):
    "All that is wanted, and the table."
    a.site = a.work / "site"
    a.out.mkdir(parents=True, exist_ok=True)
    for name in (a.lines, a.out / "log.txt"):
        name.unlink(missing_ok=True)
    if a.wheels:
        install(a)
        sys.path.insert(0, str(a.site))
    import torch

    if a.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --smoke tries everything tiny on the CPU")
    wanted = (*ALWAYS, *(a.only.split(",") if a.only else [""]))
    run_all([case for case in CASES if case.name.startswith(wanted)], a)
    print((a.out / "table.md").read_text())


if __name__ == "__main__":
    main()

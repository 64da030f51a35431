"""What a round of the loop takes beyond its stages' own work: `python bench/round.py`, on the
playground, in build/bench/rounds.

A round lasts from the start of its sampling to the start of the next. Own work: the same three
stages once more, one by one, each in a copy of a process that
has imported everything; so it counts loading models and writing results, and neither imports
nor what lies between stages.
"""

import argparse, gc, json, os, runpy, shutil, statistics, sys, time
from pathlib import Path

from halos_nb.preload import become_rank
from halos_nb.settings import Profile

HERE = Path(__file__).resolve().parent
# `waiting`: stages are started as on a GPU, where no process is kept from stage to stage, but
# compute on the CPU
PROFILES = {
    "server1": Profile(name="server1"),
    "server2": Profile(name="server2", num_processes=2),
    "waiting1": Profile(name="waiting1", launcher="accelerate"),
    "waiting2": Profile(name="waiting2", num_processes=2, launcher="accelerate"),
}


def play(home: Path, rounds: int, profile: str) -> Path:
    "A run's folder with so many rounds of the demo."
    from halos_nb.configs import LoopConfig
    from halos_nb.settings import load_settings
    from halos_nb.ledger import run_folder
    from halos_nb.loop import run_rounds
    from halos_nb.playground import into_playground

    settings = load_settings()
    settings.runs_dir = str(home)
    settings.profiles |= PROFILES
    cfg = into_playground(
        LoopConfig(run_name="rounds", total_prompts=128 * rounds, fresh=True, profile=profile),
        settings,
    )
    for r in run_rounds(cfg, settings):
        print(r, file=sys.stderr)
    return run_folder(settings, cfg.run_name)


def spans(run: Path) -> list[float]:
    "Seconds of each round but the first, in which the preload server still imports."
    from halos_nb.records import read_jsonl

    starts = [
        e["time"]
        for e in read_jsonl(run / "ledger.jsonl")
        if e["event"] == "started" and e["stage"] == "sample" and e["folder"] != "start"
    ]
    return [b - a for a, b in zip(starts[1:], starts[2:])]


def own_work(stage: str, folder: Path, scratch: Path, processes: int) -> float:
    """Wall seconds of a stage of a round, done once more in a copy of this process and of its
    folder.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder, scratch)
    config = scratch / f"{stage}.config.json"
    config.write_text(config.read_text().replace(str(folder), str(scratch)))
    start = time.monotonic()
    if not (pid := os.fork()):
        os.environ.update(HALOS_NB_PROGRESS=os.devnull, ACCELERATE_USE_CPU="true")
        if processes > 1:
            become_rank(processes)
        sys.argv[1:] = ["--config", str(config)]
        sys.modules.pop(f"halos_nb.{stage}")
        runpy.run_module(f"halos_nb.{stage}", run_name="__main__", alter_sys=True)
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"{stage} failed: {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - start


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--profile", choices=PROFILES, default="server1")
    p.add_argument("--out", type=Path, default=HERE.parent / "build/bench")
    a = p.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    home = (a.out / "rounds").resolve()
    home.mkdir(parents=True, exist_ok=True)
    run = play(home, a.rounds, a.profile)
    n = PROFILES[a.profile].num_processes
    # what a stage needs
    import tyro, torch  # noqa: F401
    import halos_nb.sample, halos_nb.label, halos_nb.train  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # as a preload server does
    own = {
        s: statistics.median(
            own_work(s, run / "round-1", home / "scratch", n) for _ in range(3)
        )
        for s in ("sample", "label", "train")
    }
    rounds = spans(run)
    print(
        json.dumps(
            dict(
                profile=a.profile,
                round_s=round(statistics.median(rounds), 2),
                rounds=[round(x, 2) for x in rounds],
                own_s={k: round(v, 2) for k, v in own.items()},
                overhead=round(statistics.median(rounds) / sum(own.values()) - 1, 3),
            )
        )
    )


if __name__ == "__main__":
    main()

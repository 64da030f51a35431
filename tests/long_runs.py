"""What a round costs at the beginning and at the end of a long run, and what a round's prompts
cost in a large file: `make test-long`. The stages only pretend, in this process; the loop, the
ledger, the monitor and every file are real. Seconds are those of the processor.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))
import pretend

from halos_nb import loop
from halos_nb.configs import LoopConfig, SampleConfig, config_json
from halos_nb.jobs import Job, remove
from halos_nb.ledger import Ledger
from halos_nb.monitor import Panel, RunMonitor
from halos_nb.runs import read_run
from halos_nb.settings import Settings

PROMPTS_A_ROUND = 16


class Pretended(Ledger):
    "A ledger whose stages are calls."

    def job_for(self, stage, clear):
        stage.folder.mkdir(parents=True, exist_ok=True)
        for path in clear:
            remove(path)
        job = Job(stage.name, stage.folder)
        job.poll = lambda: 0
        job.stop = job.tell_to_end = lambda: None
        text = config_json(replace(stage.config, num_processes=1))
        job.file("config.json").write_text(text)
        pretend.do(json.loads(text))
        job.file("status.json").write_text(json.dumps(dict(exit=0)))
        return job

    def preload(self, stage):
        "There is nothing to import."


def wait(job, **shown):
    "A call is over when it returns."


def megabytes():
    "What this process holds."
    return psutil.Process().memory_info().rss / 1e6


def config(folder, rounds, **more):
    "A run of so many rounds."
    for name in ("sft", "rm"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "weights").write_text(name)
    (folder / "prompts.json").write_text("[]")
    pretend.PROMPTS = PROMPTS_A_ROUND * (rounds + 1)
    return LoopConfig(
        run_name="long",
        lr=1e-4,
        total_prompts=PROMPTS_A_ROUND * rounds,
        prompts_per_round=PROMPTS_A_ROUND,
        sft_checkpoint=str(folder / "sft"),
        reward_checkpoint=str(folder / "rm"),
        prompts=str(folder / "prompts.json"),
        **more,
    )


def play(cfg, settings, every, say=True):
    "All rounds: milliseconds of this process for each and for a look at it, and megabytes."
    run = Path(settings.runs_dir) / cfg.run_name
    monitor = RunMonitor(run, mode="static")
    monitor.panel = Panel()
    rows = []
    before = time.process_time()
    for number, _ in enumerate(loop.run_rounds(cfg, settings, watch=wait), 1):
        seconds = time.process_time() - before
        looked = 0.0
        if number % every == 0:
            before = time.process_time()
            monitor.refresh()
            looked = time.process_time() - before
        rows.append((1000 * seconds, 1000 * looked, megabytes()))
        if say and number % every == 0:
            mean = np.array(rows[-every:])[:, 0].mean()
            costs = f"{mean:7.1f} ms a round, {1000 * looked:7.1f} ms a look"
            print(f"round {number:5}: {costs}, {rows[-1][2]:6.0f} MB")
            sys.stdout.flush()
        before = time.process_time()
    return np.array(rows)


def timed(what, call):
    "Say how long a call takes."
    start = time.process_time()
    found = call()
    print(f"{what}: {time.process_time() - start:.1f} s, {megabytes():.0f} MB")
    return found


def rounds(count, every):
    "A run of so many rounds, its second start, and a first look at it."
    loop.Ledger = Pretended
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        settings = Settings(runs_dir=str(folder / "runs"))
        cfg = config(folder, count)
        print(f"{count} rounds")
        play(cfg, settings, every)
        done = timed("the run once more, all sealed", lambda: play(cfg, settings, every, False))
        print(f"  {done[:, 0].mean():.1f} ms a round")
        timed("a summary, by this process", lambda: read_run(folder / "runs/long"))
        timed("another", lambda: read_run(folder / "runs/long"))


def prompts(count):
    "The prompts of a round early and late in a file of so many, and memory."
    from halos_nb.answers import all_counts, choose_prompts

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HALOS_NB_CACHE_DIR"] = str(Path(folder) / "cache")
        path = Path(folder) / "prompts.jsonl"
        with open(path, "w") as file:
            for i in range(count):
                text = f"What is {i} times {i + 1}? Say it in words, and how you found it out."
                file.write(json.dumps(dict(prompt=text)) + "\n")
        size = path.stat().st_size / 1e6
        print(f"{count} prompts, {size:.0f} MB; {megabytes():.0f} MB at first")
        given = dict(model="m", datasets=[str(path)], output_file="out.json", num_prompts=512)
        for skip in (0, 512, count // 2, count - 512):
            start = time.process_time()
            cfg = SampleConfig(**given, num_skip=skip)
            found, examples = choose_prompts(cfg)
            counts = all_counts(cfg, found, examples, {})
            seconds = time.process_time() - start
            assert (counts["prompts"], counts["prompts_left"]) == (512, count - 512 - skip)
            assert f"{skip} times" in examples[0].prompt[0]["content"]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            memory = f"{megabytes():5.0f} MB, peak {peak:.0f} MB"
            print(f"prompts {skip:7}...: {seconds:7.3f} s, {memory}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["rounds", "prompts"])
    parser.add_argument("count", type=int)
    parser.add_argument("--every", type=int, default=100)
    given = parser.parse_args()
    if given.what == "rounds":
        rounds(given.count, given.every)
    else:
        prompts(given.count)

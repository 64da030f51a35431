"""Trainings that are killed at random points, and what becomes of them: `make test-resume`.

A stage of 60 steps on a tiny model, run by the ledger in processes of its own. Its whole job
gets kill -9 a random time behind a random step: in a forward pass, in the optimiser, while a
checkpoint is written or an older one removed. It is started again until it ends, and must have
the bits of one that nobody killed, and must have repeated at most `save_every` steps each time.
"""

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from halos_nb.configs import SampleConfig, TrainConfig
from halos_nb.failures import StageError
from halos_nb.identity import Stage
from halos_nb.ledger import Ledger
from halos_nb.loop import batches_of
from halos_nb.models import small_llama
from halos_nb.processes import finished
from halos_nb.records import file_hash, prompt_id, read_jsonl, write_records
from halos_nb.resume import ATTEMPTS, last_step
from halos_nb.settings import Profile
from halos_nb.templates import byte_tokenizer

SAVE_EVERY = 7
STEPS = 60
LORA = dict(use_peft=True, lora_r=4, lora_alpha=8)
HUMANLINE = dict(humanline=True, sync_reference=2, log_epsilon_P=-0.1)
TWO = Profile(name="cpu2", num_processes=2)
# what is trained, how often it is killed, on how many processes
CASES = {
    "dpo": (dict(loss="dpo"), 20, Profile()),
    "kto": (dict(loss="kto"), 4, Profile()),
    "grpo": (dict(loss="grpo", old_policy="pass", batch_size=4), 4, Profile()),
    "ppo": (dict(loss="ppo", ppo_epochs=3, batch_size=8, epochs=2), 4, Profile()),
    "sft, dropout": (dict(loss="sft", dropout=0.1), 4, Profile()),
    "humanline": (dict(loss="dpo", **HUMANLINE), 4, Profile()),
    "humanline, lora": (dict(loss="dpo", **HUMANLINE, **LORA), 4, Profile()),
    "average": (dict(loss="dpo", reference="ema", ema_decay=0.9), 4, Profile()),
    "reward model, lora": (dict(loss="bradley-terry", lora_dropout=0.1, **LORA), 4, Profile()),
    "dpo, two processes": (dict(loss="dpo"), 4, TWO),
}


def make_start(home):
    "A tiny model, 40 pairs, 80 groups of scored answers."
    tok = byte_tokenizer()
    model = small_llama(tok, hidden_size=64, layers=2, initializer_range=0.2)
    for part in (model, tok):
        part.save_pretrained(home / "start")
    rows, scored = [], []
    for i in range(40):
        asked = "Say it " + "again " * (i % 5) + str(i)
        rows.append(dict(prompt=asked, chosen="Yes" + "!" * (i % 9), rejected="No."))
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(80):
        prompt = [dict(role="user", content=f"Count {i}")]
        for k in range(3):
            output = [dict(role="assistant", content="one " * (k + 1))]
            row = dict(prompt_id=prompt_id(prompt), sample_id=k, prompt=prompt, output=output)
            scored.append(row | dict(reward=float((i + k) % 3), type="scalar_feedback"))
    write_records(home / "scores.json", scored)


def train_stage(home, run, more):
    "Sixty steps of a method, as the loop would ask for them."
    data = home / ("scores.json" if more["loss"] == "grpo" else "pairs.jsonl")
    single = more["loss"] in ("kto", "grpo")  # 80 examples an epoch, and not 40
    given = dict(batch_size=4, epochs=3 if single else 6) | more
    cfg = TrainConfig(
        model=str(home / "start"),
        train_datasets=[str(data)],
        exp_name="policy",
        cache_dir=str(run),
        metrics_file=str(run / "metrics.jsonl"),
        lr=1e-3,
        save_every=SAVE_EVERY,
        **given,
    )
    outputs = [run / name for name in ("policy/FINAL", "policy/counts.json", "metrics.jsonl")]
    leaves = ("policy/step-*", "policy/attempts.jsonl", "policy/.last_step", "metrics.jsonl")
    return Stage("train", run, cfg, [home / "start", data], outputs, 1, leaves=leaves)


def sample_stage(home, run):
    "Samples of the start, two to a prompt, in forty batches."
    cfg = SampleConfig(
        model=str(home / "start"),
        reference=str(home / "start"),
        datasets=[str(home / "pairs.jsonl")],
        output_file=str(run / "samples.json"),
        num_samples_per_prompt=2,
        max_new_tokens=48,
        batch_size=2,
    )
    outputs = [run / "samples.json", run / "samples.counts.json"]
    leaves = batches_of(outputs[0])
    return Stage("sample", run, cfg, [home / "start"], outputs, 1, leaves=leaves)


def quiet(job, **shown):
    job.wait(show=False)


def kill(job):
    "kill -9 to all of a job at once."
    supervisor = psutil.Process(job.process.pid)
    for process in [*supervisor.children(recursive=True), supervisor]:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def killing(done, target, wait):
    "A watch that kills a job some seconds behind the so-many-th step or batch."

    def watch(job, **shown):
        while job.poll() is None and done() < target:
            time.sleep(0.002)
        time.sleep(wait)
        if job.poll() is None:
            kill(job)
        job.wait(show=False)

    return watch


def until_it_ends(stage, profile, done, targets, rng, then=list):
    "Run a stage, killed at each of the targets; how far it had come each time."
    reached = []
    for number, target in enumerate(targets):
        watch = killing(lambda n=number: done(n), target, rng.uniform(0, 0.05))
        with Ledger(stage.folder, profile, watch=watch) as ledger, suppress(StageError):
            ledger.run(stage)
            print(f"it ended before kill {number + 1} of {len(targets)}", flush=True)
            assert number > 0.8 * len(targets)
            return reached
        reached.append(done(number))
        then()
    with Ledger(stage.folder, profile, watch=quiet) as ledger:
        assert ledger.run(stage)
    return reached


def steps_made(run):
    "A function of the attempt's number: its last step, -1 before it has begun to train."

    def made(attempt):
        file = run / ATTEMPTS
        begun = len(read_jsonl(file)) if file.exists() else 0
        with suppress(ValueError):  # it is being written
            return last_step(run) if begun > attempt else -1
        return -1

    return made


TIMES = ("tokens_per_second", "train_runtime", "train_samples_per_second")
TIMES += ("train_steps_per_second",)


def lines(file):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_jsonl(file)]


def check_training(home, name, rng):
    "One line of what was seen; an error if the bits are others, or too much was repeated."
    more, kills, profile = CASES[name]
    whole, cut = home / name / "whole", home / name / "killed"
    for run in (whole, cut):
        run.mkdir(parents=True)
        (run / "params.json").write_text("{}")
    with Ledger(whole, profile, watch=quiet) as ledger:
        assert ledger.run(train_stage(home, whole, more))
    stage = train_stage(home, cut, more)
    began = time.monotonic()
    targets = sorted(rng.randrange(STEPS - 1) for _ in range(kills))
    made, rows = steps_made(cut / "policy"), []

    def read_rows():
        rows[:] = read_jsonl(cut / "policy" / ATTEMPTS)

    far = until_it_ends(stage, profile, made, targets, rng, read_rows)
    counts = json.loads((cut / "policy/counts.json").read_text())
    at, repeated = counts.get("resumed_at", []), counts.get("steps_repeated", 0)
    assert counts["steps"] == STEPS, counts["steps"]
    assert file_hash(whole / "policy/FINAL") == file_hash(cut / "policy/FINAL"), name
    assert lines(whole / "metrics.jsonl") == lines(cut / "metrics.jsonl"), name
    begins = [*(row["at"] for row in rows[1:]), at[-1] if at else 0]
    lost = [now - begin for now, begin in zip(far, begins)]
    assert sum(lost) == repeated, (lost, repeated)
    assert max(lost) <= SAVE_EVERY, lost
    seconds = time.monotonic() - began
    print(
        f"{name}: killed behind steps {far}, went on behind {at}, {repeated} steps repeated "
        f"of {STEPS}, same bits ({seconds:.0f} s)",
        flush=True,
    )


def check_sampling(home, profile, kills, rng):
    "Likewise, of a sampling stage: finished batches are not drawn again."
    whole, cut = home / f"{profile.name}-whole", home / f"{profile.name}-killed"
    for run in (whole, cut):
        run.mkdir()
        (run / "params.json").write_text("{}")
    with Ledger(whole, profile, watch=quiet) as ledger:
        assert ledger.run(sample_stage(home, whole))

    def batches(attempt):
        return len(finished(cut / "samples.json"))

    targets = sorted(rng.randrange(1, 36) for _ in range(kills))
    far = until_it_ends(sample_stage(home, cut), profile, batches, targets, rng)
    assert (cut / "samples.json").read_bytes() == (whole / "samples.json").read_bytes()
    kept = json.loads((cut / "samples.counts.json").read_text())["resumed_samples"]
    print(
        f"sampling, {profile.num_processes} processes: killed with {far} of 40 batches "
        f"finished, {kept} of 80 samples not drawn again, same bytes",
        flush=True,
    )


def main(wanted):
    "All of it, or the cases that are named."
    rng = random.Random(0)
    with TemporaryDirectory() as folder:
        home = Path(folder)
        make_start(home)
        for name in wanted or CASES:
            if name in CASES:
                check_training(home, name, rng)
        for profile, kills in ((Profile(name="one"), 6), (replace(TWO, name="two"), 3)):
            if not wanted or "sampling" in wanted:
                check_sampling(home, profile, kills, rng)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1:])
    os._exit(0)

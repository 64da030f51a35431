"""Runs that break, each in its own way, with real models of the playground: the alarm must fire
in the round whose training breaks the policy.

`python tests/collapses.py [name ...]` runs all of them, or those that are named, and prints a
table (`make test-alarm`); the quick ones run with the other tests.
"""

import random
import shutil
import sys
import time
from typing import NamedTuple

from halos_nb import playground
from halos_nb.checkpoints import seal
from halos_nb.configs import LoopConfig, TrainConfig
from halos_nb.ledger import Ledger, Stage, run_folder
from halos_nb.loop import AlarmError, run_rounds
from halos_nb.records import read_records, write_records
from halos_nb.settings import Profile, load_settings

SMALL = dict(total_prompts=128, prompts_per_round=64)


def quiet(job, **shown):
    "Wait for a job and show nothing."
    job.wait(show=False)


class Outcome(NamedTuple):
    "What came of a run that should break."

    alarm: AlarmError | None
    rounds: list  # that were yielded before


def outcome(cfg, settings, look=None):
    "A run, up to its alarm."
    seen = []
    try:
        for this in run_rounds(cfg, settings, watch=quiet):
            seen.append(this)
            if look:
                look(this)
    except AlarmError as error:
        return Outcome(error, seen)
    return Outcome(None, seen)


def config(name, settings, **more):
    "A run in the playground, from nothing."
    run_name = f"collapse-{name.replace(' ', '-')}"
    given = dict(run_name=run_name, audit="skip", fresh=True) | SMALL
    return playground.into_playground(LoopConfig(**given | more), settings)


# ---- the ways


def high_rate(settings):
    "DPO with 30 times its learning rate."
    lr = 30 * LoopConfig(**playground.SWEEP["dpo"]).lr
    return outcome(config("high rate", settings, method="dpo", lr=lr), settings)


def old_kto(settings):
    "KTO as it once was by default; its metrics look well."
    more = dict(total_prompts=512, prompts_per_round=128, method="kto", lr=3e-4, beta=0.1)
    return outcome(config("old kto", settings, **more), settings)


def padded(record, rng):
    "A pair whose better answer says its words again and again; the worse is the better of old."
    side = "A" if record["label"] else "B"
    text = record[f"output_{side}"][0]["content"]
    words = text.split()
    longer = " ".join([text, *[words[-1]] * rng.randint(1, 12)])
    turns = [dict(role="assistant", content=longer)]
    plain = [dict(role="assistant", content=text)]
    return record | dict(output_A=turns, output_B=plain, label=1, reward_A=1.0, reward_B=0.0)


def fooled_model(settings):
    "A reward model for which the answer that repeats itself is the better one."
    world = playground.build(settings)
    folder = run_folder(settings, "collapse-fooled-model")
    rng = random.Random(0)
    rows = [padded(row, rng) for row in read_records(world.pairs_train)[:640]]
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / "pairs.json", rows)
    given = playground.REWARD | dict(epochs=1)
    cfg = TrainConfig(
        model=str(world.policy),
        train_datasets=[str(folder / "pairs.json")],
        cache_dir=str(folder),
        **given,
    )
    out = folder / "reward"
    outputs = [out / "FINAL"]
    stage = Stage("train", out, cfg, [world.policy, folder / "pairs.json"], outputs)
    with Ledger(folder, Profile(name="playground"), watch=quiet) as ledger:
        ledger.run(stage)
    return out / "FINAL"


def fooled(settings):
    "A reward model that likes what nobody can read; the score climbs."
    reward = str(fooled_model(settings))
    more = dict(method="dpo", lr=3e-4, beta=0.05, reward_checkpoint=reward, total_prompts=256)
    more |= dict(prompts_per_round=128)
    return outcome(config("fooled", settings, **more), settings)


def spoil(folder):
    "Noise in place of a model's weights, and a manifest that says nothing of it."
    from safetensors.torch import load_file, save_file
    from torch import manual_seed, randn_like

    manual_seed(0)
    file = folder / "model.safetensors"
    weights = load_file(file)
    noise = {name: 0.1 * randn_like(w) for name, w in weights.items()}
    save_file(noise, file, metadata=dict(format="pt"))
    seal(folder)


def corrupted(settings):
    "A reference whose weights become noise behind round 1."
    world = playground.build(settings)
    reference = run_folder(settings, "collapse-reference")
    shutil.rmtree(reference, ignore_errors=True)
    shutil.copytree(world.policy, reference)

    def look(this):
        if this.number == 1:
            spoil(reference)

    cfg = config("corrupted", settings, method="dpo", lr=3e-4, sft_checkpoint=str(reference))
    return outcome(cfg, settings, look)


WAYS = {
    "high rate": high_rate,
    "old kto": old_kto,
    "fooled": fooled,
    "corrupted": corrupted,
}


def main(names):
    "Run them and print what came of each; an error if one did not fire."
    settings = load_settings()
    silent = []
    for name in names or WAYS:
        begin = time.monotonic()
        alarm, rounds = WAYS[name](settings)
        seconds = time.monotonic() - begin
        for this in rounds:
            print(this)
        print(f"\n== {name}: {alarm or 'NO ALARM'}\n({seconds:.0f} s)\n", flush=True)
        if alarm is None:
            silent.append(name)
    sys.exit(f"no alarm: {', '.join(silent)}" if silent else 0)


if __name__ == "__main__":
    main(sys.argv[1:])

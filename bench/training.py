"""A training run of ours as a user starts one, measured: `python bench/training.py --loss kto`.

Answers are counted for methods of single answers, pairs for methods of pairs. What a run does
before its first step (GRPO and PPO ask the policy about all answers) is in its seconds.
"""

import argparse
import tempfile
import warnings
from itertools import islice
from pathlib import Path

from meter import Meter, arguments, count_tokens, report, run_trainer, warm
from work import Work

PAIRED = ("dpo", "bradley-terry")


def no_sharing(trainer):
    """Every branch a tree of its own, packed as before: what sharing the prompt saves is seen
    by leaving it out.
    """
    from halos_nb.trees import make_batch

    prepare = trainer.prepare

    def alone(step, mode="train"):
        batches = []
        for batch in step.batches:
            trees = []
            for tree in batch.trees:
                trees += [tree.pick([k]) for k in range(len(tree.branches))]
            batches.append(make_batch(trees, batch.layout, batch.pad_id))
        step.batches = batches
        return prepare(step, mode)

    trainer.prepare = alone


def first_lines(file: str, n: int, folder: str) -> str:
    "A file of its first `n` lines: what the peers read."
    few = Path(folder) / "pairs.jsonl"
    with open(file) as lines:
        few.write_text("".join(islice(lines, n)))
    return str(few)


def first_groups(file: str, n: int, folder: str) -> str:
    "A file of the scored answers to its first `n` prompts."
    from halos_nb.records import read_rows, write_records

    rows = read_rows(file)
    first = set(list(dict.fromkeys(row["prompt_id"] for row in rows))[:n])
    few = Path(folder) / "scores.json"
    write_records(few, [row for row in rows if row["prompt_id"] in first])
    return str(few)


def read_arguments(doc: str, loss: str) -> argparse.Namespace:
    "The command line."
    a = arguments(
        doc,
        loss=loss,
        pairs="",
        groups="",
        batch=16,
        token_budget=0,
        max_length=1024,
        max_prompt_length=512,
        layout="auto",
        old_policy="auto",
        no_share=False,
        lora=False,
        gradient_checkpointing=False,
    )
    if not a.loss:
        raise SystemExit("--loss: name a method")
    if not (a.pairs or a.groups):
        raise SystemExit(
            "--pairs: name a jsonl file of prompt, chosen, rejected (--groups, for grpo: a "
            "file of scored answers)"
        )
    return a


def as_config(a: argparse.Namespace, home: str):
    "The run."
    from halos_nb.configs import TrainConfig

    if a.groups:
        data, examples = first_groups(a.groups, a.n, home), a.n
    else:
        data = first_lines(a.pairs, a.n, home)
        examples = 2 * a.n if a.loss in ("kto", "ppo") else a.n
    more = dict(token_budget=a.token_budget) if a.token_budget else {}
    return TrainConfig(
        loss=a.loss,
        model=a.model,
        train_datasets=[data],
        n_examples=examples,
        batch_size=a.batch,
        max_length=a.max_length,
        max_prompt_length=a.max_prompt_length,
        layout=a.layout,
        old_policy=a.old_policy,
        lr=1e-6,
        use_peft=a.lora,
        gradient_checkpointing=a.gradient_checkpointing,
        precision=a.precision,
        cache_dir=home,
        **more,
    )


def count_answers(trainer) -> list[int]:
    "A list of one number that grows by every answer that is trained on."
    answers = [0]
    count = trainer.count_step

    def counted(step):
        for batch in step.batches:
            answers[0] += sum(meaning != "KL" for meaning in batch.meanings)
        count(step)

    trainer.count_step = counted
    return answers


def leave_out_checks(trainer, work: Work):
    "A run asks its model about its first batch twice, to see that it moved: not needed."
    ask = trainer.said_exactly

    def said_exactly(batch):
        with work.paused():
            return ask(batch)

    trainer.said_exactly = said_exactly


class Asked:
    "What a reference was asked before training, which is a part of the run."

    def __init__(self):
        self.wall, self.cpu, self.tokens, self.operations, self.positions = 0.0, 0.0, 0, 0, 0

    def watch(self):
        "Measure the passes, not the loading: peers have loaded theirs, too."
        from halos_nb import reference as room

        inner = room.compute_shared

        def compute_shared(shares, reference, *args, **options):
            tokens, work = count_tokens(reference.model), Work(reference.model)
            with Meter() as meter:
                found = inner(shares, reference, *args, **options)
            self.wall, self.cpu, self.tokens = meter.wall, meter.cpu, tokens[0]
            self.operations, self.positions = work.operations, work.positions
            return found

        room.compute_shared = compute_shared


def main(doc: str, loss: str = ""):
    a = read_arguments(doc, loss)
    import torch

    from halos_nb.train import make_trainer

    warnings.filterwarnings("ignore", message="'pin_memory' argument")
    cfg = as_config(a, tempfile.mkdtemp())
    asked = Asked()
    asked.watch()
    trainer, _ = make_trainer(cfg)
    if a.no_share:
        no_sharing(trainer)
    models = [trainer.model]
    if getattr(trainer.reference, "model", None) is not None:
        models.append(trainer.reference.model)
    warm(trainer.model)
    answers = count_answers(trainer)
    tokens, work = count_tokens(*models), Work(*models)
    leave_out_checks(trainer, work)
    meter = run_trainer(trainer, a.profile)
    meter.wall += asked.wall
    meter.cpu += asked.cpu
    own = torch.tensor(answers[0], device=trainer.args.device)
    everyone = int(trainer.accelerator.reduce(own, "sum"))
    if not trainer.is_world_process_zero():
        return
    last = [h for h in trainer.state.log_history if "loss" in h][-1]
    paired = a.loss in PAIRED
    report(
        f"halos_nb:{a.loss}:{a.precision}",
        "pairs" if paired else "answers",
        everyone // 2 if paired else everyone,
        meter,
        tokens=tokens[0] + asked.tokens,
        needed=work.positions + asked.positions,
        operations=work.operations + asked.operations,
        steps=trainer.state.global_step,
        loss=round(last["loss"], 4),
        layout=trainer.layout.name,
        budget=cfg.token_budget,
        **trainer.notes,
    )


if __name__ == "__main__":
    main(__doc__)

"A training run of ours as a user starts one, measured; reward_model.py and dpo.py share it."

import tempfile, warnings
from itertools import islice
from pathlib import Path

from meter import arguments, count_tokens, report, run_trainer


def no_sharing(trainer):
    """Every branch a tree of its own, packed as before: what sharing the prompt saves is seen
    by leaving it out.
    """
    from halos_nb.trees import make_batch

    prepare = trainer.prepare

    def alone(step, mode="train"):
        step.batches = [
            make_batch(
                [t.pick([k]) for t in b.trees for k in range(len(t.branches))],
                b.layout,
                b.pad_id,
            )
            for b in step.batches
        ]
        return prepare(step, mode)

    trainer.prepare = alone


def first(file: str, n: int, folder: str) -> str:
    "A file of its first `n` lines: what the peers read."
    with open(file) as f:
        (few := Path(folder) / "pairs.jsonl").write_text("".join(islice(f, n)))
    return str(few)


def main(doc: str, loss: str):
    a = arguments(
        doc,
        pairs="",
        batch=16,
        token_budget=0,
        max_prompt_length=512,
        layout="auto",
        no_share=False,
        lora=False,
    )
    if not a.pairs:
        raise SystemExit("--pairs: name a jsonl file of prompt, chosen, rejected")
    from halos_nb.configs import TrainConfig
    from halos_nb.train import make_trainer

    warnings.filterwarnings("ignore", message="'pin_memory' argument")
    home = tempfile.mkdtemp()
    more = dict(token_budget=a.token_budget) if a.token_budget else {}
    cfg = TrainConfig(
        loss=loss,
        model=a.model,
        train_datasets=[first(a.pairs, a.n, home)],
        n_examples=a.n,
        batch_size=a.batch,
        max_prompt_length=a.max_prompt_length,
        layout=a.layout,
        lr=1e-6,
        use_peft=a.lora,
        precision=a.precision,
        cache_dir=home,
        **more,
    )
    trainer, _ = make_trainer(cfg)
    if a.no_share:
        no_sharing(trainer)
    reference = [trainer.reference.model] if getattr(trainer.reference, "model", None) else []
    tokens, needed = count_tokens(trainer.model, *reference), []
    count = trainer.count_step

    def count_needed(step):
        "What the step's trees hold, beside what was computed of them."
        needed.append(sum(t.tokens for batch in step.batches for t in batch.trees))
        count(step)

    trainer.count_step = count_needed
    meter = run_trainer(trainer, a.profile)
    if not trainer.is_world_process_zero():
        return
    last = [h for h in trainer.state.log_history if "loss" in h][-1]
    report(
        f"halos_nb:{loss}:{a.precision}",
        "pairs",
        a.n,
        meter,
        tokens=tokens[0],
        needed=sum(needed) * (1 + bool(trainer.reference)),
        steps=trainer.state.global_step,
        loss=round(last["loss"], 4),
        layout=trainer.layout.name,
        budget=cfg.token_budget,
    )

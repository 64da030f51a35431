"""TRL and plain transformers at the same jobs: runs in an environment with trl 1.16 and peft,
without halos_nb. Where ../shared/peers has a script for a job, that one is used.

default: the settings TRL ships. best_fp32, best_bf16: no gradient checkpointing, rows sorted by
length, and the forward pass that is fastest on a CPU: one pair or row, two for KTO (it needs a
neighbour), four answers of a group for GRPO. Steps are those of ours.

Asked for nothing here: TRL 1.16 has no PPO any more, not among its experiments either.
"""

import argparse
import json
import tempfile
from collections import Counter
from typing import Any

from meter import Meter, arguments, count_tokens, report, run_trainer, warm

BATCH = 16  # of padded rows, for labelling


# ---- data in TRL's words


def turn(role: str, text: str) -> list[dict]:
    return [dict(role=role, content=text)]


def read_pairs(file: str, n: int) -> list[dict]:
    "Conversations with a chosen and a rejected answer."
    rows = []
    for line in open(file).readlines()[:n]:
        row = json.loads(line)
        rows.append(
            dict(
                prompt=turn("user", row["prompt"]),
                chosen=turn("assistant", row["chosen"]),
                rejected=turn("assistant", row["rejected"]),
            )
        )
    return rows


def chosen_only(rows: list[dict]) -> list[dict]:
    "What SFT learns."
    return [dict(prompt=row["prompt"], completion=row["chosen"]) for row in rows]


def single_answers(rows: list[dict]) -> list[dict]:
    "What KTO learns: each answer, and whether it is a good one."
    answers = []
    for row in rows:
        for side in ("chosen", "rejected"):
            label = side == "chosen"
            answers.append(dict(prompt=row["prompt"], completion=row[side], label=label))
    return answers


def tokens_of(tokenizer, *turns: dict, **options) -> list[int]:
    "A conversation's ids."
    return tokenizer.apply_chat_template(list(turns), return_dict=False, **options)


def length(tokenizer, row: dict) -> int:
    "Tokens of a row's longest conversation."
    sides = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
    return max(len(tokens_of(tokenizer, *row["prompt"], *side)) for side in sides)


# ---- settings

QUIET = dict(
    report_to="none",
    save_strategy="no",
    num_train_epochs=1,
    seed=0,
    disable_tqdm=True,
    use_cpu=True,
)


def settings_of(a: argparse.Namespace, rows: int) -> dict[str, Any]:
    "The preset; `rows` go through the model in one pass."
    settings = QUIET | dict(output_dir=tempfile.mkdtemp())
    if a.preset == "default":
        return settings
    return settings | dict(
        bf16=a.preset == "best_bf16",
        gradient_checkpointing=False,
        per_device_train_batch_size=a.rows or rows,
        gradient_accumulation_steps=max(1, a.batch // (a.rows or rows)),
        logging_steps=1000,
    )


def sorted_by_length(settings: dict, rows: list[dict], tokenizer) -> list[dict]:
    "Rows with their lengths, by which the best preset sorts."
    settings |= dict(train_sampling_strategy="group_by_length", remove_unused_columns=False)
    return [row | dict(length=length(tokenizer, row)) for row in rows]


# ---- trainers


def load(a: argparse.Namespace, kind: str = "CausalLM", **options):
    "A model in float32, and its tokenizer."
    import torch
    import transformers

    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        a.model, dtype=torch.float32, attn_implementation="sdpa", **options
    )
    return model, transformers.AutoTokenizer.from_pretrained(a.model)


def paired(a: argparse.Namespace, name: str, model, tokenizer, **more):
    "RewardTrainer or DPOTrainer."
    import trl
    from datasets import Dataset

    rows = read_pairs(a.pairs, a.n)
    settings = settings_of(a, rows=1)
    if a.preset != "default":
        rows = sorted_by_length(settings, rows, tokenizer)
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **more,
    )


def reward_model(a: argparse.Namespace):
    return paired(a, "Reward", *load(a, "SequenceClassification", num_labels=1))


def dpo(a: argparse.Namespace):
    return paired(a, "DPO", *load(a))


def lora_dpo(a: argparse.Namespace):
    "The adapters of ours: rank 64 on all linear layers; the reference is the model without."
    from peft import LoraConfig

    adapters = LoraConfig(
        r=64,
        lora_alpha=256,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return paired(a, "DPO", *load(a), peft_config=adapters)


def kto(a: argparse.Namespace):
    "TRL takes KTO's rows in order, so they are sorted here."
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    model, tokenizer = load(a)
    rows = single_answers(read_pairs(a.pairs, a.n))
    if a.preset != "default":
        rows.sort(key=lambda row: length(tokenizer, row))
    return KTOTrainer(
        model=model,
        args=KTOConfig(**settings_of(a, rows=2)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def sft(a: argparse.Namespace):
    "The loss is on completions alone. packed: TRL fills rows of max_length (best fit)."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(a)
    rows = chosen_only(read_pairs(a.pairs, a.n))
    settings = settings_of(a, rows=1)
    if a.preset == "packed":
        total = sum(length(tokenizer, row) for row in rows)
        steps = -(-a.n // a.batch)  # as many as ours
        share = max(1, round(total / steps / 1024))
        settings |= dict(packing=True, max_length=1024, gradient_accumulation_steps=share)
    elif a.preset != "default":
        rows = sorted_by_length(settings, rows, tokenizer)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


class Answers:
    "The answers of each prompt, given out in turn; their ids are made before anything starts."

    def __init__(self, file: str, n: int, tokenizer):
        self.scores: dict[str, list[float]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.completions: dict[str, list[list[int]]] = {}
        for row in json.load(open(file)):
            name = row["prompt_id"]
            if name not in self.prompts and len(self.prompts) == n:
                break
            asked = tokens_of(tokenizer, *row["prompt"], add_generation_prompt=True)
            said = tokens_of(tokenizer, *row["prompt"], *row["output"])
            self.prompts[name] = asked
            self.completions.setdefault(name, []).append(said[len(asked) :])
            self.scores.setdefault(name, []).append(row["reward"])

    def roll_out(self, names: list[str], trainer) -> dict[str, list]:
        "What TRL asks of a sampler, in the order of its prompts."
        seen: Counter = Counter()
        out: dict[str, list] = dict(prompt_ids=[], completion_ids=[], score=[])
        for name in names:
            number = seen[name]
            seen[name] += 1
            out["prompt_ids"].append(self.prompts[name])
            out["completion_ids"].append(self.completions[name][number])
            out["score"].append(self.scores[name][number])
        return out | dict(logprobs=None)


def given_score(prompts, completions, score, **_) -> list[float]:
    "The reward that the answer came with."
    return score


def grpo(a: argparse.Namespace):
    """Answers and scores are given (`rollout_func`), so nothing but the training is measured.
    TRL pads answers as it gets them from the sampler: best with one group at a time. Then no
    old policy is asked either. round: all answers first, as a round of ours has them.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load(a)
    answers = Answers(a.groups, a.n, tokenizer)
    group = len(next(iter(answers.scores.values())))
    rows = a.rows or 4
    settings = settings_of(a, rows=4)
    if a.preset != "default":
        at_once = a.n * group if a.preset == "round" else group
        settings["gradient_accumulation_steps"] = a.batch * group // rows
        settings["steps_per_generation"] = at_once // rows
    return GRPOTrainer(
        model=model,
        reward_funcs=[given_score],
        args=GRPOConfig(beta=0.1, num_generations=group, loss_type="bnpo", **settings),
        train_dataset=Dataset.from_list([dict(prompt=name) for name in answers.prompts]),
        processing_class=tokenizer,
        rollout_func=answers.roll_out,
    )


TRAINERS = dict(rm=reward_model, dpo=dpo, lora=lora_dpo, kto=kto, sft=sft, grpo=grpo)
# what one row of the data holds
UNITS = dict(rm=("pairs", 1), dpo=("pairs", 1), lora=("pairs", 1), kto=("answers", 2))
UNITS |= dict(sft=("answers", 1), grpo=("answers", 8))


def training(a: argparse.Namespace):
    trainer = TRAINERS[a.job](a)
    models = [trainer.model]
    if getattr(trainer, "ref_model", None) is not None:
        models.append(trainer.ref_model)
    warm(trainer.model)
    tokens = count_tokens(*models)
    meter = run_trainer(trainer)
    unit, times = UNITS[a.job]
    report(
        f"trl:{a.job}:{a.preset}",
        unit,
        a.n * times,
        meter,
        tokens=tokens[0],
        steps=trainer.state.global_step,
        loss=round(trainer.state.log_history[-1].get("train_loss", 0.0), 4),
    )


# ---- labelling


def talks_of(a: argparse.Namespace) -> list[list[dict]]:
    "The samples as conversations."
    samples = json.load(open(a.samples))[: a.n]
    return [sample["prompt"] + turn("assistant", sample["output"]) for sample in samples]


def padded_batches(a: argparse.Namespace, tokenizer, talks: list[list[dict]]):
    "As users write it: in the file's order, padded."
    for i in range(0, len(talks), BATCH):
        texts = []
        for talk in talks[i : i + BATCH]:
            texts.append(tokenizer.apply_chat_template(talk, tokenize=False))
        yield tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")


def score_in_batches(a: argparse.Namespace, model, tokenizer, talks: list[list[dict]]):
    for rows in padded_batches(a, tokenizer, talks):
        model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])


def predict(a: argparse.Namespace, model, tokenizer, talks: list[list[dict]]):
    "TRL's RewardTrainer; it takes pairs."
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    pairs = [dict(chosen=x, rejected=y) for x, y in zip(talks[::2], talks[1::2])]
    data = Dataset.from_list(pairs)
    precision = dict(bf16=False) if a.preset.endswith("fp32") else {}
    settings = dict(report_to="none", disable_tqdm=True, use_cpu=True) | precision
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(output_dir=tempfile.mkdtemp(), **settings),
        train_dataset=data.select([0]),
        processing_class=tokenizer,
    )
    trainer.predict(trainer._prepare_dataset(data, tokenizer, trainer.args, "predict"))


def labelling(a: argparse.Namespace):
    import torch

    model, tokenizer = load(a, "SequenceClassification", num_labels=1)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    talks = talks_of(a)
    with torch.no_grad():
        model.eval()(input_ids=torch.randint(5, 1000, (2, 64)))
    tokens, meter = count_tokens(model), Meter()
    way = score_in_batches if a.preset == "batch" else predict
    with meter, torch.no_grad():
        way(a, model, tokenizer, talks)
    name = f"transformers:label:{a.preset}"
    report(name, "samples", len(talks), meter, tokens=tokens[0])


def said_of_answer(tokenizer, talk: list[dict], ids, logits) -> float:
    "The answer's log-prob; row by row, as TRL does it, for memory."
    asked = len(tokens_of(tokenizer, *talk[:-1], add_generation_prompt=True))
    chosen = logits[:-1].gather(1, ids[1:, None])[:, 0]
    said = chosen - logits[:-1].logsumexp(-1)
    return float(said[asked - 1 :].sum())


def logps(a: argparse.Namespace):
    "Log-probs of the samples under a policy, in padded batches of 16."
    import torch

    model, tokenizer = load(a)
    tokenizer.padding_side = "right"
    talks = talks_of(a)
    with torch.no_grad():
        model.eval()(input_ids=torch.randint(5, 1000, (2, 64)))
    tokens, meter = count_tokens(model), Meter()
    found = []
    with meter, torch.no_grad():
        for i, rows in enumerate(padded_batches(a, tokenizer, talks)):
            ids, mask = rows["input_ids"], rows["attention_mask"]
            logits = model(input_ids=ids, attention_mask=mask).logits
            for row, talk in enumerate(talks[i * BATCH : (i + 1) * BATCH]):
                end = int(mask[row].sum())
                found.append(said_of_answer(tokenizer, talk, ids[row, :end], logits[row, :end]))
            del logits
    mean = round(sum(found) / len(found), 4)
    report("transformers:logps", "samples", len(talks), meter, tokens=tokens[0], mean=mean)


if __name__ == "__main__":
    a = arguments(
        __doc__,
        job="rm",
        preset="best_fp32",
        pairs="",
        groups="",
        samples="",
        batch=16,
        rows=0,
    )
    if a.job in TRAINERS:
        training(a)
    else:
        dict(label=labelling, logps=logps)[a.job](a)

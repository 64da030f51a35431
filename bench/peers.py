"""TRL and plain transformers at the same jobs, for a machine without ../shared/peers: runs in
an environment with trl 1.16, without halos_nb.

default: the settings TRL ships. best_fp32, best_bf16: no gradient checkpointing, pairs sorted
by length, one pair per forward pass and 16 per step, which is fastest on a CPU.
"""

import json, tempfile

from meter import Meter, arguments, count_tokens, report, run_trainer


def training(a):
    import torch, trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    turn = lambda role, text: [dict(role=role, content=text)]
    rows = [json.loads(line) for line in open(a.pairs)][: a.n]
    data = Dataset.from_list(
        [
            dict(
                prompt=turn("user", r["prompt"]),
                chosen=turn("assistant", r["chosen"]),
                rejected=turn("assistant", r["rejected"]),
            )
            for r in rows
        ]
    )
    tokenizer, kind = (
        AutoTokenizer.from_pretrained(a.model),
        dict(
            rm=("Reward", AutoModelForSequenceClassification, dict(num_labels=1)),
            dpo=("DPO", AutoModelForCausalLM, {}),
        )[a.job],
    )
    settings = dict(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        save_strategy="no",
        num_train_epochs=1,
        seed=0,
        disable_tqdm=True,
        use_cpu=True,
    )
    if a.preset != "default":
        size = lambda r: max(
            len(tokenizer.apply_chat_template(r["prompt"] + r[k], return_dict=False))
            for k in ("chosen", "rejected")
        )
        data = data.map(lambda r: dict(length=size(r)))
        settings |= dict(
            bf16=a.preset == "best_bf16",
            gradient_checkpointing=False,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=16,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            logging_steps=1000,
        )
    model = kind[1].from_pretrained(
        a.model, dtype=torch.float32, attn_implementation="sdpa", **kind[2]
    )
    trainer = getattr(trl, f"{kind[0]}Trainer")(
        model=model,
        args=getattr(trl, f"{kind[0]}Config")(**settings),
        train_dataset=data,
        processing_class=tokenizer,
    )
    reference = getattr(trainer, "ref_model", None)
    tokens = count_tokens(model, *([reference] if reference is not None else []))
    meter = run_trainer(trainer)
    report(
        f"trl:{a.job}:{a.preset}",
        "pairs",
        len(trainer.train_dataset),
        meter,
        tokens=tokens[0],
        steps=trainer.state.global_step,
    )


def labelling(a):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    samples, tokenizer = (
        json.load(open(a.samples))[: a.n],
        AutoTokenizer.from_pretrained(a.model),
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        a.model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    talks = [s["prompt"] + [dict(role="assistant", content=s["output"])] for s in samples]
    tokens, meter = count_tokens(model), Meter()
    if a.preset == "batch":
        with meter, torch.inference_mode():
            for i in range(0, len(talks), 16):
                rows = tokenizer(
                    [
                        tokenizer.apply_chat_template(t, tokenize=False)
                        for t in talks[i : i + 16]
                    ],
                    padding=True,
                    add_special_tokens=False,
                    return_tensors="pt",
                )
                model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    else:
        data = Dataset.from_list(
            [dict(chosen=x, rejected=y) for x, y in zip(talks[::2], talks[1::2])]
        )
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                output_dir=tempfile.mkdtemp(), report_to="none", disable_tqdm=True, use_cpu=True
            ),
            train_dataset=data.select([0]),
            processing_class=tokenizer,
        )
        with meter:
            trainer.predict(trainer._prepare_dataset(data, tokenizer, trainer.args, "predict"))
    report(f"transformers:label:{a.preset}", "samples", len(samples), meter, tokens=tokens[0])


if __name__ == "__main__":
    a = arguments(__doc__, job="rm", preset="best_fp32", pairs="", samples="")
    (labelling if a.job == "label" else training)(a)

"""Data and models for the measurements, the same every time: `python bench/inputs.py FOLDER`.

Texts are real preference records where ../shared/data holds them, else words drawn from a seed
with lengths like theirs. Only texts that fit `LONGEST` tokens
are kept, so that no side drops or cuts what the other computes. Models are small Llamas with
fresh weights: hidden 256, 4 layers, vocabulary 8k or 64k.
"""

import json, random, sys
from pathlib import Path

LONGEST, MAX_PAIRS, SHARED = 1000, 400, Path(__file__).resolve().parents[2] / "shared/data"


def real_texts():
    "Pairs (prompt, chosen, rejected) and groups of 8 samples of a prompt, from records."
    pairs, groups = [], {}
    for r in (
        r
        for k in ("train", "test")
        for r in json.loads((SHARED / f"pairs_{k}.json").read_text())
    ):
        a, b = r["output_A"][0]["content"], r["output_B"][0]["content"]
        pairs.append((r["prompt"][0]["content"], *((a, b) if r["label"] else (b, a))))
    for s in json.loads((SHARED / "samples.json").read_text()):
        groups.setdefault(s["prompt"][0]["content"], []).append(s["output"])
    return pairs, list(groups.items())


def drawn_texts():
    """The same of made-up words: prompts of about 40, answers of about 300 words, both with
    long tails; more than is kept, for many are too long.
    """
    rng = random.Random(0)
    words = [
        "".join(
            rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))
        )
        for _ in range(6000)
    ]

    def text(mean):
        return " ".join(
            words[min(int(rng.expovariate(1 / 400)), 5999)]
            for _ in range(max(4, int(rng.lognormvariate(0, 0.6) * mean)))
        )

    return [(text(40), text(300), text(300)) for _ in range(3 * MAX_PAIRS)], [
        (text(40), [text(300) for _ in range(8)]) for _ in range(400)
    ]


def longer_prompts(tokenizer, texts: list[str], n: int, k: int, answer: int = 200):
    "`n` prompts of 3 x `answer` tokens with `k` answers each, cut from these texts."
    ids = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    take = iter(range(0, len(ids) - 3 * answer, 3 * answer))
    piece = lambda m: tokenizer.decode(ids[(i := next(take)) : i + m]).strip()
    return [(piece(3 * answer), [piece(answer) for _ in range(k)]) for _ in range(n)]


def write_pairs(path: Path, rows):
    path.write_text(
        "".join(
            json.dumps(dict(prompt=p, chosen=c, rejected=r), ensure_ascii=False) + "\n"
            for p, c, r in rows
        )
    )


def write_samples(path: Path, groups):
    from halos_nb.records import prompt_id

    records = []
    for prompt, outputs in groups:
        turns = [dict(role="user", content=prompt)]
        records += [
            dict(
                prompt_id=prompt_id(turns),
                sample_id=i,
                prompt=turns,
                output=o,
                generator="bench",
                dataset="bench",
                split="test",
                type="sample",
            )
            for i, o in enumerate(outputs)
        ]
    path.write_text(json.dumps(records, ensure_ascii=False))


def save_models(folder: Path, tokenizer):
    """small and big (policies, vocabulary 8k and 64k), rm1 and rm2 (reward models of one and
    two logits).
    """
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification
    from halos_nb.models import small_llama

    small = small_llama(tokenizer, hidden_size=256, layers=4, heads=4, initializer_range=0.05)
    config, models = small.config, {"small": small}
    for name, model_class, change in (
        ("rm1", LlamaForSequenceClassification, dict(num_labels=1)),
        ("rm2", LlamaForSequenceClassification, dict(num_labels=2)),
        ("big", LlamaForCausalLM, dict(vocab_size=65536)),
    ):
        torch.manual_seed(1)
        models[name] = model_class(
            type(config)(
                **{
                    k: v
                    for k, v in config.to_dict().items()
                    if k not in ("id2label", "label2id")
                }
                | change
            )
        )
        if name != "big":
            models[name].model.load_state_dict(small.model.state_dict())
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_inputs(folder: Path):
    from halos_nb.templates import train_tokenizer

    pairs, groups = real_texts() if SHARED.is_dir() else drawn_texts()
    tokenizer = train_tokenizer([t for p in pairs for t in p], 8192)
    long = lambda *texts: len(tokenizer("\n".join(texts))["input_ids"]) > LONGEST
    pairs = [p for p in pairs if not long(p[0], p[1]) and not long(p[0], p[2])]
    groups = [(p, outputs) for p, outputs in groups if not any(long(p, o) for o in outputs)]
    random.Random(0).shuffle(pairs)
    answers = [c for _, c, _ in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder / "pairs.jsonl", pairs[:MAX_PAIRS])
    write_pairs(
        folder / "long_pairs.jsonl",
        [(p, c, r) for p, (c, r) in longer_prompts(tokenizer, answers, 64, 2)],
    )
    write_samples(folder / "samples.json", groups)
    write_samples(folder / "long_samples.json", longer_prompts(tokenizer, answers, 24, 8))
    save_models(folder, tokenizer)
    (folder / "source.txt").write_text(
        "real preference records" if SHARED.is_dir() else "made-up words"
    )


if __name__ == "__main__":
    make_inputs(Path(sys.argv[1]))

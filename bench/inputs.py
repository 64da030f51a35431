"""Data and models for the measurements, the same every time: `python bench/inputs.py FOLDER`;
with `--real MODEL` the data of the real one.

Texts are real preference records where ../shared/data holds them, else words drawn from a seed
with lengths like theirs. Only texts that fit `LONGEST` tokens are kept, so that no side drops
or cuts what the other computes. Models are small, with fresh weights: Llamas (hidden 256, 4
layers, vocabulary 8k or 64k) and a BERT like them.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

LONGEST = 1000  # tokens of a prompt and its answer
SHORT = 300  # the same, of the real model's
MAX_PAIRS = 400
LONGEST_ANSWER = 450  # of a group whose prompt is as long
MAX_GROUPS = 40  # of those
SHARED = Path(__file__).resolve().parents[2] / "shared/data"

Pair = tuple[str, str, str]  # prompt, chosen, rejected
Group = tuple[str, list[str]]  # prompt, answers
# what a folder of inputs holds when it is whole
SMALL_FILES = (
    "pairs.jsonl",
    "long_pairs.jsonl",
    "samples.json",
    "long_samples.json",
    "groups.json",
    "small",
    "big",
    "rm1",
    "rm2",
    "encoder1",
    "encoder2",
    "source.txt",
)
REAL_FILES = ("pairs.jsonl", "samples.json", "source.txt")


class Texts(NamedTuple):
    "What all is made of."

    pairs: list[Pair]
    groups: list[Group]


# ---- texts


def real_texts() -> Texts:
    "Pairs, and groups of 8 samples of a prompt, from records."
    pairs = []
    for kind in ("train", "test"):
        for row in json.loads((SHARED / f"pairs_{kind}.json").read_text()):
            answers = [row[key][0]["content"] for key in ("output_A", "output_B")]
            chosen, rejected = answers if row["label"] else answers[::-1]
            pairs.append((row["prompt"][0]["content"], chosen, rejected))
    groups: dict[str, list[str]] = {}
    for sample in json.loads((SHARED / "samples.json").read_text()):
        groups.setdefault(sample["prompt"][0]["content"], []).append(sample["output"])
    return Texts(pairs, list(groups.items()))


def drawn_words(rng: random.Random, n: int = 6000) -> list[str]:
    "Made-up words."
    words = []
    for _ in range(n):
        syllables = range(rng.randint(1, 4))
        words.append(
            "".join(rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in syllables)
        )
    return words


def drawn_texts() -> Texts:
    """The same of made-up words: prompts of about 40, answers of about 300 words, both with
    long tails; more than is kept, for many are too long.
    """
    rng = random.Random(0)
    words = drawn_words(rng)

    def text(mean: int) -> str:
        said = []
        for _ in range(max(4, int(rng.lognormvariate(0, 0.6) * mean))):
            said.append(words[min(int(rng.expovariate(1 / 400)), len(words) - 1)])
        return " ".join(said)

    pairs = [(text(40), text(300), text(300)) for _ in range(3 * MAX_PAIRS)]
    groups = [(text(40), [text(300) for _ in range(8)]) for _ in range(400)]
    return Texts(pairs, groups)


def texts() -> Texts:
    "Those of this machine."
    return real_texts() if SHARED.is_dir() else drawn_texts()


def source() -> str:
    "What they are, in words."
    return "real preference records" if SHARED.is_dir() else "made-up words"


# ---- those that fit, and longer prompts


def count(tokenizer, *parts: str) -> int:
    return len(tokenizer("\n".join(parts))["input_ids"])


def fitting(found: Texts, tokenizer, longest: int) -> Texts:
    "Pairs and groups of which no answer is too long, the pairs shuffled."

    def fits(prompt: str, answers: list[str]) -> bool:
        return all(count(tokenizer, prompt, answer) <= longest for answer in answers)

    pairs = [pair for pair in found.pairs if fits(pair[0], list(pair[1:]))]
    groups = [group for group in found.groups if fits(*group)]
    random.Random(0).shuffle(pairs)
    return Texts(pairs, groups)


class Pieces:
    "Cuts texts of a wished length from many, one after another."

    def __init__(self, tokenizer, sources: list[str]):
        self.tokenizer = tokenizer
        self.ids = tokenizer("\n".join(sources), add_special_tokens=False)["input_ids"]
        self.used = 0

    def take(self, tokens: int) -> str:
        piece = self.ids[self.used : self.used + tokens]
        if len(piece) < tokens:
            raise SystemExit("the texts are too few to be cut into prompts")
        self.used += tokens
        return self.tokenizer.decode(piece).strip()


def longer_prompts(pieces: Pieces, n: int, answers: int, size: int = 200) -> list[Group]:
    "Prompts three times as long as their answers."
    groups = []
    for _ in range(n):
        prompt = pieces.take(3 * size)
        groups.append((prompt, [pieces.take(size) for _ in range(answers)]))
    return groups


def equal_prompts(pieces: Pieces, tokenizer, groups: list[Group]) -> list[Group]:
    "The groups of no long answer, each behind a prompt as long as its mean answer."
    found = []
    for _, answers in groups:
        sizes = [count(tokenizer, answer) for answer in answers]
        if max(sizes) <= LONGEST_ANSWER:
            found.append((pieces.take(sum(sizes) // len(sizes)), answers))
        if len(found) == MAX_GROUPS:
            break
    return found


# ---- files


def write_pairs(path: Path, pairs: list[Pair]):
    lines = []
    for prompt, chosen, rejected in pairs:
        row = dict(prompt=prompt, chosen=chosen, rejected=rejected)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.write_text("".join(lines))


def as_sample(prompt: str, number: int, output: str) -> dict:
    "A record of a sample."
    from halos_nb.records import prompt_id

    turns = [dict(role="user", content=prompt)]
    return dict(
        prompt_id=prompt_id(turns),
        sample_id=number,
        prompt=turns,
        output=output,
        generator="bench",
        dataset="bench",
        split="test",
        type="sample",
    )


def write_samples(path: Path, groups: list[Group]):
    records = []
    for prompt, outputs in groups:
        records += [as_sample(prompt, i, output) for i, output in enumerate(outputs)]
    path.write_text(json.dumps(records, ensure_ascii=False))


def write_scored(path: Path, groups: list[Group]):
    "The samples with scores that are drawn: what an answer earns costs nothing here."
    rng = random.Random(0)
    records = []
    for prompt, outputs in groups:
        for i, output in enumerate(outputs):
            turns = [dict(role="assistant", content=output)]
            told = dict(output=turns, reward=rng.gauss(0, 1), type="scalar_feedback")
            records.append(as_sample(prompt, i, output) | told | dict(split="train"))
    path.write_text(json.dumps(records, ensure_ascii=False))


# ---- models


def changed(config: Any, **change: Any) -> Any:
    "A config of the same kind with other numbers."
    known = config.to_dict()
    for labels in ("id2label", "label2id"):
        known.pop(labels, None)
    return type(config)(**known | change)


def small_encoder(tokenizer, labels: int):
    "A BERT of the small Llama's size, with a head for scores."
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
            num_labels=labels,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save_models(folder: Path, tokenizer):
    """small and big (policies, vocabulary 8k and 64k); rm1 and rm2, encoder1 and encoder2
    (reward models of one and two logits).
    """
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification
    from halos_nb.models import small_llama

    small = small_llama(tokenizer, hidden_size=256, layers=4, heads=4, initializer_range=0.05)
    models: dict[str, Any] = dict(small=small)
    for labels in (1, 2):
        torch.manual_seed(1)
        scorer = LlamaForSequenceClassification(changed(small.config, num_labels=labels))
        scorer.model.load_state_dict(small.model.state_dict())
        models[f"rm{labels}"] = scorer
        models[f"encoder{labels}"] = small_encoder(tokenizer, labels)
    torch.manual_seed(1)
    models["big"] = LlamaForCausalLM(changed(small.config, vocab_size=65536))
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


# ---- all of it


def make_inputs(folder: Path):
    "For the small models."
    from halos_nb.templates import train_tokenizer

    found = texts()
    tokenizer = train_tokenizer([text for pair in found.pairs for text in pair], 8192)
    pairs, groups = fitting(found, tokenizer, LONGEST)
    chosen = [pair[1] for pair in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder / "pairs.jsonl", pairs[:MAX_PAIRS])
    long_pairs = longer_prompts(Pieces(tokenizer, chosen), 64, 2)
    write_pairs(folder / "long_pairs.jsonl", [(p, *answers) for p, answers in long_pairs])
    write_samples(folder / "samples.json", groups)
    long_groups = longer_prompts(Pieces(tokenizer, chosen), 24, 8)
    write_samples(folder / "long_samples.json", long_groups)
    equal = equal_prompts(Pieces(tokenizer, chosen), tokenizer, groups)
    write_scored(folder / "groups.json", equal)
    save_models(folder, tokenizer)
    (folder / "source.txt").write_text(source())


def make_real_inputs(folder: Path, model: str):
    "For a real model: short pairs, and samples 8 of a prompt."
    from halos_nb.models import load_tokenizer

    found = fitting(texts(), load_tokenizer(model), SHORT)
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder / "pairs.jsonl", found.pairs[:MAX_PAIRS])
    write_samples(folder / "samples.json", found.groups)
    told = f"{source()} of under {SHORT} tokens"
    (folder / "source.txt").write_text(told)


def is_whole(folder: Path, files: tuple[str, ...]) -> bool:
    "Whether all is there."
    return all((folder / name).exists() for name in files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--real", default="", help="a model's folder")
    a = parser.parse_args()
    if a.real:
        make_real_inputs(a.folder, a.real)
    else:
        make_inputs(a.folder)

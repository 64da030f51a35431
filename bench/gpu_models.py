"""Models and texts of `bench/gpu.py`: sizes, configs with fresh weights, a tokenizer made on
the spot, pairs and samples of made-up words.
"""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from inputs import Pieces, drawn_words, write_pairs, write_samples

STEP = 16  # pairs of an optimiser step


class Size(NamedTuple):
    "How large everything is."

    longest: int  # tokens of a prompt and its answer, the template's among them
    prompt: int  # tokens of a prompt of the middle
    answer: int  # and of an answer
    warm: int  # optimiser steps that are not measured: kernels are compiled in them
    steps: int  # and that are
    groups: int  # prompts with 8 samples each, to be scored
    asked: int  # prompts that are answered, 4 times each
    new: int  # tokens of an answer that is drawn, at most
    budgets: tuple[int, ...]  # tokens in one forward pass that ours tries
    rows: tuple[int, ...]  # pairs in one forward pass that TRL tries
    batches: tuple[int, ...]  # rows of a padded batch
    trees: int  # in the row whose attention is measured
    gemm: int  # width of the matrix product that is the ceiling


FULL = Size(
    longest=2048,
    prompt=600,
    answer=500,
    warm=3,
    steps=5,
    groups=48,
    asked=64,
    new=128,
    budgets=(16384, 4096),
    rows=(4, 8, 2),
    batches=(16, 64),
    trees=4,
    gemm=8192,
)
SMOKE = Size(
    longest=96,
    prompt=24,
    answer=20,
    warm=1,
    steps=1,
    groups=2,
    asked=2,
    new=4,
    budgets=(512,),
    rows=(8,),
    batches=(8,),
    trees=2,
    gemm=256,
)
MARGIN = 24  # tokens of a template, and what a text gains when its tokens are counted again


# ---- texts


def length(rng: random.Random, middle: int, most: int) -> int:
    "Of a text; some are far longer than the middle one."
    return min(max(4, int(rng.lognormvariate(0, 0.5) * middle)), most)


def group(rng: random.Random, pieces: Pieces, size: Size, answers: int) -> tuple:
    "A prompt and so many answers."
    asked = length(rng, size.prompt, size.longest // 2 - MARGIN)
    room = size.longest - asked - MARGIN
    said = [pieces.take(length(rng, size.answer, room)) for _ in range(answers)]
    return pieces.take(asked), said


def make_inputs(folder: Path, size: Size):
    "Tokenizer, pairs and samples; no weights."
    from halos_nb.templates import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = drawn_words(rng)
    pairs = STEP * (size.warm + size.steps)
    texts = 3 * pairs + 9 * size.groups
    needed = 2 * texts * max(size.prompt, size.answer)  # a word is a token or more
    drawn = [words[min(int(rng.expovariate(1 / 400)), 5999)] for _ in range(needed)]
    tokenizer = train_tokenizer([" ".join(drawn[:50_000])], 8192)
    tokenizer.save_pretrained(folder)
    pieces = Pieces(tokenizer, [" ".join(drawn)])
    found = [group(rng, pieces, size, 2) for _ in range(pairs)]
    write_pairs(folder / "pairs.jsonl", [(asked, *said) for asked, said in found])
    samples = [group(rng, pieces, size, 8) for _ in range(size.groups)]
    write_samples(folder / "samples.json", samples)


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- models


def llama(tokens: int, size: Size) -> Any:
    "0.6B weights, a vocabulary of 32k."
    from transformers import LlamaConfig

    if size is SMOKE:
        return LlamaConfig(vocab_size=tokens, **tiny(heads=2))
    return LlamaConfig(
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=12,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def gemma(tokens: int, size: Size) -> Any:
    "As Gemma 3 1B: windows of 512 in five layers of six, a vocabulary of 262k."
    from transformers import Gemma3TextConfig

    if size is SMOKE:
        layers = ["sliding_attention", "full_attention"]
        known = dict(sliding_window=16, layer_types=layers, query_pre_attn_scalar=16)
        return Gemma3TextConfig(vocab_size=tokens, **tiny(heads=2), **known)
    return Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        max_position_embeddings=4096,
    )


def tiny(heads: int) -> dict[str, Any]:
    "What configs of tests have in common."
    return dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )


KINDS = dict(llama=llama, gemma=gemma)


def config_of(kind: str, tokenizer: Any, size: Size) -> Any:
    "A config whose special tokens are the tokenizer's."
    config = KINDS[kind](len(tokenizer), size)
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.bos_token_id = None
    return config


def fresh(make: Any, config: Any, device: str, **options: Any) -> Any:
    "A model with weights drawn on the device, the same every time."
    import torch

    torch.manual_seed(0)
    with torch.device(device):
        return make.from_config(config, **options).to(device)

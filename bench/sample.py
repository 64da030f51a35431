"""Samples for the prompts of a pairs file, measured from token ids to token ids: ours, and
transformers' own `generate` with the same end tokens.

A model with fresh weights never ends an answer. Here `1 / mean` of its vocabulary are end
tokens, for both ways alike, so that answers end at all lengths
and are about `--mean` tokens long. Only tokens of answers count, not what is computed behind
their ends.
"""

import json

from meter import Meter, arguments, count_tokens, profiled, report


def draw_ours(batches, model, tokenizer, cfg):
    from halos_nb.generate import generate

    return [a for rows in batches for a in generate(rows, model, tokenizer, cfg)]


def draw_transformers(batches, model, tokenizer, cfg):
    """As transformers' users do it: prompts sorted by length, padded on the left,
    `num_return_sequences`.
    """
    import torch
    from transformers import GenerationConfig

    k, ends, pad, answers = (
        cfg.num_samples_per_prompt,
        model.generation_config.eos_token_id,
        tokenizer.pad_token_id,
        [],
    )
    settings = GenerationConfig(
        do_sample=True,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=0,
        max_new_tokens=cfg.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends,
        num_return_sequences=k,
    )
    torch.manual_seed(cfg.seed)
    for rows in batches:
        prompts = [r.ids for r in rows if r.sample_id == 0]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, generation_config=settings)[
                :, width:
            ].tolist()
        answers += [
            a[: next((i + 1 for i, t in enumerate(a) if t in ends), len(a))] for a in out
        ]
    return answers


def main():
    a = arguments(
        __doc__,
        pairs="",
        way="ours",
        samples=4,
        new=256,
        mean=100,
        batch=128,
        top_p=1.0,
        temperature=1.0,
    )
    if not a.pairs:
        raise SystemExit("--pairs: name a jsonl file with prompts")
    from collections import Counter
    from transformers import AutoModelForCausalLM
    from halos_nb.configs import SampleConfig
    from halos_nb.data import Example
    from halos_nb.generate import plan
    from halos_nb.models import load_policy, load_tokenizer
    from halos_nb.records import as_turns, prompt_id

    turns = [
        as_turns(p, "user")
        for p in dict.fromkeys(json.loads(line)["prompt"] for line in open(a.pairs))
    ][: a.n]
    tokenizer = load_tokenizer(a.model)
    model = (
        load_policy(a.model, a.precision)
        if a.way == "ours"
        else AutoModelForCausalLM.from_pretrained(a.model, dtype=a.precision)
    ).eval()
    model.generation_config.eos_token_id = list(range(100, 100 + len(tokenizer) // a.mean))
    cfg = SampleConfig(
        model=a.model,
        num_samples_per_prompt=a.samples,
        max_new_tokens=a.new,
        batch_size=a.batch,
        max_prompt_length=1024,
        top_p=a.top_p,
        temperature=a.temperature,
        precision=a.precision,
    )
    batches = plan([Example(t, prompt_id(t)) for t in turns], tokenizer, cfg, Counter())
    draw = dict(ours=draw_ours, transformers=draw_transformers)[a.way]
    draw(
        [b[: a.samples] for b in batches[-1:]],
        model,
        tokenizer,
        SampleConfig(model=a.model, num_samples_per_prompt=a.samples, max_new_tokens=4),
    )
    tokens, meter = count_tokens(model), Meter()
    with meter:
        answers = profiled(lambda: draw(batches, model, tokenizer, cfg), a.profile)
    drawn, read = (
        sum(map(len, answers)),
        sum(len(r.ids) for b in batches for r in b if r.sample_id == 0),
    )
    report(
        f"{a.way}:sample:{a.precision}",
        "new tokens",
        drawn,
        meter,
        tokens=tokens[0],
        needed=drawn + read,
        answers=len(answers),
        batch=a.batch,
        top_p=a.top_p,
    )


if __name__ == "__main__":
    main()

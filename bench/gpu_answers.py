"""Scores of 8 samples a prompt beside padded batches; answers that are drawn beside
transformers' `generate`. Weights are in the type that is computed in.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

from gpu_meter import Place, now, peak, peak_from_here, told
from gpu_models import config_of, fresh, read_lines
from meter import count_tokens


def measured(run: Callable[[], Any], place: Place) -> tuple[Any, dict]:
    "What a run gives, and its seconds and memory."
    peak_from_here(place)
    start = now(place)
    found = run()
    return found, dict(seconds=now(place) - start, peak_mb=peak(place))


# ---- scores


def scorer(tokenizer: Any, place: Place) -> Any:
    import torch

    from halos_nb.models import AutoModelForBradleyTerry

    config = config_of("llama", tokenizer, place.size)
    dtype = getattr(torch, place.half)
    return fresh(AutoModelForBradleyTerry, config, place.device, dtype=dtype).eval()


def ours_scores(samples: list[dict], model: Any, tokenizer: Any, budget: int, longest: int):
    "From records to scores."
    from halos_nb.score import score_samples

    said = score_samples(samples, model, tokenizer, max_length=longest, token_budget=budget)
    return [one.score for one in said]


def texts_of(samples: list[dict], tokenizer: Any) -> list[str]:
    talks = [x["prompt"] + [dict(role="assistant", content=x["output"])] for x in samples]
    return [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]


def padded_scores(samples: list[dict], model: Any, tokenizer: Any, batch: int, by_length: bool):
    "As users write it: padded on the right; the samples in their order, or longest first."
    import torch

    texts = texts_of(samples, tokenizer)
    order = list(range(len(texts)))
    if by_length:
        order.sort(key=lambda i: -len(texts[i]))
    found = {}
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        rows = tokenizer(
            [texts[i] for i in some],
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            said = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
        found |= dict(zip(some, said.logits[:, 1].float().tolist()))
    return [found[i] for i in range(len(texts))]


def needed(samples: list[dict], model: Any, tokenizer: Any, longest: int) -> dict:
    "Positions and operations of one pass."
    from collections import Counter

    import torch
    from work import Costs, Work

    from halos_nb.score import sample_trees

    work = Work()
    with torch.no_grad():
        work.add(Costs(model), sample_trees(samples, tokenizer, longest, Counter()).trees)
    return dict(needed=work.positions, operations=work.operations)


def layout_once(model: Any, longest: int) -> str:
    "The layout, chosen before the clock starts: scoring would choose again."
    from halos_nb import score

    layout = score.choose_layout(model, "auto", longest)
    score.choose_layout = lambda *_: layout
    return layout.name


def label(place: Place):
    from halos_nb.models import load_tokenizer

    case = "label llama"
    tokenizer = load_tokenizer(str(place.inputs))
    samples = json.loads((place.inputs / "samples.json").read_text())
    model = scorer(tokenizer, place)
    longest = place.size.longest
    layout = layout_once(model, longest)
    work = needed(samples, model, tokenizer, longest)
    ways = []
    for budget in place.size.budgets:
        ways.append(("halos_nb", f"budget {budget:,}", ours_scores, (budget, longest)))
    for batch in place.size.batches:
        ways.append(("padded batch", f"{batch} rows", padded_scores, (batch, False)))
        ways.append(("padded batch", f"{batch} rows by length", padded_scores, (batch, True)))
    tokens, first = count_tokens(model), None
    for side, variant, run, more in ways:
        if place.is_late():
            place.tell(case, side, variant=variant, error="no time was left")
            continue
        with told(place, case, side, variant=variant):
            run(samples, model, tokenizer, *more)  # kernels are compiled, memory is taken
            before = tokens[0]
            found, spent = measured(
                lambda r=run, m=more: r(samples, model, tokenizer, *m), place
            )
            first = first or found
            away = max(abs(a - b) for a, b in zip(found, first))
            place.tell(
                case,
                side,
                variant=variant,
                unit="samples",
                n=len(samples),
                per_s=len(samples) / spent["seconds"],
                positions=tokens[0] - before,
                off=away,
                layout=layout,
                **spent,
                **(work if side == "halos_nb" else {}),
            )


# ---- answers

EACH = 4  # answers to a prompt


def policy(tokenizer: Any, place: Place) -> Any:
    "With end tokens that a model which knows nothing says often enough."
    import torch
    from sample import ends_of
    from transformers import AutoModelForCausalLM

    config = config_of("llama", tokenizer, place.size)
    dtype = getattr(torch, place.half)
    model = fresh(AutoModelForCausalLM, config, place.device, dtype=dtype).eval()
    everything = range(config.vocab_size)
    model.generation_config.eos_token_id = ends_of(everything, 2 * place.size.new)
    return model


def sample(place: Place):
    from sample import prompts_of

    from halos_nb.models import TreePolicy, load_tokenizer, mix_in

    tokenizer = load_tokenizer(str(place.inputs))
    model = mix_in(policy(tokenizer, place), TreePolicy)
    some = place.inputs / "asked.jsonl"
    rows = read_lines(place.inputs / "pairs.jsonl")[: place.size.asked]
    some.write_text("".join(json.dumps(row) + "\n" for row in rows))
    a = argparse.Namespace(
        model=str(place.inputs),
        pairs=str(some),
        n=place.size.asked,
        samples=EACH,
        new=place.size.new,
        batch=EACH * place.size.asked,
        max_prompt_length=place.size.longest // 2,
        top_p=1.0,
        temperature=1.0,
        precision=place.half,
    )
    cfg, batches, prompts = prompts_of(a, tokenizer)
    draw_ours(place, model, tokenizer, cfg, batches)
    draw_theirs(place, model, tokenizer, a, prompts)


def tell_answers(place: Place, side: str, variant: str, answers: list[list[int]], spent: dict):
    drawn = sum(map(len, answers))
    place.tell(
        "sample llama",
        side,
        variant=variant,
        unit="new tokens",
        n=drawn,
        per_s=drawn / spent["seconds"],
        mean_length=round(drawn / len(answers), 1),
        **spent,
    )


def draw_ours(place: Place, model: Any, tokenizer: Any, cfg: Any, batches: list):
    from dataclasses import replace

    from halos_nb.generate import draw_answers

    def run() -> list[list[int]]:
        answers = []
        for rows in batches:
            answers += draw_answers(rows, model, tokenizer, cfg)
        return [answer.ids for answer in answers]

    rows = sum(map(len, batches))
    variant = f"batch {rows}"
    with told(place, "sample llama", "halos_nb", variant=variant):
        # which way is right for the model, up to the longest row, and the cache's memory
        draw_answers(batches[0][:EACH], model, tokenizer, replace(cfg, max_new_tokens=4))
        draw_answers(batches[0][:1], model, tokenizer, cfg)
        answers, spent = measured(run, place)
        tell_answers(place, "halos_nb", variant, answers, spent)


def draw_theirs(place: Place, model: Any, tokenizer: Any, a: Any, prompts: list[list[int]]):
    "All at once, and in four batches."
    from sample import generate_as_users_do

    ends = model.generation_config.eos_token_id
    pad = tokenizer.pad_token_id
    for batch in (EACH * len(prompts), max(EACH, len(prompts))):
        variant = f"batch {batch}"
        if place.is_late():
            place.tell("sample llama", "generate", variant=variant, error="no time was left")
            return

        def run(some=prompts, batch=batch):
            return generate_as_users_do(model, some, batch, a, ends, pad)

        with told(place, "sample llama", "generate", variant=variant):
            run(prompts[-1:])
            answers, spent = measured(run, place)
            tell_answers(place, "generate", variant, answers, spent)

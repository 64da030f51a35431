"""Scores of a reward model for all samples of a file, from records to scores; with --logps
their log-probs under a policy.
"""

import argparse
import json
from collections import Counter

from meter import Meter, arguments, count_tokens, profiled, report
from work import Costs, Work

LONGEST = 1024  # tokens of a prompt and its answer


def alone(samples: list[dict]) -> list[dict]:
    "Each sample with a prompt of its own."
    found = []
    for i, sample in enumerate(samples):
        prompt = f"{i:04d} {sample['prompt'][0]['content']}"
        found.append(sample | dict(prompt=[dict(role="user", content=prompt)]))
    return found


def default_budget(a: argparse.Namespace) -> int:
    "Tokens in one forward pass, as a user has it who says nothing."
    from halos_nb.configs import LabelConfig

    cfg = LabelConfig(samples_file="-", output_file="-", reward_model_path=a.model)
    return cfg.token_budget


def choose_once(model) -> str:
    """The layout, chosen before the clock starts: once a process, as loading is. Scoring is
    told it, for it would choose again.
    """
    from halos_nb import score

    layout = score.choose_layout(model, "auto", LONGEST)
    score.choose_layout = lambda *_: layout
    return layout.name


def said_of(samples: list[dict], model, tokenizer, budget: int, layout: str) -> list[float]:
    "The log-prob of each sample."
    import torch
    from halos_nb.score import micro_batches, sample_trees
    from halos_nb.trees import make_batch

    trees = sample_trees(samples, tokenizer, LONGEST, Counter()).trees
    said = [0.0] * len(samples)
    for some in micro_batches(trees, budget, layout):
        batch = make_batch(some, layout, tokenizer.pad_token_id or 0)
        with torch.inference_mode():
            sums = model(tree=batch).logps.sum(-1).tolist()
        numbers = [i for tree in some for i in tree.index]
        for i, value in zip(numbers, sums, strict=True):
            said[i] = value
    return said


def scores_of(samples: list[dict], model, tokenizer, budget: int, layout: str) -> list[float]:
    "The score of each sample."
    from halos_nb.score import score_samples

    scored = score_samples(samples, model, tokenizer, max_length=LONGEST, token_budget=budget)
    return [says.score for says in scored]


def needed_for(samples: list[dict], model, tokenizer) -> Work:
    "What one pass over them needs."
    import torch
    from halos_nb.score import sample_trees

    work = Work()
    with torch.no_grad():
        trees = sample_trees(samples, tokenizer, LONGEST, Counter()).trees
        work.add(Costs(model), trees)
    return work


def main():
    a = arguments(__doc__, samples="", token_budget=0, no_share=False, logps=False, scores="")
    if not a.samples:
        raise SystemExit("--samples: name a file of sample records")
    import torch
    from halos_nb.models import load_policy, load_reward_model, load_tokenizer

    samples = json.load(open(a.samples))[: a.n]
    if a.no_share:
        samples = alone(samples)
    load = load_policy if a.logps else load_reward_model
    model, tokenizer = load(a.model, a.precision).eval(), load_tokenizer(a.model)
    with torch.no_grad():
        model(input_ids=torch.randint(5, 1000, (2, 64)))
    budget = a.token_budget or default_budget(a)
    layout = choose_once(model)
    work = needed_for(samples, model, tokenizer)
    way = said_of if a.logps else scores_of
    tokens, meter = count_tokens(model), Meter()
    with meter, torch.no_grad():
        found = profiled(lambda: way(samples, model, tokenizer, budget, layout), a.profile)
    if a.scores:
        json.dump(found, open(a.scores, "w"))
    report(
        f"halos_nb:{'logps' if a.logps else 'label'}:{a.precision}",
        "samples",
        len(samples),
        meter,
        tokens=tokens[0],
        needed=work.positions,
        operations=work.operations,
        mean=round(sum(found) / len(found), 5),
        layout=layout,
        budget=budget,
    )


if __name__ == "__main__":
    main()

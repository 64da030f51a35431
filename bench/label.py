"""Scores of a reward model for all samples of a file, measured from records to scores."""

import json

from meter import Meter, arguments, count_tokens, profiled, report


def main():
    a = arguments(__doc__, samples="", token_budget=0, no_share=False, scores="")
    if not a.samples:
        raise SystemExit("--samples: name a file of sample records")
    from collections import Counter
    import torch
    from halos_nb.configs import LabelConfig
    from halos_nb.score import score_samples
    from halos_nb.models import load_reward_model, load_tokenizer

    samples, counts = json.load(open(a.samples))[: a.n], Counter()
    if a.no_share:
        samples = [
            s
            | {"prompt": [{"role": "user", "content": f"{i:04d} {s['prompt'][0]['content']}"}]}
            for i, s in enumerate(samples)
        ]
    model, tokenizer = load_reward_model(a.model, a.precision).eval(), load_tokenizer(a.model)
    with torch.no_grad():
        model(input_ids=torch.randint(5, 1000, (2, 64)))
    budget, tokens, meter = (
        a.token_budget
        or LabelConfig(
            samples_file="-", output_file="-", reward_model_path=a.model
        ).token_budget,
        count_tokens(model),
        Meter(),
    )
    with meter:
        scored = profiled(
            lambda: score_samples(
                samples, model, tokenizer, token_budget=budget, counts=counts
            ),
            a.profile,
        )
    scores = [x.score for x in scored]
    if a.scores:
        json.dump(scores, open(a.scores, "w"))
    report(
        f"halos_nb:label:{a.precision}",
        "samples",
        len(samples),
        meter,
        tokens=tokens[0],
        mean=round(sum(scores) / len(scores), 5),
        budget=budget,
        counts=dict(+counts),
    )


if __name__ == "__main__":
    main()

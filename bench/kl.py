"""Log-probs of samples under a reference, 8 of a prompt, measured from token ids to sums.

`--way ours` goes as `halos_nb.sample` does, in the layout that `choose_layout` finds or that
`--layout` names; `padded` as one does it with transformers alone, 16 rows at a time.
"""

import json

from meter import Meter, arguments, count_tokens, profiled, report


def rows_of(a, tokenizer):
    "Rows with their prompts, and the answers' tokens."
    from collections import Counter

    from halos_nb.data import Example
    from halos_nb.generate import Row
    from halos_nb.templates import encode_prompts

    samples = json.load(open(a.samples))[: a.n]
    prompts: dict[str, list[int]] = {}
    rows, answers = [], []
    for number, sample in enumerate(samples):
        name = sample["prompt_id"]
        if name not in prompts:
            encoded = encode_prompts(tokenizer, [sample["prompt"]], 1024, Counter())
            prompts[name] = encoded[0].ids
        example = Example(sample["prompt"], name)
        rows.append(Row(number, example, sample["sample_id"], prompts[name]))
        ids = tokenizer(sample["output"], add_special_tokens=False)["input_ids"]
        answers.append(ids[: a.new])
    return rows, answers


def score_padded(rows, answers, model, batch: int = 16) -> list[float]:
    "Rows padded to the longest of their batch, logits everywhere."
    import torch

    found = []
    for start in range(0, len(rows), batch):
        some = [*zip(rows, answers)][start : start + batch]
        width = max(len(row.ids) + len(answer) for row, answer in some)
        ids = torch.zeros(len(some), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for k, (row, answer) in enumerate(some):
            whole = torch.tensor(row.ids + answer)
            ids[k, : len(whole)] = whole
            mask[k, : len(whole)] = 1
        with torch.inference_mode():
            logps = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        for k, (row, answer) in enumerate(some):
            begin = len(row.ids) - 1
            said = logps[k, begin : begin + len(answer)]
            said = said.gather(1, torch.tensor(answer)[:, None])
            found.append(said.double().sum().item())
    return found


def main():
    a = arguments(__doc__, samples="", way="ours", layout="", new=256, token_budget=4096)
    if not a.samples:
        raise SystemExit("--samples: name a file of sample records")
    import torch

    from halos_nb.answers import answer_logps
    from halos_nb.layouts import choose_layout
    from halos_nb.models import load_reference, load_tokenizer

    tokenizer = load_tokenizer(a.model)
    model = load_reference(a.model, a.precision)
    rows, answers = rows_of(a, tokenizer)
    with torch.no_grad():
        model(input_ids=torch.randint(5, 1000, (2, 64)))
    longest = max(len(row.ids) + len(answer) for row, answer in zip(rows, answers))
    layout = a.layout or choose_layout(model, max_length=longest).name
    tokens, meter = count_tokens(model), Meter()

    def score():
        if a.way == "padded":
            return score_padded(rows, answers, model)
        return answer_logps(rows, answers, model, layout, a.token_budget)

    with meter:
        logps = profiled(score, a.profile)
    prompts = {row.example.prompt_id: len(row.ids) for row in rows}
    report(
        f"{a.way}:kl:{a.precision}",
        "samples",
        len(rows),
        meter,
        tokens=tokens[0],
        needed=sum(prompts.values()) + sum(map(len, answers)),
        layout=layout if a.way == "ours" else "padded batch of 16",
        logps=round(sum(logps), 3),
    )


if __name__ == "__main__":
    main()

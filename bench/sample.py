"""Samples for the prompts of a pairs file, measured from token ids to token ids.

One case is one JSON line: `--way ours`; `transformers`, its own `generate`, at each size of
`--batches` in turn, of which the fastest counts; `vllm`, in the Python of `make vllm`. With
`--compare` all of them run in turn, each in a process of its own, with one thread and with two,
and a table comes last.

A model with fresh weights never ends an answer. Here `1 / mean` of its vocabulary are end
tokens, for all ways alike, so that answers end at all lengths and are about `--mean` tokens
long; each line says how long they were. Only tokens of answers count, not what is computed
behind their ends. Ours keeps the log-probability of every token, the others keep none.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from meter import Meter, arguments, count_tokens, profiled, report

HERE = Path(__file__).resolve().parent
VLLM_PYTHON = HERE.parent / "build/vllm-venv/bin/python"
VLLM_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all of it in the process that is measured
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def ends_of(tokenizer, mean: int) -> list[int]:
    "So many end tokens that a model that knows nothing says about `mean` tokens."
    return list(range(100, 100 + len(tokenizer) // mean))


def until_end(answer: list[int], ends: set[int]) -> list[int]:
    "An answer up to its end token."
    for i, token in enumerate(answer):
        if token in ends:
            return answer[: i + 1]
    return answer


def prompts_of(a, tokenizer):
    "The rows to be drawn, in ours' batches; the prompts with their tokens, longest first."
    from collections import Counter

    from halos_nb.configs import SampleConfig
    from halos_nb.data import Example
    from halos_nb.generate import plan
    from halos_nb.records import as_turns, prompt_id

    cfg = SampleConfig(
        model=a.model,
        num_samples_per_prompt=a.samples,
        max_new_tokens=a.new,
        batch_size=a.batch,
        max_prompt_length=a.max_prompt_length,
        top_p=a.top_p,
        temperature=a.temperature,
        precision=a.precision,
    )
    texts = dict.fromkeys(json.loads(line)["prompt"] for line in open(a.pairs))
    turns = [as_turns(text, "user") for text in [*texts][: a.n]]
    batches = plan([Example(t, prompt_id(t)) for t in turns], tokenizer, cfg, Counter())
    rows = [row for batch in batches for row in batch]
    return cfg, batches, [row.ids for row in rows if row.sample_id == 0]


def measure_ours(a):
    from dataclasses import replace

    from halos_nb.generate import draw_answers
    from halos_nb.models import load_policy, load_tokenizer

    tokenizer = load_tokenizer(a.model)
    model = load_policy(a.model, a.precision).eval()
    model.generation_config.eos_token_id = ends_of(tokenizer, a.mean)
    cfg, batches, prompts = prompts_of(a, tokenizer)

    def draw():
        answers = []
        for rows in batches:
            answers += draw_answers(rows, model, tokenizer, cfg)
        return [answer.ids for answer in answers]

    # what a first call does once: which way is right for the model, up to the longest row
    draw_answers(batches[0][: a.samples], model, tokenizer, replace(cfg, max_new_tokens=4))
    draw_answers(batches[0][:1], model, tokenizer, cfg)
    tokens, meter = count_tokens(model), Meter()
    with meter:
        answers = profiled(draw, a.profile)
    tell(a, prompts, answers, meter, tokens=tokens[0], batch=a.batch)


def generate_as_users_do(model, prompts, batch: int, a, ends, pad):
    "Prompts sorted by length, padded on the left, `num_return_sequences`."
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True,
        temperature=a.temperature,
        top_p=a.top_p,
        top_k=0,
        max_new_tokens=a.new,
        pad_token_id=pad,
        eos_token_id=ends,
        num_return_sequences=a.samples,
    )
    torch.manual_seed(0)
    answers = []
    at_once = max(1, batch // a.samples)
    for start in range(0, len(prompts), at_once):
        some = prompts[start : start + at_once]
        width = max(map(len, some))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in some], device=model.device)
        real = [[0] * (width - len(p)) + [1] * len(p) for p in some]
        mask = torch.tensor(real, device=model.device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, generation_config=settings)
        answers += out[:, width:].tolist()
    known = set(ends)
    return [until_end(answer, known) for answer in answers]


def measure_transformers(a):
    from transformers import AutoModelForCausalLM

    from halos_nb.models import load_tokenizer

    tokenizer = load_tokenizer(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=a.precision).eval()
    ends = ends_of(tokenizer, a.mean)
    _, _, prompts = prompts_of(a, tokenizer)

    def draw(batch, some=prompts):
        return generate_as_users_do(model, some, batch, a, ends, tokenizer.pad_token_id)

    draw(1, prompts[-1:])
    tokens = count_tokens(model)
    found = []
    for batch in map(int, a.batches.split(",")):
        before, meter = tokens[0], Meter()
        with meter:
            answers = profiled(lambda batch=batch: draw(batch), a.profile)
        found.append((sum(map(len, answers)) / meter.cpu, batch, answers, meter))
        found[-1] += (tokens[0] - before,)
    _, batch, answers, meter, computed = max(found, key=lambda case: case[0])
    speeds = {str(case[1]): round(case[0], 1) for case in found}
    tell(a, prompts, answers, meter, tokens=computed, batch=batch, by_batch=speeds)


def measure_vllm(a):
    "In this process, which is vLLM's Python."
    os.environ |= VLLM_SETTINGS
    from vllm import LLM, SamplingParams

    from halos_nb.models import load_tokenizer

    tokenizer = load_tokenizer(a.model)
    _, _, prompts = prompts_of(a, tokenizer)
    llm = LLM(
        a.model,
        dtype=a.precision,
        max_model_len=a.max_prompt_length + a.new,
        generation_config="vllm",
        enforce_eager=a.eager,
        distributed_executor_backend="uni",
    )

    def draw(some, new):
        settings = SamplingParams(
            n=a.samples,
            temperature=a.temperature,
            top_p=a.top_p,
            max_tokens=new,
            stop_token_ids=ends_of(tokenizer, a.mean),
            ignore_eos=True,
            detokenize=False,
        )
        asked = [dict(prompt_token_ids=ids) for ids in some]
        said = llm.generate(asked, settings, use_tqdm=False)
        return [list(answer.token_ids) for one in said for answer in one.outputs]

    draw(prompts[-2:], 16)
    meter = Meter()
    with meter:
        answers = draw(prompts, a.new)
    tell(a, prompts, answers, meter, compiled=not a.eager)
    sys.stdout.flush()
    os._exit(0)  # its threads are many, and none of them holds anything


def tell(a, prompts, answers, meter, **more):
    "The JSON line of a case."
    drawn = sum(map(len, answers))
    report(
        f"{a.way}:sample:{a.precision}",
        "new tokens",
        drawn,
        meter,
        needed=drawn + sum(map(len, prompts)),
        answers=len(answers),
        mean_length=round(drawn / len(answers), 1),
        threads=a.threads,
        top_p=a.top_p,
        **more,
    )


def in_vllm_python():
    "This very call again, in the Python that has vLLM."
    python = os.environ.get("HALOS_NB_VLLM_PYTHON", str(VLLM_PYTHON))
    if not Path(python).exists():
        raise SystemExit(f"no vLLM at {python}: `make vllm` makes it")
    os.environ["PYTHONPATH"] = str(HERE.parent)
    os.execv(python, [python, *sys.argv])


def run_case(flags: list[str], way: str, threads: int) -> dict:
    "What a case says of itself, in a process of its own."
    command = [sys.executable, __file__, *flags, "--way", way, "--threads", str(threads)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return json.loads(lines[-1]) if lines else dict(error=done.stderr[-600:])


def table_of(results: list[list[dict]]) -> str:  # round by round, case by case
    "Medians, and how much faster ours is, within the rounds."
    head = ["threads", "way", "tokens per CPU s", "tokens per s", "ours faster by", "(wall)"]
    head += ["batch", "mean length", "peak MB", "positions / needed"]
    lines = [head, ["---"] * len(head)]
    for i, case in enumerate(results[0]):
        good = [one for one in results if "per_cpu_s" in one[i]]
        if not good:
            failed = case["error"].strip().splitlines()[-1][:90]
            lines.append([case["asked"][1], case["asked"][0], failed] + [""] * 7)
            continue
        way, threads = case["asked"]
        ours = [case["asked"] for case in results[0]].index(("ours", threads))

        def middle(key, i=i, good=good):
            return statistics.median(one[i][key] for one in good)

        def faster(key, i=i, ours=ours, good=good):
            both = [one for one in good if key in one[ours]]
            ratios = [one[ours][key] / one[i][key] for one in both]
            if not ratios or i == ours:
                return ""
            return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

        said = good[0][i]
        share = f"{said['tokens'] / said['needed']:.2f}" if "tokens" in said else ""
        lines.append(
            [threads, way, f"{middle('per_cpu_s'):.0f}", f"{middle('per_s'):.0f}"]
            + [faster("per_cpu_s"), faster("per_s"), said.get("batch", "")]
            + [f"{middle('mean_length'):.0f}", f"{middle('peak_rss_mb'):.0f}", share]
        )
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def compare(flags: list[str], rounds: int):
    "All ways in turn, forwards and backwards; each case's JSON line, and the table."
    cases = [(way, threads) for threads in (1, 2) for way in ("ours", "transformers", "vllm")]
    results = []
    for number in range(rounds):
        row = {}
        for case in cases[::-1] if number % 2 else cases:
            row[case] = run_case(flags, *case) | dict(asked=case, round=number)
            print(json.dumps(row[case]), flush=True)
        results.append([row[case] for case in cases])
    print(table_of(results))


def main():
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--compare", action="store_true")
    first.add_argument("--rounds", type=int, default=3)
    chosen, flags = first.parse_known_args()
    if chosen.compare:
        return compare(flags, chosen.rounds)
    a = arguments(
        __doc__,
        pairs="",
        way="ours",
        samples=4,
        new=256,
        mean=100,
        batch=128,
        batches="16,32,64,128",
        max_prompt_length=1024,
        top_p=1.0,
        temperature=1.0,
        eager=False,
    )
    if not a.pairs:
        raise SystemExit("--pairs: name a jsonl file with prompts")
    if a.way == "vllm" and find_spec("vllm") is None:
        return in_vllm_python()
    ways = dict(ours=measure_ours, transformers=measure_transformers, vllm=measure_vllm)
    ways[a.way](a)


if __name__ == "__main__":
    main()

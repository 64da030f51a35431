"""The benchmarks room beside the tools that it speaks of: lm-evaluation-harness, AlpacaEval and
RewardBench, on files made here. They live in a Python of their own (`make test-benchmarks`),
which fetches nothing once it is installed.
"""

import ast
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from halos_nb.benchmarks import SECTIONS, main
from halos_nb.configs import BenchmarkConfig
from halos_nb.evaluate import write_alpaca
from halos_nb.records import append_jsonl, as_turns, prompt_id, write_json
from halos_nb.stats import share_interval


def needs(name):
    "A test of one tool; it is skipped where that is not installed."
    why = f"no {name} here: `make test-benchmarks`"
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=why)


# ---- lm-evaluation-harness

SUMS = [(1, 2), (2, 2), (4, 3), (5, 1), (3, 3), (2, 6), (7, 1), (1, 1)]

TASK = """\
task: tiny_sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def sums_in(folder):
    "A task of the harness's own form: sums with two answers each."
    folder.mkdir()
    rows = []
    for i, (a, b) in enumerate(SUMS):
        choices = [str(a + b), str(a + b + 1)][:: 1 if i % 2 else -1]
        row = dict(question=f"{a} + {b} =", choices=choices, label=choices.index(str(a + b)))
        rows.append(row)
        append_jsonl(folder / "sums.jsonl", row)
    (folder / "tiny_sums.yaml").write_text(TASK.format(file=folder / "sums.jsonl"))
    return rows


def chosen_by_hand(folder, rows):
    "Which choice a model gives the higher log-probability, with plain transformers."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    picked = []
    for row in rows:
        asked = [dict(role="user", content=row["question"])]
        prompt = tok.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        before = tok(prompt, add_special_tokens=False).input_ids
        sums = []
        for choice in row["choices"]:
            after = tok(choice, add_special_tokens=False).input_ids
            ids = torch.tensor([before + after])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1)
            mine = logps[len(before) - 1 :].gather(1, torch.tensor(after)[:, None])
            sums.append(mine.sum().item())
        picked.append(sums.index(max(sums)))
    return picked


@needs("lm_eval")
def test_a_task_of_ones_own_is_asked_by_the_harness(tmp_path):
    from halos_nb.models import small_llama
    from halos_nb.templates import byte_tokenizer

    policy = tmp_path / "policy"
    tok = byte_tokenizer()
    small_llama(tok, hidden_size=32, initializer_range=0.3).save_pretrained(policy)
    tok.save_pretrained(policy)
    rows = sums_in(tmp_path / "tasks")
    cfg = BenchmarkConfig(
        output_file=str(tmp_path / "numbers.json"),
        tasks="tiny_sums",
        task_folder=str(tmp_path / "tasks"),
        model=str(policy),
        batch_size=2,
    )
    found = main(cfg)
    assert json.loads((tmp_path / "numbers.json").read_text()) == found
    picked = chosen_by_hand(policy, rows)
    share = sum(p == row["label"] for p, row in zip(picked, rows)) / len(rows)
    value, low, high = found["tasks"]["tiny_sums"]["acc"]
    assert value == pytest.approx(share)
    right = share_interval(share * len(rows), len(rows))
    assert (low, high) == pytest.approx(right[1:], abs=1e-5)


# ---- AlpacaEval

INSTRUCTIONS = 805  # of AlpacaEval's own set
JUDGE = """\
longer:
  prompt_template: "{folder}/prompt.txt"
  fn_completions: openai_completions
  completions_kwargs:
    model_name: toy
    max_tokens: 5
    temperature: 0
    num_procs: 1
    price_per_token: 0
    openai_api_keys: ["none"]
    openai_api_base: "{url}"
  completion_parser_kwargs:
    outputs_to_match:
      1: 'is \\(a\\)'
      2: 'is \\(b\\)'
  batch_size: 1
"""


@pytest.fixture
def gamed(tmp_path, monkeypatch):
    "The file that AlpacaEval's model of length has from the hub, made here, in a cache."
    from alpaca_eval import constants

    rng = np.random.default_rng(0)
    hard = rng.normal(size=INSTRUCTIONS)
    rows = []
    for model in ("concise", "verbose"):
        longer = rng.normal(1 if model == "verbose" else -1, 1, INSTRUCTIONS)
        won = rng.random(INSTRUCTIONS) < 1 / (1 + np.exp(-np.tanh(longer) - hard))
        columns = dict(model=model, index=range(INSTRUCTIONS), preference=won.astype(float))
        columns |= dict(std_delta_len=longer, instruction_difficulty=hard)
        rows.append(pd.DataFrame(columns | dict(not_gamed_baseline=False)))
    cache = tmp_path / "hub"
    data = cache / "datasets--tatsu-lab--alpaca_eval"
    (data / "refs").mkdir(parents=True)
    (data / "refs/main").write_text("0" * 40)
    (data / "snapshots" / ("0" * 40)).mkdir(parents=True)
    pd.concat(rows).to_csv(data / "snapshots" / ("0" * 40) / "df_gamed.csv", index=False)
    monkeypatch.setattr(constants, "DEFAULT_CACHE_DIR", str(cache))
    return cache


def answers_of(generator, words):
    "Samples of a policy: so many words to each question."
    rows = []
    for i, n in enumerate(words):
        prompt = as_turns(f"Question {i}?", "user")
        row = dict(prompt_id=prompt_id(prompt), sample_id=0, prompt=prompt, type="sample")
        row |= dict(output=" ".join(["word"] * int(n)), generator=generator)
        rows.append(row | dict(dataset="questions", split="test"))
    return rows


@needs("alpaca_eval")
def test_alpaca_eval_judges_our_files_and_its_rates_come_back(tmp_path, gamed):
    from alpaca_eval import evaluate
    from test_judge import Server

    rng = random.Random(0)
    n = 60
    theirs = answers_of("theirs", [rng.randint(5, 20) for _ in range(n)])
    ours = answers_of("ours", [rng.randint(8, 26) for _ in range(n)])
    for name, rows in (("ours", ours), ("theirs", theirs)):
        assert write_alpaca(str(tmp_path / f"{name}.json"), rows) == n
    (tmp_path / "judge").mkdir()
    said = "<|im_start|>user\n{instruction}|{output_1}|{output_2}\n<|im_end|>"
    (tmp_path / "judge/prompt.txt").write_text(said)

    def longer(body, times):
        "A judge that likes length, and is not always sure of it."
        _, first, second = body["messages"][-1]["content"].split("|")
        return "is (a)" if len(first) + rng.gauss(0, 20) > len(second) else "is (b)"

    with Server(longer) as server:
        config = JUDGE.format(folder=tmp_path / "judge", url=server.url)
        (tmp_path / "judge/configs.yaml").write_text(config)
        board, _ = evaluate(
            model_outputs=str(tmp_path / "ours.json"),
            reference_outputs=str(tmp_path / "theirs.json"),
            annotators_config=str(tmp_path / "judge/configs.yaml"),
            output_path=str(tmp_path / "results"),
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            metric_kwargs=dict(glm_name="length_controlled_minimal", save_weights_dir=None),
        )
    # AlpacaEval asks nobody about answers that are equal
    assert len(server.heard) == sum(a["output"] != b["output"] for a, b in zip(ours, theirs))
    [file] = (tmp_path / "results").rglob("annotations.json")
    cfg = BenchmarkConfig(
        output_file=str(tmp_path / "numbers.json"),
        alpaca_annotations=str(file),
        alpaca_glm="length_controlled_minimal",
    )
    found = main(cfg)["alpaca_eval"]
    told = board.loc["ours"]
    errors = dict(win_rate="standard_error", length_controlled_winrate="lc_standard_error")
    for name, error in errors.items():
        value, low, high = found[name]
        assert value * 100 == pytest.approx(told[name], abs=1e-3)
        if told[error] == 0:  # of the minimal model: none is known, not one of no width
            assert (low, high) == (None, None)
        else:
            assert (high - low) * 100 == pytest.approx(2 * 1.96 * told[error], abs=1e-3)
    # 1: theirs, 2: ours, 1.5: equal
    won = [row["preference"] - 1 for row in json.loads(file.read_text())]
    assert found["win_rate"][0] == pytest.approx(sum(won) / n, abs=1e-6)
    assert found["annotations"] == n
    # ours are longer, and the judge cares for nothing else
    even = found["length_controlled_winrate"][0]
    assert abs(even - 0.5) < abs(found["win_rate"][0] - 0.5)


@pytest.fixture
def annotated(tmp_path):
    "Annotations as AlpacaEval leaves them, of so many instructions."

    def make(n, **more):
        rng = random.Random(1)
        rows = []
        for i in range(n):
            both = ["a" * rng.randint(10, 40), "b" * rng.randint(10, 40)]
            row = dict(instruction=f"{i}?", output_1=both[0], output_2=both[1])
            row |= dict(generator_1="theirs", generator_2="ours", annotator="toy")
            rows.append(row | dict(preference=rng.choice([1.0, 2.0, 1.5])) | more)
        write_json(tmp_path / "annotations.json", rows)
        given = dict(alpaca_annotations=str(tmp_path / "annotations.json"))
        return BenchmarkConfig(output_file=str(tmp_path / "numbers.json"), **given)

    return make


@needs("alpaca_eval")
def test_how_hard_an_instruction_is_is_looked_up_by_its_place(annotated, gamed):
    found = main(annotated(INSTRUCTIONS))["alpaca_eval"]
    assert None not in found["length_controlled_winrate"]
    with pytest.raises(ValueError, match="60 annotations.*of 805.*length_controlled_minimal"):
        main(annotated(60))


@needs("alpaca_eval")
def test_a_file_that_the_hub_does_not_give_is_named(annotated, tmp_path, monkeypatch):
    from alpaca_eval import constants

    monkeypatch.setattr(constants, "DEFAULT_CACHE_DIR", str(tmp_path / "empty"))
    with pytest.raises(RuntimeError, match="alpaca_annotations: .*df_gamed.csv.*tatsu-lab"):
        main(annotated(INSTRUCTIONS))


# ---- RewardBench


def published():
    "RewardBench's own weights and the function that makes its sections of them."
    folder = Path(importlib.util.find_spec("rewardbench").origin).parent
    names: dict = {}
    exec((folder / "constants.py").read_text(), names)
    # the package imports a dozen others, so that one function is read by itself
    tree = ast.parse((folder / "utils.py").read_text())
    wanted = "calculate_scores_per_section"
    tree.body = [one for one in tree.body if getattr(one, "name", "") == wanted]
    exec(compile(tree, "utils.py", "exec"), names)
    return names


@needs("rewardbench")
def test_sections_are_those_of_rewardbench_itself(tmp_path, monkeypatch):
    theirs = published()
    sections = {name: list(subsets) for name, subsets in SECTIONS.items()}
    assert sections == theirs["SUBSET_MAPPING"]
    counts = theirs["EXAMPLE_COUNTS"]
    assert {k: n for one in SECTIONS.values() for k, n in one.items()} == counts
    # a labeller by rule, on a file of rows as they are published: more pairs of some subsets
    (tmp_path / "rules.py").write_text("def score(prompt, output):\n    return len(output)\n")
    monkeypatch.syspath_prepend(tmp_path)
    rng = random.Random(2)
    right: dict = {}
    for number in range(400):
        subset = rng.choice(list(counts))
        chosen, rejected = ("x" * rng.randint(1, 6) for _ in range(2))
        right.setdefault(subset, []).append(len(chosen) > len(rejected))
        row = dict(prompt=f"Question {number}?", chosen=chosen, chosen_model="a")
        row |= dict(rejected=rejected, rejected_model="b", subset=subset, id=number)
        append_jsonl(tmp_path / "bench.jsonl", row)
    cfg = BenchmarkConfig(
        output_file=str(tmp_path / "numbers.json"),
        rewardbench=str(tmp_path / "bench.jsonl"),
        function="rules:score",
    )
    found = main(cfg)["rewardbench"]
    accuracy = {subset: sum(one) / len(one) for subset, one in right.items()}
    scores = theirs["calculate_scores_per_section"](counts, sections, accuracy)
    for name, score in scores.items():
        assert found["sections"][name]["accuracy"][0] == pytest.approx(score, abs=1e-6)
    overall = sum(scores.values()) / len(scores)
    assert found["overall"][0] == pytest.approx(overall, abs=1e-6)
    assert found["ties"] > 0

"The measurements have what they measure on, also where the real records are not."

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import every
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from halos_nb.models import load_tokenizer
from halos_nb.trees import Tree, trees_from_samples

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import inputs
import jobs
import run
import tables
import work


@every
def test_made_up_words_are_enough_for_every_job(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "SHARED", tmp_path / "none")
    # of 8k and 64k words; they need no texts
    monkeypatch.setattr(inputs, "save_models", lambda folder, tokenizer: None)
    inputs.make_inputs(tmp_path / "out")
    read = lambda name: [
        json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()
    ]
    samples, long_samples = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("samples.json", "long_samples.json")
    )
    assert (len(read("pairs.jsonl")), len(read("long_pairs.jsonl")), len(long_samples)) == (
        inputs.MAX_PAIRS,
        64,
        24 * 8,
    )
    # what `bench/run.py` asks for, 8 of a prompt
    assert len(samples) >= 256 and len({s["prompt_id"] for s in samples}) * 8 == len(samples)
    assert (tmp_path / "out/source.txt").read_text() == "made-up words"
    with pytest.raises(FileNotFoundError):
        inputs.real_texts()


BENCH = Path(inputs.__file__).parent
WORDS = "Name a star that is far away, and say why it is. ".split(" ")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A tiny model, and two pairs and four samples of two prompts."
    from halos_nb.models import small_llama
    from halos_nb.templates import byte_tokenizer

    folder = tmp_path_factory.mktemp("bench")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    model = small_llama(tokenizer, hidden_size=16, layers=1, heads=2)
    model.resize_token_embeddings(1024)  # the meter warms up with tokens of a larger one
    model.save_pretrained(folder / "model")
    pairs, samples = [], []
    for i in range(2):
        prompt = " ".join(WORDS[i:])
        pairs.append(dict(prompt=prompt, chosen="Vega", rejected="Mars"))
        turns = [dict(role="user", content=prompt)]
        for k, said in enumerate(("Vega", "Mars")):
            row = dict(prompt_id=f"p{i}", sample_id=k, prompt=turns, output=said, type="sample")
            samples.append(row)
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    inputs.write_scored(
        folder / "groups.json", [(p["prompt"], ["Vega", "Mars"]) for p in pairs]
    )
    (folder / "pairs.jsonl").write_text(lines)
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


def run_command(script, folder, *more):
    "What a measurement says of itself, as `bench/run.py` reads it."
    command = [sys.executable, BENCH / script, "--model", folder / "model", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def forks():
    "Runs commands in copies of a process that has imported what they need."
    script = Path(__file__).parent / "forks.py"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, script], **pipes) as process:
        yield process


@pytest.fixture
def run_bench(forks, tmp_path):
    "As `run_command`, but nothing is imported again."

    def measured(script, folder, *more):
        command = [str(BENCH / script), "--model", str(folder / "model"), *map(str, more)]
        forks.stdin.write(json.dumps([command, str(tmp_path / "told")]) + "\n")
        forks.stdin.flush()
        code = forks.stdout.readline()
        assert code == "0\n", (code, (tmp_path / "told.err").read_text())
        return json.loads((tmp_path / "told.out").read_text().splitlines()[-1])

    return measured


@pytest.mark.parametrize("script", ["dpo.py", "reward_model.py"])
@pytest.mark.parametrize("more", [[], ["--no-share"]])
def test_training_is_measured(script, more, small, run_bench):
    told = run_bench(script, small, "--pairs", small / "pairs.jsonl", "--n", "2", *more)
    assert told["steps"] == 1 and (told["unit"], told["n"]) == ("pairs", 2)
    assert 0 < told["needed"] <= told["tokens"]


# (method, more of the command line): what is counted
METHODS = {("kto",): 4, ("ppo",): 4, ("sft",): 2, ("dpo", "--lora"): 2}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured(method, small, run_bench):
    loss, *more = method
    data = ["--pairs", small / "pairs.jsonl", "--n", "2", "--loss", loss]
    told = run_bench("training.py", small, *data, *more)
    assert told["n"] == METHODS[method]
    assert 0 < told["needed"] <= told["tokens"]
    assert told["operations"] > 0


def test_what_a_run_asks_before_its_first_step_is_counted(small, run_bench):
    "GRPO asks the policy about all answers first, beside the step and the reference."
    data = ["--groups", small / "groups.json", "--n", "2", "--loss", "grpo"]
    told = run_bench("training.py", small, *data, "--layout", "tree")
    tokenizer = load_tokenizer(small / "model")
    samples = json.loads((small / "samples.json").read_text())
    trees = trees_from_samples(samples, tokenizer, 1024, 512, Counter())
    assert told["old_policy"].startswith("pass") and told["n"] == 4
    # who scores reads the newline behind an end, who trains does not
    tokens = sum(tree.tokens - len(tree.branches) for tree in trees)
    assert told["needed"] == 3 * tokens


@pytest.mark.parametrize("more", [[], ["--logps"]])
def test_labelling_is_measured(more, small, run_bench):
    data = ["--samples", small / "samples.json", "--n", "4"]
    told = run_bench("label.py", small, *data, *more)
    assert 0 < told["needed"] <= told["tokens"]


@every
def test_sampling_is_measured(small, run_bench):
    flags = ["--pairs", small / "pairs.jsonl", "--n", "2", "--new", "4"]
    ours = run_bench("sample.py", small, *flags)
    assert ours["tokens"] > 0 and 0 < ours["mean_length"] <= 4
    theirs = run_bench("sample.py", small, *flags, "--way", "transformers", "--batches", "4,8")
    best = max(theirs["by_batch"].values())
    assert theirs["by_batch"][str(theirs["batch"])] == best
    assert theirs["answers"] == ours["answers"] == 8


WAYS = [[], ["--layout", "plain"], ["--way", "padded"]]


@pytest.mark.parametrize(
    "more", [pytest.param(w, marks=[every] * bool(w)) for w in WAYS], ids=str
)
def test_scoring_of_samples_is_measured(small, more, run_bench):
    told = run_command("kl.py", small, "--samples", small / "samples.json", *more)
    assert told["n"] == 4 and 0 < told["needed"] <= told["tokens"]
    assert told["logps"] == pytest.approx(
        run_bench("kl.py", small, "--samples", small / "samples.json")["logps"], abs=1e-3
    )


# ---- operations


def one_row(tokens, answer):
    "A tree of one branch, all of whose tokens are predicted."
    ids = list(range(5, 5 + tokens))
    return Tree(ids[:-answer], [ids[-answer:]], ["sample"], [0])


def tiny_policy(kind):
    "With attention that hides nothing from torch's counter."
    same = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attn_implementation="eager",
    )
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**same)).eval()
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**same, sliding_window=8, layer_types=layers)
    return Gemma3ForCausalLM(config).eval()


def operations_of(model, tokens, **more):
    "What torch counts in a forward pass over one row, each position seeing all others."
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.arange(5, 5 + tokens)[None], **more)
    return counter.get_total_flops()


def test_an_encoders_operations_are_those_that_torch_counts():
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        attn_implementation="eager",
    )
    model = BertForSequenceClassification(config).eval()
    tree = one_row(tokens=20, answer=6)
    costs = work.Costs(model)
    assert costs.positions(tree) == 20
    # pooler and head look at one position, which is little in a model with layers
    once = 2 * (16 * 16 + 16)
    assert costs.tree(tree).forward == operations_of(model, 20) + 19 * once


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_policys_operations_are_those_that_torch_counts(kind):
    model = tiny_policy(kind)
    tree = one_row(tokens=20, answer=6)
    found = work.Costs(model).tree(tree).forward
    counted = operations_of(model, 20, logits_to_keep=6)
    # torch counts the keys that a mask hides, too
    hidden = 0
    for layer in work.attention_layers(model):
        hidden += 4 * layer.width * (20 * 20 - work.seen_keys(tree, layer))
    assert hidden > 0 and found == counted - hidden


def test_a_window_hides_keys_of_the_branch_and_its_prompt():
    tree = one_row(tokens=20, answer=6)
    seen = [min(position + 1, 8) for position in range(20)]
    assert work.seen_keys(tree, work.Attention(1, 8, causal=True)) == sum(seen)
    two = Tree(tree.prompt_ids, tree.branches * 2, ["sample"] * 2, [0, 0])
    again = sum(seen) + sum(seen[14:])
    assert work.seen_keys(two, work.Attention(1, 8, causal=True)) == again


def test_a_frozen_weight_needs_no_gradient_of_its_own():
    model = tiny_policy("llama")
    tree = one_row(tokens=20, answer=6)
    trained = work.Costs(model).tree(tree)
    frozen = work.Costs(model.requires_grad_(False)).tree(tree)
    assert trained.backward == 2 * trained.forward
    attention = 4 * sum(
        layer.width * work.seen_keys(tree, layer) for layer in work.attention_layers(model)
    )
    assert frozen.backward == trained.forward + attention


# ---- tables


def test_ratios_are_taken_within_a_round():
    case = jobs.Case("peer", "x", peer=True, least=2.0, memory=0.6)
    mine = [result(10.0, 500), result(1.0, 500), dict(error="no")]
    theirs = [result(5.0, 1000), result(1.0, 1000), result(9.0, 1000)]
    row = tables.summary(case, mine, theirs, dict(float32=1e9))
    assert (row["low"], row["ratio"], row["high"]) == (1.0, 1.5, 2.0)
    assert row["memory"] == 0.5
    # 2e9 operations for 4 pairs, 1e9 in a second: they need 0.8 and 4 seconds
    assert row["share"] == pytest.approx(2 / 2.4)
    text = tables.markdown(dict(job=[tables.summary(case, mine, mine, dict(float32=1e9)), row]))
    assert "**1.50** (1.00 to 2.00) | 2, memory 0.6" in text


def result(rate, peak):
    "What a command says that did 4 pairs."
    return dict(
        n=4,
        unit="pairs",
        per_cpu_s=rate,
        per_s=rate,
        cpu_s=4 / rate,
        wall_s=4 / rate,
        peak_rss_mb=peak,
        tokens=20,
        needed=10,
        operations=2e9,
    )


def test_a_command_that_fails_is_told():
    case = jobs.Case("peer", "x", peer=True)
    row = tables.summary(case, [result(1.0, 1)], [dict(error="a\nlast words")], {})
    assert "failed: last words" in tables.markdown(dict(job=[row]))


@pytest.mark.parametrize("make", [jobs.small_jobs, jobs.real_jobs])
def test_every_script_of_every_job_is_there(make, tmp_path):
    more = [tmp_path / "model"] if make is jobs.real_jobs else []
    found = make(tmp_path, *more, 8)
    for cases in found.values():
        assert not cases[0].peer
        for case in cases:
            assert Path(case.command.split()[0]).is_file()


def test_bfloat16_is_left_out_and_told_where_nothing_multiplies_in_it(tmp_path, capsys):
    found = jobs.small_jobs(tmp_path, 8)
    whole = dict(float32=9e10, bfloat16=9e10)
    assert run.without_slow(found, whole) == found
    kept = run.without_slow(found, whole | dict(bfloat16=1e9))
    assert "DPO bf16" not in kept and "reward model bf16" not in kept
    assert [case.label for case in kept["KTO"]] == ["halos_nb", "TRL best settings"]
    assert all(case.precision != "bfloat16" for cases in kept.values() for case in cases)
    assert "left out" in capsys.readouterr().err and "DPO bf16" in found

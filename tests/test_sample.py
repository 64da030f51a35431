"Sampling: the policy's distribution, and the same samples whatever the batches and the processes."
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from halos_nb.batching import byte_tokenizer
from halos_nb.config import SampleConfig
from halos_nb.data import Example
from halos_nb.models import load_policy, load_reference
from halos_nb.records import as_turns, prompt_id, read_records
from halos_nb.sample import answer_logps, end_tokens, generate, main, merge, plan, sample, sample_batch, sample_share, shard

TWO = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
       "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
PROMPTS = [f"Say {'very ' * (i % 5)}{w}" for i, w in enumerate("red green blue grey pink gold teal".split())]


def examples(prompts): return [Example(t, prompt_id(t)) for t in (as_turns(p, "user") for p in prompts)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Folder of a random model that ends about one answer in ten at each token."
    folder, tok = tmp_path_factory.mktemp("models") / "tiny", byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                         initializer_range=0.1, pad_token_id=0, eos_token_id=2, bos_token_id=None))
    model.model.norm.weight.data *= 3
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(tiny): return load_policy(tiny).eval()


@pytest.fixture(scope="module")
def tok(): return byte_tokenizer()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 1.3, "top_p": 0.8}], ids=str)
def test_same_distribution_as_transformers(policy, tok, settings):
    "Frequencies of the second token against transformers' own sampling: two-sample chi-square over the common tokens."
    n, cfg = 4000, SampleConfig(model="tiny", num_samples_per_prompt=4000, batch_size=4000, max_new_tokens=2, **settings)
    [rows] = plan(examples(["Hi"]), tok, cfg, Counter())
    ours = torch.tensor([(a + a)[1] for a in generate(rows, policy, tok, cfg)]).bincount(minlength=len(tok))
    torch.manual_seed(0)
    theirs = policy.generate(torch.tensor([rows[0].ids]), attention_mask=torch.ones(1, len(rows[0].ids), dtype=torch.long), generation_config=GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=2, num_return_sequences=n, eos_token_id=2, pad_token_id=2, temperature=cfg.temperature, top_p=cfg.top_p))[:, -1].bincount(minlength=len(tok))
    often = ours + theirs >= 20
    x, degrees = ((ours - theirs)[often] ** 2 / (ours + theirs)[often]).sum().item(), int(often.sum())
    assert degrees > 5 and x < degrees + 5 * (2 * degrees) ** 0.5
    if cfg.top_p < 1: # one step inside the nucleus
        assert len({a[0] for a in generate(rows, policy, tok, cfg)}) < len({a[0] for a in generate(rows, policy, tok, replace(cfg, top_p=1.0))})


def test_same_samples_in_any_batch(policy, tok):
    texts = {}
    for size in (1, 3, 64):
        torch.manual_seed(size) # the global generator plays no part
        texts[size] = [s["output"] for s in sample(PROMPTS, policy, tok, num_samples_per_prompt=3, max_new_tokens=20, batch_size=size)]
    assert texts[1] == texts[3] == texts[64]
    assert len(set(texts[1])) > 15
    again = sample(PROMPTS[::-1][:2], policy, tok, num_samples_per_prompt=3, max_new_tokens=20) # among other prompts
    assert [s["output"] for s in again] == texts[1][-3:] + texts[1][-6:-3]
    assert [s["output"] for s in sample(PROMPTS, policy, tok, num_samples_per_prompt=3, max_new_tokens=20, seed=1)] != texts[1]


def test_longer_answers_begin_alike(policy, tok):
    "A larger max_new_tokens or more samples per prompt changes none of the samples already drawn."
    short = sample(PROMPTS[:2], policy, tok, num_samples_per_prompt=2, max_new_tokens=5)
    long = [s for s in sample(PROMPTS[:2], policy, tok, num_samples_per_prompt=4, max_new_tokens=30) if s["sample_id"] < 2]
    cfg = SampleConfig(model="tiny", num_samples_per_prompt=2, max_new_tokens=30)
    [rows] = plan(examples(PROMPTS[:2]), tok, cfg, Counter())
    ids = {r.number: a for r, a in zip(rows, generate(rows, policy, tok, cfg))}
    assert [s["output"] for s in short] == [tok.decode(ids[i][:5], skip_special_tokens=True) for i in range(4)]
    assert [s["output"] for s in long] == [tok.decode(ids[i], skip_special_tokens=True) for i in range(4)]


def test_ends_and_counts(policy, tok):
    "Finished, cut and empty answers; a pad token drawn in the middle is no end."
    counts = Counter()
    rows = sample(PROMPTS, policy, tok, counts=counts, num_samples_per_prompt=30, max_new_tokens=25)
    assert counts["samples"] == 210 and counts["outputs_cut"] == sum(not s["finished"] for s in rows) and 0 < counts["outputs_cut"] < 210
    assert counts["empty_outputs"] == sum(not s["output"] for s in rows)
    assert counts["outputs_with_special_tokens"] > 0 # 0 and 1 are special, too
    policy.generation_config.eos_token_id = [2, 77]
    try:
        assert end_tokens(policy, tok) == [2, 77]
        more = sample(PROMPTS, policy, tok, num_samples_per_prompt=30, max_new_tokens=25)
    finally: policy.generation_config.eos_token_id = 2
    assert sum(s["finished"] for s in more) > sum(s["finished"] for s in rows)


def test_pad_is_eos(policy):
    tok = byte_tokenizer()
    expected = sample(PROMPTS, policy, tok, max_new_tokens=20)
    tok.pad_token = tok.eos_token
    assert [s["output"] for s in sample(PROMPTS, policy, tok, max_new_tokens=20)] == [s["output"] for s in expected]


def test_template_marker_ends_an_answer(policy):
    "A base model's eos is not what its chat template writes behind an answer; both end one."
    tok = byte_tokenizer()
    tok.eos_token = "<|im_start|>"
    assert end_tokens(policy, tok) == [1, 2]


@pytest.mark.parametrize("layout", ["tree", "plain"])
def test_logps_by_hand(policy, tiny, tok, layout):
    cfg = SampleConfig(model="tiny", num_samples_per_prompt=4, max_new_tokens=15)
    [rows] = plan(examples(PROMPTS), tok, cfg, Counter())
    answers = generate(rows, policy, tok, cfg)
    assert any(a[-1] == 2 for a in answers) # the end token counts
    plain = LlamaForCausalLM.from_pretrained(tiny)
    for budget in (1, 200, 10_000):
        for r, a, lp in zip(rows, answers, answer_logps(rows, answers, policy, layout, budget)):
            with torch.no_grad(): table = plain(torch.tensor([r.ids + a])).logits[0].double().log_softmax(-1)
            assert lp == pytest.approx(table[len(r.ids) - 1:-1].gather(1, torch.tensor(a)[:, None]).sum().item(), abs=1e-3)


def test_kl_estimate_is_unbiased(policy, tiny, tok):
    "Answers of two tokens: the KL by the chain rule, computed over the whole vocabulary, against the mean over samples."
    other = load_reference(tiny)
    torch.manual_seed(1)
    for w in other.parameters(): w.data += 0.03 * torch.randn_like(w)
    rows = sample(["Hi"], policy, tok, reference=other, num_samples_per_prompt=6000, batch_size=3000, max_new_tokens=2)
    d = np.array([s["policy_logps"] - s["reference_logps"] for s in rows])
    ids = plan(examples(["Hi"]), tok, SampleConfig(model="tiny"), Counter())[0][0].ids
    def logs(m, x):
        with torch.no_grad(): return m(x).logits[:, -1].double().log_softmax(-1)
    first, then = torch.tensor([ids]), torch.tensor([ids + [t] for t in range(len(tok))])
    p, q, p2, q2 = logs(policy, first)[0], logs(other, first)[0], logs(policy, then), logs(other, then)
    after = (p2.exp() * (p2 - q2)).sum(1)
    after[2] = 0 # ended
    kl = (p.exp() * (p - q + after)).sum().item()
    assert kl > 0.02 and abs(d.mean() - kl) < 4 * d.std() / len(d) ** 0.5


@pytest.mark.parametrize("world", [1, 2, 3, 11])
def test_any_number_of_shares(policy, tok, tmp_path, world):
    "The processes' shares put together: also uneven ones, and ones without any batch; an old shard is in nobody's way."
    cfg = SampleConfig(model="tiny", num_samples_per_prompt=2, max_new_tokens=8, batch_size=3)
    batches = plan(examples(PROMPTS), tok, cfg, Counter()) # five batches
    path = tmp_path / "samples.json"
    shard(path, 0).write_text('{"number": 0, "left": "by a killed run"}\n')
    for rank in range(world): sample_share(batches, rank, world, path, lambda rows, counts: sample_batch(rows, policy, tok, cfg, counts, {}))
    merge(path, world, 14)
    assert [(s["prompt"][0]["content"], s["sample_id"]) for s in read_records(path, "sample")] == [(p, k) for p in PROMPTS for k in range(2)]
    assert [s["output"] for s in read_records(path)] == [s["output"] for s in sample(PROMPTS, policy, tok, num_samples_per_prompt=2, max_new_tokens=8, batch_size=3)]
    assert [p.name for p in tmp_path.iterdir()] == ["samples.json"]


def test_two_processes_write_the_same_file(tiny, tmp_path):
    "The command on two processes against one, byte for byte; five batches, so the shares are uneven."
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    settings = dict(model=str(tiny), datasets=[str(prompts)], num_prompts=20, num_samples_per_prompt=2, batch_size=3, max_new_tokens=10, reference=str(tiny), seed=3)
    one = main(SampleConfig(output_file=str(tmp_path / "one/samples.json"), num_processes=1, **settings))
    flags = [str(tiny), "--datasets", str(prompts), "--output_file", str(tmp_path / "two/samples.json"), "--reference", str(tiny), "--num_processes", "2"]
    for name in ("num_prompts", "num_samples_per_prompt", "batch_size", "max_new_tokens", "seed"): flags += [f"--{name}", str(settings[name])]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "HALOS_NB_PROGRESS": str(tmp_path / "progress.jsonl")}
    done = subprocess.run([sys.executable, *TWO, "-m", "halos_nb.sample", *flags], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two/samples.json").read_bytes() == (tmp_path / "one/samples.json").read_bytes()
    two = json.loads((tmp_path / "two/samples.counts.json").read_text())
    assert {k: v for k, v in two.items() if k != "seconds"} == {k: v for k, v in one.items() if k != "seconds"}
    assert (two["prompts_asked"], two["prompts"], two["prompts_left"], two["samples"]) == (20, 7, 0, 14)
    last = json.loads((tmp_path / "progress.jsonl").read_text().splitlines()[-1])
    assert (last["done"], last["total"], last["unit"]) == (14, 14, "samples") and last["tokens_per_second"] > 0

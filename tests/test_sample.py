"Sampling: the policy's distribution, the same samples in any batches and processes."

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import every, free_port, missing
from tiny_families import tiny_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MistralConfig,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from halos_nb.templates import byte_tokenizer
from halos_nb.configs import SampleConfig, config_json
from halos_nb.settings import parse_args
from halos_nb.data import Example
from halos_nb import generate as generation
from halos_nb.generate import (
    Row,
    draw_answers,
    draws,
    end_tokens,
    generate,
    has_stop,
    plan,
    way_to_draw,
)
from halos_nb.models import load_policy, load_reference, load_tokenizer
from halos_nb.records import as_turns, prompt_id, read_jsonl, read_records
from halos_nb.answers import answer_logps, merge, sample_share, shard
from halos_nb.backends import (
    ENGINE_SETTINGS,
    Question,
    Wishes,
    ask_for_sample,
    ask_for_samples,
    own_end_tokens,
    sample_seed,
)
from halos_nb.runs import kl_estimate
from halos_nb.sample import main, sample, sample_batch
from halos_nb.stats import kl_terms

TWO = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--num_cpu_threads_per_process",
    "1",
    "--main_process_port",
    "0",
]
PROMPTS = [
    f"Say {'very ' * (i % 5)}{w}"
    for i, w in enumerate("red green blue grey pink gold teal".split())
]


def examples(prompts):
    return [Example(t, prompt_id(t)) for t in (as_turns(p, "user") for p in prompts)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Folder of a random model that ends about one answer in ten at each token."
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tok = byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
        )
    )
    model.model.norm.weight.data *= 3
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(tiny):
    return load_policy(tiny).eval()


@pytest.fixture(scope="module")
def tok():
    return byte_tokenizer()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 1.3, "top_p": 0.8}],
    ids=str,
)
def test_same_distribution_as_transformers(policy, tok, settings):
    "Second tokens against transformers' own sampling: chi-square over the common tokens."
    n = 4000
    cfg = SampleConfig(
        model="tiny",
        num_samples_per_prompt=4000,
        batch_size=4000,
        max_new_tokens=2,
        **settings,
    )
    [rows] = plan(examples(["Hi"]), tok, cfg, Counter())
    ours = torch.tensor([(a + a)[1] for a in generate(rows, policy, tok, cfg)]).bincount(
        minlength=len(tok)
    )
    torch.manual_seed(0)
    theirs = policy.generate(
        torch.tensor([rows[0].ids]),
        attention_mask=torch.ones(1, len(rows[0].ids), dtype=torch.long),
        generation_config=GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=2,
            num_return_sequences=n,
            eos_token_id=2,
            pad_token_id=2,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
        ),
    )[:, -1].bincount(minlength=len(tok))
    often = ours + theirs >= 20
    x = ((ours - theirs)[often] ** 2 / (ours + theirs)[often]).sum().item()
    degrees = int(often.sum())
    assert degrees > 5
    assert x < degrees + 5 * (2 * degrees) ** 0.5
    if cfg.top_p < 1:  # one step inside the nucleus
        assert len({a[0] for a in generate(rows, policy, tok, cfg)}) < len(
            {a[0] for a in generate(rows, policy, tok, replace(cfg, top_p=1.0))}
        )


class InverseCDF(LogitsProcessor):
    "Leaves one token per row, the one its number points at: greedy search draws as we do."

    def __init__(self, u, width):
        self.u, self.width = u, width

    def __call__(self, input_ids, scores):
        cdf = scores.double().softmax(-1).cumsum(-1)
        token = torch.searchsorted(
            cdf, self.u[:, input_ids.shape[1] - self.width, None] * cdf[:, -1:], right=True
        )
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)


def plain_generate(rows, model, tok, cfg):
    "What transformers' own `generate` says with the same draws, nothing shared."
    width = max(len(r.ids) for r in rows)
    ends = end_tokens(model, tok)
    ids = torch.tensor([[0] * (width - len(r.ids)) + r.ids for r in rows])
    mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in rows])
    u = torch.from_numpy(
        np.stack(
            [
                draws(cfg.seed, r.example.prompt_id, r.sample_id, cfg.max_new_tokens)
                for r in rows
            ]
        )
    )
    warp = [TemperatureLogitsWarper(cfg.temperature)] * (cfg.temperature != 1) + [
        TopPLogitsWarper(cfg.top_p)
    ] * (cfg.top_p < 1)
    out = model.generate(
        ids,
        attention_mask=mask,
        logits_processor=[*warp, InverseCDF(u, width)],
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=cfg.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=0,
        ),
    )
    return [
        a[: next((i + 1 for i, t in enumerate(a) if t in ends), len(a))]
        for a in out[:, width:].tolist()
    ]


SMALL = dict(pad_token_id=0, eos_token_id=2, bos_token_id=None, initializer_range=0.3)
SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LAYERS = ["sliding_attention", "full_attention"]
KINDS = {
    "grouped heads": lambda n: LlamaConfig(vocab_size=n, **SIZES, **SMALL),
    "learned positions": lambda n: GPT2Config(
        vocab_size=n, n_embd=32, n_layer=2, n_head=2, n_positions=128, **SMALL
    ),
    "sliding window": lambda n: MistralConfig(vocab_size=n, sliding_window=7, **SIZES, **SMALL),
    "sliding and full": lambda n: Gemma3TextConfig(
        vocab_size=n,
        sliding_window=9,
        head_dim=8,
        layer_types=LAYERS,
        tie_word_embeddings=False,
        **SIZES,
        **SMALL,
    ),
}


def crossed(first, others):
    "A parameter with every kind of model; CI has the first with each, and the others with one."
    for kind in KINDS:
        for given in [first, *others]:
            ci = given == first or kind == "sliding window"
            yield pytest.param(kind, given, marks=[] if ci else every, id=f"{kind}-{given}")


@pytest.fixture
def kind(request, tok, tmp_path):
    "Folder of a random model of this kind."
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(KINDS[request.param](len(tok))).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "kind, settings",
    crossed({"temperature": 0.7, "top_p": 0.9}, [{}, {"temperature": 1.5, "seed": 3}]),
    indirect=["kind"],
)
def test_same_tokens_as_transformers(kind, tok, settings):
    "Rows left out, prompts read once and a cache of our own change no token."
    cfg = SampleConfig(model="tiny", num_samples_per_prompt=12, max_new_tokens=40, **settings)
    [rows] = plan(examples(PROMPTS), tok, cfg, Counter())
    ours = load_policy(kind).eval()
    theirs = AutoModelForCausalLM.from_pretrained(kind).eval()
    ours.generation_config.eos_token_id = theirs.generation_config.eos_token_id = list(
        range(2, 20)
    )
    expected = plain_generate(rows, theirs, tok, cfg)
    assert generate(rows, ours, tok, cfg) == expected
    ends = [len(a) for a in expected]
    assert len(set(ends)) > 10
    assert len({tuple(a) for a in expected}) > 40
    alone = [generate([r], ours, tok, cfg)[0] for r in rows[::9]]
    assert alone == expected[::9]


def chunked(folder, rows, tok, cfg, budget, monkeypatch):
    "Answers and counts when prompts are read in passes of so many tokens, and those passes."
    passes = []
    model = load_policy(folder).eval()
    model.generation_config.eos_token_id = list(range(2, 20))
    assert way_to_draw(model, len(rows[0].ids) + cfg.max_new_tokens, 0) == "cache"
    own = type(model).forward

    def forward(self, input_ids, **more):
        out = own(self, input_ids=input_ids, **more)
        passes.append((*input_ids.shape, out.logits.shape[1]))
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    read_as = generation.read_as
    monkeypatch.setattr(generation, "read_as", lambda *given: read_as(*given, budget))
    answers = draw_answers(rows, model, tok, cfg, counts := Counter())
    monkeypatch.undo()
    return answers, counts, passes


@pytest.mark.parametrize("kind, budget", crossed(40, [5, 97, 150]), indirect=["kind"])
def test_long_prompts_in_chunks_change_nothing(kind, tok, budget, monkeypatch):
    "Many prompts, some far beyond the budget and the window; no pass is larger than it."
    cfg = SampleConfig(
        model="tiny", num_samples_per_prompt=3, max_new_tokens=12, max_prompt_length=110
    )
    prompts = [*PROMPTS, *("Say " + "very " * n + "red" for n in (12, 15, 15))]
    [rows] = plan(examples(prompts), tok, cfg, Counter())
    lengths = sorted({len(r.ids) for r in rows})
    assert lengths[-1] > 100 > 2 * lengths[0]
    whole, one_pass, _ = chunked(kind, rows, tok, cfg, 10**6, monkeypatch)
    answers, counts, passes = chunked(kind, rows, tok, cfg, budget, monkeypatch)
    assert [a.ids for a in answers] == [a.ids for a in whole]
    for ours, theirs in zip(answers, whole):
        assert ours.logps == pytest.approx(theirs.logps, abs=1e-5)
    reading = passes[: 1 + max(i for i, (_, n, _) in enumerate(passes) if n > 1)]
    assert max(n * rows for rows, n, _ in reading) <= budget
    assert {logits for *_, logits in passes} == {1}
    assert counts["positions"] < one_pass["positions"]  # less is padded
    assert not counts[generation.LONG_WHOLE]


def test_long_prompts_that_cannot_go_in_chunks_are_told(tok, tmp_path, monkeypatch):
    "Jamba's recurrent layers begin anew with every pass: prompts whole, and counted."
    tiny_model("causal", "jamba", vocab_size=len(tok)).save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    prompts = ["Say red", "Say " + "very " * 9 + "blue"]
    lines = "".join(json.dumps({"prompt": p}) + "\n" for p in prompts)
    (tmp_path / "prompts.jsonl").write_text(lines)
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "progress.jsonl"))
    told = {}
    for budget in (10**6, 60):
        monkeypatch.setattr(generation.read_as, "__defaults__", (budget,))
        told[budget] = main(
            SampleConfig(
                model=str(tmp_path / "model"),
                datasets=[str(tmp_path / "prompts.jsonl")],
                output_file=str(tmp_path / f"{budget}.json"),
                num_samples_per_prompt=2,
                max_new_tokens=6,
                num_processes=1,
            )
        )
    assert generation.LONG_WHOLE not in told[10**6]
    assert told[60][generation.LONG_WHOLE] == 1
    texts = [[s["output"] for s in read_records(tmp_path / f"{b}.json")] for b in told]
    assert texts[0] == texts[1]


def test_work_is_for_answers_that_go_on(policy, tok):
    "Each prompt is read once, a row leaves soon after its end, the head sees one position."
    cfg = SampleConfig(
        model="tiny", num_samples_per_prompt=30, max_new_tokens=60, batch_size=300
    )
    seen = []
    [rows] = plan(examples(PROMPTS), tok, cfg, counts := Counter())
    assert way_to_draw(policy, len(rows[0].ids) + 60, 0) == "cache"  # asked once a model
    hook = policy.lm_head.register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape[:2])
    )
    try:
        answers = generate(rows, policy, tok, cfg, counts)
    finally:
        hook.remove()
    read = len(PROMPTS) * len(rows[0].ids)
    drawn = sum(map(len, answers))
    width = len(rows)
    assert (
        read + drawn - width
        <= counts["positions"]
        <= read + 1.15 * drawn
        < width * max(map(len, answers))
    )
    assert {n for _, n in seen} == {1}
    assert seen[0][0] == len(PROMPTS)
    assert sum(b for b, _ in seen[1:]) == counts["positions"] - read


def test_bfloat16_draws_from_its_own_distribution(tiny, tok):
    "First tokens against the softmax of its logits; the same batch gives the same tokens."
    model, n = load_policy(tiny, "bfloat16").eval(), 4000
    cfg = SampleConfig(
        model="tiny",
        num_samples_per_prompt=n,
        batch_size=n,
        max_new_tokens=2,
        precision="bfloat16",
    )
    [rows] = plan(examples(["Hi"]), tok, cfg, Counter())
    answers = generate(rows, model, tok, cfg)
    with torch.no_grad():
        expected = n * model(torch.tensor([rows[0].ids])).logits[0, -1].double().softmax(-1)
    found = torch.tensor([a[0] for a in answers]).bincount(minlength=len(tok))
    often = expected >= 5
    x = ((found - expected)[often] ** 2 / expected[often]).sum().item()
    degrees = int(often.sum()) - 1
    assert degrees > 5
    assert x < degrees + 5 * (2 * degrees) ** 0.5
    assert generate(rows, model, tok, cfg) == answers


def test_same_samples_in_any_batch(policy, tok):
    texts = {}
    for size in (1, 3, 64):
        torch.manual_seed(size)  # the global generator plays no part
        texts[size] = [
            s["output"]
            for s in sample(
                PROMPTS,
                policy,
                tok,
                num_samples_per_prompt=3,
                max_new_tokens=20,
                batch_size=size,
            )
        ]
    assert texts[1] == texts[3] == texts[64]
    assert len(set(texts[1])) > 15
    # among other prompts
    again = sample(PROMPTS[::-1][:2], policy, tok, num_samples_per_prompt=3, max_new_tokens=20)
    assert [s["output"] for s in again] == texts[1][-3:] + texts[1][-6:-3]
    assert [
        s["output"]
        for s in sample(
            PROMPTS, policy, tok, num_samples_per_prompt=3, max_new_tokens=20, seed=1
        )
    ] != texts[1]


def test_longer_answers_begin_alike(policy, tok):
    "A larger max_new_tokens or more samples changes none of the samples already drawn."
    short = sample(PROMPTS[:2], policy, tok, num_samples_per_prompt=2, max_new_tokens=5)
    long = [
        s
        for s in sample(PROMPTS[:2], policy, tok, num_samples_per_prompt=4, max_new_tokens=30)
        if s["sample_id"] < 2
    ]
    cfg = SampleConfig(model="tiny", num_samples_per_prompt=2, max_new_tokens=30)
    [rows] = plan(examples(PROMPTS[:2]), tok, cfg, Counter())
    ids = {r.number: a for r, a in zip(rows, generate(rows, policy, tok, cfg))}
    assert [s["output"] for s in short] == [
        tok.decode(ids[i][:5], skip_special_tokens=True) for i in range(4)
    ]
    assert [s["output"] for s in long] == [
        tok.decode(ids[i], skip_special_tokens=True) for i in range(4)
    ]


def test_ends_and_counts(policy, tok):
    "Finished, cut and empty answers; a pad token drawn in the middle is no end."
    counts = Counter()
    rows = sample(
        PROMPTS, policy, tok, counts=counts, num_samples_per_prompt=30, max_new_tokens=25
    )
    assert counts["samples"] == 210
    assert counts["outputs_cut"] == sum(not s["finished"] for s in rows)
    assert 0 < counts["outputs_cut"] < 210
    assert counts["empty_outputs"] == sum(not s["output"] for s in rows)
    assert counts["outputs_with_special_tokens"] > 0  # 0 and 1 are special, too
    policy.generation_config.eos_token_id = [2, 77]
    try:
        assert end_tokens(policy, tok) == [2, 77]
        more = sample(PROMPTS, policy, tok, num_samples_per_prompt=30, max_new_tokens=25)
    finally:
        policy.generation_config.eos_token_id = 2
    assert sum(s["finished"] for s in more) > sum(s["finished"] for s in rows)


def test_pad_is_eos(policy):
    tok = byte_tokenizer()
    expected = sample(PROMPTS, policy, tok, max_new_tokens=20)
    tok.pad_token = tok.eos_token
    assert [s["output"] for s in sample(PROMPTS, policy, tok, max_new_tokens=20)] == [
        s["output"] for s in expected
    ]


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
    assert any(a[-1] == 2 for a in answers)  # the end token counts
    plain = LlamaForCausalLM.from_pretrained(tiny)
    for budget in (1, 200, 10_000):
        for r, a, lp in zip(rows, answers, answer_logps(rows, answers, policy, layout, budget)):
            with torch.no_grad():
                table = plain(torch.tensor([r.ids + a])).logits[0].double().log_softmax(-1)
            assert lp == pytest.approx(
                table[len(r.ids) - 1 : -1].gather(1, torch.tensor(a)[:, None]).sum().item(),
                abs=1e-3,
            )


def test_kl_estimate_is_unbiased(policy, tiny, tok):
    "Answers of two tokens: the KL over the whole vocabulary against the mean over samples."
    other = load_reference(tiny)
    torch.manual_seed(1)
    for w in other.parameters():
        w.data += 0.03 * torch.randn_like(w)
    rows = sample(
        ["Hi"],
        policy,
        tok,
        reference=other,
        num_samples_per_prompt=6000,
        batch_size=3000,
        max_new_tokens=2,
    )
    d = np.array([s["policy_logps"] - s["reference_logps"] for s in rows])
    assert kl_terms(rows).tolist() == d.tolist()
    ids = plan(examples(["Hi"]), tok, SampleConfig(model="tiny"), Counter())[0][0].ids

    def logs(m, x):
        with torch.no_grad():
            return m(x).logits[:, -1].double().log_softmax(-1)

    first = torch.tensor([ids])
    then = torch.tensor([ids + [t] for t in range(len(tok))])
    p = logs(policy, first)[0]
    q = logs(other, first)[0]
    p2 = logs(policy, then)
    q2 = logs(other, then)
    after = (p2.exp() * (p2 - q2)).sum(1)
    after[2] = 0  # ended
    kl = (p.exp() * (p - q + after)).sum().item()
    assert kl > 0.02
    assert abs(d.mean() - kl) < 4 * d.std() / len(d) ** 0.5


@pytest.mark.parametrize("temperature, top_p", [(0.4, 1.0), (1.0, 0.5), (0.7, 0.8)])
def test_kl_of_what_was_drawn_from(policy, tiny, tok, temperature, top_p):
    """Tempered or cut: the KL of that very distribution, over all answers of two tokens. The
    policy's own log-ratio over the same answers is no KL of anything.
    """
    other = load_reference(tiny)
    torch.manual_seed(1)
    for w in other.parameters():
        w.data += 0.03 * torch.randn_like(w)
    rows = sample(
        ["Hi"],
        policy,
        tok,
        reference=other,
        num_samples_per_prompt=6000,
        batch_size=3000,
        max_new_tokens=2,
        temperature=temperature,
        top_p=top_p,
    )
    ids = plan(examples(["Hi"]), tok, SampleConfig(model="tiny"), Counter())[0][0].ids

    def drawn(x):  # by hand: the likeliest tokens until top_p is reached
        with torch.no_grad():
            p = (policy(x).logits[:, -1].double() / temperature).softmax(-1)
        ordered, places = p.sort(descending=True)
        kept = ordered.cumsum(-1) - ordered < top_p
        p = torch.zeros_like(p).scatter(-1, places, ordered * kept)
        return p / p.sum(-1, keepdim=True)

    def reference(x):
        with torch.no_grad():
            return other(x).logits[:, -1].double().log_softmax(-1)

    def divergence(p, q, after=0.0):
        return torch.where(p > 0, p * (p.log() - q + after), 0).sum(-1)

    first = torch.tensor([ids])
    then = torch.tensor([ids + [t] for t in range(len(tok))])
    after = divergence(drawn(then), reference(then))
    after[2] = 0  # ended
    kl = divergence(drawn(first), reference(first), after).item()
    terms = kl_terms(rows)
    assert np.isfinite(terms).all()
    assert abs(terms.mean() - kl) < 4 * terms.std() / len(terms) ** 0.5
    assert kl_estimate(rows) == pytest.approx(terms.mean())
    own = np.array([s["policy_logps"] - s["reference_logps"] for s in rows])
    assert abs(own.mean() - kl) > 20 * own.std() / len(own) ** 0.5
    # without the sampler's log-probs there is no estimate, rather than another number
    assert kl_estimate([s | dict(output_logps=None) for s in rows]) is None


@pytest.mark.parametrize("world", [1, 2, 3, 11])
def test_any_number_of_shares(policy, tok, tmp_path, world):
    "Shares put together: uneven ones and empty ones too; an old shard is in nobody's way."
    cfg = SampleConfig(model="tiny", num_samples_per_prompt=2, max_new_tokens=8, batch_size=3)
    batches = plan(examples(PROMPTS), tok, cfg, Counter())  # five batches
    path = tmp_path / "samples.json"
    shard(path, 0).write_text('{"number": 0, "left": "by a killed run"}\n')
    for rank in range(world):
        sample_share(
            batches,
            rank,
            world,
            path,
            lambda rows, counts: sample_batch(rows, policy, tok, cfg, counts, {}),
        )
    merge(path, world, 14)
    assert [
        (s["prompt"][0]["content"], s["sample_id"]) for s in read_records(path, "sample")
    ] == [(p, k) for p in PROMPTS for k in range(2)]
    assert [s["output"] for s in read_records(path)] == [
        s["output"]
        for s in sample(
            PROMPTS, policy, tok, num_samples_per_prompt=2, max_new_tokens=8, batch_size=3
        )
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["samples.json"]


def test_two_processes_write_the_same_file(tiny, tmp_path):
    "The command on two processes against one, byte for byte; the shares are uneven."
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    settings = dict(
        model=str(tiny),
        datasets=[str(prompts)],
        num_prompts=20,
        num_samples_per_prompt=2,
        batch_size=3,
        max_new_tokens=10,
        reference=str(tiny),
        seed=3,
    )
    one = main(
        SampleConfig(
            output_file=str(tmp_path / "one/samples.json"), num_processes=1, **settings
        )
    )
    flags = [
        str(tiny),
        "--datasets",
        str(prompts),
        "--output_file",
        str(tmp_path / "two/samples.json"),
        "--reference",
        str(tiny),
        "--num_processes",
        "2",
    ]
    for name in (
        "num_prompts",
        "num_samples_per_prompt",
        "batch_size",
        "max_new_tokens",
        "seed",
    ):
        flags += [f"--{name}", str(settings[name])]
    env = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "HALOS_NB_PROGRESS": str(tmp_path / "progress.jsonl"),
    }
    done = subprocess.run(
        [sys.executable, *TWO, "-m", "halos_nb.sample", *flags],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two/samples.json").read_bytes() == (
        tmp_path / "one/samples.json"
    ).read_bytes()
    two = json.loads((tmp_path / "two/samples.counts.json").read_text())
    assert {k: v for k, v in two.items() if k != "seconds"} == {
        k: v for k, v in one.items() if k != "seconds"
    }
    assert two["prompts_asked"] == 20
    assert two["prompts"] == 7
    assert two["prompts_left"] == 0
    assert two["samples"] == 14
    last = json.loads((tmp_path / "progress.jsonl").read_text().splitlines()[-1])
    assert last["done"] == 14
    assert last["total"] == 14
    assert last["unit"] == "samples"
    assert last["tokens_per_second"] > 0


# ---- stop strings


STOPS = ["e", "\\", "1 "]  # of which the random model has enough


def test_stop_cuts_what_would_be_said_anyway(policy, tok):
    "Each answer is what it is without stops, up to the first of them, in any batch."
    counts = Counter()
    settings = dict(num_samples_per_prompt=20, max_new_tokens=25, seed=2)
    free = sample(PROMPTS, policy, tok, **settings)
    for size in (1, 7, 200):
        stopped = sample(
            PROMPTS,
            policy,
            tok,
            counts=(counts := Counter()),
            batch_size=size,
            stop=STOPS,
            **settings,
        )
        assert [s["output"] for s in stopped] == [
            min((s["output"].split(x)[0] for x in STOPS), key=len) for s in free
        ]
        found = [any(x in s["output"] for x in STOPS) for s in free]
        assert counts["outputs_stopped"] == sum(found)
        assert 10 < sum(found) < 140
        assert [s["finished"] for s in stopped] == [
            s["finished"] or f for s, f in zip(free, found)
        ]
        assert counts["outputs_cut"] == sum(not s["finished"] for s in stopped)


def test_stop_keeps_the_tokens_until_it_is_complete(policy, tok):
    "Also a stop of several tokens; the log-probabilities are of just these tokens."
    cfg = SampleConfig(model="tiny", num_samples_per_prompt=40, max_new_tokens=30)
    [rows] = plan(examples(PROMPTS[:3]), tok, cfg, Counter())
    free = generate(rows, policy, tok, cfg)
    texts = [tok.decode(a, skip_special_tokens=True) for a in free]
    long = next(
        t[i : i + 4]
        for t in texts
        for i in range(3, len(t) - 4)
        if "\ufffd" not in t[i : i + 4]
    )
    stop = [long, "e"]
    stopped = generate(rows, policy, tok, replace(cfg, stop=stop))
    for a, b in zip(free, stopped):
        n = next(
            (
                n
                for n in range(len(a) + 1)
                if any(s in tok.decode(a[:n], skip_special_tokens=True) for s in stop)
            ),
            len(a),
        )
        assert b == a[:n]
    assert any(
        a != b and tok.decode(b, skip_special_tokens=True).endswith(long)
        for a, b in zip(free, stopped)
    )
    assert answer_logps(rows, stopped, policy, "plain") == pytest.approx(
        answer_logps(rows, stopped, policy, "tree"), abs=1e-3
    )


def test_without_stop_nothing_is_new(policy, tok):
    "No stop, in every way to say so, and one that nobody says: the same samples."
    one, *more = (
        sample(PROMPTS, policy, tok, max_new_tokens=20, stop=s)
        for s in ("", [], ",", "no such words are ever said")
    )
    assert all(m == one for m in more)
    assert has_stop(torch.tensor([[5, 6], [7, 8]]), [], tok).tolist() == [False, False]
    cfg = parse_args(SampleConfig, ["m", "--stop", ""])
    assert cfg.stop == []
    assert cfg == replace(cfg, stop=[])


# ---- which prompts, and what is written


def command(tiny, out, *more):
    return [
        str(tiny),
        "--output_file",
        str(out),
        "--max_new_tokens",
        "4",
        "--num_processes",
        "1",
        *map(str, more),
    ]


def test_flags_of_old_on_named_sets(tiny, tmp_path, monkeypatch):
    "The predecessor's command line, on one named set and on two sources, until they run out."
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "progress.jsonl"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "princeton-nlp/llama3-ultrafeedback-armorm").mkdir(parents=True)

    def turns(q, a):
        return [dict(role="user", content=q), dict(role="assistant", content=a)]

    questions = ["One?  Two spaces.", "Two?", "Three?", "Two?"]
    rows = [
        dict(
            prompt=q,
            prompt_id=str(i),
            all_generated_responses=["x", "y"],
            all_rm_scores=[0.1, 0.2],
            chosen=turns(q, "y"),
            rejected=turns(q, "x"),
        )
        for i, q in enumerate(questions)
    ]
    datasets.Dataset.from_list(rows).to_json(
        tmp_path / "princeton-nlp/llama3-ultrafeedback-armorm/train.jsonl"
    )
    (tmp_path / "more.jsonl").write_text(
        "".join(json.dumps(dict(prompt=p)) + "\n" for p in ("Three?", "Four?"))
    )
    flags = ["--num_samples_per_prompt", 4, "--num_prompts", 512, "--num_skip", 0]
    counts = main(
        parse_args(
            SampleConfig, command(tiny, "a.json", "--datasets", "ultrafeedback_armorm", *flags)
        )
    )
    written = read_records(tmp_path / "a.json", "sample")
    assert [(s["prompt"][0]["content"], s["sample_id"], s["dataset"]) for s in written] == [
        (q, k, "ultrafeedback_armorm_train") for q in questions[:3] for k in range(4)
    ]
    assert all(s["prompt_id"] == prompt_id(s["prompt"]) for s in written)
    assert len({s["prompt_id"] for s in written}) == 3
    assert counts["prompts_asked"] == 512
    assert counts["prompts"] == 3
    assert counts["prompts_left"] == 0
    assert counts["checkpoints"] == dict(
        model=f"{tiny}: no manifest, so only what can be seen was checked"
    )
    assert "template" not in counts, "nothing is odd about it"
    both = ["--datasets", "ultrafeedback_armorm", "more.jsonl"]
    main(
        parse_args(
            SampleConfig, command(tiny, "b.json", *both, "--num_skip", 1, "--num_prompts", 2)
        )
    )
    assert [s["prompt"][0]["content"] for s in read_records(tmp_path / "b.json")] == [
        "Two?",
        "Three?",
    ]
    main(
        parse_args(
            SampleConfig, command(tiny, "c.json", *both, "--num_skip", 3, "--num_prompts", 2)
        )
    )
    assert [
        (s["prompt"][0]["content"], s["dataset"]) for s in read_records(tmp_path / "c.json")
    ] == [("Four?", "more_train")]
    with pytest.raises(ValueError, match="prompts ran out"):
        main(parse_args(SampleConfig, command(tiny, "d.json", *both, "--num_skip", 4)))


def test_what_alpacaeval_reads(tiny, prompts, tmp_path):
    """What AlpacaEval does with a file of outputs, in pandas.

    One generator, joined by instruction, duplicate rows dropped (a list in a row ends that).
    """
    import pandas as pd

    out = tmp_path / "outputs.json"
    main(
        parse_args(
            SampleConfig,
            command(
                tiny, out, "--datasets", prompts, "--mode", "alpacaeval", "--reference", tiny
            ),
        )
    )
    ours = pd.read_json(out)
    assert {"instruction", "output", "generator", "dataset"} <= set(ours.columns)
    assert ours["generator"].nunique() == 1
    reference = pd.DataFrame(
        [dict(instruction=p, output="x", generator="other", dataset="y") for p in PROMPTS[::-1]]
    )
    joined = pd.merge(
        reference, ours, on=["instruction"], suffixes=("_1", "_2")
    ).drop_duplicates()
    assert len(joined) == len(ours) == len(PROMPTS)
    assert ours["output"].map(type).eq(str).all()
    full = read_records(tmp_path / "outputs.samples.json", "sample")  # and for our own stages
    assert [s["output"] for s in full] == list(ours["output"])
    assert [s["prompt"][0]["content"] for s in full] == PROMPTS


# ---- vLLM on several GPUs, which are not at hand (tests/test_vllm.py runs the real one on a
# CPU). This package stands in its place; it has the names and signatures that were found in
# vLLM 0.32 (LLM, LLM.generate, SamplingParams, EngineArgs, RequestOutput) and refuses others,
# notes how it was used, and says random letters by each request's seed.


PLATFORM = """
class current_platform:
    is_cpu = staticmethod(lambda: False)
"""
VLLM = """
import json, os, random
from dataclasses import dataclass
from types import SimpleNamespace

@dataclass
class EngineArgs:
    logprobs_mode: str = "raw_logprobs"

@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list
    logprobs: list | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list
    outputs: list

class LLM:
    def __init__(
        self, model, *, tokenizer=None, trust_remote_code=False, tensor_parallel_size=1,
        dtype="auto", seed=None, gpu_memory_utilization=0.9, **engine_args,
    ):
        from transformers import AutoTokenizer
        known = {"max_model_len", "generation_config", "logprobs_mode"}
        assert set(engine_args) <= known | {"distributed_executor_backend"}, engine_args
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self.llm_engine = SimpleNamespace(engine_core=self)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.most = engine_args["max_model_len"]
        self.note(
            model=model, tensor_parallel_size=tensor_parallel_size, dtype=dtype,
            gpu_memory_utilization=gpu_memory_utilization, **engine_args,
        )

    def shutdown(self):
        self.note(shutdown=True)

    def note(self, **what):
        here = dict(pid=os.getpid(), gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
        with open(os.environ["STAND_IN_LOG"], "a") as f:
            f.write(json.dumps(what | here) + "\\n")

    def say(self, rng, s):
        if rng.random() < 0.1:
            return s.stop_token_ids[0]
        return self.tokenizer.encode(rng.choice("abcdefgh"), add_special_tokens=False)[0]

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert len(prompts) == len(sampling_params)
        out = []
        for i, (p, s) in enumerate(zip(prompts, sampling_params)):
            asked = p["prompt_token_ids"]
            assert s.n == 1
            assert 0 < s.top_p <= 1
            assert s.detokenize or not s.stop
            assert s.ignore_eos
            assert len(asked) + s.max_tokens <= self.most
            self.note(prompt_token_ids=asked, **vars(s))
            rng, ids, why = random.Random(f"{s.seed} {asked}"), [], "length"
            while len(ids) < s.max_tokens and why == "length":
                ids.append(self.say(rng, s))
                text = self.tokenizer.decode(ids)
                if ids[-1] in s.stop_token_ids or any(x in text for x in s.stop or []):
                    why = "stop"
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            steps = [{token: SimpleNamespace(logprob=-1.5)} for token in ids]
            reply = CompletionOutput(0, text, ids, None if s.logprobs is None else steps, why)
            out.append(RequestOutput(str(i), None, asked, [reply]))
        return out
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    "The stand-in, to be imported here and in processes started from here, and its log."
    (tmp_path / "modules/vllm").mkdir(parents=True)
    (tmp_path / "modules/vllm/__init__.py").write_text(VLLM)
    (tmp_path / "modules/vllm/platforms.py").write_text(PLATFORM)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join(
            filter(None, [str(tmp_path / "modules"), os.environ.get("PYTHONPATH")])
        ),
    )
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "vllm.log"))
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "progress.jsonl"))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", *ENGINE_SETTINGS):
        monkeypatch.setenv(name, "0")  # so that they are as before behind the test
    yield lambda: [json.loads(x) for x in (tmp_path / "vllm.log").read_text().splitlines()]
    sys.modules.pop("vllm", None)
    sys.modules.pop("vllm.platforms", None)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return path


@pytest.fixture(scope="module")
def with_bos(tiny, tmp_path_factory):
    "A tokenizer like Llama's: its chat template writes a BOS, and so does it itself."
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path_factory.mktemp("models") / "bos"
    tok = byte_tokenizer()
    shutil.copytree(tiny, folder)
    tok.add_special_tokens({"bos_token": "<s>"})
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tok.bos_token_id)]
    )
    tok.chat_template = "{{ bos_token }}" + tok.chat_template
    tok.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tok))
    model.save_pretrained(folder)
    return folder


def test_vllm_gets_what_it_should(with_bos, prompts, tmp_path, stand_in):
    """Prompt ids with one BOS, parameters, a seed per sample, order, records and counts.

    With a stand-in: the real vLLM was not run.
    """
    out = tmp_path / "out/samples.json"
    tok = load_tokenizer(with_bos)
    cfg = SampleConfig(
        model=str(with_bos),
        backend="vllm",
        datasets=[str(prompts)],
        output_file=str(out),
        num_samples_per_prompt=3,
        num_prompts=20,
        batch_size=4,
        max_new_tokens=9,
        temperature=0.7,
        top_p=0.9,
        stop=["ab", "c"],
        seed=5,
        gpu_memory_utilization=0.5,
        precision="bfloat16",
        max_prompt_length=200,
    )
    counts = main(cfg)
    engine, *requests = stand_in()
    assert {k: v for k, v in engine.items() if k not in ("pid", "gpus")} == dict(
        model=str(with_bos),
        tensor_parallel_size=1,
        dtype="bfloat16",
        gpu_memory_utilization=0.5,
        max_model_len=209,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        distributed_executor_backend="uni",
    )
    text = tok.apply_chat_template(
        as_turns(PROMPTS[0], "user"), tokenize=False, add_generation_prompt=True
    )
    # what one gets who hands over the text
    assert tok(text)["input_ids"].count(tok.bos_token_id) == 2
    expected = {
        tuple(
            tok(
                tok.apply_chat_template(
                    as_turns(p, "user"), tokenize=False, add_generation_prompt=True
                ),
                add_special_tokens=False,
            )["input_ids"]
        ): p
        for p in PROMPTS
    }
    assert all(
        ids.count(tok.bos_token_id) == 1 and ids[0] == tok.bos_token_id for ids in expected
    )
    assert Counter(expected[tuple(r["prompt_token_ids"])] for r in requests) == dict.fromkeys(
        PROMPTS, 3
    )
    for r in requests:
        assert r["n"] == 1
        assert r["temperature"] == 0.7
        assert r["top_p"] == 0.9
        assert r["max_tokens"] == 9
        assert r["stop"] == ["ab", "c"]
        assert r["stop_token_ids"] == [2]
    seeds = {(expected[tuple(r["prompt_token_ids"])], r["seed"]) for r in requests}
    assert seeds == {
        (p, sample_seed(5, prompt_id(as_turns(p, "user")), k))
        for p in PROMPTS
        for k in range(3)
    }
    assert len({s for _, s in seeds}) == 21
    written = read_records(out, "sample")
    assert [(s["prompt"][0]["content"], s["sample_id"]) for s in written] == [
        (p, k) for p in PROMPTS for k in range(3)
    ]
    assert not any("ab" in s["output"] or "c" in s["output"] for s in written)
    assert len({s["output"] for s in written}) > 5
    assert counts["prompts_asked"] == 20
    assert counts["prompts"] == 7
    assert counts["samples"] == 21
    assert counts["outputs_cut"] == sum(not s["finished"] for s in written)
    assert counts["outputs_stopped"] > 3
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "samples.counts.json",
        "samples.json",
    ]
    # other batches, more samples: the old ones stay
    main(
        replace(
            cfg,
            output_file=str(tmp_path / "more.json"),
            num_samples_per_prompt=4,
            batch_size=50,
        )
    )
    assert [s for s in read_records(tmp_path / "more.json") if s["sample_id"] < 3] == written


def test_vllm_engines_share_the_work(with_bos, prompts, tmp_path, stand_in, monkeypatch):
    "Two engines on two GPUs each give the same file as one. With a stand-in."
    same = [
        "--backend",
        "vllm",
        "--datasets",
        prompts,
        "--num_samples_per_prompt",
        2,
        "--batch_size",
        3,
    ]
    one = main(parse_args(SampleConfig, command(with_bos, tmp_path / "one.json", *same)))
    before = len(stand_in())
    two = [
        *command(with_bos, tmp_path / "two.json", *same),
        "--data_parallel_size",
        "2",
        "--tensor_parallel_size",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "halos_nb.sample", *two],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "4,5,6,7"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    counts = json.loads((tmp_path / "two.counts.json").read_text())
    without_times = [
        {k: v for k, v in of_job.items() if not k.endswith("seconds")}
        for of_job in (counts, one)
    ]
    assert without_times[0] == without_times[1]
    notes = stand_in()[before:]
    assert {
        (n["gpus"], n["tensor_parallel_size"]) for n in notes if "tensor_parallel_size" in n
    } == {("4,5", 2), ("6,7", 2)}
    assert sum("shutdown" in n for n in notes) == 2  # several GPUs: processes that must end
    assert len({n["pid"] for n in notes}) == 2
    assert not [p for p in tmp_path.iterdir() if ".shard" in p.name]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(ValueError, match="2 engines on 2 GPUs each need 4, there are 3"):
        main(parse_args(SampleConfig, two))


def test_vllm_answers_in_another_order_are_refused(
    with_bos, prompts, tmp_path, stand_in, monkeypatch
):
    import vllm

    monkeypatch.setattr(
        vllm.LLM,
        "generate",
        lambda self, p, s, f=vllm.LLM.generate, **more: f(self, p, s, **more)[::-1],
    )
    with pytest.raises(RuntimeError, match="not those to the prompts"):
        main(
            parse_args(
                SampleConfig,
                command(
                    with_bos, tmp_path / "a.json", "--backend", "vllm", "--datasets", prompts
                ),
            )
        )


def test_end_tokens_of_a_model_that_is_not_loaded(tiny, tok, tmp_path):
    "From its generation config, and from its config where it has none."
    shutil.copytree(tiny, tmp_path / "m")
    GenerationConfig(eos_token_id=[2, 77]).save_pretrained(tmp_path / "m")
    assert own_end_tokens(str(tmp_path / "m"), tok) == [2, 77]
    (tmp_path / "m/generation_config.json").unlink()
    file = tmp_path / "m/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(eos_token_id=[2, 78])))
    assert own_end_tokens(str(tmp_path / "m"), tok) == [2, 78]


def test_without_vllm_the_extra_is_named(monkeypatch):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    with pytest.raises(ImportError, match=r"pip install 'halos_nb\[vllm\]'"):
        main(SampleConfig(model="no such model", backend="vllm", datasets=["no such data"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="python -m halos_nb.sample, not accelerate launch"):
        main(SampleConfig(model="m", backend="vllm"))


# ---- a server that speaks OpenAI's protocol


KEY = "the-key-of-the-test"


def reply(text, end="stop", **more):
    return (
        dict(
            id="1",
            object="chat.completion",
            created=0,
            model="m",
            usage=dict(prompt_tokens=3, completion_tokens=2, total_tokens=5),
            choices=[
                dict(index=0, message=dict(role="assistant", content=text), finish_reason=end)
            ],
        )
        | more
    )


ONCE = {  # a fault at the first attempt, after which all is well: (status, headers)
    "429 now": (429, {"retry-after": "0"}),
    "429 ms": (429, {"retry-after-ms": "20"}),
    "429": (429, {}),
    "500": (500, {}),
    "503": (503, {"retry-after-ms": "5"}),
    "408": (408, {"retry-after-ms": "5"}),
}
NEVER = {  # (reply, why there is no answer)
    "no choices": (reply("x", choices=[]), "no choices"),
    "error in a 200": (dict(error=dict(message="overloaded")), "no choices"),
    "null": (reply(None), "no text"),
    "filtered": (reply("I wo", "content_filter"), "finish_reason content_filter"),
    "tool": (reply("", "tool_calls"), "finish_reason tool_calls"),
    "no end": (reply("I wo", None), "finish_reason None"),
    "model_length": (reply("I wo", "model_length"), "finish_reason model_length"),
    "echo": (reply(f"You are {KEY}."), "repeats a key"),
    "odd end": (reply("I wo", f"as {KEY} said"), "finish_reason as [key] said"),
    "html": ("<html>gateway</html>", "no choices"),
    "not json": ("{oops", "JSONDecodeError"),
    "bytes": (b"\xff\xfe{", "UnicodeDecodeError"),
    "half a character": (reply("\ud800"), "UnicodeEncodeError"),
    "half an end": (reply("I wo", "\ud800"), "finish_reason ?"),
    "error beside": (reply("fine", error=dict(message="no")), "an error beside the answer"),
    "400": (400, "http 400"),
    "always 500": (500, "http 500"),
    "empty body": ("", "JSONDecodeError"),
}
FINE = ["fine", "slow", "empty answer", "cut", *ONCE, "dropped", "hangs"]


class Server:
    "A loopback server whose prompts say what is to go wrong; it notes all it hears and says."

    def __init__(self, delay=0.0):
        self.lock = threading.Lock()
        self.asked = Counter()
        self.answered = Counter()
        self.busy = 0
        self.busiest = 0
        self.delay = delay
        server = self
        self.bodies = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                try:
                    self.answer(body)
                except OSError:
                    pass  # the client has gone
                finally:
                    with server.lock:
                        server.busy -= 1

            def answer(self, body):
                what = body["messages"][-1]["content"].partition(":")[0]
                key = (body["messages"][-1]["content"], body["seed"])
                with server.lock:
                    server.asked[key] += 1
                    first = server.asked[key] == 1
                    server.bodies.append(body)
                time.sleep(server.delay)
                if self.headers["Authorization"] != f"Bearer {KEY}":
                    return self.send(401, dict(error=dict(message="wrong key")))
                if what == "no credit":
                    return self.send(
                        429,
                        dict(
                            error=dict(
                                message="pay",
                                code="insufficient_quota",
                                type="insufficient_quota",
                            )
                        ),
                    )
                if what in ONCE and first:
                    return self.send(
                        ONCE[what][0], dict(error=dict(message="later")), ONCE[what][1]
                    )
                if what == "dropped" and first:
                    self.close_connection = True
                    return self.connection.shutdown(2)
                # until the client has given up, and then no answer
                if what == "hangs" and first:
                    with server.lock:
                        server.busy -= 1
                    self.connection.recv(1)
                    with server.lock:
                        server.busy += 1
                    self.close_connection = True
                    return
                if what == "slow":
                    time.sleep(0.3)
                if what in NEVER:
                    r = NEVER[what][0]
                    return (
                        self.send(r, dict(error=dict(message="no")))
                        if isinstance(r, int)
                        else self.send(200, r)
                    )
                with server.lock:
                    server.answered[key] += 1
                self.send(
                    200,
                    reply(
                        ""
                        if what == "empty answer"
                        else f"{body['messages'][-1]['content']} {body['seed']}",
                        "length" if what == "cut" else "stop",
                    ),
                )

            def send(self, status, body, headers=()):
                data = (
                    body
                    if isinstance(body, bytes)
                    else body.encode()
                    if isinstance(body, str)
                    else json.dumps(body).encode()
                )
                self.send_response(status)
                for k, v in (
                    dict(headers)
                    | {
                        "Content-Type": "text/html" if data[:1] == b"<" else "application/json",
                        "Content-Length": str(len(data)),
                    }
                ).items():
                    self.send_header(k, v)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def serve(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "progress.jsonl"))
    made = []
    yield lambda **k: made.append(Server(**k)) or made[-1]
    for s in made:
        s.http.shutdown()
        s.http.server_close()


def server_config(server, tmp_path, contents, **more):
    (tmp_path / "contents.jsonl").write_text(
        "".join(json.dumps(dict(prompt=c)) + "\n" for c in contents)
    )
    return SampleConfig(
        **dict(
            model="m",
            backend="openai",
            base_url=server.url,
            datasets=[str(tmp_path / "contents.jsonl")],
            output_file=str(tmp_path / "out/samples.json"),
            timeout=15,  # waited for once by what hangs; a busy machine stays within it
            max_retries=2,
        )
        | more
    )


def test_every_sample_is_answered_or_has_a_reason(serve, tmp_path):
    """All kinds of faults: what can be mended by asking again is.

    The rest is unanswered, with its reason, and never an empty text. Nothing journalled is
    asked again.
    """
    server, kinds = serve(), [*FINE, *NEVER]
    cfg = server_config(
        server,
        tmp_path,
        [f"{kind}: {i}" for i in range(2) for kind in kinds],
        num_samples_per_prompt=2,
        concurrency=8,
        temperature=0.5,
        top_p=0.9,
        stop="###",
        max_new_tokens=7,
        extra_body='{"top_k": 3}',
        seed=1,
    )
    counts = main(cfg)
    written = read_records(tmp_path / "out/samples.json", "sample")
    fine = [
        (f"{kind}: {i}", k)
        for i in range(2)
        for kind in kinds
        if kind not in NEVER
        for k in range(2)
    ]
    assert [(s["prompt"][0]["content"], s["sample_id"]) for s in written] == fine
    for s in written:
        text = s["prompt"][0]["content"]
        assert s["output"] == (
            ""
            if text.startswith("empty")
            else f"{text} {sample_seed(1, prompt_id(s['prompt']), s['sample_id'])}"
        )
        assert s["finished"] != text.startswith("cut")
    why = Counter(reason for _, reason in NEVER.values() for _ in range(4))
    assert {k: v for k, v in counts.items() if k.startswith("unanswered")} == dict(
        unanswered=4 * len(NEVER)
    ) | {f"unanswered ({k})": v for k, v in why.items()}
    assert counts["samples"] == len(fine)
    assert counts["empty_outputs"] == 4
    assert counts["outputs_cut"] == 4
    assert counts["from_journal"] == 0
    assert counts["repeated_outputs"] == 2
    assert counts["tokens"] == 2 * len(fine)
    journal = read_jsonl(tmp_path / "out/samples.answers.jsonl")
    assert (
        len(journal)
        == len({(a["prompt_id"], a["sample_id"]) for a in journal})
        == counts["samples"] + counts["unanswered"]
    )
    assert 1 < server.busiest <= 8
    assert all(
        b["temperature"] == 0.5
        and b["top_p"] == 0.9
        and b["stop"] == ["###"]
        and b["max_tokens"] == 7
        and b["top_k"] == 3
        and b["model"] == "m"
        for b in server.bodies
    )
    # the client's two retries
    assert {n for (c, _), n in server.asked.items() if c.startswith("always 500")} == {3}
    before, server.bodies = server.answered.copy(), []
    again = main(cfg)
    assert server.answered == before
    assert again["from_journal"] == len(fine)
    assert again["unanswered"] == 4 * len(NEVER)
    assert {b["messages"][0]["content"].partition(":")[0] for b in server.bodies} == set(NEVER)
    assert read_records(tmp_path / "out/samples.json") == written
    assert not [
        p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()
    ]


@pytest.mark.parametrize(
    "kind, told",
    [
        ("no credit", "pay"),
        ("key", "wrong key"),
        ("down", "requests in a row failed"),
        ("no key", "OPENAI_API_KEY is not set"),
    ],
)
def test_what_will_not_go_away_stops_the_run(serve, tmp_path, monkeypatch, kind, told):
    "And nothing is written but the journal; what was answered before is not asked again."
    server = serve()
    if kind == "key":
        monkeypatch.setenv("OPENAI_API_KEY", "another")
    if kind == "no key":
        monkeypatch.delenv("OPENAI_API_KEY")
    cfg = server_config(
        server,
        tmp_path,
        ["fine: 0", *(f"{'always 500' if kind == 'down' else kind}: {i}" for i in range(60))],
        concurrency=1,
        max_retries=0,
    )
    with pytest.raises((RuntimeError, ValueError), match=told):
        main(cfg)
    assert server.asked.total() == {"no key": 0, "key": 1, "no credit": 2, "down": 5}[kind]
    assert not (tmp_path / "out/samples.json").exists()
    assert server.answered.total() == (kind in ("no credit", "down"))
    if kind in ("no credit", "down"):
        with pytest.raises(RuntimeError, match=told):
            main(cfg)
        assert server.answered.total() == 1


@pytest.mark.parametrize(
    "host, name", [("api.openai.com", "max_completion_tokens"), ("127.0.0.1", "max_tokens")]
)
def test_name_of_the_longest_answer(host, name):
    "OpenAI's newer models refuse max_tokens; other servers know nothing else."
    sent = {}

    async def create(**k):
        sent.update(k)

    client = SimpleNamespace(
        base_url=SimpleNamespace(host=host),
        chat=SimpleNamespace(completions=SimpleNamespace(create=create)),
    )
    answer = asyncio.run(
        ask_for_sample(
            client,
            Question(Row(0, examples(["Hi"])[0], 0, []), 5),
            SampleConfig(model="m", backend="openai", max_new_tokens=7),
            Wishes({}),
        )
    )
    assert answer["reason"] == "no choices"
    assert sent[name] == 7
    assert len({"max_tokens", "max_completion_tokens"} & set(sent)) == 1
    assert "stop" not in sent


def test_a_dripping_answer_ends(serve, tmp_path):
    "One that comes a byte at a time, each within the time-out of a read."

    async def drip(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        )
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.1)

    async def go():
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        cfg = SampleConfig(
            model="m",
            backend="openai",
            base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1",
            timeout=0.4,
            max_retries=1,
        )
        kept = []
        await ask_for_samples(
            [Question(Row(0, examples(["Hi"])[0], 0, []), 5)],
            cfg,
            Wishes({}),
            lambda question, answer: kept.append(answer),
        )
        return kept

    start = time.monotonic()
    assert [a["reason"] for a in asyncio.run(go())] == ["TimeoutError"]
    assert time.monotonic() - start < 5


def test_killed_and_started_again(serve, tmp_path):
    """kill -9 twice on the way: what was journalled is never asked again.

    At most `concurrency` answers a time are paid twice, and none is lost.
    """
    server = serve(delay=0.03)
    cfg = server_config(
        server,
        tmp_path,
        [f"fine: {i}" for i in range(60)],
        num_samples_per_prompt=3,
        concurrency=4,
    )
    journal = tmp_path / "out/samples.answers.jsonl"
    ids = {prompt_id(as_turns(f"fine: {i}", "user")): f"fine: {i}" for i in range(60)}
    (tmp_path / "config.json").write_text(config_json(cfg))

    def start():
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "halos_nb.sample",
                "--config",
                str(tmp_path / "config.json"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )

    def kept():
        return {
            (ids[a["prompt_id"]], sample_seed(0, a["prompt_id"], a["sample_id"]))
            for a in (read_jsonl(journal) if journal.exists() else [])
        }

    for goal in (40, 110):
        known, run = kept(), start()
        server.asked.clear()
        while len(kept()) < goal:
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.02)
        run.kill()
        run.communicate()
        assert len(kept()) < 180
        assert not set(server.asked) & known
        assert not (tmp_path / "out/samples.json").exists()
        time.sleep(0.2)  # what is in flight arrives nowhere
    known, run = kept(), start()
    server.asked.clear()
    assert run.communicate(timeout=120)
    assert run.returncode == 0
    assert not set(server.asked) & known
    assert len(server.answered) == 180
    assert server.answered.total() <= 180 + 2 * 4
    counts = json.loads((tmp_path / "out/samples.counts.json").read_text())
    assert counts["samples"] == 180
    assert counts["from_journal"] == len(known)
    assert counts["unanswered"] == 0
    assert (
        len(
            {
                (s["prompt_id"], s["sample_id"])
                for s in read_records(tmp_path / "out/samples.json")
            }
        )
        == 180
    )


def test_with_a_real_server(tiny, prompts, tmp_path, monkeypatch):
    """`transformers serve` with the tiny model.

    It draws only where do_sample is set, which extra_body can; then seeds repeat a run that
    asks one at a time.
    """
    for module in ("fastapi", "uvicorn"):
        if not importlib.util.find_spec(module):
            missing(
                f"{module} is not installed: pip install -c constraints.txt "
                "'transformers[serving]'"
            )
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "progress.jsonl"))
    port = free_port()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "transformers.cli.transformers",
                "serve",
                str(tiny),
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--device",
                "cpu",
            ],
            env=env,
            stdout=log,
            stderr=log,
        )

    def run(name, **more):
        return main(
            SampleConfig(
                **dict(
                    model=str(tiny),
                    backend="openai",
                    base_url=f"http://127.0.0.1:{port}/v1",
                    datasets=[str(prompts)],
                    output_file=str(tmp_path / name),
                    num_samples_per_prompt=3,
                    max_new_tokens=10,
                    concurrency=1,
                    extra_body=json.dumps(
                        dict(
                            generation_config=json.dumps(
                                dict(do_sample=True, top_k=0, eos_token_id=2, pad_token_id=0)
                            )
                        )
                    ),
                )
                | more
            )
        )

    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            time.sleep(0.2)
        with pytest.warns(UserWarning, match="refuses return_token_ids"):
            greedy = run("greedy.json", extra_body="", concurrency=4, tokenizer=str(tiny))
        drawn = run("a.json")
        again = run("b.json")
        stopped = run("stopped.json", stop=STOPS)
    finally:
        server.terminate()
        server.wait(30)
    texts = {
        n: [s["output"] for s in read_records(tmp_path / f"{n}.json", "sample")]
        for n in ("greedy", "a", "b", "stopped")
    }
    assert greedy["repeated_outputs"] == 14
    # once, before the other questions
    refusals = (tmp_path / "server.log").read_text().count("422 Unprocessable")
    assert refusals == greedy["refused by the server (return_token_ids)"] == 1
    assert greedy["outputs_without_ids (not told)"] == 21
    assert drawn["repeated_outputs"] < 3
    assert texts["a"] == texts["b"]
    assert len(set(texts["a"])) > 15
    assert all(
        c["samples"] == 21 and c["unanswered"] == 0 and c["tokens"] > 21
        for c in (greedy, drawn, again, stopped)
    )
    assert texts["stopped"] == [
        min((t.split(x)[0] for x in STOPS), key=len) for t in texts["a"]
    ]
    assert stopped["outputs_stopped"] > 3
    assert [s["finished"] for s in read_records(tmp_path / "a.json")]
    assert 0 < drawn["outputs_cut"] <= 21


def test_a_batch_tells_how_far_it_is_and_its_samples_are_the_same_bits(
    tiny, tmp_path, monkeypatch
):
    "One batch of 64 rows: what is told inside it, and the file that nobody watched."
    lines = [json.dumps(dict(prompt=f"Name star {i}")) for i in range(64)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = dict(model=str(tiny), datasets=[str(tmp_path / "prompts.jsonl")], batch_size=64)
    given |= dict(num_prompts=64, max_new_tokens=300, num_processes=1)
    journal = tmp_path / "progress.jsonl"
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(journal))
    monkeypatch.setattr("halos_nb.answers.PAUSE", 0)  # after every token
    main(SampleConfig(**given, output_file=str(tmp_path / "watched.json")))
    inside = [row for row in read_jsonl(journal) if "of_batch_ended" in row]
    assert inside and all(row["done"] == 0 for row in inside)
    tokens = [row["batch_tokens"] for row in inside]
    assert tokens == sorted(tokens) and tokens[0] > 0
    ended = [int(row["of_batch_ended"].split("/")[0]) for row in inside]
    assert ended == sorted(ended) and any("text" in row for row in inside)
    assert "of_batch_ended" not in read_jsonl(journal)[-1]

    monkeypatch.setattr("halos_nb.answers.Watched.__call__", lambda self, look: None)
    main(SampleConfig(**given, output_file=str(tmp_path / "alone.json")))
    watched, alone = tmp_path / "watched.json", tmp_path / "alone.json"
    assert watched.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize("where", ["given", "environment"])
@pytest.mark.parametrize("path", ["?key=x", f"/{KEY}", f"?key={KEY}"])
def test_an_address_with_a_secret_is_refused_before_any_work(
    tmp_path, monkeypatch, where, path
):
    address = f"http://127.0.0.1:9/v1{path}"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", address if where == "environment" else "http://x/v1")
    cfg = SampleConfig(
        model="m",
        backend="openai",
        datasets=["not there"],
        output_file=str(tmp_path / "s.json"),
        base_url=address if where == "given" else None,
    )
    name = "base_url" if where == "given" else "OPENAI_BASE_URL"
    with pytest.raises(ValueError, match=f"{name}: ") as told:
        main(cfg)
    assert KEY not in str(told.value) and list(tmp_path.iterdir()) == []

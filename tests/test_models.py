"Heads, LoRA, references and their cache: the same numbers by every road, and no trace left by a reference pass."

import copy
import json
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)
from transformers.pytorch_utils import Conv1D

from halos_nb import attention, processes
from halos_nb import reference as references
from halos_nb.trees import Tree, byte_tokenizer, make_batch
from halos_nb.loaders import (
    GroupUnpairedPreferenceDataLoader,
    PairedPreferenceDataLoader,
    UnpairedPreferenceDataLoader,
)
from halos_nb.data import get_preferences
from halos_nb.processes import start_processes
from halos_nb.models import (
    AutoModelForBradleyTerry,
    TreeActorCritic,
    TreePolicy,
    TreeScorer,
    add_lora,
    choose_layout,
    fit_vocabulary,
    load_actor_critic,
    load_policy,
    load_reference,
    load_reward_model,
    merge_lora,
    save_adapter,
    without_adapter,
)
from halos_nb.reference import cache_reference_logps, make_reference

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=2,
)
CONFIGS = {
    "llama": lambda **kw: LlamaConfig(**SHAPE, num_key_value_heads=2, **kw),
    "qwen2": lambda **kw: Qwen2Config(**SHAPE, num_key_value_heads=2, **kw),
    "gpt_neox": lambda **kw: GPTNeoXConfig(**SHAPE, **kw),
    "mistral": lambda **kw: MistralConfig(**SHAPE, num_key_value_heads=2, **kw),
    # learnt positions, transposed linear layers, tied embeddings
    "gpt2": lambda **kw: GPT2Config(**SHAPE, **kw),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:.*fan_in_fan_out is set to False",
)
ARCHS = pytest.mark.parametrize("arch", CONFIGS)
# a prompt with three answers, a pair, one with a mismatched third, one whose branches begin
# inside the prompt
TREES = [
    Tree([9, 8, 7, 6], [[20, 21, 22], [30, 31], [40]], ["sample"] * 3, [0] * 3),
    Tree([5, 4], [[50, 51], [60]], ["chosen", "rejected"], [0, 0]),
    Tree([11, 12, 13], [[70, 71, 72, 73, 74], [20, 21]], ["chosen", "KL"], [0, 0]),
    Tree([14], [[15, 80, 81], [16, 82]], ["chosen", "rejected"], [1, 1]),
]


def save_small(arch, folder, seed=1, **more):
    "A model of two blocks with fresh weights of this architecture, as a folder."
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(CONFIGS[arch](**more)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {arch: save_small(arch, tmp_path_factory.mktemp(arch)) for arch in CONFIGS}


@pytest.fixture(scope="module")
def llama(folders):
    return folders["llama"]


def with_random_critic(path):
    model = load_actor_critic(path)
    torch.manual_seed(3)
    for p in model.value_head.parameters():
        torch.nn.init.normal_(p)
    return model


def with_random_score(path):
    torch.manual_seed(4)
    return load_reward_model(path)


KINDS = {
    "policy": load_policy,
    "actor-critic": with_random_critic,
    "bradley-terry": with_random_score,
}
kinds = pytest.mark.parametrize("kind", KINDS)


def outputs(model, layout="tree", trees=TREES):
    with torch.no_grad():
        return model(tree=make_batch(trees, layout))


def perturb(model, seed=5):
    "Give a fresh adapter and its heads something to say."
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=g) * 0.2
    return model


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# Architectures


@ARCHS
@kinds
def test_layouts_agree_in_values_and_gradients(folders, arch, kind):
    model = KINDS[kind](folders[arch])
    assert choose_layout(model, max_length=64).name == "tree", choose_layout(
        model, max_length=64
    )
    seen = {}
    for layout in ("tree", "plain"):
        model.zero_grad()
        out = model(tree=make_batch(TREES, layout))
        weights = [torch.linspace(-1, 1, x.numel()).view_as(x) for x in out]
        sum((x * w).sum() for x, w in zip(out, weights) if x.requires_grad).backward()
        seen[layout] = (
            [x.detach() for x in out],
            {n: p.grad for n, p in model.named_parameters()},
        )
    (values, grads), (plain_values, plain_grads) = seen["tree"], seen["plain"]
    for x, y in zip(values, plain_values):
        assert_close(x, y, rtol=1e-5, atol=1e-5)
    for n in grads:
        if grads[n] is None:
            assert plain_grads[n] is None, n
        else:
            assert (grads[n] - plain_grads[n]).abs().max() <= 1e-5 * max(
                1, plain_grads[n].abs().max()
            ), n


@ARCHS
def test_plain_rows_are_what_transformers_computes(folders, arch):
    "One conversation at a time, with no class of ours."
    model, table = (
        AutoModelForCausalLM.from_pretrained(folders[arch]),
        outputs(load_policy(folders[arch])).logps,
    )
    k = 0
    for t in TREES:
        for b, s in zip(t.branches, t.skip):
            with torch.no_grad():
                logps = model(torch.tensor([t.prompt_ids + b])).logits[0].log_softmax(-1)
            start = len(t.prompt_ids) + s
            want = [logps[start - 1 + i, x].item() for i, x in enumerate(b[s:])]
            assert_close(table[k, : len(want)], torch.tensor(want), rtol=1e-5, atol=1e-5)
            assert table[k, len(want) :].abs().sum() == 0
            k += 1


@pytest.mark.parametrize(
    "arch, more",
    [
        ("mistral", dict(sliding_window=4)),
        ("qwen2", dict(sliding_window=4, use_sliding_window=True, max_window_layers=0)),
    ],
    ids=["mistral", "qwen2"],
)
def test_sliding_window_shorter_than_a_row_goes_the_plain_way(tmp_path, arch, more):
    path = save_small(arch, tmp_path, **more)
    model, own = load_policy(path), AutoModelForCausalLM.from_pretrained(path)
    layout = choose_layout(model, max_length=9)
    assert layout.name == "plain" and "sliding window of 4 tokens" in layout.reason
    row = torch.tensor([TREES[2].prompt_ids + TREES[2].branches[0]])
    with torch.no_grad():
        want = own(row).logits[0].log_softmax(-1)[range(2, 7), row[0, 3:]]
    assert_close(outputs(model, "plain", [TREES[2]]).logps[0], want, rtol=1e-5, atol=1e-5)
    assert (outputs(model, "tree", [TREES[2]]).logps[0] - want).abs().max() > 1e-3, (
        "the window does not matter here, so this test proves nothing"
    )
    assert (
        choose_layout(model, max_length=4).name == "tree"
        or "probe" in choose_layout(model, max_length=4).reason
    )


# The critic


def test_critic_is_what_its_definition_says(llama):
    model = with_random_critic(llama)
    out, t = outputs(model), TREES[2]
    with torch.no_grad():
        by_hand = AutoModelForCausalLM.from_pretrained(llama)(
            torch.tensor([t.prompt_ids + t.branches[0]]), output_hidden_states=True
        )
    at = range(2, 7)  # the positions that predict the five tokens of the first branch
    assert_close(
        out.values[5, :5],
        model.value_head(by_hand.hidden_states[-1][0, at]).squeeze(-1).detach(),
        rtol=1e-5,
        atol=1e-5,
    )
    assert_close(
        out.entropy[5, :5],
        torch.distributions.Categorical(logits=by_hand.logits[0, at]).entropy(),
        rtol=1e-5,
        atol=1e-5,
    )
    assert_close(out.logps, outputs(load_policy(llama)).logps)
    # values train the whole model, not the head alone
    own = AutoModelForCausalLM.from_pretrained(llama)
    model.value_head(
        own(
            torch.tensor([t.prompt_ids + t.branches[0]]), output_hidden_states=True
        ).hidden_states[-1][0, at]
    ).sum().backward()
    model.zero_grad()
    model(tree=make_batch(TREES)).values[5].sum().backward()
    grads = dict(own.named_parameters())
    for n, p in model.named_parameters():
        if n in grads and p.grad is not None:
            assert_close(p.grad, grads[n].grad, rtol=1e-4, atol=1e-5)
    assert model.base_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_fresh_critic_is_zero_and_learns(llama):
    model = load_actor_critic(llama)
    out = model(tree=make_batch(TREES))
    assert out.values.abs().max() == 0 and not out.entropy.requires_grad
    ((out.values - 1) ** 2).sum().backward()
    assert model.value_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["policy", "actor-critic"])
def test_no_logits_of_all_tokens(llama, kind, monkeypatch):
    "The vocabulary head never sees more than a chunk of rows, in forward or backward."
    model, rows, inner = KINDS[kind](llama), [], attention.in_chunks
    monkeypatch.setattr(attention, "in_chunks", lambda *a: inner(*a, chunk=4))
    model.get_output_embeddings().register_forward_hook(lambda m, i, o: rows.append(len(o)))
    whole = KINDS[kind](llama)
    out = model(tree=make_batch(TREES))
    forward = len(rows)
    out[0].sum().backward()
    assert (
        max(rows) <= 4
        and sum(rows[:forward]) == len(make_batch(TREES).target)
        and len(rows) == 2 * forward
    )
    monkeypatch.undo()
    whole(tree=make_batch(TREES))[0].sum().backward()
    for p, q in zip(model.parameters(), whole.parameters()):
        if p.grad is not None:
            assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@ARCHS
def test_saved_critic_is_a_plain_model_and_a_head(folders, arch, tmp_path):
    model = with_random_critic(folders[arch])
    model.save_pretrained(tmp_path)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[k] for k in ("unexpected_keys", "missing_keys", "mismatched_keys"))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        type(plain).__name__
    ]
    for x, y in zip(outputs(load_actor_critic(tmp_path)), outputs(model)):
        assert torch.equal(x, y)
    assert set(load_file(tmp_path / "value_head.safetensors")) == {"weight", "bias"}


def test_wrong_value_head_is_named(llama, tmp_path):
    load_actor_critic(llama).save_pretrained(tmp_path)
    save_file(
        dict(weight=torch.zeros(1, 7), bias=torch.zeros(1)), tmp_path / "value_head.safetensors"
    )
    with pytest.raises(
        ValueError,
        match=r"value_head.safetensors: not a value head for 32 hidden units.*\(1, 7\)",
    ):
        load_actor_critic(tmp_path)


def test_values_stay_float32_under_autocast(llama):
    model = with_random_critic(llama)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tree=make_batch(TREES))
    assert {x.dtype for x in out} == {torch.float32}
    hidden = load_actor_critic(llama, "bfloat16")
    assert (
        hidden.value_head.weight.dtype == torch.float32
        and outputs(hidden).values.dtype == torch.float32
    )


# LoRA


LORA = dict(r=4, alpha=8, dropout=0.0)


@ARCHS
@kinds
def test_lora_saves_restores_and_merges(folders, arch, kind, tmp_path):
    load, path = KINDS[kind], folders[arch]
    fresh = add_lora(load(path), **LORA)
    for x, y in zip(outputs(fresh), outputs(load(path))):
        assert_close(x, y, rtol=1e-5, atol=1e-5)
    names = trained(fresh)
    head = {"policy": [], "actor-critic": ["value_head"], "bradley-terry": ["score"]}[kind]
    assert all("lora_" in n or any(h in n for h in head) for n in names) and all(
        any(h in n for n in names) for h in head
    )
    assert not any(
        "lora_" in n and any(h in n for h in [*head, "lm_head", "embed_out"]) for n in names
    ), "a head got an adapter"
    linear = sum(
        isinstance(m, torch.nn.Linear | Conv1D) for m in load(path).base_model.modules()
    )
    assert sum("lora_A" in n for n in names) == linear, "every linear layer of the backbone"

    model = perturb(fresh)
    want = outputs(model)
    assert (want[0] - outputs(load(path))[0]).abs().max() > 1e-2
    for layout in ("tree", "plain"):
        for x, y in zip(outputs(model, layout), want):
            assert_close(x, y, rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "adapter")
    again = add_lora(load(path), **LORA, adapter=tmp_path / "adapter")
    for x, y in zip(outputs(again), want):
        assert torch.equal(x, y)
    assert {n: p.shape for n, p in trained(again).items()} == {
        n: p.shape for n, p in names.items()
    }

    for x, y in zip(outputs(model), want):
        assert torch.equal(x, y), "saving changed the model"
    merged = merge_lora(model)
    assert isinstance(
        merged,
        {"policy": TreePolicy, "actor-critic": TreeActorCritic, "bradley-terry": TreeScorer}[
            kind
        ],
    )
    assert {n: p.shape for n, p in merged.named_parameters()} == {
        n: p.shape for n, p in load(path).named_parameters()
    }
    merged.save_pretrained(tmp_path / "merged")
    auto = (
        AutoModelForSequenceClassification if kind == "bradley-terry" else AutoModelForCausalLM
    )
    _, report = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[k] for k in ("unexpected_keys", "missing_keys", "mismatched_keys"))
    load_merged = {
        "policy": load_policy,
        "actor-critic": load_actor_critic,
        "bradley-terry": AutoModelForBradleyTerry.from_pretrained,
    }[kind]
    for m in (merged, load_merged(tmp_path / "merged")):
        for x, y in zip(outputs(m), want):
            assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_encoder_with_lora(tmp_path):
    from transformers import BertConfig

    torch.manual_seed(0)
    bert = AutoModelForBradleyTerry.from_config(
        BertConfig(
            vocab_size=259,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).eval()
    bert.save_pretrained(tmp_path / "bert")
    model = perturb(add_lora(bert, **LORA)).eval()
    assert any("classifier" in n for n in trained(model)) and not any(
        "classifier" in n and "lora_" in n for n in trained(model)
    )
    want = outputs(model, "plain").scores
    merge_lora(model).save_pretrained(tmp_path / "merged")
    assert_close(
        outputs(AutoModelForBradleyTerry.from_pretrained(tmp_path / "merged"), "plain").scores,
        want,
        rtol=1e-5,
        atol=1e-5,
    )


def test_all_linear_trains_what_it_says_and_nothing_else(llama):
    model = add_lora(with_random_critic(llama), **LORA)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # B is zero at first, so A moves with the second step
        opt.zero_grad()
        out = model(tree=make_batch(TREES))
        (out.logps.sum() + out.values.sum()).backward()
        opt.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trained(model))
    assert any("value_head" in n for n in moved)


def test_named_targets(llama):
    names = trained(add_lora(load_policy(llama), **LORA, targets=["q_proj", "v_proj"]))
    assert len(names) == 2 * 2 * 2 and all("q_proj" in n or "v_proj" in n for n in names)


@kinds
def test_adapter_is_float32_on_a_bfloat16_base(llama, kind, tmp_path):
    load = {
        "policy": load_policy,
        "actor-critic": load_actor_critic,
        "bradley-terry": load_reward_model,
    }[kind]
    model = add_lora(load(llama, "bfloat16"), **LORA)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "base_layer" in n} == {
        torch.bfloat16
    }
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    model(tree=make_batch(TREES))[0].sum().backward()
    assert all(
        p.grad is not None
        for p in model.parameters()
        if p.requires_grad
        if kind != "actor-critic"
    ) and all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    layers = {
        n: m
        for n, m in perturb(model).get_base_model().named_modules()
        if hasattr(m, "base_layer")
    }
    want = {n: m.base_layer.weight + m.get_delta_weight("default") for n, m in layers.items()}
    merged = merge_lora(model)
    # the sum is rounded to the base's precision
    for n, w in want.items():
        assert_close(merged.get_submodule(n).weight, w.bfloat16(), rtol=2**-7, atol=2**-8)
    merged.save_pretrained(tmp_path)
    assert (
        len(want) == 14
        and (outputs(load(str(tmp_path), "float32"))[0] - outputs(merged.float())[0])
        .abs()
        .max()
        < 1e-4
    )


def test_fresh_adapter_depends_on_its_seed_alone(llama):
    def fresh(seed, before):
        torch.manual_seed(before)
        model = add_lora(load_policy(llama), **LORA, seed=seed)
        return torch.cat([p.flatten() for p in trained(model).values()]), torch.rand(3)

    (a, drawn), (b, _), (c, _) = fresh(0, 1), fresh(0, 2), fresh(1, 1)
    torch.manual_seed(1)
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(drawn, torch.rand(3)), (
        "the global generator was touched"
    )


def test_dropout_acts_in_training_only_and_repeats(llama):
    model = perturb(add_lora(load_policy(llama), **(LORA | dict(dropout=0.3))))

    def run(seed, training=True):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model.train(training)(tree=make_batch(TREES)).logps

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert torch.equal(run(0, False), run(1, False))

    def steps():
        torch.manual_seed(0)
        m = add_lora(load_policy(llama), **(LORA | dict(dropout=0.3))).train()
        opt = torch.optim.AdamW(m.parameters(), lr=1e-2)
        for _ in range(3):
            opt.zero_grad()
            m(tree=make_batch(TREES)).logps.sum().backward()
            opt.step()
        return torch.cat([p.flatten() for p in trained(m).values()])

    assert torch.equal(steps(), steps())


def test_adapter_with_other_settings_is_refused(llama, tmp_path):
    save_adapter(add_lora(load_policy(llama), **LORA), tmp_path)
    with pytest.raises(ValueError, match="r is 4, asked for 8"):
        add_lora(load_policy(llama), **(LORA | dict(r=8)), adapter=tmp_path)
    with pytest.raises(ValueError, match="lora_alpha is 8, asked for 3"):
        add_lora(load_policy(llama), **(LORA | dict(alpha=3)), adapter=tmp_path)
    with pytest.raises(ValueError, match="lora_dropout is 0.0, asked for 0.1"):
        add_lora(load_policy(llama), **(LORA | dict(dropout=0.1)), adapter=tmp_path)
    with pytest.raises(ValueError, match="target_modules is .*asked for {'q_proj'}"):
        add_lora(load_policy(llama), **LORA, targets=["q_proj"], adapter=tmp_path)
    with pytest.raises(ValueError, match="no adapter_model.safetensors here"):
        add_lora(load_policy(llama), **LORA, adapter=llama)


def test_layout_is_chosen_with_an_adapter_on(llama):
    for kind in KINDS:
        assert (
            choose_layout(perturb(add_lora(KINDS[kind](llama), **LORA)), max_length=64).name
            == "tree"
        )


# References


def state_of(model):
    return {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}, [
        m.training for m in model.modules()
    ]


@contextmanager
def no_trace(model):
    "Parameters, their flags and the modules' modes are the same before and after."
    params, modes = state_of(model)
    yield
    now, modes_now = state_of(model)
    assert modes == modes_now and params.keys() == now.keys()
    for n in params:
        assert params[n][0] == now[n][0] and torch.equal(params[n][1], now[n][1]), n


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["policy", "actor-critic"])
@pytest.mark.parametrize("sync", [False, True])
def test_reference_of_a_lora_policy(llama, kind, sync, training):
    model = perturb(add_lora(KINDS[kind](llama), **(LORA | dict(dropout=0.5)))).train(training)
    model.get_base_model().get_input_embeddings().eval()  # a mode of its own must survive too
    # and a flag of its own
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    base, names, batch = (
        outputs(load_policy(llama)).logps,
        set(trained(model)),
        make_batch(TREES),
    )
    reference = make_reference(
        model, load=lambda: pytest.fail("no second model is needed"), lora=True, sync=sync
    )
    assert set(trained(model)) == names, "the reference trains"
    assert not any("modules_to_save.reference" in n for n, _ in model.named_parameters()), (
        "a second value head that nothing uses"
    )
    for _ in range(2):
        with no_trace(model):
            got = reference(batch)
        assert_close(got, base, rtol=1e-5, atol=1e-5)
        assert not got.requires_grad
    if not sync:
        with pytest.raises(RuntimeError, match="cannot be synchronised"):
            reference.sync()
        return
    with no_trace(copy.deepcopy(model)):
        reference.sync()
    assert set(trained(model)) == names
    with no_trace(model):
        synced = reference(batch)
    assert_close(synced, outputs(model.eval()).logps, rtol=1e-5, atol=1e-5)
    perturb(model, seed=6)
    assert torch.equal(reference(batch), synced), "the reference moved with the policy"
    assert (outputs(model).logps - synced).abs().max() > 1e-3


def test_reference_pass_inside_a_training_step(llama):
    "Gradients are those of a step without a reference pass, wherever the pass comes."
    batch, grads = make_batch(TREES), []
    for when in ("never", "before", "between"):
        for sync in (False, True):
            model = perturb(add_lora(with_random_critic(llama), **LORA)).train()
            reference = make_reference(model, lora=True, sync=sync)
            if when == "before":
                reference(batch)
            out = model(tree=batch)
            if when == "between":
                reference(batch)
            (out.logps.sum() + out.values.sum()).backward()
            grads.append(
                torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
            )
            assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for g in grads[1:]:
        assert torch.equal(g, grads[0])


def test_error_inside_a_reference_pass_leaves_no_trace(llama):
    model = perturb(add_lora(load_policy(llama), **LORA)).train()
    references = [make_reference(model, lora=True, sync=s) for s in (True, False)]
    want = outputs(model).logps
    for reference in references:
        with no_trace(model), pytest.raises(AttributeError):
            reference(None)
        with no_trace(model), pytest.raises(IndexError):
            reference(make_batch([Tree([9], [[9999]], ["sample"], [0])]))
        assert torch.equal(outputs(model).logps, want)


def test_second_adapter_is_not_saved_or_merged(llama, tmp_path):
    model = perturb(add_lora(with_random_critic(llama), **LORA))
    reference = make_reference(model, lora=True, sync=True)
    perturb(model)
    reference.sync()
    perturb(model)
    want = outputs(model)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not any(
        "reference" in k for k in load_file(tmp_path / "adapter/adapter_model.safetensors")
    )
    for m in (
        add_lora(load_actor_critic(llama), **LORA, adapter=tmp_path / "adapter"),
        merge_lora(model),
    ):
        for x, y in zip(outputs(m), want):
            assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert {n for n, _ in m.named_parameters()} == {
        n for n, _ in load_actor_critic(llama).named_parameters()
    }


@pytest.mark.parametrize("sync", [False, True])
def test_a_merged_policy_is_no_reference(llama, sync):
    model = add_lora(load_policy(llama), **LORA)
    reference = make_reference(model, lora=True, sync=sync)
    merge_lora(model)
    with pytest.raises(ValueError, match="[Nn]o.* found|not found"):
        reference(make_batch(TREES))


def test_saved_adapter_is_the_same_file_every_time(llama, tmp_path):
    "peft keeps the layers' names as a set, whose order is another one in every process."
    for d in "ab":
        save_adapter(perturb(add_lora(load_policy(llama), **LORA)), tmp_path / d)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), (
            name
        )
    targets = json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 1 and targets == sorted(targets)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_reference_with_weights_of_its_own(llama, precision):
    policy = with_random_critic(llama).train()
    reference = make_reference(policy, load=lambda: load_reference(llama, precision))
    before, batch = reference(make_batch(TREES)), make_batch(TREES)
    assert_close(before, outputs(load_policy(llama, precision)).logps)
    pointers = [p.data_ptr() for p in reference.model.parameters()]
    perturb(policy)
    assert torch.equal(reference(batch), before)
    with no_trace(policy):
        reference.sync()
    now = dict(policy.named_parameters())
    assert all(
        torch.equal(p, now[n].to(p.dtype)) for n, p in reference.model.named_parameters()
    ) and set(now) - {"value_head.weight", "value_head.bias"} == {
        n for n, _ in reference.model.named_parameters()
    }
    if precision == "float32":
        assert_close(reference(batch), outputs(policy).logps)
    assert not any(p.requires_grad for p in reference.model.parameters()) and {
        p.dtype for p in reference.model.parameters()
    } == {getattr(torch, precision)}
    assert [p.data_ptr() for p in reference.model.parameters()] == pointers, "copied in place"


def test_policy_and_reference_draw_the_same_new_tokens(llama):
    tok = byte_tokenizer()
    tok.add_tokens(["<new>", "<other>"])
    models_ = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models_.append(fit_vocabulary(load_policy(llama), tok))
    a, b = (m.get_input_embeddings().weight for m in models_)
    assert a.shape[0] == 261 and torch.equal(a, b) and a[259:].abs().sum() > 0


# The cache


def fill(
    trees,
    folder,
    path,
    precision="float32",
    layout="tree",
    token_budget=12,
    refuse=False,
    **more,
):
    def reference():
        if refuse:
            pytest.fail("the reference was loaded")
        return make_reference(load_policy(path), load=lambda: load_reference(path, precision))

    return cache_reference_logps(
        trees,
        reference,
        folder,
        path,
        precision,
        layout,
        token_budget,
        start_processes(1, cpu=True),
        **more,
    )


def fresh_trees():
    return copy.deepcopy(TREES)


def directly(path, trees=TREES, layout="tree"):
    return outputs(load_policy(path), layout, trees).logps


@ARCHS
@pytest.mark.parametrize("layout", ["tree", "plain"])
@pytest.mark.parametrize("token_budget", [1, 12, 4096])
def test_cached_values_are_the_reference_s(folders, arch, layout, token_budget, tmp_path):
    trees, path = fresh_trees(), folders[arch]
    assert fill(trees, tmp_path, path, layout=layout, token_budget=token_budget) == dict(
        reference_cached=0, reference_computed=9
    )
    want, k = directly(path, layout="plain"), 0
    for t in trees:
        for b, s, r in zip(t.branches, t.skip, t.reference, strict=True):
            assert len(r) == len(b) - s
            assert_close(torch.tensor(r), want[k, : len(r)], rtol=1e-5, atol=1e-5)
            k += 1


def test_second_run_loads_no_model(llama, tmp_path):
    one, two = fresh_trees(), fresh_trees()[::-1]
    fill(one, tmp_path, llama)
    assert fill(two, tmp_path, llama, layout="plain", refuse=True) == dict(
        reference_cached=9, reference_computed=0
    )
    assert [t.reference for t in two[::-1]] == [t.reference for t in one] and len(
        list(tmp_path.iterdir())
    ) == 1
    assert_close(make_batch(one).reference, directly(llama), rtol=1e-5, atol=1e-5)


LOADERS = {
    "paired": (PairedPreferenceDataLoader, {}),
    "KTO": (UnpairedPreferenceDataLoader, dict(mismatched=True)),
    "group": (GroupUnpairedPreferenceDataLoader, {}),
}


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_s_trees(llama, tmp_path, name):
    "Two epochs of each, mismatched answers too; what the epochs share is computed once."
    cls, more = LOADERS[name]
    rows = [
        {
            "prompt": f"Say {'it ' * i}",
            "chosen": "Yes" + "!" * i,
            "rejected": "No" + "." * (5 - i),
        }
        for i in range(5)
    ]
    loader, trees = (
        cls(
            get_preferences(rows, "train"),
            byte_tokenizer(),
            batch_size=2,
            max_length=200,
            **more,
        ),
        [],
    )
    for epoch in range(2):
        loader.set_epoch(epoch)
        trees += [t for step in loader.plan() for t in step]
    counts = fill(trees, tmp_path, llama, token_budget=200)
    branches = {
        (tuple(t.prompt_ids + b), s + len(t.prompt_ids))
        for t in trees
        for b, s in zip(t.branches, t.skip)
    }
    assert (
        counts == dict(reference_cached=0, reference_computed=len(branches))
        and len(branches) >= 10
    )
    assert ("KL" in {m for t in trees for m in t.meanings}) == (name == "KTO")
    for t in trees:
        assert_close(
            make_batch([t]).reference, directly(llama, [t], "plain"), rtol=1e-5, atol=1e-5
        )


def test_only_what_is_missing_is_computed(llama, tmp_path):
    fill(fresh_trees()[:2], tmp_path, llama)
    # the first is known, cut elsewhere
    extra = Tree([9], [[8, 7, 6, 20, 21, 22], [8, 7, 6, 99]], ["chosen", "KL"], [3, 3])
    trees = [*fresh_trees(), extra]
    assert fill(trees, tmp_path, llama) == dict(reference_cached=5, reference_computed=5)
    assert (
        trees[-1].reference[0] == trees[0].reference[0] and len(list(tmp_path.iterdir())) == 2
    )
    assert_close(
        torch.tensor(trees[-1].reference[1]),
        directly(llama, [extra])[1, :1],
        rtol=1e-5,
        atol=1e-5,
    )
    assert fill(trees, tmp_path, llama, refuse=True)["reference_cached"] == 10


def test_same_tokens_with_another_beginning_are_not_confused(llama, tmp_path):
    "What is predicted is part of the hash: one token more of the prompt is another entry, and so is an empty answer."
    trees = [
        Tree([9, 8], [[7, 20]], ["sample"], [0]),
        Tree([9, 8], [[7, 20]], ["sample"], [1]),
        Tree([9, 8, 7, 20], [[21]], ["sample"], [1]),
    ]
    assert fill(trees[:2], tmp_path, llama)["reference_computed"] == 2
    assert [len(t.reference[0]) for t in trees[:2]] == [2, 1] and trees[0].reference[0][
        1
    ] == pytest.approx(trees[1].reference[0][0], rel=1e-5)
    # nothing is predicted in the third, so nothing is missing
    fill(trees, tmp_path, llama, refuse=True)
    assert trees[2].reference == [[]]


def test_other_weights_or_precision_is_another_cache(llama, tmp_path):
    cache, moved = tmp_path / "cache", tmp_path / "moved"
    one, two = fresh_trees(), fresh_trees()
    fill(one, cache, llama)
    load_policy(llama).save_pretrained(moved)
    assert fill(two, cache, str(moved), refuse=True)["reference_cached"] == 9, (
        "the same weights elsewhere are the same reference"
    )
    assert fill(two, cache, llama, "bfloat16")["reference_computed"] == 9
    state = load_file(moved / "model.safetensors")
    state[next(iter(state))][0, 0] += 0.5
    save_file(state, moved / "model.safetensors", metadata={"format": "pt"})
    assert fill(two, cache, str(moved))["reference_computed"] == 9
    assert one[0].reference != two[0].reference and len(list(cache.iterdir())) == 3
    config = json.loads((moved / "config.json").read_text())
    config["rms_norm_eps"] = 1e-2
    (moved / "config.json").write_text(json.dumps(config))
    assert fill(two, cache, str(moved))["reference_computed"] == 9, (
        "the config is part of the reference"
    )
    assert fill(two, cache, llama, vocabulary=261)["reference_computed"] == 9, (
        "so is the number of rows"
    )


def flip(raw, at):
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "harm",
    [
        "last byte",
        "first hash",
        "truncated",
        "empty",
        "not ours",
        "renamed",
        "other model",
        "wrong counts",
    ],
)
def test_harmed_file_is_refused(llama, tmp_path, harm):
    fill(fresh_trees(), tmp_path, llama)
    (file,) = tmp_path.iterdir()
    raw, name = file.read_bytes(), file.name
    head = 8 + int.from_bytes(raw[:8], "little")
    tensors = load_file(file)
    with references.safe_open(file, "pt") as f:
        meta = f.metadata()
    if harm == "last byte":
        file.write_bytes(flip(raw, len(raw) - 1))
    if harm == "first hash":
        file.write_bytes(flip(raw, head))
    if harm == "truncated":
        file.write_bytes(raw[:-100])
    if harm == "empty":
        file.write_bytes(b"")
    if harm == "not ours":
        save_file(dict(x=torch.zeros(3)), file)
    if harm == "renamed":
        (file := file.rename(tmp_path / (name[:17] + "0" * 16 + ".safetensors")))
    if harm == "other model":
        save_file(tensors, file, metadata=meta | dict(model="x" * 64))
    if harm == "wrong counts":
        tensors["offsets"][-1] -= 1  # by a program that is wrong, so hash and name are right
        content = references.tensors_hash(tensors)
        file.unlink()
        file = tmp_path / f"{name[:17]}{content[:16]}.safetensors"
        save_file(tensors, file, metadata=meta | dict(content=content))
    with pytest.raises(ValueError, match=f"{file.name}: .*delete this file"):
        fill(fresh_trees(), tmp_path, llama)
    file.unlink()
    assert fill(fresh_trees(), tmp_path, llama)["reference_computed"] == 9


def test_stale_file_under_the_new_name_is_refused(llama, folders, tmp_path):
    "A cache of another reference, renamed to fit."
    fill(fresh_trees(), tmp_path / "other", folders["qwen2"])
    fill(fresh_trees(), tmp_path / "right", llama)
    (stale,), (right,) = ((tmp_path / d).iterdir() for d in ("other", "right"))
    stale.rename(tmp_path / "right" / (right.name[:17] + stale.name[17:]))
    with pytest.raises(ValueError, match="does not match its name"):
        fill(fresh_trees(), tmp_path / "right", llama)


def test_numbers_that_are_not_finite_are_not_kept(llama, tmp_path):
    class Broken:
        def __call__(self, batch):
            return torch.full((len(batch.last), 5), torch.nan)

    with pytest.raises(ValueError, match="not finite numbers, in float32"):
        cache_reference_logps(
            fresh_trees(),
            Broken,
            tmp_path,
            llama,
            "float32",
            "tree",
            12,
            start_processes(1, cpu=True),
        )
    assert not list(tmp_path.iterdir())


def test_adapter_off_fills_the_same_cache(llama, tmp_path):
    "With LoRA the reference is the base model, so either run can use the other's file."
    policy, trees = perturb(add_lora(load_policy(llama), **LORA)).train(), fresh_trees()
    with no_trace(policy):
        cache_reference_logps(
            trees,
            lambda: make_reference(policy, lora=True),
            tmp_path,
            llama,
            "float32",
            "tree",
            12,
            start_processes(1, cpu=True),
        )
    assert_close(make_batch(trees).reference, directly(llama), rtol=1e-5, atol=1e-5)
    assert fill(fresh_trees(), tmp_path, llama, refuse=True)["reference_cached"] == 9


def test_hub_name_is_known_by_its_commit(tmp_path, llama):
    "A hub cache as huggingface_hub lays it out, read offline."
    commit = "0123456789abcdef" * 2 + "01234567"
    repo = tmp_path / "hub/models--someone--small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text(
        (Path(llama) / "config.json").read_text()
    )
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "from halos_nb.reference import model_identity; "
                "print(model_identity('someone/small'))"
            ),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ
        | {
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        },
        timeout=120,
    )
    assert run.stdout.strip() == f"someone/small@{commit}", run.stderr[-2000:]


# Precision


@pytest.mark.parametrize("master, moves", [("float32", True), ("bfloat16", False)])
def test_bfloat16_autocast_moves_float32_weights(llama, master, moves):
    "A learning rate of 1e-6 is below bfloat16's resolution, so the weights themselves have to be float32."
    model = load_policy(llama, master)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    for _ in range(3):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = -model(tree=make_batch(TREES)).logps.sum()
        loss.backward()
        opt.step()
    assert all(p.dtype == getattr(torch, master) for p in model.parameters())
    share = {
        n: (p != before[n]).float().mean().item()
        for n, p in model.named_parameters()
        if "proj" in n
    }
    assert min(share.values()) > 0.9 if moves else max(share.values()) < 0.1, share


# Two processes


def two_processes(llama, out):
    "What each of two processes does; run by `accelerate launch`, see below."
    acc, rank = start_processes(2, cpu=True), int(os.environ["RANK"])
    calls, trees = [], fresh_trees()

    def reference():
        calls.append(1)
        return make_reference(load_policy(llama), load=lambda: load_reference(llama))

    count = lambda trees, folder: dict(
        cache_reference_logps(
            trees, reference, Path(out) / folder, llama, "float32", "tree", 12, acc
        )
    )
    report = dict(
        first=count(trees, "cache"),
        second=count(fresh_trees()[:3], "cache"),
        one_tree=count(fresh_trees()[:1], "small"),
        calls=len(calls),
        reference=[t.reference for t in trees],
    )
    model = perturb(add_lora(with_random_critic(llama), **LORA)).train()
    second = make_reference(model, lora=True, sync=True)
    # every parameter must get a gradient in every step
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    wrapped = [make_reference(ddp, lora=True), second]
    mine = make_batch(TREES[rank::2])
    for _ in range(2):
        out_, refs = ddp(tree=mine), [r(mine) for r in wrapped]
        (out_.logps.sum() + out_.values.sum()).backward()
    for r in refs:
        assert_close(r, directly(llama, TREES[rank::2]), rtol=1e-5, atol=1e-5)
    with without_adapter(ddp) as m:
        assert_close(m(tree=mine).logps, refs[0])
    report["grad"] = torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    ).tolist()
    (Path(out) / f"{rank}.json").write_text(json.dumps(report))
    acc.wait_for_everyone()


def test_two_processes_share_the_work(llama, tmp_path):
    run = subprocess.run(
        [
            sys.executable,
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
            __file__,
            llama,
            str(tmp_path),
        ],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    a, b = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    for r in (a, b):
        assert (r["first"], r["second"], r["calls"]) == (
            dict(reference_cached=0, reference_computed=9),
            dict(reference_cached=7, reference_computed=0),
            2,
        )
        assert r["one_tree"] == dict(reference_cached=0, reference_computed=3), (
            "one process has nothing to do"
        )
    assert a["reference"] == b["reference"]
    trees = fresh_trees()
    assert (
        fill(trees, tmp_path / "cache", llama, refuse=True)["reference_cached"] == 9
        and [t.reference for t in trees] == a["reference"]
    )
    assert_close(make_batch(trees).reference, directly(llama), rtol=1e-5, atol=1e-5)
    model = perturb(add_lora(with_random_critic(llama), **LORA)).train()
    for _ in range(2):
        (out := model(tree=make_batch(TREES))).logps.sum().add(out.values.sum()).backward()
    # DDP averages
    alone = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]) / 2
    for r in (a, b):
        assert_close(torch.tensor(r["grad"]), alone, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    two_processes(*sys.argv[1:])
    processes.end_process()

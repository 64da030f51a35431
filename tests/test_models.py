"Policy, critic and reward model, whole or with LoRA: the same numbers by every road."

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from tiny_models import (
    ARCHS,
    KINDS,
    LORA,
    TREES,
    kinds,
    outputs,
    perturb,
    save_small,
    trained,
    with_random_critic,
)

from halos_nb import head as head_room
from halos_nb.layouts import choose_layout, shrunk_windows, training_difference
from halos_nb.models import (
    AutoModelForBradleyTerry,
    TreeActorCritic,
    TreePolicy,
    TreeScorer,
    add_lora,
    dropouts,
    fit_vocabulary,
    load_actor_critic,
    load_policy,
    load_reward_model,
    merge_lora,
    own_forward,
    save_adapter,
    set_dropout,
)
from halos_nb.templates import byte_tokenizer
from halos_nb.trees import make_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:.*fan_in_fan_out is set to False",
)


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
    model = AutoModelForCausalLM.from_pretrained(folders[arch])
    table = outputs(load_policy(folders[arch])).logps
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
def test_sliding_window_shorter_than_a_row(tmp_path, arch, more):
    path = save_small(arch, tmp_path, **more)
    model = load_policy(path)
    own = AutoModelForCausalLM.from_pretrained(path)
    layout = choose_layout(model, max_length=9)
    assert layout.name == "tree"
    row = torch.tensor([TREES[2].prompt_ids + TREES[2].branches[0]])
    with torch.no_grad():
        want = own(row).logits[0].log_softmax(-1)[range(2, 7), row[0, 3:]]
    for name in ("tree", "plain"):
        assert_close(outputs(model, name, [TREES[2]]).logps[0], want, rtol=1e-5, atol=1e-5)
    with shrunk_windows(model, 2), torch.no_grad():
        other = own_forward(model, row).logits[0].log_softmax(-1)[range(2, 7), row[0, 3:]]
    assert (other - want).abs().max() > 1e-3, (
        "the window does not matter here, so this test proves nothing"
    )


# The critic


def test_critic_is_what_its_definition_says(llama):
    model = with_random_critic(llama)
    out = outputs(model)
    t = TREES[2]
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
    assert out.values.abs().max() == 0
    assert not out.entropy.requires_grad
    ((out.values - 1) ** 2).sum().backward()
    assert model.value_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layout", ["tree", "plain", "alone"])
@pytest.mark.parametrize("kind", ["policy", "actor-critic"])
def test_no_logits_of_all_tokens(llama, kind, layout, monkeypatch):
    "The vocabulary head never sees more than a chunk of rows, in forward or backward."
    model = KINDS[kind](llama)
    assert model.head_form == head_room.HeadForm()  # it is looked at once
    rows = []
    inner = head_room.in_chunks
    monkeypatch.setattr(head_room, "in_chunks", lambda *a: inner(*a, chunk=4))
    model.get_output_embeddings().register_forward_hook(lambda m, i, o: rows.append(len(o)))
    whole = KINDS[kind](llama)
    out = model(tree=make_batch(TREES, layout))
    forward = len(rows)
    out[0].sum().backward()
    assert max(rows) <= 4
    assert sum(rows[:forward]) == len(make_batch(TREES).target)
    assert len(rows) == 2 * forward
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
    assert hidden.value_head.weight.dtype == torch.float32
    assert outputs(hidden).values.dtype == torch.float32


# LoRA


@ARCHS
@kinds
def test_lora_saves_restores_and_merges(folders, arch, kind, tmp_path):
    load = KINDS[kind]
    path = folders[arch]
    fresh = add_lora(load(path), **LORA)
    for x, y in zip(outputs(fresh), outputs(load(path))):
        assert_close(x, y, rtol=1e-5, atol=1e-5)
    names = trained(fresh)
    head = {"policy": [], "actor-critic": ["value_head"], "bradley-terry": ["score"]}[kind]
    assert all("lora_" in n or any(h in n for h in head) for n in names)
    assert all(any(h in n for n in names) for h in head)
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
    assert any("classifier" in n for n in trained(model))
    assert not any("classifier" in n and "lora_" in n for n in trained(model))
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
    assert len(names) == 2 * 2 * 2
    assert all("q_proj" in n or "v_proj" in n for n in names)


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
    )
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
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
    assert len(want) == 14
    assert (
        outputs(load(str(tmp_path), "float32"))[0] - outputs(merged.float())[0]
    ).abs().max() < 1e-4


def test_fresh_adapter_depends_on_its_seed_alone(llama):
    def fresh(seed, before):
        torch.manual_seed(before)
        model = add_lora(load_policy(llama), **LORA, seed=seed)
        return torch.cat([p.flatten() for p in trained(model).values()]), torch.rand(3)

    (a, drawn), (b, _), (c, _) = fresh(0, 1), fresh(0, 2), fresh(1, 1)
    torch.manual_seed(1)
    assert torch.equal(a, b), "the global generator was touched"
    assert not torch.equal(a, c), "the global generator was touched"
    assert torch.equal(drawn, torch.rand(3)), "the global generator was touched"


def test_dropout_acts_in_training_only_and_repeats(llama):
    model = perturb(add_lora(load_policy(llama), **(LORA | dict(dropout=0.3))))

    def run(seed, training=True):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model.train(training)(tree=make_batch(TREES)).logps

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
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


def test_an_adapter_goes_on_with_the_dropout_asked_for(llama, tmp_path):
    "Adapters of before were saved with 0.05; what was learnt does not depend on it."
    save_adapter(perturb(add_lora(load_policy(llama), **(LORA | dict(dropout=0.05)))), tmp_path)
    again = add_lora(load_policy(llama), **LORA, adapter=tmp_path)
    assert dropouts(again) == {}
    assert again.peft_config["default"].lora_dropout == 0
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any(p.any() for n, p in saved.items() if "lora_B" in n)
    more = add_lora(load_policy(llama), **(LORA | dict(dropout=0.2)), adapter=tmp_path)
    assert set(dropouts(more).values()) == {0.2}


DROPPING = {
    "gpt2": dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
    "llama": dict(attention_dropout=0.3),
    "gpt_neox": dict(attention_dropout=0.3, hidden_dropout=0.2),
}


@pytest.mark.parametrize("layout", ["tree", "plain"])
@pytest.mark.parametrize("arch", DROPPING)
def test_nothing_is_dropped_where_dropout_is_off(tmp_path, arch, layout):
    "Layers and shares that attention reads alike; with gradient checkpointing too."
    model = load_policy(save_small(arch, tmp_path, **DROPPING[arch]))
    config = model.config.to_dict()
    assert training_difference(model, layout) > 1e-3
    set_dropout(model, 0)
    assert training_difference(model, layout) == 0
    asked = outputs(model.eval(), layout).logps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions call it by another name
        model.train().gradient_checkpointing_enable()
    said = model(tree=make_batch(TREES, layout)).logps
    assert torch.equal(said, asked) and said.requires_grad
    assert model.config.to_dict() == config, "what is saved says what it said"


def test_adapter_with_other_settings_is_refused(llama, tmp_path):
    save_adapter(add_lora(load_policy(llama), **LORA), tmp_path)
    with pytest.raises(ValueError, match="r is 4, asked for 8"):
        add_lora(load_policy(llama), **(LORA | dict(r=8)), adapter=tmp_path)
    with pytest.raises(ValueError, match="lora_alpha is 8, asked for 3"):
        add_lora(load_policy(llama), **(LORA | dict(alpha=3)), adapter=tmp_path)
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


def test_saved_adapter_is_the_same_file_every_time(llama, tmp_path):
    "peft keeps the layers' names as a set, whose order is another one in every process."
    for d in "ab":
        save_adapter(perturb(add_lora(load_policy(llama), **LORA)), tmp_path / d)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), (
            name
        )
    targets = json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 1
    assert targets == sorted(targets)


def test_policy_and_reference_draw_the_same_new_tokens(llama):
    tok = byte_tokenizer()
    tok.add_tokens(["<new>", "<other>"])
    models_ = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models_.append(fit_vocabulary(load_policy(llama), tok))
    a, b = (m.get_input_embeddings().weight for m in models_)
    assert a.shape[0] == 261
    assert torch.equal(a, b)
    assert a[259:].abs().sum() > 0


# Precision


@pytest.mark.parametrize("master, moves", [("float32", True), ("bfloat16", False)])
def test_bfloat16_autocast_moves_float32_weights(llama, master, moves):
    """A learning rate of 1e-6 is below bfloat16's resolution, so the weights themselves have to
    be float32.
    """
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

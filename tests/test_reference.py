"References and their cache: the same numbers by every road, and no trace left by a pass."

import copy
import json
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from tiny_models import (
    ARCHS,
    CONFIGS,
    KINDS,
    LORA,
    SHAPE,
    TREES,
    outputs,
    perturb,
    trained,
    with_random_critic,
)
from transformers import AutoModelForCausalLM

from halos_nb import processes
from halos_nb import reference as references
from halos_nb.data import get_preferences
from halos_nb.loaders import (
    GroupUnpairedPreferenceDataLoader,
    PairedPreferenceDataLoader,
    UnpairedPreferenceDataLoader,
)
from halos_nb.models import (
    add_lora,
    load_actor_critic,
    load_policy,
    load_reference,
    merge_lora,
    save_adapter,
    set_dropout,
    without_adapter,
)
from halos_nb.processes import computing_in, start_processes
from halos_nb.reference import (
    Pass,
    cache_reference_logps,
    largest_log_ratio,
    make_reference,
)
from halos_nb.templates import byte_tokenizer
from halos_nb.trees import Tree, make_batch

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:.*fan_in_fan_out is set to False",
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
    assert modes == modes_now
    assert params.keys() == now.keys()
    for n in params:
        assert params[n][0] == now[n][0], n
        assert torch.equal(params[n][1], now[n][1]), n


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["policy", "actor-critic"])
@pytest.mark.parametrize("sync", [False, True])
def test_reference_of_a_lora_policy(llama, kind, sync, training):
    model = perturb(add_lora(KINDS[kind](llama), **(LORA | dict(dropout=0.5)))).train(training)
    model.get_base_model().get_input_embeddings().eval()  # a mode of its own must survive too
    # and a flag of its own
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    base = outputs(load_policy(llama)).logps
    names = set(trained(model))
    batch = make_batch(TREES)
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
    batch = make_batch(TREES)
    grads = []
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_reference_with_weights_of_its_own(llama, precision):
    policy = with_random_critic(llama).train()
    reference = make_reference(policy, load=lambda: load_reference(llama, precision))
    before = reference(make_batch(TREES))
    batch = make_batch(TREES)
    assert_close(before, outputs(load_policy(llama, precision)).logps)
    pointers = [p.data_ptr() for p in reference.model.parameters()]
    perturb(policy)
    assert torch.equal(reference(batch), before)
    with no_trace(policy):
        reference.sync()
    now = dict(policy.named_parameters())
    assert all(
        torch.equal(p, now[n].to(p.dtype)) for n, p in reference.model.named_parameters()
    )
    assert set(now) - {"value_head.weight", "value_head.bias"} == {
        n for n, _ in reference.model.named_parameters()
    }
    if precision == "float32":
        assert_close(reference(batch), outputs(policy).logps)
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert {p.dtype for p in reference.model.parameters()} == {getattr(torch, precision)}
    assert [p.data_ptr() for p in reference.model.parameters()] == pointers, "copied in place"


DEEP = dict(num_hidden_layers=6, initializer_range=0.2)


def deep_model(arch, folder):
    "Six layers, whose bfloat16 roundings add up."
    torch.manual_seed(1)
    small = CONFIGS[arch]()
    groups = dict(num_key_value_heads=2) if hasattr(small, "num_key_value_heads") else {}
    config = type(small)(**(SHAPE | DEEP | groups))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def long_trees():
    "Pairs of some 80 tokens in all, no two alike in length."
    rng = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(3, 259, (n,), generator=rng).tolist()

    trees = []
    for i in range(3):
        answers = [ids(20 + 7 * i), ids(50 - 11 * i)]
        trees.append(Tree(ids(10 + i), answers, ["chosen", "rejected"], [0, 0]))
    return trees


@ARCHS
def test_an_unmoved_policy_is_its_reference(tmp_path, arch):
    """Log-ratios of exactly 0, in each precision and layout, with gradient checkpointing, with
    an adapter. A reference with rounded weights, as there was once, is another function.
    """
    path = deep_model(arch, tmp_path)
    policy = load_policy(path).train()
    set_dropout(policy, 0)
    adapted = add_lora(load_policy(path), **LORA).train()
    set_dropout(adapted, 0)
    frozen = load_reference(path)
    for layout, precision in product(("tree", "plain"), ("float32", "bfloat16")):
        batch = make_batch(long_trees(), layout)
        own = make_reference(policy, load=lambda: frozen, precision=precision)
        assert largest_log_ratio(policy, own, batch, precision) == 0
        policy.gradient_checkpointing_enable()
        assert largest_log_ratio(policy, own, batch, precision) == 0
        policy.gradient_checkpointing_disable()
        off = make_reference(adapted, lora=True, precision=precision)
        assert largest_log_ratio(adapted, off, batch, precision) == 0
        assert largest_log_ratio(adapted, own, batch, precision) == 0
    rounded = make_reference(policy, load=lambda: load_reference(path, "bfloat16"))
    assert largest_log_ratio(policy, rounded, batch, "bfloat16") > 1e-3


def test_a_second_adapter_is_the_reference_too(llama):
    policy = add_lora(load_policy(llama), **LORA).train()
    second = make_reference(policy, lora=True, sync=True, precision="bfloat16")
    batch = make_batch(TREES)
    assert largest_log_ratio(policy, second, batch, "bfloat16") == 0
    perturb(policy)
    assert largest_log_ratio(policy, second, batch, "bfloat16") > 1e-3
    second.sync()
    assert largest_log_ratio(policy, second, batch, "bfloat16") == 0


def planned(trees, *batches):
    "Passes of these batches of whole trees, on one process."
    passes = []
    for numbers in batches:
        parts = [(trees[i], list(range(len(trees[i].branches)))) for i in numbers]
        passes.append(Pass(0, parts))
    return passes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_cache_computes_what_training_will_ask(llama, tmp_path, precision):
    "In its batches, bit for bit; in bfloat16 another cut is another entry."
    policy = load_policy(llama)

    def kept(trees, *batches):
        def reference():
            return make_reference(policy, lambda: load_reference(llama), precision=precision)

        return cache_reference_logps(
            trees,
            reference,
            tmp_path,
            llama,
            precision,
            "plain",
            4096,
            start_processes(1, cpu=True),
            passes=planned(trees, *batches),
        )

    trees = long_trees()
    assert kept(trees, [0, 2], [1])["reference_computed"] == 6
    for numbers in ([0, 2], [1]):
        batch = make_batch([trees[i] for i in numbers], "plain")
        with computing_in(precision, "cpu"):
            assert torch.equal(policy(tree=batch).logps.detach(), batch.reference)
    again = long_trees()
    assert kept(again, [0, 2], [1]) == dict(reference_cached=6, reference_computed=0)
    assert [t.reference for t in again] == [t.reference for t in trees]
    other = kept(long_trees(), [0, 1], [2])
    assert other["reference_computed"] == (0 if precision == "float32" else 6)
    # what stands in two passes has the values of the first
    twice = long_trees()
    found = kept(twice, [0, 2], [1], [2, 1, 0])
    assert found == dict(reference_cached=6, reference_computed=0)


def test_a_cache_of_rounded_weights_is_not_read(llama, tmp_path):
    "In bfloat16 files were once written by another function, under another name."
    key = references.sha256("1", "\n", "some model", "\n", "bfloat16")[:16]
    assert references.cache_key("some model", "bfloat16") != key
    known = references.sha256("1", "\n", "some model", "\n", "float32")[:16]
    assert references.cache_key("some model", "float32") == known


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
    trees = fresh_trees()
    path = folders[arch]
    assert fill(trees, tmp_path, path, layout=layout, token_budget=token_budget) == dict(
        reference_cached=0, reference_computed=9
    )
    want = directly(path, layout="plain")
    k = 0
    for t in trees:
        for b, s, r in zip(t.branches, t.skip, t.reference, strict=True):
            assert len(r) == len(b) - s
            assert_close(torch.tensor(r), want[k, : len(r)], rtol=1e-5, atol=1e-5)
            k += 1


def test_second_run_loads_no_model(llama, tmp_path):
    one = fresh_trees()
    two = fresh_trees()[::-1]
    fill(one, tmp_path, llama)
    assert fill(two, tmp_path, llama, layout="plain", refuse=True) == dict(
        reference_cached=9, reference_computed=0
    )
    assert [t.reference for t in two[::-1]] == [t.reference for t in one]
    assert len(list(tmp_path.iterdir())) == 1
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
    loader = cls(
        get_preferences(rows, "train"),
        byte_tokenizer(),
        batch_size=2,
        max_length=200,
        **more,
    )
    trees = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        trees += [t for step in loader.plan() for t in step]
    counts = fill(trees, tmp_path, llama, token_budget=200)
    branches = {
        (tuple(t.prompt_ids + b), s + len(t.prompt_ids))
        for t in trees
        for b, s in zip(t.branches, t.skip)
    }
    assert counts == dict(reference_cached=0, reference_computed=len(branches))
    assert len(branches) >= 10
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
    assert trees[-1].reference[0] == trees[0].reference[0]
    assert len(list(tmp_path.iterdir())) == 2
    assert_close(
        torch.tensor(trees[-1].reference[1]),
        directly(llama, [extra])[1, :1],
        rtol=1e-5,
        atol=1e-5,
    )
    assert fill(trees, tmp_path, llama, refuse=True)["reference_cached"] == 10


def test_same_tokens_with_another_beginning_are_not_confused(llama, tmp_path):
    """What is predicted is part of the hash: one token more of the prompt is another entry, and
    so is an empty answer.
    """
    trees = [
        Tree([9, 8], [[7, 20]], ["sample"], [0]),
        Tree([9, 8], [[7, 20]], ["sample"], [1]),
        Tree([9, 8, 7, 20], [[21]], ["sample"], [1]),
    ]
    assert fill(trees[:2], tmp_path, llama)["reference_computed"] == 2
    assert [len(t.reference[0]) for t in trees[:2]] == [2, 1]
    assert trees[0].reference[0][1] == pytest.approx(trees[1].reference[0][0], rel=1e-5)
    # nothing is predicted in the third, so nothing is missing
    fill(trees, tmp_path, llama, refuse=True)
    assert trees[2].reference == [[]]


def test_other_weights_or_precision_is_another_cache(llama, tmp_path):
    cache = tmp_path / "cache"
    moved = tmp_path / "moved"
    one = fresh_trees()
    two = fresh_trees()
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
    assert one[0].reference != two[0].reference
    assert len(list(cache.iterdir())) == 3
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
    raw = file.read_bytes()
    name = file.name
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
    policy = perturb(add_lora(load_policy(llama), **LORA)).train()
    trees = fresh_trees()
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


# Two processes


def two_processes(llama, out):
    "What each of two processes does; run by `accelerate launch`, see below."
    acc = start_processes(2, cpu=True)
    rank = int(os.environ["RANK"])
    calls = []
    trees = fresh_trees()

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
        out_ = ddp(tree=mine)
        refs = [r(mine) for r in wrapped]
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
        assert r["first"] == dict(reference_cached=0, reference_computed=9)
        assert r["second"] == dict(reference_cached=7, reference_computed=0)
        assert r["calls"] == 2
        assert r["one_tree"] == dict(reference_cached=0, reference_computed=3), (
            "one process has nothing to do"
        )
    assert a["reference"] == b["reference"]
    trees = fresh_trees()
    assert fill(trees, tmp_path / "cache", llama, refuse=True)["reference_cached"] == 9
    assert [t.reference for t in trees] == a["reference"]
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

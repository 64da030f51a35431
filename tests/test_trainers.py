"""Whole batches against the golden values.

And the same training whatever the number of processes, the token budget and the layout.
"""

import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import every
from golden import cases
from safetensors.torch import load_file

from halos_nb.templates import byte_tokenizer
from halos_nb.trees import Tree, make_batch
from halos_nb.loaders import Step
from halos_nb.configs import TrainConfig, config_json
from halos_nb.hub_sets import load_data
from halos_nb.feedback import group_advantages
from halos_nb.losses import ppo_loss
from halos_nb.head import logps_and_entropy
from halos_nb.checkpoints import CheckpointError
from halos_nb.models import (
    BranchLogps,
    BranchScores,
    BranchValues,
    dropouts,
    load_policy,
    load_reference,
    load_tokenizer,
    small_llama,
)
from halos_nb.records import prompt_id, read_jsonl, write_records
from halos_nb import train as train_room
from halos_nb.train import load_model, loader_options, make_trainer, train
from halos_nb.tree_trainer import Sums
from halos_nb.trainers import TRAINERS, PPOTrainer
from halos_nb.score import head_at
from halos_nb.jobs import launch
from halos_nb.settings import Profile

BY_NAME = {cls.__name__: cls for cls in TRAINERS.values()}
TOL = dict(rtol=1e-4, atol=1e-5)


# ---- golden batches


class Table(torch.nn.Module):
    "A model whose outputs depend on the current token alone; a classifier's: its row's mean."

    def __init__(self, policy=None, value=None, classifier=None):
        super().__init__()
        self.tables = torch.nn.ParameterDict()
        given = dict(policy=policy, value=value, classifier=classifier)
        for name, table in given.items():
            if table is not None:
                self.tables[name] = torch.nn.Parameter(torch.tensor(table))

    def forward(self, tree):
        ids, mask = tree.input_ids.flatten()[tree.predict], tree.attention_mask[..., None]
        if "classifier" in self.tables:
            logits = self.tables["classifier"][tree.input_ids] * mask
            return BranchScores(logits.sum(1) / mask.sum(1))
        logits = self.tables["policy"][ids]
        logps, entropy = logps_and_entropy(logits, tree.target)
        if "value" not in self.tables:
            return BranchLogps(tree.table(logps))
        values = self.tables["value"][ids]
        return BranchValues(tree.table(logps), tree.table(values), tree.table(entropy))


ROLES = dict(target="completion", chosen="chosen", rejected="rejected", KL="KL")


def golden_batch(batch):
    """The reference's matrices as trees, and the rows in the order of the trees.

    Prompts may differ within a pair, so nothing is shared; a GRPO group is one tree.
    """
    names = [name for name in ROLES if f"{name}_labels" in batch]
    groups = {}
    for i in range(len(batch[f"{names[0]}_labels"])):
        prompt = batch["prompt_id"][i] if "prompt_id" in batch else i
        groups.setdefault(prompt, []).append(i)
    advantages = None
    if "score" in batch:
        advantages = group_advantages(batch["prompt_id"], batch["score"])[0]
    trees = []
    for group in groups.values():
        tree = Tree([], [], [], [])
        for i in group:
            for name in names:
                add_golden_branch(tree, batch, name, i)
        if advantages:
            tree.facts["score"] = [batch["score"][i] for i in group]
            tree.facts["advantage"] = [advantages[i] for i in group]
        trees.append(tree)
    return make_batch(trees, "plain"), [i for group in groups.values() for i in group]


def add_golden_branch(tree, batch, name, i):
    "Row i of a matrix of the reference as a branch, without padding."
    ids = batch[f"{name}_combined_input_ids"][i]
    mask = batch[f"{name}_combined_attention_mask"][i]
    labels = batch[f"{name}_labels"][i]
    known = name == "target" and "status" in batch
    tree.branches.append([token for token, real in zip(ids, mask) if real])
    tree.meanings.append(batch["status"][i] if known else ROLES[name])
    tree.skip.append(next(n for n, label in enumerate(labels) if label != -100))


ALONE = SimpleNamespace(device=torch.device("cpu"), reduce=lambda x, _: x)


def bare(cls, model, reference, hyper):
    "A trainer without transformers' loop around it."
    trainer = cls.__new__(cls)
    trainer.model = model
    trainer.accelerator = ALONE
    trainer.args = SimpleNamespace(device=torch.device("cpu"))
    defaults = dict(humanline=False, use_margin=False, centring=0.0)
    defaults |= dict(label_smoothing=0.0, debias_length=False, objectives=[])
    trainer.config = SimpleNamespace(**defaults | hyper)
    trainer.reference = lambda batch: reference(tree=batch).logps.detach()
    return trainer


class HalosPPO(PPOTrainer):
    "PPO as HALOs has it: the ratio to the reference, and a penalty that rewards leaving it."

    def loss(self, batch, now, before):
        cfg = self.config
        rolled = before.old_logps, before.advantages, before.discounted_future_rewards
        weights = cfg.cliprange, cfg.critic_coef, cfg.KL_coef
        return ppo_loss(*now, *rolled, batch.mask, *weights, self.clamp)


@cases("trainer_end_to_end")
def test_golden_batches(case):
    cls, want, inputs = BY_NAME[case["trainer"]], case["outputs"], case["inputs"]
    cls = HalosPPO if cls is PPOTrainer else cls
    model = Table(*(inputs.get(f"{k}_table") for k in ("policy", "value", "classifier")))
    reference = None
    if "reference_table" in inputs:
        reference = Table(inputs["reference_table"])
    trainer = bare(cls, model, reference, case["hyper"])
    batch, order = golden_batch(inputs["batch"])
    (batch,) = trainer.prepare(Step([batch], len(batch.trees), len(batch.target)))
    losses, metrics = trainer.get_batch_metrics(batch, "train")
    loss = losses.sum() / trainer.batch_size(batch)
    torch.testing.assert_close(loss.item(), want["loss"], **TOL)
    check_metrics(trainer, metrics, want["metrics"], order)
    if cls is HalosPPO:
        check_rollout(batch.rollout, batch.mask, case["rollout"])
    loss.backward()
    names = dict(policy_table="policy", value_table="value", classifier_table="classifier")
    for name, grad in case["grads"].items():
        torch.testing.assert_close(model.tables[names[name]].grad, torch.tensor(grad), **TOL)


def check_metrics(trainer, metrics, want, order):
    sums = Sums()
    sums.add(metrics)
    means = trainer.derive(sums.means(ALONE))
    for name, values in want.items():
        values = torch.tensor(values, dtype=torch.float64)
        if name.endswith("/accuracies"):  # the predecessor's ties are wrong, ours half right
            margins = torch.tensor(want[name.replace("accuracies", "margins")])
            values = values + (margins == 0).double() / 2
        if name == "_advantages":
            got = trainer_advantages(metrics, order)
        elif name.startswith("logps_train"):
            # the reference keeps tokens, we keep their sum
            got, values = metrics[name].double(), values.sum(-1)
        elif name == "loss/train" and values.dim() == 2:
            # SFT: the matrix whose sum is the loss
            got, values = means[name], values.sum()
        elif values.numel() == 0:
            # a mean over nothing
            assert math.isnan(means[name]), name
            continue
        elif (
            values.dim()
            and isinstance(metrics.get(name), torch.Tensor)
            and len(metrics[name]) == len(values)
        ):
            got, values = (
                metrics[name].double(),
                values[order] if len(values) == len(order) else values,
            )
        else:
            got, values = means[name], values.mean()
        torch.testing.assert_close(
            torch.as_tensor(got, dtype=torch.float64),
            values,
            msg=lambda m, n=name: f"{n}: {m}",
            **TOL,
        )


def trainer_advantages(metrics, order):
    "Signed advantages are the loader's; their size is a metric."
    rewards = metrics["rewards_train/rewards"].tolist()
    sizes = metrics["rewards_train/groupsize"].tolist()
    ids, i = [], 0
    while i < len(sizes):
        ids += [i] * int(sizes[i])
        i += int(sizes[i])
    advantages = torch.tensor(group_advantages(ids, rewards)[0], dtype=torch.float64)
    torch.testing.assert_close(
        metrics["rewards_train/advantage"].double(), advantages.abs(), **TOL
    )
    return advantages[torch.tensor(order).argsort()]


def check_rollout(rollout, mask, want):
    real = torch.tensor(want["masks"]).bool()
    for name, golden in dict(
        old_logps="logprobs",
        values="values",
        advantages="advantages",
        returns="returns",
        discounted_future_rewards="discounted_future_rewards",
    ).items():
        torch.testing.assert_close(
            getattr(rollout, name)[mask],
            torch.tensor(want[golden])[real],
            rtol=1e-4,
            atol=1e-4 if name == "advantages" else 1e-5,
        )


# ---- whole trainings on a tiny model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A tiny model, seven pairs of very different lengths, five prompts with scored answers."
    home, tok = tmp_path_factory.mktemp("trainers"), byte_tokenizer()
    small_llama(tok, hidden_size=32, initializer_range=0.2).save_pretrained(home / "start")
    tok.save_pretrained(home / "start")
    rows = []
    for i in range(7):
        prompt = "Say it " + "again " * (i * i % 7)
        row = {"prompt": prompt, "chosen": "Yes" + "!" * (3 * i), "rejected": "No."}
        row |= dict(helpful_chosen=i, helpful_rejected=3)  # one pair is equal
        if i % 3:  # nobody rated the others
            row |= dict(brief_chosen=0, brief_rejected=1)
        rows.append(row)
    (home / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    scored = []
    for i in range(5):
        for k in range(1 + i % 4):
            scored.append(scored_answer("Count " + "up " * (2 * i), k, float((i * k) % 3)))
    write_records(home / "scores.json", scored)
    return home


def scored_answer(question, k, reward):
    "Scalar feedback on the k-th answer to a question."
    prompt = [{"role": "user", "content": question}]
    return dict(
        prompt_id=prompt_id(prompt),
        sample_id=k,
        prompt=prompt,
        output=[{"role": "assistant", "content": "one " * (k + 1)}],
        reward=reward,
        type="scalar_feedback",
    )


def config(home, loss, name, **more):
    data = [str(home / ("scores.json" if loss in ("grpo", "raft") else "pairs.jsonl"))]
    return TrainConfig(
        **dict(
            loss=loss,
            model=str(home / "start"),
            train_datasets=data,
            test_datasets=data,
            exp_name=name,
            cache_dir=str(home),
            lr=2e-3,
            warmup=0,
            batch_size=3,
            epochs=2,
        )
        | more
    )


def weights(folder):
    tensors = load_file(Path(folder) / "FINAL/model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def apart(a, b):
    return (weights(a) - weights(b)).abs().max().item()


def drift(a, b):
    """How far two runs are apart, in units of how far they have come.

    Adam makes a whole step of a gradient that is nothing but rounding, so single weights
    differ.
    """
    start = load_file(Path(a).parent / "start/model.safetensors")
    one = load_file(Path(a) / "FINAL/model.safetensors")
    two = load_file(Path(b) / "FINAL/model.safetensors")
    assert one.keys() == two.keys()
    moved = distance(one, start)
    assert moved > 1e-3
    return distance(one, two) / moved


def distance(a, b):
    "The length of the difference of what two models have in common."
    differences = []
    for name in sorted(b):
        if name in a and a[name].shape == b[name].shape:
            differences.append((a[name] - b[name]).flatten())
    return torch.cat(differences).norm().item()


LOSSES = list(TRAINERS)
LORA = dict(use_peft=True, lora_r=4, lora_alpha=8, lora_dropout=0.0)
HUMANLINE = dict(humanline=True, log_epsilon_P=-0.02, log_epsilon_R=0.03, sync_reference=2)
PPO_OPTIONS = dict(
    ppo_reward="score",
    KL_in="reward",
    critic_detach=True,
    critic_lr=1e-2,
    critic_max_grad_norm=0.1,
    critic_cliprange=0.2,
)
GRPO_OPTIONS = dict(
    normalise="sequence", epsilon_high=0.3, advantage_scale="round", old_policy="pass"
)
VARIANTS = {loss: (loss, {}) for loss in LOSSES} | {
    "raft": ("raft", dict(batch_size=1)),  # two prompts have a best answer
    "dpo-lora": ("dpo", LORA),
    "bradley-terry-lora": ("bradley-terry", LORA),
    "ppo-lora": ("ppo", LORA),
    "dpo-humanline": ("dpo", HUMANLINE),
    "kto-humanline": ("kto", HUMANLINE),
    "grpo-humanline": ("grpo", HUMANLINE),
    "dpo-lora-humanline": ("dpo", LORA | HUMANLINE),
    "ppo-epochs": ("ppo", dict(ppo_epochs=3)),
    "ppo-options": ("ppo", PPO_OPTIONS),
    "grpo-options": ("grpo", GRPO_OPTIONS),
    "dpo-ema": ("dpo", dict(reference="ema", ema_decay=0.5)),
    "bradley-terry-centred": ("bradley-terry", dict(centring=0.1)),
    "bradley-terry-smooth": ("bradley-terry", dict(label_smoothing=0.1)),
    "bradley-terry-objectives": ("bradley-terry", dict(objectives="helpful, brief")),
}
# CI trains every method on two processes, and each option with one of them
EVERY = os.environ.get("HALOS_NB_LONG") == "every"
SEEN = ["bradley-terry-lora", "ppo-lora", "dpo-lora-humanline"]
SEEN += ["kto-humanline", "grpo-humanline", "bradley-terry-smooth"]
ON_TWO = [name for name in VARIANTS if EVERY or name not in SEEN]


@pytest.fixture(scope="module")
def both(home):
    "Every variant trained by one process, and again by two, which import once for them all."
    for name in ON_TWO:
        loss, more = VARIANTS[name]
        train(config(home, loss, f"{name}-1", **more))
        (home / f"{name}.json").write_text(
            config_json(config(home, loss, f"{name}-2", num_processes=2, **more))
        )
    files = [home / f"{name}.json" for name in ON_TWO]
    for how in ("full", "lora", "cached"):
        for precision in ("float32", "bfloat16"):
            cfg = at_start(home, how, precision, num_processes=2, test_datasets=[])
            files.append(home / f"{cfg.exp_name}.json")
            files[-1].write_text(config_json(cfg))
    (home / "nan-2.json").write_text(config_json(broken(home, 2)))
    run = launch_two(*files, home / "nan-2.json")
    assert run.returncode == 0, run.stderr[-3000:]
    return home


def launch_two(*files, timeout=400):
    options = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --num_cpu_threads_per_process 1 --main_process_port 0"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    script = str(Path(__file__).parent / "train_all.py")
    return subprocess.run(
        [*launch, script, *map(str, files)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize("name", ON_TWO)
def test_two_processes_train_the_same_model(both, name):
    "Three steps an epoch of 3, 3 and 1 pairs: in the last one process has nothing to do."
    one, two = (both / f"{name}-{n}" for n in (1, 2))
    assert drift(one, two) < 5e-3
    other = dict(sft="dpo").get(name, "sft")
    if name != "csft" and "bradley" not in name:
        assert apart(one, both / f"{other}-1") > 1e-3, (
            "another method gives another model, or this compares nothing"
        )
    assert same_metrics(one, two, leave=("total_flos", "train_loss")) > 50
    if VARIANTS[name][0] not in ("sft", "csft", "raft", "kto", "grpo", "ppo"):
        judged = [r["index"] for r in read_jsonl(two / "eval_scores.jsonl")]
        assert judged == [r["index"] for r in read_jsonl(one / "eval_scores.jsonl")]
        # of one of the pairs no objective says anything
        pairs = 6 if "objectives" in name else 7
        assert judged == list(range(pairs)), "every held-out pair once, in order"


def trained_by(home, launcher):
    "A training of two processes, started as our jobs are."
    cfg = config(home, "dpo", f"by-{launcher}")
    job = launch("train", cfg, Profile(num_processes=2, launcher=launcher), home / launcher)
    job.wait(show=False)
    return home / f"by-{launcher}"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")
def test_two_processes_train_the_same_weights_by_both_launchers(both):
    "`both` was trained by `accelerate launch`."
    forked = trained_by(both, "fork")
    assert apart(forked, both / "dpo-2") == 0
    assert drift(forked, both / "dpo-2") == 0  # which makes sure that they have moved
    if EVERY:  # as a job, too
        assert apart(forked, trained_by(both, "accelerate")) == 0


CLOCK = (
    "tokens_per_second",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
)
COST = ("tokens", "padding", "shared", "layout", "total_flos", "train_loss")


def same_metrics(one, two, leave=()):
    """How many numbers of two runs' metrics were compared.

    They agree to float tolerance, and what is missing is missing in both.
    """
    compared = 0
    logs = read_jsonl(one / "metrics.jsonl"), read_jsonl(two / "metrics.jsonl")
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        for k in a.keys() - {*CLOCK, *leave}:
            want = pytest.approx(b[k], rel=1e-3, abs=1e-4) if isinstance(b[k], float) else b[k]
            assert a[k] == want, (k, a[k], b[k])
            compared += 1
    return compared


CUTS = {
    "one token": dict(token_budget=1),
    "two forward passes": dict(microbatch_size=2),
    "three": dict(microbatch_size=1),
    "plain": dict(layout="plain"),
    "plain, cut": dict(layout="plain", token_budget=150),
}


# pairs and rollouts in every way; one loss of each other kind in the two that are furthest
# from the first, the rest in one of them
KINDS = LOSSES if EVERY else ["sft", "dpo", "kto", "grpo", "ppo", "bradley-terry"]
CUT_LOSSES = [
    (loss, cut)
    for loss in KINDS
    for cut in CUTS
    if EVERY or loss in ("dpo", "ppo") or cut in ("one token", "plain, cut")
]
CUT_LOSSES += [(loss, "plain, cut") for loss in LOSSES if loss not in KINDS]


@pytest.mark.parametrize("loss, cut", CUT_LOSSES)
def test_cut_and_layout_do_not_change_the_model(both, loss, cut):
    "The optimiser step is the same however it is computed; metrics too."
    train(config(both, loss, f"{loss}-cut", **VARIANTS[loss][1] | CUTS[cut]))
    assert drift(both / f"{loss}-1", both / f"{loss}-cut") < 5e-3
    assert same_metrics(both / f"{loss}-1", both / f"{loss}-cut", leave=COST) > 40


def test_same_seed_same_bits(home):
    for name in ("a", "b"):
        train(config(home, "dpo", name, seed=5))
    train(config(home, "dpo", "c", seed=6))
    assert torch.equal(weights(home / "a"), weights(home / "b"))
    assert not torch.equal(weights(home / "a"), weights(home / "c"))


def test_wrong_number_of_processes_stops(home):
    with pytest.raises(RuntimeError, match="asked for 2 processes, Accelerate started 1"):
        train(config(home, "sft", "x", num_processes=2))


# ---- other architectures

ARCHITECTURES = ("llama", "qwen2", "gpt_neox", "mistral")


def small_model(arch, folder):
    "A model of this architecture and its tokenizer, saved."
    from transformers import AutoConfig, AutoModelForCausalLM

    tok = byte_tokenizer()
    torch.manual_seed(0)
    more = {} if arch == "gpt_neox" else dict(num_key_value_heads=2)
    cfg = AutoConfig.for_model(
        arch,
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
        bos_token_id=None,
        **more,
    )
    AutoModelForCausalLM.from_config(cfg).save_pretrained(folder)
    tok.save_pretrained(folder)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request, home):
    small_model(request.param, home / request.param)
    return request.param


# the architecture decides on attention and heads: CI has every loss with one, and one loss of
# each head with the others
HEADS = ("dpo", "ppo", "bradley-terry")


def with_every_architecture():
    "An architecture and a loss of each test."
    for arch in ARCHITECTURES:
        for loss in LOSSES:
            ci = arch == ARCHITECTURES[0] or loss in HEADS
            yield pytest.param(arch, loss, marks=[] if ci else every)


@pytest.mark.parametrize(
    "architecture, loss", with_every_architecture(), indirect=["architecture"]
)
def test_tree_is_plain(home, architecture, loss, monkeypatch):
    "Loss and gradients of a whole step in both layouts, for every architecture."
    monkeypatch.setattr("halos_nb.train.KEPT_TARGETS", 0)  # the reference stays, to be moved
    grads = {}
    for layout in ("tree", "plain"):
        cfg = config(
            home,
            loss,
            f"{architecture}-{layout}",
            model=str(home / architecture),
            layout=layout,
            batch_size=7,
        )
        trainer, _ = make_trainer(cfg)
        if trainer.reference:
            move(trainer.reference.model)
        step = next(iter(trainer.loader))
        value = trainer.training_step(trainer.model, step)
        parameters = [p for p in trainer.model.parameters() if p.grad is not None]
        grads[layout] = value, torch.cat([p.grad.flatten() for p in parameters])
    (a, ga), (b, gb) = grads.values()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert ga.abs().max() > 1e-4
    assert (ga - gb).abs().max() <= 1e-5 * max(1, ga.abs().max())


def test_these_architectures_choose_the_tree(home, architecture):
    trainer, _ = make_trainer(config(home, "dpo", "auto", model=str(home / architecture)))
    assert trainer.layout.name == "tree", trainer.layout.reason


def move(model):
    "Make the reference another model than the policy, so that log-ratios are not all zero."
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)


# ---- rounds


@pytest.mark.parametrize(
    "name", ["dpo", "kto", "grpo", "ppo", "simpo", "dpo-lora", "ppo-lora", "dpo-humanline"]
)
def test_a_round_goes_on_where_the_last_one_ended(home, name):
    """Two rounds that hand over a checkpoint equal two epochs without a stop.

    In weights, moments, schedule and counters. Each step is the whole epoch, so that its order
    plays no part.
    """
    loss, more = VARIANTS[name]
    if more.get("humanline"):
        # a larger step would leave no token within the clamp, and no gradient
        more = more | dict(sync_reference=0, lr=1e-4)
    if loss in ("grpo", "ppo"):
        # each round has a policy of its own that sampled; one run has one
        more = more | dict(old_policy="reference")
    kw = dict(batch_size=20, warmup=2.0, online=False, **more)
    train(config(home, loss, "two", epochs=2, **kw))
    train(config(home, loss, "first", epochs=1, **kw))
    train(
        config(
            home,
            loss,
            "second",
            epochs=1,
            from_checkpoint=str(home / "first/FINAL"),
            load_from=str(home / "start"),
            **kw,
        )
    )
    unbroken, continued = steps_of(home / "two")[1], steps_of(home / "second")[0]
    assert apart(home / "first", home / "second") > 1e-5
    # the mismatched answers follow the order of the epoch: same size of step, same schedule
    if loss == "kto":
        assert unbroken["learning_rate"] == continued["learning_rate"]
    else:
        assert apart(home / "two", home / "second") < 2e-6
        assert unbroken["grad_norm"] == pytest.approx(continued["grad_norm"], rel=1e-5)
    assert unbroken["total_steps"] == continued["total_steps"]
    assert unbroken["total_examples"] == continued["total_examples"]


def steps_of(folder):
    "The logs of a run's optimiser steps."
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


def test_without_its_moments_a_round_would_go_elsewhere(home):
    "The check above can fail: the same weights with a fresh optimiser give another model."
    train(config(home, "dpo", "two", epochs=2, batch_size=20))
    train(config(home, "dpo", "first", epochs=1, batch_size=20))
    train(
        config(
            home,
            "dpo",
            "fresh",
            epochs=1,
            batch_size=20,
            model=str(home / "first/FINAL"),
            load_from=str(home / "start"),
        )
    )
    assert apart(home / "two", home / "fresh") > 1e-5


def test_wrong_checkpoints_are_refused(home):
    train(config(home, "dpo", "full", epochs=1))
    train(config(home, "dpo", "lora", epochs=1, **LORA))
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        train(config(home, "dpo", "x", from_checkpoint=str(home / "full/FINAL"), **LORA))
    with pytest.raises(ValueError, match="trained with LoRA"):
        train(config(home, "dpo", "x", from_checkpoint=str(home / "lora/FINAL")))
    with pytest.raises(FileNotFoundError, match="optimizer.pt"):
        train(config(home, "dpo", "x", from_checkpoint=str(home / "start")))
    with pytest.raises(ValueError, match="lora_alpha"):
        train(
            config(
                home,
                "dpo",
                "x",
                from_checkpoint=str(home / "lora/FINAL"),
                **LORA | dict(lora_alpha=16),
            )
        )


# ---- LoRA


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_a_trained_model_generates_with_its_cache_as_before(home, more):
    "transformers' Trainer switches `use_cache` off, and would save it so."
    train(config(home, "dpo", "run", **more))
    saved = json.loads((home / "run/FINAL/config.json").read_text())
    assert saved["use_cache"] is True


def test_lora_trains_adapters_and_merges_them(home):
    "The final model is plain transformers, and what is not adapted has not moved."
    from transformers import AutoModelForCausalLM

    train(config(home, "dpo", "lora", save_every=2, keep_steps=0, **LORA))
    start = load_file(home / "start/model.safetensors")
    final = load_file(home / "lora/FINAL/model.safetensors")
    assert sorted(start) == sorted(final)
    moved = {k for k in start if not torch.equal(start[k], final[k])}
    assert moved and all("proj" in k for k in moved), (
        "linear layers of the body, and nothing else"
    )
    AutoModelForCausalLM.from_pretrained(home / "lora/FINAL")
    steps = sorted(p.name for p in (home / "lora").glob("step-*"))
    assert steps == ["step-2", "step-4", "step-6"]
    assert not (home / "lora/step-2/model.safetensors").exists()
    assert (home / "lora/step-2/adapter/adapter_model.safetensors").exists()


def test_lora_reward_model_keeps_its_head(home):
    "Held-out scores before saving equal those of the merged and reloaded model."
    result = train(config(home, "bradley-terry", "rm", **LORA))
    rows = read_jsonl(home / "rm/eval_scores.jsonl")
    cfg = config(home, "bradley-terry", "again", model=result.model)
    trainer, _ = make_trainer(cfg)
    trainer.evaluate()
    for row, score in zip(rows, trainer.pair_scores, strict=True):
        assert row["index"] == score.number
        assert row["chosen"] == pytest.approx(score.chosen, abs=1e-5)
        assert row["rejected"] == pytest.approx(score.rejected, abs=1e-5)
    assert any(abs(r["chosen"]) > 1e-3 for r in rows)


def test_lora_reference_is_the_policy_without_adapters(home):
    trainer, _ = make_trainer(config(home, "dpo", "x", **LORA))
    own = load_reference(str(home / "start"))
    for step in trainer.loader:
        trainer.training_step(trainer.model, step)
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p += 0.1
    batch = next(iter(trainer.loader)).batches[0]
    torch.testing.assert_close(trainer.reference_logps(batch), own(tree=batch).logps, **TOL)
    with torch.no_grad():
        moved = trainer.model(tree=batch).logps - trainer.reference_logps(batch)
    assert moved.abs().max() > 1e-2


# ---- humanline


@pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])
def test_the_reference_is_synced(home, lora):
    "Before the optimiser's step: at the next loss it is the policy of one step ago."
    train(config(home, "dpo", "h", epochs=2, humanline=True, **lora))
    logs = steps_of(home / "h")
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for row in logs[1:]:
        assert abs(row["rewards_train/margins"]) > 1e-7
        assert row["rewards_train/chosen_unclamped"] > 0


@pytest.mark.parametrize("every", [1, 2])
def test_the_synced_reference_is_the_policy_before_its_last_step(home, every):
    cfg = config(home, "dpo", "s", epochs=2, save_every=1, keep_steps=0, **HUMANLINE)
    trainer, _ = make_trainer(replace(cfg, sync_reference=every))
    trainer.train()
    steps = trainer.state.global_step
    synced = steps - steps % every - 1  # optimiser steps that it has seen
    saved = load_file(home / f"s/step-{synced}/model.safetensors")
    reference = dict(trainer.reference.model.named_parameters())
    assert reference.keys() >= saved.keys()
    for name, weight in saved.items():
        assert torch.equal(reference[name], weight), name


def test_humanline_of_methods_without_pairs_moves(home):
    for loss, name in (("kto", "chosen"), ("grpo", "KL")):
        more = dict(humanline=True, log_epsilon_P=-0.5, log_epsilon_R=0.5)
        train(config(home, loss, "h", epochs=2, **more))
        logs = steps_of(home / "h")
        assert any(abs(row[f"rewards_train/{name}"] or 0) > 1e-7 for row in logs[1:])


# ---- a reference that is asked first


@pytest.mark.parametrize("layout", ["tree", "plain"])
@pytest.mark.parametrize("loss", ["dpo", "kto", "grpo", "ppo"])
def test_a_reference_that_is_asked_first_says_the_same_and_is_gone(
    home, loss, layout, monkeypatch
):
    "To the bit, also in steps that are cut; of its weights nothing is left."
    more = dict(layout=layout, token_budget=60, epochs=2, lr=1e-3)
    rows = {}
    loaded = []
    load = train_room.load_reference

    def watched(*args):
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(train_room, "load_reference", watched)
    for kept in (4_000_000, 0):
        monkeypatch.setattr("halos_nb.train.KEPT_TARGETS", kept)
        trainer, _ = make_trainer(config(home, loss, f"first-{kept}", **more))
        assert hasattr(trainer.reference, "model") is not bool(kept)
        assert (loaded.pop()() is None) is bool(kept)
        trainer.train()
        names = ("loss", "grad_norm", "rewards_train/KL", "rewards_train/margins")
        logs = [row for row in trainer.state.log_history if "loss" in row]
        rows[bool(kept)] = [{k: row[k] for k in names if k in row} for row in logs]
        counted = trainer.loader.counts["reference_computed"]
        assert bool(counted) is bool(kept)
    assert rows[True] == rows[False]


# ---- a reference that moves


def test_the_average_goes_on_in_the_next_round(home):
    "The mean of all policies so far, each step weighing what is new by 1 - ema_decay."
    more = dict(reference="ema", ema_decay=0.75, save_every=1, keep_steps=0)
    train(config(home, "dpo", "ema", epochs=1, **more))
    start = load_file(home / "start/model.safetensors")
    mean = {name: weight.clone() for name, weight in start.items()}
    for step in range(1, 4):
        policy = load_file(home / f"ema/step-{step}/model.safetensors")
        for name in mean:
            mean[name] = 0.75 * mean[name] + 0.25 * policy[name]
    kept = load_file(home / "ema/FINAL/reference/model.safetensors")
    for name, weight in kept.items():
        torch.testing.assert_close(weight, mean[name], rtol=1e-5, atol=1e-6)
    again = config(
        home, "dpo", "ema2", epochs=1, from_checkpoint=str(home / "ema/FINAL"), **more
    )
    trainer, _ = make_trainer(again)
    for name, weight in trainer.reference.model.named_parameters():
        assert torch.equal(weight, kept[name])
    with pytest.raises(FileNotFoundError, match="has no reference"):
        train(config(home, "dpo", "plain", epochs=1))
        make_trainer(replace(again, from_checkpoint=str(home / "plain/FINAL")))


@pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])
def test_the_last_rounds_policy_as_reference(home, lora):
    "In its first step a round that is compared with where it starts has moved nowhere."
    train(config(home, "dpo", "one", epochs=1, **lora))
    later = dict(from_checkpoint=str(home / "one/FINAL"), load_from=str(home / "start"))
    for reference, moved in (("previous", False), ("sft", True)):
        train(config(home, "dpo", "two", epochs=1, reference=reference, **later, **lora))
        first = steps_of(home / "two")[0]
        assert (abs(first["rewards_train/margins"]) > 1e-6) is moved


def test_the_unclamped_share_is_reported(home):
    fixed = dict(humanline=True, sync_reference=0)
    wide = fixed | dict(log_epsilon_P=-100.0, log_epsilon_R=100.0)
    tight = fixed | dict(log_epsilon_P=-0.2, log_epsilon_R=0.2)
    shares = {}
    for name, more in dict(wide=wide, none={}, tight=tight).items():
        train(config(home, "dpo", name, epochs=2, **more))
        shares[name] = [r["rewards_train/chosen_unclamped"] for r in steps_of(home / name)]
    nothing = "a clamp that nothing reaches changes nothing"
    assert apart(home / "wide", home / "none") < 1e-6, nothing
    assert shares["wide"][0] == 0, "on step one no token has moved"
    assert set(shares["wide"][1:]) == {1.0}
    assert set(shares["none"]) == {1.0}
    assert any(0 < x < 1 for x in shares["tight"])
    assert apart(home / "tight", home / "none") > 1e-4


# ---- the reference's log-probs from a cache


@pytest.mark.parametrize("loss", ["dpo", "kto", "grpo", "ppo"])
def test_cached_reference_trains_the_same_model(both, loss, monkeypatch):
    first = train(config(both, loss, "cached", reference_cache=str(both / f"cache-{loss}")))
    assert apart(both / f"{loss}-1", both / "cached") < 1e-5
    assert first.counts["reference_computed"] > 0 and first.counts["reference_cached"] == 0
    monkeypatch.setattr(
        "halos_nb.train.load_reference",
        lambda *a: pytest.fail("the reference was loaded although all is known"),
    )
    again = train(config(both, loss, "again", reference_cache=str(both / f"cache-{loss}")))
    assert again.counts["reference_computed"] == 0
    assert again.counts["reference_cached"] == first.counts["reference_computed"]
    assert torch.equal(weights(both / "cached"), weights(both / "again"))


def test_another_reference_has_another_cache(home):
    cache = str(home / "cache")
    train(config(home, "dpo", "one", reference_cache=cache, epochs=1))
    start = dict(load_from=str(home / "one/FINAL"), model=str(home / "start"), epochs=1)
    other = train(config(home, "dpo", "two", reference_cache=cache, **start))
    assert other.counts["reference_cached"] == 0
    train(config(home, "dpo", "plain", **start))
    assert apart(home / "two", home / "plain") < 1e-6


# ---- evaluation, checkpoints, ends


def test_timetable(home):
    train(config(home, "dpo", "t", eval_every=2, save_every=4, keep_steps=1))
    logs = read_jsonl(home / "t/metrics.jsonl")
    assert [r["step"] for r in logs if "eval_loss" in r] == [0, 2, 4, 6]
    assert [p.name for p in (home / "t").glob("step-*")] == ["step-4"]
    start = dict(from_checkpoint=str(home / "t/step-4"), load_from=str(home / "start"))
    late = train(config(home, "dpo", "late", epochs=1, **start))
    counters = json.loads((Path(late.model) / "counters.json").read_text())
    assert counters["total_steps"] == 4 + 3
    train(config(home, "dpo", "quiet", eval_at_start=False, epochs=1))
    quiet = read_jsonl(home / "quiet/metrics.jsonl")
    assert [r["step"] for r in quiet if "eval_loss" in r] == [3]


def test_evaluation_between_two_updates_changes_nothing(home):
    "PPO uses a step's rollouts for several updates; an evaluation does not renew them."
    for name, more in dict(seen={"eval_every": 1}, unseen={}).items():
        train(config(home, "ppo", name, ppo_epochs=3, epochs=1, **more))
    assert torch.equal(weights(home / "seen"), weights(home / "unseen"))


def ppo_step(home, **more):
    "A PPO trainer and the batches of its first step, one tree each, still without rollouts."
    trainer, _ = make_trainer(config(home, "ppo", "x", microbatch_size=1, **more))
    return trainer, next(iter(trainer.loader))


def test_rollouts_hang_on_their_batches(home, monkeypatch):
    """Two batches whose ids coincide keep their own rollouts.

    CPython gives an id again after garbage collection; here all ids are the same.
    """
    trainer, step = ppo_step(home)
    want = [m for _, m in all_metrics(trainer, trainer.prepare(step))]
    monkeypatch.setattr("halos_nb.trainers.id", lambda x: 7, raising=False)
    trainer, step = ppo_step(home)
    batches = trainer.prepare(step)
    assert len(batches) > 1
    for (_, got), known in zip(all_metrics(trainer, batches), want, strict=True):
        assert got.keys() == known.keys()
        for name in got:
            torch.testing.assert_close(got[name], known[name])


def all_metrics(trainer, batches):
    return [trainer.get_batch_metrics(batch, "train") for batch in batches]


def test_rollouts_of_a_step_outlive_the_next_step(home):
    "Batches of a step that is over still have the rollouts that were made for them."
    trainer, _ = ppo_step(home)
    first, second = list(trainer.loader)[:2]
    batches = trainer.prepare(first)
    before = all_metrics(trainer, batches)
    trainer.prepare(second)
    for (losses, _), (again, _) in zip(before, all_metrics(trainer, batches), strict=True):
        torch.testing.assert_close(losses, again)


def test_no_pickle_is_left(home):
    train(config(home, "dpo", "p", save_every=3))
    assert not list((home / "p").rglob("training_args.bin"))
    assert not list((home / "p").rglob("*.pkl"))


@pytest.mark.parametrize("n, steps", [(3, 1), (4, 2), (9, 4), (100, 6)])
def test_n_examples_ends_early(home, n, steps):
    train(config(home, "dpo", "n", n_examples=n))
    logs = steps_of(home / "n")
    assert len(logs) == steps
    assert logs[-1]["total_examples"] == min(n, 14)


# ---- precision


def test_bfloat16_keeps_float32_masters(home):
    "A learning rate far below bfloat16's spacing still moves the weights, saved in float32."
    train(config(home, "dpo", "b", precision="bfloat16", lr=1e-6, epochs=4))
    start = load_file(home / "start/model.safetensors")
    final = load_file(home / "b/FINAL/model.safetensors")
    big = max(start, key=lambda k: start[k].abs().max())
    assert final[big].dtype == torch.float32
    moved = (start[big] != final[big])[start[big].abs() > 0.1]
    assert moved.float().mean() > 0.5


# ---- data at the edge


def write(home, name, rows):
    (home / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return dict(train_datasets=[str(home / name)], test_datasets=[str(home / name)])


PAIR = {"prompt": "Name a star.", "chosen": "Vega.", "rejected": "Io."}


@pytest.mark.parametrize("loss", LOSSES)
def test_one_example(home, loss):
    "One pair (or one group), in batches that it does not fill: nothing hangs, all is finite."
    result = train(config(home, loss, "one", **write(home, "one.jsonl", [PAIR])))
    assert weights(home / "one").isfinite().all()
    assert math.isfinite(result.evaluation["eval_loss"])


@pytest.mark.parametrize("loss", ["kto", "ppo", "csft"])
@pytest.mark.parametrize("label", [True, False])
def test_one_side_only(home, loss, label):
    "Only good or only bad answers."
    rows = [
        {"prompt": f"Say {w}.", "completion": f"{w}!", "label": label}
        for w in ("one", "two", "three", "four")
    ]
    train(config(home, loss, "side", **write(home, "side.jsonl", rows)))
    logs = steps_of(home / "side")
    assert weights(home / "side").isfinite().all()
    assert all(math.isfinite(r["loss"]) for r in logs)
    if loss == "kto":
        absent = "rejected" if label else "chosen"
        assert logs[0][f"rewards_train/{absent}"] is None, "a mean over nothing is no number"


def test_equal_rewards_pull_to_the_reference_only(home):
    "A group of equal rewards has no advantage; the loss is the KL term, zero at first."
    rows = [scored_answer("Count.", k, 1.0) for k in range(3)]
    rows += [scored_answer("Name a star.", k, float(k)) for k in range(2)]
    write_records(home / "equal.json", rows)
    data = dict(train_datasets=[str(home / "equal.json")], test_datasets=[])
    result = train(config(home, "grpo", "equal", batch_size=1, epochs=1, **data))
    assert result.counts["groups_without_signal"] == 1
    logs = steps_of(home / "equal")
    assert result.counts["steps_without_gradient"] == (logs[0]["grad_norm"] == 0)
    assert 0 in [round(abs(row["loss"]), 3) for row in logs]


# ---- a run that learnt nothing


def test_groups_without_signal_are_no_training(home):
    "Where all rewards are equal nothing is started."
    rows = [scored_answer(f"Count {q}.", k, float(q)) for q in range(3) for k in range(2)]
    write_records(home / "same.json", rows)
    data = dict(train_datasets=[str(home / "same.json")], test_datasets=[])
    with pytest.raises(ValueError, match="same.json: nothing can be learnt.* 3 groups"):
        train(config(home, "grpo", "same", **data))
    assert not (home / "same/FINAL").exists()


def test_weights_that_did_not_move_are_an_error(home):
    "The rate is too small for a single bit of a float32 weight."
    with pytest.raises(RuntimeError, match="bit for bit .* learning rate was 1.0e-30"):
        train(config(home, "dpo", "still", lr=1e-30, test_datasets=[]))
    assert not (home / "still/FINAL").exists()


def test_steps_without_a_gradient_are_told(home):
    "All margins are beyond the hinge already, and nothing else pulls."
    rows = []
    for word in ("one", "two", "three"):
        rows.append(dict(prompt=f"Say {word}.", chosen="!", rejected="No. " * 9))
    data = write(home, "beyond.jsonl", rows) | dict(test_datasets=[], batch_size=1)
    with pytest.raises(RuntimeError, match="no step had a gradient.*beyond a hinge"):
        train(config(home, "slic", "beyond", lambda_coef=0.0, beta=0.1, **data))
    assert not (home / "beyond/FINAL").exists()
    write(home, "beyond.jsonl", [*rows, PAIR])
    result = train(config(home, "slic", "half", lambda_coef=0.0, beta=50.0, **data))
    assert 0 <= result.counts["steps_without_gradient"] < result.counts["steps"] == 8


@pytest.mark.parametrize("loss", LOSSES)
def test_one_step_trains_at_the_full_rate(home, loss):
    "Today's default warm-up does not eat a run that is one step long."
    more = dict(warmup=0.1, epochs=1, batch_size=20, test_datasets=[])
    result = train(config(home, loss, "single", **more))
    (step,) = steps_of(home / "single")
    assert step["learning_rate"] == 2e-3
    assert result.counts["steps"] == 1 and result.counts["steps_without_gradient"] == 0


def test_warm_up_starts_above_zero(home):
    "And ends at the peak; a round that continues has none of its own."
    more = dict(warmup=0.4, batch_size=1, test_datasets=[])
    result = train(config(home, "dpo", "warm", epochs=1, **more))
    rates = [row["learning_rate"] / 2e-3 for row in steps_of(home / "warm")]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1])
    start = dict(from_checkpoint=result.model, load_from=str(home / "start"))
    train(config(home, "dpo", "warm-2", epochs=4, **start, **more))
    assert {row["learning_rate"] for row in steps_of(home / "warm-2")} == {2e-3}


def test_an_unfinished_warm_up_goes_on(home):
    more = dict(warmup=20.0, batch_size=1, epochs=1, test_datasets=[])
    first = train(config(home, "dpo", "slow", **more))
    start = dict(from_checkpoint=first.model, load_from=str(home / "start"))
    train(config(home, "dpo", "slow-2", **start, **more))
    rates = []
    for name in ("slow", "slow-2"):
        rates += [row["learning_rate"] / 2e-3 * 21 for row in steps_of(home / name)]
    assert rates == pytest.approx([i + 1 for i in range(14)])


# ---- means over examples


@pytest.mark.parametrize("log_every", [1, 2])
def test_a_run_s_numbers_are_means_over_its_examples(home, log_every):
    "Seven pairs in steps of 3, 3 and 1: the last line is not what the run is called by."
    more = dict(epochs=1, lr=1e-9, test_datasets=[])
    result = train(config(home, "dpo", "means", batch_size=3, log_every=log_every, **more))
    rows = read_jsonl(home / "means/metrics.jsonl")
    (line,) = [row for row in rows if "summary/loss" in row]
    summary = result.summary
    assert {f"summary/{name}" for name in summary} <= line.keys()
    assert line["summary/loss"] == summary["loss"]
    whole = train(config(home, "dpo", "whole", batch_size=7, **more))
    (step,) = steps_of(home / "whole")
    for name in ("loss", "rewards_train/margins", "logps_train/chosen", "loss/train"):
        assert summary[name] == pytest.approx(step[name], abs=1e-5), name
    assert summary["loss"] == summary["loss/train"]
    if log_every == 1:
        sizes = (3, 3, 1)
        lines = [row["logps_train/chosen"] for row in rows if "loss" in row]
        mean = sum(x * n for x, n in zip(lines, sizes)) / 7
        assert summary["logps_train/chosen"] == pytest.approx(mean)
        assert abs(lines[-1] - mean) > 1
    assert whole.summary["loss"] == step["loss"]


# ---- policy and reference are one function

LOG_2 = torch.tensor(2.0).log().item()
AT_START = {
    "full": {},
    "plain": dict(layout="plain"),
    "lora": LORA,
    "cached": dict(reference_cache="cache"),
    "lora, cached": LORA | dict(reference_cache="cache"),
    "humanline": HUMANLINE,
}


def at_start(home, how, precision, **more):
    "A run of one epoch in several batches; its policy has not moved before its first step."
    options = dict(AT_START[how])
    name = f"{how}-{precision}-{more.get('num_processes', 1)}".replace(", ", "-")
    if "reference_cache" in options:
        options["reference_cache"] = str(home / f"cache-{name}")
    given = dict(precision=precision, epochs=2, batch_size=4, microbatch_size=2)
    return config(home, "dpo", name, **given | options | more)


def check_first_step(folder):
    first, *later = steps_of(folder)
    assert first["loss"] == LOG_2
    assert first["rewards_train/chosen"] == first["rewards_train/rejected"] == 0
    assert any(row["loss"] != LOG_2 for row in later), "or this compares nothing"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", AT_START)
def test_the_first_loss_is_log_2(home, how, precision):
    "Exactly, however the reference is come by; held-out pairs too, before the first step."
    cfg = at_start(home, how, precision)
    train(cfg)
    check_first_step(home / cfg.exp_name)
    before = read_jsonl(home / cfg.exp_name / "metrics.jsonl")[0]
    assert before["eval_loss"] == LOG_2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["full", "lora", "cached"])
def test_the_first_loss_is_log_2_on_two_processes(both, how, precision):
    check_first_step(both / at_start(both, how, precision, num_processes=2).exp_name)


@pytest.mark.parametrize("loss", ["kto", "grpo", "ppo", "ipo"])
@pytest.mark.parametrize("how", ["full", "cached"])
def test_no_method_sees_a_policy_that_has_not_moved_move(home, loss, how):
    "In bfloat16 too: KL, ratios and rewards of the first step are those of equal policies."
    train(with_loss(home, loss, how))
    first = steps_of(home / f"{loss}-{how}")[0]
    zero = dict(
        kto=["rewards_train/KL_estimate", "rewards_train/chosen", "rewards_train/rejected"],
        grpo=["rewards_train/KL"],
        ppo=["loss/policykl"],
        ipo=["rewards_train/chosen", "rewards_train/rejected"],
    )
    for name in zero[loss]:
        assert first[name] == 0, name


def with_loss(home, loss, how):
    more = dict(AT_START[how])
    if more:
        more["reference_cache"] = str(home / f"cache-{loss}-b")
    more |= dict(precision="bfloat16", batch_size=4, microbatch_size=2, test_datasets=[])
    return config(home, loss, f"{loss}-{how}", **more)


def test_a_cache_of_another_cut_is_not_taken_in_bfloat16(home):
    "There its values would be other roundings; in float32 they are taken."
    found = {}
    for precision in ("float32", "bfloat16"):
        cache = str(home / f"cache-cut-{precision}")
        given = dict(precision=precision, reference_cache=cache, epochs=1, test_datasets=[])
        train(config(home, "dpo", "cut-1", **given))
        again = train(config(home, "dpo", "cut-1", lr=1e-3, **given))
        other = train(config(home, "dpo", "cut-2", batch_size=2, seed=3, **given))
        found[precision] = [x.counts["reference_computed"] for x in (again, other)]
    assert found["float32"] == [0, 0]
    assert found["bfloat16"][0] == 0 and found["bfloat16"][1] > 0


# ---- dropout


@pytest.fixture(scope="module")
def dropping(home):
    "A GPT-2, whose config says that a tenth is dropped, everywhere."
    from tiny_models import save_small

    tok = byte_tokenizer()
    save_small("gpt2", home / "gpt2")
    tok.save_pretrained(home / "gpt2")
    return str(home / "gpt2")


@pytest.mark.parametrize("loss", ["dpo", "kto", "grpo", "ppo", "simpo", "sft"])
def test_dropout_is_off(home, dropping, loss):
    "So the first loss is that of equal policies, and no cut changes it."
    losses = []
    for cut in (dict(), dict(microbatch_size=1)):
        given = dict(model=dropping, batch_size=4, test_datasets=[], epochs=1)
        train(config(home, loss, "drop", **given | cut))
        losses.append(steps_of(home / "drop")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    if loss == "dpo":
        assert losses == [LOG_2, LOG_2]
    saved = json.loads((home / "drop/FINAL/config.json").read_text())
    assert saved["resid_pdrop"] == 0.1, "what the model says of itself has not changed"


def test_dropout_is_a_setting_of_sft(home, dropping):
    "None: what the model's config says; a number: this."
    firsts = {}
    for dropout in (0.0, 0.5, None):
        cfg = config(home, "sft", "drop", model=dropping, dropout=dropout, test_datasets=[])
        trainer, _ = make_trainer(cfg)
        firsts[dropout] = set(dropouts(trainer.model).values())
    assert firsts == {0.0: set(), 0.5: {0.5}, None: {0.1}}


def test_lora_has_no_dropout_where_it_is_compared(home, dropping):
    more = LORA | dict(lora_dropout=None, model=dropping)
    trainer, _ = make_trainer(config(home, "dpo", "x", **more))
    assert dropouts(trainer.model) == {}
    trainer, _ = make_trainer(config(home, "bradley-terry", "x", **more))
    assert set(dropouts(trainer.model).values()) == {0.05}


def test_a_chance_that_nobody_knows_is_refused(home, dropping, monkeypatch):
    "Log-probs that change from pass to pass are measured before the data are read."
    monkeypatch.setattr("halos_nb.train.set_dropout", lambda model, share: None)
    with pytest.raises(RuntimeError, match="differ by .*dpo compares it with a reference"):
        make_trainer(config(home, "dpo", "x", model=dropping))


# ---- the machine has no say


@pytest.mark.parametrize("said", ["bf16", "fp16"])
def test_a_machine_that_says_another_precision_stops_the_run(home, monkeypatch, said):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
    with pytest.raises(ValueError, match=f"float32.*mixed_precision {said}"):
        train(config(home, "dpo", "x"))
    if said == "bf16":
        train(config(home, "dpo", "agreed", precision="bfloat16", epochs=1))
        check = steps_of(home / "agreed")[0]["loss"]
        assert check == LOG_2


def test_launched_with_another_precision_stops(home, tmp_path):
    "`accelerate launch` reads the machine's own file."
    file = tmp_path / "accelerate/default_config.yaml"
    file.parent.mkdir()
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\n"
        "num_machines: 1\nnum_processes: 1\nuse_cpu: true\n"
    )
    cfg = tmp_path / "c.json"
    cfg.write_text(config_json(config(home, "dpo", "x")))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-m", "halos_nb.train"]
    run = subprocess.run(
        [*launch, "--config", str(cfg)],
        env=os.environ | {"HF_HOME": str(tmp_path), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode != 0
    assert "float32" in run.stderr and "mixed_precision bf16" in run.stderr
    assert str(file) in run.stderr


def test_nothing_to_train_on(home):
    tie = write(home, "tie.jsonl", [PAIR | {"rejected": PAIR["chosen"]}])
    with pytest.raises(ValueError, match="equal_pairs 1"):
        train(config(home, "dpo", "x", **tie))
    some = write(home, "some.jsonl", [PAIR, PAIR | {"rejected": PAIR["chosen"]}])
    counts = train(config(home, "dpo", "some", **some, epochs=1)).counts
    assert counts["reading"]["equal_pairs"] == 1  # told, though the loader never saw it
    empty = write(home, "empty.jsonl", [PAIR | {"rejected": " "}])
    with pytest.raises(ValueError, match="no trainable example.*1 empty_completions"):
        train(config(home, "dpo", "x", **empty))


def test_ipo_leaves_step_one(home):
    "Where policy = reference, the gradient is that of the mean over real tokens."
    trainer, _ = make_trainer(config(home, "ipo", "x", batch_size=7))
    step = next(iter(trainer.loader))
    trainer.training_step(trainer.model, step)
    batch = step.batches[0]
    got = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.model.zero_grad()
    logps = trainer.model(tree=batch).logps
    means = logps.sum(-1) / batch.mask.sum(-1)
    target = 1 / (2 * trainer.config.tau)
    margin = means[batch.rows_of("chosen")] - means[batch.rows_of("rejected")]
    ((margin - margin.detach()) * -2 * target).mean().backward()
    want = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def broken(home, processes):
    "A training whose first gradient is no number."
    tok = load_tokenizer(str(home / "start"))
    model = load_policy(str(home / "start"))
    with torch.no_grad():
        next(model.parameters())[tok.convert_tokens_to_ids("<|im_end|>")] = float("nan")
    model.save_pretrained(home / "broken")
    tok.save_pretrained(home / "broken")
    more = dict(model=str(home / "broken"), layout="tree", test_datasets=[])
    return config(home, "sft", f"nan-{processes}", num_processes=processes, **more)


IS_NAN = "step 1: the gradient of sft is nan"


def test_a_loss_that_is_no_number_stops(home):
    "Before the optimiser has touched a weight; there is no final model."
    with pytest.raises(FloatingPointError, match=IS_NAN):
        train(broken(home, 1))
    assert not (home / "nan-1/FINAL").exists()


def test_a_loss_that_is_no_number_stops_all_processes(both):
    for rank in (0, 1):
        assert IS_NAN in (both / f"nan-2.rank-{rank}").read_text()
    assert not (both / "nan-2/FINAL").exists()


def test_csft_gets_real_control_tokens(home):
    result = train(config(home, "csft", "c"))
    tok = load_tokenizer(result.model)
    assert len(tok("<|good|>Yes", add_special_tokens=False)["input_ids"]) == 1 + 3
    trainer, _ = make_trainer(config(home, "csft", "c2", epochs=1))
    first = {branch[0] for tree in trainer.loader.trees for branch in tree.branches}
    assert first >= set(tok.convert_tokens_to_ids(["<|good|>", "<|bad|>"]))


def test_bradley_terry_margin_needs_scores(home):
    with pytest.raises(ValueError, match="margin"):
        train(config(home, "bradley-terry", "m", use_margin=True))


def test_no_reference_is_loaded_where_none_is_needed(home, monkeypatch):
    monkeypatch.setattr(
        "halos_nb.train.load_reference", lambda *a: pytest.fail("a reference was loaded")
    )
    for loss in ("sft", "csft", "simpo", "slic", "bradley-terry"):
        assert make_trainer(config(home, loss, "x"))[0].reference is None


def test_every_method_says_what_it_needs(home):
    "Feedback that a method cannot use is refused by name."
    scores = dict(train_datasets=[str(home / "scores.json")], test_datasets=[])
    for loss in ("dpo", "kto", "bradley-terry"):
        with pytest.raises(ValueError, match="no trainable example"):
            train(config(home, loss, "x", **scores))
    assert len(load_data(str(home / "scores.json"))) == 5
    assert loader_options(config(home, "kto", "x"))["mismatched"]
    tokenizer = load_tokenizer(str(home / "start"))
    assert load_model(config(home, "ppo", "x"), tokenizer).value_head


def test_margins_are_on_the_data_s_own_scale(home):
    "A labeller of 1 to 100 and one of 0.01 to 1 give one reward model; raw points give two."
    for name, unit in (("points", 100.0), ("parts", 1.0)):
        rows = []
        for i in range(7):
            row = dict(prompt=f"Say {i}.", chosen="Yes" + "!" * i, rejected="No.")
            rows.append(row | dict(score_chosen=unit * (0.1 + 0.1 * i), score_rejected=0.0))
        given = write(home, f"{name}.jsonl", rows)
        for way in ("median", "score"):
            more = given | dict(use_margin=True, margin_unit=way)
            counts = train(config(home, "bradley-terry", f"{name}-{way}", **more)).counts
            assert ("margin_unit" in counts) is (way == "median")
    assert apart(home / "points-median", home / "parts-median") < 1e-5
    assert apart(home / "points-score", home / "parts-score") > 1e-3


def test_objectives_that_contradict_each_other_are_both_learnt(home):
    "One model, a logit for each; what is brief is never what was chosen."
    more = dict(objectives=["brief", "label"], epochs=15, lr=5e-3)
    done = train(config(home, "bradley-terry", "several", **more))
    last = read_jsonl(done.metrics_file)[-1]
    for name in more["objectives"]:
        assert done.evaluation[f"rewards_eval/accuracies_{name}"] == 1, last
    rows = read_jsonl(home / "several/eval_scores.jsonl")
    rated = [row["objectives"]["brief"] is not None for row in rows]
    assert rated == [bool(i % 3) for i in (0, 1, 6, 2, 5, 3, 4)]  # prompt by prompt
    assert all(row["objectives"]["label"] > 0 for row in rows)
    told = json.loads((home / "several/FINAL/config.json").read_bytes())
    assert told["id2label"] == {"0": "brief", "1": "label"}
    for k, name in enumerate(more["objectives"]):
        head = head_at(done.model, f"{name}=1")
        assert head.weights == ((1, 0), (0, 1))[k]
    with pytest.raises(ValueError, match="has 2 logits, brief, label; weigh them by name"):
        head_at(done.model)
    with pytest.raises(CheckpointError, match="of brief, label, not of one score"):
        train(config(home, "bradley-terry", "on", from_checkpoint=done.model))
    with pytest.raises(ValueError, match="no pair has the numbers brave_A"):
        train(config(home, "bradley-terry", "no", objectives="brief, brave"))

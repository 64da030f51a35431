"""The fast path gives the plain path's numbers: log-probs, losses, gradients, rewards and
scores, for every way a batch is cut.
"""

import json
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from halos_nb.templates import byte_tokenizer
from halos_nb.configs import TrainConfig
from halos_nb.layouts import Layout
from halos_nb.models import load_reward_model, unwrap
from halos_nb.reference import AdapterOff
from halos_nb.records import prompt_id
from halos_nb.score import score_samples
from halos_nb.train import make_trainer
from halos_nb.trainers import TRAINERS

SHAPE = dict(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=2,
)
ARCHS = dict(
    llama=partial(LlamaConfig, num_key_value_heads=2),
    qwen2=partial(Qwen2Config, num_key_value_heads=2),
    gpt_neox=GPTNeoXConfig,
    mistral=partial(MistralConfig, num_key_value_heads=2),
)
EXACT = dict(rtol=1e-5, atol=1e-5)
PAIRS = [
    (
        f"Question {i}: " + "why? " * (i % 3),
        "Because " + "so " * (3 * i % 7),
        "No" + "!" * (2 + i % 5),
    )
    for i in range(12)
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:.*pin_memory",
    "ignore:flex_attention called without",
)


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    "A folder per architecture: a model of two blocks and its tokenizer."
    out = {}
    for name, config in ARCHS.items():
        out[name] = str(tmp_path_factory.mktemp(name))
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config(**SHAPE)).save_pretrained(out[name])
        byte_tokenizer().save_pretrained(out[name])
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps(dict(prompt=p, chosen=c, rejected=r)) + "\n" for p, c, r in PAIRS)
    )
    return str(file)


# ---- whole training steps


@pytest.fixture(autouse=True)
def the_reference_stays(monkeypatch):
    "It is not asked first and let go, so that a test can move it."
    monkeypatch.setattr("halos_nb.train.KEPT_TARGETS", 0)


def trainer_for(home, pairs, loss, folder, **more):
    cfg = TrainConfig(
        loss=loss,
        model=home,
        train_datasets=[pairs],
        cache_dir=str(folder),
        **dict(
            batch_size=6,
            max_length=200,
            max_prompt_length=100,
            lr=1e-3,
            warmup=0,
            lora_dropout=0,
        )
        | more,
    )
    return make_trainer(cfg)[0]


def one_step(trainer):
    """Loss, gradients and metrics of the first step; a reference that is not the policy, so
    that rewards are not zero.
    """
    if trainer.reference is not None and not isinstance(trainer.reference, AdapterOff):
        torch.manual_seed(5)
        for p in trainer.reference.model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    loss = trainer.training_step(trainer.model, next(iter(trainer.loader)))
    grads = {
        n: p.grad for n, p in unwrap(trainer.model).named_parameters() if p.grad is not None
    }
    return loss, grads, trainer.derive(trainer.sums.means(trainer.accelerator))


def assert_same_step(got, want):
    (loss, grads, metrics), (loss_2, grads_2, metrics_2) = got, want
    assert_close(loss, loss_2, **EXACT)
    assert grads.keys() == grads_2.keys()
    assert any(g.abs().max() > 1e-4 for g in grads.values())
    scale = max(g.abs().max() for g in grads_2.values())
    for n, g in grads.items():
        assert (g - grads_2[n]).abs().max() <= 1e-5 * max(scale, 1), n
    assert metrics.keys() == metrics_2.keys()
    for k, v in metrics.items():
        assert_close(v, metrics_2[k], **EXACT, equal_nan=True, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("loss", ["dpo", "bradley-terry"])
def test_architectures(homes, pairs, arch, loss, tmp_path):
    fast, plain = (
        one_step(trainer_for(homes[arch], pairs, loss, tmp_path, layout=x))
        for x in ("tree", "plain")
    )
    assert_same_step(fast, plain)


@pytest.mark.parametrize(
    "loss", [m for m in TRAINERS if m not in ("dpo", "bradley-terry", "csft")]
)
def test_methods(homes, pairs, loss, tmp_path):
    fast, plain = (
        one_step(trainer_for(homes["llama"], pairs, loss, tmp_path, layout=x))
        for x in ("tree", "plain")
    )
    assert_same_step(fast, plain)


@pytest.mark.parametrize("loss", ["dpo", "ppo", "bradley-terry"])
def test_lora(homes, pairs, loss, tmp_path):
    def step(layout):
        trainer = trainer_for(
            homes["llama"],
            pairs,
            loss,
            tmp_path,
            layout=layout,
            use_peft=True,
            lora_r=4,
            lora_alpha=8,
        )
        torch.manual_seed(3)
        for n, p in trainer.model.named_parameters():
            if "lora_B" in n:
                p.data.normal_(0, 0.3)
        return one_step(trainer)

    assert_same_step(step("tree"), step("plain"))


def test_lora_on_the_head(homes, pairs, tmp_path):
    step = lambda layout: one_step(
        trainer_for(
            homes["llama"],
            pairs,
            "dpo",
            tmp_path,
            layout=layout,
            use_peft=True,
            lora_r=4,
            lora_targets="q_proj,lm_head",
        )
    )
    assert_same_step(step("tree"), step("plain"))


@pytest.mark.parametrize("loss", ["dpo", "bradley-terry", "kto"])
def test_accumulation(homes, pairs, loss, tmp_path):
    "One forward pass for all, one for each tree."
    whole, cut = (
        trainer_for(homes["qwen2"], pairs, loss, tmp_path, token_budget=b) for b in (10_000, 1)
    )
    assert [len(next(iter(t.loader)).batches) for t in (whole, cut)] == [1, 6]
    assert_same_step(one_step(whole), one_step(cut))


def test_the_same_loss_curve_in_both_layouts(homes, pairs, tmp_path):
    def curve(layout):
        trainer = trainer_for(
            homes["llama"],
            pairs,
            "dpo",
            tmp_path / layout,
            layout=layout,
            batch_size=4,
            epochs=3,
        )
        trainer.train()
        return torch.tensor([h["loss"] for h in trainer.state.log_history if "loss" in h])

    fast = curve("tree")
    plain = curve("plain")
    # it moves
    assert len(fast) == 9
    assert fast.max() - fast.min() > 0.05
    assert_close(fast, plain, rtol=1e-4, atol=1e-4)


# ---- scores


@pytest.mark.parametrize("arch", ARCHS)
def test_scores(homes, arch, monkeypatch):
    model = load_reward_model(homes[arch]).eval()
    turns = lambda p: [dict(role="user", content=p)]
    samples = [
        dict(prompt_id=prompt_id(turns(p)), sample_id=i, prompt=turns(p), output=o)
        for p, c, r in PAIRS[:4]
        for i, o in enumerate((c, r, ""))
    ]
    scores = lambda **kw: torch.tensor(
        [s.score for s in score_samples(samples, model, byte_tokenizer(), **kw)]
    )
    fast = scores()
    one_by_one = scores(token_budget=1)
    monkeypatch.setattr("halos_nb.score.choose_layout", lambda *_: Layout("plain", "as asked"))
    plain = scores()
    assert fast.std() > 0.01
    assert_close(fast, plain, **EXACT)
    assert_close(one_by_one, plain, **EXACT)

"The fast path gives the plain path's numbers: log-probs, losses, gradients, rewards and scores, for every way a batch is cut."

import json
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from halos_nb import attention
from halos_nb.trees import Segment, Tree, byte_tokenizer, make_batch, tree_mask
from halos_nb.configs import TrainConfig
from halos_nb.attention import HeadLogps, flex_fault, head_logps, sees
from halos_nb.models import Layout, load_policy, load_reward_model, unwrap
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


# ---- the head


def head_inputs(n=23, width=6, vocabulary=37, bias=True, dtype=torch.double, seed=0):
    torch.manual_seed(seed)
    head = torch.nn.Linear(width, vocabulary, bias=bias).to(dtype)
    return (
        head,
        torch.randn(n, width, dtype=dtype, requires_grad=True),
        torch.randint(vocabulary, (n,)),
    )


@pytest.mark.parametrize("chunk", [1, 3, 7, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_head_gradcheck(chunk, bias):
    head, x, ids = head_inputs(7, bias=bias)
    fast = lambda x, w, *b: HeadLogps.apply(x, w, *(b or (None,)), ids, chunk, True)[0]
    assert torch.autograd.gradcheck(fast, (x, *head.parameters()))
    # a frozen head
    assert torch.autograd.gradcheck(
        lambda x: fast(x, *(p.detach() for p in head.parameters())), x
    )
    # only the head trains
    assert torch.autograd.gradcheck(lambda w: fast(x.detach(), w), head.weight)


@pytest.mark.parametrize("chunk", [1, 5, 23, 64])
def test_head_equals_what_one_writes_by_hand(chunk):
    head, x, ids = head_inputs(dtype=torch.float32)
    weights = torch.randn(len(ids))
    logps, entropy = head_logps(head, x, ids, chunk, entropy=True)
    by_hand = torch.distributions.Categorical(logits=head(x))
    assert_close((logps, entropy), (by_hand.log_prob(ids), by_hand.entropy()), **EXACT)
    assert not entropy.requires_grad
    got, want = (
        torch.autograd.grad((weights * y).sum(), (x, *head.parameters()))
        for y in (logps, by_hand.log_prob(ids))
    )
    assert_close(got, want, **EXACT)


def test_head_twice_backward_and_tied():
    "A graph kept for a second backward pass gives the same again; an embedding that is also the head gets both gradients."
    head, x, ids = head_inputs()
    logps = HeadLogps.apply(x, head.weight, head.bias, ids, 8, False)[0].sum()
    first, second = (
        torch.autograd.grad(logps, (x, head.weight, head.bias), retain_graph=True)
        for _ in range(2)
    )
    assert_close(first, second)
    tied = lambda logps: torch.autograd.grad(
        logps(head.weight[ids] + x.detach()).sum(), head.weight
    )[0]
    assert_close(
        tied(lambda h: HeadLogps.apply(h, head.weight, head.bias, ids, 8, False)[0]),
        tied(lambda h: head(h).log_softmax(-1).gather(1, ids[:, None])),
    )


def test_head_in_bfloat16_is_as_near_to_the_truth_as_autograd():
    head, x, ids = head_inputs(64, 32, 99, dtype=torch.float32)

    def errors(logps, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = logps()
        return [y.detach(), *torch.autograd.grad(y.sum(), (x, *head.parameters()))]

    plain = lambda: head(x).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    truth, usual, ours = (
        errors(plain, False),
        errors(plain, True),
        errors(lambda: head_logps(head, x, ids, 10)[0], True),
    )
    for t, u, o in zip(truth, usual, ours):
        assert o.dtype == t.dtype and 0 < (o - t).norm() <= 1.25 * (u - t).norm()


class Largest(TorchDispatchMode):
    "The most elements any tensor has that is made within."

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_no_tensor_of_all_tokens_and_the_vocabulary(frozen):
    head, x, ids = head_inputs(300, 4, 2000, dtype=torch.float32)
    head.requires_grad_(not frozen)
    saved = []
    with (
        Largest() as most,
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ),
    ):
        head_logps(head, x, ids, 16)[0].sum().backward()
    assert most.numel == 16 * (2000 + attention.MARGIN) and max(saved, default=0) <= 4 * 2000
    with Largest() as whole:
        torch.log_softmax(head(x), -1).sum().backward()
    assert whole.numel == 300 * 2000  # so the measurement can see it


@pytest.mark.parametrize(
    "n, before", [(1, 0), (128, 0), (129, 0), (300, 0), (1, 7), (128, 300), (257, 40)]
)
def test_attention_in_blocks_is_attention(n, before):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, length, 8, requires_grad=True)
        for length in (n, before + n, before + n)
    )
    blocks = torch.cat(attention.causal_pieces(q, k, v), 1)
    whole = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.ones(n, before + n, dtype=torch.bool).tril(before)
    ).transpose(1, 2)
    weights = torch.randn_like(whole)
    assert_close(blocks, whole, **EXACT)
    assert_close(
        *(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (blocks, whole)), **EXACT
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_of_bfloat16_is_nearer_to_the_truth_than_sdpa(autocast):
    "On a CPU it is computed in float32; under autocast query and key come in float32, turned by their positions, and value in bfloat16."
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 16).bfloat16()
    if autocast:
        q, k = q.float(), k.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, _ = attention.tree_attention(
            None, q, k, v, None, segments=[Segment(0, 100, (200,))]
        )
        usual = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True
        ).transpose(1, 2)
    truth = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    ).transpose(1, 2)
    assert (
        ours.dtype == torch.bfloat16
        and 0 < (ours - truth).norm() < 0.95 * (usual - truth).norm()
    )


def test_head_s_memory_is_given_back_before_the_layers_go_backward():
    head, x, ids = head_inputs()
    logps = head_logps(head, x, ids, 5)[0]
    node, held = logps.grad_fn, []
    assert node.memory is not None
    x.register_hook(lambda g: held.append((node.memory, node.last)))
    logps.sum().backward()
    assert held == [(None, None)]


def test_other_heads_are_called_as_they_are():
    "A head with an adapter or a hook is not a plain linear layer: its own forward pass counts."
    head, x, ids = head_inputs(dtype=torch.float32)

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(6, 37)
    doubled.load_state_dict(head.state_dict())
    assert_close(
        head_logps(doubled, x, ids)[0],
        (2 * head(x)).log_softmax(-1).gather(1, ids[:, None])[:, 0],
        **EXACT,
    )
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    head_logps(head, x, ids)
    assert calls


# ---- attention


def test_flex_attention_gives_the_same(homes, monkeypatch):
    "The GPU's road through a whole model with grouped heads, uncompiled on the CPU; its gradients need a GPU."
    from torch.nn.attention.flex_attention import flex_attention

    model, masks = load_policy(homes["llama"]).eval(), []
    batch = make_batch(
        [
            Tree([9, 8, 7, 6], [[20, 21, 22], [30, 31], [40]], ["sample"] * 3, [0] * 3),
            Tree([14], [[15, 80, 81], [16, 82]], ["chosen", "rejected"], [1, 1]),
        ]
    )
    with torch.no_grad():
        pieces, plain = (
            model(tree=batch).logps,
            model(tree=make_batch(batch.trees, "plain")).logps,
        )
        monkeypatch.setattr(attention, "flex_fault", lambda device: "")
        monkeypatch.setattr(
            attention,
            "compiled_flex",
            lambda: (
                lambda *a, block_mask, **kw: (
                    masks.append(block_mask) or flex_attention(*a, block_mask=block_mask, **kw)
                )
            ),
        )
        flex = model(tree=batch).logps
    assert len(masks) == 2  # one per layer
    assert_close(flex, pieces, **EXACT)
    assert_close(pieces, plain, **EXACT)


def test_a_row_sees_what_its_definition_says():
    "Rule for flex_attention and dense mask, on rows drawn at random."
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = [
            (
                int(torch.randint(1, 6, (1,), generator=rng)),
                torch.randint(
                    1, 5, (int(torch.randint(1, 4, (1,), generator=rng)),), generator=rng
                ).tolist(),
            )
            for _ in range(3)
        ]
        batch = make_batch(
            [
                Tree(list(range(p)), [[1] * n for n in bs], ["sample"] * len(bs), [0] * len(bs))
                for p, bs in sizes
            ]
        )
        at = torch.arange(batch.input_ids.numel())
        assert sees(batch.segments, "cpu")(0, 0, at[:, None], at[None]).equal(
            tree_mask(batch.segments)
        )


def test_no_gpu_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert flex_fault("cpu") == "no GPU"
    with pytest.warns(UserWarning, match="flex_attention is not used.*piece by piece"):
        assert flex_fault.__wrapped__("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flex_attention_on_a_gpu():
    assert flex_fault.__wrapped__("cuda") == ""


# ---- whole training steps


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
    "Loss, gradients and metrics of the first step; a reference that is not the policy, so that rewards are not zero."
    if hasattr(trainer.reference, "model"):
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
    assert grads.keys() == grads_2.keys() and any(g.abs().max() > 1e-4 for g in grads.values())
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

    fast, plain = curve("tree"), curve("plain")
    assert len(fast) == 9 and fast.max() - fast.min() > 0.05  # it moves
    assert_close(fast, plain, rtol=1e-4, atol=1e-4)


# ---- scores


@pytest.mark.parametrize("arch", ARCHS)
def test_scores(homes, arch, monkeypatch):
    model, turns = (
        load_reward_model(homes[arch]).eval(),
        lambda p: [dict(role="user", content=p)],
    )
    samples = [
        dict(prompt_id=prompt_id(turns(p)), sample_id=i, prompt=turns(p), output=o)
        for p, c, r in PAIRS[:4]
        for i, o in enumerate((c, r, ""))
    ]
    scores = lambda **kw: torch.tensor(
        [s.score for s in score_samples(samples, model, byte_tokenizer(), **kw)]
    )
    fast, one_by_one = scores(), scores(token_budget=1)
    monkeypatch.setattr("halos_nb.score.choose_layout", lambda *_: Layout("plain", "as asked"))
    plain = scores()
    assert fast.std() > 0.01
    assert_close(fast, plain, **EXACT)
    assert_close(one_by_one, plain, **EXACT)

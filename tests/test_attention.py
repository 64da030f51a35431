"""Tree attention and the vocabulary head: the numbers of the plain way, in values, gradients
and memory.
"""

from itertools import product

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from halos_nb import attention
from halos_nb import head as head_room
from halos_nb.attention import Reach, Scoring, TreeRow, flex_fault, sees
from halos_nb.head import Head, HeadLogps, head_logps
from halos_nb.models import load_policy
from halos_nb.trees import Segment, Tree, make_batch, tree_mask

EXACT = dict(rtol=1e-5, atol=1e-5)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


# ---- the head


def head_inputs(n=23, width=6, vocabulary=37, bias=True, dtype=torch.double, seed=0):
    torch.manual_seed(seed)
    head = torch.nn.Linear(width, vocabulary, bias=bias).to(dtype)
    return (
        head,
        torch.randn(n, width, dtype=dtype, requires_grad=True),
        torch.randint(vocabulary, (n,)),
    )


def by_hand(x, weight, bias, ids, chunk, cap=None):
    return HeadLogps.apply(x, weight, bias, ids, Head(weight, bias, cap, chunk, True, None))[0]


@pytest.mark.parametrize("chunk", [1, 3, 7, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_head_gradcheck(chunk, bias):
    head, x, ids = head_inputs(7, bias=bias)
    fast = lambda x, w, *b: by_hand(x, w, *(b or (None,)), ids, chunk)
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
    """A graph kept for a second backward pass gives the same again; an embedding that is also
    the head gets both gradients.
    """
    head, x, ids = head_inputs()
    logps = by_hand(x, head.weight, head.bias, ids, 8).sum()
    first, second = (
        torch.autograd.grad(logps, (x, head.weight, head.bias), retain_graph=True)
        for _ in range(2)
    )
    assert_close(first, second)
    tied = lambda logps: torch.autograd.grad(
        logps(head.weight[ids] + x.detach()).sum(), head.weight
    )[0]
    assert_close(
        tied(lambda h: by_hand(h, head.weight, head.bias, ids, 8)),
        tied(lambda h: head(h).log_softmax(-1).gather(1, ids[:, None])),
    )


def test_head_in_bfloat16_is_as_near_to_the_truth_as_autograd():
    head, x, ids = head_inputs(64, 32, 99, dtype=torch.float32)

    def errors(logps, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = logps()
        return [y.detach(), *torch.autograd.grad(y.sum(), (x, *head.parameters()))]

    plain = lambda: head(x).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    truth = errors(plain, False)
    usual = errors(plain, True)
    ours = errors(lambda: head_logps(head, x, ids, 10)[0], True)
    for t, u, o in zip(truth, usual, ours):
        assert o.dtype == t.dtype
        assert 0 < (o - t).norm() <= 1.25 * (u - t).norm()


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
    assert most.numel == 16 * (2000 + head_room.MARGIN)
    assert max(saved, default=0) <= 4 * 2000
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
    blocks = torch.cat(attention.causal_pieces(q, k, v, before, Reach(), Scoring()), 1)
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
    """On a CPU it is computed in float32; under autocast query and key come in float32, turned
    by their positions, and value in bfloat16.
    """
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 16).bfloat16()
    if autocast:
        q = q.float()
        k = k.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, _ = attention.tree_attention(
            None, q, k, v, None, tree_row=TreeRow([Segment(0, 100, (200,))], q.device)
        )
        usual = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True
        ).transpose(1, 2)
    truth = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    ).transpose(1, 2)
    assert ours.dtype == torch.bfloat16
    assert 0 < (ours - truth).norm() < 0.95 * (usual - truth).norm()


def test_head_s_memory_is_given_back_before_the_layers_go_backward():
    head, x, ids = head_inputs()
    logps = head_logps(head, x, ids, 5)[0]
    node = logps.grad_fn
    held = []
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


def test_flex_attention_gives_the_same(llama, monkeypatch):
    """The GPU's road through a whole model with grouped heads, uncompiled on the CPU; its
    gradients need a GPU.
    """
    from torch.nn.attention.flex_attention import flex_attention

    model = load_policy(llama).eval()
    masks = []
    batch = make_batch(
        [
            Tree([9, 8, 7, 6], [[20, 21, 22], [30, 31], [40]], ["sample"] * 3, [0] * 3),
            Tree([14], [[15, 80, 81], [16, 82]], ["chosen", "rejected"], [1, 1]),
        ]
    )
    with torch.no_grad():
        pieces = model(tree=batch).logps
        plain = model(tree=make_batch(batch.trees, "plain")).logps
        monkeypatch.setattr(attention, "flex_fault", lambda *kind: "")
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
@pytest.mark.parametrize(
    "dtype, width, groups", [(torch.float32, 64, 1), (torch.bfloat16, 256, 4)]
)
def test_flex_attention_on_a_gpu(dtype, width, groups):
    assert flex_fault.__wrapped__("cuda", dtype, width, groups) == ""


def test_kernels_are_not_silently_left(monkeypatch):
    """Each kind of layer is compiled anew; past torch's limit of 8 it would go on without a
    kernel. Here a compiler that counts stands for the real one.
    """
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    compiled = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: real(f, **(o | dict(backend=backend))))
    kernel = attention.compiled_flex.__wrapped__()
    segments = [Segment(0, 10, (10,))]
    mask = attention.make_block_mask(segments, "cpu", Reach(7))
    kinds = product((None, 3.0), (None, torch.zeros(4)), (2, 4), (16, 32), (False, True))
    for cap, sinks, heads, width, grad in kinds:
        q, k, v = [torch.randn(1, n, 20, width) for n in (4, heads, heads)]
        how = Scoring(softcap=cap, sinks=sinks)
        with torch.set_grad_enabled(grad):
            got = attention.by_flex(q, k, v, mask, how, kernel)
        assert_close(got, attention.by_flex(q, k, v, mask, how, flex_attention), **EXACT)
    assert len(compiled) > 8
    torch._dynamo.reset()

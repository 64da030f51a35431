"""Losses and log-probabilities, against golden values and their own gradients.

And what must hold for any batch: cut, order, padding, extremes.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from golden import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from halos_nb.losses import (
    Share,
    actor_critic_loss,
    bradley_terry_loss,
    cdpo_loss,
    dpo_loss,
    dpo_norm_loss,
    grpo_loss,
    importance,
    ipo_loss,
    kto_kl,
    kto_loss,
    log_ratios,
    ppo_loss,
    rpo_loss,
    sft_loss,
    simpo_loss,
    slic_loss,
)
from halos_nb.advantages import generalized_advantages, moments, penalised_rewards, whiten
from halos_nb.head import token_logps

tol = dict(rtol=1e-4, atol=1e-5)


def tensor(x):
    return torch.tensor(x, dtype=torch.float32)


def clamp(hyper):
    return (hyper["log_epsilon_P"], hyper["log_epsilon_R"]) if hyper["humanline"] else None


def close(got, want, **kw):
    "Equal to a golden value; a Share by its value, whatever the nesting of a single number."
    got, want = (got.value if isinstance(got, Share) else got).float(), tensor(want)
    torch.testing.assert_close(got.flatten(), want.flatten(), **{**tol, **kw})


def leaves(inputs):
    return {k: tensor(v).requires_grad_() for k, v in inputs.items()}


def check_grads(inputs, grads, rows=slice(None)):
    "Gradients as recorded; null: none flows."
    for name, want in grads.items():
        grad = inputs[name].grad
        if want is None:
            assert grad is None, name
        elif grad is None:
            assert tensor(want).numel() == 0, name
        else:
            close(grad[rows], tensor(want).reshape(grad.shape)[rows].tolist())


# ---- golden: pairs

PAIRS = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
)


def run_pairs(loss, case, inputs, reference=True, **kw):
    hyper = {
        k: v
        for k, v in case["hyper"].items()
        if k in ("beta", "epsilon", "tau", "gamma_beta_ratio", "lambda_coef")
    }
    return loss(
        *(inputs[k] for k in (PAIRS if reference else PAIRS[:2])),
        **hyper,
        clamp=clamp(case["hyper"]),
        **kw,
    )


def check_pairs(loss, case):
    inputs = leaves(case["inputs"])
    out = run_pairs(loss, case, inputs)
    want = case["outputs"]
    assert "quirk" not in case
    assert "error" not in case
    for name, got in out._asdict().items():
        close(got, want[name])
    close(out.losses.mean(), want["mean_loss"])
    out.losses.mean().backward()
    check_grads(inputs, case["grads"])


@cases("losses_dpo")
def test_dpo(case):
    check_pairs(dpo_loss, case)


@cases("losses_cdpo")
def test_cdpo(case):
    check_pairs(cdpo_loss, case)


def mean_based(name, case):
    "(losses of the margin, their derivative) written out again, in float64."
    if name == "ipo":
        target = 0.5 / case["hyper"]["tau"]
        return lambda d: (d - target) ** 2, lambda d: 2 * (d - target)
    beta, gamma = case["hyper"]["beta"], case["hyper"]["gamma_beta_ratio"]

    def value(d):
        return torch.log1p(torch.exp(-beta * (d - gamma)))

    def slope(d):
        return -beta / (1 + torch.exp(beta * (d - gamma)))

    return value, slope


def check_means(loss, name, case):
    "Without masks. Deliberate: a row whose ratios are all zero (0/0 in HALOs) has reward 0."
    inputs = leaves(case["inputs"])
    out, want = run_pairs(loss, case, inputs, name == "ipo"), case["outputs"]
    assert "error" not in case
    chosen, rejected = tensor(want["chosen_rewards"]), tensor(want["rejected_rewards"])
    rows = tensor(want["losses"]).isfinite()
    assert rows.all() or "quirk" in case
    close(out.chosen_rewards, chosen.nan_to_num(0).tolist())
    close(out.rejected_rewards, rejected.nan_to_num(0).tolist())
    close(out.losses[rows], tensor(want["losses"])[rows].tolist())
    value, _ = mean_based(name, case)
    expected = value(chosen.nan_to_num(0).double() - rejected.nan_to_num(0).double())
    close(out.losses[~rows], expected[~rows].tolist())
    if "alternative" in case:
        close(out.losses, case["alternative"]["losses"])
    if rows.all():
        close(out.losses.mean(), want["mean_loss"])
    close(out.chosen_unclamped, want["chosen_unclamped"])
    close(out.rejected_unclamped, want["rejected_unclamped"])
    out.losses.mean().backward()
    check_grads(inputs, case["grads"], rows)
    for k in PAIRS[:2]:
        assert inputs[k].grad.isfinite().all()


def check_masked_means(loss, name, case):
    """With masks: the mean over real tokens, value and gradient written out again.

    Golden wherever no ratio is exactly 0.
    """
    inputs = leaves(case["inputs"])
    pc, pr, rc, rr = [inputs[k].detach().double() for k in PAIRS]
    masks = [(pc != 0) | (rc != 0), (pr != 0) | (rr != 0)]
    raws = [pc, pr] if name == "simpo" else [pc - rc, pr - rr]
    both = dict(chosen_mask=masks[0], rejected_mask=masks[1])
    out = run_pairs(loss, case, inputs, name == "ipo", **both)
    low, high = clamp(case["hyper"]) or (-math.inf, math.inf)
    counts = [m.sum(1).clamp(min=1) for m in masks]
    chosen, rejected = [r.clamp(low, high).sum(1) / n for r, n in zip(raws, counts)]
    value, slope = mean_based(name, case)
    close(out.losses, value(chosen - rejected).tolist())
    out.losses.sum().backward()
    for sign, key, mask, n in zip((1, -1), PAIRS, masks, counts):
        # what is on a bound is decided in float32
        raw32 = inputs[key].detach()
        if name == "ipo":
            raw32 = raw32 - inputs["reference" + key[6:]].detach()
        inside = mask & (raw32 >= low) & (raw32 <= high)
        grad = sign * slope(chosen - rejected)[:, None] / n[:, None] * inside
        close(inputs[key].grad, grad.tolist())
    if "quirk" not in case and all(((r != 0) == m).all() for r, m in zip(raws, masks)):
        close(out.losses, case["outputs"]["losses"])
        close(out.chosen_rewards, case["outputs"]["chosen_rewards"])


@cases("losses_ipo")
def test_ipo(case):
    check_means(ipo_loss, "ipo", case)


@cases("losses_ipo")
def test_ipo_with_masks(case):
    check_masked_means(ipo_loss, "ipo", case)


@cases("losses_simpo")
def test_simpo(case):
    check_means(simpo_loss, "simpo", case)


@cases("losses_simpo")
def test_simpo_with_masks(case):
    check_masked_means(simpo_loss, "simpo", case)


@cases("losses_slic")
def test_slic(case):
    "Deliberate: one loss per example, as documented, also where HALOs raises or broadcasts."
    inputs, want = leaves(case["inputs"]), case["documented"]
    out = run_pairs(slic_loss, case, inputs, reference=False)
    close(out.losses, want["losses"])
    close(out.losses.mean(), want["mean_loss"])
    for name in (
        "chosen_rewards",
        "rejected_rewards",
        "chosen_unclamped",
        "rejected_unclamped",
    ):
        if "outputs" in case:
            close(getattr(out, name), case["outputs"][name])
    out.losses.mean().backward()
    check_grads(inputs, want["grads"])


# ---- golden: KTO, GRPO, PPO, Bradley-Terry


@cases("losses_kto")
def test_kto(case):
    inputs = {}
    for name, values in case["inputs"].items():
        inputs[name] = tensor(values).reshape(-1, case["seq_len"]).requires_grad_()
    h, want = case["hyper"], case["outputs"]
    share = kto_kl(inputs["policy_KL_logps"], inputs["reference_KL_logps"], clamp(h))
    KL = share.value.clamp(min=0)
    out = kto_loss(
        *(inputs[k] for k in PAIRS),
        KL,
        h["beta"],
        h["desirable_weight"],
        h["undesirable_weight"],
        clamp(h),
    )
    for name, got in {**out._asdict(), "KL": KL, "mean_loss": out.losses.mean()}.items():
        close(got, want[name])
    out.losses.mean().backward()
    check_grads(inputs, case["grads"])


@cases("losses_grpo")
def test_grpo(case):
    h, want, given = case["hyper"], case["outputs"], case["inputs"]
    inputs = leaves({k: given[k] for k in ("policy_logps", "reference_logps")})
    mask = torch.tensor(given["target_labels"])[:, 1:] != -100
    out = grpo_loss(
        *inputs.values(), tensor(given["advantages"]), mask, h["beta"], h["epsilon"], clamp(h)
    )
    loss = out.losses.sum() / mask.sum()
    close(loss, want["loss"])
    for name in ("KL", "weighted_advantage", "unclamped"):
        close(getattr(out, name), want[name])
    loss.backward()
    check_grads(inputs, case["grads"])


@cases("losses_ppo")
def test_ppo(case):
    h, stats = case["hyper"], case["outputs"]["stats"]
    b = case["inputs"]["batch"]
    e = leaves(case["inputs"]["episode"])
    mask = tensor(b["masks"]) != 0
    out = ppo_loss(
        e["logprobs"],
        e["values"],
        torch.distributions.Categorical(logits=e["logits"]).entropy(),
        tensor(b["logprobs"]),
        tensor(b["advantages"]),
        tensor(b["discounted_future_rewards"]),
        mask,
        h["cliprange"],
        h["critic_coef"],
        h["KL_coef"],
        clamp(h),
    )
    loss = out.losses.sum() / mask.sum()
    got = {
        "loss/total": loss,
        "loss/critic": out.critic,
        "loss/policy": out.policy,
        "clipfrac/policy": out.clipped,
        "loss/entropy": out.entropy,
        "loss/policykl": out.policy_kl,
        "loss/seqratio": out.sequence_ratio,
        "loss/unclamped": out.unclamped,
    }
    assert set(got) == set(stats)
    close(loss, case["outputs"]["loss"])
    for name, value in got.items():
        close(value, stats[name])
    loss.backward()
    check_grads({f"episode_{k}": v for k, v in e.items()}, case["grads"])


@cases("ppo_advantages")
def test_ppo_advantages(case):
    given, want, h = case["inputs"], case["outputs"], case["hyper"]
    mask = tensor(given["masks"]) != 0
    values, rewards = tensor(given["values"]), tensor(given["rewards"])
    got = generalized_advantages(values, rewards, mask, h["gamma"], h["lam"])
    close(got.returns, want["returns"])
    close(got.discounted_future_rewards, want["discounted_future_rewards"])
    m = moments(got.raw, mask)
    close(whiten(got.raw, mask, m.mean, m.variance), want["advantages"], atol=1e-4)


@cases("losses_bradley_terry")
def test_bradley_terry(case):
    inputs = leaves(case["inputs"])
    out = bradley_terry_loss(**inputs)
    close(out.losses.mean(), case["outputs"]["loss"])
    close(out.chosen_scores, case["outputs"]["chosen_rewards"])
    close(out.rejected_scores, case["outputs"]["rejected_rewards"])
    out.losses.mean().backward()
    check_grads(inputs, case["grads"])


@cases("batch_logps")
def test_token_logps(case):
    dtype = getattr(torch, case["logits_dtype"])
    logits = torch.tensor(case["inputs"]["logits"], dtype=dtype).requires_grad_()
    got = token_logps(logits, torch.tensor(case["inputs"]["labels"]))
    torch.testing.assert_close(got, tensor(case["outputs"]["token_logps"]), **tol)
    got.sum().backward()
    # the gradient itself is stored in bfloat16
    loose = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else tol
    torch.testing.assert_close(
        logits.grad.float(), tensor(case["grads"]["logits_of_sum"]), **loose
    )


# ---- every loss on one made-up batch: {name: (gradient inputs, function of batch and clamp)}


def four(b):
    return b["pc"], b["pr"], b["rc"], b["rr"]


ON_BATCH = {
    "sft": ("pc", lambda b, c: sft_loss(b["pc"])),
    "dpo": ("pc pr", lambda b, c: dpo_loss(b["pc"], b["pr"], b["rc"], b["rr"], 0.3, c)),
    "cdpo": ("pc pr", lambda b, c: cdpo_loss(b["pc"], b["pr"], b["rc"], b["rr"], 0.3, 0.2, c)),
    "ipo": ("pc pr", lambda b, c: ipo_loss(b["pc"], b["pr"], b["rc"], b["rr"], 0.4, c)),
    "ipo, masks": (
        "pc pr",
        lambda b, c: ipo_loss(b["pc"], b["pr"], b["rc"], b["rr"], 0.4, c, b["mc"], b["mr"]),
    ),
    "rpo": ("pc pr", lambda b, c: rpo_loss(*four(b), 0.3, 0.5, c)),
    "rpo, mask": ("pc pr", lambda b, c: rpo_loss(*four(b), 0.3, 0.5, c, b["mc"])),
    "dpo-norm": ("pc pr", lambda b, c: dpo_norm_loss(*four(b), 3.0, c)),
    "dpo-norm, masks": (
        "pc pr",
        lambda b, c: dpo_norm_loss(*four(b), 3.0, c, b["mc"], b["mr"]),
    ),
    "simpo": ("pc pr", lambda b, c: simpo_loss(b["pc"], b["pr"], 2.0, 0.3, c)),
    "simpo, masks": (
        "pc pr",
        lambda b, c: simpo_loss(b["pc"], b["pr"], 2.0, 0.3, c, b["mc"], b["mr"]),
    ),
    "slic": ("pc pr", lambda b, c: slic_loss(b["pc"], b["pr"], 1.5, 0.2, c)),
    "kto": (
        "pc pr",
        lambda b, c: kto_loss(
            b["pc"], b["pr"], b["rc"], b["rr"], torch.tensor(0.7), 0.3, 1.2, 0.8, c
        ),
    ),
    "grpo": ("pc", lambda b, c: grpo_loss(b["pc"], b["rc"], b["A"], b["mc"], 0.2, 0.3, c)),
    "ppo": (
        "pc v",
        lambda b, c: ppo_loss(
            b["pc"], b["v"], b["ent"], b["rc"], b["At"], b["G"], b["mc"], 0.3, 0.2, 0.1, c
        ),
    ),
    "grpo, old": (
        "pc",
        lambda b, c: grpo_loss(
            b["pc"], b["rc"], b["A"], b["mc"], 0.2, 0.2, c, b["oc"], 0.4, b["W"]
        ),
    ),
    "actor-critic": (
        "pc v",
        lambda b, c: actor_critic_loss(
            *(b["pc"], b["v"], b["ent"], b["oc"], b["rc"], b["At"], b["G"], b["mc"]),
            *(0.3, 0.2, 0.1, c, b["ov"], 0.4, b["W"]),
        ),
    ),
    "bradley-terry": ("lc lr", lambda b, c: bradley_terry_loss(b["lc"], b["lr"], b["m"], 0.1)),
}
CLAMP = (-0.6, 0.5)
every = pytest.mark.parametrize("name", ON_BATCH)
clamps = pytest.mark.parametrize("c", [None, CLAMP], ids=["plain", "humanline"])


def made_up(seed=0, n=4, S=5, dtype=torch.float64, empty=False, full=False):
    "A right-padded batch; `empty`: some rows may hold no token; `full`: there is no padding."
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    b = {}
    for x in "cr":
        mask = torch.arange(S) < torch.randint(
            0 if empty else S if full else 1, S + 1, (n, 1), generator=g
        )
        ref = -rand(n, S).abs() - 0.1
        b |= {"m" + x: mask, "r" + x: ref * mask, "p" + x: (ref + 0.5 * rand(n, S)) * mask}
    b |= dict(
        A=rand(n),
        At=rand(n, S) * b["mc"],
        v=rand(n, S),
        G=rand(n, S) * b["mc"],
        ent=rand(n, S).abs(),
        lc=rand(n, 2),
        lr=rand(n, 2),
        m=rand(n).abs(),
        oc=(b["pc"] + 0.3 * rand(n, S)) * b["mc"],  # of the policy that sampled
        ov=rand(n, S),
        W=rand(n, S).exp() * b["mc"],
    )
    return {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in b.items()}


def losses_of(out):
    return out if isinstance(out, torch.Tensor) else out.losses


def shares_of(out):
    if isinstance(out, torch.Tensor):
        return {}
    return {k: v for k, v in out._asdict().items() if isinstance(v, Share)}


@every
@clamps
def test_gradcheck(name, c):
    keys, method = ON_BATCH[name]
    # without masks their divisor counts what is not 0, and jumps where padding is moved
    b = made_up(7, full=name in ("ipo", "simpo", "rpo", "dpo-norm"))
    xs = [b[k].requires_grad_() for k in keys.split()]
    assert torch.autograd.gradcheck(
        lambda *xs: losses_of(method({**b, **dict(zip(keys.split(), xs))}, c)), xs
    )


@every
@clamps
def test_no_gradient_but_through_the_losses(name, c):
    keys, method = ON_BATCH[name]
    b = made_up(3)
    for k in keys.split():
        b[k].requires_grad_()
    out = method(b, c)
    assert losses_of(out).requires_grad
    if isinstance(out, torch.Tensor):
        return
    for k, v in out._asdict().items():
        for t in v if isinstance(v, Share) else [v]:
            assert t.requires_grad == (k == "losses"), k


def take(b, rows):
    return {k: v[rows] for k, v in b.items()}


def same(out, parts, order=None):
    """Losses and shares of parts together equal those of the whole.

    Of nothing counted at all, a share is only a convention.
    """
    losses = torch.cat([losses_of(p) for p in parts])
    torch.testing.assert_close(
        losses if order is None else losses[order], losses_of(out), rtol=1e-9, atol=1e-9
    )
    for k, v in shares_of(out).items():
        total = shares_of(parts[0])[k]
        for p in parts[1:]:
            total = total + shares_of(p)[k]
        assert (
            total.whole.item() == pytest.approx(v.whole.item(), abs=1e-8) or v.part == v.whole
        ), k
        if v.whole >= 1:
            torch.testing.assert_close(total.value, v.value, rtol=1e-7, atol=1e-8, msg=k)


@every
@clamps
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), cut=st.integers(0, 6))
def test_cutting_a_batch_changes_nothing(name, c, seed, n, cut):
    "Also where a part holds no row at all."
    b, method = made_up(seed, n, empty=True), ON_BATCH[name][1]
    cut = min(cut, n)
    parts = [method(take(b, rows), c) for rows in (slice(None, cut), slice(cut, None))]
    order = None
    if name == "kto":  # chosen and rejected of one part, then of the other
        chosen = [*range(cut), *range(2 * cut, n + cut)]
        rejected = [*range(cut, 2 * cut), *range(n + cut, 2 * n)]
        order = torch.tensor(chosen + rejected)
    same(method(b, c), parts, order)


@every
@clamps
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6))
def test_order_of_rows_does_not_matter(name, c, seed, n):
    b, method = made_up(seed, n, empty=True), ON_BATCH[name][1]
    perm = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    back = torch.argsort(perm)
    same(
        method(b, c),
        [method(take(b, perm), c)],
        torch.cat([back, back + n]) if name == "kto" else back,
    )


@every
@clamps
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), extra=st.integers(1, 4))
def test_padding_does_not_matter(name, c, seed, extra):
    b, method = made_up(seed, 3, empty=True), ON_BATCH[name][1]
    padded = dict(b)
    for key, values in b.items():
        if values.dim() == 2 and values.shape[1] == 5:
            padded[key] = F.pad(values, (0, extra))
    same(method(b, c), [method(padded, c)])


@every
@clamps
def test_nan_stays_visible(name, c):
    "In the row where it is, and only there; no other row is harmed."
    keys, method = ON_BATCH[name]
    for k in keys.split():
        b = made_up(1)
        assert losses_of(method(b, c)).isfinite().all()
        b[k][2] = torch.where(b[k][2] != 0, math.nan, b[k][2])
        bad = losses_of(method(b, c)).isnan()
        assert bad.nonzero().flatten().tolist() == [2 + 4 * (name == "kto" and k == "pr")]


@clamps
@pytest.mark.parametrize("rubbish", [3.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "name, keys",
    [
        ("grpo", "pc rc"),
        ("ppo", "pc v ent rc At G"),
        ("grpo, old", "pc rc oc W"),
        ("actor-critic", "pc v ent oc rc At G ov W"),
        ("ipo, masks", "pc rc"),
        ("dpo-norm, masks", "pc rc"),
        ("simpo, masks", "pc"),
    ],
)
def test_what_lies_outside_the_mask_does_not_matter(name, keys, rubbish, c):
    "Neither for the losses nor the gradients."
    b, (grads, method) = made_up(4), ON_BATCH[name]

    def run(b):
        xs = [b[k].clone().requires_grad_() for k in grads.split()]
        out = method({**b, **dict(zip(grads.split(), xs))}, c)
        return out, torch.autograd.grad(losses_of(out).sum(), xs)

    assert not b["mc"].all()
    out, want = run(b)
    dirty, got = run(b | {k: b[k].where(b["mc"], rubbish) for k in keys.split()})
    torch.testing.assert_close(losses_of(dirty), losses_of(out))
    torch.testing.assert_close(got, want)
    if "mask" not in name:
        same(out, [dirty])


@every
@clamps
def test_bfloat16_is_computed_in_float32(name, c):
    b, method = made_up(5, 3, S=40, dtype=torch.bfloat16), ON_BATCH[name][1]
    wide = {k: v.float() if v.is_floating_point() else v for k, v in b.items()}
    got, want = method(b, c), method(wide, c)
    assert losses_of(got).dtype == torch.float32
    torch.testing.assert_close(losses_of(got), losses_of(want), rtol=0, atol=0)
    for k, v in shares_of(got).items():
        torch.testing.assert_close(v.value, shares_of(want)[k].value, rtol=1e-6, atol=1e-6)


@every
@clamps
@pytest.mark.parametrize("scale", [0.0, 1e3, -1e3])
def test_extremes_are_finite(name, c, scale):
    "Policy = reference, and log-probs hundreds of nats away; losses and gradients, float32."
    keys, method = ON_BATCH[name]
    b = made_up(2, dtype=torch.float32)
    for x in "cr":
        b["p" + x] = b["r" + x] + (scale * b["m" + x] if x == "c" else -scale * b["m" + x])
    for k in keys.split():
        b[k].requires_grad_()
    out = losses_of(method(b, c))
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.sum(), [b[k] for k in keys.split()])
    assert all(g.isfinite().all() for g in grads)


@every
@clamps
def test_rows_without_tokens_are_finite(name, c):
    keys, method = ON_BATCH[name]
    b = made_up(2)
    for k in ("pc", "rc", "mc", "At", "G"):
        b[k][1:3] = 0
    for k in keys.split():
        b[k].requires_grad_()
    out = losses_of(method(b, c))
    assert out.isfinite().all()
    if name in ("sft", "grpo", "grpo, old", "ppo", "actor-critic"):
        assert not out[1:3].any()
    assert all(
        g.isfinite().all() for g in torch.autograd.grad(out.sum(), [b[k] for k in keys.split()])
    )


# ---- how the methods relate

batches = given(seed=st.integers(0, 10**6))
some = settings(max_examples=20, deadline=None)


def swapped(b):
    return b["pr"], b["pc"], b["rr"], b["rc"]


@some
@batches
def test_swapping_chosen_and_rejected(seed):
    b = made_up(seed)
    # labels that are noise say nothing
    torch.testing.assert_close(
        cdpo_loss(*four(b), epsilon=0.5).losses, cdpo_loss(*swapped(b), epsilon=0.5).losses
    )
    p, q = [(-dpo_loss(*x).losses).exp() for x in (four(b), swapped(b))]
    torch.testing.assert_close(p + q, torch.ones_like(p))  # one of the two is better
    torch.testing.assert_close(
        cdpo_loss(*four(b), 0.2, 0.3).losses, cdpo_loss(*swapped(b), 0.2, 0.7).losses
    )


@some
@batches
def test_reductions(seed):
    b = made_up(seed)
    torch.testing.assert_close(
        cdpo_loss(*four(b), 0.2, 0.0, CLAMP).losses, dpo_loss(*four(b), 0.2, CLAMP).losses
    )
    ones = [x[:, :1] for x in four(b)]
    nothing = [torch.zeros_like(x) for x in ones[2:]]
    torch.testing.assert_close(
        simpo_loss(*ones[:2], 2.0, 0.0).losses, dpo_loss(*ones[:2], *nothing, 2.0).losses
    )
    two = [F.pad(x, (1, 0)) for x in ones[:2]]
    torch.testing.assert_close(
        bradley_terry_loss(*two).losses, dpo_loss(*ones[:2], *nothing, 1.0).losses
    )
    torch.testing.assert_close(
        bradley_terry_loss(*two, margin=b["m"]).losses,
        bradley_terry_loss(two[0] - b["m"][:, None], two[1]).losses,
    )
    centred = bradley_terry_loss(b["lc"], b["lr"], centring=0.3).losses
    plain = bradley_terry_loss(b["lc"], b["lr"]).losses
    torch.testing.assert_close(centred - plain, 0.3 * (b["lc"][:, 1] + b["lr"][:, 1]) ** 2)
    # the hinge is met
    torch.testing.assert_close(slic_loss(b["pc"], b["pr"], -1e3, 1.0).losses, sft_loss(b["pc"]))
    # without its term RPO is DPO; one token long, the mean is the sum
    near(rpo_loss(*four(b), 0.2, 0.0, CLAMP), dpo_loss(*four(b), 0.2, CLAMP))
    near(dpo_norm_loss(*ones, 0.2, CLAMP), dpo_loss(*ones, 0.2, CLAMP))
    wide = log_ratios(b["pc"], b["rc"], (-1e3, 1e3))
    torch.testing.assert_close(wide.tokens, log_ratios(b["pc"], b["rc"]).tokens)
    assert wide.unclamped.value == 1


@some
@batches
def test_kto_is_a_sigmoid_on_each_side(seed):
    b, none = made_up(seed), torch.zeros(0, 5, dtype=torch.float64)
    zero, r = torch.zeros((), dtype=torch.float64), (b["pc"] - b["rc"]).sum(-1)
    good = kto_loss(b["pc"], none, b["rc"], none, zero, 0.3, desirable_weight=1.5)
    bad = kto_loss(none, b["pc"], none, b["rc"], zero, 0.3, undesirable_weight=0.5)
    torch.testing.assert_close(good.losses, 1.5 / (1 + (0.3 * r).exp()))
    torch.testing.assert_close(bad.losses, 0.5 / (1 + (-0.3 * r).exp()))
    assert good.rejected_rewards.shape == (0,)
    assert good.rejected_unclamped.value == 1
    assert good.losses.shape == bad.losses.shape == (4,)


def test_no_gradient_through_the_reference_point():
    b = made_up()
    KL = b["pc"].requires_grad_().sum().abs()
    torch.autograd.backward(
        kto_loss(b["pc"].detach(), b["pr"].requires_grad_(), b["rc"], b["rr"], KL).losses.sum()
    )
    assert b["pc"].grad is None and b["pr"].grad is not None
    assert not any(x.requires_grad for x in kto_kl(b["pc"], b["rc"]))


@some
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 5))
def test_kto_kl_adds_up_before_it_is_floored(seed, cut):
    b = made_up(seed, 5, empty=True)
    rows = (b["pc"] - b["rc"]).clamp(*CLAMP).sum(-1)
    want = max(rows.sum().item() / max((rows != 0).sum().item(), 1), 0)
    parts = kto_kl(b["pc"][:cut], b["rc"][:cut], CLAMP) + kto_kl(
        b["pc"][cut:], b["rc"][cut:], CLAMP
    )
    assert parts.value.clamp(min=0).item() == pytest.approx(want, rel=1e-9, abs=1e-12)


def near(a, b):
    "Two results are equal, losses and metrics."
    assert type(a) is type(b)
    for name, x, y in zip(a._fields, a, b):
        torch.testing.assert_close(x, y, msg=lambda m, n=name: f"{n}: {m}")


@some
@batches
def test_grpo_and_ppo(seed):
    b = made_up(seed, empty=True)
    same = grpo_loss(b["rc"], b["rc"], b["A"], b["mc"])
    # ratio 1: -advantage per token
    torch.testing.assert_close(same.losses, -b["A"] * b["mc"].sum(-1))
    group = grpo_loss(b["pc"], b["rc"], b["A"], b["mc"], 0.0, 0.3, CLAMP)
    tokens = ppo_loss(
        b["pc"],
        b["v"],
        b["ent"],
        b["rc"],
        b["A"][:, None] * b["mc"],
        b["G"],
        b["mc"],
        0.3,
        0.0,
        0.0,
        CLAMP,
    )
    torch.testing.assert_close(group.losses, tokens.losses)
    assert group.unclamped == tokens.unclamped
    # with what each of them has beside: nothing of it changes a thing
    old = grpo_loss(b["pc"], b["rc"], b["A"], b["mc"], 0.2, 0.3, CLAMP, b["rc"], 0.3)
    near(old, grpo_loss(b["pc"], b["rc"], b["A"], b["mc"], 0.2, 0.3, CLAMP))
    ones = torch.ones_like(b["W"])
    near(grpo_loss(b["pc"], b["rc"], b["A"], b["mc"], 0.0, 0.3, CLAMP, weights=ones), group)
    given = b["pc"], b["v"], b["ent"], b["rc"]
    rest = b["At"], b["G"], b["mc"], 0.3, 0.2, 0.0, CLAMP
    new = actor_critic_loss(*given, b["rc"], *rest, b["ov"], None, ones)
    near(new, ppo_loss(*given, *rest))
    # the KL estimate is never negative
    assert grpo_loss(b["pc"], b["rc"], b["A"] * 0, b["mc"], 1.0).losses.min() >= 0


@pytest.mark.parametrize(
    "name",
    [
        "dpo",
        "rpo",
        "rpo, mask",
        "dpo-norm",
        "dpo-norm, masks",
        "simpo",
        "simpo, masks",
        "slic",
        "kto",
        "bradley-terry",
    ],
)
@clamps
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), push=st.floats(0.01, 3))
def test_a_likelier_chosen_never_costs(name, c, seed, push):
    "Nor does a less likely rejected: each loss is monotone."
    b, (keys, method) = made_up(seed), ON_BATCH[name]
    if "bradley" in name:
        method = lambda b, c: bradley_terry_loss(b["lc"], b["lr"])
    up, down = keys.split()
    for key, sign in ((up, 1), (down, -1)):
        better = {**b, key: b[key] + sign * push * (b[key] != 0)}
        assert (losses_of(method(better, c)) <= losses_of(method(b, c)) + 1e-12).all()


# ---- advantages


def exact_advantages(values, rewards, mask, gamma, lam):
    "Equation 16 as the double sum that it is."
    v, r, S = values * mask, rewards * mask, values.shape[1]
    delta = F.pad(r + gamma * F.pad(v, (0, 1))[:, 1:] - v, (0, S))
    total = torch.zeros_like(v)
    for t in range(S):
        for l in range(S):
            total[:, t] += (gamma * lam) ** l * delta[:, t + l]
    return total * mask


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 4),
    S=st.integers(0, 7),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_generalized_advantages(seed, n, S, gamma, lam):
    g = torch.Generator().manual_seed(seed)
    values, rewards = (torch.randn(n, S, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(n, S, generator=g) < 0.7
    got = generalized_advantages(values, rewards, mask, gamma, lam)
    want = exact_advantages(values, rewards, mask, gamma, lam) if S else values
    torch.testing.assert_close(got.raw, want)
    torch.testing.assert_close(got.returns, want + values * mask)
    if S:
        torch.testing.assert_close(
            got.discounted_future_rewards,
            exact_advantages(values * 0, rewards, mask, gamma, 1.0),
        )
    garbage = generalized_advantages(
        values.where(mask, math.nan), rewards.where(mask, math.inf), mask, gamma, lam
    )
    for a, b in zip(got, garbage):
        torch.testing.assert_close(a, b)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), offset=st.sampled_from([0.0, 1.0, -1e4]), cut=st.integers(0, 5)
)
def test_whitening_by_global_moments(seed, offset, cut):
    g = torch.Generator().manual_seed(seed)
    raw, mask = torch.randn(5, 6, generator=g) + offset, torch.rand(5, 6, generator=g) < 0.7
    mask[0, :2] = True
    m = moments(raw[:cut], mask[:cut]) + moments(raw[cut:], mask[cut:])
    want = raw[mask].double()
    torch.testing.assert_close(m.mean, want.mean())
    torch.testing.assert_close(m.variance, want.var(unbiased=False), rtol=1e-6, atol=1e-9)
    white = whiten(raw.where(mask, math.nan), mask, m.mean, m.variance)
    torch.testing.assert_close(
        white[mask].double(),
        (want - want.mean()) / (want.var(unbiased=False) + 1e-8).sqrt(),
        rtol=1e-4,
        atol=1e-4,
    )
    assert not white[~mask].any() and white.dtype == torch.float32


def test_whitening_without_spread_or_tokens():
    raw, mask = torch.full((2, 3), 4.0), torch.ones(2, 3).bool()
    m = moments(raw, mask)
    assert not whiten(raw, mask, m.mean, m.variance).any()
    m = moments(raw, ~mask)
    assert not whiten(raw, ~mask, m.mean, m.variance).any() and m.mean == 0


# ---- what must fail

one, two = torch.zeros(1, 3), torch.zeros(2, 3)
flags = two == 0


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: dpo_loss(two, two, one, two), r"policy \(2, 3\), reference \(1, 3\)"),
        (lambda: dpo_loss(one, two, one, two), "chosen"),
        (lambda: slic_loss(two, one), "rejected"),
        (lambda: ipo_loss(two, two, two, two, chosen_mask=flags[:1]), "mask"),
        (lambda: simpo_loss(two, two, clamp=(0.1, 1.0)), "padding"),
        (lambda: kto_loss(two, one, two, two, torch.tensor(0.0)), "reference"),
        (lambda: grpo_loss(two, two, torch.zeros(1), flags), "advantages"),
        (lambda: grpo_loss(two, two, torch.zeros(2, 1), flags), "advantages"),
        (lambda: ppo_loss(two, two, two, two, two, one, flags), "discounted_future_rewards"),
        (lambda: grpo_loss(two, two, torch.zeros(2), flags, old_logps=one), "old"),
        (lambda: grpo_loss(two, two, torch.zeros(2), flags, weights=one), "weights"),
        (lambda: importance(two, one, flags), "sampler"),
        (lambda: actor_critic_loss(*[two] * 6, one, flags), "value_target"),
        (lambda: actor_critic_loss(*[two] * 4, one, two, two, flags), "reference"),
        (lambda: actor_critic_loss(*[two] * 7, flags, old_values=one), "old_values"),
        (lambda: actor_critic_loss(*[two] * 7, flags, weights=one), "weights"),
        (lambda: rpo_loss(two, two, two, two, chosen_mask=flags[:1]), "mask"),
        (lambda: dpo_norm_loss(two, two, two, two, rejected_mask=flags[:1]), "mask"),
        (lambda: penalised_rewards(two, two, one, flags, 0.1), "reference"),
        (lambda: generalized_advantages(two, one, flags), "rewards"),
        (lambda: bradley_terry_loss(torch.zeros(2, 2), torch.zeros(1, 2)), "rejected"),
        (
            lambda: bradley_terry_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(1)),
            "margin",
        ),
    ],
)
def test_what_pytorch_would_broadcast_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()

"""Losses against their papers' equations, written out token by token in float64.

The policy is a softmax over four tokens, and what is compared is the gradient of its scores,
by autograd of the equation. Then what must come of them: which way a step moves the KL.
"""

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from golden import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import clamp, clamps, close, leaves, tensor

from halos_nb.advantages import penalised_rewards
from halos_nb.feedback import group_advantages, pooled_spread
from halos_nb.losses import (
    EXP_LIMIT,
    actor_critic_loss,
    clipped_surrogate,
    dpo_norm_loss,
    grpo_loss,
    importance,
    ppo_loss,
    rpo_loss,
    value_error,
)

WORDS = 4  # tokens that the policy chooses from
S = 5
some = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)
exact = dict(rtol=1e-10, atol=1e-12)


def near(got, want):
    torch.testing.assert_close(got, want, **exact)


def near_share(share, want):
    "The mean of a Share; a count of tokens may be kept in float32."
    assert share.value.item() == pytest.approx(want.item(), rel=1e-6, abs=1e-9)


# ---- a policy that is a table of scores


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rand(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


class Answers:
    "Rows of tokens, some of them empty, and the scores that a softmax chose them by."

    def __init__(self, g, n=4):
        self.scores = rand(g, n, S, WORDS).requires_grad_()
        self.tokens = torch.randint(WORDS, (n, S), generator=g)
        self.lengths = torch.randint(0, S + 1, (n,), generator=g).tolist()
        self.mask = torch.arange(S) < torch.tensor(self.lengths)[:, None]
        self.near = self.logps(0.0).detach() + 0.5 * rand(g, n, S) * self.mask
        self.old = self.logps(0.0).detach() + 0.3 * rand(g, n, S) * self.mask

    def logps(self, padding=math.nan):
        "(n, S) as a trainer has them; what stands at padding must not matter."
        logps = F.log_softmax(self.scores, -1).gather(-1, self.tokens[..., None])[..., 0]
        return logps.where(self.mask, padding)

    def dirty(self, table, rubbish=math.nan):
        return table.where(self.mask, rubbish)

    def logp(self, i, t):
        "Of one token, by the definition of a softmax."
        scores = self.scores[i, t]
        return scores[self.tokens[i, t]] - scores.exp().sum().log()

    def rows(self, of_token):
        "(n,) the sum over each row's tokens of a function of row and position."
        zero = self.scores.sum() * 0
        sums = []
        for i, length in enumerate(self.lengths):
            sums.append(sum((of_token(i, t) for t in range(length)), zero))
        return torch.stack(sums)

    def means(self, of_token):
        "(n,) the same, over the number of the row's tokens."
        return self.rows(of_token) / torch.tensor(self.lengths).clamp(min=1)


def equal_with_gradients(got, want, *parameters):
    "Each row's loss, and what each parameter gets of the rows' sum."
    near(got, want)
    theirs = torch.autograd.grad(got.sum(), parameters)
    nothing = sum(parameter.sum() * 0 for parameter in parameters)  # all rows may be empty
    near(theirs, torch.autograd.grad(want.sum() + nothing, parameters))


# ---- the equations


def held(x, low, high):
    "x, or the bound that it is beyond: a number, which has no gradient."
    if x < low:
        return torch.tensor(low, dtype=torch.float64)
    if x > high:
        return torch.tensor(high, dtype=torch.float64)
    return x


def objective(logp, old, A, low, high, interval):
    "min(rho A, clip(rho, 1 - low, 1 + high) A), to be maximised."
    log_ratio = logp - old
    if interval:
        log_ratio = held(log_ratio, *interval)
    rho = log_ratio.exp()
    free = rho * A
    clipped = held(rho, 1 - low, 1 + high) * A
    return free if free <= clipped else clipped


def k3(logp, reference):
    "Schulman's estimate: r - log r - 1, with r the reference's probability over the policy's."
    r = (reference - logp).exp()
    return r - torch.log(r) - 1


def sigmoid_loss(margin):
    return (1 + (-margin).exp()).log()


# ---- GRPO


@clamps
@some
@given(
    seed=seeds,
    beta=st.sampled_from([0.0, 0.1, 1.0]),
    low=st.sampled_from([0.0, 0.1, 0.2]),
    high=st.sampled_from([None, 0.0, 0.28, math.inf]),
    known=st.booleans(),
    weighted=st.booleans(),
)
def test_grpo(c, seed, beta, low, high, known, weighted):
    "Shao et al. 2024, eq. 3 and 4; Yu et al. 2025 for the upper bound; truncated importance."
    g = generator(seed)
    a = Answers(g)
    A = rand(g, 4)
    A[0] = 0
    w = rand(g, 4, S).exp() if weighted else torch.ones(4, S, dtype=torch.float64)
    out = grpo_loss(
        a.logps(),
        a.dirty(a.near),
        A,
        a.mask,
        beta,
        low,
        c,
        a.dirty(a.old) if known else None,
        high,
        a.dirty(w) if weighted else None,
    )
    old = a.old if known else a.near
    above = low if high is None else high

    def loss(i, t):
        logp = a.logp(i, t)
        gain = w[i, t] * objective(logp, old[i, t], A[i], low, above, c)
        return -gain + beta * k3(logp, a.near[i, t])

    equal_with_gradients(out.losses, a.rows(loss), a.scores)
    count = sum(a.lengths)
    if count:
        kl = a.rows(lambda i, t: k3(a.logp(i, t), a.near[i, t])).sum() / count
        near_share(out.KL, kl)

        def is_clipped(i, t):
            logp = a.logp(i, t)
            bounded = objective(logp, old[i, t], A[i], low, above, c)
            free = objective(logp, old[i, t], A[i], 1.0, math.inf, c)
            return (bounded < free).double()

        near_share(out.clipped, a.rows(is_clipped).sum() / count)


def one_token(log_ratio, A, **kw):
    "(loss, gradient) of a token whose log-prob stands this far above its sampler's."
    logp = torch.full((1, 1), -1.0 + log_ratio, dtype=torch.float64, requires_grad=True)
    old = torch.full((1, 1), -1.0, dtype=torch.float64)
    real = torch.ones(1, 1, dtype=torch.bool)
    A = torch.tensor([A], dtype=torch.float64)
    kw = dict(beta=0.0, old_logps=old) | kw
    loss = grpo_loss(logp, kw.pop("reference", old), A, real, **kw).losses.sum()
    return loss.item(), torch.autograd.grad(loss, logp)[0].item()


@pytest.mark.parametrize(
    "log_ratio, A, low, high, loss, gradient",
    [
        # at rest, on both bounds at once: the whole gradient
        (0.0, 2.0, 0.0, 0.0, -2.0, -2.0),
        (0.0, -2.0, 0.0, 0.0, 2.0, 2.0),
        # within
        (math.log(1.25), 2.0, 0.25, 0.5, -2.5, -2.5),
        (math.log(0.75), -2.0, 0.5, 0.25, 1.5, 1.5),
        # beyond it, where it went by its own advantage: nothing more to gain
        (math.log(2.0), 2.0, 0.25, 0.5, -3.0, 0.0),
        (math.log(0.25), -2.0, 0.5, 0.25, 1.0, 0.0),
        # beyond it against its advantage: pulled back
        (math.log(2.0), -2.0, 0.25, 0.5, 4.0, 4.0),
        (math.log(0.25), 2.0, 0.5, 0.25, -0.5, -0.5),
        # the upper bound is not the lower one's
        (math.log(1.375), 1.0, 0.25, 0.5, -1.375, -1.375),
        (math.log(1.375), 1.0, 0.5, 0.25, -1.25, 0.0),
        # no advantage, nothing
        (math.log(2.0), 0.0, 0.25, 0.5, 0.0, 0.0),
    ],
)
def test_on_and_beyond_the_bounds(log_ratio, A, low, high, loss, gradient):
    found = one_token(log_ratio, A, epsilon=low, epsilon_high=high)
    assert found == pytest.approx((loss, gradient), rel=1e-12, abs=1e-15)


def test_exactly_on_a_bound():
    "Ratios that are the bound to the last bit, so the two branches are equal."
    for log_ratio in (math.log(1.5), 0.0, math.log(0.5)):
        ratio = torch.tensor(log_ratio, dtype=torch.float64).exp().item()
        for A in (2.0, -2.0):
            wide = dict(epsilon=1 - ratio, epsilon_high=0.0)
            if ratio > 1:
                wide = dict(epsilon=0.0, epsilon_high=ratio - 1)
            x = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
            out = clipped_surrogate(x, torch.tensor([[A]], dtype=torch.float64), **wide)
            assert not out.clipped.any()
            assert out.losses.item() == -A * ratio
            assert torch.autograd.grad(out.losses.sum(), x)[0].item() == -A * ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nats", [100.0, -100.0, 1e4, -1e4])
@pytest.mark.parametrize("A", [1.0, -1.0, 0.0])
def test_a_hundred_nats(dtype, nats, A):
    "Capped at EXP_LIMIT: finite in float32, and without a gradient beyond it."
    x = torch.tensor([[-1.0 + nats]], dtype=dtype, requires_grad=True)
    base = torch.tensor([[-1.0]], dtype=dtype)
    real = torch.ones(1, 1, dtype=torch.bool)
    out = grpo_loss(x, base, torch.tensor([A], dtype=dtype), real, 0.5, 0.2, None, base, 0.3)
    top = math.exp(EXP_LIMIT)
    if nats > 0:
        policy = {1.0: -1.3, -1.0: top, 0.0: 0.0}[A]
        kl = nats - 1
    else:
        policy = {1.0: 0.0, -1.0: 0.8, 0.0: 0.0}[A]
        kl = top - EXP_LIMIT - 1
    assert out.losses.item() == pytest.approx(policy + 0.5 * kl, rel=1e-5)
    assert out.KL.value.item() == pytest.approx(kl, rel=1e-5)
    gradient = torch.autograd.grad(out.losses.sum(), x)[0].item()
    # k3 grows by a nat a nat above the reference
    assert gradient == pytest.approx(0.5 if nats > 0 else 0.0, abs=1e-6)


@some
@given(seed=seeds, beta=st.sampled_from([0.0, 0.3]))
def test_at_its_own_sampler_grpo_is_the_policy_gradient(seed, beta):
    "-A grad log pi, and beta (1 - reference / pi) grad log pi; grad log softmax by hand."
    g = generator(seed)
    a = Answers(g)
    A = rand(g, 4)
    logps = a.logps()
    out = grpo_loss(logps, a.dirty(a.near), A, a.mask, beta, 0.2, None, logps.detach(), 0.28)
    probabilities = F.softmax(a.scores.detach(), -1)
    slope = F.one_hot(a.tokens, WORDS) - probabilities
    ratio = (a.near - a.logps(0.0).detach()).exp()
    push = -A[:, None] + beta * (1 - ratio)
    want = (push * a.mask)[..., None] * slope
    near(torch.autograd.grad(out.losses.sum(), a.scores)[0], want)
    assert not out.clipped.value and out.losses.isfinite().all()


@some
@given(seed=seeds)
def test_without_a_penalty_the_reference_does_not_matter(seed):
    "Neither for loss nor gradient, when the ratio is to what sampled; in HALOs it does."
    g = generator(seed)
    a = Answers(g)
    A = rand(g, 4)
    found = []
    for reference in (a.near, a.near - 7.0):
        losses = grpo_loss(a.logps(), reference, A, a.mask, 0.0, 0.2, None, a.old).losses
        found.append((losses, *torch.autograd.grad(losses.sum(), a.scores)))
    near(*found)
    if sum(a.lengths):
        halos = [
            grpo_loss(a.logps(), reference, A, a.mask, 0.0, 0.2).losses
            for reference in (a.near, a.near - 7.0)
        ]
        assert not torch.equal(*halos)


# ---- importance


@some
@given(seed=seeds, cap=st.sampled_from([1.0, 2.0, 10.0, math.inf]))
def test_importance(seed, cap):
    "min(old / sampler, cap) of each token whose sampler's log-prob is known; else 1."
    g = generator(seed)
    a = Answers(g)
    sampler = a.old + rand(g, 4, S)
    sampler[torch.rand(4, S, generator=g) < 0.3] = math.nan
    sampler[1, 0] = a.old[1, 0] - 100  # more than float32 holds
    out = importance(a.dirty(a.old), a.dirty(sampler), a.mask, cap)
    weights, apart = [], []
    for i, length in enumerate(a.lengths):
        for t in range(S):
            before, told = a.old[i, t].item(), sampler[i, t].item()
            if t >= length or math.isnan(told):
                assert out.weights[i, t] == 1
                continue
            weights.append(math.exp(before) / math.exp(told))
            apart.append(abs(before - told))
            want = min(math.exp(min(before - told, EXP_LIMIT)), cap)
            assert out.weights[i, t].item() == pytest.approx(want, rel=1e-12)
    n = len(weights)
    assert out.mean.whole == out.cut.whole == out.difference.whole == n
    if n:
        kept = [min(w, cap, math.exp(EXP_LIMIT)) for w in weights]
        assert out.mean.value.item() == pytest.approx(sum(kept) / n, rel=1e-12)
        assert out.cut.part.item() == sum(w > cap for w in weights)
        assert out.difference.value.item() == pytest.approx(sum(apart) / n, rel=1e-12)


def test_an_unknown_weight_is_1_whatever_the_cap():
    old = torch.full((1, 2), -1.0)
    sampler = torch.tensor([[math.nan, -1.0]])
    out = importance(old, sampler, torch.ones(1, 2, dtype=torch.bool), cap=0.5)
    assert out.weights.tolist() == [[1.0, 0.5]]


def test_importance_at_the_cap_is_not_cut():
    old = torch.tensor([[math.log(0.5), math.log(0.5)]], dtype=torch.float64)
    sampler = torch.tensor([[math.log(0.25), math.log(0.125)]], dtype=torch.float64)
    out = importance(old, sampler, torch.ones(1, 2, dtype=torch.bool), cap=2.0)
    assert out.weights.tolist() == [[2.0, 2.0]] and out.cut.part == 1


@some
@given(seed=seeds)
def test_importance_turns_a_sampler_into_the_policy(seed):
    "With all outcomes: the sampler's, weighted, give the gradient of the policy's own."
    g = generator(seed)
    scores, behind = rand(g, WORDS).requires_grad_(), rand(g, WORDS) * 0.2
    logps = F.log_softmax(scores, -1)[:, None]
    sampler = F.log_softmax(behind, -1)[:, None]
    A, real = rand(g, WORDS), torch.ones(WORDS, 1, dtype=torch.bool)
    weights = importance(logps, sampler, real, cap=math.inf).weights
    found = []
    for drawn, w in ((sampler, weights), (logps.detach(), None)):
        out = grpo_loss(logps, logps.detach(), A, real, 0.0, 0.2, None, logps.detach(), None, w)
        mean = (drawn.exp()[:, 0] * out.losses).sum()
        found.append(torch.autograd.grad(mean, scores, retain_graph=True)[0])
    near(*found)


# ---- PPO


@some
@given(seed=seeds, cliprange=st.sampled_from([None, 0.0, 0.2, 1.0]), known=st.booleans())
def test_value_error(seed, cliprange, known):
    "Half the square, and the worse of it and that of the value held near the old one."
    g = generator(seed)
    values, target, old = rand(g, 3, S).requires_grad_(), rand(g, 3, S), rand(g, 3, S)
    old[0] = values[0].detach()  # where nothing has moved yet
    got = value_error(values, target, old if known else None, cliprange)
    want = []
    for v, y, before in zip(values.flatten(), target.flatten(), old.flatten()):
        error = (v - y) ** 2 / 2
        if known and cliprange is not None:
            moved = before + held(v - before, -cliprange, cliprange)
            bounded = (moved - y) ** 2 / 2
            error = error if error >= bounded else bounded
        want.append(error)
    equal_with_gradients(got.flatten(), torch.stack(want), values)


@clamps
@some
@given(
    seed=seeds,
    k=st.sampled_from([0.0, 0.3]),
    value_cliprange=st.sampled_from([None, 0.2]),
    weighted=st.booleans(),
)
def test_actor_critic(c, seed, k, value_cliprange, weighted):
    "Schulman et al. 2017, eq. 7 and 9, the KL to the reference added as GRPO's is."
    g = generator(seed)
    a = Answers(g)
    values, old_values = rand(g, 4, S).requires_grad_(), rand(g, 4, S)
    A, G, entropy = rand(g, 4, S), rand(g, 4, S), rand(g, 4, S)
    A[0] = 0
    w = rand(g, 4, S).exp() if weighted else torch.ones(4, S, dtype=torch.float64)
    out = actor_critic_loss(
        a.logps(),
        a.dirty(values),
        a.dirty(entropy),
        *[a.dirty(table) for table in (a.old, a.near, A, G)],
        a.mask,
        0.2,
        0.7,
        k,
        c,
        a.dirty(old_values),
        value_cliprange,
        a.dirty(w) if weighted else None,
    )

    def critic(i, t):
        error = (values[i, t] - G[i, t]) ** 2 / 2
        if value_cliprange is None:
            return error
        moved = held(values[i, t] - old_values[i, t], -value_cliprange, value_cliprange)
        bounded = (old_values[i, t] + moved - G[i, t]) ** 2 / 2
        return error if error >= bounded else bounded

    def policy(i, t):
        return -objective(a.logp(i, t), a.old[i, t], A[i, t], 0.2, 0.2, c)

    def kl(i, t):
        return k3(a.logp(i, t), a.near[i, t])

    def loss(i, t):
        return w[i, t] * policy(i, t) + 0.7 * critic(i, t) + k * kl(i, t)

    equal_with_gradients(out.losses, a.rows(loss), a.scores, values)
    count = sum(a.lengths)
    if count:
        means = dict(critic=critic, policy=policy, KL=kl)
        means["entropy"] = lambda i, t: entropy[i, t]
        means["policy_kl"] = lambda i, t: a.old[i, t] - a.logp(i, t)
        for name, of_token in means.items():
            near_share(getattr(out, name), a.rows(of_token).sum() / count)


@cases("losses_ppo")
def test_actor_critic_is_halos_but_for_the_penalty(case):
    """Golden. HALOs' last term, -k (log old - log new), has the wrong sign: it pays for
    leaving the old policy. Without it value and gradients are HALOs' own; ours comes beside.
    """
    h, stats = case["hyper"], case["outputs"]["stats"]
    b, e = case["inputs"]["batch"], leaves(case["inputs"]["episode"])
    mask = tensor(b["masks"]) != 0
    entropy = torch.distributions.Categorical(logits=e["logits"]).entropy()
    old = tensor(b["logprobs"])

    def run(k):
        given = (e["logprobs"], e["values"], entropy, old, old, tensor(b["advantages"]))
        target = tensor(b["discounted_future_rewards"])
        settings = h["cliprange"], h["critic_coef"], k, clamp(h)
        out = actor_critic_loss(*given, target, mask, *settings)
        return out, out.losses.sum() / mask.sum()

    out, loss = run(0.0)
    close(loss, case["outputs"]["loss"] + h["KL_coef"] * stats["loss/policykl"])
    for name, share in (("critic", "critic"), ("policy", "policy"), ("policykl", "policy_kl")):
        close(getattr(out, share), stats[f"loss/{name}"])
    close(out.clipped, stats["clipfrac/policy"])
    loss.backward()
    close(e["values"].grad, case["grads"]["episode_values"])
    quirk = h["KL_coef"] * mask / mask.sum()
    close(e["logprobs"].grad, (tensor(case["grads"]["episode_logprobs"]) - quirk).tolist())
    penalty = k3(e["logprobs"].double(), old.double()).where(mask, 0).sum() / mask.sum()
    close(run(0.3)[1] - loss, 0.3 * penalty.item())


@some
@given(seed=seeds, k=st.sampled_from([0.0, 0.1, 2.0]))
def test_penalised_rewards(seed, k):
    "Ouyang et al. 2022, eq. 2: each token pays, also the one that the reward comes at."
    g = generator(seed)
    a = Answers(g)
    rewards = rand(g, 4, S)
    got = penalised_rewards(a.dirty(rewards, 7.0), a.dirty(a.old), a.dirty(a.near), a.mask, k)
    for i, length in enumerate(a.lengths):
        for t in range(S):
            if t >= length:
                assert got[i, t] == 7.0  # is no reward, and stays what it was
                continue
            price = k * (a.old[i, t] - a.near[i, t])
            near(got[i, t], rewards[i, t] - price)


# ---- pairs


@clamps
@pytest.mark.parametrize("masked", [False, True])
@some
@given(seed=seeds, alpha=st.sampled_from([0.0, 0.2, 1.0]))
def test_rpo(c, masked, seed, alpha):
    "Pang et al. 2024, eq. 1: DPO's loss, less alpha times the chosen's log-prob per token."
    g = generator(seed)
    w, l = Answers(g), Answers(g)
    out = rpo_loss(
        *(w.logps(0.0), l.logps(0.0), w.near * w.mask, l.near * l.mask),
        0.3,
        alpha,
        c,
        w.mask if masked else None,
    )
    wins, loses = summed_ratios(w, c), summed_ratios(l, c)
    want = sigmoid_loss(0.3 * (wins - loses)) - alpha * w.means(w.logp)
    equal_with_gradients(out.losses, want, w.scores, l.scores)
    near(out.chosen_rewards, 0.3 * wins.detach())
    near(out.rejected_rewards, 0.3 * loses.detach())


def token_ratio(a, c):
    "Log-ratio of a token as a function of row and position."

    def ratio(i, t):
        raw = a.logp(i, t) - a.near[i, t]
        return held(raw, *c) if c else raw

    return ratio


def summed_ratios(a, c):
    return a.rows(token_ratio(a, c))


@clamps
@some
@given(seed=seeds)
def test_dpo_norm(c, seed):
    "Lambert et al. 2024: DPO of mean log-ratios; padding does not count, and may be rubbish."
    g = generator(seed)
    w, l = Answers(g), Answers(g)
    tables = w.logps(), l.logps(), w.dirty(w.near), l.dirty(l.near)
    out = dpo_norm_loss(*tables, 5.0, c, w.mask, l.mask)
    wins, loses = w.means(token_ratio(w, c)), l.means(token_ratio(l, c))
    want = sigmoid_loss(5 * (wins - loses))
    equal_with_gradients(out.losses, want, w.scores, l.scores)
    near(out.chosen_rewards, 5 * wins.detach())
    near(out.rejected_rewards, 5 * loses.detach())


# ---- advantages within a group

groups = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-6, 6).map(lambda x: x / 4)), max_size=14
)


def spread_around_means(prompts, scores):
    "Root of the mean square, over all samples, of score less its group's mean; in fractions."
    exact_scores = [Fraction(score) for score in scores]
    squares = []
    for prompt, score in zip(prompts, exact_scores):
        own = [s for p, s in zip(prompts, exact_scores) if p == prompt]
        squares.append((score - sum(own) / len(own)) ** 2)
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


@settings(max_examples=100, deadline=None)
@given(rows=groups, constant=st.sampled_from([0.0, 0.01, 1.0]))
def test_group_advantages(rows, constant):
    "Shao et al. 2024, sec. 4.1; Liu et al. 2025 undivided; or over the round's spread."
    prompts, scores = [p for p, _ in rows], [s for _, s in rows]
    pooled = spread_around_means(prompts, scores)
    assert pooled_spread(prompts, scores) == pytest.approx(pooled, rel=1e-12, abs=1e-15)
    for scale in ("group", "round", "none"):
        got, sizes = group_advantages(prompts, scores, constant, scale)
        for prompt, score, advantage, size in zip(prompts, scores, got, sizes, strict=True):
            own = [s for p, s in rows if p == prompt]
            mean = sum(own) / len(own)
            deviation = math.sqrt(sum((s - mean) ** 2 for s in own) / len(own))
            by = dict(group=deviation + constant, round=pooled, none=1.0)[scale]
            want = (score - mean) / by if len(set(own)) > 1 else 0.0
            assert advantage == pytest.approx(want, rel=1e-9, abs=1e-12)
            assert size == len(own)
        for prompt in set(prompts):
            of_group = [a for p, a in zip(prompts, got) if p == prompt]
            assert sum(of_group) == pytest.approx(0, abs=1e-9)


@some
@given(rows=groups, unit=st.sampled_from([1e-6, 0.02, 300.0]))
def test_advantages_without_a_unit(rows, unit):
    "A constant that is a share of the pooled spread, and division by it: the unit is gone."
    prompts, scores = [p for p, _ in rows], [s for _, s in rows]
    scaled = [unit * score for score in scores]
    for scale in ("group", "round"):
        found = []
        for values in (scores, scaled):
            constant = 0.1 * pooled_spread(prompts, values)
            found.append(group_advantages(prompts, values, constant, scale)[0])
        assert found[1] == pytest.approx(found[0], rel=1e-9, abs=1e-9)


def test_halos_constant_has_a_unit():
    "HALOs adds 0.01 whatever the scores are: their unit changes the gradient (quirk)."
    prompts, scores = ["a", "a"], [1.0, 0.0]
    assert group_advantages(prompts, scores)[0][0] == pytest.approx(0.5 / 0.51)
    small = [score / 50 for score in scores]
    assert group_advantages(prompts, small)[0][0] == pytest.approx(0.01 / 0.02)


# ---- which way a step moves the KL: a policy whose outcomes can all be counted

LETTERS = 3  # of a two-letter language; the second letter's scores depend on the first
TABLE = (1 + LETTERS, LETTERS)  # scores of the first letter, and of the second after each
OUTCOMES = list(itertools.product(range(LETTERS), repeat=2))


def of_all_outcomes(scores):
    "(9, 2) token log-probs of every outcome."
    logps = F.log_softmax(scores, -1)
    rows = [torch.stack([logps[0, x], logps[1 + x, y]]) for x, y in OUTCOMES]
    return torch.stack(rows)


def exact_KL(scores, reference):
    "KL(policy || reference) over all outcomes, nats."
    p, q = of_all_outcomes(scores).sum(-1), of_all_outcomes(reference).sum(-1)
    return (p.exp() * (p - q)).sum().item()


REAL = torch.ones(9, 2, dtype=torch.bool)
ZERO = torch.zeros(9, 2, dtype=torch.float64)


def penalty_now(scores, reference, k=1.0, A=ZERO):
    "Expected PPO loss of the outcomes as the policy itself would draw them."
    logps = of_all_outcomes(scores)
    old, anchor = logps.detach(), of_all_outcomes(reference)
    out = actor_critic_loss(logps, ZERO, ZERO, old, anchor, A, ZERO, REAL, 0.2, 0.0, k)
    return (old.sum(-1).exp() * out.losses).sum()


def halos_penalty_now(scores, reference, k=1.0):
    "The same of HALOs' loss, whose old policy is the reference, which drew the outcomes."
    logps, old = of_all_outcomes(scores), of_all_outcomes(reference)
    out = ppo_loss(logps, ZERO, ZERO, old, ZERO, ZERO, REAL, 0.2, 0.0, k)
    return (old.sum(-1).exp() * out.losses).sum()


def group_loss_now(scores, reference, k, A):
    "Expected GRPO loss of the outcomes as the policy itself would draw them."
    logps = of_all_outcomes(scores)
    old, anchor = logps.detach(), of_all_outcomes(reference)
    losses = grpo_loss(logps, anchor, A[:, 0], REAL, k, 0.2, None, old).losses
    return (old.sum(-1).exp() * losses).sum()


def stepped(scores, loss, rate):
    return (scores - rate * torch.autograd.grad(loss, scores)[0]).detach().requires_grad_()


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_the_penalty_pulls_back_and_halos_pushes_away(seed):
    """From the same policy, half a nat off its reference: a small step on the penalty alone.

    Ours lowers the exact KL. HALOs' has the wrong sign and raises it (quirk), in either
    direction of the KL.
    """
    g = generator(seed)
    reference = rand(g, *TABLE)
    scores = (reference + 0.5 * rand(g, *TABLE)).requires_grad_()
    before = exact_KL(scores, reference), exact_KL(reference, scores)
    back = stepped(scores, penalty_now(scores, reference), 1e-2)
    away = stepped(scores, halos_penalty_now(scores, reference), 1e-2)
    assert exact_KL(back, reference) < before[0] < exact_KL(away, reference)
    assert exact_KL(reference, back) < before[1] < exact_KL(reference, away)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_the_gradient_of_the_penalty(seed):
    """At the policy that sampled, k3's gradient is that of KL(reference || policy), whose
    sum over the words is p - q; not of KL(policy || reference), which is p (log p/q - KL).
    """
    g = generator(seed)
    reference, scores = rand(g, WORDS), rand(g, WORDS).requires_grad_()
    logps, anchor = F.log_softmax(scores, -1), F.log_softmax(reference, -1)
    zero, real = torch.zeros(WORDS, 1).double(), torch.ones(WORDS, 1, dtype=torch.bool)
    old = logps.detach()[:, None]
    given = logps[:, None], zero, zero, old, anchor[:, None], zero, zero, real
    ppo = actor_critic_loss(*given, 0.2, 0.0, 1.0).losses
    group = grpo_loss(logps[:, None], anchor[:, None], zero[:, 0], real, 1.0, old_logps=old)
    p, q = logps.exp().detach(), anchor.exp()
    for losses in (ppo, group.losses):
        # its value, drawn by the policy, is KL(policy || reference)
        near((p * losses).sum().detach(), (p * (p / q).log()).sum())
        slope = torch.autograd.grad((p * losses).sum(), scores, retain_graph=True)[0]
        near(slope, p - q)


@pytest.mark.parametrize("loss", [penalty_now, group_loss_now])
@settings(max_examples=8, deadline=None)
@given(seed=seeds)
def test_more_weight_on_the_KL_less_of_it(loss, seed):
    "Twenty steps towards the same advantages, the outcomes drawn anew each time."
    g = generator(seed)
    reference = rand(g, *TABLE)
    A = rand(g, 9, 1).expand(9, 2)
    ends = []
    for k in (0.0, 0.1, 0.3, 1.0):
        scores = reference.clone().requires_grad_()
        for _ in range(20):
            scores = stepped(scores, loss(scores, reference, k, A), 0.2)
        ends.append(exact_KL(scores, reference))
    assert ends[0] > ends[1] > ends[2] > ends[3] > 0

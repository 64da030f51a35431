"""Converters: equal to HALOs where HALOs is right, and what must hold for any samples."""
import copy, math
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings, strategies as st

import halos_nb.feedback as feedback_module
from halos_nb.feedback import convert_to_binary_feedback, convert_to_pairwise_feedback, convert_to_scalar_feedback, feedback_counts, group_advantages
from halos_nb.records import RecordError, check

from golden import cases, load


def the_samples(name, case):
    samples = load(name)["sample_sets"][case["samples"]]
    ids = {(s["prompt_id"], s["output"][0]["content"], s["reward"]): s["sample_id"] for s in samples}
    return samples, lambda r, x: ids[r["prompt_id"], r[f"output_{x}"][0]["content"], r[f"reward_{x}"]]


def winners(pairs, name_of):
    return sorted([p["prompt_id"], *(name_of(p, x) for x in ("AB" if p["label"] else "BA"))] for p in pairs)


@cases("feedback_binary")
def test_binary_golden(case):
    samples, _ = the_samples("feedback_binary", case)
    given = () if case["threshold"] == "<default>" else (case["threshold"],)
    if "error" in case and "documented" not in case:
        with pytest.raises(ValueError, match="threshold"): convert_to_binary_feedback(samples, *given)
        return
    # deliberate: a fractional threshold is neither cut by int() nor, as text, refused
    feedback = convert_to_binary_feedback(samples, *given)
    assert [r["label"] for r in feedback] == case.get("documented", case)["labels"]
    if "items" in case: assert feedback == case["items"]


@cases("grpo_advantages")
def test_group_advantages_golden(case):
    advantages, sizes = group_advantages(case["inputs"]["prompt_id"], case["inputs"]["score"])
    assert advantages == pytest.approx(case["outputs"]["advantages"], rel=1e-4, abs=1e-5) and sizes == case["outputs"]["group_size"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-1e6, 1e6)), max_size=12), st.floats(-100, 100))
def test_group_advantages(samples, shift):
    ids, scores = [p for p, _ in samples], [s for _, s in samples]
    advantages, sizes = group_advantages(ids, scores)
    assert sizes == [ids.count(p) for p in ids]
    for p in set(ids):
        group = [(s, a) for q, s, a in zip(ids, scores, advantages) if q == p]
        assert abs(sum(a for _, a in group)) < 1e-3, "they say what is better within a prompt, nothing of the prompt"
        assert all(a == 0 for _, a in group) == (len({s for s, _ in group}) == 1) or max(s for s, _ in group) - min(s for s, _ in group) < 1e-6
        assert all((a <= b) for (s, a), (t, b) in combinations(sorted(group), 2)), "in the order of the scores"
    alone = [group_advantages([p], [s])[0] for p, s in samples]
    assert all(a == [0] for a in alone)


@cases("feedback_pairwise")
def test_pairwise_golden(case, monkeypatch):
    "Bit for bit, once HALOs' rule for equal rewards (the file's order) is put in the place of ours (the answers' words)."
    monkeypatch.setattr(feedback_module, "ranking", lambda group: sorted(group, key=lambda s: s["reward"], reverse=True))
    samples, name_of = the_samples("feedback_pairwise", case)
    def run(): return convert_to_pairwise_feedback(samples, case["seed"], case["mode"], case["threshold"])
    if "error" in case:
        with pytest.raises(ValueError): run()
        return
    before, pairs = copy.deepcopy(samples), run()
    assert samples == before
    if "alternative_min_pairs" in case: # deliberate: min gives all equally close pairs, none of a sample with itself
        assert winners(pairs, name_of) == case["alternative_min_pairs"]
    elif "quirk" in case: # deliberate: under a negative threshold ties are still no pairs
        assert case["threshold"] < 0 and pairs == convert_to_pairwise_feedback(samples, case["seed"], case["mode"], 0)
    else:
        assert [[p["prompt_id"], name_of(p, "A"), name_of(p, "B"), p["label"]] for p in pairs] == case["pairs"]
        assert [p["reward_difference"] for p in pairs] == case["reward_differences"]
    if "items" in case and "quirk" not in case: assert pairs == case["items"]


@cases("feedback_pairwise", keep=lambda case: "error" not in case and "quirk" not in case)
def test_pairwise_golden_with_our_ties(case):
    "deliberate: which of a prompt's equal rewards `max` takes does not hang on their order; all else is as recorded."
    samples, name_of = the_samples("feedback_pairwise", case)
    reward = {(s["prompt_id"], s["sample_id"]): s["reward"] for s in samples}
    tied = {k for k, n in Counter((s["prompt_id"], s["reward"]) for s in samples).items() if n > 1} if case["mode"] != "random" else set()
    def standing(p, a, b, label): return [p, *((reward[p, i] if (p, reward[p, i]) in tied else f"sample {i}") for i in (a, b)), label]
    pairs = convert_to_pairwise_feedback(samples, case["seed"], case["mode"], case["threshold"])
    ours, theirs = ([standing(*x) for x in rows] for rows in ([[p["prompt_id"], name_of(p, "A"), name_of(p, "B"), p["label"]] for p in pairs], case["pairs"]))
    assert ours == theirs
    assert [p["reward_difference"] for p in pairs] == case["reward_differences"]


rewards = st.one_of(st.none(), st.just(math.nan), st.integers(-3, 3), st.floats(-5, 5))


@st.composite
def labelled(draw):
    "Samples of a few prompts, mixed; each output is unique."
    owners = draw(st.lists(st.integers(0, 4), max_size=24))
    return [dict(prompt_id=p, sample_id=i, prompt=[dict(role="user", content=f"prompt {p}")], output=f"answer {i}", reward=draw(rewards), type="sample") for i, p in enumerate(owners)]


modes, thresholds, seeds = st.sampled_from(["random", "max", "min"]), st.sampled_from([-1, 0, 0.5, 1, 2.5]), st.integers(0, 2**32)


def good(samples):
    return [s for s in samples if s["reward"] is not None and not math.isnan(s["reward"])]


def of_pair(pairs):
    return [(p[f"output_{x}"][0]["content"], p["prompt_id"], p["prompt"], p[f"reward_{x}"]) for p in pairs for x in "AB"]


@given(labelled(), modes, thresholds, seeds)
@settings(max_examples=300, deadline=None)
def test_pairs_are_true(samples, mode, threshold, seed):
    before = copy.deepcopy(samples)
    pairs = convert_to_pairwise_feedback(samples, seed, mode, threshold)
    assert repr(samples) == repr(before)
    for p in pairs:
        check(p, "pairwise_feedback")
        assert p["output_A"] != p["output_B"]
        assert p["reward_difference"] == abs(p["reward_A"] - p["reward_B"]) > 0
        assert p["reward_difference"] >= threshold - 1e-12
        assert p["label"] == (p["reward_A"] > p["reward_B"])
    assert set(map(repr, of_pair(pairs))) <= {repr((s["output"], s["prompt_id"], s["prompt"], s["reward"])) for s in good(samples)} # nothing is invented
    if mode == "random": assert max(Counter(map(repr, of_pair(pairs))).values(), default=1) == 1
    if mode == "max": assert max(Counter(p["prompt_id"] for p in pairs).values(), default=1) == 1
    counts = feedback_counts(samples, pairs, mode)
    assert counts["records"] == len(pairs) and counts["samples"] == len(samples) and counts["unscored"] == len(samples) - len(good(samples))
    sizes = Counter(s["prompt_id"] for s in good(samples))
    assert counts["singles"] == sum(n == 1 for n in sizes.values())
    if mode == "random": assert counts["ties"] + len(pairs) == sum(n // 2 for n in sizes.values())
    else: assert counts["ties"] + len({p["prompt_id"] for p in pairs}) == sum(n > 1 for n in sizes.values())


@given(labelled(), st.sampled_from(["max", "min"]), thresholds, seeds, st.randoms())
@settings(max_examples=200, deadline=None)
def test_order_of_samples_does_not_matter(samples, mode, threshold, seed, rng):
    def values(pairs): # equal rewards may stand in for each other
        return sorted((p["prompt_id"], max(p["reward_A"], p["reward_B"]), min(p["reward_A"], p["reward_B"])) for p in pairs)
    shuffled = rng.sample(samples, len(samples))
    a, b = (convert_to_pairwise_feedback(x, seed, mode, threshold) for x in (samples, shuffled))
    assert values(a) == values(b)
    if mode == "min": assert {frozenset(map(repr, of_pair([p]))) for p in a} == {frozenset(map(repr, of_pair([p]))) for p in b}


@given(labelled(), seeds)
@settings(deadline=None)
def test_max_and_min_by_hand(samples, seed):
    groups = {p: [s["reward"] for s in good(samples) if s["prompt_id"] == p] for p in {s["prompt_id"] for s in samples}}
    widest = {p: max(r) - min(r) for p, r in groups.items() if len(set(r)) > 1}
    assert {p["prompt_id"]: p["reward_difference"] for p in convert_to_pairwise_feedback(samples, seed, "max")} == widest
    for p in convert_to_pairwise_feedback(samples, seed, "min"):
        least = min(abs(a - b) for a, b in combinations(groups[p["prompt_id"]], 2) if a != b)
        assert p["reward_difference"] == pytest.approx(least, abs=2e-12)


@given(labelled(), st.sampled_from(["mean", "median", 0, 0.5, "1.5"]))
@settings(deadline=None)
def test_binary_and_scalar_keep_every_scored_sample(samples, threshold):
    binary, scalar, kept = convert_to_binary_feedback(samples, threshold), convert_to_scalar_feedback(samples), good(samples)
    for r in binary: check(r, "binary_feedback")
    for r in scalar: check(r, "scalar_feedback")
    assert [r["output"][0]["content"] for r in binary] == [r["output"][0]["content"] for r in scalar] == [s["output"] for s in kept]
    assert [r["reward"] for r in binary] == [r["reward"] for r in scalar] == [s["reward"] for s in kept]
    assert [r["sample_id"] for r in scalar] == [s["sample_id"] for s in kept]
    assert all(a["label"] >= b["label"] for a in binary for b in binary if a["reward"] >= b["reward"])
    if threshold == "median" and kept: assert 2 * sum(r["label"] for r in binary) >= len(kept)


def test_coin_is_fair_and_seeded():
    samples = [dict(prompt_id=p, sample_id=i, prompt=[dict(role="user", content=str(p))], output=str(i), reward=i) for p in range(2000) for i in range(2)]
    labels = [p["label"] for p in convert_to_pairwise_feedback(samples, 7, "max")]
    assert abs(sum(labels) - 1000) < 100 # 4.5 standard deviations
    assert labels != [p["label"] for p in convert_to_pairwise_feedback(samples, 8, "max")]


@pytest.mark.parametrize("broken, told", [({}, "sample 2 .*`reward` is missing"), ({"reward": "1"}, "sample 2: field `reward`"), ({"reward": math.inf}, "infinite")])
def test_unlabelled_samples_are_an_error(broken, told):
    sample = dict(prompt_id=0, sample_id=0, prompt=[dict(role="user", content="?")], output="!")
    for convert in (convert_to_scalar_feedback, convert_to_binary_feedback, lambda s: convert_to_pairwise_feedback(s, 0)):
        with pytest.raises(RecordError, match=told): convert([sample | dict(reward=1), sample | broken])

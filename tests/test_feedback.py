"""Converters: equal to HALOs where HALOs is right, and what must hold for any samples."""

import copy, json, math, subprocess, sys
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings, strategies as st

from halos_nb import feedback as feedback_module
from halos_nb.feedback import (
    Tally,
    convert_to_binary_feedback,
    convert_to_pairwise_feedback,
    convert_to_scalar_feedback,
    feedback_counts,
    gap_quantile,
    gaps_within_prompts,
    group_advantages,
    iter_pairwise_feedback,
    without_contrast,
)
from halos_nb.verdicts import (
    HOW,
    combine_labels,
    combine_pairs,
    convert_comparisons,
    pair_of,
    pair_table,
    verdict_table,
    with_scores,
)
from halos_nb.records import RecordError, check_record

from golden import cases, load, without_ids


def the_samples(name, case):
    samples = load(name)["sample_sets"][case["samples"]]
    ids = {
        (s["prompt_id"], s["output"][0]["content"], s["reward"]): s["sample_id"]
        for s in samples
    }
    return samples, lambda r, x: ids[
        r["prompt_id"], r[f"output_{x}"][0]["content"], r[f"reward_{x}"]
    ]


def winners(pairs, name_of):
    return sorted(
        [p["prompt_id"], *(name_of(p, x) for x in ("AB" if p["label"] else "BA"))]
        for p in pairs
    )


@cases("feedback_binary")
def test_binary_golden(case):
    samples, _ = the_samples("feedback_binary", case)
    given = () if case["threshold"] == "<default>" else (case["threshold"],)
    if "error" in case and "documented" not in case:
        with pytest.raises(ValueError, match="threshold"):
            convert_to_binary_feedback(samples, *given)
        return
    # deliberate: a fractional threshold is neither cut by int() nor, as text, refused
    feedback = convert_to_binary_feedback(samples, *given)
    assert [r["label"] for r in feedback] == case.get("documented", case)["labels"]
    if "items" in case:
        assert without_ids(feedback) == case["items"]


@cases("grpo_advantages")
def test_group_advantages_golden(case):
    advantages, sizes = group_advantages(case["inputs"]["prompt_id"], case["inputs"]["score"])
    assert (
        advantages == pytest.approx(case["outputs"]["advantages"], rel=1e-4, abs=1e-5)
        and sizes == case["outputs"]["group_size"]
    )


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(-1e6, 1e6)), max_size=12),
    st.floats(-100, 100),
)
def test_group_advantages(samples, shift):
    ids, scores = [p for p, _ in samples], [s for _, s in samples]
    advantages, sizes = group_advantages(ids, scores)
    assert sizes == [ids.count(p) for p in ids]
    for p in set(ids):
        group = [(s, a) for q, s, a in zip(ids, scores, advantages) if q == p]
        assert abs(sum(a for _, a in group)) < 1e-3, (
            "they say what is better within a prompt, nothing of the prompt"
        )
        assert (
            all(a == 0 for _, a in group) == (len({s for s, _ in group}) == 1)
            or max(s for s, _ in group) - min(s for s, _ in group) < 1e-6
        )
        assert all((a <= b) for (s, a), (t, b) in combinations(sorted(group), 2)), (
            "in the order of the scores"
        )
    alone = [group_advantages([p], [s])[0] for p, s in samples]
    assert all(a == [0] for a in alone)


@cases("feedback_pairwise")
def test_pairwise_golden(case, monkeypatch):
    """Bit for bit, once HALOs' rule for equal rewards (the file's order) is put in the place of
    ours (the answers' words).
    """
    monkeypatch.setattr(
        feedback_module,
        "ranking",
        lambda group: sorted(group, key=lambda s: s["reward"], reverse=True),
    )
    samples, name_of = the_samples("feedback_pairwise", case)

    def run():
        return convert_to_pairwise_feedback(
            samples, case["seed"], case["mode"], case["threshold"]
        )

    if "error" in case:
        with pytest.raises(ValueError):
            run()
        return
    before, pairs = copy.deepcopy(samples), run()
    assert samples == before
    # deliberate: min gives all equally close pairs, none of a sample with itself
    if "alternative_min_pairs" in case:
        assert winners(pairs, name_of) == case["alternative_min_pairs"]
    elif "quirk" in case:  # deliberate: under a negative threshold ties are still no pairs
        assert case["threshold"] < 0 and pairs == convert_to_pairwise_feedback(
            samples, case["seed"], case["mode"], 0
        )
    else:
        assert [
            [p["prompt_id"], name_of(p, "A"), name_of(p, "B"), p["label"]] for p in pairs
        ] == case["pairs"]
        assert [p["reward_difference"] for p in pairs] == case["reward_differences"]
    if "items" in case and "quirk" not in case:
        assert without_ids(pairs) == case["items"]


@cases("feedback_pairwise", keep=lambda case: "error" not in case and "quirk" not in case)
def test_pairwise_golden_with_our_ties(case):
    """deliberate: which of a prompt's equal rewards `max` takes does not hang on their order;
    all else is as recorded.
    """
    samples, name_of = the_samples("feedback_pairwise", case)
    reward = {(s["prompt_id"], s["sample_id"]): s["reward"] for s in samples}
    tied = (
        {k for k, n in Counter((s["prompt_id"], s["reward"]) for s in samples).items() if n > 1}
        if case["mode"] != "random"
        else set()
    )

    def standing(p, a, b, label):
        return [
            p,
            *((reward[p, i] if (p, reward[p, i]) in tied else f"sample {i}") for i in (a, b)),
            label,
        ]

    pairs = convert_to_pairwise_feedback(samples, case["seed"], case["mode"], case["threshold"])
    ours, theirs = (
        [standing(*x) for x in rows]
        for rows in (
            [[p["prompt_id"], name_of(p, "A"), name_of(p, "B"), p["label"]] for p in pairs],
            case["pairs"],
        )
    )
    assert ours == theirs
    assert [p["reward_difference"] for p in pairs] == case["reward_differences"]


rewards = st.one_of(st.none(), st.just(math.nan), st.integers(-3, 3), st.floats(-5, 5))


@st.composite
def labelled(draw):
    "Samples of a few prompts, mixed; each output is unique."
    owners = draw(st.lists(st.integers(0, 4), max_size=24))
    return [
        dict(
            prompt_id=p,
            sample_id=i,
            prompt=[dict(role="user", content=f"prompt {p}")],
            output=f"answer {i}",
            reward=draw(rewards),
            type="sample",
        )
        for i, p in enumerate(owners)
    ]


modes, thresholds, seeds = (
    st.sampled_from(["random", "max", "min"]),
    st.sampled_from([-1, 0, 0.5, 1, 2.5]),
    st.integers(0, 2**32),
)


def good(samples):
    return [s for s in samples if s["reward"] is not None and not math.isnan(s["reward"])]


def of_pair(pairs):
    return [
        (p[f"output_{x}"][0]["content"], p["prompt_id"], p["prompt"], p[f"reward_{x}"])
        for p in pairs
        for x in "AB"
    ]


@given(labelled(), modes, thresholds, seeds)
@settings(max_examples=300, deadline=None)
def test_pairs_are_true(samples, mode, threshold, seed):
    before = copy.deepcopy(samples)
    pairs = convert_to_pairwise_feedback(samples, seed, mode, threshold)
    assert repr(samples) == repr(before)
    for p in pairs:
        check_record(p, "pairwise_feedback")
        assert p["output_A"] != p["output_B"]
        assert p["reward_difference"] == abs(p["reward_A"] - p["reward_B"]) > 0
        assert p["reward_difference"] >= threshold - 1e-12
        assert p["label"] == (p["reward_A"] > p["reward_B"])
    # nothing is invented
    assert set(map(repr, of_pair(pairs))) <= {
        repr((s["output"], s["prompt_id"], s["prompt"], s["reward"])) for s in good(samples)
    }
    if mode == "random":
        assert max(Counter(map(repr, of_pair(pairs))).values(), default=1) == 1
    if mode == "max":
        assert max(Counter(p["prompt_id"] for p in pairs).values(), default=1) == 1
    counts = feedback_counts(samples, pairs, mode)
    assert (
        counts["records"] == len(pairs)
        and counts["samples"] == len(samples)
        and counts["unscored"] == len(samples) - len(good(samples))
    )
    used = {x[0] for x in of_pair(pairs)}  # outputs are unique
    assert counts["samples"] == counts["unscored"] + counts["unused"] + len(used)
    tally = Tally()
    assert (
        list(tally.count(iter_pairwise_feedback(samples, seed, mode, threshold))) == pairs
        and feedback_counts(samples, tally, mode) == counts
    )
    sizes = Counter(s["prompt_id"] for s in good(samples))
    assert counts["singles"] == sum(n == 1 for n in sizes.values())
    if mode == "random":
        assert counts["ties"] + len(pairs) == sum(n // 2 for n in sizes.values())
    else:
        assert counts["ties"] + len({p["prompt_id"] for p in pairs}) == sum(
            n > 1 for n in sizes.values()
        )


@given(
    labelled(),
    modes,
    st.integers(0, 100),
    seeds,
    st.sampled_from([0.125, 0.5, 3, 1024]),
    st.integers(-50, 50),
)
@settings(max_examples=300, deadline=None)
def test_a_share_of_the_gaps_means_the_same_on_every_scale(
    samples, mode, percent, seed, scale, shift
):
    "Rewards times a number, and with another added, give the same pairs; all exact in floats."
    samples = [s | dict(reward=round(s["reward"])) for s in good(samples)]
    other = [s | dict(reward=s["reward"] * scale + shift) for s in samples]
    threshold = f"{percent}%"
    one = convert_to_pairwise_feedback(samples, seed, mode, threshold)
    two = convert_to_pairwise_feedback(other, seed, mode, threshold)
    ids = ("prompt_id", "sample_id_A", "sample_id_B", "label")
    assert [[p[i] for i in ids] for p in one] == [[p[i] for i in ids] for p in two]
    assert [p["reward_difference"] * scale for p in one] == [
        p["reward_difference"] for p in two
    ]
    # no more than the share is left out, and the next larger gap would leave out more
    gaps = list(gaps_within_prompts(samples))
    least = gap_quantile(samples, percent / 100)
    if least:
        assert least in gaps
        assert sum(g <= least for g in gaps) * 100 <= percent * len(gaps)
    larger = [g for g in gaps if g > least]
    if larger:
        assert sum(g <= min(larger) for g in gaps) * 100 > percent * len(gaps)
    # the number that it stands for gives the same
    assert convert_to_pairwise_feedback(samples, seed, mode, least) == one


@given(labelled(), seeds)
@settings(max_examples=100, deadline=None)
def test_no_share_and_no_threshold_are_one(samples, seed):
    for mode in ("random", "max", "min"):
        none = convert_to_pairwise_feedback(samples, seed, mode)
        assert convert_to_pairwise_feedback(samples, seed, mode, "0%") == none
        # nothing differs by more than the largest difference
        assert convert_to_pairwise_feedback(samples, seed, mode, "100%") == []


@pytest.mark.parametrize("threshold", ["101%", "-1%", "x%", "nan%", "25%%", "prompt mean"])
def test_what_is_no_share_is_refused(threshold):
    with pytest.raises(ValueError, match="not a number or a share of the differences"):
        convert_to_pairwise_feedback([], 0, "max", threshold)


@given(labelled(), st.sampled_from(["mean", "median"]))
@settings(max_examples=200, deadline=None)
def test_good_within_the_prompt(samples, word):
    """Each prompt is labelled as it would be alone; one whose rewards are all one gives
    nothing.
    """
    made = convert_to_binary_feedback(samples, f"prompt {word}")
    alone = []
    silent = 0
    for prompt in dict.fromkeys(s["prompt_id"] for s in samples):
        group = [s for s in good(samples) if s["prompt_id"] == prompt]
        if len({s["reward"] for s in group}) > 1:
            alone += convert_to_binary_feedback(group, word)
        else:
            silent += len(group)
    key = lambda r: (r["prompt_id"], r["sample_id"])
    assert sorted(made, key=key) == sorted(alone, key=key)
    assert without_contrast(samples) == silent == len(good(samples)) - len(made)
    # in the order of the samples
    numbers = {key(s): i for i, s in enumerate(samples)}
    places = [numbers[key(r)] for r in made]
    assert places == sorted(places)


@given(labelled(), st.sampled_from(["max", "min"]), thresholds, seeds, st.randoms())
@settings(max_examples=200, deadline=None)
def test_order_of_samples_does_not_matter(samples, mode, threshold, seed, rng):
    def values(pairs):  # equal rewards may stand in for each other
        return sorted(
            (
                p["prompt_id"],
                max(p["reward_A"], p["reward_B"]),
                min(p["reward_A"], p["reward_B"]),
            )
            for p in pairs
        )

    within = {
        p: iter(rng.sample(group := [s for s in samples if s["prompt_id"] == p], len(group)))
        for p in {s["prompt_id"] for s in samples}
    }
    assert convert_to_pairwise_feedback(
        [next(within[s["prompt_id"]]) for s in samples], seed, mode, threshold
    ) == convert_to_pairwise_feedback(samples, seed, mode, threshold), "equal rewards included"
    shuffled = rng.sample(samples, len(samples))
    a, b = (convert_to_pairwise_feedback(x, seed, mode, threshold) for x in (samples, shuffled))
    assert values(a) == values(b)
    if mode == "min":
        assert {frozenset(map(repr, of_pair([p]))) for p in a} == {
            frozenset(map(repr, of_pair([p]))) for p in b
        }


@given(labelled(), seeds)
@settings(deadline=None)
def test_max_and_min_by_hand(samples, seed):
    groups = {
        p: [s["reward"] for s in good(samples) if s["prompt_id"] == p]
        for p in {s["prompt_id"] for s in samples}
    }
    widest = {p: max(r) - min(r) for p, r in groups.items() if len(set(r)) > 1}
    assert {
        p["prompt_id"]: p["reward_difference"]
        for p in convert_to_pairwise_feedback(samples, seed, "max")
    } == widest
    for p in convert_to_pairwise_feedback(samples, seed, "min"):
        least = min(abs(a - b) for a, b in combinations(groups[p["prompt_id"]], 2) if a != b)
        assert p["reward_difference"] == pytest.approx(least, abs=2e-12)


@given(labelled(), st.sampled_from(["mean", "median", 0, 0.5, "1.5"]))
@settings(deadline=None)
def test_binary_and_scalar_keep_every_scored_sample(samples, threshold):
    binary, scalar, kept = (
        convert_to_binary_feedback(samples, threshold),
        convert_to_scalar_feedback(samples),
        good(samples),
    )
    for r in binary:
        check_record(r, "binary_feedback")
    for r in scalar:
        check_record(r, "scalar_feedback")
    assert (
        [r["output"][0]["content"] for r in binary]
        == [r["output"][0]["content"] for r in scalar]
        == [s["output"] for s in kept]
    )
    assert (
        [r["reward"] for r in binary]
        == [r["reward"] for r in scalar]
        == [s["reward"] for s in kept]
    )
    assert [r["sample_id"] for r in scalar] == [s["sample_id"] for s in kept]
    assert all(
        a["label"] >= b["label"] for a in binary for b in binary if a["reward"] >= b["reward"]
    )
    if threshold == "median" and kept:
        assert 2 * sum(r["label"] for r in binary) >= len(kept)


@st.composite
def repeated(draw):
    "Scored samples of a few prompts who often say the same words, with rewards of their own."
    owners = draw(st.lists(st.integers(0, 3), max_size=24))
    return [
        dict(
            prompt_id=p,
            sample_id=i,
            prompt=[dict(role="user", content=f"prompt {p}")],
            output=draw(st.sampled_from(["Vega", "Rigel", "Deneb"])),
            reward=draw(st.one_of(st.none(), st.integers(-3, 3))),
            type="sample",
        )
        for i, p in enumerate(owners)
    ]


@given(repeated(), modes, thresholds, seeds)
@settings(max_examples=300, deadline=None)
def test_records_name_their_samples(samples, mode, threshold, seed):
    """The ids of a record lead to the samples it is made of, and count the unused ones,
    whatever the words.
    """
    known = {(s["prompt_id"], s["sample_id"]): s for s in samples}
    pairs = convert_to_pairwise_feedback(samples, seed, mode, threshold)
    named = []
    for r in pairs:
        check_record(r, "pairwise_feedback")
        for x in "AB":
            key = r["prompt_id"], r[f"sample_id_{x}"]
            assert known[key]["output"] == r[f"output_{x}"][0]["content"]
            assert known[key]["reward"] == r[f"reward_{x}"]
            named.append(key)
    scored = len(good(samples))
    counts = feedback_counts(samples, pairs, mode)
    assert counts["unused"] == scored - len(set(named))
    if mode == "random":
        assert counts["unused"] == scored - 2 * len(pairs)
    binary = convert_to_binary_feedback(samples)
    assert [r["sample_id"] for r in binary] == [s["sample_id"] for s in good(samples)]
    assert feedback_counts(samples, binary)["unused"] == 0
    for r in binary:
        assert list(check_record(r, "binary_feedback"))[:2] == ["prompt_id", "sample_id"]


@given(repeated(), seeds)
@settings(max_examples=200, deadline=None)
def test_max_and_min_of_different_words(samples, seed):
    """The widest and the narrowest difference among pairs of different words, found by trying
    all pairs.
    """
    gaps = {}
    for a, b in combinations(good(samples), 2):
        if a["prompt_id"] == b["prompt_id"] and a["output"] != b["output"]:
            gaps.setdefault(a["prompt_id"], []).append(abs(a["reward"] - b["reward"]))
    gaps = {p: [g for g in found if g > 0] for p, found in gaps.items() if max(found) > 0}
    for mode, best in dict(max=max, min=min).items():
        made = convert_to_pairwise_feedback(samples, seed, mode)
        assert {p["prompt_id"]: p["reward_difference"] for p in made} == {
            p: best(found) for p, found in gaps.items()
        }
        assert all(p["output_A"] != p["output_B"] for p in made)


def answers(*said):
    "Samples of one prompt: (words, score)."
    prompt = [dict(role="user", content="Name a star.")]
    return [
        dict(prompt_id="p", sample_id=i, prompt=prompt, output=words, reward=score)
        for i, (words, score) in enumerate(said)
    ]


def test_max_when_the_best_and_the_worst_say_the_same():
    samples = answers(("Vega", 9), ("Rigel", 5), ("Vega", 1))
    (pair,) = convert_to_pairwise_feedback(samples, 0, "max")
    assert {pair["reward_A"], pair["reward_B"]} == {9, 5}  # as wide as 5 and 1, and better
    (pair,) = convert_to_pairwise_feedback(
        answers(("Vega", 9), ("Rigel", 8), ("Vega", 1)), 0, "max"
    )
    assert {pair["reward_A"], pair["reward_B"]} == {8, 1}
    assert convert_to_pairwise_feedback(answers(("Vega", 9), ("Vega", 1)), 0, "max") == []
    assert convert_to_pairwise_feedback(samples, 0, "max", threshold=4) == []


def test_a_file_without_ids_is_counted_by_its_words():
    """Feedback of before: the same words and score are one sample, and the count says that it
    was done so.
    """
    samples = answers(("Vega", 9), ("Rigel", 5), ("Vega", 9))
    pairs = convert_to_pairwise_feedback(samples, 0, "max")
    counts = feedback_counts(samples, pairs)
    assert counts["unused"] == 1 and "matched_by_text" not in counts
    counts = feedback_counts(samples, without_ids(pairs))
    assert counts["unused"] == 0 and counts["matched_by_text"] == 1
    nameless = without_ids(convert_to_binary_feedback(samples))
    assert "sample_id_A" not in convert_to_pairwise_feedback(nameless, 0, "max")[0]


def test_coin_is_fair_and_seeded():
    samples = [
        dict(
            prompt_id=p,
            sample_id=i,
            prompt=[dict(role="user", content=str(p))],
            output=str(i),
            reward=i,
        )
        for p in range(2000)
        for i in range(2)
    ]
    labels = [p["label"] for p in convert_to_pairwise_feedback(samples, 7, "max")]
    assert abs(sum(labels) - 1000) < 100  # 4.5 standard deviations
    assert labels != [p["label"] for p in convert_to_pairwise_feedback(samples, 8, "max")]


@pytest.mark.parametrize(
    "broken, told",
    [
        ({}, "sample 2 .*`reward` is missing"),
        ({"reward": "1"}, "sample 2: field `reward`"),
        ({"reward": math.inf}, "infinite"),
    ],
)
def test_unlabelled_samples_are_an_error(broken, told):
    sample = dict(prompt_id=0, sample_id=0, prompt=[dict(role="user", content="?")], output="!")
    for convert in (
        convert_to_scalar_feedback,
        convert_to_binary_feedback,
        lambda s: convert_to_pairwise_feedback(s, 0),
    ):
        with pytest.raises(RecordError, match=told):
            convert([sample | dict(reward=1), sample | broken])


# ---- several labellers

scores_of_labellers = st.dictionaries(
    st.sampled_from(["rm:a", "api:b", "human:c", "human:d"]),
    st.dictionaries(
        st.tuples(st.sampled_from("pq"), st.integers(0, 3)),
        st.one_of(st.none(), st.integers(-2, 2)),
        max_size=8,
    ),
    min_size=1,
)


def as_labels(said):
    return [
        dict(
            prompt_id=p,
            sample_id=i,
            labeller=n,
            score=x,
            reason="" if x is not None else "?",
            type="label",
        )
        for n, v in said.items()
        for (p, i), x in v.items()
    ]


@given(scores_of_labellers, st.sampled_from(list(HOW)), st.randoms())
@settings(deadline=None, max_examples=200)
def test_combined_labels(said, how, rng):
    """The order of labels changes nothing; by hand for each way; people count only where
    machines contradict each other or are silent.
    """
    rows = as_labels(said)
    found = combine_labels(rows, how)
    assert combine_labels(
        rng.sample(rows, len(rows)), how
    ).scores == found.scores and found.counts["samples"] == len(found.scores)
    known = {n: {k: x for k, x in v.items() if x is not None} for n, v in said.items()}
    sign = lambda x: (x > 0) - (x < 0)

    def beats(names, k):
        return [
            (1 + sign(known[n][k] - known[n][j])) / 2
            for n in names
            for j in known[n]
            if k in known[n] and j != k and j[0] == k[0]
        ]

    for k, x in found.scores.items():
        machines, people = (
            [n for n in known if n.startswith("human:") == human] for human in (False, True)
        )
        fight = any(
            {sign(known[n][a] - known[n][b]) for n in machines if {a, b} <= known[n].keys()}
            >= {1, -1}
            for a, b in combinations(found.scores, 2)
            if a[0] == b[0] == k[0]
        )
        quiet = not any(j[0] == k[0] for n in machines for j in known[n])
        same = [v for v in known.values() if any(j[0] == k[0] for j in v)]
        values = (
            [v[k] for v in same if all(k in v for v in same)]
            if how == "mean"
            else beats(known if how == "vote" else people if fight or quiet else machines, k)
        )
        assert x == (pytest.approx(sum(values) / len(values)) if values else None)


def test_a_mean_is_over_the_same_labellers_for_every_answer_of_a_prompt():
    "A judge says 8 and 9, a reward model -2 and 1; of the better answer the judge is silent."
    said = {
        "api:judge": {("p", 0): 8.0, ("p", 1): None, ("q", 0): 9.0},
        "rm": {("p", 0): -2.0, ("p", 1): 1.0, ("q", 0): None},
    }
    found = combine_labels(as_labels(said), "mean")
    assert found.scores == {("p", 0): 3.0, ("p", 1): None, ("q", 0): 9.0}
    assert (found.counts["scored_by_some"], found.counts["unscored"]) == (2, 1)


looks = st.lists(
    st.tuples(
        st.sampled_from(["rm:a", "api:b", "human:c"]),
        st.sampled_from("pq"),
        st.integers(0, 3),
        st.integers(0, 3),
        st.sampled_from(["A", "B", "tie", None]),
        st.sampled_from(["AB", "BA"]),
    ).filter(lambda x: x[2] != x[3]),
    max_size=25,
)


@given(
    looks,
    st.sampled_from(["vote", "human-where-they-disagree"]),
    st.integers(0, 99),
    st.dictionaries(st.tuples(st.sampled_from("pq"), st.integers(0, 3)), st.floats(-2, 2)),
)
@settings(deadline=None, max_examples=200)
def test_verdicts_become_pairs(rows, how, seed, scores):
    """The winner is who most chose, whatever was called A; its reward is higher; every pair is
    a record, a tie, undecided or of equal outputs.
    """
    comparisons = [
        dict(
            prompt_id=p,
            sample_id_A=a,
            sample_id_B=b,
            labeller=n,
            winner=w,
            order=o,
            reason="",
            type="comparison",
        )
        for n, p, a, b, w, o in rows
    ]
    # 2 and 3 are the same words
    samples = [
        dict(
            prompt_id=p,
            sample_id=i,
            prompt=[dict(role="user", content=p)],
            output=f"{p}{min(i, 2)}",
        )
        for p in "pq"
        for i in range(4)
    ]
    records, counts = convert_comparisons(comparisons, samples, seed, how, scores=scores)
    assert counts["items"] == len({pair_of(p, a, b)[0] for _, p, a, b, _, _ in rows}) == counts[
        "ties"
    ] + counts["no_verdict"] + counts["equal_outputs"] + counts["records"] and counts[
        "records"
    ] == len(records)
    said = {}
    for n, p, a, b, w, o in rows:
        # which was shown first: one look of each kind counts, the last
        first = a if o == "AB" else b
        if w is not None:
            said.setdefault((p, frozenset((a, b))), {}).setdefault(n, {})[first] = dict(
                A=a, B=b, tie=None
            )[w]
    # of a judge, one order alone says nothing
    halves = [pair for pair, by in said.items() if len(by.get("api:b", "both")) == 1]
    for pair in halves:
        del said[pair]["api:b"]
    assert counts["one_order"] == len(halves)
    words = {(s["prompt_id"], s["sample_id"]): s["output"] for s in samples}
    for r in records:
        check_record(r, "pairwise_feedback")
        for x in "AB":
            assert words[r["prompt_id"], r[f"sample_id_{x}"]] == r[f"output_{x}"][0]["content"]
        better, worse = (
            int(r[f"output_{x}"][0]["content"][1:]) for x in ("AB" if r["label"] else "BA")
        )
        assert r["label"] == (r["reward_A"] > r["reward_B"]) and r["reward_difference"] > 0
        options = [
            k
            for k in said
            if k[0] == r["prompt_id"] and {min(i, 2) for i in k[1]} == {better, worse}
        ]

        def margin(k, names, better=better, worse=worse):  # votes for better
            votes = [
                v.pop() if len(v := set(x.values())) == 1 else None
                for n, x in said[k].items()
                if n in names
            ]
            return (
                sum(
                    (min(v, 2) == better) - (min(v, 2) == worse) for v in votes if v is not None
                ),
                {v for v in votes if v is not None},
                len(votes),
            )

        def wins(k, margin=margin):
            total, _, _ = margin(k, ("rm:a", "api:b", "human:c"))
            machines, sides, n = margin(k, ("rm:a", "api:b"))
            human, _, _ = margin(k, ("human:c",))
            return (
                total > 0
                if how == "vote"
                else (human if len(sides) == 2 or not n else machines) > 0
            )

        assert any(wins(k) for k in options)
    again = convert_comparisons(
        [
            c
            | dict(
                sample_id_A=c["sample_id_B"],
                sample_id_B=c["sample_id_A"],
                winner=dict(A="B", B="A").get(c["winner"], c["winner"]),
                order=c["order"][::-1],
            )
            for c in comparisons
        ],
        samples,
        seed,
        how,
        scores=scores,
    )
    assert again == (records, counts)


@given(scores_of_labellers)
@settings(deadline=None)
def test_scores_and_verdicts_are_one_table(said):
    "A labeller who compares as its scores do is the same labeller."
    rows = as_labels(said)
    table = pair_table(labels=rows)
    spoken = [
        dict(
            prompt_id=p,
            sample_id_A=b,
            sample_id_B=a,
            labeller=n,
            winner="tie" if m == 0 else "B" if m > 0 else "A",
            order=order,
            reason="",
            type="comparison",
        )
        for n, v in table.items()
        for (p, a, b), m in v.items()
        for order in ("AB", "BA")
    ]
    verdicts = verdict_table(spoken).table
    assert {
        n: {k: (m > 0) - (m < 0) for k, m in v.items()} for n, v in table.items() if v
    } == verdicts
    pairs = [k for v in verdicts.values() for k in v]
    for how in ("vote", "human-where-they-disagree"):
        assert combine_pairs(table, pairs, how) == combine_pairs(verdicts, pairs, how)


def test_margins_are_kept():
    """From labels through a vote to pairs: the reward difference is the difference of the
    shares won.
    """
    rows = as_labels(
        {
            "rm:a": {("p", i): float(i) for i in range(3)},
            "api:b": {("p", i): 2.0 - (i == 0) for i in range(3)},
        }
    )
    samples = [
        dict(prompt_id="p", sample_id=i, prompt=[dict(role="user", content="?")], output=str(i))
        for i in range(3)
    ]
    [best] = convert_to_pairwise_feedback(
        with_scores(samples, combine_labels(rows, "vote").scores), 0, "max"
    )
    assert {best["output_A"][0]["content"], best["output_B"][0]["content"]} == {
        "2",
        "0",
    } and best["reward_difference"] == 7 / 8 - 0


def test_streamed_in_little_memory(tmp_path):
    """10,000 samples from file to file by the script that measures a million: nothing lost, and
    memory for little more than the samples.
    """
    script = __file__.replace("tests/test_feedback.py", "bench/feedback.py")
    lines = subprocess.run(
        [sys.executable, script, "--n", "10000", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout.splitlines()[1:]
    found = {r["form"]: r for r in map(json.loads, lines)}
    assert {k: v["records"] for k, v in found.items() if k != "min"} == dict(
        random=5000, max=2500, binary=10000, scalar=10000
    ) and found["min"]["records"] >= 2500
    assert all(r["peak_gib"] < 0.2 for r in found.values()) and not list(tmp_path.iterdir())


def test_samples_without_a_number_make_binary_feedback_too():
    "As the predecessor's function did for samples of one's own script."
    prompt = [dict(role="user", content="Name a star.")]
    samples = [
        dict(prompt_id="p", prompt=prompt, output=said, reward=reward)
        for said, reward in [("Vega", 1.0), ("Mars", -1.0)]
    ]
    records = convert_to_binary_feedback(samples)
    assert [r["label"] for r in records] == [1, 0]
    assert not any("sample_id" in r for r in records)
    assert feedback_counts(samples, records)["unused"] == 0
    assert feedback_counts(samples, records[:1])["unused"] == 1

"""Agreement: against published values, against the definitions written out, and on real pairs that a model, a judge and a person have labelled."""

import json
import math
import os
from collections import Counter
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from halos_nb.stats import (
    agree,
    agreement_report,
    bootstrap,
    calibrate,
    cohen_kappa,
    share_interval,
    krippendorff,
    share_over_prompts,
    spearman,
    spearman_of,
)
from halos_nb.verdicts import pair_table


# ---- published values


@pytest.mark.parametrize(
    "both_yes, first_yes, second_yes, both_no, kappa",
    [(20, 5, 10, 15, 0.4), (45, 15, 25, 15, 0.1304), (25, 35, 5, 35, 0.2593)],
)
def test_kappa_of_published_tables(both_yes, first_yes, second_yes, both_no, kappa):
    "The three tables of Wikipedia's article on Cohen's kappa."
    x = "y" * both_yes + "y" * first_yes + "n" * second_yes + "n" * both_no
    y = "y" * both_yes + "n" * first_yes + "y" * second_yes + "n" * both_no
    assert cohen_kappa(x, y) == pytest.approx(kappa, abs=5e-5)


def test_alpha_of_krippendorff_2011():
    "Computing Krippendorff's Alpha-Reliability, sections A (binary, two observers), B (nominal, two) and C (four, with missing values)."
    assert krippendorff(
        [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
    ) == pytest.approx(0.095, abs=5e-4)
    letters = [["abcde".index(c) for c in said] for said in ("aabbdcccedda", "babbbccceddd")]
    assert krippendorff(letters) == pytest.approx(0.692, abs=5e-4)


def test_spearman_of_published_and_tied_values():
    "Wikipedia's IQ against hours of television: -29/165. And ranks 1, 2.5, 2.5, 4 against 1, 2, 3.5, 3.5: 3.75 / 4.5."
    iq, hours = (
        [106, 100, 86, 101, 99, 103, 97, 113, 112, 110],
        [7, 27, 2, 50, 28, 29, 20, 12, 6, 17],
    )
    assert spearman(iq, hours) == pytest.approx(-29 / 165) and spearman(
        [1, 2, 2, 3], [1, 2, 3, 3]
    ) == pytest.approx(3.75 / 4.5)


@pytest.mark.parametrize(
    "k, n, low, high",
    [(8, 10, 0.4439, 0.9748), (5, 10, 0.1871, 0.8129), (0, 20, 0, 0.1684), (20, 20, 0.8316, 1)],
)
def test_share_interval_of_published_values(k, n, low, high):
    assert share_interval(k, n)[1:] == (
        pytest.approx(low, abs=6e-5),
        pytest.approx(high, abs=6e-5),
    )


@given(st.integers(1, 60), st.data())
def test_share_interval_by_its_definition(n, data):
    "At its ends, what was seen or more (or less) has a chance of 2.5%."
    k = data.draw(st.integers(0, n))
    _, low, high = share_interval(k, n)
    chance = lambda p, counts: sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in counts)
    if k:
        assert chance(low, range(k, n + 1)) == pytest.approx(0.025, rel=1e-6)
    if k < n:
        assert chance(high, range(k + 1)) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize("n", [1, 10, 37])
def test_share_interval_keeps_its_promise(n):
    "Whatever the true share, at least 95% of the counts have an interval that holds it."
    intervals = [share_interval(k, n) for k in range(n + 1)]
    for p in np.linspace(0.001, 0.999, 333):
        chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        held = [i.low <= p <= i.high for i in intervals]
        assert sum(c for c, holds in zip(chances, held) if holds) >= 0.95


# ---- the definitions, written out


def alpha_by_definition(columns, level):
    "Observed over expected disagreement, from the matrix of coincidences; columns: the values of each unit."
    columns = [c for c in columns if len(c) > 1]
    pairs = Counter()
    for c in columns:
        for a, b in permutations(c, 2):
            pairs[a, b] += 1 / (len(c) - 1)
    n = Counter()
    for (a, _), x in pairs.items():
        n[a] += x
    total, values = sum(n.values()), sorted(n)

    def apart(a, b):
        if level == "nominal":
            return float(a != b)
        if level == "interval":
            return float((a - b) ** 2)
        between = [v for v in values if min(a, b) <= v <= max(a, b)]
        return (sum(n[v] for v in between) - (n[a] + n[b]) / 2) ** 2

    observed = sum(x * apart(a, b) for (a, b), x in pairs.items()) / total if total else 0
    expected = (
        sum(n[a] * n[b] * apart(a, b) for a in values for b in values) / (total * (total - 1))
        if total > 1
        else 0
    )
    return 1 - observed / expected if expected > 1e-12 else math.nan


ratings = st.lists(
    st.lists(st.one_of(st.none(), st.integers(-2, 2)), min_size=3, max_size=3),
    min_size=1,
    max_size=12,
)


@given(ratings, st.sampled_from(["nominal", "ordinal", "interval"]))
@settings(deadline=None, max_examples=200)
def test_alpha_by_its_definition(rows, level):
    ours, theirs = (
        krippendorff([list(x) for x in zip(*rows)], level),
        alpha_by_definition([[v for v in r if v is not None] for r in rows], level),
    )
    assert ours == pytest.approx(theirs, abs=1e-9, nan_ok=True)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
        min_size=2,
        max_size=15,
    )
)
@settings(deadline=None, max_examples=200)
def test_weights_are_repetitions(rows):
    "An item of weight 3 is the item three times; kappa and rho as sums over items."
    x, y = ([r[i] for r in rows for _ in range(r[2])] for i in (0, 1))
    w = np.array([r[2] for r in rows], float)
    if not x:
        return
    rank = lambda v, all_: sum(u < v for u in all_) + sum(u == v for u in all_) / 2
    a, b = ([rank(v, u) - len(u) / 2 for v in u] for u in (x, y))
    below = math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
    assert spearman_of([r[0] for r in rows], [r[1] for r in rows])(w) == pytest.approx(
        sum(p * q for p, q in zip(a, b)) / below if below > 1e-9 else math.nan,
        abs=1e-9,
        nan_ok=True,
    )
    same, chance = (
        sum(p == q for p, q in zip(x, y)) / len(x),
        sum(x.count(v) * y.count(v) for v in range(4)) / len(x) ** 2,
    )
    assert cohen_kappa(x, y) == pytest.approx(
        (same - chance) / (1 - chance) if chance < 1 - 1e-9 else math.nan, abs=1e-9, nan_ok=True
    )


# ---- two labellers of pairs

margins = st.dictionaries(
    st.tuples(st.integers(0, 4), st.just(0), st.integers(1, 3)),
    st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
    min_size=1,
    max_size=15,
)


@given(margins)
@settings(deadline=None, max_examples=60)
def test_agreement_of_pairs(said):
    "By hand; and without ties kappa is 2 rate - 1, because chance is a fair coin whatever sample is called first."
    table = {n: {k: v[i] for k, v in said.items()} for i, n in enumerate(("a", "b"))}
    sign = lambda x: (x > 0) - (x < 0)
    hits = [sign(x) == sign(y) for x, y in said.values()]
    found = agree("a", "b", table, draws=20)
    assert found.items == len(said) and found.rate.value == pytest.approx(sum(hits) / len(hits))
    assert {
        (u, v): found.confusion[i][j]
        for i, u in enumerate(found.values)
        for j, v in enumerate(found.values)
        if found.confusion[i][j]
    } == Counter((sign(x), sign(y)) for x, y in said.values())
    if all(x and y for x, y in said.values()):
        assert found.kappa.value == pytest.approx(2 * found.rate.value - 1)
    both = [(sign(x), sign(y)) for x, y in said.values()]
    # both orders at half a weight: n/2 ratings, so Krippendorff's n - 1 is n/2 - 1
    n, whole = 4 * len(both), alpha_by_definition(both + [(-x, -y) for x, y in both], "ordinal")
    assert found.alpha.value == pytest.approx(
        1 - (1 - whole) * (n - 2) / (n - 1), abs=1e-9, nan_ok=True
    )
    back = agree("b", "a", table, draws=20)
    assert [back.kappa.value, back.alpha.value, back.rho.value] == pytest.approx(
        [found.kappa.value, found.alpha.value, found.rho.value], nan_ok=True
    )


def test_intervals_hold_the_truth():
    "250 studies of 60 prompts with four alike pairs each: about 95% of the intervals hold the true share, and those that take the pairs for independent do not."
    rng, inside, naive = np.random.default_rng(0), 0, 0
    for study in range(250):
        level = rng.beta(2, 1, 60)  # the prompts' own shares; 2/3 on average
        hits = (rng.random((60, 4)) < level[:, None]).ravel().tolist()
        clusters, alone = (
            share_over_prompts(hits, prompts, draws=200, seed=study)
            for prompts in ([p for p in range(60) for _ in range(4)], list(range(240)))
        )
        inside += clusters.low <= 2 / 3 <= clusters.high
        naive += alone.low <= 2 / 3 <= alone.high
    assert 0.90 * 250 <= inside <= 0.99 * 250 and naive < inside


def test_bootstrap_is_seeded():
    stat, prompts = (
        (lambda w: float(w @ np.arange(12.0) / w.sum())),
        [i // 3 for i in range(12)],
    )
    assert (
        bootstrap(stat, prompts, seed=1)
        == bootstrap(stat, prompts, seed=1)
        != bootstrap(stat, prompts, seed=2)
    )


# ---- calibration


def test_calibration_by_hand():
    "Margins log 3 and log 9 claim 3/4 and 9/10; the first comes true, the second does not."
    found = calibrate(
        {
            ("p", 0, 1): math.log(3),
            ("q", 0, 1): -math.log(9),
            ("r", 0, 1): 1.0,
            ("s", 0, 1): 1.0,
        },
        {("p", 0, 1): 1, ("q", 0, 1): 1, ("r", 0, 1): 0},
    )
    assert (found.items, found.ties) == (2, 1)
    assert found.brier.value == pytest.approx(
        (0.25**2 + 0.9**2) / 2
    ) and found.log_loss.value == pytest.approx(-(math.log(0.75) + math.log(0.1)) / 2)
    assert found.error == pytest.approx(abs((0.75 + 0.9) / 2 - 0.5))


def test_calibration_finds_the_scale():
    "Choices drawn from sigmoid(margin): slope 1, and 1/3 when the model shouts three times as loud; all intervals of the bins near their claims."
    rng = np.random.default_rng(3)
    true = {(p, 0, 1): float(m) for p, m in enumerate(rng.normal(0, 2, 4000))}
    chosen = {k: 1 if rng.random() < 1 / (1 + math.exp(-m)) else -1 for k, m in true.items()}
    honest, loud = (
        calibrate(true, chosen, draws=50),
        calibrate({k: 3 * m for k, m in true.items()}, chosen, draws=50),
    )
    assert honest.slope == pytest.approx(1, abs=0.1) and loud.slope == pytest.approx(
        honest.slope / 3
    )
    assert honest.error < 0.03 < loud.error and honest.log_loss.value < loud.log_loss.value
    assert sum(b["chosen"].low <= b["claimed"] <= b["chosen"].high for b in honest.bins) >= 8


# ---- a model, a judge and a person on the same real pairs

SHARED = Path(os.environ.get("HALOS_NB_SHARED") or Path(__file__).parents[2] / "shared")
DATA = SHARED / "data/pairs_test.json"


@pytest.mark.skipif(
    not DATA.is_file(),
    reason=(
        f"no real pairs: {DATA.parent.name}/ is not beside the repository (HALOS_NB_SHARED "
        "may name the folder that holds it)"
    ),
)
def test_three_kinds_of_labellers_on_real_pairs(tmp_path):
    """The judge's preference is the file's; the model is a small random one, whose scores the label command writes; the person is a rule (the longer answer, a tie if
    nearly as long, now and then a skip) whose keys go through a session. Counts and rates of the report are counted again here from the texts."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from halos_nb.trees import byte_tokenizer
    from halos_nb.configs import LabelConfig
    from halos_nb.label import main
    from halos_nb.people import Session, comparisons, samples_of_pairs
    from halos_nb.records import read_jsonl, read_records, write_records

    records = read_records(DATA)[:60]
    found = samples_of_pairs(records)
    tok = byte_tokenizer()
    torch.manual_seed(0)
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.2,
            pad_token_id=0,
            num_labels=2,
        )
    ).save_pretrained(tmp_path / "rm")
    tok.save_pretrained(tmp_path / "rm")
    write_records(
        tmp_path / "samples.json",
        [{k: v for k, v in s.items() if k != "reward"} for s in found.samples],
    )
    main(
        LabelConfig(
            samples_file=str(tmp_path / "samples.json"),
            output_file=str(tmp_path / "feedback.json"),
            reward_model_path=str(tmp_path / "rm"),
            max_length=256,
            feedback_type="scalar",
        )
    )
    model = read_jsonl(tmp_path / "feedback.labels.jsonl")
    person = Session(
        tmp_path / "person.jsonl", found.samples, found.pairs, "human:rule", seed=1
    )

    def taste(left, right):
        return (
            "tie"
            if abs(left - right) < 0.1 * max(left, right)
            else "left"
            if left > right
            else "right"
        )

    while item := person.current:
        view = person.show(item)
        person.choose(
            "skip"
            if int(item.name) % 20 == 0 and not item.again
            else taste(len(view["left"]), len(view["right"]))
        )
    told = comparisons(person)
    report = agreement_report(
        pair_table(told, model, found.pairs) | {"api:judge": found.margins}, draws=200
    )

    answered = [r for r in told if r["winner"] is not None]
    seen = {(r["prompt_id"], frozenset((r["sample_id_A"], r["sample_id_B"]))) for r in answered}
    rm = model[0]["labeller"]
    assert {x["labeller"]: x["items"] for x in report.labellers} == {
        "human:rule": len(seen),
        rm: 60,
        "api:judge": 60,
    }
    assert 40 < len(seen) < 60 == len(found.pairs)
    length, score = (
        {(s["prompt_id"], s["sample_id"]): v for s, v in zip(found.samples, values)}
        for values in ([len(s["output"]) for s in found.samples], [r["score"] for r in model])
    )
    sign = lambda x: (x > 0) - (x < 0)
    said = {}  # labeller -> choice of each pair, first minus second of the file
    for (p, a, b), m in found.margins.items():
        x, y = length[p, a], length[p, b]
        said[p, a, b] = {"api:judge": sign(m), rm: sign(score[p, a] - score[p, b])} | (
            {"human:rule": 0 if abs(x - y) < 0.1 * max(x, y) else sign(x - y)}
            if (p, frozenset((a, b))) in seen
            else {}
        )
    assert {(a.first, a.second) for a in report.pairs} == set(
        combinations(["human:rule", rm, "api:judge"], 2)
    )
    for a in report.pairs:
        both = [
            (v[a.first], v[a.second]) for v in said.values() if a.first in v and a.second in v
        ]
        assert (a.items, a.rate.value) == (
            len(both),
            pytest.approx(sum(x == y for x, y in both) / len(both)),
        )
        assert (
            a.rate.low <= a.rate.value <= a.rate.high
            and -1 <= a.kappa.value <= a.rate.value
            and abs(a.rho.value) <= 1
        )
    n, whole = (
        2 * sum(map(len, said.values())),
        alpha_by_definition(
            [list(v.values()) for v in said.values()]
            + [[-x for x in v.values()] for v in said.values()],
            "ordinal",
        ),
    )
    assert report.alpha.value == pytest.approx(1 - (1 - whole) * (n - 2) / (n - 1))
    assert set(report.calibrations) == {
        (a, b)
        for a in (rm, "api:judge")
        for b in said[next(iter(said))] | {"human:rule": 0}
        if a != b
    }
    json.dumps([report.rows(), report.claims()])  # plain enough for a file


def test_report_needs_nothing_of_the_model():
    "Scores of two labellers, no comparison: all pairs of each prompt."
    labels = [
        dict(
            prompt_id=p,
            sample_id=i,
            labeller=n,
            score=(s := i * (1 if n == "a" or p else -1)) and float(s),
            reason="",
            type="label",
        )
        for n in "ab"
        for p in range(3)
        for i in range(3)
    ]
    report = agreement_report(pair_table(labels=labels), draws=50)
    assert (report.pairs[0].items, report.pairs[0].rate.value) == (
        9,
        pytest.approx(6 / 9),
    ) and report.claims()[0]["items"] == 9

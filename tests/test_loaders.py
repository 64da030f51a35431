"""Loaders: against the reference's items, and what must hold for any data, process count and
cut.
"""

import copy
import math
import random
import re
from collections import Counter
from functools import lru_cache
from itertools import chain, islice, zip_longest
from statistics import fmean, pstdev

import pytest
import torch
from golden import cases, load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from halos_nb import loaders
from halos_nb.templates import byte_tokenizer
from halos_nb.trees import make_batch
from halos_nb.loaders import (
    ConditionalSFTDataLoader,
    GroupUnpairedPreferenceDataLoader,
    PairedPreferenceDataLoader,
    SFTDataLoader,
    UnpairedPreferenceDataLoader,
    add_control_tokens,
)
from halos_nb.data import Dataset, Example
from halos_nb.hub_sets import load_data

TOK = byte_tokenizer()
add_control_tokens(TOK)
MERGING = byte_tokenizer()  # merges the newline that ends a prompt with what follows
add_control_tokens(MERGING)
MERGING.add_tokens(
    [AddedToken("\nYes", normalized=False), AddedToken("\n<|good|>", normalized=False)]
)
LOADERS = [
    SFTDataLoader,
    ConditionalSFTDataLoader,
    PairedPreferenceDataLoader,
    UnpairedPreferenceDataLoader,
    GroupUnpairedPreferenceDataLoader,
]


@lru_cache
def told(name):
    return load(name)


# ---- loaders against the reference

# the reference's drop an epoch's last partial batch
FORGETS = (UnpairedPreferenceDataLoader, GroupUnpairedPreferenceDataLoader)


def is_group(case):
    return case["loader"].startswith("Group")


def is_share(case):
    return any(k.startswith("frac_unique") for k in case["options"])


def is_loaded(case):
    return "pool" in case


def pool_of(case):
    return told("dataloaders")["pools"][case["pool"]]


def refused(e, cls):
    return not e["prompt"] or cls is SFTDataLoader and e["sft_index"] < 0


def plainly(items):
    return sorted(
        repr([float(x) if isinstance(x, (int, float)) else x for x in i]) for i in items
    )


def dataset(examples):
    data = Dataset("golden")
    for i, e in enumerate(examples):
        data.data[i] = Example(**{k: copy.deepcopy(v) for k, v in e.items() if k != "key"})
    for e in data:
        e.pairs = [tuple(p) for p in e.pairs]
    return data


def golden_loader(case, *without, **more):
    """Our loader for a case, with long enough lengths for a tokenizer of bytes; n_epochs
    belongs to the trainer.
    """
    options = {
        k.replace("global_", ""): v
        for k, v in case["options"].items()
        if k not in ("n_epochs", *without)
    }
    return getattr(loaders, case["loader"])(
        dataset(pool_of(case)),
        TOK,
        **(dict(max_length=4096, max_prompt_length=2048) | options | more),
    )


def run_of(case):  # the reference's run in one process; of some cases there is none
    return next((r for r in case.get("runs") or [] if r["num_processes"] == 1), {})


def dealt(case):  # the reference's flat list, put together from its two processes
    runs = sorted(
        (r for r in case["runs"] if r["num_processes"] == 2), key=lambda r: r["process_index"]
    )
    return [
        x
        for pair in zip_longest(*(r["process_data"] for r in runs))
        for x in pair
        if x is not None
    ]


def item(loader, tree):
    "A tree in the reference's words: [example, answers ..., what is known]."
    i = loader.items[tree.index[0]]
    if isinstance(loader, SFTDataLoader):
        return [i.prompt]
    if isinstance(loader, ConditionalSFTDataLoader):
        return [i.prompt, *i.answers, "chosen" if i.facts["desirable"][0] else "rejected"]
    return (
        [i.prompt, *i.answers, i.meanings[0], tree.facts["score"][0]]
        if isinstance(loader, UnpairedPreferenceDataLoader)
        else [i.prompt, *i.answers]
    )


def words(tree, meaning):
    "The texts of the turns of the completion with this meaning, decoded from its ids."
    text = TOK.decode(tree.branches[tree.meanings.index(meaning)])
    assert text.endswith("<|im_end|>"), "what stands behind the end of a turn is no target"
    return re.split(
        r"<\|im_end\|>\n<\|im_start\|>(?:user|assistant|system)\n",
        text.removesuffix("<|im_end|>"),
    )


def said(loader, tree):
    "A tree as the reference's batch element, texts decoded from our ids."
    i = loader.items[tree.index[0]]
    e = loader.examples[i.prompt]
    if isinstance(loader, PairedPreferenceDataLoader):
        return dict(
            prompt_id=e.prompt_id,
            chosen=words(tree, "chosen"),
            rejected=words(tree, "rejected"),
        )
    out = dict(prompt_id=e.prompt_id, target=words(tree, i.meanings[0]))
    if isinstance(loader, SFTDataLoader):
        return out | dict(dataset_name=e.dataset_name)
    return out | dict(zip(("status", "score"), item(loader, tree)[2:]))


def without_piles(element, tokens):
    """The reference's element with a control token that has piled up written once, and without
    its mismatched completion.
    """
    element = {k: v for k, v in element.items() if k != "KL"}
    for token in tokens:
        if "target" in element:
            element["target"] = [
                re.sub(f"^({re.escape(token)})+", lambda m: m[1], t) for t in element["target"]
            ]
    return element


def units(e, cls):
    """What `max_prompt_count` counts, in the README's words; nothing of a prompt that is
    refused.
    """
    if refused(e, cls):
        return []
    if cls is SFTDataLoader:
        return [[()]]
    if cls is PairedPreferenceDataLoader:
        return [[tuple(p)] for p in e["pairs"]]
    paired = set(chain(*e["pairs"]))
    return [[(i, "chosen"), (j, "rejected")] for i, j in e["pairs"]] + [
        [(k, "chosen" if d else "rejected")]
        for k, d in enumerate(e["desirable"])
        if d is not None and k not in paired
    ]


def orders(case, cls):
    "Each epoch's items in order, from the README's words alone."
    rng = random.Random(case["options"]["seed"])
    most = case["options"].get("max_prompt_count")
    while True:
        flat = []
        for n, e in enumerate(pool_of(case)):
            us = units(e, cls)
            flat += [
                [n, *i]
                for unit in (
                    us
                    if most is None or cls is SFTDataLoader
                    else rng.sample(us, min(most, len(us)))
                )
                for i in unit
            ]
        rng.shuffle(flat)
        yield flat


def has_items(case):
    return is_group(case) or any(
        units(e, getattr(loaders, case["loader"])) for e in pool_of(case)
    )


def epochs_of(loader, n):
    "The planned steps of n epochs."
    for e in range(n):
        loader.set_epoch(e)
        yield list(loader.plan())


@cases("dataloaders", lambda c: not is_loaded(c))
def test_cases_that_the_reference_cannot_load(case):
    """A data set that is not there is an error that says so; a conditional loader without
    tokens has default ones, where the reference knows none.
    """
    pool = "+".join(case["datasets"]) + "|" + case["split"]
    if pool not in told("dataloaders")["pools"]:
        with pytest.raises(ValueError, match=case["datasets"][0]):
            load_data(case["datasets"], case["split"])
        return
    assert case["loader"] == "ConditionalSFTDataLoader"
    assert "control_tokens" not in case["options"]
    loader = golden_loader(case | dict(pool=pool))
    assert loader.trees
    assert all(
        words(t, "completion")[-1].startswith(("<|good|>", "<|bad|>")) for t in loader.trees
    )


@cases("dataloaders", lambda c: is_loaded(c) and not has_items(c))
def test_nothing_to_train_on_is_an_error(case):
    "Where the reference fails with another error, or is silent and yields nothing."
    with pytest.raises(
        ValueError, match="no trainable example.*(no_pair|unlabelled|no_sft_target)"
    ):
        golden_loader(case)


@cases(
    "dataloaders",
    lambda c: is_loaded(c) and not is_group(c) and not is_share(c) and has_items(c),
)
def test_items_in_the_reference_order(case):
    """One process, steps of the reference's microbatch: the same items, the same texts, in its
    order, in every epoch.
    Normalised: piled-up control tokens; its forgotten last batches; later epochs under
    max_prompt_count, which it draws from what the first left. Where a prompt is refused (it
    names no SFT target, or is empty), the order cannot be the reference's; then the items are.
    """
    cls = getattr(loaders, case["loader"])
    o = case["options"]
    pool = pool_of(case)
    run = run_of(case)
    micro = o["microbatch_size"]
    golden = [
        without_piles(x, o.get("control_tokens", {}).values())
        for b in run.get("batches", [])
        for x in b
    ]
    first = run.get("process_data") or dealt(case)
    skip = o.get("num_skip", 0)
    total = o["n_epochs"] or 1 + len(golden)
    loader = golden_loader(case, "n_examples", batch_size=micro)
    ours = []
    for steps, flat in zip(epochs_of(loader, total), orders(case, cls)):
        assert [item(loader, t)[: len(flat[0])] for t in chain(*steps)] == flat[skip:], (
            "every item once, in the order of the drawing"
        )
        assert [len(s) for s in steps[:-1]] == [micro] * (len(steps) - 1)
        ours.append(
            [said(loader, t) for s in steps for t in s if cls not in FORGETS or len(s) == micro]
        )
        skip = max(0, skip - len(flat))
    if any(refused(e, cls) for e in pool):
        everything = chain(*next(epochs_of(golden_loader(case, "n_examples", "num_skip"), 1)))
        assert (
            plainly(item(loader, t) for t in everything)
            == plainly(x for x in first if not refused(pool[x[0]], cls))
            != []
        )
        return
    assert [item(loader, t) for t in chain(*next(epochs_of(loader, 1)))] == first[
        o.get("num_skip", 0) :
    ]
    assert golden or run.get("error"), "its one process gave nothing"
    compared = golden[: len(ours[0])] if "max_prompt_count" in o else golden
    assert compared == list(chain(*ours))[: len(compared)]
    if "max_prompt_count" not in o and not o.get("n_examples") and golden:
        assert len(golden) == len(list(chain(*ours)))


@cases(
    "dataloaders",
    lambda c: is_loaded(c) and not is_group(c) and not is_share(c) and has_items(c),
)
def test_steps_of_two_processes(case):
    """Two processes of ours share the steps that one process takes; they are the reference's
    global batches, whose items it deals alternately, and more where it cuts the end off.
    """
    size = case["options"]["global_batch_size"]
    cls = getattr(loaders, case["loader"])
    pool = pool_of(case)
    two = [golden_loader(case, "n_examples", "num_skip", rank=r, world=2) for r in range(2)]
    shared = [
        [
            item(two[r], t)
            for r, s in enumerate(pair)
            if not s.idle
            for b in s.batches
            for t in b.trees
        ]
        for pair in zip(*two, strict=True)
    ]
    assert [plainly(s) for s in shared] == [
        plainly(item(two[0], t) for t in step)
        for step in golden_loader(case, "n_examples", "num_skip").plan()
    ]
    theirs = dealt(case)
    told = "every process has its steps, also where the reference waits for ever or stops"
    assert len(theirs) % size == 0, told
    assert all(next(iter(loader)).batches for loader in two), told
    if any(refused(e, cls) for e in pool):
        assert {*plainly(x for x in theirs if not refused(pool[x[0]], cls))} <= {
            *plainly(chain(*shared))
        }
    else:
        assert [plainly(s) for s in shared[: len(theirs) // size]] == [
            plainly(theirs[k : k + size]) for k in range(0, len(theirs), size)
        ]


@cases("dataloaders", is_share)
def test_shares_are_random_parts_of_each_class(case):
    """Deliberate: the reference takes the first so many of all. Ours are parts of each class,
    drawn from the seed, of the items the reference knows; order and steps are tested with
    any data below.
    """
    whole = golden_loader(case, "frac_unique_desirable", "frac_unique_undesirable")
    part = golden_loader(case)
    parts = [golden_loader(case, seed=s) for s in range(20)]
    for status, name in (
        ("chosen", "frac_unique_desirable"),
        ("rejected", "frac_unique_undesirable"),
    ):
        unique = {
            (n, k)
            for n, e in enumerate(pool_of(case))
            for u in units(e, UnpairedPreferenceDataLoader)
            for k, s in u
            if s == status
        }
        want = round(case["options"].get(name, 1) * len(unique))
        assert {len(p.used[status]) for p in [part, *parts]} == {want}
        assert part.counts[f"{status}_left_out"] == len(unique) - want
        assert part.used[status] <= unique
        if 0 < want < len(unique):
            assert len({frozenset(p.used[status]) for p in parts}) > 1, (
                "another seed, another share"
            )
    if is_group(case):
        kept, known = (
            [(i.prompt, k) for i in x.items for k in i.answers] for x in (part, whole)
        )
    else:
        kept, known = (
            [(i.prompt, *i.answers, *i.meanings) for i in x.items] for x in (part, whole)
        )
    assert kept
    assert set(kept) <= set(known)
    assert (len(kept) < len(known)) == any(
        part.counts[f"{s}_left_out"] for s in ("chosen", "rejected")
    )
    if is_group(case):  # advantages are from all scored samples nevertheless
        facts = {
            (i.prompt, k): a
            for i in whole.items
            for k, a in zip(i.answers, i.facts["advantage"])
        }
        assert all(
            facts[i.prompt, k] == a
            for i in part.items
            for k, a in zip(i.answers, i.facts["advantage"])
        )


@cases(
    "dataloaders",
    lambda c: c["loader"].startswith("Unpaired") and not is_share(c) and has_items(c),
)
def test_mismatched_completions(case):
    """The reference's own wherever its next item has another prompt; otherwise what the rule
    says, worked out here item by item.
    """
    micro = case["options"]["microbatch_size"]
    pool = pool_of(case)
    skip = case["options"].get("num_skip", 0)
    loader = golden_loader(case, "n_examples", batch_size=micro, mismatched=True)
    flat = next(orders(case, UnpairedPreferenceDataLoader))
    ours = [t for s in next(epochs_of(loader, 1)) for t in s]
    size = len(flat)

    def prompt(at):
        return pool[flat[at][0]]["prompt_id"]

    for n, tree in enumerate(ours):
        at = skip + n
        start = skip + n - n % micro
        stop = min(start + micro, size)
        candidates = [
            *range(at + 1, stop),
            *range(start, at),
            *range(stop, size),
            *range(start),
        ]
        other = next((j for j in candidates if prompt(j) != prompt(at)), candidates[0])
        assert words(tree, "KL") == [
            t["content"] for t in pool[flat[other][0]]["generations"][flat[other][1]]
        ]
        assert math.isnan(tree.facts["score"][tree.meanings.index("KL")])
        assert not math.isnan(tree.facts["score"][0])
    batches = run_of(case).get("batches", [])[: len(ours) // micro]  # of the first epoch
    compared = 0
    for b, batch in enumerate(batches):
        for n, x in enumerate(batch):
            if x["prompt_id"] == batch[(n + 1) % len(batch)]["prompt_id"]:
                continue
            assert words(ours[b * micro + n], "KL") == x["KL"]
            compared += 1
    assert (
        compared
        or not batches
        or all(len({x["prompt_id"] for x in batch}) == 1 for batch in batches)
    )
    assert loader.counts["mismatch_same_prompt"] == (
        size if len({e["prompt_id"] for e in pool}) == 1 else 0
    )


def samples_of(case):
    """prompt_id -> {(example, answer): score} of the scored samples, +1 and -1 by status where
    a prompt has no scores.
    """
    pool = pool_of(case)
    out = {}
    for n, e in enumerate(pool):
        for k in range(len(e["generations"])):
            out.setdefault(e["prompt_id"], {})[n, k] = (
                e["scores"][k] if k < len(e["scores"]) else None
            )
    signs = {}
    for n, e in enumerate(pool):
        for k, s in chain(*units(e, UnpairedPreferenceDataLoader)):
            signs.setdefault((n, k), []).append(1 if s == "chosen" else -1)
    for samples in out.values():
        if all(s is None for s in samples.values()):
            samples.update({x: fmean(signs[x]) for x in samples if x in signs})
    return {
        p: known
        for p, samples in out.items()
        if (known := {x: s for x, s in samples.items() if s is not None})
    }


@cases("dataloaders", lambda c: is_group(c) and not is_share(c))
def test_groups_in_the_reference_order(case):
    """The reference's prompts in its order (as far as it does not cut the last off), each with
    every sample it has there and, deliberately, all other scored ones;
    once each, never split, with advantages from all of them. Scalar feedback, which it refuses,
    works.
    """
    pool = pool_of(case)
    o = case["options"]
    known = samples_of(case)
    loader = golden_loader(case, "n_examples", "num_skip", batch_size=1)
    trees = [t for s in next(epochs_of(loader, 1)) for t in s]
    seen = {}
    theirs = run_of(case).get("process_data") or (dealt(case) if case.get("runs") else [])
    for n, k, _, score in theirs:
        seen.setdefault(pool[n]["prompt_id"], {}).setdefault((n, k), []).append(score)
    prompts = [loader.examples[loader.items[t.index[0]].prompt].prompt_id for t in trees]
    assert sorted(prompts) == sorted(known)
    assert prompts[: len(seen)] == list(seen)
    if theirs:
        assert len(case["flat_data"]) - len(theirs) < max(
            o["microbatch_size"], o["global_batch_size"]
        )
    for p, tree in zip(prompts, trees):
        mine = [words(tree.pick([n]), "sample") for n in range(len(tree.branches))]
        everything = [
            (n, k)
            for n, e in enumerate(pool)
            if e["prompt_id"] == p
            for k in range(len(e["generations"]))
        ]
        keys = iter(everything)
        # in the data's order
        found = [
            next(
                x
                for x in keys
                if [t["content"] for t in pool[x[0]]["generations"][x[1]]] == text
            )
            for text in mine
        ]
        if "max_prompt_count" in o:
            assert (
                set(found) == set(seen[p]) or p == list(seen)[-1] and set(found) >= set(seen[p])
            )
        else:
            assert set(found) == set(known[p]) >= set(seen.get(p, []))
        assert tree.facts["score"] == pytest.approx([known[p][x] for x in found])
        mean = fmean(known[p].values())
        std = pstdev(known[p].values())
        assert tree.facts["advantage"] == pytest.approx(
            [(known[p][x] - mean) / (std + 0.01) for x in found], rel=1e-6, abs=1e-9
        )
        for x, scores in seen.get(p, {}).items():
            assert len(set(scores)) > 1 or scores[0] == pytest.approx(known[p][x])
    for step in (1, o["global_batch_size"]):
        two = [
            golden_loader(case, "n_examples", "num_skip", rank=r, world=2, batch_size=step)
            for r in range(2)
        ]
        shared = [
            [t.index[0] for s in pair if not s.idle for b in s.batches for t in b.trees]
            for pair in zip(*two, strict=True)
        ]
        assert [sorted(s) for s in shared] == [
            sorted(t.index[0] for t in trees[k : k + step]) for k in range(0, len(trees), step)
        ]
    # what a process of the reference holds is among what we hold
    for r in case.get("runs") or []:
        for n, k, *_ in r.get("process_data", []):
            assert (n, k) in known[pool[n]["prompt_id"]]
    if (
        "max_prompt_count" in o
        or o.get("num_skip")
        or o.get("n_examples")
        or not run_of(case).get("batches")
    ):
        return
    golden = [x["prompt_id"] for b in run_of(case)["batches"] for x in b]
    whole = len(run_of(case)["process_data"])
    assert len(golden) == whole * o["n_epochs"]
    for e, steps in enumerate(epochs_of(loader, o["n_epochs"])):
        ids = list(dict.fromkeys(golden[e * whole : (e + 1) * whole]))
        assert [
            loader.examples[loader.items[t.index[0]].prompt].prompt_id for s in steps for t in s
        ][: len(ids)] == ids


@cases("dataloaders", lambda c: is_loaded(c) and has_items(c))
def test_number_of_steps(case):
    """As many steps as are announced, by `len`, by `num_training_steps` and by counting.
    The reference's number, which counts full steps only and answers in pairs only, wherever
    there are no others.
    """
    o = case["options"]
    loader = golden_loader(case)
    cls = getattr(loaders, case["loader"])
    epochs = o["n_epochs"]
    limit = o.get("n_examples")
    skip = o.get("num_skip", 0)
    size = o["global_batch_size"]
    before = 0
    steps = 0
    n = 0
    for e in range(1000 if epochs is None else epochs):
        loader.set_epoch(e)
        n = len(loader.this_epoch()[0])
        this = list(loader)
        want = max(0, min(before + n, math.inf if limit is None else limit) - max(before, skip))
        assert sum(s.examples for s in this) == want
        assert len(this) == len(loader) == math.ceil(want / size)
        before = before + n
        steps = steps + len(this)
        if limit is not None and before >= limit:
            break
    assert loader.num_training_steps(epochs) == steps
    if (
        is_group(case)
        or is_share(case)
        or skip
        or any(
            refused(e, cls) or cls is not SFTDataLoader and not e["pairs"]
            for e in pool_of(case)
        )
    ):
        return
    if n % size == 0 if limit is None else limit % size == 0 and limit <= n:
        assert steps == case["num_training_steps"]
    else:
        assert steps > case["num_training_steps"] or limit is not None


# ---- any data

answers = st.sampled_from(
    ["Yes.", "No, never.", "It depends on the weather.", "é" * 9, " ", "", "Forty-two"]
)


@st.composite
def examples(draw):
    "Prompts with answers, some empty, and whatever is known about them."
    data = Dataset("drawn")
    for p in range(draw(st.integers(1, 6))):
        texts = draw(st.lists(answers, min_size=2, max_size=5))
        n = len(texts)
        name = draw(st.sampled_from([f"id {p}", "shared"]))  # the same id is the same prompt
        prompt = [dict(role="system", content="Be kind.")] * (name == "shared") + [
            dict(
                role="user",
                content=name if name == "shared" else "x" * draw(st.integers(0, 40)),
            )
        ]
        pair = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(
            lambda x: x[0] != x[1]
        )
        data.data[p] = Example(
            prompt,
            name,
            [[dict(role="assistant", content=t)] for t in texts],
            draw(st.integers(-1, n - 1)),
            draw(
                st.lists(st.none() | st.integers(-3, 3).map(float), min_size=n, max_size=n)
                | st.just([])
            ),
            draw(st.lists(pair, max_size=3)),
            draw(st.lists(st.none() | st.booleans(), min_size=n, max_size=n) | st.just([])),
        )
    return data


cuts = st.fixed_dictionaries(
    dict(
        world=st.integers(1, 4),
        token_budget=st.sampled_from([1, 60, 150, 4096]),
        microbatch_size=st.sampled_from([None, 1, 2, 3]),
        layout=st.sampled_from(["tree", "plain"]),
    )
)
common = st.fixed_dictionaries(
    dict(
        batch_size=st.integers(1, 5),
        seed=st.integers(0, 99),
        shuffle=st.booleans(),
        max_length=st.sampled_from([64, 200]),
        drop=st.sampled_from(["oldest", "newest"]),
        max_prompt_count=st.sampled_from([None, 1, 2]),
        n_examples=st.sampled_from([None, 3, 7]),
        num_skip=st.sampled_from([0, 2]),
    )
)
many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def made(cls, data, options, tok=TOK):
    "The loader, or None where nothing in the data can be trained on, which it must say."
    try:
        return cls(data, tok, **options)
    except ValueError as e:
        assert "no trainable example" in str(e)
        return None


def contents(trees):  # NaN is not equal to itself, its text is
    return sorted(
        repr((t.prompt_ids, t.branches, t.meanings, t.skip, t.index, t.facts)) for t in trees
    )


@many
@given(st.sampled_from(LOADERS), examples(), common, cuts, st.booleans(), st.integers(0, 2))
def test_steps_do_not_depend_on_processes_budget_or_layout(
    cls, data, options, how, mismatched, epoch
):
    before = copy.deepcopy(data.data)
    if cls is UnpairedPreferenceDataLoader:
        options = options | dict(mismatched=mismatched)
    whole = made(cls, data, options | dict(token_budget=10**9))
    if whole is None:
        return
    ranks = [made(cls, data, options | how | dict(rank=r)) for r in range(how["world"])]
    for loader in [whole, *ranks]:
        loader.set_epoch(epoch)
    planned = [list(trees) for trees in whole.plan()]
    for trees, shares in zip(planned, zip(*ranks, strict=True), strict=True):
        assert contents(trees) == contents(
            t for s in shares if not s.idle for b in s.batches for t in b.trees
        )
        assert {(s.examples, s.targets) for s in shares} == {
            (len(trees), sum(t.targets for t in trees))
        }
        for s in shares:
            assert s.branches == Counter(m for t in trees for m in t.meanings)
            for b in s.batches:
                assert len(b.trees) <= (how["microbatch_size"] or math.inf)
                assert (
                    sum(t.cost(how["layout"]) for t in b.trees) <= how["token_budget"]
                    or len(b.trees) == 1
                )
    assert data.data == before, "nothing of the data set is edited"


@many
@given(st.sampled_from(LOADERS), examples(), common)
def test_every_example_once_per_epoch(cls, data, options):
    loader = made(cls, data, options)
    if loader is None:
        return
    sizes = [len(trees) for trees, _ in islice(loader.epochs(), 4)]
    for epoch, (trees, _) in enumerate(islice(loader.epochs(), 4)):
        seen = Counter(t.index[0] for t in trees)
        assert set(seen.values()) == {1}
        if options["max_prompt_count"] is None:
            assert set(seen) == set(range(len(loader.items)))
        elif cls is not GroupUnpairedPreferenceDataLoader:
            for us in loader.units:
                taken = [u for u in us if any(i in seen for i in u)]
                assert len(taken) == min(len(us), options["max_prompt_count"])
                assert all(i in seen for u in taken for i in u)
        loader.set_epoch(epoch)
        steps = list(loader)
        assert len(steps) == len(loader)
        assert all(s.examples == options["batch_size"] for s in steps[:-1])
        here = sum(s.examples for s in steps)
        last = options["n_examples"] if options["n_examples"] is not None else math.inf
        assert here == max(
            0, min(sum(sizes[: epoch + 1]), last) - max(sum(sizes[:epoch]), options["num_skip"])
        )
    assert loader.num_training_steps(4) == sum(map(len, epochs_of(loader, 4)))


@many
@given(examples(), common, st.integers(1, 3), st.booleans())
def test_groups_are_whole(data, options, world, trimmed):
    options = (
        options
        | dict(num_skip=0, n_examples=None)
        | ({} if trimmed else dict(max_prompt_count=None))
    )
    ranks = [
        made(GroupUnpairedPreferenceDataLoader, data, options | dict(rank=r, world=world))
        for r in range(world)
    ]
    if ranks[0] is None:
        return
    trees = [
        t for loader in ranks for s in loader if not s.idle for b in s.batches for t in b.trees
    ]
    where = [ranks[0].items[t.index[0]].prompt for t in trees]
    assert len(where) == len(set(where)), "a prompt is in one step of one process"
    for p, t in zip(where, trees):
        e = ranks[0].examples[p]
        known = [k for k in range(len(e.generations)) if e.known(k)[0] is not None]
        if not known:
            continue  # then scores are from status, see the golden cases
        filled = [k for k in known if e.generations[k][0]["content"].strip()]
        assert (
            len(t.branches) == len(filled)
            if options["max_prompt_count"] is None
            else 1 <= len(t.branches) <= len(filled)
        )
        scores = [e.scores[k] for k in known]
        want = {(s - fmean(scores)) / (pstdev(scores) + 0.01) for s in scores}
        assert all(min(abs(a - w) for w in want) < 1e-9 for a in t.facts["advantage"]), (
            "from all scored samples, the empty ones too"
        )


@many
@given(st.sampled_from(LOADERS), examples(), common, st.booleans())
def test_both_layouts_predict_the_same(cls, data, options, merging):
    """Also where the tokenizer merges the end of the prompt with the beginning of an answer,
    which is then seen but not predicted.
    """
    loader = made(cls, data, options, MERGING if merging else TOK)
    if loader is None:
        return
    if not merging:
        assert loader.counts["prefix_mismatch"] == 0
    tree, plain = (make_batch(loader.trees, layout, 7) for layout in ("tree", "plain"))
    for b in (tree, plain):
        flat = b.input_ids.flatten()
        pos = b.position_ids.flatten()
        k = 0
        for t in loader.trees:
            for ids, skip in zip(t.branches, t.skip):
                mine = b.branch == k
                whole = t.prompt_ids + ids
                assert b.target[mine].tolist() == ids[skip:]
                assert b.column[mine].tolist() == list(range(len(ids) - skip))
                assert (
                    flat[b.predict[mine]].tolist() == whole[len(t.prompt_ids) + skip - 1 : -1]
                )
                assert flat[b.last[k]] == whole[-1]
                assert pos[b.predict[mine]].tolist() == list(
                    range(len(t.prompt_ids) + skip - 1, len(whole) - 1)
                )
                k += 1
        assert b.mask.sum() == len(b.target)
        assert torch.equal(
            b.mask.sum(1),
            torch.tensor(
                [len(i) - s for t in loader.trees for i, s in zip(t.branches, t.skip)]
            ),
        )
        for name in loader.trees[0].facts:
            assert len(b.fact(name)) == k == len(b.tree_of)
        for m in set(b.meanings):
            part = b.only(m)
            assert part.layout == b.layout
            assert set(part.meanings) == {m}
            assert len(part.last) == len(b.rows_of(m))
            assert torch.equal(part.target, b.target[torch.isin(b.branch, b.rows_of(m))])
    assert torch.equal(tree.table(tree.target), plain.table(plain.target))
    assert torch.equal(tree.tree_of, plain.tree_of)


@many
@given(examples(), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_shares_of_good_and_bad(data, good, bad, seed):
    whole, part = (
        made(UnpairedPreferenceDataLoader, data, dict(seed=seed) | more)
        for more in ({}, dict(frac_unique_desirable=good, frac_unique_undesirable=bad))
    )
    if part is None:
        return
    again = made(
        UnpairedPreferenceDataLoader,
        data,
        dict(
            seed=seed, frac_unique_desirable=good, frac_unique_undesirable=bad, rank=1, world=2
        ),
    )
    assert part.items == again.items, "drawn from the seed alone"
    for status, share in (("chosen", good), ("rejected", bad)):
        unique = {
            (p, k)
            for p, e in enumerate(part.examples)
            for u in loaders.status_units(e)
            for k, s in u
            if s == status
        }
        assert len(unique) - part.counts[f"{status}_left_out"] == round(share * len(unique))
        if whole is None or whole.counts["equal_pairs"]:
            continue  # both sides of such a pair go, unless the share has left one out
        kept = {(i.prompt, *i.answers) for i in part.items if i.meanings == [status]}
        assert len(kept) <= round(share * len(unique))
        assert [i for i in part.items if i.meanings == [status]] == [
            i for i in whole.items if i.meanings == [status] and (i.prompt, *i.answers) in kept
        ], "all places of an answer stay or go together"


@many
@given(examples(), common)
def test_nothing_goes_uncounted(data, options):
    "Every answer, or pair, is trained on, or in a count."
    options = options | dict(max_prompt_count=None)
    if paired := made(PairedPreferenceDataLoader, data, options):
        passed_over = paired.counts["empty_completions"] + paired.counts["equal_pairs"]
        assert len(paired.items) + passed_over == sum(len(e.pairs) for e in data)
    if sft := made(SFTDataLoader, data, options):
        assert len(sft.items) + sft.counts["empty_completions"] + sft.counts[
            "no_sft_target"
        ] == len(data)
    if group := made(GroupUnpairedPreferenceDataLoader, data, options):
        assert sum(len(i.answers) for i in group.items) + group.counts[
            "empty_completions"
        ] + group.counts["unscored"] == sum(len(e.generations) for e in data)
    for cls in (UnpairedPreferenceDataLoader, ConditionalSFTDataLoader):
        if not (loader := made(cls, data, options)):
            continue
        labelled = sum(len({k for u in loaders.status_units(e) for k, _ in u}) for e in data)
        assert loader.counts["unlabelled"] + labelled == sum(len(e.generations) for e in data)
        passed_over = loader.counts["empty_completions"] + 2 * loader.counts["equal_pairs"]
        assert len(loader.items) + passed_over == sum(
            len(u) for e in data for u in loaders.status_units(e)
        )


@many
@given(examples(), st.integers(0, 9), st.integers(1, 4))
def test_mismatched_answers_answer_another_prompt(data, seed, batch_size):
    loader = made(
        UnpairedPreferenceDataLoader,
        data,
        dict(seed=seed, batch_size=batch_size, mismatched=True),
    )
    if loader is None:
        return
    ids = {loader.examples[i.prompt].prompt_id for i in loader.items}
    texts = {}
    for i in loader.items:
        texts.setdefault(loader.examples[i.prompt].prompt_id, set()).add(
            loader.outputs(i)[0][0]["content"]
        )
    for t in chain(*loader.plan()):
        own = loader.examples[loader.items[t.index[0]].prompt].prompt_id
        (kl,) = words(t, "KL")
        assert any(kl in texts[p] for p in (ids - {own} or ids))
    assert loader.counts["mismatch_same_prompt"] == (len(loader.items) if len(ids) == 1 else 0)


@many
@given(st.sampled_from(LOADERS), examples(), common, st.booleans(), st.integers(1, 3))
def test_kept_trees_are_the_planned_ones(cls, data, options, mismatched, epochs):
    """What is written on a kept tree is there in every epoch that uses it; the plan is the same
    as without.
    """
    if cls is UnpairedPreferenceDataLoader:
        options = options | dict(mismatched=mismatched)
    loader = made(cls, data, options)
    other = made(cls, data, options)
    if loader is None:
        return
    kept = loader.keep(epochs)
    assert loader.epoch == 0
    assert len({id(t) for t in kept}) == len(kept)
    for mine, theirs in zip(
        epochs_of(loader, epochs + 1), epochs_of(other, epochs + 1), strict=True
    ):
        assert [contents(s) for s in mine] == [contents(s) for s in theirs]
    for t in kept:
        t.reference = [[float(-x) for x in b[s:]] for b, s in zip(t.branches, t.skip)]
    for e in range(epochs):
        loader.set_epoch(e)
        for b in (b for s in loader for b in s.batches):
            assert torch.equal(b.reference, -b.table(b.target.float()))


def test_a_run_that_goes_on_takes_the_same_steps():
    data = Dataset("pairs")
    for i in range(11):
        data.data[i] = Example(
            [dict(role="user", content=f"Q{i}")],
            str(i),
            [[dict(role="assistant", content=x)] for x in ("yes", "no")],
            pairs=[(0, 1)],
        )

    def steps(epoch, **more):
        loader = PairedPreferenceDataLoader(data, TOK, batch_size=4, seed=3, **more)
        loader.set_epoch(epoch)
        return [[t.index[0] for t in s] for s in loader.plan()]

    whole = steps(0) + steps(1)
    assert [len(s) for s in whole] == [4, 4, 3, 4, 4, 3]
    for done in range(6):
        skip = sum(len(s) for s in whole[:done])
        assert steps(0, num_skip=skip) + steps(1, num_skip=skip) == whole[done:]
        assert steps(0, n_examples=skip) + steps(1, n_examples=skip) == whole[:done]


def test_margins():
    data = Dataset("scored")
    for i, scores in enumerate(([2.0, -1.0], [None, 1.0], [])):
        data.data[i] = Example(
            [dict(role="user", content=f"Q{i}")],
            str(i),
            [[dict(role="assistant", content=x)] for x in ("yes", "no")],
            scores=scores,
            pairs=[(0, 1)],
        )
    margins = [t.facts["margin"] for t in PairedPreferenceDataLoader(data, TOK).trees]
    assert margins[0] == [3.0, 3.0]
    assert all(math.isnan(m) for m in chain(*margins[1:]))
    del data.data[0]
    with pytest.raises(ValueError, match="fact 'margin'"):
        next(iter(PairedPreferenceDataLoader(data, TOK))).batches[0].fact("margin")


def test_options_that_make_no_sense():
    data = dataset(
        [
            dict(
                prompt=[dict(role="user", content="Q")],
                prompt_id="q",
                generations=[[dict(role="assistant", content="A")]] * 2,
                pairs=[(0, 1)],
            )
        ]
    )
    for cls, options, said in (
        (PairedPreferenceDataLoader, dict(max_prompt_count=0), "max_prompt_count: 0"),
        (
            PairedPreferenceDataLoader,
            dict(drop="middle", max_prompt_length=5),
            "drop: 'middle'",
        ),
        (
            UnpairedPreferenceDataLoader,
            dict(frac_unique_undesirable=-0.1),
            "frac_unique_undesirable: -0.1",
        ),
        (SFTDataLoader, {}, "1 no_sft_target"),
    ):
        with pytest.raises(ValueError, match=said):
            cls(data, TOK, **options)

"""Labelling by hand: nothing pressed is lost, nothing is shown that should not be seen, and the
feedback is what was pressed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings, strategies as st

from halos_nb.stats import compare_labellers, share_over_prompts
from halos_nb.configs import TrainConfig
from halos_nb.verdicts import pair_of, pair_table
from halos_nb.people import (
    CHOICES,
    Session,
    choose_pairs,
    comparisons,
    labels,
    make_items,
    most_disputed,
    most_uncertain,
    replay,
    session_report,
    samples_of_pairs,
    self_agreement,
    session_feedback,
)
from halos_nb.records import (
    RecordError,
    as_turns,
    check_record,
    prompt_id,
    read_jsonl,
    read_records,
    write_records,
)


def make_samples(prompts=6, each=3):
    rows = []
    for p in range(prompts):
        ask = as_turns(f"Question {p}?", "user")
        rows += [
            dict(
                prompt_id=prompt_id(ask),
                sample_id=i,
                prompt=ask,
                output=f"Answer {chr(97 + i)} to question {p}.",
                generator="secret-model",
                reward=0.125 + i,
                type="sample",
            )
            for i in range(each)
        ]
    return rows


# ---- which pairs, and in which order


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(0, 100), st.integers(0, 30))
@settings(deadline=None)
def test_pairs_take_turns(owners, seed, n):
    samples = [
        dict(prompt_id=p, sample_id=i, prompt=[], output="same" if i % 4 == 0 else str(i))
        for i, p in enumerate(owners)
    ]
    all_ = {
        pair_of(a["prompt_id"], a["sample_id"], b["sample_id"])[0]
        for a, b in combinations(samples, 2)
        if a["prompt_id"] == b["prompt_id"] and a["output"] != b["output"]
    }
    assert sorted(choose_pairs(samples, seed=seed)) == sorted(all_)
    some, room = choose_pairs(samples, n, seed), Counter(p for p, _, _ in all_)
    assert len(set(some)) == min(n, len(all_)) and some == choose_pairs(samples, n, seed)
    taken = Counter(p for p, _, _ in some)
    for p in room:
        assert taken[p] == room[p] or taken[p] >= max(taken.values(), default=0) - 1, (
            "nobody gets a second turn before all had a first"
        )


@given(st.integers(0, 60), st.integers(0, 1000), st.floats(0, 1))
@settings(deadline=None)
def test_items(n, seed, repeats):
    pairs = [(f"p{k % 7}", k, k + 100) for k in range(n)]
    items = make_items(pairs, seed, repeats, apart=10)
    assert [i.name for i in items] == [f"{k:04d}" for k in range(1, len(items) + 1)]
    places = {}
    for k, i in enumerate(items):
        places.setdefault(i[1:4], []).append((k, i))
    assert places.keys() == set(pairs)
    for looks in places.values():
        assert [i.again for _, i in looks] == [False, True][: len(looks)]
        if len(looks) == 2:
            (k, a), (m, b) = looks
            assert {a.left, b.left} == {"A", "B"} and m - k > min(10, n // 2 - 1)
    assert len(items) - n == min(round(repeats * n), max(n - 10, (n + 1) // 2) if n else 0)


def test_sides_are_a_fair_coin():
    items = make_items([("p", k, k + 1) for k in range(4000)], seed=5)
    first = [i for i in items if not i.again]
    assert abs(sum(i.left == "A" for i in first) - 2000) < 160  # 5 standard deviations
    assert [i.sample_id_A for i in first] != sorted(i.sample_id_A for i in first)


def test_where_a_person_is_worth_most():
    table = dict(
        rm={("p", 0, 1): 4.0, ("p", 0, 2): -0.5, ("q", 0, 1): 2.0, ("q", 0, 2): 0.0},
        judge={("p", 0, 1): -1.0, ("p", 0, 2): 1.0, ("q", 0, 1): 1.0, ("q", 0, 2): 1.0},
    )
    assert most_uncertain(table["rm"]) == [("q", 0, 2), ("p", 0, 2), ("q", 0, 1), ("p", 0, 1)]
    assert most_disputed(table) == [("p", 0, 1), ("p", 0, 2)] and most_disputed(table, 1) == [
        ("p", 0, 1)
    ]
    assert most_disputed(dict(rm=table["rm"], silent={})) == [] == most_disputed({})


# ---- events


class Naive:
    "What a session should hold: a list of all its former states."

    def __init__(self):
        self.states = [({}, {})]

    def put(self, which, item, value):
        self.states.append(
            tuple(
                {**d, item: value} if i == which else d for i, d in enumerate(self.states[-1])
            )
        )

    def undo(self):
        if len(self.states) > 1:
            self.states.pop()


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("choose"), st.sampled_from(CHOICES), st.integers(0, 4)),
            st.tuples(
                st.just("note"),
                st.text(max_size=5).filter(lambda x: x.isprintable()),
                st.integers(0, 4),
            ),
            st.tuples(st.just("undo"), st.none(), st.none()),
            st.tuples(st.just("reopen"), st.none(), st.none()),
        ),
        max_size=25,
    )
)
@settings(deadline=None, max_examples=60)
def test_any_keys_any_order(tmp_path_factory, keys):
    """Against a list of states; opened again at any moment the session is the same, and its
    journal is never rewritten.
    """
    path, samples, naive, before = (
        tmp_path_factory.mktemp("keys") / "me.jsonl",
        make_samples(5, 2),
        Naive(),
        b"",
    )
    session = Session(path, samples, choose_pairs(samples), repeats=0)
    for kind, value, k in keys:
        name = k is not None and session.items[k].name
        if kind == "choose":
            session.choose(value, name)
            naive.put(0, name, value)
        if kind == "note":
            session.note(value, name)
            naive.put(1, name, value)
        if kind == "undo":
            session.undo()
            naive.undo()
        if kind == "reopen":
            session = Session(path, samples)
        now = path.read_bytes()
        assert now.startswith(before) and (
            kind == "reopen" or len(now) > len(before) or kind == "undo"
        )
        before = now
        chosen, notes = naive.states[-1]
        assert (
            {i: a["value"] for i, a in session.state.choose.items()},
            session.state.note,
        ) == (chosen, notes)
        assert [i.name for i in session.open_items] == [
            i.name for i in session.items if i.name not in chosen
        ]
        assert session.current == (session.open_items or [None])[0]
    assert replay(read_jsonl(path)[1:]) == session.state


def test_on_disk_before_it_is_true(tmp_path, monkeypatch):
    "fsync has returned before the state changes; an event that is wrong leaves no line."
    samples = make_samples()
    session, seen, fsync = (
        Session(tmp_path / "me.jsonl", samples, choose_pairs(samples)),
        [],
        os.fsync,
    )
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (
            seen.append((len(session.state.choose), read_jsonl(session.path)[-1]["event"])),
            fsync(fd),
        ),
    )
    session.choose("left")
    session.undo()
    assert seen == [(0, "choose"), (1, "undo")]
    size = session.path.stat().st_size
    for wrong in (
        lambda: session.choose("both"),
        lambda: session.choose("left", "9999"),
        lambda: session.note(7),
    ):
        with pytest.raises(ValueError):
            wrong()
    assert session.path.stat().st_size == size and session.undo() is None


KEYS = """
import itertools, sys
from halos_nb.people import Session, choose_pairs
from halos_nb.records import read_records
s = Session(sys.argv[1], read_records(sys.argv[2]))
for n in itertools.count():
    item = s.items[n % len(s.items)]
    s.choose(("left", "right", "tie")[n % 3], item.name)
    print(item.name, ("left", "right", "tie")[n % 3], flush=True)
"""


def test_killed_at_the_key(tmp_path):
    """kill -9 three times: whatever was acknowledged is in the journal, in order, and at most
    one event more each time.
    """
    samples, path, told = make_samples(), tmp_path / "me.jsonl", []
    write_records(tmp_path / "samples.json", samples)
    Session(path, samples, choose_pairs(samples))
    for _ in range(3):
        p = subprocess.Popen(
            [sys.executable, "-c", KEYS, str(path), str(tmp_path / "samples.json")],
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = [p.stdout.readline() for _ in range(20)]
        time.sleep(0.05)
        p.send_signal(signal.SIGKILL)
        told.append(
            [x.split() for x in lines + p.stdout.read().split("\n") if len(x.split()) == 2]
        )
        p.wait()
    held = [[e["item"], e["value"]] for e in read_jsonl(path)[1:]]
    # before each start but the first, perhaps the one event that nobody heard of
    for said in told:
        lost = next(n for n in (0, 1) if held[n : n + len(said)] == said)
        held = held[lost + len(said) :]
    assert len(held) <= 1
    assert Session(path, samples).state.undone == 0


def test_torn_foreign_and_edited_journals(tmp_path):
    samples, path = make_samples(), tmp_path / "me.jsonl"
    pairs = choose_pairs(samples)
    session = Session(path, samples, pairs, "human:ada", seed=3)
    for _ in range(3):
        session.choose("left")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # the disk was full, the line is torn
    again = Session(path, samples, labeller="human:ada")
    assert len(again.state.choose) == 2
    again.choose("right")
    assert [e["value"] for e in read_jsonl(path)[1:]] == ["left", "left", "right"]
    for field, kw in dict(
        labeller=dict(labeller="human:bob"),
        seed=dict(pairs=pairs, seed=4),
        items=dict(pairs=pairs[1:], seed=3),
    ).items():
        with pytest.raises(RecordError, match=f"me.jsonl: field `{field}`"):
            Session(path, samples, **dict(labeller="human:ada") | kw)
    with pytest.raises(RecordError, match="field `texts`"):
        Session(
            path, [s | dict(output=s["output"].upper()) for s in samples], labeller="human:ada"
        )
    with pytest.raises(
        RecordError, match="sample_id . of prompt_id .* is not among the samples"
    ):
        Session(path, samples[:1], labeller="human:ada")
    path.write_bytes(
        whole.replace(b'"event":"choose","item":"0002"', b'"event":"choose","item":"7777"')
    )
    with pytest.raises(RecordError, match="event 2: field `item` is '7777'"):
        Session(path, samples, labeller="human:ada")
    path.write_text('{"prompt_id": 1}\n')
    with pytest.raises(RecordError, match="line 1: field `event` should be start"):
        Session(path, samples)
    with pytest.raises(RecordError, match="2 of them have prompt_id"):
        Session(tmp_path / "new.jsonl", samples + samples[:1], pairs)


def test_two_windows(tmp_path):
    samples = make_samples()
    one = Session(tmp_path / "me.jsonl", samples, choose_pairs(samples))
    two = Session(tmp_path / "me.jsonl", samples)
    two.choose("tie")
    with pytest.raises(RuntimeError, match="somebody else writes"):
        one.choose("left")
    assert len(read_jsonl(one.path)) == 2 and not one.state.choose


# ---- what is seen, and what it becomes


def test_a_person_sees_two_texts(tmp_path):
    "Neither ids, generator, reward, side nor whether the pair comes again."
    samples = make_samples()
    session = Session(tmp_path / "me.jsonl", samples, choose_pairs(samples), repeats=0.5)
    for item in session.items:
        view = session.show(item)
        assert view.keys() == {"name", "prompt", "left", "right", "answer", "note"}
        text = json.dumps(view)
        assert not [
            x
            for x in ("secret-model", "0.125", item.prompt_id, "again", "sample_id")
            if x in text
        ]
    assert {session.show(i)["left"] < session.show(i)["right"] for i in session.items} == {
        True,
        False,
    }


@pytest.fixture
def pressed(tmp_path):
    """A session in which every key was used, and what the eyes saw: (text, text, key) of each
    look.
    """
    samples, seen = make_samples(8, 3), []
    session = Session(
        tmp_path / "me.jsonl",
        samples,
        choose_pairs(samples, 20),
        "human:ada",
        seed=2,
        repeats=0.2,
    )
    for k, item in enumerate(session.items):
        view, key = session.show(item), CHOICES[k * 3 % 5]
        if item.again:
            key = "left" if view["left"] < view["right"] else "right"
        seen.append((view["left"], view["right"], key))
        session.choose(key)
    return samples, session, seen


def test_feedback_is_what_was_pressed(pressed, tmp_path):
    samples, session, seen = pressed
    looks = {}  # pair of texts -> the better text of each look, "=" for a tie
    for left, right, key in seen:
        if key != "skip":
            looks.setdefault(frozenset((left, right)), []).append(
                dict(left=left, right=right).get(key, "=")
            )
    expected = {
        pair: set(said).pop()
        for pair, said in looks.items()
        if len(set(said)) == 1 and "=" not in said
    }
    made = session_feedback(session)
    words = {(s["prompt_id"], s["sample_id"]): s["output"] for s in samples}
    got = {}
    for r in made.records:
        check_record(r, "pairwise_feedback")
        a, b = r["output_A"][0]["content"], r["output_B"][0]["content"]
        assert (
            words[r["prompt_id"], r["sample_id_A"]],
            words[r["prompt_id"], r["sample_id_B"]],
        ) == (a, b)
        got[frozenset((a, b))] = a if r["label"] else b
    assert got == expected and len(got) == len(made.records)
    counts = made.counts
    assert (
        counts["items"]
        == counts["ties"] + counts["no_verdict"] + counts["equal_outputs"] + counts["records"]
        == 20
    )
    assert (
        counts["no_verdict"] == len({frozenset(x[:2]) for x in seen}) - len(looks) > 0
        and counts["order_decided"] == sum(len(set(x)) > 1 for x in looks.values()) > 0
    )
    assert (
        session_feedback(session, seed=1).records
        != made.records
        == session_feedback(session).records
    )


def test_labels_are_shares_of_wins(pressed):
    samples, session, seen = pressed
    said = {}
    for left, right, key in seen:
        for text, wins in ((left, "left"), (right, "right")):
            said.setdefault(text, []).append(
                None if key == "skip" else 0.5 if key == "tie" else float(key == wins)
            )
    text = {(s["prompt_id"], s["sample_id"]): s["output"] for s in samples}
    rows = labels(session)
    assert {text[r["prompt_id"], r["sample_id"]] for r in rows} == said.keys() and {
        r["labeller"] for r in rows
    } == {"human:ada"}
    for r in rows:
        known = [x for x in said[text[r["prompt_id"], r["sample_id"]]] if x is not None]
        assert (r["score"], r["reason"]) == (
            (pytest.approx(sum(known) / len(known)), "") if known else (None, "skipped")
        )
    for kind in ("binary", "scalar"):
        made = session_feedback(session, kind)
        assert (
            made.counts["samples"]
            == len(samples)
            == made.counts["unanswered"] + made.counts["skipped"] + made.counts["records"]
        )
        for r in made.records:
            check_record(r, f"{kind}_feedback")
            assert text[r["prompt_id"], r["sample_id"]] == r["output"][0]["content"]
    assert [r["label"] for r in session_feedback(session, "binary").records] == [
        int(r["reward"] >= 0.5) for r in session_feedback(session, "scalar").records
    ]


def test_comparisons_are_records(pressed, tmp_path):
    samples, session, seen = pressed
    rows = comparisons(session)
    write_records(tmp_path / "comparisons.json", rows)
    assert read_records(tmp_path / "comparisons.json", "comparison") == rows
    assert Counter(r["answer"] for r in rows) == Counter(key for *_, key in seen) and {
        r["winner"] for r in rows if r["answer"] == "bad"
    } == {"tie"}
    text = {(s["prompt_id"], s["sample_id"]): s["output"] for s in samples}
    for r, (left, right, _) in zip(rows, seen, strict=True):
        a, b = (text[r["prompt_id"], r[f"sample_id_{x}"]] for x in "AB")
        assert (left, right) == ((a, b) if r["order"] == "AB" else (b, a))


def test_report(pressed):
    samples, session, seen = pressed
    scores = {(s["prompt_id"], s["sample_id"]): s["reward"] for s in samples}
    margins = {
        p: scores[p[0], p[1]] - scores[p[0], p[2]] for p in {i[1:4] for i in session.items}
    }
    told, keys = session_report(session, {"rm": margins}), Counter(key for *_, key in seen)
    assert (told["items"], told["answered"], told["open"], told["undone"]) == (
        24,
        24,
        0,
        0,
    ) and {c: told[c] for c in CHOICES} == {c: keys[c] for c in CHOICES}
    assert told["left_rate"].value == keys["left"] / (keys["left"] + keys["right"])
    answered = session.state.choose.items()
    sided = [(name, a) for name, a in answered if a["value"] in ("left", "right")]
    asked = [session.by_name[name].prompt_id for name, _ in sided]
    lefts = [answer["value"] == "left" for _, answer in sided]
    assert told["left_rate"] == share_over_prompts(lefts, asked)
    twice = {}
    for left, right, key in seen:
        twice.setdefault(frozenset((left, right)), []).append(
            None if key == "skip" else dict(left=left, right=right).get(key, "=")
        )
    twice = [x for x in twice.values() if len(x) == 2 and None not in x]
    assert self_agreement(session) == told["self_agreement"] and told[
        "self_agreement"
    ].value == pytest.approx(sum(a == b for a, b in twice) / len(twice))
    assert told["agreement"] == compare_labellers(
        pair_table(comparisons(session)) | {"rm": margins}
    )
    assert (
        told["agreement"][0].items
        == len({i[1:4] for i in session.items}) - session_feedback(session).counts["no_verdict"]
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 3), st.floats(-2, 2)),
        max_size=15,
    )
)
@settings(deadline=None)
def test_pairs_of_a_feedback_file(rows):
    records = [
        dict(
            prompt_id=p,
            prompt=[dict(role="user", content=str(p))],
            output_A=as_turns(f"text {a}"),
            output_B=as_turns(f"text {b}"),
            reward_A=m,
            reward_B=0.0,
        )
        for p, a, b, m in rows
    ]
    found = samples_of_pairs(records)
    text = {(s["prompt_id"], s["sample_id"]): s["output"] for s in found.samples}
    assert (
        len(text) == len({(p, x) for p, a, b, _ in rows for x in (a, b)}) == len(found.samples)
    )
    assert found.pairs == list(found.margins)
    last = {(p, frozenset((a, b))): (a, m) for p, a, b, m in rows if a != b}
    assert len(last) == len(found.pairs)
    for (p, a, b), m in found.margins.items():
        first, margin = last[p, frozenset(int(text[p, x][5:]) for x in (a, b))]
        assert m == (margin if text[p, a] == f"text {first}" else -margin)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 3)).filter(
            lambda x: x[1] != x[2]
        ),
        max_size=15,
    )
)
@settings(deadline=None)
def test_samples_of_pairs_by_their_ids(rows):
    """Samples 2 and 3 of a prompt say the same words and stay two; a pair of both is not to be
    asked.
    """
    records = [
        dict(
            prompt_id=p,
            prompt=[dict(role="user", content=str(p))],
            output_A=as_turns(f"text {min(a, 2)}"),
            output_B=as_turns(f"text {min(b, 2)}"),
            sample_id_A=a,
            sample_id_B=b,
            reward_A=float(a),
            reward_B=float(b),
        )
        for p, a, b in rows
    ]
    found = samples_of_pairs(records)
    assert {(s["prompt_id"], s["sample_id"]) for s in found.samples} == {
        (p, i) for p, a, b in rows for i in (a, b)
    }
    assert {(s["output"], min(s["sample_id"], 2)) for s in found.samples} <= {
        (f"text {i}", i) for i in range(3)
    }
    assert found.margins == {
        (p, min(a, b), max(a, b)): min(a, b) - max(a, b)
        for p, a, b in rows
        if min(a, 2) != min(b, 2)
    }


def test_samples_of_pairs_of_joined_files():
    """Rounds that asked a prompt twice, joined: one id, two texts. And a file of before beside
    a new one.
    """
    prompt = [dict(role="user", content="Name a star.")]

    def pair(a, b, **ids):
        return dict(
            prompt_id="p",
            prompt=prompt,
            output_A=as_turns(a),
            output_B=as_turns(b),
            reward_A=1.0,
            reward_B=0.0,
            **ids,
        )

    ids = dict(sample_id_A=0, sample_id_B=1)
    found = samples_of_pairs(
        [pair("Vega", "Rigel", **ids), pair("Deneb", "Vega", **ids), pair("Rigel", "Sirius")]
    )
    text = {s["sample_id"]: s["output"] for s in found.samples}
    assert len(text) == len(found.samples) == 5
    assert sorted(text.values()) == ["Deneb", "Rigel", "Sirius", "Vega", "Vega"]
    said = {
        (text[a], text[b]) if m > 0 else (text[b], text[a])
        for (_, a, b), m in found.margins.items()
    }
    assert said == {("Vega", "Rigel"), ("Deneb", "Vega"), ("Rigel", "Sirius")}


@pytest.mark.parametrize(
    "kind, loss", [("pairwise", "dpo"), ("binary", "kto"), ("scalar", "grpo")]
)
def test_train_takes_it(pressed, tmp_path, kind, loss):
    "A real step of a small model on what a person pressed."
    from halos_nb.templates import byte_tokenizer
    from halos_nb.models import small_llama
    from halos_nb.train import train

    _, session, _ = pressed
    made, tok, file = (
        session_feedback(session, kind).records,
        byte_tokenizer(),
        tmp_path / f"{kind}.json",
    )
    write_records(file, made)
    small_llama(tok, hidden_size=16).save_pretrained(tmp_path / "start")
    tok.save_pretrained(tmp_path / "start")
    train(
        TrainConfig(
            loss=loss,
            model=str(tmp_path / "start"),
            train_datasets=[str(file)],
            exp_name=kind,
            cache_dir=str(tmp_path),
            warmup=0,
            batch_size=4,
            epochs=1,
        )
    )
    assert (tmp_path / kind / "FINAL/model.safetensors").exists() and any(
        "loss" in r for r in read_jsonl(tmp_path / kind / "metrics.jsonl")
    )


def test_a_clock_that_is_set_gives_no_absurd_seconds(tmp_path):
    samples, path = make_samples(), tmp_path / "me.jsonl"
    now = [1e9]
    timers = dict(clock=lambda: now[0], timer=time.monotonic)  # the second is the default
    session = Session(path, samples, choose_pairs(samples), "human:ada", **timers)
    assert Session(path, samples, labeller="human:ada").timer is time.monotonic
    for jump in (-900, 3e8, -2e8):
        now[0] += jump
        session.choose("left")
    assert all(0 <= event["seconds"] < 60 for event in read_jsonl(path)[1:])
    lines = path.read_text().splitlines()
    told = json.loads(lines[1]) | dict(seconds=-990.0)  # of before
    path.write_text("\n".join([lines[0], json.dumps(told)]) + "\n")
    again = Session(path, samples, labeller="human:ada")
    assert [row["seconds"] for row in comparisons(again)] == [0]


NO_EVENTS = [dict(seconds=None), dict(seconds="x"), dict(time=True), dict(item=["0001"])]


@pytest.mark.parametrize("wrong", [*NO_EVENTS, dict(item={}), dict(item=None)])
def test_a_line_of_another_kind_is_named(tmp_path, wrong):
    samples, path = make_samples(), tmp_path / "me.jsonl"
    Session(path, samples, choose_pairs(samples), "human:ada").choose("left")
    start, event = path.read_text().splitlines()
    path.write_text("\n".join([start, json.dumps(json.loads(event) | wrong)]) + "\n")
    with pytest.raises(RecordError, match=f"me.jsonl, event 1: field `{[*wrong][0]}`"):
        Session(path, samples, labeller="human:ada")


@pytest.mark.parametrize("items", [None, 5, {}, [None], [[1, 2]], [["1", [], 0, 1, "A", True]]])
def test_a_beginning_of_another_kind_is_named(tmp_path, items):
    samples, path = make_samples(), tmp_path / "me.jsonl"
    Session(path, samples, choose_pairs(samples), "human:ada")
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(items=items)) + "\n")
    with pytest.raises(RecordError, match="me.jsonl, line 1: field `items` should be a list"):
        Session(path, samples, labeller="human:ada")

"What widgets decide, without a screen: pairs kept, files written, keys, what may be shown."

import ast
import hashlib
import json
import random
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from halos_nb import widgets
from conftest import every
from golden import without_ids
from halos_nb.feedback import (
    convert_to_binary_feedback,
    convert_to_pairwise_feedback,
    convert_to_scalar_feedback,
)
from halos_nb.verdicts import pair_of
from halos_nb.people import Session, choose_pairs
from halos_nb.records import append_jsonl, as_text, read_jsonl, read_records, write_records
from halos_nb.pairs import answer_key, export_pairs, flag_pair, pair_detail, pick, read_pairs
from halos_nb.pairs import static_view
from halos_nb.widgets import SessionView, HumanLabeler, PairBrowser, browse_pairs, finish

ROOT = Path(__file__).resolve().parent.parent
EVIL = "document.title=String.fromCharCode(114,97,110)"  # would set the title to "ran"
HOSTILE = [
    f"<script>{EVIL}</script>",
    f"<img src=x onerror={EVIL}>",
    f"<details open ontoggle={EVIL}><summary>s</summary></details>",
    "![i](http://evil.example/i.png)",
    f"<iframe src='http://evil.example/' onload={EVIL}></iframe>",
    f"</textarea></pre></td></div><svg/onload={EVIL}>",
    f"[x](javascript:{EVIL}) `c` $x$ **b**",
    "\u202ebidi\u2066 \x1b[31m",
    "</script><script src='http://evil.example/s.js'></script>",
    f'" onmouseover="{EVIL}" \'',
]


def turns(text, role="assistant"):
    return [dict(role=role, content=text)]


def make_round(
    folder,
    n,
    seed=0,
    prompt="Prompt {} of {}?",
    output="Answer {} to {}.",
    samples=4,
    judges=True,
):
    "A round's files: samples, pairs by score, scores of two labellers who often disagree."
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        dict(
            prompt_id=f"p{p}",
            sample_id=i,
            prompt=turns(prompt.format(p, folder.name), "user"),
            output=output.format(i, p) + " word" * rng.randrange(9),
            type="sample",
        )
        for p in range(n)
        for i in range(samples)
    ]
    scored = [s | dict(reward=round(rng.gauss(0, 1), 3)) for s in rows]
    write_records(folder / "samples.json", rows)
    write_records(
        folder / "feedback.json", convert_to_pairwise_feedback(scored, seed=0, mode="max")
    )
    labels = [
        dict(
            prompt_id=s["prompt_id"],
            sample_id=s["sample_id"],
            labeller=who,
            score=s["reward"] + d,
            reason="",
            type="label",
        )
        for s in scored
        for who, d in (("rm:small", 0.0), ("api:judge", round(rng.gauss(0, 2), 3)))
    ]
    if judges:
        (folder / "feedback.labels.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in labels)
        )
    return folder


def make_run(folder, rounds=(12, 12, 8), **how):
    for k, n in enumerate(rounds, 1):
        make_round(folder / f"round-{k}", n, seed=k, **how)
    return folder


def byte_spelling():
    "A tokenizer of bytes, as a policy's folder has it."
    spelling = Tokenizer(models.BPE())
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    spelling.train_from_iterator([], trainer)
    return spelling


def tell_tokens(run, numbers=None, words=("sft", "round-1")):
    "What two policies are to have said of some pairs (None: all); the policies are gone."
    (run / "policy/FINAL").mkdir(parents=True, exist_ok=True)
    spelling = byte_spelling()
    spelling.save(str(run / "policy/FINAL/tokenizer.json"))
    pairs = read_pairs(run)
    for i in range(len(pairs)) if numbers is None else numbers:
        for side in "AB":
            ids = spelling.encode(as_text(pairs.records[i][f"output_{side}"])).ids
            row = dict(answer=answer_key(pairs.records[i], side), marks="", names=words)
            row |= dict(ids=ids, reference_logps=[-3.0] * len(ids))
            row |= dict(policy_logps=[-3.0 + (k % 7 - 3) for k in range(len(ids))])
            (run / "rescore").mkdir(exist_ok=True)
            append_jsonl(run / "rescore/tokens.jsonl", row)
    return run


# ---- pairs


def test_import_is_light():
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, halos_nb.widgets; print(*{m.split('.')[0] for m in sys.modules})",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert not {"torch", "transformers", "accelerate", "datasets"} & set(out.stdout.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("pairs") / "run", rounds=(20, 15, 10))


def brute(
    pairs,
    round="",
    margin=(None, None),
    length=(None, None),
    difference=(None, None),
    wrong=False,
    disputed=False,
    flagged=False,
    text="",
):
    "What `pick` should keep, pair by pair and from the records alone."

    def keeps(i, r):
        won, lost = ("A", "B") if r["label"] else ("B", "A")
        m = r[f"reward_{won}"] - r[f"reward_{lost}"]
        lengths = [len(as_text(r[f"output_{side}"])) for side in (won, lost)]
        ranges = ((m, margin), (max(lengths), length), (lengths[0] - lengths[1], difference))
        signs = {(x > 0) - (x < 0) for x in pairs.said[i].values()}
        within = all(
            (low is None or x >= low) and (high is None or x <= high)
            for x, (low, high) in ranges
        )
        return (
            within
            and (not round or pairs.rounds[i] == round)
            and (not disputed or {1, -1} <= signs)
            and (not flagged or i in pairs.flags)
            and (not wrong or m < 0)
            and text.lower() in json.dumps(r).lower()
        )

    return [i for i, r in enumerate(pairs.records) if keeps(i, r)]


@pytest.mark.parametrize(
    "filter",
    [
        dict(),
        dict(round="round-2"),
        dict(margin=(1.5, None)),
        dict(margin=(None, 1.0), difference=(0, None)),
        dict(difference=(-5, 5)),
        dict(length=(30, None), difference=(None, 0)),
        dict(wrong=True),
        dict(disputed=True),
        dict(flagged=True),
        dict(text="PROMPT 3 of"),
        dict(text="no such text"),
        dict(round="round-1", disputed=True, margin=(0.5, 3), text="word"),
    ],
)
def test_filters(run, filter):
    pairs = read_pairs(run)
    pairs.flags = {1, 7, 40}
    assert pick(pairs, **filter).tolist() == brute(pairs, **filter)


@pytest.mark.parametrize(
    "column",
    ["margin", "near", "length", "difference", "chosen", "rejected", "disputed", "round"],
)
def test_sorting(run, column):
    pairs = read_pairs(run)
    up, down = (pairs.columns[column][pick(pairs, sort=column, down=d)] for d in (False, True))
    assert up.tolist() == sorted(up)
    assert down.tolist() == sorted(up, reverse=True)
    assert len(up) == 45


def test_labels_of_all_labellers_reach_the_right_pair(run):
    pairs = read_pairs(run)
    for i, r in enumerate(pairs.records):
        folder = run / pairs.rounds[i]
        ids = {
            s["output"]: s["sample_id"]
            for s in read_records(folder / "samples.json")
            if s["prompt_id"] == r["prompt_id"]
        }
        score = {
            (x["labeller"], x["sample_id"]): x["score"]
            for x in read_jsonl(folder / "feedback.labels.jsonl")
            if x["prompt_id"] == r["prompt_id"]
        }
        a, b = (ids[as_text(r[k])] for k in ("output_A", "output_B"))
        assert pairs.said[i] == pytest.approx(
            {w: score[w, a] - score[w, b] for w in ("rm:small", "api:judge")}
        )
        assert {s["labeller"]: s["winner"] for s in pair_detail(pairs, i)["said"]} == {
            w: "A" if score[w, a] > score[w, b] else "B" for w in ("rm:small", "api:judge")
        }


def test_comparisons_are_labels_too_and_unknown_samples_are_counted(tmp_path):
    folder = make_round(tmp_path / "round-1", 3, judges=False)
    r = read_records(folder / "feedback.json")[0]
    ids = {
        s["output"]: s["sample_id"]
        for s in read_records(folder / "samples.json")
        if s["prompt_id"] == r["prompt_id"]
    }
    append_jsonl(
        folder / "people.labels.jsonl",
        dict(
            prompt_id=r["prompt_id"],
            sample_id_A=ids[as_text(r["output_A"])],
            sample_id_B=ids[as_text(r["output_B"])],
            labeller="human:ada",
            winner="B",
            reason="",
            order="BA",
            type="comparison",
        ),
    )
    assert [p for p in read_pairs(tmp_path).said if p] == [{"human:ada": -1}]
    rows = read_records(folder / "feedback.json")
    trimmed = [rows[0] | dict(output_A=turns("trimmed")), *rows[1:]]
    write_records(folder / "feedback.json", trimmed)
    # the ids say which sample it was
    assert [p for p in read_pairs(tmp_path).said if p] == [{"human:ada": -1}]
    write_records(folder / "feedback.json", without_ids(trimmed))
    pairs = read_pairs(tmp_path)
    assert pairs.unknown == 1
    assert pairs.by_text == 0
    assert "1 without labels" in static_view(pairs).parts[0].text
    said = PairBrowser(pairs).answer(dict(do="open"))[0]["said"]
    assert said.startswith("1 pairs without labels")
    write_records(folder / "feedback.json", without_ids(rows))
    pairs = read_pairs(tmp_path)
    assert [p for p in pairs.said if p] == [{"human:ada": -1}]
    assert pairs.unknown == 0
    assert pairs.by_text == 1
    assert "1 matched to labels by their words" in static_view(pairs).parts[0].text
    said = PairBrowser(pairs).answer(dict(do="open"))[0]["said"]
    assert said.startswith("1 pairs matched to labels by their words")


def vega(folder):
    "Two of three answers have the same words and the best and the worst score."
    said = [("Vega", 9.0), ("Rigel", 3.0), ("Vega", 1.0)]
    samples = [
        dict(
            prompt_id="p",
            sample_id=i,
            prompt=turns("Name a star.", "user"),
            output=words,
            type="sample",
        )
        for i, (words, _) in enumerate(said)
    ]
    folder.mkdir(parents=True)
    write_records(folder / "samples.json", samples)
    scored = [s | dict(reward=score) for s, (_, score) in zip(samples, said)]
    for s in scored:
        label = dict(
            prompt_id="p",
            sample_id=s["sample_id"],
            labeller="rm:small",
            score=s["reward"],
            reason="",
            type="label",
        )
        append_jsonl(folder / "feedback.labels.jsonl", label)
    return scored


@pytest.mark.parametrize("kind", ["pairwise", "binary", "scalar"])
def test_a_labellers_margin_where_two_samples_say_the_same(tmp_path, kind):
    scored = vega(tmp_path / "round-1")
    convert = dict(
        pairwise=lambda s: convert_to_pairwise_feedback(s, seed=0, mode="max"),
        binary=lambda s: convert_to_binary_feedback(s, 5),
        scalar=convert_to_scalar_feedback,
    )
    write_records(tmp_path / "round-1" / "feedback.json", convert[kind](scored))
    pairs = read_pairs(tmp_path)
    (r,) = pairs.records
    assert {r["reward_A"], r["reward_B"]} == {9.0, 3.0}
    assert pairs.said == [{"rm:small": r["reward_A"] - r["reward_B"]}]
    assert pairs.by_text == 0


def test_flags_of_pairs_that_say_the_same(tmp_path):
    "Pairs of the same words are two; a flag of before ids were kept, by words, still counts."
    scored = vega(tmp_path / "round-1")
    best, star, worst = scored
    rows = [*convert_to_pairwise_feedback([best, star], 0, "max")] + [
        *convert_to_pairwise_feedback([star, worst | dict(reward=2.0)], 0, "max")
    ]
    same = ("label", "output_A", "output_B")
    rows[1] |= {k: rows[0][k] for k in same}
    write_records(tmp_path / "round-1" / "feedback.json", rows)
    flag_pair(read_pairs(tmp_path), 0)
    assert read_pairs(tmp_path).flags == {0}
    flag_pair(read_pairs(tmp_path), 1)
    flag_pair(read_pairs(tmp_path), 0, on=False)
    assert read_pairs(tmp_path).flags == {1}
    (tmp_path / "flags.jsonl").unlink()
    words = repr([rows[1][k] for k in ("prompt", "output_A", "output_B")])
    old = dict(pair=hashlib.sha256(words.encode()).hexdigest()[:16], on=True)
    append_jsonl(tmp_path / "flags.jsonl", old)
    assert read_pairs(tmp_path).flags == {1}
    flag_pair(read_pairs(tmp_path), 1, on=False)
    assert read_pairs(tmp_path).flags == set()


def test_an_export_is_feedback_with_the_records_as_they_were(run, tmp_path):
    pairs = read_pairs(run)
    pairs.folder = tmp_path
    at = pick(pairs, margin=(1, None), sort="margin")
    file = export_pairs(pairs, at)
    assert read_records(file, "pairwise_feedback") == [pairs.records[i] for i in at]
    for k in (2, 3):
        assert export_pairs(pairs, at).name == f"selection-{k}.json"


def test_the_page_gets_plain_json_and_what_it_asks_for(run):
    browser = PairBrowser(read_pairs(run))
    opened, buffers = browser.answer(dict(do="open"))
    for name, b in zip(opened["columns"], buffers, strict=True):
        np.testing.assert_array_equal(
            np.frombuffer(b, np.float32), browser.pairs.columns[name].astype(np.float32)
        )
    for message in (
        dict(do="show", i=3, rows=[3, 4]),
        dict(do="flag", i=3, on=True),
        dict(do="filter", flagged=True),
    ):
        json.dumps(browser.answer(message)[0], allow_nan=False)
    assert browser.kept.tolist() == [3]
    for wrong in (
        dict(do="show", i=99),
        dict(do="sweep"),
        dict(),
        dict(do="filter", sort="x"),
        dict(do="filter", margin="x"),
    ):
        assert list(browser.answer(wrong)[0]) == ["error"]
    saved = json.dumps(browser.get_state(), default=str)
    assert len(saved) < 60_000 and "Answer" not in saved, "no data is saved with a notebook"
    flag_pair(browser.pairs, 3, on=False)


@every  # it has a time, and machines differ
def test_twenty_thousand_pairs(tmp_path):
    "Time of this process, so that it does not matter what else runs."
    make_round(
        tmp_path / "round-1",
        20_000,
        output="Answer {} to {}. " + "Some words that make it as long as answers are. " * 8,
        samples=2,
    )
    start = time.process_time()
    browser = PairBrowser(read_pairs(tmp_path))
    (
        browser.answer(dict(do="open")),
        browser.answer(dict(do="filter")),
        browser.answer(dict(do="show", i=0, rows=list(range(25)))),
    )
    opened, filters = time.process_time() - start, []
    for f in (
        dict(text="some words that"),
        dict(margin=(1, 2), sort="length"),
        dict(disputed=True, sort="disputed", down=True),
        dict(round="round-1"),
    ):
        start = time.process_time()
        browser.answer(dict(do="filter", **f))
        filters.append(time.process_time() - start)
    print(f"opened in {opened:.2f} s, filters {[round(f, 3) for f in filters]}")
    assert opened < 2
    assert max(filters) < 0.3
    assert len(pick(browser.pairs)) > 19_000
    parts = static_view(browser.pairs, 2).parts
    assert (
        sum(len(p.html) if hasattr(p, "html") else len(p.to_json()) for p in parts) < 300_000
    ), "the static form stays small"


# ---- labelling


def samples_of(texts):
    return [
        dict(
            prompt_id=f"p{i}",
            sample_id=k,
            prompt=turns(t, "user"),
            output=t + " end" * k,
            type="sample",
            generator="secret-model",
            reward=123.456,
        )
        for i, t in enumerate(texts)
        for k in range(3)
    ]


def view_of(folder, texts=("one", "two", "three", "four"), n=8, repeats=0.25, **how):
    samples = samples_of(texts)
    return SessionView(
        Session(
            folder / "journal.jsonl",
            samples,
            choose_pairs(samples, n),
            "human:ada",
            repeats=repeats,
        ),
        folder / "feedback.json",
        **how,
    )


def test_random_keys_and_the_files_they_leave(tmp_path):
    "Whatever is pressed, also across restarts: files and screen say what was pressed."
    rng, wanted, past = random.Random(0), {}, []
    view = view_of(tmp_path)
    for step in range(120):
        do = rng.choice(["choose"] * 6 + ["undo", "look", "note", "restart"])
        page = widgets.view_content(view)
        if do == "choose" and page["item"]:
            name, value = (
                page["item"]["name"],
                rng.choice(["left", "right", "tie", "bad", "skip"]),
            )
            past.append((name, wanted.get(name)))
            wanted[name] = (value, page["item"]["left"], page["item"]["right"])
            view.choose(name, value, 1.0)
        elif do == "undo" and past and view.session.state.past[-1][0] == "choose":
            name, before = past.pop()
            assert view.undo()
            assert widgets.view_content(view)["item"]["name"] == name
            if before:
                wanted[name] = before
            else:
                del wanted[name]
        elif do == "look":
            view.look(rng.randrange(-2, 14))
        elif do == "note" and page["item"]:
            view.note(page["item"]["name"], f"note {step}")
            assert widgets.view_content(view)["item"]["note"] == f"note {step}"
            view.undo()
        elif do == "restart":
            view = view_of(tmp_path)
        verdicts = {}
        for value, left, right in wanted.values():
            verdicts.setdefault(frozenset((left, right)), []).extend(
                [] if value == "skip" else [dict(left=left, right=right).get(value, "tie")]
            )
        preferred = {
            p: v[0] for p, v in verdicts.items() if v and len(set(v)) == 1 and v[0] != "tie"
        }
        records = json.loads(view.file.read_text()) if view.file.exists() else []
        assert {
            frozenset((as_text(r["output_A"]), as_text(r["output_B"]))): as_text(
                r["output_A" if r["label"] else "output_B"]
            )
            for r in records
        } == preferred
        assert (
            {r["item"]: r["answer"] for r in read_jsonl(view.file.with_suffix(".labels.jsonl"))}
            == {k: v[0] for k, v in wanted.items()}
            if wanted
            else True
        )
        assert widgets.view_content(view)["answered"] == len(wanted)


def test_nothing_that_should_be_blind_is_sent(tmp_path):
    labeler = HumanLabeler(view_of(tmp_path, others={"rm:leak": {}}))
    sent = []
    for _ in range(10):
        page = labeler.answer(dict(do="open"))[0]
        sent.append(json.dumps(page))
        labeler.answer(dict(do="choose", item=page["item"]["name"], value="left", seconds=1.0))
    for text in ("secret-model", "123.456", "rm:leak", "sample_id", "again", "reward"):
        assert not any(text in s for s in sent), text
    assert labeler.answer(dict(do="open"))[0]["item"] is None


def test_an_answer_that_is_not_saved_is_not_shown_as_saved(tmp_path):
    view = view_of(tmp_path)
    labeler, other = HumanLabeler(view), view_of(tmp_path)
    other.choose("0001", "left")  # a second window
    reply, _ = labeler.answer(dict(do="choose", item="0001", value="right", seconds=1.0))
    assert "close the other window" in reply["error"]
    assert "item" not in reply
    assert view.session.state.choose == {}


def test_policies_for_open_pairs(tmp_path, capsys):
    view = view_of(tmp_path, repeats=0)
    view.choose("0001", "left"), view.choose("0002", "skip")
    pairs = [pair_of(*i[1:4])[0] for i in view.session.items]
    view.others = {"rm:x": {p: (-1.0) ** k * (k != 7) for k, p in enumerate(pairs)}}
    with pytest.raises(widgets.LabelsMissing, match="6 of 8 pairs are open"):
        finish(view, "judge", "rm:x", "widget")
    with pytest.raises(RuntimeError, match="6 of 8 pairs are not labelled"):
        finish(view, "stop", mode="static")
    assert finish(view, "skip", mode="static")["records"] == 1
    assert "6 left out" in capsys.readouterr().out
    # one is a tie
    assert finish(view, "judge", "rm:x", "static")["records"] == 1 + 5
    assert "6 pairs by rm:x" in capsys.readouterr().out
    by = {r["labeller"]: 0 for r in read_jsonl(tmp_path / "feedback.labels.jsonl")}
    for r in read_jsonl(tmp_path / "feedback.labels.jsonl"):
        by[r["labeller"]] += 1
    assert by == {"human:ada": 2, "rm:x": 6}, (
        "each verdict stands under the name of who gave it"
    )
    said = {
        frozenset((as_text(r["output_A"]), as_text(r["output_B"]))): as_text(
            r["output_A" if r["label"] else "output_B"]
        )
        for r in read_records(tmp_path / "feedback.json")
    }
    for k in range(2, 7):
        p, a, b = pairs[k]
        texts = [view.session.known[p, s]["output"] for s in (a, b)]
        assert said[frozenset(texts)] == texts[k % 2], (
            "the judge's sign is that of the pair's first sample"
        )
    empty = view_of(tmp_path / "e") if (tmp_path / "e").mkdir() is None else None
    with pytest.raises(RuntimeError, match="nothing to train on"):
        finish(empty, "skip", mode="static")


# ---- hostile text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert_without_a_kernel(text, tmp_path):
    from test_show import ATTRIBUTES, TAGS, Page
    from halos_nb.show import visible

    run = make_run(
        tmp_path / "run",
        rounds=(2,),
        prompt=text.replace("{", "").replace("}", ""),
        output=text.replace("{", "").replace("}", ""),
    )
    labels = run / "round-1/feedback.labels.jsonl"
    labels.write_text(labels.read_text().replace('"rm:small"', json.dumps(text)))
    view = view_of(tmp_path, texts=[text, "two"], n=4, others={text: {}})
    pairs = read_pairs(tell_tokens(run, words=(text, text)))
    assert "token by token" in static_view(pairs).parts[-1].text
    for shown in [
        *static_view(pairs).parts,
        widgets.labelling_report(view),
        browse_pairs(run, "static").parts[0],
    ]:
        if not hasattr(shown, "html"):
            assert not {"<script", "<img", "<svg", "<iframe"} & {
                t
                for t in ("<script", "<img", "<svg", "<iframe")
                if t in json.dumps(shown.to_dict(), default=str)
            }
            continue
        page = Page(shown.html)
        assert set(page.tags) <= TAGS | {"span"}  # tokens, each with its numbers as title
        assert page.attributes <= ATTRIBUTES | {"title"}
        assert not page.stack
    assert visible(text) in static_view(pairs).parts[2].text
    for bundle in (
        PairBrowser(pairs)._repr_mimebundle_()[0],
        HumanLabeler(view)._repr_mimebundle_()[0],
    ):
        assert set(Page(bundle["text/html"]).tags) <= TAGS


STATIC = ROOT / "halos_nb/static"
FORBIDDEN = [
    "innerHTML",
    "outerHTML",
    "insertAdjacentHTML",
    "document.write",
    "createContextualFragment",
    "DOMParser",
    "srcdoc",
    "eval(",
    "new Function",
    "fetch(",
    "XMLHttpRequest",
    "import(",
    "http:",
    "https:",
]


@pytest.mark.parametrize("file", sorted(STATIC.glob("*.js")), ids=lambda p: p.name)
def test_page_code_makes_no_html(file):
    "Text reaches the page as text nodes alone; nothing is fetched, no code is made of text."
    # the name of a kind of element, which nobody looks up
    code = file.read_text().replace('"http://www.w3.org/2000/svg"', "")
    for word in FORBIDDEN:
        assert word not in code, word


@pytest.mark.parametrize("file", sorted(STATIC.glob("*.css")), ids=lambda p: p.name)
def test_styles_load_nothing(file):
    for word in ("url(", "@import"):
        assert word not in file.read_text(), word


@pytest.mark.parametrize("file", sorted(STATIC.glob("*.html")), ids=lambda p: p.name)
def test_templates_escape_what_they_print(file):
    for word in ("safe", "autoescape", "<script src", "onclick", "onload"):
        assert not re.search(rf"\b{word}\b", file.read_text()), word


def static_files_named(module):
    "The files that a module's calls of `render` and `static_text` name."
    for node in ast.walk(ast.parse(module.read_text())):
        called = isinstance(node, ast.Call) and getattr(node.func, "id", "")
        if called in ("render", "static_text") and isinstance(node.args[0], ast.Constant):
            yield node.args[0].value


def test_static_files_go_with_the_package():
    "What the package's data names holds every file that `static_text` and `render` ask for."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = project["tool"]["setuptools"]["package-data"]["halos_nb"]
    carried = {p.name for pattern in data for p in (ROOT / "halos_nb").glob(pattern)}
    modules = (ROOT / "halos_nb").glob("*.py")
    named = {name for module in modules for name in static_files_named(module)}
    assert {"page.html", "page.js", "monitor.css", "common.js"} <= named <= carried

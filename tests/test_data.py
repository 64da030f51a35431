"""Data: golden files and sets, TRL rows, joining files without loss."""

import contextlib
import gzip
import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from halos_nb import data as d
from halos_nb import hub_sets
from halos_nb.feedback import (
    convert_to_binary_feedback,
    convert_to_pairwise_feedback,
    convert_to_scalar_feedback,
)
from halos_nb.records import Drawn, RecordError, as_turns, prompt_id, write_records

from golden import cases, load


def as_golden(key, ex):
    return dict(
        key=key,
        prompt=ex.prompt,
        generations=ex.generations,
        sft_index=ex.sft_index,
        scores=ex.scores,
        pairs=[list(p) for p in ex.pairs],
        desirable=ex.desirable,
        dataset_name=ex.dataset_name,
        original_prompt=ex.original_prompt,
    )


def without_id(example):  # deliberate: prompt_id is that of `records`, roles included
    return {k: v for k, v in example.items() if k != "prompt_id"}


@cases("local_files")
def test_local_files_golden(case, tmp_path):
    path = tmp_path / f"{case['file']}.json"
    path.write_text(json.dumps(load("local_files")["files"][case["file"]]))
    read = d.get_sampled_data if case["file"] == "samples" else d.get_feedback
    if "error" in case:
        with pytest.raises(ValueError, match=path.name):
            read(path, case["split"])
        return
    data = read(path, case["split"])
    assert data.name == case["outputs"]["name"]
    assert [as_golden(k, e) for k, e in data.data.items()] == [
        without_id(e) for e in case["outputs"]["examples"]
    ]
    assert all(e.prompt_id == prompt_id(e.prompt) for e in data)
    assert [e.generations for e in hub_sets.load_data([str(path)], case["split"])] == [
        e.generations for e in data
    ]


def single_spaced(x):
    "Deliberate: HALOs collapses runs of blanks in named sets, texts are not altered here."
    if isinstance(x, dict):
        return {k: v if k == "key" else single_spaced(v) for k, v in x.items()}
    if isinstance(x, list):
        return [single_spaced(v) for v in x]
    return re.sub(r"[ \t]+", " ", x) if isinstance(x, str) else x


HH = ("hh", "hh_helpful", "hh_harmless")
# no words, or a transcript taken for an answer
REFUSED = re.compile(r"(\A|\n\n(Human|Assistant):)\s*\Z")


def same_words_once(example):
    "Deliberate: the same words are one answer; the first score of it stands."
    texts = [json.dumps(g) for g in example["generations"]]
    kept = list(dict.fromkeys(texts))
    number = [kept.index(text) for text in texts]
    pairs = [[number[better], number[worse]] for better, worse in example["pairs"]]
    scores = example["scores"]
    imitated = example["sft_index"]
    return example | dict(
        generations=[json.loads(text) for text in kept],
        pairs=[pair for pair in pairs if pair[0] != pair[1]],
        scores=[scores[texts.index(text)] for text in kept] if scores else [],
        sft_index=number[imitated] if imitated >= 0 else imitated,
    )


def answered(example):
    "An example of HH, in which every answer stands in one pair, without pairs that lack one."
    empty = set()
    for i, generation in enumerate(example["generations"]):
        if any(REFUSED.search(turn["content"]) for turn in generation):
            empty.add(i)
    pairs = [pair for pair in example["pairs"] if not empty.intersection(pair)]
    kept = sorted({i for pair in pairs for i in pair})
    return example | dict(
        generations=[example["generations"][i] for i in kept],
        pairs=[[kept.index(better), kept.index(worse)] for better, worse in pairs],
    )


def expected(case):
    "What is recorded, with our deliberate differences applied."
    examples = [without_id(e) for e in case["outputs"]["examples"]]
    # quirk: rows without an answer are passed over
    if case["function"] in HH:
        examples = [e for e in map(answered, examples) if e["pairs"]]
    # quirk: the answer to imitate as documented; deliberate: higher scores are better
    if case["function"] == "oasst":
        examples = [
            e | dict(sft_index=e["pairs"][0][0], scores=[-x for x in e["scores"]])
            for e in examples
        ]
    # deliberate: a conversation's key is its prompt_id, which the test below looks at
    if case["function"] in (*HH, "oasst"):
        examples = [e | dict(key=None) for e in examples]
    return single_spaced([same_words_once(e) for e in examples])


def as_expected(data, function):
    return single_spaced(
        [as_golden(None if function in (*HH, "oasst") else k, e) for k, e in data.data.items()]
    )


@cases("datasets")
def test_hub_sets_golden(case, monkeypatch):
    import datasets

    rows, calls = load("datasets")["raw_rows"][case["rows"]], []

    def load_dataset(repository, config=None, split=None, data_dir=None):
        calls.append(
            dict(repository=repository, config_name=config, split=split, data_dir=data_dir)
        )
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    get = getattr(hub_sets, f"get_{case['function']}")
    if "error" in case:
        with pytest.raises(ValueError, match="split"):
            get(case["split"])
        assert not calls
        return
    data, asked = get(case["split"]), dict(case["load_call"])
    # asked for at once here
    asked["split"] = asked.pop("split_taken_from_result", None) or asked["split"]
    assert (calls, data.name) == ([asked], case["outputs"]["name"])
    assert as_expected(data, case["function"]) == expected(case)
    assert all(e.prompt_id == prompt_id(e.prompt) for e in data)
    assert asked["repository"] in get.__doc__
    if case["function"] in HH:
        assert data.counts["no_answer"] == sum(
            any(REFUSED.search(r[side]) for side in ("chosen", "rejected")) for r in rows
        )
    if case["function"] in (*HH, "oasst"):
        assert all(k == e.prompt_id for k, e in data.data.items())


@cases("datasets", lambda c: "error" not in c)
def test_hub_sets_alter_no_text(case, monkeypatch):
    import datasets

    rows = load("datasets")["raw_rows"][case["rows"]]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    said = "\0".join(str(x) for row in rows for x in texts_in(row))
    for ex in hub_sets.load_data(case["function"], case["split"]):
        for turn in ex.prompt + sum(ex.generations, []):
            for part in parts_of(turn, case["function"]):
                assert part in said


def parts_of(turn, function):
    "The texts of a turn that a row holds; s1k_11 joins two of them with markers."
    if function != "s1k_11" or turn["role"] != "assistant":
        return [turn["content"]]
    parts = turn["content"].split("<|im_start|>")[1:]
    return [re.sub(r"^(think|answer)\n|\n\Z", "", part) for part in parts]


def texts_in(x):
    if isinstance(x, dict):
        return [t for v in x.values() for t in texts_in(v)]
    if isinstance(x, list):
        return [t for v in x for t in texts_in(v)]
    return [x]


OTHER_SPLIT = dict(
    train="test",
    test="train",
    validation="train",
    train_prefs="test_prefs",
    test_prefs="train_prefs",
    train_sft="test_sft",
    test_sft="train_sft",
)


def other_words(x):
    "Rows of the same types, which were not asked for."
    if isinstance(x, dict):
        return {k: other_words(v) for k, v in x.items()}
    if isinstance(x, list):
        return [other_words(v) for v in x]
    return "\n\nHuman: other\n\nAssistant: words" if isinstance(x, str) else x


def write_parquet(path, rows):
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def file_in_card(split, path):
    return f"  - split: {split}\n    path: {path}\n"


def copy_with_configs(folder, config, split, rows, other):
    "A set with two configurations, named in its card."
    card = "---\nconfigs:\n"
    for name, own in ((config, rows), ("v1-legacy", other)):
        path = f"{name}/{split}-00000-of-00001.parquet"
        write_parquet(folder / path, own)
        card += f"- config_name: {name}\n  data_files:\n" + file_in_card(split, path)
    (folder / "README.md").write_text(card + "---\n")


def copy_with_folders(folder, asked, split, rows, other):
    "HH: a folder for each kind of conversation."
    for kind in ("helpful-base", "harmless-base"):
        for name in ("train", "test"):
            taken = name == split and asked in (None, kind)
            write_lines(folder / kind / f"{name}.jsonl.gz", rows if taken else other)


def copy_with_splits(folder, splits):
    "A set with some splits, named in its card."
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for name, rows in splits.items():
        path = f"data/{name}-00000-of-00001.parquet"
        write_parquet(folder / path, rows)
        card += file_in_card(name, path)
    (folder / "README.md").write_text(card + "---\n")


@cases("datasets", lambda c: "error" not in c)
def test_hub_sets_from_a_local_copy(case, tmp_path, monkeypatch):
    """The real load_dataset, which takes a folder of the repository's name before it asks the
    hub; laid out as on the hub, beside what was not asked for."""
    import datasets

    function, call = case["function"], case["load_call"]
    rows = load("datasets")["raw_rows"][case["rows"]]
    other = other_words(rows)
    split = call["split"] or call["split_taken_from_result"]
    folder = tmp_path / call["repository"]
    if call["config_name"]:
        copy_with_configs(folder, call["config_name"], split, rows, other)
    elif function in HH:
        copy_with_folders(folder, call["data_dir"], split, rows, other)
    elif function in ("shp", "safe_rlhf"):
        write_lines(folder / f"data/sub/{split}.jsonl", rows)
        write_lines(folder / f"data/sub/{OTHER_SPLIT[split]}.jsonl", other)
    elif split in OTHER_SPLIT and function != "s1k_11":
        copy_with_splits(folder, {split: rows, OTHER_SPLIT[split]: other})
    else:
        copy_with_splits(folder, {split: rows})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with contextlib.chdir(tmp_path):
        data = getattr(hub_sets, f"get_{function}")(case["split"])
    want = expected(case)
    if function == "hh":  # both folders hold the rows, so every pair is said twice
        want = [e | dict(pairs=e["pairs"] * 2) for e in want]
    assert as_expected(data, function) == want


def test_every_named_set_is_public_and_says_what_it_is():
    for name, get in hub_sets.DATASETS.items():
        assert (
            getattr(hub_sets, f"get_{name}") is get
            and "\n" not in get.__doc__
            and len(get.__doc__) > 30
        )
        with pytest.raises(ValueError, match="split: 'trian' is not one of"):
            get("trian")


def stub(monkeypatch, rows):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)


def test_alpacaeval_reads_the_file_where_scripts_are_refused(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, **where):
        calls.append((path, where))
        if path != "json":
            raise RuntimeError(
                "Dataset scripts are no longer supported, but found alpaca_eval.py"
            )
        return [dict(instruction="Hi.", output="Hello.", dataset="koala", generator="x")]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = hub_sets.get_alpacaeval("test")
    assert example.generations == [as_turns("Hello.")]
    assert example.dataset_name == "koala"
    assert calls[1][1]["split"] == "train"


def test_alpacaeval_tells_other_errors_as_they_are(monkeypatch):
    import datasets

    def load_dataset(path, **where):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RuntimeError, match="on fire"):
        hub_sets.get_alpacaeval("test")


def talk(*turns):
    "A transcript; an empty turn is a bare marker."
    text = ""
    for i, turn in enumerate(turns):
        speaker = "Assistant" if i % 2 else "Human"
        text += f"\n\n{speaker}:" + (f" {turn}" if turn else "")
    return text


def test_transcripts_without_two_answers_to_one_prompt_are_passed_over(monkeypatch):
    rows = [
        dict(chosen=talk("a", "b"), rejected=talk("a", "c")),
        dict(chosen=talk("a", ""), rejected=talk("a", "c")),
        dict(chosen=talk("a", "b"), rejected=talk("z", "c")),
        dict(chosen=talk("a", "b", "c"), rejected=talk("a", "b", "d")),
        dict(chosen="no marker", rejected=talk("a", "c")),
        dict(chosen=talk("a", "b"), rejected=talk("a", "b")),
    ]
    stub(monkeypatch, rows)
    data = hub_sets.get_hh("train")
    assert [e.pairs for e in data] == [[(0, 1)]]
    assert data.counts == dict(no_answer=3, two_prompts=1, equal_pairs=1)


def test_wildbench_asks_the_first_turn(monkeypatch):
    turn = dict(role="user", content="a", toxic=False)
    rows = [
        dict(conversation_input=[turn], references={"gpt-4": "b"}),
        dict(conversation_input=[turn] * 3, references=None),
    ]
    stub(monkeypatch, rows)
    data = hub_sets.get_wildbench("test")
    assert data.counts == dict(later_turns=2, no_answer=1)
    assert [e.generations for e in data] == [[as_turns("b")]]
    # v2-hard as it is now
    stub(monkeypatch, [dict(session_id=1, conversation_input=[dict(role="user", content="a")])])
    (example,) = hub_sets.get_wildbench("v2-hard")
    assert (example.generations, example.sft_index) == ([], -1)


def test_answers_that_are_not_imitated_are_counted(monkeypatch):
    stub(monkeypatch, [dict(messages=as_turns("a", "user") + as_turns(x)) for x in "bcb"])
    data = hub_sets.get_ultrachat("train")
    (example,) = data
    assert (len(example.generations), example.sft_index) == (2, 0)
    assert data.counts == dict(not_imitated=1)


@st.composite
def comments(draw):
    "A row of SHP: two comments on one of three posts, and their votes."
    votes_a, votes_b = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    return dict(
        history=f"Post {draw(st.integers(0, 2))}",
        human_ref_A=f"A {draw(st.sampled_from('abcdef'))}",
        human_ref_B=f"B {draw(st.sampled_from('abcdef'))}",
        score_A=votes_a,
        score_B=votes_b,
        labels=int(votes_a >= votes_b),
        score_ratio=max(votes_a, votes_b) / min(votes_a, votes_b),
    )


def better_first(row):
    answers = row["human_ref_A"], row["human_ref_B"]
    return answers if row["score_A"] >= row["score_B"] else answers[::-1]


@given(st.lists(comments(), max_size=40), st.sampled_from(["train", "test"]))
@settings(max_examples=50, deadline=None)
def test_shp_rule(rows, split):
    with pytest.MonkeyPatch.context() as m:
        stub(m, rows)
        data = hub_sets.get_shp(split)
    good = [row for row in rows if split == "test" or row["score_ratio"] >= 2]
    assert list(data.data) == list(dict.fromkeys(row["history"] for row in good))
    assert data.counts["low_ratio"] == len(rows) - len(good)
    for ex in data:
        said = [better_first(row) for row in good if row["history"] == ex.original_prompt]
        if split == "train":
            said = random.Random(0).sample(said, min(5, len(said)))
        words = [g[0]["content"] for g in ex.generations]
        assert [(words[a], words[b]) for a, b in ex.pairs] == said
        assert ex.sft_index == 0  # as the predecessor: votes do not tell the best of all
    kept = sum(len(e.pairs) for e in data)
    assert kept + data.counts["pairs_left_out"] == len(good)


def path_of(row, known):
    "The messages from the root to this one."
    if row is None:
        return []
    return [*path_of(known.get(row["parent_id"]), known), row]


@st.composite
def forests(draw):
    "Messages of OASST, parents before their answers."
    nodes = st.tuples(
        st.integers(0, 30),
        st.sampled_from(["en", "en", "de"]),
        st.one_of(st.none(), st.integers(0, 3)),
    )
    drawn = draw(st.dictionaries(st.integers(0, 30), nodes))
    known = {}
    for i in sorted(drawn):
        parent, lang, rank = drawn[i]
        row = dict(message_id=i, parent_id=None, lang=lang, rank=rank, text=f"t{i}")
        if parent < i and parent in drawn:
            row["parent_id"] = parent
        known[i] = row
        depth = len(path_of(row, known))
        row["role"] = "assistant" if depth % 2 == 0 else "prompter"
    return [known[i] for i in drawn]


def neighbours_by_definition(rows):
    "Every two siblings, looked at directly."
    known = {row["message_id"]: row for row in rows}
    english = [row for row in rows if row["lang"] == "en"]
    for better in english:
        place = better["parent_id"], better["rank"]
        siblings = [r for r in english if (r["parent_id"], r["rank"]) == place]
        if None in place or siblings[0] is not better or better["role"] != "assistant":
            continue
        for worse in english:
            path = path_of(worse, known)
            if (worse["parent_id"], worse["rank"]) != (place[0], place[1] + 1):
                continue
            if all(row["lang"] == "en" for row in path):
                yield [row["text"] for row in path[:-1]], better["text"], worse["text"]


@given(forests())
@settings(max_examples=200, deadline=None)
def test_oasst_rule(rows):
    counts = Counter()
    found = []
    for pair in hub_sets.neighbour_pairs(iter(rows), counts):
        texts = [turn["content"] for turn in pair["prompt"]]
        found.append((texts, pair["chosen"], pair["rejected"]))
    assert sorted(found) == sorted(neighbours_by_definition(rows))
    answers = [r for r in rows if r["lang"] == "en" and r["role"] == "assistant"]
    ranked = [r for r in answers if r["rank"]]
    assert len(found) + counts["rank_gaps"] + counts["other_language"] == len(ranked)


def test_oasst_ties_take_the_first_sibling():
    rows = [
        dict(message_id=i, parent_id=p, lang="en", rank=rank, text=f"t{i}", role=role)
        for i, p, rank, role in [
            (0, None, None, "prompter"),
            (1, 0, 0, "assistant"),
            (2, 0, 0, "assistant"),
            (3, 0, 1, "assistant"),
        ]
    ]
    assert [
        (r["chosen"], r["rejected"]) for r in hub_sets.neighbour_pairs(rows, Counter())
    ] == [("t1", "t3")]


words = st.text(st.sampled_from("aB: \n\t"), max_size=12) | st.sampled_from(
    [
        "Human:",
        "Assistant: x",
        "a\nHuman: b",
        "a\n\nHuman",
        "x\n\n Human: y",
        "x\n\nHuman:y",
        "a  b",
        "\n\n",
    ]
)


@given(
    st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), words | st.text()), max_size=6)
)
@settings(max_examples=300, deadline=None)
def test_transcripts_keep_every_turn(turns):
    clean = [(who, said.strip()) for who, said in turns]
    # that would be a turn
    clean = [
        (who, said)
        for who, said in clean
        if not re.search(r"\n\n(Human|Assistant):(\s|\Z)", said)
    ]
    roles = dict(Human="user", Assistant="assistant")
    wanted = [dict(role=roles[who], content=said) for who, said in clean]
    assert d.transcript("".join(f"\n\n{who}: {said}" for who, said in clean)) == wanted
    # a bare marker at the end too
    assert (
        d.transcript("".join(f"\n\n{who}: {said}" for who, said in clean).rstrip() + " ")
        == wanted
    )


@given(
    st.text(st.sampled_from("HA:\n x"))
    | st.lists(
        st.sampled_from(
            ["\n\nHuman:", "\n\nAssistant:", " ", "x", "\n", "Human: ", "Assistant:"]
        )
    ).map("".join)
)
@settings(max_examples=300, deadline=None)
def test_any_transcript_is_read_and_no_word_lost(text):
    turns = d.transcript(text)
    if turns:
        assert re.sub(
            r"\s",
            "",
            "".join(
                dict(user="Human:", assistant="Assistant:")[t["role"]] + t["content"]
                for t in turns
            ),
        ) == re.sub(r"\s", "", text)
    else:
        assert not re.match(r"\s*(Human|Assistant):(\s|\Z)", text)
    pairs = list(
        d.transcript_pairs([(1, dict(chosen=text, rejected=text))], counts := Counter())
    )
    assert len(pairs) + sum(counts.values()) == 1 and all(
        r["prompt"] and r["chosen"][0]["content"] for _, r in pairs
    )


ask, star, moon = as_turns("Name a star.", "user"), as_turns("Vega."), as_turns("Io.")


@pytest.mark.parametrize(
    "row",
    [
        dict(prompt="Name a star.", chosen="Vega.", rejected="Io."),
        dict(prompt=ask, chosen=star, rejected=moon),
        dict(chosen=ask + star, rejected=ask + moon),
        dict(prompt="Name a star.", chosen=ask + star, rejected=ask + moon, type="astronomy"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_trl_rows(row, suffix, tmp_path):
    path = tmp_path / f"pairs{suffix}"
    path.write_text(json.dumps(row) if suffix == ".jsonl" else json.dumps([row]))
    (example,) = hub_sets.load_data(str(path))
    assert (example.prompt, example.generations, example.pairs, example.sft_index) == (
        ask,
        [star, moon],
        [(0, 1)],
        0,
    )


def test_long_conversations_share_all_they_can():
    talk = ask + star + as_turns("And a moon?", "user")
    (example,) = d.get_preferences(
        [dict(chosen=talk + moon, rejected=talk + as_turns("Mars."))]
    )
    assert (example.prompt, example.generations) == (talk, [moon, as_turns("Mars.")])
    (example,) = d.get_preferences(
        [
            dict(
                prompt=as_turns("Be brief.", "system") + ask,
                chosen="Vega.",
                rejected="Vega, in Lyra.",
            )
        ]
    )
    assert example.prompt_id == prompt_id(as_turns("Be brief.", "system") + ask)


@pytest.mark.parametrize(
    "broken, told",
    [
        (dict(prompt="?", chosen="!"), "`rejected` is missing"),
        (dict(chosen="!", rejected="."), "`prompt` is missing"),
        (dict(prompt="?", rejected="."), "`chosen` is missing"),
        (
            dict(prompt=3, chosen="!", rejected="."),
            "`prompt` should be a text or a list of turns",
        ),
        (dict(prompt="?", chosen=[], rejected="."), "`chosen` should be"),
        (
            dict(prompt="?", chosen=[{"role": "assistant"}], rejected="."),
            r"`chosen\[0\]\.content` is missing; `chosen` should be a text or a list",
        ),
        (dict(prompt="?", chosen=None, rejected="."), "`chosen` should be"),
        (
            dict(prompt="Other?", chosen=ask + star, rejected=ask + moon),
            "`chosen` answers with a user turn",
        ),
    ],
)
def test_broken_rows(broken, told, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(
        json.dumps([dict(prompt="Name a star.", chosen="Vega.", rejected="Io."), broken])
    )
    with pytest.raises(RecordError, match=rf"pairs\.json, record 2: field {told}"):
        hub_sets.load_data(str(path))


def test_prompts_alone_keep_their_order_and_split(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        "\n".join(
            json.dumps(dict(prompt=f"Question {i % 7}?", split="train" if i % 2 else "test"))
            for i in range(10)
        )
    )
    data = hub_sets.load_data(str(tmp_path / "p.jsonl"), "train")
    assert [e.prompt[0]["content"] for e in data] == [f"Question {i}?" for i in (1, 3, 5, 0, 2)]
    assert data.counts["other_split"] == 5 and all(e.generations == [] for e in data)


@pytest.mark.parametrize(
    "text, told",
    [
        ("{", "not JSON"),
        ("[]", "empty list"),
        ('{"type": "sample"}', "record 1: field `prompt_id` is missing"),
        ("[3]", "record 1: should be an object"),
        ('[{"type": "binary"}]', "record 1: field `type` is 'binary'"),
        ('[{"prompt": "?", "output": "!"}]', "record 1: field `type` is missing"),
        ('[{"instruction": "?"}]', "record 1: field `type` is missing"),
        (
            (
                '[{"type": "label", "prompt_id": 1, "sample_id": 0, "labeller": "x", '
                '"score": 1, "reason": ""}]'
            ),
            "not feedback",
        ),
    ],
)
def test_broken_files(text, told, tmp_path):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(RecordError, match=rf"f\.json.*{told}"):
        hub_sets.load_data(str(tmp_path / "f.json"))


def test_names_are_helped():
    with pytest.raises(ValueError, match="did you mean `ultrabin`"):
        hub_sets.load_data("ultrabon")
    with pytest.raises(ValueError, match="no data set was named"):
        hub_sets.load_data([])


PROMPTS = [as_turns(f"Question {i}?", "user") for i in range(3)]
outputs = st.sampled_from([as_turns(x) for x in "abcd"])
rewards = st.sampled_from([0.0, 0.5, 1.0])


def binary_record(prompt, output, reward, label):
    return dict(
        prompt_id=prompt_id(prompt),
        prompt=prompt,
        output=output,
        reward=reward,
        label=label,
        type="binary_feedback",
    )


def pair_record(prompt, answers, scores, label):
    return dict(
        prompt_id=prompt_id(prompt),
        prompt=prompt,
        output_A=answers[0],
        output_B=answers[1],
        label=label,
        reward_A=scores[0],
        reward_B=scores[1],
        reward_difference=abs(scores[0] - scores[1]),
        type="pairwise_feedback",
    )


@st.composite
def feedback_file(draw):
    "Records of one kind about a few prompts."
    binary = draw(st.booleans())
    rows = []
    for prompt in draw(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=8)):
        if binary:
            reward = draw(rewards)
            rows.append(binary_record(prompt, draw(outputs), reward, int(reward > 0.4)))
        else:
            # equal answers are passed over: see test_pairs_of_an_answer_with_itself
            answers = draw(st.lists(outputs, min_size=2, max_size=2, unique_by=str))
            scores = draw(rewards), draw(rewards)
            rows.append(pair_record(prompt, answers, scores, draw(st.integers(0, 1))))
    return rows


def facts(rows):
    "What a file says, independent of how it is stored, and how often."
    said = Counter()
    for row in rows:
        if "output" in row:
            text = row["output"][0]["content"]
            said[row["prompt_id"], text, row["reward"], bool(row["label"])] += 1
        else:
            sides = "AB" if row["label"] else "BA"
            better, worse = (row[f"output_{side}"][0]["content"] for side in sides)
            said[row["prompt_id"], better, worse] += 1
    return said


def stored_facts(ex):
    "What an example says, in the same words."
    stored = Counter()
    words = [g[0]["content"] for g in ex.generations]
    for i, text in enumerate(words):
        score, good, _ = ex.known(i)
        if good is not None:
            stored[ex.prompt_id, text, score, good] += 1
    for better, worse in ex.pairs:
        stored[ex.prompt_id, words[better], words[worse]] += 1
    return stored


def scored_answers(rows):
    "(prompt, answer, score) of all rows."
    for row in rows:
        for side in ("",) if "output" in row else ("_A", "_B"):
            text = row[f"output{side}"][0]["content"]
            yield row["prompt_id"], text, row[f"reward{side}"]


@given(st.lists(feedback_file(), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_joining_files_loses_and_invents_nothing(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("x")
    names = [str(folder / f"{i}.json") for i in range(len(files))]
    for name, rows in zip(names, files):
        write_records(name, rows)
    data = hub_sets.load_data(names)
    everything = sum(files, [])
    assert list(data.data) == list(dict.fromkeys(row["prompt_id"] for row in everything))
    said = Counter()
    for rows in files:  # in several files: as often as in the one that says it most
        said |= facts(rows)
    assert sum((stored_facts(ex) for ex in data), Counter()) == said
    for ex in data:
        assert len(ex.scores) in (0, len(ex.generations))
        assert len(ex.desirable) in (0, len(ex.generations))
        scores = [ex.known(i).score for i in range(len(ex.generations))]
        assert max(scores) == scores[ex.sft_index]
        for generation, score in zip(ex.generations, scores):
            known = ex.prompt_id, generation[0]["content"], score
            assert known in set(scored_answers(everything))
    again = hub_sets.load_data(names + names)
    assert list(again) == list(data)


def test_pairs_of_an_answer_with_itself(tmp_path):
    "Passed over and counted, unless the two were drawn differently."
    equal = pair_record(ask, [star, star], [1.0, 0.0], 1)
    rows = [
        equal,
        pair_record(ask, [star, moon], [1.0, 0.0], 1),
        equal | dict(output_ids_A=[7, 2], output_ids_B=[7, 2]),
        equal | dict(output_ids_A=[7, 2], output_ids_B=[3, 4, 2]),
    ]
    write_records(tmp_path / "pairs.json", rows)
    data = d.get_feedback(tmp_path / "pairs.json")
    (ex,) = data
    assert data.counts["equal_pairs"] == 2
    assert ex.generations == [star, moon, star]
    assert ex.pairs == [(0, 1), (0, 2)]
    assert ex.where == f"{tmp_path / 'pairs.json'}, record 2"
    write_records(tmp_path / "equal.json", [equal])
    with pytest.raises(ValueError, match="nothing in it to learn from.*equal_pairs 1"):
        hub_sets.load_data(tmp_path / "equal.json")


def drawn_sample(k, ids, **more):
    "A sample that says how it came."
    drawn = dict(output_ids=ids, finished=True, output_logps=[-0.5] * len(ids), tokenizer="t")
    fields = dict(prompt_id=prompt_id(ask), sample_id=k, prompt=ask, output="Vega.")
    return fields | drawn | dict(type="sample") | more


def test_what_was_drawn_travels_into_examples(tmp_path):
    "Samples, binary and scalar feedback: each keeps its ids, also through a second file."
    samples = [drawn_sample(0, [7, 2]), drawn_sample(1, [3, 4, 2]), drawn_sample(2, [7, 2])]
    scored = [s | dict(reward=0.5) for s in samples]
    want = [Drawn(s["output_ids"], True, s["output_logps"], "t") for s in samples]
    write_records(tmp_path / "samples.json", samples)
    write_records(tmp_path / "binary.json", convert_to_binary_feedback(scored))
    write_records(tmp_path / "scalar.json", convert_to_scalar_feedback(scored))
    alone = d.get_sampled_data(tmp_path / "samples.json")
    assert [ex.drawn for ex in alone] == [[draw] for draw in want]
    for name in ("binary.json", "scalar.json"):
        (ex,) = hub_sets.load_data([tmp_path / name])
        assert ex.drawn == want and ex.generations == [star] * 3
        (twice,) = hub_sets.load_data([tmp_path / name, tmp_path / name])
        assert twice == ex


def test_what_was_drawn_travels_into_pairs(tmp_path):
    samples = [
        drawn_sample(0, [7, 2], reward=1.0),
        drawn_sample(1, [9], reward=0.0, output="Io.", finished=False),
    ]
    records = convert_to_pairwise_feedback(samples, seed=0)
    assert {"output_ids_A", "output_logps_B", "finished_A", "tokenizer_B"} <= set(records[0])
    write_records(tmp_path / "pairs.json", records)
    (ex,) = hub_sets.load_data(tmp_path / "pairs.json")
    (pair,) = ex.pairs
    assert [ex.drawn[i].ids for i in pair] == [[7, 2], [9]]
    assert [ex.drawn[i].finished for i in pair] == [True, False]


def test_samples_stay_apart_and_prompts_merge(tmp_path):
    sample = dict(
        prompt_id=7, sample_id=0, prompt=ask, output="Vega.", type="sample", generator="a"
    )
    write_records(tmp_path / "s.json", [sample, sample | dict(output="Io.", generator="b")])
    (tmp_path / "p.json").write_text(
        json.dumps([dict(prompt="Name a star.", chosen="Vega.", rejected="Io.")])
    )
    data = hub_sets.load_data([tmp_path / "s.json", tmp_path / "p.json"])
    assert [(e.generations, e.sft_index, e.pairs) for e in data] == [
        ([star], 0, []),
        ([moon], 0, []),
        ([star, moon], 0, [(0, 1)]),
    ]
    assert len({e.prompt_id for e in data}) == 1


# row, split of the file -> prompt, generations, pairs, desirable, sft_index; the examples are
# those of TRL's documentation
FORMATS = [
    (
        dict(prompt="The sky is", chosen=" blue.", rejected=" green."),
        (
            as_turns("The sky is", "user"),
            [as_turns(" blue."), as_turns(" green.")],
            [(0, 1)],
            [],
            0,
        ),
    ),
    (
        dict(chosen="The sky is blue.", rejected="The sky is green."),
        (
            as_turns("The sky is", "user"),
            [as_turns(" blue."), as_turns(" green.")],
            [(0, 1)],
            [],
            0,
        ),
    ),
    (dict(prompt=ask, chosen=star, rejected=moon), (ask, [star, moon], [(0, 1)], [], 0)),
    (dict(chosen=ask + star, rejected=ask + moon), (ask, [star, moon], [(0, 1)], [], 0)),
    (
        dict(prompt=None, chosen=ask + star, rejected=ask + moon),
        (ask, [star, moon], [(0, 1)], [], 0),
    ),
    (
        dict(
            chosen="\n\nHuman: Name a star.\n\nAssistant: Vega.",
            rejected="\n\nHuman: Name a star.\n\nAssistant: Io.",
        ),
        (ask, [star, moon], [(0, 1)], [], 0),
    ),
    (
        dict(prompt="The sky is", completion=" blue.", label=True),
        (as_turns("The sky is", "user"), [as_turns(" blue.")], [], [True], 0),
    ),
    (dict(prompt=ask, completion=moon, label=False), (ask, [moon], [], [False], -1)),
    (dict(prompt=ask, completion=star), (ask, [star], [], [], 0)),
    (dict(prompt="Name a star.", completion="Vega."), (ask, [star], [], [], 0)),
    (dict(messages=ask + star), (ask, [star], [], [], 0)),
    (
        dict(messages=as_turns("Be brief.", "system") + ask + star + ask + moon),
        (as_turns("Be brief.", "system") + ask, [star + ask + moon], [], [], 0),
    ),
    (dict(prompt="Name a star.", messages=ask + star, prompt_id="x"), (ask, [star], [], [], 0)),
    (dict(prompt=ask), (ask, [], [], [], -1)),
    (dict(prompt="Name a star.", solution="Vega."), (ask, [], [], [], -1)),
]


@pytest.mark.parametrize("row, want", FORMATS)
@pytest.mark.parametrize("source", ["json", "jsonl", "parquet", "hub", "folder"])
def test_every_format_from_every_source(row, want, source, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if source in ("json", "jsonl"):
        (name := tmp_path / f"rows.{source}").write_text(
            json.dumps(row) if source == "jsonl" else json.dumps([row])
        )
    elif source == "parquet":
        datasets.Dataset.from_list([row]).to_parquet(name := tmp_path / "rows.parquet")
    else:
        (tmp_path / "org/name/data").mkdir(parents=True)
        datasets.Dataset.from_list([row]).to_parquet(
            tmp_path / "org/name/data/train-00000-of-00001.parquet"
        )
        name = "org/name" if source == "hub" else tmp_path / "org/name"
    with contextlib.chdir(tmp_path):
        (example,) = hub_sets.load_data(str(name), "train")
    assert (
        example.prompt,
        example.generations,
        example.pairs,
        example.desirable,
        example.sft_index,
    ) == want


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.booleans()),
        min_size=1,
        max_size=10,
    )
)
@settings(max_examples=50, deadline=None)
def test_judged_rows_are_observations_and_rows_to_imitate_stay_apart(rows):
    judged = [dict(prompt=f"Question {p}?", completion=x, label=good) for p, x, good in rows]
    found = [
        (e.prompt[0]["content"], g[0]["content"], good)
        for e in d.get_preferences(judged)
        for g, good in zip(e.generations, e.desirable, strict=True)
    ]
    # as often as said
    assert sorted(found) == sorted((r["prompt"], r["completion"], r["label"]) for r in judged)
    for e in d.get_preferences(judged):
        assert e.sft_index == (e.desirable.index(True) if True in e.desirable else -1)
    with pytest.MonkeyPatch.context() as m:
        stub(m, dict(train=[{k: r[k] for k in ("prompt", "completion")} for r in judged]))
        apart = hub_sets.load_data("org/name")
    assert [(e.prompt[0]["content"], e.generations, e.sft_index) for e in apart] == [
        (r["prompt"], [as_turns(r["completion"])], 0) for r in judged
    ]


def test_split_column_of_a_parquet_file(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list(
        [dict(prompt=f"Question {i}?", split="train" if i else "test") for i in range(3)]
    ).to_parquet(tmp_path / "p.parquet")
    data = hub_sets.load_data(str(tmp_path / "p.parquet"), "train")
    assert (len(data), data.counts) == (2, dict(other_split=1))


def test_scores_of_pairs_are_kept():
    row = dict(prompt=ask, chosen=star, rejected=moon, score_chosen=8.5, score_rejected=3)
    (example,) = d.get_preferences(
        [row, row | dict(rejected=as_turns("Mars."), score_chosen=9, score_rejected=None)]
    )
    assert (example.scores, example.pairs) == ([8.5, 3, None], [(0, 1), (0, 2)])
    assert d.get_preferences([row, row | dict(score_chosen=9)]).counts["rescored"] == 1
    for bad in ("8", float("nan")):
        with pytest.raises(
            RecordError,
            match="preferences, record 1: field `score_chosen` should be a finite number",
        ):
            d.get_preferences([row | dict(score_chosen=bad)])


@given(st.text(), st.text(), st.text())
@settings(max_examples=200, deadline=None)
def test_implicit_prompts_lose_no_character(head, a, b):
    row = dict(chosen=head + a, rejected=head + b)
    try:
        prompt, chosen, rejected = d.split_pair(row, "row")
    except RecordError:
        return
    assert prompt[0]["content"].strip() and chosen[0]["content"][0].isspace()
    assert [prompt[0]["content"] + x[0]["content"] for x in (chosen, rejected)] == [
        row["chosen"],
        row["rejected"],
    ]


@pytest.mark.parametrize(
    "row, told",
    [
        (
            dict(chosen=" \n a", rejected=" \n b"),
            "record 1: field `prompt` is missing, and chosen and rejected share no beginning",
        ),
        (dict(text="The sky is blue."), "columns text are in no known format"),
        (
            dict(question="?", chosen="I say a", rejected="I say b"),
            "columns question, chosen, rejected are in no",
        ),
        (dict(instruction="?", output="!"), "columns instruction, output are in no"),
        (dict(prompt="?", response="!"), "columns prompt, response are in no"),
        (
            dict(prompt="?", completion="!", label="good"),
            "record 1: field `label` should be true or false",
        ),
        (dict(messages=ask), "record 1: field `messages` should be a prompt and an answer"),
        (dict(prompt="?", completion=3), "record 1: field `completion` should be a text"),
        (dict(messages="Hi."), "record 1: field `messages` should be a prompt and an answer"),
        (dict(prompt="?", chosen="!"), "record 1: field `rejected` is missing"),
    ],
)
def test_columns_that_are_not_understood(row, told, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda path: dict(train=[row]))
    with pytest.raises(RecordError, match=f"org/name.*{told}"):
        hub_sets.load_data("org/name")
    (tmp_path / "f.json").write_text(json.dumps([row]))
    with pytest.raises(
        RecordError,
        match=(
            rf"f\.json, record 1: {told.removeprefix('record 1: ')}|f\.json, record 1: field "
            rf"`type` is missing, and {told}"
        ),
    ):
        hub_sets.load_data(str(tmp_path / "f.json"))
    if "known format" in told:
        with pytest.raises(
            RecordError, match="unpaired preference \\(prompt, completion, label\\)"
        ):
            hub_sets.load_data("org/name")


def test_names_of_the_hub(monkeypatch, tmp_path):
    import datasets

    calls = []

    def load_dataset(*asked):
        calls.append(asked)
        if asked[0] == "org/gone":
            raise datasets.exceptions.DatasetNotFoundError(
                "Dataset 'org/gone' doesn't exist on the Hub or cannot be accessed."
            )
        if asked[0] == "org/off":
            raise ConnectionError("Couldn't reach 'org/off' on the Hub")
        if asked == ("org/many",):
            raise ValueError(
                "Config name is missing. Please pick one among the available configs: "
                "['a', 'b']"
            )
        return dict(
            train_prefs=[dict(prompt="a", split="whatever")],
            validation=[dict(prompt="b")],
            extra=[dict(prompt="c")],
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def prompts(name, split):
        return [e.prompt[0]["content"] for e in hub_sets.load_data(name, split)]

    assert (
        prompts("org/name:a", "train"),
        prompts("org/many:b", "test"),
        prompts("org/name", None),
        prompts("org/name", "extra"),
    ) == (["a"], ["b"], ["a", "b", "c"], ["c"])
    assert calls == [("org/name", "a"), ("org/many", "b"), ("org/name",), ("org/name",)]
    assert hub_sets.load_data("org/name", "test").counts == dict(rows_of_validation=1)
    for name, split, told in [
        (
            "org/gone",
            "train",
            "org/gone: neither a file, a folder nor a known data set.*doesn't exist",
        ),
        ("org/off", "train", "org/off: .*Couldn't reach"),
        ("org/many", "train", "(?s)org/many: Config name is missing.*org/name:config"),
        (
            "org/name",
            "dev",
            "org/name: no split is clearly 'dev'; it has train_prefs, validation, extra",
        ),
    ]:
        with pytest.raises(ValueError, match=told):
            hub_sets.load_data(name, split)
    calls.clear()
    # these never ask the hub
    for name in (
        "ultrabim",
        "shpp",
        "no-such-set",
        "runs/gone.json",
        "./gone.jsonl",
        str(tmp_path / "gone"),
        "a/b/c",
    ):
        with pytest.raises(
            ValueError, match="nothing is at|neither a file nor a known data set"
        ):
            hub_sets.load_data(name)
    assert calls == []


def test_hub_sets_and_files_join(monkeypatch, tmp_path):
    stub(
        monkeypatch,
        [
            dict(
                prompt="Name a star.",
                response_0="Io.",
                response_1="Vega.",
                better_response_id=1,
            )
        ],
    )
    write_records(
        tmp_path / "f.json",
        [
            dict(
                prompt_id=prompt_id(ask),
                sample_id=i,
                prompt=ask,
                output=x,
                reward=i,
                type="scalar_feedback",
            )
            for i, x in enumerate([moon, star])
        ],
    )
    (example,) = hub_sets.load_data(["safe_rlhf", str(tmp_path / "f.json")])
    assert (example.generations, example.pairs, example.scores) == (
        [star, moon],
        [(0, 1)],
        [1, 0],
    )


@st.composite
def labelled_round(draw, number):
    "Labelled samples of one round, as feedback of some kind, and what is known of each."
    kind = draw(st.sampled_from(["scalar", "binary", "pairwise"]))
    rows, known = [], {}
    for j in range(draw(st.integers(1, 6))):
        prompt = draw(st.sampled_from(PROMPTS))
        different = st.lists(st.integers(-3, 3), min_size=2, max_size=2, unique=True)
        scores = draw(different)
        answers = [as_turns(f"{number} {j} {side}") for side in "ab"]  # all answers differ
        better = 0 if scores[0] > scores[1] else 1
        for n in range(2):
            good = scores[n] > 0 if kind == "binary" else None
            beaten = None
            if kind == "pairwise" and n == better:
                beaten = answers[1 - better][0]["content"]
            known[prompt_id(prompt), answers[n][0]["content"]] = (scores[n], good, beaten)
        if kind == "pairwise":
            rows.append(pair_record(prompt, answers, scores, label=1 - better))
            continue
        for n in range(2):
            row = binary_record(prompt, answers[n], scores[n], int(scores[n] > 0))
            row |= dict(sample_id=2 * j + n, type=f"{kind}_feedback")
            if kind == "scalar":
                del row["label"]
            rows.append(row)
    return draw(st.permutations(rows)), known


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rounds_join_in_any_order(tmp_path_factory, data):
    "Rounds of labelled samples, cut into files of any kind: all is under the right answer."
    folder = tmp_path_factory.mktemp("rounds")
    names, known = [], {}
    for i in range(data.draw(st.integers(1, 4))):
        rows, of_round = data.draw(labelled_round(i))
        names.append(str(folder / f"{i}.json"))
        known |= of_round
        write_records(names[-1], rows)
    joined = hub_sets.load_data(data.draw(st.permutations(names)))
    found = {}
    for ex in joined:
        # so groups of GRPO and the converters have every score
        assert len(ex.scores) == len(ex.generations)
        assert None not in ex.scores
        words = [g[0]["content"] for g in ex.generations]
        beaten = {words[better]: words[worse] for better, worse in ex.pairs}
        assert len(beaten) == len(ex.pairs)
        for n, text in enumerate(words):
            found[ex.prompt_id, text] = (*ex.known(n)[:2], beaten.get(text))
    assert found == known
    assert not joined.counts


def test_large_sets_show_progress_and_are_read_row_by_row(tmp_path, monkeypatch):
    from halos_nb.records import read_jsonl

    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "progress.jsonl"))

    class Rows:
        asked = 0

        def __len__(self):
            return 30

        def __iter__(self):
            for i in range(30):
                self.asked += 1
                yield i

    rows = Rows()
    for n, i in enumerate(hub_sets.with_progress(rows, "x", many=30), 1):
        assert rows.asked == n == i + 1
    lines = read_jsonl(tmp_path / "progress.jsonl")
    assert (lines[0]["done"], lines[-1]["done"], lines[-1]["total"], lines[-1]["unit"]) == (
        0,
        30,
        30,
        "rows",
    )
    (tmp_path / "progress.jsonl").unlink()
    assert list(hub_sets.with_progress(Rows(), "x", many=31)) == list(range(30))
    monkeypatch.setenv("RANK", "1")
    assert (
        list(hub_sets.with_progress(Rows(), "x", many=30)) == list(range(30))
        and not (tmp_path / "progress.jsonl").exists()
    )


def rated(number, helpful, **more):
    "A pairwise record of two answers, and what they are rated."
    prompt = as_turns("Name a star.", "user")
    texts = [as_turns(text) for text in ("Vega.", "Rigel.")]
    record = dict(prompt_id=prompt_id(prompt), prompt=prompt, label=1, reward_A=1.0)
    record |= dict(reward_B=0.0, reward_difference=1.0, type="pairwise_feedback")
    record |= dict(output_A=texts[0], output_B=texts[1])
    return record | dict(helpful_A=helpful[0], helpful_B=helpful[1]) | more


def test_ratings_of_pairs_are_read_and_contradictions_counted(tmp_path):
    rows = [
        rated(0, (4, 2), brief_A=True, brief_B=False),
        rated(1, (4, 3), safe_A=1, safe_B="1"),
    ]
    write_records(tmp_path / "rated.json", rows)
    data = d.get_feedback(tmp_path / "rated.json")
    [ex] = data
    assert ex.ratings == [dict(helpful=4, brief=1), dict(helpful=2, brief=0)]
    assert data.counts["rescored"] == 1
    both = hub_sets.load_data([str(tmp_path / "rated.json")] * 2, "train")
    assert [e.ratings for e in both] == [ex.ratings]

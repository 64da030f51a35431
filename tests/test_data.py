"""Data: golden files and sets, TRL rows, joining files without loss."""
import json, re
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from halos_nb import data as d
from halos_nb.records import RecordError, as_turns, prompt_id, write_records

from golden import cases, load

SETS = ("ultrabin", "ultrafeedback_armorm")


def as_golden(key, ex):
    return dict(key=key, prompt=ex.prompt, generations=ex.generations, sft_index=ex.sft_index, scores=ex.scores, pairs=[list(p) for p in ex.pairs],
                desirable=ex.desirable, dataset_name=ex.dataset_name, original_prompt=ex.original_prompt)


def without_id(example): # deliberate: prompt_id is that of `records`, roles included
    return {k: v for k, v in example.items() if k != "prompt_id"}


@cases("local_files")
def test_local_files_golden(case, tmp_path):
    path = tmp_path / f"{case['file']}.json"
    path.write_text(json.dumps(load("local_files")["files"][case["file"]]))
    read = d.get_sampled_data if case["file"] == "samples" else d.get_feedback
    if "error" in case:
        with pytest.raises(ValueError, match=path.name): read(path, case["split"])
        return
    data = read(path, case["split"])
    assert data.name == case["outputs"]["name"]
    assert [as_golden(k, e) for k, e in data.data.items()] == [without_id(e) for e in case["outputs"]["examples"]]
    assert all(e.prompt_id == prompt_id(e.prompt) for e in data)
    assert [e.generations for e in d.load_data([str(path)], case["split"])] == [e.generations for e in data]


def single_spaced(x): # deliberate: HALOs collapses runs of spaces and tabs in named sets, texts are not altered here
    if isinstance(x, dict): return {k: single_spaced(v) if k != "key" else v for k, v in x.items()}
    return [single_spaced(v) for v in x] if isinstance(x, list) else re.sub(r"[ \t]+", " ", x) if isinstance(x, str) else x


@cases("datasets", lambda c: c["function"] in SETS)
def test_hub_sets_golden(case, monkeypatch):
    import datasets
    rows, calls = load("datasets")["raw_rows"][case["rows"]], []
    monkeypatch.setattr(datasets, "load_dataset", lambda repository, split: calls.append((repository, split)) or rows)
    get = getattr(d, f"get_{case['function']}")
    if "error" in case:
        with pytest.raises(ValueError, match="split"): get(case["split"])
        return
    data = get(case["split"])
    assert calls == [(case["load_call"]["repository"], case["load_call"]["split"])]
    assert data.name == case["outputs"]["name"]
    assert single_spaced([as_golden(k, e) for k, e in data.data.items()]) == [without_id(e) for e in case["outputs"]["examples"]]
    texts = {t["content"] for r in rows for side in ("chosen", "rejected") for t in r[side]}
    assert all(g[0]["content"] in texts for e in data for g in e.generations)


@pytest.mark.parametrize("name", SETS)
def test_hub_sets_from_a_local_copy(name, tmp_path, monkeypatch):
    "The real load_dataset, which takes a folder of the repository's name before it asks the hub."
    import datasets
    repository, split = dict(ultrabin=("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"), ultrafeedback_armorm=("princeton-nlp/llama3-ultrafeedback-armorm", "test"))[name]
    row = dict(prompt="Name a star.", chosen=as_turns("Name a star.", "user") + as_turns("Vega."), rejected=as_turns("Name a star.", "user") + as_turns("A  fish."), all_rm_scores=[0.25, 0.5, 0.125])
    folder = tmp_path / repository / "data"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list([row]).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    example, = d.load_data(name, "test")
    assert (example.prompt, example.generations, example.pairs) == (as_turns("Name a star.", "user"), [as_turns("Vega."), as_turns("A  fish.")], [(0, 1)])
    assert example.scores == ([0.5, 0.125] if name == "ultrafeedback_armorm" else [])


ask, star, moon = as_turns("Name a star.", "user"), as_turns("Vega."), as_turns("Io.")


@pytest.mark.parametrize("row", [
    dict(prompt="Name a star.", chosen="Vega.", rejected="Io."), dict(prompt=ask, chosen=star, rejected=moon), dict(chosen=ask + star, rejected=ask + moon),
    dict(prompt="Name a star.", chosen=ask + star, rejected=ask + moon, type="astronomy")])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_trl_rows(row, suffix, tmp_path):
    path = tmp_path / f"pairs{suffix}"
    path.write_text(json.dumps(row) if suffix == ".jsonl" else json.dumps([row]))
    example, = d.load_data(str(path))
    assert (example.prompt, example.generations, example.pairs, example.sft_index) == (ask, [star, moon], [(0, 1)], 0)


def test_long_conversations_share_all_they_can():
    talk = ask + star + as_turns("And a moon?", "user")
    example, = d.get_preferences([dict(chosen=talk + moon, rejected=talk + as_turns("Mars."))])
    assert (example.prompt, example.generations) == (talk, [moon, as_turns("Mars.")])
    example, = d.get_preferences([dict(prompt=as_turns("Be brief.", "system") + ask, chosen="Vega.", rejected="Vega, in Lyra.")])
    assert example.prompt_id == prompt_id(as_turns("Be brief.", "system") + ask)


@pytest.mark.parametrize("broken, told", [
    (dict(prompt="?", chosen="!"), "`rejected` is missing"), (dict(chosen="!", rejected="."), "`prompt` is missing"), (dict(prompt="?", rejected="."), "`chosen` is missing"),
    (dict(prompt=3, chosen="!", rejected="."), "`prompt` should be a text or a list of turns"), (dict(prompt="?", chosen=[], rejected="."), "`chosen` should be"),
    (dict(prompt="?", chosen=[{"role": "assistant"}], rejected="."), "`chosen` should be"), (dict(prompt="?", chosen=None, rejected="."), "`chosen` should be"),
    (dict(prompt="Other?", chosen=ask + star, rejected=ask + moon), "`chosen` answers with a user turn")])
def test_broken_rows(broken, told, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([dict(prompt="Name a star.", chosen="Vega.", rejected="Io."), broken]))
    with pytest.raises(RecordError, match=rf"pairs\.json, record 2: field {told}"): d.load_data(str(path))


def test_prompts_alone_keep_their_order_and_split(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(dict(prompt=f"Question {i % 7}?", split="train" if i % 2 else "test")) for i in range(10)))
    data = d.load_data(str(tmp_path / "p.jsonl"), "train")
    assert [e.prompt[0]["content"] for e in data] == [f"Question {i}?" for i in (1, 3, 5, 0, 2)]
    assert data.counts["other_split"] == 5 and all(e.generations == [] for e in data)


@pytest.mark.parametrize("text, told", [("{", "not JSON"), ("[]", "empty list"), ('{"type": "sample"}', "should be a list"), ("[3]", "record 1: should be an object"),
                                        ('[{"type": "binary"}]', "record 1: field `type` is 'binary'"), ('[{"prompt": "?", "output": "!"}]', "record 1: field `type` is missing"),
                                        ('[{"instruction": "?"}]', "record 1: field `type` is missing"), ('[{"type": "label", "prompt_id": 1, "sample_id": 0, "labeller": "x", "score": 1, "reason": ""}]', "not feedback")])
def test_broken_files(text, told, tmp_path):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(RecordError, match=rf"f\.json.*{told}"): d.load_data(str(tmp_path / "f.json"))


def test_names_are_helped():
    with pytest.raises(ValueError, match="did you mean `ultrabin`"): d.load_data("ultrabon")
    with pytest.raises(ValueError, match="no data set was named"): d.load_data([])


PROMPTS = [as_turns(f"Question {i}?", "user") for i in range(3)]
outputs, rewards = st.sampled_from([as_turns(x) for x in "abcd"]), st.sampled_from([0.0, 0.5, 1.0])


@st.composite
def feedback_file(draw):
    def single(p): return dict(prompt_id=prompt_id(p), prompt=p, output=draw(outputs), reward=(reward := draw(rewards)), label=int(reward > 0.4), type="binary_feedback")
    def pair(p): return dict(prompt_id=prompt_id(p), prompt=p, output_A=draw(outputs), output_B=draw(outputs), label=draw(st.integers(0, 1)), reward_A=(x := draw(rewards)),
                             reward_B=(y := draw(rewards)), reward_difference=abs(x - y), type="pairwise_feedback")
    one = draw(st.sampled_from([single, pair]))
    return [one(draw(st.sampled_from(PROMPTS))) for _ in range(draw(st.integers(1, 8)))]


def facts(rows): # what each file says, independent of how it is stored
    said = Counter()
    for r in rows:
        if "output" in r: said[r["prompt_id"], r["output"][0]["content"], r["reward"], bool(r["label"])] += 1
        else:
            a, b = (r[f"output_{x}"][0]["content"] for x in ("AB" if r["label"] else "BA"))
            said[r["prompt_id"], a, b] += 1
    return said


@given(st.lists(feedback_file(), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_joining_files_loses_and_invents_nothing(tmp_path_factory, files):
    folder, names = tmp_path_factory.mktemp("x"), []
    for i, rows in enumerate(files):
        names.append(str(folder / f"{i}.json"))
        write_records(names[-1], rows)
    data, said = d.load_data(names), Counter()
    for rows in files: said |= facts(rows) # in several files: as often as in the one that says it most
    assert list(data.data) == list(dict.fromkeys(r["prompt_id"] for rows in files for r in rows))
    stored = Counter()
    for ex in data:
        assert all(len(x) in (0, len(ex.generations)) for x in (ex.scores, ex.desirable))
        words = [(g[0]["content"], *ex.known(i)) for i, g in enumerate(ex.generations)]
        for text, score, good in words:
            if good is not None: stored[ex.prompt_id, text, score, good] += 1
        for a, b in ex.pairs: stored[ex.prompt_id, words[a][0], words[b][0]] += 1
        assert max(x[1] for x in words) == words[ex.sft_index][1]
        assert {x[:2] for x in words} <= {(o[0]["content"], s) for rows in files for r in rows if r["prompt_id"] == ex.prompt_id
                                        for o, s in ([(r["output"], r["reward"])] if "output" in r else [(r["output_A"], r["reward_A"]), (r["output_B"], r["reward_B"])])}
    assert stored == said
    again = d.load_data(names + names)
    assert list(again) == list(data)


def test_samples_stay_apart_and_prompts_merge(tmp_path):
    sample = dict(prompt_id=7, sample_id=0, prompt=ask, output="Vega.", type="sample", generator="a")
    write_records(tmp_path / "s.json", [sample, sample | dict(output="Io.", generator="b")])
    (tmp_path / "p.json").write_text(json.dumps([dict(prompt="Name a star.", chosen="Vega.", rejected="Io.")]))
    data = d.load_data([tmp_path / "s.json", tmp_path / "p.json"])
    assert [(e.generations, e.sft_index, e.pairs) for e in data] == [([star], 0, []), ([moon], 0, []), ([star, moon], 0, [(0, 1)])]
    assert len({e.prompt_id for e in data}) == 1

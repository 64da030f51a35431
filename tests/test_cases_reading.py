"""What people's files hold: read as it stands there, or refused with file, record and field."""

import bz2
import contextlib
import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest

from halos_nb import data as d
from halos_nb import hub_sets
from halos_nb.configs import LabelConfig
from halos_nb.label import main as label
from halos_nb.records import (
    Drawn,
    RecordError,
    as_text,
    as_turns,
    fault_in,
    prompt_id,
    read_jsonl,
    read_records,
    read_rows,
    write_records,
)

ASK = as_turns("Name a star.", "user")
PAIR = dict(prompt="Name a star.", chosen="Vega.", rejected="Mars.")
LINES = "".join(json.dumps(PAIR | dict(chosen=x)) + "\n" for x in ("Vega.", "Rigel."))


def words(data):
    "The answers, each as its words."
    return [as_text(answer) for ex in data for answer in ex.generations]


def load(path, content):
    "The data set of a file with this content."
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    return hub_sets.load_data(path)


def call(**arguments):
    "An answer that is a call of a tool."
    function = dict(name="look_up", arguments=arguments)
    return [
        dict(
            role="assistant", content="", tool_calls=[dict(type="function", function=function)]
        )
    ]


# ---------------------------------------------------------------------------- text is text

CELLS = ["4", "None", "NA", "nan", "null", "007", "2024-01-01", "1e5", "True", "-", "3.10"]


@pytest.mark.parametrize("suffix, comma", [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_columns_of_text_are_text(tmp_path, suffix, comma):
    lines = [comma.join(["prompt", "chosen", "rejected"])]
    lines += [comma.join([f"Question {i}?", cell, "no"]) for i, cell in enumerate(CELLS)]
    content = "\n".join(lines).encode()
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    data = load(tmp_path / f"rows{suffix}", content)
    assert words(data)[::2] == CELLS
    assert [ex.where for ex in data][1].endswith(f"rows{suffix}, record 2")


def test_csv_keeps_empty_answers_quotes_line_ends_and_long_fields(tmp_path):
    long = "x" * 200_000
    text = f'prompt,chosen,rejected\r\na,"","say ""hi"",\nthen go"\r\nb,{long},é\r\n'
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        data = load(tmp_path / "rows.csv", text.encode(encoding))
        assert words(data) == ["", 'say "hi",\nthen go', long, "é"]
    import csv

    assert csv.field_size_limit() == 131_072  # left as it was


def test_csv_knows_scores_labels_and_splits(tmp_path):
    header = "prompt,completion,label,split,system\n"
    rows = "a,4,1,train,\nb,5,False,,Be brief.\nc,6,TRUE,test,\n"
    good, bad = load(tmp_path / "rows.csv", header + rows)
    assert (good.desirable, bad.desirable) == ([True], [False])
    assert (good.prompt[0]["role"], bad.prompt[0]["role"]) == ("user", "system")
    header = "prompt,chosen,rejected,score_chosen,score_rejected\n"
    (ex,) = load(tmp_path / "rows.csv", header + "a,4,5,0.5,\n")
    assert ex.scores == [0.5, None]


@pytest.mark.parametrize(
    "text, told",
    [
        ("prompt,chosen,rejected\na,b\n", "record 1: has 2 fields where the header has 3"),
        ("prompt,chosen,rejected\na,b,c\na,b,c,d\n", "record 2: has 4 fields"),
        ('prompt,chosen,rejected\na,"b,c\n', "line 2 is no CSV: unexpected end of data"),
        ("prompt,prompt\na,b\n", "column `prompt` stands there twice"),
        ("prompt,chosen,rejected\n", "an empty list"),
        ("", "an empty list"),
        ("prompt;chosen;rejected\na;b;c\n", "columns prompt;chosen;rejected are in no known"),
        (
            "prompt,chosen,rejected,score_chosen\na,b,c,best\n",
            "record 1: field `score_chosen` should be a number, is 'best'",
        ),
        ("prompt,completion,label\na,b,maybe\n", "record 1: field `label` should be true"),
    ],
)
def test_csv_that_is_refused(tmp_path, text, told):
    with pytest.raises(RecordError, match=rf"rows\.csv.*{told}"):
        load(tmp_path / "rows.csv", text)


def test_folders_read_their_files_as_files(tmp_path):
    "Also CSV in a folder, where the hub's reader would guess types."
    folder = tmp_path / "set"
    folder.mkdir()
    for split, cell in (("train", "None"), ("test", "2024-01-01")):
        (folder / f"{split}.csv").write_text(f"prompt,chosen,rejected\nWhen?,{cell},4\n")
    assert words(hub_sets.load_data(folder)) == ["None", "4"]
    assert words(hub_sets.load_data(folder, "test")) == ["2024-01-01", "4"]
    (folder / "train.csv").write_text("prompt,chosen,rejected\nWhen?,now\n")
    with pytest.raises(RecordError, match=r"train\.csv, record 1: has 2 fields"):
        hub_sets.load_data(folder)


# ------------------------------------------------------------- by content, not by name


def zstd(data):
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = dict(plain=bytes, gz=gzip.compress, bz2=bz2.compress, xz=lzma.compress, zst=zstd)


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows"])
def test_lines_and_arrays_under_any_name(tmp_path, pack, name):
    array = json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1)
    for text in (LINES, array, "\ufeff" + LINES, LINES.replace("\n", "\r\n\r\n")):
        data = load(tmp_path / name, PACKERS[pack](text.encode()))
        assert words(data) == ["Vega.", "Mars.", "Rigel."]


def test_one_record_over_several_lines(tmp_path):
    assert words(load(tmp_path / "one.json", json.dumps(PAIR, indent=2))) == ["Vega.", "Mars."]


@pytest.mark.parametrize("pack", ["gz", "bz2", "xz", "zst"])
def test_torn_archives(tmp_path, pack):
    whole = PACKERS[pack](LINES.encode() * 50)
    with pytest.raises(RecordError, match=r"rows\.jsonl.*cannot be unpacked"):
        load(tmp_path / "rows.jsonl", whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "content, told",
    [
        (b"PK\x03\x04rest", "is a ZIP archive"),
        (LINES.encode("latin-1").replace(b"Vega", b"V\xe9ga"), r"line 1 is not UTF-8.*0xe9"),
        ((LINES * 2)[:-20].encode(), r"record 4 \(line 4\): not JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}\n', r"not JSON"),
        (b"   \n", "is empty"),
        (b"prompt,chosen\n", "not JSON"),
    ],
)
def test_what_is_no_json(tmp_path, content, told):
    with pytest.raises(RecordError, match=rf"rows\.jsonl.*{told}"):
        load(tmp_path / "rows.jsonl", content)


# -------------------------------------------------------------------- tables with types

TALKS = [
    dict(messages=ASK + call(star="Vega", n=None)),
    dict(messages=ASK + as_turns("Vega.")),
]


def write_table(path, rows, kind):
    import datasets
    import pyarrow

    table = datasets.Dataset.from_list(rows).data.table
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        make = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
        with make(path, table.schema) as out:
            out.write_table(table)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_tables_say_what_json_says(tmp_path, kind):
    "The nulls that a table fills in are not part of a turn."
    import pyarrow.parquet  # noqa: F401  (a submodule that is not there of itself)

    suffix = "parquet" if kind == "parquet" else "arrow"
    write_table(tmp_path / f"t.{suffix}", TALKS, kind)
    called, said = hub_sets.load_data(tmp_path / f"t.{suffix}")
    assert said.generations == [as_turns("Vega.")]
    assert called.generations == [call(star="Vega")]
    assert as_text(called.generations[0]) == 'look_up({"star":"Vega"})'
    whole = (tmp_path / f"t.{suffix}").read_bytes()
    (tmp_path / f"t.{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match=rf"t\.{suffix}: is no whole Parquet or Arrow"):
        hub_sets.load_data(tmp_path / f"t.{suffix}")


def test_feedback_in_a_table(tmp_path):
    "As it comes back from the hub."
    import datasets

    record = dict(
        prompt_id=prompt_id(ASK),
        prompt=ASK,
        output=as_turns("Vega."),
        output_ids=[7, 2],
        finished=True,
        label=1,
        reward=0.5,
        type="binary_feedback",
    )
    other = record | dict(output_ids=None, finished=None, label=0)
    datasets.Dataset.from_list([record, other]).to_parquet(tmp_path / "f.parquet")
    (ex,) = hub_sets.load_data(tmp_path / "f.parquet")
    assert ex.desirable == [True, False]
    assert ex.drawn == [Drawn([7, 2], True), None]


def test_tables_with_types_of_their_own_are_refused_by_name(tmp_path):
    import datasets

    rows = [PAIR | dict(chosen=4, rejected=5)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(RecordError, match=r"t\.parquet, record 1: field `chosen` should be a"):
        hub_sets.load_data(tmp_path / "t.parquet")


def test_saved_data_sets(tmp_path):
    import datasets

    one = datasets.Dataset.from_list([PAIR])
    one.save_to_disk(tmp_path / "one")
    (ex,) = hub_sets.load_data(tmp_path / "one")
    assert ex.where == f"{tmp_path / 'one'}, record 1"
    other = datasets.Dataset.from_list([PAIR | dict(chosen="Rigel.")])
    datasets.DatasetDict(train=one, test_prefs=other).save_to_disk(tmp_path / "two")
    assert words(hub_sets.load_data(tmp_path / "two")) == ["Vega.", "Mars."]
    assert words(hub_sets.load_data(tmp_path / "two", "test")) == ["Rigel.", "Mars."]
    with pytest.raises(ValueError, match="two: no split is clearly 'dev'"):
        hub_sets.load_data(tmp_path / "two", "dev")
    (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(RecordError, match="one: was written by save_to_disk, and cannot be"):
        hub_sets.load_data(tmp_path / "one")


# ------------------------------------------------------------------------------ columns


def test_system_column(tmp_path):
    rows = [
        PAIR | dict(system="In French."),
        PAIR | dict(system=None),
        dict(messages=ASK + as_turns("Vega."), system_prompt="In French."),
    ]
    french, plain = load(tmp_path / "rows.json", json.dumps(rows[:2]))
    assert french.prompt == as_turns("In French.", "system") + ASK
    assert plain.prompt == ASK and plain.prompt_id != french.prompt_id
    (talk,) = load(tmp_path / "talk.json", json.dumps(rows[2:]))
    assert talk.prompt == french.prompt and talk.prompt_id == french.prompt_id
    twice = PAIR | dict(prompt=french.prompt, system="In French.")
    (same,) = load(tmp_path / "twice.json", json.dumps([twice]))
    assert same.prompt == french.prompt


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_offered_columns(tmp_path, name):
    offer = [dict(type="function", function=dict(name="look_up"))]
    rows = [PAIR | {name: offer}, PAIR | {name: json.dumps(offer)}, PAIR | {name: []}, PAIR]
    first, none = load(tmp_path / "rows.json", json.dumps(rows))
    assert first.prompt == [ASK[0] | {name: offer}]
    assert first.pairs == [(0, 1)] * 2 and none.pairs == [(0, 1)] * 2
    assert none.prompt == ASK and none.prompt_id == prompt_id(ASK) != first.prompt_id


@pytest.mark.parametrize(
    "column, told",
    [
        (dict(prompt=None), "`prompt` is null; give the prompt"),
        (dict(chosen=None), "`chosen` should be a text or a list of turns"),
        (
            dict(chosen=[dict(role="assistant", content=None)]),
            r"`chosen\[0\]\.content` is miss",
        ),
        (
            dict(chosen=[dict(role="assistant", content=["x"])]),
            r"`chosen\[0\]\.content` should",
        ),
        (dict(prompt=[{"from": "human", "value": "Hi"}]), r"`prompt\[0\]\.role` is missing"),
        (dict(prompt='[{"role": "user", "content": "Hi"}]'), "`prompt` is a list of turns wr"),
        (dict(system=["x"]), "`system` should be a text"),
        (dict(prompt=as_turns("A", "system") + ASK, system="B"), "`system` is not the system"),
        (dict(tools="a hammer"), "`tools` should be a list of objects"),
        (dict(documents=["a text"]), "`documents` should be a list of objects"),
        (dict(chat_template_kwargs=dict(think=False)), "`chat_template_kwargs` is not read"),
        (dict(score_chosen=True), "`score_chosen` should be a finite number"),
        (dict(score_chosen="8"), "`score_chosen` should be a finite number"),
    ],
)
def test_columns_that_are_refused(tmp_path, column, told):
    with pytest.raises(RecordError, match=rf"rows\.json, record 2: field {told}"):
        load(tmp_path / "rows.json", json.dumps([PAIR, PAIR | column]))


def test_rows_of_another_format_than_the_first(tmp_path):
    prompt = dict(prompt="Name a star.")
    for later in (prompt | dict(completion="Vega."), prompt | dict(response="Vega.")):
        with pytest.raises(RecordError, match=r"rows\.json, record 2: .*record 1 is prompt-on"):
            load(tmp_path / "rows.json", json.dumps([prompt, later]))


def test_calls_of_tools_are_prompts_and_answers(tmp_path):
    prompts = [ASK + call(n=n) + [dict(role="tool", content="ok")] for n in (1, 2)]
    one, two = load(tmp_path / "p.json", json.dumps([PAIR | dict(prompt=p) for p in prompts]))
    assert one.prompt_id != two.prompt_id
    talks = [dict(messages=ASK + call(n=n)) for n in (1, 2)]
    talks[1]["messages"][-1]["content"] = None  # as OpenAI's format has it
    data = load(tmp_path / "a.json", json.dumps(talks))
    assert [ex.generations for ex in data] == [[call(n=1)], [call(n=2)]]
    assert words(data) == ['look_up({"n":1})', 'look_up({"n":2})']
    same = [PAIR | dict(chosen=call(n=1), rejected=call(n=n)) for n in (1, 2)]
    data = load(tmp_path / "s.json", json.dumps(same))
    assert data.counts["equal_pairs"] == 1 and len(words(data)) == 2


# ---------------------------------------------------------- what cannot be used or written

SAMPLE = dict(prompt_id="p", sample_id=0, prompt=ASK, output="Vega.", type="sample")
DEEP = "[" * 3000 + "]" * 3000
BROKEN = {
    "half a character": ('"Ve\\ud83dga"', "holds half of a character"),
    "not a number": ("NaN", "should be a finite number, got nan"),
    "infinity": ("-Infinity", "should be a finite number, got -inf"),
    "beyond floats": ("1" * 400, "should be a finite number, got inf"),
    "beyond digits": ("1" * 5000, "should be a finite number, got inf"),
    "an exponent": ("1e999", "should be a finite number, got inf"),
    "nested without end": (DEEP, "is nested more than"),
    "nested deep": ("[" * 300 + "]" * 300, "is nested more than"),
    "inside": ('{"a": [1, {"b": NaN}]}', "should be a finite number"),
    "a repeated key": ('{"a": 1, "a": 2}', "stands there twice"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("row", [PAIR, SAMPLE], ids=["pair", "sample"])
@pytest.mark.parametrize("array", [True, False], ids=["array", "lines"])
def test_values_that_cannot_be_used(tmp_path, kind, row, array):
    "In a field that is read and in one that is only carried: file, record and field."
    value, told = BROKEN[kind]
    for field in ("note", "output" if row is SAMPLE else "score_chosen"):
        good = json.dumps(row)
        bad = good[:-1] + f', "{field}": {value}' + "}"
        if field == "output":  # instead of the one that is there
            bad = json.dumps({k: v for k, v in row.items() if k != "output"})
            bad = bad[:-1] + f', "output": {value}' + "}"
        text = f"[{good}, {bad}]" if array else f"{good}\n{bad}\n"
        with pytest.raises(RecordError, match=rf"x\.json, record 2.*field `{field}.*{told}"):
            load(tmp_path / "x.json", text)


def test_a_key_of_the_record_itself_that_stands_twice(tmp_path):
    with pytest.raises(RecordError, match="record 1.*field `chosen` stands there twice"):
        load(tmp_path / "x.json", json.dumps(PAIR)[:-1] + ', "chosen": "Rigel."}')


def test_words_that_only_look_like_trouble(tmp_path):
    "Letters that look like keys, long digits, NaN in a text: read as they are."
    answers = ['": ', ': "a":', '"a": 1, "a": 2', "9" * 30, "NaN", "\\ud83d", "😀", "\u2028"]
    rows = [PAIR | dict(prompt=f"{i}?", chosen=text) for i, text in enumerate(answers)]
    for ascii_only in (True, False):
        lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
        assert words(load(tmp_path / "x.jsonl", lines))[::2] == answers


def count_letters(prompt, output):
    "A labeller."
    return float(len(output))


def test_big_numbers_are_carried_to_the_end(tmp_path, monkeypatch):
    "Through labelling into feedback, digit for digit."
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    rows = [SAMPLE | dict(x=10**30 + 1), SAMPLE | dict(sample_id=1, output="Io", x=2**64)]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    label(
        LabelConfig(
            samples_file=str(tmp_path / "s.json"),
            output_file=str(tmp_path / "f.json"),
            feedback_type="scalar",
            function="test_cases_reading:count_letters",
        )
    )
    assert [r["x"] for r in read_records(tmp_path / "f.json")] == [10**30 + 1, 2**64]


def test_bad_samples_stop_before_a_model_is_loaded(tmp_path):
    "The reward model does not even exist."
    bad = json.dumps(SAMPLE)[:-1] + ', "note": "\\ud83d"}'
    (tmp_path / "s.json").write_text(f"[{json.dumps(SAMPLE)}, {bad}]")
    cfg = LabelConfig(
        samples_file=str(tmp_path / "s.json"),
        output_file=str(tmp_path / "f.json"),
        reward_model_path=str(tmp_path / "no model"),
    )
    with pytest.raises(RecordError, match=r"s\.json, record 2: field `note` holds half"):
        label(cfg)


def test_deep_but_bounded_nesting_is_kept(tmp_path):
    note = json.loads("[" * 150 + "]" * 150)
    write_records(tmp_path / "s.json", [SAMPLE | dict(note=note)])
    assert read_records(tmp_path / "s.json")[0]["note"] == note
    assert fault_in(read_rows(tmp_path / "s.json")[0]) is None


# ------------------------------------------------------------------------- implicit prompts


def test_implicit_prompts_get_the_same_checks(tmp_path):
    talk = dict(chosen=ASK + as_turns("Vega."), rejected=ASK + as_turns("Mars."))
    (ex,) = load(tmp_path / "t.json", json.dumps([talk | dict(system="Brief.")]))
    assert ex.prompt == as_turns("Brief.", "system") + ASK
    (ex,) = load(tmp_path / "t.json", json.dumps([talk | dict(prompt=None)]))
    assert ex.prompt == ASK  # conversations say where their prompt ends
    equal = dict(chosen="The sky is blue.", rejected="The sky is blue.")
    with pytest.raises(ValueError, match="nothing in it to learn from.*equal_pairs 1"):
        load(tmp_path / "t.json", json.dumps([equal]))


def test_transcripts_beside_something_else(tmp_path):
    good = "\n\nHuman: Name a star.\n\nAssistant: Vega."
    rows = [
        dict(chosen=good, rejected=good.replace("Vega", "Mars"), score_chosen=2.0),
        dict(chosen=as_turns("Vega."), rejected=as_turns("Mars.")),
    ]
    data = load(tmp_path / "t.json", json.dumps(rows))
    (ex,) = data
    assert data.counts["no_answer"] == 1 and ex.scores == [2.0, None]


def test_a_hub_set_of_csv_is_text(tmp_path, monkeypatch):
    "The hub's own reader, which asks the folder of that name first."
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "org/name").mkdir(parents=True)
    text = "prompt,chosen,rejected,label\nAny?,None,007,1\n"
    (tmp_path / "org/name/train.csv").write_text(text)
    with contextlib.chdir(tmp_path):
        (ex,) = hub_sets.load_hub("org/name", "train")
    assert [as_text(answer) for answer in ex.generations] == ["None", "007"]


def test_recursion_and_field_limits_are_left_alone(tmp_path):
    before = sys.getrecursionlimit()
    with pytest.raises(RecordError):
        load(tmp_path / "x.json", f'[{{"x": {DEEP}}}]')
    assert sys.getrecursionlimit() == before
    assert d.file_rows is hub_sets.file_rows


def raise_half(prompt, output):
    "A labeller whose complaint cannot be written."
    raise ValueError("half \ud83d")


def give_huge(prompt, output):
    "A labeller whose number is beyond floats."
    return 10**400


@pytest.mark.parametrize("function", ["raise_half", "give_huge"])
def test_what_a_function_says_can_always_be_written(tmp_path, monkeypatch, function):
    "Everything was scored by then."
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    write_records(tmp_path / "s.json", [SAMPLE])
    cfg = LabelConfig(
        samples_file=str(tmp_path / "s.json"),
        output_file=str(tmp_path / "f.json"),
        function=f"test_cases_reading:{function}",
    )
    with pytest.raises(ValueError, match="nothing to learn from: 1 prompts, 1 unscored"):
        label(cfg)
    (row,) = read_jsonl(tmp_path / "f.labels.jsonl")
    assert row["score"] is None and row["reason"]

"""Records: what is refused, what comes back, and what a killed writer leaves."""

import errno
import io
import json
import re
import socket
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from halos_nb import records as r

PROMPT = [dict(role="user", content="Name a star.")]
OUTPUT = [dict(role="assistant", content="Vega.")]
GOOD = dict(
    sample=dict(prompt_id="p", sample_id=0, prompt=PROMPT, output="Vega.", type="sample"),
    scalar_feedback=dict(
        prompt_id="p",
        sample_id=0,
        prompt=PROMPT,
        output=OUTPUT,
        reward=0.5,
        type="scalar_feedback",
    ),
    binary_feedback=dict(
        prompt_id=3, prompt=PROMPT, output=OUTPUT, label=True, reward=1, type="binary_feedback"
    ),
    pairwise_feedback=dict(
        prompt_id="p",
        prompt=PROMPT,
        output_A=OUTPUT,
        output_B=OUTPUT,
        label=0,
        reward_A=0.5,
        reward_B=1.5,
        reward_difference=1.0,
        type="pairwise_feedback",
    ),
    label=dict(
        prompt_id="p",
        sample_id=0,
        labeller="rm",
        score=None,
        reason="no number in the reply",
        type="label",
    ),
    comparison=dict(
        prompt_id="p",
        sample_id_A=0,
        sample_id_B=1,
        labeller="human:ada",
        winner="A",
        reason="",
        order="BA",
        type="comparison",
    ),
)
every_type = pytest.mark.parametrize("type", list(GOOD))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.json"


@every_type
def test_good_records_come_back_unchanged(type, path):
    rows = [GOOD[type] | dict(mine=[1, {"a": None}]), GOOD[type]]
    path.write_text(json.dumps(rows))
    assert r.read_records(path) == r.read_records(path, type) == rows


def fields():
    return [(t, f) for t in GOOD for f in GOOD[t] if f != "type"]


@pytest.mark.parametrize("type, name", fields())
def test_missing_field(type, name, path):
    without = GOOD[type].copy()
    del without[name]
    path.write_text(json.dumps([GOOD[type], without]))
    told = rf"file\.json, record 2: field `{name}` is missing.*mend or remove"
    with pytest.raises(r.RecordError, match=told):
        r.read_records(path)


@pytest.mark.parametrize(
    "wrong", [{"a": 1}, 1.5, [], ["text"], [{"role": "user"}], [{"role": "user", "content": 1}]]
)
@pytest.mark.parametrize("type, name", fields())
def test_wrong_type(type, name, wrong, path):
    if wrong == 1.5 and name.startswith(("reward", "score")):
        return
    path.write_text(json.dumps([GOOD[type], GOOD[type], GOOD[type] | {name: wrong}]))
    with pytest.raises(r.RecordError, match=rf"file\.json, record 3: field `{name}"):
        r.read_records(path)


NUMBERED = [
    ("binary_feedback", "sample_id"),
    ("pairwise_feedback", "sample_id_A"),
    ("pairwise_feedback", "sample_id_B"),
]


@pytest.mark.parametrize("type, name", NUMBERED)
def test_ids_that_feedback_need_not_have_are_ids_where_it_has_them(type, name, path):
    rows = [GOOD[type], *(GOOD[type] | {name: id} for id in ("a", 3, None))]
    path.write_text(json.dumps(rows))
    assert r.read_records(path) == rows
    for wrong in ([1], {"a": 1}, 1.5, True):
        path.write_text(json.dumps([*rows, GOOD[type] | {name: wrong}]))
        told = rf"file\.json, record 5: field `{name}` should be a text or a whole number"
        with pytest.raises(r.RecordError, match=told):
            r.read_records(path)


NUMBERS = [(type, name) for type, name in fields() if name.startswith(("reward", "score"))]


@pytest.mark.parametrize("type, name", NUMBERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, "1.0", "NaN"])
def test_rewards_are_finite_numbers(type, name, bad, path):
    # Python writes NaN and Infinity, which are not JSON
    path.write_text(json.dumps([GOOD[type] | {name: bad}]))
    with pytest.raises(r.RecordError, match=rf"record 1: field `{name}` should be"):
        r.read_records(path)


@pytest.mark.parametrize(
    "text, told",
    [
        ("{nope", "not JSON.*line 1 column 2"),
        ("", "not JSON"),
        ('[{"a": 1},', "not JSON"),
        ("[]", "an empty list"),
        (
            '{"type": "sample"}',
            "record 1: field `prompt_id` is missing",
        ),  # one line, one record
        ("3", "should be a list"),
        ('["text"]', "record 1: should be an object"),
        ("[null]", "record 1: should be an object"),
        ("[{}]", "record 1: field `type` is missing"),
        (
            '[{"type": "smaple"}]',
            (
                "record 1: field `type` is 'smaple', which is unknown; known are sample, "
                "pairwise_feedback"
            ),
        ),
        ('[{"type": ["sample"]}]', "record 1: field `type`"),
        (
            json.dumps([GOOD["sample"], GOOD["binary_feedback"]]),
            "record 2: field `type` is 'binary_feedback' where sample was expected",
        ),
        (
            json.dumps([GOOD["sample"], GOOD["sample"] | {"type": None}]),
            "record 2: field `type` is missing",
        ),
        (json.dumps([GOOD["sample"] | {"output": "\ud800"}]), "record 1: field `output`"),
    ],
)
def test_broken_files(text, told, path):
    path.write_text(text)
    with pytest.raises(r.RecordError, match=r"file\.json.*" + told):
        r.read_records(path)


def test_jsonl(tmp_path):
    path = tmp_path / "file.jsonl"
    # no line end at the end
    path.write_text("\n".join(map(json.dumps, [GOOD["sample"], GOOD["sample"]])))
    assert r.read_records(path) == [GOOD["sample"]] * 2
    path.write_text(json.dumps(GOOD["sample"]) + "\n\n" + '{"type": "sam')
    with pytest.raises(r.RecordError, match=r"file\.jsonl, record 2 \(line 3\): not JSON"):
        r.read_records(path)
    path.write_text("\n")
    with pytest.raises(r.RecordError, match="empty"):
        r.read_rows(path)


def test_not_utf8(path):
    path.write_bytes(b'["\xff"]')
    with pytest.raises(r.RecordError, match=r"file\.json: line 1 is not UTF-8"):
        r.read_rows(path)


texts = st.text(st.characters(codec="utf-8"))
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)


def collections(x):
    return st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3)


values = st.recursive(st.none() | st.booleans() | numbers | texts, collections, max_leaves=8)
objects = st.dictionaries(texts.filter(lambda k: k != "type"), values, max_size=4)


@given(st.lists(objects, min_size=1, max_size=5), st.sampled_from([".json", ".jsonl"]))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, rows, suffix):
    path = tmp_path_factory.mktemp("x") / f"f{suffix}"
    if suffix == ".json":
        r.write_records(path, rows)
    else:
        for row in rows:
            r.append_jsonl(path, row)
        assert r.read_jsonl(path) == rows
    assert r.read_rows(path) == rows
    if suffix == ".json":
        assert json.loads(path.read_text(encoding="utf-8")) == rows


def test_streaming_to_an_open_file_leaves_it_open():
    file = io.StringIO()
    rows = [dict(a=1), dict(b="é\n")]
    writer = r.StreamingJSONWriter(file)
    for row in rows:
        writer.write_item(row)
    writer.close()
    assert not file.closed
    assert json.loads(file.getvalue()) == rows
    empty = io.StringIO()
    with r.StreamingJSONWriter(empty):
        pass
    assert json.loads(empty.getvalue()) == []


def test_writer_is_atomic(path):
    r.write_json(path, {"old": 1})
    writer = r.StreamingJSONWriter(path)
    writer.write_item(dict(a=1))
    assert json.loads(path.read_text()) == {"old": 1}
    writer.close()
    assert r.read_rows(path) == [dict(a=1)]
    with pytest.raises(TypeError), r.StreamingJSONWriter(path) as out:
        out.write_item(object())
    good = GOOD["binary_feedback"]
    with pytest.raises(r.RecordError, match="record 2, not written: field `reward`"):
        r.write_records(path, [good, good | dict(reward=math.nan)])
    assert r.read_rows(path) == [dict(a=1)]
    assert os.listdir(path.parent) == [path.name]


def test_kill_leaves_the_old_file(path):
    r.write_json(path, ["old"])
    code = f"""
from halos_nb.records import StreamingJSONWriter
with StreamingJSONWriter({str(path)!r}) as out:
    for i in range(10**9):
        out.write_item(dict(i=i))
        if i == 1000:
            print(flush=True)
"""
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    job.stdout.readline()
    job.kill()
    job.wait()
    job.stdout.close()
    assert json.loads(path.read_text()) == ["old"]


@given(st.integers(0, 200))
@settings(deadline=None)
def test_a_torn_journal_line_is_gone(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("x") / "j.jsonl"
    for i in range(3):
        r.append_jsonl(path, dict(i=i, text="é" * i))
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    whole = r.read_jsonl(path)
    ended = data[: cut + 1].count(b"\n")  # a whole line may have lost its end
    assert [x["i"] for x in whole] == list(range(ended))
    r.append_jsonl(path, dict(i="new"), sync=True)
    assert r.read_jsonl(path) == whole + [dict(i="new")]


@pytest.mark.parametrize("last", ['[{"i": 1}, {"i": 2}]', "7", "i: 1", '{"i": 1} {"i": 2}'])
def test_what_no_writer_of_ours_has_left_is_never_cut_away(tmp_path, last):
    "An editor may have made something else of a journal; its labels were paid for."
    path = tmp_path / "j.jsonl"
    path.write_text('{"i": 0}\n' + last)
    for touch in (r.read_jsonl, lambda path: r.append_jsonl(path, dict(i=3))):
        with pytest.raises(r.RecordError, match="j.jsonl"):
            touch(path)
    assert path.read_text() == '{"i": 0}\n' + last


def test_two_processes_share_a_journal(tmp_path):
    path = tmp_path / "j.jsonl"
    code = """
import sys
from halos_nb.records import append_jsonl
for i in range(300):
    append_jsonl(sys.argv[1], dict(who=sys.argv[2], i=i, text="x" * 9000))
"""
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(path), who]) for who in "AB"]
    assert [j.wait() for j in jobs] == [0, 0]
    rows = r.read_jsonl(path)
    assert len(rows) == 600
    for who in "AB":
        assert [x["i"] for x in rows if x["who"] == who] == list(range(300))


conversations = st.lists(
    st.fixed_dictionaries(dict(role=texts, content=texts)), min_size=1, max_size=3
)


@given(conversations, conversations)
@settings(deadline=None)
def test_prompt_id_tells_conversations_apart(a, b):
    assert (r.prompt_id(a) == r.prompt_id(b)) == (a == b)
    assert len(r.prompt_id(a)) == 16
    assert int(r.prompt_id(a), 16) >= 0


def test_prompt_id_stays_what_it_is():
    # changing it would orphan every file written before
    assert r.prompt_id(PROMPT) == "1d652e37f3478736"


def test_hash_of_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "y").write_text("2")
    first = r.file_hash(tmp_path)
    os.utime(tmp_path / "y", (0, 0))
    assert r.file_hash(tmp_path) == first
    (tmp_path / "y").write_text("3")
    assert r.file_hash(tmp_path) != first


def test_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "p.jsonl"))
    with r.Progress(10, "steps", "train") as p:
        for i in range(10):
            p.update(loss=1 / (i + 1))
            time.sleep(0.03)
    rows = r.read_jsonl(tmp_path / "p.jsonl")
    last = rows[-1]
    assert rows[0]["done"] == 0
    assert (last["done"], last["loss"]) == (10, 0.1)
    assert 3 <= len(rows) < 10
    assert last["rate"] == pytest.approx(10 / last["seconds"])
    assert capsys.readouterr() == ("", "")
    # cannot be written; goes on
    with r.Progress(1, "steps", path=tmp_path / "no folder" / "p.jsonl") as p:
        p.update()
    monkeypatch.delenv("HALOS_NB_PROGRESS")
    with r.Progress(2, "steps", "train") as p:
        p.update(2, loss=0.5)
    assert "train" in capsys.readouterr().err


WRONG = {
    "[]": "",
    "7": "should be a list of records",
    "{}": "should be a list of records",
    "[7]": "record 1: should be an object",
    '[{"a": 1}, {}]': "record 1: field `prompt_id` is missing",
    '[{"a": 1}': "line 1",
    "[" * 100_000: "is nested more than 250 levels",
    "1" * 5_000: "o.json",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:9])
def test_what_is_no_list_of_records_is_named(tmp_path, text):
    "Summaries, report and monitor read samples and feedback by this."
    path = tmp_path / "o.json"
    path.write_text(text, encoding="utf-8")
    if not WRONG[text]:
        assert r.read_objects(path, type="sample") == []
        return
    with pytest.raises(r.RecordError, match=WRONG[text]) as e:
        r.read_objects(path, type="sample")
    assert str(path) in str(e.value)


def test_an_object_without_a_field_that_it_must_have_is_named(tmp_path):
    path = tmp_path / "o.json"
    path.write_text("{}", encoding="utf-8")
    assert r.read_object(path) == {}
    with pytest.raises(r.RecordError, match=re.escape(f"{path}: has no field `checks`")):
        r.read_object(path, "checks")


def test_a_folder_that_may_only_be_read_is_named(tmp_path, monkeypatch):
    "Not the hidden file that could not be made there."
    real = open

    def refused(file, *args, **more):
        if str(file).endswith((".tmp", ".lock")):
            raise OSError(errno.EROFS, "Read-only file system", str(file))
        return real(file, *args, **more)

    monkeypatch.setattr("builtins.open", refused)
    writers = (lambda path: r.write_json(path, {}), r.lock_file)
    for write, name in zip(writers, ("x.json", ".lock")):
        with pytest.raises(OSError, match="may only be read; give another place") as e:
            write(tmp_path / name)
        assert f"{tmp_path} may" in str(e.value)
        assert ".tmp" not in str(e.value)


def test_a_link_that_leads_nowhere_is_told(tmp_path):
    (tmp_path / "x.json").symlink_to("nowhere.json")
    (tmp_path / "loop").symlink_to("loop")
    told = "x.json is a link that leads nowhere, to nowhere.json"
    with pytest.raises(FileNotFoundError, match=told):
        r.read_rows(tmp_path / "x.json")
    assert "did you mean" not in r.nothing_at(tmp_path / "loop")


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a socket"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, monkeypatch, kind):
    "A pipe that nobody writes to keeps a reader for ever, and /dev/zero has no end."
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    path = Path("x.jsonl")
    with socket.socket(socket.AF_UNIX) as here:
        make = dict(zip(("a pipe", "a socket"), (os.mkfifo, lambda p: here.bind(str(p)))))
        make.get(kind, lambda p: p.symlink_to("/dev/zero"))(path)
        readers = (r.read_rows, r.read_jsonl, r.read_object, r.read_objects, r.file_bytes)
        if kind == "a pipe":
            readers += (lambda p: r.append_jsonl(p, {}),)
        for read in readers:
            with pytest.raises(r.RecordError, match=f"x.jsonl is {kind}, not a file; "):
                read(path)
        assert f"x.jsonl is {kind}" in r.nothing_at(path)


def test_where_nothing_is_one_sentence_says_so(tmp_path):
    (tmp_path / "x.json").symlink_to("gone.json")
    said = r.nothing_at(tmp_path / "x.json")
    link = "x.json is a link that leads nowhere, to gone.json"
    assert said == f"nothing is at {tmp_path}/x.json; {link}"

"""Files that are not what they should be, made from a seed, and what every reader says to them:
`python tests/malformed.py files 10000`, and judge's replies: `python tests/malformed.py replies
10000`. test_malformed.py has the short forms; `make soak` runs the long ones.

A reader may give the right rows, or an error that names the file (and the record and the field
where one of them was broken on purpose). It may not give other rows than Python's own JSON
finds, raise what another library or Python itself says, or take long.
"""

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20  # of CPU; a reader that takes more hangs
TURN = dict(role="user", content="How do I boil an egg? 🥚")
SAID = dict(role="assistant", content="In water.\nFor 7 minutes.")
DRAWN = dict(output_ids=[5, 6, 7], output_logps=[-0.5, -1.25, -0.125], finished=True)

GOOD = {
    "sample": dict(prompt_id="a1", sample_id=0, prompt=[TURN], output="7 minutes", **DRAWN)
    | dict(type="sample", split="train"),
    "scalar_feedback": dict(prompt_id="a1", sample_id=0, prompt=[TURN], output=[SAID])
    | dict(reward=1.5, type="scalar_feedback"),
    "binary_feedback": dict(prompt_id="a1", prompt=[TURN], output=[SAID], label=1)
    | dict(reward=0.5, type="binary_feedback"),
    "pairwise_feedback": dict(prompt_id="a1", prompt=[TURN], output_A=[SAID], output_B=[TURN])
    | dict(label=1, reward_A=2.0, reward_B=1.0, reward_difference=1.0)
    | dict(type="pairwise_feedback"),
    "label": dict(prompt_id="a1", sample_id=0, labeller="api:judge", score=8, reason="")
    | dict(reply="Final Score: 8", time=1.7e9, cost=0.25, type="label"),
    "comparison": dict(prompt_id="a1", sample_id_A=0, sample_id_B=1, labeller="human:me")
    | dict(winner="A", reason="", order="AB", type="comparison"),
    "preference": dict(prompt="How?", chosen="So.", rejected="Not so.", score_chosen=1.0),
    "unpaired": dict(prompt="How?", completion="So.", label=True),
    "completion": dict(prompt=[TURN], completion=[SAID]),
    "messages": dict(messages=[TURN, SAID]),
    "prompt": dict(prompt="How?", split="train"),
    "alpaca": dict(instruction="How?", output="So.", generator="me"),
}
RECORDS = ("sample", "scalar_feedback", "binary_feedback", "pairwise_feedback")
RECORDS += ("label", "comparison")
# fields without which a record is none
NEEDED = {
    "sample": "prompt_id sample_id prompt output",
    "scalar_feedback": "prompt_id sample_id prompt output reward",
    "binary_feedback": "prompt_id prompt output label reward",
    "pairwise_feedback": "prompt_id prompt output_A output_B label reward_A reward_B",
    "label": "prompt_id sample_id labeller score reason",
    "comparison": "prompt_id sample_id_A sample_id_B labeller winner reason order",
}
NEEDED |= {
    "preference": "chosen rejected",
    "unpaired": "prompt completion label",
    "completion": "prompt completion",
    "messages": "messages",
    "prompt": "prompt",
    "alpaca": "instruction output",
}
# what no field of ours can be
NEVER = [[], {}, [[]], {"a": 1}, [None], [1, "x"], [{"role": 1, "content": 2}]]
NEVER += [[{"role": "user"}], [{"content": "x"}], ["x"], [[{"role": "user", "content": "x"}]]]
ODD = [None, True, False, 0, -1, 2, 0.5, -0.0, 1e300, 2**53 + 1, 2**64, -(2**63) - 1, 10**30]
ODD += ["", " ", "0", "nan", "x" * 5000, "\x00", "\u2028", "é\u0301", "[]", "null", "🥚" * 50]


class Made(NamedTuple):
    "A file, and what is known of it."

    data: bytes | None  # None: it is a folder
    suffix: str
    kind: str  # of its records
    how: str  # what was done to it
    record: int = 0  # that was broken, from 1; 0: none was, or nobody knows
    field: str = ""  # that was broken


def rows_of(kind, rng, n):
    "Good records of a kind, each of its own prompt."
    rows = []
    for i in range(n):
        row = copy.deepcopy(GOOD[kind])
        for name in ("prompt_id", "instruction"):
            if name in row:
                row[name] = f"{row[name]} {i}"
        if isinstance(row.get("prompt"), str):
            row["prompt"] = f"{row['prompt']} {i}"
        elif "prompt" in row:
            row["prompt"][0]["content"] += f" {i}"
        if rng.random() < 0.2:
            row["note"] = rng.choice(ODD)
        rows.append(row)
    return rows


def nested(depth, rng):
    "A value that is nested so deep."
    x = "x"
    for _ in range(depth):
        x = [x] if rng.random() < 0.5 else {"a": x}
    return x


# ---- what is done to the records; each returns what it did, and what is broken by it


def drop_field(rows, kind, rng):
    i = rng.randrange(len(rows))
    name = rng.choice(NEEDED[kind].split())
    del rows[i][name]
    if i == 0 and kind not in RECORDS or name == "prompt":  # the first says which format it is
        return "field dropped", 0, ""
    return "field dropped", i + 1, name if kind in RECORDS else ""


def never_value(rows, kind, rng):
    i = rng.randrange(len(rows))
    name = rng.choice(NEEDED[kind].split())
    rows[i][name] = rng.choice(NEVER)
    return "a value of another kind", i + 1, name


def odd_value(rows, kind, rng):
    i = rng.randrange(len(rows))
    rows[i][rng.choice(sorted(rows[i]))] = rng.choice(ODD)
    return "an odd value", 0, ""


def inner_value(rows, kind, rng):
    "Something within a turn."
    row = rng.choice(rows)
    turns = [x for x in row.values() if isinstance(x, list) and x and isinstance(x[0], dict)]
    if turns:
        rng.choice(turns)[0][rng.choice(["role", "content", "tool_calls", "name"])] = (
            rng.choice(ODD + NEVER)
        )
    return "an odd value within a turn", 0, ""


def odd_riders(rows, kind, rng):
    "What rides on a prompt: tools, documents, a system turn, options."
    name = rng.choice(["tools", "documents", "system", "system_prompt", "chat_template_kwargs"])
    rng.choice(rows)[name] = rng.choice(ODD + NEVER + ['[{"type": "function"}]', "[1]"])
    return "an odd column", 0, ""


def other_record(rows, kind, rng):
    i = rng.randrange(len(rows))
    rows[i] = rng.choice(["text", 7, None, [rows[i]], True, []])
    # of lines whose first is no object the place is told as line and column
    return "no object", i + 1 if i else 0, ""


def other_kind(rows, kind, rng):
    i = rng.randrange(len(rows))
    rows[i] = copy.deepcopy(GOOD[rng.choice([k for k in GOOD if k != kind])])
    return "a record of another kind", 0, ""


def other_type(rows, kind, rng):
    i = rng.randrange(len(rows))
    rows[i]["type"] = rng.choice(["samples", "", 7, None, [], {}, "Sample", *RECORDS])
    return "another type", 0, ""


def same_ids(rows, kind, rng):
    for row in rows:
        for name in ("prompt_id", "sample_id"):
            if name in row:
                row[name] = rng.choice([0, 1, "0", "a1", -1, 2**70, 1.5, True, "", "\x00"])
    return "odd ids", 0, ""


def too_deep(rows, kind, rng):
    i = rng.randrange(len(rows))
    name = rng.choice(["note", "meta", *rows[i]])
    rows[i][name] = nested(
        rng.choice([50, 150, 200, 245, 246, 247, 248, 249, 250, 251, 252, 260, 400]), rng
    )
    return "nested deep", 0, ""


def list_of_ids(rows, kind, rng):
    rows[0]["output_ids"] = rng.choice(
        [[-1], [2**70], [1.0], ["1"], [True], "5", [[1]], [None]]
    )
    rows[0]["output_logps"] = rng.choice([None, [], [-0.5] * 2, ["x"], [1e400], "x", 5])
    return "odd ids of tokens", 0, ""


def many_fields(rows, kind, rng):
    rng.choice(rows).update({f"field {i} é": i for i in range(2000)})
    return "2,000 fields", 0, ""


def long_text(rows, kind, rng):
    row = rng.choice(rows)
    texts = [name for name, x in row.items() if isinstance(x, str)]
    if texts:
        row[rng.choice(texts)] = 'é\\"\n' * 100_000
    return "a long text", 0, ""


def nothing(rows, kind, rng):
    return "nothing", 0, ""


OF_RECORDS = [drop_field, never_value, odd_value, inner_value, odd_riders, other_record]
OF_RECORDS += [other_kind, other_type, same_ids, too_deep, list_of_ids, many_fields, long_text]
OF_RECORDS += [nothing]


# ---- how they are written


def as_json(rows, rng):
    "JSON as some writer writes it."
    how = rng.choice(["array", "lines", "indented", "ascii", "spaced"])
    options = dict(ensure_ascii=how == "ascii")
    if how == "lines" or rng.random() < 0.2:
        lines = [json.dumps(row, **options) for row in rows]
        return rng.choice(["\n", "\r\n", "\n\n"]).join(lines) + rng.choice(["", "\n"])
    if how == "indented":
        options["indent"] = 1
    if how == "spaced":
        options["separators"] = (" , ", rng.choice(["\t:", " : ", "\n:", ": "]))
    return json.dumps(rows, **options)


def cut(text, rng):
    return text[: rng.randrange(len(text))], "cut"


def repeat_key(text, rng):
    "A key twice, in spellings that a quick look does not see."
    key = rng.choice(["type", "prompt", "note", "output", "reward"])
    colon = rng.choice([":", " :", "\t:", "  :", ": ", "\n:"])
    twice = f'"{key}"{colon}1,"{key}"{colon}2'
    if rng.random() < 0.5:
        twice += rng.choice([',"x":"\\u0022:"', ',"x":"\\u0022: \\u0022:"', ',"x":"\\u003a"'])
    if rng.random() < 0.3:
        twice = f'"{key}"{colon}1,"\\u00{ord(key[0]):02x}{key[1:]}"{colon}2'
    at = text.find("{")
    if at < 0:
        return text, "nothing"
    return text[: at + 1] + twice + "," + text[at + 1 :], "a key twice"


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "-1e999", "9" * 400, "9" * 5000]
NUMBERS += [
    "18446744073709551616",
    "-9223372036854775809",
    "01",
    "+1",
    "1.",
    ".5",
    "0x10",
    "1_0",
]
NUMBERS += ["12345678901234567890123", "1e-999", "True", "None", "undefined", "1e5"]


def odd_number(text, rng):
    at = text.find("{")
    number = rng.choice(NUMBERS)
    if at < 0:
        return text, "nothing"
    return text[: at + 1] + f'"note": {number},' + text[at + 1 :], f"the number {number[:9]}"


ESCAPES = ["\\ud800", "\\udc00", "\\ud83d\\ud83d", "\\u0000", "\\x41", "\\u12", "\x01", "\t"]


def odd_escape(text, rng):
    at = text.find("{")
    escape = rng.choice(ESCAPES)
    place = rng.choice(
        [f'"note": "a{escape}b",', f'"a{escape}b": 1,', f'"prompt": "{escape}",']
    )
    if at < 0:
        return text, "nothing"
    return text[: at + 1] + place + text[at + 1 :], "an odd escape"


def mixed(text, rng):
    "Lines and arrays in one file, or two texts."
    more = rng.choice(
        ["[{}]", "{}", "[]", "null", "7", '"x"', text, "]", "}", ",", "//x", "\x00"]
    )
    joint = rng.choice(["\n", "", " ", ","])
    first = rng.random() < 0.3
    return (more + joint + text if first else text + joint + more), "lines and arrays mixed"


def brackets(text, rng):
    "Only the beginnings of very deep values."
    n = rng.choice([500, 5000, 100_000])
    deep = rng.choice(["[", '{"a":', '[{"a":'])
    return rng.choice(["", '[{"prompt": ', '{"prompt": ']) + deep * n, "brackets without end"


def one_letter(text, rng):
    at = rng.randrange(len(text))
    letter = rng.choice('[]{}",:\\ \n\t0a-é')
    return text[:at] + letter + text[at + rng.randrange(2) :], "one letter changed"


def as_it_is(text, rng):
    return text, ""


OF_TEXT = [cut, repeat_key, odd_number, odd_escape, mixed, brackets, one_letter]
OF_TEXT += [as_it_is] * 5


def latin(data, rng):
    text = data.decode(errors="replace").replace("🥚", "ü")
    return text.encode("latin-1", "replace"), "in Latin-1"


def bytes_changed(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :], "a byte changed"


def packed(data, rng):
    pack = rng.choice([gzip.compress, bz2.compress, lzma.compress])
    return pack(data), "packed"


def packed_and_cut(data, rng):
    whole, _ = packed(data, rng)
    what = rng.randrange(4)
    at = rng.randrange(6, len(whole))
    if what == 0:
        return whole[:at], "packed and cut"
    if what == 1:
        return whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :], "packed, a bit flipped"
    if what == 2:
        return whole + b"rubbish", "packed, with rubbish behind"
    return whole[: rng.randrange(1, 6)], "packed, only the mark"


MARKS = [b"PAR1", b"ARROW1\x00\x00", b"PK\x03\x04", b"\xff\xff\xff\xff", b"\x28\xb5\x2f\xfd"]
MARKS += [b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00", b"\x80\x04", b"\x89PNG", b"%PDF-1.4"]


def other_file(data, rng):
    return rng.choice(MARKS) + rng.choice(
        [b"", data[:50], os.urandom(0) + data]
    ), "another file"


def in_utf16(data, rng):
    text = data.decode(errors="replace")
    encoding = rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
    told = text.encode(encoding)
    return told[: len(told) - rng.choice([0, 0, 1, 3])], f"in {encoding}"


def zeros(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + b"\x00" * rng.choice([1, 8, 4096]) + data[at:], "with NUL bytes"


def empty(data, rng):
    return rng.choice([b"", b" ", b"\n\n", b"\xef\xbb\xbf", b"\x00", b"[]", b"{}", b"null"]), (
        "empty"
    )


def bomb(data, rng):
    return gzip.compress(b"[" + b" " * 30_000_000 + b"]"), "30 MB of spaces, packed"


def unchanged(data, rng):
    return data, ""


OF_BYTES = [latin, bytes_changed, packed, packed_and_cut, other_file, in_utf16, zeros, empty]
OF_BYTES += [unchanged] * 8


def as_table(rows, rng):
    "CSV or TSV of the records, perhaps broken; and its suffix."
    suffix = rng.choice([".csv", ".tsv"])
    out = io.StringIO(newline="")
    names = sorted({name for row in rows if isinstance(row, dict) for name in row})
    writer = csv.DictWriter(out, names, delimiter="," if suffix == ".csv" else "\t")
    writer.writeheader()
    writer.writerows(
        {k: str(v) for k, v in row.items()} for row in rows if isinstance(row, dict)
    )
    text = out.getvalue()
    what = rng.randrange(6)
    at = rng.randrange(len(text))
    if what == 0:
        text = text[:at]
    if what == 1:
        text = text[:at] + rng.choice(['"', ",", "\n", "\x00", "\t", "\r"]) + text[at:]
    if what == 2:
        text = text.replace("prompt", (names or ["x"])[-1])
    return text.encode(), suffix


def one_file(seed):
    "A malformed file of this seed."
    rng = random.Random(seed)
    kind = rng.choice(list(GOOD))
    rows = rows_of(kind, rng, rng.choice([1, 1, 2, 3, 7]))
    if rng.random() < 0.01:
        return Made(None, ".json", kind, "a folder")
    how, record, field = rng.choice(OF_RECORDS)(rows, kind, rng)
    suffix = rng.choice([".json", ".jsonl", ".json.gz", ""])
    if kind in ("preference", "unpaired", "completion", "prompt") and rng.random() < 0.15:
        try:
            data, suffix = as_table(rows, rng)
        except UnicodeEncodeError:
            data = b""
        return Made(data, suffix, kind, f"table, {how}")
    text = as_json(rows, rng)
    text, done = rng.choice(OF_TEXT)(text, rng)
    data = text.encode("utf-8", "surrogatepass")
    if data and not (done and rng.random() < 0.8):
        change = bomb if rng.random() < 0.002 else rng.choice(OF_BYTES)
        data, more = change(data, rng)
    else:
        more = ""
    said = ", ".join(word for word in (how, done, more) if word)
    only = not done and more in ("", "packed")
    return Made(data, suffix, kind, said, record if only else 0, field if only else "")


# ---- what is right


class Unreadable(Exception):
    "Python's own JSON, told to be strict, does not read it."


def only_once(pairs):
    if len(dict(pairs)) < len(pairs):
        raise Unreadable("a key twice")
    return dict(pairs)


def no_constant(name):
    raise Unreadable(name)


def strictly(text):
    "A JSON text as Python reads it; Unreadable where it is none, or says what nobody can use."
    try:
        value = json.loads(text, object_pairs_hook=only_once, parse_constant=no_constant)
        for part in (json.dumps(value, ensure_ascii=False).encode(),):
            del part
    except (ValueError, RecursionError) as e:
        raise Unreadable(str(e)) from None
    check_finite(value)
    return value


def check_finite(value):
    "No number without end, nothing of more than 250 levels."
    left = [(value, 0)]
    while left:
        x, depth = left.pop()
        if isinstance(x, float) and not math.isfinite(x):
            raise Unreadable("a number")
        if isinstance(x, dict | list) and depth >= 250:
            raise Unreadable("too deep")
        if isinstance(x, int) and len(str(abs(x)) if abs(x) < 10**400 else "9" * 400) > 309:
            raise Unreadable("a number")
        if isinstance(x, dict | list):
            parts = x.values() if isinstance(x, dict) else x
            left += [(part, depth + 1) for part in parts]


def unpacked(data):
    for mark, unpack in {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\x00": lzma}.items():
        if data.startswith(mark):
            try:
                return unpack.decompress(data)
            except (OSError, EOFError, ValueError, lzma.LZMAError, gzip.zlib.error) as e:
                raise Unreadable(str(e)) from None
    return data


def right_rows(data):
    "The rows that a file of JSON says; Unreadable if it says none."
    data = unpacked(data)
    try:
        text = data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as e:
        raise Unreadable(str(e)) from None
    try:
        whole = strictly(text)
        rows = whole if isinstance(whole, list) else [whole]
    except Unreadable:
        rows = [strictly(line) for line in text.split("\n") if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise Unreadable("no rows")
    return rows


def told(value):
    "A value with its types, to be compared."
    return json.dumps(value, sort_keys=True)


# ---- who reads


def readers(kind):
    "Name -> function of a path, for a file that should hold these."
    from halos_nb import data, hub_sets, label_input, records

    found = {
        "read_rows": records.read_rows,
        "file_rows": data.file_rows,
        "load_data": lambda path: hub_sets.load_data([path], None),
        "load_prompts": lambda path: hub_sets.load_prompts([path], None),
        "stream": lambda path: [row for row in hub_sets.json_lines(path)],
        "starts": hub_sets.holds_lines_of_prompts,
        "read_answers": label_input.read_answers,
    }
    if kind in RECORDS:
        found["read_records"] = lambda path: records.read_records(path, kind)
        found["get_feedback"] = data.get_feedback
    if kind == "sample":
        found["get_sampled_data"] = data.get_sampled_data
        found["read_samples"] = label_input.read_samples
    if kind in ("label", "comparison"):
        found["read_jsonl"] = records.read_jsonl
    return found


ROWS = ("read_rows", "file_rows", "read_records", "stream", "read_samples", "read_jsonl")


def told_by(kind):
    "The readers that name record and field of such a file."
    if kind == "alpaca":
        return ("read_answers",)
    if kind not in RECORDS:
        return ("load_data", "load_prompts")
    own = {"sample": ("get_sampled_data", "read_samples", "load_data", "load_prompts")}
    feedback = ("get_feedback", "load_data", "load_prompts")
    more = feedback if kind.endswith("feedback") else ()
    return ("read_records", *own.get(kind, more))


class TooLong(BaseException):
    "A reader takes longer than it may."


def too_long(*_):
    raise TooLong


def fault_of(name, read, path, made):
    "What is wrong with what a reader does with a file; empty if nothing is."
    from halos_nb.records import RecordError

    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        value = read(str(path))
    except (RecordError, ValueError) as e:
        own = type(e) in (ValueError, RecordError) or type(e).__module__.startswith("halos_nb")
        last = traceback.extract_tb(e.__traceback__)[-1].filename
        if not own or f"{os.sep}halos_nb{os.sep}" not in last:
            return f"{type(e).__name__} of {last}: {str(e)[:200]}"
        if path.name not in str(e):
            return f"does not name the file: {str(e)[:200]}"
        if made.record and name in told_by(made.kind):
            if f"record {made.record}" not in str(e):
                return f"does not name record {made.record}: {str(e)[:300]}"
            if made.field and f"`{made.field}" not in str(e):
                return f"does not name field {made.field}: {str(e)[:300]}"
        return "" if len(str(e)) < 3000 else "says too much"
    except OSError as e:
        return "" if path.name in str(e) else f"{type(e).__name__}: {e}"
    except TooLong:
        return f"takes more than {SECONDS} s"
    except BaseException as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        return f"{type(e).__name__}: {str(e)[:150]} ({last.filename}:{last.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if made.field and name in told_by(made.kind):
        return f"takes a record {made.record} whose `{made.field}` is broken"
    if name in ROWS and made.data is not None and made.suffix not in (".csv", ".tsv"):
        return other_rows(name, value, made)
    return ""


def other_rows(name, value, made):
    "Whether rows are others than the file says."
    try:
        right = right_rows(made.data)
    except Unreadable as e:
        if name == "read_jsonl":  # a line that is not ended counts as not written
            return ""
        if name == "stream" and (not value or "utf-" in made.how):  # a line of it is whole
            return ""
        return f"reads what is no JSON: {str(e)[:100]}"
    if name == "read_jsonl" and len(value) < len(right):
        right = right[: len(value)]
    return "" if told(value) == told(right) else "gives other rows than the file has"


def try_files(n, seed=0, say=lambda text: print(text, flush=True)):
    "Malformed files through every reader; returns the faults, and what was tried."
    folder = Path(tempfile.mkdtemp())
    signal.signal(signal.SIGVTALRM, too_long)
    faults, tried = [], Counter()
    slowest = (0.0, "")
    try:
        for i in range(seed, seed + n):
            made = one_file(i)
            path = folder / f"file-{i}{made.suffix}"
            path.mkdir() if made.data is None else path.write_bytes(made.data)
            start = time.process_time()
            for name, read in readers(made.kind).items():
                tried[made.how.split(",")[0]] += 1
                if problem := fault_of(name, read, path, made):
                    faults.append(f"seed {i}, {made.kind}, {made.how}: {name}: {problem}")
                    say(faults[-1])
            slowest = max(slowest, (time.process_time() - start, f"{made.kind}, {made.how}"))
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        shutil.rmtree(folder)
    say(f"slowest file: {slowest[0]:.2f} s of CPU, {slowest[1]}")
    say(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")
    return faults, tried


# ---- judge's replies: what is surely said must be read so, what is not must be unread

BEFORE = [
    "",
    "The answer is short and clear.\n",
    "It boils the egg.\n\n",
    "  ",
    "\ufeff",
    "## Verdict\n",
]
BEFORE += ["<think>I thought of a 3, then of B.</think>\n", "- clear\n- short\n\n", "\u200b"]
AFTER = ["", "\n", ".", " ", "\n\n", "\r\n"]
SURE_SCORES = [
    "Final Score: {}",
    "**Final Score: {}**",
    "Final Score: {}/10",
    "{}",
    "Score: {}",
]
SURE_SCORES += [
    "<score>{}</score>",
    "[[{}]]",
    '{{"score": {}}}',
    "FINAL SCORE: {}",
    "Rating: {}/10",
]
SURE_SCORES += [
    '```json\n{{"score": {}}}\n```',
    "Final Score = {}",
    "Final Score: \\boxed{{{}}}",
]
UNSURE_SCORES = [
    "Final Score: {}-{}",
    "Final Score: {} to {}",
    "Final Score: {}/100",
    "Final Score: {}%",
]
UNSURE_SCORES += [
    "Final Score: {}\nFinal Score: {}",
    "Final Score: {} or {}",
    "Final Score: {}±{}",
]
UNSURE_SCORES += ["Final Score: {} minus {}", "Final Score: not {}", "Final Score: {}..{}"]
UNSURE_SCORES += [
    "Final Score: {}\nWait, make it {}",
    "Final Score: {}~{}",
    "Final Score: {},000",
]
UNSURE_SCORES += [
    '{{"score": {}, "score": {}}}',
    '{{"score": {}',
    '{{"score": [{}]}}',
    "<score>{}–{}</score>",
]
UNSURE_SCORES += [
    "<think>Final Score: {}",
    "I would not give {} out of 10",
    '{{"score": true}}',
    "[[{}]] [[{}]]",
]
SURE_WINNERS = [
    "Winner: {}",
    "[[{}]]",
    '{{"winner": "{}"}}',
    "{}",
    "**Winner: {}**",
    "<winner>{}</winner>",
]
UNSURE_WINNERS = [
    "Winner: {} or {}",
    "Winner: not {}",
    "[[{}]] [[{}]]",
    '{{"winner": "{}", "winner": "{}"}}',
]
UNSURE_WINNERS += [
    "Winner: {}\nWinner: {}",
    "<think>Winner: {}",
    '{{"winner": ["{}"]}}',
    "Winner: {}, but {}",
]
NOISE = "AB 0123456789.,-–/%{}[]()<>\"'`*_#:\n\tscorewinnerfinal½٣８Ａ\u200b\u202e\x00🥚"


def one_reply(seed):
    "A reply, who reads it, and what it says: a value, None (unread) or ... (anybody's guess)."
    rng = random.Random(seed)
    first, second = rng.sample(range(11), 2)
    scores = rng.random() < 0.6
    if not scores:
        first, second = rng.sample(["A", "B"], 2)
    what = rng.randrange(5)
    if what < 2:
        said = rng.choice(SURE_SCORES if scores else SURE_WINNERS).format(first)
        alone = not said.strip("0123456789AB")
        before = "" if alone else rng.choice(BEFORE)
        return before + said + rng.choice(AFTER), scores, float(first) if scores else first
    if what < 4:
        said = rng.choice(UNSURE_SCORES if scores else UNSURE_WINNERS).format(first, second)
        return rng.choice(BEFORE) + said + rng.choice(AFTER), scores, None
    noise = "".join(rng.choices(NOISE, k=rng.choice([5, 40, 400])))
    if rng.random() < 0.1:
        noise *= rng.choice([100, 1000])
    return noise, scores, ...


def reply_fault(seed):
    "What is wrong with how a reply is read; empty if nothing is."
    from halos_nb.replies import read_number, read_winner

    reply, scores, right = one_reply(seed)
    read = read_number if scores else read_winner
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        value, reason = read(reply)
    except TooLong:
        return f"takes more than {SECONDS} s: {reply[:80]!r}"
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:100]}: {reply[:80]!r}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if (value is None) != bool(reason):
        return f"{value} with the reason {reason!r}: {reply[:80]!r}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no score: {reply[:80]!r}"
    if right is not ... and value != right:
        return f"reads {value} ({reason}), says {right}: {reply[:120]!r}"
    return ""


def try_replies(n, seed=0):
    "Judge's replies through their readers; returns the faults, and what was tried."
    signal.signal(signal.SIGVTALRM, too_long)
    faults, tried = [], Counter()
    for i in range(seed, seed + n):
        right = one_reply(i)[2]
        tried["noise" if right is ... else "unsure" if right is None else "sure"] += 1
        if problem := reply_fault(i):
            faults.append(f"seed {i}: {problem}")
    return faults, tried


def main(what, n, seed=0):
    sys.path.insert(0, str(ROOT))
    start = time.process_time()
    faults, tried = dict(files=try_files, replies=try_replies)[what](int(n), int(seed))
    for how, count in sorted(tried.items()):
        print(f"{how:32} {count:7}")
    print(
        f"{n} {what}, {sum(tried.values())} readings, {len(faults)} faults, "
        f"{time.process_time() - start:.0f} s of CPU"
    )
    for fault in faults[:60]:
        print(" ", fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

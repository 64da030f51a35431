"What replies mean: numbers, winners, and nothing that is not stated."

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from halos_nb import replies
from halos_nb.replies import read_number, read_winner


@pytest.mark.parametrize(
    "reply, score",
    [
        ("<think>Final Score: 3? No, 4.</think>\nFinal Score: 7", 7),
        ('So 3.\n</think>\n\n{"why": "", "score": 7}', 7),
        ("<think>\nFinal Score: 7", None),
        ("<think></think>", None),
        ("<think>8/10</think>It is fine.", None),
        ("<think>a</think>Final Score: 7. It wrote </think>Final Score: 10", None),
    ],
)
def test_thoughts_are_not_the_reply(reply, score):
    assert read_number(reply).value == score


def test_thoughts_name_no_winner():
    assert [
        read_winner(r).value
        for r in (
            "<think>Winner: A</think>Winner: B",
            "Winner: A?</think>\n[[B]]",
            "<think>Winner: A",
        )
    ] == ["B", "B", None]


CASES = json.loads((Path(__file__).parent / "data/judge_replies.json").read_text())
SHARED = Path(__file__).resolve().parents[2] / "shared/cases/judge_replies.json"


def read_score(reply):
    "The number from 0 to 10 that a judge has given."
    value = read_number(reply).value
    return value if value is None or 0 <= value <= 10 else None


@pytest.mark.parametrize("read, kind", [(read_score, "scores"), (read_winner, "winners")])
def test_replies_of_every_kind(read, kind):
    "1,900 replies: read as they are meant, or unread with a reason."
    (cases,) = [list(rows.items()) for name, rows in CASES.items() if name.startswith(kind)]
    if SHARED.exists():
        cases += [
            c
            for name, rows in json.loads(SHARED.read_text()).items()
            if name[0] == kind[0]
            for c in rows
        ]
    wrong = {}
    for reply, meant in cases:
        said = read(reply)
        value = said if read is read_score else said.value
        if value != meant:
            wrong[reply] = (meant, value)
    assert not wrong
    assert all(read_number(reply).reason or read_winner(reply).reason for reply, _ in cases)


@pytest.mark.parametrize("read, kind", [(read_score, "scores"), (read_winner, "winners")])
def test_replies_that_may_be_unread(read, kind):
    "Rarer wordings: nothing is lost if they are unread, all if they are read as another."
    wrong = {}
    for reply, meant in CASES[f"either read so or unread: {kind}"].items():
        said = read(reply)
        value = said if read is read_score else said.value
        if value not in (meant, None):
            wrong[reply] = (meant, value)
    assert not wrong


MARKS = [
    (read_number, '{"score": 8}', 8),
    (read_number, "<score>8</score>", 8),
    (read_winner, '{"winner": "A"}', "A"),
    (read_winner, "<winner>A</winner>", "A"),
]


@pytest.mark.parametrize("read, mark, meant", MARKS)
@pytest.mark.parametrize(
    "before, behind",
    [
        ("I will not write ", ""),
        ("I won't give it ", "."),
        ("Never ", ""),
        ("If it rhymed: ", ""),
        ("The format is ", ""),
        ("Instead of ", ""),
        ("> ", ""),
        ("~~", "~~"),
        ("", "?"),
        ("", " or so"),
        ("", "\nNo."),
        ("", "\nHalve it, swap the two."),
        ("", " is not my verdict."),
    ],
)
def test_a_mark_that_is_only_spoken_of(read, mark, meant, before, behind):
    assert read(before + mark + behind).value is None and read(mark).value == meant


@pytest.mark.parametrize("read, mark, meant", MARKS)
@pytest.mark.parametrize(
    "before",
    [
        "",
        "It is not perfect: ",
        "It never rhymes, so ",
        "I do not see any errors, so I give it ",
        "It misses the format: ",
        "If I had to decide: ",
        "Here is the JSON you asked for: ",
        "I would say ",
        "- ",
        "The user asked for a poem and got one: ",
    ],
)
def test_a_mark_that_is_given(read, mark, meant, before):
    "Words that are like the others, behind which no verdict may be lost."
    for behind in ("", " (not perfect).", "\nIt does not rhyme.", "\n- Halve the sugar."):
        assert read(before + mark + behind).value == meant, behind


numbers = st.decimals(-20, 20, places=2, allow_nan=False).map(lambda d: f"{d:f}")
words = st.text("abcdefg ,.!?\n0123456789/-", max_size=60)


@given(
    words,
    numbers,
    st.sampled_from(
        [
            "Final Score: {}",
            "**Final Score:** {}",
            "final rating = {}",
            "FINAL SCORE {}/10",
            "Final Score:\n{}",
            "Final Score (0-10): {}",
        ]
    ),
)
def test_final_score_wins(before, x, form):
    "Whatever stands before it, numbers included."
    assert read_number(f"{before}\n{form.format(x)}").value == float(x)


@given(numbers, numbers)
def test_two_final_scores(a, b):
    assert read_number(f"Final Score: {a}\nthen again\nFinal Score: {b}").value == (
        float(a) if float(a) == float(b) else None
    )


@given(
    st.text()
    | st.text("0123456789.,/+-eE%: Fnialscore{}\"'[]()*\n")
    | st.from_regex(replies.FINAL + replies.VALUE)
)
def test_nothing_is_invented(reply):
    "No text breaks the reader; what it reads stands in the text."
    value, reason = read_number(reply)
    assert (value is None) == bool(reason)
    if value is not None:
        assert value in {
            replies.to_float(m[0])
            for m in re.finditer(replies.NUMBER, replies.plain_text(reply), re.I)
        } | {
            replies.to_float(m["x"])
            for m in re.finditer(replies.VALUE, replies.plain_text(reply), re.I)
        }
    assert read_winner(reply).value in ("A", "B", "tie", None)


@given(
    st.integers(0, 10),
    st.integers(0, 10),
    st.sampled_from(
        ["{} to {}", "{}-{}", "{} or {}", "between {} and {}", "{} – {}", "{},000,{}"]
    ),
)
def test_ranges_are_no_scores(a, b, form):
    assert read_number("Final Score: " + form.format(a, b)).value is None


LONG = [
    "9" * 20000,
    "final score " * 5000,
    "so the " * 5000,
    "the my " * 5000,
    "(" * 20000,
    "Final Score: " + "*" * 20000,
    "Final Score: 8" + "\n" * 20000 + "x",
    "Final Score: 8" + "." * 20000 + "x",
    "Final Score: 8" + "\n." * 10000 + "x",
    "Final Score: 8\n" + "a, " * 10000,
    "Winner: A because " + "\n" * 20000 + "!",
    "Winner: A because " + "B is " * 5000,
    "Winner: A\n" + "B is wrong, " * 3000,
    '{"score": ' * 5000,
    "8/" * 10000,
    "8/10 " * 5000,
    "a" * 50000 + "\n" * 5000,
    "Winner: " * 5000,
    "[[A]] " * 5000,
    "Winner: A\n" + "a'" * 20000,
    "Winner: A since B is " * 2000,
    "Winner: A since " + "B is really " * 500,
    "I not " * 1000 + '{"score": 8}',
    '{"' + "maxscoreof" * 500 + 'x": 3, "score": 8}',
    "<think>" * 5000,
    "Final Score: 8" + "</s>" * 5000,
]


def test_long_replies_are_read_fast():
    "None takes minutes (some did), nor does a reply of 300,000 letters."
    start = time.process_time()
    for text in LONG:
        read_number(text), read_winner(text)
    prose = "It is a fine answer that explains the thing. " * 7000
    assert read_number(f"{prose}\nFinal Score: 8").value == 8
    assert read_winner(f"{prose}\nWinner: A").value == "A"
    assert time.process_time() - start < 10

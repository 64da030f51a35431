"""Files and judge's replies that are not what they should be, made from seeds (malformed.py).

A few hundred of each here; `make soak` tries ten thousand.
"""

import os

import pytest
from malformed import try_files, try_replies

from halos_nb.records import RecordError, parse_json, read_jsonl
from halos_nb.templates import TemplateEndless, byte_tokenizer, limited_time, render

SOAK = os.environ.get("HALOS_NB_LONG") == "soak"
HI = [dict(role="user", content="Hi!")]


def test_malformed_files_are_told_or_read_right(tmp_path, monkeypatch):
    monkeypatch.setenv("HALOS_NB_CACHE_DIR", str(tmp_path))
    faults, tried = try_files(10_000 if SOAK else 300)
    print(dict(tried))
    assert not faults, "\n".join(faults[:20])


def test_replies_are_read_right_or_unread():
    faults, tried = try_replies(10_000 if SOAK else 1000)
    print(dict(tried))
    assert not faults, "\n".join(faults[:20])


TWICE = [
    b'{"a": 1, "a": 2}',
    b'{"a"\t: 1, "a"\n:2}',
    b'{"a"  :1,"a"  :2}',
    b'{"a":1,"\\u0061":2}',
    b'{"a":1,"a":2,"b":"\\u0022:"}',
    b'{"a":1,"a":2,"b":"\\u003ax"}',
]


@pytest.mark.parametrize("text", TWICE)
def test_a_key_that_stands_twice_is_seen_however_it_is_spelt(text, tmp_path):
    assert parse_json(text, "x").key == "a"
    (tmp_path / "labels.jsonl").write_bytes(text.replace(b"\n", b" ") + b"\n")
    with pytest.raises(RecordError, match="labels.jsonl, line 1: field `a` stands there twice"):
        read_jsonl(tmp_path / "labels.jsonl")


def test_many_keys_of_which_one_stands_twice_take_no_time():
    keys = ",".join(f'"k{i}":1' for i in range(50_000))
    with limited_time(10):
        assert parse_json(b'{%s,"k7":2}' % keys.encode(), "x").key == "k7"


GROWS = "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    GROWS + "{% endfor %}{{ n.x }}": "takes more than .* of memory",
    "{{ 'x' * 100000000 }}": "writes 100,000,000 letters",
    "{{ 'x'.ljust(10**8) }}": "writes 100,000,000 letters",
}


def refusal_of(template):
    "What is said of a template."
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RecordError) as told:
        render(tokenizer, HI, where="f.json, record 3")
    return told


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_without_end_is_told_by_name(template):
    told = refusal_of(template)
    assert told.type is TemplateEndless
    told.match(f"f.json, record 3: the chat template {ENDLESS[template]}")


def test_a_template_that_computes_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr("halos_nb.templates.limited_time.__wrapped__.__defaults__", (1.0,))
    told = refusal_of(NESTED)
    assert told.type is TemplateEndless
    told.match("f.json, record 3: the chat template computes for more than 1 second")


REFUSED = {
    "{{ raise_exception('no system turn') }}": "no system turn",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}": "SecurityError",
    "{% for i in range(10**9) %}x{% endfor %}": "OverflowError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% include '/etc/passwd' %}": "TypeError",
    "{% for m in messages": "TemplateSyntaxError",
}


@pytest.mark.parametrize("template", REFUSED)
def test_a_template_that_is_refused_says_why(template):
    refusal_of(template).match(f"f.json, record 3.*{REFUSED[template]}")

"The client for OpenAI-compatible servers: what stops it, what it keeps, what it never says."

import asyncio
import base64
import random
import time
from collections import deque
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

from halos_nb import api
from halos_nb.api import ServerError, answer_or_error, ask_all, excerpt, hide, is_hopeless
from halos_nb.configs import LabelConfig, LoopConfig, config_json, make_config
from halos_nb.settings import notebook_config, parse_args

KEY = "the-key-of-the-test"


class Refusal(Exception):
    def __init__(self, message="no", **more):
        super().__init__(message)
        vars(self).update(more)


async def raised(error):
    raise error


@pytest.mark.parametrize(
    "error, hopeless",
    [
        (Refusal(status_code=401), True),
        (Refusal(status_code=402), True),
        (Refusal(status_code=404), True),
        (Refusal(status_code=429, code="insufficient_quota"), True),
        (Refusal(status_code=400, param="temperature"), True),
        (Refusal(status_code=400), False),
        (Refusal(status_code=403), False),  # a filter has flagged this one question
        (Refusal(status_code=429), False),
        (Refusal(status_code=500), False),
        (OSError("lost"), False),
        (TimeoutError(), False),
    ],
    ids=str,
)
def test_what_is_hopeless_stops_and_the_rest_is_a_value(error, hopeless):
    assert is_hopeless(error) == hopeless
    work = answer_or_error(raised(error), 5, "m")
    if hopeless:
        with pytest.raises(ServerError, match="m: Refusal: no"):
            asyncio.run(work)
    else:
        assert asyncio.run(work) is error


def test_a_deadline_is_for_all_of_it():
    async def drip():
        for _ in range(100):
            await asyncio.sleep(0.05)

    start = time.monotonic()
    assert isinstance(asyncio.run(answer_or_error(drip(), 0.12, "m")), TimeoutError)
    assert time.monotonic() - start < 2


@settings(deadline=None)
@given(st.text(), st.text())
def test_the_key_is_in_no_message(before, behind):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", f" {KEY}\n")
        text = f"{before}{KEY}{behind}"
        assert KEY not in hide(text)
        assert KEY not in excerpt(SimpleNamespace(said=text), 10_000)
        assert KEY not in api.describe(ValueError(text))
        patch.delenv("OPENAI_API_KEY")
        assert hide(text) == text


PASTED = "sk-" + "a1B2c3D4e5F6" * 3  # put together here, so that no secret is written down


@pytest.mark.parametrize(
    "key",
    ["AKIA" + "IOSFODNN7PQRSTUV", "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0In0" + ".c2ln"],
)
def test_keys_of_capitals_and_signed_tokens_are_no_parameters(key):
    "An access key of AWS, and a token such as a gateway's."
    with pytest.raises(ValueError, match="api_model: holds what looks like a key") as e:
        notebook_config(LoopConfig, dict(run_name="x", api_model=key))
    assert key not in str(e.value)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: notebook_config(LoopConfig, dict(judge_url=f"http://x/v1?key={PASTED}")),
        lambda: notebook_config(LoopConfig, dict(run_name=PASTED)),
        lambda: notebook_config(LoopConfig, dict(label_options=dict(system_prompt=PASTED))),
        lambda: make_config(LabelConfig, samples_file="s", output_file="f", api_key=PASTED),
        lambda: parse_args(LabelConfig, ["--api_model", PASTED, "s.json", "f.json"]),
        lambda: parse_args(LabelConfig, [f"--api_model={PASTED}", "s.json", "f.json"]),
        lambda: parse_args(LabelConfig, ["s.json", PASTED]),
        lambda: config_json(LabelConfig(samples_file="s", output_file="f", function=PASTED)),
    ],
)
def test_a_secret_is_no_parameter(monkeypatch, make, known):
    "It is refused at once, by its look or its value, with what is to be cleaned."
    if known:
        monkeypatch.setenv("SOME_API_KEY", PASTED)
    with pytest.raises(ValueError, match="holds") as e:
        make()
    said = str(e.value)
    for where in ("executed notebook", "params.json", "shell's history"):
        assert where in said
    assert PASTED not in said and PASTED[3:12] not in said
    assert ("the value of SOME_API_KEY" in said) == known


@pytest.mark.parametrize("key", ["0", "-", "none", "gpt-4o", "playground", "any text"])
def test_words_are_no_secrets(monkeypatch, key):
    "Also where a variable with the name of a key has them."
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("HF_TOKEN", key)
    assert notebook_config(LoopConfig, dict(run_name="gpt-4o")).run_name == "gpt-4o"
    text = f"Final Score: 10, range 7-8, {key}"
    assert hide(text) == text


def run_workers(questions, ask, workers=3, most_failures=4):
    todo = deque(questions)
    take = lambda: todo.popleft() if todo else None
    asyncio.run(ask_all(take, ask, workers, most_failures))
    return list(todo)


def test_workers_take_question_after_question():
    busy, busiest, kept = 0, 0, []

    async def ask(question):
        nonlocal busy, busiest
        busy += 1
        busiest = max(busiest, busy)
        await asyncio.sleep(random.random() / 100)
        busy -= 1
        kept.append(question)
        return ""

    assert run_workers(range(1, 30), ask) == []
    assert sorted(kept) == list(range(1, 30))
    assert busiest == 3


def test_what_is_in_flight_when_it_stops_is_kept():
    "An answer that was asked for is paid for, whatever another worker has met meanwhile."
    kept = []

    async def ask(question):
        if question == 3:
            raise ServerError("no credit")
        await asyncio.sleep(0.05)
        kept.append(question)
        return ""

    with pytest.raises(ServerError, match="no credit"):
        run_workers(range(1, 30), ask)
    assert kept == [1, 2]


def test_failures_in_a_row_stop_and_an_answer_between_them_does_not():
    asked = []

    async def ask(question):
        asked.append(question)
        return "" if question % 4 == 0 else f"no {question}"

    assert run_workers(range(1, 30), ask, workers=1) == []
    with pytest.raises(ServerError, match="4 requests in a row failed, the last one: no 15"):
        run_workers([1, 2, 3, 4, 9, 10, 11, 15, 16], ask, workers=1)
    assert asked[-1] == 15


def test_an_error_of_our_own_is_not_hidden():
    async def ask(question):
        raise OSError("no room for another line")

    with pytest.raises(OSError, match="no room"):
        run_workers(range(1, 5), ask)


HIDDEN = "a1B2" + "c3D4e5F6g7H8"  # put together, as above
KEPT_AT = {  # variable and value, and what a server repeats
    "Bearer": ("OPENAI_API_KEY", f"Bearer {HIDDEN}", HIDDEN),
    "a blank within": ("OPENAI_API_KEY", f"{HIDDEN} {HIDDEN[::-1]}", HIDDEN),
    "headers": ("OPENAI_CUSTOM_HEADERS", f"X-Name: {HIDDEN}\nX-Other: no", HIDDEN),
    "a proxy's": ("HTTPS_PROXY", f"http://me:{HIDDEN}@proxy:3128", f"me:{HIDDEN}"),
    "a database's": ("DATABASE_URL", f"postgres://me:{HIDDEN}@h/db", HIDDEN),
}


@pytest.mark.parametrize("name, value, echo", KEPT_AT.values(), ids=KEPT_AT)
def test_a_secret_is_known_wherever_the_environment_has_it(monkeypatch, name, value, echo):
    "Also behind another word, among headers, and as the password of an address."
    monkeypatch.setenv(name, value)
    for said in (
        echo,
        base64.b64encode(echo.encode()).decode(),
        f"Basic {echo.encode().hex()}",
    ):
        assert said not in hide(f"wrong: {said}!") and "[key]" in hide(f"wrong: {said}!")
    assert (
        hide("wrong: Bearer, me, X-Name, proxy:3128") == "wrong: Bearer, me, X-Name, proxy:3128"
    )


ENCODED = {
    "base64": base64.b64encode(f"me:{HIDDEN}".encode()).decode(),
    "base64 for addresses": base64.urlsafe_b64encode(f"x{HIDDEN}".encode()).decode(),
    "hex": HIDDEN.encode().hex().upper(),
    "percent": "".join(f"%{ord(c):02x}" for c in HIDDEN),
    "two words": f"{HIDDEN[:7]} {HIDDEN[7:]}",
    "two strings": f'{HIDDEN[:7]}" "{HIDDEN[7:]}',
    "backwards": HIDDEN[::-1],
}


@pytest.mark.parametrize("said", ENCODED.values(), ids=ENCODED)
def test_an_encoded_secret_is_no_parameter(monkeypatch, said):
    monkeypatch.setenv("SOME_API_KEY", HIDDEN)
    for parameters in (
        dict(judge_url=f"http://x/v1/{said}"),
        dict(label_options={"system_prompt": said}),
    ):
        with pytest.raises(ValueError, match="holds the value of SOME_API_KEY") as told:
            notebook_config(LoopConfig, parameters)
        assert said not in str(told.value)

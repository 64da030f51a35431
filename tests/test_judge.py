"An API judge over real HTTP: its faults, what a killed run has paid, where the key is not."

import asyncio
import base64
import codecs
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import socketserver
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

import golden
from halos_nb import api, judge
from halos_nb.configs import LabelConfig, config_json
from halos_nb.replies import read_number
from halos_nb.api import ServerError, ask_all, run_async
from halos_nb.judge import Judge, interpret, process_samples_with_api
from halos_nb.label import main
from halos_nb.verdicts import pair_table
from halos_nb.records import (
    RecordError,
    as_turns,
    prompt_id,
    read_jsonl,
    read_records,
    write_records,
)

KEY = "sk-" + "Zx9" * 10  # put together here, so that no secret is written down

# ---- what was intended, with the golden replies


@golden.cases("api_scores")
def test_golden_replies(case):
    """The number that was intended; None where nothing should be read.

    Where two readings are possible ours is the strict one: none. A score outside the range is
    read, then refused.
    """
    reading = read_number(case["reply"] or "")
    wanted = None if case.get("ambiguous") else case["intended"]
    assert reading.value == wanted, reading
    assert bool(reading.reason) == (wanted is None), reading
    row = interpret(dict(reply=case["reply"] or "", reason=""), Judge("m"))
    assert row["score"] == (wanted if wanted is not None and 0 <= wanted <= 10 else None)
    assert bool(row["reason"]) == (row["score"] is None)


class Pretend:
    "A client, asynchronous or not, that answers with a text, with nothing, or with an error."

    def __init__(self, reply, sync):
        async def later(**kw):
            return self.create(**kw)

        self.reply = reply
        self.chat = SimpleNamespace(
            completions=SimpleNamespace(create=self.create if sync else later)
        )

    def create(self, *, model, messages):
        if isinstance(self.reply, Exception):
            raise self.reply
        return SimpleNamespace(
            choices=[
                SimpleNamespace(
                    message=SimpleNamespace(content=self.reply), finish_reason="stop"
                )
            ]
        )


@pytest.mark.parametrize("sync", [True, False])
@golden.cases("api_scores")
def test_golden_process_samples(case, sync):
    "The same through the predecessor's function; no reply is unscored and never a 0."
    client = Pretend(OSError("down") if case["kind"] == "exception" else case["reply"], sync)
    samples = make_samples(3)
    kept = json.dumps(samples)
    out = asyncio.run(
        process_samples_with_api(samples, client, "You judge.", "Rate this.", "m", batch_size=2)
    )
    wanted = (
        None
        if case.get("ambiguous") or case["intended"] is None or not 0 <= case["intended"] <= 10
        else case["intended"]
    )
    assert [s["reward"] for s in out] == [wanted] * 3
    assert [s["sample_id"] for s in out] == [s["sample_id"] for s in samples]
    assert json.dumps(samples) == kept
    assert all(bool(s["reason"]) == (wanted is None) for s in out)


# ---- a server that plays the judge, on loopback

FAULTS = (
    "429 after",
    "429",
    "500",
    "hang",
    "drop",
    "torn",
    "empty",
    "nothing",
    "garbage",
    "html",
    "error body",
    "bad json",
    "drip",
    "null",
    "wrong",
    "mumble",
)


def make_samples(n, per_prompt=4):
    prompts = [as_turns(f"Question {p}?", "user") for p in range(-(-n // per_prompt))]
    return [
        dict(
            prompt_id=prompt_id(p), sample_id=k, prompt=p, output=f"Answer #{i}#", type="sample"
        )
        for i in range(n)
        for p, k in [(prompts[i // per_prompt], i % per_prompt)]
    ]


def truth(i):
    return i * 7 % 101 / 10


def completion(text, n=40):
    return dict(
        id="x",
        object="chat.completion",
        created=1,
        model="toy",
        choices=[
            dict(index=0, message=dict(role="assistant", content=text), finish_reason="stop")
        ],
        usage=dict(prompt_tokens=n, completion_tokens=10, total_tokens=n + 10),
    )


def http(status, body, kind="application/json", size=None, more=""):
    "The bytes of a response."
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(data) if size is None else size
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
    return f"{head}{more}\r\n".encode() + data


def error(message, **more):
    return dict(error=dict(message=message, **more))


GOOD = json.dumps(completion("Final Score: 3")).encode()
SAID = {  # fault: what the server sends, all at once
    "429 after": http(429, error("slow down"), more="Retry-After: 0.1\r\n"),
    "429": http(429, error("slow down")),
    "500": http(500, error(f"bad key {KEY}?")),
    "torn": http(200, GOOD[:50], size=len(GOOD)),
    "empty": http(200, b""),
    "nothing": http(200, completion("")),
    "garbage": http(200, bytes(range(128, 256))),
    "html": http(200, b"<html><body>Sign in: 7</body></html>", "text/html"),
    "error body": http(200, error(f"overloaded, {KEY}", code=502) | dict(choices=None)),
    "bad json": http(200, GOOD[:-30]),
    "null": http(200, completion(None)),
    "wrong": http(200, completion("Final Score: 11")),
    "mumble": http(200, completion(f"It has 3 merits and 2 faults. {KEY}")),
}


class Server:
    """HTTP by hand, so that it can be broken in every way.

    `answer(body, times)` gives a text, the name of a fault, or (status, object).
    """

    def __init__(self, answer, late=0):
        self.answer = answer
        self.late = late  # seconds
        self.heard = []
        self.seen = Counter()
        self.keys = set()
        self.loop = asyncio.new_event_loop()

    def __enter__(self):
        ready = threading.Event()

        async def serve():
            self.server = await asyncio.start_server(self.talk, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
            ready.set()

        self.loop.create_task(serve())
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *error):
        async def stop():
            self.server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    async def talk(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                fields = {
                    k.lower(): v
                    for k, _, v in (
                        line.partition(": ") for line in head.decode().split("\r\n")
                    )
                }
                body = json.loads(await reader.readexactly(int(fields["content-length"])))
                text = body["messages"][-1]["content"]
                self.heard.append(body)
                self.keys.add(fields.get("authorization"))
                self.seen[text] += 1
                if not await self.reply(writer, self.answer(body, self.seen[text])):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def reply(self, writer, what):
        "Answer as told; False if the connection is to end."
        if what == "hang":
            await asyncio.sleep(3)
        if self.late:
            await asyncio.sleep(self.late)
        if what == "drip":
            writer.write(http(200, b"", size=len(GOOD)))
            for byte in GOOD:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
        elif isinstance(what, bytes):
            writer.write(what)
        elif isinstance(what, tuple):
            status, body = what
            writer.write(http(status, body))
        elif what in SAID:
            writer.write(SAID[what])
        elif what not in FAULTS:
            writer.write(http(200, completion(what)))
        await writer.drain()
        return what not in ("hang", "drop", "torn")


def number_of(body):
    return int(re.search(r"Answer #(\d+)#", body["messages"][-1]["content"])[1])


def config(server, folder, n=None, **more):
    if n:
        write_records(folder / "samples.json", make_samples(n))
    given = dict(
        samples_file=str(folder / "samples.json"),
        output_file=str(folder / "feedback.json"),
        api_type="openai",
        api_model="toy",
        base_url=server.url,
        max_retries=2,
        batch_size=8,
        request_timeout=5,
    )
    return LabelConfig(**given | more)


def answers(journal):
    return {
        (r["prompt_id"], r["sample_id"]): r
        for r in read_jsonl(journal)
        if r["reply"] is not None
    }


def flags(cfg, **more):
    usual = {f.name: f.default for f in fields(LabelConfig)}
    kept = {
        k: v
        for k, v in (asdict(cfg) | more).items()
        if k not in ("samples_file", "output_file") and v != usual[k]
    }
    return [
        sys.executable,
        "-m",
        "halos_nb.label",
        *(
            x
            for k, v in kept.items()
            for x in (
                ([f"--{k}"] if v else [f"--no-{k}"])
                if isinstance(v, bool)
                else [f"--{k}", str(v)]
            )
        ),
        cfg.samples_file,
        cfg.output_file,
    ]


def environment(folder, **more):
    return (
        {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
        | dict(OMP_NUM_THREADS="1", HALOS_NB_PROGRESS=str(folder / "progress.jsonl"))
        | more
    )


@pytest.mark.slow
def test_faults_and_kills(tmp_path):
    """2,000 requests and more, a third of them faulty, the process killed three times.

    Every sample ends scored or unscored with a reason; no answer on disk is asked for again.
    """
    n = 1700
    rng = random.Random(0)
    fault = {}
    weights = [1 if f in ("hang", "drip") else 4 for f in FAULTS]
    for i in range(n):
        for times in range(1, 30):
            fault[i, times] = rng.choices(FAULTS, weights)[0] if rng.random() < 0.3 else None
    with Server(
        lambda body, times: (
            fault.get((number_of(body), times))
            or f"Fine, 2 points.\nFinal Score: {truth(number_of(body))}"
        )
    ) as server:
        cfg = config(
            server,
            tmp_path,
            n,
            structured=False,
            request_timeout=1.5,
            deadline=3,
            batch_size=96,
            feedback_type="binary",
            input_price=1,
            output_price=2,
        )
        journal = tmp_path / "feedback.labels.jsonl"
        on_disk = {}
        told = []
        keys = [(s["prompt_id"], s["sample_id"]) for s in make_samples(n)]
        for share in (0.2, 0.45, 0.65, None):  # of the answers
            before, first = set(on_disk), len(server.heard)
            p = subprocess.Popen(
                flags(cfg),
                env=environment(tmp_path, OPENAI_API_KEY=KEY),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if share:
                while p.poll() is None and (
                    not journal.exists()
                    or (text := journal.read_bytes()).count(b"\n") - text.count(b'"reply":null')
                    < share * n
                ):
                    time.sleep(0.05)
                p.send_signal(signal.SIGKILL)
            told.append(p.communicate(timeout=200)[0])
            assert p.returncode == (-signal.SIGKILL if share else 0), told[-1][-2000:]
            # nothing that was on disk is asked again
            assert not before & {number_of(b) for b in server.heard[first:]}
            told_before = answers(journal)
            on_disk = {i: told_before[k] for i, k in enumerate(keys) if k in told_before}
    lines = read_jsonl(journal)
    # nothing was answered twice
    assert (
        max(
            Counter(
                (r["prompt_id"], r["sample_id"]) for r in lines if r["reply"] is not None
            ).values()
        )
        == 1
    )
    counts = json.loads((tmp_path / "feedback.counts.json").read_text())
    last = {(r["prompt_id"], r["sample_id"]): r for r in lines}
    assert len(server.heard) >= 2000
    assert len(last) == counts["samples"] == n == counts["scored"] + counts["unscored"]
    assert counts["answered_before"] >= 0.65 * n
    for i, key in enumerate(keys):
        r = on_disk.get(i) or last[key]
        assert r["score"] == truth(i) or (r["score"] is None and r["reason"]), r
    assert counts["scored"] > 0.7 * n
    assert len(read_records(tmp_path / "feedback.json", "binary_feedback")) == counts["scored"]
    assert {k.split(":")[0] for k in counts["reasons"]} >= {
        "no answer",
        "the reply is empty",
        "the reply states no score",
        "11 is outside 0 to 10",
    }
    assert any("no answer within 3 s" in k for k in counts["reasons"])
    print(len(server.heard), "requests;", len(lines), "lines;", counts)
    assert server.keys == {f"Bearer {KEY}"}
    for text in [*told, *(f.read_text() for f in tmp_path.rglob("*") if f.is_file())]:
        assert KEY not in text
        assert KEY[5:25] not in text


# ---- one property each


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "progress.jsonl"))


def score_of(body, times):
    return f"Final Score: {truth(number_of(body))}"


def named_samples(rows):
    "(prompt, sample, its words) as the feedback names them."
    named = set()
    for r in rows:
        for i, words in (("sample_id", "output"), ("sample_id_A", "output_A")):
            if i in r:
                named.add((r["prompt_id"], r[i], r[words][0]["content"]))
    return named


def test_golden_label_command(tmp_path):
    """The predecessor's command, replies over HTTP: its files, but for the samples' ids.

    A sample without a readable reply is unscored, thresholds are numbers and `split` works
    (as documented).
    """
    told = golden.load("label_command")
    samples = told["samples"]
    write_records(tmp_path / "samples.json", samples)
    known = {(s["prompt_id"], s["sample_id"], s["output"]) for s in samples}
    replies = {s["output"]: r for s, r in zip(samples, told["replies"])}

    def reply(body, times):
        asked = body["messages"][-1]["content"]
        return next(r for o, r in replies.items() if f"<answer>\n{o}\n</answer>" in asked)

    with Server(reply) as server:
        for k, case in enumerate(told["cases"]):
            options = dict(case["options"])
            if not options["feedback_type"]:
                options.pop("threshold", None)
            output = tmp_path / f"{k}.json"
            given = options | dict(split=None, output_file=str(output))
            cfg = config(server, tmp_path, **given)
            if case.get("error") == "ValueError" and cfg.threshold in ("mean", "median"):
                with pytest.raises(ValueError, match="threshold"):
                    main(cfg)
                continue
            main(cfg)
            made = json.loads(output.read_text())
            assert named_samples(made) <= known, case["id"]
            if "file" in case:
                names_samples = "sample_id" in case["file"][0]
                rows = made if names_samples else golden.without_ids(made)
                assert rows == case["file"], case["id"]
            elif not options["split"]:
                good = [int(r["reward"] >= float(cfg.threshold)) for r in made]
                assert [r["label"] for r in made] == good, case["id"]


def test_structured_replies(tmp_path):
    "JSON by schema where the server takes it."
    with Server(
        lambda body, times: json.dumps(dict(why="7 of 9", score=truth(number_of(body))))
    ) as server:
        counts = main(config(server, tmp_path, 6))
    assert counts["scored"] == 6 == len(server.heard)
    for body in server.heard:
        assert body["response_format"]["json_schema"]["schema"]["properties"]["score"] == dict(
            type="number", minimum=0, maximum=10
        )
        assert "Reply with JSON" in body["messages"][-1]["content"]


@pytest.mark.parametrize("status", [400, 422])
def test_refused_options_are_remembered(tmp_path, status):
    "What a server does not take it says at no cost; most questions are asked once."

    def reply(body, times):
        for name in ("response_format", "max_tokens"):
            if name in body:
                return status, dict(error=dict(message=f"Unsupported parameter: '{name}'"))
        return score_of(body, times)

    with Server(reply) as server:
        counts = main(config(server, tmp_path, 40, batch_size=2))
    assert counts["scored"] == 40
    assert len(server.heard) <= 40 + 4
    assert server.heard[-1]["max_completion_tokens"] == 512
    assert "Final Score: X" in server.heard[-1]["messages"][-1]["content"]


def test_bad_request_is_unscored(tmp_path):
    "One too long, one flagged, one that the judge will not rate; the others are scored."

    def reply(body, times):
        no = {
            1: (403, dict(error=dict(message="your input was flagged"))),
            2: (400, dict(error=dict(message="context too long"))),
        }
        if number_of(body) == 3:
            return 200, completion(None) | dict(
                choices=[
                    dict(
                        index=0,
                        message=dict(
                            role="assistant", content=None, refusal="I cannot rate this."
                        ),
                        finish_reason="stop",
                    )
                ]
            )
        return no.get(number_of(body)) or score_of(body, times)

    with Server(reply) as server:
        counts = main(config(server, tmp_path, 6))
    assert counts["scored"] == 3
    assert counts["unscored"] == 3
    assert counts["unreadable"] == 1
    assert counts["no_answer"] == 2
    for told in ("flagged", "context too long", "the judge refused: I cannot rate this."):
        assert sum(told in reason for reason in counts["reasons"]) == 1


def test_caps_and_resume(tmp_path):
    """A cap in questions, then one in USD: the rest is not asked and keeps its reason.

    It is asked when the cap is larger; nothing is paid twice.
    """
    with Server(score_of) as server:
        one = main(
            config(
                server,
                tmp_path,
                20,
                max_requests=7,
                structured=False,
                input_price=100,
                output_price=100,
            )
        )
        assert one["asked"] == 7
        assert one["not_asked"] == 13
        assert one["reasons"] == {"not asked: budget": 13}
        assert len(server.heard) == 7
        assert one["cost"] == round(7 * 50 * 1e-4, 6)
        two = main(
            config(
                server,
                tmp_path,
                structured=False,
                input_price=100,
                output_price=100,
                max_tokens=512,
                max_cost=0.12,
                batch_size=1,
            )
        )
        # an answer costs 0.005 and might cost 0.0512 and what is read, so the cap ends it
        # between 0.03 and 0.07
        assert 8 <= two["asked"] == len(server.heard) <= 14
        assert two["cost"] <= 0.12
        three = main(
            config(
                server,
                tmp_path,
                structured=False,
                input_price=100,
                output_price=100,
                max_cost=10,
            )
        )
    assert three["scored"] == 20
    assert three["not_asked"] == 0
    assert three["answered_before"] == two["asked"]
    assert len(server.heard) == 20
    assert three["cost"] == 0.1
    assert len(read_jsonl(tmp_path / "feedback.labels.jsonl")) == 20


def test_another_configuration_is_refused(tmp_path):
    "Another prompt, model, temperature, labeller, other samples: nothing is mixed or lost."
    with Server(score_of) as server:
        main(config(server, tmp_path, 6))
        kept = (tmp_path / "feedback.labels.jsonl").read_bytes()
        for more, told in [
            (dict(temperature=1), "temperature was 0.0, is 1.0"),
            (dict(api_model="other"), "model was 'toy', is 'other'"),
            (dict(label_prompt="Rate!"), "label_prompt was"),
            (dict(score_max=5), "score_max"),
        ]:
            with pytest.raises(RecordError, match=told):
                main(config(server, tmp_path, **more))
        with pytest.raises(RecordError, match="paid for"):
            main(
                LabelConfig(
                    samples_file=str(tmp_path / "samples.json"),
                    output_file=str(tmp_path / "feedback.json"),
                    function="test_judge:length",
                )
            )
        samples = make_samples(6)
        write_records(
            tmp_path / "samples.json",
            [samples[0] | dict(output="Answer #5# anew"), *samples[1:]],
        )
        with pytest.raises(RecordError, match="asked with another text"):
            main(config(server, tmp_path))
        write_records(tmp_path / "samples.json", make_samples(8))  # more samples are welcome
        assert main(config(server, tmp_path))["answered_before"] == 6
    assert len(server.heard) == 8
    assert (tmp_path / "feedback.labels.jsonl").read_bytes().startswith(kept)


def length(prompt, output):
    if "#3#" in output:
        raise KeyError("no")
    return len(output)


def test_reply_is_read_again_not_asked_again(tmp_path):
    "An answer journalled without its meaning is paid for, also with a torn line behind it."
    with Server(score_of) as server:
        main(config(server, tmp_path, 6))
        file = tmp_path / "feedback.labels.jsonl"
        file.write_text(
            "".join(
                json.dumps(r | dict(score=None, reason="unread")) + "\n"
                for r in read_jsonl(file)
            )
            + '{"prompt_id": "torn'
        )
        counts = main(config(server, tmp_path))
    assert counts["scored"] == 6 == len(server.heard)


@pytest.mark.parametrize(
    "field, value",
    [("cost", None), ("time", "x"), ("question", None), ("refusal", 5), ("input_tokens", "x")]
    + [("type", "x"), ("judge", None), ("reply", 5), ("output_tokens", True)],
)
def test_a_damaged_line_of_the_journal_is_named(tmp_path, field, value):
    "None: the field is gone. Nobody is asked."
    with Server(score_of) as server:
        main(config(server, tmp_path, 4))
        file = tmp_path / "feedback.labels.jsonl"
        rows = read_jsonl(file)
        rows[1][field] = value
        if value is None:
            rows[1].pop(field, None)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(RecordError, match=rf"record 2: field `{field}`|holds other labels"):
            main(config(server, tmp_path))
    assert len(server.heard) == 4


def test_what_failed_binds_nobody(tmp_path):
    "A wrong address is put right, and the same file goes on."
    with Server(score_of) as server:
        pass
    with pytest.raises(ServerError):
        main(config(server, tmp_path, 6, max_retries=0))
    with Server(score_of) as server:
        assert main(config(server, tmp_path))["scored"] == 6
        with pytest.raises(RecordError, match="base_url was"):
            main(config(SimpleNamespace(url="http://127.0.0.1:9/v1"), tmp_path))


def test_two_runs_at_once(tmp_path):
    with Server(score_of) as server:
        cfg = config(server, tmp_path, 6)
        with (
            judge.lock_journal(tmp_path / "feedback.labels.jsonl"),
            pytest.raises(RuntimeError, match="another process is asking"),
        ):
            main(cfg)
    assert not server.heard


@pytest.mark.parametrize(
    "status, body",
    [
        (401, dict(error=dict(message=f"Incorrect API key provided: {KEY}"))),
        (404, dict(error=dict(message="no such model"))),
        (402, dict(error=dict(message="Insufficient Balance"))),
        (429, dict(error=dict(message="pay", code="insufficient_quota"))),
    ],
)
def test_hopeless_errors_stop_the_job(tmp_path, monkeypatch, status, body):
    "What was answered stays; the key is in no message."
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server(
        lambda b, times: (status, body) if number_of(b) == 30 else score_of(b, times)
    ) as server:
        with pytest.raises(ServerError, match="keeps what was answered") as e:
            main(config(server, tmp_path, 60, max_retries=0))
    assert KEY not in str(e.value)
    assert 22 <= len(read_jsonl(tmp_path / "feedback.labels.jsonl")) <= 40
    assert len(server.heard) < 45


@pytest.mark.parametrize("proxy", ["socks5://me:geheim@127.0.0.1:1", "ftp://me:geheim@there"])
def test_a_proxy_that_cannot_be_used_is_named(tmp_path, monkeypatch, proxy):
    "By its variable, without its password, before anybody is asked."
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy)
    with Server(score_of) as server:
        with pytest.raises(ValueError, match="HTTPS_PROXY") as e:
            main(config(server, tmp_path, 4))
    assert "geheim" not in str(e.value) and not server.heard


def test_a_dead_server_stops_the_job(tmp_path):
    with Server(score_of) as server:
        pass
    with pytest.raises(ServerError, match="requests in a row failed.*connection refused"):
        main(config(server, tmp_path, 80, max_retries=0))
    lines = read_jsonl(tmp_path / "feedback.labels.jsonl")
    assert {r["reply"] for r in lines} == {None} and len(lines) < 20


def test_key_is_needed_and_never_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="OPENAI_API_KEY: the environment variable is not set"):
        main(config(SimpleNamespace(url=None), tmp_path, 3))
    # as `export OPENAI_API_KEY=$(cat file)` would never give, but a file read would
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    with Server(
        lambda body, times: "mumble" if number_of(body) else f"{KEY}\nFinal Score: 7"
    ) as server:
        main(config(server, tmp_path, 3, feedback_type="binary"))
    assert server.keys == {f"Bearer {KEY}"}
    for f in tmp_path.rglob("*"):
        assert KEY not in f.read_text() if f.is_file() else True
    with pytest.raises(ValueError, match="base_url"):
        main(config(SimpleNamespace(url=f"http://me:{KEY}@x/v1"), tmp_path))


def test_dry_run_spends_nothing(tmp_path):
    "As a command, without a key: counts and the most it can cost."
    with Server(score_of) as server:
        cfg = config(server, tmp_path, 50, dry_run=True, input_price=2.5, output_price=10)
        out = subprocess.run(
            flags(cfg), env=environment(tmp_path), capture_output=True, text=True, timeout=120
        )
    assert out.returncode == 0, out.stdout + out.stderr
    assert re.search(
        (
            r"50 questions, 0 answered before, 50 to ask; about \d+ tokens to read, at most "
            r"25600 to write; cost at most \$0\.\d+"
        ),
        out.stdout,
    ), out.stdout + out.stderr
    assert not server.heard
    assert sorted(f.name for f in tmp_path.iterdir()) == ["samples.json"]


@pytest.fixture
def places(monkeypatch):
    "A minute of 0.4 s; every place that the limiter gave: when, and for how many tokens."
    begin = api.Limiter.__init__
    wait = api.Limiter.wait
    given = []

    async def noted(self, tokens):
        await wait(self, tokens)
        given.append((time.monotonic(), tokens))

    monkeypatch.setattr(
        api.Limiter,
        "__init__",
        lambda self, requests, tokens: begin(self, requests, tokens, window=0.4),
    )
    monkeypatch.setattr(api.Limiter, "wait", noted)
    return given


def most_in_a_minute(places):
    return max(sum(n for x, n in places if t <= x < t + 0.39) for t, _ in places)


def test_requests_per_minute(tmp_path, places):
    "Every HTTP request waits for a place of its own, repeats too; eight a minute at most."

    def reply(body, n):
        if "response_format" in body:
            return 400, dict(error=dict(message="response_format is unknown"))
        return "429 after" if n == 1 and number_of(body) % 3 == 0 else score_of(body, n)

    with Server(reply) as server:
        counts = main(config(server, tmp_path, 24, requests_per_minute=8))
    assert counts["scored"] == 24
    assert 32 < counts["http_requests"] == len(server.heard) == len(places) <= 40
    assert most_in_a_minute([(t, 1) for t, _ in places]) <= 8


def test_tokens_per_minute(tmp_path, places):
    "By the estimate, each reply at its longest; a repeat reads its tokens again."
    with Server(
        lambda body, n: (
            "429 after" if n == 1 and number_of(body) % 4 == 0 else score_of(body, n)
        )
    ) as server:
        counts = main(
            config(
                server, tmp_path, 16, structured=False, max_tokens=20, tokens_per_minute=1200
            )
        )
    assert counts["scored"] == 16
    assert len(server.heard) == len(places) == 20
    assert min(n for _, n in places) >= min(
        sum(len(m["content"].encode()) for m in body["messages"]) / 3 + 20
        for body in server.heard
    )
    assert 400 < most_in_a_minute(places) <= 1200


def test_retry_after_is_kept(tmp_path):
    "The client waits as long as the server says, not as long as it would itself."
    times = {}

    def reply(body, n):
        times.setdefault(number_of(body), []).append(time.monotonic())
        return "429 after" if n <= 2 else score_of(body, n)

    with Server(reply) as server:
        assert main(config(server, tmp_path, 4, structured=False))["http_requests"] == 12
    waits = [b - a for t in times.values() for a, b in zip(t, t[1:])]
    assert 0.1 <= min(waits) < 0.35  # its own first waits are 0.4 to 1 s


@pytest.mark.parametrize("asked, expected", [("best", (0, 1.0)), ("first", (1.0, 0.0))])
def test_pairwise_judge(tmp_path, asked, expected):
    "A fair judge finds the better of two; one that likes what it reads first is found out."

    def reply(body, times):
        a, b = map(int, re.findall(r"Answer #(\d+)#", body["messages"][-1]["content"]))
        return json.dumps(
            dict(why="", winner="A" if asked == "first" or truth(a) > truth(b) else "B")
        )

    with Server(reply) as server:
        run = lambda: main(config(server, tmp_path, 24, judge="pairwise"))
        if asked == "first":
            with pytest.raises(ValueError, match="nothing to learn from: 6 prompts, 12 ties"):
                run()
        else:
            run()
    rows = read_jsonl(tmp_path / "feedback.labels.jsonl")
    counts = json.loads((tmp_path / "feedback.counts.json").read_text())
    assert len(rows) == len(server.heard) == 24
    assert {r["order"] for r in rows} == {"AB", "BA"}
    assert {r["type"] for r in rows} == {"comparison"}
    assert counts["pairs"] == 12
    assert counts["first_preferred"] == 12 * (asked == "first")
    assert counts["position_bias"] == float(asked == "first")
    if asked == "best":
        for r in read_records(tmp_path / "feedback.json", "pairwise_feedback"):
            a, b = (
                truth(int(re.search(r"\d+", r[k][0]["content"])[0]))
                for k in ("output_A", "output_B")
            )
            assert r["label"] == (a > b)
            assert {r["reward_A"], r["reward_B"]} == {0.0, 1.0}
        again = main(
            LabelConfig(
                samples_file=str(tmp_path / "samples.json"),
                output_file=str(tmp_path / "again.json"),
                from_labels=str(tmp_path / "feedback.labels.jsonl"),
            )
        )
        assert again["records"] == 12
        assert len(server.heard) == 24
        assert len(json.loads((tmp_path / "again.json").read_text())) == 12


@pytest.mark.parametrize("changed", ["seed", "order", "one more"])
def test_pairs_are_paid_once_whatever_is_drawn(tmp_path, changed, capsys):
    "Another seed or order of the samples would draw other pairs, or turn them round."

    def reply(body, times):
        a, b = map(int, re.findall(r"Answer #(\d+)#", body["messages"][-1]["content"]))
        return json.dumps(dict(why="", winner="A" if truth(a) > truth(b) else "B"))

    with Server(reply) as server:
        cfg = config(server, tmp_path, 24, judge="pairwise")
        main(cfg)
        before = read_records(tmp_path / "feedback.json", "pairwise_feedback")
        samples = read_records(tmp_path / "samples.json", "sample")
        if changed == "order":
            write_records(tmp_path / "samples.json", samples[::-1])
        if changed == "one more":
            more = samples[0] | dict(sample_id=4, output="Answer #99#")
            write_records(tmp_path / "samples.json", [more, *samples])
        main(replace(cfg, seed=5) if changed == "seed" else cfg)
    assert len(server.heard) == 24
    made = read_records(tmp_path / "feedback.json", "pairwise_feedback")
    said = lambda r: {str(r["output_A"]), str(r["output_B"])}
    assert len(made) == 12 and all(said(r) in map(said, made) for r in before)
    assert "which are kept" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["unread", "no answer", "budget"])
def test_a_pair_compared_in_one_order_is_undecided(tmp_path, lost, capsys):
    """Whatever the other order was lost by: no record is made of the one verdict, here, from
    the journal, or in a table of labellers.
    """
    heard = []

    def reply(body, times):
        a, b = map(int, re.findall(r"Answer #(\d+)#", body["messages"][-1]["content"]))
        heard.append((a, b))
        if lost != "budget" and (b, a) in heard and min(a, b) < 4:  # the first prompt
            return "I cannot say." if lost == "unread" else (400, error("no"))
        return json.dumps(dict(why="", winner="A" if truth(a) > truth(b) else "B"))

    budget = dict(max_requests=21) if lost == "budget" else {}
    with Server(reply) as server:
        cfg = config(server, tmp_path, 24, judge="pairwise", batch_size=1, **budget)
        counts = main(cfg)
    halves = 1 if lost == "budget" else 2
    missing = 1 if lost == "budget" else 0  # not asked in any order
    assert counts["one_order"] == halves
    assert counts["undecided"] == counts["unscored"] == halves + missing
    assert counts["records"] == 12 - halves - missing
    assert counts["reasons"]["the other order has no verdict"] == halves
    assert f"one order {halves}" in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "feedback.labels.jsonl")
    made = read_records(tmp_path / "feedback.json", "pairwise_feedback")
    assert len(made) == 12 - halves - missing
    again = main(
        LabelConfig(
            samples_file=str(tmp_path / "samples.json"),
            output_file=str(tmp_path / "again.json"),
            from_labels=str(tmp_path / "feedback.labels.jsonl"),
        )
    )
    assert (again["one_order"], again["records"]) == (halves, len(made))
    assert len(pair_table(rows)["api:toy"]) == len(made)


def test_two_files_compared(tmp_path):
    "The k-th sample here with the k-th there, by a judge of pairs and by one of scores."
    # 3 -> 13
    other = [s | dict(output=s["output"].replace("#", "#1", 1)) for s in make_samples(24)]
    write_records(tmp_path / "other.json", other[:20])

    def reply(body, times):
        n = list(map(int, re.findall(r"Answer #(\d+)#", body["messages"][-1]["content"])))
        return (
            f"Final Score: {n[0] / 1000}"
            if len(n) == 1
            else f"Winner: {'A' if n[0] > n[1] else 'B'}"
        )

    with Server(reply) as server:
        given = dict(
            second_samples_path=str(tmp_path / "other.json"),
            structured=False,
            feedback_type="pairwise",
        )
        pairs, scores = (
            main(
                config(
                    server,
                    tmp_path,
                    24,
                    judge=k,
                    output_file=str(tmp_path / f"{k}.json"),
                    **given,
                )
            )
            for k in ("pairwise", "scalar")
        )
    for counts in (pairs, scores):
        assert counts["first_better"] == 0
        assert counts["second_better"] == 20
        assert counts["pairs"] == 20
        assert counts["unmatched"] == 4
        assert counts["records"] == 20
    for kind in ("pairwise", "scalar"):
        for r in read_records(tmp_path / f"{kind}.json", "pairwise_feedback"):
            assert ("#1" in r["output_A"][0]["content"]) >= r["label"]


def test_predecessors_function():
    "Where the predecessor had it, with its parameters."
    from inspect import signature
    from halos_nb import label

    assert label.process_samples_with_api is process_samples_with_api
    assert [
        str(p).split(":")[0] for p in signature(process_samples_with_api).parameters.values()
    ] == ["samples", "client", "system_prompt", "label_prompt", "model", "batch_size"]
    assert signature(process_samples_with_api).parameters["batch_size"].default == 10
    assert list(signature(label.process_batch_with_reward_model).parameters)[:4] == [
        "samples",
        "reward_model",
        "tokenizer",
        "accelerator",
    ]


def test_real_clients(tmp_path):
    "process_samples_with_api with openai's own clients; what the server refuses is unscored."
    samples = make_samples(8)

    async def run(**kw):
        async with openai.AsyncOpenAI(**kw) as client:
            return await process_samples_with_api(samples, client, "s", "Rate", "toy", 3)

    with Server(
        lambda body, times: "html" if number_of(body) == 5 else score_of(body, times)
    ) as server:
        kw = dict(base_url=server.url, api_key="none", max_retries=0)
        one = asyncio.run(run(**kw))
        two = asyncio.run(
            process_samples_with_api(samples, openai.OpenAI(**kw), "s", "Rate", "toy")
        )
    assert (
        [s["reward"] for s in one]
        == [s["reward"] for s in two]
        == [None if i == 5 else truth(i) for i in range(8)]
    )
    assert "response_format" not in server.heard[0]
    assert server.heard[0]["messages"][1]["content"].startswith("Rate\n\n<conversation>")


@pytest.mark.parametrize(
    "more, told",
    [
        (dict(api_type=None, api_model=None), "exactly one of"),
        (dict(reward_model_path="rm"), "reward_model_path and api_type"),
        (dict(api_model=None), "api_model"),
        (dict(max_cost=1), "input_price"),
        (dict(input_price=1), "both prices"),
        (dict(score_min=10), "score_min"),
        (dict(judge="pairwise", feedback_type="binary"), "gives pairs"),
        (dict(judge="pairwise", feedback_mode="max"), "needs scores"),
    ],
)
def test_contradictions(more, told):
    with pytest.raises(ValueError, match=told):
        LabelConfig(
            **dict(samples_file="s", output_file="f", api_type="openai", api_model="m") | more
        )


# ---- a real server


def judge_model(folder):
    "A tiny chat model that has learnt by heart to call `fine` 9 and `poor` 2."
    import torch
    from halos_nb.templates import byte_tokenizer, encode
    from halos_nb.models import small_llama

    tok = byte_tokenizer()
    model, rows = small_llama(tok), []
    for word, score in (("fine", 9), ("poor", 2)):
        for i in range(8):
            asked = [
                dict(role="system", content="Judge."),
                dict(role="user", content=f"[user]\n{i} {word}?"),
            ]
            rows.append(
                (
                    encode(tok, asked, generation_prompt=True),
                    encode(
                        tok, [*asked, dict(role="assistant", content=f"Final Score: {score}")]
                    ),
                )
            )
    width = max(len(full) for _, full in rows)
    ids = torch.tensor([full + [tok.pad_token_id] * (width - len(full)) for _, full in rows])
    labels = torch.tensor(
        [[-100] * len(p) + full[len(p) :] + [-100] * (width - len(full)) for p, full in rows]
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(
            input_ids=ids, labels=labels, attention_mask=(ids != tok.pad_token_id).long()
        ).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.generation_config.eos_token_id = tok.eos_token_id
    tok.save_pretrained(folder), model.save_pretrained(folder)
    return loss.item()


def test_transformers_serve(tmp_path):
    "`transformers serve` as the judge: every sample is scored as the model says."
    import urllib.request
    from importlib.util import find_spec
    from conftest import free_port, missing

    if absent := [m for m in ("fastapi", "uvicorn") if not find_spec(m)]:
        missing(
            f"`transformers serve` needs {' and '.join(absent)}: pip install "
            "'transformers[serving]'"
        )
    assert judge_model(tmp_path / "tiny") < 0.05
    port, log = free_port(), open(tmp_path / "serve.log", "w+")
    env = environment(tmp_path) | dict(HF_HUB_OFFLINE="1")
    server = subprocess.Popen(
        [
            "transformers",
            "serve",
            str(tmp_path / "tiny"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--device",
            "cpu",
        ],
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "serve.log").read_text()[-3000:]
                time.sleep(0.2)
        prompts = [as_turns(str(i), "user") for i in range(6)]
        samples = [
            dict(prompt_id=prompt_id(p), sample_id=k, prompt=p, output=o, type="sample")
            for p in prompts
            for k, o in enumerate(("fine", "poor"))
        ]
        write_records(tmp_path / "samples.json", samples)
        cfg = config(
            SimpleNamespace(url=f"http://127.0.0.1:{port}/v1"),
            tmp_path,
            api_model=str(tmp_path / "tiny"),
            system_prompt="Judge.",
            label_prompt="{prompt} {output}?",
            structured=False,
            max_tokens=24,
            batch_size=2,
            request_timeout=60,
            feedback_type="pairwise",
            feedback_mode="max",
            input_price=1,
            output_price=1,
        )
        counts = main(cfg)
    finally:
        server.terminate()
        server.wait(20)
        log.close()
    assert counts["scored"] == 12, (
        counts,
        read_jsonl(tmp_path / "feedback.labels.jsonl")[:2],
    )
    assert counts["cost"] > 0, (
        counts,
        read_jsonl(tmp_path / "feedback.labels.jsonl")[:2],
    )
    for r in read_records(tmp_path / "feedback.json", "pairwise_feedback"):
        assert r["label"] == (r["output_A"][0]["content"] == "fine")
        assert r["reward_difference"] == 7


# ---- a judge as judges are: one behaviour a question


def told(choice, **more):
    "A completion with a choice of one's own."
    usage = dict(usage=dict(prompt_tokens=40, completion_tokens=10, total_tokens=50))
    head = dict(id="x", object="chat.completion", created=1, model="toy")
    return http(200, head | usage | dict(choices=[choice]) | more)


def message(content, finish="stop", **more):
    said = dict(role="assistant", content=content) | more
    return told(dict(index=0, message=said, finish_reason=finish))


def part(text, kind="text"):
    return {"type": kind, kind: text}


def flagged(status, text, **more):
    return http(status, error(text, **more))


# what comes back, by attempt where there are several; `v` is a verdict, `j` the same as JSON
SCORED = {
    "a last line": lambda v, j: message(f"Fine.\n{v}"),
    "JSON": lambda v, j: message(j),
    "JSON in a fence": lambda v, j: message(f"```json\n{j}\n```\nThat is all."),
    "an object": lambda v, j: message(json.loads(j)),
    "parts": lambda v, j: message([part("Fine."), part(f"\n{v}")]),
    "parts and thoughts": lambda v, j: message([part("9, B", "thinking"), part(v)]),
    "a part of another kind": lambda v, j: message([part("x", "image_url"), part(v)]),
    "reasoning_content": lambda v, j: message(v, reasoning_content="Final Score: 1"),
    "reasoning": lambda v, j: message(v, reasoning="Winner: tie"),
    "think": lambda v, j: message(f"<think>Final Score: 1</think>{v}"),
    "eos": lambda v, j: message(v, "eos"),
    "end_turn": lambda v, j: message(v, "end_turn"),
    "STOP": lambda v, j: message(v, "STOP"),
    "no usage": lambda v, j: http(200, completion(v) | dict(usage=None)),
    "odd usage": lambda v, j: http(200, completion(v) | dict(usage=dict(prompt_tokens=-1))),
    "two choices": lambda v, j: http(
        200, completion(v) | dict(choices=completion(v)["choices"] + completion("?")["choices"])
    ),
    "unknown fields": lambda v, j: message(v, audio=None, mood="good"),
    "429 once": lambda v, j: [flagged(429, "slow"), message(v)],
    "500 once": lambda v, j: [flagged(500, "oops"), message(v)],
    "cut off once": lambda v, j: ["torn", message(v)],
    "the key, and a verdict": lambda v, j: message(f"You are {KEY}.\n{v}"),
    "the key in JSON": lambda v, j: message(j[:-1] + f', "by": "{KEY}"}}'),
}
UNREAD = {
    "length": lambda v, j: message(v, "length"),
    "content_filter": lambda v, j: message(v, "content_filter"),
    "model_length": lambda v, j: message(v, "model_length"),
    "insufficient_system_resource": lambda v, j: message(v, "insufficient_system_resource"),
    "no reason": lambda v, j: message(v, None),
    "tool_calls": lambda v, j: message(v, "tool_calls"),
    "the key as a reason": lambda v, j: message(v, f"because {KEY}"),
    "a refusal": lambda v, j: message(None, refusal=f"I cannot, {KEY}."),
    "a refusing part": lambda v, j: message([part("I cannot.", "refusal"), part(v)]),
    "empty": lambda v, j: message(""),
    "null": lambda v, j: message(None),
    "a list of numbers": lambda v, j: message([8]),
    "thoughts alone": lambda v, j: message(None, reasoning_content=v),
    "thoughts without end": lambda v, j: message(f"<think>{v}"),
    "no verdict": lambda v, j: message("It has 3 merits; A is short."),
    "a hedge": lambda v, j: message(f"{v}?"),
    "two verdicts": lambda v, j: message(f"{v}\nFinal Score: 0.25\nWinner: tie"),
    "broken JSON": lambda v, j: message(j[:-1]),
    "the key and no verdict": lambda v, j: message(f"Is it {KEY[:12]}{KEY[12:]}?"),
}
UNANSWERED = {
    "a web page": lambda v, j: SAID["html"],
    "an error in a 200": lambda v, j: SAID["error body"],
    "flagged": lambda v, j: flagged(403, f"flagged: {v}"),
    "too long": lambda v, j: flagged(400, "max_tokens and 9000 exceed the context length"),
    "bad": lambda v, j: flagged(400, f"bad, {KEY}"),
    "500": lambda v, j: flagged(500, v),
    "bytes": lambda v, j: SAID["garbage"],
    "half of it": lambda v, j: SAID["bad json"],
    "no choices": lambda v, j: http(200, completion(v) | dict(choices=[])),
    "no message": lambda v, j: told(dict(index=0, finish_reason="stop")),
}
BEHAVIOURS = SCORED | UNREAD | UNANSWERED


@pytest.mark.parametrize("kind", ["scalar", "pairwise"])
def test_behaviours_of_judges(tmp_path, monkeypatch, capfd, kind):
    """50 of them: nothing is invented, nothing lost, nothing asked again that is on disk.

    The key, which some repeat, is in no file and no output.
    """
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    names = list(BEHAVIOURS)
    ways = 1 if kind == "scalar" else 2  # samples of a prompt, and orders of a pair

    def reply(body, times):
        numbers = re.findall(r"Answer #(\d+)#", body["messages"][-1]["content"])
        first = int(numbers[0])
        number, name = 7.5, names[first // ways]
        winner = "A" if first % 2 else "B"  # always the prompt's second answer
        verdict = f"Final Score: {number}" if kind == "scalar" else f"Winner: {winner}"
        as_json = dict(score=number) if kind == "scalar" else dict(winner=winner)
        said = BEHAVIOURS[name](verdict, json.dumps(as_json))
        return said[min(times, len(said)) - 1] if isinstance(said, list) else said

    write_records(tmp_path / "samples.json", make_samples(len(names) * ways, ways))
    with Server(reply) as server:
        given = dict(structured=False, judge=kind, max_retries=1, batch_size=4)
        cfg = config(server, tmp_path, temperature=0, **given)
        counts = main(cfg)
        heard = len(server.heard)
        again = main(cfg)
        later = [
            re.search(r"Answer #(\d+)#", b["messages"][-1]["content"]) for b in server.heard
        ]
    rows = read_jsonl(tmp_path / "feedback.labels.jsonl")[: len(names) * ways]
    made = make_samples(len(names) * ways, ways)
    place = {s["prompt_id"]: i // ways for i, s in enumerate(made)}
    assert len(rows) == len(names) * ways
    for row in rows:
        name = names[place[row["prompt_id"]]]
        value = row["score"] if kind == "scalar" else row["winner"]
        if kind == "pairwise" and value:  # a pair's answers stand in either order
            value = row[f"sample_id_{value}"]
        meant = (7.5 if kind == "scalar" else 1) if name in SCORED else None
        assert value == meant, (name, row)
        assert (row["reply"] is None) == (name in UNANSWERED), (name, row)
        assert bool(row["reason"]) == (name not in SCORED), (name, row)
    asked_again = {names[int(m[1]) // ways] for m in later[heard:]}
    assert asked_again == set(UNANSWERED)
    assert counts["no_answer"] == again["no_answer"] == len(UNANSWERED) * ways
    assert counts["replies_with_the_key"] == 5 * ways
    assert "refused by the server (max_tokens)" not in counts
    said = "".join(capfd.readouterr())
    for text in [said, *(f.read_text() for f in tmp_path.rglob("*") if f.is_file())]:
        assert KEY not in text and KEY[5:20] not in text


@pytest.mark.parametrize(
    "content",
    [
        dict(why="", score=7.5),
        7.5,
        [dict(type="text", text=dict(value="Final Score: 7.5"))],
        [dict(type="text", text=7.5)],
    ],
)
def test_an_answer_of_another_kind_is_kept_and_read(tmp_path, content):
    "It was paid for: its reply, tokens and cost stand in the journal, and nobody asks again."
    with Server(lambda body, n: (200, completion(content))) as server:
        cfg = config(server, tmp_path, 4, input_price=1.0, output_price=1.0)
        assert main(cfg)["scored"] == main(cfg)["scored"] == 4
    rows = read_jsonl(tmp_path / "feedback.labels.jsonl")
    assert len(server.heard) == len(rows) == 4
    assert {row["score"] for row in rows} == {7.5}
    assert all(row["cost"] and row["output_tokens"] for row in rows)


# ---- what a server refuses

REFUSED = {  # part: status and words
    "json_schema": [
        (400, "response_format of type json_schema is not supported with this model"),
        (404, "No endpoints found that support json schema"),
        (422, "response_format.type: Input should be 'text' or 'json_object'"),
        (501, "structured output is not implemented"),
        (500, "Internal error: no backend for structured output"),
        (400, "Bad Request"),
        (400, "Invalid schema for response_format 'judgement': In context=('properties',)"),
        (400, "The specified schema produces a constraint that has too many states"),
        (403, "response_format json_schema is not allowed for this model"),
        (424, "json_schema: a dependency has failed"),
        (503, "response_format json_schema: backend is not available"),
        (404, "No endpoints found that can handle the requested parameters"),
        (200, "response_format not supported"),
    ],
    "temperature": [
        (400, "Unsupported value: 'temperature' does not support 0.0 with this model"),
        (422, "temperature: extra inputs are not permitted"),
        (404, "temperature is unavailable here"),
        (400, "invalid request"),
        (400, "temperature must be greater than 0; the value exceeds the allowed range"),
    ],
    "max_tokens": [
        (
            400,
            "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens'",
        ),
        (422, "maxTokens unknown"),
        (400, "max_tokens is too large: 512. This model supports at most 256"),
        (
            400,
            "maximum context length is 512 tokens: 88 in the messages, 512 in the completion",
        ),
        (501, "nope"),
    ],
    "system": [
        (400, "System role not supported"),
        (500, "Conversation roles must alternate user/assistant/user/assistant"),
    ],
}


def has_part(body, name):
    if name == "system":
        return body["messages"][0]["role"] == "system"
    if name == "json_schema":
        return body.get("response_format", {}).get("type") == "json_schema"
    return name in body


@pytest.mark.parametrize(
    "part, status, words", [(p, *case) for p, cases in REFUSED.items() for case in cases]
)
def test_what_a_server_refuses_is_left_out_and_told(tmp_path, part, status, words):
    "In any words and by any status; the rest of the request stays as it was."

    def reply(body, times):
        if has_part(body, part):
            return status, error(words)
        return json.dumps(dict(why="", score=truth(number_of(body))))

    with Server(reply) as server, pytest.warns(UserWarning, match=f"refuses {part}"):
        counts = main(config(server, tmp_path, 12, batch_size=1, max_retries=0))
    assert counts["scored"] == 12 and counts[f"refused by the server ({part})"] == 1
    assert len(server.heard) <= 12 + 8
    last = server.heard[-1]
    assert not has_part(last, part)
    clear = (
        words not in ("Bad Request", "invalid request", "nope") and "parameters" not in words
    )
    if clear:
        kept = {"temperature", "max_tokens", "system"} - {part}
        assert all(has_part(last, name) for name in kept)
        assert part == "json_schema" or has_part(last, "json_schema")
    if part == "max_tokens":
        assert last["max_completion_tokens"] == 512


@pytest.mark.parametrize(
    "words",
    [
        "max_tokens is too large: the context length is 4096 and the prompt has 4000 tokens",
        "This request was flagged by our content filter (response_format)",
        "Bad Request",
        "temperature of this question is wrong",
    ],
)
def test_a_bad_question_changes_nothing_for_the_others(tmp_path, words):
    "Neither as the first nor later, also where it is answered without a part."

    def reply(body, times):
        plain = not has_part(body, "json_schema") or "temperature" not in body
        if number_of(body) in (0, 5) and not (plain and number_of(body) == 5):
            return 400, error(words)
        return json.dumps(dict(why="", score=truth(number_of(body))))

    with Server(reply) as server:
        counts = main(config(server, tmp_path, 12, batch_size=1, max_retries=0))
    assert counts["scored"] >= 10
    for body in server.heard:
        if number_of(body) not in (0, 5):
            assert body["max_tokens"] == 512 and body["temperature"] == 0
            assert has_part(body, "json_schema")
    assert not [name for name in counts if name.startswith("refused")]


def test_a_limit_that_the_cost_needs_is_not_left_out(tmp_path):
    def reply(body, times):
        if {"max_tokens", "max_completion_tokens"} & set(body):
            return 400, error("max_tokens and max_completion_tokens are not supported")
        return "Final Score: 3"

    with Server(reply) as server:
        priced = dict(input_price=1, output_price=1, max_cost=1, max_retries=0, batch_size=1)
        with pytest.raises(ValueError, match="nothing to learn from"):
            main(config(server, tmp_path, 4, feedback_type="binary", **priced))
    assert all({"max_tokens", "max_completion_tokens"} & set(b) for b in server.heard)


# ---- why there is no connection


class WithoutTLS(socketserver.BaseRequestHandler):
    "Answers whatever it hears with a 400, as servers without TLS do."

    def handle(self):
        if self.request.recv(1):
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def without_tls(request):
    "The port of such a server."
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), WithoutTLS)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    request.addfinalizer(server.server_close)
    request.addfinalizer(server.shutdown)
    return server.server_address[1]


@pytest.mark.parametrize(
    "fault, told",
    [
        ("refused", "connection refused: nothing listens there"),
        ("name", "the name of the host is not known"),
        ("TLS", "no TLS there"),
        ("proxy", "through the proxy of HTTP_PROXY"),
        ("no /v1", "has no /v1 at its end"),
        ("web page", "a web page: is base_url the API's"),
        ("moved", "sends on to https://there.invalid/v1: is that the base_url"),
        ("no web server", "no answer of a web server"),
        ("no address", "is no address of a server"),
        ("odd letter", r"letter 3 of 12 is U\+2011, NON-BREAKING HYPHEN"),
        ("quotes", "stands in quotes"),
    ],
)
def test_the_cause_is_said_before_50_questions(tmp_path, monkeypatch, request, fault, told):
    "Once, and the key is not in it."
    monkeypatch.setenv("NO_PROXY", "")
    page = http(200, b"<html>Welcome</html>", "text/html")
    moved = "Location: https://there.invalid/v1/chat/completions\r\n"
    said = {"web page": page, "moved": http(308, b"", more=moved)}
    said |= {"no web server": b"220 mail.invalid ESMTP\r\n\r\n"}
    missing = http(404, dict(detail="Not Found"))
    with Server(lambda body, times: said.get(fault, missing)) as server:
        url = server.url
        if fault == "proxy":
            monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        if fault in ("odd letter", "quotes"):
            key = "sk\u2011" + "a1B2c3D4e" if fault == "odd letter" else f"'{KEY}'"
            monkeypatch.setenv("OPENAI_API_KEY", key)
        url = {
            "refused": "http://127.0.0.1:9/v1",
            "name": "http://no-such-host.invalid/v1",
            "TLS": f"https://127.0.0.1:{without_tls(request)}/v1",
            "no /v1": url.removesuffix("/v1"),
            "no address": "127.0.0.1:8000/v1",
        }.get(fault, url)
        patient = dict(max_retries=0, batch_size=4, request_timeout=100)
        cfg = config(SimpleNamespace(url=url), tmp_path, 60, **patient)
        with pytest.raises((ServerError, ValueError), match=told) as e:
            main(cfg)
    assert KEY not in str(e.value)
    journal = tmp_path / "feedback.labels.jsonl"
    assert len(read_jsonl(journal) if journal.exists() else []) < 12


# ---- a key is nowhere

CANARY = "sk-" + "canary" + "A9xQ2mZ7pL4vT8wB3nR6"  # put together, as above
DATA = CANARY.encode()
ECHOES = {
    "plain": CANARY,
    "repr": repr(DATA),
    "JSON": json.dumps(dict(key=CANARY)),
    "JSON escapes": "".join(f"\\u{b:04x}" for b in DATA),
    "one escape": CANARY[:9] + f"\\u{DATA[9]:04x}" + CANARY[10:],
    "a slash": CANARY[:12] + "\\/" + CANARY[12:],
    "JSON twice": json.dumps(json.dumps("".join(f"\\u{b:04x}" for b in DATA))),
    "URL": "".join(f"%{b:02X}" for b in DATA),
    "URL twice": "".join(f"%25{b:02x}" for b in DATA),
    "HTML": "".join(f"&#{b};" for b in DATA),
    "HTML hex": "".join(f"&#x{b:x};" for b in DATA),
    "base64": base64.b64encode(DATA).decode(),
    "base64 of a header": base64.urlsafe_b64encode(b"Bearer " + DATA).decode(),
    "basic": base64.b64encode(b"user:" + DATA).decode(),
    "basic, another offset": base64.b64encode(b"u:" + DATA + b"!").decode(),
    "base32": base64.b32encode(DATA).decode(),
    "base85": base64.b85encode(DATA).decode(),
    "ascii85": base64.a85encode(DATA).decode(),
    "hex": DATA.hex(),
    "HEX": DATA.hex().upper(),
    "hex with colons": ":".join(f"{b:02x}" for b in DATA),
    "bytes": "".join(f"\\x{b:02x}" for b in DATA),
    "numbers": str(list(DATA)),
    "capitals": CANARY.upper(),
    "small letters": CANARY.lower(),
    "a header": str({"AUTHORIZATION": f"bearer {CANARY}"}),
    "backwards": CANARY[::-1],
    "spaces": " ".join(CANARY),
    "two lines": CANARY[:15] + "\n    " + CANARY[15:],
    "two strings": CANARY[:15] + '" + "' + CANARY[15:],
    "no width": "\u200b".join(CANARY),
    "the beginning": CANARY[:16],
    "the middle": CANARY[8:24],
    "masked": CANARY[:13] + "*****" + CANARY[-4:],
    "rot13": codecs.encode(CANARY, "rot13"),
    "octal": "".join(f"\\{b:03o}" for b in DATA),
    "quoted-printable": "".join(f"={b:02X}" for b in DATA),
    "0x": ", ".join(f"0x{b:02x}" for b in DATA),
    "code points": " ".join(f"U+{b:04X}" for b in DATA),
    "%u": "".join(f"%u{b:04x}" for b in DATA),
    "braces": "".join(f"\\u{{{b:x}}}" for b in DATA),
    "full width": "".join(chr(b + 0xFEE0) for b in DATA),
    "tags": "".join(f"<b>{c}</b>" for c in CANARY),
    "UTF-16 in base64": base64.b64encode(CANARY.encode("utf-16-le")).decode(),
    "base64 of base64": base64.b64encode(base64.b64encode(DATA)).decode(),
    "base64 of hex": base64.b64encode(DATA.hex().encode()).decode(),
    "hex of base64": base64.b64encode(DATA).hex(),
    "base64 backwards": base64.b64encode(DATA).decode()[::-1],
    "a long end": "sk-..." + CANARY[-6:],
}


@pytest.mark.parametrize("where", ["reply", "error", "refusal", "reasoning"])
def test_a_canary_is_in_no_file_and_no_output(tmp_path, monkeypatch, capfd, where):
    "47 forms of echo; what is read of a reply is what it says, the key or not."
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    echoes = list(ECHOES.values())

    def reply(body, times):
        echo = f"Is it {echoes[number_of(body)]} ?"
        if where == "error":
            return flagged(403, echo)
        if where == "refusal":
            return message(None, refusal=echo)
        if where == "reasoning":
            return message("Final Score: 8", reasoning_content=echo)
        return message(f"{echo}\nFinal Score: 8")

    with Server(reply) as server, contextlib.suppress(ValueError):
        main(config(server, tmp_path, len(echoes), structured=False, max_retries=0))
    rows = read_jsonl(tmp_path / "feedback.labels.jsonl")
    assert len(rows) == len(echoes) and server.keys == {f"Bearer {CANARY}"}
    if where in ("reply", "reasoning"):
        assert {r["score"] for r in rows} == {8} and all(r["key_hidden"] for r in rows)
    written = [f.read_text() for f in tmp_path.rglob("*") if f.is_file()]
    for text in [*written, "".join(capfd.readouterr())]:
        assert not [name for name, echo in ECHOES.items() if echo in text]
        assert not [name for name, echo in ECHOES.items() if json.dumps(echo)[1:-1] in text]
        assert CANARY[3:13].lower() not in text.lower()


@pytest.mark.parametrize("key", ["0", "-", "8", "none", "Final", "any text", "EMPTY"])
def test_hiding_changes_no_number(tmp_path, monkeypatch, key):
    "A key that is no secret hides nothing."
    monkeypatch.setenv("OPENAI_API_KEY", key)
    replies = {0: ("Final Score: 10", 10), 1: ("Final Score: 7-8", None), 2: ("8/10", 8)}
    with Server(lambda body, times: replies[number_of(body)][0]) as server:
        main(config(server, tmp_path, 3, structured=False))
    rows = sorted(read_jsonl(tmp_path / "feedback.labels.jsonl"), key=lambda r: r["sample_id"])
    assert [(r["reply"], r["score"]) for r in rows] == list(replies.values())


# ---- 10,000 requests and 20 kills


@pytest.mark.skipif(os.environ.get("HALOS_NB_LONG") != "soak", reason="make soak")
@pytest.mark.timeout(3600)
def test_soak_10000_requests_and_20_kills(tmp_path):
    "A kill costs at most as many answers as were under way; nothing on disk is asked again."
    n, kills, workers = int(os.environ.get("HALOS_NB_SOAK_REQUESTS", 10_000)), 20, 16
    answered = Counter()

    def reply(body, times):
        i = number_of(body)
        if times == 1 and i % 10 == 3:
            return "500"
        answered[i] += 1
        return f"Final Score: {truth(i)}"

    with Server(reply) as server, open(tmp_path / "log", "w") as log:
        given = tmp_path / "config.json"
        options = dict(structured=False, batch_size=workers, max_retries=3)
        given.write_text(config_json(config(server, tmp_path, n, **options)))
        keys = [(s["prompt_id"], s["sample_id"]) for s in make_samples(n)]
        journal = tmp_path / "feedback.labels.jsonl"
        lost = []
        print("| start | answered | on disk | paid again |")
        for kill in range(kills + 1):
            known = set(answers(journal)) if journal.exists() else set()
            before, first = sum(answered.values()), len(server.heard)
            run = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("ask_judge.py")), str(given)],
                env=environment(tmp_path, OPENAI_API_KEY=KEY),
                stdout=log,
                stderr=log,
            )
            goal = n if kill == kills else (kill + 1) * n // (kills + 1)
            while run.poll() is None and sum(answered.values()) < goal:
                time.sleep(0.05)
            if kill < kills:
                run.send_signal(signal.SIGKILL)
            assert run.wait(1200) == (-signal.SIGKILL if kill < kills else 0)
            time.sleep(0.3)  # what is under way arrives nowhere
            asked = {keys[number_of(b)] for b in server.heard[first:]}
            assert not asked & known
            kept = len(answers(journal)) - len(known)
            lost.append(sum(answered.values()) - before - kept)
            print(f"| {kill + 1} | {kept + lost[-1]} | {kept} | {lost[-1]} |", flush=True)
            assert lost[-1] <= (workers if kill < kills else 0)
    print(f"{len(server.heard)} requests, {sum(lost)} of {n} answers paid again")
    rows = answers(journal)
    assert len(rows) == n
    for i, key in enumerate(keys):
        assert rows[key]["score"] == truth(i)


def test_an_interrupt_waits_for_what_is_asked_and_nothing_is_asked_twice(tmp_path):
    with Server(lambda body, times: f"Final Score: {truth(number_of(body))}", 0.7) as server:
        cfg = config(server, tmp_path, 60, structured=False, batch_size=6)
        alone = environment(tmp_path, OPENAI_API_KEY=KEY)
        del alone["HALOS_NB_PROGRESS"]  # somebody at a terminal
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        first = subprocess.Popen(flags(cfg), env=alone, **pipes)
        while len(server.heard) < 12:
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)
        told = first.communicate(timeout=60)[1]
        journal = tmp_path / "feedback.labels.jsonl"
        asked = len(server.heard)
        assert len(answers(journal)) == asked < 60
        assert "waiting for up to 6 answers" in told and "Traceback" not in told, told
        assert told.endswith("python -m halos_nb.label: interrupted\n")
        assert first.returncode == -signal.SIGINT  # which a shell takes for an interrupt
        again = subprocess.run(flags(cfg), env=alone, timeout=120, capture_output=True)
        assert again.returncode == 0 and len(server.heard) == 60
    assert len(answers(journal)) == 60


def test_an_interrupt_in_a_notebook_stops_asking():
    "A kernel has a loop already, so questions are asked from another thread."
    asked, ended = [], []

    async def ask(i):
        asked.append(i)
        if len(asked) == 4:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        await asyncio.sleep(0.4)
        ended.append(i)
        return ""

    async def kernel():
        todo = deque(range(100))
        run_async(ask_all(lambda: todo.popleft() if todo else None, ask, 4, 9))

    with pytest.raises(KeyboardInterrupt):
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(kernel())
        finally:
            loop.close()
    assert asked == ended == [0, 1, 2, 3]


# ---- what a server or an environment says that no file may hold, or takes

ADDRESSES = dict(
    path=f"http://h/v1/{KEY}",
    query=f"http://h/v1?key={KEY}",
    other="http://h/v1?key=x",
    fragment="http://h/#x",
)


@pytest.mark.parametrize("where", ["given", "environment"])
@pytest.mark.parametrize("address", ADDRESSES.values(), ids=ADDRESSES)
def test_an_address_with_a_secret_is_refused_before_any_work(
    tmp_path, monkeypatch, where, address
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", address if where == "environment" else "http://x/v1")
    cfg = config(SimpleNamespace(url=address if where == "given" else None), tmp_path)
    name = "base_url" if where == "given" else "OPENAI_BASE_URL"
    with pytest.raises(ValueError, match=f"{name}: ") as told:  # there are no samples to read
        main(cfg)
    assert KEY not in str(told.value) and list(tmp_path.iterdir()) == []


def test_a_judges_identity_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for more in (dict(label_prompt=f"Rate! {KEY}"), dict(system_prompt=KEY)):
        with pytest.raises(ValueError, match="holds the value of OPENAI_API_KEY"):
            main(config(SimpleNamespace(url="http://127.0.0.1:9/v1"), tmp_path, 2, **more))
    assert [p.name for p in tmp_path.iterdir()] == ["samples.json"]


ODD_USAGE = (10**400, -1, "40", float("nan"), 1.5, True, [1])


@pytest.mark.parametrize("kind", ["scalar", "pairwise"])
def test_what_no_file_and_no_sum_takes_loses_no_reply(tmp_path, monkeypatch, kind):
    "Half a character in any text, odd counts with prices, an error beside the reply."
    said = "Winner: A" if kind == "pairwise" else "Final Score: 3"
    whole = completion(said)
    end = dict(index=0, message=dict(role="assistant", content=said))
    bad = [http(200, whole | dict(usage=dict(prompt_tokens=n))) for n in ODD_USAGE]
    bad += [
        told(end | dict(finish_reason="\ud800")),
        message(said, reasoning="\udc00"),
        message(said, refusal="\ud800"),
        http(200, whole | error("overloaded \ud800")),
        told(end | dict(finish_reason="stop", error=dict(message="overloaded"))),
        http(200, completion("") | error("overloaded")),
        flagged(400, "bad \ud800"),
    ]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server(lambda body, times: bad[(len(server.heard) - 1) % len(bad)]) as server:
        more = dict(judge=kind, input_price=1, output_price=1, batch_size=1)
        # one winner in both orders is a tie: there is nothing to learn from then
        tied = pytest.raises(ValueError, match="nothing to learn")
        with tied if kind == "pairwise" else contextlib.nullcontext():
            main(config(server, tmp_path, 16, max_retries=0, **more))
    counts = json.loads((tmp_path / "feedback.counts.json").read_bytes())
    rows = read_jsonl(tmp_path / "feedback.labels.jsonl")
    assert len(rows) == len(server.heard) == counts["asked"]
    first = rows[: len(bad)]
    n = len(ODD_USAGE)
    assert all(r["cost"] is None and r["reason"] == "" for r in first[:n])
    ended, thought, refused, beside, inside, empty, flat = first[n:]
    assert ended["finish"] == "?" and "finish_reason ?" in ended["reason"]
    assert thought["reasoning"] == "?" and thought["reason"] == ""
    assert refused["refusal"] == "?" and "refused" in refused["reason"]
    assert (
        beside["reply"] == inside["reply"] == said and empty["reply"] is flat["reply"] is None
    )
    for row in (beside, inside, empty):
        assert "an error beside the answer" in row["reason"] and "overloaded" in row["reason"]
        assert row.get("score") is row.get("winner") is None
    assert [bool(r.get("halves_replaced")) for r in first[n : n + 3]] == [True] * 3
    assert counts["replies_with_half_a_character"] >= 3


def test_a_cut_identity_is_named(tmp_path):
    with Server(score_of) as server:
        main(config(server, tmp_path, 4))
        identity = tmp_path / "feedback.judge.json"
        for cut in (identity.read_bytes()[:40], b"[]"):
            identity.write_bytes(cut)
            with pytest.raises(RecordError, match=r"holds other labels.*feedback\.judge\.json"):
                main(config(server, tmp_path, temperature=1))
        assert main(config(server, tmp_path))["answered_before"] == 4  # the same judge goes on


def test_what_stands_beside_feedback_never_replaces_an_input(tmp_path, monkeypatch):
    write_records(tmp_path / "f.judge.json", make_samples(4))
    before = (tmp_path / "f.judge.json").read_bytes()
    given = dict(samples_file=str(tmp_path / "f.judge.json"))
    with pytest.raises(ValueError, match="over samples_file"):
        url = SimpleNamespace(url="http://127.0.0.1:9/v1")
        main(config(url, tmp_path, **given, output_file=str(tmp_path / "f.json")))
    assert (tmp_path / "f.judge.json").read_bytes() == before
    rules = tmp_path / "rules_of_test.py"
    rules.write_text("def score(prompt, output):\n    return len(output)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    more = dict(function="rules_of_test:score", output_file=str(rules))
    with pytest.raises(ValueError, match="over function"):
        main(LabelConfig(**given, **more))
    assert "def score" in rules.read_text(encoding="utf-8")


# ---- what was paid for is kept, and not paid for in vain

KEPT = {
    "a text": dict(message="Final Score: 5"),
    "a list": dict(message=["Final Score: 5"]),
    "a completion's": dict(text="Final Score: 5"),
    "a stream's": dict(delta=dict(content="Final Score: 5")),
    "parts in parts": dict(message=dict(content=[[part("Final Score: 5")]])),
    "a part of JSON": dict(
        message=dict(content=[dict(type="output_json", json=dict(score=5))])
    ),
    "parsed": dict(message=dict(content=None, parsed=dict(score=5))),
    "a call": dict(message=dict(content="", tool_calls=[dict(function=dict(name="score: 5"))])),
}


@pytest.mark.parametrize("choice", KEPT.values(), ids=KEPT)
def test_an_answer_in_an_odd_place_is_kept(tmp_path, choice):
    "Scored or not, its words are in the journal, and nobody asks again."
    with Server(lambda body, n: told(dict(index=0, finish_reason="stop") | choice)) as server:
        cfg = config(server, tmp_path, 4, structured=False, empty_ok=True)
        main(cfg)
        main(cfg)
    rows = read_jsonl(tmp_path / "feedback.labels.jsonl")
    assert len(server.heard) == len(rows) == 4
    for row in rows:
        assert "core" in row["reply"] and "5" in row["reply"] and row["output_tokens"] == 10
        assert row["score"] == 5 or (row["score"] is None and row["reason"])


@pytest.mark.parametrize("finish", ["length", "stop"])
def test_a_judge_that_is_never_read_is_not_paid_to_the_end(tmp_path, finish):
    "It stops after 50 with the reason; who runs it again goes on, and pays for none twice."
    with Server(lambda body, n: message("Hm.", finish)) as server:
        cfg = config(server, tmp_path, 70, structured=False, batch_size=4, empty_ok=True)
        reason = "max_tokens" if finish == "length" else "states no score"
        with pytest.raises(ServerError, match=f"none of the first 50 replies.*{reason}"):
            main(cfg)
        assert 50 <= len(server.heard) < 54
        assert main(cfg)["unreadable"] == 70
    assert len(server.heard) == 70


def test_one_that_is_read_lets_the_others_be_asked(tmp_path):
    with Server(lambda b, n: "Hm." if number_of(b) != 3 else "Final Score: 3") as server:
        counts = main(config(server, tmp_path, 70, structured=False))
    assert counts["scored"] == 1 and counts["unreadable"] == 69


def test_what_was_answered_before_the_server_stops_is_returned():
    "The predecessor's function has no journal: what was paid for is in what it returns."
    samples = make_samples(12)

    def reply(body, times):
        return (402, error("no money")) if number_of(body) == 5 else "Final Score: 3"

    async def run(server):
        async with openai.AsyncOpenAI(
            api_key="x", base_url=server.url, max_retries=0
        ) as client:
            return await process_samples_with_api(samples, client, "Judge!", "Rate:", "toy", 2)

    with Server(reply) as server, pytest.warns(UserWarning, match="no reward.*no money"):
        scored = asyncio.run(run(server))
    assert [row["reward"] for row in scored[:5]] == [3] * 5 and len(server.heard) < 9
    assert all(row["reward"] == 3 or "no money" in row["reason"] for row in scored)
    everywhere = Server(lambda body, times: (402, error("no money")))
    with everywhere as server, pytest.raises(ServerError, match="no money"):
        asyncio.run(run(server))


def test_a_long_reply_keeps_nobody_waiting(tmp_path):
    "While it is read, the others go on: they are on disk before it, and none is over its time."
    long = "It is a clear answer. " * 32_000 + "\nFinal Score: 3"
    with Server(lambda body, n: long if number_of(body) == 0 else "Final Score: 3") as server:
        counts = main(config(server, tmp_path, 30, structured=False, batch_size=4))
    assert counts["scored"] == len(server.heard) == 30
    rows = read_jsonl(tmp_path / "feedback.labels.jsonl")
    assert [len(row["reply"]) for row in rows].index(len(long)) > 4


def test_zeros_that_a_disk_leaves_are_a_torn_line(tmp_path):
    with Server(score_of) as server:
        main(config(server, tmp_path, 4))
        journal = tmp_path / "feedback.labels.jsonl"
        first, *rest = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(first + b"".join(rest) + b"\0" * 99)
        assert main(config(server, tmp_path))["answered_before"] == 4
        journal.write_bytes(first + b"\0" * 99 + b"\n" + b"".join(rest[1:]) + rest[0][:9])
        assert main(config(server, tmp_path))["answered_before"] == 3
        journal.write_bytes(first + b"?\n" + b"".join(rest))
        with pytest.raises(RecordError, match="line 2.*Mend or remove this line"):
            main(config(server, tmp_path))
        without = json.loads(first)
        del without["reply"]
        journal.write_bytes(json.dumps(without).encode() + b"\n" + b"".join(rest))
        with pytest.raises(RecordError, match="record 1: field `reply` is missing"):
            main(config(server, tmp_path))


def test_a_slow_judge_is_told_which_time_is_over(tmp_path):
    with Server(lambda body, n: "hang") as server:
        cfg = config(server, tmp_path, 6, request_timeout=0.2, max_retries=0, batch_size=6)
        with pytest.raises(ServerError, match="it was heard.*request_timeout"):
            main(cfg)


def streamed(text, *, ends="stop", kind="text/event-stream"):
    "A stream of parts that nobody asked for."
    parts = [dict(content=piece) for piece in re.findall(r".{1,7}", text, re.S)]
    lines = []
    for delta, finish in [*((d, None) for d in parts), ({}, ends)]:
        choice = dict(index=0, delta=delta, finish_reason=finish)
        lines.append(json.dumps(dict(object="chat.completion.chunk", choices=[choice])))
    usage = dict(prompt_tokens=40, completion_tokens=10)
    lines += [json.dumps(dict(choices=[], usage=usage)), "[DONE]"]
    body = "".join(f": ping\n\ndata: {line}\n\n" for line in lines)
    return http(200, body.encode(), kind)


def chosen(content="Final Score: 8", finish="stop", **more):
    said = dict(role="assistant", content=content) | more.pop("said", {})
    return dict(index=0, message=said, finish_reason=finish) | more


CALL = dict(id="c", type="function", function=dict(name="s", arguments='{"score": 3}'))
AS_ASKED, ODDLY = "Fine.\nFinal Score: 8", "Final Score: 8"


@pytest.mark.parametrize(
    "body, score, told",
    [
        (streamed(AS_ASKED), 8, ""),
        (streamed(AS_ASKED, kind="application/json"), 8, ""),
        (streamed(AS_ASKED, ends="length"), None, "cut off at max_tokens"),
        (streamed(AS_ASKED, ends=None), None, "not complete"),
        (told(chosen(native_finish_reason="MAX_TOKENS")), None, "cut off"),
        (told(chosen(stop_reason="max_tokens")), None, "cut off"),
        (told(chosen(native_finish_reason="STOP", stop_reason=128001)), 8, ""),
        (told(chosen(said=dict(tool_calls=[CALL]))), None, "a tool call beside its text"),
        (told(chosen(said=dict(tool_calls=[], function_call=None))), 8, ""),
        (told(chosen(said=dict(role="user"))), None, "the user's words"),
        (
            http(200, completion("?") | dict(choices=[chosen("3") | dict(index=1), chosen()])),
            8,
            "",
        ),
    ],
)
def test_an_answer_that_comes_otherwise_is_read_or_kept(tmp_path, body, score, told):
    "It is paid for: in the journal, and nobody asks again."
    with Server(lambda *asked: body) as server:
        cfg = config(server, tmp_path, 2, structured=False, max_retries=0)
        for _ in range(2):
            with contextlib.suppress(ValueError):
                main(cfg)
    assert len(server.heard) == 2
    for row in read_jsonl(tmp_path / "feedback.labels.jsonl"):
        assert row["score"] == score and told in row["reason"]
        assert "Final Score: 8" in row["reply"]
        assert (row["input_tokens"], row["output_tokens"]) == (40, 10)


def test_an_answer_of_another_protocol_is_told(tmp_path):
    "What it holds is shown, not what it lacks."
    said = dict(type="message", content=[dict(type="text", text="Final Score: 8")])
    with Server(lambda *asked: http(200, said)) as server, contextlib.suppress(ValueError):
        main(config(server, tmp_path, 2, structured=False, max_retries=0))
    [row, _] = read_jsonl(tmp_path / "feedback.labels.jsonl")
    assert "'text': 'Final Score: 8'" in row["reason"] and "None" not in row["reason"]
    assert "has no choices: is it OpenAI's chat protocol?" in row["reason"]


SIGN = "\x1b[2J\x1b]8;;http://there.invalid\x07\u202e"


@pytest.mark.parametrize(
    "body",
    [
        message(None, refusal=SIGN),
        message("Final Score: 8", SIGN),
        flagged(403, SIGN),
        flagged(401, SIGN),
        http(200, SIGN.encode(), "text/html"),
    ],
)
def test_a_terminal_obeys_no_server(tmp_path, body):
    "What clears a screen, makes a link or turns letters around is spelt out."
    with Server(lambda *asked: body) as server, pytest.raises(Exception, match="x1b.2J") as e:
        main(config(server, tmp_path, 4, structured=False, max_retries=0))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", str(e.value))

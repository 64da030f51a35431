"""What leaves a run: the curve of its rounds in a tracker, a card beside the model, and the
model on a hub, here one on this machine. Real trackers by `make test-trackers`.
"""

import base64
import importlib.util
import json
import os
import sqlite3
import tempfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from halos_nb.configs import LoopConfig, TrainConfig
from halos_nb.handover import model_card, push, track_round
from halos_nb.identity import TOLD_ELSEWHERE, RunFiles, change, identity
from halos_nb.loop import train_stage
from halos_nb.models import small_llama
from halos_nb.records import append_jsonl, file_hash, read_jsonl, write_json, write_records
from halos_nb.settings import Profile
from halos_nb.templates import byte_tokenizer
from halos_nb.train import train


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A tiny model and four pairs."
    home, tok = tmp_path_factory.mktemp("trackers"), byte_tokenizer()
    small_llama(tok, hidden_size=16, heads=2).save_pretrained(home / "start")
    tok.save_pretrained(home / "start")
    for i in range(4):
        row = {"prompt": "Say " * (i + 1), "chosen": "Yes!" * (i + 1), "rejected": "No."}
        append_jsonl(home / "pairs.jsonl", row)
    return home


def two_rounds(home, where, **more):
    "Two trainings of two steps; the second goes on from the first."
    cfg = TrainConfig(
        loss="dpo",
        model=str(home / "start"),
        train_datasets=[str(home / "pairs.jsonl")],
        test_datasets=[str(home / "pairs.jsonl")],
        exp_name="one",
        cache_dir=str(where),
        lr=1e-2,
        batch_size=2,
        tracker_run="curve",
        tracker_dir=str(where / "trackers"),
        **more,
    )
    first = train(cfg)
    train(replace(cfg, exp_name="two", from_checkpoint=first.model))
    return cfg


class Recorder(TrainerCallback):
    "A tracker that remembers what it was told."

    told: list = []
    events: list = []

    def on_train_begin(self, args, state, control, **kw):
        said = args.to_dict()
        self.events.append(["begin", args.run_name, said["halos_nb/lr"], said["learning_rate"]])
        assert json.loads(args.to_json_string())["halos_nb/loss"] == "dpo"

    def on_log(self, args, state, control, logs=None, **kw):
        self.told.append(dict(logs) | dict(at=state.global_step))

    def on_train_end(self, args, state, control, **kw):
        self.events.append(["end", state.global_step])


def test_the_rounds_of_a_run_are_one_curve_in_a_tracker(home, tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "told", [])
    monkeypatch.setattr(Recorder, "events", [])
    two_rounds(home, tmp_path, report_to="none, recorder")
    steps = [row["at"] for row in Recorder.told if "loss" in row]
    assert steps == [1, 2, 3, 4]
    lines = read_jsonl(tmp_path / "one/metrics.jsonl") + read_jsonl(
        tmp_path / "two/metrics.jsonl"
    )
    assert [row["loss"] for row in Recorder.told if "loss" in row] == [
        row["loss"] for row in lines if "loss" in row
    ]
    # what is logged behind the last step is told, too: the summary and the last evaluation
    assert sum("summary/loss" in row for row in Recorder.told) == 2
    begin, end = ["begin", "curve", 1e-2, 1e-2], ["end", 2]
    assert Recorder.events == [begin, end, begin, ["end", 4]]
    assert [row["step"] for row in lines if "loss" in row] == [1, 2, 1, 2]


@pytest.mark.parametrize("name", ["nobody", "comet_ml"])
def test_a_tracker_that_is_not_here_is_told_before_any_work(home, tmp_path, name):
    cfg = TrainConfig(loss="dpo", model=str(tmp_path / "none"), report_to=name)
    with pytest.raises(ValueError, match=f"report_to: {name}: "):
        train(replace(cfg, train_datasets=["-"], cache_dir=str(tmp_path)))


def test_where_metrics_go_makes_no_result_another_one(home, tmp_path):
    cfg = LoopConfig(sft_checkpoint=str(home / "start"), lr=1e-3, reward_checkpoint="r")
    cfg = replace(cfg, prompts="p")
    files = RunFiles(tmp_path, Profile())
    stages = [
        train_stage(replace(cfg, report_to=name), tmp_path / "round-1", 1, None)
        for name in ("none", "tensorboard, trackio")
    ]
    assert stages[1].config.report_to == "tensorboard, trackio"
    assert stages[1].config.tracker_dir == str(tmp_path / "trackers")
    was, now = [identity(files, stage) for stage in stages]
    assert was == now and not set(TOLD_ELSEWHERE) & set(now["config"])
    told = was | dict(config=was["config"] | dict(report_to="none"))
    assert change(told, now) == ""


# ---- real trackers

# Trackio reads where to keep its files when it is imported
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()
real = [name for name in ("tensorboard", "trackio", "wandb") if importlib.util.find_spec(name)]


def rows_of_trackio(run):
    "What Trackio was told of a run, in order."
    db = sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "halos_nb.db")
    told = "select metrics from metrics where run_name = ? order by id"
    return [json.loads(row) for (row,) in db.execute(told, (run,))]


def steps_in(name, where):
    "The steps of the loss's curve, as a tracker keeps it on disk."
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(where / "trackers/tensorboard"))
        found.Reload()
        assert (
            "halos_nb/loss"
            in found.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
        )
        return [event.step for event in found.Scalars("train/loss")]
    if name == "trackio":
        rows = rows_of_trackio("curve")
        return [row["train/global_step"] for row in rows if "train/loss" in row]
    files = sorted(where.glob("wandb/wandb/offline-run-*/*.wandb"))
    assert len({file.stem for file in files}) == 1  # one run, gone on with
    return [step for file in files for step in steps_in_wandb(file)]


def records_in(data):
    "The records of a file in LevelDB's log format, behind its header of 7 bytes."
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the end of a block is filled up
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def steps_in_wandb(file):
    "The steps of the loss's curve in an offline run's file."
    from wandb.proto.wandb_internal_pb2 import Record

    for data in records_in(file.read_bytes()):
        row = {}
        for item in Record.FromString(data).history.item:
            row["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        if "train/loss" in row:
            yield row["train/global_step"]


@pytest.mark.parametrize("name", real)
def test_a_real_tracker_has_one_curve(home, tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    (tmp_path / "wandb").mkdir()
    two_rounds(home, tmp_path, report_to=name)
    assert steps_in(name, tmp_path) == [1, 2, 3, 4]


# ---- the card and the hub


@pytest.fixture
def run(home, tmp_path):
    "A run of one round, its model sealed as the ledger does it."
    run = tmp_path / "mine"
    folder = run / "round-1"
    folder.mkdir(parents=True)
    samples = []
    for i in range(4):
        said = dict(prompt_id=f"p{i // 2}", sample_id=i % 2, output="<b>|", type="sample")
        said |= dict(prompt=[dict(role="user", content="Is it?")], reference_logps=-2.0)
        samples.append(said | dict(policy_logps=-1.0))
        label = dict(prompt_id=f"p{i // 2}", sample_id=i % 2, score=None if i == 3 else i)
        label |= dict(labeller="rm:x", reason="")
        append_jsonl(folder / "feedback.labels.jsonl", label)
    write_records(folder / "samples.json", samples)
    pair = dict(prompt_id="p0", prompt=samples[0]["prompt"], type="pairwise_feedback", label=1)
    for side, text in (("A", "<script>|"), ("B", "no")):
        pair[f"output_{side}"] = [dict(role="assistant", content=text)]
        pair[f"reward_{side}"] = 1.0
    write_records(folder / "feedback.json", [pair | dict(reward_difference=0.5)])
    counts = dict(prompts=2, samples=4, unscored=1, ties=3)
    write_json(folder / "feedback.counts.json", counts)
    append_jsonl(folder / "metrics.jsonl", {"step": 1, "summary/loss": 0.6})
    for stage in ("sample", "label", "train"):
        event = dict(event="finished", time=0.0, stage=stage, seconds=1.0, folder="round-1")
        append_jsonl(run / "ledger.jsonl", event)
    final = folder / "policy/FINAL"
    final.parent.mkdir()
    for file in (home / "start").iterdir():
        final.mkdir(exist_ok=True)
        (final / file.name).write_bytes(file.read_bytes())
    (final / "optimizer.pt").write_bytes(b"moments")
    outputs = {"round-1/policy/FINAL": file_hash(final), "round-1/metrics.jsonl": "x"}
    done = dict(config={}, code="", libraries={}, inputs=[])
    sealed = dict(stage="train", identity=done, outputs=outputs, pruned=[])
    write_json(folder / "train.manifest.json", sealed)
    (run / "policy").symlink_to("round-1/policy/FINAL")
    params = dict(method="dpo", lr=1e-3, prompts="/home/me/data/p.json", beta=0.1)
    told = dict(parameters=params, versions=dict(torch="2"), ended="as [planned](http://x)")
    write_json(run / "params.json", told)
    return run


def test_a_card_says_what_the_run_says_and_breaks_no_seal(run):
    final = run / "round-1/policy/FINAL"
    before = file_hash(final)
    card = model_card(run)
    text = card.read_text()
    assert card == run / "round-1/policy/README.md" and file_hash(final) == before
    assert "1.000 \\[" in text  # mean of 0, 1, 2; the unscored one is none
    assert "label: unscored 1; label: ties 3" in text
    assert "data/p.json" in text and "/home/me" not in text
    assert "as \\[planned\\]\\(http&#58;//x\\)" in text
    assert "<b>" not in text and "<script" not in text
    assert text.count("to be filled in") == 3


class FakeHub(BaseHTTPRequestHandler):
    "What `huggingface_hub` asks of a hub when it sends files that are small."

    def answer(self, said):
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub = self.server.hub
        hub.tokens.add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            hub.made.append(json.loads(body))
            self.answer(dict(url=f"http://{self.headers['Host']}/me/mine", name="me/mine"))
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            mode = dict(uploadMode="regular", shouldIgnore=False)
            self.answer(dict(files=[dict(path=path) | mode for path in files]))
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.files[line["value"]["path"]] = content
            at = f"http://{self.headers['Host']}/me/mine/commit/{'0' * 40}"
            self.answer(dict(success=True, commitOid="0" * 40, commitUrl=at, hookOutput=""))
        else:
            self.answer({})

    def do_GET(self):
        self.answer(dict(id="me/mine", sha="0" * 40, siblings=[]))

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    "A hub on this machine, and where it keeps what it was sent."
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.hub = SimpleNamespace(made=[], files={}, tokens=set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    import huggingface_hub.hf_api as api
    from huggingface_hub import constants

    for module in (api, constants):
        if hasattr(module, "ENDPOINT"):
            monkeypatch.setattr(module, "ENDPOINT", at)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server.hub
    server.shutdown()


def test_a_model_and_its_card_go_to_the_hub_and_nothing_else(run, hub):
    url = push(run, "me/mine")
    assert url.endswith("/me/mine")
    [made] = hub.made
    assert made["visibility"] == "private" and hub.tokens == {"Bearer secret-of-the-test"}
    final = run / "round-1/policy/FINAL"
    assert hub.files["model.safetensors"] == (final / "model.safetensors").read_bytes()
    assert hub.files["README.md"] == (final.parent / "README.md").read_bytes()
    assert {"config.json", "tokenizer.json"} <= set(hub.files)
    assert "optimizer.pt" not in hub.files


def test_the_best_policy_goes_to_the_hub_if_it_is_asked_for(run, hub):
    with pytest.raises(ValueError, match="nobody asked which policy is best"):
        push(run, "me/mine", which="best")
    assert not hub.made
    params = json.loads((run / "params.json").read_text())
    keeping = dict(parameters=params["parameters"] | dict(keep="best"))
    (run / "params.json").write_text(json.dumps(params | keeping))
    with pytest.raises(ValueError, match="no policy of it has been scored yet"):
        push(run, "me/mine", which="best")
    best = dict(policy="round-1/policy/FINAL", words="round 1's: 0.48")
    (run / "params.json").write_text(json.dumps(params | dict(best=best)))
    push(run, "me/mine", which="best")
    final = run / "round-1/policy/FINAL"
    assert hub.files["model.safetensors"] == (final / "model.safetensors").read_bytes()
    assert b"the best of the run" in hub.files["README.md"]


def test_a_model_that_has_changed_is_not_sent(run, hub):
    (run / "round-1/policy/FINAL/config.json").write_text("{}")
    with pytest.raises(ValueError, match="not what its training wrote; it is not sent"):
        push(run, "me/mine")
    assert not hub.made and not hub.files


@pytest.mark.skipif("trackio" not in real, reason="Trackio is not installed")
def test_trackio_gets_a_rounds_row_pairs_and_figure(run):
    this = SimpleNamespace(name="round-1", number=1, folder=run / "round-1")
    this.feedback_file = this.folder / "feedback.json"
    assert track_round(run, LoopConfig(report_to="trackio", run_name="mine"), this)
    [row] = rows_of_trackio("mine")
    assert row["round/reward"] == 1.0 and row["round/unscored"] == 1
    assert "round/scores" in row and "<script>|" in json.dumps(row["round/pairs"])

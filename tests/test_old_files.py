"""Files of November 2026, before feedback named its samples, open with today's code and say
what they said.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from halos_nb import ledger
from halos_nb.compare import RunComparer
from halos_nb.configs import LabelConfig, LoopConfig, TrainConfig
from halos_nb.data import get_feedback
from halos_nb.label import main as label
from halos_nb.loop import run_rounds
from halos_nb.page import report
from halos_nb.pairs import flag_pair, read_pairs, static_view
from halos_nb.people import Session, comparisons, samples_of_pairs, session_feedback
from halos_nb.records import check_record, read_jsonl, read_records
from halos_nb.runs import read_run, run_summary
from halos_nb.settings import Settings
from halos_nb.train import train

OLD = Path(__file__).parent / "data/2026-11"
WHERE = "/tmp/halos/2026-11"  # where they were written
FEEDBACK = OLD / "feedback"


@pytest.fixture
def old(tmp_path):
    "A copy that may be written to, whose paths lead to itself."
    copy = shutil.copytree(OLD, tmp_path / "old", symlinks=True)
    for kind in ("json", "jsonl"):
        for file in copy.rglob(f"*.{kind}"):
            file.write_text(file.read_text().replace(WHERE, str(copy)))
    return copy


def words(turns):
    return turns[0]["content"]


# ---- feedback and journals


@pytest.mark.parametrize(
    "kind, answers, pairs", [("pairwise", 5, 3), ("binary", 8, 0), ("scalar", 8, 0)]
)
def test_feedback_is_read(kind, answers, pairs):
    file = FEEDBACK / kind / "feedback.json"
    rows = read_records(file, f"{kind}_feedback")
    assert kind == "scalar" or not any("sample_id" in key for r in rows for key in r)
    data = get_feedback(file)
    assert sum(len(e.generations) for e in data) == answers
    assert sum(len(e.pairs) for e in data) == pairs


def test_the_pair_browser_matches_words_and_says_so(tmp_path):
    shutil.copytree(FEEDBACK / "pairwise", tmp_path / "round-1")
    shutil.copy(FEEDBACK / "samples.json", tmp_path / "round-1")
    pairs = read_pairs(tmp_path)
    scores = [{words(r["output_A"]), words(r["output_B"])} for r in pairs.records]
    assert scores == [{"Deneb", "Rigel"}, {"Io", "Titan"}, {"Io", "Europa"}]
    assert pairs.said[0] == {"function:rate:rate": 1.0}
    assert (pairs.unknown, pairs.by_text) == (0, 3)
    assert "3 matched to labels by their words" in static_view(pairs).parts[0].text
    flag_pair(pairs, 1)
    assert read_pairs(tmp_path).flags == {1}


@pytest.mark.parametrize("kind", ["binary", "scalar"])
def test_the_pair_browser_shows_other_feedback(kind):
    pairs = read_pairs(FEEDBACK / kind / "feedback.json", FEEDBACK / "samples.json")
    gaps = [r["reward_difference"] for r in pairs.records]
    assert gaps == [6.0, 5.0], "the widest between different words"
    assert pairs.by_text == (2 if kind == "binary" else 0), "scalar feedback had ids"


def converted(tmp_path, journal, **more):
    "What `--from_labels` makes of a journal."
    cfg = LabelConfig(
        samples_file=str(FEEDBACK / "samples.json"),
        output_file=str(tmp_path / "feedback.json"),
        from_labels=str(FEEDBACK / journal / "feedback.labels.jsonl"),
        **more,
    )
    label(cfg)
    return read_records(tmp_path / "feedback.json")


def without_ids(rows):
    return [{k: v for k, v in r.items() if not k.startswith("sample_id")} for r in rows]


@pytest.mark.parametrize(
    "kind, more",
    [
        ("pairwise", dict(feedback_type="pairwise", feedback_mode="random")),
        ("binary", dict(feedback_type="binary")),
        ("scalar", {}),
        ("judged", dict(seed=3)),
    ],
)
def test_a_journal_becomes_the_same_feedback(tmp_path, kind, more):
    before = read_records(FEEDBACK / kind / "feedback.json")
    made = converted(tmp_path, kind, **more)
    assert without_ids(made) == without_ids(before)
    for r in made:
        check_record(r, r["type"])
        assert any("sample_id" in key for key in r)


def test_a_session_is_replayed_and_continued(tmp_path):
    shutil.copy(FEEDBACK / "session.jsonl", tmp_path)
    samples = read_records(FEEDBACK / "samples.json", "sample")
    session = Session(tmp_path / "session.jsonl", samples, labeller="human:ada")
    held = {name: a["value"] for name, a in session.state.choose.items()}
    values = ("left", "right", "tie", "skip", "bad", "left", "left")
    assert held == {f"{k:04d}": v for k, v in enumerate(values, 1)}
    assert (session.state.undone, session.state.note) == (2, {})
    assert session.current.name == "0008"
    session.choose("left")
    assert Session(session.path, samples, labeller="human:ada").current is None
    rows = comparisons(session)
    assert [r["winner"] for r in rows] == ["B", "B", "tie", None, "tie", "B", "B", "B"]
    by_id = {(s["prompt_id"], s["sample_id"]): s["output"] for s in samples}
    for r in session_feedback(session).records:
        assert by_id[r["prompt_id"], r["sample_id_A"]] == words(r["output_A"])


def test_pairs_to_label_again():
    found = samples_of_pairs(read_records(FEEDBACK / "pairwise/feedback.json"))
    assert [s["output"] for s in found.samples] == ["Deneb", "Rigel", "Io", "Titan", "Europa"]
    assert [s["sample_id"] for s in found.samples] == [0, 1, 0, 1, 2]
    assert list(found.margins.values()) == [1.0, -3.0, -1.0]


# ---- runs and checkpoints


def test_a_run_is_shown(old):
    rows = run_summary(old / "run")
    assert [(r["round"], r["samples"], r["examples"]) for r in rows] == [
        ("1", 16, 8),
        ("2", 16, 8),
        ("final", 16, None),
    ]
    run = read_run(old / "run")
    rewards = [s["reward"] for s in json.loads((old / "run/final/feedback.json").read_text())]
    assert [s["reward"] for s in run.samples("final")] == rewards
    (row,) = RunComparer(old, ["run"], mode="static").rows(only_differences=False)
    assert row["run"] == "run"
    page = report(old / "run").read_text()
    assert "round 2" in page and "Pairs" in page
    pairs = read_pairs(old / "run")
    # 16 pairs without ids, and the widest of each prompt's final samples
    assert (len(pairs), pairs.unknown, pairs.by_text) == (20, 0, 16)


def test_training_goes_on_from_a_checkpoint(old, tmp_path):
    "Policy, optimiser and schedule continue where they were."
    config = json.loads((old / "run/round-2/train.config.json").read_text())
    final = old / "run/round-2/policy/FINAL"
    where = dict(
        from_checkpoint=str(final),
        cache_dir=str(tmp_path),
        metrics_file=str(tmp_path / "metrics.jsonl"),
    )
    train(TrainConfig(**config | where))
    made = tmp_path / "policy/FINAL"

    def steps(folder):
        held = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        return {float(state["step"]) for state in held.values()}

    assert (steps(final), steps(made)) == ({4.0}, {6.0})
    assert json.loads((made / "counters.json").read_text())["total_steps"] == 6
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in r] == [1, 2]


def test_a_run_goes_on(old, monkeypatch):
    "Its code has changed, so its stages are done again, and the ledger says why."
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}")
    real = ledger.launch
    monkeypatch.setattr(
        ledger, "launch", lambda *a, **k: real(*a[:4], "pretend", **k)
    )  # stages that need no model
    (old / "models/policy/weights").write_text("start")
    parameters = json.loads((old / "run/params.json").read_text())["parameters"]
    rounds = run_rounds(
        LoopConfig(**parameters, audit="skip", on_change="redo"),
        Settings(runs_dir=str(old)),
        watch=lambda job, **shown: job.wait(show=False),
    )
    assert [(r.name, r.skipped) for r in rounds] == [
        ("round-1", []),
        ("round-2", []),
        ("final", []),
    ]
    events = read_jsonl(old / "run/ledger.jsonl")
    begun = [i for i, e in enumerate(events) if e["event"] == "run"]
    assert len(begun) == 2
    started = [e for e in events[begun[1] :] if e["event"] == "started"]
    why = [e["why"] for e in started if e["stage"] != "check"]
    assert len(why) == 8 and all(w.startswith("changed: ") for w in why), why
    assert len(started) == 10  # after each training a look that was unknown then
    assert [r["samples"] for r in run_summary(old / "run")] == [16] * 3

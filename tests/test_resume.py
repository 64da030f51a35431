"""A training that is ended between two steps goes on to the same bits; nothing is lost, nothing
stands there twice, and what belongs to another run is not taken.
"""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from faults import has_another_bit
from job_helpers import NEEDS_LINUX, ONE, quiet
from test_trainers import LORA, scored_answer


from halos_nb import tree_trainer
from halos_nb.configs import LabelConfig, SampleConfig, TrainConfig
from halos_nb.failures import StageError
from halos_nb.identity import Stage
from halos_nb.ledger import Ledger
from halos_nb.label import main as label
from halos_nb.models import load_reward_model, load_tokenizer, small_llama
from halos_nb.records import as_turns, file_hash, read_jsonl, write_records
from halos_nb.resume import STATE, step_folders
from halos_nb.sample import main as sample
from halos_nb.templates import byte_tokenizer
from halos_nb.train import train
from halos_nb.tree_trainer import TreeTrainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def progress_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "progress.jsonl"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("resume"))


def make_home(home):
    "A tiny model, twelve pairs, six prompts with scored answers."
    tok = byte_tokenizer()
    model = small_llama(tok, hidden_size=16, layers=1, initializer_range=0.3)
    for part in (model, tok):
        part.save_pretrained(home / "start")
    rows = []
    for i in range(12):
        asked = "Say it " + "again " * (i % 5)
        rows.append({"prompt": asked + str(i), "chosen": "Yes" + "!" * i, "rejected": "No."})
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = [
        scored_answer(f"Count {i}", k, float((i + k) % 3)) for i in range(6) for k in range(3)
    ]
    write_records(home / "scores.json", scored)
    return home


def config(home, loss="dpo", name="run", **more):
    "Two epochs of four steps; a checkpoint behind every third."
    data = [str(home / ("scores.json" if loss == "grpo" else "pairs.jsonl"))]
    given = dict(
        loss=loss,
        model=str(home / "start"),
        train_datasets=data,
        exp_name=name,
        cache_dir=str(home),
        lr=1e-2,
        warmup=0,
        batch_size=2 if loss == "grpo" else 3,
        epochs=2,
        save_every=3,
    )
    return TrainConfig(**given | more)


class Killed(BaseException):
    "As a kill: nothing of ours catches it."


def train_until(cfg, step, monkeypatch):
    "Train, and end within the step behind this one."
    own = TreeTrainer.training_step

    def dying(self, *args, **kw):
        if self.state.global_step == step:
            raise Killed
        return own(self, *args, **kw)

    with monkeypatch.context() as patched:
        patched.setattr(TreeTrainer, "training_step", dying)
        with pytest.raises(Killed):
            train(cfg)


TIMES = ("tokens_per_second", "train_runtime", "train_samples_per_second")
TIMES += ("train_steps_per_second",)


def lines(folder):
    "The metrics of a run, but for what a clock says."
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_same(home, one, two):
    "The same bits in every file of FINAL, the same lines of metrics."
    assert lines(home / one) == lines(home / two)
    for path in sorted((home / one / "FINAL").rglob("*")):
        other = home / two / path.relative_to(home / one)
        assert path.is_dir() or file_hash(path) == file_hash(other), path


# other methods, and more of them, are killed by `make test-resume`
CASES = {
    "dpo": dict(loss="dpo", eval_every=2, log_every=4, test_datasets="pairs"),
    "ppo": dict(loss="ppo", ppo_epochs=2, save_every=5, epochs=1, old_policy="pass"),
    "dropout": dict(loss="sft", dropout=0.2, max_prompt_count=1),
    "average": dict(loss="kto", reference="ema", ema_decay=0.8, n_examples=19),
    "lora": dict(loss="dpo", humanline=True, sync_reference=2, **LORA),
}
# the step within which it is ended, and where it goes on
ENDED = {"dpo": (4, 3), "ppo": (5, 4), "average": (6, 6)}


@pytest.mark.parametrize("case", CASES)
def test_it_ends_in_the_same_bits(home, case, monkeypatch):
    "In the middle of an epoch, at its end, between two lines of the metrics, in the second."
    more = dict(CASES[case])
    if more.get("test_datasets"):
        more["test_datasets"] = [str(home / "pairs.jsonl")]
    ended, at = ENDED.get(case, (5, 3))
    train(config(home, name=f"{case}-whole", **more))
    cut = config(home, name=f"{case}-cut", **more)
    train_until(cut, ended, monkeypatch)
    assert step_folders(home / f"{case}-cut")
    counts = train(cut).counts
    assert_same(home, f"{case}-whole", f"{case}-cut")
    assert (counts["resumed_at"], counts["steps_repeated"]) == ([at], ended - at)
    assert not step_folders(home / f"{case}-cut")
    assert not (home / f"{case}-cut/attempts.jsonl").exists()


@pytest.fixture
def whole(home, tmp_path, monkeypatch):
    "A run that nobody ended, and a folder with the same start for others."
    if not (home / "whole/FINAL").exists():
        train(config(home, name="whole"))
    for name in ("start", "pairs.jsonl", "whole"):
        (tmp_path / name).symlink_to(home / name)
    return tmp_path


def test_it_is_ended_again_and_again(whole, monkeypatch):
    "Before there is a checkpoint, while one is written, and in its last step."
    cut = config(whole)
    train_until(cut, 2, monkeypatch)
    seals = []

    def dying(folder):
        seals.append(folder.name)
        if len(seals) == 2:
            raise Killed
        return own(folder)

    own = tree_trainer.seal
    with monkeypatch.context() as patched:
        patched.setattr(tree_trainer, "seal", dying)
        with pytest.raises(Killed):
            train(cut)
    assert (whole / "run/step-6.partial").exists()
    train_until(cut, 7, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(tree_trainer, "seal", dying)
        seals[:] = ["behind the last step"]
        with pytest.raises(Killed):
            train(cut)
    counts = train(cut).counts
    assert_same(whole, "whole", "run")
    assert counts["resumed_at"] == [3, 6, 6]
    assert counts["steps_repeated"] == 2 + 3 + 1 + 2
    names = [path.name for path in (whole / "run").iterdir()]
    assert sorted(names) == ["FINAL", "counts.json", "metrics.jsonl"]


@pytest.mark.parametrize(
    "name, damage",
    [("model.safetensors", has_another_bit), (f"{STATE}/rank-0.safetensors", Path.unlink)],
)
def test_one_that_is_not_what_was_written_is_passed_over(
    whole, name, damage, monkeypatch, capfd
):
    train_until(config(whole), 7, monkeypatch)
    damage(whole / "run/step-6" / name)
    capfd.readouterr()
    assert train(config(whole)).counts["resumed_at"] == [3]
    said = capfd.readouterr().err
    assert f"step-6 is not what was written ({whole / 'run/step-6' / name}:" in said
    assert "goes on from" in said
    assert_same(whole, "whole", "run")


@pytest.mark.parametrize("change", ["lr", "models", "code"])
def test_what_belongs_to_another_run_is_not_taken(whole, change, monkeypatch, capfd):
    "It starts anew and says so, and leaves alone what it does not know."
    other = config(whole, lr=2e-2) if change == "lr" else config(whole)
    if change == "models":
        shutil.copytree(whole / "start", whole / "changed")
        (whole / "changed/generation_config.json").write_text('{"max_length": 9}')
        other = replace(other, model=str(whole / "changed"))
    with monkeypatch.context() as patched:
        if change == "code":
            patched.setattr("halos_nb.checkpoints.package_hash", lambda: "of before")
        train_until(other, 4, monkeypatch)
    (whole / "run/step-3").rename(whole / "run/step-100")
    capfd.readouterr()
    counts = train(config(whole)).counts
    said = capfd.readouterr().err
    assert f"step-100 belongs to another run, which differs in {change}; not used" in said
    assert "starts anew" in said
    assert "resumed_at" not in counts
    assert_same(whole, "whole", "run")
    assert (whole / "run/step-100").exists()


def test_a_run_that_is_over_is_another_when_it_is_asked_for_again(whole, capfd):
    cfg = config(whole, keep_steps=0)
    train(cfg)
    assert [path.name for path in step_folders(whole / "run")] == ["step-6", "step-3"]
    capfd.readouterr()
    assert "resumed_at" not in train(cfg).counts
    assert "step-6 is of a run that is over; not used" in capfd.readouterr().err
    train(replace(cfg, keep_steps=1, exp_name="one"))
    assert [path.name for path in step_folders(whole / "one")] == ["step-6"]


@pytest.mark.parametrize("where", ["run", "elsewhere"])
def test_given_by_hand_it_passes_over_what_was_seen(whole, where, monkeypatch, capfd):
    "In its own folder, though there is a newer one; or elsewhere, with metrics from there on."
    train_until(config(whole), 7, monkeypatch)
    capfd.readouterr()
    by_hand = config(whole, name=where, from_checkpoint=str(whole / "run/step-3"))
    counts = train(by_hand).counts
    assert "step-3 is of this run, which goes on behind it" in capfd.readouterr().err
    assert counts["steps"] == 8
    if where == "run":
        assert_same(whole, "whole", "run")
        return
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        assert file_hash(whole / "elsewhere/FINAL" / name) == file_hash(
            whole / "whole/FINAL" / name
        )
    assert lines(whole / "elsewhere") == lines(whole / "whole")[3:]


def test_given_by_hand_on_other_data_it_begins_a_round(whole, monkeypatch, capfd):
    train_until(config(whole), 7, monkeypatch)
    rows = (whole / "pairs.jsonl").read_text().replace("No.", "Never.")
    (whole / "others.jsonl").write_text(rows)
    capfd.readouterr()
    step = whole / "run/step-3"
    more = dict(from_checkpoint=str(step), train_datasets=[str(whole / "others.jsonl")])
    counts = train(config(whole, name="next", **more)).counts
    assert f"{step} begins a new round, for its run differs in train" in capfd.readouterr().err
    assert counts["steps"] == 8
    counters = json.loads((whole / "next/FINAL/counters.json").read_text())
    assert counters["total_steps"] == 3 + 8


def test_a_later_round_goes_on_in_the_middle(whole, monkeypatch):
    "Its reference is where it began, and not where it goes on."
    more = dict(from_checkpoint=str(whole / "whole/FINAL"), reference="previous", lr=5e-3)
    train(config(whole, name="second", **more))
    train_until(config(whole, **more), 5, monkeypatch)
    train(config(whole, **more))
    assert_same(whole, "second", "run")


# ---- through the ledger


def train_stage(home, run, **more):
    "A training as a stage of a run."
    cfg = config(home, name="policy", cache_dir=str(run), **more)
    cfg = replace(cfg, metrics_file=str(run / "metrics.jsonl"))
    outputs = [run / name for name in ("policy/FINAL", "policy/counts.json", "metrics.jsonl")]
    stage = Stage("train", run, cfg, [home / "pairs.jsonl"], outputs, 1, "dying_train")
    steps = ("policy/step-*", "policy/attempts.jsonl", "policy/.last_step")
    return replace(stage, leaves=(*steps, "metrics.jsonl"))


def killed(stage, *orders):
    "Run a stage once for each order; each time it is killed."
    for order in orders:
        (stage.folder / "kill_at").write_text(order)
        with pytest.raises(StageError), Ledger(stage.folder, ONE, watch=quiet) as ledger:
            ledger.run(stage)


@NEEDS_LINUX
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("stages_on_path")
def test_a_stage_that_was_killed_goes_on_and_another_finds_nothing(whole):
    "kill -9 between two steps, of other settings first; then within a checkpoint."
    run = whole / "ledger"
    run.mkdir()
    (run / "params.json").write_text("{}")
    killed(train_stage(whole, run, lr=2e-2), "step 7")
    assert [path.name for path in step_folders(run / "policy")] == ["step-6", "step-3"]
    stage = train_stage(whole, run)
    killed(stage, "step 5")
    assert [path.name for path in step_folders(run / "policy")] == ["step-3"]
    assert len(read_jsonl(run / "metrics.jsonl")) == 5
    assert len(read_jsonl(run / "policy/attempts.jsonl")) == 1
    killed(stage, "seal 1")
    with Ledger(run, ONE, watch=quiet) as ledger:
        assert ledger.run(stage)
        assert not ledger.run(stage)
    counts = json.loads((run / "policy/counts.json").read_text())
    assert counts["resumed_at"] == [3, 3]
    assert counts["steps_repeated"] == 2 + 3
    for name in ("model.safetensors", "optimizer.pt", "counters.json", "trainer_state.json"):
        assert file_hash(run / "policy/FINAL" / name) == file_hash(whole / "whole/FINAL" / name)
    shown = read_jsonl(run / "train.progress.jsonl")[-1]
    assert (shown["done"], shown["total"], shown["resumed_at"]) == (8, 8, 3)
    assert not stage.attempt.exists()


# ---- sampling and labelling


def killed_at(monkeypatch, where, call, go):
    "Run, and be ended within the so-many-th call of a function."
    calls = []
    module, _, name = where.rpartition(".")
    own = getattr(importlib.import_module(module), name)

    def dying(*args, **kw):
        calls.append(where)
        if len(calls) == call:
            raise Killed
        return own(*args, **kw)

    with monkeypatch.context() as patched:
        patched.setattr(where, dying)
        with pytest.raises(Killed):
            go()


def without_times(counts):
    return {k: v for k, v in counts.items() if k not in ("seconds", "resumed_samples")}


@pytest.mark.parametrize("change", ["nothing", "temperature"])
def test_sampling_goes_on_with_the_batches_that_are_left(whole, change, monkeypatch, capfd):
    more = dict(num_samples_per_prompt=2, max_new_tokens=5, batch_size=4)
    one, two = [
        SampleConfig(
            model=str(whole / "start"),
            reference=str(whole / "start"),
            datasets=[str(whole / "pairs.jsonl")],
            output_file=str(whole / f"{name}.json"),
            **more,
        )
        for name in ("one", "two")
    ]
    counts = sample(one)
    killed_at(monkeypatch, "halos_nb.sample.sample_batch", 4, lambda: sample(two))
    assert not (whole / "two.json").exists()
    if change == "temperature":
        one, two = (replace(cfg, temperature=0.7) for cfg in (one, two))
        counts = sample(one)
    capfd.readouterr()
    told = sample(two)
    said = capfd.readouterr().err
    assert told.get("resumed_samples", 0) == (12 if change == "nothing" else 0)
    assert without_times(told) == without_times(counts)
    assert (whole / "two.json").read_bytes() == (whole / "one.json").read_bytes()
    goes_on = "goes on with what was finished before"
    assert (goes_on if change == "nothing" else "differs in temperature; starts anew") in said
    assert not list(whole.glob(".two*"))


def test_scoring_goes_on_with_the_batches_that_are_left(whole, monkeypatch, capfd):
    model = load_reward_model(str(whole / "start"))
    model.save_pretrained(whole / "rm")
    load_tokenizer(str(whole / "start")).save_pretrained(whole / "rm")
    samples = [
        dict(prompt_id=f"p{i}", sample_id=k, prompt=f"Say {i}", output="Yes" + "!" * k)
        for i in range(6)
        for k in range(3)
    ]
    rows = [
        row | dict(prompt=as_turns(row["prompt"], "user"), type="sample") for row in samples
    ]
    write_records(whole / "samples.json", rows)
    one, two = [
        LabelConfig(
            samples_file=str(whole / "samples.json"),
            output_file=str(whole / name / "feedback.json"),
            reward_model_path=str(whole / "rm"),
            feedback_type="scalar",
            token_budget=60,
        )
        for name in ("one", "two")
    ]
    counts = label(one)
    killed_at(monkeypatch, "halos_nb.score.score_batch", 3, lambda: label(two))
    capfd.readouterr()
    assert without_times(label(two)) == without_times(counts)
    assert "goes on with what was finished before" in capfd.readouterr().err
    for name in ("feedback.json", "feedback.labels.jsonl"):
        assert (whole / "two" / name).read_bytes() == (whole / "one" / name).read_bytes()
    assert not list((whole / "two").glob(".*"))

"""What we lean on in libraries though nobody promised it: each place by name.

A failure here says which function of ours relies on what a new version has moved.
"""

import inspect
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from halos_nb.configs import TrainConfig
from halos_nb.models import load_policy, small_llama
from halos_nb.trees import byte_tokenizer
from halos_nb.train import make_trainer

# ---- transformers.Trainer, for halos_nb.tree_trainer

TRAINER_HOOKS = {
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "get_train_dataloader": ["self"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "floating_point_ops": ["self", "inputs"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["self", "logs", "start_time"],
}


def moved(name, what):
    return (
        f"transformers {transformers.__version__}: {what}; "
        f"see {name} in halos_nb.tree_trainer, which relies on it"
    )


@pytest.mark.parametrize("name", TRAINER_HOOKS)
def test_trainer_has_the_method_as_we_know_it(name):
    method = getattr(Trainer, name, None)
    assert method is not None, moved(name, f"Trainer.{name} is gone")
    parameters = list(inspect.signature(method).parameters)
    known = TRAINER_HOOKS[name]
    assert parameters[: len(known)] == known, moved(name, f"Trainer.{name} takes {parameters}")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A tiny model and four pairs."
    home, tok = tmp_path_factory.mktemp("fragile"), byte_tokenizer()
    small_llama(tok, hidden_size=32, initializer_range=0.2).save_pretrained(home / "start")
    tok.save_pretrained(home / "start")
    with open(home / "pairs.jsonl", "w") as file:
        for i in range(4):
            row = dict(prompt=f"Say {i}", chosen="Yes" + "!" * i, rejected="No.")
            file.write(json.dumps(row) + "\n")
    return home


def dpo_trainer(home, **more):
    "A trainer of two steps, ready to start."
    cfg = TrainConfig(
        loss="dpo",
        model=str(home / "start"),
        train_datasets=[str(home / "pairs.jsonl")],
        batch_size=2,
        lr=1e-2,
        warmup=0,
        cache_dir=str(home),
        exp_name="dpo",
        **more,
    )
    return make_trainer(cfg)


class StepRecorder(TrainerCallback):
    "Notes what Trainer does, in order."

    def __init__(self, notes):
        self.notes = notes

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kw):
        ready = optimizer is not None and lr_scheduler is not None
        self.notes.append("begin, ready" if ready else "begin, not ready")

    def on_optimizer_step(self, args, state, control, **kw):
        self.notes.append("optimizer")

    def on_step_end(self, args, state, control, **kw):
        self.notes.append("end")


@pytest.fixture(scope="module")
def notes(home):
    "The order in which Trainer calls what we override, over two steps."
    trainer, _ = dpo_trainer(home)
    notes = []
    for name in ("get_batch_samples", "training_step", "_get_grad_norm"):
        own = getattr(trainer, name)

        def noted(*args, name=name, own=own, **kw):
            notes.append(name)
            return own(*args, **kw)

        setattr(trainer, name, noted)
    trainer.add_callback(StepRecorder(notes))
    trainer.train()
    return notes


def test_a_step_is_fetched_computed_checked_and_taken(notes):
    "The gradient is checked behind backward and in front of the optimiser."
    order = ["get_batch_samples", "training_step", "_get_grad_norm", "optimizer", "end"]
    assert notes[1:] == 2 * order, moved("_get_grad_norm", f"its loop is {notes[1:]}")


def test_optimizer_and_scheduler_are_there_when_training_begins(notes):
    "When Timetable.on_train_begin reads the moments of the round before."
    assert notes[0] == "begin, ready", moved("Timetable", "on_train_begin comes too early")


def test_the_training_state_goes_round(home, tmp_path):
    "What is saved is what is read: moments and schedule."
    trainer, _ = dpo_trainer(home)
    trainer.train()
    trainer.save_training_state(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert {"optimizer.pt", "scheduler.pt"} <= files, moved("save_training_state", str(files))
    again, _ = dpo_trainer(home)
    again.create_optimizer_and_scheduler(num_training_steps=2)
    again.load_training_state(tmp_path)
    want = trainer.optimizer.state_dict()["state"]
    got = again.optimizer.state_dict()["state"]
    assert got.keys() == want.keys() and got, moved(
        "load_training_state", "no moments are read"
    )
    for number in want:
        assert torch.equal(got[number]["exp_avg"], want[number]["exp_avg"])
    assert again.lr_scheduler.last_epoch == 2, moved(
        "load_training_state", "no schedule is read"
    )


def test_the_state_is_read_without_pickle():
    "Trainer reads tensors only."
    source = inspect.getsource(Trainer._load_optimizer_and_scheduler)
    reads = source.count("torch.load(")
    safe = source.count("weights_only=True")
    assert reads <= safe, moved("load_training_state", "torch.load without weights_only=True")


def test_trainer_puts_its_arguments_beside_the_weights(home, tmp_path):
    "A pickle, which save_whole_model takes away."
    trainer, _ = dpo_trainer(home)
    trainer.save_whole_model(tmp_path)
    kinds = {file.suffix for file in tmp_path.iterdir()}
    assert kinds <= {".json", ".safetensors", ".jinja"}, moved("save_whole_model", str(kinds))
    load_policy(str(tmp_path))


def test_warmup_below_one_is_a_share():
    args = TrainingArguments(warmup_steps=0.1, use_cpu=True, report_to="none")
    assert args.get_warmup_steps(200) == 20, moved("training_arguments", "warmup_steps < 1")
    args = TrainingArguments(warmup_steps=3.0, use_cpu=True, report_to="none")
    assert args.get_warmup_steps(200) == 3, moved("training_arguments", "warmup_steps >= 1")


def test_a_callback_asks_for_an_evaluation(home):
    "Timetable.on_step_end sets control.should_evaluate, and Trainer evaluates once."
    assert TrainerControl().should_evaluate is False
    trainer, _ = dpo_trainer(home, test_datasets=[str(home / "pairs.jsonl")], eval_every=1)
    seen = []
    trainer.evaluate = lambda *a, **kw: seen.append(trainer.state.global_step) or {}
    trainer.train()
    # the last step is evaluated by train(), not by the timetable
    assert seen == [1], moved("Timetable", f"evaluations at {seen}")


def test_a_checkpoint_has_what_a_round_needs(home):
    trainer, tokenizer = dpo_trainer(home)
    trainer.train()
    folder = trainer.save_final(home / "FINAL", tokenizer)
    files = {file.name for file in Path(folder).iterdir()}
    needed = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert needed <= files, moved("save_checkpoint", f"it wrote {sorted(files)}")

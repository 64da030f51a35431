"Whole batches against the golden values, and the same training whatever the number of processes, the token budget and the layout."
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden import cases
from safetensors.torch import load_file

from halos_nb.batching import Tree, byte_tokenizer, make_batch
from halos_nb.config import TrainConfig, config_json
from halos_nb.models import BranchLogps, BranchScores, gather_logps, small_llama
from halos_nb.records import read_jsonl
from halos_nb.train import train
from halos_nb.trainers import BradleyTerryTrainer, DPOTrainer, SFTTrainer

TRAINERS = {c.__name__: c for c in (SFTTrainer, DPOTrainer, BradleyTerryTrainer)}


class LanguageTable(torch.nn.Module):
    "A language model whose logits depend on the current token alone."
    def __init__(self, table): super().__init__(); self.table = torch.nn.Parameter(torch.tensor(table))
    def forward(self, tree): return BranchLogps(tree.table(gather_logps(self.table[tree.input_ids.flatten()[tree.predict]], tree.target)))


class ClassifierTable(LanguageTable):
    "A classifier whose logits are the mean over a row's tokens."
    def forward(self, tree):
        mask = tree.attention_mask[..., None]
        return BranchScores((self.table[tree.input_ids] * mask).sum(1) / mask.sum(1))


def golden_batch(batch):
    "The reference's matrices as trees; a pair's two prompts may differ, so nothing is shared."
    roles = {"target": "completion", "chosen": "chosen", "rejected": "rejected"}
    sides = [(role, batch[f"{k}_combined_input_ids"], batch[f"{k}_combined_attention_mask"], batch[f"{k}_labels"]) for k, role in roles.items() if f"{k}_labels" in batch]
    trees = []
    for i in range(len(sides[0][1])):
        ids = [[t for t, m in zip(s[1][i], s[2][i]) if m] for s in sides]
        trees.append(Tree([], ids, [s[0] for s in sides], [next(k for k, x in enumerate(s[3][i]) if x != -100) for s in sides]))
    return make_batch(trees, "plain")


def is_here(case): return case["trainer"] in TRAINERS and not case["hyper"].get("humanline")


@cases("trainer_end_to_end", is_here)
def test_golden_batches(case):
    cls, want, inputs = TRAINERS[case["trainer"]], case["outputs"], case["inputs"]
    model = (ClassifierTable if cls is BradleyTerryTrainer else LanguageTable)(inputs.get("policy_table") or inputs["classifier_table"])
    trainer = cls.__new__(cls)
    trainer.model, trainer.config = model, SimpleNamespace(beta=case["hyper"].get("beta"))
    trainer.reference = LanguageTable(inputs["reference_table"]) if "reference_table" in inputs else None
    batch = golden_batch(inputs["batch"])
    losses, metrics = trainer.get_batch_metrics(batch, "train")
    loss = losses.sum() / trainer.batch_size(batch)
    torch.testing.assert_close(loss.item(), want["loss"], rtol=1e-4, atol=1e-5)
    for name, values in want["metrics"].items():
        if name.startswith("rewards_train") and "unclamped" not in name:
            torch.testing.assert_close(metrics[name], torch.tensor(values), rtol=1e-4, atol=1e-5)
        if name.startswith("logps_train"): # the reference keeps tokens, we keep their sum
            torch.testing.assert_close(metrics[name], torch.tensor(values).sum(-1), rtol=1e-4, atol=1e-5)
    loss.backward()
    torch.testing.assert_close(model.table.grad, torch.tensor(next(iter(case["grads"].values()))), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A tiny model and seven pairs of very different lengths."
    home, tok = tmp_path_factory.mktemp("trainers"), byte_tokenizer()
    small_llama(tok, hidden_size=32, initializer_range=0.2).save_pretrained(home / "start")
    tok.save_pretrained(home / "start")
    rows = [{"prompt": "Say it " + "again " * (i * i % 7), "chosen": "Yes" + "!" * (3 * i), "rejected": "No."} for i in range(7)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return home


def config(home, loss, name, **more):
    return TrainConfig(loss=loss, model=str(home / "start"), train_datasets=[str(home / "pairs.jsonl")], test_datasets=[str(home / "pairs.jsonl")], exp_name=name,
                       cache_dir=str(home), **(dict(lr=1e-2, warmup=0, batch_size=3, epochs=2) | more))


def weights(folder): return torch.cat([t.flatten() for _, t in sorted(load_file(folder / "FINAL/model.safetensors").items())])


LOSSES = ("sft", "dpo", "bradley-terry")


@pytest.fixture(scope="module")
def both(home):
    "Every loss trained by one process, and again by two."
    for loss in LOSSES: train(config(home, loss, f"{loss}-1"))
    for loss in LOSSES: (home / f"{loss}.json").write_text(config_json(config(home, loss, f"{loss}-2", num_processes=2)))
    run = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                          "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0", str(Path(__file__).parent / "train_all.py"),
                          *(str(home / f"{loss}.json") for loss in LOSSES)], env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return home


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_train_the_same_model(both, loss):
    "Three steps an epoch of 3, 3 and 1 pairs: in the last one process has nothing to do."
    one, two = (both / f"{loss}-{n}" for n in (1, 2))
    assert (weights(one) - weights(two)).abs().max() < 1e-4
    for a, b in zip(read_jsonl(one / "metrics.jsonl"), read_jsonl(two / "metrics.jsonl"), strict=True):
        same = [k for k in a if k.startswith(("loss", "rewards", "logps", "eval", "grad_norm", "tokens")) and k != "tokens_per_second"]
        for k in same: assert a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-4), k
    if loss != "sft": assert [r["index"] for r in read_jsonl(two / "eval_scores.jsonl")] == list(range(7)), "every held-out pair once, in order"


@pytest.mark.parametrize("cut", [dict(token_budget=1), dict(token_budget=150), dict(layout="plain"), dict(layout="plain", token_budget=1)], ids=str)
def test_cut_and_layout_do_not_change_the_model(home, cut):
    train(config(home, "dpo", "whole"))
    train(config(home, "dpo", "cut", **cut))
    assert (weights(home / "whole") - weights(home / "cut")).abs().max() < 1e-4


def test_same_seed_same_bits(home):
    for name in ("a", "b"): train(config(home, "dpo", name, seed=5))
    train(config(home, "dpo", "c", seed=6))
    assert torch.equal(weights(home / "a"), weights(home / "b")) and not torch.equal(weights(home / "a"), weights(home / "c"))


def test_wrong_number_of_processes_stops(home):
    with pytest.raises(RuntimeError, match="asked for 2 processes, Accelerate started 1"): train(config(home, "sft", "x", num_processes=2))

"""A tiny loop of real models, and what is done to its machine: `python tests/soak_machine.py
disk|paths` (as root for the small disk). test_machine.py has the short forms.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from halos_nb.models import load_reward_model, small_llama
from halos_nb.templates import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
LOOP = """
import json, sys
from halos_nb.configs import LoopConfig
from halos_nb.loop import run_rounds
from halos_nb.settings import load_settings
given = json.loads(open(sys.argv[1], encoding="utf-8").read())
for this in run_rounds(LoopConfig(**given), load_settings()):
    print("round", this.number, flush=True)
"""
RUN = dict(
    run_name="r",
    total_prompts=16,
    prompts_per_round=8,
    num_samples_per_prompt=4,
    max_new_tokens=16,
    max_prompt_length=64,
    max_length=96,
    threshold=0,
    batch_size=4,
    lr=1e-3,
    audit="skip",
    alarm="skip",
)


def make_world(folder, hidden=64):
    "A policy, a reward model and prompts, in a folder; the parameters of a run of them."
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tok = byte_tokenizer()
    shape = dict(hidden_size=hidden, layers=2, heads=4, max_length=256, initializer_range=0.08)
    model = small_llama(tok, **shape)
    model.save_pretrained(folder / "sft ä")
    tok.save_pretrained(folder / "sft ä")
    reward = load_reward_model(str(folder / "sft ä"))
    torch.nn.init.normal_(reward.score.weight, std=0.5)
    reward.save_pretrained(folder / "rm ö")
    tok.save_pretrained(folder / "rm ö")
    rows = [json.dumps(dict(prompt=f"Größe {i}?"), ensure_ascii=False) for i in range(24)]
    (folder / "Fragen über alles.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    names = dict(sft_checkpoint="sft ä", reward_checkpoint="rm ö")
    names |= dict(prompts="Fragen über alles.jsonl")
    return RUN | {name: str(folder / file) for name, file in names.items()}


def run_loop(folder, given, runs, cwd, **env):
    "The loop in a process of its own: its exit code and what it said."
    (folder / "loop.py").write_text(LOOP, "utf-8")
    (folder / "given.json").write_text(json.dumps(given), "utf-8")
    env = os.environ | {"HALOS_NB_RUNS_DIR": str(runs), "PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, str(folder / "loop.py"), str(folder / "given.json")]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True)
    return done.returncode, done.stdout.decode() + done.stderr.decode()


def results(run):
    "The files of a run that its parameters decide, by name."
    found = {}
    for name in ("samples.json", "feedback.json", "policy/FINAL/model.safetensors"):
        for file in sorted(run.glob(f"*/{name}")):
            found[str(file.relative_to(run))] = file.read_bytes()
    return found

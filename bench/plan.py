"""Planned memory beside measured: `python bench/plan.py` (or `make test-plan`).

Each case is a training in a process of its own on this machine's CPU, of a random Llama of
some 230 million parameters, or where its name says experts of a Mixtral of as many. Measured is
the process's highest resident set less what it had before it loaded anything (imports done);
planned is `halos_nb.plan` of the same config. Of weights in two shares (FSDP2) the training
alone is measured: reading and writing hold a whole model in the machine's memory, which on a
GPU's machine is not the GPU's. Experts lie in the file one by one, put together when they
are read; the file's pages of them stay resident until the kernel wants them back. They are no
need of the training, and are told apart (`pages`).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = dict(vocab_size=32_000, hidden_size=1024, intermediate_size=2816)
SHAPE |= dict(num_hidden_layers=14, num_attention_heads=16, num_key_value_heads=8)
SHAPE |= dict(max_position_embeddings=2048)
# the same with experts in place of its linear layers
EXPERTS = SHAPE | dict(intermediate_size=704, num_local_experts=8, num_experts_per_tok=2)
EXPERTS |= dict(num_hidden_layers=8)
COMMON = dict(lr=1e-5, max_length=80, max_prompt_length=32, layout="tree", batch_size=4)
# name -> fields of the training's config
CASES: dict[str, dict] = {
    "dpo": dict(loss="dpo"),
    "dpo, checkpointing": dict(loss="dpo", gradient_checkpointing=True),
    "dpo, twice the budget": dict(loss="dpo", token_budget=512, batch_size=8),
    "dpo, LoRA": dict(loss="dpo", use_peft=True, lora_r=16),
    "dpo, moving reference": dict(loss="dpo", reference="ema"),
    "sft": dict(loss="sft"),
    "sft, checkpointing": dict(loss="sft", gradient_checkpointing=True),
    "bradley-terry": dict(loss="bradley-terry"),
    "bradley-terry, checkpointing": dict(loss="bradley-terry", gradient_checkpointing=True),
    "dpo, bfloat16": dict(loss="dpo", precision="bfloat16"),
    "dpo, experts": dict(loss="dpo"),
    "sft, experts, checkpointing": dict(loss="sft", gradient_checkpointing=True),
    "dpo, experts, LoRA": dict(loss="dpo", use_peft=True, lora_r=16),
    "dpo, two shards": dict(loss="dpo"),
    "dpo, two shards, bfloat16": dict(loss="dpo", precision="bfloat16"),
    "dpo, LoRA, two shards, bfloat16": dict(
        loss="dpo", use_peft=True, lora_r=16, precision="bfloat16"
    ),
}
# freed memory goes back at once, so that two processes' training is seen apart from the rest
EXACT = dict(MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")
SHARED = Path(__file__).parents[1] / "halos_nb/accelerate/fsdp2_cpu2.yaml"


def make_models(home: Path) -> None:
    "A random Llama and a Mixtral with a tokenizer of bytes."
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    from halos_nb.templates import byte_tokenizer

    tok = byte_tokenizer()
    ids = dict(pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None)
    configs = dict(model=LlamaConfig(**SHAPE, **ids), experts=MixtralConfig(**EXPERTS, **ids))
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(home / name)
        tok.save_pretrained(home / name)


def model_of(home: Path, case: str) -> Path:
    return home / ("experts" if "experts" in case else "model")


def make_pairs(file: Path) -> None:
    "Pairs that are as long as the configs let through."
    text = "The quick brown fox jumps over the lazy dog again and again. " * 10
    with file.open("w") as f:
        for i in range(32):
            row = dict(prompt=f"{i} " + text[:20], chosen=text[i : i + 120])
            f.write(json.dumps(row | dict(rejected=text[i + 7 : i + 127])) + "\n")


def training(home: Path, case: str):
    from halos_nb.configs import TrainConfig

    where = dict(model=str(model_of(home, case)), train_datasets=[str(home / "pairs.jsonl")])
    where |= dict(
        cache_dir=str(home / "out"), exp_name="x", n_examples=2 * COMMON["batch_size"]
    )
    return TrainConfig(**dict(token_budget=256) | COMMON | where | CASES[case])


def resident(name: str) -> float:
    "VmRSS (now) or VmHWM (highest) of this process, MiB."
    [line] = [
        s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(name)
    ]
    return int(line.split()[1]) / 1024


def put_together(model: Path) -> float:
    "Size of the experts in a model's file that make up one weight when they are read, MiB."
    from safetensors import safe_open

    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            shapes = [
                weights.get_slice(n).get_shape() for n in weights.keys() if ".experts." in n
            ]
        total += sum(4 * math.prod(shape) for shape in shapes)
    return total / 2**20


def measure(home: Path, case: str) -> dict:
    "Train; the highest memory above what imports took."
    os.environ["HALOS_NB_PROGRESS"] = os.devnull
    import torch

    import halos_nb.train
    from halos_nb.train import make_trainer
    from halos_nb.trainers import TRAINERS  # noqa: F401  # imported before the baseline

    torch.set_num_threads(1)
    cfg = training(home, case)
    if cfg.use_peft:
        import peft  # noqa: F401
    before = resident("VmRSS")
    if "shards" not in case and not os.environ.get("TRACE"):
        halos_nb.train.train(cfg)
        pages = round(put_together(Path(cfg.model)))
        return dict(case=case, measured=round(resident("VmHWM") - before) - pages, pages=pages)
    steps = {}

    def step_is_over(step: str) -> None:
        "Note the highest memory of a step, and begin anew."
        steps[step] = round(resident("VmHWM") - before)
        Path("/proc/self/clear_refs").write_text("5")

    trainer, tok = make_trainer(cfg)
    step_is_over("prepared")
    trainer.train()
    step_is_over("trained")
    trainer.save_final(home / "out/x/FINAL", tok)
    step_is_over("saved")
    print(steps, file=sys.stderr)
    return dict(case=case, measured=steps["trained"])


def planned(home: Path, case: str) -> dict:
    "What the plan says of the same."
    from halos_nb.plan import plan
    from halos_nb.settings import Profile

    profile = Profile(accelerate_config=str(SHARED) if "shards" in case else "")
    made = plan(training(home, case), profile)
    need = made.stages[made.peak]
    parts = {k: round(v / 2**20) for k, v in vars(need).items() if v >= 2**20}
    return dict(case=case, planned=round(need.total / 2**20), peak=made.peak, parts=parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=[], help="names of cases (none: all)")
    parser.add_argument(
        "--home", default="", help="where model and pairs are (none: temporary)"
    )
    parser.add_argument("--do", choices=["all", "measure", "planned"], default="all")
    parser.add_argument("--most", type=float, default=0.15, help="largest difference allowed")
    a = parser.parse_args()
    home = Path(a.home or tempfile.mkdtemp())
    if not model_of(home, " ".join(a.cases)).is_dir():
        make_models(home)
        make_pairs(home / "pairs.jsonl")
    if a.do != "all":
        [case] = a.cases
        print(json.dumps((measure if a.do == "measure" else planned)(home, case)), flush=True)
        return
    wrong = 0
    print("| case | measured MB | planned MB | off | planned parts |\n|---|---|---|---|---|")
    for case in a.cases or CASES:
        row: dict = {}
        for do in ("measure", "planned"):
            own = [sys.executable, __file__, case, "--home", str(home), "--do", do]
            env = dict(os.environ)
            if do == "measure" and "shards" in case:
                launch = "-m accelerate.commands.launch --config_file".split()
                own[1:1] = [*launch, str(SHARED)]
                env |= EXACT
            out = subprocess.run(
                own, check=True, stdout=subprocess.PIPE, text=True, env=env
            ).stdout
            # of two processes the one that needs more: the first also writes the model
            said = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            row |= max(said, key=lambda one: one.get("measured", 0))
        off = row["planned"] / row["measured"] - 1
        wrong += abs(off) > a.most
        parts = ", ".join(f"{k} {v}" for k, v in row["parts"].items())
        of_file = f" ({row['pages']} of the file beside it)" if row.get("pages") else ""
        told = f"{row['measured']}{of_file} | {row['planned']} | {off:+.1%} | {parts}"
        print(f"| {case} | {told} |")
        sys.stdout.flush()
    sys.exit(f"{wrong} cases are off by more than {a.most:.0%}" if wrong else 0)


if __name__ == "__main__":
    main()

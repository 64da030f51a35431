"""What is measured: for each job the command of ours and those of its peers, and what was asked
of them.
"""

from pathlib import Path
from typing import NamedTuple

from sample import VLLM_PYTHON

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared/peers"


class Case(NamedTuple):
    "One command; `peer` commands run in TRL's environment."

    label: str
    command: str
    peer: bool = False
    least: float | None = None  # times this case ours should be at least
    memory: float | None = None  # of this case's peak memory ours should be at most
    precision: str = "float32"  # what it computes in


Jobs = dict[str, list[Case]]  # ours is the first case of each


def flags(options: dict) -> str:
    "Options of a command line; True stands alone."
    words = []
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return " ".join(words)


def ours(script: str, token_budget: int = 1024, **options) -> str:
    "A command of ours; a CPU is fastest with about a thousand tokens per forward pass."
    if token_budget:
        options["token_budget"] = token_budget
    return f"{HERE / script}.py {flags(options)}"


def train(loss: str, **options) -> str:
    "A training run of ours."
    return ours("training", loss=loss, **options)


def peer(job: str, preset: str, **options) -> str:
    "A command of bench/peers.py."
    return f"{HERE / 'peers.py'} {flags(dict(job=job, preset=preset) | options)}"


def known_peer(job: str, preset: str, **options) -> str:
    "The script of ../shared/peers, where that is."
    if not SHARED.is_dir():
        return peer(job, preset, **options)
    if job == "label":
        return f"{SHARED / 'label_transformers.py'} {flags(dict(mode=preset) | options)}"
    batch = options.pop("batch", None)
    if batch and preset != "default":
        options |= dict(batch=1, accum=batch)
    return f"{SHARED / f'trl_{job}.py'} {flags(dict(preset=preset) | options)}"


# ---- training


def beside_trl(
    job: str,
    least: tuple[float, float],  # TRL best, TRL defaults
    memory: float | None = None,
    precision: str = "float32",
    **options,
) -> list[Case]:
    "TRL's two presets of a job."
    best = "best_fp32" if precision == "float32" else "best_bf16"
    return [
        Case(
            "TRL best settings",
            known_peer(job, best, **options),
            peer=True,
            least=least[0],
            memory=memory,
            precision=precision,
        ),
        Case(
            "TRL defaults (bf16)",
            known_peer(job, "default", **options),
            peer=True,
            least=least[1],
            precision="bfloat16",
        ),
    ]


def in_both(loss: str, job: str, model: Path, peer_model: Path, least, memory, data) -> Jobs:
    "A paired method in float32 and in bfloat16."
    name = dict(rm="reward model", dpo="DPO")[job]
    found: Jobs = {}
    for precision, suffix in (("float32", ""), ("bfloat16", " bf16")):
        own = train(loss, model=model, precision=precision, **data)
        peers = beside_trl(job, least[precision], memory, precision, model=peer_model, **data)
        found[name + suffix] = [Case("halos_nb", own, precision=precision), *peers]
    return found


def paired_jobs(inputs: Path, n: int) -> Jobs:
    "Reward model and DPO."
    data = dict(pairs=inputs / "pairs.jsonl", n=n)
    small, big = inputs / "small", inputs / "big"
    half = dict(model=big, pairs=inputs / "pairs.jsonl", n=max(1, n // 2), batch=8)
    reward = dict(float32=(1.6, 2.6), bfloat16=(1.5, 2.5))
    preference = dict(float32=(2.4, None), bfloat16=(2.4, 4.5))
    scorers = inputs / "rm2", inputs / "rm1"
    found = in_both("bradley-terry", "rm", *scorers, reward, None, data)
    found |= in_both("dpo", "dpo", small, small, preference, 0.6, data)
    found["DPO 64k vocabulary"] = [
        Case("halos_nb", train("dpo", **half)),
        Case("TRL best settings", known_peer("dpo", "best_fp32", **half), True, 3.0),
    ]
    return found


def other_methods(inputs: Path, n: int) -> Jobs:
    "LoRA DPO, KTO and SFT, on the same pairs."
    data = dict(model=inputs / "small", pairs=inputs / "pairs.jsonl", n=n)
    return {
        "LoRA DPO": [
            Case("halos_nb", train("dpo", lora=True, **data)),
            Case("TRL best settings, peft", peer("lora", "best_fp32", **data), True),
        ],
        "KTO": [
            Case("halos_nb", train("kto", **data)),
            Case("TRL best settings", peer("kto", "best_fp32", **data), True, 2.0),
            Case(
                "TRL defaults (bf16)",
                peer("kto", "default", **data),
                peer=True,
                precision="bfloat16",
            ),
        ],
        "SFT": [
            Case("halos_nb", train("sft", **data)),
            Case("TRL best settings", peer("sft", "best_fp32", **data), True),
            Case("TRL packing", peer("sft", "packed", **data), True),
        ],
        "PPO": [Case("halos_nb (TRL has none)", train("ppo", **data))],
    }


def group_jobs(inputs: Path, n: int) -> Jobs:
    """GRPO of groups of 8, prompts as long as their answers. TRL's best has the answers of a
    step drawn just before it and asks no old policy; ours asks it, unless the reference is it.
    """
    prompts = max(2, n // 4)
    batch = max(1, prompts // 2)
    data = dict(model=inputs / "small", groups=inputs / "groups.json", n=prompts, batch=batch)
    best = peer("grpo", "best_fp32", **data)
    return {
        "GRPO": [
            Case("halos_nb", train("grpo", **data)),
            Case("TRL best settings (no old policy asked)", best, True, 2.0),
            Case("TRL, a round's answers first", peer("grpo", "round", **data), True),
        ],
        "GRPO without an old policy": [
            Case("halos_nb", train("grpo", old_policy="reference", **data)),
            Case("TRL best settings", best, True, 2.0),
        ],
    }


# ---- labelling and sampling


def label(budget: int = 0, **options) -> str:
    return ours("label", token_budget=budget, **options)


def labelling_cases(own: Path, other: Path, least: tuple, data: dict) -> list[Case]:
    "Beside what users write, and TRL's own way."
    batch = known_peer("label", "batch", model=other, **data)
    predict = known_peer("label", "trl_predict", model=other, **data)
    as_ours = known_peer("label", "trl_predict_fp32", model=other, **data)
    return [
        Case("halos_nb", label(model=own, **data)),
        Case("padded batch of 16", batch, True, least[0]),
        Case("TRL predict (bf16)", predict, True, least[1], precision="bfloat16"),
        Case("TRL predict", as_ours, True),
    ]


def labelling_jobs(inputs: Path, n: int) -> Jobs:
    "A reward model, and an encoder."
    data = dict(samples=inputs / "samples.json", n=8 * n)
    llamas = inputs / "rm2", inputs / "rm1"
    encoders = inputs / "encoder2", inputs / "encoder1"
    return {
        "labelling": labelling_cases(*llamas, (2.8, 1.8), data),
        "labelling encoder": labelling_cases(*encoders, (None, None), data),
    }


def sampling_jobs(inputs: Path, n: int) -> Jobs:
    """Beside transformers' `generate` at its best batch, and vLLM where `make vllm` was. With
    two threads, too: `python bench/sample.py --compare`.
    """
    data = dict(token_budget=0, model=inputs / "small", pairs=inputs / "pairs.jsonl", n=n)
    generate = ours("sample", way="transformers", **data)
    cases = [
        Case("halos_nb", ours("sample", **data)),
        Case("transformers generate, its best batch", generate, least=2.6),
    ]
    if VLLM_PYTHON.exists():
        cases.append(Case("vLLM on CPU", ours("sample", way="vllm", **data)))
    return dict(sampling=cases)


def long_prompt_jobs(inputs: Path, n: int) -> Jobs:
    "What sharing a prompt saves by itself."
    pairs = dict(
        model=inputs / "rm2",
        pairs=inputs / "long_pairs.jsonl",
        n=n,
        max_prompt_length=800,
    )
    samples = dict(model=inputs / "rm2", samples=inputs / "long_samples.json", n=4 * n)
    lone = dict(no_share=True)
    return {
        "reward model long prompts": [
            Case("halos_nb", train("bradley-terry", **pairs)),
            Case("prompt not shared", train("bradley-terry", **pairs, **lone), least=1.4),
        ],
        "labelling long prompts": [
            Case("halos_nb", label(**samples)),
            Case("prompt not shared", label(**samples, **lone), least=2.0),
        ],
    }


def small_jobs(inputs: Path, n: int) -> Jobs:
    "All of `make bench`; n pairs."
    return (
        paired_jobs(inputs, n)
        | other_methods(inputs, n)
        | group_jobs(inputs, n)
        | labelling_jobs(inputs, n)
        | sampling_jobs(inputs, n)
        | long_prompt_jobs(inputs, n)
    )


# ---- the real model


def real_jobs(inputs: Path, model: Path, n: int) -> Jobs:
    "All of `make bench-real`; n short pairs, 8 to a step, and four times as many samples."
    pairs = dict(model=model, pairs=inputs / "pairs.jsonl", n=n)
    samples = dict(model=model, samples=inputs / "samples.json", n=4 * n)
    # with so large a vocabulary memory is short, the layers are the smaller part, and a pass
    # whose logits are one chunk computes them once
    lean = dict(token_budget=256, gradient_checkpointing=True)

    def rows(least: float | None) -> Case:
        command = peer("label", "batch", **samples)
        return Case("padded batch of 16", command, True, least)

    return {
        "DPO": [
            Case("halos_nb", train("dpo", batch=8, **lean, **pairs)),
            *beside_trl("dpo", (2.1, None), 0.9, batch=8, **pairs),
        ],
        "log-probs": [
            Case("halos_nb", label(1024, logps=True, **samples)),
            Case("padded batch of 16", peer("logps", "batch", **samples), True, 2.5),
        ],
        "scores": [Case("halos_nb", label(1024, **samples)), rows(2.5)],
    }

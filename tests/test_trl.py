"""One step beside TRL's own trainers: the same loss and the same gradient of every weight.

TRL 1.16 lives in a Python of its own: HALOS_NB_TRL_PYTHON, or build/trl-venv (`make test-trl`).
It gets our token ids and the same weights, and computes all else itself (`trl_step.py`).
"""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainers import scored_answer
from tiny_models import save_small
from transformers import AutoModelForCausalLM

from halos_nb.configs import TrainConfig
from halos_nb.records import write_records
from halos_nb.templates import byte_tokenizer
from halos_nb.train import make_trainer

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "build/trl-venv/bin/python"


def trl_python():
    "The Python that has TRL, or None."
    if named := os.environ.get("HALOS_NB_TRL_PYTHON"):
        return named
    return str(VENV) if VENV.exists() else None


PYTHON = trl_python()
pytestmark = [
    pytest.mark.skipif(
        PYTHON is None,
        reason="no Python with TRL: `make test-trl`, or name one in HALOS_NB_TRL_PYTHON",
    ),
    pytest.mark.timeout(600),
]
# of the loss, and of each gradient beside the largest of all weights; float32
TOLERANCE = 5e-6


# ---- models and data


def save_moved(start, folder, by, seed):
    "The same model with noise on its weights, so that log-ratios are not all zero."
    model = AutoModelForCausalLM.from_pretrained(start)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=g)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def home(request, tmp_path_factory):
    "The policy as it sampled, as it is now, and its reference; answers, and scored answers."
    home = tmp_path_factory.mktemp(request.param)
    save_small(request.param, home / "old")
    save_moved(home / "old", home / "policy", 0.01, seed=7)
    save_moved(home / "old", home / "reference", 0.02, seed=8)
    for name in ("old", "policy", "reference"):
        byte_tokenizer().save_pretrained(home / name)
    rows = []
    for i in range(6):
        prompt = "Say it " + "again " * (i * i % 5)
        rows.append({"prompt": prompt, "chosen": "Yes" + "!" * (3 * i), "rejected": "No."})
    (home / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return home


def config(home, loss, data, **more):
    return TrainConfig(
        loss=loss,
        train_datasets=[str(home / data)],
        exp_name=f"{loss}-here",
        cache_dir=str(home),
        warmup=0,
        epochs=1,
        **more,
    )


# ---- the two sides


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def in_trl(home, *jobs):
    "What TRL makes of each job: {name: (loss and what was on its way, gradients)}."
    out = home / "trl"
    out.mkdir(exist_ok=True)
    (out / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parent / "trl_step.py"
    quiet = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TRL_EXPERIMENTAL_SILENCE="1")
    run = subprocess.run(
        [PYTHON, str(script), str(out / "jobs.json"), str(out)],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | quiet,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = {}
    for job in jobs:
        name = job["name"]
        told = json.loads((out / f"{name}.json").read_text())
        found[name] = told, load_file(out / f"{name}.safetensors")
    return found


def compare(name, ours, theirs, scale=1.0):
    "Equal loss and gradients, theirs times `scale`; how far they are apart is printed."
    (loss, grads), (told, other) = ours, theirs
    assert grads.keys() == other.keys()
    top = max(grad.abs().max() for grad in grads.values()).item()
    assert top > 1e-3, "no gradient: this compares nothing"
    apart = max((grads[k] - scale * other[k]).abs().max() for k in grads).item()
    off = abs(loss - scale * told["loss"])
    print(f"{name}: loss {loss:.6f}, apart {off:.1e}; gradient {top:.4f}, apart {apart:.1e}")
    assert off <= TOLERANCE * max(1, abs(loss)), (loss, told["loss"])
    assert apart <= TOLERANCE * max(1, top)


# ---- KTO

WEIGHTS = dict(beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
KTO = {
    "beta 0.1": (dict(beta=0.1), ("policy", "reference")),
    "weights": (WEIGHTS, ("policy", "reference")),
    "the other way": (WEIGHTS, ("reference", "policy")),
}


def kto_rows(step):
    "The step's trees in the words of TRL's collator: an answer, and one to another prompt."
    rows = []
    for tree in (tree for batch in step.batches for tree in batch.trees):
        (answer, other), (own, borrowed) = tree.branches, tree.meanings
        assert borrowed == "KL" and tree.skip == [0, 0]
        rows.append(
            dict(
                prompt_ids=tree.prompt_ids,
                completion_ids=answer,
                KL_completion_ids=other,
                label=own == "chosen",
            )
        )
    return rows


def test_kto(home):
    """Given the same mismatched answers. TRL would make others: prompt i gets the answer of
    i - 1 in its own forward pass, here that of i + 1 in the whole step, if its prompt is
    another. TRL estimates the KL anew for every forward pass, here it is the step's; and TRL
    counts all rows, here (as in HALOs) those that are not exactly 0.
    """
    jobs, ours = [], {}
    for name, (settings, (policy, reference)) in KTO.items():
        folders = dict(policy=str(home / policy), reference=str(home / reference))
        mine = dict(model=folders["policy"], load_from=folders["reference"], batch_size=9)
        trainer, _ = make_trainer(config(home, "kto", "pairs.jsonl", **mine | settings))
        step = next(iter(trainer.loader))
        rows = kto_rows(step)
        assert len(rows) == 9 and len({row["label"] for row in rows}) == 2
        loss = trainer.training_step(trainer.model, step).item()
        ours[name] = loss, gradients(trainer.model), trainer.KL.item()
        jobs.append(dict(name=name, method="kto", rows=rows, settings=settings, **folders))
    theirs = in_trl(home, *jobs)
    for name, (loss, grads, KL) in ours.items():
        assert KL == pytest.approx(theirs[name][0]["KL"][0], rel=1e-4)
        compare(f"KTO, {name}", (loss, grads), theirs[name])
    estimates = [KL for _, _, KL in ours.values()]
    assert max(estimates) > 0.1 and min(estimates) == 0, "one is floored, one is not"


# ---- GRPO

GROUP = 3  # answers of a prompt; TRL wants as many of each
LENGTH = 64
BOUNDS = dict(epsilon=0.15, epsilon_high=0.25)


@pytest.fixture(scope="module")
def scored(home):
    """Answers with scores, three times: as they are, with the old policy's log-probs as their
    sampler's, and with others, where one answer came without.
    """
    g = torch.Generator().manual_seed(3)
    records = []
    for i in range(4):
        # TRL pads on the left and gives no positions, which a model with learnt ones notices
        times = 4 if home.name.startswith("gpt2") else 2 * i
        for k in range(GROUP):
            score = torch.randn((), generator=g).item()
            records.append(scored_answer(f"Count {i} " + "up " * times, k, score))
    write_records(home / "scores.json", records)
    trainer = grpo_trainer(home, "scores.json", old_policy="pass")
    said = {}
    for tree in trees_of(next(iter(trainer.loader))):
        for ids, logps, score in zip(tree.branches, tree.old, tree.facts["score"]):
            said[score] = ids, logps
    told, other = [], []
    for n, record in enumerate(records):
        ids, logps = said[record["reward"]]
        drawn = record | dict(output_ids=ids, finished=True, temperature=1.0, top_p=1.0)
        told.append(drawn | dict(output_logps=logps))
        noise = torch.randn(len(ids), generator=g).tolist()
        apart = [logp + 0.8 * x for logp, x in zip(logps, noise)]
        other.append(drawn | dict(output_logps=apart) if n != 4 else record)
    write_records(home / "told.json", told)
    write_records(home / "other.json", other)
    return home


def trees_of(step):
    return [tree for batch in step.batches for tree in batch.trees]


def grpo_trainer(home, data, **settings):
    "Before its first step: the old policy is the model, and what is kept of it is."
    folders = dict(model=str(home / "old"), load_from=str(home / "reference"))
    cfg = config(home, "grpo", data, batch_size=4, **folders, **settings)
    trainer, _ = make_trainer(cfg)
    trainer.begin()
    return trainer


def grpo_rows(step):
    "The step's answers, those of a prompt in a row; None where no sampler told."
    rows = []
    for i, tree in enumerate(trees_of(step)):
        assert len(tree.branches) == GROUP
        for ids, skip, score, sampled in zip(
            tree.branches, tree.skip, tree.facts["score"], tree.sampled, strict=True
        ):
            logps = [None if math.isnan(logp) else logp for logp in sampled]
            ids = tree.prompt_ids + ids[:skip], ids[skip:]
            row = dict(prompt=i, score=score, sampler_logps=logps)
            rows.append(row | dict(prompt_ids=ids[0], completion_ids=ids[1]))
    return rows


# TRL divides by the standard deviation with n - 1, and adds 1e-4; ours is the population's
BESSEL = math.sqrt((GROUP - 1) / GROUP)
LIKE_TRL = dict(advantage_scale="group", advantage_constant=1e-4 * BESSEL)
UNSCALED = dict(advantage_scale="none")
CONSTANT = dict(normalise="constant", normalise_length=LENGTH)
TRUNCATED = dict(vllm_importance_sampling_mode="token_truncate")
# {name: (data, ours, TRL's)}, beside what all have
GRPO = {
    "per token": ("scores.json", UNSCALED, dict(loss_type="bnpo", scale_rewards="none")),
    "dapo": ("scores.json", UNSCALED, dict(loss_type="dapo", scale_rewards="none")),
    "per answer": (
        "scores.json",
        UNSCALED | dict(normalise="sequence"),
        dict(loss_type="grpo", scale_rewards="none"),
    ),
    "constant": (
        "scores.json",
        UNSCALED | CONSTANT,
        dict(loss_type="dr_grpo", scale_rewards="none"),
    ),
    "by the group's deviation": (
        "scores.json",
        LIKE_TRL,
        dict(loss_type="bnpo", scale_rewards="group"),
    ),
    "the samples' log-probs": (
        "told.json",
        UNSCALED | dict(old_policy="samples"),
        dict(loss_type="bnpo", scale_rewards="none"),
    ),
    "importance": (
        "other.json",
        UNSCALED | dict(importance_cap=1.5),
        dict(loss_type="bnpo", scale_rewards="none", vllm_importance_sampling_clip_max=1.5)
        | TRUNCATED,
    ),
    "importance, per answer": (
        "other.json",
        UNSCALED | dict(importance_cap=3.0, normalise="sequence"),
        dict(loss_type="grpo", scale_rewards="none", vllm_importance_sampling_clip_max=3.0)
        | TRUNCATED,
    ),
}


def test_grpo(scored):
    """The policy has left the one that sampled, and both the reference: tokens are clipped.

    Not TRL's defaults, which multiply the KL by the ratio, and have no KL at all. In TRL a
    bound of the sampler's weight is asked for together with vLLM, which is not started here.
    """
    home, jobs, ours = scored, [], {}
    folders = {name: str(home / name) for name in ("old", "policy", "reference")}
    common = dict(num_generations=GROUP, use_bias_correction_kl=False, disable_dropout=True)
    for name, (data, mine, theirs) in GRPO.items():
        scale = BESSEL if mine.get("advantage_scale") == "group" else 1.0
        more = dict(old_policy="pass", beta=0.1 / scale) | BOUNDS | mine
        trainer = grpo_trainer(home, data, **more)
        policy = AutoModelForCausalLM.from_pretrained(folders["policy"])
        trainer.model.load_state_dict(policy.state_dict())
        step = next(iter(trainer.loader))
        loss = trainer.training_step(trainer.model, step).item()
        means = trainer.sums.means(trainer.accelerator)
        ours[name] = scale, (loss, gradients(trainer.model)), means
        settings = dict(beta=0.1, max_completion_length=LENGTH) | BOUNDS | common | theirs
        job = dict(name=name, method="grpo", rows=grpo_rows(step), settings=settings)
        jobs.append(job | folders | dict(corrects=data == "other.json"))
    found = in_trl(home, *jobs)
    for name, (scale, result, means) in ours.items():
        metrics = found[name][0]["metrics"]
        clipped = means["rewards_train/clipped"]
        assert 0.05 < clipped < 0.8
        assert clipped == pytest.approx(metrics["clip_ratio/region_mean"], abs=1e-6)
        if "importance" in name:
            assert means["rewards_train/importance_cut"] > 0
        assert means["rewards_train/KL"] == pytest.approx(metrics["kl"], rel=1e-4)
        compare(f"GRPO, {name}", result, found[name], 1 / scale)

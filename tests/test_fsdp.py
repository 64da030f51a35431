"""Weights that are shared out over processes (FSDP2) train as one process does.

Two ranks over gloo, forked from this process. `make test-fsdp` runs every method and more ways
of going on (HALOS_NB_LONG=fsdp); CI a few that between them take every path.
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from ranks import SHARDED, run_ranks
from safetensors.torch import load_file
from test_trainers import (
    HUMANLINE,
    LORA,
    VARIANTS,
    apart,
    config,
    distance,
    drift,
    home,  # noqa: F401  # a fixture
    same_metrics,
)
from transformers import AutoModelForCausalLM

from halos_nb.configs import LoopConfig, SampleConfig
from halos_nb.ledger import run_folder
from halos_nb.loop import run_rounds
from halos_nb.playground import build, into_playground, locate
from halos_nb.models import load_tokenizer
from halos_nb.processes import InStep, check_shares, is_sharded, start_processes
from halos_nb.records import prompt_id
from halos_nb.sample import main as draw
from halos_nb.settings import load_settings
from halos_nb.train import make_trainer, train

LONG = os.environ.get("HALOS_NB_LONG") == "fsdp"
long = pytest.mark.skipif(not LONG, reason="make test-fsdp")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")

WHOLE = SHARDED | dict(FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
ONCE = WHOLE | dict(FSDP_CPU_RAM_EFFICIENT_LOADING="true")
del ONCE["ACCELERATE_USE_CPU"]  # as `accelerate launch` leaves it out beside FSDP
CUT = dict(microbatch_size=1)  # so that two processes have 2 and 1 batches of three pairs
ROWS = dict(layout="plain", gradient_checkpointing=True)

# name: (loss, options, environment)
CASES = {
    "dpo": ("dpo", CUT | dict(save_every=2, keep_steps=0), SHARDED),
    "kto-humanline": ("kto", CUT | ROWS | HUMANLINE, WHOLE),
    "dpo-lora": ("dpo", CUT | LORA, ONCE | dict(FSDP_ACTIVATION_CHECKPOINTING="true")),
}
if LONG:
    for name, (loss, more) in VARIANTS.items():
        one_each = {} if loss == "raft" else CUT
        CASES[f"every {name}"] = (loss, one_each | more, SHARDED)
    for name in ("dpo", "bradley-terry", "dpo-ema", "ppo-lora", "grpo", "dpo-humanline"):
        loss, more = VARIANTS[name]
        CASES[f"once {name}"] = (loss, CUT | more, ONCE)
        CASES[f"rows {name}"] = (loss, CUT | ROWS | more, WHOLE)
    CASES["stays whole"] = ("dpo", CUT, SHARDED | dict(FSDP_RESHARD_AFTER_FORWARD="false"))
    CASES["computed twice"] = ("dpo", CUT, SHARDED | dict(FSDP_ACTIVATION_CHECKPOINTING="true"))
    CASES["one unit"] = ("dpo", CUT, SHARDED | dict(FSDP_AUTO_WRAP_POLICY="NO_WRAP"))


def train_shared(cfg, env):
    "Train in this rank, as a job of its own."
    become_shared(env)
    train(cfg)


def become_shared(env):
    "Let this rank's next job have this environment."
    from accelerate.state import AcceleratorState

    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]
    os.environ |= env
    AcceleratorState._reset_state(reset_partial_state=True)


EPOCHS = 2 if LONG else 1
STEPS = 3 * EPOCHS


@pytest.fixture(scope="module")
def both(home):  # noqa: F811
    "Every case by one process, and by two that share; then round 2 of the first, mixed."
    for name, (loss, more, _) in CASES.items():
        train(config(home, loss, f"fsdp-{name}-1", **dict(epochs=EPOCHS) | more))

    def work():
        for name, (loss, more, env) in CASES.items():
            cfg = config(
                home, loss, f"fsdp-{name}-2", num_processes=2, **dict(epochs=EPOCHS) | more
            )
            train_shared(cfg, env)
        # rounds 2 of two processes: behind one process, and behind two
        for before, env in (("dpo-1", WHOLE), ("dpo-2", SHARDED)):
            cfg = go_on(home, before, "2", num_processes=2)
            train_shared(cfg, env)

    run_ranks(2, work, home)
    for before in ("dpo-1", "dpo-2"):
        train(go_on(home, before, "1"))
    return home


ROUND = CUT | dict(epochs=EPOCHS)


def go_on(home, before, after, **more):  # noqa: F811
    final = str(home / f"fsdp-{before}/FINAL")
    name = f"fsdp-{before} then {after}"
    return config(home, "dpo", name, from_checkpoint=final, load_from=final, **ROUND | more)


@pytest.mark.parametrize("name", CASES)
def test_shared_weights_train_as_one_process_does(both, name):
    one, two = (both / f"fsdp-{name}-{n}" for n in (1, 2))
    assert json.loads((two / "counts.json").read_text())["sharded"] == 2
    far = drift(one, two)
    print(f"{name}: the weights are {far:.1e} of their way apart")
    assert far < 1e-4
    assert same_metrics(one, two, leave=("total_flos", "train_loss", "tokens", *CUT_COST)) > 20
    assert weights_of(one) == weights_of(two)


CUT_COST = ("padding", "shared")  # what only fills up is computed, too


def weights_of(folder):
    "Names and shapes of what the files of a checkpoint hold; the optimiser's apart."
    found = {}
    for file in sorted((folder / "FINAL").rglob("*.safetensors")):
        if file.parent.name != "optimizer":
            for name, weight in load_file(file).items():
                found[file.name, name] = (tuple(weight.shape), weight.dtype)
    return found


def test_a_checkpoint_loads_with_plain_transformers(both):
    "Whatever the kind of state dict; the one between, too."
    for folder in ("dpo-2/FINAL", "dpo-2/step-2", "dpo-lora-2/FINAL", "kto-humanline-2/FINAL"):
        path = both / f"fsdp-{folder}"
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(info.values()), info
        assert type(model).__name__ == "LlamaForCausalLM"
        assert json.loads((path / "config.json").read_text())["architectures"] == [
            "LlamaForCausalLM"
        ]


def test_the_optimiser_is_written_as_asked(both):
    def names(case):
        return {path.name for path in (both / f"fsdp-{case}/FINAL").iterdir()}

    assert "optimizer.pt" in names("kto-humanline-2") and "optimizer" not in names("dpo-1")
    shares = {path.name for path in (both / "fsdp-dpo-2/FINAL/optimizer").iterdir()}
    assert "groups.json" in shares and len([s for s in shares if "safetensors" in s]) >= 2
    assert not any("pickle" in s or s.endswith((".pt", ".bin", ".distcp")) for s in shares)
    whole, shared = (
        torch.load(both / f"fsdp-kto-humanline-{n}/FINAL/optimizer.pt", weights_only=True)
        for n in (1, 2)
    )
    assert whole["param_groups"] == shared["param_groups"]
    for number, one in whole["state"].items():
        other = shared["state"][number]
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.shape == other[name].shape and value.dtype == other[name].dtype
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-6)


def test_a_round_goes_on_from_any_other_sharing(both):
    """One process behind one, two behind one, one behind two, two behind two.

    Without the moments the second round is another.
    """
    ends = [both / f"fsdp-dpo-{b} then {a}" for b in "12" for a in "12"]
    for end in ends[1:]:
        assert apart(ends[0], end) < 1e-5
        assert json.loads((end / "FINAL/counters.json").read_text())["total_steps"] == STEPS * 2
    start = both / "fsdp-dpo-1/FINAL"
    moved = distance(*(load_file(f / "model.safetensors") for f in (start, ends[0] / "FINAL")))
    fresh = config(both, "dpo", "fsdp-fresh", model=str(start), **ROUND)
    train(fresh)
    assert moved > 1e-3 and apart(ends[0], both / "fsdp-fresh") > 1e-3


def refusal(work, tmp_path):
    with pytest.raises(RuntimeError) as error:
        run_ranks(2, work, tmp_path)
    return str(error.value)


@pytest.mark.parametrize("precision, env", [("float32", ONCE), ("bfloat16", SHARDED)])
def test_what_was_drawn_is_scored_by_shares(home, tmp_path, monkeypatch, precision, env):  # noqa: F811
    "Three batches of different lengths over two processes, each under two models."
    start = str(home / "start")
    other = AutoModelForCausalLM.from_pretrained(start)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(start).save_pretrained(tmp_path / "other")
    prompts = [[dict(role="user", content="ab " * n)] for n in (1, 5, 2, 9, 3)]
    rows = [dict(prompt=prompt, prompt_id=prompt_id(prompt)) for prompt in prompts]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    how = dict(datasets=[str(tmp_path / "prompts.json")], max_new_tokens=12, batch_size=2)
    how |= dict(model=start, precision=precision, num_samples_per_prompt=1)
    draw(SampleConfig(**how, output_file=str(tmp_path / "drawn.json")))
    how |= dict(reference=str(tmp_path / "other"), drawn=str(tmp_path / "drawn.json"))
    draw(SampleConfig(**how, output_file=str(tmp_path / "one.json")))

    def work():
        become_shared(env)
        join = InStep.join

        def noted(self, number):
            join(self, number)
            (tmp_path / f"{os.getpid()}.passes").write_text(str(self.passes))

        monkeypatch.setattr(InStep, "join", noted)
        draw(SampleConfig(**how, num_processes=2, output_file=str(tmp_path / "two.json")))

    run_ranks(2, work, tmp_path)
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert [row["output_ids"] for row in one] == [row["output_ids"] for row in two]
    for name in ("policy_logps", "reference_logps"):
        said = [[row[name] for row in rows] for rows in (one, two)]
        assert said[1] == pytest.approx(said[0], rel=1e-6)
    assert max(int(file.read_text()) for file in tmp_path.glob("*.passes")) > 0


def test_what_is_not_shared_is_an_error(home, tmp_path):  # noqa: F811
    "Where Accelerate would train whole copies without a word, and where a weight is left out."

    def whole_copies():
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        accelerator = start_processes(2)
        assert not is_sharded(accelerator)
        check_shares(make_trainer(config(home, "sft", "x")).trainer.model)

    told = refusal(whole_copies, tmp_path)
    assert "FSDP was asked for, and 20 weights are whole on every process" in told


@long
def test_other_numbers_of_processes(both, tmp_path):
    "2 -> 1 -> 4 -> 2, whole and in shares, each round like the same of one process."
    train(go_on(both, "dpo-1 then 1", "1"))
    train(go_on(both, "dpo-1 then 1 then 1", "1"))
    for env in (SHARDED, WHOLE):
        kind = "whole" if env is WHOLE else "shares"
        four = go_on(both, "dpo-2 then 1", f"4 {kind}", num_processes=4)
        run_ranks(4, partial(train_shared, four, env), tmp_path)
        assert apart(both / "fsdp-dpo-1 then 1 then 1", both / four.exp_name) < 1e-4
        two = go_on(both, f"dpo-2 then 1 then 4 {kind}", "2", num_processes=2)
        run_ranks(2, partial(train_shared, two, env), tmp_path)
        assert apart(both / "fsdp-dpo-1 then 1 then 1 then 1", both / two.exp_name) < 1e-4
        print(kind, apart(both / "fsdp-dpo-1 then 1 then 1 then 1", both / two.exp_name))


MOVING = {
    "dpo-humanline": SHARDED,
    "dpo-lora-humanline": WHOLE,
    "dpo-ema": ONCE,
    "ppo": SHARDED,
}


@long
@pytest.mark.parametrize("name", MOVING)
def test_an_interrupted_run_goes_on_in_the_middle(home, tmp_path, name):  # noqa: F811
    loss, more = VARIANTS[name]
    more = CUT | more | dict(save_every=2, keep_steps=0, epochs=2, num_processes=2)

    def work():
        for end, start in (("whole", None), ("late", str(home / f"{name}-whole/step-2"))):
            cfg = config(home, loss, f"{name}-{end}", from_checkpoint=start, **more)
            train_shared(cfg, MOVING[name])

    run_ranks(2, work, home)
    assert apart(home / f"{name}-whole", home / f"{name}-late") == 0


@long
@pytest.mark.parametrize("loss", ["dpo", "kto", "grpo", "ppo", "bradley-terry"])
def test_bfloat16(both, tmp_path, loss):
    "What is put together in bfloat16 is what autocast would round, up to embedding and norms."
    more = CUT | dict(precision="bfloat16", epochs=2)
    train(config(both, loss, f"fsdp-bf-{loss}-1", **more))
    cfg = config(both, loss, f"fsdp-bf-{loss}-2", num_processes=2, **more)
    run_ranks(2, partial(train_shared, cfg, SHARDED), tmp_path)
    far = drift(both / f"fsdp-bf-{loss}-1", both / f"fsdp-bf-{loss}-2")
    exact = drift(both / f"fsdp-bf-{loss}-1", both / f"fsdp-every {loss}-1")
    print(f"{loss}: bfloat16 shared out is {far:.1e} from one process, float32 {exact:.1e}")
    assert far < 0.2


# ---- whole runs, as a user starts them

quiet = lambda job, **kw: job.wait(show=False)
LOOPS = {
    "dpo": {},
    "kto": dict(method="kto"),
    "grpo": dict(method="grpo"),
    "humanline": dict(humanline=True),
    "lora": dict(train_options="use_peft=true, lora_r=8"),
}


@long
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_shares_its_weights_and_learns_the_same(name):
    "Two rounds in the playground; what one and two processes draw is the same."
    cfg = LoopConfig(total_prompts=64, prompts_per_round=32, num_samples_per_prompt=4)
    cfg = replace(cfg, fresh=True, label_measured="no", **LOOPS[name])
    settings, models = load_settings(), {}
    build(settings)
    cfg = into_playground(cfg, settings)
    for profile in ("cpu1", "fsdp_cpu2"):
        run = replace(cfg, profile=profile, run_name=f"loop-{name}-{profile}")
        for this in run_rounds(run, settings, watch=quiet):
            print(profile, this.note)
        folder = run_folder(settings, run.run_name)
        models[profile] = load_file(folder / "policy/model.safetensors")
        counts = json.loads((folder / "round-2/policy/counts.json").read_text())
        assert counts.get("sharded", 0) == (2 if profile == "fsdp_cpu2" else 0)
    start = load_file(locate(settings).policy / "model.safetensors")
    moved = distance(models["cpu1"], start)
    apart = distance(models["fsdp_cpu2"], models["cpu1"])
    far = max((models["cpu1"][n] - models["fsdp_cpu2"][n]).abs().max() for n in start)
    print(
        f"{name}: the weights moved by {moved:.3f}, {apart / moved:.1e} of it apart; {far:.1e}"
    )
    assert apart < 1e-4 * moved

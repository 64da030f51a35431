"The plan of a run: what is there at the same time, and what it takes from elsewhere."

import inspect

import pytest
from transformers import LlamaConfig

from halos_nb.answers import answer_logps
from halos_nb.backends import ENGINE_SETTINGS
from halos_nb.configs import LoopConfig
from halos_nb.plan import ENGINE_CACHE, GB, SCORED_AT_A_TIME, plan
from halos_nb.settings import Profile

TINY = dict(num_hidden_layers=3, num_attention_heads=4, hidden_size=64, intermediate_size=128)
MODEL = {"m": LlamaConfig(vocab_size=500, **TINY)}
LOOP = dict(sft_checkpoint="m", reward_checkpoint="m", prompts="p", lr=1e-6)
GPUS = dict(name="gpus", cpu=False)


def test_its_numbers_are_those_of_the_rooms_that_do_the_work():
    assert ENGINE_CACHE == int(ENGINE_SETTINGS["VLLM_CPU_KVCACHE_SPACE"]) * GB
    budget = inspect.signature(answer_logps).parameters["token_budget"].default
    assert budget == SCORED_AT_A_TIME


@pytest.mark.parametrize(
    "given, profile, beside",
    [
        ({}, {}, set()),
        (dict(staleness=1), {}, {"train beside"}),
        (dict(staleness=1), dict(GPUS, stages=dict(train=dict(devices="1"))), set()),
        (dict(backend="vllm"), dict(sampler="server"), {"score", "label", "train"}),
        (
            dict(backend="vllm"),
            dict(GPUS, sampler="server", devices="0", stages=dict(sample=dict(devices="1"))),
            set(),
        ),
    ],
)
def test_what_shares_a_device_at_the_same_time_adds_up(given, profile, beside):
    if profile.get("cpu") is False and "staleness" in given:
        profile = profile | dict(devices="0")
    made = plan(LoopConfig(**LOOP | given), Profile(**profile), MODEL, memory_gb=10)
    assert not made.notes
    joint = {name for name in made.stages if " beside " in name}
    assert {name.partition(" ")[0] for name in joint} >= {b.partition(" ")[0] for b in beside}
    assert bool(joint) == bool(beside)
    for name in joint:
        first, _, others = name.partition(" beside ")
        parts = [first, *others.split(" and ")]
        each = sum(made.stages[part].total for part in parts)
        assert made.stages[name].total == pytest.approx(each)


def test_processes_of_a_cpu_share_its_memory():
    two = Profile(name="cpu2", num_processes=2)
    made = plan(LoopConfig(**LOOP, staleness=1), two, MODEL, memory_gb=10)
    [name] = [name for name in made.stages if name.startswith("train beside")]
    assert made.places[name].memory == 2 * 10 * GB
    parts = name.split(" beside ")
    assert made.stages[name].total == pytest.approx(
        2 * sum(made.stages[part].total for part in parts)
    )


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="lrr: unknown parameter; did you mean `lr`"):
        plan(LOOP | dict(method="dpo", lrr=1), Profile(), MODEL)

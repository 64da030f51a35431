"The plan of a run: what is there at the same time, and what it takes from elsewhere."

import inspect
import json
from dataclasses import asdict, replace

import pytest
import torch
from tiny_families import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DeepseekV3Config, FalconMambaConfig
from transformers import LlamaConfig, MistralConfig, MixtralConfig, Qwen3MoeConfig

from halos_nb.answers import answer_logps
from halos_nb.backends import ENGINE_SETTINGS
from halos_nb.configs import LabelConfig, LoopConfig, PlanConfig, SampleConfig, TrainConfig
from halos_nb.plan import (
    ENGINE_CACHE,
    GB,
    SCORED_AT_A_TIME,
    Model,
    Pass,
    Place,
    as_rehearsed,
    changes_of_scoring,
    changes_of_sharing,
    drawing_needs,
    full_batch,
    kept_layers,
    keys_and_values,
    longest,
    place_of,
    plan,
    rehearsed,
    scoring_needs,
    seen_in,
    size_of,
    training_needs,
    with_layers,
)
from halos_nb.settings import Profile, Sharing

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


SHARDED = {"distributed_type": "FSDP", "num_processes": 8, "use_cpu": False}
TRAINING = TrainConfig(loss="dpo", model="m", max_length=400, max_prompt_length=200)


LARGE = LlamaConfig(vocab_size=500, **TINY | dict(hidden_size=256))


def trained_under(tmp_path, **sharing):
    "What a training needs whose Accelerate configuration says so."
    file = tmp_path / "theirs.yaml"
    file.write_text(json.dumps(SHARDED | {"fsdp_config": {"fsdp_version": 2} | sharing}))
    profile = Profile(accelerate_config=str(file), cpu=False)
    place = place_of(profile.for_stage("train"), 1)
    needs = training_needs(LARGE, TRAINING, place, longest(TRAINING))
    return needs["train"], changes_of_sharing(file.name, place.sharing)


def test_what_accelerate_s_file_says_of_sharing_is_planned(tmp_path):
    plain, told = trained_under(tmp_path)
    assert told == []
    size = size_of(Model(LARGE))
    stays, [told] = trained_under(tmp_path, reshard_after_forward="false")
    few = size.root + 2 * size.layer
    assert stays.gathered - plain.gathered == pytest.approx(4 * (size.weights - few))
    assert told.startswith("fsdp_reshard_after_forward: true in theirs.yaml")
    at_once, [told] = trained_under(tmp_path, fsdp_auto_wrap_policy="NO_WRAP")
    assert at_once.gathered == pytest.approx(4 * size.weights)
    assert told.startswith("fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP in theirs.yaml")
    again, _ = trained_under(tmp_path, fsdp_activation_checkpointing=True)
    assert again.activations < plain.activations / 2


def test_what_is_in_no_named_layer_stays_whole():
    whole, layer = size_of(Model(LARGE)), size_of(Model(LARGE), Sharing(("LlamaMLP",)))
    assert layer.layer < whole.layer
    assert layer.root > whole.root
    assert size_of(Model(LARGE), Sharing(at_once=True)).root == whole.weights


# 64 heads and 1.1 GB in bfloat16
WIDE = LlamaConfig(
    vocab_size=50_000, hidden_size=2048, num_attention_heads=64, intermediate_size=8192,
    num_hidden_layers=6,
)  # fmt: skip


@pytest.mark.parametrize(
    "memory, given, fits, told",
    [
        (8, {}, True, ""),
        (2, {}, False, "tensor_parallel_size=2: 0.6 GB of weights on each, it fits"),
        (2, dict(tensor_parallel_size=4), True, ""),
        (8, dict(gpu_memory_utilization=0.1), False, "gpu_memory_utilization=0.3: "),
        (0.5, {}, False, "no engine of up to 16 such GPUs"),
    ],
)
def test_an_engine_has_room_for_its_weights(memory, given, fits, told):
    how = dict(model="m", datasets=["p"], backend="vllm", precision="bfloat16") | given
    made = plan(SampleConfig(**how), Profile(**GPUS), {"m": WIDE}, memory_gb=memory)
    assert made.fits is fits
    need, place = made.stages["sample"], made.places["sample"]
    assert need.weights == pytest.approx(2 * size_of(Model(WIDE)).weights / place.processes)
    if fits:
        assert need.total == pytest.approx(place.share * memory * GB)
    assert told in "; ".join(made.changes)


def test_scoring_what_an_engine_drew_is_planned_where_it_runs():
    apart = dict(sample=dict(devices="04"), label=dict(devices="4"), train=dict(devices="0"))
    given = dict(LOOP, backend="vllm", staleness=1)
    own = Profile(**GPUS, stages=apart)
    alone = plan(LoopConfig(**given), own, MODEL, memory_gb=10)
    assert not any(" beside " in name for name in alone.stages)  # 04 is 4
    stays = Profile(**GPUS, sampler="server", stages=apart | dict(score=dict(devices="0")))
    beside = plan(LoopConfig(**given), stays, MODEL, memory_gb=10)
    assert "train beside score" in beside.stages


def test_every_stage_that_does_not_fit_is_named():
    made = plan(LoopConfig(**LOOP, backend="vllm"), Profile(**GPUS), MODEL, memory_gb=0.1)
    assert len(made.too_large) > 2
    assert all(f"nor does {name} fit" in str(made) for name in made.too_large[1:])
    assert "precision=bfloat16 halves it" in made.changes


@pytest.mark.parametrize("memory", [-5, 0, float("inf"), float("nan"), True])
def test_a_memory_that_is_none_is_refused(memory):
    with pytest.raises(ValueError, match="memory_gb: "):
        plan(LoopConfig(**LOOP), Profile(), MODEL, memory_gb=memory)


def test_what_is_no_config_is_refused(tmp_path):
    for wrong in (8, None, Profile(), PlanConfig(run="x")):
        with pytest.raises(ValueError, match="cfg: a .* cannot be planned"):
            plan(wrong)
    with pytest.raises(ValueError, match="cfg: nothing is at m8"):
        plan("m8")
    (tmp_path / "params.json").write_text(json.dumps(dict(parameters=asdict(TRAINING))))
    assert "train" in plan(str(tmp_path), configs=MODEL, memory_gb=1).stages


def test_scoring_by_shares_is_planned_as_it_runs(tmp_path):
    file = tmp_path / "four.yaml"
    file.write_text(json.dumps(SHARDED | {"num_processes": 4, "fsdp_config": dict(version=2)}))
    given = LoopConfig(**LOOP, backend="vllm", precision="bfloat16")
    made = {}
    for name, own in (("whole", {}), ("shared", dict(accelerate_config=str(file)))):
        place = place_of(Profile(**GPUS, stages=dict(score=own)).for_stage("score"), 80)
        made[name] = scoring_needs(WIDE, given.sampling("vllm", model="m"), place)["score"]
    size = size_of(Model(WIDE))
    assert made["whole"].weights == 2 * size.weights
    assert made["shared"].weights == made["shared"].reference == 2 * size.weights / 4
    assert made["shared"].gathered == 2 * (2 * size.root + 2 * size.layer)
    assert made["shared"].activations == made["whole"].activations
    place = Place("cuda", memory=made["whole"].total - GB)
    [told] = changes_of_scoring(given, {"m": WIDE}, made["whole"], place)
    assert told.startswith("accelerate_config.score = fsdp2_") and told.endswith("it fits")


@pytest.mark.parametrize("config", [LoopConfig(**LOOP, reference="ema"), TRAINING])
def test_what_a_config_refuses_is_not_proposed(config):
    if isinstance(config, TrainConfig):
        config = replace(config, loss="dpo", reference="ema")
    made = plan(config, Profile(**GPUS), MODEL, memory_gb=0.01)
    assert made.fits is False and not made.notes
    assert not any("use_peft" in line for line in made.changes)


def test_adapters_of_a_reward_model_are_planned():
    reward = TrainConfig(loss="bradley-terry", model="m")
    made = plan(replace(reward, use_peft=True), Profile(**GPUS), MODEL, memory_gb=10)
    assert not made.notes
    lora = dict(use_peft=True, lora_dropout=0.0)
    policy = plan(replace(TRAINING, **lora), Profile(**GPUS), MODEL, memory_gb=10)
    near = dict(rel=0.1)
    assert made.stages["train"].gradients == pytest.approx(
        policy.stages["train"].gradients, **near
    )
    small = plan(reward, Profile(**GPUS), {"m": WIDE}, memory_gb=0.1)
    assert any("use_peft=true" in line for line in small.changes)


@pytest.mark.parametrize("given", [{}, dict(humanline=True)])
def test_a_reference_is_planned_as_large_as_it_is(given):
    "Asked before the training, or there all the time."
    models = dict(MODEL, large=WIDE)
    cfg = TrainConfig(loss="dpo", model="m", load_from="large", **given)
    made = plan(cfg, Profile(**GPUS), models, memory_gb=80)
    [needs] = [n for n in made.stages.values() if n.reference]
    assert needs.reference == 4 * size_of(Model(WIDE)).weights
    assert needs.weights == 4 * size_of(Model(MODEL["m"])).weights


def test_who_compares_is_planned_with_its_vocabulary():
    own = dict(LOOP, reward_checkpoint="")
    by_lm = plan(LoopConfig(**own, judge_model_path="m"), Profile(**GPUS), MODEL, memory_gb=9)
    assert by_lm.stages["label"].weights == 4 * size_of(Model(MODEL["m"])).weights
    files = dict(samples_file="s", output_file="f")
    for given, names in [
        (dict(reward_model_path="m*0.7, n*0.3"), ["label", "label 2"]),
        (dict(judge_model_path="m"), ["label"]),
        (dict(function="rules:score"), []),
    ]:
        two = dict(MODEL, n=MODEL["m"])
        made = plan(LabelConfig(**files, **given), Profile(**GPUS), two, memory_gb=9)
        assert ([*made.stages], made.notes) == (names, [])


@pytest.mark.parametrize("learns", ["float32", "bfloat16"])
def test_experts_are_planned(learns):
    few = dict(num_local_experts=4, num_experts_per_tok=2, vocab_size=500)
    two = {"m": MixtralConfig(**TINY | few, num_key_value_heads=2)}
    cfg = replace(TRAINING, loss="dpo", precision=learns)
    made = plan(cfg, Profile(**GPUS), two, memory_gb=10)
    assert not made.notes
    assert made.stages["train"].activations > 0


DENSE_FIRST = dict(hidden_size=64, intermediate_size=512, moe_intermediate_size=32)
DENSE_FIRST |= dict(num_experts=8, num_experts_per_tok=2, vocab_size=500, head_dim=16)
DENSE_FIRST |= dict(num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize(
    "dense, learns",
    [([0, 1, 2], True), ([2], True), ([0, 2, 4, 6], True), ([0, 2, 4, 6], False)],
)
def test_layers_of_several_kinds_are_planned_each_as_what_it_is(dense, learns):
    "Some layers have experts and others none; all of them rehearsed at once say how much."
    model = Model(Qwen3MoeConfig(**DENSE_FIRST, mlp_only_layers=dense))
    how = Pass(512, 64, 64, 2, learns=learns)
    with FakeTensorMode(allow_non_fake_inputs=True):
        all_at_once = seen_in(as_rehearsed(model, how, 8), full_batch(512, 64, 64, 2), how)
    held = rehearsed(model, how)
    most = max(all_at_once.forward + held.logits, all_at_once.going, all_at_once.back)
    assert held.activations + held.logits == pytest.approx(most, rel=0.05)


LATENT = dict(vocab_size=500, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=12)
LATENT |= dict(qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=3, num_key_value_heads=4)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=500, num_key_value_heads=2, **TINY),
        DeepseekV3Config(**LATENT, **TINY),
    ],
    ids=["few heads", "latent"],
)
def test_an_engine_s_cache_has_what_a_model_keeps_of_a_token(config):
    cache = AutoModelForCausalLM.from_config(config)(torch.arange(7)[None]).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 7 * TINY["num_hidden_layers"] * keys_and_values(config, 4)


# shared keys, a latent cache, windows of 6 tokens, recurrent states alone and between
CACHES = dict(
    llama={},
    deepseek_v3={},
    mistral=dict(sliding_window=6),
    gemma2=dict(sliding_window=6),
    qwen3_next={},
    lfm2={},
    mamba={},
    jamba={},
    falcon_h1={},
)


@pytest.mark.parametrize("family", CACHES)
def test_a_cache_is_planned_as_a_model_fills_it(family):
    "A window keeps all tokens but the one that comes next."
    made = tiny_model("causal", family, **CACHES[family])
    with torch.no_grad():
        said = made(torch.arange(20)[None], use_cache=True)
    cache = said.get("past_key_values") or said.get("cache_params")
    kept = kept_layers(Model(made.config))
    assert len(kept) == len(cache.layers)
    for layer, planned in zip(cache.layers, kept):
        held = [x for x in tree_leaves(vars(layer)) if isinstance(x, torch.Tensor)]
        tokens = planned.window - 1 if planned.window else 20
        assert planned.of(tokens) == sum(x.nbytes for x in {id(x): x for x in held}.values())
    assert {"mistral", "gemma2"} & {family} == {family for x in kept if x.window}


def test_the_cache_of_a_window_does_not_grow_with_the_row():
    "Of eight times as many tokens windows keep nearly as much; a plain cache eight times."
    shape = dict(vocab_size=500, num_key_value_heads=2, **TINY)
    grown = []
    for config in (LlamaConfig(**shape), MistralConfig(**shape, sliding_window=64)):
        needs = [
            drawing_needs(
                config,
                SampleConfig(model="x", max_prompt_length=half, max_new_tokens=half),
                Place(),
            )["sample"].cache
            for half in (512, 4096)
        ]
        grown.append(needs[1] / needs[0])
    assert grown[0] > 7 and grown[1] < 1.01


def test_layers_whose_kinds_follow_from_their_number_are_planned():
    shape = dict(num_hidden_layers=3, hidden_size=64, vocab_size=500)
    made = size_of(Model(with_layers(FalconMambaConfig(**shape), 1)))
    assert made.weights < size_of(Model(FalconMambaConfig(**shape))).weights

"""Configs: what is not there is named before anything starts, errors are in a config's own
words.
"""

import copy
from dataclasses import asdict, fields
from typing import get_args, get_type_hints

import pytest

from halos_nb.configs import (
    LabelConfig,
    LoopConfig,
    RewardConfig,
    SampleConfig,
    TrainConfig,
    config_json,
    make_config,
    require_path,
)
from halos_nb.loop import run_rounds
from halos_nb.playground import asks_truth, into_playground, pairs_of_playground
from halos_nb.score import head_at
from halos_nb.settings import Profile, Settings, SlurmOptions


@pytest.mark.parametrize("name", ["org/model", "gpt2", "."])
def test_a_name_of_the_hub_or_a_path_that_exists_is_taken(name):
    assert require_path(name, "model") == name


def test_a_reward_model_that_is_not_there_is_named(tmp_path):
    assert require_path(str(tmp_path), "model") == str(tmp_path)
    for gone in (str(tmp_path / "none"), "./none", "~/none"):
        with pytest.raises(FileNotFoundError, match="reward_model_path: nothing is at .*none"):
            head_at(gone)


def test_the_loop_names_a_model_that_is_not_there_before_its_first_stage(tmp_path):
    gone = str(tmp_path / "none")
    settings = Settings(runs_dir=str(tmp_path / "runs"))
    here = dict(run_name="r", prompts="hh", sft_checkpoint=str(tmp_path))
    loop = LoopConfig(**here, lr=1e-6, reward_checkpoint=gone)
    with pytest.raises(FileNotFoundError, match="reward_checkpoint: nothing is at .*none"):
        next(run_rounds(loop, settings))
    with pytest.raises(FileNotFoundError, match="sft_checkpoint: nothing is at .*none"):
        into_playground(LoopConfig(sft_checkpoint=gone, lr=1e-6), settings)
    with pytest.raises(FileNotFoundError, match="model: nothing is at .*none"):
        pairs_of_playground(RewardConfig(model=gone, lr=1e-6), settings)
    assert not (tmp_path / "runs").exists()


def test_errors_of_a_config_are_in_its_own_words():
    with pytest.raises(ValueError) as error:
        make_config(LoopConfig, train_options="tau=x")
    assert str(error.value) == (
        "LoopConfig: training stage, TrainConfig: tau: should be a number, got 'x'"
    )


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ValueError) as error:
        make_config(LoopConfig, bta=0.1, beta="hello", total_prompts=0)
    told = str(error.value).removeprefix("LoopConfig: ").split("; ")
    assert told == [
        "beta: should be a number, got 'hello'",
        "total_prompts: should be greater than 0, got 0",
        "bta: unknown parameter",
        "did you mean `beta`?",
    ]


# first and last field of every group, as they are read in the notebook
ORDER = {
    SampleConfig: "model num_samples_per_prompt temperature num_processes "
    "tensor_parallel_size extra_body",
    LabelConfig: "samples_file combine feedback_type empty_ok trim_to_sentence "
    "split api_model structured max_retries dry_run precision num_processes",
    TrainConfig: "loss metrics_file beta centring old_policy advantage_constant cliprange "
    "ppo_epochs reference ema_decay humanline sync_reference lr "
    "microbatch_size max_length control_rejected use_peft reference_cache "
    "report_to tracker_dir eval_at_start num_processes",
    LoopConfig: "run_name lr total_prompts gradient_checkpointing backend sampler_options "
    "keep pack_after staleness staleness report_to report_to labeller dry_run "
    "evaluate_every patience "
    "sft_checkpoint fresh",
}


@pytest.mark.parametrize("cls", ORDER)
def test_groups_come_in_the_order_in_which_they_are_written(cls):
    "Dataclasses take the last base class first; files and --help have the order of reading."
    names = [f.name for f in fields(cls)]
    edges = [names.index(name) for name in ORDER[cls].split()]
    assert edges == sorted(edges)
    assert edges[0] == 0 and edges[-1] == len(names) - 1
    starts, ends = edges[2::2], edges[1:-1:2]
    assert starts == [end + 1 for end in ends]


def test_a_config_is_data():
    config = TrainConfig(loss="dpo", model="m")
    assert copy.deepcopy(config) == config
    assert config_json(config).startswith('{\n "loss": "dpo",\n "model": "m",')


@pytest.mark.parametrize("given", ["x%", "120%", "-1%", "nan%", "25 %%", "high", "prompt"])
def test_a_threshold_has_one_of_three_forms(given):
    files = dict(samples_file="s", output_file="f", function="f:g")
    for cls, more in ((LabelConfig, files), (LoopConfig, {})):
        with pytest.raises(ValueError) as error:
            make_config(cls, threshold=given, **more)
        assert str(error.value) == (
            f"{cls.__name__}: threshold: should be a number, a share of the score differences "
            "as '25%', or one of mean, median, prompt mean, prompt median, got "
            f"{given!r}"
        )


@pytest.mark.parametrize(
    "given, taken", [("25%", "25%"), ("0.5", 0.5), ("25", 25.0), (3, 3), (0.25, 0.25)]
)
def test_a_threshold_is_taken_by_what_it_says(given, taken):
    assert make_config(LoopConfig, threshold=given).threshold == taken


def test_what_a_threshold_cannot_mean_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="threshold: for pairs it is the smallest difference"):
        make_config(LoopConfig, threshold="prompt mean")
    with pytest.raises(ValueError, match="threshold: for good or bad it is the smallest good"):
        make_config(LoopConfig, method="kto", threshold="25%")
    assert make_config(LoopConfig, method="kto", threshold="prompt mean")


def test_a_stored_config_is_the_same_again():
    "What None stood for is written down, and read back as it is."
    files = dict(samples_file="s", output_file="f")
    judge = dict(api_type="openai", api_model="m", judge="pairwise")
    for more, mode in ((dict(function="f:g"), "max"), (judge, "random")):
        config = make_config(LabelConfig, **files, **more)
        assert config.feedback_mode == mode
        assert make_config(LabelConfig, **asdict(config)) == config


@pytest.mark.parametrize(
    "models, said",
    [
        ("a", "ensemble: worst is of several reward models"),
        ("a*0.7, b", "ensemble: worst asks every reward model alike"),
    ],
)
def test_an_ensemble_is_of_several_models_that_count_alike(models, said):
    files = dict(samples_file="s", output_file="f", reward_model_path=models)
    for cls, more in ((LabelConfig, files), (LoopConfig, dict(reward_checkpoint=models))):
        with pytest.raises(ValueError, match=said):
            make_config(cls, ensemble="worst", **more)
    make_config(LabelConfig, ensemble="worst", **files | dict(reward_model_path="a, b"))


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(label_smoothing=0.5), "label_smoothing: with 0.5 of the labels wrong"),
        (dict(loss="dpo", debias_length=True), "debias_length: only a reward model"),
        (dict(loss="dpo", label_smoothing=0.1), "label_smoothing: only a reward model"),
        (dict(loss="dpo", objectives="a, b"), "objectives: only a reward model"),
        (dict(objectives="a"), "objectives: a should be several names"),
        (dict(objectives="a, b, a"), "objectives: a, b, a should be several names, each once"),
        (dict(objectives="a=1, b=2"), "objectives: a=1 is no name"),
        (dict(objectives="a, b", debias_length=True), "debias_length: is of the pairs' one"),
    ],
)
def test_what_only_a_reward_model_has_is_refused_elsewhere(given, said):
    with pytest.raises(ValueError, match=said):
        make_config(TrainConfig, **dict(loss="bradley-terry", model="m") | given)


NO_NUMBERS = (float("inf"), float("nan"), True, False, "inf", "nan", "1e999")


@pytest.mark.parametrize("cls", [LoopConfig, TrainConfig, SampleConfig, Profile, SlurmOptions])
def test_no_number_is_endless_or_a_truth_value(cls):
    needed = {TrainConfig: dict(loss="dpo", model="m"), SampleConfig: dict(model="m")}
    kinds = get_type_hints(cls)
    looked_at = 0
    for one in fields(cls):
        if not {int, float} & {kinds[one.name], *get_args(kinds[one.name])}:
            continue
        looked_at += 1
        for value in NO_NUMBERS:
            with pytest.raises(ValueError, match=one.name):
                make_config(cls, **needed.get(cls, {}) | {one.name: value})
    assert looked_at > 1


def test_what_may_be_a_word_or_a_number_says_both():
    for keep in (0, -2, "lst"):
        with pytest.raises(ValueError, match="keep: .*'last'.*, or a number above 0, got"):
            LoopConfig(keep=keep)
    with pytest.raises(ValueError, match="max_token: unknown .*did you mean `max_tokens`"):
        LoopConfig(label_options="max_token=128")


@pytest.mark.parametrize("method, enough", [("dpo", 2), ("kto", 1), ("grpo", 2), ("raft", 1)])
def test_a_method_that_compares_has_something_to_compare(method, enough):
    "Told before a round has been sampled for nothing."
    LoopConfig(method=method, num_samples_per_prompt=enough)
    if enough > 1:
        with pytest.raises(ValueError, match=f"num_samples_per_prompt: {method} compares"):
            LoopConfig(method=method, num_samples_per_prompt=1)


@pytest.mark.parametrize(
    "name, value", [("lora_r", 8), ("lora_alpha", 16), ("lora_targets", "q")]
)
def test_what_is_said_of_adapters_without_adapters_is_refused(name, value):
    given = dict(loss="dpo", model="x", train_datasets=["d.json"], lr=1e-6)
    with pytest.raises(
        ValueError, match=f"{name}: does nothing without adapters; add use_peft"
    ):
        TrainConfig(**given, **{name: value})
    assert getattr(TrainConfig(**given, use_peft=True, **{name: value}), name) == value


def test_the_truth_of_the_playground_evaluates_where_it_is_asked():
    given = dict(run_name="r", lr=1e-3, evaluate_every=1)
    assert asks_truth(LoopConfig(**given))
    assert asks_truth(LoopConfig(**given, eval_labeller="function, rm"))
    assert not asks_truth(LoopConfig(**given, eval_labeller="rm"))
    own = dict(labeller="function", function="rules:score", eval_labeller="function")
    assert not asks_truth(LoopConfig(**given, **own))
    with pytest.raises(ValueError, match="eval_labeller: it asks function, and there is none"):
        LoopConfig(**given, prompts="mine.json", eval_labeller="function")


@pytest.mark.parametrize("make", [Settings, LoopConfig])
def test_a_path_whose_bytes_are_no_text_is_named(make):
    "Linux allows such a name, and LC_ALL=C makes one of every umlaut."
    name = dict(Settings="runs_dir", LoopConfig="prompts")
    given = {name[make.__name__]: "caf\udce9"}
    with pytest.raises(ValueError, match=f"{make.__name__}: .*no UTF-8.*PYTHONUTF8=1.*udce9"):
        make(**given)

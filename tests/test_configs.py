"Configs as they come from a command line: every field is a flag, its range is checked, and nothing is said that is not meant."

import subprocess
import sys
import warnings
from dataclasses import fields

import pytest

from halos_nb.configs import (
    LabelConfig,
    LoopConfig,
    RewardConfig,
    SampleConfig,
    TrainConfig,
    make_config,
    require_path,
)
from halos_nb.settings import Settings, parse_args
from halos_nb.loop import run_rounds
from halos_nb.playground import into_playground, pairs_of_playground
from halos_nb.score import head_at

STAGES = {
    "sample": (SampleConfig, ["m"]),
    "label": (LabelConfig, ["--reward_model_path", "rm", "in.json", "out.json"]),
    "train": (TrainConfig, ["--loss", "kto", "--model", "m", "--train_datasets", "a", "b"]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_flags_make_a_config_quietly(stage):
    "HALOs' way to start a stage; what is not given has its default."
    cls, flags = STAGES[stage]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfg = parse_args(cls, flags)
    given = {
        "model",
        "reward_model_path",
        "samples_file",
        "output_file",
        "loss",
        "train_datasets",
    }
    plain = cls(**{f.name: getattr(cfg, f.name) for f in fields(cls) if f.name in given})
    assert {f.name: getattr(cfg, f.name) for f in fields(cls)} == {
        f.name: getattr(plain, f.name) for f in fields(cls)
    }


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_flag(stage, capsys):
    cls, _ = STAGES[stage]
    with pytest.raises(SystemExit):
        parse_args(cls, ["--help"])
    said = capsys.readouterr().out.replace("-", "_")
    # these stand by themselves
    assert [f.name for f in fields(cls) if f"__{f.name}" not in said] == dict(
        sample=["model"], label=["samples_file", "output_file"], train=[]
    )[stage]


@pytest.mark.parametrize(
    "flag, value",
    [
        ("frac_unique_desirable", "1.5"),
        ("frac_unique_undesirable", "-0.1"),
        ("lora_dropout", "1"),
        ("frac_unique_desirable", "most"),
    ],
)
def test_a_share_outside_its_range_is_an_error(flag, value, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        parse_args(TrainConfig, [*STAGES["train"][1], f"--{flag}", value])
    assert flag in str(error.value) + capsys.readouterr().err.replace("-", "_")


def test_the_command_itself(tmp_path):
    "Flags reach the stage: it goes as far as the model that is not there."
    flags = [
        "--loss",
        "kto",
        "--model",
        str(tmp_path / "none"),
        "--train_datasets",
        "a",
        "--frac_unique_desirable",
        "0.5",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "halos_nb.train", *flags],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode != 0
        and done.stderr.splitlines()[-1]
        == f"FileNotFoundError: model: nothing is at {tmp_path / 'none'}"
    )


def test_a_model_that_is_not_there_is_named_before_anything_starts(tmp_path):
    "A path is told from a hub's name by its look; the loop says so before its first stage."
    assert [require_path(name, "model") for name in ("org/model", "gpt2", str(tmp_path))] == [
        "org/model",
        "gpt2",
        str(tmp_path),
    ]
    for gone in (str(tmp_path / "none"), "./none", "~/none"):
        with pytest.raises(FileNotFoundError, match="reward_model_path: nothing is at .*none"):
            head_at(gone)
    loop = LoopConfig(
        run_name="r",
        sft_checkpoint=str(tmp_path),
        reward_checkpoint=str(tmp_path / "none"),
        prompts="hh",
    )
    with pytest.raises(FileNotFoundError, match="reward_checkpoint: nothing is at .*none"):
        next(run_rounds(loop, Settings(runs_dir=str(tmp_path / "runs"))))
    settings = Settings(runs_dir=str(tmp_path / "runs"))
    with pytest.raises(FileNotFoundError, match="sft_checkpoint: nothing is at .*none"):
        into_playground(LoopConfig(sft_checkpoint=str(tmp_path / "none")), settings)
    with pytest.raises(FileNotFoundError, match="model: nothing is at .*none"):
        pairs_of_playground(RewardConfig(model=str(tmp_path / "none")), settings)
    assert not (tmp_path / "runs").exists()


def test_errors_of_a_config_are_in_its_own_words():
    with pytest.raises(ValueError) as error:
        make_config(LoopConfig, train_options="tau=x")
    assert str(error.value) == (
        "LoopConfig: training stage, TrainConfig: tau: Input should be a valid number, "
        "unable to parse string as a number, got 'x'"
    )

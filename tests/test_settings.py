"Command lines and this machine: every field is a flag, and a wrong value is named."

import re
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest

from halos_nb.configs import LabelConfig, SampleConfig, TrainConfig
from halos_nb.settings import load_settings, notebook_config, parse_args

STAGES = {
    "sample": (SampleConfig, ["m"]),
    "label": (LabelConfig, ["--reward_model_path", "rm", "in.json", "out.json"]),
    "train": (TrainConfig, ["--loss", "kto", "--model", "m", "--train_datasets", "a", "b"]),
}
GIVEN = {"model", "reward_model_path", "samples_file", "output_file", "loss", "train_datasets"}
# these stand by themselves, without a flag
POSITIONAL = dict(sample=["model"], label=["samples_file", "output_file"], train=[])


def values(config):
    return {f.name: getattr(config, f.name) for f in fields(config)}


@pytest.mark.parametrize("stage", STAGES)
def test_flags_make_a_config_quietly(stage):
    "HALOs' way to start a stage; what is not given has its default."
    cls, flags = STAGES[stage]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parsed = values(parse_args(cls, flags))
    given = {name: parsed[name] for name in parsed if name in GIVEN}
    assert parsed == values(cls(**given))


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_flag_in_order(stage, capsys):
    cls, _ = STAGES[stage]
    with pytest.raises(SystemExit):
        parse_args(cls, ["--help"])
    said = capsys.readouterr().out.replace("-", "_")
    names = [f.name for f in fields(cls)]
    assert [name for name in names if f"__{name}" not in said] == POSITIONAL[stage]
    flags = [name for name in names if name not in POSITIONAL[stage]]
    told = re.findall(r"^. __([a-zA-Z]\w*)", said, re.M)
    assert [name for name in told if name != "help"] == flags


def test_help_begins_with_what_the_command_needs(capsys):
    with pytest.raises(SystemExit):
        parse_args(LabelConfig, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "What `halos_nb.label` needs: samples in, feedback out. Name one labeller: "
        "reward_model_path, api_type, function, or from_labels."
    ) in said


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
    gone = tmp_path / "none"
    flags = ["--loss", "kto", "--model", str(gone), "--train_datasets", "a"]
    flags += ["--frac_unique_desirable", "0.5"]
    command = [sys.executable, "-m", "halos_nb.train", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last == f"FileNotFoundError: model: nothing is at {gone}"


# ---- this machine, and notebooks


def test_the_environment_overrides_the_file(tmp_path):
    file = tmp_path / "settings.ini"
    file.write_text("[halos_nb]\nprofile = cpu2\nprecision = bfloat16\n")
    settings = load_settings(file, env={"HALOS_NB_PROFILE": "cpu1", "PROFILE": "tpu"})
    assert (settings.profile, settings.precision) == ("cpu1", "bfloat16")
    assert settings.runs_dir == str(tmp_path / "runs")


def test_what_a_notebook_defines_is_a_parameter_unless_it_is_code():
    namespace = dict(
        loss="dpo", model="m", sys=sys, fields=fields, STAGE=TrainConfig, _private=1
    )
    assert notebook_config(TrainConfig, namespace).loss == "dpo"
    with pytest.raises(ValueError, match="TrainConfig: colour: unknown parameter"):
        notebook_config(TrainConfig, namespace | dict(colour="red"))

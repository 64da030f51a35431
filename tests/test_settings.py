"Command lines and this machine: every field is a flag, and a wrong value is named."

import os
import re
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest

from halos_nb.configs import LabelConfig, SampleConfig, TrainConfig
from halos_nb.settings import (
    check_precision,
    load_settings,
    notebook_config,
    parse_args,
)

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
    file.write_text("[halos_nb]\nprofile = cpu2\n")
    settings = load_settings(file, env={"HALOS_NB_PROFILE": "cpu1", "PROFILE": "tpu"})
    assert settings.profile == "cpu1"
    assert settings.runs_dir == str(tmp_path / "runs")


def test_what_a_notebook_defines_is_a_parameter_unless_it_is_code():
    namespace = dict(
        loss="dpo", model="m", sys=sys, fields=fields, STAGE=TrainConfig, _private=1
    )
    assert notebook_config(TrainConfig, namespace).loss == "dpo"
    with pytest.raises(ValueError, match="TrainConfig: colour: unknown parameter"):
        notebook_config(TrainConfig, namespace | dict(colour="red"))


@pytest.mark.parametrize("value", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["file", "environment"])
def test_a_machine_that_still_names_a_precision_is_told_where_it_went(tmp_path, value, where):
    file = tmp_path / "settings.ini"
    line = f"precision = {value}\n" if where == "file" else ""
    file.write_text(f"[halos_nb]\n{line}")
    env = {} if where == "file" else {"HALOS_NB_PRECISION": value}
    with pytest.raises(ValueError) as error:
        load_settings(file, env=env)
    told = str(error.value)
    assert str(file) in told and f"-p precision {value}" in told


FILE = "compute_environment: LOCAL_MACHINE\nmixed_precision: {}\nnum_machines: 1\n"


@pytest.mark.parametrize(
    "in_file, exported, precision, wrong",
    [
        (None, None, "float32", ""),
        ("'no'", None, "bfloat16", ""),
        ("no", None, "float32", ""),
        ("bf16", None, "float32", "bf16"),
        ('"bf16"', None, "bfloat16", ""),
        ("fp16", None, "bfloat16", "fp16"),
        (None, "bf16", "float32", "bf16"),
        ("bf16", "no", "float32", ""),
        ("bf16", "fp16", "bfloat16", "fp16"),
        (None, "BF16", "bfloat16", ""),
        (None, "fp8", "bfloat16", "fp8"),
    ],
)
def test_accelerate_must_not_say_otherwise(tmp_path, in_file, exported, precision, wrong):
    env = {"HF_HOME": str(tmp_path)}
    if in_file:
        (tmp_path / "accelerate").mkdir()
        (tmp_path / "accelerate/default_config.yaml").write_text(FILE.format(in_file))
    if exported:
        env["ACCELERATE_MIXED_PRECISION"] = exported
    if not wrong:
        check_precision(precision, env)
        return
    with pytest.raises(ValueError, match=f"{precision}.*mixed_precision {wrong}") as error:
        check_precision(precision, env)
    told = str(error.value)
    assert ("ACCELERATE_MIXED_PRECISION" if exported else "default_config.yaml") in told


def test_our_file_is_accelerate_s(tmp_path):
    "The same place, by the same rules."
    code = (
        "from accelerate.commands.config.config_args import default_config_file as theirs; "
        "from halos_nb.settings import accelerate_file as ours; "
        "assert str(ours()) == theirs, (ours(), theirs)"
    )
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        env = {k: v for k, v in os.environ.items() if k not in ("HF_HOME", "XDG_CACHE_HOME")}
        env[name] = str(tmp_path)
        subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=60)


# ---- how processes start


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("launcher", ["auto", "fork", "accelerate"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_only_a_cpu_on_linux_forks(tmp_path, monkeypatch, cpu, launcher, system):
    monkeypatch.setattr(sys, "platform", system)
    file = tmp_path / "settings.ini"
    file.write_text(f"[profile mine]\ncpu = {cpu}\nlauncher = {launcher}\n")
    can = cpu and system == "linux"
    if launcher == "fork" and not can:
        why = "only Linux forks" if cpu else "CUDA does not survive a fork"
        with pytest.raises(ValueError, match=f"launcher: fork: {why}.*use auto or accelerate"):
            load_settings(file, env={})
        return
    profile = load_settings(file, env={}).get_profile("mine")
    assert profile.forks == (can and launcher != "accelerate")


def test_a_misspelt_launcher_is_an_error(tmp_path):
    file = tmp_path / "settings.ini"
    file.write_text("[profile mine]\nlauncher = torchrun\n")
    with pytest.raises(ValueError, match="launcher: .*'auto', 'fork' or 'accelerate'"):
        load_settings(file, env={})

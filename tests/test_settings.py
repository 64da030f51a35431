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
    SHIPPED,
    Profile,
    check_precision,
    load_settings,
    notebook_config,
    parse_args,
    read_accelerate,
    set_aside,
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
        "reward_model_path, judge_model_path, api_type, function, or from_labels."
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
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
        subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=600)


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


# ---- what Accelerate is told


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_configuration_is_accelerate_s_and_ours(file):
    "Accelerate reads it, we honour all of it, and a comment says what it is for."
    from accelerate.commands.config.config_args import load_config_from_file

    theirs = load_config_from_file(str(file))
    said = read_accelerate(file)
    assert said.sharded == (theirs.distributed_type == "FSDP")
    assert file.read_text().startswith("# ")
    profile = Profile(accelerate_config=file.stem, cpu=bool(said.values.get("use_cpu")))
    number = int(re.sub(r".*?(\d+)(x(\d+))?$", r"\1", file.stem)) if file.stem != "ddp" else 1
    machines = number if "x" in file.stem else 1
    assert profile.num_machines == machines
    per_machine = profile.num_processes // machines
    assert file.stem.endswith(str(per_machine)) or file.stem == "ddp"


def test_what_accelerate_config_writes_is_taken(tmp_path):
    from accelerate.commands.config.default import write_basic_config

    file = tmp_path / "default_config.yaml"
    write_basic_config("no", str(file))
    profile = Profile(accelerate_config=str(file))
    assert (profile.num_processes, profile.sharded) == (1, False)
    assert not set_aside(profile, {"HF_HOME": str(tmp_path)})


def test_shipped_configurations_are_in_the_package():
    from setuptools.config.pyprojecttoml import read_configuration

    ours = read_configuration(str(SHIPPED.parent.parent / "pyproject.toml"), expand=False)
    data = ours["tool"]["setuptools"]["package-data"]["halos_nb"]
    assert "accelerate/*" in data


INI = """
[profile mine]
cpu = no
accelerate_config = files/mine.yaml
accelerate_config.label = gpu1
python.sample = vllm/bin/python
devices.sample = 4,5
num_processes.sample = 1
Threads.train = 3
env.Mixed_Case = 1
"""
FSDP = "distributed_type: FSDP\nnum_processes: 4\nmixed_precision: {}\nfsdp_config:\n"
FSDP += "  fsdp_version: 2\n  reshard_after_forward: false\n"


@pytest.fixture
def mine(tmp_path):
    "A profile whose file lies beside settings.ini."
    (tmp_path / "files").mkdir()
    (tmp_path / "files/mine.yaml").write_text(FSDP.format("'no'"))
    (tmp_path / "settings.ini").write_text(INI)
    return lambda: load_settings(tmp_path / "settings.ini", env={}).get_profile("mine")


def test_each_stage_has_what_is_said_of_it(mine, tmp_path):
    profile = mine()
    train, sample, label, audit = map(profile.for_stage, ("train", "sample", "label", "audit"))
    assert (train.num_processes, train.sharded, train.threads) == (4, True, 3)
    assert train.accelerate_config == str(tmp_path / "files/mine.yaml")
    assert (sample.num_processes, sample.sharded, sample.devices) == (1, False, "4,5")
    assert sample.python == str(tmp_path / "vllm/bin/python") and not train.python
    assert (label.num_processes, label.accelerate_config) == (1, str(SHIPPED / "gpu1.yaml"))
    assert (audit.num_processes, audit.threads) == (4, 1)
    assert audit.env == {"Mixed_Case": "1"}


def test_a_file_s_precision_must_be_the_experiment_s(mine, tmp_path):
    "Whatever this user has told Accelerate beside it."
    check_precision("float32", {}, mine().accelerate_config)
    (tmp_path / "files/mine.yaml").write_text(FSDP.format("bf16"))
    check_precision(
        "bfloat16", {"ACCELERATE_MIXED_PRECISION": "fp16"}, mine().accelerate_config
    )
    with pytest.raises(ValueError, match="float32.*mixed_precision bf16.*mine.yaml"):
        check_precision("float32", {}, mine().accelerate_config)


@pytest.mark.parametrize(
    "line, wrong",
    [
        ("num_processes = 2", "num_processes: the profile has 2, .*mine.yaml has 4"),
        ("num_machines = 3", "num_processes: 4 on 3 machines is not even"),
        ("devices.train = 0,1", "2 GPUs .* for 4 processes"),
        ("devices.label = 0,1", "label: devices: 0,1 for 1 processes"),
        ("devices.train = 0,1,2,2", "different numbers"),
        ("env.FSDP_VERSION = 1", "belongs into the file that accelerate_config names"),
        ("env.sample.HF_TOKEN = x", "a secret is exported"),
        ("launcher = fork", "CUDA does not survive a fork"),
        ("hosts = a, b", "start: should say"),
        ("python.simple = x", "no stage is called simple; stages are sample, label"),
        ("accelerate_config.audit = fsdp2_gpu9", "nothing is at .*fsdp2_gpu9"),
        ("gpus = 4", "gpus: unknown parameter"),
        ("gpus.train = 4", "train: Profile: gpus: unknown parameter"),
        ("env = x", "a variable is env.NAME"),
    ],
)
def test_what_a_profile_gets_wrong_is_named(mine, tmp_path, line, wrong):
    with open(tmp_path / "settings.ini", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=wrong) as raised:
        mine()
    where = re.escape(f"{tmp_path}/settings.ini")
    assert re.match(rf"{where}(, line (\d+ or )*11)?: \[profile mine\]", str(raised.value))


@pytest.mark.parametrize(
    "text, wrong",
    [
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}",
            "DeepSpeed is not run",
        ),
        (FSDP.format("'no'").replace("version: 2", "version: 1"), "should be 2, got 1"),
        (
            FSDP.format("'no'") + "  fsdp_sharding_strategy: FULL_SHARD\n",
            "of version 1 are gone",
        ),
        ("distributed_type: MULTI_GPU\nfsdp_config: {fsdp_version: 2}", "is only used with"),
        ("distributed_type: MULTI_GPU\ndebug: true", "debug: give it with"),
        ("distributed_type: MULTI_GPU\ndynamo_config: {dynamo_backend: INDUCTOR}", "compiled"),
        ("distributed_type: MULTI_GPU\nmachine_rank: 1", "machine_rank: should be 0"),
        ("num_processes: 4", "distributed_type: is missing"),
        ("distributed_type: 'NO'", "is for one process, the profile has more"),
        ("- 1", "should hold keys and values"),
        ("a: [", "is no YAML"),
    ],
)
def test_what_a_configuration_gets_wrong_is_named(mine, tmp_path, text, wrong):
    (tmp_path / "files/mine.yaml").write_text(text)
    with open(tmp_path / "settings.ini", "a") as file:
        file.write("num_processes = 4\n")
    with pytest.raises(ValueError, match=wrong):
        mine()

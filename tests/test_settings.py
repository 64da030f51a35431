"Command lines and this machine: every field is a flag, and a wrong value is named."

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest

from halos_nb.configs import LabelConfig, SampleConfig, TrainConfig, make_config
from halos_nb.settings import (
    ELSEWHERE,
    ONLY,
    SHIPPED,
    Profile,
    SlurmOptions,
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
    assert last == f"python -m halos_nb.train: model: nothing is at {gone}"


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
        ("sampler.sample = server", "holds for the whole run"),
        (
            "env.HTTPS_PROXY = http://me:hunter2@proxy:3128",
            "env: holds an address with a password",
        ),
        ("launcher = fork", "CUDA does not survive a fork"),
        ("hosts = a, b", "start: should say"),
        ("python.simple = x", "no stage is called simple; stages are sample, label"),
        ("accelerate_config.audit = fsdp2_gpu9", "nothing is at .*fsdp2_gpu9"),
        ("gpus = 4", "gpus: unknown parameter"),
        ("gpus.train = 4", "train: Profile: gpus: unknown parameter"),
        ("env = x", "a variable is env.NAME"),
        ("env. = x", "a variable is env.NAME"),
        ("env.train. = x", "a variable is env.NAME"),
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


FILE_PROBLEMS = [
    ("num_processes: 2.7", "num_processes: should be a whole number such as 8, got 2.7"),
    ("num_processes: two", "num_processes: should be a whole number"),
    ("num_processes: true", "num_processes: should be a whole number"),
    ("num_processes: -4", "num_processes: should be a whole number"),
    ("num_machines: 1.5", "num_machines: should be a whole number"),
    ("main_process_port: auto", "main_process_port: should be a whole number"),
    ("main_process_port: 70000", "main_process_port: .*65535"),
    ("main_process_ip: 7", "main_process_ip: should be a name or address"),
    ("use_cpu: flase", "use_cpu: should be true or false, got 'flase'"),
    ("use_cpu: 'false'", "without quotes"),
    ("same_network: ture", "same_network: should be true or false"),
    ("mixed_precision: bf61", "mixed_precision: .*did you mean `bf16`"),
    ("gpu_ids: 0", "gpu_ids: should be 'all', got 0; .*devices = 0"),
    ("gpu_ids: 0,1", "gpu_ids: .*devices = 0,1"),
    ("gpu_ids: [0, 1]", "gpu_ids: .*devices = 0,1"),
    ("fsdp_config: [1]", "fsdp_config: should hold keys and values"),
    ("fsdp_config: FSDP", "fsdp_config: should hold keys and values"),
    ("7: 8", "7: unknown parameter"),
    ("num_processes: 4\nnum_processes: 8", "num_processes: stands there twice"),
    ("distributed_type: NO", "distributed_type: .*in quotes: 'NO'"),
    ("distributed_type: MULTI_GPUS", "distributed_type: .*did you mean `MULTI_GPU`"),
    ("distributed_type: MEGATRON_LM", "distributed_type: .*has a trainer of its own$"),
    (
        "distributed_type: MULTI_XPU",
        "distributed_type: .*CPUs and on GPUs of CUDA or ROCm alone$",
    ),
]
SHARDING_PROBLEMS = [
    ("fsdp_state_dict_type: NONSENSE", "should be SHARDED_STATE_DICT or FULL_STATE_DICT, got"),
    ("fsdp_state_dict_type: SHARDED_STATE", "did you mean `SHARDED_STATE_DICT`"),
    ("fsdp_state_dict_type: LOCAL_STATE_DICT", "fsdp_state_dict_type: .*SHARDED_STATE_DICT"),
    ("fsdp_auto_wrap_policy: TRANSFORMER_WRAP", "did you mean `TRANSFORMER_BASED_WRAP`"),
    ("fsdp_reshard_after_forward: FULL_SHARD", "fsdp_reshard_after_forward: .*true or false"),
    ("fsdp_activation_checkpointing: flase", "fsdp_activation_checkpointing: .*true or false"),
    ("fsdp_cpu_ram_efficient_loading: 2", "fsdp_cpu_ram_efficient_loading: .*true or false"),
    ("fsdp_offload_params: null", "fsdp_offload_params: .*true or false"),
    ("fsdp_offload_params: true", "fsdp_offload_params: weights cannot wait on the CPU"),
    ("fsdp_ignored_modules: lm_head", "fsdp_ignored_modules: all weights are shared out"),
    ("fsdp_min_num_params: 1e8", "fsdp_min_num_params: should be a whole number"),
    ("fsdp_activation_checkpointing_offload: true", "what a layer keeps stays on its device"),
    ("fsdp_auto_wrap_policy: size_based_wrap", "does not share out a list of layers"),
    ("fsdp_min_num_params: 100", "fsdp_min_num_params: goes with SIZE_BASED_WRAP"),
    ("fsdp_auto_wrap_policy: NO_WRAP\n  transformer_layer_cls_to_wrap: A", "goes with TRANSF"),
    ("fsdp_transformer_layer_cls_to_wrap: [A]", "should be names set apart by commas"),
    ("fsdp_version: 1", "should be 2, got 1"),
    ("version: 2\n  fsdp_version: 2", "fsdp_version: stands there twice"),
]


@pytest.mark.parametrize("text, wrong", FILE_PROBLEMS)
def test_a_value_of_accelerate_s_file_is_looked_at_when_it_is_read(tmp_path, text, wrong):
    file = tmp_path / "theirs.yaml"
    if not text.startswith("distributed_type"):
        kind = "FSDP" if text.startswith("fsdp") else "MULTI_GPU"
        text = f"distributed_type: {kind}\n{text}\n"
    file.write_text(text)
    with pytest.raises(ValueError, match=wrong) as raised:
        read_accelerate(file)
    assert str(raised.value).startswith(str(file))


@pytest.mark.parametrize("text, wrong", SHARDING_PROBLEMS)
def test_a_value_of_sharding_is_looked_at_when_it_is_read(tmp_path, text, wrong):
    file = tmp_path / "theirs.yaml"
    version = "" if "version" in text else "  fsdp_version: 2\n"
    file.write_text(f"distributed_type: FSDP\nfsdp_config:\n{version}  {text}\n")
    with pytest.raises(ValueError, match=wrong) as raised:
        read_accelerate(file)
    assert str(raised.value).startswith(str(file))


def test_what_accelerate_takes_is_taken(tmp_path):
    "In the forms in which its own questions and people write it."
    file = tmp_path / "theirs.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: FSDP\n"
        "downcast_bf16: 'no'\nenable_cpu_affinity: false\nfsdp_config:\n"
        "  fsdp_activation_checkpointing: false\n"
        "  fsdp_auto_wrap_policy: transformer_based_wrap\n"
        "  fsdp_cpu_ram_efficient_loading: 'true'\n  fsdp_offload_params: 'False'\n"
        "  fsdp_reshard_after_forward: yes\n  fsdp_state_dict_type: full_state_dict\n"
        "  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer,Qwen2DecoderLayer\n"
        "  fsdp_version: 2\nmachine_rank: 0\nmain_training_function: main\n"
        "mixed_precision: no\nnum_machines: 1\nnum_processes: '4'\nrdzv_backend: static\n"
        "same_network: true\ntpu_env: []\ntpu_use_cluster: false\nuse_cpu: false\n"
        "gpu_ids:\nmain_process_port: null\nmain_process_ip:\n"
    )
    assert Profile(accelerate_config=str(file), cpu=False).num_processes == 4
    for text in ("gpu_ids: all", "num_processes: -1", "num_processes: 0", "debug: no"):
        file.write_text(f"distributed_type: MULTI_GPU\n{text}\n")
        assert Profile(accelerate_config=str(file), num_processes=2).num_processes == 2


def test_a_layer_that_no_model_has_is_told_before_any_work(tmp_path):
    from halos_nb.jobs import check_launch

    file = tmp_path / "theirs.yaml"
    text = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config:\n  fsdp_version: 2\n"
    text += "  fsdp_transformer_layer_cls_to_wrap: {}\n"

    def check(layers, kind=""):
        file.write_text(text.format(layers))
        if kind:
            (tmp_path / "config.json").write_text(json.dumps(kind))
        profile = Profile(accelerate_config=str(file))
        check_launch(profile, "float32", model=str(tmp_path) if kind else "org/model")

    check("LlamaDecoderLayer, Embedding")
    with pytest.raises(ValueError, match="theirs.yaml.*LlamaDecodrLayer.*`LlamaDecoderLayer`"):
        check("LlamaDecodrLayer")
    with pytest.raises(ValueError, match="fsdp_transformer_layer_cls_to_wrap: .*NoSuchLayer"):
        check("LlamaDecoderLayer,NoSuchLayer")
    # of another architecture than the run's
    check("LlamaDecoderLayer,Qwen2DecoderLayer", {"model_type": "llama"})
    check("LlamaDecoderLayer", {"model_type": "seen", "text_config": {"model_type": "llama"}})
    check("LlamaDecoderLayer", {"model_type": "not here"})
    with pytest.raises(
        ValueError, match="type llama has no Qwen2DecoderLayer; .*LlamaDecoderLayer"
    ):
        check("Qwen2DecoderLayer", {"model_type": "llama"})


def test_a_stage_s_own_configuration_takes_the_numbers_that_it_says(mine, tmp_path):
    "And leaves the profile's where it says none."
    ddp = dict(accelerate_config="ddp")
    eight = Profile(num_processes=8, stages={"train": ddp})
    assert eight.for_stage("train").num_processes == 8
    two = Profile(num_processes=8, num_machines=2, stages={"train": ddp})
    train = two.for_stage("train")
    assert (train.num_processes, train.num_machines) == (8, 2)
    one = Profile(num_processes=8, stages={"train": dict(accelerate_config="gpu1")})
    assert one.for_stage("train").num_processes == 1
    four = dict(accelerate_config="fsdp2_gpu4")
    assert (
        Profile(num_processes=8, cpu=False, stages={"train": four})
        .for_stage("train")
        .num_processes
        == 4
    )
    # for one process by its kind, though it does not say so
    (tmp_path / "no.yaml").write_text("distributed_type: 'NO'\nmixed_precision: 'no'\n")
    own = dict(accelerate_config=str(tmp_path / "no.yaml"))
    assert Profile(num_processes=8, stages={"train": own}).for_stage("train").num_processes == 1
    # a file for one machine, of a profile for two
    hosts = dict(hosts="a, b", start="ssh {host}", num_processes=2)
    gpu1 = Profile(**hosts, stages={"label": dict(accelerate_config="gpu1")})
    assert gpu1.for_stage("label").host_names == []


OWNED = [
    ("CUDA_VISIBLE_DEVICES", "devices = 0,1"),
    ("OMP_NUM_THREADS", "threads"),
    ("RANK", "num_processes"),
    ("WORLD_SIZE", "num_processes"),
    ("LOCAL_WORLD_SIZE", "num_processes"),
    ("LOCAL_RANK", "num_processes"),
    ("NODE_RANK", "num_processes"),
    ("MASTER_ADDR", "main_process_ip"),
    ("MASTER_PORT", "main_process_port"),
    ("TORCHELASTIC_RESTART_COUNT", "num_processes"),
    ("PET_NNODES", "num_processes"),
    ("PMI_RANK", "num_processes"),
    ("OMPI_COMM_WORLD_SIZE", "num_processes"),
    ("MV2_COMM_WORLD_LOCAL_RANK", "num_processes"),
    ("MPI_LOCALNRANKS", "num_processes"),
    ("SLURM_PROCID", "num_processes"),
    ("SLURM_NTASKS", "num_processes"),
    ("ACCELERATE_USE_CPU", "cpu"),
    ("ACCELERATE_USE_FSDP", "accelerate_config"),
    ("FSDP_VERSION", "accelerate_config"),
    ("HALOS_NB_PROMISED", "is set for each stage"),
    ("HALOS_NB_RANKS", "is set for each stage"),
    ("HALOS_NB_MEETING_SOCKET", "is set for each stage"),
    ("HALOS_NB_TIMEOUT_MINUTES", "timeout_minutes"),
    ("HALOS_NB_RUNS_DIR", r"runs_dir .*\[halos_nb\]"),
    ("HALOS_NB_PROFILE", r"profile .*\[halos_nb\]"),
    ("PYTHONUTF8", "UTF-8"),
    ("PYTHONUNBUFFERED", "is set for each stage"),
    ("cuda_visible_devices", "devices"),
    ("MY-VARIABLE", "is no name of a variable"),
]


@pytest.mark.parametrize("name, instead", OWNED)
def test_a_variable_that_a_launch_sets_is_refused(tmp_path, name, instead):
    "With what to write in its place."
    file = tmp_path / "settings.ini"
    for key in ("env.", "ENV.", "Env.Train."):
        file.write_text(f"[profile mine]\ncpu = no\n{key}{name} = 0,1\n")
        with pytest.raises(ValueError, match=rf"env\.{name}: .*{instead}") as raised:
            load_settings(file, env={})
        assert str(raised.value).startswith(f"{file}, line 3: [profile mine]")


def test_every_variable_of_a_launch_is_refused():
    "None that the launcher decides can be given beside it, but for the network's."
    from halos_nb.jobs import environment

    two = Profile(hosts="a, b", start="ssh {host}", cpu=False, devices="0")
    fsdp = Profile(accelerate_config="fsdp2_cpu2")
    for profile in (Profile(), two, fsdp):
        told = environment(profile, Path("p"))
        decided = {*told} - {*environment.__globals__["inherited"]()}
        for name in decided - {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}:
            with pytest.raises(ValueError, match=rf"env\.{name}: "):
                Profile(env={name: "7"})


def test_a_variable_of_one_s_own_is_given(tmp_path):
    file = tmp_path / "settings.ini"
    names = ["Mixed_Case", "HF_HOME", "OMPI_MCA_btl", "I_MPI_FABRICS", "http_proxy"]
    names += ["HALOS_NB_CACHE_DIR", "HALOS_NB_NO_LOCKS", "HALOS_NB_NO_ROOM_CHECK"]
    names += ["ACCELERATE_DEBUG_MODE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"]
    names += ["CUDA_DEVICE_ORDER", "TOKENIZERS_PARALLELISM", "MKL_NUM_THREADS", "SLURM_CONF"]
    lines = "\n".join(f"Env.{name} = 1" for name in names)
    more = "env.PYTHONUTF8 = 1\nEnv.Train.More = 2"
    file.write_text(f"[profile mine]\n{lines}\n{more}\n")
    profile = load_settings(file, env={}).get_profile("mine")
    assert profile.env == dict.fromkeys([*names, "PYTHONUTF8"], "1")
    assert profile.for_stage("train").env["More"] == "2"


HOSTS = [
    ("node[1-3]", "node1 node2 node3"),
    ("node[08-11]", "node08 node09 node10 node11"),
    ("a[1,3-4],b", "a1 a3 a4 b"),
    ("a[1-2] b[1-2]-ib", "a1 a2 b1-ib b2-ib"),
    ("r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2"),
    ("10.0.0.1, 10.0.0.2", "10.0.0.1 10.0.0.2"),
    ("fd00::1, fd00::2", "fd00::1 fd00::2"),
    ("me@n1, n2", "me@n1 n2"),
    ("node1 ,node2", "node1 node2"),
]


@pytest.mark.parametrize("text, names", HOSTS)
def test_hosts_are_named_as_a_scheduler_names_them(text, names):
    profile = Profile(hosts=text, start="ssh {host}", main_process_ip="10.0.0.1")
    assert profile.host_names == names.split()
    assert profile.num_machines == len(names.split())


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("a, a", "hosts: a is named twice"),
        ("node[1-2], Node2", "hosts: Node2 is named twice"),
        ("node[2-1]", r"hosts: .*node\[2-1\]"),
        ("node[1-", r"hosts: .*node\[1-"),
        ("node[]", "hosts: .*node"),
        ("node{1..2}", "hosts: .*node"),
        ("node1:8, node2:8", "hosts: 'node1:8' is no name"),
        ("node1;node2", "hosts: 'node1;node2' is no name"),
        ("node1 slots=8, node2 slots=8", "hosts: 'slots=8' is no name"),
        ("/etc/hosts", "hosts: '/etc/hosts' is no name"),
        ("-oProxyCommand=x, b", "hosts: '-oProxyCommand=x' is no name"),
        (",", "hosts: names no machine"),
        ("me@n1, n2", "main_process_ip: "),
    ],
)
def test_hosts_that_name_no_machines_are_told(text, wrong):
    with pytest.raises(ValueError, match=wrong):
        Profile(hosts=text, start="ssh {host}")


def test_one_host_is_this_one_or_told_before_any_work(monkeypatch):
    "A stage of one machine runs where the notebook does."
    import socket

    from halos_nb.jobs import check_launch

    for here in ("localhost", "127.0.0.1", socket.gethostname()):
        check_launch(Profile(hosts=here), "float32")
    with pytest.raises(ValueError, match="hosts: .*not-here.invalid.*start the notebook there"):
        check_launch(Profile(hosts="not-here.invalid"), "float32")
    two = Profile(hosts="a, b", start="ssh {host}", stages={"label": {"num_machines": "1"}})
    check_launch(two, "float32")


@pytest.mark.parametrize("devices", ["0, 0", "0,00", "1,01", "²,1", "0;1", "0 1", "-1", "0,"])
def test_devices_are_different_numbers(devices):
    with pytest.raises(ValueError, match="devices: should be different numbers"):
        Profile(cpu=False, devices=devices)


def test_a_device_has_one_name():
    from halos_nb.jobs import environment

    profile = Profile(cpu=False, num_processes=2, devices=" 00, 1 ")
    assert environment(profile, Path("p"))["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_samplers_and_trainers_are_apart_by_what_their_stages_have():
    from halos_nb.loop import check_apart

    def check(sample="1", train="0"):
        devices = dict(sample=sample, label="2", train=train)
        stages = {stage: dict(devices=named) for stage, named in devices.items() if named}
        check_apart(Profile(cpu=False, stages=stages))

    check()
    for sample, train in (("0", "0"), ("00", "0"), ("0", "00"), ("", "0"), ("1", "")):
        with pytest.raises(ValueError, match="staleness: .* devices.sample and devices.train"):
            check(sample, train)
    # who is on a CPU takes no GPU from the other
    on_cpu = dict(cpu=True)
    check_apart(Profile(cpu=False, stages=dict(train=on_cpu)))
    check_apart(Profile(cpu=False, stages=dict(sample=on_cpu, label=on_cpu)))
    own = dict(sample=dict(cpu=False, devices="0"), train=dict(cpu=False, devices="0"))
    with pytest.raises(ValueError, match="staleness: "):
        check_apart(Profile(stages=own))
    check_apart(Profile())


def test_gpus_that_are_promised_are_looked_for(tmp_path, monkeypatch):
    "By the stage, before it waits for others; who takes what there is has promised none."
    from halos_nb.jobs import environment
    from halos_nb.processes import check_gpus

    named = ",".join(map(str, range(1000)))
    thousand = tmp_path / "thousand.yaml"
    thousand.write_text((SHIPPED / "fsdp2_gpu8.yaml").read_text().replace("es: 8", "es: 1000"))
    promising = [
        Profile(cpu=False, devices=named),
        Profile(cpu=False, num_processes=1000),
        Profile(cpu=False, accelerate_config=str(thousand)),
        Profile(cpu=False, accelerate_config="ddp", num_processes=1000),
    ]
    name = "HALOS_NB_PROMISED"
    for profile in promising:
        monkeypatch.setenv(name, environment(profile, Path("p"))[name])
        with pytest.raises(RuntimeError, match=r"devices: \[profile cpu1\].*promises \d+ GPUs"):
            check_gpus()
    for profile in (Profile(), Profile(cpu=False), Profile(accelerate_config="fsdp2_cpu2")):
        monkeypatch.setenv(name, environment(profile, Path("p"))[name])
        check_gpus()


def test_processes_of_a_cpu_by_accelerate_s_own_name(tmp_path):
    "Its launcher would start one process of them, so it gets the file for several."
    from halos_nb.jobs import accelerate_options

    file = tmp_path / "cpus.yaml"
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    own = Profile(accelerate_config=str(file), launcher="accelerate")
    assert own.num_processes == 2
    assert accelerate_options(own)[1].endswith("ddp.yaml")
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    with pytest.raises(ValueError, match="cpu: .*MULTI_CPU"):
        Profile(accelerate_config=str(file), cpu=False)


def test_answers_are_scored_where_they_were_drawn():
    "Unless the profile says where, or an engine stays there."
    apart = dict(sample=dict(devices="4,5"), label=dict(devices="6"), train=dict(devices="0"))
    own = Profile(cpu=False, stages=apart)
    assert own.for_stage("score").device_names == ["4", "5"]
    assert own.for_stage("score").num_processes == 2
    fewer = Profile(cpu=False, stages=apart | dict(score=dict(num_processes=1)))
    assert fewer.for_stage("score").device_names == ["4"]
    said = Profile(cpu=False, stages=apart | dict(score=dict(devices="7")))
    assert said.for_stage("score").device_names == ["7"]
    assert Profile(cpu=False, stages=apart, sampler="server").for_stage("score").devices == ""
    assert Profile().for_stage("score") == Profile()
    shared = Profile(accelerate_config="fsdp2_cpu2")
    assert not shared.for_stage("score").sharded
    said = Profile(stages=dict(score=dict(accelerate_config="fsdp2_cpu2")))
    assert said.for_stage("score").sharded and not said.for_stage("sample").sharded


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not run here"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "has a trainer of its own"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "nothing is compiled here"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "sharding is over all processes"),
        ("ACCELERATE_FP8_BACKEND", "TE", "the precision is the experiment's"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "however token_budget cuts them"),
    ],
)
def test_what_a_launch_by_hand_asks_for_is_refused(name, value, told, monkeypatch):
    "Before any model is read; what says no, or nothing, is no wish."
    from halos_nb.processes import start_processes, wish_problems

    for nothing in ("no", "NO", "false", "1" if name.endswith("STEPS") else "0"):
        monkeypatch.setenv(name, nothing)
        assert not [*wish_problems()]
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}: is {value}, .* and .*{told}"):
        start_processes(1, cpu=True)


def test_scoring_beside_a_training_has_devices_of_its_own():
    from halos_nb.loop import check_apart

    apart = dict(sample=dict(devices="1"), label=dict(devices="1"), train=dict(devices="0"))
    check_apart(Profile(cpu=False, stages=apart), "vllm")
    stays = Profile(cpu=False, stages=apart, sampler="server")
    check_apart(stays)
    with pytest.raises(ValueError, match="set devices.score and devices.train"):
        check_apart(stays, "vllm")
    said = apart | dict(score=dict(devices="2"))
    check_apart(Profile(cpu=False, stages=said, sampler="server"), "vllm")


def test_hosts_of_one_stage_are_counted():
    with pytest.raises(ValueError, match="train: .*num_processes: 1 on 2 machines is not even"):
        Profile(stages=dict(train=dict(hosts="a,b", start="ssh {host}")))
    own = dict(hosts="a,b", start="ssh {host}", num_processes=2)
    assert Profile(stages=dict(train=own)).for_stage("train").num_machines == 2


@pytest.mark.parametrize(
    "given, wrong",
    [
        (dict(time="1d"), "slurm.time: should be minutes, m:s, .*as 1-00:00:00"),
        (dict(time="1:2:3:4"), "slurm.time: should be"),
        (dict(time="1-"), "slurm.time: should be"),
        (dict(cpus="0"), "slurm.cpus: should be a whole number from 1"),
        (dict(cpus="eight"), "slurm.cpus: should be"),
        (dict(gpus="-1"), "slurm.gpus: should be as 8, a100:8"),
        (dict(gpus="8.5"), "slurm.gpus: should be"),
        (dict(mem="lots"), "slurm.mem: should be a number"),
        (dict(notice=True), "notice: should be a number"),
    ],
)
def test_what_slurm_would_not_read_is_refused(given, wrong):
    with pytest.raises(ValueError, match=wrong):
        make_config(SlurmOptions, **given)


def test_what_slurm_reads_is_taken():
    for time in ("30", "30:00", "0:30:00", "1-12", "1-12:30", "1-12:30:00", "UNLIMITED", "0"):
        assert make_config(SlurmOptions, time=time).time == time
    for gpus in ("8", "a100:8", "a100:4,h100:4", "nvidia_a100-sxm4:2", "a100"):
        assert make_config(SlurmOptions, gpus=gpus).gpus == gpus


def test_a_model_s_config_that_cannot_be_read_is_named(tmp_path):
    from halos_nb.settings import model_kinds

    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json: "):
            model_kinds(str(tmp_path))


def test_a_user_s_answers_to_accelerate_in_another_encoding(tmp_path):
    "What is read of them is ASCII; where a profile takes them, the file is named."
    file = tmp_path / "accelerate/default_config.yaml"
    file.parent.mkdir()
    file.write_bytes(b"# Ger\xe4t\nmixed_precision: bf16\n")
    check_precision("bfloat16", {"HF_HOME": str(tmp_path)})
    with pytest.raises(ValueError, match="default_config.yaml"):
        check_precision("float32", {"HF_HOME": str(tmp_path)})
    with pytest.raises(ValueError, match="default_config.yaml: is no YAML"):
        Profile(accelerate_config=str(file))


def test_every_kind_of_accelerate_is_taken_or_said_to_be_elsewhere():
    from accelerate.utils import DistributedType

    ours = {*ONLY["distributed_type"], *ELSEWHERE, "DEEPSPEED", "MEGATRON_LM"}
    assert ours == {kind.value for kind in DistributedType}

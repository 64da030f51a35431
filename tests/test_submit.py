"Submitting, up to the scheduler: what a user types, and what stands in the script."

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from job_helpers import NEEDS_LINUX, alive, code_cell, until

from halos_nb.configs import LoopConfig, SubmitConfig
from halos_nb.loop import run_rounds
from halos_nb.playground import into_playground
from halos_nb.settings import SHIPPED, load_settings
from halos_nb.submit import main

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = """
[halos_nb]
runs_dir = runs
[profile cpu1]
[profile slurm_2x8]
num_machines = 2
num_processes = 16
cpu = no
threads = 8
slurm.partition = gpu
slurm.account = nlp
slurm.time = 12:00:00
slurm.export = OPENAI_API_KEY
"""
PARAMETERS = "run_name = 'r'\nseed = 0\nlr = 1e-4\nprofile = ''\nfresh = False"
GUARD = """
from halos_nb.configs import LoopConfig
from halos_nb.settings import notebook_config
cfg = notebook_config(LoopConfig, globals())
"""
WORK = """
print("in a slot")
if cfg.seed == 1:
    raise ValueError("no such prompts")
"""


@pytest.fixture
def place(tmp_path):
    "A user's folder: settings and a small driver."
    (tmp_path / "settings.ini").write_text(SETTINGS)
    cells = [code_cell(i, text) for i, text in enumerate((PARAMETERS, GUARD, WORK))]
    cells[0]["metadata"]["tags"] = ["parameters"]
    kernel = dict(kernelspec=dict(name="python3", display_name="", language="python"))
    notebook = dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)
    (tmp_path / "driver.ipynb").write_text(json.dumps(notebook))
    return tmp_path


def environment():
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    env.pop("HALOS_NB_RUNS_DIR", None)
    return env


AGAIN = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # as it is: imported above


@pytest.fixture
def command(place, monkeypatch):
    "`python -m halos_nb.submit`, as a user types it in that folder."
    monkeypatch.chdir(place)
    monkeypatch.delenv("HALOS_NB_RUNS_DIR", raising=False)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["submit", "driver.ipynb", *words])
        runpy.run_module("halos_nb.submit", run_name="__main__")

    return run


@AGAIN
def test_a_dry_run_shows_all_and_touches_nothing(place, command, monkeypatch, capsys):
    before = sorted(place.rglob("*"))
    monkeypatch.setenv("OPENAI_API_KEY", "not-to-be-written")
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    words = ["-p", "lr", "3e-4", "--profile", "slurm_2x8", "--dry_run"]
    command(*words, "--sweep", "method=dpo,kto seed=0,1", "--slots", "2")
    said = capsys.readouterr().out
    assert sorted(place.rglob("*")) == before
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=64",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=nlp",
        "#SBATCH --time=12:00:00",
        "#SBATCH --export=PATH,HOME,OPENAI_API_KEY",
        "#SBATCH --array=0-3%2",
        "#SBATCH --requeue",
        "# not used, the profile decides: SBATCH_PARTITION",
        f"sbatch --parsable {place}/runs/r/submit/job.sh",
    ):
        assert line in said.splitlines(), line
    assert "not-to-be-written" not in said
    assert said.count("-p run_name r-") == 4
    assert f"every node of the job must see {place}/runs" in said
    assert "-p runs r-dpo-s0,r-dpo-s1,r-kto-s0,r-kto-s1" in said


@AGAIN
def test_a_misspelt_parameter_is_told_in_one_line(place, command):
    with pytest.raises(SystemExit) as error:
        command("-p", "sed", "1")
    told = "LoopConfig: sed: unknown parameter; did you mean `seed`?"
    assert error.value.code == told  # which Python prints, with exit status 1
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    "given, told",
    [
        (dict(parameters=[("beta", "much")]), "LoopConfig: beta: "),
        (dict(sweep="method=dpo,pdo"), "LoopConfig: method: "),
        (dict(profile="slurm_9x9"), "has no section .profile slurm_9x9"),
        (dict(parameters=[("prompts", "a key-in-a-value")]), "the value of A_TOKEN is among"),
        (dict(local=True, profile="slurm_2x8"), "its stages are on 2 machines"),
        ({}, "no sbatch here"),
    ],
)
def test_what_cannot_work_is_refused(place, given, told, monkeypatch):
    "Before anything is written."
    monkeypatch.chdir(place)
    monkeypatch.setenv("A_TOKEN", "key-in-a-value")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("HALOS_NB_RUNS_DIR", raising=False)
    with pytest.raises(ValueError, match=told):
        main(SubmitConfig(notebook="driver.ipynb", **given))
    assert not (place / "runs").exists()


def test_runs_side_by_side_and_one_that_fails(place):
    words = ["driver.ipynb", "--local", "--slots", "2", "--sweep", "seed=0,1"]
    done = subprocess.run(
        [sys.executable, "-m", "halos_nb.submit", *words],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert "1 of 2 runs failed" in done.stderr
    assert "r-s1: exit code 1: ValueError: no such prompts" in done.stderr
    assert "2 of 2 runs done, 1 failed" in done.stderr
    executed = json.loads((place / "runs/r-s0/driver.ipynb").read_text())
    assert "slot" in str(executed["cells"][-1]["outputs"])


HANGING = """
import sys
from pathlib import Path
from halos_nb.submit import Start, side_by_side
wait = "import subprocess; subprocess.run(['sleep', '300'])"
starts = [Start(name, [sys.executable, "-c", wait]) for name in "abc"]
side_by_side(starts, [{}, {}], Path("runs"), Path("logs"))
"""


@NEEDS_LINUX
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_run_outlives_who_started_them(tmp_path, how):
    started = subprocess.Popen(
        [sys.executable, "-c", HANGING],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    try:  # of each of the two a supervisor, a Python and what that has started
        until(lambda: len(alive(tmp_path / "logs")) == 6, 60, "two runs")
    finally:
        started.send_signal(how)
        started.wait(60)
    until(lambda: not alive(tmp_path / "logs"), 15, "nothing alive")
    assert not (tmp_path / "logs/c.log").exists()


STAGES_APART = """
[profile apart]
threads = 1
cpu = no
devices.sample = 6,7
devices.label = 6
devices.train = 0,1,2,3
num_processes.train = 4
threads.train = 8
[profile of_cpus]
cpu.train = no
num_processes.train = 4
[profile few]
cpu = no
num_processes = 8
slurm.gpus = a100:4
"""


@pytest.mark.parametrize(
    "words, lines",
    [
        (["apart"], ["#SBATCH --gpus-per-node=8", "#SBATCH --cpus-per-task=32"]),
        (["apart", "-p", "staleness", "1"], ["#SBATCH --cpus-per-task=33"]),
        (["of_cpus"], ["#SBATCH --gpus-per-node=4", "#SBATCH --cpus-per-task=4"]),
    ],
)
@AGAIN
def test_a_job_asks_for_the_most_that_a_stage_has(place, command, capsys, words, lines):
    with open(place / "settings.ini", "a", encoding="utf-8") as f:
        f.write(STAGES_APART)
    command("--dry_run", "--profile", *words)
    said = capsys.readouterr().out.splitlines()
    assert set(lines) <= set(said)


@AGAIN
def test_a_job_that_would_have_too_little_is_refused(place, command):
    with open(place / "settings.ini", "a", encoding="utf-8") as f:
        f.write(STAGES_APART)
    with pytest.raises(SystemExit, match="slurm.gpus: asks for 4 on each machine, .* have 8"):
        command("--dry_run", "--profile", "few")


LIKE_A_LAUNCH = """
[profile elsewhere]
python.train = /no/such/python
[profile on_gpus]
cpu = no
[profile stays]
sampler = server
[profile read_once]
accelerate_config = once.yaml
"""
BY_ITSELF = "use_peft=true, reference_cache=cache"
JUDGED = dict(labeller="judge", api_model="j", reward_checkpoint="")


def said_at_launch(cfg, settings):
    "What the launch of a run says that refuses it."
    with pytest.raises(Exception) as error:
        next(run_rounds(into_playground(cfg, settings), settings))
    return error.value


@pytest.mark.parametrize(
    "given, told",
    [
        (dict(train_options="seed=1"), "train_options: seed is set elsewhere; give it"),
        (dict(train_options="exp_name=x"), "train_options: exp_name is set elsewhere; leave"),
        (dict(label_options="seed=1"), "label_options: seed is set elsewhere"),
        (dict(sampler_options="num_skip=1"), "sampler_options: num_skip is set elsewhere"),
        (dict(report_to="wandbb"), "report_to: 'wandbb' is no tracker .* mean `wandb`?"),
        (dict(report_to="comet_ml"), "report_to: comet_ml needs the package"),
        (dict(profile="elsewhere"), "python: nothing is at /no/such/python"),
        (dict(profile="on_gpus", staleness=1), "staleness: in profile on_gpus sample has no"),
        (dict(precision="bfloat16", exported="fp16"), "configured for mixed_precision fp16"),
        (dict(backend="vllm"), "backend: there is no vLLM in"),
        (dict(sft_checkpoint="./gone/x"), "sft_checkpoint: nothing is at"),
        (dict(prompts="gone.json"), "prompts: "),
        (dict(evaluate_every=1, prompts="here.json"), "eval_prompts: an evaluation needs"),
        (dict(owner="label_by_hand"), "was made by label_by_hand, and this is online_loop"),
        (dict(max_requests=1, **JUDGED), "max_requests: .* are more than 1"),
        (dict(train_options="optimizer=adamw_8bit"), "optimizer: adamw_8bit needs bitsandb"),
        (dict(train_options=BY_ITSELF, profile="read_once"), "reference_cache: with use_peft"),
        (dict(reward_checkpoint="lm"), "lm is a LlamaForCausalLM, not a reward model"),
        (dict(sft_checkpoint="rm"), "rm is a LlamaForSequenceClassification, a reward"),
        (dict(sft_checkpoint="sfft"), "nothing is at sfft .*did you mean `sft`"),
    ],
)
def test_the_dry_run_refuses_what_the_launch_refuses(place, monkeypatch, given, told, request):
    "In the same words, and before the playground is built or anything is written."
    monkeypatch.chdir(place)
    monkeypatch.delenv("HALOS_NB_RUNS_DIR", raising=False)
    with open(place / "settings.ini", "a", encoding="utf-8") as f:
        f.write(LIKE_A_LAUNCH)
    (place / "here.json").write_text("[]")
    for name, kind in dict(sft="", lm="CausalLM", rm="SequenceClassification").items():
        (place / name).mkdir()
        architectures = [f"LlamaFor{kind}"] if kind else None
        (place / name / "config.json").write_text(json.dumps(dict(architectures=architectures)))
    shared = (SHIPPED / "fsdp2_cpu2.yaml").read_text("utf-8")
    once = shared.replace("efficient_loading: false", "efficient_loading: true")
    (place / "once.yaml").write_text(once)
    given = dict(sft_checkpoint="sft", prompts="here.json", reward_checkpoint="sft") | given
    given |= dict(lr=1e-4, run_name="r")
    if exported := given.pop("exported", ""):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", exported)
    if owner := given.pop("owner", ""):
        (place / "runs/r").mkdir(parents=True)
        (place / "runs/r/run.json").write_text(json.dumps(dict(made_by=owner)))
    before = sorted(place.rglob("*"))
    words = [(name, str(value)) for name, value in given.items()]
    with pytest.raises(Exception, match=told) as error:
        main(SubmitConfig(notebook="driver.ipynb", dry_run=True, parameters=words))
    assert sorted(place.rglob("*")) == before
    at_launch = said_at_launch(LoopConfig(**given), load_settings())
    assert (type(error.value), str(error.value)) == (type(at_launch), str(at_launch))

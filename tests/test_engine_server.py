"An engine that stays over a run: started, asked, given new weights, ended, left by nobody."

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from job_helpers import NEEDS_LINUX, alive, quiet, until
from stay_engine import ask

from halos_nb import ledger
from halos_nb.configs import LoopConfig, SampleConfig
from halos_nb.engine_client import EngineError
from halos_nb.jobs import launch
from halos_nb.identity import stage_profile
from halos_nb.loop import run_rounds, sample_stage, with_draw
from halos_nb.models import load_tokenizer, small_llama
from halos_nb.records import read_jsonl, read_records
from halos_nb.sample import main
from halos_nb.settings import Profile, Settings
from halos_nb.templates import byte_tokenizer, prompt_ids

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("stages_on_path"),
    NEEDS_LINUX,
]


def pretended(stage, cfg, profile, folder, module="", **more):
    "A job that pretends, in place of each stage; an engine that computes nothing."
    module = "stay_engine" if stage == "engine_server" else "pretend"
    return launch(stage, cfg, profile, folder, module, **more)


def given(tmp_path):
    "What a run of pretended stages is told."
    for name in ("sft", "rm"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "prompts.json").write_text("[]")
    return dict(
        run_name="r",
        sft_checkpoint=str(tmp_path / "sft"),
        reward_checkpoint=str(tmp_path / "rm"),
        prompts=str(tmp_path / "prompts.json"),
        total_prompts=20,
        prompts_per_round=10,
        audit="skip",
        alarm="skip",
        lr=3e-4,
        backend="vllm",
    )


def play(tmp_path, profile, look=None, **more):
    "The rounds of a run."
    settings = Settings(runs_dir=str(tmp_path / "runs"), profile="p", profiles={"p": profile})
    rounds = []
    for this in run_rounds(LoopConfig(**given(tmp_path) | more), settings, watch=quiet):
        rounds.append(this)
        if look:
            look(this)
    return rounds


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    "A folder of packages in which vLLM is said to be; one, so that stages share a server."
    folder = tmp_path_factory.mktemp("packages")
    (folder / "vllm-0.0.dist-info").mkdir()
    (folder / "vllm-0.0.dist-info/METADATA").write_text("Name: vllm\nVersion: 0.0\n")
    return str(folder)


@pytest.fixture
def pretend(monkeypatch, tmp_path, packages):
    monkeypatch.setattr(ledger, "launch", pretended)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{os.environ['PYTHONPATH']}")
    return lambda *args, **more: play(tmp_path, *args, **more)


def engines(run):
    "Why each engine of a run was started."
    return [row["why"] for row in read_jsonl(run / "ledger.jsonl") if row["event"] == "engine"]


def told(rounds, name):
    "What the stages of this name were told, of each round."
    return [json.loads((r.folder / f"{name}.config.json").read_text()) for r in rounds]


STAYS = Profile(name="p", sampler="server")
FIRST = "for the first stage that draws"


def test_one_engine_draws_for_all_rounds_and_ends_with_the_run(pretend, tmp_path):
    run = tmp_path / "runs/r"
    pids = []

    def look(this):
        if this.name != "final":
            pids.append(ask(f"unix:{run}/engine/socket", "/health")["pid"])

    rounds = pretend(STAYS, look)
    assert [r.name for r in rounds] == ["round-1", "round-2", "final"]
    assert engines(run) == [FIRST] and len(set(pids)) == 1 and not alive(run)
    assert json.loads((run / "engine/engine_server.status.json").read_text())["stopped"]
    asked = told(rounds, "draw")
    assert {c["base_url"] for c in asked} == {f"unix:{run}/engine/socket"}
    sft = str(tmp_path / "sft")
    assert [c["model"] for c in asked] == [sft, *(str(r.policy) for r in rounds[:2])]
    for scoring, drawing in zip(told(rounds, "sample"), asked, strict=True):
        assert scoring["drawn"] == drawing["output_file"]
        assert (scoring["base_url"], scoring["reference"]) == (None, sft)
        assert (drawing["reference"], drawing["seed"]) == (None, scoring["seed"])

    # where all answers lie there already there is no engine; and one for each stage would
    # have drawn the same
    for profile in (STAYS, Profile(name="p", sampler="engine")):
        again = pretend(profile)
        assert all("draw" in r.skipped for r in again)
        assert engines(run) == [FIRST]


def test_an_engine_that_ended_by_itself_is_started_again(pretend, tmp_path):
    run = tmp_path / "runs/r"

    def look(this):
        if this.name == "round-1":  # round 2's samples are being drawn meanwhile
            until(lambda: (run / "round-2/draw.status.json").exists(), 60, "its answers")
            with pytest.raises(OSError):
                os.kill(ask(f"unix:{run}/engine/socket", "/health")["pid"], signal.SIGKILL)
                while True:
                    ask(f"unix:{run}/engine/socket", "/health")

    pretend(STAYS, look)
    assert engines(run) == [FIRST, "the last one has ended by itself, exit code -9"]
    assert not alive(run)


DRIVER = """
import sys
import time
from pathlib import Path
import test_engine_server as t
t.ledger.launch = t.pretended
def look(this):
    print(this.name, flush=True)
    if this.name == sys.argv[2]:
        time.sleep(600)
t.play(Path(sys.argv[1]), t.STAYS, look)
"""


def test_a_killed_run_leaves_no_engine_and_goes_on(pretend, tmp_path):
    run = tmp_path / "runs/r"
    command = [sys.executable, "-c", DRIVER, tmp_path, "round-1"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "round-1\n"
    assert alive(run)
    driver.kill()
    driver.wait()
    until(lambda: not alive(run), 30, "nothing of the run")
    rounds = pretend(STAYS)
    assert "draw" in rounds[0].skipped and rounds[-1].name == "final"
    assert engines(run) == [FIRST] * 2 and not alive(run)


def test_samplings_own_python_draws_and_ours_scores(pretend, tmp_path):
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nSAMPLING=yes exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    profile = Profile(name="p", stages=dict(sample=dict(python=str(other))))
    rounds = pretend(profile, total_prompts=10)
    for this in rounds:
        own = [
            json.loads((this.folder / f"samples.{x}counts.json").read_text())
            for x in ("drawn.", "")
        ]
        assert [c["sampling"] for c in own] == ["yes", None]
    params = json.loads((tmp_path / "runs/r/params.json").read_text())
    assert params["versions"]["vllm"] == "vllm 0.0"
    assert not (tmp_path / "runs/r/engine").exists()


def test_a_teacher_answers_the_rounds_and_the_policy_itself_all_else(pretend, tmp_path):
    "A server of somebody else's keeps its weights, so what it says is not the policy's."
    teacher = dict(backend="openai", sampler_model="teacher", alarm="warn")
    rounds = pretend(Profile(name="p"), total_prompts=10, **teacher)
    asked, answered = told(rounds, "sample")
    assert (asked["backend"], asked["model"], asked["reference"]) == ("openai", "teacher", None)
    for own in (answered, told(rounds[:1], "check")[0]):
        assert (own["backend"], own["model"]) == ("transformers", str(rounds[0].policy))
    looks = [
        row for row in read_jsonl(tmp_path / "runs/r/ledger.jsonl") if row["event"] == "health"
    ]
    assert [(row["folder"], row["stage"]) for row in looks][0] == ("round-1", "check")


def test_one_process_asks_vllm_and_all_score_what_it_drew(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    own = dict(sample=dict(python="vllm/python"))
    profile = Profile(name="p", num_processes=8, cpu=False, stages=own)
    cfg = LoopConfig(lr=1e-6, sft_checkpoint="sft", prompts="p", backend="vllm")
    draw, score = with_draw(cfg, sample_stage(cfg, Path("r"), 1, "sft", 0, 8))
    found = stage_profile(profile, draw)
    assert (found.num_processes, found.python) == (1, "vllm/python")
    assert found.devices == "0,1,2,3,4,5,6,7"  # an engine may lie on several
    found = stage_profile(profile, score)
    assert (found.num_processes, found.python, found.devices) == (8, "", "")


def test_a_sampler_that_cannot_work_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("HALOS_NB_VLLM_PYTHON", str(tmp_path / "bin/python"))  # nothing is there
    with pytest.raises(ValueError, match="^backend: there is no vLLM in .*profile p has sampl"):
        play(tmp_path, STAYS)
    assert not (tmp_path / "runs").exists()


def test_an_engine_that_stays_needs_gpus_of_its_own(pretend, tmp_path):
    gpu = Profile(name="p", sampler="server", cpu=False)
    with pytest.raises(ValueError, match="^sampler: an engine that stays keeps the memory"):
        pretend(gpu)
    assert not (tmp_path / "runs").exists()


# ---- what is asked of it


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Two models and some prompts."
    folder, tok = tmp_path_factory.mktemp("models"), byte_tokenizer()
    for seed in (1, 2):
        model = small_llama(tok, 32, max_length=256, seed=seed, initializer_range=0.2)
        model.save_pretrained(folder / str(seed))
        tok.save_pretrained(folder / str(seed))
    lines = [
        json.dumps(dict(prompt=f"Say {word}.")) + "\n" for word in ("red", "green", "blue")
    ]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder


@contextmanager
def engine(models, folder, **more):
    "An engine that stays; `draw(model, name)` asks it: samples, and counts."
    own = dict(backend="vllm", base_url=f"unix:{folder}/engine/socket", max_new_tokens=8)
    own |= dict(datasets=[str(models / "prompts.jsonl")], num_samples_per_prompt=3)
    cfg = SampleConfig(model=str(models / "1"), **own | more)
    job = launch("engine_server", cfg, Profile(), folder / "engine", "stay_engine")

    def draw(model, name):
        out = folder / f"{name}.json"
        cfg = SampleConfig(model=str(models / model), output_file=str(out), **own | more)
        counts = main(cfg)
        return read_records(out, "sample"), counts

    try:
        yield draw
    finally:
        job.stop()


def check_logps(samples, folder):
    "Each sample is one of this model's."
    from transformers import AutoModelForCausalLM

    tok, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    for s in samples:
        prompt = prompt_ids(tok, s["prompt"])
        ids = torch.tensor([prompt + s["output_ids"]])
        with torch.no_grad():
            table = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        known = table.gather(1, ids[0, len(prompt) :, None]).squeeze(1).tolist()
        assert s["output_logps"] == pytest.approx(known, abs=1e-4)


def test_each_round_is_answered_by_its_own_policy(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "progress.jsonl"))
    with engine(models, tmp_path) as draw:
        first, counts = draw("1", "first")
        assert "swap_seconds" not in counts and counts["wait_seconds"] > 0
        second, counts = draw("2", "second")
        assert 0 <= counts["swap_difference"] < 1e-5 and counts["check_seconds"] > 0
        again, _ = draw("1", "again")
    for samples, name in ((first, "1"), (second, "2")):
        assert len(samples) == 9
        check_logps(samples, models / name)
    assert again == [s | dict(generator=a["generator"]) for s, a in zip(first, again)]
    assert [s["output"] for s in first] != [s["output"] for s in second]
    with pytest.raises(EngineError, match="the engine has ended with -15"):
        draw("1", "late")


def test_an_engine_that_keeps_its_old_weights_stops_the_run(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "progress.jsonl"))
    with engine(models, tmp_path, seed=13) as draw:  # it forgets to read
        with pytest.raises(
            EngineError, match="was given these weights and answers with others"
        ):
            draw("2", "second")
    assert not (tmp_path / "second.json").exists()

"""The loop with the real vLLM as its sampler, on a CPU: an engine for each stage that draws,
one that stays, a run that is killed and goes on. The Python is that of test_vllm.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
import torch
from conftest import free_port
from job_helpers import alive, until
from test_vllm import ENDS, PYTHON, ROOT, WORDS
from test_vllm import start as start_vllm
from transformers import LlamaConfig, LlamaForCausalLM

from halos_nb.models import load_reward_model, load_tokenizer, small_llama
from halos_nb.records import read_jsonl, read_records
from halos_nb.templates import byte_tokenizer, prompt_ids

pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason="no Python with vLLM: see test_vllm.py"),
    pytest.mark.timeout(3000),  # an engine takes a minute to start where cores are few
]
PATIENCE = 1500  # seconds for a run
# the driver: rounds are told as they are done
DRIVER = """
import json, sys
from halos_nb.configs import LoopConfig
from halos_nb.loop import run_rounds
from halos_nb.settings import load_settings
given, settings = json.loads(sys.argv[1]), load_settings(sys.argv[2])
def quiet(job, **shown):
    job.wait(show=False)

for this in run_rounds(LoopConfig(**given), settings, watch=quiet):
    print(this, flush=True)
"""
RUN = dict(
    total_prompts=16,
    prompts_per_round=8,
    num_samples_per_prompt=4,
    max_new_tokens=24,
    max_prompt_length=200,
    max_length=256,
    lr=1e-4,
    batch_size=4,
    audit="skip",
    alarm="skip",
    backend="vllm",
    threshold=0,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A policy and a reward model, 256 wide, prompts, and a profile for each kind of sampler."
    folder, tok = tmp_path_factory.mktemp("world"), byte_tokenizer()
    torch.manual_seed(0)
    shape = dict(hidden_size=256, layers=2, heads=4, max_length=512, initializer_range=0.08)
    model = small_llama(tok, **shape)
    assert model.config.tie_word_embeddings  # reading it anew is where vLLM errs
    model.model.norm.weight.data *= 3
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder / "sft")
    tok.save_pretrained(folder / "sft")
    reward = load_reward_model(str(folder / "sft"))
    torch.nn.init.normal_(reward.score.weight, std=0.5)
    reward.save_pretrained(folder / "rm")
    tok.save_pretrained(folder / "rm")
    texts = [f"Say {WORDS[i % 16]} {'and more ' * (i % 7)}{i}" for i in range(24)]
    lines = [json.dumps(dict(prompt=text)) + "\n" for text in texts]
    (folder / "prompts.jsonl").write_text("".join(lines))
    profile = f"cpu = yes\npython.sample = {PYTHON}\nsampler = "
    ini = "[halos_nb]\nprofile = engine\n"
    for sampler in ("engine", "server"):
        ini += f"[profile {sampler}]\n{profile}{sampler}\n"
    (folder / "settings.ini").write_text(ini)
    return folder


def start(world, name, **more):
    "A run of the loop in a process of its own."
    given = RUN | dict(run_name=name, profile=name.partition("-")[0])
    given |= dict(sft_checkpoint=str(world / "sft"), reward_checkpoint=str(world / "rm"))
    given |= dict(prompts=str(world / "prompts.jsonl")) | more
    quiet = dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    env = os.environ | quiet | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    env |= dict(HALOS_NB_RUNS_DIR=str(world / "runs"))
    log = open(world / f"{name}.out", "w")
    command = [sys.executable, "-c", DRIVER, json.dumps(given), world / "settings.ini"]
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def finish(world, name, **more):
    "A run to its end; what it said, and its folder."
    process = start(world, name, **more)
    try:
        code = process.wait(PATIENCE)
    finally:
        process.kill()
    said = (world / f"{name}.out").read_text()
    run = world / "runs" / name
    logs = [log.read_text()[-1500:] for log in sorted(run.glob("*/*.log"))]
    assert code == 0, said[-3000:] + "".join(logs)
    until(lambda: not alive(run), 30, "no process of the run")
    print(said)
    return said, run


def samples(run, folder):
    return (run / folder / "samples.json").read_bytes()


def counts(run, folder):
    return json.loads((run / folder / "samples.counts.json").read_text())


@pytest.fixture(scope="module")
def engines(world):
    "A run that starts an engine for each stage."
    return finish(world, "engine")


@pytest.fixture(scope="module")
def served(world):
    "A run with one engine that stays."
    return finish(world, "server")


FOLDERS = ("round-1", "round-2", "final")


def test_an_engine_for_each_round(engines):
    said, run = engines
    for folder in FOLDERS:
        assert counts(run, folder)["engine_seconds"] > 0
    assert len(re.findall(r"vLLM: an engine in [\d.]+ s, drawn in", said)) == 3
    assert not (run / "engine").exists()


def test_one_engine_for_all_rounds(served):
    said, run = served
    events = [row["event"] for row in read_jsonl(run / "ledger.jsonl")]
    assert events.count("engine") == 1
    first, *later = (counts(run, folder) for folder in FOLDERS)
    assert "swap_seconds" not in first  # it was started with the first policy
    for counted in later:
        assert counted["swap_difference"] < 1e-5 and counted["swap_seconds"] < 10
        print({k: counted[k] for k in counted if "second" in k or "swap" in k})
    assert len(re.findall(r"new weights in [\d.]+ s, found to be the right ones", said)) == 2


def test_both_draw_the_same(engines, served):
    for folder in FOLDERS:
        assert samples(engines[1], folder) == samples(served[1], folder)
    assert samples(served[1], "round-1") != samples(served[1], "round-2")


def test_kl_is_that_of_transformers(served, world):
    "Both log-probabilities of a sample, and the policy's of each token."
    run = served[1]
    policy, sft = run / "round-2/policy/FINAL", world / "sft"
    tok = load_tokenizer(sft)
    models = dict(policy=policy, reference=sft)
    models = {name: LlamaForCausalLM.from_pretrained(path) for name, path in models.items()}
    drawn = read_records(run / "final/samples.json", "sample")
    worst = 0.0
    for s in drawn:
        prompt = prompt_ids(tok, s["prompt"])
        ids = torch.tensor([prompt + s["output_ids"]])
        for name, model in models.items():
            with torch.no_grad():
                table = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            known = table.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            assert s[f"{name}_logps"] == pytest.approx(float(known.sum()), abs=1e-3)
            worst = max(worst, abs(s[f"{name}_logps"] - float(known.sum())))
    print(f"largest difference of a whole answer's log-probability: {worst:.2g} nats")
    assert any(s["policy_logps"] != s["reference_logps"] for s in drawn)


def test_a_killed_run_goes_on_to_the_same_samples(served, world):
    "Killed while the second round is drawn: nothing is left, and what comes is the same."
    process = start(world, "server-killed")
    run = world / "runs/server-killed"

    def drawing():
        assert process.poll() is None, (world / "server-killed.out").read_text()[-3000:]
        return (run / "round-2/draw.log").exists()

    until(drawing, PATIENCE, "the end of round 1")
    assert len(alive(run)) > 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not alive(run), 30, "no process of the run")
    finish(world, "server-killed")
    for folder in FOLDERS:
        assert samples(run, folder) == samples(served[1], folder)


# ---- with a judge


def opinionated(tok):
    "A judge that closes a text at once and then names any digit, where JSON is asked for."
    plain = small_llama(tok, hidden_size=256, layers=2, heads=4, max_length=4096).config
    config = LlamaConfig.from_dict(plain.to_dict() | dict(tie_word_embeddings=False))
    model = LlamaForCausalLM(config)
    likes = dict.fromkeys("0123456789", 1.0) | {'"': 3.0, ":": 3.0, ",": 3.0, "}": 2.0}
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = (
            30  # so the first number of every state is large
        )
        model.lm_head.weight.zero_()
        for letter, much in likes.items():
            [token] = tok.encode(letter, add_special_tokens=False)
            model.lm_head.weight[token, 0] = much
    return model


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    "vLLM's OpenAI-compatible server with a model that judges; its address."
    folder, port, tok = tmp_path_factory.mktemp("judge"), free_port(), byte_tokenizer()
    opinionated(tok).save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", folder / "model"]
    command += ["--served-model-name", "judge", "--dtype", "float32", "--max-model-len", 2048]
    command += ["--generation-config", "vllm", "--enforce-eager", "--no-enable-chunked-prefill"]
    process = start_vllm(folder, *command, "--host", "127.0.0.1", "--port", port)

    def ready():
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
        except OSError:
            return False

    try:
        until(ready, PATIENCE, "a server that answers")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)
    until(lambda: not alive(folder), 30, "no process of the server")


def test_a_loop_with_a_judge_is_killed_and_goes_on(world, judge, monkeypatch):
    "Sampled by an engine that stays, judged by a server, killed while it is judged."
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    judged = dict(api_model="judge", judge_url=judge, reward_checkpoint="")
    judged |= dict(label_options="temperature=1, max_tokens=48")
    name, run = "server-judged", world / "runs/server-judged"
    process = start(world, name, **judged)
    journal = run / "round-1/feedback.labels.jsonl"

    def judging():
        assert process.poll() is None, (world / f"{name}.out").read_text()[-3000:]
        return journal.exists() and journal.stat().st_size > 0

    until(judging, PATIENCE, "the first judgement")
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not alive(run), 30, "no process of the run")
    paid = journal.read_text().splitlines()
    said, _ = finish(world, name, **judged)
    for folder in FOLDERS:
        labels = read_jsonl(run / folder / "feedback.labels.jsonl")
        assert len(labels) == 32 and len({row["score"] for row in labels}) > 3
    assert journal.read_text().splitlines()[: len(paid)] == paid  # nothing is paid twice
    assert "round-2: 8 prompts, 32 samples" in said

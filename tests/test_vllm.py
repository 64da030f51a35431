"""The real vLLM, on a CPU: engines, a server, a reward model. It lives in a Python of its own:
HALOS_NB_VLLM_PYTHON, or build/vllm-venv (`make vllm`), or this one.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import free_port
from job_helpers import alive, until
from transformers import LlamaForCausalLM

from halos_nb.configs import SampleConfig
from halos_nb.generate import nucleus
from halos_nb.models import load_reward_model, load_tokenizer, small_llama
from halos_nb.records import read_jsonl, read_records
from halos_nb.sample import main
from halos_nb.templates import byte_tokenizer, prompt_ids, tokenizer_hash

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "build/vllm-venv/bin/python"


def vllm_python():
    "The Python that has vLLM, or None."
    if named := os.environ.get("HALOS_NB_VLLM_PYTHON"):
        return named
    if VENV.exists():
        return str(VENV)
    return sys.executable if importlib.util.find_spec("vllm") else None


PYTHON = vllm_python()
pytestmark = [
    pytest.mark.skipif(
        PYTHON is None,
        reason="no Python with vLLM: `make vllm`, or name one in HALOS_NB_VLLM_PYTHON",
    ),
    pytest.mark.timeout(600),
]
# ChatML that shows an option, tools and documents
TEMPLATE = (
    "{% if style is defined %}{{ '<|im_start|>style ' + style + '<|im_end|>\n' }}{% endif %}"
    "{% if tools %}{{ '<|im_start|>tools' }}{% for t in tools %}{{ ' ' + t.function.name }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% if documents %}{{ '<|im_start|>read ' + documents[0].text }}"
    "{{ '<|im_end|>\n' }}{% endif %}"
)
WORDS = "red green blue grey pink gold teal star moon sun sea sky lake hill tree bird".split()
LONG = 24  # tokens of an answer
ENDS = [2, *range(20, 36)]  # the template's end, and what the model's generation config names


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A random model that ends some of its answers; vLLM's CPU kernels want heads this wide."
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tok = byte_tokenizer()
    tok.chat_template = TEMPLATE + tok.chat_template
    torch.manual_seed(0)
    model = small_llama(
        tok, hidden_size=256, layers=2, heads=4, max_length=512, initializer_range=0.08
    )
    model.model.norm.weight.data *= 3
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    "32 prompts: with 4 samples each more tokens than a CPU engine reads in one piece."
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    texts = [f"Say {'very ' * (i % 5)}{WORDS[i % 16]} {'and more ' * i}{i}" for i in range(32)]
    path.write_text("".join(json.dumps(dict(prompt=text)) + "\n" for text in texts))
    return path


def environment():
    "What a stage under vLLM's Python gets; its Python has no halos_nb of its own."
    quiet = dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    return os.environ | quiet | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def start(folder, *command):
    "A command under vLLM's Python; `alive(folder)` knows what is left of it."
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            [PYTHON, *map(str, command)], env=environment(), stdout=log, stderr=log, cwd=folder
        )


def stage(folder, model, prompts, *flags):
    "`halos_nb.sample --backend vllm` into this folder."
    return start(
        folder,
        "-m",
        "halos_nb.sample",
        model,
        "--backend",
        "vllm",
        "--datasets",
        prompts,
        "--output_file",
        folder / "samples.json",
        "--max_new_tokens",
        LONG,
        "--max_prompt_length",
        400,
        *flags,
    )


def ended(process, folder):
    "The exit code; and nothing may be left (multiprocessing's tracker leaves a moment later)."
    code = process.wait(500)
    until(lambda: not alive(folder), 20, "no process of the stage")
    return code


def sampled(folder, *args):
    "The samples of a stage that has to succeed."
    code = ended(stage(folder, *args), folder)
    assert code == 0, (folder / "log").read_text()[-3000:]
    return read_records(folder / "samples.json", "sample")


def logps_of(model, tok, sample, temperature=1.0, top_p=1.0):
    "Log-probabilities of a sample's ids under the distribution that is drawn from."
    prompt = prompt_ids(tok, sample["prompt"])
    ids = torch.tensor([prompt + sample["output_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].double()
    table = nucleus(logits / temperature, top_p).log_softmax(-1)
    return table.gather(1, ids[0, len(prompt) :, None]).squeeze(1).tolist()


@pytest.fixture(scope="module")
def drawn(tiny, prompts, tmp_path_factory):
    "32 prompts x 4, all seeded, all at once."
    folder = tmp_path_factory.mktemp("drawn")
    sampled(folder, tiny, prompts, "--num_samples_per_prompt", 4)
    return folder


def test_samples_carry_what_was_drawn(drawn, tiny):
    "Ids with the end among them, the end as it was, the hash of our tokenizer and template."
    tok = load_tokenizer(tiny)
    samples = read_records(drawn / "samples.json", "sample")
    counts = json.loads((drawn / "samples.counts.json").read_text())
    assert len(samples) == counts["samples"] == 128
    assert counts["outputs_without_logps"] == counts["seeds_moved"] == 0
    assert 0 < counts["outputs_cut"] == sum(not s["finished"] for s in samples) < 128
    for s in samples:
        ids = s["output_ids"]
        body = ids[:-1] if s["finished"] else ids
        assert s["finished"] == (ids[-1] in ENDS)
        assert not set(body) & set(ENDS)
        assert s["finished"] or len(ids) == LONG
        assert s["output"] == tok.decode(body, skip_special_tokens=True)
        assert s["tokenizer"] == tokenizer_hash(tok)
        assert (s["temperature"], s["top_p"]) == (1, 1)
    assert len({tuple(s["output_ids"]) for s in samples}) > 110  # some are one token long


def test_log_probs_are_the_policys(drawn, tiny):
    tok, model = load_tokenizer(tiny), LlamaForCausalLM.from_pretrained(tiny)
    for s in read_records(drawn / "samples.json", "sample")[::3]:
        assert s["output_logps"] == pytest.approx(logps_of(model, tok, s), abs=1e-4)


def test_temperature_top_p_and_stops(drawn, tiny, prompts, tmp_path):
    "Log-probs are of what was drawn from; a stop ends an answer, and its ids end with it."
    said = "".join(s["output"] for s in read_records(drawn / "samples.json", "sample"))
    often = Counter(c for c in said if c.isascii() and c.isalnum()).most_common(3)
    stops = [c for c, _ in often]
    flags = [
        "--temperature",
        0.8,
        "--top_p",
        0.9,
        "--stop",
        ",".join(stops),
        "--num_prompts",
        32,
    ]
    samples = sampled(tmp_path, tiny, prompts, *flags)
    tok, model = load_tokenizer(tiny), LlamaForCausalLM.from_pretrained(tiny)
    stopped = 0
    for s in samples:
        assert (s["temperature"], s["top_p"]) == (0.8, 0.9)
        ours = logps_of(model, tok, s, 0.8, 0.9)
        assert s["output_logps"] == pytest.approx(ours, abs=1e-4)
        ids = s["output_ids"]
        ended_so = ids[-1] in ENDS
        text = tok.decode(ids[:-1] if ended_so else ids, skip_special_tokens=True)
        stop = next((x for x in stops if text.endswith(x)), "")
        assert s["output"] == text.removesuffix(stop)
        assert not any(x in s["output"] for x in stops)
        assert s["finished"] == (bool(stop) or ended_so)
        stopped += bool(stop)
    assert 0 < stopped < 32


def test_engines_share_the_work(drawn, tiny, prompts, tmp_path):
    "Two engines and smaller batches give the file of one, byte for byte."
    flags = ["--num_samples_per_prompt", 4, "--data_parallel_size", 2, "--batch_size", 32]
    sampled(tmp_path, tiny, prompts, *flags)
    both = [folder / "samples.json" for folder in (drawn, tmp_path)]
    assert both[0].read_bytes() == both[1].read_bytes()


def test_an_engine_of_several_workers_ends(drawn, tiny, prompts, tmp_path):
    samples = sampled(tmp_path, tiny, prompts, "--tensor_parallel_size", 2, "--num_prompts", 2)
    first = read_records(drawn / "samples.json", "sample")[0]
    assert samples[0]["output_ids"] == first["output_ids"]
    assert samples[0]["output_logps"] == pytest.approx(first["output_logps"], abs=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_a_stage_that_fails_leaves_nothing(tiny, prompts, tmp_path, size):
    "Its journal cannot be written, which shows when the engine runs."
    (tmp_path / ".samples.json.shard0.jsonl").mkdir()
    process = stage(tmp_path, tiny, prompts, "--tensor_parallel_size", size)
    assert ended(process, tmp_path) == 1
    log = (tmp_path / "log").read_text()  # a command ends with its message alone
    assert "Is a directory" in log and "shard0.jsonl" in log


@pytest.mark.parametrize("kind", ["data_parallel_size", "tensor_parallel_size"])
def test_a_stage_that_is_killed_leaves_nothing(tiny, prompts, tmp_path, kind):
    "Also without the supervisor, which ends whatever is left."
    many = ["--num_samples_per_prompt", 400, "--batch_size", 64]
    process = stage(tmp_path, tiny, prompts, f"--{kind}", 2, *many)
    shard = tmp_path / ".samples.json.shard0.jsonl"
    until(lambda: shard.exists() and shard.stat().st_size > 0, 400, "the first samples")
    assert len(alive(tmp_path)) > 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not alive(tmp_path), 150, "no process of the stage")


# ---- a server


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    "vLLM's own OpenAI-compatible server; its address."
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", tiny]
    command += ["--served-model-name", "policy", "--dtype", "float32", "--max-model-len", 512]
    command += ["--generation-config", "vllm", "--no-enable-chunked-prefill", "--enforce-eager"]
    process = start(folder, *command, "--host", "127.0.0.1", "--port", port)

    def ready():
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
        except OSError:
            return False

    try:
        until(ready, 500, "a server that answers")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)
    until(lambda: not alive(folder), 30, "no process of the server")


@pytest.fixture
def ask(server, prompts, tmp_path, monkeypatch):
    "`ask(**settings)`: samples from the server, and the counts."
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("HALOS_NB_PROGRESS", str(tmp_path / "progress.jsonl"))

    def run(name="a", **settings):
        own = dict(model="policy", backend="openai", base_url=server, max_new_tokens=LONG)
        own |= dict(datasets=[str(prompts)], output_file=str(tmp_path / f"{name}.json"))
        counts = main(SampleConfig(**own | settings))
        return read_records(tmp_path / f"{name}.json", "sample"), counts

    return run


def without_ids(counts):
    return {name: n for name, n in counts.items() if "without" in name or "refused" in name}


def test_a_server_draws_what_an_engine_draws(ask, drawn, tiny):
    "The same ids, ends and log-probs, and a journal that has them for another time."
    samples, counts = ask(tokenizer=str(tiny), num_prompts=8, num_samples_per_prompt=4)
    engine = read_records(drawn / "samples.json", "sample")[:32]
    for s, e in zip(samples, engine, strict=True):
        for name in ("output", "output_ids", "finished", "tokenizer", "temperature", "top_p"):
            assert s[name] == e[name]
        assert s["output_logps"] == pytest.approx(e["output_logps"], abs=1e-4)
    assert without_ids(counts) == dict(outputs_without_logps=0)
    again, counts = ask(tokenizer=str(tiny), num_prompts=8, num_samples_per_prompt=4)
    assert again == samples and counts["from_journal"] == 32


def test_what_a_server_cannot_tell_is_counted(ask, tiny, tmp_path):
    "Log-probs of a distribution that is not the one drawn from; ids of another template."
    samples, counts = ask("warm", tokenizer=str(tiny), num_prompts=4, temperature=0.7)
    assert without_ids(counts) == dict(outputs_without_logps=4)
    assert all(s["output_ids"] and s.get("output_logps") is None for s in samples)
    other = load_tokenizer(tiny)
    other.chat_template = "Hm. " + other.chat_template
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other/config.json").write_text((tiny / "config.json").read_text())
    samples, counts = ask("other", tokenizer=str(tmp_path / "other"), num_prompts=4)
    assert without_ids(counts) == {"outputs_without_ids (prompt read otherwise)": 4}
    assert not any(s.get("output_ids") or s.get("tokenizer") for s in samples)
    samples, counts = ask("words", num_prompts=4)
    assert without_ids(counts) == {}
    assert not any(s.get("output_ids") for s in samples)


def test_options_tools_and_documents_reach_the_servers_template(ask, tiny, tmp_path):
    "The server says which ids it read: ours, with all of them in."
    look_up = dict(type="function", function=dict(name="look_up", parameters={}))
    turn = dict(role="user", content="Name a star.", tools=[look_up])
    turn["documents"] = [dict(title="Lyra", text="Vega is bright.")]
    (tmp_path / "tools.jsonl").write_text(json.dumps(dict(prompt=[turn])) + "\n")
    samples, counts = ask(
        "tools",
        tokenizer=str(tiny),
        datasets=[str(tmp_path / "tools.jsonl")],
        template_options="style=short",
    )
    assert without_ids(counts) == dict(outputs_without_logps=0)
    tok = load_tokenizer(tiny, template_options="style=short")
    text = tok.decode(prompt_ids(tok, samples[0]["prompt"]))
    assert "style short" in text and "tools look_up" in text and "read Vega" in text
    journal = read_jsonl(tmp_path / "tools.answers.jsonl")
    assert [len(line["output_ids"]) for line in journal] == [len(samples[0]["output_ids"])]


# ---- a reward model

POOLING = """
import json, sys
from vllm import LLM
from vllm import PoolingParams
folder, file = sys.argv[1:]
llm = LLM(model=folder, runner="pooling", dtype="float32", enforce_eager=True,
          max_model_len=256, distributed_executor_backend="uni", enable_chunked_prefill=False)
rows = [dict(prompt_token_ids=ids) for ids in json.load(open(file))]
raw = PoolingParams(task="classify", use_activation=False)
replies = llm.classify(rows, pooling_params=raw, use_tqdm=False)
json.dump([r.outputs.probs for r in replies], open(file + ".logits", "w"))
"""


def test_pooling_gives_our_scores(tiny, tmp_path):
    "A Bradley-Terry model of ours, read by vLLM: the same two logits."
    tok = load_tokenizer(tiny)
    torch.manual_seed(3)
    model = load_reward_model(str(tiny)).eval()
    torch.nn.init.normal_(model.score.weight, std=0.1)
    model.save_pretrained(tmp_path / "rm")
    tok.save_pretrained(tmp_path / "rm")
    turns = [dict(role="user", content=f"Name {n} stars.") for n in (1, 22, 333)]
    answer = dict(role="assistant", content="Vega.")
    rows = [tok.apply_chat_template([t, answer])["input_ids"] for t in turns]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "pool.py").write_text(POOLING)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        process = start(tmp_path, tmp_path / "pool.py", tmp_path / "rm", tmp_path / "rows.json")
        assert ended(process, tmp_path) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    theirs = json.loads((tmp_path / "rows.json.logits").read_text())
    for ids, logits in zip(rows, theirs, strict=True):
        with torch.no_grad():
            ours = model(input_ids=torch.tensor([ids])).logits[0].tolist()
        assert logits == pytest.approx(ours, abs=1e-4)

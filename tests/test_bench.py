"The measurements have what they measure on, also where the real records are not."

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import inputs


def test_made_up_words_are_enough_for_every_job(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "SHARED", tmp_path / "none")
    # of 8k and 64k words; they need no texts
    monkeypatch.setattr(inputs, "save_models", lambda folder, tokenizer: None)
    inputs.make_inputs(tmp_path / "out")
    read = lambda name: [
        json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()
    ]
    samples, long_samples = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("samples.json", "long_samples.json")
    )
    assert (len(read("pairs.jsonl")), len(read("long_pairs.jsonl")), len(long_samples)) == (
        inputs.MAX_PAIRS,
        64,
        24 * 8,
    )
    # what `bench/run.py` asks for, 8 of a prompt
    assert len(samples) >= 256 and len({s["prompt_id"] for s in samples}) * 8 == len(samples)
    assert (tmp_path / "out/source.txt").read_text() == "made-up words"
    with pytest.raises(FileNotFoundError):
        inputs.real_texts()


BENCH = Path(inputs.__file__).parent
WORDS = "Name a star that is far away, and say why it is. ".split(" ")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A tiny model, and two pairs and four samples of two prompts."
    from halos_nb.models import small_llama
    from halos_nb.templates import byte_tokenizer

    folder = tmp_path_factory.mktemp("bench")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    model = small_llama(tokenizer, hidden_size=16, layers=1, heads=2)
    model.resize_token_embeddings(1024)  # the meter warms up with tokens of a larger one
    model.save_pretrained(folder / "model")
    pairs, samples = [], []
    for i in range(2):
        prompt = " ".join(WORDS[i:])
        pairs.append(dict(prompt=prompt, chosen="Vega", rejected="Mars"))
        turns = [dict(role="user", content=prompt)]
        for k, said in enumerate(("Vega", "Mars")):
            row = dict(prompt_id=f"p{i}", sample_id=k, prompt=turns, output=said, type="sample")
            samples.append(row)
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (folder / "pairs.jsonl").write_text(lines)
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


def run_bench(script, folder, *more):
    "What a measurement says of itself, as `bench/run.py` reads it."
    command = [sys.executable, BENCH / script, "--model", folder / "model", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", ["dpo.py", "reward_model.py"])
@pytest.mark.parametrize("more", [[], ["--no-share"]])
def test_training_is_measured(script, more, small):
    told = run_bench(script, small, "--pairs", small / "pairs.jsonl", "--n", "2", *more)
    assert told["steps"] == 1
    assert 0 < told["needed"] <= told["tokens"]


def test_labelling_is_measured(small):
    told = run_bench("label.py", small, "--samples", small / "samples.json", "--n", "4")
    assert told["tokens"] > 0


def test_sampling_is_measured(small):
    told = run_bench(
        "sample.py", small, "--pairs", small / "pairs.jsonl", "--n", "2", "--new", "4"
    )
    assert told["tokens"] > 0

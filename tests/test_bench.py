"The measurements have what they measure on, also where the real records are not."

import json
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

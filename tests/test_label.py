"Labelling: every sample exactly once, in order, with the same score on any number of processes."
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import golden
from halos_nb.batching import byte_tokenizer, encode, encode_prompt
from halos_nb.config import LabelConfig
from halos_nb.label import check_reward_model, main, process_batch_with_reward_model, read_samples, score_samples, to_feedback
from halos_nb.models import load_reward_model
from halos_nb.records import RecordError, as_turns, prompt_id, read_jsonl, read_records, write_records

TWO = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
       "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]


def make_samples(sizes=(5, 1, 3, 4, 2, 7, 1)):
    "Samples of several prompts, mixed up, texts of many lengths."
    rows = []
    for p, n in enumerate(sizes):
        prompt = as_turns(f"Question {'and so on ' * (p % 4)}{p}?", "user")
        rows += [dict(prompt_id=prompt_id(prompt), sample_id=k, prompt=prompt, output=f"answer {k} " * ((7 * p + 5 * k) % 11), type="sample") for k in range(n)]
    return [rows[(i * 7) % len(rows)] for i in range(len(rows))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A random reward model."
    folder, tok = tmp_path_factory.mktemp("models") / "rm", byte_tokenizer()
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                               initializer_range=0.2, pad_token_id=0, eos_token_id=2, bos_token_id=None, num_labels=2)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rm(folder): return load_reward_model(folder).eval()


@pytest.fixture(scope="module")
def tok(): return byte_tokenizer()


def test_equals_plain_transformers(rm, folder, tok):
    "Against AutoModelForSequenceClassification, one text at a time, cut ones included."
    plain, samples = AutoModelForSequenceClassification.from_pretrained(folder), make_samples()
    scored = score_samples(samples, rm, tok, max_length=100)
    for s, x in zip(samples, scored):
        ids = encode(tok, s["prompt"] + as_turns(s["output"]))
        if len(ids) > 100: ids = encode(tok, encode_prompt(tok, s["prompt"], 50, Counter())[0] + as_turns(s["output"]))
        with torch.no_grad(): assert x.score == pytest.approx(plain(torch.tensor([ids[:100]])).logits[0, 1].item(), abs=1e-5)
        assert x.truncated == (len(ids) > 100)
    assert 0 < sum(x.truncated for x in scored) < len(samples)


def test_score_depends_on_the_sample_alone(rm, tok):
    "Scored among its siblings or without them, where some are too long and some are not."
    samples = make_samples()
    together = score_samples(samples, rm, tok, max_length=100)
    for s, x in zip(samples, together):
        [alone] = score_samples([s], rm, tok, max_length=100)
        assert (alone.score, alone.truncated) == (pytest.approx(x.score, abs=1e-5), x.truncated)


@pytest.mark.parametrize("budget", [1, 100, 333, 10**6])
def test_any_budget(rm, tok, budget):
    samples = make_samples()
    expected = [x.score for x in score_samples(samples, rm, tok)]
    assert [x.score for x in score_samples(samples, rm, tok, token_budget=budget)] == pytest.approx(expected, abs=1e-5)


class Ranks:
    "Stands for the accelerator of one process after another; the last one sees the sum."
    def __init__(self, world): self.num_processes, self.process_index, self.device, self.tables = world, 0, "cpu", []
    def reduce(self, table, how):
        self.tables.append(table.clone())
        self.process_index += 1
        return sum(self.tables) if len(self.tables) == self.num_processes else torch.ones_like(table)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 40])
def test_any_number_of_processes(rm, tok, world):
    "Bit for bit, with uneven shares and with more processes than batches; no sample is scored twice or not at all."
    samples, ranks = make_samples(), Ranks(world)
    for _ in range(world): scored = score_samples(samples, rm, tok, ranks, token_budget=200)
    assert scored == score_samples(samples, rm, tok, token_budget=200)
    assert sum(t[1] for t in ranks.tables).tolist() == [1] * len(samples)


def test_missing_share_is_an_error(rm, tok):
    ranks = Ranks(2)
    ranks.reduce = lambda table, how: table
    with pytest.raises(RuntimeError, match="not scored exactly once"): score_samples(make_samples(), rm, tok, ranks, token_budget=200)


def test_two_processes_label_the_same(folder, tmp_path):
    "The command on two processes against one: labels and feedback byte for byte."
    write_records(tmp_path / "samples.json", make_samples())
    given = dict(samples_file=str(tmp_path / "samples.json"), reward_model_path=str(folder), token_budget=200, max_length=100, feedback_type="pairwise")
    one = main(LabelConfig(output_file=str(tmp_path / "one/feedback.json"), num_processes=1, **given))
    flags = ["--reward_model_path", str(folder), "--feedback_type", "pairwise", "--token_budget", "200", "--max_length", "100", "--num_processes", "2",
             str(tmp_path / "samples.json"), str(tmp_path / "two/feedback.json")]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "HALOS_NB_PROGRESS": str(tmp_path / "progress.jsonl")}
    done = subprocess.run([sys.executable, *TWO, "-m", "halos_nb.label", *flags], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("feedback.json", "feedback.labels.jsonl"): assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    two = json.loads((tmp_path / "two/feedback.counts.json").read_text())
    assert {k: v for k, v in two.items() if k != "seconds"} == {k: v for k, v in one.items() if k != "seconds"}
    assert (two["samples"], two["scored"], two["prompts"], two["singles"]) == (23, 23, 7, 2) and two["outputs_cut"] > 0
    last = json.loads((tmp_path / "progress.jsonl").read_text().splitlines()[-1])
    assert (last["done"], last["total"]) == (23, 23)
    assert len(read_jsonl(tmp_path / "two/feedback.labels.jsonl")) == 23 and len(read_records(tmp_path / "two/feedback.json", "pairwise_feedback")) == two["records"]


def test_process_batch(rm, tok):
    samples = make_samples()
    kept = json.dumps(samples)
    out = process_batch_with_reward_model(samples, rm, tok, None)
    assert json.dumps(samples) == kept # not edited
    assert [(s["prompt_id"], s["sample_id"], s["output"][0]["content"]) for s in out] == [(s["prompt_id"], s["sample_id"], s["output"]) for s in samples]
    assert [s["reward"] for s in out] == [x.score for x in score_samples(samples, rm, tok)]
    assert process_batch_with_reward_model([], rm, tok, None) == []


def test_unscored(folder, tok, tmp_path):
    "A model that breaks on a text leaves exactly that text unscored: it is in the labels with its reason, and in no feedback."
    model = load_reward_model(folder)
    model.model.embed_tokens.weight.data[tok.encode("~")] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tok.save_pretrained(tmp_path / "broken")
    samples = make_samples()
    for i in (3, 8, 9): samples[i]["output"] = "so ~ so"
    write_records(tmp_path / "samples.json", samples)
    cfg = LabelConfig(samples_file=str(tmp_path / "samples.json"), output_file=str(tmp_path / "feedback.json"), reward_model_path=str(tmp_path / "broken"))
    counts = main(cfg)
    assert (counts["samples"], counts["scored"], counts["unscored"], counts["reasons"]) == (23, 20, 3, {"the reward model gave nan": 3})
    labels = read_jsonl(tmp_path / "feedback.labels.jsonl")
    assert [i for i, row in enumerate(labels) if row["score"] is None] == [3, 8, 9]
    assert len(read_records(tmp_path / "feedback.json", "scalar_feedback")) == 20


@golden.needs_golden
def test_golden_label_command():
    "The feedback files of the predecessor's command, given its scores."
    told = golden.load("label_command")
    scalar = next(c["file"] for c in told["cases"] if c["options"]["feedback_type"] is None and "file" in c)
    reward = {(r["prompt_id"], r["sample_id"]): r["reward"] for r in scalar}
    labelled = [s | dict(reward=reward.get((s["prompt_id"], s["sample_id"])), output=as_turns(s["output"])) for s in told["samples"]]
    for case in told["cases"]:
        options = {k: v for k, v in case["options"].items() if k != "threshold" or case["options"]["feedback_type"]}
        cfg = LabelConfig(samples_file="", output_file="", reward_model_path="", **options)
        if "file" in case: assert to_feedback(labelled, cfg) == case["file"], case["id"]
        elif options["split"]: assert {r["split"] for r in to_feedback(labelled, cfg)} == {options["split"]}, case["id"] # documented_note
        elif cfg.threshold == 5.5: assert [r["label"] for r in to_feedback(labelled, cfg)] == [int(r["reward"] >= 5.5) for r in scalar]
        else:
            with pytest.raises(ValueError, match="threshold"): to_feedback(labelled, cfg)


def test_defaults():
    "Pairwise: any difference; binary: the median; no type: the score."
    rows = [dict(prompt_id="p", sample_id=i, prompt=as_turns("?", "user"), output=as_turns(str(r)), reward=r) for i, r in enumerate((0.1, 0.2, 5.0))]
    given = dict(samples_file="", output_file="", reward_model_path="")
    assert [r["reward_difference"] > 0 for r in to_feedback(rows, LabelConfig(feedback_type="pairwise", **given))] == [True]
    assert [r["label"] for r in to_feedback(rows, LabelConfig(feedback_type="binary", **given))] == [0, 1, 1]
    assert {r["type"] for r in to_feedback(rows, LabelConfig(**given))} == {"scalar_feedback"}


@pytest.mark.parametrize("broken, told", [
    ({"output": None}, "record 2: field `output`"), ({"prompt": []}, "record 2: field `prompt`"), ({"prompt": [{"role": "user"}]}, r"record 2: field `prompt\[0\].content` is missing"),
    ({"type": "smaple"}, "record 2: field `type`"), ({"prompt_id": "other", "sample_id": [1]}, "record 2: field `sample_id`")])
def test_broken_record(folder, tmp_path, broken, told):
    rows = make_samples()[:3]
    (tmp_path / "samples.json").write_text(json.dumps([rows[0], rows[1] | broken, rows[2]]))
    with pytest.raises(RecordError, match="samples.json, " + told):
        main(LabelConfig(samples_file=str(tmp_path / "samples.json"), output_file=str(tmp_path / "f.json"), reward_model_path=str(folder)))


@pytest.mark.parametrize("text, told", [("[]", "an empty list"), ("{", "not JSON"), ('{"type": "sample"}', "should be a list")])
def test_broken_file(tmp_path, text, told):
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises(RecordError, match=f"samples.json: .*{told}"): read_samples(tmp_path / "samples.json")


def test_other_heads_are_refused(tmp_path):
    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="with 1 logits, not a Bradley-Terry reward model"): check_reward_model(str(tmp_path / "one"))

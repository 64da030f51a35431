"""Labelling: every sample exactly once, in order, with the same score on any number of
processes.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import golden
from halos_nb.templates import byte_tokenizer, encode, encode_all, encode_prompt
from halos_nb.configs import LabelConfig
from halos_nb.settings import parse_args
from halos_nb.label import feedback_from_scores, main, make_feedback, score_with
from halos_nb.label_input import LabelInput, only_finished, pairs_to_ask, read_samples
from halos_nb.judge import Judge, letter_turns, questions_of_pair
from halos_nb.models import AutoModelForBradleyTerry, load_reward_model, small_llama
from halos_nb.people import Session, choose_pairs, comparisons
from halos_nb.records import (
    RecordError,
    append_jsonl,
    as_turns,
    prompt_id,
    read_jsonl,
    read_records,
    write_records,
)
from halos_nb.score import (
    Scored,
    head_of,
    process_batch_with_reward_model,
    score_samples,
)

TWO = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--num_cpu_threads_per_process",
    "1",
    "--main_process_port",
    "0",
]


def make_samples(sizes=(5, 1, 3, 4, 2, 7, 1)):
    "Samples of several prompts, mixed up, texts of many lengths."
    rows = []
    for p, n in enumerate(sizes):
        prompt = as_turns(f"Question {'and so on ' * (p % 4)}{p}?", "user")
        rows += [
            dict(
                prompt_id=prompt_id(prompt),
                sample_id=k,
                prompt=prompt,
                output=f"answer {k} " * ((7 * p + 5 * k) % 11),
                type="sample",
            )
            for k in range(n)
        ]
    return [rows[(i * 7) % len(rows)] for i in range(len(rows))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A random reward model."
    folder, tok = tmp_path_factory.mktemp("models") / "rm", byte_tokenizer()
    torch.manual_seed(0)
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
            num_labels=2,
        )
    ).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rm(folder):
    return load_reward_model(folder).eval()


@pytest.fixture(scope="module")
def tok():
    return byte_tokenizer()


def test_equals_plain_transformers(rm, folder, tok):
    "Against AutoModelForSequenceClassification, one text at a time, cut ones included."
    plain, samples = AutoModelForSequenceClassification.from_pretrained(folder), make_samples()
    scored = score_samples(samples, rm, tok, max_length=100)
    for s, x in zip(samples, scored):
        ids = encode(tok, s["prompt"] + as_turns(s["output"]))
        if len(ids) > 100:
            ids = encode(
                tok, encode_prompt(tok, s["prompt"], 50, Counter())[0] + as_turns(s["output"])
            )
        with torch.no_grad():
            assert x.score == pytest.approx(
                plain(torch.tensor([ids[:100]])).logits[0, 1].item(), abs=1e-5
            )
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
    assert [
        x.score for x in score_samples(samples, rm, tok, token_budget=budget)
    ] == pytest.approx(expected, abs=1e-5)


class Ranks:
    "Stands for the accelerator of one process after another; the last one sees the sum."

    def __init__(self, world):
        self.num_processes, self.process_index, self.device, self.tables = world, 0, "cpu", []

    def reduce(self, table, how):
        self.tables.append(table.clone())
        self.process_index += 1
        return (
            sum(self.tables)
            if len(self.tables) == self.num_processes
            else torch.ones_like(table)
        )


@pytest.mark.parametrize("world", [1, 2, 3, 5, 40])
def test_any_number_of_processes(rm, tok, world):
    """Bit for bit, with uneven shares and with more processes than batches; no sample is scored
    twice or not at all.
    """
    samples, ranks = make_samples(), Ranks(world)
    for _ in range(world):
        scored = score_samples(samples, rm, tok, ranks, token_budget=200)
    assert scored == score_samples(samples, rm, tok, token_budget=200)
    assert sum(t[1] for t in ranks.tables).tolist() == [1] * len(samples)


def test_missing_share_is_an_error(rm, tok):
    ranks = Ranks(2)
    ranks.reduce = lambda table, how: table
    with pytest.raises(RuntimeError, match="not scored exactly once"):
        score_samples(make_samples(), rm, tok, ranks, token_budget=200)


def test_two_processes_label_the_same(folder, tmp_path):
    "The command on two processes against one: labels and feedback byte for byte."
    write_records(tmp_path / "samples.json", make_samples())
    given = dict(
        samples_file=str(tmp_path / "samples.json"),
        reward_model_path=str(folder),
        token_budget=200,
        max_length=100,
        feedback_type="pairwise",
    )
    one = main(
        LabelConfig(output_file=str(tmp_path / "one/feedback.json"), num_processes=1, **given)
    )
    flags = [
        "--reward_model_path",
        str(folder),
        "--feedback_type",
        "pairwise",
        "--token_budget",
        "200",
        "--max_length",
        "100",
        "--num_processes",
        "2",
        str(tmp_path / "samples.json"),
        str(tmp_path / "two/feedback.json"),
    ]
    env = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "HALOS_NB_PROGRESS": str(tmp_path / "progress.jsonl"),
    }
    done = subprocess.run(
        [sys.executable, *TWO, "-m", "halos_nb.label", *flags],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("feedback.json", "feedback.labels.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    two = json.loads((tmp_path / "two/feedback.counts.json").read_text())
    assert {k: v for k, v in two.items() if k != "seconds"} == {
        k: v for k, v in one.items() if k != "seconds"
    }
    assert (two["samples"], two["scored"], two["prompts"], two["singles"]) == (
        23,
        23,
        7,
        2,
    ) and two["outputs_cut"] > 0
    last = json.loads((tmp_path / "progress.jsonl").read_text().splitlines()[-1])
    assert (last["done"], last["total"]) == (23, 23)
    assert (
        len(read_jsonl(tmp_path / "two/feedback.labels.jsonl")) == 23
        and len(read_records(tmp_path / "two/feedback.json", "pairwise_feedback"))
        == two["records"]
    )


def test_process_batch(rm, tok):
    samples = make_samples()
    kept = json.dumps(samples)
    out = process_batch_with_reward_model(samples, rm, tok, None)
    assert json.dumps(samples) == kept  # not edited
    assert [(s["prompt_id"], s["sample_id"], s["output"][0]["content"]) for s in out] == [
        (s["prompt_id"], s["sample_id"], s["output"]) for s in samples
    ]
    assert [s["reward"] for s in out] == [x.score for x in score_samples(samples, rm, tok)]
    assert process_batch_with_reward_model([], rm, tok, None) == []


def test_unscored(folder, tok, tmp_path):
    """A model that breaks on a text leaves exactly that text unscored: it is in the labels with
    its reason, and in no feedback.
    """
    model = load_reward_model(folder)
    model.model.embed_tokens.weight.data[tok.encode("~")] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tok.save_pretrained(tmp_path / "broken")
    samples = make_samples()
    for i in (3, 8, 9):
        samples[i]["output"] = "so ~ so"
    write_records(tmp_path / "samples.json", samples)
    cfg = LabelConfig(
        samples_file=str(tmp_path / "samples.json"),
        output_file=str(tmp_path / "feedback.json"),
        reward_model_path=str(tmp_path / "broken"),
    )
    counts = main(cfg)
    assert (counts["samples"], counts["scored"], counts["unscored"], counts["reasons"]) == (
        23,
        20,
        3,
        {"the reward model gave nan": 3},
    )
    labels = read_jsonl(tmp_path / "feedback.labels.jsonl")
    assert [i for i, row in enumerate(labels) if row["score"] is None] == [3, 8, 9]
    assert len(read_records(tmp_path / "feedback.json", "scalar_feedback")) == 20


def test_golden_label_command():
    "The feedback files of the predecessor's command, given its scores."
    told = golden.load("label_command")
    scalar = next(
        c["file"]
        for c in told["cases"]
        if c["options"]["feedback_type"] is None and "file" in c
    )
    reward = {(r["prompt_id"], r["sample_id"]): r["reward"] for r in scalar}
    labelled = [
        s
        | dict(
            reward=reward.get((s["prompt_id"], s["sample_id"])), output=as_turns(s["output"])
        )
        for s in told["samples"]
    ]
    for case in told["cases"]:
        options = {
            k: v
            for k, v in case["options"].items()
            if k != "threshold" or case["options"]["feedback_type"]
        }
        cfg = LabelConfig(samples_file="", output_file="", reward_model_path="rm", **options)
        if "file" in case:
            made = make_feedback(labelled, cfg)
            if cfg.feedback_type in ("pairwise", "binary"):
                made = golden.without_ids(made)
            assert made == case["file"], case["id"]
        elif options["split"]:
            # documented_note
            assert {r["split"] for r in make_feedback(labelled, cfg)} == {options["split"]}, (
                case["id"]
            )
        elif cfg.threshold == 5.5:
            assert [r["label"] for r in make_feedback(labelled, cfg)] == [
                int(r["reward"] >= 5.5) for r in scalar
            ]
        else:
            with pytest.raises(ValueError, match="threshold"):
                make_feedback(labelled, cfg)


def test_defaults():
    """Pairwise: the widest pair, by any difference; binary: the median; no type: the score. 16
    are scored at a time.
    """
    rows = [
        dict(
            prompt_id="p",
            sample_id=i,
            prompt=as_turns("?", "user"),
            output=as_turns(str(r)),
            reward=r,
        )
        for i, r in enumerate((0.1, 0.2, 5.0))
    ]
    given = dict(samples_file="", output_file="", reward_model_path="rm")
    cfg = LabelConfig(feedback_type="pairwise", **given)
    assert (cfg.feedback_mode, cfg.batch_size, cfg.threshold) == ("max", 16, None)
    (pair,) = make_feedback(rows, cfg)
    assert {pair["reward_A"], pair["reward_B"]} == {0.1, 5.0}
    assert [
        r["label"] for r in make_feedback(rows, LabelConfig(feedback_type="binary", **given))
    ] == [0, 1, 1]
    assert {r["type"] for r in make_feedback(rows, LabelConfig(**given))} == {"scalar_feedback"}


@pytest.mark.parametrize(
    "broken, told",
    [
        ({"output": None}, "record 2: field `output`"),
        ({"prompt": []}, "record 2: field `prompt`"),
        ({"prompt": [{"role": "user"}]}, r"record 2: field `prompt\[0\].content` is missing"),
        ({"type": "smaple"}, "record 2: field `type`"),
        ({"prompt_id": "other", "sample_id": [1]}, "record 2: field `sample_id`"),
        ({"spllit": "train"}, "record 2: field `spllit` is unknown and `split` is missing"),
        ({"genrator": "m"}, "record 2: field `genrator` is unknown and `generator` is missing"),
    ],
)
def test_broken_record(folder, tmp_path, broken, told):
    rows = make_samples()[:3]
    (tmp_path / "samples.json").write_text(json.dumps([rows[0], rows[1] | broken, rows[2]]))
    with pytest.raises(RecordError, match="samples.json, " + told):
        main(
            LabelConfig(
                samples_file=str(tmp_path / "samples.json"),
                output_file=str(tmp_path / "f.json"),
                reward_model_path=str(folder),
            )
        )


def test_other_fields_are_kept_and_counted(folder, tmp_path):
    samples = [
        s | dict(judge_preference=i) if i % 2 else s for i, s in enumerate(make_samples())
    ]
    assert label(folder, tmp_path, samples)["other_fields"] == {"judge_preference": 11}
    assert [r.get("judge_preference") for r in read_records(tmp_path / "feedback.json")] == [
        s.get("judge_preference") for s in samples
    ]


@pytest.mark.parametrize(
    "text, told",
    [
        ("[]", "an empty list"),
        ("{", "not JSON"),
        ('{"type": "sample"}', "`prompt_id` is missing"),
    ],
)
def test_broken_file(tmp_path, text, told):
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises(RecordError, match=f"samples.json.*: .*{told}"):
        read_samples(tmp_path / "samples.json")


# ---- other heads than ours


def save_llama(folder, tok, **more):
    torch.manual_seed(1)
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
            **more,
        )
    ).save_pretrained(folder)
    tok.save_pretrained(folder)


def save_bert(folder, tok, **more):
    torch.manual_seed(1)
    BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
            **more,
        )
    ).save_pretrained(folder)
    tok.save_pretrained(folder)


def label(folder, tmp_path, samples=None, **more):
    write_records(tmp_path / "samples.json", samples or make_samples())
    return main(
        LabelConfig(
            samples_file=str(tmp_path / "samples.json"),
            output_file=str(tmp_path / "feedback.json"),
            **(dict(reward_model_path=str(folder)) if folder else {}),
            **more,
        )
    )


def scores(tmp_path):
    return [r["score"] for r in read_jsonl(tmp_path / "feedback.labels.jsonl")]


@pytest.mark.parametrize("save", [save_llama, save_bert])
@pytest.mark.parametrize(
    "n, weights, meaning",
    [
        (1, "", "its one logit"),
        (2, "", "second of two logits (Bradley-Terry)"),
        (3, "safe=0.25, helpful=-1", "0.25 safe + -1 helpful"),
        (2, "LABEL_0=1", "1 LABEL_0"),
    ],
)
def test_heads(tmp_path, tok, save, n, weights, meaning):
    """Decoders and encoders with one, two and three logits, against plain transformers one text
    at a time.
    """
    save(
        tmp_path / "m",
        tok,
        **(
            dict(id2label=dict(enumerate(("helpful", "safe", "brief"))))
            if n == 3
            else dict(num_labels=n)
        ),
    )
    counts, plain = (
        label(tmp_path / "m", tmp_path, objective_weights=weights),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval(),
    )
    assert counts["head"] == meaning and counts["scored"] == 23
    w = torch.tensor(
        {"": [0.0] * (n - 1) + [1.0], "LABEL_0=1": [1.0, 0.0]}.get(weights, [-1, 0.25, 0])
    )
    for s, score in zip(make_samples(), scores(tmp_path)):
        with torch.no_grad():
            assert score == pytest.approx(
                (
                    plain(
                        torch.tensor([encode(tok, s["prompt"] + as_turns(s["output"]))])
                    ).logits[0]
                    @ w
                ).item(),
                abs=1e-5,
            )


def save_roberta(folder, tok, **more):
    torch.manual_seed(1)
    RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
            pad_token_id=0,
            **more,
        )
    ).save_pretrained(folder)
    tok.save_pretrained(folder)


@pytest.mark.parametrize(
    "save, positions", [(save_bert, 64), (save_roberta, 65), (save_llama, 64)]
)
def test_a_model_that_reads_less(tmp_path, tok, save, positions):
    """A model whose positions end before max_length: its own limit counts, by the same policy;
    RoBERTa's first position is one behind its padding.
    """
    save(tmp_path / "m", tok, num_labels=1, max_position_embeddings=positions)
    counts, plain = (
        label(tmp_path / "m", tmp_path),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval(),
    )
    rows, cut = read_jsonl(tmp_path / "feedback.labels.jsonl"), 0
    for s, r in zip(make_samples(), rows):
        ids = encode(tok, s["prompt"] + as_turns(s["output"]))
        if len(ids) > 64:
            ids = encode(
                tok, encode_prompt(tok, s["prompt"], 32, Counter())[0] + as_turns(s["output"])
            )
        assert r["truncated"] == (len(ids) > 64)
        cut += len(ids) > 64
        with torch.no_grad():
            assert r["score"] == pytest.approx(
                plain(torch.tensor([ids[:64]])).logits[0, 0].item(), abs=1e-5
            )
    assert counts["read_at_most"] == 64 and 0 < counts["outputs_cut"] == cut < 23
    assert "read_at_most" not in label(tmp_path / "m", tmp_path, max_length=64)


def test_heads_that_are_refused(tmp_path, tok):
    save_llama(tmp_path / "three", tok, id2label=dict(enumerate(("helpful", "safe", "brief"))))
    with pytest.raises(
        ValueError, match="has 3 logits, helpful, safe, brief; weigh them by name"
    ):
        label(tmp_path / "three", tmp_path)
    for weights, told in [
        ("kind=1", "'kind' is no objective of .*; it has helpful, safe, brief"),
        ("safe=x", "safe has no number"),
        ("safe", "safe has no number"),
        ("safe=1,safe=2", "given twice"),
        ("safe=0", "weighs nothing"),
        ("safe=nan", "weighs nothing"),
    ]:
        with pytest.raises(ValueError, match="objective_weights: .*" + told):
            label(tmp_path / "three", tmp_path, objective_weights=weights)
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, not a reward model"):
        head_of(LlamaConfig(architectures=["LlamaForCausalLM"]))
    assert not (tmp_path / "feedback.labels.jsonl").exists()


GATED = """
from dataclasses import dataclass
import torch
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput

@dataclass
class Answer(ModelOutput):
    rewards: torch.Tensor | None = None
    score: torch.Tensor | None = None

class GatedReward(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        width, labels = config.hidden_size, config.num_labels
        self.objectives = torch.nn.Linear(width, labels, bias=False)
        self.gate = torch.nn.Linear(width, labels, bias=False)
        self.post_init()

    # takes it that nothing is padded
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        last = self.model(input_ids, attention_mask=attention_mask).last_hidden_state[:, -1]
        rewards = self.objectives(last)
        return Answer(rewards=rewards, score=(rewards * self.gate(last).softmax(-1)).sum(-1))
"""


def test_model_with_a_score_of_its_own(tmp_path, tok):
    """ArmoRM-like: code that comes with the model runs only if the user says so, and its
    `score` is taken, whatever it does with padding.
    """
    from importlib.util import module_from_spec, spec_from_file_location

    (tmp_path / "m").mkdir()
    (tmp_path / "m/gated.py").write_text(GATED)
    spec = spec_from_file_location("gated", tmp_path / "m/gated.py")
    sys.modules["gated"] = gated = module_from_spec(spec)  # dataclass looks there
    spec.loader.exec_module(gated)
    torch.manual_seed(0)
    model = gated.GatedReward(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            initializer_range=0.2,
            num_labels=5,
            pad_token_id=0,
        )
    ).eval()
    model.save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text()) | dict(
        auto_map={"AutoModelForSequenceClassification": "gated.GatedReward"}
    )
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="trust_remote_code: .* is a GatedReward with code of its own"
    ):
        label(tmp_path / "m", tmp_path)
    command = [
        sys.executable,
        "-m",
        "halos_nb.label",
        "--reward_model_path",
        str(tmp_path / "m"),
        "--trust_remote_code",
        str(tmp_path / "samples.json"),
        str(tmp_path / "feedback.json"),
    ]
    out = subprocess.run(
        command,
        env=os.environ | dict(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    for s, score in zip(make_samples(), scores(tmp_path)):
        ids = torch.tensor([encode(tok, s["prompt"] + as_turns(s["output"]))])
        with torch.no_grad():
            assert score == pytest.approx(
                model(ids, torch.ones_like(ids)).score.item(), abs=1e-5
            )
    assert (
        json.loads((tmp_path / "feedback.counts.json").read_text())["head"]
        == "the `score` of GatedReward"
    )
    model.config.auto_map = config["auto_map"]  # as if it had been loaded with its code
    assert [
        s["reward"] for s in process_batch_with_reward_model(make_samples(), model, tok, None)
    ] == pytest.approx(scores(tmp_path), abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<|pad|>", "<|im_end|>"])
def test_padding_side(folder, tmp_path, rm, tok, side, pad):
    "How the tokenizer would pad, and with what, changes nothing."
    other = byte_tokenizer()
    other.padding_side, other.pad_token = side, pad
    assert [
        x.score for x in score_samples(make_samples(), rm, other, token_budget=300)
    ] == pytest.approx([x.score for x in score_samples(make_samples(), rm, tok)], abs=1e-5)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_batch_size(rm, tok, most):
    seen, samples = [], make_samples()
    hook = rm.register_forward_hook(
        lambda module, args, kwargs, out: (
            seen.append(len(out[0])) if "tree" in kwargs else None
        ),
        with_kwargs=True,
    )
    scored = [x.score for x in score_samples(samples, rm, tok, batch_size=most)]
    hook.remove()
    # the first three: a probe of the layout
    assert (
        scored == pytest.approx([x.score for x in score_samples(samples, rm, tok)], abs=1e-5)
        and max(seen[3:]) == most
        and sum(seen[3:]) == len(samples)
    )


def test_process_batch_takes_plain_and_wrapped_models(folder, rm, tok):
    plain, samples = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        make_samples(),
    )
    expected = [x.score for x in score_samples(samples, rm, tok)]
    for model in (plain, type("DDP", (), dict(module=rm))()):
        assert [
            s["reward"] for s in process_batch_with_reward_model(samples, model, tok, None)
        ] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("how", ["plain", "ours", "dropout"])
def test_process_batch_takes_a_model_in_memory(tok, how):
    """Never saved, so without a named architecture; in training mode, where dropout would spoil
    the scores; it is left as it was.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        num_labels=2,
        pad_token_id=0,
        attention_dropout=0.5 * (how == "dropout"),
    )
    model = (
        LlamaForSequenceClassification(config)
        if how != "ours"
        else AutoModelForBradleyTerry.from_config(config)
    )
    model.train(how == "dropout")
    out = process_batch_with_reward_model(make_samples(), model, tok, None)
    assert model.training == (how == "dropout")
    model.eval()
    for s in out:
        with torch.no_grad():
            assert s["reward"] == pytest.approx(
                model(torch.tensor([encode(tok, s["prompt"] + s["output"])]))
                .logits[0, 1]
                .item(),
                abs=1e-5,
            )


# ---- functions, journals, two files


def grade(prompt, output):
    prompt.clear()  # a labeller cannot spoil the samples
    if not output:
        raise KeyError("empty")
    return (
        float("inf")
        if "9" in output
        else len(output)
        if "3" in output
        else True
        if "2" in output
        else "many"
        if "1" in output
        else 0
    )


def test_function(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    samples = [
        s | dict(output=o) for s, o in zip(make_samples((6,)), ("", "9", "333", "2", "1", "0"))
    ]
    counts = label(None, tmp_path, samples, function="test_label:grade")
    assert scores(tmp_path) == [None, None, 3.0, 1.0, None, 0.0] and counts["reasons"] == {
        "KeyError: 'empty'": 1,
        "the function gave inf": 1,
        "the function gave 'many'": 1,
    }
    assert [
        r["reward"] for r in read_records(tmp_path / "feedback.json", "scalar_feedback")
    ] == [3.0, 1.0, 0.0]
    assert (
        read_jsonl(tmp_path / "feedback.labels.jsonl")[0]["labeller"]
        == "function:test_label:grade"
    )
    for spec in ("test_label", "test_label:gone", "gone:f", "test_label:TWO", ":"):
        with pytest.raises(ValueError, match="function: "):
            label(None, tmp_path, samples, function=spec)


def test_conversion_from_labels(folder, tmp_path):
    """The same feedback from the journal as from the model, in every form; an older journal,
    whose labeller is a path, is read too.
    """
    for kind in ("pairwise", "binary", "scalar"):
        label(folder, tmp_path, feedback_type=kind)
        made, journal = (
            (tmp_path / "feedback.json").read_bytes(),
            tmp_path / "feedback.labels.jsonl",
        )
        rows = read_jsonl(journal)
        assert {r["labeller"] for r in rows} == {f"rm:{folder}"}
        (tmp_path / "old.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        k: r[k]
                        for k in ("prompt_id", "sample_id", "score", "reason", "truncated")
                    }
                    | dict(labeller=str(folder))
                )
                + "\n"
                for r in rows
            )
        )
        for source in (journal, tmp_path / "old.jsonl"):
            label(None, tmp_path, feedback_type=kind, from_labels=str(source))
            assert (tmp_path / "feedback.json").read_bytes() == made


def test_journal_of_others(tmp_path):
    samples, file = make_samples(), tmp_path / "some.jsonl"
    row = lambda s, **more: (
        dict(
            prompt_id=s["prompt_id"],
            sample_id=s["sample_id"],
            labeller="human:a",
            score=1.0,
            reason="",
            type="label",
        )
        | more
    )
    file.write_text(
        "".join(
            json.dumps(r) + "\n"
            for r in [
                *(row(s, score=float(i)) for i, s in enumerate(samples[:9])),
                row(samples[0], labeller="rm:x"),
                row(samples[0], prompt_id="gone"),
            ]
        )
    )
    with pytest.raises(ValueError, match="labeller: .*human:a, rm:x; name one"):
        label(None, tmp_path, from_labels=str(file))
    counts = label(None, tmp_path, from_labels=str(file), labeller="human:a")
    assert (
        counts["scored"],
        counts["unscored"],
        counts["reasons"],
        counts["labels_without_sample"],
    ) == (9, 14, {"not in the journal": 14}, 1)
    # a person's labels are beside the output now
    with pytest.raises(RecordError, match="paid for"):
        label(None, tmp_path, function="builtins:len")
    file.write_text(json.dumps(row(samples[0], score="9")) + "\n")
    with pytest.raises(RecordError, match="some.jsonl, record 1: field `score`"):
        label(None, tmp_path, from_labels=str(file))


def by_hand(tmp_path, samples, better):
    "A session in which a person prefers what `better` prefers; its comparisons in a journal."
    session = Session(
        tmp_path / "session.jsonl",
        samples,
        choose_pairs(samples, seed=1),
        "human:ann",
        repeats=0.2,
    )
    while (item := session.current) is not None:
        shown = session.show(item)
        session.choose(
            "tie"
            if better(shown["left"]) == better(shown["right"])
            else "left"
            if better(shown["left"]) > better(shown["right"])
            else "right",
            seconds=1.0,
        )
    for r in comparisons(session):
        append_jsonl(tmp_path / "ann.labels.jsonl", r)
    return session


def test_people(tmp_path):
    """What a person said of pairs, through the command: the winner is the one that was chosen,
    whatever side it was on; a tie is no pair.
    """
    samples = make_samples()
    session = by_hand(tmp_path, samples, len)
    counts = label(
        None,
        tmp_path,
        samples,
        from_labels=str(tmp_path / "ann.labels.jsonl"),
        feedback_type="pairwise",
    )
    made = read_records(tmp_path / "feedback.json", "pairwise_feedback")
    for r in made:
        assert (
            r["label"] == (len(r["output_A"][0]["content"]) > len(r["output_B"][0]["content"]))
            and r["reward_difference"] == 1
        )
    assert (
        counts["items"]
        == len({i[1:4] for i in session.items})
        == counts["records"] + counts["ties"]
        and counts["records"] == len(made) > 20
        and counts["position_bias"] == 0 < counts["compared"]
    )
    assert read_jsonl(tmp_path / "feedback.labels.jsonl") == comparisons(session)
    for more, told in [
        (dict(feedback_type="binary"), "feedback_type: .*compared pairs"),
        (dict(threshold=0.5), "threshold: .*no scores"),
        (dict(combine="mean"), "combine: mean needs scores"),
    ]:
        with pytest.raises(ValueError, match=told):
            label(
                None, tmp_path, samples, from_labels=str(tmp_path / "ann.labels.jsonl"), **more
            )
    with pytest.raises(RecordError, match="session.jsonl: .*halos_nb.people.comparisons"):
        label(None, tmp_path, samples, from_labels=str(tmp_path / "session.jsonl"))
    assert (
        label(None, tmp_path, samples[:-1], from_labels=str(tmp_path / "ann.labels.jsonl"))[
            "labels_without_sample"
        ]
        > 0
    )


def test_labellers_together(tmp_path):
    """Mean, vote, and people where the machines disagree, of scores and of scores with
    comparisons.
    """
    samples = make_samples((2, 2))
    rows = {
        name: [
            dict(
                prompt_id=s["prompt_id"],
                sample_id=s["sample_id"],
                labeller=name,
                score=x,
                reason="",
                type="label",
            )
            for s, x in zip(sorted(samples, key=lambda s: (s["prompt_id"], s["sample_id"])), xs)
        ]
        for name, xs in {
            "rm:a": (1.0, 2.0, 5.0, 0.0),
            "api:b": (3.0, 1.0, 9.0, 2.0),
            "human:c": (0.0, 1.0, 0.0, 1.0),
        }.items()
    }
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in sum(rows.values(), [])))
    rewards = lambda: {
        (r["prompt_id"], r["sample_id"]): r["reward"]
        for r in read_records(tmp_path / "feedback.json", "scalar_feedback")
    }
    keys = [(r["prompt_id"], r["sample_id"]) for r in rows["rm:a"]]
    counts = label(None, tmp_path, samples, from_labels=str(file), combine="mean")
    assert [rewards()[k] for k in keys] == pytest.approx([4 / 3, 4 / 3, 14 / 3, 1]) and (
        counts["labellers"],
        counts["disputed_prompts"],
    ) == (3, 2)
    label(None, tmp_path, samples, from_labels=str(file), combine="human-where-they-disagree")
    # the machines agree on the second prompt alone
    assert [rewards()[k] for k in keys] == [0, 1, 1, 0]
    with file.open("a") as f:  # a person who compared; now pairs are what is voted on
        for i in (0, 2):
            f.write(
                json.dumps(
                    dict(
                        prompt_id=keys[i][0],
                        sample_id_A=keys[i][1],
                        sample_id_B=keys[i + 1][1],
                        labeller="human:d",
                        winner="B",
                        reason="",
                        order="AB",
                        type="comparison",
                    )
                )
                + "\n"
            )
    label(None, tmp_path, samples, from_labels=str(file), combine="human-where-they-disagree")
    said = {(s["prompt_id"], s["sample_id"]): s["output"] for s in samples}
    for r in read_records(tmp_path / "feedback.json", "pairwise_feedback"):
        assert (
            r["output_A" if r["label"] else "output_B"][0]["content"]
            == said[r["prompt_id"], 1 if r["prompt_id"] == keys[0][0] else 0]
        )
    for more in (dict(labeller="rm:a", from_labels=str(file)), dict(function="x:y")):
        with pytest.raises(ValueError, match="combine: "):
            LabelConfig(samples_file="s", output_file="f", combine="vote", **more)


def test_options_of_the_command_line():
    """Every option of the predecessor by its name, with its kind of value; the defaults are
    those of the documentation.
    """
    given = parse_args(
        LabelConfig,
        (
            "--reward_model_path rm --feedback_type pairwise --feedback_mode max --threshold "
            "0.5 --batch_size 4 --seed 7 --split test --second_samples_path b.json "
            "--trim_to_sentence --dry_run a.json f.json"
        ).split(),
    )
    assert given == LabelConfig(
        samples_file="a.json",
        output_file="f.json",
        reward_model_path="rm",
        feedback_type="pairwise",
        feedback_mode="max",
        threshold=0.5,
        batch_size=4,
        seed=7,
        split="test",
        second_samples_path="b.json",
        trim_to_sentence=True,
        dry_run=True,
    )
    given = parse_args(
        LabelConfig,
        [
            "--api_type",
            "openai",
            "--api_model",
            "gpt",
            "--system_prompt",
            "You judge.",
            "--label_prompt",
            "Rate.",
            "--feedback_type",
            "binary",
            "--threshold",
            "median",
            "a.json",
            "f.json",
        ],
    )
    assert (given.api_model, given.system_prompt, given.label_prompt, given.threshold) == (
        "gpt",
        "You judge.",
        "Rate.",
        "median",
    )
    assert (
        given.batch_size,
        given.seed,
        given.split,
        given.second_samples_path,
        given.trim_to_sentence,
        given.dry_run,
    ) == (16, 0, None, None, False, False)
    assert given.feedback_mode == "max"
    given = parse_args(
        LabelConfig,
        "--function f:g --feedback_type pairwise --threshold 25% a.json f.json".split(),
    )
    assert (given.threshold, given.feedback_mode) == ("25%", "max")
    given = parse_args(
        LabelConfig, ["--function", "f:g", "--threshold", "prompt mean", "a.json", "f.json"]
    )
    assert given.threshold == "prompt mean"


def test_second_file(folder, tmp_path):
    """The k-th sample of a prompt here against the k-th there, with the scores that each has in
    its own file; broken second files say so.
    """
    samples = make_samples()
    write_records(
        tmp_path / "other.json",
        other := [s | dict(output=s["output"] + " indeed") for s in samples[::-1]],
    )
    alone = {}
    for name, rows in (("first", samples), ("second", other)):
        label(folder, tmp_path, rows)
        alone[name] = {(s["prompt_id"], s["output"]): x for s, x in zip(rows, scores(tmp_path))}
    counts = label(
        folder,
        tmp_path,
        samples,
        second_samples_path=str(tmp_path / "other.json"),
        feedback_type="pairwise",
    )
    assert (
        counts["pairs"]
        == 23
        == counts["first_better"] + counts["second_better"] + counts["equal"]
        and counts["unmatched"] == 0
    )
    for r in read_records(tmp_path / "feedback.json", "pairwise_feedback"):
        sides = [
            (
                "second" if r[k][0]["content"].endswith("indeed") else "first",
                r[k][0]["content"],
                r[v],
            )
            for k, v in (("output_A", "reward_A"), ("output_B", "reward_B"))
        ]
        assert {s for s, _, _ in sides} == {"first", "second"} and r["label"] == (
            r["reward_A"] > r["reward_B"]
        )
        for side, text, reward in sides:
            assert reward == pytest.approx(alone[side][r["prompt_id"], text], abs=1e-5)
    by_id = {
        (s["prompt_id"], f"{name}{s['sample_id']}"): s["output"]
        for name, rows in (("", samples), ("second:", other))
        for s in rows
    }
    for r in read_records(tmp_path / "feedback.json", "pairwise_feedback"):
        for x in "AB":
            key = r["prompt_id"], str(r[f"sample_id_{x}"])
            assert by_id[key] == r[f"output_{x}"][0]["content"]
    for rows, told in [
        (
            [other[0] | dict(prompt=as_turns("?", "user"))],
            "other.json, record 1: field `prompt`",
        ),
        ([other[0] | dict(prompt_id="new")], "no prompt_id of it is in"),
        ([other[0], other[0]], "other.json, record 2: field `sample_id`"),
    ]:
        write_records(tmp_path / "other.json", rows)
        with pytest.raises(RecordError, match=told):
            label(folder, tmp_path, samples, second_samples_path=str(tmp_path / "other.json"))


def test_second_file_whose_ids_are_taken(tmp_path):
    "A first file that was itself made of two: its ids already begin with `second:`."
    first = make_samples((2,))
    first[1] |= dict(sample_id="second:0")
    write_records(tmp_path / "other.json", make_samples((2,)))
    with pytest.raises(RecordError, match="other.json, record 1: .*second:0.* is taken"):
        label(
            None,
            tmp_path,
            first,
            function="builtins:len",
            second_samples_path=str(tmp_path / "other.json"),
        )


@pytest.mark.parametrize("words", ["xxyy", "xxy", "xxxx", "xyxyxxyz", "xxxyyyzz"])
def test_pairs_that_are_asked(words):
    """A judge is asked of every two samples that can be paired: those shuffled to a partner of
    equal words find another.
    """
    prompt = as_turns("Name a star.", "user")
    samples = [
        dict(prompt_id="p", sample_id=i, prompt=prompt, output=x) for i, x in enumerate(words)
    ]
    judge = dict(api_type="openai", api_model="m", judge="pairwise")
    cfg = LabelConfig(samples_file="s", output_file="f", **judge)
    pairs = pairs_to_ask(LabelInput(samples, None, {}), cfg)
    used = [i for pair in pairs for i in pair]
    assert len(used) == len(set(used))
    assert all(words[i] != words[j] for i, j in pairs)
    left = {words[i] for i in range(len(words)) if i not in used}
    assert len(left) <= 1, "two samples with different words were both left out"


def test_trim_to_sentence(folder, tmp_path, rm, tok):
    "Only if asked; what is scored is what stands in the feedback."
    samples = [
        s | dict(output=o)
        for s, o in zip(make_samples((3,)), ("One. Two, th", "One. Two.", "no end"))
    ]
    assert "outputs_trimmed" not in label(folder, tmp_path, samples)
    assert label(folder, tmp_path, samples, trim_to_sentence=True)["outputs_trimmed"] == 1
    cut = [r["output"][0]["content"] for r in read_records(tmp_path / "feedback.json")]
    assert cut == ["One.", "One. Two.", "no end"] and scores(tmp_path) == pytest.approx(
        [
            x.score
            for x in score_samples([s | dict(output=o) for s, o in zip(samples, cut)], rm, tok)
        ],
        abs=1e-5,
    )


def test_dry_run_scores_nothing(folder, tmp_path, capsys):
    counts = label(folder, tmp_path, dry_run=True)
    assert (
        counts["samples"] == 23
        and "second of two logits" in capsys.readouterr().out
        and not (tmp_path / "feedback.labels.jsonl").exists()
    )


@pytest.mark.parametrize("mode", ["random", "max", "min"])
def test_ties_of_given_pairs_are_told_whatever_the_mode(mode):
    samples = make_samples((6,))
    pairs = [(0, 3), (1, 4), (2, 5)]
    scores = [1.0, 2.0, 3.0, 1.0, 2.0, 0.0]  # two pairs are equal
    data = LabelInput(samples, pairs, {})
    cfg = LabelConfig(
        samples_file="",
        output_file="",
        function="rule:of",
        feedback_type="pairwise",
        feedback_mode=mode,
    )
    scored = [Scored(score, "", False) for score in scores]
    records, counts = feedback_from_scores(data, scored, cfg)
    assert (len(records), counts["ties"]) == (1, 2)
    scored[5] = Scored(None, "no word", False)
    assert feedback_from_scores(data, scored, cfg)[1]["ties"] == 2


def count_words(prompt, output):
    "A labeller: how many words."
    return float(len(output.split()))


def answers_of_three_lengths():
    "Per prompt: a short finished answer, a long cut one, a middling finished one."
    rows = []
    for p in range(3):
        prompt = as_turns(f"Question {p}?", "user")
        for k, (words, finished) in enumerate([(1, True), (9, False), (4, True)]):
            rows.append(
                dict(
                    prompt_id=prompt_id(prompt),
                    sample_id=k,
                    prompt=prompt,
                    output="word " * words,
                    output_ids=[words, k, 2],
                    finished=finished,
                    type="sample",
                )
            )
    return rows


def label_lengths(tmp_path, **options):
    "Counts and winners where answers are judged by their length."
    write_records(tmp_path / "samples.json", answers_of_three_lengths())
    counts = main(
        LabelConfig(
            samples_file=str(tmp_path / "samples.json"),
            output_file=str(tmp_path / "feedback.json"),
            feedback_type="pairwise",
            feedback_mode="max",
            **options,
        )
    )
    feedback = read_records(tmp_path / "feedback.json")
    won = {r["sample_id_A" if r["label"] else "sample_id_B"] for r in feedback}
    return counts, won, feedback


@pytest.mark.parametrize(
    "unfinished, winner, counted",
    [
        ("keep", 1, dict(unscored=0, unfinished=3)),
        ("drop", 2, dict(unscored=3, unfinished=3, unfinished_dropped=3)),
        (2.5, 1, dict(unscored=0, unfinished=3, unfinished_penalised=3)),
        (5.5, 2, dict(unscored=0, unfinished=3, unfinished_penalised=3)),
    ],
)
def test_unfinished_answers(tmp_path, monkeypatch, unfinished, winner, counted):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    function = f"{Path(__file__).stem}:count_words"
    counts, won, feedback = label_lengths(tmp_path, function=function, unfinished=unfinished)
    assert won == {winner}
    assert {name: counts[name] for name in counted} == counted
    assert counts["reasons"] == ({"unfinished": 3} if unfinished == "drop" else {})
    # what was drawn is in the pairs, on its side
    for record in feedback:
        for side in "AB":
            words = len(record[f"output_{side}"][0]["content"].split())
            assert record[f"output_ids_{side}"] == [words, record[f"sample_id_{side}"], 2]
            assert record[f"finished_{side}"] == (words != 9)
    # the journal keeps what was said, so another choice costs nothing
    labels = read_jsonl(tmp_path / "feedback.labels.jsonl")
    scores = {r["sample_id"]: r["score"] for r in labels}
    assert scores == {0: 1.0, 1: None if unfinished == "drop" else 9.0, 2: 4.0}
    journal = str(tmp_path / "journal.jsonl")
    (tmp_path / "feedback.labels.jsonl").rename(journal)
    again = label_lengths(tmp_path, from_labels=journal, unfinished=5.5)
    assert again[1] == {2}
    again = label_lengths(tmp_path, from_labels=journal, unfinished="drop")
    assert again[1] == {2}


def score_hundredths(prompt, output):
    "A labeller with a small scale: a hundredth a word."
    return len(output.split()) / 100


HUNDREDTHS = f"{Path(__file__).stem}:score_hundredths"


def test_a_threshold_above_all_differences_tells_the_scale(tmp_path, monkeypatch):
    """What was asked, how far the scores are apart, and what would keep how many; each of these
    thresholds then keeps as many.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(ValueError, match="nothing to learn from") as error:
        label_lengths(tmp_path, function=HUNDREDTHS, threshold=0.5)
    assert str(error.value).splitlines()[1:] == [
        "  threshold 0.5; of 9 differences the median is 0.05, the largest 0.08",
        "  threshold 0% (0) would keep 3 pairs",
        "  threshold 25% (0) would keep 3 pairs",
        "  threshold 50% (0.03) would keep 3 pairs",
    ]
    counts = json.loads((tmp_path / "feedback.counts.json").read_text())
    assert (counts["threshold"], counts["ties"], counts["records"]) == (0.5, 3, 0)
    counts, _, feedback = label_lengths(tmp_path, function=HUNDREDTHS, threshold="50%")
    assert len(feedback) == 3
    assert counts["threshold"] == pytest.approx(0.03)
    with pytest.raises(ValueError, match="threshold 0.08"):
        label_lengths(tmp_path, function=HUNDREDTHS, threshold="100%")


def test_a_share_of_the_differences_of_two_files(tmp_path, monkeypatch, capsys):
    "Of the pairs across them, and of no others."
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    second = [s | dict(output="word " * 6, finished=True) for s in answers_of_three_lengths()]
    write_records(tmp_path / "second.json", second)
    given = dict(function=HUNDREDTHS, second_samples_path=str(tmp_path / "second.json"))
    counts, _, feedback = label_lengths(tmp_path, **given, threshold="50%")
    # 5, 3 and 2 words apart, three times each
    assert counts["threshold"] == pytest.approx(0.02)
    differences = {round(r["reward_difference"], 2) for r in feedback}
    assert (len(feedback), differences, counts["ties"]) == (6, {0.03, 0.05}, 3)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "feedback.json: 6 records, threshold 0.02, ties 3, unfinished 3"


def test_good_for_its_prompt(tmp_path, monkeypatch):
    "Within each prompt one is good; a prompt whose answers are all alike is left out."
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    samples = answers_of_three_lengths()
    alike = as_turns("All alike?", "user")
    for k in range(2):
        answer = dict(sample_id=k, prompt=alike, output=f"word {k}", finished=True)
        samples.append(samples[0] | answer | dict(prompt_id=prompt_id(alike)))
    write_records(tmp_path / "samples.json", samples)
    given = dict(
        samples_file=str(tmp_path / "samples.json"),
        output_file=str(tmp_path / "feedback.json"),
        function=f"{Path(__file__).stem}:count_words",
        feedback_type="binary",
    )
    counts = main(LabelConfig(**given, threshold="prompt mean"))
    feedback = read_records(tmp_path / "feedback.json", "binary_feedback")
    assert [r["label"] for r in feedback] == [0, 1, 0] * 3  # 1, 9 and 4 words
    assert counts["no_contrast"] == counts["unused"] == 2
    assert counts["threshold"] == "prompt mean"
    assert main(LabelConfig(**given))["threshold"] == 4.0  # the median of all
    write_records(tmp_path / "samples.json", samples[-2:])
    with pytest.raises(ValueError, match="nothing to learn from: 1 prompts, 2 no_contrast"):
        main(LabelConfig(**given, threshold="prompt median"))


def test_pairs_of_two_files_without_their_unfinished(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    second = [s | dict(output="word " * 6, finished=True) for s in answers_of_three_lengths()]
    write_records(tmp_path / "second.json", second)
    function = f"{Path(__file__).stem}:count_words"
    counts, _, feedback = label_lengths(
        tmp_path,
        function=function,
        second_samples_path=str(tmp_path / "second.json"),
        unfinished="drop",
    )
    assert counts["unfinished_pairs"] == 3
    assert len(feedback) == counts["second_better"] == 6
    assert all(r["finished_A"] and r["finished_B"] for r in feedback)


def test_a_judge_is_not_asked_about_dropped_answers():
    data = LabelInput(answers_of_three_lengths(), None, {})
    judge = dict(api_type="openai", api_model="toy", judge="pairwise", unfinished="drop")
    cfg = LabelConfig(samples_file="s.json", output_file="f.json", **judge)
    asked = only_finished(data, cfg)
    pairs = pairs_to_ask(asked, cfg)
    assert len(pairs) == 3
    for pair in pairs:
        assert [asked.samples[i]["finished"] for i in pair] == [True, True]


def letters_of_plain(folder, tok, judge, asked):
    "The log-probs of both letters of a question, by plain transformers."
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = encode_all(tok, [letter_turns(judge, asked)], generation_prompt=True)
    with torch.no_grad():
        logps = model(torch.tensor(ids)).logits[0, -1].log_softmax(-1)
    return [logps[tok.convert_tokens_to_ids(letter)].item() for letter in "AB"]


def test_language_model_says_which_of_two_is_better(tmp_path, tok):
    "By its log-probs, as plain transformers has them; a verdict where both orders agree."
    torch.manual_seed(5)
    small_llama(tok, hidden_size=32, initializer_range=0.4).save_pretrained(tmp_path / "lm")
    tok.save_pretrained(tmp_path / "lm")
    samples = make_samples((2, 2, 3, 2, 2, 2, 2, 2))
    samples[0] |= dict(output="much " * 400)
    given = dict(judge_model_path=str(tmp_path / "lm"), max_length=1500, token_budget=4000)
    counts = label(None, tmp_path, samples, label_prompt="Better?", **given)
    rows = read_jsonl(tmp_path / "feedback.labels.jsonl")
    judge = Judge("", "pairwise", label_prompt="Better?")
    known = {(s["prompt_id"], s["sample_id"]): s for s in samples}
    long = 0
    for number, row in enumerate(rows):
        pair = [known[row["prompt_id"], row[f"sample_id_{side}"]] for side in "AB"]
        asked = questions_of_pair(*pair)[number % 2]
        assert asked.ids["order"] == row["order"]
        if row["winner"] is None:
            assert row["reason"] == "the question is longer than 1500 tokens"
            long += 1
            continue
        first, second = letters_of_plain(tmp_path / "lm", tok, judge, asked)
        assert row["logps"] == pytest.approx([first, second], abs=1e-4)
        shown_first = row["order"][0]
        assert (row["winner"] == shown_first) == (first > second)
    assert (len(rows), long) == (16, 2)
    assert counts["questions"] == 16 and 0 < counts["letter_mass"] < 1
    assert counts["reasons"] == {"the question is longer than 1500 tokens": 2}
    assert counts["records"] + counts["ties"] + counts["no_verdict"] == 8
    assert counts["records"] > 0 and counts["order_decided"] > 0
    feedback = read_records(tmp_path / "feedback.json", "pairwise_feedback")
    assert len(feedback) == counts["records"]
    assert {row["labeller"] for row in rows} == {f"lm:{tmp_path / 'lm'}"}
    assert not list(tmp_path.glob("*.lm*"))  # nothing half done is left


@pytest.mark.parametrize(
    "value, score",
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (True, 1.0),
        (np.float32("inf"), None),
        ("5", None),
    ],
)
def test_what_a_function_gives_is_a_number_or_named(value, score):
    "numpy's are numbers, too."
    said = score_with(lambda prompt, output: value, make_samples()[0])
    assert said.score == score and bool(said.reason) == (score is None)


def test_why_nothing_was_scored_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = make_samples()
    write_records("s.json", samples)
    Path("rules.py").write_text("def says(prompt, output):\n    return '5'\n")
    given = dict(samples_file="s.json", output_file="f.json", feedback_type="pairwise")
    told = f"Why unscored: {len(samples)} the function gave '5'"
    with pytest.raises(ValueError, match=told):
        main(LabelConfig(**given, function="rules.py:says"))
    rows = [s | dict(labeller="human:me", score=1.0, reason="", type="label") for s in samples]
    with open("other.jsonl", "w") as file:
        for row in rows:
            file.write(json.dumps(row | dict(sample_id=str(row["sample_id"]))) + "\n")
    with pytest.raises(ValueError, match="Why unscored: "):
        main(LabelConfig(**given | dict(output_file="g.json"), from_labels="other.jsonl"))


def test_what_a_function_dies_of_names_no_key_and_ends_nothing(monkeypatch):
    "A client's error repeats the key it was given; a function that exits ended all with 0."
    key = "sk-" + "Zx9" * 10
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def asks(prompt, output):
        raise RuntimeError(f"401: {key} is no key of ours")

    def leaves(prompt, output):
        sys.exit(0)

    sample = make_samples()[0]
    assert score_with(asks, sample).reason == "RuntimeError: 401: [key] is no key of ours"
    assert key not in score_with(lambda prompt, output: key, sample).reason
    assert score_with(leaves, sample).reason == "SystemExit: 0"


PRINTING = """
import logging, os, sys, warnings
key = os.environ["OPENAI_API_KEY"]
if os.environ.get("AT_ONCE"):
    raise RuntimeError(f"401 for {key}")
def score(prompt, output):
    print("asked with", key)
    print(key[:12], end="")
    print(key[12:])
    logging.error("with %s", key)
    warnings.warn(f"with {key}")
    sys.stderr.write(key)
    return 1.0
"""


@pytest.mark.parametrize("at_once", ["", "1"])
def test_what_a_function_prints_is_in_its_log_without_a_key(tmp_path, at_once):
    "Printed, logged, warned or raised: the stage's streams say it without the key."
    key = "sk-" + "Zx9" * 10
    (tmp_path / "rule.py").write_text(PRINTING)
    write_records(tmp_path / "s.json", make_samples())
    words = f"{tmp_path}/s.json {tmp_path}/f.json --function rule:score --feedback_type binary"
    done = subprocess.run(
        [sys.executable, "-m", "halos_nb.label", *words.split()],
        cwd=tmp_path,
        env=os.environ
        | dict(OPENAI_API_KEY=key, AT_ONCE=at_once, PYTHONPATH=str(Path(__file__).parents[1])),
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert "[key]" in said and "Zx9Zx9" not in said
    assert bool(done.returncode) == bool(at_once)
    for file in tmp_path.glob("f*"):
        assert "Zx9Zx9" not in file.read_text()

"""Evaluation where it could go wrong without a word: units, opponents, answers without a score,
prompts that were trained on.
"""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from halos_nb.configs import EvaluateConfig, LabelConfig, LoopConfig, evaluators, labellers
from halos_nb.evaluate import main
from halos_nb.label import main as label
from halos_nb.label import write_labels
from halos_nb.records import (
    RecordError,
    as_turns,
    prompt_id,
    read_jsonl,
    read_records,
    write_records,
)
from halos_nb.templates import byte_tokenizer

RULES = """
def length(prompt, output):
    open(__file__ + ".asked", "a").write("x")
    return float(len(output))

def nothing(prompt, output):
    return float("nan")
"""


@pytest.fixture
def rules(tmp_path, monkeypatch):
    "A module of labellers under a name of its own."
    name = f"rules_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def answers(outputs):
    "One answer a prompt."
    rows = []
    for i, output in enumerate(outputs):
        prompt = as_turns(f"{i}?", "user")
        row = dict(prompt_id=prompt_id(prompt), sample_id=0, prompt=prompt, output=output)
        rows.append(row | dict(generator="g", dataset="d", split="test", type="sample"))
    return rows


def evaluate(folder, ours, theirs, **more):
    "The evaluation of ours against theirs."
    write_records(folder / "ours.json", ours)
    write_records(folder / "theirs.json", theirs)
    given = dict(samples_file=str(folder / "ours.json"), output_file=str(folder / "out.json"))
    return main(EvaluateConfig(**given, against=[f"b={folder / 'theirs.json'}"], **more))


@pytest.fixture
def models(tmp_path):
    "Two reward models of one opinion, the second's scores a hundred times the first's."
    tok = byte_tokenizer()
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    ids = dict(vocab_size=len(tok), pad_token_id=0, eos_token_id=2, bos_token_id=None)
    config = LlamaConfig(num_labels=1, num_attention_heads=2, **ids, **shape)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    paths = []
    for name in ("a", "b"):
        paths.append(str(tmp_path / name))
        model.save_pretrained(paths[-1])
        tok.save_pretrained(paths[-1])
        model.score.weight.data *= 100
    return paths


def test_several_reward_models_have_one_unit_for_all_files(tmp_path, models, capsys):
    rows = answers("abcdefgh"), answers("ijklmnop")
    evaluate(tmp_path, *rows, reward_model_path=models[0])
    said = [read_jsonl(tmp_path / f"out.{name}.labels.jsonl") for name in ("rm", "rm@b")]
    better, worse = [], []
    for row, other, a, b in zip(*rows, *said):
        better.append(row if a["score"] > b["score"] else other)
        worse.append(other if a["score"] > b["score"] else row)
    both = evaluate(tmp_path, better, worse, reward_model_path=", ".join(models))
    both = both["labellers"]["rm"]
    assert both["against"]["b"]["win_rate"][0] == 1  # in units of its own file it was a half
    assert "standard deviations above the mean of b" in capsys.readouterr().out
    theirs = [row["score"] for row in read_jsonl(tmp_path / "out.rm@b.labels.jsonl")]
    assert sum(theirs) == pytest.approx(0, abs=1e-5)
    assert both["score"][0] > 0.1


def test_nothing_scored_is_unknown_and_no_error(tmp_path, rules):
    rows = answers(["a", "bb", "ccc"])
    found = evaluate(tmp_path, rows, rows, function=f"{rules}:nothing")
    row = found["labellers"]["function"]
    assert (row["score"], row["unscored"]) == ([None] * 3, 3)
    assert row["against"]["b"]["win_rate"] == [None] * 3
    assert row["against"]["b"]["undecided"] == 3
    assert found["decides"]["value"] == [None] * 3


def test_prompts_that_were_trained_on_are_neither_labelled_nor_exported(tmp_path, rules):
    ours, theirs = answers("abcdefghij"), answers(["yy"] * 10)
    write_records(tmp_path / "trained.json", [dict(prompt=row["prompt"]) for row in ours[:8]])
    seen = dict(seen=[str(tmp_path / "trained.json")], alpaca_file=str(tmp_path / "al.json"))
    found = evaluate(tmp_path, ours, theirs, function=f"{rules}:length", **seen)
    assert (found["prompts"], found["seen_prompts"], found["alpaca_answers"]) == (2, 8, 2)
    assert len((tmp_path / f"{rules}.py.asked").read_text()) == 4
    assert len(json.loads((tmp_path / "al.json").read_text())) == 2


def numbered(rows, first=0):
    "The answers with numbers as HALOs has them for the prompts' ids."
    return [row | dict(prompt_id=first + i) for i, row in enumerate(rows)]


def test_a_prompt_that_was_trained_on_is_known_by_its_words(tmp_path, rules):
    "Ids are hashes here and numbers in other tools; numbers of two files say nothing."
    ours, theirs = numbered(answers("abcd")), numbered(answers("efgh"))
    trained = [dict(prompt=row["prompt"]) for row in ours[:3]]
    write_records(tmp_path / "trained.json", trained)
    seen = dict(seen=[str(tmp_path / "trained.json")])
    found = evaluate(tmp_path, ours, theirs, function=f"{rules}:length", **seen)
    assert (found["prompts"], found["seen_prompts"]) == (1, 3)


def test_answers_to_other_prompts_of_the_same_number_are_refused(tmp_path, rules):
    ours, theirs = numbered(answers("abcd")), numbered(answers("efgh"))
    theirs[2]["prompt"] = as_turns("another?", "user")
    with pytest.raises(RecordError, match="theirs.json, record 3: field `prompt` is not that"):
        evaluate(tmp_path, ours, theirs, function=f"{rules}:length")
    assert not (tmp_path / f"{rules}.py.asked").exists()  # before anybody is asked


def test_what_a_number_does_not_rest_on_is_told(tmp_path, rules, capsys):
    "Prompts without an answer of the others, too few answers, words before the last question."
    ours, theirs = answers("abcdefgh"), answers(["yy", "y"])
    ours[0]["prompt"] = theirs[0]["prompt"] = [
        *as_turns("Be brief.", "system"),
        *ours[0]["prompt"],
    ]
    for row in (ours[0], theirs[0]):
        row["prompt_id"] = prompt_id(row["prompt"])
    more = dict(best_of=2, alpaca_file=str(tmp_path / "al.json"))
    evaluate(tmp_path, ours, theirs, function=f"{rules}:length", **more)
    told = capsys.readouterr().out
    assert "(2 comparisons of 2 prompts, 1 ties)" in told
    assert "best of 2 by function: of 0 of 8 prompts, for" in told
    assert "1 of 8 prompts are more than one question" in told


def test_others_that_nobody_has_compared_with_are_told(tmp_path, rules, capsys):
    rows = answers("abcd")
    evaluate(tmp_path, rows, rows, function=f"{rules}:length")
    said = [f"function={tmp_path / 'out.function.labels.jsonl'}"]
    capsys.readouterr()
    found = evaluate(tmp_path, rows, rows, labels=said)
    assert found["labellers"]["function"]["against"] == {}
    assert "b: nobody here says anything of it" in capsys.readouterr().out


def test_who_decides_must_say_something(tmp_path, rules):
    rows = answers(["a", "bb", "ccc"])
    with pytest.raises(
        ValueError, match="decides: zorro says nothing here; known are function"
    ):
        evaluate(tmp_path, rows, rows, function=f"{rules}:length", decides="zorro")
    assert not (tmp_path / f"{rules}.py.asked").exists()  # before anybody is asked
    with pytest.raises(ValueError, match="decides: .*known are b"):
        evaluate(tmp_path, rows, rows, function=f"{rules}:length", decides="function@zorro")
    found = evaluate(tmp_path, rows, rows, function=f"{rules}:length", decides="function@b")
    assert found["decides"]["what"] == "win rate against b by function"


SHORT = dict(system_prompt="Judge.", label_prompt="{prompt} A: {output_A} B: {output_B}")


def test_a_judge_here_compares_in_an_evaluation(tmp_path):
    from tiny_models import save_small

    path = save_small("llama", tmp_path / "lm")
    byte_tokenizer().save_pretrained(path)
    ours, theirs = answers(["ab", "cd"]), answers(["xy", "cd"])
    found = evaluate(tmp_path, ours, theirs, judge_model_path=path, **SHORT)
    row = found["labellers"]["lm"]["against"]["b"]
    assert (row["comparisons"], row["undecided"]) == (2, 0)
    assert found["decides"]["what"] == "win rate against b by lm"


def test_the_score_that_trains_is_judged_on_the_answers_it_meets(tmp_path, rules):
    rows = []
    for number in range(3):
        rows += [row | dict(sample_id=number) for row in answers(["a" * (number + 1)] * 4)]
    label = dict(labeller="rm", reason="", truncated=False, type="label")
    journal = []
    for row in rows:  # the longest is taken for the worst
        score = -5.0 if row["sample_id"] == 2 else float(row["sample_id"])
        journal.append(label | dict(prompt_id=row["prompt_id"], sample_id=row["sample_id"]))
        journal[-1]["score"] = score
    write_labels(tmp_path / "rm.labels.jsonl", journal)
    said = dict(labels=[f"rm={tmp_path / 'rm.labels.jsonl'}"], decides="function")
    [row] = evaluate(tmp_path, rows, rows, function=f"{rules}:length", **said)["orders"]
    assert (row["score"], row["by"], row["pairs"]) == ("rm", "function", 12)
    assert row["right"][0] == pytest.approx(1 / 3, abs=1e-5)


def test_what_length_explains_is_taken_out_of_scores(tmp_path, rules):
    rows = []
    for number, text in enumerate(["a", "bbb", "cc"]):
        rows += [row | dict(sample_id=number) for row in answers([text] * 2)]
    rows[0]["output"] = "?"  # as long as the others say, and better
    with open(tmp_path / f"{rules}.py", "a") as f:
        f.write(
            "\n\ndef asks(prompt, output):\n    return len(output) + 3.0 * ('?' in output)\n"
        )
    write_records(tmp_path / "samples.json", rows)
    given = dict(samples_file=str(tmp_path / "samples.json"), function=f"{rules}:asks")
    out = tmp_path / "out.json"
    counts = label(LabelConfig(output_file=str(out), without_length=True, **given))
    left = [row["reward"] for row in read_records(out)]
    assert counts["length_slope"] == pytest.approx(
        25
    )  # a character: 1 in one prompt, -1/2 in the other
    assert 0 < counts["length_share"] < 1
    assert sum(left) == pytest.approx(1 + 3 + 2 + 3 + 1 + 3 + 2)  # the mean stays
    said = [row["score"] for row in read_jsonl(tmp_path / "out.labels.jsonl")]
    assert sorted(said) == [1, 2, 2, 3, 3, 4]  # as it was given
    pairs = dict(feedback_type="pairwise", without_length=True, feedback_mode="random")
    with pytest.raises(ValueError, match="without_length: a pairwise judge gives no scores"):
        LabelConfig(
            **given | dict(function=None, judge_model_path="lm"), output_file="o", **pairs
        )


def test_a_language_model_here_labels_and_evaluates_in_the_loop():
    given = dict(sft_checkpoint="s", prompts="p", lr=1e-5, judge_model_path="lm")
    cfg = LoopConfig(**given, evaluate_every=1, heldout_prompts="h")
    assert (labellers(cfg), evaluators(cfg)) == (["lm"], ["lm"])
    with pytest.raises(ValueError, match="judge_model_path: given, and nobody asks it"):
        LoopConfig(**given, labeller="rm", reward_checkpoint="r")
    with pytest.raises(ValueError, match="without_length: lm has no scores"):
        LoopConfig(**given, without_length=True)
    asked = LoopConfig(**given, label_options="label_prompt={prompt} {output_A} {output_B}")
    with pytest.raises(ValueError, match="label_options: max_tokens is a judge's"):
        LoopConfig(**given, label_options="max_tokens=3")
    assert asked.feedback_type == "pairwise"

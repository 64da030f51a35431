"Labels reach the pair they were given to, or none: never another's."

import json

import pytest
import torch

from halos_nb import pairs as room
from halos_nb.models import small_llama
from halos_nb.templates import byte_tokenizer
from halos_nb.feedback import (
    convert_to_binary_feedback,
    convert_to_pairwise_feedback,
    convert_to_scalar_feedback,
)
from halos_nb.pairs import (
    as_pairs,
    flag_pair,
    name_by_ids,
    note_pair,
    pair_detail,
    pick,
    prompt_history,
    read_pairs,
)
from halos_nb.records import append_jsonl, as_text, write_records


def scored(*answers, prompt="p"):
    "Samples 0, 1, ... of a prompt from (words, score)."
    return [
        dict(
            prompt_id=prompt,
            sample_id=i,
            prompt=[dict(role="user", content=f"Name a star, {prompt}.")],
            output=words,
            type="sample",
            reward=score,
        )
        for i, (words, score) in enumerate(answers)
    ]


def widest(samples):
    return convert_to_pairwise_feedback(samples, seed=0, mode="max")


def write_journal(file, samples, who="rm:small"):
    for s in samples:
        ids = {k: s[k] for k in ("prompt_id", "sample_id")}
        label = dict(labeller=who, score=s["reward"], reason="", type="label")
        append_jsonl(file, ids | label)


def write_labelled(folder, name, samples, who="rm:small", beside=True):
    "A journal and, where it is wanted, the feedback made with it."
    folder.mkdir(exist_ok=True)
    write_journal(folder / f"{name}.labels.jsonl", samples, who)
    if beside:
        write_records(folder / f"{name}.json", widest(samples))


def write_unscored(folder, samples):
    rows = [{k: v for k, v in s.items() if k != "reward"} for s in samples]
    write_records(folder / "samples.json", rows)


def without_ids(rows):
    return [{k: v for k, v in r.items() if not k.startswith("sample_id")} for r in rows]


def margin_of(record):
    return record["reward_A"] - record["reward_B"]


VEGA = scored(("Vega", 9.0), ("Sol", 1.0))
SOL = scored(("Sol", 1.0), ("Vega", 9.0))


# ---- whose journal


@pytest.mark.parametrize("name", ["fa", "fb"])
def test_the_journal_of_the_file_itself_wins(tmp_path, name):
    write_labelled(tmp_path, "fa", VEGA)
    write_labelled(tmp_path, "fb", SOL)
    pairs = read_pairs(tmp_path / f"{name}.json")
    assert pairs.said == [{"rm:small": margin_of(pairs.records[0])}]
    assert pairs.unknown == 0


def test_a_journal_of_other_samples_says_nothing_also_of_another_labeller(tmp_path):
    write_labelled(tmp_path, "fa", VEGA)
    write_labelled(tmp_path, "fb", SOL, "rm:large")
    write_labelled(tmp_path, "fc", VEGA, "api:judge")
    pairs = read_pairs(tmp_path / "fa.json")
    margin = margin_of(pairs.records[0])
    assert pairs.said == [{"rm:small": margin, "api:judge": margin}]
    (tmp_path / "fc.json").write_text("no feedback")
    assert read_pairs(tmp_path / "fa.json").said == pairs.said, "nothing speaks against it"


def test_journals_that_contradict_each_other_leave_the_pair_unknown(tmp_path):
    other = scored(("Deneb", 4.0), ("Rigel", 2.0), prompt="q")
    write_records(tmp_path / "fa.json", [*widest(VEGA), *widest(other)])
    for name, rows in (("x", VEGA), ("y", SOL)):
        write_labelled(tmp_path, name, [*rows, *other], beside=False)
    pairs = read_pairs(tmp_path / "fa.json")
    assert pairs.said == [{}, {"rm:small": margin_of(pairs.records[1])}]
    assert pairs.unknown == 1
    assert pairs.remarks().startswith("1 without labels")
    write_journal(tmp_path / "fa.labels.jsonl", VEGA)
    pairs = read_pairs(tmp_path / "fa.json")
    assert pairs.said[0] == {"rm:small": margin_of(pairs.records[0])}
    assert pairs.unknown == 0


def test_verdicts_that_contradict_each_other_leave_the_pair_unknown(tmp_path):
    write_records(tmp_path / "fa.json", widest(VEGA))
    row = dict(prompt_id="p", sample_id_A=0, sample_id_B=1, labeller="human:ada")
    row |= dict(reason="", order="AB", type="comparison")
    append_jsonl(tmp_path / "x.labels.jsonl", row | dict(winner="A"))
    assert list(read_pairs(tmp_path / "fa.json").said[0]) == ["human:ada"]
    append_jsonl(tmp_path / "y.labels.jsonl", row | dict(winner="B"))
    pairs = read_pairs(tmp_path / "fa.json")
    assert (pairs.said, pairs.unknown) == ([{}], 1)


# ---- one id, two texts


def test_an_id_of_two_texts_is_unknown_and_not_wrong(tmp_path):
    "Feedback and journals of two rounds were joined, and both number samples from 0."
    apart = scored(("Deneb", 4.0), ("Rigel", 2.0), prompt="q")
    rows = [*widest(VEGA), *widest(SOL), *widest(apart)]
    write_records(tmp_path / "feedback.json", rows)
    write_journal(tmp_path / "feedback.labels.jsonl", [*VEGA, *SOL, *apart])
    pairs = read_pairs(tmp_path / "feedback.json")
    assert pairs.said == [{}, {}, {"rm:small": margin_of(rows[2])}]
    assert pairs.unknown == 2


@pytest.mark.parametrize("convert", [convert_to_scalar_feedback, convert_to_binary_feedback])
def test_joined_scores_never_pair_an_id_with_itself(tmp_path, convert):
    again = scored(("Rigel", -5.0), ("Deneb", -4.0))
    rows = convert([*VEGA, *again])
    pairs = as_pairs(rows)
    words = [{as_text(r["output_A"]), as_text(r["output_B"])} for r in pairs]
    assert words == [{"Vega", "Sol"}, {"Rigel", "Deneb"}]
    assert [{r["sample_id_A"], r["sample_id_B"]} for r in pairs] == [{0, 1}, {0, 1}]
    # the second round has one answer and no pair: its id is doubtful all the same
    write_records(tmp_path / "feedback.json", rows[:3])
    write_journal(tmp_path / "feedback.labels.jsonl", [*VEGA, again[0]])
    pairs = read_pairs(tmp_path / "feedback.json")
    assert (pairs.said, pairs.unknown) == ([{}], 1)


def test_a_sample_and_itself_are_no_pair(tmp_path):
    (record,) = widest(VEGA)
    assert name_by_ids(record) is not None
    same = record | dict(sample_id_A=0, sample_id_B=0)
    assert name_by_ids(same) is None
    write_records(tmp_path / "feedback.json", [same])
    write_unscored(tmp_path, VEGA)
    write_journal(tmp_path / "feedback.labels.jsonl", VEGA)
    pairs = read_pairs(tmp_path / "feedback.json")
    assert (pairs.said, pairs.unknown) == ([{}], 1)


# ---- files without ids


TWICE = scored(("Vega", 9.0), ("Rigel", 3.0), ("Vega", 1.0))


@pytest.mark.parametrize("scores", ["in the samples", "in the journal", "of two labellers"])
@pytest.mark.parametrize("ends", [(0, 1), (1, 2)])
def test_words_said_twice_are_told_apart_by_their_reward(tmp_path, ends, scores):
    rows = widest([TWICE[i] for i in ends])
    write_records(tmp_path / "feedback.json", without_ids(rows))
    write_journal(tmp_path / "feedback.labels.jsonl", TWICE)
    write_unscored(tmp_path, TWICE)
    if scores == "in the samples":
        write_records(tmp_path / "samples.json", TWICE)
    if scores == "of two labellers":
        write_journal(tmp_path / "feedback.labels.jsonl", TWICE, "api:judge")
    pairs = read_pairs(tmp_path / "feedback.json")
    known = scores != "of two labellers"  # whose score the reward is cannot be told
    assert pairs.said == [{"rm:small": margin_of(rows[0])} if known else {}]
    assert (pairs.unknown, pairs.by_text) == ((0, 1) if known else (1, 0))


def test_words_that_stay_ambiguous_are_left_out(tmp_path):
    same = scored(("Vega", 9.0), ("Rigel", 3.0), ("Vega", 9.0))
    write_records(tmp_path / "feedback.json", without_ids(widest(same)))
    write_records(tmp_path / "samples.json", same)
    write_journal(tmp_path / "feedback.labels.jsonl", same)
    pairs = read_pairs(tmp_path / "feedback.json")
    assert (pairs.said, pairs.unknown, pairs.by_text) == ([{}], 1, 0)


def test_a_samples_file_of_two_rounds_names_no_pair(tmp_path):
    write_records(tmp_path / "feedback.json", without_ids(widest(VEGA)))
    samples = [*VEGA, *scored(("Rigel", 0.0), ("Deneb", 2.0))]
    write_unscored(tmp_path, samples)
    write_journal(tmp_path / "feedback.labels.jsonl", samples)
    pairs = read_pairs(tmp_path / "feedback.json")
    assert (pairs.said, pairs.unknown) == ([{}], 1)


def test_a_record_without_ids_leaves_the_others_their_labels(tmp_path):
    apart = scored(("Deneb", 4.0), ("Rigel", 2.0), prompt="q")
    rows = [*widest(VEGA), *without_ids(widest(apart))]
    write_records(tmp_path / "feedback.json", rows)
    write_journal(tmp_path / "feedback.labels.jsonl", [*VEGA, *apart])
    pairs = read_pairs(tmp_path / "feedback.json")
    assert pairs.said == [{"rm:small": margin_of(rows[0])}, {}]
    assert (pairs.unknown, pairs.by_text) == (1, 0)


# ---- flags


def test_a_flag_stays_in_its_round(tmp_path):
    for name in ("round-1", "round-2"):
        write_labelled(tmp_path / name, "feedback", VEGA)
    flag_pair(read_pairs(tmp_path), 0)
    assert read_pairs(tmp_path).flags == {0}
    flag_pair(read_pairs(tmp_path), 1)
    flag_pair(read_pairs(tmp_path), 0, on=False)
    assert read_pairs(tmp_path).flags == {1}


@pytest.mark.parametrize("text", ["", "again", "<b>x</b>"])
def test_a_note_is_the_last_one_and_flags_stay(tmp_path, text):
    write_labelled(tmp_path / "round-1", "feedback", VEGA)
    flag_pair(read_pairs(tmp_path), 0)
    note_pair(read_pairs(tmp_path), 0, "first")
    note_pair(read_pairs(tmp_path), 0, f" {text} ")
    pairs = read_pairs(tmp_path)
    assert (pairs.flags, pairs.notes) == ({0}, {0: text} if text else {})


def test_marks_of_two_runs_stay_in_their_runs(tmp_path):
    for name in ("a/round-1", "b/round-1", "deep/b/round-1"):
        (tmp_path / name).mkdir(parents=True)
        write_labelled(tmp_path / name, "feedback", VEGA)
    both = read_pairs([tmp_path / "a", tmp_path / "b", tmp_path / "deep/b"])
    assert both.names == ["a round-1", "b (2) round-1", "b (3) round-1"]
    flag_pair(both, 1)
    note_pair(both, 2, "third")
    assert read_pairs(tmp_path / "a").flags == set()
    assert read_pairs(tmp_path / "b").flags == {0}
    assert read_pairs(tmp_path / "deep/b").notes == {0: "third"}
    again = read_pairs([tmp_path / "deep/b", tmp_path / "b"])
    assert (again.flags, again.notes) == ({1}, {0: "third"})
    assert len(prompt_history(again, 0)) == 2


# ---- what a reward model was judged by


def judged(texts, max_length):
    "Held-out records of pairs (chosen, rejected), scored by their lengths."
    from halos_nb.data import Dataset, Example
    from halos_nb.loaders import PairedPreferenceDataLoader
    from halos_nb.templates import byte_tokenizer
    from halos_nb.train import held_out_record
    from halos_nb.tree_trainer import PairScore

    data = Dataset("held out")
    for number, answers in enumerate(texts):
        prompt = [dict(role="user", content=f"{number}?")]
        turns = [[dict(role="assistant", content=text)] for text in answers]
        example = Example(prompt=prompt, prompt_id=number, generations=turns, pairs=[(0, 1)])
        data.data[number] = example
    loader = PairedPreferenceDataLoader(
        data, byte_tokenizer(), max_length=max_length, max_prompt_length=40
    )
    scores = [PairScore(k, *map(float, map(len, pair))) for k, pair in enumerate(texts)]
    return [held_out_record(loader, one) for one in scores]


def test_where_a_reward_model_stopped_reading(tmp_path):
    long = "Ein Täßchen Kaffee, dann weiter. " * 9
    records = judged([("short", long), (long, "short"), ("one", "two three")], 120)
    cuts = [(r["cut_A"], r["cut_B"]) for r in records]
    assert cuts[0][0] is None and cuts[1][1] is None and cuts[2] == (None, None)
    assert cuts[0][1] == cuts[1][0] and 20 < cuts[0][1] < 120
    (tmp_path / "rm").mkdir()
    write_records(tmp_path / "rm/eval_pairs.json", records)
    pairs = read_pairs(tmp_path)
    assert pairs.names == ["rm"]
    # longer is better to this model: two of three are wrong, the surest first
    assert pick(pairs, wrong=True, sort="near", down=True).tolist() == [0, 2]
    assert pick(pairs, part="cut at max_length").tolist() == [0, 1]
    assert pick(pairs, part="the chosen is longer").tolist() == [1]
    detail = pair_detail(pairs, 0)
    assert detail["A"]["cut"] is None
    assert long.startswith(detail["B"]["text"][: detail["B"]["cut"]])


def test_seeds_of_a_reward_model_are_rounds(tmp_path):
    for name in ("rm", "rm-s1", "rm-s2"):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / "eval_pairs.json", judged([("a b", "c")], 99))
    pairs = read_pairs(tmp_path)
    assert pairs.names == ["rm", "rm-s1", "rm-s2"]
    assert pairs.same[pairs.records[0]["prompt_id"]] == [0, 1, 2]


# ---- what training changed


def trained_run(folder):
    "A run with two policies of fresh weights and a round's pairs."
    tok = byte_tokenizer()
    places = dict(sft=folder / "sft", now=folder / "run/round-1/policy/FINAL")
    for seed, place in enumerate(places.values()):
        torch.manual_seed(seed)
        small_llama(tok, hidden_size=32, initializer_range=0.2).save_pretrained(place)
        tok.save_pretrained(place)
    run = folder / "run"
    (run / "policy").symlink_to("round-1/policy/FINAL")
    told = dict(parameters=dict(sft_checkpoint=str(places["sft"]), max_length=64))
    (run / "params.json").write_text(json.dumps(told), "utf-8")
    samples = scored(("Vega", 1.0), ("Sirius, I am sure.", 0.0)) + scored(
        ("Deneb", 2.0), ("Mars", -1.0), prompt="q"
    )
    write_records(run / "round-1/feedback.json", widest(samples))
    return run


def test_policies_are_asked_once_about_what_is_shown(tmp_path):
    "By a stage of its own; a policy that trains on is asked anew, and what it said stays."
    run = trained_run(tmp_path)
    pairs = read_pairs(run)
    assert room.ask_policies(pairs, [0], show=False) == 2
    assert room.is_told(pairs, 0) and not room.is_told(pairs, 1)
    assert room.ask_policies(pairs, [0], show=False) == 0  # nothing is started
    told = room.change_detail(read_pairs(run), 0)
    assert told["scale"].startswith("log-prob under run/round-1 minus log-prob under ")
    words = as_text(pairs.records[0]["output_A"])
    assert "".join(cell[0] for cell in told["A"]["tokens"]).startswith(words)
    [row, _] = [json.loads(x) for x in (run / "rescore/tokens.jsonl").open(encoding="utf-8")]
    changes = [a - b for a, b in zip(row["policy_logps"], row["reference_logps"])]
    assert told["A"]["words"].startswith(room.minus(f"{sum(changes):+.2f} nats over "))
    # another policy
    config = run / "round-1/policy/FINAL/config.json"
    config.write_text(config.read_text("utf-8") + "\n", "utf-8")
    assert room.change_detail(read_pairs(run), 0) is None
    # no policy at all: what was told last is still known
    (run / "policy").unlink()
    assert room.change_scale(read_pairs(run), 0) == told["scale"]
    with pytest.raises(ValueError, match="has no policy"):
        room.ask_policies(read_pairs(run), [1])

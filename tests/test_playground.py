"""The playground's world.

A reward that any text gets, data that is the same every time, a tokenizer that loses nothing.
"""

import json
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from halos_nb.templates import encode
from halos_nb.configs import HandConfig, LoopConfig, RewardConfig
from halos_nb.playground import (
    ANIMALS,
    ASKED,
    BEST,
    COURTEOUS,
    EVASIVE,
    FACTS,
    MANNERS,
    MEASURES,
    QUESTIONS,
    RUDE,
    SAID,
    STATEMENTS,
    WEIGHTS,
    Playground,
    asked,
    fresh_policy,
    into_playground,
    locate,
    make_data,
    pairs_of_playground,
    prompts,
    shared_questions,
    split_questions,
    true_reward,
    true_reward_parts,
)
from halos_nb.records import (
    PairwiseFeedback,
    Sample,
    as_text,
    file_hash,
    prompt_id,
    write_records,
)
from halos_nb.settings import Settings

PROMPTS = prompts()
ASKED_IN = {question.lower(): animal for question, (animal, _) in ASKED.items()}
SENTENCES = sorted({*SAID, *COURTEOUS, *RUDE, *EVASIVE})
a_prompt = st.sampled_from(PROMPTS)
a_sentence = st.sampled_from(SENTENCES) | st.text(max_size=20)
a_text = st.text(max_size=200) | st.lists(a_sentence, max_size=8).map(" ".join)
a_role = st.sampled_from(["system", "user", "assistant"])
a_turn = st.fixed_dictionaries(dict(role=a_role, content=st.text(max_size=60)))
any_prompt = a_prompt | st.lists(a_turn, max_size=3)


def right_answers(prompt):
    animal, topic = asked(prompt)
    return [s.format(animal, FACTS[animal, topic]) for s in STATEMENTS[topic]]


# ---- the true reward


@given(any_prompt, a_text)
@settings(max_examples=300, deadline=None)
def test_any_text_gets_a_reward(prompt, text):
    reward = true_reward(prompt, text)
    assert 0 <= reward <= BEST and reward == true_reward(prompt, text)
    assert reward == true_reward(prompt, [{"role": "assistant", "content": text}])


@given(a_prompt, st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_gibberish_is_worth_nothing(prompt, text):
    assert true_reward(prompt, text) == 0


def test_every_prompt_has_a_best_answer():
    assert sum(WEIGHTS.values()) == pytest.approx(BEST)
    for p in PROMPTS:
        for courtesy in COURTEOUS:
            for answer in right_answers(p):
                assert true_reward(p, f"{courtesy} {answer}") == BEST


@given(a_prompt, st.lists(st.sampled_from(SENTENCES), max_size=6).map(" ".join))
@settings(max_examples=300, deadline=None)
def test_only_a_good_answer_is_best(prompt, text):
    best = {f"{c} {a}" for c in COURTEOUS for a in right_answers(prompt)}
    assert (true_reward(prompt, text) == BEST) == (text in best)


@given(a_prompt, st.sampled_from(COURTEOUS), st.sampled_from(RUDE), st.data())
@settings(max_examples=100, deadline=None)
def test_each_fault_costs(prompt, kind, rude, data):
    fact = data.draw(st.sampled_from(right_answers(prompt)))
    animal, topic = asked(prompt)
    values = {value for (_, t), value in FACTS.items() if t == topic}
    false = data.draw(st.sampled_from(sorted(values - {FACTS[animal, topic]})))
    other = data.draw(st.sampled_from(sorted(set(ANIMALS) - {animal})))
    wrong = STATEMENTS[topic][0].format(animal, false)
    worse = [
        fact,
        f"{kind} {wrong}",
        f"{kind} {fact} {fact}",
        f"{kind} {fact} {wrong}",
        f"{rude} {fact}",
        f"{kind} {fact[:-1].rsplit(' ', 1)[0]}",
        f"{kind} {STATEMENTS[topic][0].format(other, FACTS[other, topic])}",
        f"{kind} {EVASIVE[0]}",
        kind,
        EVASIVE[0],
        rude,
        "",
    ]
    assert max(true_reward(prompt, w) for w in worse) < BEST
    assert true_reward(prompt, f"{rude} {fact}") < true_reward(prompt, fact)


def test_saying_everything_is_no_answer():
    for p in PROMPTS[:20]:
        everything = " ".join([COURTEOUS[0], *SENTENCES])
        animal, topic = asked(p)
        assert true_reward(p, everything) <= WEIGHTS["courteous"]
        # about the right thing, but everything
        about_it = [s for s, (a, t, _) in SAID.items() if (a, t) == (animal, topic)]
        all_of_it = " ".join([COURTEOUS[0], *about_it])
        assert true_reward(p, all_of_it) <= WEIGHTS["courteous"] + WEIGHTS["subject"]


def test_the_last_turn_is_what_is_asked():
    owl = {"role": "user", "content": "Where does the owl live?"}
    cow = {"role": "user", "content": "Where does the cow live?"}
    answer = {"role": "assistant", "content": "Happily! The owl lives in a hollow tree."}
    kind = {"role": "system", "content": "Be kind."}
    assert asked([owl, answer, cow]) == ("cow", "home")
    assert asked([kind, owl]) == asked([owl]) == ("owl", "home")
    assert asked([]) is None
    assert asked([{"role": "user", "content": "Who won?"}]) is None
    assert not true_reward_parts([], "The owl lives in a hollow tree.")["subject"]


# ---- prompts and data


def test_prompts_are_distinct_and_cover_the_world():
    assert len({prompt_id(p) for p in PROMPTS}) == len(PROMPTS) >= 640
    assert prompts() == PROMPTS
    assert {asked(p) for p in PROMPTS} == set(FACTS) == set(ASKED.values())
    # every fact is asked for equally often
    assert len(set(Counter(asked(p) for p in PROMPTS).values())) == 1


@pytest.fixture(scope="module")
def data():
    return make_data(n_sft=400, n_pairs=400, n_test=100)


def test_data_is_the_same_every_time(data):
    assert json.dumps(make_data(n_sft=400, n_pairs=400, n_test=100)) == json.dumps(data)


def test_data_are_records(data):
    for r in data["sft"] + data["samples"]:
        Sample(**r)
    for r in data["pairs_train"] + data["pairs_test"]:
        PairwiseFeedback(**r)
    for r in data["sft"] + data["samples"] + data["pairs_train"] + data["pairs_test"]:
        assert r["prompt_id"] == prompt_id(r["prompt"])
    assert len({prompt_id(r["prompt"]) for r in data["prompts"]}) == len(data["prompts"]) >= 640
    assert len({prompt_id(r["prompt"]) for r in data["heldout"]}) == len(data["heldout"]) >= 200


# ---- what nobody trains on: questions, whatever the manner of asking

SEEDS = range(3)


def question_texts(rows):
    "The questions of some records as words, their manner taken off here and not by the world."
    texts = set()
    for row in rows:
        text = as_text(row["prompt"][-1:]).removesuffix("?")
        for manner in MANNERS:
            before = manner.removesuffix("{}?")
            if before and text.startswith(before):
                text = text.removeprefix(before)
        texts.add(text.lower())
    return texts


@pytest.fixture(scope="module")
def worlds(data):
    "The data of a few seeds; few rows, but all prompts."
    return [make_data(n_sft=2000, n_pairs=600, n_test=200, seed=seed) for seed in SEEDS]


@pytest.mark.parametrize("seed", SEEDS)
def test_held_out_prompts_share_no_question_with_anything_trained_on(worlds, seed):
    files = {name: question_texts(rows) for name, rows in worlds[seed].items()}
    assert files.keys() == {"sft", "pairs_train", "prompts", "samples", "pairs_test", "heldout"}
    trained = files["sft"] | files["pairs_train"] | files["prompts"] | files["samples"]
    for name in MEASURES:
        assert len(files[name]) == 18 and not files[name] & trained
    # what is labelled by hand is new to the policy too
    assert not files["samples"] & (files["sft"] | files["pairs_train"] | files["prompts"])
    assert set.union(*files.values()) == {question.lower() for question in ASKED}
    # nothing else is held out: every fact, every wording and every manner is trained on
    for name in ("sft", "prompts", "pairs_train"):
        rows = worlds[seed][name]
        assert {asked(row["prompt"]) for row in rows} == set(FACTS)
    wordings = {question.replace(ASKED_IN[question], "") for question in files["prompts"]}
    assert len(wordings) == sum(map(len, QUESTIONS.values()))


def test_the_table_of_questions_sees_one_leak(worlds):
    world = worlds[0]
    assert {row["file"]: row["held out"] for row in shared_questions(world)} == {
        "sft.json": 0,
        "pairs_train.json": 0,
        "samples.json": 0,
        "prompts.json": 0,
        "pairs_test.json": 18,
        "heldout.json": 18,
    }
    # another manner does not make another question
    leak = dict(
        prompt=[
            {
                "role": "user",
                "content": "Say, friend, " + as_text(world["heldout"][0]["prompt"]).lower(),
            }
        ]
    )
    table = shared_questions(world | dict(pairs_train=[*world["pairs_train"], leak]))
    assert {row["file"]: row["held out"] for row in table}["pairs_train.json"] == 1


def test_every_question_is_in_one_part():
    for seed in range(20):
        parts = split_questions(seed)
        everything = sum(parts.values(), [])
        assert sorted(everything) == sorted(ASKED)
        for name in ("by_hand", "held_out"):
            # each fact and each wording once
            assert {ASKED[question] for question in parts[name]} == set(FACTS)
            wordings = {question.replace(ASKED[question][0], "{}") for question in parts[name]}
            assert wordings == set(sum(QUESTIONS.values(), []))


def test_a_seed_decides_the_world(worlds):
    held_out = [split_questions(seed)["held_out"] for seed in range(20)]
    assert len(set(map(str, held_out))) == 20
    sft = [json.dumps(world["sft"]) for world in worlds]
    assert len(set(sft)) == len(worlds)
    again = make_data(n_sft=2000, n_pairs=600, n_test=200, seed=2)
    assert json.dumps(again) == json.dumps(worlds[2])


def test_worlds_have_folders_of_their_own(tmp_path):
    settings = Settings(runs_dir=str(tmp_path))
    folders = [locate(settings, seed).folder for seed in range(3)]
    assert [f.name for f in folders] == ["playground", "playground-1", "playground-2"]
    assert [locate(settings, seed).seed for seed in range(3)] == [0, 1, 2]


def test_a_world_that_is_there_is_not_written_again(data, tmp_path, monkeypatch):
    from halos_nb import ledger, playground

    monkeypatch.setattr(playground, "make_data", lambda seed: data)
    for stage in ("policy_stage", "reward_stage"):
        monkeypatch.setattr(playground, stage, lambda world: None)
    monkeypatch.setattr(ledger.Ledger, "run", lambda *stage, **then: None)
    settings = Settings(runs_dir=str(tmp_path))

    def build():
        files = [playground.build(settings).folder / f"{name}.json" for name in data]
        return {file: (file.stat().st_ino, file.read_bytes()) for file in files}

    there = build()
    assert build() == there
    # what is damaged, is
    damaged, lost, *others = there
    damaged.write_bytes(there[damaged][1].replace(b"a", b"b", 1))
    lost.unlink()
    again = build()
    assert all(again[file] == there[file] for file in others)
    assert all(again[file][1] == there[file][1] for file in (damaged, lost))


def test_a_world_seed_that_decides_nothing_is_refused(tmp_path):
    own = dict(sft_checkpoint="gpt2", reward_checkpoint="rm", prompts="shp", lr=1e-5)
    with pytest.raises(ValueError, match="world_seed: 3 would decide nothing"):
        into_playground(LoopConfig(**own, world_seed=3), Settings(runs_dir=str(tmp_path)))
    pairs = dict(train_datasets="shp", test_datasets="shp")
    with pytest.raises(ValueError, match="world_seed: 3 would decide nothing"):
        pairs_of_playground(RewardConfig(**pairs, world_seed=3), Settings())
    with pytest.raises(ValueError, match="world_seed: it decides nothing"):
        HandConfig(samples="s.json", model="m", lr=1e-5, world_seed=3)
    assert not list(tmp_path.iterdir())


def test_some_training_labels_are_wrong_and_there_is_headroom(data):
    def wrong(r):
        reward_a = true_reward(r["prompt"], r["output_A"])
        reward_b = true_reward(r["prompt"], r["output_B"])
        return (reward_a > reward_b) != bool(r["label"])

    assert 0.02 < sum(map(wrong, data["pairs_train"])) / 400 < 0.09
    assert not any(map(wrong, data["pairs_test"]))
    assert 0.35 < sum(r["true_reward"] for r in data["sft"]) / 400 < 0.65


# ---- tokenizer and template


@pytest.fixture(scope="module")
def tokenizer(data, tmp_path_factory):
    from halos_nb.models import load_tokenizer

    world = Playground(tmp_path_factory.mktemp("playground"))
    write_records(world.sft, data["sft"])
    return load_tokenizer(str(fresh_policy(world)))


def test_markers_are_single_tokens(tokenizer):
    for marker in ("<|pad|>", "<|im_start|>", "<|im_end|>"):
        assert len(tokenizer(marker, add_special_tokens=False)["input_ids"]) == 1
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) <= 1024


@given(st.text(max_size=100))
@settings(max_examples=200, deadline=None)
def test_tokenizer_loses_nothing(tokenizer, text):
    if any(m in text for m in tokenizer.all_special_tokens):
        return
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_all_bytes_are_in_the_alphabet(tokenizer):
    from tokenizers import pre_tokenizers

    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())


def test_template_gives_the_expected_ids(tokenizer):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Where does the owl live?"},
        {"role": "assistant", "content": "Happily! The owl lives in a hollow tree."},
    ]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = []
    for turn in turns:
        whole += [start, *ids(f"{turn['role']}\n{turn['content']}"), end, *ids("\n")]
    assert encode(tokenizer, turns) == whole
    prompt = encode(tokenizer, turns[:2], generation_prompt=True)
    assert prompt == encode(tokenizer, turns[:2]) + [start, *ids("assistant\n")]
    assert whole[: len(prompt)] == prompt


def test_start_is_the_same_every_time(data, tmp_path):
    worlds = [
        Playground(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    for world in worlds:
        world.folder.mkdir()
        write_records(world.sft, data["sft"])
    a, b, c = map(fresh_policy, worlds)
    assert a.name == b.name and file_hash(a) == file_hash(b)
    # the same texts and so the same tokens, but other first weights
    assert file_hash(a / "tokenizer.json") == file_hash(c / "tokenizer.json")
    assert file_hash(a / "model.safetensors") != file_hash(c / "model.safetensors")

"""What a policy reads, what it said and what ends a turn: templates and tokenizers that went
wrong, each as the smallest of its kind.
"""

import json
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from halos_nb.records import Drawn, RecordError, as_turns, write_records
from halos_nb.configs import TrainConfig
from halos_nb.data import Dataset, Example, get_feedback, get_preferences
from halos_nb.loaders import (
    ConditionalSFTDataLoader,
    PairedPreferenceDataLoader,
    SFTDataLoader,
    UnpairedPreferenceDataLoader,
    add_control_tokens,
)
from halos_nb.templates import (
    MISSING,
    Answer,
    byte_tokenizer,
    check_template,
    encode,
    encode_answers,
    encode_prompts,
    end_ids,
    put_chatml,
    render,
    set_template_options,
    template_oddities,
    tokenizer_hash,
)
from halos_nb.trees import trees_from_samples

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPENS_THOUGHTS = (
    TURN + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
EMPTY_THOUGHTS = (
    TURN + "{% if m.role == 'assistant' and loop.last %}"
    "{% set parts = m.content.split('</think>') %}<think>\n"
    "{{ parts[0].split('<think>')[-1] if parts | length > 1 else '' }}\n</think>\n\n"
    "{{ parts[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
SPACE_BEFORE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST] "
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system turn here') }}{% endif %}<|im_start|>{{ m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}" + ASK
)
TOOLS = (
    "{{ tools | length if tools else 0 }} tools\n"
    + TURN
    + (
        "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
        "<|im_end|>\n{% endfor %}" + ASK
    )
)
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('need system') }}{% endif %}"
    + TURN
    + "{{ m.content }}<|im_end|>\n{% endfor %}"
    + ASK
)
ENDS_ELSEWHERE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|pad|>\n{% endfor %}"
    + ASK
)


def with_template(template, *tokens):
    "A tokenizer of bytes with this template; `tokens` are added, not special."
    tok = byte_tokenizer()
    tok.chat_template = template
    tok.add_tokens([AddedToken(t, normalized=False) for t in tokens])
    return tok


def melting():
    "A small byte-pair tokenizer in which ` yes` and ` no` are one token with the space."
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["it is yes yes yes no no no"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", chat_template=SPACE_BEFORE
    )


def pairs_of(*rows):
    names = ("prompt", "chosen", "rejected")
    return get_preferences([dict(zip(names, row)) for row in rows])


def said(tok, tree, k):
    "The targets of a branch, as text."
    return tok.decode(tree.branches[k][tree.skip[k] :], clean_up_tokenization_spaces=False)


def asked(tok, text="Q?"):
    [prompt] = encode_prompts(tok, [as_turns(text, "user")], 999, Counter())
    return prompt


def targets(tok, answer, whole=False, counts=None, prompt=None):
    prompt = prompt or asked(tok)
    counts = Counter() if counts is None else counts
    [(ids, context)] = encode_answers(tok, [prompt], [answer], counts, whole)
    assert ids[:context] == prompt.ids[:context]
    return ids[context:]


# ---- offline text


def test_thoughts_that_a_finished_turn_drops_are_targets():
    tok = with_template(OPENS_THOUGHTS, "<think>", "</think>")
    answers = "I add.\n</think>\nA", "I guess.\n</think>\nB"
    loader = PairedPreferenceDataLoader(pairs_of(("1+1?", *answers)), tok)
    [tree] = loader.trees
    assert tok.decode(tree.prompt_ids).endswith("<|im_start|>assistant\n<think>\n")
    assert [said(tok, tree, k) for k in (0, 1)] == [a + "<|im_end|>" for a in answers]
    assert loader.counts["put_together"] == 2
    [one] = SFTDataLoader(pairs_of(("1+1?", "A", "B")), tok).trees
    assert said(tok, one, 0) == "A<|im_end|>"


def test_a_token_that_melts_into_the_prompt_is_a_target():
    tok = melting()
    [tree] = PairedPreferenceDataLoader(pairs_of(("Is it?", "yes", "no")), tok).trees
    shown = [tok.convert_ids_to_tokens(b[s:]) for b, s in zip(tree.branches, tree.skip)]
    assert shown == [["Ġyes", "<eos>"], ["Ġno", "<eos>"]]


def test_only_what_melts_is_a_target():
    tok = melting()
    [tree] = PairedPreferenceDataLoader(pairs_of(("Is it?", "yes", "Maybe")), tok).trees
    assert [said(tok, tree, k) for k in (0, 1)] == [" yes<eos>", "Maybe<eos>"]


def test_a_block_that_a_template_adds_is_a_target_unless_the_prompt_has_it():
    tok = with_template(EMPTY_THOUGHTS, "<think>", "</think>")
    block = "<think>\n\n</think>\n\n"
    answer = Answer(as_turns("A"))
    assert tok.decode(targets(tok, answer)) == block + "A<|im_end|>"
    set_template_options(tok, "enable_thinking=false")
    assert render(tok, as_turns("Q?", "user"), True).endswith(block)
    assert tok.decode(targets(tok, answer)) == "A<|im_end|>"


def test_what_stands_behind_the_end_is_read_by_reward_models_only():
    tok = byte_tokenizer()
    turns = as_turns("Q?", "user") + as_turns("A")
    answer = Answer(as_turns("A"))
    assert asked(tok).ids + targets(tok, answer, whole=True) == encode(tok, turns)
    assert tok.decode(targets(tok, answer)) == "A<|im_end|>"


ALL = [byte_tokenizer(), with_template(EMPTY_THOUGHTS), with_template(OPENS_THOUGHTS)]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.sampled_from(ALL))
def test_the_words_of_any_answer_are_targets(text, tok):
    ids = targets(tok, Answer(as_turns(text)))
    decoded = tok.decode(ids, clean_up_tokenization_spaces=False)
    assert decoded.endswith(text.split("</think>")[-1] + "<|im_end|>")
    assert ids[-1:] == end_ids(tok)


def test_several_turns_have_no_place_in_a_template_that_rewrites():
    tok = with_template(OPENS_THOUGHTS)
    output = as_turns("A") + as_turns("More?", "user") + as_turns("B")
    with pytest.raises(RecordError, match="f.json, record 7: .*several turns"):
        encode_answers(
            tok, [asked(tok)], [Answer(output)], Counter(), wheres=["f.json, record 7"]
        )
    tok = byte_tokenizer()
    assert tok.decode(targets(tok, Answer(output))).count("<|im_end|>") == 3


def test_tools_and_tool_calls_reach_the_template():
    tok = with_template(TOOLS)
    call = dict(type="function", function=dict(name="f", arguments=dict(a=1)))
    prompt = [dict(role="user", content="w?", tools=[dict(name="f"), dict(name="g")])]
    data = Dataset("t")
    output = [dict(role="assistant", content="", tool_calls=[call])]
    data.data[0] = Example(prompt, "p", [output], sft_index=0)
    loader = SFTDataLoader(data, tok)
    [tree] = loader.trees
    assert tok.decode(tree.prompt_ids).startswith("2 tools\n")
    assert json.loads(said(tok, tree, 0).removesuffix("<|im_end|>")) == call
    assert loader.counts["empty_completions"] == 0


def test_tools_stay_when_the_turn_they_ride_on_is_dropped():
    tok = with_template(TOOLS)
    talk = [
        dict(role="user", content="long " * 30, tools=[dict(name="f")]),
        dict(role="assistant", content="A"),
        dict(role="user", content="short?"),
    ]
    counts = Counter()
    [prompt] = encode_prompts(tok, [talk], 90, counts)
    assert counts["prompts_shortened"] == 1
    assert tok.decode(prompt.ids).startswith("1 tools\n")
    assert "long" not in tok.decode(prompt.ids)


def test_pairs_that_the_template_or_the_cut_makes_equal_are_passed_over():
    tok = with_template(NO_SYSTEM)
    rows = ("Q?", "same", " same "), ("Q2?", "yes", "no"), ("Q3?", "a" * 90, "a" * 90 + "b")
    loader = PairedPreferenceDataLoader(pairs_of(*rows), tok, max_length=100)
    assert loader.counts["equal_pairs"] == 2
    assert [said(tok, t, 0) for t in loader.trees] == ["yes<|im_end|>"]
    assert [len(step.batches[0].trees) for step in loader] == [1]
    with pytest.raises(ValueError, match="no trainable example.*1 equal_pairs"):
        PairedPreferenceDataLoader(pairs_of(rows[0]), tok)


# ---- what was drawn


def drawn(tok, ids, finished=True, **more):
    return Drawn(ids, finished, tokenizer=tokenizer_hash(tok), **more)


def test_drawn_ids_are_trained_as_they_are():
    "Broken bytes and unusual cuts of words; other ids of the same text are another answer."
    tok = melting()
    yes = [*tok.encode("y"), *tok.encode("es"), *end_ids(tok)]
    counts = Counter()
    assert targets(tok, Answer(as_turns("yes"), drawn(tok, yes)), counts=counts) == yes
    broken = [tok.convert_tokens_to_ids("Ã"), *end_ids(tok)]
    assert tok.decode(broken[:1]) == "\ufffd"
    answer = Answer(as_turns("\ufffd"), drawn(tok, broken))
    assert targets(tok, answer, counts=counts) == broken
    assert counts["reencoded"] == counts["broken_characters"] == 0
    elsewhere = Drawn(broken, True, tokenizer="another")
    targets(tok, Answer(as_turns("\ufffd"), elsewhere), counts=counts)
    assert (counts["reencoded"], counts["broken_characters"]) == (1, 1)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("ids_known", [False, True])
def test_an_answer_that_did_not_end_gets_no_end(whole, ids_known):
    tok = with_template(EMPTY_THOUGHTS, "<think>", "</think>")
    text = "<think> Let me"
    ids = tok.encode(text, add_special_tokens=False)
    how = drawn(tok, ids, False) if ids_known else Drawn(finished=False)
    counts = Counter()
    got = targets(tok, Answer(as_turns(text), how), whole, counts)
    assert counts["unfinished"] == 1
    assert got[-3:] == ids[-3:]
    if ids_known or not whole:
        assert got == ids, "no block of thoughts that the policy did not have"


def test_a_reward_model_reads_words_that_a_stop_ended():
    tok = byte_tokenizer()
    ids = tok.encode("Vega.##", add_special_tokens=False)
    answer = Answer(as_turns("Vega."), drawn(tok, ids))
    assert targets(tok, answer) == ids
    assert tok.decode(targets(tok, answer, whole=True)) == "Vega.<|im_end|>\n"


def test_a_reward_model_reads_drawn_ids_as_the_rendered_conversation():
    tok = byte_tokenizer()
    ids = tok.encode("Vega.", add_special_tokens=False) + end_ids(tok)
    sample = dict(prompt=as_turns("Q?", "user"), output="Vega.", output_ids=ids)
    sample |= dict(finished=True, tokenizer=tokenizer_hash(tok))
    counts = Counter()
    [tree] = trees_from_samples([sample], tok, 999, 500, counts)
    [same] = trees_from_samples([sample | dict(output_ids=None)], tok, 999, 500, counts)
    assert tree.prompt_ids + tree.branches[0] == same.prompt_ids + same.branches[0]
    empty = sample | dict(output="", output_ids=None, finished=False)
    [tree] = trees_from_samples([sample, empty], tok, 999, 500, counts)
    assert tree.branches[1] == []


def feedback_file(path, tok, rows):
    "Pairs of samples: (words, ids, whether it ended), the first preferred."
    records = []
    for i, pair in enumerate(rows):
        record = dict(
            prompt_id=str(i),
            prompt=as_turns(f"Q{i}?", "user"),
            label=1,
            reward_A=1.0,
            reward_B=0.0,
            reward_difference=1.0,
            type="pairwise_feedback",
        )
        for side, (text, ids, finished) in zip("AB", pair):
            record[f"output_{side}"] = as_turns(text)
            record[f"output_ids_{side}"] = ids
            record[f"finished_{side}"] = finished
            record[f"tokenizer_{side}"] = tokenizer_hash(tok)
        records.append(record)
    write_records(path, records)
    return get_feedback(path)


def test_feedback_brings_ids_and_ends_to_training(tmp_path):
    tok = melting()
    odd = [*tok.encode("y"), *tok.encode("es"), *end_ids(tok)]
    cut = tok.encode("Maybe", add_special_tokens=False)
    rows = [
        (("yes", odd, True), ("Maybe", cut, False)),
        (("Maybe", cut, False), ("no", None, True)),
    ]
    data = feedback_file(tmp_path / "f.json", tok, rows)
    loader = PairedPreferenceDataLoader(data, tok)
    first, second = loader.trees
    assert [said(tok, first, k) for k in (0, 1)] == ["yes<eos>", "Maybe"]
    assert first.branches[0][first.skip[0] :] == odd
    assert [said(tok, second, k) for k in (0, 1)] == ["Maybe", " no<eos>"]
    assert loader.counts["unfinished"] == 2
    assert loader.counts["reencoded"] == 0
    with pytest.raises(ValueError, match="2 unfinished_dropped"):
        PairedPreferenceDataLoader(data, tok, unfinished="drop")


def test_words_that_are_not_those_of_the_ids_are_read_and_counted():
    tok = byte_tokenizer()
    ids = tok.encode("Vega", add_special_tokens=False) + end_ids(tok)
    for how in (drawn(tok, ids), drawn(tok, [9999, *ids]), drawn(tok, [-1, *ids])):
        counts = Counter()
        answer = Answer(as_turns("EDITED"), how)
        assert tok.decode(targets(tok, answer, counts=counts)) == "EDITED<|im_end|>"
        assert (counts["ids_of_other_words"], counts["reencoded"]) == (1, 1)


@pytest.mark.parametrize("last", ["<|im_end|>", "<|pad|>"])
def test_a_reward_model_scores_a_finished_answer_as_it_is_rendered(last):
    "Whichever token ended it, and whatever a tokenizer makes of what stands behind it."
    tok = with_template(TURN + "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK)
    tok.add_tokens([AddedToken("<|im_end|>", special=True, rstrip=True)])
    ids = tok.encode("Vega", add_special_tokens=False)
    ids.append(tok.convert_tokens_to_ids(last))
    answer = Answer(as_turns("Vega"), drawn(tok, ids))
    turns = as_turns("Q?", "user") + as_turns("Vega")
    assert asked(tok).ids + targets(tok, answer, whole=True) == encode(tok, turns)
    assert targets(tok, answer) == ids


def test_a_reward_model_reads_drawn_ids_where_words_would_be_others():
    tok = melting()
    tok.chat_template = TURN + "{{ m.content }}<eos>\n{% endfor %}" + ASK
    odd = [*tok.encode("ye"), *tok.encode("s"), *end_ids(tok)]
    answer = Answer(as_turns("yes"), drawn(tok, odd))
    assert targets(tok, answer, whole=True) == odd + tok.encode("\n")


# ---- told before work begins


@pytest.mark.parametrize(
    "row, what",
    [
        (dict(tools=[dict(name="f")], prompt="Q", chosen="a", rejected="b"), "tools"),
        (dict(system="Kind.", prompt="Q", chosen="a", rejected="b"), "a system turn"),
        (
            dict(
                prompt="Q",
                chosen=[dict(role="assistant", content="", tool_calls=[dict(name="f")])],
                rejected="b",
            ),
            "tool calls",
        ),
    ],
)
def test_what_a_template_does_not_write_is_refused(row, what, tmp_path):
    "A policy would never see it; a reward model scores it, counted."
    deaf = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
    )
    tok = with_template(deaf)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    data = get_preferences(file)
    with pytest.raises(RecordError, match=f"rows.jsonl, record 1: carries {what}, and"):
        PairedPreferenceDataLoader(data, tok)
    loader = PairedPreferenceDataLoader(data, tok, whole=True)
    assert loader.counts["not_rendered"] == 1
    assert len(loader.trees) == 1


def test_ends_are_found_behind_a_system_turn_too():
    tok = with_template(NEEDS_SYSTEM)
    tok.eos_token = "<|pad|>"
    assert end_ids(tok) == [tok.convert_tokens_to_ids("<|im_end|>")]
    turns = [dict(role="system", content="Kind."), *as_turns("Q?", "user")]
    [prompt] = encode_prompts(tok, [turns], 99, Counter())
    cut = Answer(as_turns("A"), Drawn(finished=False))
    for whole in (False, True):
        assert tok.decode(targets(tok, cut, whole, prompt=prompt)) == "A"


def test_white_space_ends_no_turn():
    tok = with_template(NO_END, "\n")
    assert end_ids(tok) == []
    with pytest.raises(ValueError, match="never learns to stop"):
        check_template(tok, "policy")


def test_a_tag_that_prompt_and_answer_share_is_written_once():
    tok = with_template(OPENS_THOUGHTS, "<think>", "</think>")
    answer = Answer(as_turns("<think>Hm.</think>A"))
    assert tok.decode(targets(tok, answer)) == "Hm.</think>A<|im_end|>"


def test_good_and_bad_answers_of_the_same_ids_are_passed_over():
    tok = with_template(NO_SYSTEM)
    rows = ("Q?", "same", " same "), ("Q2?", "yes", "no")
    for make in (UnpairedPreferenceDataLoader, ConditionalSFTDataLoader):
        if make is ConditionalSFTDataLoader:
            add_control_tokens(tok)
            tok.chat_template = NO_SYSTEM
            rows = ("Q?", "same", "same  "), ("Q2?", "yes", "no")
        loader = make(pairs_of(*rows), tok)
        equal = 1 if make is UnpairedPreferenceDataLoader else 0  # behind other tokens
        assert loader.counts["equal_pairs"] == equal
        assert len(loader.trees) == 4 - 2 * equal


def test_the_record_that_a_template_refuses_is_named(tmp_path):
    tok = with_template(NO_SYSTEM)
    system = [dict(role="system", content="Kind."), dict(role="user", content="q")]
    rows = [dict(prompt=q, chosen="a", rejected="b") for q in ("1?", "2?", system)]
    file = tmp_path / "turns.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecordError, match=r"turns.jsonl, record 3.*no system turn here"):
        PairedPreferenceDataLoader(get_preferences(file), tok)


@pytest.mark.parametrize(
    "template, words",
    [
        (NO_END, "never learns to stop"),
        ("{% for m in messages %}Hello<|im_end|>{% endfor %}", "whatever it says"),
        (
            TURN + "{{ m.content if m.role == 'user' else 'Yes' }}<|im_end|>{% endfor %}",
            "assistant",
        ),
    ],
)
def test_templates_with_which_nothing_can_be_learnt(template, words):
    with pytest.raises(ValueError, match=f"policy: .*{words}"):
        check_template(with_template(template), "policy")


def test_training_with_a_template_that_never_ends_is_refused(tmp_path):
    from halos_nb.train import make_tokenizer

    with_template(NO_END).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    cfg = TrainConfig(loss="sft", model=str(tmp_path), train_datasets=["none.json"])
    with pytest.raises(ValueError, match="puts no special token behind an answer"):
        make_tokenizer(cfg)


@pytest.mark.parametrize(
    "template, names",
    [
        (NO_SYSTEM, ["trims", "trims"]),
        (OPENS_THOUGHTS, ["rewrites"]),
        (TOOLS, []),
        (TURN + "{{ strftime_now('%Y') }}{{ m.content }}<|im_end|>\n{% endfor %}", ["dated"]),
        ("{{ raise_exception('never') }}", ["refuses"]),
        (TURN + "{{ m.content | upper }}<|im_end|>\n{% endfor %}", ["changes", "changes"]),
        (NEEDS_SYSTEM, []),
        (
            "{{ messages[-2:][0].content }}{{ messages[-1].content }}<|im_end|>",
            ["forgets", "rewrites"],
        ),
    ],
)
def test_what_is_odd_about_a_template(template, names):
    assert [oddity.name for oddity in template_oddities(with_template(template))] == names


def test_a_missing_template_is_said_and_begins_with_bos():
    tok = byte_tokenizer()
    tok.chat_template = None
    tok.add_special_tokens(dict(bos_token="<|begin|>"))
    put_chatml(tok)
    assert check_template(tok, "base") == [MISSING]
    from halos_nb.tree_trainer import notes_of

    assert notes_of(None, tok) == dict(template=MISSING)
    assert notes_of(None, byte_tokenizer()) == {}
    ids = encode(tok, as_turns("Q?", "user"), generation_prompt=True)
    assert ids.count(tok.bos_token_id) == 1 and ids[0] == tok.bos_token_id


def test_the_end_is_what_the_template_says():
    "Also where the tokenizer names another token as its end."
    tok = with_template(ENDS_ELSEWHERE)
    assert tok.eos_token == "<|im_end|>"
    assert end_ids(tok) == [tok.pad_token_id]
    assert tok.decode(targets(tok, Answer(as_turns("A")))) == "A<|pad|>"


# ---- whose ids?


def test_a_tokenizer_is_known_by_what_it_does(tmp_path):
    tok = melting()
    tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again(["a", "b c"], padding=True, truncation=True, max_length=1)
    assert tokenizer_hash(again) == tokenizer_hash(tok)
    others = {tokenizer_hash(tok), tokenizer_hash(byte_tokenizer())}
    again.add_tokens(["<new>"])
    others.add(tokenizer_hash(again))
    tok.chat_template += " "
    others.add(tokenizer_hash(tok))
    set_template_options(tok, "a=1")
    others.add(tokenizer_hash(tok))
    assert len(others) == 5


# ---- from the sampler to the trainer


@pytest.fixture(scope="module")
def talker():
    "A tiny policy that says anything, broken bytes among it, and often does not end."
    from halos_nb.models import TreePolicy, mix_in, small_llama

    tok = byte_tokenizer()
    model = small_llama(tok, hidden_size=32, initializer_range=0.3)
    return tok, mix_in(model, TreePolicy).eval()


@pytest.mark.parametrize("kind", ["pairwise", "binary", "scalar"])
def test_what_was_sampled_is_what_is_trained(talker, kind, tmp_path):
    "Token for token, with the log-probabilities it was drawn with, whatever the words are."
    import torch

    from halos_nb import feedback, loaders
    from halos_nb.sample import sample
    from halos_nb.trees import make_batch

    tok, model = talker
    prompts = [f"Question {i}?" for i in range(4)]
    samples = sample(prompts, model, tok, num_samples_per_prompt=6, max_new_tokens=70, seed=1)
    assert any("\ufffd" in s["output"] for s in samples), "none of the cases that it is about"
    assert {s["finished"] for s in samples} == {True, False}
    for i, s in enumerate(samples):
        s["reward"] = float(i % 5)
    records = dict(
        pairwise=lambda: feedback.convert_to_pairwise_feedback(samples, seed=0),
        binary=lambda: feedback.convert_to_binary_feedback(samples),
        scalar=lambda: feedback.convert_to_scalar_feedback(samples),
    )[kind]()
    write_records(tmp_path / "f.json", records)
    make = dict(
        pairwise=loaders.PairedPreferenceDataLoader,
        binary=loaders.UnpairedPreferenceDataLoader,
        scalar=loaders.GroupUnpairedPreferenceDataLoader,
    )[kind]
    loader = make(get_feedback(tmp_path / "f.json"), tok)
    known = {(s["prompt_id"], tuple(s["output_ids"])): s for s in samples}
    seen = 0
    for item, tree in zip(loader.items, loader.trees, strict=True):
        example = loader.examples[item.prompt]
        batch = make_batch([tree])
        with torch.no_grad():
            logps = model(tree=batch).logps.double()
        for k, branch in enumerate(tree.branches):
            drawn = known[example.prompt_id, tuple(branch[tree.skip[k] :])]
            want = torch.tensor(drawn["output_logps"]).double()
            assert (logps[k, : len(want)] - want).abs().max() < 1e-4
            assert (branch[-1:] == end_ids(tok)) == drawn["finished"]
            seen += 1
    assert seen >= 8
    assert loader.counts["reencoded"] == loader.counts["broken_characters"] == 0
    assert loader.counts["unfinished"] > 0

"""Trees and batches: against the reference's tokens, the template and the tokenizer by
themselves.
"""

import copy
from collections import Counter
from functools import lru_cache

import jinja2
import pytest
import torch
from golden import FOLDER, cases, load
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from halos_nb.templates import common_prefix, byte_tokenizer, encode, encode_prompt
from halos_nb.trees import make_batch, make_tree, trees_from_samples

TOK = byte_tokenizer()


@lru_cache
def told(name):
    return load(name)


class Plain:
    "The template and the tokenizer by themselves: jinja2 and `tokenizers`, nothing of ours."

    def __init__(self, name):
        self.tok = Tokenizer.from_file(str(FOLDER / f"tokenizer_{name}.json"))
        self.template = jinja2.Environment().from_string(told("tokenization")["chat_template"])

    def text(self, turns, ask=False):
        return self.template.render(messages=turns, add_generation_prompt=ask)

    def ids(self, turns, ask=False):
        return self.tok.encode(self.text(turns, ask), add_special_tokens=False).ids


def golden_tokenizer(name):
    special = {
        k: v
        for k, v in told("tokenization")["tokenizers"][name].items()
        if k in ("bos_token", "eos_token", "pad_token") and v
    }
    return PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDER / f"tokenizer_{name}.json"),
        chat_template=told("tokenization")["chat_template"],
        **special,
    )


def going(turns, drop="oldest"):
    """The turns in the order in which they may go: never the last; a leading system turn after
    all others.
    """
    system = [0] if turns[0]["role"] == "system" and len(turns) > 1 else []
    others = [i for i in range(len(turns) - 1) if i not in system]
    return (others if drop == "oldest" else others[::-1]) + system


def left(plain, turns, limit, drop="oldest"):
    """The turns that must be left of a prompt, by trying: as many as fit, else the last, as
    many tokens of it as fit.
    """
    order = going(turns, drop)
    for gone in range(len(order) + 1):
        kept = [t for i, t in enumerate(turns) if i not in order[:gone]]
        if len(plain.ids(kept, True)) <= limit:
            return kept
    tokens = plain.tok.encode(turns[-1]["content"], add_special_tokens=False).ids
    for n in range(len(tokens), -1, -1):
        kept = [
            turns[-1]
            | dict(
                content=plain.tok.decode(tokens[:n], skip_special_tokens=False).rstrip("\ufffd")
            )
        ]
        if len(plain.ids(kept, True)) <= limit:
            return kept


def labelled(tree):
    "(ids, labels) of a one-branch tree, as the reference writes them."
    own = len(tree.prompt_ids) + tree.skip[0]
    ids = tree.prompt_ids + tree.branches[0]
    return ids, [-100] * own + ids[own:]


def built(case):
    """Our tree of a case; what it must hold, computed from template and tokenizer alone; which
    parts the reference left whole.
    """
    tok = golden_tokenizer(case["tokenizer"])
    plain = Plain(case["tokenizer"])
    n = case["max_length"]
    counts = Counter()
    tree = make_tree(
        tok,
        case["conversation"],
        [case["generation"]],
        ["completion"],
        n,
        case["max_prompt_length"],
        counts,
    )
    kept = left(plain, case["conversation"], min(case["max_prompt_length"], n - 1))
    prompt = plain.ids(kept, True)
    whole = plain.ids(kept + case["generation"])
    context = common_prefix(prompt, whole)
    want = whole[:n], ([-100] * context + whole[context:])[:n]
    same = (
        case["outputs"]["prompt"] == case["conversation"],
        case["outputs"]["target"] == case["generation"] and context == len(prompt),
    )
    return tok, tree, counts, kept, want, same


@cases("tokenization")
def test_tokenization_golden(case):
    """Where the reference cut nothing, its ids and labels; where it cut, superseded are
    `prompt`, `target` and all texts and ids made of them:
    whole turns go first, oldest first, then the last turn is cut, and completions are cut in
    ids. `untruncated_conversation` is superseded: nothing is edited. So are the labels where
    the end of the prompt and the beginning of the answer are one token: it is a target.
    """
    before = copy.deepcopy(case)
    out = case["outputs"]
    n = case["max_length"]
    tok, tree, counts, kept, want, (same_prompt, same_target) = built(case)
    assert case == before
    assert labelled(tree) == want
    limit = min(case["max_prompt_length"], n - 1)
    turns, ids = encode_prompt(tok, case["conversation"], limit, Counter())
    assert turns == kept
    assert ids == Plain(case["tokenizer"]).ids(kept, True)
    assert len(ids) <= limit
    assert counts["prompts_shortened"] == (len(kept) < len(case["conversation"]))
    assert counts["prompts_cut"] == (kept[-1] != case["conversation"][-1])
    assert counts["outputs_cut"] == (len(encode(tok, kept + case["generation"])) > n)
    assert kept[-1]["role"] == case["conversation"][-1]["role"]
    assert case["conversation"][-1]["content"].startswith(kept[-1]["content"])
    if same_prompt:
        assert kept == case["conversation"]
        assert ids == out["prompt_input_ids"]
        assert (
            tok.apply_chat_template(kept, tokenize=False, add_generation_prompt=True)
            == out["prompt_text"]
        )
    if same_prompt and same_target:
        assert labelled(tree) == (
            out["target_combined_input_ids"][:n],
            out["target_labels"][:n],
        )
        assert (
            tok.apply_chat_template(kept + case["generation"], tokenize=False)
            == out["target_combined_text"]
        )
    elif same_prompt and case["outputs"]["target"] != case["generation"]:
        # the reference cut the text and encoded it anew, with an end of turn; both are
        # beginnings of the same completion
        assert len(tree.branches[0]) + len(tree.prompt_ids) == n
        assert out["target_combined_text"].startswith(
            tok.decode(labelled(tree)[0]).rstrip("\ufffd")[: -8 * len("<|im_end|>")]
        )


@cases("tokenization")
def test_newest_turns_can_go_first(case):
    limit = min(case["max_prompt_length"], case["max_length"] - 1)
    turns, ids = encode_prompt(
        golden_tokenizer(case["tokenizer"]),
        case["conversation"],
        limit,
        Counter(),
        drop="newest",
    )
    assert turns == left(Plain(case["tokenizer"]), case["conversation"], limit, "newest")
    assert len(ids) <= limit


def collate_cases():
    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=c["id"]) for c in told("tokenization")["collate_cases"]]
    )


@collate_cases()
def test_collation_golden(case):
    """Unpadded, our rows are the reference's where it cut nothing; padding reaches the longest
    row, not `max_length`.
    """
    elements = [
        built(next(c for c in told("tokenization")["cases"] if c["id"] == name))
        for name in case["elements"]
    ]
    batch = make_batch([tree for _, tree, *_ in elements], "plain", case["pad_token_id"])
    out = case["outputs"]
    width = batch.input_ids.shape[1]
    labels = torch.full((len(elements), width), -100)
    labels[batch.predict // width, batch.predict % width + 1] = batch.target
    assert width == max(len(want[0]) for *_, want, _ in elements)
    for i, (*_, kept, want, same) in enumerate(elements):
        n = len(want[0])
        assert batch.input_ids[i].tolist() == want[0] + [case["pad_token_id"]] * (width - n)
        assert labels[i].tolist() == want[1] + [-100] * (width - n)
        assert batch.attention_mask[i].tolist() == [1] * n + [0] * (width - n)
        if all(same):
            real = sum(out["target_combined_attention_mask"][i])
            assert want[0] == out["target_combined_input_ids"][i][:real]
            assert want[1] == out["target_labels"][i][:real]
        if same[0]:
            assert [
                t
                for t, m in zip(out["prompt_input_ids"][i], out["prompt_attention_mask"][i])
                if m
            ] == Plain(case["tokenizer"]).ids(kept, True)


STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("drop", ["oldest", "newest"])
def test_a_template_that_wants_roles_to_alternate(drop):
    "What it refuses is dropped on; what is refused from the start is an error."
    tok = byte_tokenizer()
    tok.chat_template = STRICT
    talk = [
        dict(role=("user", "assistant")[i % 2], content=f"Turn number {i}") for i in range(5)
    ]
    turns, ids = encode_prompt(tok, talk, 120, Counter(), drop)
    assert [t["content"][-1] for t in turns] == dict(
        oldest=["2", "3", "4"], newest=["0", "1", "4"]
    )[drop]
    assert len(ids) <= 120
    with pytest.raises(jinja2.TemplateError):
        encode_prompt(tok, talk[1:], 120, Counter(), drop)


MERGING = byte_tokenizer()  # merges the newline that ends a prompt with what follows
MERGING.add_tokens([AddedToken("\nYes", normalized=False)])


@pytest.mark.parametrize("layout", ["tree", "plain"])
def test_tokens_merged_over_the_end_of_the_prompt_are_targets(layout):
    "They carry the answer's first letters; of an answer that does not melt nothing more is."
    asked = [dict(role="user", content="Q")]
    counts = Counter()
    meanings = ["chosen", "rejected"]
    tree = make_tree(MERGING, asked, ["Yes.", "No."], meanings, 99, 50, counts)
    prompt = encode(MERGING, asked, generation_prompt=True)
    newline = MERGING.encode("\n")
    b = make_batch([tree], layout)
    assert counts["prefix_mismatch"] == 1
    assert tree.prompt_ids + newline == prompt
    assert tree.skip == [0, 1]
    said = [["\nYes", ".", "<|im_end|>"], ["N", "o", ".", "<|im_end|>"]]
    for k, tokens in enumerate(said):
        mine = b.branch == k
        whole = tree.prompt_ids + tree.branches[k]
        first = len(whole) - len(tokens)
        assert MERGING.convert_ids_to_tokens(b.target[mine].tolist()) == tokens
        assert b.input_ids.flatten()[b.predict[mine]].tolist() == whole[first - 1 : -1]
        assert b.position_ids.flatten()[b.predict[mine]].tolist() == list(
            range(first - 1, len(whole) - 1)
        ), "positions go on from the prompt's"


def test_samples_of_a_prompt_are_one_tree():
    samples = [
        dict(prompt=[dict(role="user", content=f"Q{i % 2}")], output=f"answer {i}")
        for i in range(5)
    ]
    trees = trees_from_samples(samples, TOK, 100, 50, Counter())
    assert [t.index for t in trees] == [[0, 2, 4], [1, 3]]
    for t in trees:
        for i, b in zip(t.index, t.branches):
            assert t.prompt_ids + b == encode(
                TOK,
                samples[i]["prompt"] + [dict(role="assistant", content=samples[i]["output"])],
            )

"""Every family that transformers can build: its numbers are those of plain transformers, or
it is refused with the reason.

`python tests/test_architectures.py` prints the whole table (`make test-architectures`); the
families of FAMILIES run with the other tests.
"""

import copy
import os
import signal
import sys
import warnings
from collections import Counter
from multiprocessing import get_context
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_families import tiny_model
from transformers import LlamaForCausalLM
from transformers.models.auto import modeling_auto

from halos_nb import attention, audit
from halos_nb.attention import rope_limit
from halos_nb.configs import SampleConfig
from halos_nb.data import Example
from halos_nb.generate import Row, drawing_fault, generate, way_to_draw
from halos_nb.layouts import choose_layout, shrunk_windows
from halos_nb.models import TreePolicy, TreeScorer, mix_in
from halos_nb.rescore import each_token
from halos_nb.templates import byte_tokenizer
from halos_nb.trees import Tree, make_batch

TREES = [
    Tree([9, 8, 7, 6], [[20, 21, 22], [30, 31], [40]], ["sample"] * 3, [0] * 3),
    Tree([5, 4], [[50, 51], [60]], ["chosen", "rejected"], [0, 0]),
    Tree([11, 12, 13] * 4, [[70, 71, 72, 73, 74], [20, 21]], ["chosen", "rejected"], [0, 0]),
    Tree([14], [[15, 80, 81], [16, 82]], ["chosen", "rejected"], [1, 1]),
]
PROMPTS = [[9, 8, 7, 6, 5], [10, 11], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31]]
NEW = 5  # tokens of each sample
TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "scorer": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


class Found(NamedTuple):
    "What came of one family."

    task: str  # causal or scorer
    family: str
    result: str  # equal, refused, not built, not run (by transformers itself), wrong
    how: str  # layout and way of drawing, or the reason


class Wrong(AssertionError):
    "Other numbers than those of plain transformers."


def near(ours, plain, what):
    "An error if these are not the same up to rounding."
    off = (ours - plain).abs().max().item()
    if not off <= 2e-4 * max(plain.abs().max().item(), 0.1):
        raise Wrong(f"{what} off by {off:.1e}")


def rows_of(trees):
    return [(tree, branch, k) for tree in trees for branch, k in zip(tree.branches, tree.skip)]


def plain_logps(plain, tree, branch, skip):
    "Token log-probs of one row by plain transformers, nothing beside it."
    row = torch.tensor([tree.prompt_ids + branch])
    if rope_limit(plain) and not torch.is_grad_enabled():
        plain = copy.deepcopy(plain)  # rope may remember the rows before
    logps = plain(input_ids=row).logits[0].float().log_softmax(-1)
    start = len(tree.prompt_ids) + skip
    at = torch.arange(start, row.shape[1])
    return logps[at - 1, row[0, at]]


def check_logps(ours, plain, layout):
    table = ours(tree=make_batch(TREES, layout)).logps
    for line, row in zip(table, rows_of(TREES)):
        want = plain_logps(plain, *row)
        near(line[: len(want)], want, "log-probs")


def logits_behind(plain, ids, ends):
    "Logits of the next token behind the first so many, with nothing read before."
    if rope_limit(plain) is None:
        return plain(input_ids=ids).logits[0, [n - 1 for n in ends]].float()
    # each length has frequencies of its own, and the model remembers the last ones
    fresh = [copy.deepcopy(plain)(input_ids=ids[:, :n]) for n in ends]
    return torch.stack([out.logits[0, -1].float() for out in fresh])


def check_samples(ours, plain):
    "Greedy answers, two a prompt, prompts of different lengths in one batch."
    cfg = SampleConfig(
        model="tiny", num_samples_per_prompt=2, max_new_tokens=NEW, temperature=1e-4
    )
    asked = [Example([dict(role="user", content=str(p))], str(p)) for p in PROMPTS]
    rows = []
    for prompt, example in zip(PROMPTS, asked):
        rows += [Row(len(rows) + i, example, i, prompt) for i in range(2)]
    answers = generate(rows, ours, byte_tokenizer(), cfg)
    for row, answer in zip(rows, answers):
        ids = torch.tensor([row.ids + answer])
        at = range(len(row.ids), ids.shape[1])
        logits = logits_behind(plain, ids, at)
        said = logits[torch.arange(len(answer)), torch.tensor(answer)]
        best = logits.max(-1).values
        near(said, best, "a greedy token's logit")  # equal but for ties
    return [row.ids for row in rows], answers


def generated_by_transformers(plain, prompts, answers):
    "What `generate` says beside it, one row at a time; empty if the same."
    for prompt, answer in list(zip(prompts, answers))[::2]:
        try:
            out = plain.generate(
                torch.tensor([prompt]),
                do_sample=False,
                max_new_tokens=len(answer),
                min_new_tokens=len(answer),
                eos_token_id=None,
                pad_token_id=0,
            )
        except Exception as e:  # whatever it may say
            return f"; `generate` itself fails here: {type(e).__name__}"
        if out[0, len(prompt) :].tolist() != answer:
            return "; `generate` itself is not equal to a full pass"
    return ""


def dpo_like(rows):
    "A loss of pairs from the log-probs of rows: chosen, rejected, chosen, ..."
    sums = torch.stack([row.sum() for row in rows])
    return -F.logsigmoid(0.3 * (sums[::2] - sums[1::2])).sum()


def farthest(gradients, true):
    "The largest distance of some gradients from true ones."
    return max((g.double() - true[name]).abs().max() for name, g in gradients.items())


def gradients_of(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_gradients(ours, plain, layout):
    """As `gradients_in`. Where they differ in float32, they may only if untouched rows are the
    farther ones from float64, in which both must be equal to 1e-5.
    """
    try:
        return gradients_in(ours, plain, layout, 2e-4)
    except Wrong as wrong:
        float32 = gradients_of(ours), gradients_of(plain)
        for model in (ours, plain):
            model.zero_grad()
            model.double()
        said = gradients_in(ours, plain, layout, 1e-5)
        mine, its = [farthest(one, gradients_of(plain)) for one in float32]
        if mine > its:
            raise wrong
        return said


def gradients_in(ours, plain, layout, close):
    "Of one step in training mode against one row at a time; empty if it could be taken."
    pairs = TREES[1:]
    plain.train()
    try:
        dpo_like([plain_logps(plain, *row) for row in rows_of(pairs)]).backward()
    except Exception as e:  # rows that it only reads in evaluation mode
        return f"; transformers itself does not train it here: {type(e).__name__}"
    ours.train()
    dpo_like(ours(tree=make_batch(pairs, layout)).logps).backward()
    mine = dict(ours.named_parameters())
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for name, p in plain.named_parameters():
        if p.grad is None:
            assert mine[name].grad is None or not mine[name].grad.any(), name
            continue
        off = (mine[name].grad - p.grad).abs().max() / largest
        if not off <= close:
            raise Wrong(f"gradient of {name} off by {off:.1e} of the largest")
    return ""


def check_policy(family, gradients=False, whole=False, **more):
    plain = tiny_model("causal", family, **more)
    ours = mix_in(copy.deepcopy(plain), TreePolicy)
    layout = choose_layout(ours, max_length=24).name
    with torch.no_grad():
        check_logps(ours, plain, layout)
        prompts, answers = check_samples(ours, plain)
        beside = generated_by_transformers(plain, prompts, answers) if whole else ""
    way = way_to_draw(ours, 1, 0)
    if gradients:
        beside += check_gradients(ours, plain, layout)
    return f"{layout}, drawn with {way}{beside}"


def check_scorer(family, gradients=False, whole=False, **more):
    plain = tiny_model("scorer", family, **more)
    ours = mix_in(copy.deepcopy(plain), TreeScorer)
    layout = choose_layout(ours, max_length=24).name
    with torch.no_grad():
        scores = ours(tree=make_batch(TREES, layout)).scores
        for score, (tree, branch, _) in zip(scores, rows_of(TREES)):
            row = torch.tensor([tree.prompt_ids + branch])
            near(score, copy.deepcopy(plain)(input_ids=row).logits[0], "scores")
    return layout


CHECKS = {"causal": check_policy, "scorer": check_scorer}


def find(task, family, gradients=False, whole=False):
    "What comes of a family; `whole`: and what `generate` of transformers says."
    try:
        model = tiny_model(task, family)
    except Exception as e:  # a size that does not fit another, a package that is not there
        return Found(task, family, "not built", f"{type(e).__name__}: {short(e)}")
    try:
        return Found(task, family, "equal", CHECKS[task](family, gradients, whole))
    except Wrong as e:
        return Found(task, family, "wrong", short(e))
    except Exception as e:
        if str(e).startswith(("layout:", "model:")):
            return Found(task, family, "refused", short(e))
        result = "not run" if plain_fault(model) else "crashed"
        return Found(task, family, result, f"{type(e).__name__}: {short(e)}")


def plain_fault(plain):
    "Why plain transformers itself does not read these rows; empty if it does."
    try:
        with torch.no_grad():
            for tree, branch, _ in rows_of(TREES):
                plain(input_ids=torch.tensor([tree.prompt_ids + branch]))
    except Exception as e:
        return f"{type(e).__name__}: {short(e)}"
    return ""


def short(error):
    return " ".join(str(error).split())[:230]


# The families of the order, under transformers' names; as trees or the plain way.
TREES_FIT = (
    "llama qwen2 qwen3 qwen3_moe phi3 phi olmo2 gpt2 gpt_neox opt mixtral deepseek_v2 "
    "deepseek_v3 smollm3 starcoder2 glm4 mistral gemma2 gemma3_text gemma3 cohere2 gpt_oss "
    "exaone4 gptj bloom mpt granite cohere stablelm nemotron falcon"
)
ONE_ROW_EACH = (
    "mamba mamba2 jamba qwen3_next lfm2 falcon_mamba rwkv recurrent_gemma gpt_neo doge "
    "llama4_text falcon_h1"
)
SCORERS = (
    "bert roberta deberta-v2 modernbert convbert nystromformer xlnet llama gpt2 falcon gemma3 "
    "perceiver"
)


def policy_is_equal(family):
    found = find("causal", family, gradients=True)
    assert found.result == "equal" and "itself" not in found.how, found
    return found.how


@pytest.mark.parametrize("family", TREES_FIT.split())
def test_policies_as_trees(family):
    assert policy_is_equal(family).startswith("tree, drawn with cache")


@pytest.mark.parametrize("family", ONE_ROW_EACH.split())
def test_policies_the_plain_way(family):
    assert not policy_is_equal(family).startswith("tree")


def test_what_only_listens_speaks_against_no_trees():
    "Convolutions over sound, which no token of a text goes through."
    assert policy_is_equal("phi4_multimodal") == "tree, drawn with cache"


def test_positions_may_be_called_otherwise():
    "No row of a probe is longer than the positions of a decoder of an encoder's states."
    assert policy_is_equal("whisper").endswith("drawn with own cache")


@pytest.mark.parametrize("family", SCORERS.split())
def test_scorers(family):
    found = find("scorer", family)
    assert found.result == "equal", found


# ---- windows and rope, which show only in rows that are long enough

WINDOW = dict(sliding_window=6)
WINDOWS = {
    "mistral": WINDOW,
    "gemma2": WINDOW | dict(attn_logit_softcapping=0.5),  # small enough to bend
    "gemma3_text": WINDOW,
    "gemma3": dict(text_config=WINDOW),
    "qwen2": WINDOW | dict(use_sliding_window=True, max_window_layers=0),
    "gpt_oss": WINDOW,
    "cohere2": WINDOW,
    "exaone4": WINDOW,
    "phimoe": WINDOW,  # which only its mask knows
    "llama4_text": dict(attention_chunk_size=6),
    "falcon": dict(alibi=True),
}


BY_PLACE = ("falcon", "llama4_text")  # biases and temperatures by the place in the row


@pytest.mark.parametrize("family", WINDOWS)
def test_windows_chunks_and_alibi(family):
    by_chance = family == "phimoe"  # which experts it trains
    how = check_policy(family, gradients=not by_chance, **WINDOWS[family])
    assert how.startswith("plain" if family in BY_PLACE else "tree"), how


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral"])
def test_an_empty_answer_stands_between_others(family):
    "One that was cut to nothing: it says nothing, and moves no gradient of its neighbours."
    plain = tiny_model("causal", family, **WINDOW)
    ours = mix_in(copy.deepcopy(plain), TreePolicy)
    tree = Tree([9, 8, 7], [[20, 21, 22], [], [40]], ["sample"] * 3, [0] * 3)
    table = ours(tree=make_batch([tree])).logps
    rows = [(tree, branch, 0) for branch in tree.branches[::2]]
    for line, row in zip(table[::2], rows):
        near(line[: len(row[1])], plain_logps(plain, *row), "log-probs")
    assert not table[1].any()
    table.sum().backward()
    sum(plain_logps(plain, *row).sum() for row in rows).backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters()):
        if theirs.grad is not None:
            near(mine.grad, theirs.grad, "gradient")


BENT = ("mistral", "gpt_oss", "llama4_text")


@pytest.mark.parametrize("family", BENT)
def test_a_window_matters_here(family, monkeypatch):
    """The tests above can fail: a tree whose layers look back over everything is another
    model, and the probe sees it, also where no row is as long as the window.
    """
    monkeypatch.setattr(attention, "reach_of", lambda *_: attention.Reach())
    model = mix_in(tiny_model("causal", family, **WINDOWS[family]), TreePolicy)
    with torch.no_grad(), pytest.raises(Wrong, match="log-probs off by"):
        check_logps(model, tiny_model("causal", family, **WINDOWS[family]), "tree")
    if family in BY_PLACE:
        return  # it never goes as trees
    larger = {name: 400 for name in WINDOWS[family]}
    far = mix_in(tiny_model("causal", family, **larger), TreePolicy)
    found = choose_layout(far, max_length=24)
    assert found.name == "plain" and "with windows of 4" in found.reason, found


@pytest.mark.parametrize("family, name", [("gemma2", "softcap"), ("gpt_oss", "sinks")])
def test_caps_and_sinks_matter_here(family, name, monkeypatch):
    "As above, for what bends the scores."
    scoring = attention.Scoring
    without = lambda *given: scoring(*given)._replace(**{name: None})
    monkeypatch.setattr(attention, "Scoring", without)
    more = dict(attn_logit_softcapping=0.5) if family == "gemma2" else {}
    model = mix_in(tiny_model("causal", family, **more), TreePolicy)
    assert "trees differ" in choose_layout(model, max_length=24).reason


FRESH = dict(initializer_range=0.02)  # weights that have learnt nothing hide what they do


@pytest.mark.parametrize(
    "family, more",
    [
        ("gpt_neo", dict(window_size=256, max_position_embeddings=2048)),
        ("llama4_text", {}),
        ("lfm2", {}),
        ("jamba", {}),
        ("falcon_h1", {}),
        ("qwen3_next", {}),
    ],
)
def test_what_goes_by_the_place_in_the_row_never_goes_as_trees(family, more):
    """A window in a family's own code that no probe row reaches, a temperature by place, a
    state that is passed on: with fresh weights a small probe shows none of them.
    """
    model = mix_in(tiny_model("causal", family, **FRESH, **more), TreePolicy)
    found = choose_layout(model, max_length=128)
    assert found.name != "tree", found
    with pytest.raises(ValueError, match="does not fit trees"):
        choose_layout(model, "tree", max_length=128)


def test_a_cap_that_nobody_declares_is_seen_in_fresh_weights():
    "And one that is declared and not there is not believed."

    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 300 * torch.tanh(out.logits / 300)
            return out

    config = tiny_model("causal", "llama", **FRESH).config
    torch.manual_seed(0)
    model = mix_in(Capped(config).eval(), TreePolicy)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    assert model.head_form is None
    assert all(p.equal(weights[name]) for name, p in model.named_parameters())
    declared = tiny_model("causal", "llama", **FRESH)
    declared.config.final_logit_softcapping = 300.0
    assert mix_in(declared, TreePolicy).head_form.cap is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_generate_of_a_mixed_model_is_the_model_s_own(family):
    "With padding on the left, and the logits of a prompt's last position alone."
    plain = tiny_model("causal", family)
    mixed = mix_in(copy.deepcopy(plain), TreePolicy)
    ids = torch.tensor([[0, 0, 0, 0, 9, 8, 7], [20, 21, 22, 23, 24, 25, 26]])
    mask = (ids > 0).long()
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, output_scores=True)
    said = [m.generate(ids, return_dict_in_generate=True, **options) for m in (plain, mixed)]
    assert said[0].sequences.equal(said[1].sequences)
    assert all(a.equal(b) for a, b in zip(said[0].scores, said[1].scores))


def test_windows_are_put_back():
    "Whatever happens while they are shrunk, in the config and in every layer."
    model = mix_in(tiny_model("causal", "gemma3_text", sliding_window=60), TreePolicy)
    layers = [layer.self_attn.sliding_window for layer in model.base_model.layers]
    with pytest.raises(KeyError), shrunk_windows(model, 4):
        assert model.config.sliding_window == 4
        assert {layer.self_attn.sliding_window for layer in model.base_model.layers} == {4}
        raise KeyError
    assert model.config.sliding_window == 60
    assert [layer.self_attn.sliding_window for layer in model.base_model.layers] == layers


LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0] * 4,
    long_factor=[8.0] * 4,
    factor=4.0,
    original_max_position_embeddings=12,
)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_rope_of_two_sets_goes_by_length(family):
    more = dict(rope_parameters=LONGROPE, max_position_embeddings=48)
    if family == "phi3":
        more["original_max_position_embeddings"] = 12
    how = check_policy(family, gradients=True, **more)
    assert how.startswith("unpadded, drawn with own cache")
    assert check_scorer("llama", **more) == "unpadded"


def test_rope_that_stretches_goes_by_length_and_forgets():
    more = dict(rope_parameters=DYNAMIC, max_position_embeddings=12)
    plain = tiny_model("causal", "llama", **more)
    ours = mix_in(copy.deepcopy(plain), TreePolicy)
    with torch.no_grad():
        for layout in (choose_layout(ours, max_length=24).name, "alone", "unpadded"):
            assert layout != "plain"
            check_logps(ours, plain, layout)
        with pytest.raises(Wrong):
            check_logps(ours, plain, "plain")
        beyond = [PROMPTS[2], PROMPTS[1]]  # 12 tokens and more beside 2
        assert drawing_fault(ours, "own cache", beyond, 0) == ""
        assert float(drawing_fault(ours, "cache", beyond, 0)) > 1e-3


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_single_rows_are_read_with_nothing_left_of_others(rope):
    "What a stage reads without a probe: the tokens of a few answers, the rows of an audit."
    short = dict(max_position_embeddings=12)
    more = dict(rope_parameters=DYNAMIC if rope == "dynamic" else LONGROPE) | short
    plain = tiny_model("causal", "llama", **more)
    ours = mix_in(copy.deepcopy(plain), TreePolicy)
    ids = list(range(20, 60))  # rows of 30, 20, 13 and 12 tokens, of which 12 are not stretched
    trees = [
        Tree([9, 8, 7, 6], [ids[:26], ids[16:32]], ["sample"] * 2, [0, 0], [0, 1]),
        Tree([5, 4], [ids[4:15], ids[29:39]], ["sample"] * 2, [0, 0], [2, 3]),
    ]
    with torch.no_grad():
        want = [plain_logps(plain, *row) for row in rows_of(trees)]
        said = each_token(trees, ours)
    for number, logps in enumerate(want):
        near(torch.tensor(said[number]), logps, "log-probs of an answer's tokens")
    seen = [SimpleNamespace(context=t.prompt_ids, target=b) for t, b, _ in rows_of(trees)]
    policy = SimpleNamespace(model=ours, seen=seen, measure=want, device="cpu")
    policy.tokenizer = SimpleNamespace(pad_token_id=0)
    policy.cfg = SimpleNamespace(precision="float32")
    assert audit.check_plain(policy).verdict == "ok"


# ---- what does not fit is refused, with the difference


@pytest.mark.parametrize(
    "task, family, more",
    [
        ("causal", "gpt_neo", {}),
        ("causal", "doge", {}),
        ("scorer", "bert", {}),
    ],
)
def test_trees_that_are_asked_for_are_held_to_the_untouched_model(task, family, more):
    mixin = TreePolicy if task == "causal" else TreeScorer
    model = mix_in(tiny_model(task, family, **more), mixin)
    kind = type(model).__name__
    with pytest.raises(ValueError, match=rf"layout: {kind} does not fit trees: .* \d\.\de[-+]"):
        choose_layout(model, "tree", max_length=24)
    assert choose_layout(model, "plain", max_length=24).name == "plain"


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match="layout: Bert.* a token's log-prob changes by"):
        check_policy("bert", is_decoder=False)


def test_plain_rows_are_held_to_the_untouched_model():
    "A mask that is lost in every layout but one row alone."

    class Leaky(TreePolicy):
        def predicting(self, tree):
            at = super().predicting(tree)
            return at._replace(inputs=at.inputs * 1.5)

    model = mix_in(tiny_model("causal", "gptj"), Leaky)
    with pytest.raises(ValueError, match="GPTJForCausalLM cannot be used: .*plain rows differ"):
        choose_layout(model)


# ---- the whole sweep


def quiet():
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(50)
    torch.set_num_threads(1)


def find_in_child(task, family, seconds=120):
    "As `find`, in a process of its own that may hang or be killed."
    ours, theirs = get_context("fork").Pipe()

    def work():
        quiet()
        sys.stdout = sys.stderr = open(os.devnull, "w")
        theirs.send(find(task, family, gradients=task == "causal", whole=True))

    child = get_context("fork").Process(target=work)
    child.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            return ours.recv()
        return Found(task, family, "no answer", f"not within {seconds} seconds")
    except EOFError:
        return Found(task, family, "crashed", "its process ended")
    finally:
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()


def main(names):
    "Print the table, and how often each result was found."
    quiet()
    tally = Counter()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float32, CPU\n")
    print("| task | family | result | how, or why not |\n|---|---|---|---|")
    for task, families in TASKS.items():
        for family in families:
            if names and family not in names:
                continue
            found = find_in_child(task, family)
            kind = found.how.split(",")[0] if found.result == "equal" else ""
            tally[task, f"{found.result} ({kind})" if kind else found.result] += 1
            how = found.how.replace("|", "/")
            print(f"| {task} | {family} | {found.result} | {how} |", flush=True)
    print("\n| task | result | families |\n|---|---|---|")
    for (task, result), n in sorted(tally.items()):
        print(f"| {task} | {result} | {n} |")
    bad = [result for _, result in tally if result in ("wrong", "crashed")]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

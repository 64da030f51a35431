"""A saved model is whole, unchanged and of the right kind wherever it is loaded, and means the
same there; or it is refused with the path of the file.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import DAMAGES, Table, as_anybody, has_another_bit, is_half
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    pipeline,
)
from tiny_models import LORA, TREES, outputs, perturb, save_small

from halos_nb import checkpoints
from halos_nb.checkpoints import (
    CheckpointError,
    check_checkpoint_files,
    seal,
)
from halos_nb.configs import SampleConfig, TrainConfig
from halos_nb.models import (
    AutoModelForBradleyTerry,
    add_lora,
    fit_vocabulary,
    load_actor_critic,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    merge_lora,
    own_padding,
    save_adapter,
    small_llama,
)
from halos_nb.records import as_turns, file_hash, prompt_id
from halos_nb.reference import make_reference
from halos_nb.sample import load_models, sample
from halos_nb.score import head_at, load_scorer, score_samples
from halos_nb.templates import byte_tokenizer
from halos_nb.train import make_trainer, train
from halos_nb.trees import make_batch

pytestmark = pytest.mark.filterwarnings("ignore")

COLOURS = "red green blue grey".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A policy, a reward model and a LoRA run, each with a step's checkpoint and FINAL."
    home = tmp_path_factory.mktemp("runs")
    tok = byte_tokenizer()
    model = small_llama(tok, hidden_size=16, layers=1, initializer_range=0.3)
    for part in (model, tok):
        part.save_pretrained(home / "start")
    rows = [{"prompt": f"Say {c}", "chosen": f"{c}!", "rejected": f"no {c}"} for c in COLOURS]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lora = dict(use_peft=True, lora_r=2, lora_alpha=4, lora_dropout=0.0)
    for name, loss, more in (
        ("policy", "sft", {}),
        ("reward", "bradley-terry", {}),
        ("lora", "dpo", lora),
    ):
        train(config(home, loss, name, save_every=1, keep_steps=0, **more))
    return home


def config(home, loss, name="x", **more):
    given = dict(
        loss=loss,
        model=str(home / "start"),
        train_datasets=[str(home / "pairs.jsonl")],
        exp_name=name,
        cache_dir=str(home),
        lr=1e-2,
        batch_size=2,
        epochs=1,
    )
    return TrainConfig(**given | more)


def ids_of(texts, tok):
    return tok(texts, add_special_tokens=False)["input_ids"]


# ---- each file x each damage x each stage


def scores_of(folder):
    "What the label stage loads, and what it says."
    head = head_at(folder)
    tok = load_tokenizer(folder)
    model = load_scorer(folder, head).eval()
    found = score_samples(sampled("Say red", "red!", "no red"), model, tok)
    return [x.score for x in found]


def sampled(question, *answers):
    prompt = as_turns(question, "user")
    name = prompt_id(prompt)
    return [
        dict(prompt_id=name, sample_id=i, prompt=prompt, output=answer, type="sample")
        for i, answer in enumerate(answers)
    ]


def answers_of(folder):
    "What the sample stage loads, and what it says."
    tok = load_tokenizer(folder)
    policy, _ = load_models(SampleConfig(model=folder), tok, "cpu")
    drawn = sample(["Say red"], policy, tok, max_new_tokens=6, temperature=0.5, seed=1)
    return drawn[0]["output"]


def loss_of(cfg):
    "What the train stage loads, and the first loss with it."
    trainer = make_trainer(cfg)[0]
    step = next(iter(trainer.loader))
    return trainer.training_step(trainer.model, step).item()


def stages_of(home, kind):
    "How each stage loads a checkpoint of this kind."
    goes_on = dict(model=str(home / "start"), load_from=str(home / "start"))
    lora = goes_on | dict(use_peft=True, lora_r=2, lora_alpha=4, lora_dropout=0.0)
    begins = lambda loss: lambda at: loss_of(config(home, loss, model=at))
    continues = lambda loss, more: (
        lambda at: loss_of(config(home, loss, from_checkpoint=at, **more))
    )
    refers = lambda at: loss_of(config(home, "dpo", load_from=at))
    return {
        "policy/FINAL": [begins("dpo"), continues("sft", {}), refers, answers_of],
        "policy/step-1": [begins("sft"), continues("sft", {}), answers_of],
        "reward/FINAL": [
            begins("bradley-terry"),
            continues("bradley-terry", {}),
            scores_of,
        ],
        "lora/FINAL": [begins("sft"), continues("dpo", lora), answers_of],
        "lora/step-1": [continues("dpo", lora)],
    }[kind]


KINDS = ["policy/FINAL", "policy/step-1", "reward/FINAL", "lora/FINAL", "lora/step-1"]


def damaged_copies(source, folder, file):
    "A copy of a checkpoint with each damage to one of its files, one after another."
    for damage in DAMAGES:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        damage(folder / file)
        yield damage.__name__


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_to_a_sealed_checkpoint_is_passed_over(home, tmp_path, kind):
    "Whatever happens to whichever file, every stage names the file."
    files = [p for p in (home / kind).rglob("*") if p.is_file()]
    assert len(files) >= 8
    load = stages_of(home, kind)
    table = Table(f"{kind}, {len(files)} files, {len(load)} stages")
    for path in files:
        name = path.relative_to(home / kind)
        for damage in damaged_copies(home / kind, tmp_path / "broken", name):
            for stage in load:
                with pytest.raises(CheckpointError) as error, as_anybody():
                    stage(str(tmp_path / "broken"))
                assert str(tmp_path / "broken" / name) in str(error.value), (damage, name)
                table.add(damage, "refused, with the path")
    table.show()


@pytest.mark.parametrize("kind", ["policy/FINAL", "reward/FINAL"])
def test_damage_that_can_be_seen_without_a_seal(home, tmp_path, kind):
    """A folder of somebody else's: what is refused has a path, what is not gives the same
    numbers, and what can be neither is listed here.
    """
    source = tmp_path / "foreign"
    kept = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    source.mkdir()
    for name in (*kept, "chat_template.jinja", "generation_config.json"):
        if (home / kind / name).exists():
            shutil.copy(home / kind / name, source)
    loss, used = "sft", answers_of
    if kind == "reward/FINAL":
        loss, used = "bradley-terry", scores_of
    trained = lambda at: loss_of(config(home, loss, model=at))
    load = lambda at: (used(at), trained(at))
    intact = load(str(source))
    unseen = set()
    for path in source.iterdir():
        for damage in damaged_copies(source, tmp_path / "broken", path.name):
            try:
                with as_anybody():
                    found = load(str(tmp_path / "broken"))
                if found != intact:
                    unseen.add((path.name, damage))
            except Exception as error:
                assert str(tmp_path / "broken") in str(error), (path.name, damage, error)
    # a flipped bit in a number or a text; a template that was never there
    cannot = {(name, "has_another_bit") for name in (*kept, "chat_template.jinja")}
    cannot |= {("chat_template.jinja", "is_missing"), ("chat_template.jinja", "is_half")}
    assert unseen <= cannot, unseen - cannot


def test_commands_name_the_file(home, tmp_path):
    "Each stage as its command: it ends with an error that has the path, and writes nothing."
    (tmp_path / "samples.json").write_text(json.dumps(sampled("Say red", "red!", "no red")))
    commands = {
        "sample": [
            "FINAL",
            "--output_file",
            "out.json",
            "--datasets",
            str(home / "pairs.jsonl"),
            "--num_prompts",
            "1",
        ],
        "label": ["samples.json", "out.json", "--reward_model_path", "FINAL"],
        "train": ["--loss", "sft", "--model", "FINAL"]
        + ["--train_datasets", str(home / "pairs.jsonl"), "--cache_dir", "out"],
    }
    running = {}
    for name, words in commands.items():
        at = tmp_path / f"{name}-model"
        kind = "reward" if name == "label" else "policy"
        shutil.copytree(home / kind / "FINAL", at)
        has_another_bit(at / "model.safetensors")
        words = [str(at) if word == "FINAL" else word for word in words]
        running[name] = subprocess.Popen(
            [sys.executable, "-m", f"halos_nb.{name}", *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    for name, process in running.items():
        said, _ = process.communicate(timeout=600)
        assert process.returncode != 0
        path = tmp_path / f"{name}-model/model.safetensors"
        assert f"{path}: has been changed since it was written" in said, said
    assert not (tmp_path / "out.json").exists()
    assert not (tmp_path / "out/policy/FINAL").exists()


def test_a_file_more_is_a_change(home, tmp_path):
    "An adapter's config makes transformers load an adapter, a template is another prompt."
    folder = shutil.copytree(home / "reward/FINAL", tmp_path / "m")
    (folder / "README.md").write_text("about this model")
    (folder / ".cache").mkdir()
    check_checkpoint_files(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter_config.json: was not there when"):
        check_checkpoint_files(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    with pytest.raises(CheckpointError, match="rag.jinja: was not there when"):
        check_checkpoint_files(folder)
    seal(folder)
    check_checkpoint_files(folder)


# ---- what the check costs


@pytest.fixture
def hashed(monkeypatch):
    "The names of the files whose hash was taken."
    names = []
    whole = checkpoints.file_hash
    monkeypatch.setattr(checkpoints, "file_hash", lambda p: names.append(p.name) or whole(p))
    return names


def test_a_process_reads_a_checkpoint_once(home, tmp_path, hashed):
    folder = shutil.copytree(home / "policy/FINAL", tmp_path / "m")
    files = len(list(folder.iterdir())) - 1
    load_policy(str(folder))
    load_reference(str(folder))
    load_tokenizer(str(folder))
    assert len(hashed) == files
    has_another_bit(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors: has been changed"):
        load_policy(str(folder))
    has_another_bit(folder / "model.safetensors")
    load_policy(str(folder))
    assert len(hashed) == 3 * files


TOGETHER = """
import sys
from halos_nb import checkpoints
from halos_nb.processes import start_processes

accelerator = start_processes(2, cpu=True)
read, whole = [], checkpoints.file_hash
checkpoints.file_hash = lambda p: read.append(p) or whole(p)
good, bad = sys.argv[1:]
checkpoints.check_together([good, "a/name"], accelerator)
checkpoints.check_checkpoint_files(good)
try:
    checkpoints.check_together([good, bad], accelerator)
except checkpoints.CheckpointError as error:
    print(len(read), str(error))
"""


def test_a_machine_reads_a_checkpoint_once(home, tmp_path):
    "Of two processes one reads; both know what it found, and both stop."
    bad = shutil.copytree(home / "reward/FINAL", tmp_path / "bad")
    is_half(bad / "tokenizer.json")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    running = []
    for rank in ("0", "1"):
        own = dict(RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
        command = [sys.executable, "-c", TOGETHER, str(home / "policy/FINAL"), str(bad)]
        running.append(
            subprocess.Popen(
                command, env=os.environ | shared | own, stdout=subprocess.PIPE, text=True
            )
        )
    said = [process.communicate(timeout=600)[0].split(" ", 1) for process in running]
    files = len(list((home / "policy/FINAL").iterdir())) - 1
    assert [int(count) for count, _ in said] == [files, 0]
    assert said[0][1] == said[1][1]
    assert f"{bad / 'tokenizer.json'}: has" in said[1][1]


def test_the_same_training_is_the_same_folder(home):
    "A manifest has no times, so the ledger's hash of a folder is still one of its content."
    train(config(home, "sft", "again", save_every=1, keep_steps=0))
    for name in ("FINAL", "step-1"):
        assert file_hash(home / "again" / name) == file_hash(home / "policy" / name)


def test_checkpoints_of_before_have_no_seal_and_load(home, tmp_path):
    old = Path(__file__).parent / "data/2026-11/run/round-2/policy/FINAL"
    assert "no manifest" in check_checkpoint_files(old)
    load_policy(str(old))
    counts = train(config(home, "sft", "noted", model=str(home / "lora/FINAL"))).counts
    assert counts["checkpoints"]["model"].endswith("files are what was written")
    assert "no manifest" in train(config(home, "sft", "noted")).counts["checkpoints"]["model"]


# ---- weights that are not there


def rename(folder, was, new):
    state = load_file(folder / "model.safetensors")
    state[new] = state.pop(was)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def drop(folder, name):
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weight(folder, name):
    state = load_file(folder / "model.safetensors")
    state[name] = state[name][:3].contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize(
    "change",
    [
        lambda folder: rename(folder, Q, f"old.{Q}"),
        lambda folder: drop(folder, Q),
        lambda folder: cut_weight(folder, Q),
    ],
    ids=["renamed", "missing", "cut"],
)
def test_weights_that_would_be_random_are_refused(home, tmp_path, kind, change):
    "With a manifest and without: also in a folder that was sealed as it is."
    folder = shutil.copytree(home / kind / "FINAL", tmp_path / "m")
    change(folder)
    seal(folder)
    loaders = [load_policy, load_reference, load_actor_critic]
    if kind == "reward":
        loaders = [load_reward_model, lambda at: load_scorer(at, head_at(at))]
    else:
        loaders.append(lambda at: AutoModelForBradleyTerry.from_pretrained(at))
    for load in loaders:
        with pytest.raises(CheckpointError, match="model.safetensors|cannot be loaded") as e:
            load(str(folder))
        assert str(folder) in str(e.value)


def test_a_reward_model_without_its_head_is_refused(home, tmp_path):
    folder = shutil.copytree(home / "reward/FINAL", tmp_path / "m")
    drop(folder, "score.weight")
    seal(folder)
    for load in (scores_of, load_reward_model):
        with pytest.raises(CheckpointError, match="score.weight"):
            load(str(folder))


def test_scores_of_a_head_that_nobody_trained_are_told(home, recwarn):
    "A start for training may be scored with in a notebook, but not without a word."
    model = AutoModelForBradleyTerry.from_pretrained(str(home / "policy/FINAL")).eval()
    tok = load_tokenizer(str(home / "policy/FINAL"))
    with pytest.warns(UserWarning, match=r"its head \(score.weight\) is as it was drawn"):
        score_samples(sampled("Say red", "red!"), model, tok)
    with torch.no_grad():
        model.score.weight += 1
    recwarn.clear()
    assert score_samples(sampled("Say red", "red!"), model, tok)[0].score
    assert not [w for w in recwarn if "as it was drawn" in str(w.message)]


# ---- kinds


def test_other_kinds_are_refused_by_name(home, tmp_path):
    policy, reward = str(home / "policy/FINAL"), str(home / "reward/FINAL")
    for load in (load_policy, load_reference, load_actor_critic, answers_of):
        with pytest.raises(CheckpointError, match="is a LlamaForSequenceClassification"):
            load(reward)
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, not a reward model"):
        scores_of(policy)
    for loss in ("sft", "dpo", "ppo"):
        with pytest.raises(CheckpointError, match="is a LlamaForSequenceClassification"):
            make_trainer(config(home, loss, model=reward))
    with pytest.raises(CheckpointError, match="is a LlamaForSequenceClassification"):
        make_trainer(config(home, "dpo", load_from=reward))


def test_an_adapter_is_no_model(home, tmp_path):
    adapter = str(home / "lora/FINAL/adapter")
    for load in (load_policy, load_reward_model, scores_of):
        with pytest.raises(CheckpointError, match="is a LoRA adapter, not a model; name the"):
            load(adapter)
    with pytest.raises(CheckpointError, match="holds a LoRA run's adapter and no model"):
        load_policy(str(home / "lora/step-1"))
    assert add_lora(
        load_policy(str(home / "start")), r=2, alpha=4, dropout=0.0, adapter=adapter
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; name the folder"):
        load_policy(str(tmp_path / "file"))


def test_a_critic_s_folder_is_a_policy_and_a_foreign_one_is_not(home, tmp_path):
    load_actor_critic(str(home / "start")).save_pretrained(tmp_path / "critic")
    load_policy(str(tmp_path / "critic"))
    folder = shutil.copytree(home / "start", tmp_path / "trl")
    state = load_file(folder / "model.safetensors") | {"v_head.weight": torch.zeros(1, 16)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 weights are not in a .*v_head.weight"):
        load_policy(str(folder))


# ---- reward models elsewhere


def texts_of(tok, answers=("red!", "no, not red at all", "")):
    turns = [as_turns("Say red", "user") + as_turns(answer) for answer in answers]
    return tok.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("pad", ["own", "eos"])
def test_scores_are_those_of_plain_transformers(home, tmp_path, pad):
    """One text at a time, batches padded on either side, and a pipeline; also where training
    began with a tokenizer that pads with its end-of-turn token.
    """
    start = shutil.copytree(home / "start", tmp_path / "start")
    if pad == "eos":
        tok = AutoTokenizer.from_pretrained(start)
        tok.pad_token = tok.eos_token
        # nothing behind the end, so that the text ends with the token that pads
        tok.chat_template = tok.chat_template.replace("<|im_end|>' + '\\n'", "<|im_end|>'")
        tok.chat_template = tok.chat_template.replace("<|im_end|>\\n", "<|im_end|>")
        tok.save_pretrained(start)
    cfg = config(home, "bradley-terry", cache_dir=str(tmp_path), model=str(start), epochs=3)
    folder = train(cfg).model
    answers = ("red!", "no, not red at all", "")
    ours = score_samples(
        sampled("Say red", *answers),
        load_scorer(folder, head_at(folder)).eval(),
        load_tokenizer(folder),
    )
    want = torch.tensor([x.score for x in ours])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tok = AutoTokenizer.from_pretrained(folder)
    assert tok.pad_token_id == model.config.pad_token_id != tok.eos_token_id
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    texts = texts_of(tok)
    plain = dict(return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        alone = [model(**tok(text, **plain)).logits[0, 1] for text in texts]
        assert_close(torch.stack(alone), want, rtol=1e-5, atol=1e-5)
        for side in ("left", "right"):
            rows = tok(texts, padding=True, padding_side=side, **plain)
            assert_close(model(**rows).logits[:, 1], want, rtol=1e-5, atol=1e-5)
    pipe = pipeline("text-classification", folder, top_k=None, batch_size=3)
    found = pipe(texts, add_special_tokens=False)
    scores = [{x["label"]: x["score"] for x in labels}["LABEL_1"] for labels in found]
    assert_close(torch.tensor(scores), want, rtol=1e-5, atol=1e-5)
    assert len(set(scores)) == 3


def test_the_pad_token_is_one_that_no_text_has(home):
    tok = byte_tokenizer()
    for pad in ("<|im_end|>", None, tok.pad_token):
        tok.pad_token = pad
        own_padding(tok)
        assert tok.pad_token == "<|pad|>" and len(tok) == 259
        assert tok.padding_side == "right"
    bare = AutoTokenizer.from_pretrained(str(home / "start"))
    bare.add_special_tokens({"pad_token": "<|im_end|>"})
    state = json.loads(bare.backend_tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != "<|pad|>"]
    kind = type(bare.backend_tokenizer)
    bare._tokenizer = kind.from_str(json.dumps(state))
    own_padding(bare)
    assert bare.pad_token == "<|pad|>"
    assert bare.pad_token_id not in (bare.eos_token_id, bare.bos_token_id)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_one_logit_becomes_two_and_the_score_stays(home, tmp_path, arch):
    torch.manual_seed(0)
    shape = dict(vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    shape |= dict(num_attention_heads=2, num_labels=1, pad_token_id=0)
    kind = BertConfig if arch == "bert" else LlamaConfig
    own = AutoModelForSequenceClassification.from_config(kind(**shape)).eval()
    if arch == "bert":
        torch.nn.init.ones_(own.classifier.bias)
    own.save_pretrained(tmp_path / "one")
    byte_tokenizer().save_pretrained(tmp_path / "one")
    ids = torch.tensor([[9, 8, 30, 4]])
    mask = torch.ones_like(ids)
    two = AutoModelForBradleyTerry.from_pretrained(str(tmp_path / "one")).eval()
    with torch.no_grad():
        score = own(ids, attention_mask=mask).logits[0, 0]
        logits = two(input_ids=ids, attention_mask=mask).logits[0]
    assert_close(logits, torch.stack([torch.zeros(()), score]), rtol=1e-6, atol=1e-6)
    two.save_pretrained(tmp_path / "two")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two").eval()
    with torch.no_grad():
        assert torch.equal(again(ids, attention_mask=mask).logits[0], logits)
    cfg = config(home, "bradley-terry", model=str(tmp_path / "one"), cache_dir=str(tmp_path))
    result = train(cfg)
    assert scores_of(result.model)[0] != scores_of(str(tmp_path / "one"))[0]
    many = AutoModelForSequenceClassification.from_config(kind(**shape | dict(num_labels=5)))
    many.save_pretrained(tmp_path / "many")
    with pytest.raises(CheckpointError, match="has 5 logits"):
        load_reward_model(str(tmp_path / "many"))


def test_labels_of_a_mixed_classifier_are_classes(home):
    "Its config calls itself a regression, so that nobody takes a softmax of its logits."
    model = load_reward_model(str(home / "reward/FINAL")).eval()
    ids = torch.tensor([[9, 8, 30]])
    out = model(input_ids=ids, labels=torch.tensor([1]))
    assert_close(out.loss, -out.logits.log_softmax(-1)[0, 1])
    bert = AutoModelForBradleyTerry.from_config(
        BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    out = bert(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0]))
    assert_close(out.loss, -out.logits.log_softmax(-1)[0, 0])


# ---- policies elsewhere


def test_a_policy_is_the_same_elsewhere(home, tmp_path):
    "Logits, greedy answers, tokens, template, and all that its configs said."
    start = shutil.copytree(home / "start", tmp_path / "start")
    own = dict(eos_token_id=[2, 7], do_sample=True, temperature=0.6, top_p=0.9)
    (start / "generation_config.json").write_text(json.dumps(own))
    state = load_file(start / "model.safetensors")
    half = {name: w.bfloat16() for name, w in state.items()}
    save_file(half, start / "model.safetensors", metadata={"format": "pt"})
    config_file = start / "config.json"
    said = json.loads(config_file.read_text()) | dict(dtype="bfloat16")
    config_file.write_text(json.dumps(said))
    folder = train(config(home, "sft", model=str(start), cache_dir=str(tmp_path))).model
    saved = json.loads((Path(folder) / "generation_config.json").read_text())
    assert {name: saved[name] for name in own} == own
    written = json.loads((Path(folder) / "config.json").read_text())
    assert written["use_cache"] is True
    assert written["dtype"] == "float32"
    weights = load_file(Path(folder) / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}

    ours, tok = load_policy(folder).eval(), load_tokenizer(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = AutoTokenizer.from_pretrained(folder)
    texts = ["Sag: Grüße, 你好", "<|im_end|> x"]
    assert ids_of(texts, tok) == ids_of(texts, plain) == ids_of(texts, byte_tokenizer())
    assert plain.chat_template == byte_tokenizer().chat_template
    prompt = plain.apply_chat_template(
        as_turns("Say red", "user"), add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        assert_close(ours(prompt).logits, theirs(prompt).logits, rtol=1e-5, atol=1e-5)
        greedy = theirs.generate(prompt, do_sample=False, max_new_tokens=8)
    drawn = sample(["Say red"], ours, tok, max_new_tokens=8, temperature=1e-4)
    assert drawn[0]["output_ids"] == greedy[0, prompt.shape[1] :].tolist()


# ---- LoRA


def tied_and_not(tmp_path):
    for tied in (True, False):
        folder = tmp_path / f"tied-{tied}"
        save_small("llama", folder, tie_word_embeddings=tied)
        yield tied, str(folder)


def test_a_tied_head_gets_no_adapter(tmp_path):
    for tied, folder in tied_and_not(tmp_path):
        for targets in (["lm_head"], ["q_proj", "embed_tokens"], r".*\.embed_tokens"):
            if not tied:
                add_lora(load_policy(folder), **LORA, targets=targets)
                continue
            with pytest.raises(ValueError, match="is both the embedding and the vocabulary"):
                add_lora(load_policy(folder), **LORA, targets=targets)


def test_a_saved_adapter_on_a_tied_head_is_refused(tmp_path):
    "An adapter of somebody else's, whose config says that it has the whole head."
    (_, tied), _ = tied_and_not(tmp_path)
    save_adapter(add_lora(load_policy(tied), **LORA), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | dict(modules_to_save=["lm_head"]))
    )
    with pytest.raises(ValueError, match="lm_head is both the embedding"):
        add_lora(load_policy(tied), **LORA, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_tokens_train_and_merge(tmp_path, dtype):
    "Their rows move, in both matrices where these are two; merged, saved and loaded the same."
    for tied, folder in tied_and_not(tmp_path):
        start = load_policy(folder, dtype)
        before = outputs(start)
        model = add_lora(start, **LORA, new_tokens=[20, 70])
        assert_close(outputs(model).logps, before.logps)
        rows = [n for n, p in model.named_parameters() if "trainable_tokens" in n]
        assert len(rows) == (1 if tied else 2)
        model(tree=make_batch(TREES)).logps.sum().backward()
        grads = [p.grad for n, p in model.named_parameters() if "trainable_tokens" in n]
        assert all(g.abs().sum(1).gt(0).all() for g in grads)
        want = outputs(perturb(model)).logps
        plain = outputs(model, "plain").logps
        close = dict(rtol=1e-4, atol=1e-4) if dtype == "float32" else dict(rtol=0.1, atol=1.0)
        assert_close(plain, want, **close)
        save_adapter(model, tmp_path / "adapter")
        again = add_lora(
            load_policy(folder, dtype),
            **LORA,
            adapter=tmp_path / "adapter",
            new_tokens=[20, 70],
        )
        assert torch.equal(outputs(again).logps, want)
        merged = merge_lora(model)
        merged.save_pretrained(tmp_path / "merged")
        assert merged.lm_head.weight.equal(merged.model.embed_tokens.weight) == tied
        plain_again = load_policy(str(tmp_path / "merged"), dtype)
        assert_close(outputs(plain_again).logps, outputs(merged).logps)
        assert_close(outputs(merged).logps, want, **close)


def test_an_adapter_without_its_rows_or_weights_is_refused(llama, tmp_path):
    save_adapter(add_lora(load_policy(llama), **LORA), tmp_path / "a")
    with pytest.raises(ValueError, match=r"trainable_token_indices is None, asked for"):
        add_lora(load_policy(llama), **LORA, adapter=tmp_path / "a", new_tokens=[20])
    file = tmp_path / "a/adapter_model.safetensors"
    state = load_file(file)
    name = next(iter(state))
    state[f"old.{name}"] = state.pop(name)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has not the weights of this adapter"):
        add_lora(load_policy(llama), **LORA, adapter=tmp_path / "a")
    is_half(file)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: "):
        add_lora(load_policy(llama), **LORA, adapter=tmp_path / "a")


def test_the_reference_has_the_rows_that_were_drawn(llama):
    "Of a policy with new tokens, without its adapter and as it was synchronised."
    tok = byte_tokenizer()
    tok.add_tokens(["<new>"])
    fresh = lambda: fit_vocabulary(load_policy(llama), tok)
    model = add_lora(fresh(), **LORA, new_tokens=[259])
    reference = make_reference(model, lora=True)
    synced = make_reference(model, lora=True, sync=True)
    tree = [TREES[1].__class__([5, 259], [[259, 8], [9]], ["sample"] * 2, [0, 0])]
    batch = make_batch(tree)
    want = outputs(fresh(), trees=tree).logps
    perturb(model)
    assert_close(reference(batch), want)
    assert_close(synced(batch), want)
    assert (outputs(model, trees=tree).logps - want).abs().max() > 0.1
    synced.sync()
    assert_close(synced(batch), outputs(model, trees=tree).logps)


def test_lora_trains_the_markers_of_a_template(home, tmp_path):
    "A base model without a template, and control tokens: rows move, and only these."
    start = shutil.copytree(home / "start", tmp_path / "base")
    tok = AutoTokenizer.from_pretrained(start)
    state = json.loads((start / "tokenizer.json").read_text())
    assert tok.chat_template
    lora = dict(use_peft=True, lora_r=2, lora_alpha=4, lora_dropout=0.0)
    cfg = config(home, "csft", model=str(start), cache_dir=str(tmp_path), **lora)
    folder = Path(train(cfg).model)
    was = load_file(start / "model.safetensors")["model.embed_tokens.weight"]
    now = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    drawn = fit_vocabulary(load_policy(str(start)), load_tokenizer(str(folder)))
    drawn = drawn.get_input_embeddings().weight.detach()
    new = load_tokenizer(str(folder)).convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    assert len(state["model"]["vocab"]) <= min(new)
    assert torch.equal(now[: len(was)], was)
    assert (now[new] != drawn[new]).any(1).all()
    more = dict(from_checkpoint=str(folder), exp_name="more")
    goes_on = train(
        config(home, "csft", model=str(start), cache_dir=str(tmp_path), **lora | more)
    )
    check_checkpoint_files(goes_on.model)
    load_policy(goes_on.model)


def test_merged_equals_adapter(home):
    "FINAL of a run, and the adapter beside it on the base it was made for."
    adapter = home / "lora/FINAL/adapter"
    base = load_policy(str(home / "start"))
    with_adapter = add_lora(base, r=2, alpha=4, dropout=0.0, adapter=adapter)
    merged = load_policy(str(home / "lora/FINAL"))
    assert_close(outputs(merged).logps, outputs(with_adapter).logps, rtol=1e-5, atol=1e-5)


def test_a_template_s_end_is_where_others_stop(home, tmp_path):
    "Of a base model that got its template here; what its generation config said is kept."
    start = shutil.copytree(home / "start", tmp_path / "base")
    (start / "generation_config.json").write_text(json.dumps(dict(eos_token_id=7, top_k=9)))
    folder = train(config(home, "sft", model=str(start), cache_dir=str(tmp_path))).model
    saved = json.loads((Path(folder) / "generation_config.json").read_text())
    end = byte_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert (saved["eos_token_id"], saved["top_k"]) == ([7, end], 9)


def test_a_shard_that_is_not_there_is_named(home, tmp_path):
    load_policy(str(home / "start")).save_pretrained(tmp_path / "m", max_shard_size="10KB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 1
    load_policy(str(tmp_path / "m"))
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=f"index.json: names shards .*{shards[0].name}"):
        load_policy(str(tmp_path / "m"))


def test_an_adapter_goes_on_only_where_it_was_trained(home, tmp_path):
    "On another model of the same shape it would be a policy that nobody trained."
    other = small_llama(byte_tokenizer(), hidden_size=16, layers=1, seed=9)
    for part in (other, byte_tokenizer()):
        part.save_pretrained(tmp_path / "other")
    lora = dict(use_peft=True, lora_r=2, lora_alpha=4, lora_dropout=0.0)
    goes_on = lora | dict(from_checkpoint=str(home / "lora/FINAL"))
    elsewhere = str(tmp_path / "other")
    with pytest.raises(CheckpointError, match="this adapter was trained on .*start"):
        make_trainer(config(home, "dpo", model=elsewhere, load_from=elsewhere, **goes_on))
    shutil.copytree(home / "start", tmp_path / "moved")
    moved = str(tmp_path / "moved")
    make_trainer(config(home, "dpo", model=moved, load_from=moved, **goes_on))


@pytest.mark.parametrize(
    "more", [dict(lr=1e-13), dict(lr=1e-20, use_peft=True, lora_r=2, lora_alpha=4)]
)
def test_a_rate_that_moves_nothing_is_an_error(home, more):
    "Not one that changed a last bit somewhere, and says what it said."
    with pytest.raises(RuntimeError, match="nothing was learnt"):
        train(config(home, "dpo", "still", **more))
    assert not (home / "still/FINAL").exists()

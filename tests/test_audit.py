"""The audit finds what is put wrong by hand, and finds nothing where nothing is wrong."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, SHAPE
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FalconConfig,
    GPT2Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from halos_nb import audit as room
from halos_nb.audit import (
    POLICY_CHECKS,
    REWARD_CHECKS,
    Policy,
    Reward,
    audit,
    printable,
    report_text,
    run_checks,
    wrong_checks,
)
from halos_nb.configs import AuditConfig
from halos_nb.jobs import launch
from halos_nb.records import write_json
from halos_nb.settings import Profile
from halos_nb.show import audit_report
from halos_nb.templates import CHATML, train_tokenizer

pytestmark = pytest.mark.timeout(200)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def save_model(folder, config, kind=AutoModelForCausalLM, template=CHATML, seed=1):
    "A model of two blocks with fresh weights and a tokenizer of bytes."
    torch.manual_seed(seed)
    kind.from_config(config).save_pretrained(folder)
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A policy, the same with another template, and a reward model, each in its folder."
    home = tmp_path_factory.mktemp("audited")
    save_model(home / "policy", CONFIGS["llama"]())
    save_model(home / "swapped", CONFIGS["llama"](), template=CHATML.replace("\n", " "))
    save_model(home / "no_end", CONFIGS["llama"](), template=NO_END)
    reward = CONFIGS["llama"](num_labels=2)
    save_model(home / "reward", reward, AutoModelForSequenceClassification)
    return home


def verdicts(checks):
    return {check.name: check.verdict for check in checks}


def policy_checks(path, **more):
    return run_checks(POLICY_CHECKS, Policy(AuditConfig(model=str(path), **more)))


def test_nothing_is_wrong_where_nothing_is(models):
    both = AuditConfig(
        model=str(models / "policy"), reward_model_path=str(models / "reward"), quick=True
    )
    report = audit(both)
    assert wrong_checks(report) == []
    assert {"plain", "tree", "cache", "ids", "end", "reward_scores"} <= {
        check["name"] for check in report["checks"]
    }
    assert len(report["examples"]) == 4
    for example in report["examples"]:
        assert len(example["end"]) == 1 and not example["cut"]


def test_a_swapped_template_is_found(models, tmp_path):
    "Sampled with one template, trained with another."
    sampled = Policy(AuditConfig(model=str(models / "policy")))
    write_json(tmp_path / "samples.json", sampled.drawn.records)
    cfg = AuditConfig(model=str(models / "policy"), samples=str(tmp_path / "samples.json"))
    assert room.check_samples(Policy(cfg)).verdict == "ok"
    swapped = replace(cfg, model=str(models / "swapped"))
    found = room.check_samples(Policy(swapped))
    assert found.verdict == "wrong"
    assert found.detail.startswith("8 of 8 answers were drawn with")


def test_a_checkpoint_that_reads_otherwise_is_found(models):
    cfg = AuditConfig(
        model=str(models / "policy"), from_checkpoint=str(models / "swapped"), quick=True
    )
    found = room.check_same_template(Policy(cfg))
    assert found.verdict == "wrong" and "swapped has " in found.detail


def test_a_reward_model_without_its_head_is_found(models, tmp_path):
    shutil.copytree(models / "reward", tmp_path / "headless")
    weights = load_file(tmp_path / "headless/model.safetensors")
    del weights["score.weight"]
    file = tmp_path / "headless/model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    (tmp_path / "headless/manifest.json").unlink(missing_ok=True)
    cfg = AuditConfig(reward_model_path=str(tmp_path / "headless"), quick=True)
    checks = run_checks(REWARD_CHECKS, Reward(cfg))
    assert verdicts(checks)["reward_weights"] == "wrong"
    assert "score.weight" in checks[1].detail


def test_falcons_lost_mask_is_found(tmp_path, monkeypatch):
    "A renamed attention makes Falcon forget its causal mask: put back by hand."
    shape = {k: v for k, v in SHAPE.items() if k != "intermediate_size"}
    config = FalconConfig(**shape, alibi=False, new_decoder_architecture=False)
    path = save_model(tmp_path / "falcon", config)
    load = room.load_policy
    AttentionInterface.register("renamed", sdpa_attention_forward)
    AttentionMaskInterface.register("renamed", sdpa_mask)

    def load_without_mask(*args, **more):
        model = load(*args, **more)
        model.config._attn_implementation = "renamed"
        return model

    monkeypatch.setattr(room, "load_policy", load_without_mask)
    found = room.check_plain(Policy(AuditConfig(model=path)))
    assert found.verdict == "wrong", found
    off = float(found.detail.split("off by ")[1].split()[0])
    assert off > 0.01


def test_dropout_is_found(tmp_path, monkeypatch):
    "Dropout that is switched on again behind the trainer's back."
    shape = dict(SHAPE, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    path = save_model(tmp_path / "gpt2", GPT2Config(**shape))
    make = room.make_trainer

    def make_with_dropout(cfg):
        made = make(cfg)
        for module in made.trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
                module.train = lambda mode=True, module=module: module
                module.training = True
        return made

    monkeypatch.setattr(room, "make_trainer", make_with_dropout)
    policy = Policy(AuditConfig(model=path))
    assert room.check_dropout(policy).verdict == "wrong"
    assert room.check_loss(policy).verdict == "wrong"


def test_a_missing_end_is_found(models):
    found = policy_checks(models / "no_end", quick=True)
    assert verdicts(found)["template"] == verdicts(found)["end"] == "wrong"
    details = {check.name: check.detail for check in found}
    assert "never learns to stop" in details["template"]
    assert details["end"].startswith("8 of 8 answers end with")


def test_a_reward_model_as_policy_and_the_reverse_are_found(models):
    as_policy = policy_checks(models / "reward", quick=True)
    assert verdicts(as_policy)["weights"] == "wrong"
    cfg = AuditConfig(reward_model_path=str(models / "policy"), quick=True)
    as_reward = run_checks(REWARD_CHECKS, Reward(cfg))
    assert verdicts(as_reward)["reward_weights"] == "wrong"


def test_a_token_in_front_twice_is_found(tmp_path):
    "Written by the template twice, as happens where template and tokenizer both write it."
    path = save_model(
        tmp_path / "twice", CONFIGS["llama"](), template="<|pad|><|pad|>" + CHATML
    )
    policy = Policy(AuditConfig(model=path))
    policy.tokenizer.bos_token = "<|pad|>"
    found = room.check_bos(policy)
    assert found.verdict == "wrong" and found.detail.startswith("8 of 8")


def test_a_record_that_the_template_refuses_is_named(models, tmp_path):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
    template += "{% endif %}{% endfor %}" + CHATML
    path = save_model(tmp_path / "strict", CONFIGS["llama"](), template=template)
    rows = []
    for i in range(3):
        turns = [dict(role="system", content="Be brief.")] if i == 2 else []
        turns.append(dict(role="user", content=f"What is {i}?"))
        rows.append(dict(prompt=turns))
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(rows))
    found = policy_checks(path, datasets=str(file), quick=True)
    read = next(check for check in found if check.name == "read")
    assert read.verdict == "wrong"
    assert "prompts.json, record 2" in read.detail or "prompts.json, record 3" in read.detail
    assert found[-1] == read and "nothing more can be asked" in read.detail


@pytest.mark.parametrize("split, verdict", [("", "ok"), ("test", "ok"), ("train", "wrong")])
def test_samples_of_any_split_are_looked_at(models, tmp_path, split, verdict):
    prompt = [dict(role="user", content="What is 2?")]
    sample = dict(type="sample", prompt_id="p", sample_id=0, prompt=prompt, output="Two.")
    file = tmp_path / "samples.json"
    write_json(file, [sample | dict(split="test", generator="g", dataset="d")])
    found = policy_checks(str(models / "policy"), datasets=str(file), split=split, quick=True)
    assert next(check for check in found if check.name == "read").verdict == verdict


def test_what_is_cut_is_shown_and_counted(models):
    cfg = AuditConfig(model=str(models / "policy"), max_length=60, max_prompt_length=50)
    policy = Policy(cfg)
    assert room.check_cut(policy).verdict == "counted"
    cut = [example for example in room.shown_examples(policy) if example["cut"]]
    assert cut and not cut[0]["end"]
    assert room.check_end(policy).verdict == "ok"


def test_the_command_writes_json_and_fails_where_something_is_wrong(models, tmp_path):
    out = tmp_path / "audit.json"
    command = [sys.executable, "-m", "halos_nb.audit", "--model", str(models / "no_end")]
    command += ["--quick", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1, done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert {"name", "verdict", "detail"} == set(report["checks"][0])
    assert {"prompt", "target", "end"} <= set(report["examples"][0])
    assert "\033[" not in done.stdout and "end " in done.stdout


def test_texts_of_models_are_texts():
    hostile = "\x1b[2J<script>alert(1)</script>\u202e\n"
    part = [[7, hostile]]
    example = dict(prompt=part, target=part, end=part, cut=[])
    checks = [dict(name="bos", verdict="wrong", detail=hostile)]
    report = dict(checks=checks, examples=[example])
    shown = audit_report(report)
    assert "<script" not in shown.html and "\x1b" not in shown.html + shown.text
    plain = report_text(report)
    assert "\x1b" not in plain and "\u202e" not in plain
    assert printable("a\u202eb") == "a\\u202eb"
    coloured = report_text(report, colours=True)
    assert "\x1b[2J" not in coloured and "\x1b[34m" in coloured


def test_the_names_of_the_checks_are_documented():
    "Names are read by other tools: changing one is a decision."
    assert list(POLICY_CHECKS) == [
        "files",
        "weights",
        "template",
        "same_template",
        "read",
        "vocabulary",
        "bos",
        "end",
        "ids",
        "drawn_logps",
        "plain",
        "tree",
        "batch",
        "cache",
        "cache_batch",
        "dropout",
        "reference",
        "loss_float32",
        "loss_bfloat16",
        "save",
        "merge",
        "cut",
        "special",
        "samples",
        "unfinished",
    ]
    assert all(check.__doc__ for check in [*POLICY_CHECKS.values(), *REWARD_CHECKS.values()])


@pytest.mark.parametrize("end, words", [(71, "in their midst"), (99_999, "beyond")])
def test_an_end_that_is_a_letter_or_no_token_is_found(models, tmp_path, end, words):
    "Every sample would be cut there, and trained as finished."
    shutil.copytree(models / "policy", tmp_path / "cut")
    file = tmp_path / "cut/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(eos_token_id=[71, end])))
    (tmp_path / "cut/manifest.json").unlink(missing_ok=True)
    found = room.check_end(Policy(AuditConfig(model=str(tmp_path / "cut"), quick=True)))
    assert found.verdict == "wrong" and words in found.detail


def test_a_reward_model_that_says_one_number_is_counted(models, tmp_path):
    shutil.copytree(models / "reward", tmp_path / "flat")
    file = tmp_path / "flat/model.safetensors"
    weights = load_file(file)
    weights["score.weight"].zero_()
    save_file(weights, file, metadata={"format": "pt"})
    (tmp_path / "flat/manifest.json").unlink(missing_ok=True)
    found = room.check_reward_scores(
        Reward(AuditConfig(reward_model_path=str(tmp_path / "flat"), quick=True))
    )
    assert found.verdict == "counted" and "one score, 0" in found.detail


@pytest.mark.parametrize("launcher", ["auto", "accelerate"])
def test_under_shared_weights_the_audit_is_made_and_has_one_check_more(
    models, tmp_path, launcher
):
    profile = Profile(
        name="shared", accelerate_config="fsdp2_cpu2", cpu=True, threads=1, launcher=launcher
    )
    cfg = AuditConfig(model=str(models / "policy"), json=str(tmp_path / "audit.json"))
    launch("audit", cfg, profile, tmp_path).wait(show=False)
    checks = {c["name"]: c for c in json.loads((tmp_path / "audit.json").read_text())["checks"]}
    assert checks["shared"]["verdict"] == "ok", checks["shared"]
    assert len(checks) > 5

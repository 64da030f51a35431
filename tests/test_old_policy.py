"""Whose log-probs a ratio is to: the samples', a pass's, the reference's; and the weights."""

import math

import pytest
import torch
from safetensors.torch import load_file

from halos_nb.configs import SampleConfig, TrainConfig
from halos_nb.models import load_policy, small_llama
from halos_nb.records import read_jsonl, read_records, write_json
from halos_nb.sample import main as sample
from halos_nb.templates import byte_tokenizer
from halos_nb.train import make_trainer, train


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A start, another model beside it, and answers of the start with scores and log-probs."
    home, tok = tmp_path_factory.mktemp("old"), byte_tokenizer()
    for name, seed in (("start", 0), ("other", 1)):
        model = small_llama(tok, hidden_size=32, seed=seed, initializer_range=0.2)
        model.save_pretrained(home / name)
        tok.save_pretrained(home / name)
    prompts = [dict(prompt=[dict(role="user", content=f"Say {n}.")]) for n in range(6)]
    write_json(home / "prompts.json", prompts)
    draw(home, "told.json")
    return home


def draw(home, name, **more):
    "Four answers to each prompt, as scalar feedback."
    options = dict(max_new_tokens=12, num_samples_per_prompt=4) | more
    path = home / f"samples-{name}"
    start = dict(model=str(home / "start"))
    files = dict(datasets=[str(home / "prompts.json")], output_file=str(path))
    sample(SampleConfig(**start | files | options))
    rows = []
    for i, row in enumerate(read_records(path)):
        output = [dict(role="assistant", content=row["output"])]
        rows.append(row | dict(output=output, reward=float(i % 4), type="scalar_feedback"))
    write_json(home / name, rows)


def rewrite(home, source, name, change):
    "The same feedback, each record changed."
    rows = read_records(home / source)
    write_json(home / name, [change(dict(row)) for row in rows])
    return name


def config(home, file="told.json", loss="grpo", **more):
    given = dict(model=str(home / "start"), lr=1e-3, warmup=0, batch_size=2, epochs=1)
    given |= dict(exp_name="policy", cache_dir=str(home / "out"))
    return TrainConfig(loss=loss, train_datasets=[str(home / file)], **given | more)


def steps_of(home):
    rows = read_jsonl(home / "out/policy/metrics.jsonl")
    return [row for row in rows if "loss" in row]


def old_of(cfg):
    "The old log-probs that a run keeps, and its trainer."
    trainer, _ = make_trainer(cfg)
    trainer.begin()
    return [row for tree in trainer.loader.trees for row in tree.old], trainer


def test_samples_own_log_probs_are_those_of_a_pass(home):
    told, trainer = old_of(config(home))
    assert trainer.notes["old_policy"] == "samples"
    assert trainer.notes["sampler_difference"] < 1e-4
    passed, trainer = old_of(config(home, old_policy="pass"))
    assert trainer.notes["old_policy"] == "pass"
    for one, other in zip(told, passed, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_the_ratio_is_to_the_round_s_first_policy_and_the_KL_to_the_reference(home):
    "A round that begins from another policy than the reference: its first ratio is 1."
    cfg = config(home, load_from=str(home / "other"))
    train(cfg)
    first, *_, last = steps_of(home)
    assert first["rewards_train/KL"] > 0.05, "the reference is another model"
    assert first["rewards_train/clipped"] == 0
    weighted = first["rewards_train/weighted_advantage"]
    # each answer's ratio is 1, so the mean over its tokens is that of |advantage|
    trainer, _ = make_trainer(cfg)
    step = next(iter(trainer.loader))
    total = tokens = 0.0
    for batch in step.batches:
        total += (batch.fact("advantage").abs()[:, None] * batch.mask).sum().item()
        tokens += batch.mask.sum().item()
    assert weighted == pytest.approx(total / tokens, rel=1e-4)
    as_before = config(home, load_from=str(home / "other"), old_policy="reference")
    train(as_before)
    assert steps_of(home)[0]["rewards_train/clipped"] > 0.1


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda row: row | dict(output_logps=None), "24 of 24 answers came without"),
        (lambda row: row | dict(temperature=0.7), "temperature 0.7, top_p 1.0"),
        (lambda row: row | dict(top_p=0.9), "temperature 1.0, top_p 0.9"),
        (
            lambda row: row | dict(output_logps=[x - 0.5 for x in row["output_logps"]]),
            "0.5 nats a token from this policy's",
        ),
        (lambda row: row | dict(tokenizer="another"), "24 of 24 answers came without"),
    ],
    ids=["none", "temperature", "top_p", "another policy", "another tokenizer"],
)
def test_what_is_not_this_policy_s_is_not_taken_for_it(home, change, why):
    name = rewrite(home, "told.json", "changed.json", change)
    old, trainer = old_of(config(home, name))
    assert trainer.notes["old_policy"].startswith("pass (")
    assert why in trainer.notes["old_policy"]
    assert all(math.isfinite(x) for row in old for x in row)
    if "nats" not in why:
        with pytest.raises(ValueError, match="old_policy: samples cannot be taken, "):
            old_of(config(home, name, old_policy="samples"))


def test_a_sampler_that_is_not_the_policy_is_weighed_and_told(home):
    "Drawn at temperature 2: what the policy finds likely came too rarely, and counts more."
    draw(home, "hot.json", temperature=2.0)
    cfg = config(home, "hot.json", importance_cap=1.5)
    result = train(cfg)
    assert "temperature 2.0" in result.counts["old_policy"]
    row = steps_of(home)[0]
    told = read_records(home / "hot.json")
    assert 0 < row["rewards_train/importance_cut"] < 1
    assert row["rewards_train/sampler_difference"] > 0.01
    assert row["rewards_train/importance"] < 1.5
    # by hand: the mean of min(policy / sampler, 1.5) over the first step's tokens
    trainer, _ = make_trainer(cfg)
    trainer.begin()
    step = next(iter(trainer.loader))
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in step.batches:
        for tree in batch.trees:
            for old, sampled in zip(tree.old, tree.sampled):
                ratio = (torch.tensor(old) - torch.tensor(sampled)).exp().clamp(max=1.5)
                sums += torch.tensor([ratio.sum(), len(old)], dtype=torch.float64)
    assert row["rewards_train/importance"] == pytest.approx(
        (sums[0] / sums[1]).item(), rel=1e-5
    )
    assert len(told) == 24


def test_many_epochs_have_one_old_policy(home):
    "The second epoch is compared with the policy before the first, not with a newer one."
    cfg = config(home, old_policy="pass", epochs=3, lr=5e-3)
    old, trainer = old_of(cfg)
    train(cfg)
    rows = steps_of(home)
    assert rows[0]["rewards_train/clipped"] == 0
    assert rows[-1]["rewards_train/clipped"] > 0, "by now the policy has left it"


def test_ppo_takes_the_same_old_policy(home):
    train(config(home, loss="ppo", file=binary(home), load_from=str(home / "other")))
    first = steps_of(home)[0]
    assert first["loss/policykl"] == pytest.approx(0, abs=1e-4)
    assert first["loss/KL"] > 0.05
    result = train(config(home, loss="ppo", file=binary(home), ppo_reward="score"))
    assert result.counts["old_policy"] == "samples"
    assert 0 < steps_of(home)[0]["rewards"] < 3


def binary(home):
    def good_or_bad(row):
        return row | dict(label=int(row["reward"] > 1), type="binary_feedback")

    return rewrite(home, "told.json", "binary.json", good_or_bad)


def test_pairs_and_labels_feed_groups(home):
    "Pairwise feedback is a group too, with its scores, as the predecessor's scripts have it."
    from halos_nb.feedback import convert_to_pairwise_feedback

    samples = read_records(home / "samples-told.json")
    for i, row in enumerate(samples):
        row["reward"] = float(i % 4)
    write_json(home / "pairs.json", convert_to_pairwise_feedback(samples, 0, "random"))
    for name in ("pairs.json", binary(home)):
        trainer, _ = make_trainer(config(home, name))
        assert [len(tree.branches) for tree in trainer.loader.trees] == [4] * 6
        trainer.begin()
        assert trainer.notes["old_policy"] == "samples"
        assert trainer.loader.trees[0].facts["score"] == [0.0, 1.0, 2.0, 3.0] or sorted(
            trainer.loader.trees[0].facts["score"]
        ) == [0.0, 1.0, 2.0, 3.0]


def test_the_value_head_has_its_own_rate_and_nothing_reaches_the_policy(home):
    "Detached and without advantages' gradient, only the head learns; at its own rate."
    more = dict(
        loss="ppo", file=binary(home), critic_lr=0.05, critic_detach=True, critic_coef=1.0
    )
    trainer, _ = make_trainer(config(home, **more))
    trainer.train()
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert rates == {1e-3, 0.05}
    step = next(iter(trainer.loader))
    for batch in trainer.prepare(step):
        trainer.model.zero_grad()
        value = trainer.forward(trainer.model, batch).values.sum()
        value.backward()
        with_grad = [n for n, p in trainer.model.named_parameters() if p.grad is not None]
        assert all(
            "value_head" in name or not trainer.model.get_parameter(name).grad.any()
            for name in with_grad
        )
        assert any("value_head" in name for name in with_grad)


def test_the_heads_gradient_is_scaled_apart(home):
    more = dict(loss="ppo", file=binary(home), critic_coef=100.0, critic_max_grad_norm=0.1)
    trainer, _ = make_trainer(config(home, **more))
    seen = []
    clip = type(trainer)._clip_grad_norm

    def watch(model):
        norm = clip(trainer, model)
        head = [p.grad for n, p in model.named_parameters() if "value_head" in n]
        seen.append(torch.cat([g.flatten() for g in head]).norm().item())
        return norm

    trainer._clip_grad_norm = watch
    trainer.train()
    assert max(seen) <= 0.1 * 1.001


def test_a_policy_that_has_not_moved_has_ratio_one_in_bfloat16(home):
    cfg = config(home, old_policy="pass", precision="bfloat16")
    trainer, _ = make_trainer(cfg)
    trainer.begin()
    step = next(iter(trainer.loader))
    trainer.model.train()
    for batch in step.batches:
        now = trainer.forward(trainer.model, batch).detach()
        assert torch.equal(now, batch.kept("old"))


def test_the_policy_on_disk_is_the_one_that_was_trained(home):
    "What `begin` looked at did not change it: with a rate of nearly nothing it stays."
    train(config(home, old_policy="pass", lr=1e-7))
    before = load_policy(str(home / "start")).state_dict()
    after = load_file(home / "out/policy/FINAL/model.safetensors")
    for name, weight in after.items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-5)


def test_the_first_evaluation_has_the_same_objective_as_the_others(home):
    "Held-out answers have their old policy before the first look, not only for training."
    name = rewrite(home, "told.json", "held.json", lambda row: row | dict(split="test"))
    more = dict(load_from=str(home / "other"), test_datasets=[str(home / name)], lr=1e-6)
    for loss in ("grpo", "ppo"):
        file = binary(home) if loss == "ppo" else "told.json"
        if loss == "ppo":
            bad = rewrite(
                home, binary(home), "held2.json", lambda row: row | dict(split="test")
            )
            more["test_datasets"] = [str(home / bad)]
        train(config(home, file, loss, **more))
        rows = read_jsonl(home / "out/policy/metrics.jsonl")
        losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
        assert len(losses) == 2
        assert losses[0] == pytest.approx(losses[1], abs=1e-3), "nothing was learnt in between"


def test_held_out_answers_without_log_probs_get_a_pass(home):
    def untold(row):
        return row | dict(split="test", output_logps=None)

    name = rewrite(home, "told.json", "untold.json", untold)
    result = train(config(home, test_datasets=[str(home / name)]))
    assert result.counts["old_policy"].startswith("pass (24 of 48 answers came without")
    assert math.isfinite(result.evaluation["eval_loss"])


@pytest.mark.parametrize("seed", range(3))
def test_answers_of_two_policies_are_not_taken_for_one(home, seed):
    "Half of them by another: whichever steps come first, the log-probs are not this policy's."
    draw(home, "others.json", model=str(home / "other"), seed=5)
    mixed = []
    for i, (own, other) in enumerate(
        zip(read_records(home / "told.json"), read_records(home / "others.json"))
    ):
        mixed.append(own if i // 4 % 2 else other)
    write_json(home / "mixed.json", mixed)
    _, trainer = old_of(config(home, "mixed.json", batch_size=1, seed=seed))
    assert trainer.notes["old_policy"].startswith("pass (the sampler's")


@pytest.mark.parametrize(
    "more",
    [dict(humanline=True), dict(old_policy="reference"), dict(reference="previous")],
)
def test_a_penalty_that_would_be_nothing_is_refused(home, more):
    with pytest.raises(ValueError, match="KL_in: the policy that sampled is the reference"):
        config(home, loss="ppo", KL_in="reward", **more)


def test_another_optimiser_is_named(home):
    file = binary(home)
    train(config(home, file, "ppo", exp_name="one"))
    later = dict(from_checkpoint=str(home / "out/one/FINAL"), exp_name="two")
    with pytest.raises(ValueError, match="from_checkpoint: the optimiser of .*critic_lr"):
        train(config(home, file, "ppo", critic_lr=0.01, **later))

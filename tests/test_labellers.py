"""Any labeller in the loop: judges over real HTTP, functions, several reward models, people,
and several of them together; what it costs, and what a killed run has paid.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import every
import torch
from job_helpers import NEEDS_LINUX, quiet
from test_judge import Server
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from halos_nb import ledger
from halos_nb.configs import LabelConfig, LoopConfig
from halos_nb.failures import StageError
from halos_nb.identity import RunFiles, Stage
from halos_nb.judge import Budget, Judge, Question, question, questions_of_pair
from halos_nb.label import main
from halos_nb.loop import FRAME, CostError, Loop, estimate, round_samples, run_rounds
from halos_nb.page import report
from halos_nb.records import as_turns, read_jsonl, read_records, write_json, write_records
from halos_nb.runs import run_summary
from halos_nb.settings import Profile, Settings
from halos_nb.templates import byte_tokenizer

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("stages_on_path"),
    NEEDS_LINUX,
]
REAL = ("halos_nb.label", "halos_nb.people")  # the others pretend
FEW = dict(total_prompts=8, prompts_per_round=4, num_samples_per_prompt=4)


@pytest.fixture
def loop(tmp_path, monkeypatch, stages_on_path):
    "`loop(look=..., **parameters)`: the rounds of a run whose labelling is real."
    launch = ledger.launch

    def launch_some(stage, cfg, profile, folder, module, **more):
        module = module if module in REAL else "pretend"
        return launch(stage, cfg, profile, folder, module, **more)

    monkeypatch.setattr(ledger, "launch", launch_some)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/weights").write_text("sft")
    for name in ("prompts", "heldout"):
        (tmp_path / f"{name}.json").write_text("[]")
    given = FEW | dict(
        run_name="r",
        sft_checkpoint=str(tmp_path / "sft"),
        prompts=str(tmp_path / "prompts.json"),
        heldout_prompts=str(tmp_path / "heldout.json"),
        audit="skip",
        alarm="skip",
        lr=3e-4,
    )
    settings = Settings(runs_dir=str(tmp_path / "runs"))

    def rounds(look=None, watch=quiet, on_estimate=print, **more):
        seen = []
        cfg = LoopConfig(**given | more)
        for this in run_rounds(cfg, settings, watch=watch, on_estimate=on_estimate):
            if look:
                look(this)
            seen.append(this)
        return seen

    rounds.settings, rounds.given = settings, given
    return rounds


# ---- a judge that likes x: an answer of `pretend` has as many as its number


def answers_in(body):
    text = body["messages"][-1]["content"]
    return re.findall(r"<answer.*?>\n(.*?)\n</answer", text, re.S)


def worth(answer):
    "More x is better, then the later seed."
    xs, _, seed = answer.partition(" ")
    return len(xs), int(seed)


def likes_x(body, times):
    shown = answers_in(body)
    if len(shown) == 1:
        return json.dumps(dict(why="", score=worth(shown[0])[0]))
    first, second = map(worth, shown)
    return json.dumps(dict(why="", winner="A" if first > second else "B"))


def of_judge(server, **more):
    return dict(api_model="toy", judge_url=server.url) | more


PRICES = dict(input_price=1.0, output_price=2.0)
PAID = (40 * 1.0 + 10 * 2.0) / 1e6  # USD: the usage that the server tells of each answer


def params(tmp_path):
    return json.loads((tmp_path / "runs/r/params.json").read_text())


def test_a_scalar_judge(loop, tmp_path):
    said = []
    with Server(likes_x) as server:
        given = of_judge(server, method="kto", **PRICES)
        start, first, second, final = loop(on_estimate=said.append, **given)
        asked = len(server.heard)
        again = loop(**given)  # all of it stands, and nobody is asked again
        assert len(server.heard) == asked == 4 * 16
    assert [r.skipped for r in again][1] == ["sample", "judge", "label", "train"]
    assert first.labelled_by == "toy (scalar)"
    assert f"labelled by toy (scalar), for ${16 * PAID:.4f}" in str(first)
    rewards = [s["reward"] for s in round_samples(first.folder)]
    assert Counter(rewards) == Counter({0.0: 4, 1.0: 4, 2.0: 4, 3.0: 4})
    assert {r["label"] for r in read_records(first.feedback_file)} == {0, 1}
    assert [said[0].questions[n] for n in ("start", "round-1", "final")] == [16] * 3
    assert said[0].at_most >= 64 * PAID and said[0].spent == 0
    told = params(tmp_path)["labelling"]
    assert (told["at_most"], told["spent"]) == (0, pytest.approx(64 * PAID))
    rows = run_summary(tmp_path / "runs/r")
    assert [row["cost"] for row in rows] == pytest.approx([16 * PAID] * 4)
    assert [row["reward"] for row in rows] == [1.5] * 4


def test_a_pairwise_judge_in_both_orders(loop, tmp_path):
    with Server(likes_x) as server:
        given = of_judge(server, judge="pairwise", label_options="max_tokens=64")
        start, first, second, final = loop(**given)
        orders = Counter(tuple(answers_in(body)) for body in server.heard)
    assert all(orders[a, b] == orders[b, a] for a, b in orders)
    assert len(server.heard) == 2 * (8 + 8 + 16)  # no question at the start
    assert first.counts["label"]["records"] == 8 and not first.counts["label"]["ties"]
    for row in read_records(first.feedback_file, "pairwise_feedback"):
        better = row["output_A"] if row["label"] else row["output_B"]
        worse = row["output_B"] if row["label"] else row["output_A"]
        assert worth(better[0]["content"]) > worth(worse[0]["content"])
    # no reward is made up; what is known is who wins
    assert {s["reward"] for s in round_samples(first.folder)} == {None}
    rows = run_summary(tmp_path / "runs/r")
    assert [row["round"] for row in rows] == ["start", "1", "2", "final"]
    assert [row["reward"] for row in rows] == [None] * 4
    assert rows[-1]["win_rate"] in (0.0, 1.0)  # the later seed, for every pair
    assert "won of 16 pairs" in str(final)
    assert start.counts.keys() == {"sample"} and start.labelled_by == "nobody"
    page = report(tmp_path / "runs/r").read_text()
    assert "toy (pairwise)" in page and "win_rate" in page


def test_an_empty_comparison_is_a_tie(loop):
    "Answers that are all equally good end the run well."

    def undecided(body, times):
        shown = [worth(answer)[0] for answer in answers_in(body)]
        winner = "tie" if shown[0] == shown[1] else "AB"[shown[0] < shown[1]]
        return json.dumps(dict(why="", winner=winner))

    with Server(undecided) as server:
        final = loop(total_prompts=4, **of_judge(server, judge="pairwise"))[-1]
    assert "50.0% won of 16 pairs (0 better, 0 worse, 16 ties)" in str(final)


@every
def test_a_function_alone(loop, tmp_path, monkeypatch):
    (tmp_path / "rules.py").write_text("def length(prompt, output):\n    return len(output)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    start, first, *_ = loop(total_prompts=4, function="rules:length", threshold=0)
    assert first.labelled_by == "rules:length"
    for sample in round_samples(first.folder):
        assert sample["reward"] == len(sample["output"])
    assert set(first.seconds) == {"sample", "label", "train"}


# ---- several reward models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Two random reward models; the second speaks in numbers a hundred times as large."
    folder, tok, paths = tmp_path_factory.mktemp("rms"), byte_tokenizer(), []
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    shape |= dict(num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)
    for seed, size in enumerate((1, 100)):
        torch.manual_seed(seed)
        ids = dict(vocab_size=len(tok), pad_token_id=0, eos_token_id=2, bos_token_id=None)
        model = LlamaForSequenceClassification(LlamaConfig(num_labels=1, **ids, **shape))
        model.score.weight.data *= size
        paths.append(str(folder / f"rm-{seed}"))
        model.save_pretrained(paths[-1])
        tok.save_pretrained(paths[-1])
    return paths


def samples_of(prompts, each=4):
    rows = []
    for p in range(prompts):
        for k in range(each):
            row = dict(prompt_id=f"p{p}", sample_id=k, prompt=as_turns(f"{p}?", "user"))
            rows.append(row | dict(output="x" * (1 + 3 * k + p), type="sample"))
    return rows


def label(folder, name, model, **more):
    given = dict(samples_file=str(folder / "samples.json"), reward_model_path=model)
    out = folder / f"{name}.json"
    counts = main(LabelConfig(output_file=str(out), feedback_type="scalar", **given, **more))
    return counts, read_jsonl(folder / f"{name}.labels.jsonl")


def test_several_reward_models_are_weighed_in_their_own_units(tmp_path, models):
    write_records(tmp_path / "samples.json", samples_of(5))
    alone = [[r["score"] for r in label(tmp_path, f"m{i}", m)[1]] for i, m in enumerate(models)]
    counts, rows = label(tmp_path, "both", f"{models[0]}*3, {models[1]}")
    units = []
    for said, path in zip(alone, models):
        mean = sum(said) / len(said)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in said) / len(said))
        units.append((mean, deviation))
        assert counts["units"][path] == pytest.approx([mean, deviation], rel=1e-5)
    for a, b, row in zip(*alone, rows):
        (m0, d0), (m1, d1) = units
        assert row["score"] == pytest.approx((3 * (a - m0) / d0 + (b - m1) / d1) / 4, abs=1e-5)
        assert list(row["scores"].values()) == pytest.approx([a, b], rel=1e-5)
    # another file has the same unit, so its mean need not be 0
    (tmp_path / "late").mkdir()
    write_records(tmp_path / "late/samples.json", samples_of(5)[:4])
    both = f"{models[0]}*3, {models[1]}"
    before = str(tmp_path / "both.counts.json")
    _, late = label(tmp_path / "late", "both", both, units_from=before)
    assert [r["score"] for r in late] == pytest.approx([r["score"] for r in rows[:4]], abs=1e-5)
    with pytest.raises(ValueError, match="units_from: .* knows no unit of "):
        label(tmp_path, "x", both, units_from=str(tmp_path / "m0.counts.json"))


@every
def test_several_reward_models_in_the_loop(loop, tmp_path, models):
    both = f"{models[0]}*0.7, {models[1]}*0.3"
    start, first, second, final = loop(reward_checkpoint=both, method="grpo")
    units = [this.counts["label"]["units"] for this in (start, first, second, final)]
    assert units == [units[0]] * 4
    [one, *_] = read_jsonl(first.labels_file)
    assert list(one["scores"]) == models and "0.7" in first.labelled_by
    mean = sum(s["reward"] for s in round_samples(start.folder)) / 16
    assert mean == pytest.approx(0, abs=1e-5)


@every
def test_a_language_model_here_compares_in_the_loop(loop, tmp_path):
    tok, shape = byte_tokenizer(), dict(hidden_size=16, intermediate_size=16)
    ids = dict(vocab_size=len(tok), pad_token_id=0, eos_token_id=2, bos_token_id=None)
    shape |= dict(num_hidden_layers=2, num_attention_heads=2, initializer_range=1.0)
    config = LlamaConfig(**ids, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    tok.save_pretrained(tmp_path / "lm")
    more = dict(max_length=2048, judge_model_path=str(tmp_path / "lm"))
    _, first, _ = loop(method="dpo", total_prompts=4, **more)
    looks = read_jsonl(first.folder / "lm.labels.jsonl")
    assert {row["type"] for row in looks} == {"comparison"}
    assert {row["labeller"] for row in looks} == {f"lm:{tmp_path / 'lm'}"}
    assert first.counts["label"]["records"] > 0 and str(tmp_path / "lm") in first.labelled_by


# ---- people


ANSWER = """
import sys, time
from halos_nb.configs import PeopleConfig
from halos_nb.people import open_questions
import json, pathlib
folder, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])
config = folder / "human-ada.config.json"
while not (config.exists() and (folder / "human-ada.session.jsonl").exists()):
    time.sleep(0.05)
session, _ = open_questions(PeopleConfig(**json.loads(config.read_text())))
for item in session.open_items[:number]:
    shown = session.show(item)
    session.choose("left" if shown["left"] > shown["right"] else "right")
"""


def person(folder, number=99):
    "Another process that presses keys in a round's session, as soon as there is one."
    return subprocess.Popen([sys.executable, "-c", ANSWER, str(folder), str(number)])


def test_people_are_waited_for(loop, tmp_path):
    "Killed while it waits, and continued; the second round is left open, then gone on with."
    run = tmp_path / "runs/r"
    given = dict(labeller="human:ada", num_pairs=3, heldout_prompts="")
    with pytest.raises(StageError, match="3 of 3 pairs wait for human:ada"):
        loop(wait_minutes=0, **given)
    with person(run / "round-1", 2) as two:
        two.wait(60)
    with pytest.raises(
        StageError, match=r"(?s)1 of 3 pairs wait.*label_round.ipynb, run_name=r"
    ):
        loop(wait_minutes=0, **given)
    helper = person(run / "round-1")
    late = person(run / "round-2")
    rows = []

    def watch(job, **shown):
        job.wait(show=False)
        if job.stage == "human-ada":
            rows.extend(read_jsonl(job.file("progress.jsonl")))

    first, second, final = loop(watch=watch, **given)
    assert (helper.wait(60), late.wait(60)) == (0, 0)
    assert rows[0]["label"] == "human:ada in label_round.ipynb, run_name=r"
    assert (rows[-1]["done"], rows[-1]["total"], rows[-1]["left"]) == (3, 3, 0)
    said = read_jsonl(first.folder / "human-ada.labels.jsonl")
    assert len(said) == 3 and {r["labeller"] for r in said} == {"human:ada"}
    assert first.counts["label"]["records"] == 3
    assert final.counts.keys() == {"sample"}  # people are not asked unless asked for


def test_open_pairs_may_be_skipped(loop, tmp_path):
    with person(tmp_path / "runs/r/round-1", 1):
        [first, _] = loop(
            labeller="human:ada",
            heldout_prompts="",
            total_prompts=4,
            wait_minutes=0.2,
            pending="skip",
        )
    assert first.counts["human-ada"]["open"] == 7
    assert first.counts["label"]["records"] == 1
    assert "human-ada: open 7" in str(first)


def test_people_decide_what_others_dispute(loop, tmp_path):
    "A rule, a judge and a person, who is shown only where the two contradict."
    with Server(likes_x) as server, person(tmp_path / "runs/r/round-1"):
        [first, _] = loop(
            labeller="function, judge, human:ada",
            combine="human-where-they-disagree",
            function="pretend:contrary",
            heldout_prompts="",
            total_prompts=4,
            **of_judge(server, judge="pairwise"),
        )
    counts = first.counts["human-ada"]
    assert counts["pairs_shown"] + counts["undisputed"] == 8
    assert counts["pairs_shown"] == 4
    # ada and the judge like the same, so wherever she was asked the judge wins
    assert first.counts["label"]["records"] == 8
    for row in read_records(first.feedback_file, "pairwise_feedback"):
        better, worse = "AB" if row["label"] else "BA"
        texts = [row[f"output_{side}"][0]["content"] for side in (better, worse)]
        assert worth(texts[0]) > worth(texts[1])
    # the rule's scores are there to be looked at
    assert None not in {s["reward"] for s in round_samples(first.folder)}


def scores_of(folder, name):
    rows = read_jsonl(folder / f"{name}.labels.jsonl")
    return {(r["prompt_id"], r["sample_id"]): r["score"] for r in rows}


def rewards_of(folder):
    return {(s["prompt_id"], s["sample_id"]): s["reward"] for s in round_samples(folder)}


def test_scores_are_put_together(loop, models, tmp_path, monkeypatch):
    "A reward model and a judge of scores vote; another reward model looks on."
    with Server(likes_x) as server:
        given = dict(labeller="rm, judge", reward_checkpoint=models[0], method="grpo")
        given |= dict(watch_reward=models[1], total_prompts=4)
        start, first, final = loop(**given, **of_judge(server))
    rewards = {r["reward"] for r in read_records(first.feedback_file, "scalar_feedback")}
    assert rewards <= {n / 6 for n in range(7)}
    watched = scores_of(first.folder, "watch")
    assert rewards_of(first.folder) == watched
    assert [s["watch"] for s in round_samples(first.folder)] == list(watched.values())
    assert "watch" in run_summary(tmp_path / "runs/r")[0]


@pytest.mark.parametrize("combine", ["vote", "mean"])
def test_what_a_run_of_several_is_followed_by(loop, models, tmp_path, combine):
    "Half of a prompt's comparisons are won in every round: a vote says nothing of a policy."
    with Server(likes_x) as server:
        given = dict(labeller="rm, judge", reward_checkpoint=models[0], method="grpo")
        start, first, final = loop(
            **given, total_prompts=4, combine=combine, **of_judge(server)
        )
    seen, of_rm = rewards_of(first.folder), scores_of(first.folder, "rm")
    if combine == "vote":
        assert seen == of_rm
    else:
        judged = scores_of(first.folder, "judge")
        assert seen == {key: (of_rm[key] + judged[key]) / 2 for key in seen}
    rows = run_summary(tmp_path / "runs/r")
    assert len({row["reward"] for row in rows}) == len(rows) == 3
    named = params(tmp_path)["reward"]
    assert named == dict(vote="reward model score", mean="mean score (rm, judge)")[combine]


def test_what_is_known_of_a_vote_is_that_of_these_scores(tmp_path):
    "A journal may know the health of answers by other scores; it is looked at anew."
    folder = tmp_path / "round-1"
    folder.mkdir()
    turns = [dict(role="user", content="?")]
    rows = [dict(prompt_id="p", sample_id=k, prompt=turns, output="a b") for k in (0, 1)]
    write_records(folder / "samples.json", [dict(row, type="sample") for row in rows])
    write_json(folder / "label.config.json", dict(combine="vote"))
    files = [folder / "feedback.labels.jsonl", folder / "rm.labels.jsonl"]

    def say(file, *scores):
        ids = [{name: row[name] for name in ("prompt_id", "sample_id")} for row in rows]
        said = dict(labeller="rm", reason="")
        file.write_text(
            "".join(json.dumps(i | said | dict(score=s)) + "\n" for i, s in zip(ids, scores))
        )

    say(files[0], 0.0, 1.0)
    stage = Stage("label", folder, None, [], [folder / "feedback.json", *files[:1]])
    write_records(folder / "feedback.json", [])
    run = Loop(LoopConfig(lr=1.0), RunFiles(tmp_path, Profile()))
    for mean in (2.0, 3.0):
        say(files[1], mean - 1, mean + 1)
        now, seen = run.health_of(stage)
        assert now.score == mean
        run.known[seen] = now


# ---- costs


def test_a_run_that_may_cost_too_much_does_not_start(loop, tmp_path, capsys):
    with Server(likes_x) as server:
        given = of_judge(server, **PRICES)
        with pytest.raises(CostError, match="max_cost: up to .* so nothing was started"):
            loop(max_cost=0.01, **given)
        with pytest.raises(CostError, match="max_requests: 64 questions are more than 63"):
            loop(max_requests=63, **given)
        assert "judge toy: 0 questions asked before, at most 64" in capsys.readouterr().out
        assert loop(dry_run=True, **given) == []
        assert not server.heard
    assert not (tmp_path / "runs/r/start").exists()
    # a dry run leaves what the runs before it have written
    assert params(tmp_path)["ended"].startswith("stopped by the cap: max_requests")


def test_a_run_stops_between_rounds_and_keeps_what_was_paid(loop, tmp_path):
    "Answers that cost more than anybody could expect; with a higher cap it goes on."
    dear = dict(prompt_tokens=90000, completion_tokens=10, total_tokens=90010)

    def reply(body, times):
        answer = likes_x(body, times)
        choice = dict(index=0, message=dict(role="assistant", content=answer))
        more = dict(id="x", object="chat.completion", created=1, model="toy", usage=dear)
        return 200, more | dict(choices=[choice | dict(finish_reason="stop")])

    with Server(reply) as server:
        given = of_judge(server, heldout_prompts="", label_measured="no", **PRICES)
        seen = []
        with pytest.raises(CostError, match="round-2 is labelled, so the run stops before it"):
            loop(seen.append, max_cost=1.45, **given)
        assert [this.name for this in seen] == ["round-1"]
        assert "stopped by the cap" in params(tmp_path)["ended"]
        assert len(server.heard) == 16
        assert (tmp_path / "runs/r/policy").resolve() == seen[0].policy
        rounds = loop(max_cost=9, **given)
        assert len(server.heard) == 32  # and nothing was asked twice
    assert [this.name for this in rounds] == ["round-1", "round-2", "final"]


def test_an_estimate_is_no_less_than_what_is_read():
    "The frame of a question, with what stands around prompt and answers."
    for kind, names in (("scalar", ["output"]), ("pairwise", ["output_A", "output_B"])):
        nothing = Question({}, dict.fromkeys(["prompt", *names], ""))
        assert Budget(Judge("m", kind)).tokens(nothing) <= FRAME


def test_an_estimate_counts_the_prompts_as_a_judge_is_shown_them(tmp_path):
    "It is no less than what the judge's stage holds back for all the questions of the run."
    words = [3, 900, 40, 7, 2000, 1]
    turns = [as_turns(f"{n} " + "Name a star. " * n) for n in words]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(dict(prompt=one)) + "\n" for one in turns))
    for kind in ("scalar", "pairwise"):
        given = dict(judge=kind, labeller="judge", api_model="j", lr=1e-4, **PRICES)
        given |= dict(sft_checkpoint="a", prompts=str(prompts), label_measured="no")
        cfg = LoopConfig(**given, **FEW | dict(total_prompts=6))
        told = estimate(cfg, tmp_path / "run")
        judge = Judge("j", kind, max_tokens=told.written)
        budget = Budget(judge, cfg.input_price, cfg.output_price)
        held = longest = 0.0
        for number, prompt in enumerate(turns):
            answers = []
            for sample_id in range(FEW["num_samples_per_prompt"]):
                said = "answer " * cfg.max_new_tokens
                ids = dict(prompt_id=str(number), sample_id=sample_id)
                answers.append(ids | dict(prompt=prompt, output=said[: 6 * cfg.max_new_tokens]))
            asked = [question(answer) for answer in answers]
            if kind == "pairwise":
                asked = questions_of_pair(*answers[:2]) + questions_of_pair(*answers[2:])
            held += sum(map(budget.dearest, asked))
            longest = max(longest, *map(budget.tokens, asked))
        assert sum(told.questions.values()) == 24
        assert longest <= told.read < 1.2 * longest
        assert held <= told.at_most < 1.5 * held
        assert f"prompts whole, the longest about {told.longest:,}" in str(told)
    unread = estimate(LoopConfig(**given | dict(prompts="gone"), **FEW), tmp_path / "run")
    assert "not all prompts can be read here, so max_prompt_length" in str(unread)


KILLED = """
import sys, json
sys.path.insert(0, {here!r})
from halos_nb import ledger
from halos_nb.configs import LoopConfig
from halos_nb.loop import run_rounds
from halos_nb.settings import Settings
launch = ledger.launch
def some(stage, cfg, profile, folder, module, **more):
    real = module in ("halos_nb.label", "halos_nb.people")
    return launch(stage, cfg, profile, folder, module if real else "pretend", **more)
ledger.launch = some
cfg = LoopConfig(**json.loads(sys.argv[1]))
quiet = lambda job, **kw: job.wait(show=False)
for this in run_rounds(cfg, Settings(runs_dir=sys.argv[2]), watch=quiet):
    pass
"""


def test_a_run_killed_while_the_judge_is_asked_pays_nothing_twice(loop, tmp_path):
    half = threading.Event()
    lock, answered = threading.Lock(), []

    def reply(body, times):
        with lock:
            answered.append(body["messages"][-1]["content"])
        if len(answered) == 20 and not half.is_set():  # the fourth question of round 1
            half.set()
        if half.is_set() and not gone.is_set() and len(answered) > 20:
            return "hang"
        return likes_x(body, times)

    gone = threading.Event()
    with Server(reply) as server:
        more = of_judge(server, total_prompts=4, label_options=dict(batch_size=1))
        given = json.dumps(loop.given | more)
        code = KILLED.format(here=str(Path(__file__).parent))
        run = [sys.executable, "-c", code, given, str(tmp_path / "runs")]
        with subprocess.Popen(run) as process:
            assert half.wait(120)
            time.sleep(0.5)
            process.send_signal(signal.SIGKILL)
        journal = tmp_path / "runs/r/round-1/judge.labels.jsonl"
        paid = read_jsonl(journal)
        assert 0 < len(paid) < 16
        gone.set()
        before = len(answered)
        rounds = loop(**more)
        assert read_jsonl(journal)[: len(paid)] == paid
        asked_again = len(answered) - before
    assert asked_again == 16 - len(paid) + 16  # the rest of round 1, and final
    assert [this.name for this in rounds] == ["start", "round-1", "final"]


def test_what_was_paid_for_other_samples_is_set_aside(loop, tmp_path):
    with Server(likes_x) as server:
        given = of_judge(server, total_prompts=4, heldout_prompts="", label_measured="no")
        loop(**given)
        [first, _] = loop(seed=1, on_change="redo", **given)
        old = tmp_path / "runs/r/round-1/judge.labels.before-1.jsonl"
        assert (
            len(read_jsonl(old)) == len(read_jsonl(first.folder / "judge.labels.jsonl")) == 16
        )
        assert "the samples have changed: what was paid for is set aside" in first.note

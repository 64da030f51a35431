"""Long runs: what is read again, what stays on disk, and what is found without reading."""

import json
import os
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
from job_helpers import NEEDS_LINUX, quiet
from long_runs import Pretended, wait

from halos_nb import hub_sets, ledger, loop, monitor, runs
from halos_nb.configs import LoopConfig
from halos_nb.data import Example
from halos_nb.health import Health
from halos_nb.hub_sets import PromptFile, distinct_prompts, load_data, load_prompts
from halos_nb.loop import AlarmError, Loop, Round, round_samples
from halos_nb.figures import some_rounds
from halos_nb.monitor import Panel, RunMonitor
from halos_nb.page import report
from halos_nb.pairs import feedback_files
from halos_nb.records import read_jsonl
from halos_nb.runs import pack, run_summary
from halos_nb.settings import Settings

pytestmark = [pytest.mark.timeout(300), NEEDS_LINUX]
THREE = dict(total_prompts=30, prompts_per_round=10, num_samples_per_prompt=2)


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    "`pretend(look=..., **parameters)`: the rounds of a run whose stages are calls."
    monkeypatch.setattr(loop, "Ledger", Pretended)
    for name in ("sft", "rm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "prompts.json").write_text("[]")
    paths = dict(sft_checkpoint="sft", reward_checkpoint="rm", prompts="prompts.json")
    given = {name: str(tmp_path / path) for name, path in paths.items()}
    given |= dict(run_name="r", audit="skip", lr=3e-4, alarm="skip")
    settings = Settings(runs_dir=str(tmp_path / "runs"))

    def rounds(look=None, watch=wait, **more):
        seen = []
        for this in loop.run_rounds(LoopConfig(**given | more), settings, watch=watch):
            if look:
                look(this)
            seen.append(this)
        return seen

    return rounds


def on_disk(rounds):
    return [this.policy.exists() for this in rounds if this.number]


# ---- policies


def test_the_best_policy_stays_and_is_told(pretend, tmp_path):
    "The second round's training fools the labeller; the answers are known a round later."
    # 2.7: see pretend.BREAKS
    rounds = pretend(**THREE, keep="best", beta=2.7)
    run = tmp_path / "runs/r"
    assert on_disk(rounds) == [False, True, True]
    assert (run / "best").resolve() == rounds[1].policy
    assert (run / "policy").resolve() == rounds[2].policy
    best = json.loads((run / "params.json").read_text())["best"]
    assert (best["by"], best["policy"]) == ("round-2", "round-2/policy/FINAL")
    assert best["measured"].startswith("mean score of its own answers in round-3")
    # all its answers score the same here, which has no interval
    assert (best["low"], best["value"], best["high"]) == (None, 99.5, None)
    assert "Best: the policy of round-2" in report(run).read_text()
    # the same when the run is continued, and nothing is done again
    again = pretend(**THREE, keep="best", beta=2.7)
    assert all(set(this.skipped) >= {"sample", "label"} for this in again)
    assert on_disk(again) == [False, True, True]
    assert json.loads((run / "params.json").read_text())["best"] == best


def test_the_best_policy_is_told_of_a_run_that_did_not_end(pretend, tmp_path):
    def look(this):
        if this.name == "round-3":
            raise KeyboardInterrupt

    run = tmp_path / "runs/r"
    with pytest.raises(KeyboardInterrupt):
        pretend(look, **THREE, keep="best", beta=2.7, fresh=True)
    told = json.loads((run / "params.json").read_text())
    assert told["ended"] == "running, or killed"
    assert told["best"]["policy"] == "round-2/policy/FINAL"


def test_where_no_policy_is_better_the_first_is_best(pretend, tmp_path):
    rounds = pretend(**THREE, keep="best")
    assert on_disk(rounds) == [False, False, True]
    assert (tmp_path / "runs/r/best").resolve() == tmp_path / "sft"


def test_a_better_policy_that_is_gone_is_told(tmp_path):
    "Where an earlier session kept less, the best of all may not be there."
    cfg = LoopConfig(lr=1.0, keep="best", sft_checkpoint=str(tmp_path))
    run = Loop(cfg, SimpleNamespace(run_dir=tmp_path))

    def trained(number, score, there):
        "A round, and how its policy's answers score in the next one."
        policy = tmp_path / f"round-{number}/policy"
        if there:
            policy.mkdir(parents=True)
        run.done.append(Round(number, f"round-{number}", policy.parent, policy, {}, [], {}))
        now = Health(4, None, None, None, None, score, errors=dict(score=0.1))
        run.add_score(f"round-{number + 1}", now)

    for number, (score, there) in enumerate([(2.0, True), (3.0, False), (1.0, True)], 1):
        trained(number, score, there)
    told = run.best_told()["best"]
    assert (told["by"], told["value"], told["policy"]) == ("round-1", 2.0, "round-1/policy")
    assert "better was the policy of round-2 (mean score 3 [2.8, 3.2] " in told["words"]
    trained(4, 4.0, True)
    assert "better was" not in run.best_told()["best"]["words"]


@pytest.mark.parametrize(
    "keep, kept",
    [("last", [False, False, True]), (2, [False, True, True]), ("all", [True, True, True])],
)
def test_as_many_policies_stay_as_were_asked_for(pretend, keep, kept):
    assert on_disk(pretend(**THREE, keep=keep)) == kept


# ---- packing


def as_told(run):
    "What the readers make of a run."
    folders = [path for path in run.glob("*") if (path / "label.manifest.json").exists()]
    samples = {path.name: round_samples(path) for path in sorted(folders)}
    runs.ROWS.clear()
    runs.ROWS_READ.clear()
    (run / runs.ROWS_KEPT).unlink(missing_ok=True)
    files = {name: path.name for name, path in feedback_files(run).items()}
    seconds_left_out = [row | dict(seconds=0) for row in run_summary(run)]
    return samples, seconds_left_out, files


def test_packed_rounds_are_read_as_before_and_still_stand(pretend, tmp_path):
    pretend(**THREE, alarm="warn")
    run = tmp_path / "runs/r"
    before = as_told(run)
    hashes = json.loads((run / "round-1/label.manifest.json").read_text())["outputs"]
    assert pack(run, keep=1) > 0
    for name in ("samples.json", "feedback.json", "feedback.labels.jsonl", "check.json"):
        assert not (run / "round-1" / name).exists()
        assert (run / "round-1" / f"{name}.gz").exists()
    assert (run / "round-3/samples.json").exists()
    assert json.loads((run / "round-1/label.manifest.json").read_text())["outputs"] == hashes
    assert as_told(run) == before
    report(run)
    again = pretend(**THREE, alarm="warn")
    assert all(set(this.skipped) >= {"sample", "label"} for this in again)
    assert (run / "round-1/samples.json.gz").exists()


def test_what_a_stage_reads_is_unpacked_and_what_is_damaged_is_made_again(pretend, tmp_path):
    pretend(**THREE)
    run = tmp_path / "runs/r"
    whole = (run / "round-1/feedback.json").read_bytes()
    pack(run, keep=1)
    again = dict(**THREE, beta=0.3, on_change="redo")
    rounds = pretend(**again)  # all trainings are others
    assert rounds[0].skipped == ["sample", "label"]
    assert (run / "round-1/feedback.json").read_bytes() == whole
    assert not (run / "round-1/feedback.json.gz").exists()
    assert (run / "round-1/samples.json.gz").exists()
    packed = run / "round-1/samples.json.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is compressed, and cannot be unpacked"):
        round_samples(run / "round-1")
    assert "sample" not in pretend(**again)[0].skipped
    assert (run / "round-1/samples.json").exists() and not packed.exists()


def test_the_loop_packs_by_itself(pretend, tmp_path):
    pretend(**THREE, pack_after=1)
    packed = sorted(
        path.parent.name for path in (tmp_path / "runs/r").glob("*/samples.json.gz")
    )
    assert packed == ["round-1", "round-2", "round-3"]
    assert [row["round"] for row in run_summary(tmp_path / "runs/r")] == [
        "1",
        "2",
        "3",
        "final",
    ]


# ---- what is read again


def test_a_continued_run_looks_at_no_answers_twice(pretend, tmp_path, monkeypatch):
    first = pretend(**THREE, alarm="warn")

    def refuse(samples):
        raise AssertionError("these answers were looked at before")

    refuse.__module__ = loop.health.__module__
    monkeypatch.setattr(loop, "health", refuse)
    again = pretend(**THREE, alarm="warn")
    assert [this.health for this in again] == [this.health for this in first]


def test_a_monitor_reads_each_round_once(pretend, tmp_path, monkeypatch):
    run = tmp_path / "runs/r"
    read = []
    known_row = monitor.known_row
    monkeypatch.setattr(
        monitor, "known_row", lambda folder: read.append(folder.name) or known_row(folder)
    )
    watching = RunMonitor(run, mode="static")
    watching.panel = Panel()
    pretend(look=lambda this: watching.refresh(), **THREE)
    watching.refresh()
    watching.refresh()
    assert read == ["round-1", "round-2", "round-3", "final"]
    assert watching.summary() == run_summary(run)
    assert list(watching.metrics()) == ["round-1", "round-2", "round-3"]


def test_what_a_look_reads_does_not_grow_with_the_run(pretend, tmp_path, monkeypatch):
    "Of each round config and answers are read once, also when its policy was pruned since."
    configs, views = [], []
    metrics_file, round_view = monitor.metrics_file, monitor.round_view
    monkeypatch.setattr(
        monitor, "metrics_file", lambda path: configs.append(path) or metrics_file(path)
    )
    monkeypatch.setattr(
        monitor, "round_view", lambda *given: views.append(given[0].name) or round_view(*given)
    )
    monkeypatch.setattr(monitor, "some_rounds", lambda names: some_rounds(names, 6))
    watching = RunMonitor(tmp_path / "runs/r", mode="static")
    watching.panel = Panel()
    most = dict(total_prompts=20, prompts_per_round=2)
    pretend(look=lambda this: watching.refresh(), **most)
    watching.refresh()
    assert len(configs) <= 10 + 1  # the one that is under way is looked at again
    assert sorted(views) == sorted(set(views))
    assert [view.name for view in watching.shown_rounds()][:2] == ["1", "2"]


# ---- prompts by their number


@pytest.fixture
def all_are_large(tmp_path, monkeypatch):
    monkeypatch.setenv("HALOS_NB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_sets, "LARGE", 0)


PROMPTS = [dict(prompt=f"What is {i % 50} plus 1?", split="train") for i in range(60)]
PROMPTS.append(dict(prompt="What is nothing?", split="test"))


def as_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITE = {
    "p.json": lambda path: path.write_text(json.dumps(PROMPTS, indent=1)),
    "p.jsonl": lambda path: as_lines(path, PROMPTS),
    "p.csv": lambda path: pd.DataFrame(PROMPTS).to_csv(path, index=False),
    "p.parquet": lambda path: pd.DataFrame(PROMPTS).to_parquet(path),
    "p.jsonl.gz": lambda path: pd.DataFrame(PROMPTS).to_json(
        path, orient="records", lines=True
    ),
    "folder": lambda path: (path.mkdir(), as_lines(path / "train.jsonl", PROMPTS)),
}


@pytest.mark.parametrize("name", WRITE)
def test_prompts_by_their_number_are_those_of_the_whole(name, tmp_path, all_are_large):
    WRITE[name](tmp_path / name)
    whole = load_data(tmp_path / name)
    for _ in range(2):
        found = load_prompts(tmp_path / name)
        assert isinstance(found.examples, PromptFile)
        assert (found.name, found.counts) == (whole.name, whole.counts)
        assert found.examples[:] == distinct_prompts(whole)
        assert found.examples[48:60] == distinct_prompts(whole)[48:60]
    (file,) = (tmp_path / "cache/prompts").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-1])  # a torn file is not believed
    assert load_prompts(tmp_path / name).examples[:] == distinct_prompts(whole)


def test_prompts_of_several_sources_and_of_conversations(tmp_path, all_are_large):
    talk = [dict(role="user", content="Hi"), dict(role="assistant", content="Ho")]
    asked = dict(prompt=[*talk, dict(role="user", content="Hum?")], system="Sing.")
    as_lines(tmp_path / "a.jsonl", [asked, asked, *PROMPTS])
    as_lines(tmp_path / "b.jsonl", PROMPTS[::-1])
    names = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert load_prompts(names).examples[:] == distinct_prompts(load_data(names))
    alone = load_prompts(names[0]).examples
    assert [turn["role"] for turn in alone[:1][0].prompt][:2] == ["system", "user"]
    assert isinstance(alone[:1][0], Example)


def test_who_cannot_keep_a_file_reads_the_whole_and_says_so(tmp_path, all_are_large, capsys):
    WRITE["p.jsonl"](tmp_path / "p.jsonl")
    (tmp_path / "cache").write_text("no folder")
    assert len(load_prompts(tmp_path / "p.jsonl").examples) == 50
    assert "prompts are read whole each time" in capsys.readouterr().out


def test_a_source_that_is_replaced_is_read_anew(tmp_path, all_are_large):
    path = tmp_path / "p.jsonl"
    WRITE["p.jsonl"](path)
    assert len(load_prompts(path).examples) == 50
    stat = path.stat()
    other = tmp_path / "other"
    as_lines(other, PROMPTS[1:2] * 61)
    shutil.move(other, path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(load_prompts(path).examples) == 1


# ---- a round is sampled while the one before it trains

FOUR = dict(total_prompts=40, prompts_per_round=10, num_samples_per_prompt=2, staleness=1)


def bits(run):
    "All that a run has made, by name."
    names = ("samples.json", "feedback.json", "weights")
    return {
        path.relative_to(run): path.read_bytes() for name in names for path in run.rglob(name)
    }


def test_who_samples_is_a_matter_of_the_numbers(pretend, tmp_path):
    rounds = pretend(**FOUR, keep="all")
    run = tmp_path / "runs/r"
    told = [json.loads((this.folder / "sample.config.json").read_text()) for this in rounds]
    policies = [str(this.policy) for this in rounds]
    assert [c["model"] for c in told] == [str(tmp_path / "sft")] * 2 + [
        *policies[:2],
        policies[3],
    ]
    assert [c["num_skip"] for c in told] == [0, 10, 20, 30, 30]
    trained = [this.folder / "train.config.json" for this in rounds[:4]]
    starts = [json.loads(path.read_text())["from_checkpoint"] for path in trained]
    assert starts == [None, *policies[:3]]
    assert "sampled by the policy of round 2, one round old" in str(rounds[3])
    rows = run_summary(run)
    older = [row.get("sampled by") for row in rows]
    assert older == [None, "the first", "round 1", "round 2", None]
    assert all(set(this.seconds) >= {"sample", "label", "train"} for this in rounds[:4])


def test_a_run_that_overlaps_goes_on_where_it_was(pretend, tmp_path):
    "Stopped after every round, and continued."

    def stop(this):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pretend(look=stop, **FOUR)
    in_parts = pretend(**FOUR)
    assert set(in_parts[0].skipped) == {"sample", "label", "train"}
    parts = bits(tmp_path / "runs/r")
    pretend(**FOUR, fresh=True)
    assert bits(tmp_path / "runs/r") == parts


def test_the_alarm_names_the_policy_that_was_seen(pretend, tmp_path):
    "The first training breaks its policy: its check says so, with round 2 sampled already."
    many = FOUR | dict(num_samples_per_prompt=8)
    with pytest.raises(AlarmError) as error:
        pretend(**many, alarm="stop", beta=1.0)
    assert "round 1's training has left a policy that is breaking" in str(error.value)
    assert error.value.seen.good == str(tmp_path / "sft")
    with pytest.raises(AlarmError) as error:  # seen in the samples of a round later still
        pretend(**many, alarm="stop", beta=1.5, fresh=True)
    assert error.value.seen.seen == tmp_path / "runs/r/round-3/samples.json"
    assert error.value.seen.broken == tmp_path / "runs/r/round-1/policy/FINAL"


def test_both_run_at_once_and_come_to_the_same(pretend, tmp_path, monkeypatch, stages_on_path):
    "Real processes, in which training is the slower: another order of ends, the same bits."
    pretend(**FOUR, keep="all")
    parts = bits(tmp_path / "runs/r")
    launch = ledger.launch

    def launch_pretend(stage, cfg, profile, folder, module, **more):
        return launch(stage, cfg, profile, folder, "pretend", **more)

    monkeypatch.setattr(loop, "Ledger", ledger.Ledger)
    monkeypatch.setattr(ledger, "launch", launch_pretend)
    monkeypatch.setenv("PRETEND_SLOW", "train")
    pretend(**FOUR, keep="all", fresh=True, watch=quiet)
    assert bits(tmp_path / "runs/r") == parts
    events = read_jsonl(tmp_path / "runs/r/ledger.jsonl")
    order = [(e["event"], e["folder"], e["stage"]) for e in events if "stage" in e]
    meanwhile = order.index(("finished", "round-2", "label"))
    assert order.index(("started", "round-1", "train")) < meanwhile
    assert meanwhile < order.index(("finished", "round-1", "train"))


def test_what_a_stale_ratio_cannot_be_is_refused():
    for more, why in (
        (dict(temperature=0.7), "grpo needs the log-probs of the policy that sampled"),
        (dict(humanline=True), "humanline takes the ratio to its synced reference"),
        (dict(train_options="old_policy=pass"), "leave old_policy out"),
    ):
        with pytest.raises(ValueError, match=why):
            LoopConfig(method="grpo", staleness=1, **more)
    ratio = LoopConfig(method="grpo", staleness=1).training(model="sft", online=True)
    assert ratio.old_policy == "samples"
    assert LoopConfig(method="grpo").training(model="sft", online=True).old_policy == "auto"

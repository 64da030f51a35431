"""What is sealed stays, and what is written is never what is read: names that become folders,
outputs that are inputs, whose a run's folder is, and what becomes of a run whose parameters
have changed.
"""

import json
import os
from pathlib import Path

import pytest

from halos_nb import audit, evaluate, label, sample, train
from halos_nb.configs import (
    AuditConfig,
    CompareConfig,
    EvaluateConfig,
    HandConfig,
    LabelConfig,
    LoopConfig,
    PeopleConfig,
    RewardConfig,
    RoundLabelConfig,
    SampleConfig,
    TrainConfig,
    make_config,
)
from halos_nb.models import small_llama
from halos_nb.records import file_hash, pack_file, write_records
from halos_nb.templates import byte_tokenizer
from halos_nb.tree_trainer import make_way

# ---- names

WRONG_NAMES = ("", ".", "..", "../x", "a/b", "/x", "a\\b", ".hidden", " x", "x\n", "x\0y")
WRONG_NAMES += ("x\ty", "x" * 151, "\N{GREEK SMALL LETTER ALPHA}" * 76, "\ud800")


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_name_that_leads_elsewhere_is_refused(name):
    for cls in (LoopConfig, CompareConfig, HandConfig, RoundLabelConfig, RewardConfig):
        with pytest.raises(ValueError, match="run_name: "):
            make_config(cls, run_name=name)
    with pytest.raises(ValueError, match="exp_name: "):
        make_config(TrainConfig, loss="sft", model="m", exp_name=name)
    with pytest.raises(ValueError, match="exp_name: "):
        make_config(RewardConfig, exp_name=name)


def test_names_that_are_taken_are_refused():
    for name in ("playground", "playground-12", "models"):
        with pytest.raises(ValueError, match=f"run_name: {name} is the name of a folder"):
            make_config(LoopConfig, run_name=name)
    for name in ("start", "audit", "ledger.jsonl", "submit"):
        with pytest.raises(ValueError, match=f"exp_name: {name} is a name that the run"):
            make_config(RewardConfig, exp_name=name)


@pytest.mark.parametrize("name", ["../ada", "a/b", "x" * 81, "", "a\nb"])
def test_who_labels_is_part_of_a_files_name(name):
    given = dict(samples_file="s", output_file="o", session_file="j")
    for cls, more in ((HandConfig, {}), (PeopleConfig, given), (LoopConfig, {})):
        with pytest.raises(ValueError, match="labeller: "):
            make_config(cls, labeller=f"human:{name}", **more)


# ---- outputs that are inputs


def some_samples(path, n=4):
    "Two prompts' answers, of n words and fewer."
    rows = []
    for i in range(2):
        for k in range(n):
            turns = [dict(role="user", content=f"{i}?")]
            row = dict(
                prompt_id=f"p{i}", sample_id=k, prompt=turns, output="word " * k + "end."
            )
            rows.append(row | dict(type="sample"))
    write_records(path, rows)
    return path


def words(prompt, output):
    return len(output.split())


def nothing(prompt, output):
    return 0


@pytest.fixture
def by_words(tmp_path, monkeypatch):
    "`by_words(output_file, **more)`: samples in the current folder labelled by their length."
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)
    some_samples(tmp_path / "s.json")

    def labelled(out, function="words", **more):
        given = dict(samples_file="s.json", output_file=str(out))
        if "from_labels" not in more:
            more["function"] = f"{Path(__file__).stem}:{function}"
        return label.main(LabelConfig(**given | more, feedback_type="pairwise"))

    return labelled


def another_name(of, kind, folder):
    "Another spelling of a file, or another name for it."
    if kind == "plain":
        return str(of)
    if kind == "relative":
        return os.path.relpath(of, folder)
    if kind == "spelt":
        return f"{of.parent}/./../{of.parent.name}/{of.name}"
    other = folder / f"other-{kind}{of.suffix}"
    (other.symlink_to if kind == "symlink" else other.hardlink_to)(of)
    return str(other)


KINDS = ("plain", "relative", "spelt", "symlink", "hard link")


@pytest.mark.parametrize("kind", KINDS)
def test_labelling_never_replaces_what_it_reads(by_words, tmp_path, kind):
    "`label s.json s.json` removed its samples."
    given = tmp_path / "s.json"
    before = given.read_bytes()
    out = another_name(given, kind, tmp_path)
    with pytest.raises(ValueError, match="output_file: would write .* over samples_file"):
        by_words(out)
    assert given.read_bytes() == before
    # nor by what stands beside the output
    journal = some_samples(tmp_path / "f.labels.jsonl")
    with pytest.raises(ValueError, match="over second_samples_path"):
        by_words(tmp_path / "f.json", second_samples_path=str(journal))


def test_labelling_never_replaces_a_journal_that_it_converts(by_words, tmp_path):
    by_words("f.json")
    journal = tmp_path / "f.labels.jsonl"
    said = journal.read_bytes()
    with pytest.raises(ValueError, match="over from_labels"):
        by_words(journal, from_labels=str(journal))
    assert by_words("f.json", from_labels=str(journal))["records"] == 2
    assert journal.read_bytes() == said


def test_an_empty_result_keeps_what_was_there(by_words, tmp_path):
    counts = by_words("f.json")
    before = (tmp_path / "f.json").read_bytes()
    assert counts["records"] == 2
    with pytest.raises(ValueError, match=r"feedback that was there is f\.before-1\.json"):
        by_words("f.json", function="nothing")
    assert (tmp_path / "f.before-1.json").read_bytes() == before
    assert not (tmp_path / "f.json").exists()  # it would have been made of other labels
    by_words("f.json")
    by_words("f.json")
    assert sorted(p.name for p in tmp_path.glob("f.*json")) == [
        "f.before-1.json",
        "f.counts.json",
        "f.json",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_no_stage_writes_over_what_it_reads(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    data = some_samples(tmp_path / "d.json")
    out = another_name(data, kind, tmp_path)
    sampling = SampleConfig(model="m", datasets=[str(data)], output_file=out)
    training = dict(loss="sft", model="m", cache_dir=str(tmp_path), exp_name="x")
    looking = AuditConfig(model="m", samples=str(data), json=out)
    with pytest.raises(ValueError, match="output_file: would write .* over datasets"):
        sample.main(sampling)
    with pytest.raises(ValueError, match="metrics_file: would write .* over train_datasets"):
        train.main(TrainConfig(**training, train_datasets=[str(data)], metrics_file=out))
    with pytest.raises(ValueError, match="json: would write .* over samples"):
        audit.main(looking)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []  # nothing was begun


def test_a_training_never_replaces_what_it_starts_from(tmp_path):
    final = tmp_path / "x/FINAL"
    final.mkdir(parents=True)
    (final / "weights").write_text("1")
    given = dict(loss="sft", cache_dir=str(tmp_path), exp_name="x", train_datasets=["d"])
    for more in (dict(model=str(final)), dict(model="m", from_checkpoint=str(final))):
        with pytest.raises(ValueError, match="exp_name: would write"):
            train.main(TrainConfig(**given, **more))
    assert (final / "weights").read_text() == "1"


def test_what_is_packed_is_an_input_too(by_words, tmp_path):
    "A new `s.json` would be read in its place from then on."
    given = tmp_path / "s.json"
    packed = pack_file(given)
    given.unlink()
    before = packed.read_bytes()
    for out in ("s.json", "./s.json", "s.json.gz"):
        with pytest.raises(ValueError, match="output_file: would write .* over samples_file"):
            by_words(out)
    assert packed.read_bytes() == before and not given.exists()
    assert by_words("f.json")["records"] == 2


def test_a_finished_model_of_an_earlier_training_stays(tmp_path, capsys):
    "The same training leaves the same model, and one of them."
    old = tmp_path / "x/FINAL"
    for name, text in (("x/FINAL", "1"), ("x/FINAL.partial", "1")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_text(text)
    make_way(old, tmp_path / "x/FINAL.partial", keep=True)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["FINAL.partial"]
    old.mkdir()
    (old / "weights").write_text("0")
    make_way(old, tmp_path / "x/FINAL.partial", keep=True)
    assert (tmp_path / "x/FINAL.before-1/weights").read_text() == "0"
    assert "FINAL.before-1" in capsys.readouterr().err


def test_a_training_keeps_what_another_has_left(tmp_path):
    "Both models, and what was told of each."
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "m")
    small_llama(tokenizer, hidden_size=32).save_pretrained(tmp_path / "m")
    rows = [dict(prompt=f"Say {i}", chosen=f"{i}!", rejected="no") for i in range(4)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    given = dict(loss="bradley-terry", model=str(tmp_path / "m"), batch_size=4)
    given |= dict(train_datasets=[str(tmp_path / "d.json")], cache_dir=str(tmp_path))
    for lr in (1e-3, 1e-3, 2e-3):
        train.main(TrainConfig(**given, exp_name="x", lr=lr))
    finals = [tmp_path / "x" / name for name in ("FINAL", "FINAL.before-1")]
    assert file_hash(finals[0]) != file_hash(finals[1])
    names = {p.name for p in (tmp_path / "x").iterdir()}
    for name in ("counts.json", "counts.before-1.json", "metrics.before-1.jsonl"):
        assert name in names
    assert "FINAL.before-2" not in names  # the second was the first once more


@pytest.mark.parametrize("kind", ["labels.jsonl", "counts.json"])
def test_labelling_never_replaces_what_stands_beside_other_feedback(by_words, tmp_path, kind):
    by_words("f.json")
    beside = tmp_path / f"f.{kind}"
    said = beside.read_bytes()
    with pytest.raises(ValueError, match="another labelling has written beside its feedback"):
        by_words(beside)
    assert beside.read_bytes() == said


@pytest.mark.parametrize("place", ["", "/", "a\0b", "sub", "pipe", "x" * 250 + ".json"])
def test_an_output_that_cannot_be_a_file_is_told_before_any_work(by_words, tmp_path, place):
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"output_file: "):
        by_words(place, function="nobody_is_asked")
    with pytest.raises(OSError, match="pipe"):
        write_records(tmp_path / "pipe", [])


def test_a_link_stays_a_link(by_words, tmp_path):
    (tmp_path / "f.json").symlink_to(tmp_path / "elsewhere.json")
    for _ in range(2):
        by_words("f.json")
        assert (tmp_path / "f.json").is_symlink()
        assert len(json.loads((tmp_path / "elsewhere.json").read_text())) == 2


@pytest.mark.parametrize(
    "text", ["my notes\n", '{"my": "thesis"}', '[{"type": "sample"}]', b"\xff"]
)
def test_a_file_of_another_kind_stays(by_words, tmp_path, text):
    "What a person, or another stage, has written is no feedback of before."
    theirs = tmp_path / "theirs.json"
    theirs.write_bytes(text.encode() if isinstance(text, str) else text)
    before = theirs.read_bytes()
    with pytest.raises(ValueError, match="output_file: .*theirs.json.* move it away"):
        by_words(theirs, function="nobody_is_asked")
    with pytest.raises(ValueError, match="output_file: .*theirs.json.* move it away"):
        given = dict(samples_file="s.json", output_file=str(theirs), function="sys:exit")
        evaluate.main(EvaluateConfig(**given))
    assert theirs.read_bytes() == before and len(list(tmp_path.glob("theirs*"))) == 1


@pytest.mark.parametrize("place", ["s.json/f.json", "loop", "loop/f.json", "read_only/f.json"])
def test_a_place_where_nothing_can_be_written_is_told_before_any_work(
    by_words, tmp_path, monkeypatch, place
):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "read_only").mkdir()
    may = os.access
    monkeypatch.setattr(  # root may write everywhere
        os, "access", lambda path, mode: "read_only" not in str(path) and may(path, mode)
    )
    with pytest.raises(ValueError, match=r"output_file: ") as told:
        by_words(place, function="nobody_is_asked")
    assert place.split("/")[0] in str(told.value)

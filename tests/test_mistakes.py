"""Natural mistakes, as a new user makes them: one line that says what to do.

`docs/mistakes.md` shows them; its tables are held to the messages here.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import papermill
import pytest

import halos_nb
from halos_nb import label, sample
from halos_nb.configs import LabelConfig, SampleConfig, TrainConfig
from halos_nb.hub_sets import load_data
from halos_nb.settings import load_settings, parse_args

ROOT = Path(__file__).resolve().parent.parent

# driver, its parameters, and what the message says
NOTEBOOKS = [
    ("online_loop", dict(bta=0.1), "bta: unknown parameter; did you mean `beta`?"),
    ("online_loop", dict(model="m"), "model: unknown parameter; here it is `sft_checkpoint`"),
    ("online_loop", dict(reward_model="m"), "here it is `reward_checkpoint`"),
    ("online_loop", dict(learning_rate=1e-5), "unknown parameter; here it is `lr`"),
    ("online_loop", dict(num_generations=8), "here it is `num_samples_per_prompt`"),
    ("online_loop", dict(num_epochs=2), "here it is `epochs` in `train_options`"),
    ("online_loop", dict(rounds=3), "here it is `total_prompts` / `prompts_per_round`"),
    ("reward_model", dict(sft_checkpoint="m"), "here it is `model`"),
    ("label_by_hand", dict(loss="dpo"), "here it is `method`"),
    ("online_loop", dict(method="dpoo"), "got 'dpoo'; did you mean `dpo`?"),
    ("online_loop", dict(beta="hello"), "beta: should be a number, got 'hello'"),
    ("online_loop", dict(total_prompts=0), "total_prompts: should be greater than 0, got 0"),
    ("online_loop", dict(fresh="maybe"), "fresh: should be True or False, got 'maybe'"),
    ("online_loop", dict(run_name=7), "run_name: should be a text, got 7 (int)"),
    (
        "online_loop",
        dict(labeller="humn:me"),
        "none of rm, function, judge, lm and human:<name>",
    ),
    ("online_loop", dict(preset="zephyrr"), "did you mean `zephyr`?"),
    ("online_loop", dict(train_options="lrr=1"), "lrr: unknown parameter; did you mean `lr`?"),
    ("online_loop", dict(prompts="pompts.jsonl"), "did you mean `prompts.jsonl`?"),
    ("online_loop", dict(prompts="prompts.jsn"), "did you mean `prompts.jsonl`?"),
    ("online_loop", dict(prompts="ultrafedback"), "did you mean `ultrafeedback_armorm`?"),
    ("online_loop", dict(profile="cpu11"), "no section [profile cpu11]; did you mean `cpu1`?"),
    (
        "online_loop",
        dict(function="rules:scor"),
        "rules.py has no scor; did you mean `score`?",
    ),
    (
        "online_loop",
        dict(method="my_metod.py:Hinge"),
        "did you mean `my_method.py`?",
    ),
    (
        "online_loop",
        dict(method="my_method:Hing"),
        "my_method.py has no Hing; did you mean `Hinge`?",
    ),
    (
        "online_loop",
        dict(method="rules.py:score"),
        "score of rules.py is no trainer; derive a class",
    ),
    (
        "online_loop",
        dict(method="hinge"),
        "'raft', or a trainer of yours, my_method.py:MyTrainer; got 'hinge'",
    ),
    ("label_round", dict(run_name="onlin"), "no run is called onlin; did you mean `online`?"),
    ("compare_runs", dict(runs="onlin"), "no run is called onlin; did you mean `online`?"),
    ("compare_methods", dict(methods="dpo, ktoo"), "'ktoo' is none; did you mean `kto`?"),
    ("compare_methods", dict(seeds="0,a"), "seeds: should be a number or 0, 1, 2, got '0,a'"),
    (
        "reward_model",
        dict(train_datasets="pais.json", test_datasets="pairs.json", model="m", lr=1e-5),
        "did you mean `pairs.json`?",
    ),
    (
        "reward_model",
        dict(max_length=512),
        "RewardConfig: max_prompt_length: 512 leaves no room for a completion in max_length",
    ),
]

# a command's flags, and what it says
COMMANDS = [
    (SampleConfig, "m --nun_prompts 3", "Unrecognized options: --nun_prompts"),
    (SampleConfig, "m --num_prompts 0", "num_prompts: should be greater than 0, got 0"),
    (SampleConfig, "m --temperature -1", "temperature: should be greater than 0, got -1.0"),
    (LabelConfig, "samples.json out.json", "labeller: name exactly one of"),
    (TrainConfig, "--loss dpoo --model m", "got 'dpoo'; did you mean `dpo`?"),
    (TrainConfig, "--config gone.json", "--config: nothing is at gone.json"),
    (TrainConfig, "--config broken.json", "--config: broken.json is no JSON"),
]

# what is done in a notebook or script, and what it says
CALLS = [
    (lambda: load_data("gone.txt"), "nothing is at gone.txt"),
    (lambda: load_data("notes.md"), "or .txt with a prompt on each line"),
    (lambda: load_data("odd.csv"), "columns q, a are in no known format; rename them"),
    (lambda: halos_nb.LoopConfig(bta=1), "bta: unknown parameter; did you mean `beta`?"),
    (lambda: halos_nb.report("runs/onlin"), "did you mean `runs/online`?"),
    (lambda: halos_nb.browse_pairs("runs/onlin"), "did you mean `runs/online`?"),
    (lambda: halos_nb.browse_pairs("onlin"), "did you mean `online`?"),
    (lambda: halos_nb.compare_runs("rums"), "did you mean `runs`?"),
    (lambda: halos_nb.compare_run, "did you mean `compare_runs`?"),
    (
        lambda: sample.main(SampleConfig(model="./gone", datasets=["prompts.jsonl"])),
        "model: nothing is at ./gone",
    ),
    (
        lambda: LabelConfig(samples_file="gone.json", function="math:sqrt"),
        "output_file: is missing",
    ),
    (
        lambda: label.main(
            LabelConfig(samples_file="gone.json", output_file="f.json", function="math:sqrt")
        ),
        "nothing is at gone.json",
    ),
]

JARGON = re.compile(r"https?://|pydantic|Input should|type=|validation error|ArgsKwargs")


@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A folder as somebody works in it: a run, prompts, pairs, notes."
    (tmp_path / "runs/online").mkdir(parents=True)
    for name in ("params.json", "run.json"):
        (tmp_path / "runs/online" / name).write_text("{}", encoding="utf-8")
    files = {
        "prompts.jsonl": '{"prompt": "Hi"}\n',
        "pairs.json": "[]",
        "notes.md": "# Stars\n",
        "odd.csv": "q,a\n1,2\n",
        "broken.json": "{beta",
        "my_method.py": "from halos_nb.trainers import DPOTrainer\nclass Hinge(DPOTrainer): 1",
        "rules.py": "def score(prompt, output):\n    return len(output)\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALOS_NB_RUNS_DIR", str(tmp_path / "runs"))
    return tmp_path


def one_line(said):
    "The message, if it is one line without words of the validator."
    assert not JARGON.search(said), said
    assert "\n" not in said.strip(), said
    return said


@pytest.mark.parametrize("driver, given, told", NOTEBOOKS)
def test_a_driver_says_it_before_anything_starts(desk, driver, given, told):
    cells = json.loads((ROOT / f"nbs/{driver}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    here = {"__name__": "driver"}
    with pytest.raises(Exception) as error, contextlib.redirect_stdout(io.StringIO()):
        for i, source in enumerate(sources[:3]):
            exec(source, here)
            here |= {} if i else given
    assert told in one_line(str(error.value))
    assert [p.name for p in (desk / "runs").iterdir()] == ["online"]


@pytest.mark.parametrize("config, line, told", COMMANDS)
def test_a_command_says_it(desk, capsys, config, line, told):
    try:
        parse_args(config, line.split())
        raise AssertionError("taken")
    except SystemExit as error:
        assert error.code == 2
        said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    except (ValueError, OSError) as error:
        said = str(error)
    assert told in one_line(said)


@pytest.mark.parametrize("call, told", CALLS)
def test_a_call_says_it(desk, call, told):
    with pytest.raises(Exception) as error:
        call()
    assert told in one_line(str(error.value))


def test_a_text_of_prompts_is_read(desk):
    (desk / "mine.txt").write_text("Name a star.\n\nName a sea.\n", encoding="utf-8")
    turns = [example.prompt[0]["content"] for example in load_data("mine.txt")]
    assert turns == ["Name a star.", "Name a sea."]


def test_a_model_that_the_hub_does_not_give_is_said_without_its_address(desk, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from halos_nb.checkpoints import CheckpointError, architecture

    with pytest.raises(CheckpointError) as error:
        architecture("gpt2x")
    said = one_line(str(error.value))
    assert said.startswith("gpt2x: is no folder here, and the hub did not give it (")
    (desk / "my_policy").mkdir()
    with pytest.raises(CheckpointError) as error:
        architecture("my_polcy")
    assert one_line(str(error.value)).endswith("did you mean `my_policy`?")


def test_a_profile_that_is_missing_is_said_with_the_file_that_was_read(desk):
    with pytest.raises(ValueError, match="no settings.ini was found in .* or above it, so"):
        load_settings().get_profile("slurm_2x8")
    (desk / "settings.ini").write_text("[profile mine]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="settings.ini has no section") as error:
        load_settings().get_profile("slurm_2x8")
    assert f"(read: {desk / 'settings.ini'})" in str(error.value)


def test_papermill_says_how_a_parameter_is_given(desk):
    "`-p lr=1e-5` takes the next word for its value, and would be code that is no Python."
    driver = str(ROOT / "nbs/compare_runs.ipynb")
    with pytest.raises(ValueError, match="-p lr=1e-5: .* write `-p lr 1e-5`"):
        papermill.execute_notebook(
            driver, "out.ipynb", {"lr=1e-5": "--log-output"}, engine_name="halos_nb"
        )


def test_papermill_prints_the_message_once_and_folds_the_traceback(desk):
    "In the terminal the message is last and alone; in the notebook first, and shown once."
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    engines = entry["project"]["entry-points"]["papermill.engine"]
    info = desk / "here/halos_here-1.dist-info"  # as an installation writes it
    info.mkdir(parents=True)
    lines = [f"{name} = {value}\n" for name, value in engines.items()]
    (info / "entry_points.txt").write_text("[papermill.engine]\n" + "".join(lines))
    (info / "METADATA").write_text("Name: halos_here\nVersion: 1\n", encoding="utf-8")
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{info.parent}"}
    driver = str(ROOT / "nbs/compare_runs.ipynb")
    command = ["papermill", driver, "out.ipynb", "-p", "runs", "onlin"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 1
    told = done.stderr[done.stderr.index("ValueError: ") :].splitlines()
    assert told[0].endswith("no run is called onlin; did you mean `online`?")
    assert told[1].startswith("(cell [") and len(told) == 2
    assert "Traceback" not in done.stderr

    cells = json.loads((desk / "out.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    (at,) = [i for i, out in enumerate(outputs) if out["output_type"] == "error"]
    assert outputs[at]["traceback"] == [told[0]]
    folded = outputs[at + 1]["data"]
    assert "".join(folded["text/html"]).startswith("<details><summary>Traceback</summary>")
    assert "onlin" not in folded["text/plain"]


def test_the_docs_show_these_mistakes():
    text = (ROOT / "docs/mistakes.md").read_text(encoding="utf-8")
    for _, given, told in NOTEBOOKS:
        assert told in text, told
        assert all(name in text for name in given)
    for _, line, told in COMMANDS:
        assert line in text and told in text, line


def test_a_command_ends_with_its_message_alone(tmp_path):
    "Its traceback is there for who asks for it, and in a stage's log."
    command = [sys.executable, "-m", "halos_nb.people", "--samples-file", "here.json"]
    command += ["--output-file", "me.labels.jsonl", "--session-file", "me.jsonl"]
    command += ["--labeller", "human:me"]
    told = f"nothing is at here.json in {tmp_path}"
    given = dict(cwd=tmp_path, capture_output=True, text=True, timeout=120)
    for more, is_alone in (({}, True), (dict(HALOS_NB_TRACEBACK="1"), False)):
        env = {k: v for k, v in os.environ.items() if k != "HALOS_NB_PROGRESS"}
        env |= dict(PYTHONPATH=str(ROOT)) | more
        done = subprocess.run(command, env=env, **given)
        assert done.returncode == 1 and done.stderr.rstrip().endswith(told)
        assert ("Traceback" in done.stderr) != is_alone
        assert not is_alone or done.stderr == f"python -m halos_nb.people: {told}\n"

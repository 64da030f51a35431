"The measurement on a GPU runs whole on a CPU, tiny, and loses nothing to a case that fails."

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import every

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import gpu
import gpu_meter
import gpu_models
import gpu_table


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "A run of the cases that need no TRL."
    out = tmp_path_factory.mktemp("gpu")
    only = "attention,dpo gemma halos_nb,label,sample"
    command = [sys.executable, BENCH / "gpu.py", "--smoke", "--out", out, "--only", only]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return Namespace(out=out, said=done.stdout, lines=lines)


def of(smoke, case, side):
    return [one for one in smoke.lines if one["case"] == case and one["side"] == side]


@every
def test_every_case_has_its_lines(smoke):
    for case, side in (
        ("ceiling", "float32"),
        ("attention: Llama, all", "flex"),
        ("attention: Llama, all", "pieces"),
        ("attention: gpt-oss, window 128 and sinks", "flex"),
        ("dpo gemma", "halos_nb"),
        ("label llama", "halos_nb"),
        ("label llama", "padded batch"),
        ("sample llama", "halos_nb"),
        ("sample llama", "generate"),
    ):
        found = of(smoke, case, side)
        assert found and all(one.get("per_s") for one in found), found


@every
def test_both_ways_of_attention_and_of_scoring_give_the_same(smoke):
    compared = [one for one in smoke.lines if "off" in one]
    assert len(compared) == 4 + 3
    assert all(one["off"] < 1e-4 for one in compared)


@every
def test_trees_are_trained_without_padding(smoke):
    [told] = of(smoke, "dpo gemma", "halos_nb")
    assert told["positions"] == told["needed"] and "tree" in told["variant"]
    assert told["n"] == 16 and told["operations"] > 0
    assert "| dpo gemma | halos_nb | budget 512, tree" in smoke.said


def test_a_setting_that_fails_is_told_and_loses_no_other(tmp_path):
    lines = tmp_path / "results.jsonl"
    place = gpu_meter.Place("cpu", gpu_models.SMOKE, tmp_path, lines, 0.0)
    for divisor in (0, 1):
        with gpu_meter.told(place, "dpo", "TRL", variant=str(divisor)):
            place.tell("dpo", "TRL", per_s=1 / divisor)
    failed, good = map(json.loads, lines.read_text().splitlines())
    assert failed["variant"] == "0" and "ZeroDivisionError" in failed["error"]
    assert good["per_s"] == 1


def arguments(tmp_path, seconds):
    tmp_path.mkdir(exist_ok=True)
    return Namespace(
        out=tmp_path,
        work=tmp_path,
        lines=tmp_path / "results.jsonl",
        site=tmp_path / "site",
        wheels=None,
        device="cpu",
        smoke=True,
        seconds=seconds,
    )


def test_a_case_is_ended_when_its_time_is_over(tmp_path):
    fault = gpu.start(gpu.Case("label", 1), 0.1, arguments(tmp_path, 100))
    assert fault == "ended after 0 s"


def test_cases_without_time_are_named(tmp_path):
    a = arguments(tmp_path, seconds=0)
    gpu.run_all([gpu.Case("label", 30)], a)
    assert "label: not begun: no time was left" in (tmp_path / "table.md").read_text()


def test_wheels_that_are_not_there_are_an_error(tmp_path):
    a = arguments(tmp_path, 0)
    a.wheels = tmp_path / "none"
    with pytest.raises(SystemExit, match="no wheels there"):
        gpu.install(a)


# ---- the table


def told(side, per_s, **more):
    return dict(case="dpo", side=side, unit="pairs", n=4, per_s=per_s, variant="v") | more


def test_the_fastest_setting_of_each_side_is_compared():
    ours = [told("halos_nb", 2.0), told("halos_nb", 6.0, peak_mb=50, operations=4e9)]
    theirs = [told("TRL", 3.0, peak_mb=100), dict(case="dpo", side="TRL", error="no memory")]
    ceiling = dict(case="ceiling", side="bfloat16", per_s=1e10, unit="operations", n=8)
    _, own, other = gpu_table.rows([ceiling, *theirs, *ours])
    assert own[:4] == ["dpo", "halos_nb", "v (of 2)", "6.0 pairs"]
    assert other[4] == "**2.00**" and other[6] == "0.50"
    # 1e9 operations a pair
    assert (own[8], other[8]) == ("60%", "30%")


def test_a_side_with_nothing_but_errors_is_a_row():
    failed = dict(case="dpo", side="TRL", error="RuntimeError:\n no memory")
    rows = gpu_table.rows([told("halos_nb", 2.0), failed])
    assert rows[1][2] == "failed: RuntimeError: no memory"
    assert gpu_table.rows([failed])[0][0] == "dpo"

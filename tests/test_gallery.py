"""The gallery: its notebooks in a short form, from parameters to verdict, as somebody starts
them. With one seed, two rounds and eight prompts nothing is shown; that they run, say so and
write a figure is."""

import ast
import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from halos_nb.configs import GalleryConfig
from halos_nb.gallery import Claim, end_and_peak, verdict
from halos_nb.records import as_text
from halos_nb.playground import noisy_reward, prefer_longer, true_reward
from halos_nb.stats import Interval

ROOT = Path(__file__).resolve().parent.parent
GALLERY = {path.stem: path for path in sorted((ROOT / "nbs/gallery").glob("*.ipynb"))}
IN_CI = ("online_and_offline",)
SHORT = dict(seeds=1, rounds=2, prompts_per_round=8, num_samples_per_prompt=4, pairs=40)
SAYS = r"Too few seeds to say \(1 of at least 3\): "


def code_cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("name", GALLERY)
def test_parameters_are_the_config(name):
    "In its order, with values that it takes; each notebook has lengths of its own."
    cells = code_cells(GALLERY[name])
    [given] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    body = ast.parse("".join(given["source"])).body
    values = {s.targets[0].id: ast.literal_eval(s.value) for s in body}
    assert list(values) == [f.name for f in dataclasses.fields(GalleryConfig)]
    assert GalleryConfig(**values).seeds >= 3
    guard = "".join(cells[cells.index(given) + 1]["source"])
    assert "notebook_config(GalleryConfig" in guard


@pytest.mark.parametrize("name", GALLERY)
def test_a_notebook_has_question_paper_figure_and_verdict(name):
    cells = json.loads(GALLERY[name].read_text())["cells"]
    text = "".join(cells[0]["source"])
    assert re.search(r"^> .*\?$", text, re.M), "its question"
    assert re.search(r"\(\*[A-Z].*, 20\d\d\)", text), "the paper that it is about"
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert sum("write_image(cfg.picture" in source for source in code) == 1
    assert "gallery.verdict(" in code[-1]
    assert name in (ROOT / "docs/gallery.md").read_text()


def run_short(name, folder, **more):
    "What a notebook has said, executed in its short form."
    given = SHORT | dict(run_name="gallery-test", picture=folder / f"{name}.png") | more
    out = folder / f"{name}.ipynb"
    command = ["papermill", str(GALLERY[name]), str(out), "--no-progress-bar"]
    for key, value in given.items():
        command += ["-p", key, str(value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    return done, out


@pytest.mark.parametrize("name", GALLERY)
def test_a_notebook_runs_to_its_verdict(name, tmp_path):
    if name not in IN_CI and os.environ.get("HALOS_NB_LONG") != "gallery":
        pytest.skip("make test-gallery")
    done, out = run_short(name, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.dumps(code_cells(out)[-1]["outputs"], ensure_ascii=False)
    number = r"[+−]\d+\.\d{3}"  # a minus sign, as figures have it
    over_prompts = rf"\[{number}, {number}\] over prompts"
    assert re.search(
        SAYS + rf".* {number} \(no interval\) over 1 seed, {over_prompts}", last
    ), last
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_parameter_stops_before_anything_starts(tmp_path):
    done, out = run_short("online_and_offline", tmp_path, seed=3)
    assert done.returncode != 0
    assert "GalleryConfig: seed: " in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "online_and_offline.png").exists()


# ---- what they are made of


def one(low, high, prompts=None, seeds=3):
    over_seeds = Interval((low + high) / 2, low, high)
    return Claim("it rises by", over_seeds, prompts or over_seeds, seeds)


ABOVE, AROUND, BELOW = (
    Interval(0.2, 0.1, 0.3),
    Interval(0.1, -0.1, 0.3),
    Interval(-0.2, -0.3, -0.1),
)
NONE = float("nan")


@pytest.mark.parametrize(
    "claims, says",
    [
        ([one(0.1, 0.3)], "This world shows it"),
        ([one(0.1, 0.3), one(0.01, 0.2)], "This world shows it"),
        ([one(0.1, 0.3), one(-0.01, 0.2)], "This world does not show it"),
        ([one(0.1, 0.3, AROUND)], "This world does not show it"),
        ([one(-0.1, 0.3, ABOVE)], "This world does not show it"),
        ([one(-0.3, -0.1, BELOW)], "This world shows the opposite"),
        ([one(-0.3, -0.1, AROUND)], "This world does not show it"),
        ([one(-0.3, -0.1, BELOW), one(0.1, 0.3)], "This world does not show it"),
        ([one(NONE, NONE, ABOVE)], "This world does not show it"),
        ([one(0.1, 0.3, Interval(0.2, NONE, NONE))], "This world does not show it"),
        ([one(0.0, 0.0)], "This world does not show it"),
        ([one(0.1, 0.3, seeds=2)], "Too few seeds to say (2 of at least 3)"),
        ([one(0.1, 0.3), one(NONE, NONE, seeds=1)], "Too few seeds to say (1 of at least 3)"),
    ],
)
def test_a_verdict_goes_by_intervals_over_seeds_and_prompts(claims, says):
    assert verdict(claims).startswith(f"{says}: it rises by ")
    assert all(str(claim) in verdict(claims) for claim in claims)


def test_arms_that_differ_by_their_seeds_alone_are_rarely_a_finding():
    "Runs whose true reward is spread by 0.08: in few worlds the one or the other is found."
    import numpy as np

    from halos_nb.gallery import claim

    rng = np.random.default_rng(0)
    found = by_prompts = 0
    for _ in range(60):
        hard = rng.normal(0.5, 0.15, 48)
        ends = []
        for _ in range(3):
            arms = hard + rng.normal(0, 0.15, (2, 48)) + rng.normal(0, 0.08, (2, 1))
            ends.append([[dict(prompt_id=i, r=x) for i, x in enumerate(arm)] for arm in arms])
        one = claim("differs by", ends, "r")
        found += "does not" not in verdict([one])
        by_prompts += one.prompts.low > 0 or one.prompts.high < 0
    assert found <= 6 < 20 < by_prompts, (found, by_prompts)


def test_a_policy_that_is_best_by_luck_is_not_shown_to_be_better():
    """Of thirty equal policies one is the best: its lead, on the prompts that chose
    it, is taken for a fall in many worlds; on the others in few."""
    import numpy as np

    from halos_nb.gallery import claim, halves

    fooled = wrong = 0
    for world in range(60):
        rng = np.random.default_rng(world)
        way = {}
        for number in range(30):
            rewards = rng.normal(size=30)
            rows = [dict(prompt_id=i, true_reward=x) for i, x in enumerate(rewards)]
            way[number] = rows
        end, peak = end_and_peak(way)
        wrong += claim("falls", [(peak, end)]).prompts.low > 0
        chose = {number: halves(rows)[0] for number, rows in way.items()}
        means = {n: np.mean([r["true_reward"] for r in rows]) for n, rows in chose.items()}
        best = chose[max(means, key=means.get)]
        fooled += claim("falls", [(best, chose[29])]).prompts.low > 0
    assert wrong <= 5 < fooled, (wrong, fooled)


def test_labellers_are_wrong_in_ways_of_their_own():
    turns = [dict(role="user", content="Where does the owl live?")]
    said = [f"The owl lives in a hollow tree. {i}" for i in range(400)]
    noise = [noisy_reward(turns, text) - true_reward(turns, text) for text in said]
    assert (
        abs(sum(noise) / 400) < 0.08 and 0.35 < (sum(x * x for x in noise) / 400) ** 0.5 < 0.45
    )
    pair = dict(
        output_A=[dict(role="assistant", content="short")],
        output_B=[dict(role="assistant", content="much longer")],
        label=1,
        reward_A=0.9,
        reward_B=0.1,
    )
    [turned] = prefer_longer([pair], 1.0)
    assert (turned["label"], turned["reward_A"], turned["reward_B"]) == (0, 0.1, 0.9)
    assert as_text(turned["output_B"]) == "much longer"
    share = sum(row["label"] == 0 for row in prefer_longer([pair] * 500, 0.4)) / 500
    assert 0.33 < share < 0.47

"""The page that `make lab` opens, with the runs there are: `python docs/start.py`.

A notebook of Markdown only, so JupyterLab shows it rendered; links lead to notebooks beside it.
"""

import json
import re
import time
from pathlib import Path
from urllib.parse import quote

from halos_nb.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "build" / "start.ipynb"
FIRST = [
    ("tutorials/01_one_round_by_hand", "the whole idea in plain torch, then broken on purpose"),
    ("tutorials/02_your_own_reward_model", "from pairs to a model that one can judge"),
    ("tutorials/03_a_new_method", "a loss, a trainer of a few lines, run beside others"),
    ("tutorials/04_label_by_hand", "you say what is better, the policy learns it"),
]
DRIVERS = [
    ("online_loop", "the online loop: sample, label, train, round by round"),
    ("reward_model", "train, judge and use a reward model"),
    ("label_by_hand", "from samples to a trained step by your own judgement"),
    ("label_round", "the pairs that a running loop waits for"),
    ("compare_runs", "all runs under runs/, side by side"),
    ("compare_methods", "every method in the playground, with one seed or several"),
    ("audit", "what each model really sees"),
]


def plain(text: str) -> str:
    "A name as Markdown that means only itself."
    return re.sub(r"([\\`*_\[\]<>|#&!$~(){}])", r"\\\1", " ".join(text.split()))


def link(text: str, path: Path) -> str:
    "A link from the page, where the path lies in this folder; else the text alone."
    try:
        inside = path.resolve().relative_to(ROOT)
    except ValueError:
        return plain(text)
    return f"[{plain(text)}](../{quote(inside.as_posix())})"


def run_rows(folder: Path) -> list[str]:
    "A line for each run, the newest first."
    runs = [path.parent for path in folder.glob("*/params.json")]
    rows = []
    for run in sorted(runs, key=lambda run: -(run / "params.json").stat().st_mtime):
        rounds = len(list(run.glob("round-*")))
        begun = time.localtime((run / "params.json").stat().st_mtime)
        when = time.strftime("%Y-%m-%d %H:%M", begun)
        views = [link(path.stem, path) for path in sorted(run.glob("*.ipynb"))]
        views += [link(path.name, path) for path in sorted(run.glob("*.html"))]
        rows.append(f"| {link(run.name, run)} | {when} | {rounds or ''} | {', '.join(views)} |")
    return rows


def table(notebooks: list[tuple[str, str]]) -> str:
    rows = ["| notebook | |", "|---|---|"]
    for name, said in notebooks:
        path = ROOT / "nbs" / f"{name}.ipynb"
        if path.exists():
            rows.append(f"| {link(path.stem, path)} | {said} |")
    return "\n".join(rows)


def texts(runs_dir: Path) -> list[str]:
    "The page's cells."
    runs = run_rows(runs_dir) if runs_dir.is_dir() else []
    head = "| run | begun | rounds | to look at |\n|---|---|---|---|\n"
    none = "None yet: run `online_loop`, or `make demo`."
    guides = [link(path.stem, path) for path in sorted((ROOT / "docs").glob("*.md"))]
    phenomena = sorted((ROOT / "nbs/gallery").glob("*.ipynb"))
    gallery = [(f"gallery/{path.stem}", "") for path in phenomena]
    reading = link("the map", ROOT / "docs/rooms.md")
    return [
        "# halos_nb: where to begin\n\nThis page is made anew by each `make lab`.",
        f"## The first hour\n\n{table(FIRST)}",
        f"## Drivers: change a parameter, run all\n\n{table(DRIVERS)}",
        f"## Runs\n\n{head + chr(10).join(runs) if runs else none}",
        f"## Phenomena to run and cite\n\n{table(gallery)}",
        f"## To read\n\nThe rooms, in order: {reading}. Guides: {', '.join(guides)}.",
    ]


def write(page: Path = PAGE, runs_dir: Path | None = None) -> None:
    cells = []
    for i, text in enumerate(texts(runs_dir or Path(load_settings().runs_dir))):
        cells.append(dict(cell_type="markdown", id=f"start{i}", metadata={}, source=text))
    kernel = dict(name="python3", display_name="python3", language="python")
    nb = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(json.dumps(nb, ensure_ascii=False, indent=1), "utf-8")


if __name__ == "__main__":
    write()

"""Runs notebooks for the site: `python docs/execute.py [--keep] [NOTEBOOK ...]`.

Without names all rooms and tutorials. What is executed already, of the same cells and the same
code of ours, stands. `--keep` writes outputs into the notebooks, as the tutorials have them.
"""

import json
import re
import sys
import time
from pathlib import Path

import nbformat
from build import ROOT, executed_path, notebooks, state_of
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

LONGEST = 900  # seconds for one cell


def is_current(path: Path) -> bool:
    "Whether the cache has this notebook, executed with this code."
    there = executed_path(path)
    if not there.is_file():
        return False
    return json.loads(there.read_text("utf-8"))["metadata"].get("halos_nb_state") == state_of(
        path
    )


def execute(path: Path) -> None:
    "Run a notebook and keep it with its outputs."
    state = state_of(path)
    nb = nbformat.read(path, 4)
    where = dict(metadata=dict(path=str(path.parent)))
    NotebookClient(nb, timeout=LONGEST, kernel_name="python3", resources=where).execute()
    nb.metadata["halos_nb_state"] = state
    there = executed_path(path)
    there.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, there)


TEMPORARY = re.compile(r"[^\s'\"]*/(tutorial-\d\d)-\w+")
FIGURE = "application/vnd.plotly.v1+json"


def trimmed(output: dict) -> dict | None:
    "An output as a notebook of the repository keeps it: small, and of no machine; or None."
    if output.get("name") == "stderr":
        return None
    text = TEMPORARY.sub(r"\1", json.dumps(output, ensure_ascii=False))
    kept = json.loads(text)
    data = kept.get("data", {})
    if FIGURE in data:
        kept["data"] = {FIGURE: data[FIGURE]}
    elif "application/vnd.jupyter.widget-view+json" in data:
        return None
    return kept


def keep(path: Path) -> None:
    "Write the outputs of the cache into the notebook itself."
    nb = json.loads(path.read_text("utf-8"))
    executed = json.loads(executed_path(path).read_text("utf-8"))
    for cell, ran in zip(nb["cells"], executed["cells"], strict=True):
        if cell["cell_type"] == "code":
            cell["outputs"] = [o for o in map(trimmed, ran["outputs"]) if o]
    text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", "utf-8")


def chosen(names: list[str]) -> list[Path]:
    "The notebooks that are named; else all that are quick: no driver, nothing of the gallery."
    if names:
        return [Path(name).resolve() for name in names]
    rooms = [path for path in notebooks() if path.parent == ROOT / "nbs"]
    found = [path for path in rooms if path.stem[0].isdigit()]
    return found + [path for path in notebooks() if path.parent.name == "tutorials"]


def main(names: list[str]) -> None:
    storing = "--keep" in names
    failed = []
    for path in chosen([name for name in names if name != "--keep"]):
        name = path.relative_to(ROOT)
        if is_current(path):
            print(f"{name}: stands", flush=True)
            continue
        began = time.monotonic()
        try:
            execute(path)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        except CellExecutionError as e:
            failed.append(str(name))
            print(f"{name}: {e.ename}: {e.evalue}", flush=True)
    if storing and not failed:
        for path in chosen([name for name in names if name != "--keep"]):
            keep(path)
    if failed:
        sys.exit(f"not executed, so shown without outputs: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])

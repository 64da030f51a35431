"""Runs notebooks for the site: `python docs/execute.py [NOTEBOOK ...]` (none: all rooms and
tutorials). What is executed already, of the same cells and the same code of ours, stands.
"""

import json
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


def chosen(names: list[str]) -> list[Path]:
    "The notebooks that are named; else all that are quick: no driver, nothing of the gallery."
    if names:
        return [Path(name).resolve() for name in names]
    rooms = [path for path in notebooks() if path.parent == ROOT / "nbs"]
    found = [path for path in rooms if path.stem[0].isdigit()]
    return found + [path for path in notebooks() if path.parent.name == "tutorials"]


def main(names: list[str]) -> None:
    failed = []
    for path in chosen(names):
        name = path.relative_to(ROOT)
        if is_current(path):
            continue
        began = time.monotonic()
        try:
            execute(path)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        except CellExecutionError as e:
            failed.append(str(name))
            print(f"{name}: {e.ename}: {e.evalue}", flush=True)
    if failed:
        sys.exit(f"not executed, so shown without outputs: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""A stage whose last rank does something else in its third step or batch, or the third time
that it loads or saves: what the file `fault` beside its config says. The file is removed then,
so its folder tells when.
"""

import ctypes
import importlib
import os
import signal
import sys
import time
from pathlib import Path

from halos_nb import configs
from halos_nb.processes import end_process
from halos_nb.settings import parse_args

WORK = {
    "train": ("halos_nb.tree_trainer", "TreeTrainer.training_step"),
    "sample": ("halos_nb.sample", "sample_batch"),
    "label": ("halos_nb.score", "score_batch"),
    "loading": ("halos_nb.loaders", "TreeDataLoader.as_step"),
    "saving": ("halos_nb.tree_trainer", "TreeTrainer._save_checkpoint"),
}


def do(what):
    "Leave the work in one of these ways."
    if what == "close":
        os.closerange(0, 3)
    if what in ("raise", "close"):
        raise ValueError("no reward")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "hang":
        time.sleep(3600)
    if what == "grab":
        ctypes.PyDLL(None).sleep(3600)  # holds Python's lock
    if what == "exit 0":
        os._exit(0)
    if what == "exit 3":
        sys.exit(3)


def with_fault(own, file):
    "The function that does the work, but for its third call."
    calls = []

    def work(*args, **kw):
        calls.append(args)
        if len(calls) == 3:
            what = file.read_text().partition(" while ")[0]
            file.unlink()
            do(what)
        return own(*args, **kw)

    return work


def main():
    "Do the stage's work, but for the fault."
    config = Path(sys.argv[sys.argv.index("--config") + 1])
    stage = config.name.partition(".")[0]
    fault = config.with_name("fault")
    where = fault.read_text().partition(" while ")[2] if fault.exists() else ""
    module, name = WORK[where or stage]
    place = importlib.import_module(module)
    *inner, name = name.split(".")
    for part in inner:
        place = getattr(place, part)
    if os.environ["RANK"] == "1":
        setattr(place, name, with_fault(getattr(place, name), fault))
    kind = getattr(configs, f"{stage.capitalize()}Config")
    importlib.import_module(f"halos_nb.{stage}").main(parse_args(kind))
    end_process()


if __name__ == "__main__":
    main()

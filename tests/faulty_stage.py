"""A stage whose last rank does something else in its third step or batch: what the file `fault`
beside its config says. The file is removed then, so its folder tells when.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

from halos_nb import configs
from halos_nb.processes import end_process
from halos_nb.settings import parse_args

WORK = {
    "train": ("halos_nb.tree_trainer", "TreeTrainer.training_step"),
    "sample": ("halos_nb.sample", "sample_batch"),
    "label": ("halos_nb.score", "score_batch"),
}


def do(what):
    "Leave the work in one of these ways."
    if what == "raise":
        raise ValueError("no reward")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
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
            what = file.read_text()
            file.unlink()
            do(what)
        return own(*args, **kw)

    return work


def main():
    "Do the stage's work, but for the fault."
    config = Path(sys.argv[sys.argv.index("--config") + 1])
    stage = config.name.partition(".")[0]
    module, name = WORK[stage]
    place = importlib.import_module(module)
    *inner, name = name.split(".")
    for part in inner:
        place = getattr(place, part)
    if os.environ["RANK"] == "1":
        setattr(place, name, with_fault(getattr(place, name), config.with_name("fault")))
    kind = getattr(configs, f"{stage.capitalize()}Config")
    importlib.import_module(f"halos_nb.{stage}").main(parse_args(kind))
    end_process()


if __name__ == "__main__":
    main()

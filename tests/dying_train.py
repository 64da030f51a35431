"""halos_nb.train, which kills itself; `kill_at` beside its outputs says when.

Within which step, or at which sealing of a checkpoint. The last rank dies; a line is used once.
"""

import os
import signal
from pathlib import Path

from halos_nb import tree_trainer
from halos_nb.configs import TrainConfig
from halos_nb.processes import end_process
from halos_nb.settings import parse_args
from halos_nb.train import train
from halos_nb.tree_trainer import TreeTrainer


def next_death(file):
    "Take the first line of the file: what is done, and how often before."
    orders = file.read_text().split("\n") if file.exists() else []
    if not orders or not orders[0]:
        return "", 0
    file.write_text("\n".join(orders[1:]))
    what, number = orders[0].split()
    return what, int(number)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def main(cfg):
    "Train, but for the deaths."
    world = int(os.environ.get("WORLD_SIZE", 1))
    is_last = int(os.environ.get("RANK", 0)) == world - 1
    what, number = next_death(Path(cfg.cache_dir) / "kill_at") if is_last else ("", 0)
    step, seal = TreeTrainer.training_step, tree_trainer.seal
    seals = []

    def dying_step(self, *args, **kw):
        if (what, number) == ("step", self.state.global_step):
            die()
        return step(self, *args, **kw)

    def dying_seal(folder):
        seals.append(folder)
        if (what, number) == ("seal", len(seals)):
            die()
        return seal(folder)

    TreeTrainer.training_step = dying_step
    tree_trainer.seal = dying_seal
    return train(cfg)


if __name__ == "__main__":
    main(parse_args(TrainConfig))
    end_process()

"""Train every config file named, in one job of several processes (for test_trainers). One whose
name begins with nan is to stop, and each rank leaves what stopped it beside the file.
"""

import gc
import os
import sys
from pathlib import Path

from halos_nb.configs import TrainConfig
from halos_nb.settings import parse_args
from halos_nb.processes import end_process
from halos_nb.train import train

gc.freeze()  # the look for garbage at the end of each training is short
for file in map(Path, sys.argv[1:]):
    try:
        train(parse_args(TrainConfig, ["--config", str(file)]))
    except FloatingPointError as error:
        if not file.name.startswith("nan"):
            raise
        file.with_suffix(f".rank-{os.environ['RANK']}").write_text(str(error))
end_process()

"Train every config file named, in one job of several processes (for test_trainers)."

import gc
import sys

from halos_nb.configs import TrainConfig
from halos_nb.settings import parse_args
from halos_nb.processes import end_process
from halos_nb.train import train

gc.freeze()  # the look for garbage at the end of each training is short
for file in sys.argv[1:]:
    train(parse_args(TrainConfig, ["--config", file]))
end_process()

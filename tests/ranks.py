"""Ranks of one job, forked from the test's own process: nothing is imported twice."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from halos_nb.processes import wait_for_all

SHARDED = dict(ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def become(rank: int, world: int, port: int, env: dict[str, str]) -> None:
    "Let this process be a rank."
    from accelerate.state import AcceleratorState

    os.environ |= env | dict(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        HALOS_NB_TIMEOUT_MINUTES="1",
    )
    AcceleratorState._reset_state(reset_partial_state=True)


def run_ranks(
    world: int,
    work: Callable[[], object],  # what each rank does
    folder: Path,  # for what they print
    env: dict[str, str] = SHARDED,
) -> None:
    "Do work in so many ranks; an error with the traceback of the first that failed."
    port = free_port()
    pids = {}
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids[pid] = rank
            continue
        code = 1
        try:
            log = open(folder / f"rank{rank}.log", "w")
            sys.stdout = sys.stderr = log
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            become(rank, world, port, env)
            work()
            wait_for_all()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    failed = []
    while pids:
        pid, status = os.wait()
        if pid not in pids:
            continue
        rank = pids.pop(pid)
        if status:
            failed.append(rank)
            for other in pids:
                os.kill(other, 9)
    if failed:
        told = (folder / f"rank{failed[0]}.log").read_text()
        raise RuntimeError(f"rank {failed[0]} of {world} failed:\n{told[-4000:]}")

"A stage for the tests of jobs and the ledger; `model` of its config says what it does."

import atexit
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def progress(total, pause):
    from halos_nb.records import Progress

    with Progress(total, "prompts", "sampling") as p:
        for _ in range(total):
            time.sleep(pause)
            p.update(cut=0)


def fail_with_a_cause():
    try:
        {}["reward"]
    except KeyError as e:
        raise ValueError("record 7: no reward") from e


def hang(out):
    "Say that it runs, and run."
    out.write_text("joined")
    time.sleep(600)


ENDS = ("quiet", "leave", "stop", "grab", "close", "both", "stays")


def end_badly(mode, out):
    "What the last rank does instead of its work."
    if mode == "close":
        os.closerange(0, 3)
    if mode == "raise" and os.environ.get("WORLD_SIZE", "1") != "1":
        atexit.register(os.abort)  # as gloo's destructors do, now and then
    if mode in ("raise", "close", "both"):
        fail_with_a_cause()
    if mode == "stays":
        subprocess.Popen([sys.executable, "-c", DEAF], start_new_session=True)
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if mode == "quiet":
        os._exit(7)
    if mode == "leave":
        os._exit(0)
    if mode == "stop":
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGSTOP)
    if mode == "grab":
        ctypes.PyDLL(None).sleep(600)  # holds Python's lock
    if mode == "hang":
        hang(out)


def in_a_group(mode, cfg, out):
    "Join the other processes; the last of them does what `mode` says."
    import torch

    from halos_nb.processes import end_process, start_processes

    a = start_processes()
    total = int(a.gather(torch.tensor([a.process_index + 1])).sum())
    if int(os.environ.get("RANK", 0)) == a.num_processes - 1:
        end_badly(mode, out)
    elif mode == "both":
        time.sleep(600)
    if mode == "gather" and a.is_main_process:
        progress(5, 0.02)
        found = [total, a.num_processes, cfg["num_processes"], str(a.device)]
        out.write_text(json.dumps([*found, os.environ["OMP_NUM_THREADS"]]))
    end_process()


def tell_variables(out):
    "What Accelerate and torch will read of this process's environment."
    prefixes = ("ACCELERATE_", "FSDP_", "MASTER_ADDR", "WORLD_SIZE", "OMP_NUM", "HALOS_NB_PROM")
    found = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    found["python"] = sys.executable
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(found))


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def with_deaf_children(out):
    "Children in sessions of their own that ignore TERM, as a rank in native code does."
    for _ in range(3):
        subprocess.Popen([sys.executable, "-c", DEAF], start_new_session=True)
    time.sleep(0.5)
    hang(out)


def append(cfg, words, out):
    "The output is a function of the inputs, written after a while and in two parts."
    text = "".join(Path(f).read_text() for f in cfg["datasets"]) + words + "\n"
    progress(4, 0.03)
    out.write_text(text[: len(text) // 2])
    time.sleep(0.05)
    out.write_text(text)


def main():
    cfg = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    mode, _, words = cfg["model"].partition(":")
    out = Path(cfg["output_file"])
    if mode == "early":
        raise RuntimeError("broken before joining")
    if mode in ("gather", "raise", "hang", "die", "segfault", *ENDS):
        in_a_group(mode, cfg, out)
    if mode == "variables":
        tell_variables(out)
    if mode == "deaf":
        with_deaf_children(out)
    if mode == "append":
        append(cfg, words, out)


if __name__ == "__main__":
    main()
    # without destructors, as a real stage ends: those of a copy of a server would take longer
    # than its work
    sys.stdout.flush()
    os._exit(0)

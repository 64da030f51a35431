"""A stage for the tests of launch and loop: real processes, and with `joined` a real gloo group; `model` of its config says what to do."""

import json, os, signal, sys, time
from pathlib import Path


cfg = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
mode, _, extra = cfg["model"].partition(":")
rank, out = int(os.environ.get("RANK", 0)), Path(cfg["output_file"])


def progress(total, pause):
    from halos_nb.records import Progress

    with Progress(total, "prompts", "sampling") as p:
        for _ in range(total):
            time.sleep(pause)
            p.update(cut=0)


if mode == "early":
    raise RuntimeError("broken before joining")
if mode in ("gather", "raise", "hang", "die", "segfault", "quiet"):  # over all processes
    import torch
    from accelerate import Accelerator

    a = Accelerator()
    total = int(a.gather(torch.tensor([a.process_index + 1])).sum())
    if rank == a.num_processes - 1:
        if mode == "raise":
            try:
                {}["reward"]
            except KeyError as e:
                raise ValueError("record 7: no reward") from e
        if mode == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if mode == "quiet":
            os._exit(7)
        if mode == "hang":
            out.write_text("joined")
            time.sleep(600)
    if mode == "gather" and a.is_main_process:
        progress(5, 0.02)
        out.write_text(
            json.dumps(
                [
                    total,
                    a.num_processes,
                    cfg["num_processes"],
                    str(a.device),
                    os.environ["OMP_NUM_THREADS"],
                ]
            )
        )
    a.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)
# children in sessions of their own that ignore TERM, as a rank in native code does
if mode == "deaf":
    import subprocess

    for _ in range(3):
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                (
                    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                    "time.sleep(600)"
                ),
            ],
            start_new_session=True,
        )
    time.sleep(0.5)
    out.write_text("joined")
    time.sleep(600)
# for the loop: the output is a function of the inputs, written after a while
if mode == "append":
    text = "".join(Path(f).read_text() for f in cfg["datasets"]) + extra + "\n"
    progress(4, 0.03)
    out.write_text(text[: len(text) // 2])
    time.sleep(0.05)
    out.write_text(text)
if mode == "nothing":
    pass

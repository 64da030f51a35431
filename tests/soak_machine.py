"""A tiny loop of real models, and what is done to its machine: `python tests/soak_machine.py
disk|paths` (as root for the small disk). test_machine.py has the short forms.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from halos_nb.configs import LoopConfig
from halos_nb.loop import run_rounds
from halos_nb.models import load_reward_model, small_llama
from halos_nb.settings import Settings
from halos_nb.templates import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
LOOP = """
import json, sys
from halos_nb.configs import LoopConfig
from halos_nb.loop import run_rounds
from halos_nb.settings import load_settings
given = json.loads(open(sys.argv[1], encoding="utf-8").read())
for this in run_rounds(LoopConfig(**given), load_settings()):
    print("round", this.number, flush=True)
"""
RUN = dict(
    run_name="r",
    total_prompts=16,
    prompts_per_round=8,
    num_samples_per_prompt=4,
    max_new_tokens=16,
    max_prompt_length=64,
    max_length=96,
    threshold=0,
    batch_size=4,
    lr=1e-3,
    audit="skip",
    alarm="skip",
)


def make_world(folder, hidden=64):
    "A policy, a reward model and prompts, in a folder; the parameters of a run of them."
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tok = byte_tokenizer()
    shape = dict(hidden_size=hidden, layers=2, heads=4, max_length=256, initializer_range=0.08)
    model = small_llama(tok, **shape)
    model.save_pretrained(folder / "sft ä")
    tok.save_pretrained(folder / "sft ä")
    reward = load_reward_model(str(folder / "sft ä"))
    torch.nn.init.normal_(reward.score.weight, std=0.5)
    reward.save_pretrained(folder / "rm ö")
    tok.save_pretrained(folder / "rm ö")
    rows = [json.dumps(dict(prompt=f"Größe {i}?"), ensure_ascii=False) for i in range(24)]
    (folder / "Fragen über alles.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    names = dict(sft_checkpoint="sft ä", reward_checkpoint="rm ö")
    names |= dict(prompts="Fragen über alles.jsonl")
    return RUN | {name: str(folder / file) for name, file in names.items()}


def run_loop(folder, given, runs, cwd, **env):
    "The loop in a process of its own: its exit code and what it said."
    (folder / "loop.py").write_text(LOOP, "utf-8")
    (folder / "given.json").write_text(json.dumps(given), "utf-8")
    env = os.environ | {"HALOS_NB_RUNS_DIR": str(runs), "PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, str(folder / "loop.py"), str(folder / "given.json")]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True)
    return done.returncode, done.stdout.decode() + done.stderr.decode()


def results(run):
    "The files of a run that its parameters decide, by name."
    found = {}
    for name in ("samples.json", "feedback.json", "policy/FINAL/model.safetensors"):
        for file in sorted(run.glob(f"*/{name}")):
            found[str(file.relative_to(run))] = file.read_bytes()
    return found


# ---- a full disk


@contextmanager
def small_disk(folder, megabytes):
    "A tmpfs of this size at a folder; as root."
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={megabytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def free(folder):
    told = os.statvfs(folder)
    return told.f_bavail * told.f_frsize


def fill(folder, leave):
    "A file that leaves so many bytes free."
    with open(folder / "ballast", "ab") as file:
        while (n := free(folder) - leave) > 0:
            try:
                file.write(b"\0" * min(n, 1 << 20))
                file.flush()
            except OSError:
                break


def used(run):
    "How many files a run has, and their bytes: how far it is."
    files = [path for path in run.rglob("*") if path.is_file()] if run.exists() else []
    return sum(path.stat().st_size for path in files if path.exists())


def fill_when(folder, run, bytes_there, done, leave):
    "Fill the disk once the run is so far."
    while not done.is_set():
        try:
            if used(run) >= bytes_there:
                fill(folder, leave)
                return
        except OSError:
            pass
        time.sleep(0.003)


def rounds_here(given, runs, check):
    "The loop in this process, whose server stays: what it raised, in words."
    os.environ["HALOS_NB_NO_ROOM_CHECK"] = "" if check else "1"
    try:
        for _ in run_rounds(LoopConfig(**given), Settings(runs_dir=str(runs)), watch=quiet):
            pass
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def quiet(job, **shown):
    "Wait for a job and show nothing."
    job.wait(show=False)


def fail_at(point, at, small, given):
    "One point: the disk is filled once the run is so far; what came of it, for the table."
    done = threading.Event()
    words = (small, small / "runs/r", at, done, 0 if point % 4 else 20_000)
    filler = threading.Thread(target=fill_when, args=words)
    filler.start()
    # in blocks, for a server has one environment
    why = rounds_here(given, small / "runs", check=point // 5 % 2 == 0)
    done.set()
    filler.join()
    full = (small / "ballast").exists()
    (small / "ballast").unlink(missing_ok=True)
    half = [*small.rglob("*.partial"), *small.rglob("*.tmp")]
    row = dict(point=point, at=at, full=full, half=[path.name for path in half], why=why)
    print(*row.values(), sep=" | ", flush=True)
    return row


def disk(points=20):
    "The disk full at so many points of a run, with and without the check before a stage."
    base = Path(tempfile.mkdtemp())
    given = make_world(base / "models")
    began = time.monotonic()
    assert not rounds_here(given, base / "undisturbed", check=True)
    wanted = results(base / "undisturbed/r")
    whole = used(base / "undisturbed/r")
    print(f"undisturbed: {whole} bytes, {time.monotonic() - began:.0f} s", flush=True)
    with small_disk(base / "disk", 64) as small:
        ways = range(points)
        table = [fail_at(i, whole * i // points, small, given) for i in ways]
        why = rounds_here(given, small / "runs", check=True)
        same = results(small / "runs/r") == wanted
    print(f"continued with room: {why or 'to the end'}, the same: {same}")
    failed = [row for row in table if row["why"]]
    named = [row for row in failed if "no room on the disk" in row["why"]]
    print(f"{len(failed)} of {points} failed, {len(named)} name the disk")
    assert same and failed and named == failed
    assert not any(row["half"] for row in failed)


# ---- paths


def paths():
    "The loop in a folder with umlauts and spaces, from another folder, by either launcher."
    base = Path(tempfile.mkdtemp()) / "Über uns & andere"
    given = make_world(base / "Modelle")
    ini = "[halos_nb]\nruns_dir = 'Läufe 1'\n[profile fork]\nnum_processes = 2\n"
    ini += "[profile apart]\nnum_processes = 2\nlauncher = accelerate\n"
    here = base / "ein Projekt"
    here.mkdir()
    (here / "settings.ini").write_text(ini, "utf-8")
    for profile in ("fork", "apart"):
        mine = given | dict(run_name=profile, profile=profile)
        began = time.monotonic()
        code, said = run_loop(base, mine, "", here)
        assert code == 0, said[-3000:]
        found = results(here / "Läufe 1" / profile)
        print(f"{profile}: {len(found)} files, {time.monotonic() - began:.0f} s")
    assert results(here / "Läufe 1/fork") == results(here / "Läufe 1/apart")


if __name__ == "__main__":
    for name in sys.argv[1:] or ("paths", "disk"):
        dict(disk=disk, paths=paths)[name]()

"""Faults made on purpose: a child that is killed at a file operation, in a system call or at
any moment; damaged files; and what two runs have in common.

Children are forked from this process, so nothing is imported twice.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from long_runs import Pretended, config, wait

from halos_nb import loop
from halos_nb.identity import code_of
from halos_nb.jobs import stage_module
from halos_nb.runs import read_run
from halos_nb.settings import Settings

# ---- children


def child(work, log):
    "Fork a process that does some work; its pid. What it prints is in the log."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        work()
        code = 0
    except BaseException:
        # pytest has its own sys.stderr, which is not the log
        with open(2, "w", encoding="utf-8", closefd=False) as err:
            traceback.print_exc(file=err)
    finally:
        os._exit(code)


def ended(pid):
    "The exit code of a child; negative: the signal that killed it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(work, log):
    "Do some work in a child; its exit code."
    return ended(child(work, log))


# ---- kills

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def at_each_change(root, then):
    "Call `then(number, what)` before each change of a file below a folder, in this process."
    numbers = Counter()
    root = os.fspath(root)

    def look(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if not writes and event not in CHANGES:
            return
        path = next((a for a in args if isinstance(a, (str, os.PathLike))), "")
        if root in os.fspath(path):
            numbers["all"] += 1
            then(numbers["all"], f"{event} {os.path.relpath(path, root)}")

    sys.addaudithook(look)


def changes_of(work, root, log):
    "What a child's work changes, in order."
    found = Path(log).with_suffix(".changes")
    found.unlink(missing_ok=True)
    told = os.open(found, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counted():
        at_each_change(root, lambda n, what: os.write(told, f"{what}\n".encode()))
        work()

    assert in_child(counted, log) == 0, Path(log).read_text()[-3000:]
    os.close(told)
    return found.read_text().splitlines()


def killed_at_change(work, root, number, log):
    "A child that is killed before its so-many-th change."

    def dying(n, what):
        if n == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched():
        at_each_change(root, dying)
        work()

    return in_child(watched, log)


def killed_behind(work, seconds, log):
    "A child that is killed after so many seconds."
    pid = child(work, log)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return ended(pid)


CALLS = "write,pwrite64,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,ftruncate"
CALLS += ",fsync,fdatasync,symlink,symlinkat,link,linkat,copy_file_range,sendfile,fallocate"


def traced(work, log, *options):
    "A child's exit code and its system calls, seen (and with options injected) by strace."
    ours, theirs = os.pipe()

    def waiting():
        os.close(theirs)
        os.read(ours, 1)
        work()

    pid = child(waiting, log)
    os.close(ours)
    seen = Path(log).with_suffix(".strace")
    words = ["strace", "-f", "-qq", "-p", str(pid), "-o", seen, "-e", f"trace={CALLS}"]
    strace = subprocess.Popen([*words, *options], stderr=subprocess.PIPE)
    while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
        assert strace.poll() is None, strace.stderr.read()
        time.sleep(0.005)
    os.close(theirs)
    code = ended(pid)
    strace.wait()
    own = (line for line in seen.read_text().splitlines() if line.startswith(f"{pid} "))
    return code, [line.split(maxsplit=1)[1] for line in own if "(" in line]


def kind_of(call):
    "The name of a system call that strace has seen."
    return call.partition("(")[0]


def killed_at_call(work, calls, number, log):
    """A child that is killed within the so-many-th of its system calls, seen before: the
    call's kind; empty if it came to its end, with a line of progress less.
    """
    kinds = [kind_of(call) for call in calls[:number]]
    # strace counts each kind for itself
    inject = f"inject={kinds[-1]}:signal=SIGKILL:when={kinds.count(kinds[-1])}"
    code, seen = traced(work, log, "-e", inject)
    return kind_of(seen[-1]) if code == -signal.SIGKILL else ""


# ---- damages


def is_missing(path):
    path.unlink()


def is_empty(path):
    path.write_bytes(b"")


def is_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def has_another_bit(path):
    stat, data = path.stat(), bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    # as a disk would: the times are those of before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def is_a_folder(path):
    path.unlink()
    path.mkdir()


def is_unreadable(path):
    path.chmod(0)


DAMAGES = [is_missing, is_empty, is_half, has_another_bit, is_a_folder, is_unreadable]
OVERRIDES = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: what lets root read any file


@contextmanager
def as_anybody():
    "Root reads whatever its mode; in here it is held to the modes, as anybody is."
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    had, less = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, had) == 0
    less[:] = list(had)
    less[0] &= ~OVERRIDES  # of the effective ones; the permitted ones bring them back
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, had) == 0


# ---- two rounds with stages that pretend, in this process


def two_rounds(home):
    "What a run of two rounds does; started again, it goes on. To be done in a child."
    for stage in ("sample", "label", "train"):
        code_of(stage_module(stage))  # a second of a child's time, which it inherits so

    def work():
        loop.Ledger = Pretended
        home.mkdir(exist_ok=True)
        cfg = config(home, 2, audit="skip", alarm="skip")
        for _ in loop.run_rounds(cfg, Settings(runs_dir=str(home / "runs")), watch=wait):
            pass
        read_run(home / "runs/long")

    return work


OUTPUTS = ("samples.json", "feedback.json", "feedback.labels.jsonl", "metrics.jsonl", "weights")


def outputs(run):
    "What a run has made, by name."
    files = (p for p in sorted(run.rglob("*")) if p.name in OUTPUTS and p.is_file())
    made = {str(p.relative_to(run)): p.read_bytes() for p in files}
    link = run / "policy"
    made["policy"] = os.readlink(link).encode() if link.is_symlink() else b""
    return made


def leftovers(run):
    "What writers that are no more have left; a folder called so was made by no writer."
    found = [p for p in run.rglob("*") if p.name.endswith((".tmp", ".partial"))]
    return [p.name for p in found if p.is_file() or p.suffix == ".partial"]


# ---- what was seen


class Table:
    "Counts by row and column, printed as Markdown."

    def __init__(self, title):
        self.title = title
        self.rows = {}

    def add(self, row, column, example=""):
        counts = self.rows.setdefault(row, Counter())
        counts[column] += 1

    def total(self, column):
        return sum(counts[column] for counts in self.rows.values())

    def show(self):
        columns = sorted({name for counts in self.rows.values() for name in counts})
        print(f"\n| {self.title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
        for row, counts in self.rows.items():
            print(f"| {row} | {' | '.join(str(counts[name]) for name in columns)} |")
        sys.stdout.flush()


def copy_of(folder, to):
    "A fresh copy of a folder."
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(folder, to, symlinks=True)

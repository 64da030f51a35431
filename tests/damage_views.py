"""Every file of a run, damaged as JSON can be, looked at by every view.

A view shows what is left, or its error names a file of the run; what `look` finds otherwise is
a fault. A part of it, seeded, is in tests/test_report.py; `make soak` does more.
"""

import json
import random
import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

VALUES = [None, True, -1, 0, 1e400, 2.5, "", "x", "\ud83d", [], [1], ["a", None], {}, {"a": 1}]
WHOLE = [
    b"",
    b"[]",
    b"{}",
    b"7",
    b'"x"',
    b"null",
    b"[1]",
    b"{",
    b"\xff\xfe",
    b"[[]]\n",
    b"{}\n7\n",
]


def places(value, loc=()):
    "Where something stands in a value."
    yield loc
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*loc, key))


def changed(value, rng):
    "A value with one place of another kind, or without it."
    loc = rng.choice(list(places(value)))
    wrong = rng.choice(VALUES)
    if not loc:
        return wrong
    inner = value
    for key in loc[:-1]:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[loc[-1]]
    else:
        inner[loc[-1]] = wrong
    return value


def text(value):
    return json.dumps(value).encode()


def damage(path, rng):
    "Change a file as JSON; says how."
    data = path.read_bytes()
    kind = rng.choice(["whole", "value", "value", "value", "cut", "line"])
    try:
        if kind == "value" and path.suffix == ".jsonl":
            lines = data.splitlines()
            i = rng.randrange(len(lines))
            lines[i] = text(changed(json.loads(lines[i]), rng))
            data = b"\n".join(lines) + b"\n"
        elif kind == "value":
            data = text(changed(json.loads(data), rng))
        elif kind == "cut":
            data = data[: rng.randrange(len(data) + 1)]
        elif kind == "line":
            lines = data.splitlines()
            lines[rng.randrange(len(lines))] = rng.choice(WHOLE)
            data = b"\n".join(lines) + b"\n"
        else:
            data = rng.choice(WHOLE)
    except (ValueError, IndexError):
        data = rng.choice(WHOLE)
    path.write_bytes(data)
    return data


def views(run, tmp):
    "What people look at a run with."
    from halos_nb.compare import RunComparer
    from halos_nb.handover import model_card
    from halos_nb.monitor import RunMonitor
    from halos_nb.page import report
    from halos_nb.widgets import browse_pairs

    def monitor():
        watching = RunMonitor(run, mode="static")
        watching.look()
        watching.warning(watching.look())
        watching.show()

    return dict(
        monitor=monitor,
        pairs=lambda: browse_pairs(run, mode="static"),
        compare=lambda: RunComparer(run.parent, [run.name], mode="static").static(),
        report=lambda: report(run, tmp / "report.html"),
        card=lambda: model_card(run),
    )


def problem(view, run):
    "What is wrong with how a view takes a damaged run; empty if nothing is."
    try:
        view()
    except (ValueError, OSError) as e:
        return "" if str(run.parent) in str(e) else f"no path: {e!r}"
    except Exception as e:
        import traceback

        at = traceback.extract_tb(e.__traceback__)[-1]
        return f"{e!r} at {Path(at.filename).name}:{at.lineno} {at.name}"
    return ""


def look(run, tmp, n, seed=0, only=""):
    "Damage a copy of a run n times; returns (file, view, what is wrong) for what is wrong."
    rng = random.Random(seed)
    files = [
        p.relative_to(run)
        for p in sorted(run.rglob("*"))
        if p.is_file() and p.suffix in (".json", ".jsonl") and only in p.name
    ]
    found = []
    for _ in range(n):
        here = tmp / "runs" / run.name
        shutil.rmtree(tmp / "runs", ignore_errors=True)
        shutil.copytree(run, here, ignore=shutil.ignore_patterns("*.safetensors"))
        file = rng.choice(files)
        data = damage(here / file, rng)
        for name, view in views(here, tmp).items():
            with (
                warnings.catch_warnings(),
                redirect_stdout(StringIO()),
                redirect_stderr(StringIO()),
            ):
                warnings.simplefilter("ignore")
                if wrong := problem(view, here):
                    found.append((str(file), name, wrong, data[:300]))
    return found

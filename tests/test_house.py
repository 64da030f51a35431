"""The house rules that a reader relies on: who imports whom, what stays light, what is never
done.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from air import everything

ROOT = Path(__file__).resolve().parent.parent

# The rooms in reading order, by floor, and which floors each floor may import. Within what a
# floor may see, imports point to lower numbers only. The map in docs/rooms.md says the same;
# change both together and say why.
FLOORS = {
    0: "records stats configs settings data hub_sets feedback verdicts label_input health",
    1: "templates trees loaders processes attention checkpoints head models reference layouts",
    2: "losses advantages tree_trainer old_policy trainers resume train plan",
    3: "generate api answers backends engine_client sample engine_server wording rescore "
    "letters",
    4: "score replies judge label audit evaluate benchmarks",
    5: "supervise preload failures progress jobs identity ledger loop submit hosts",
    6: "show figures rewards runs people pairs monitor widgets compare page",
    7: "playground handover reward_report gallery terminal paper printing",
}
SEES = {
    0: {0},
    1: {0, 1},
    2: {0, 1, 2},
    3: {0, 1, 3},
    4: {0, 1, 2, 3, 4},
    5: {0, 5},
    6: {0, 5, 6},
    7: {0, 1, 2, 3, 4, 5, 6, 7},  # the gallery plays in the playground
}
ALONE = ["records", "losses", "supervise"]  # import nothing of ours
# The only places that name a stage's module as a string: who starts it, and what is imported
# for it beforehand.
NAME_STAGES = ["jobs", "preload", "submit", "hosts"]

ROOMS = {name: floor for floor, names in FLOORS.items() for name in names.split()}
ORDER = list(ROOMS)


def may_import(name):
    "The rooms that this one may import."
    below = ORDER[: ORDER.index(name)]
    return [] if name in ALONE else [m for m in below if ROOMS[m] in SEES[ROOMS[name]]]


# These run in the notebook's kernel beside the stages' processes, so torch (and its GPU memory)
# has no place in them.
LIGHT = [m for m in ORDER if ROOMS[m] in (5, 6)]
LIGHT += [
    "records",
    "stats",
    "configs",
    "settings",
    "feedback",
    "verdicts",
    "label_input",
    "health",
    "api",
    "wording",
    "replies",
    "judge",
]
HEAVY = {"torch", "transformers", "accelerate", "datasets"}

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = {
    p.stem: p for p in sorted((ROOT / "halos_nb").glob("*.py")) if not p.stem.startswith("_")
}
SOURCES = [
    *MODULES.values(),
    *sorted((ROOT / "tests").glob("*.py")),
    *sorted((ROOT / "bench").glob("*.py")),
]


def cells(path, kind):
    return [
        "".join(c["source"])
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == kind
    ]


def default_exp(path):
    "The module that a notebook exports to, or None."
    return next(
        (
            m[1]
            for src in cells(path, "code")
            if (m := re.search(r"^#\|\s*default_exp:?\s+(\S+)", src, re.M))
        ),
        None,
    )


def own_imports(tree):
    """(module of ours, imported names) of every import anywhere in a syntax tree, functions
    included.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.split(".")[0] == "halos_nb":
                    yield (a.name.split(".") + [""])[1], [a.name]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            # relative: nbdev writes these
            if node.level:
                module = ["halos_nb", *filter(None, module)]
            if module[0] != "halos_nb":
                continue
            names = [a.name for a in node.names]
            if len(module) > 1:
                yield module[1], names
            else:
                yield from ((n, names) for n in names)


ids = dict(ids=lambda p: p.stem if isinstance(p, Path) else str(p))


@pytest.mark.parametrize("name", MODULES)
def test_import_table(name):
    assert name in ROOMS, f"{name}: a new room; give it a place in FLOORS and in docs/rooms.md"
    for module, names in own_imports(ast.parse(MODULES[name].read_text())):
        if module in ("", "__version__"):
            continue
        assert module in may_import(name), (
            f"{name} imports {module}; it may import {may_import(name) or 'none of ours'}"
        )
        assert "*" not in names, f"{name}: star import from {module}"


@pytest.mark.parametrize(
    "line, found",
    [
        ("def f():\n    from halos_nb.loop import run", [("loop", ["run"])]),
        ("from .models import *", [("models", ["*"])]),
        ("import halos_nb.figures as p", [("figures", ["halos_nb.figures"])]),
        ("from halos_nb import sample", [("sample", ["sample"])]),
        ("from . import label", [("label", ["label"])]),
        ("import torch", []),
    ],
)
def test_import_table_sees(line, found):
    assert list(own_imports(ast.parse(line))) == found


def strings_naming_rooms(tree):
    """(room, line) of every text in a syntax tree that is a dotted name of ours, documentation
    left out.
    """
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docs
        ):
            if m := re.fullmatch(r"halos_nb\.(\w*)\.?", node.value):
                yield m[1], node.lineno


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_named_as_strings_only_where_stages_start(name):
    named = list(strings_naming_rooms(ast.parse(MODULES[name].read_text())))
    assert not named or name in NAME_STAGES, f"{name}: names {named} as strings"


def test_strings_are_seen():
    tree = ast.parse("'halos_nb.doc'\nrun('halos_nb.train', f'halos_nb.{stage}')")
    assert list(strings_naming_rooms(tree)) == [("train", 2), ("", 2)]


def test_the_table_has_no_room_twice_and_points_down():
    assert sum(len(names.split()) for names in FLOORS.values()) == len(ROOMS)
    for name in ROOMS:
        assert all(ORDER.index(m) < ORDER.index(name) for m in may_import(name)), name


def loaded(statement):
    "Top-level modules in memory after a statement in a fresh Python."
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(out.stdout.split())


def test_light_rooms_do_not_load_torch():
    "All of them in one process; who does is looked for only where somebody does."
    names = [n for n in LIGHT if n in MODULES]
    if loaded("import " + ", ".join(f"halos_nb.{name}" for name in names)) & HEAVY:
        heavy = [name for name in names if loaded(f"import halos_nb.{name}") & HEAVY]
        assert heavy == [], f"they load one of {sorted(HEAVY)}"
        pytest.fail("together they load what none of them loads alone")


def test_import_halos_nb_is_light():
    assert not loaded("import halos_nb") & (
        HEAVY | {"pandas", "numpy", "plotly", "pydantic", "IPython"}
    )


def test_every_notebook_has_its_module_and_the_reverse():
    exported = {default_exp(p): p for p in NOTEBOOKS}  # drivers export nothing and are None
    exported.pop(None, None)
    assert set(exported) == set(MODULES), (
        "a notebook without module (run nbdev-export) or a module whose notebook is gone "
        "(delete it)"
    )
    for name, p in exported.items():
        assert re.fullmatch(r"\d\d_" + name, p.stem), f"{p.name} exports {name}"
    numbers = [p.stem[:2] for p in exported.values()]
    assert len(set(numbers)) == len(numbers), "two notebooks have the same number"
    for name, p in exported.items():
        assert int(p.stem[0]) == ROOMS[name], f"{p.name} stands on floor {ROOMS[name]}"
    order = [default_exp(p) for p in NOTEBOOKS if default_exp(p)]
    assert order == [n for n in ORDER if n in exported], (
        "the notebooks' numbers are the reading order of FLOORS"
    )


def test_modules_are_what_the_notebooks_export(tmp_path):
    import shutil

    for f in ("nbs", "halos_nb"):
        shutil.copytree(
            ROOT / f,
            tmp_path / f,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for f in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / f, tmp_path)
    subprocess.run(["nbdev-export"], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    for name, p in MODULES.items():
        assert (tmp_path / "halos_nb" / p.name).read_text() == p.read_text(), (
            f"{name}: run nbdev-export"
        )


@pytest.mark.parametrize("path", NOTEBOOKS, **ids)
def test_notebook_says_its_purpose_first(path):
    first = json.loads(path.read_text())["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S.*\n+> \S", "".join(first["source"])), (
        f"{path.name}: begin with '# Title' and '> purpose'"
    )


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if default_exp(p) is None], **ids)
def test_drivers_export_and_define_nothing(path):
    for src in cells(path, "code"):
        assert not re.search(r"^#\|\s*export", src, re.M)
        plain = "\n".join(
            line for line in src.splitlines() if not line.lstrip().startswith(("%", "!"))
        )
        for node in ast.walk(ast.parse(plain)):
            assert not isinstance(node, ast.ClassDef | ast.AsyncFunctionDef), (
                f"{path.name} defines {node.name}: it belongs in a room"
            )


@pytest.mark.parametrize("path", SOURCES, **ids)
def test_nothing_dangerous(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            assert not {"pickle", "cPickle", "dill", "joblib", "marshal"} & {
                n.split(".")[0] for n in names
            }, f"line {node.lineno}: no pickle is loaded here"
        if not isinstance(node, ast.Call):
            continue
        given = {
            k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
        }
        assert given.get("trust_remote_code") is not True, (
            f"line {node.lineno}: trust_remote_code is the user's to turn on"
        )
        if ast.unparse(node.func) == "torch.load":
            assert given.get("weights_only") is True, (
                f"line {node.lineno}: torch.load without weights_only=True"
            )


SECRET = re.compile(
    r"sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|xox[bp]-[0-9A-Za-z-]{20,}"
)
TEXTS = [
    p
    for p in ROOT.glob("*")
    if p.suffix in (".md", ".toml", ".ini", ".txt") or p.name == "Makefile"
]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOURCES, *TEXTS], **ids)
def test_no_secret_is_written_down(path):
    assert not SECRET.search(path.read_text())


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("path", PAGES, **ids)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_code_has_air():
    "The measures of CONTRIBUTING.md; `python tests/air.py` prints them for every notebook."
    for figures in everything(ROOT):
        assert figures["too_long"] == 0 and figures["mean"] <= 52
        assert figures["comprehensions"] <= 0.06
    (size, longest), *_ = everything(ROOT)[1]["longest"]
    assert size <= 120, f"{size} nodes: {ast.unparse(longest)}"


TOLD = [*(p for p in PAGES if p.name != "LOG.md"), *NOTEBOOKS]


@pytest.mark.parametrize("path", TOLD, **ids)
def test_notebooks_that_texts_name_are_there(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join(cells(path, "markdown"))
    for name in re.findall(r"\b(\d\d_[a-z_]+)\b", text):
        assert [*(ROOT / "nbs").rglob(f"{name}.ipynb")], f"{path.name} names nbs/{name}"


def test_the_map_has_every_room_with_its_sentence():
    text = (ROOT / "docs/rooms.md").read_text("utf-8").lower()
    for notebook in NOTEBOOKS:
        if not (name := default_exp(notebook)):
            assert f"`nbs/{notebook.stem}`" in text, f"docs/rooms.md lacks {notebook.name}"
            continue
        purpose = cells(notebook, "markdown")[0].split("\n> ")[1].splitlines()[0]
        row = f"| `nbs/{notebook.stem}` → `{name}` | {purpose.rstrip('.')} |".lower()
        assert row in text, f"docs/rooms.md says of {name}: {purpose}"


def public_functions(tree):
    "Functions and methods that a user may call, each with its name."
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for name, method in public_functions(node):
                yield f"{node.name}.{name}", method
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_") or node.name == "__init__":
                yield node.name, node


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_are_annotated_and_documented_by_type(name):
    for function, node in public_functions(ast.parse(MODULES[name].read_text())):
        given = node.args
        parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        bare = [p.arg for p in parameters if not p.annotation and p.arg not in ("self", "cls")]
        assert not bare, f"{name}.{function}: {', '.join(bare)} have no type"
        assert node.returns, f"{name}.{function}: no return type"


def test_what_is_promised_has_a_test():
    "Every test that docs/promise.md names exists."
    said = (ROOT / "docs" / "promise.md").read_text("utf-8")
    named = re.findall(r"`(\w+\.py)::(\w+)`", said)
    assert len(named) > 40
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in tests, f"docs/promise.md: tests/{file} has no {name}"

"""How much air the code has: prints STYLE.md's table for the notebooks and modules of a
checkout.

usage: python tests/air.py [CHECKOUT]     (default: this one; `make air`)
A code line is not blank and no comment of its own. Its mean length is without indentation;
too long is a whole line over 96. `compr.`: lines on which a comprehension begins; `names`:
assignments to three and more names, per 1,000 lines; `words`: of prose, for 45 characters of
exported code. nbdev's own `__all__` is left out. tests/test_house.py holds the limits.
"""

import ast
import json
import re
import statistics
import sys
from pathlib import Path

WIDTH = 96  # characters of a cell that JupyterLab shows at 1366 pixels
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def cells(path, kind="code"):
    "The sources of a notebook's cells."
    notebook = json.loads(path.read_text())
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def plain(source):
    "A cell without magics, as Python can parse it."
    lines = source.splitlines()
    return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in lines)


def module_cells(path):
    "A module in nbdev's pieces, without its header and `__all__`."
    pieces = re.split(r"^# %% .*\n", path.read_text(), flags=re.M)
    return [p for p in pieces if not p.startswith("__all__")]


def code_lines(source):
    "Lines that hold code."
    lines = source.splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def own_nodes(statement):
    "Syntax nodes of a statement, those of statements inside it left out."
    count, todo = 0, [statement]
    while todo:
        node = todo.pop()
        count += 1
        todo += [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.stmt)]
    return count


def many_names(node):
    "Does it assign to three names and more at a time?"
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(t, ast.Tuple) and len(t.elts) >= 3 for t in targets)


def measure(sources):
    "The figures of some pieces of code."
    lines, comprehended, crowded, statements = [], set(), 0, []
    for number, source in enumerate(sources):
        lines += code_lines(source)
        for node in ast.walk(ast.parse(plain(source))):
            if isinstance(node, COMPREHENSIONS):
                comprehended.add((number, node.lineno))
            if isinstance(node, ast.stmt):
                statements.append((own_nodes(node), node))
            crowded += many_names(node)
    everything = [line for source in sources for line in source.splitlines()]
    return dict(
        lines=len(lines),
        characters=sum(len(line.strip()) for line in lines),
        mean=statistics.mean(len(line.strip()) for line in lines),
        too_long=sum(len(line) > WIDTH for line in everything),
        over_120=sum(len(line) > 120 for line in everything),
        comprehensions=len(comprehended) / len(lines),
        many_names=1000 * crowded / len(lines),
        longest=sorted(statements, key=lambda x: -x[0])[:10],
    )


def exported(path):
    "The exported cells of a notebook."
    return [s for s in cells(path) if re.search(r"^#\|\s*export", s, re.M)]


def prose(path):
    """Words of a notebook's Markdown for 45 characters of exported code, a line's worth; or
    None.
    """
    words = sum(len(s.split()) for s in cells(path, "markdown"))
    code = exported(path)
    return 45 * words / measure(code)["characters"] if code else None


def row(name, m, words=None):
    "One line of the table."
    return (
        f"{name:<24}{m['lines']:>7}{m['mean']:>7.1f}{m['too_long']:>6}{m['over_120']:>7}"
        f"{m['comprehensions']:>8.1%}{m['many_names']:>8.1f}"
        + (f"{words:>8.1f}" if words is not None else "")
    )


def everything(root):
    "The figures of all notebooks, and of all modules."
    notebooks = sorted((root / "nbs").rglob("*.ipynb"))
    modules = [p for p in sorted((root / "halos_nb").glob("*.py")) if p.stem[0] != "_"]
    shown = measure([s for p in notebooks for s in cells(p)])
    return shown, measure([s for p in modules for s in module_cells(p)])


def main(root="."):
    root = Path(root)
    print(f"{'':<24}  lines   mean  > 96  > 120  compr.   names   words")
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        print(row(path.stem, measure(cells(path)), prose(path)))
    shown, modules = everything(root)
    print(row("all notebooks", shown))
    print(row("all modules", modules))
    print("\nThe longest statements of the modules, in syntax nodes:")
    for size, node in modules["longest"]:
        print(f"{size:>6}  {ast.unparse(node).splitlines()[0][:100]}")


if __name__ == "__main__":
    main(*sys.argv[1:])

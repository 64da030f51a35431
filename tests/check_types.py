"""mypy over the exported modules: `python tests/check_types.py` (`make types`, and in CI).

fastcore's `@patch` puts a method beside its explanation instead of into its class; no type
checker follows that. So mypy reads a copy of each module, in build/types, in which patched
methods stand at the end of their class. Its messages name the lines of the real modules.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "types" / "halos_nb"
IGNORE = re.compile(r"#\s*type:\s*ignore(\[[\w, -]+\])?(.*)")


def patched(node):
    "The class that a function is patched into, and whether as a property; None if it is not."
    for decorator in getattr(node, "decorator_list", []):
        text = ast.unparse(decorator)
        if text == "patch" or text.startswith("patch("):
            first = node.args.args[0].annotation
            return ast.unparse(first).strip("'\""), "as_prop=True" in text
    return None


def method_lines(node, lines, as_property):
    "The (number, text) of a patched function's lines, as a method."
    out = [(node.lineno, "    @property")] if as_property else []
    for decorator in node.decorator_list:
        if "patch" not in ast.unparse(decorator):
            out.append((decorator.lineno, "    " + lines[decorator.lineno - 1]))
    body = range(node.lineno, node.end_lineno + 1)
    return out + [(n, "    " + lines[n - 1] if lines[n - 1] else "") for n in body]


def merged(source):
    "The (number, text) of a module's lines, patched methods in their classes."
    tree, lines = ast.parse(source), source.splitlines()
    ends = {n.name: n.end_lineno for n in tree.body if isinstance(n, ast.ClassDef)}
    moved, gone = {}, set()
    for node in tree.body:
        if not (found := patched(node)):
            continue
        owner, as_property = found
        moved.setdefault(ends[owner], []).extend(method_lines(node, lines, as_property))
        first = min(d.lineno for d in node.decorator_list)
        gone.update(range(first, node.end_lineno + 1))
    out = []
    for number, text in enumerate(lines, 1):
        if number not in gone:
            out.append((number, text))
        out += moved.get(number, [])
    return out


def write_copies():
    "The modules for mypy; for each the real number of every line."
    COPY.mkdir(parents=True, exist_ok=True)
    for old in COPY.glob("*.py"):
        old.unlink()
    numbers = {}
    for path in sorted((ROOT / "halos_nb").glob("*.py")):
        if path.stem == "_modidx":
            continue
        rows = merged(path.read_text())
        (COPY / path.name).write_text("\n".join(text for _, text in rows) + "\n")
        numbers[path.name] = [number for number, _ in rows]
    return numbers


def ignores():
    "Every `type: ignore` of the modules: (file, line, what is ignored, why)."
    for path in sorted((ROOT / "halos_nb").glob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if found := IGNORE.search(line):
                yield path.name, number, found[1] or "", found[2].strip(" #")


def main():
    numbers = write_copies()
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
    done = subprocess.run([*command, COPY], cwd=COPY.parent, capture_output=True, text=True)
    for line in (done.stdout + done.stderr).splitlines():
        if place := re.match(r"(?:halos_nb/)?(\w+\.py):(\d+): (.*)", line):
            name, number, message = place.groups()
            line = f"halos_nb/{name}:{numbers[name][int(number) - 1]}: {message}"
        print(line)
    found = list(ignores())
    counted = ", ".join(f"{n} {kind}" for kind, n in Counter(x[2] for x in found).items())
    print(f"type: ignore: {len(found)}" + (f" ({counted})" if found else ""))
    bare = [x for x in found if not x[2] or not x[3]]
    for name, number, *_ in bare:
        print(f"halos_nb/{name}:{number}: an ignore names its error and says why behind it")
    return done.returncode or bool(bare)


if __name__ == "__main__":
    sys.exit(main())

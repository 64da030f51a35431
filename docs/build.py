"""Writes what Sphinx reads: `python docs/build.py build/docs-src`.

The notebooks stay the one source. Each is copied with the outputs that a cache has of it
(`make docs-execute`); every exported definition gets an entry made from its syntax tree and the
comments beside its parameters; nothing of the project is imported, nothing is executed.
"""

import ast
import hashlib
import io
import json
import re
import shutil
import sys
import tokenize
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EXECUTED = ROOT / "build" / "docs-executed"
FOLDERS = ("nbs", "nbs/tutorials", "nbs/gallery")
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")
NO_OUTPUTS = "*Shown without outputs; `make docs-execute` runs the notebooks and adds them.*"

# ---- notebooks


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def notebooks() -> list[Path]:
    "Every notebook that is shown."
    found: list[Path] = []
    for folder in FOLDERS:
        found += sorted((ROOT / folder).glob("*.ipynb"))
    return found


def state_of(path: Path) -> str:
    "What a notebook's outputs depend on: its cells, and our code."
    cells = json.loads(path.read_text("utf-8"))["cells"]
    digest = hashlib.sha256("\0".join(map(source_of, cells)).encode())
    for module in sorted((ROOT / "halos_nb").glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def executed_path(path: Path) -> Path:
    return EXECUTED / path.relative_to(ROOT)


def with_outputs(path: Path) -> tuple[dict, bool]:
    "A notebook with the outputs of the cache, where they are this notebook's and this code's."
    nb = json.loads(path.read_text("utf-8"))
    if executed_path(path).is_file():
        executed = json.loads(executed_path(path).read_text("utf-8"))
        if executed["metadata"].get("halos_nb_state") == state_of(path):
            return executed, True
    return nb, any(cell.get("outputs") for cell in nb["cells"])


RUNS = "script iframe object embed form base meta link frame frameset applet portal".split()
ADDRESSES = ("href", "src", "action", "formaction", "data", "srcset", "poster", "background")


class Inert(HTMLParser):
    "Whether HTML holds nothing that runs or fetches."

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.inert = True

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in RUNS:
            self.inert = False
        for name, value in attrs:
            said = re.sub(r"[\s\x00]", "", value or "").lower()
            address = name.split(":")[-1] in ADDRESSES
            harmless = said.startswith(("#", "data:image/png;", "data:image/svg+xml;"))
            fetches = name == "style" and ("url(" in said or "@import" in said)
            if name.startswith("on") or name == "srcdoc" or fetches:
                self.inert = False
            if address and said and not harmless:
                self.inert = False

    handle_startendtag = handle_starttag


def is_inert(html: str) -> bool:
    parser = Inert()
    parser.feed(html)
    parser.close()
    named = re.search(rf"</?\s*({'|'.join(RUNS)})\b", html, re.I)
    return parser.inert and not named and not re.search(r"@import|url\(", html)


def figure_html(figure: dict) -> str:
    "A figure for `figures.js`: its data as text, drawn when it comes into view."
    text = json.dumps({key: figure[key] for key in ("data", "layout") if key in figure})
    for sign, written in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(sign, written)
    height = figure.get("layout", {}).get("height") or 400
    return (
        f'<div class="figure" style="min-height:{int(height)}px">'
        f'<script type="application/json">{text}</script></div>'
    )


def shown_output(output: dict) -> dict | None:
    "An output as the site shows it, or None: models' text is text, and nothing in it runs."
    kind = output["output_type"]
    if kind == "stream":
        return None if output.get("name") == "stderr" else output
    if kind == "error":
        said = f"{output['ename']}: {output['evalue']}\n"
        return dict(output_type="stream", name="stdout", text=said)
    data = output["data"]
    text = "".join(data.get("text/plain", ""))
    shown: dict[str, Any] = {}
    html = "".join(data.get("text/html", ""))
    if figure := data.get("application/vnd.plotly.v1+json"):
        shown["text/html"] = figure_html(figure)
    elif "image/png" in data:
        shown["image/png"] = data["image/png"]
    elif html and is_inert(html):
        shown["text/html"] = f'<div class="view">{html}</div>'
    elif text and "application/vnd.jupyter.widget-view+json" not in data:
        return dict(output_type="stream", name="stdout", text=text + "\n")
    return dict(output_type="display_data", data=shown, metadata={}) if shown else None


DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
ROOM = re.compile(r"(?<!\[)`(?:nbs/)?((?:gallery/|tutorials/)?\w+)(?:\.ipynb)?`")


def linked(text: str, names: dict[str, Path], base: str) -> str:
    "A text in which `20_losses` and `nbs/online_loop` lead to their pages."

    def link(found: re.Match[str]) -> str:
        said = found[0].strip("`")
        bare = re.fullmatch(r"\w+", said) and not re.match(r"\d\d_", said)
        target = names.get(found[1])
        if bare or target is None:
            return found[0]
        return f"[{found[0]}]({base}{target.relative_to(ROOT).as_posix()})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
    return "".join(part if i % 2 else ROOM.sub(link, part) for i, part in enumerate(parts))


def page_of(path: Path, names: dict[str, Path]) -> dict:
    "A notebook as MyST-NB reads it."
    nb, has = with_outputs(path)
    base = "../" * len(path.relative_to(ROOT).parent.parts)
    cells = []
    for i, cell in enumerate(nb["cells"]):
        source = source_of(cell)
        if cell["cell_type"] == "markdown":
            source = linked(source, names, base)
            cell = dict(cell_type="markdown", id=f"c{i}", metadata={}, source=source)
        else:
            if re.search(r"^#\|\s*(default_exp|hide\s*$)", source, re.M):
                continue
            outputs = [shown_output(o) for o in cell.get("outputs", [])]
            cell = dict(
                cell_type="code",
                id=f"c{i}",
                metadata={},
                execution_count=None,
                source=DIRECTIVE.sub("", source).strip("\n"),
                outputs=[o for o in outputs if o],
            )
        cells.append(cell)
    if not has:
        cells[0]["source"] += "\n\n" + NO_OUTPUTS
    kernel = dict(name="python3", display_name="Python 3", language="python")
    told = dict(kernelspec=kernel)
    told["language_info"] = dict(name="python", pygments_lexer="python")
    return dict(cells=cells, metadata=told, nbformat=4, nbformat_minor=5)


# ---- the API reference


class Comments(NamedTuple):
    "The comments of a module, by line: beside code, and on lines of their own."

    beside: dict[int, str]
    alone: dict[int, str]
    lines: list[str]

    def of(self, node: ast.AST) -> str:
        "What is said of a parameter or a field, beside it or above it."
        line = getattr(node, "end_lineno", 0)
        if line in self.beside:
            return self.beside[line]
        above: list[str] = []
        line = getattr(node, "lineno", 0) - 1
        if self.lines[line][: getattr(node, "col_offset", 0)].strip(" *"):
            return ""
        while line in self.alone:
            above.insert(0, self.alone[line])
            line -= 1
        return " ".join(above)


def comments_of(source: str) -> Comments:
    found = Comments({}, {}, source.split("\n"))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# %%"):
            alone = token.line[: token.start[1]].strip() == ""
            text = re.sub(r"^#\s*(?:type: ignore\S*\s*)?(?:#\s*)?", "", token.string).strip()
            (found.alone if alone else found.beside)[token.start[0]] = text
    return found


def doc_of(node: ast.AST) -> str:
    return ast.get_docstring(node) or ""  # type: ignore[arg-type]


def is_patch(node: ast.FunctionDef) -> str:
    "The class that `@patch` gives a function to; empty for a plain one."
    for decorator in node.decorator_list:
        if ast.unparse(decorator).split("(")[0] == "patch" and node.args.args[0].annotation:
            return ast.unparse(node.args.args[0].annotation)
    return ""


def is_property(node: ast.FunctionDef) -> bool:
    said = [ast.unparse(d) for d in node.decorator_list]
    return any("property" in d or "as_prop=True" in d for d in said)


class Qualified(ast.NodeTransformer):
    "Types with the module they come from, so that links know which one is meant."

    def __init__(self, origin: dict[str, str]) -> None:
        self.origin = origin

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.origin.get(node.id, node.id))


def type_text(node: ast.AST | None, origin: dict[str, str]) -> str:
    if node is None:
        return ""
    if isinstance(node, ast.Starred):
        return f"*{type_text(node.value, origin)}"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    copy = ast.parse(ast.unparse(node), mode="eval").body
    return ast.unparse(Qualified(origin).visit(copy))


def parameters(args: ast.arguments) -> list[tuple[ast.arg, ast.AST | None, str]]:
    "Each parameter with its default and its star."
    plain = [*args.posonlyargs, *args.args]
    defaults: list[ast.AST | None] = [None] * (len(plain) - len(args.defaults))
    defaults += args.defaults
    found = [(a, d, "") for a, d in zip(plain, defaults)]
    if args.vararg:
        found.append((args.vararg, None, "*"))
    elif args.kwonlyargs:
        found.append((ast.arg("*"), None, ""))
    found += [(a, d, "") for a, d in zip(args.kwonlyargs, args.kw_defaults)]
    if args.kwarg:
        found.append((args.kwarg, None, "**"))
    return found


def signature(node: ast.FunctionDef, origin: dict[str, str]) -> str:
    parts = []
    for arg, default, star in parameters(node.args):
        if arg.arg in ("self", "cls"):
            continue
        text = star + arg.arg
        if arg.annotation:
            text += f": {type_text(arg.annotation, origin)}"
        if default is not None:
            text += f" = {ast.unparse(default)}"
        parts.append(text)
    if parts and is_patch(node):
        parts = parts[1:] if parts[0].split(":")[0] == node.args.args[0].arg else parts
    back = f" -> {type_text(node.returns, origin)}" if node.returns else ""
    return f"({', '.join(parts)}){back}"


def said_of(name: str, kind: str, default: str, comment: str) -> str:
    more = ", ".join(filter(None, [f"`{kind}`" if kind else "", default and f"= `{default}`"]))
    text = f"- **{escaped(name)}**" + (f" ({more})" if more else "")
    return text + (f": {escaped(comment)}" if comment else "")


def escaped(text: str) -> str:
    "A comment or docstring as Markdown that means only itself; `code` stays code."
    parts = re.split(r"(``.+?``|`[^`\n]+`)", text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*_\[\]<>#|{}$~^@&!])", r"\\\1", parts[i])
        parts[i] = re.sub(r"^(\s*)([-+]|\d+[.)])(\s)", r"\1\\\2\3", parts[i], flags=re.M)
    return "".join(parts)


def docstring_text(doc: str) -> str:
    "A docstring: paragraphs stay, what is indented is shown as it stands."
    blocks = []
    for block in re.split(r"\n\s*\n", doc.strip()):
        lines = block.split("\n")
        if all(line.startswith("    ") for line in lines):
            blocks.append("~~~text\n" + "\n".join(line[4:] for line in lines) + "\n~~~")
        else:
            blocks.append(escaped(block))
    return "\n\n".join(blocks)


class Room(NamedTuple):
    "An exported module and the notebook it comes from."

    name: str
    notebook: Path
    purpose: str
    tree: ast.Module
    comments: Comments
    origin: dict[str, str]  # name -> where it is defined, with our module


def origins(tree: ast.Module, module: str) -> dict[str, str]:
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            said = node.module or ""
            ours = said if said.startswith("halos_nb") else f"halos_nb.{said}"
            if node.level or said.startswith("halos_nb."):
                found |= {a.asname or a.name: f"{ours}.{a.name}" for a in node.names}
        if isinstance(node, ast.ClassDef):
            found[node.name] = f"halos_nb.{module}.{node.name}"
    return found


def rooms() -> list[Room]:
    found = []
    for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")):
        name = path.stem[3:]
        source = (ROOT / "halos_nb" / f"{name}.py").read_text("utf-8")
        first = source_of(json.loads(path.read_text("utf-8"))["cells"][0])
        purpose = first.split("\n> ")[1].splitlines()[0]
        tree = ast.parse(source)
        found.append(Room(name, path, purpose, tree, comments_of(source), origins(tree, name)))
    return found


def entry(kind: str, name: str, arguments: str, body: list[str], option: str = "") -> str:
    fence = "::::"
    text = "\n\n".join(part for part in body if part)
    return f"{fence}{{py:{kind}}} {name}{arguments}\n{option}\n{text}\n{fence}\n"


def function_entry(room: Room, node: ast.FunctionDef, owner: str = "") -> str:
    "A function, method or property with what is said of each parameter."
    name = f"{owner}.{node.name}" if owner else node.name
    said = []
    for arg, default, star in parameters(node.args):
        comment = room.comments.of(arg)
        if arg.arg in ("self", "cls", "*") or not comment:
            continue
        kind = ast.unparse(arg.annotation) if arg.annotation else ""
        told = ast.unparse(default) if default is not None else ""
        said.append(said_of(star + arg.arg, kind, told, comment))
    body = [docstring_text(doc_of(node)), "\n".join(said)]
    if owner and is_property(node):
        kind = type_text(node.returns, room.origin)
        option = f":type: {kind}\n" if kind else ""
        return entry("property", name, "", body, option)
    what = "method" if owner else "function"
    option = ":async:\n" if isinstance(node, ast.AsyncFunctionDef) else ""
    return entry(what, name, signature(node, room.origin), body, option)


def class_entry(room: Room, node: ast.ClassDef) -> list[str]:
    "A class with its fields; its methods follow."
    fields, methods = [], []
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            default = ast.unparse(part.value) if part.value is not None else ""
            kind = ast.unparse(part.annotation)
            fields.append(said_of(part.target.id, kind, default, room.comments.of(part)))
        elif isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            if not part.name.startswith("_"):
                methods.append(function_entry(room, part, node.name))
    bases = [ast.unparse(base) for base in node.bases]
    under = f"From {', '.join(f'`{b}`' for b in bases)}." if bases else ""
    body = [docstring_text(doc_of(node)), under, "\n".join(fields)]
    return [entry("class", node.name, "", body), *methods]


def exported(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def constant_entry(room: Room, node: ast.Assign | ast.AnnAssign, name: str) -> str:
    value = ast.unparse(node.value) if node.value is not None else ""
    value = value if len(value) <= 200 else value[:197] + "..."
    comment = room.comments.of(node)
    shown = f"~~~python\n{value}\n~~~" if value else ""
    return entry("data", name, "", [escaped(comment), shown])


def api_page(room: Room) -> str:
    "All that a module exports, in the order of its notebook."
    public = set(exported(room.tree))
    parts = [
        f"# halos_nb.{room.name}\n",
        f"{escaped(room.purpose)}\n",
        f"The room: [{room.notebook.stem}](../nbs/{room.notebook.name}).\n",
        f"```{{py:module}} halos_nb.{room.name}\n```\n",
        f"```{{py:currentmodule}} halos_nb.{room.name}\n```\n",
    ]
    seen: set[str] = set()
    for node in room.tree.body:
        if isinstance(node, ast.ClassDef) and node.name in public:
            parts += class_entry(room, node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            owner = is_patch(node)
            if (owner or node.name in public) and not node.name.startswith("_"):
                key = f"{owner}.{node.name}"
                if key not in seen:
                    parts.append(function_entry(room, node, owner))
                seen.add(key)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in [n for t in targets for n in getattr(t, "elts", [t])]:
                if isinstance(target, ast.Name) and target.id in public - seen:
                    parts.append(constant_entry(room, node, target.id))
                    seen.add(target.id)
    return "\n".join(parts)


# ---- pages


FLOORS = {
    "0": "Data",
    "1": "Model",
    "2": "Train",
    "3": "Sample",
    "4": "Label",
    "5": "Runs",
    "6": "Look",
    "7": "The embedded world",
}
GUIDES = {
    "How to": "own_data own_judge evaluate own_method many_gpus reproduce paper stages "
    "samplers slurm".split(),
    "Coming from": "from_halos from_trl".split(),
    "Know": "views inside methods rooms mistakes glossary promise repeat scale network "
    "architectures beside_trl".split(),
}


def tree_of(caption: str, entries: list[str]) -> str:
    lines = "\n".join(entries)
    return f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {caption}\n\n{lines}\n```\n"


def contents(found: list[Room]) -> str:
    "The hidden tables of contents at the end of the landing page."
    nbs = notebooks()
    parts = []

    def under(folder: str) -> list[str]:
        inside = [p for p in nbs if p.parent == ROOT / folder]
        return [p.relative_to(ROOT).with_suffix("").as_posix() for p in inside]

    if tutorials := under("nbs/tutorials"):
        parts.append(tree_of("The first hour", tutorials))
    for caption, names in GUIDES.items():
        there = [n for n in names if (ROOT / f"docs/{n}.md").is_file()]
        parts.append(tree_of(caption, [f"docs/{name}" for name in there]))
    parts.append(tree_of("Gallery", ["docs/gallery", *under("nbs/gallery")]))
    drivers = [name for name in under("nbs") if not re.match(r"nbs/\d\d_", name)]
    parts.append(tree_of("Drivers", drivers))
    parts.append(tree_of("Rooms", [f"floors/{digit}" for digit in FLOORS]))
    parts.append(tree_of("Reference", ["api/index"]))
    parts.append(tree_of("Project", [p.removesuffix(".md") for p in PAGES]))
    return "\n".join(parts)


def floor_page(digit: str, found: list[Room]) -> str:
    rows, names = [], []
    for room in found:
        if room.notebook.stem[0] == digit:
            stem = room.notebook.stem
            rows.append(f"| [{stem}](../nbs/{stem}.ipynb) | {room.purpose} |")
            names.append(f"../nbs/{stem}")
    table = "\n".join(["| room | one line |", "|---|---|", *rows])
    tree = "```{toctree}\n:hidden:\n\n" + "\n".join(names) + "\n```"
    return f"# {digit}x {FLOORS[digit]}\n\n{table}\n\n{tree}\n"


def api_index(found: list[Room]) -> str:
    rows = [f"| [{r.name}]({r.name}.md) | {r.purpose} |" for r in found]
    table = "\n".join(["| module | one line |", "|---|---|", *rows])
    tree = "```{toctree}\n:hidden:\n\n" + "\n".join(r.name for r in found) + "\n```"
    said = "Signatures, and what the comments beside the parameters say, read from the source."
    every = "{ref}`All names <genindex>`."
    return f"# API reference\n\n{said} {every}\n\n{table}\n\n{tree}\n"


def copied(text: str, names: dict[str, Path], base: str) -> str:
    "A page of ours, with rooms linked and links out of the site taken away."

    def keep(found: re.Match[str]) -> str:
        target = found[2].split("#")[0]
        if re.match(r"\w+:", target) or not target:
            return found[0]
        there = target.endswith((".md", ".ipynb", ".png"))
        return found[0] if there else f"`{found[1].strip('`')}`"

    text = re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", keep, text)
    there = base + "docs/" if not base else ""
    text = re.sub(r"(?<!\[)`docs/([a-z_]+\.md)`", rf"[`docs/\1`]({there}\1)", text)
    text = text.replace("(README.md", "(index.md").replace("../README.md", "../index.md")
    return linked(text, names, base)


def names_of() -> dict[str, Path]:
    found = {}
    for path in notebooks():
        inside = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        found[inside] = found[path.stem] = path
    return found


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def build(out: Path) -> None:
    "The whole source of the site."
    shutil.rmtree(out, ignore_errors=True)
    names, found = names_of(), rooms()
    for path in notebooks():
        page = json.dumps(page_of(path, names), ensure_ascii=False, indent=1)
        write(out / path.relative_to(ROOT), page)
    for path in sorted((ROOT / "docs").glob("*.md")):
        write(out / "docs" / path.name, copied(path.read_text("utf-8"), names, "../"))
    for name in PAGES:
        write(out / name, copied((ROOT / name).read_text("utf-8"), names, ""))
    landing = copied((ROOT / "README.md").read_text("utf-8"), names, "")
    write(out / "index.md", landing + "\n" + contents(found))
    for digit in FLOORS:
        write(out / "floors" / f"{digit}.md", floor_page(digit, found))
    write(out / "api" / "index.md", api_index(found))
    for room in found:
        write(out / "api" / f"{room.name}.md", api_page(room))
    for folder in ("nbs/images", "docs/images"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, out / folder)
    shutil.copy(ROOT / "docs/conf.py", out)
    shutil.copytree(ROOT / "docs/static", out / "_static")
    shutil.copytree(ROOT / "docs/templates", out / "_templates")


if __name__ == "__main__":
    build(Path(sys.argv[1]))

"""The docs: what they say is so. The site itself: `make docs`, and the tests that want its
environment here.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hostile import HIT, PAYLOADS
from papermill.cli import _resolve_type
from test_notebooks import CONFIG

from halos_nb import configs
from halos_nb.configs import HALOS_NAMES, TRL_NAMES
from halos_nb.playground import build, into_playground
from halos_nb.settings import load_settings, notebook_config, parse_args

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import build as site
import start

STAGES = dict(train="TrainConfig", sample="SampleConfig", label="LabelConfig")
MISTAKE = r"^## (\d+)\. (.+?)\n.*?```console\n\$ (.+?)\n```\n\n```text\n(.*?)```"
MISTAKES = re.findall(MISTAKE, (DOCS / "mistakes.md").read_text("utf-8"), re.M | re.S)


def papermill(words):
    "What a driver's guard says of the parameters, read as papermill reads them."
    driver = Path(words[0]).stem
    flags = zip(words[2::3], words[3::3], words[4::3], strict=True)
    given = {name: _resolve_type(value) for _, name, value in flags}
    cfg = notebook_config(CONFIG[driver], given)
    settings = load_settings()
    settings.get_profile(cfg.profile)
    into_playground(cfg, settings)


def stage(words):
    "A stage in this process."
    room = words[1].removeprefix("halos_nb.")
    cfg = parse_args(getattr(configs, STAGES[room]), words[2:])
    importlib.import_module(f"halos_nb.{room}").main(cfg)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Where the mistakes are made: the playground under runs/, and the files that are named."
    here = tmp_path_factory.mktemp("mistakes")
    (here / "runs").symlink_to(build().folder.parent)
    shutil.copy(ROOT / "settings.ini", here)
    pairs = [dict(question="q", chosen="a", rejected="b")]
    (here / "pairs.json").write_text(json.dumps(pairs), "utf-8")
    turns = dict(prompt=[dict(role="user", content="q")])
    turns |= dict(output_A=[dict(role="assistant", content="a")], output_B=[])
    broken = [turns | dict(label=1, type="pairwise_feedback")]
    (here / "broken.json").write_text(json.dumps(broken), "utf-8")
    return here


def test_there_are_fifteen_mistakes():
    assert [int(number) for number, *_ in MISTAKES] == list(range(1, 16))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m[1])
def test_a_mistake_gets_the_message_that_the_docs_show(mistake, folder, monkeypatch):
    *_, command, told = mistake
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = shlex.split(command)
    run = papermill if words[0] == "papermill" else stage
    with pytest.raises(ValueError) as caught:
        run(words[1:])
    assert str(caught.value).strip() == told.strip()


@pytest.mark.parametrize("page, names", [("halos", HALOS_NAMES), ("trl", TRL_NAMES)])
def test_tables_of_names_are_those_that_answer(page, names):
    text = (DOCS / f"from_{page}.md").read_text("utf-8")
    for theirs, ours in names.items():
        flag = ours if "`" in ours or ours.startswith("nothing") else f"`--{ours}`"
        assert f"| `{theirs}` | {flag} |" in text


def test_the_readme_is_short():
    "The first screen, then at most about 900 words."
    _, _, rest = (ROOT / "README.md").read_text("utf-8").partition("\n## ")
    assert len(rest.split()) <= 900


def test_every_page_is_in_the_contents():
    named = {name for names in site.GUIDES.values() for name in names} | {"gallery"}
    assert {path.stem for path in DOCS.glob("*.md")} == named


def test_what_is_harmless_stays():
    assert site.is_inert("<table><td title='x &lt; y'>x</td></table>")
    assert not site.is_inert("<b style='background:url(x)'>x</b>")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_runs_or_fetches_is_shown_as_text(payload):
    "Of a model's text in an output: as HTML only if nothing in it runs."
    bundle = {"text/html": payload, "text/plain": payload}
    shown = site.shown_output(dict(output_type="display_data", data=bundle, metadata={}))
    html = shown.get("data", {}).get("text/html", "")
    runs = r"<\s*(script|iframe|object|embed|base|meta|form)|<[^>]*(\bon\w+=|src|javascript:)"
    assert not re.search(runs, html, re.I)


def test_every_export_is_in_the_reference():
    for room in site.rooms():
        page = site.api_page(room)
        for name in site.exported(room.tree):
            assert re.search(rf"\{{py:\w+\}} (?:\w+\.)*{re.escape(name)}\b", page), (
                f"api/{room.name}: {name}"
            )


def test_the_start_page_lists_runs_and_links_lead_somewhere(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    for name in ("mine", "<img src=x onerror=window.hit=1>"):
        (runs / name / "round-1").mkdir(parents=True)
        (runs / name / "params.json").write_text("{}", "utf-8")
    (runs / "mine/online_loop.ipynb").write_text("{}", "utf-8")
    page = tmp_path / "start.ipynb"
    start.write(page, runs)
    cells = json.loads(page.read_text("utf-8"))["cells"]
    text = "\n".join(cell["source"] for cell in cells)
    assert "mine" in text and "online_loop" in text and "<img" not in text.replace("\\<", "")
    for target in re.findall(r"\]\(\.\./([^)]+)\)", text):
        assert (ROOT / target).exists(), target


# ---- the site, where its environment is


PYTHON = ROOT / "build/docs-venv/bin/python"


@cache
def hostile_site(folder):
    "A site whose notebook shows every payload as stream, as result and as HTML."
    out = folder / "src"
    cells = [dict(cell_type="markdown", id="m", metadata={}, source="# Texts of a model")]
    for i, text in enumerate(PAYLOADS):
        outputs = [
            dict(output_type="stream", name="stdout", text=text + "\n"),
            dict(output_type="display_data", data={"text/plain": text}, metadata={}),
        ]
        both = {"text/plain": text, "text/html": text}
        outputs.append(dict(output_type="display_data", data=both, metadata={}))
        figure = dict(data=[dict(x=[1], y=[1], text=[text], name=text)], layout={})
        data = {"application/vnd.plotly.v1+json": figure, "text/plain": text}
        outputs.append(dict(output_type="display_data", data=data, metadata={}))
        code = dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None)
        shown = [o for o in map(site.shown_output, outputs) if o]
        cells.append(code | dict(source=f"show({text!r})", outputs=shown))
    for name in ("conf.py", "static", "templates"):
        there = out / {"static": "_static", "templates": "_templates"}.get(name, name)
        there.parent.mkdir(parents=True, exist_ok=True)
        if (DOCS / name).is_dir():
            shutil.copytree(DOCS / name, there)
        else:
            shutil.copy(DOCS / name, there)
    nb = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    (out / "index.ipynb").write_text(json.dumps(nb), "utf-8")
    command = [PYTHON, "-m", "sphinx", "-q", "-b", "html", out, folder / "html"]
    subprocess.run([str(word) for word in command], check=True, timeout=300)
    return folder / "html"


@pytest.mark.browser
@pytest.mark.skipif(not PYTHON.exists(), reason="make docs installs Sphinx")
def test_no_text_runs_or_fetches_on_the_site(tmp_path):
    from playwright.sync_api import sync_playwright

    page_file = hostile_site(tmp_path) / "index.html"
    with sync_playwright() as p:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        asked = []
        page.on("request", lambda r: asked.append(r.url))
        page.goto(page_file.as_uri())
        for place in range(0, page.evaluate("document.body.scrollHeight"), 600):
            page.evaluate(f"scrollTo(0, {place})")
            page.wait_for_timeout(30)
        page.wait_for_timeout(500)
        assert page.evaluate("window.hit") is None and HIT in page.inner_text("body")
        outside = [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
        assert not outside
        browser.close()


PROFILE = re.compile(r"^ *\[profile (\w+)\]\n((?: *[\w.]+ *=.*\n)+)", re.M)
PRINTED = [
    pytest.param(name, lines, id=f"{page.stem} {name}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for name, lines in PROFILE.findall(page.read_text("utf-8"))
]


@pytest.mark.parametrize("name, lines", PRINTED)
def test_a_profile_in_the_docs_is_taken_for_every_stage(name, lines, tmp_path):
    text = "\n".join(line.strip() for line in lines.splitlines())
    ini = tmp_path / "settings.ini"
    ini.write_text(f"[halos_nb]\n[profile {name}]\n{text}\n", encoding="utf-8")
    profile = load_settings(ini).get_profile(name)
    for stage in ("sample", "label", "train"):
        assert profile.for_stage(stage).num_processes >= 1


def test_profiles_are_found_in_the_docs():
    assert len(PRINTED) >= 3

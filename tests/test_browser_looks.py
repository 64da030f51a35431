"""How the panel, its charts and figures look, in a real Chromium: at both sizes, light and
dark, at 200% and on a telephone nothing is cut, nothing lies on other text, all can be read.
"""

import json
import re
import subprocess

import pytest
from looks import LAPTOP, SCREEN, WINDOWS, complaints_of, look_at, set_window
from conftest import ROOT, every
from test_browser import HEIGHT, SHOWN, open_notebook, outputs
from test_widgets import tell_tokens
from test_browser_monitor import everything_is_text, hostile_runs  # noqa: F401

from halos_nb.figures import NotebookRenderer, margin_histogram, reward_distributions
from halos_nb.figures import training_curves
from halos_nb.monitor import RunMonitor
from halos_nb.page import report
from halos_nb.pairs import read_pairs, told_view
from halos_nb.records import write_records
from halos_nb.rewards import kl_curve, length_and_reward, reward_vs_true
from halos_nb.runs import read_run, with_truth

pytestmark = pytest.mark.browser
TYPED = dict(type="pairwise_feedback")


def length_is_good(prompt, output):
    return float(len(output) % 3)


WELL = """<!doctype html><meta name="color-scheme" content="light dark"><style>
  body { font: 16px sans-serif; max-width: 30em } nav { overflow: hidden; padding: 8px }
  pre { overflow-x: auto }
</style><nav><a href="#x">contents</a></nav><h1>A title</h1><p>Some words.</p>
<pre>what is wide is scrolled LONG to</pre>"""
BAD = {  # a style that breaks the page, and what is said of it
    "p { color: #999 }": "contrast 2.8",
    "h1 { width: 40px; overflow: hidden }": "cut: A title",
    "p { position: relative; top: -3em }": "on each other: A title | Some words.",
    "p { white-space: nowrap; margin-left: 1330px }": "the page is 14",
    "p { margin-left: -50px }": "cut by the page: Some words.",
    "p { word-break: break-all }": "breaks words: Some words.",
    "a:focus { outline: none }": "no ring: contents",
    "nav { padding: 0 } a:focus { outline: 2px solid; outline-offset: 4px }": "its ring is cut",
}


@pytest.mark.parametrize("style, said", [("", ""), *BAD.items()])
def test_what_looks_bad_is_told(style, said, quiet):
    set_window(quiet, *LAPTOP)
    quiet.set_content(WELL.replace("LONG", "x" * 400) + f"<style>{style}</style>")
    wrong = complaints_of(quiet, "body")
    assert said in "\n".join(wrong) if said else not wrong


@pytest.mark.parametrize("width, height, scheme", WINDOWS)
def test_report_looks_well(width, height, scheme, quiet, hostile_runs, tmp_path):  # noqa: F811
    page = quiet
    made = report(hostile_runs / "one", tmp_path / "r.html", length_is_good, 2.0)
    set_window(page, width, height, scheme)
    page.goto(made.as_uri())
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # draws every figure
    page.locator("[data-figure] .main-svg").last.wait_for(timeout=60_000)
    look_at(page, "body")
    everything_is_text(page.locator("body > :not(script)"))
    assert page.locator("[data-charts] svg").count() == 5
    set_window(page, 1400, 1600)


SECTIONS = "details.section:not(:first-of-type)"


def test_report_shows_what_matters_first_and_opens_the_rest(quiet, hostile_runs, tmp_path):  # noqa: F811
    page, pages = quiet, report(hostile_runs / "one", tmp_path / "r.html", length_is_good, 2.0)
    set_window(page, *LAPTOP)
    page.goto(pages.as_uri())
    page.locator("[data-charts] svg").last.wait_for()
    told = page.locator("body").inner_text()
    for needed in (
        "one: finished",
        "Reward per round",
        "Scores of the last policy",
        "Pairs of",
    ):
        assert needed in told
    assert page.evaluate("document.documentElement.scrollHeight") < 3 * 768
    rest = page.locator(SECTIONS)
    is_open = lambda: rest.evaluate_all("them => them.map((one) => one.open)")
    assert rest.count() > 8 and not any(is_open())
    look_at(page, "body")
    # a link opens what it leads to, also a second time; a figure is drawn when it is seen
    link = page.get_by_role("link", name="Margins")
    for _ in range(2):
        link.click()
        page.locator("details.section", has_text="Margin of chosen").wait_for()
        assert sum(is_open()) == 1
        assert page.evaluate("scrollY") > 400
        page.locator("[data-figure] .main-svg:visible").first.wait_for(timeout=30_000)
        rest.evaluate_all("them => them.forEach((one) => (one.open = false))")
    # dark while it is folded: drawn anew, as wide as the page, when it is opened again
    page.emulate_media(color_scheme="dark")
    link.click()
    page.wait_for_function(
        "innerWidth && document.querySelector('.main-svg').clientWidth > 900"
    )
    paper = page.locator(".main-svg:visible").first
    assert paper.evaluate("s => getComputedStyle(s).backgroundColor") == "rgb(13, 17, 23)"
    page.get_by_role("button", name="open all").click()
    assert all(is_open())
    page.get_by_role("button", name="close all").click()
    assert not any(is_open())
    # on paper nothing can be opened; afterwards it is as it was
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not any(is_open())
    set_window(page, 1400, 1600)


def test_a_table_that_is_wider_than_a_telephone_says_so(quiet, hostile_runs, tmp_path):  # noqa: F811
    page = quiet
    set_window(page, 390, 844)
    page.goto(report(hostile_runs / "one", tmp_path / "r.html").as_uri())
    hint = page.locator(".sideways", has_text="scroll to the right")
    hint.first.wait_for()
    assert hint.count() == 1, "only the table of rounds is wider"
    box = page.locator(".sideways + div")
    assert box.evaluate("b => b.scrollWidth > b.clientWidth")
    box.evaluate("b => { b.scrollLeft = 9000 }")
    last = box.locator("td").last.bounding_box()
    assert last["x"] + last["width"] < 390
    set_window(page, *LAPTOP)
    hint.first.wait_for(state="hidden")
    set_window(page, 1400, 1600)


def test_charts_can_be_smoothed_zoomed_and_made_logarithmic(quiet, hostile_runs, tmp_path):  # noqa: F811
    page = quiet
    page.set_viewport_size(dict(width=1366, height=768))
    steps = [dict(step=i + 1, loss=0.7 - i / 90 + i % 2 / 20) for i in range(60)]
    file = hostile_runs / "one/round-1/metrics.jsonl"
    file.write_text("".join(json.dumps(step) + "\n" for step in steps))
    page.goto(report(hostile_runs / "one", tmp_path / "r.html").as_uri())
    chart = page.locator(".halos-charts .panel", has_text="Loss")
    paths = chart.locator("svg path")
    before = paths.count()
    page.get_by_label("smoothing").fill("20")
    assert paths.count() == before + 1  # the pale line behind the mean
    page.get_by_label("log axis").check()
    assert "log axis" in chart.locator(".title").inner_text()
    box = chart.locator("svg").bounding_box()
    whole = chart.locator(".x").all_inner_texts()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.2 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.4 * box["width"], middle, steps=4)
    page.mouse.up()
    zoomed = chart.locator(".x").all_inner_texts()
    assert zoomed != whole
    # what is set otherwise leaves the zoom, and the button takes it back
    page.get_by_label("smoothing").fill("0")
    assert chart.locator(".x").all_inner_texts() == zoomed
    page.get_by_role("button", name="whole range").click()
    assert chart.locator(".x").all_inner_texts() == whole
    set_window(page, 1400, 1600)


def output(bundle):
    "An output of a saved notebook."
    return dict(output_type="display_data", metadata={}, data=bundle)


def saved_notebook(path, bundles):
    "A notebook with these outputs, as papermill has left it: JupyterLab does not trust it."
    cell = dict(cell_type="code", id="c", metadata={}, source=["shown"], execution_count=1)
    cell["outputs"] = [output(bundle) for bundle in bundles]
    kernel = dict(name="python3", display_name="python3", language="python")
    whole = dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(whole), "utf-8")


def figures_of(run):
    "What the drivers draw of a run."
    found = read_run(run)
    rounds = {row["round"]: found.samples(row["round"]) for row in found.rounds}
    rounds = {name: with_truth(rows, length_is_good) for name, rows in rounds.items()}
    pairs = json.loads((run / "round-1/feedback.json").read_text("utf-8"))
    yield reward_distributions(rounds)
    yield training_curves(found.metrics())
    yield margin_histogram(pairs)
    yield kl_curve(rounds)
    yield reward_vs_true(rounds, best=2.0)
    yield length_and_reward(rounds)


def choose_theme(page, name):
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Settings$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Theme$")).hover()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{name}$")).click()
    light = "true" if name == "JupyterLab Light" else "false"
    page.wait_for_selector(f"body[data-jp-theme-light={light}]", state="attached")
    page.wait_for_timeout(1000)


def open_without_kernel(page, lab, name):
    set_window(page, *LAPTOP)
    open_notebook(page, lab(kernels=False), name, idle=False)
    page.locator(".jp-Dialog button", has_text=re.compile("^No Kernel$")).click()


def test_saved_notebook_looks_well_without_a_kernel(lab, quiet, hostile_runs, tmp_path):  # noqa: F811
    "The panel and the figures as stored, in JupyterLab: whole at once, light and dark."
    page, run = quiet, hostile_runs / "one"
    panel = RunMonitor(run, "static", truth=length_is_good).static()._repr_mimebundle_()
    renderer = NotebookRenderer()
    drawn = [renderer.to_mimebundle(fig.to_dict()) for fig in figures_of(run)]
    pairs = json.loads((run / "round-1/feedback.json").read_text("utf-8"))
    write_records(run / "told/feedback.json", [p | TYPED for p in pairs])
    [shaded] = told_view(read_pairs(tell_tokens(run / "told")), 2)
    saved_notebook(tmp_path / "saved.ipynb", [panel, *drawn, shaded._repr_mimebundle_()])
    open_without_kernel(page, lab, "saved.ipynb")
    plots = outputs(page).locator(".js-plotly-plot")  # at once, not when the mouse comes
    page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot').length === 6")
    everything_is_text(outputs(page).locator(".jp-RenderedHTMLCommon"), "data:image/svg+xml")
    first = outputs(page).locator("pre span").first  # its numbers and its shade are there
    assert "nats: log-prob" in first.get_attribute("title")
    assert "213, 94, 0" in first.evaluate("t => getComputedStyle(t).backgroundColor")
    look_at(page, SHOWN)
    for theme, (width, height) in (("JupyterLab Dark", SCREEN), ("JupyterLab Light", LAPTOP)):
        page.set_viewport_size(dict(width=width, height=height))
        choose_theme(page, theme)
        look_at(page, SHOWN)
        # no white slab on a dark page: what lies behind a figure is the page
        for i in range(plots.count()):
            paper = plots.nth(i).locator(".main-svg").first
            color = paper.evaluate("svg => getComputedStyle(svg).backgroundColor")
            assert color == "rgba(0, 0, 0, 0)"
    # no stripes where the mouse is
    row = outputs(page).locator("tbody tr").first
    row.hover()
    assert row.evaluate("tr => getComputedStyle(tr).backgroundColor") == "rgba(0, 0, 0, 0)"
    set_window(page, 1400, 1600)


@every
def test_executed_demo_looks_well(lab, quiet, tmp_path):
    "As `make demo` leaves it, opened in JupyterLab: at every size, light and dark, no kernel."
    page, made = quiet, tmp_path / "demo.ipynb"
    command = ["papermill", ROOT / "nbs/online_loop.ipynb", made]
    command += ["-p", "run_name", "demo-looks", "-p", "fresh", "True", "--no-progress-bar"]
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT)
    assert made.stat().st_size < 3e6
    open_without_kernel(page, lab, "demo.ipynb")
    outputs(page).locator("table:visible").first.wait_for(timeout=60_000)
    page.wait_for_timeout(1000)
    tall = page.evaluate(HEIGHT)
    assert tall <= 8 * 768, f"the notebook is {tall / 768:.1f} screens tall"
    page.keyboard.press("Control+b")  # a telephone has no room for the list of files
    wrong = []
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        set_window(page, *LAPTOP)
        choose_theme(page, theme)
        for width, height, _ in WINDOWS:
            set_window(page, width, height)
            page.wait_for_timeout(500)
            wrong += [f"{width}, {theme}: {said}" for said in complaints_of(page, SHOWN)]
    set_window(page, 1400, 1600)
    assert not wrong, "\n".join(wrong)

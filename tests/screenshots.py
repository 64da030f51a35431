"""The README's and the docs' pictures, of runs that are there (`make screenshots` makes them):
`python tests/screenshots.py runs nbs/images`. A real JupyterLab in a real Chromium.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from conftest import CHROMIUM_FLAGS, ROOT, Lab
from playwright.sync_api import sync_playwright
from test_browser import DONE, open_notebook, outputs, run_all, write_notebook

LABEL = """from halos_nb.people import Session, choose_pairs
from halos_nb.records import read_records
from halos_nb.widgets import SessionView, label_pairs
samples = read_records({run!r} + "/round-1/samples.json", "sample")
session = Session("journal.jsonl", samples, choose_pairs(samples, 20), "human:me")
label_pairs(SessionView(session, "feedback.json", "Which answer is true, and kind?"))"""
COMPARE = """from halos_nb.compare import RunComparer
RunComparer({runs!r}, ["pictures-*"]).show()"""
REWARD = """from halos_nb import reward_report, show
pairs = reward_report.read_scored_pairs({runs!r} + "/reward_model/rm/eval_scores.jsonl")
rows = reward_report.accuracy_rows(pairs)
shares = dict.fromkeys(["model", "the longer wins", "gain"], ".3f")
display(show.summary_table(rows, shares, "Held-out accuracy"))
rows = reward_report.margin_rows(pairs)
display(show.summary_table(rows, dict(value=".3f"), "Margins, and their claims"))
display(reward_report.accuracy_by_length({{"rm": [pairs]}}))"""
LIVE = {  # picture -> what is run, and what of its output is shown (empty: all)
    "monitor": (
        "from halos_nb.monitor import RunMonitor\nRunMonitor({run!r}).show()",
        "",
    ),
    "pairs": ("from halos_nb.widgets import browse_pairs\nbrowse_pairs({run!r})", ".hnb"),
    "labeller": (LABEL, ".hnb"),
    "compared": (COMPARE, ""),
    "reward": (REWARD, ""),
}
LONG = ("compared", "reward")
NEEDED = {  # runs that the pictures show, and what makes them
    "online": "make demo",
    "pictures-dpo": "make screenshots",
    "reward_model": "make screenshots",
}


def start_page(folder: Path, runs: Path):
    "The page that `make lab` opens, with these runs, in a folder that JupyterLab serves."
    sys.path.insert(0, str(ROOT / "docs"))
    import start

    start.write(folder / "start.ipynb", runs)


def shots(runs: Path, out: Path):
    "Pictures of the report, light and dark, the start page, and each line of LIVE."
    from halos_nb.page import report
    from halos_nb.playground import BEST, true_reward

    run = runs / "online"
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as p:
        tmp = Path(tmp)
        shutil.copy(ROOT / "settings.ini", tmp)
        context = p.chromium.launch_persistent_context(
            str(tmp / "chromium"),
            executable_path=browser,
            headless=True,
            args=CHROMIUM_FLAGS,
            viewport={"width": 1500, "height": 1100},
        )
        page, lab = context.pages[0], None
        try:
            made = report(run, tmp / "report.html", true_reward, BEST)
            for scheme, name in (("dark", "report-dark"), ("light", "report")):
                page.emulate_media(color_scheme=scheme)
                page.goto(made.as_uri())
                page.locator("[data-charts] svg").last.wait_for()
                page.wait_for_timeout(500)
                clip = dict(x=140, y=0, width=1220, height=960)
                page.screenshot(path=out / f"{name}.png", clip=clip, full_page=True)
            lab = Lab(tmp)
            for name, (source, selector) in LIVE.items():
                # JupyterLab draws what is in the window: all of a long output needs a high one
                height = 4000 if name in LONG else 800 if selector else 1400
                page.set_viewport_size(dict(width=1500, height=height))
                told = source.format(run=str(run.resolve()), runs=str(runs.resolve()))
                write_notebook(tmp / f"{name}.ipynb", told, DONE)
                open_notebook(page, lab, f"{name}.ipynb")
                run_all(page, 120)
                shown = (
                    outputs(page).locator(selector).first if selector else outputs(page).first
                )
                shown.wait_for()
                page.wait_for_timeout(1500)
                shown.screenshot(path=out / f"{name}.png")
            start_page(tmp, runs)
            page.set_viewport_size(dict(width=1500, height=1000))
            open_notebook(page, lab, "start.ipynb")
            page.locator(".jp-RenderedMarkdown table").first.wait_for()
            page.wait_for_timeout(500)
            page.locator(".jp-NotebookPanel").first.screenshot(path=out / "start.png")
        finally:
            if lab:
                lab.close()
            context.close()
    for f in sorted(out.glob("*.png")):
        print(f"{f}: {f.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    runs, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name, maker in NEEDED.items():
        if not (runs / name / "ledger.jsonl").exists():
            sys.exit(f"{runs / name}: no run there; `{maker}` makes it")
    out.mkdir(parents=True, exist_ok=True)
    shots(runs, out)

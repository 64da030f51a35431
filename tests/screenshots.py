"""The README's pictures, from a run that is there: `python tests/screenshots.py runs/online
nbs/images`. A real JupyterLab in a real Chromium.
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
LIVE = {  # picture -> what is run, and what of its output is shown (empty: all)
    "monitor": (
        "from halos_nb.monitor import RunMonitor\nRunMonitor({run!r}).show()",
        "",
    ),
    "pairs": ("from halos_nb.widgets import browse_pairs\nbrowse_pairs({run!r})", ".hnb"),
    "labeller": (LABEL, ".hnb"),
}


def shots(run: Path, out: Path):
    "Write pictures of the report, light and dark, and one for each line of LIVE."
    from halos_nb.page import report
    from halos_nb.playground import BEST, true_reward

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
                page.set_viewport_size(dict(width=1500, height=800 if selector else 1400))
                write_notebook(
                    tmp / f"{name}.ipynb", source.format(run=str(run.resolve())), DONE
                )
                open_notebook(page, lab, f"{name}.ipynb")
                run_all(page)
                shown = (
                    outputs(page).locator(selector).first if selector else outputs(page).first
                )
                shown.wait_for()
                page.wait_for_timeout(1500)
                shown.screenshot(path=out / f"{name}.png")
        finally:
            if lab:
                lab.close()
            context.close()
    for f in sorted(out.glob("*.png")):
        print(f"{f}: {f.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    if not (run / "ledger.jsonl").exists():
        sys.exit(f"{run}: no run there; `make demo` makes runs/online")
    out.mkdir(parents=True, exist_ok=True)
    shots(run, out)

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

LIVE = {  # picture -> what is run, and what of its output is shown
    "monitor": (
        "from halos_nb.monitor import RunMonitor\nRunMonitor({run!r}).show()",
        ".halos-monitor",
    ),
    "pairs": ("from halos_nb.widgets import browse_pairs\nbrowse_pairs({run!r})", ".hnb"),
}


def shots(run: Path, out: Path):
    "Write report.png, and one picture for each line of LIVE."
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
            page.goto(report(run, tmp / "report.html", true_reward, BEST).as_uri())
            for what in ("Reward per round", "Win rate"):
                page.get_by_role("img", name=what).first.locator(".main-svg").first.wait_for()
            page.wait_for_timeout(500)
            page.screenshot(
                path=out / "report.png",
                clip=dict(x=140, y=0, width=1220, height=960),
                full_page=True,
            )
            lab = Lab(tmp)
            for name, (source, selector) in LIVE.items():
                write_notebook(
                    tmp / f"{name}.ipynb", source.format(run=str(run.resolve())), DONE
                )
                open_notebook(page, lab, f"{name}.ipynb")
                run_all(page)
                shown = outputs(page).locator(selector).first
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

"What a person sees: a real JupyterLab in headless Chromium, notebooks run and opened in it."

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from looks import LAPTOP, complaints_of, set_window
from test_notebooks import code_cells, tags

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.browser

FIGURE = ".js-plotly-plot .main-svg"  # a plotly figure that is drawn, not only loaded
FAILED = "[data-mime-type='application/vnd.jupyter.error']"
PICTURE = "img[src^='data:image/png']"
ANSWER = "<b>bold</b> is text, <img src=x onerror='document.title=1'> too"
PAIR = dict(
    type="pairwise_feedback",
    prompt_id="p0",
    prompt=[dict(role="user", content="Name a warm colour.")],
    label=1,
    reward_A=1.5,
    reward_B=-0.5,
    reward_difference=2.0,
    output_A=[dict(role="assistant", content="Red is warm.")],
    output_B=[dict(role="assistant", content=ANSWER)],
)
DONE = "print('all' + 'done')"  # so that the text is found in the output, not in the source


# what a notebook's cells have put out
SHOWN = ".jp-NotebookPanel .jp-OutputArea-output"


def write_notebook(path, *sources):
    cells = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata={},
            source=s.splitlines(True),
            execution_count=None,
            outputs=[],
        )
        for i, s in enumerate(sources)
    ]
    path.write_text(
        json.dumps(
            dict(
                cells=cells,
                metadata={
                    "kernelspec": dict(
                        name="python3", display_name="python3", language="python"
                    )
                },
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )


def with_parameters(source, target, **values):
    "A copy of a driver with other values in its parameters cell."
    nb = json.loads(source.read_text())
    nb["cells"].append(
        dict(
            cell_type="code",
            id="last",
            metadata={},
            source=DONE,
            execution_count=None,
            outputs=[],
        )
    )
    cell = next(c for c in nb["cells"] if "parameters" in tags(c))
    cell["source"] = ["".join(cell["source"]), *(f"\n{k} = {v!r}" for k, v in values.items())]
    target.write_text(json.dumps(nb))


SETUP = """from halos_nb.figures import reward_distributions, setup_display
from halos_nb.show import pairs_table
setup_display()"""
ROUNDS = {"round 1": [0.1, 0.4, 0.5, 0.7], "round 2": [0.3, 0.6, 0.8, 0.9]}


def figure_notebook(path):
    "One figure, one pair."
    write_notebook(
        path,
        SETUP,
        f"reward_distributions({ROUNDS!r})",
        f"pairs_table([{PAIR!r}], 1)",
        DONE,
    )


def open_notebook(page, server, name, idle=True):
    page.goto(server.url(name))
    page.wait_for_selector(".jp-NotebookPanel", timeout=60_000)
    if idle:
        wait_idle(page, 60)


def wait_idle(
    page, seconds
):  # the execution indicator says idle too early; the status bar does not
    page.wait_for_function(
        (
            "() => /\\| Idle/.test(document.querySelector('#jp-main-statusbar')?.textContent "
            "?? '')"
        ),
        timeout=seconds * 1000,
    )


def run_all(page, seconds=60):
    "Run menu, Run All Cells; until the last cell prints `alldone`, or a cell fails."
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    failed, done = (
        outputs(page).locator(FAILED),
        outputs(page).locator(".jp-OutputArea-output", has_text="alldone"),
    )
    done.or_(failed).first.wait_for(timeout=seconds * 1000)
    assert failed.count() == 0, "\n".join(failed.all_inner_texts())[-3000:]
    wait_idle(page, seconds)


def outputs(page):
    return page.locator(".jp-NotebookPanel .jp-Cell-outputArea")


def box(locator):
    "Width and height on the screen, once it is there."
    locator.wait_for(timeout=30_000)
    locator.scroll_into_view_if_needed()
    b = locator.bounding_box()
    return b["width"], b["height"]


def assert_shows_figure_and_pairs(page):
    area = outputs(page)
    width, height = box(area.locator(f"{FIGURE}, {PICTURE}").first)
    assert width > 300 and height > 150, f"the figure is {width} x {height} pixels"
    text = " ".join(area.all_inner_texts())
    assert "Name a warm colour." in text
    assert "Red is warm." in text
    assert ANSWER in text, "a model's answer is shown as the text it is"
    assert area.locator("b", has_text=re.compile("^bold$")).count() == 0
    assert page.title() != "1"


def test_figures_and_pairs_in_a_running_notebook(lab, page, tmp_path):
    figure_notebook(tmp_path / "figures.ipynb")
    open_notebook(page, lab(), "figures.ipynb")
    run_all(page)
    noise = (
        outputs(page)
        .locator("[data-mime-type='application/vnd.jupyter.stderr']")
        .all_inner_texts()
    )
    assert not noise, "\n".join(noise)
    assert_shows_figure_and_pairs(page)
    # JupyterLab shows the picture until the pointer comes: then the figure is live
    outputs(page).locator(f"{FIGURE}, {PICTURE}").first.hover(force=True)
    width, height = box(outputs(page).locator(FIGURE).first)
    assert width > 300
    assert height > 150


def test_executed_notebook_opens_without_a_kernel(lab, page, tmp_path):
    figure_notebook(tmp_path / "in.ipynb")
    subprocess.run(
        ["papermill", "in.ipynb", "executed.ipynb", "--no-progress-bar"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=120,
    )
    data = [
        d
        for c in code_cells(tmp_path / "executed.ipynb")
        for o in c["outputs"]
        if "application/vnd.plotly.v1+json" in (d := o.get("data", {}))
    ]
    assert len(data) == 1 and "data:image/png" in "".join(data[0]["text/html"]), (
        "the figure is saved for JupyterLab, and as a picture for everything else"
    )
    assert (tmp_path / "executed.ipynb").stat().st_size < 500_000
    open_notebook(page, lab(kernels=False), "executed.ipynb", idle=False)
    dialog = page.locator(".jp-Dialog button", has_text=re.compile("^No Kernel$"))
    dialog.click(timeout=30_000)
    assert_shows_figure_and_pairs(page)


# of a notebook's cells, from the first to the last
HEIGHT = """() => {
  const boxes = [...document.querySelectorAll('.jp-Cell')].map((c) => c.getBoundingClientRect())
  return boxes.at(-1).bottom - boxes[0].top
}"""
DRIVERS = {  # small enough for a test: two rounds of eight prompts
    "online_loop": dict(
        run_name="lab",
        total_prompts=16,
        prompts_per_round=8,
        labeller="rm, function",
        function="halos_nb.playground:true_reward",
    ),
}


@pytest.mark.parametrize("name", DRIVERS)
def test_driver_runs_in_the_lab(name, lab, quiet, tmp_path):
    "Opened and run from the menu, as a user does; what it shows is looked at on a laptop."
    page = quiet
    driver = ROOT / "nbs" / f"{name}.ipynb"
    assert driver.exists(), f"{driver.name} is gone"
    with_parameters(driver, tmp_path / "driver.ipynb", **DRIVERS[name])
    open_notebook(page, lab(), "driver.ipynb")
    run_all(page, seconds=600)
    area = outputs(page)
    assert area.locator(".halos-charts svg").count() == 6
    assert area.locator(".halos-monitor").count() == 1
    table = area.locator("table", has_text="true reward")
    assert table.first.locator("tbody tr").count() == 4  # start, two rounds, final
    assert area.locator("summary", has_text="1. margin").first.is_visible()
    set_window(page, *LAPTOP)
    page.wait_for_timeout(1000)
    tall = page.evaluate(HEIGHT)
    assert tall <= 8 * 768, f"the notebook is {tall / 768:.1f} screens tall"
    # the word of DONE is printed, and what is printed JupyterLab breaks anywhere
    wrong = [said for said in complaints_of(page, SHOWN) if "alldone" not in said]
    assert not wrong, "\n".join(wrong)
    set_window(page, 1400, 1600)
    assert (Path(os.environ["HALOS_NB_RUNS_DIR"]) / "lab/params.json").exists()

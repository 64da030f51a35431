"Monitor, comparer and report page in a real JupyterLab and Chromium, over real jobs."

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import every
from hostile import IN_A_SOAK
from test_browser import DONE, open_notebook, outputs, run_all, wait_idle, write_notebook
from job_helpers import alive
from looks import complaints

from halos_nb.monitor import Panel
from halos_nb.show import visible

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.browser
XSS = [
    "<script>window.hit=1</script>",
    "<img src=x onerror='window.hit=1'>",
    "<details open ontoggle='window.hit=1'><summary>s</summary></details>",
    "![x](http://203.0.113.7/a.png)",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "</textarea><script>window.hit=1</script>",
    "<svg/onload=window.hit=1>",
    "[x](javascript:window.hit=1)",
    "</script><script>window.hit=1</script>",
]
XSS = IN_A_SOAK or XSS


TRAINING = """
import os
from pathlib import Path
from halos_nb.configs import TrainConfig
from halos_nb.ledger import Ledger, Stage
from halos_nb.models import start_from_scratch
from halos_nb.monitor import RunMonitor
from halos_nb.records import write_records
from halos_nb.settings import Profile
run = Path(os.environ['HALOS_NB_RUNS_DIR']) / 'monitored'

def turn(text, role='assistant'):
    return [dict(role=role, content=text)]

pairs = []
for i in range(4000):
    pair = dict(type='pairwise_feedback', prompt_id=f'p{i}')
    pair['prompt'] = turn(f'What is {i}?', 'user')
    pair |= dict(output_A=turn(f'{i} is even.'), output_B=turn(f'{i} is odd.'))
    odd = i % 2
    pair |= dict(label=1 - odd, reward_A=1.0 - odd, reward_B=float(odd), reward_difference=1.0)
    pairs.append(pair)
run.mkdir(parents=True)
write_records(run / 'pairs.json', pairs)
texts = [p[k][0]['content'] for p in pairs[:200] for k in ('prompt', 'output_A')]
start_from_scratch(str(run / 'start'), texts)
config = TrainConfig(
    loss='dpo', model=str(run / 'start'), train_datasets=[str(run / 'pairs.json')],
    exp_name='policy', cache_dir=str(run / 'dpo'),
    metrics_file=str(run / 'dpo/metrics.jsonl'), batch_size=4, lr=1e-3,
)
inputs, made = [run / 'start', run / 'pairs.json'], [run / 'dpo/policy/FINAL']
stage = Stage('train', run / 'dpo', config, inputs, made, 1)
"""
WATCHED = """
monitor = RunMonitor(run)
monitor.show()
with Ledger(run, Profile(), watch=monitor.wait) as ledger:
    ledger.run(stage, 'training', 'nothing')
"""


def press_run_all(page):
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()


def test_stop_a_real_job_in_its_own_notebook(lab, quiet, tmp_path, monkeypatch):
    "The running cell has the kernel's main thread; the panel moves, its button works."
    monkeypatch.setenv("HALOS_NB_RUNS_DIR", str(tmp_path / "runs"))
    page, run = quiet, tmp_path / "runs/monitored"
    write_notebook(tmp_path / "training.ipynb", TRAINING, WATCHED, DONE)
    open_notebook(page, lab(), "training.ipynb")
    press_run_all(page)
    panel = outputs(page).locator(".halos-monitor")
    panel.locator(".text", has_text=re.compile(r"\d+/1000 steps .* left")).wait_for(
        timeout=120_000
    )
    assert panel.locator(".badge").inner_text() == "running"
    panel.locator("svg").nth(3).wait_for(timeout=30_000)
    before = panel.locator("svg").first.get_attribute("aria-label")
    # the curve goes on
    page.wait_for_function(
        "b => document.querySelector('.halos-monitor svg').getAttribute('aria-label') !== b",
        arg=before,
        timeout=30_000,
    )
    took = press_stop(panel, run)
    assert took < 2, f"{took:.2f} s"
    outputs(page).locator(
        ".jp-OutputArea-output", has_text="Stopped: monitored, training"
    ).wait_for(timeout=30_000)
    assert "Traceback" not in " ".join(outputs(page).all_inner_texts())
    assert "alldone" not in " ".join(outputs(page).all_inner_texts())
    panel.locator(".badge", has_text="stopped").wait_for(timeout=10_000)
    assert json.loads((run / "dpo/train.status.json").read_text())["stopped"] is True
    assert panel.get_by_role("button", name="Stop").is_disabled()


def press_stop(panel, run):
    "Press Stop; seconds until no stage of the run is alive."
    assert alive(run)
    start = time.monotonic()
    panel.get_by_role("button", name="Stop").click()
    while alive(run) and time.monotonic() < start + 20:
        time.sleep(0.02)
    took = time.monotonic() - start
    print(f"no process of the run is left {took:.2f} s after Stop was pressed")
    return took


@every
def test_attach_from_another_kernel(lab, quiet, tmp_path, monkeypatch):
    "The run goes on in a script; its monitor's kernel is restarted, attaches, and stops it."
    monkeypatch.setenv("HALOS_NB_RUNS_DIR", str(tmp_path / "runs"))
    page, run = quiet, tmp_path / "runs/monitored"
    script = subprocess.Popen(
        [
            sys.executable,
            "-c",
            TRAINING + "with Ledger(run, Profile()) as ledger: ledger.run(stage, 'training')",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        write_notebook(
            tmp_path / "watch.ipynb",
            (
                "import os\nfrom halos_nb.monitor import "
                "RunMonitor\nRunMonitor(os.environ['HALOS_NB_RUNS_DIR'] + "
                "'/monitored').show()"
            ),
            DONE,
        )
        open_notebook(page, lab(), "watch.ipynb")
        for _ in range(2):
            run_all(page)
            panel = outputs(page).locator(".halos-monitor")
            panel.locator(".text", has_text=re.compile(r"\d+/1000 steps")).wait_for(
                timeout=120_000
            )
            if _ == 0:
                page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Kernel$")).click()
                page.locator(
                    ".lm-Menu-itemLabel",
                    has_text=re.compile("^Restart Kernel and Clear Outputs"),
                ).click()
                page.locator(".jp-Dialog button.jp-mod-accept").click()
                wait_idle(page, 60)
        assert press_stop(panel, run) < 2
        panel.locator(".badge", has_text="stopped").wait_for(timeout=10_000)
        # the script's own loop ended too
        assert "its supervisor was ended by SIGTERM" in script.communicate(timeout=20)[1]
    finally:
        script.kill()


def test_what_a_stage_says_is_text(lab, quiet, tmp_path):
    "Hostile log lines, progress labels, names of rounds and numbers that are none, live."
    run = tmp_path / XSS[1].replace("/", "_")
    (run / "round-1").mkdir(parents=True)
    (run / "round-1/train.log").write_text("\n".join(XSS) + "\n")
    (run / "round-1/train.status.json").write_text(json.dumps(dict(exit=1, stopped=False)))
    (run / "round-1/train.progress.jsonl").write_text(
        json.dumps(dict(label=XSS[0], done=1, total=2, unit=XSS[2], rate=1.0, seconds=1.0))
        + "\n"
    )
    (run / "round-1/metrics.jsonl").write_text(
        "".join(
            json.dumps(dict(step=i, loss=x)) + "\n" for i, x in enumerate([0.7, None, 0.6], 1)
        )
    )
    (run / "round-1/train.config.json").write_text(
        json.dumps(dict(metrics_file=str(run / "round-1/metrics.jsonl")))
    )
    (run / "ledger.jsonl").write_text(
        json.dumps(dict(event="run", time=1.0))
        + "\n"
        + json.dumps(dict(event="started", time=2.0, stage="train", round=1, folder="round-1"))
        + "\n"
    )
    write_notebook(
        tmp_path / "hostile.ipynb",
        (
            "from halos_nb.monitor import "
            f"RunMonitor\nRunMonitor({str(run)!r}).show()\nRunMonitor({str(run)!r}, "
            "mode='static').show()"
        ),
        DONE,
    )
    open_notebook(page := quiet, lab(), "hostile.ipynb")
    run_all(page)
    panel = outputs(page).locator(".halos-monitor")
    panel.locator("summary", has_text="Log").click()
    said = "\n".join(map(visible, XSS[-20:]))  # the end of a log is shown
    assert panel.locator("pre").inner_text() == said
    static = outputs(page).locator("div.tex2jax_ignore")
    static.locator("summary").click()
    assert static.locator("pre").inner_text() == said
    for where in (panel, static):
        everything_is_text(where, "data:image/svg+xml;base64")
    zoom_outlives_new_values(page, panel, run / "round-1/metrics.jsonl")


def zoom_outlives_new_values(page, panel, file):
    "What somebody has zoomed into stays when the run goes on."
    chart = panel.locator(".panel", has_text="Loss")
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.1 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=4)
    page.mouse.up()
    zoomed = chart.locator(".x").all_inner_texts()
    before = chart.locator("svg").get_attribute("aria-label")
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(dict(step=9, loss=0.1)) + "\n")
    page.wait_for_function(
        "b => document.querySelector('.halos-monitor .panel svg').ariaLabel !== b",
        arg=before,
        timeout=30_000,
    )
    assert chart.locator(".x").all_inner_texts() == zoomed
    panel.get_by_role("button", name="whole range").click()
    assert chart.locator(".x").all_inner_texts() != zoomed


# ---- runs and the page about one


@pytest.fixture
def hostile_runs(tmp_path):
    "Two runs whose prompts, answers and parameters want to run something."
    for r, name in enumerate(["one", "two"]):
        for n, folder in enumerate(["round-1", "final"]):
            run = tmp_path / "runs" / name
            (run / folder).mkdir(parents=True)
            samples = [
                dict(
                    prompt_id=f"p{i}",
                    sample_id=k,
                    prompt=[dict(role="user", content=XSS[i])],
                    output=XSS[(i + k + r) % len(XSS)],
                    policy_logps=-3.0 + n,
                    reference_logps=-3.0,
                    type="sample",
                )
                for i in range(len(XSS))
                for k in (0, 1)
            ]
            (run / folder / "samples.json").write_text(json.dumps(samples))
            (run / folder / "feedback.labels.jsonl").write_text(
                "".join(
                    json.dumps(
                        dict(
                            prompt_id=s["prompt_id"],
                            sample_id=s["sample_id"],
                            labeller="rm:x",
                            score=n + 0.1 * s["sample_id"],
                            reason="",
                        )
                    )
                    + "\n"
                    for s in samples
                )
            )
            (run / folder / "feedback.counts.json").write_text(
                json.dumps(dict(prompts=9, samples=18, unscored=0))
            )
            pairs = [
                dict(
                    prompt_id=f"p{i}",
                    prompt=samples[2 * i]["prompt"],
                    output_A=[dict(role="assistant", content=XSS[i])],
                    output_B=[dict(role="assistant", content=XSS[-i])],
                    label=1,
                    reward_A=1.0,
                    reward_B=0.1 * i,
                    reward_difference=1 - 0.1 * i,
                    type="pairwise_feedback",
                )
                for i in range(len(XSS))
            ]
            (run / folder / "feedback.json").write_text(json.dumps(pairs if not n else []))
            (run / folder / "metrics.jsonl").write_text(
                '{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.6}\n'
            )
            with open(run / "ledger.jsonl", "a") as f:
                f.writelines(
                    json.dumps(
                        dict(
                            event="finished",
                            time=1.0 + n,
                            stage=s,
                            folder=folder,
                            seconds=1.0,
                            why=XSS[1],
                        )
                    )
                    + "\n"
                    for s in ("sample", "label", "train")[: 3 - n]
                )
        (run / "params.json").write_text(
            json.dumps(
                dict(
                    parameters=dict(
                        run_name=name, note=XSS[r], total_prompts=9, prompts_per_round=9
                    ),
                    ended=XSS[2],
                )
            )
        )
    return tmp_path / "runs"


def everything_is_text(where, picture="data:image/png"):
    script = "script:not([type='application/json'])"  # a figure's numbers run nothing
    active = f"{script}, img:not([src^='{picture}']), iframe, textarea, svg[onload]"
    assert where.locator(f"{active}, details[ontoggle], a[href^='javascript']").count() == 0


def test_report_opens_offline_and_runs_nothing_it_was_not_given(quiet, hostile_runs):
    from halos_nb.page import report

    quiet.goto(
        report(
            hostile_runs / "one", truth=lambda prompt, output: float(len(output) % 3), best=2.0
        ).as_uri()
    )
    quiet.get_by_role("button", name="open all").click()
    figures = quiet.locator("[data-figure]")
    assert figures.count() >= 10
    for i in range(figures.count()):
        figures.nth(i).scroll_into_view_if_needed()
        figures.nth(i).locator(".main-svg").first.wait_for(timeout=30_000)
        assert figures.nth(i).get_attribute("aria-label")
    everything_is_text(quiet.locator("body > :not(script)"))
    # ontoggle would fire now
    for d in quiet.locator("details").all():
        d.evaluate("d => { d.open = false; d.open = true }")
    quiet.locator("input[data-filters=pairs]").fill("srcdoc")
    left = quiet.locator("#pairs details:visible").count()
    assert 0 < left < len(XSS)
    assert quiet.locator("#pairs details:visible").first.inner_text().count("srcdoc")
    assert quiet.locator("output").first.inner_text() == f"{left} of {len(XSS)}"
    assert (
        quiet.locator(
            ".modebar-btn[data-title*='hare'], .modebar-btn[data-title*='loud']"
        ).count()
        == 0
    )
    paper = lambda: quiet.locator("[data-figure] .main-svg").first.evaluate(
        "s => getComputedStyle(s).backgroundColor"
    )
    light = paper()
    quiet.emulate_media(color_scheme="dark")
    quiet.wait_for_function(
        (
            "c => getComputedStyle(document.querySelector('[data-figure] "
            ".main-svg')).backgroundColor !== c"
        ),
        arg=light,
    )
    assert light == "rgb(255, 255, 255)"
    assert paper() == "rgb(13, 17, 23)"
    quiet.emulate_media(color_scheme="light")


def test_report_would_hold_even_if_a_text_came_through(page, hostile_runs):
    "The second lock: its policy lets nothing be asked, and no foreign script run."
    from halos_nb.page import report

    page.goto(report(hostile_runs / "one").as_uri())
    assert (
        page.evaluate(
            "async () => { try { await fetch('http://127.0.0.1:9/x'); return 'sent' } "
            "catch { return 'refused' } }"
        )
        == "refused"
    )
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', `<img src=x "
        "onerror='window.hit=1'><details open ontoggle='window.hit=1'>x</details><iframe "
        "srcdoc='<script>parent.hit=1</script>'></iframe>`)"
    )
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.hit=1'}))"
    )
    page.wait_for_timeout(500)
    assert page.evaluate("window.hit") is None


def headers_sort(page, live):
    "A click or a key on a header sorts; the focus stays, and aria-sort says which way."
    head = live.get_by_role("columnheader", name="run", exact=True)
    runs = live.locator(".sorted tbody td:first-child")
    assert live.locator(".sorted th[aria-sort=none]").count() > 3
    assert live.locator(".widget-dropdown").count() == 1  # of prompts
    head.get_by_role("button").click()
    live.locator(".sorted th[aria-sort=ascending]").wait_for()
    assert runs.all_inner_texts() == ["one", "two"]
    page.keyboard.press("Enter")  # the header that was clicked still has the keyboard
    live.locator(".sorted th[aria-sort=descending]").wait_for()
    assert runs.all_inner_texts() == ["two", "one"]
    assert head.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Tab")
    page.keyboard.press(" ")
    live.locator(".sorted .status", has_text="sorted by rounds").wait_for()
    assert head.get_attribute("aria-sort") == "none"
    assert not (wrong := complaints(live.locator(".sorted"))), wrong


def test_comparer_live(lab, quiet, hostile_runs, tmp_path):
    write_notebook(
        tmp_path / "compare.ipynb",
        f"from halos_nb.compare import RunComparer\nRunComparer({str(hostile_runs)!r}).show()",
        f"RunComparer({str(hostile_runs)!r}, mode='static').show()",
        DONE,
    )
    open_notebook(page := quiet, lab(), "compare.ipynb")
    run_all(page)
    live = outputs(page).nth(0)
    prompt = live.locator(".widget-dropdown", has=page.get_by_text("prompt", exact=True))
    prompt = prompt.locator("select")
    prompt.wait_for(timeout=30_000)
    assert "only parameters that differ" in live.inner_text()
    assert live.locator("th", has_text="total_prompts").count() == 0
    live.locator("input[type=checkbox]").uncheck()
    live.locator("th", has_text="total_prompts").wait_for(timeout=10_000)
    headers_sort(page, live)
    for i in range(3):
        prompt.select_option(index=i)
        live.locator("pre").first.wait_for()
        page.wait_for_timeout(300)
        shown = live.locator("pre").first.inner_text().strip()
        assert shown in XSS
        assert (
            prompt.locator("option")
            .nth(i)
            .inner_text()
            .replace("\xa0", " ")
            .endswith(shown[:100])
        )
    assert live.locator("ins").count() > 0
    for where in (live, outputs(page).nth(1)):
        everything_is_text(where)


PANEL = """status => {
  if (!window.panel) {
    const box = document.createElement("div");
    document.body.replaceChildren(box);
    const heard = {};
    const model = { get: (name) => panel[name], on: (name, f) => (heard[name] = f) };
    window.panel = { status, curves: [], heard, box };
    ours.render({ model, el: box });
  }
  panel.status = status;
  panel.heard["change:status"]();
  return panel.box.querySelector(".top").getBoundingClientRect().height;
}"""


def test_what_is_below_the_status_line_stays_where_it_is(page):
    "Its words come and go ten times a round: while the run goes on, nothing jumps up again."
    page.goto("about:blank")
    page.set_viewport_size(dict(width=700, height=600))
    page.add_style_tag(content=Panel._css)
    code = Panel._esm.replace("export default", "window.ours =")
    page.add_script_tag(content=code)

    def height(words, state="running", share=0.5):
        told = dict(state=state, text=words, share=share, warning="", stopping=False, log=[])
        return page.evaluate(PANEL, told)

    tall = height("sampled 12 of 64 " * 20)
    assert height("starting", share=None) == tall
    assert height("sampled 12 of 64 " * 10) == tall
    page.set_viewport_size(dict(width=1400, height=600))  # another width has other lines
    assert height("starting") < tall
    assert height("sampled 12 of 64 " * 20) < tall
    page.set_viewport_size(dict(width=700, height=600))
    assert height("sampled 12 of 64 " * 20) == tall
    assert height("done", "finished") < tall

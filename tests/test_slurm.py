"""Jobs of a real SLURM: two nodes on this machine (`slurm_cluster`), by `make test-slurm`.

The stages of most runs pretend (`pretend`); scheduler, script, papermill, kernel, ledger and
supervisors are real.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from job_helpers import alive
from slurm_cluster import INSIDE, Cluster, run

from halos_nb.playground import build
from halos_nb.records import file_hash, read_jsonl
from halos_nb.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
RUNS = os.environ["HALOS_NB_RUNS_DIR"]  # the playground in it is built once for all tests
pytestmark = [
    pytest.mark.skipif(INSIDE not in os.environ, reason="make test-slurm runs these"),
    pytest.mark.timeout(3600),
]

SETTINGS = """
[halos_nb]
runs_dir = runs
profile = one

[profile one]
slurm.partition = test
slurm.notice = 30

[profile listed]
slurm.export = PYTHONPATH, MY_API_KEY, STAGE_SECONDS

[profile short]
slurm.time = 2:30
slurm.notice = 30

[profile nowhere]
slurm.partition = nowhere

[profile cpu2]
num_processes = 2

[profile two]
num_machines = 2
num_processes = 2
slurm.time = 30
"""

# a stage takes so long that there is time to end it
SLOW = """
import os, sys, time
import pretend
if __name__ == "__main__":
    time.sleep(float(os.environ.get("STAGE_SECONDS", "0.5")))
    print("secret is here:", "MY_API_KEY" in os.environ, "other:", "OTHER" in os.environ)
    pretend.main()
"""
PARAMETERS = """
run_name = "r"
method = "dpo"
beta = None
seed = 0
lr = 3e-4
total_prompts = 20
prompts_per_round = 10
sft_checkpoint = "sft"
reward_checkpoint = "rm"
prompts = "prompts.json"
audit = "skip"
alarm = "skip"
profile = ""
fresh = False
"""
GUARD = """
from halos_nb.configs import LoopConfig
from halos_nb.settings import load_settings, notebook_config

cfg = notebook_config(LoopConfig, globals())
"""
ROUNDS = """
from halos_nb import ledger
from halos_nb.loop import run_rounds

launch = ledger.launch
ledger.launch = lambda stage, cfg, profile, folder, module, **more: launch(
    stage, cfg, profile, folder, "slow_pretend", **more
)
for this in run_rounds(cfg, load_settings()):
    print(this)
"""


def driver():
    "A notebook that runs the loop with stages that pretend."
    cells = []
    for source, tags in ((PARAMETERS, ["parameters"]), (GUARD, []), (ROUNDS, [])):
        cell = dict(cell_type="code", metadata=dict(tags=tags), outputs=[], source=source)
        cells.append(cell | dict(execution_count=None, id=f"c{len(cells)}"))
    kernel = dict(kernelspec=dict(name="python3", display_name="", language="python"))
    return json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    return Cluster(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="session")
def place(cluster, tmp_path_factory):
    "A user's folder: settings, a driver, models that pretend."
    place = tmp_path_factory.mktemp("place with 'space'")
    (place / "settings.ini").write_text(SETTINGS)
    (place / "driver.ipynb").write_text(driver())
    (place / "slow_pretend.py").write_text(SLOW)
    (place / "prompts.json").write_text("[]")
    for name in ("sft", "rm"):
        (place / name).mkdir()
        (place / name / "weights").write_text(name)
    return place


@pytest.fixture
def submit(place, monkeypatch):
    "`submit(-p ..., seconds=...)`: the number of a job."
    path = [str(place), str(ROOT / "tests"), str(ROOT)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("MY_API_KEY", "abcdefgh-very-secret")
    monkeypatch.setenv("OTHER", "of the shell")
    monkeypatch.delenv("HALOS_NB_RUNS_DIR", raising=False)
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")

    def submitted(*words, notebook="driver.ipynb", seconds=0.5, **parameters):
        command = [sys.executable, "-m", "halos_nb.submit", notebook, *words]
        for name, value in parameters.items():
            command += ["-p", name, str(value)]
        env = os.environ | dict(STAGE_SECONDS=str(seconds))
        said = run(*command, cwd=place, env=env)
        return int(re.search(r"^submitted: job (\d+)", said, re.M)[1])

    return submitted


def events(folder, session=None):
    rows = read_jsonl(folder / "ledger.jsonl")
    if session is None:
        return rows
    starts = [i for i, row in enumerate(rows) if row["event"] == "run"]
    ends = [*starts[1:], len(rows)]
    return rows[starts[session] : ends[session]]


def results(folder):
    "Every result of a run, as hashes."
    files = [*folder.glob("*/samples.json"), *folder.glob("*/feedback.json")]
    files += folder.glob("*/policy/FINAL/weights")
    return {str(file.relative_to(folder)): file_hash(file) for file in sorted(files)}


def begun(folder, stage="train", number=1):
    "Whether a stage of a round has begun, and has not ended."
    if not (folder / "ledger.jsonl").exists():
        return False
    last = [e for e in events(folder) if "folder" in e][-1:]
    return [(e["event"], e["folder"], e["stage"]) for e in last] == [
        ("started", f"round-{number}", stage)
    ]


def nothing_of(folder):
    "Whether no process has a file of this folder open, or names it."
    if alive(folder):
        return False
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes():
                return False
        except OSError:
            continue
    return True


@pytest.fixture(scope="session")
def whole(cluster, place):
    "The results of a run that nobody interrupted, by papermill alone."
    env = os.environ | dict(STAGE_SECONDS="0")
    env["PYTHONPATH"] = os.pathsep.join([str(place), str(ROOT / "tests"), str(ROOT)])
    env.pop("HALOS_NB_RUNS_DIR", None)
    words = ["driver.ipynb", "out.ipynb", "--no-progress-bar", "-p", "run_name", "whole"]
    run(sys.executable, "-m", "papermill", *words, cwd=place, env=env)
    found = results(place / "runs/whole")
    assert len(found) == 2 * 3 + 1
    return found


def test_a_job_does_what_papermill_does(cluster, place, submit, whole):
    number = submit(run_name="plain")
    cluster.wait(number, "COMPLETED")
    folder = place / "runs/plain"
    assert results(folder) == whole
    log = (folder / f"submit/slurm-{number}.log").read_text()
    assert "the driver ended with 0\n" in log
    assert "round-2: 10 prompts" in (folder / "driver.ipynb").read_text()
    assert nothing_of(folder)


def test_a_secret_reaches_the_stage_and_no_file(cluster, place, submit):
    for profile, other in (("one", True), ("listed", False)):
        number = submit("--profile", profile, run_name=f"env-{profile}", total_prompts=10)
        cluster.wait(number, "COMPLETED")
        folder = place / f"runs/env-{profile}"
        said = (folder / "round-1/train.log").read_text()
        assert f"secret is here: True other: {other}" in said
        texts = [p for p in folder.rglob("*") if p.is_file()]
        assert not any(b"very-secret" in p.read_bytes() for p in texts)
        assert "very-secret" not in run("scontrol", "write", "batch_script", str(number), "-")


def test_hostile_parameters_arrive_as_they_are(cluster, place, submit):
    name = 'it\'s $(touch hurt) `touch hurt` "q" \\ \n#SBATCH --comment=hurt\n.json'
    name = name.replace("/", "")
    (place / name).write_text("[]")
    number = submit(run_name="hostile", total_prompts=10, prompts=name)
    cluster.wait(number, "COMPLETED")
    told = json.loads((place / "runs/hostile/params.json").read_text())["parameters"]
    assert Path(told["prompts"]).name == name
    assert not list(place.rglob("hurt"))
    assert "Comment" not in cluster.job(number)


def test_a_name_with_quotes_has_its_log(cluster, place, submit):
    number = submit(run_name='it\'s a "run" #1 (id);', total_prompts=10)
    cluster.wait(number, "COMPLETED")
    log = place / 'runs/it\'s a "run" #1 (id);' / f"submit/slurm-{number}.log"
    assert "ended with 0" in log.read_text()


def test_cancelled_nothing_is_left(cluster, place, submit):
    number = submit(run_name="cancelled", seconds=100)
    folder = place / "runs/cancelled"
    cluster.until(lambda: begun(folder, "sample"), what="the first stage")
    cluster.until(lambda: alive(folder), what="its process")
    run("scancel", str(number))
    cluster.wait(number, "CANCELLED", 30)
    gone = cluster.until(lambda: nothing_of(folder), 15, "nothing alive")
    print(f"nothing alive {gone:.1f} s after CANCELLED")
    assert events(folder)[-1]["event"] == "started"


def test_requeued_it_ends_in_the_same_bits(cluster, place, submit, whole):
    "Also with `fresh`: what this submission has begun, it goes on with."
    number = submit(run_name="requeued", fresh="True", seconds=1.5)
    folder = place / "runs/requeued"
    for of_round in (1, 2):
        cluster.until(lambda of=of_round: begun(folder, "train", of), what="a training")
        run("scontrol", "requeue", str(number))
        cluster.start_again(number)
    cluster.wait(number, "COMPLETED")
    assert results(folder) == whole
    assert cluster.job(number)["Restarts"] == "2"
    sessions = [e for e in events(folder) if e["event"] == "run"]
    assert len(sessions) == 3
    skipped = [(e["folder"], e["stage"]) for e in events(folder, 1) if e["event"] == "skipped"]
    assert skipped == [("round-1", "sample"), ("round-1", "label")]
    log = (folder / f"submit/slurm-{number}.log").read_text()
    assert log.count(f"job {number} on") == 3


def test_out_of_time_it_is_requeued(cluster, place, submit, whole):
    "Told half a minute before, and SLURM may do so a minute earlier."
    number = submit("--profile", "short", run_name="short", seconds=20)
    folder = place / "runs/short"
    while cluster.state(number) != "COMPLETED":
        cluster.wait(number, "RUNNING")
        cluster.until(lambda: cluster.state(number) in ("PENDING", "COMPLETED"), 400)
        if cluster.state(number) == "PENDING":
            cluster.start_again(number)
    assert results(folder) == whole
    log = (folder / f"submit/slurm-{number}.log").read_text()
    assert "told to by USR1" in log and "goes on where it was" in log
    print("restarts:", cluster.job(number)["Restarts"])
    assert nothing_of(folder)


def test_preempted_it_goes_on_afterwards(cluster, place, submit, whole):
    number = submit(run_name="preempted", seconds=1.5)
    folder = place / "runs/preempted"
    cluster.until(lambda: begun(folder, "train"), what="a training")
    words = "--partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap".split()
    other = int(run("sbatch", "--parsable", *words, "sleep 5", cwd=place))
    cluster.wait(other, "RUNNING", 60)
    assert nothing_of(folder)
    cluster.wait(other, "COMPLETED")
    cluster.start_again(number)
    cluster.wait(number, "COMPLETED")
    assert results(folder) == whole
    assert cluster.job(number)["Restarts"] == "1"


def test_an_array_of_four_runs(cluster, place, submit, whole):
    "Each has a folder, a notebook and a log of its own; compare_runs lays them side by side."
    number = submit("--sweep", "method=dpo,kto seed=0,1", "--slots", "3", run_name="sweep")
    names = ["sweep-dpo-s0", "sweep-dpo-s1", "sweep-kto-s0", "sweep-kto-s1"]

    def ended():
        text = run("scontrol", "show", "job", "-o", str(number))
        return re.findall(r"JobState=(\w+)", text) == ["COMPLETED"] * 4

    cluster.until(ended, 500, "all four")
    for name in names:
        folder = place / "runs" / name
        assert (folder / "driver.ipynb").exists()
        logs = list((folder / "submit").glob("slurm-*.log"))
        assert len(logs) == 1 and "ended with 0" in logs[0].read_text()
    assert results(place / "runs/sweep-dpo-s0") == whole
    kinds = [results(place / "runs" / name)["round-1/samples.json"] for name in names]
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]
    join = ["papermill", str(ROOT / "nbs/compare_runs.ipynb"), "runs/sweep/compare_runs.ipynb"]
    words = [*join, "--no-progress-bar", "-p", "runs", ",".join(names)]
    run(sys.executable, "-m", *words, cwd=place)
    rows = (place / "runs/compare_runs.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == names


def test_what_slurm_refuses_is_told(cluster, place, submit):
    with pytest.raises(AssertionError, match="sbatch refused .*job.sh: .*partition"):
        submit("--profile", "nowhere", run_name="refused")


def on_node(node, module):
    "Processes of a module that SLURM has started on a node."
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            env = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if module.encode() in words and f"SLURMD_NODENAME={node}".encode() in env:
            found.append(int(process.name))
    return found


def test_stages_on_both_nodes(cluster, place, submit):
    """The real loop, with a rank on each node: cancelled in the middle, nothing is left on
    either; submitted again, it ends in the bits of two processes on one machine.
    """
    world = build(Settings(runs_dir=RUNS))
    given = dict(
        sft_checkpoint=world.policy,
        reward_checkpoint=world.reward_model,
        prompts=world.prompts,
        lr=3e-4,
        total_prompts=8,
        prompts_per_round=8,
        num_samples_per_prompt=4,
        audit="skip",
        alarm="skip",
    )
    notebook = str(ROOT / "nbs/online_loop.ipynb")
    asked = dict(notebook=notebook, run_name="nodes", **given)
    number = submit("--profile", "two", **asked)
    folder = place / "runs/nodes"
    both = [lambda n=n: on_node(n, "halos_nb.train") for n in ("n1", "n2")]
    cluster.until(lambda: all(one() for one in both), 500, "stages on both nodes")
    run("scancel", str(number))
    cluster.wait(number, "CANCELLED")
    gone = cluster.until(
        lambda: nothing_of(folder) and not any(one() for one in both), 20, "nothing alive"
    )
    print(f"two nodes: nothing alive {gone:.1f} s after CANCELLED")
    number = submit("--profile", "two", **asked)
    cluster.wait(number, "COMPLETED", 600)

    words = [notebook, "out.ipynb", "--no-progress-bar", "-p", "profile", "cpu2"]
    for name, value in given.items():
        words += ["-p", name, str(value)]
    run(sys.executable, "-m", "papermill", *words, "-p", "run_name", "local", cwd=place)
    for name in ("round-1/samples.json", "round-1/policy/FINAL/model.safetensors"):
        found = [file_hash(place / "runs" / one / name) for one in ("nodes", "local")]
        assert found[0] == found[1], name

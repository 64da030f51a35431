"""Several machines: two network namespaces of this one, which see each other over a cable of
their own. `make test-hosts`; in CI, two hosts that are one.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from job_helpers import NEEDS_LINUX, alive, papermill, start, until
from safetensors.torch import load_file

from halos_nb.configs import TrainConfig
from halos_nb.failures import StageError
from halos_nb.jobs import environment, launch
from halos_nb.models import small_llama
from halos_nb.settings import SHIPPED, Profile
from halos_nb.templates import byte_tokenizer

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("stages_on_path"),
    NEEDS_LINUX,
]


def gathered(folder):
    return json.loads((folder / "out").read_text())[:3]


def test_two_hosts_that_are_one(tmp_path):
    "Each launcher starts its ranks, they meet, and the stage finds what it was promised."
    local = Profile(hosts="ada, bob", start="env PLACE={host}", main_process_ip="127.0.0.1")
    job = start("gather", tmp_path, local)
    job.wait(show=False)
    assert gathered(tmp_path) == [3, 2, 2]
    assert not alive(tmp_path)
    assert not list(tmp_path.glob("*.shared*"))


def test_what_a_host_is_told_and_what_it_keeps(monkeypatch):
    "What the profile decides goes along; a rank of the scheduler stays behind."
    monkeypatch.setenv("PMI_RANK", "1")
    two = Profile(hosts="a, b", start="ssh {host}", env={"GLOO_SOCKET_IFNAME": "link0"})
    env = environment(two, Path("p"))
    decided = env["HALOS_NB_DECIDED"].split(",")
    assert {"OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "HALOS_NB_PROMISED"} <= {*decided}
    assert "PATH" not in decided and "PMI_RANK" not in env
    assert "PMI_RANK".startswith(tuple(env["HALOS_NB_LEFT_OUT"].split(",")))


def test_hosts_of_a_slurm_job(tmp_path, monkeypatch):
    "Named by the scheduler, in its own short form; their number is the profile's."
    from halos_nb.jobs import SRUN, command

    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho $3 | sed 's/\\[7-8\\]/7\\nnode8/'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[7-8]")
    two = Profile(num_machines=2, num_processes=4)
    words = command("halos_nb.train", Path("train.config.json"), two)
    assert words[words.index("--hosts") + 1] == "node7,node8"
    assert words[words.index("--start") + 1] == SRUN
    assert words[words.index("--ranks") + 1] == "2"
    assert words[words.index("--main_process_ip") + 1] == "node7"
    three = Profile(name="three", num_machines=3)
    with pytest.raises(ValueError, match="is for 3 machines, and a SLURM job names 2"):
        command("halos_nb.train", Path("train.config.json"), three)


# ---- namespaces

real = pytest.mark.skipif(
    not os.environ.get("HALOS_NB_TEST_HOSTS"), reason="takes minutes: make test-hosts"
)


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def spaces():
    "The names of two namespaces with a cable between them; nothing of them is left."
    names = [f"halos{os.getpid()}{name}" for name in ("ada", "bob")]
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: the command `ip` is not installed")
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    one, two = names
    ip("link", "add", "link0", "netns", one, "type", "veth", "peer", "link0", "netns", two)
    for number, name in enumerate(names, 1):
        ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "link0")
        for device in ("lo", "link0"):
            ip("-n", name, "link", "set", device, "up")
    yield names
    for name in names:
        assert ip("netns", "pids", name) == "", f"{name}: something is left"
        ip("netns", "delete", name)


def on(spaces, **more):
    "The profile of two machines with a process each."
    return Profile(
        name="two_hosts",
        hosts=", ".join(spaces),
        start=more.pop("start", "ip netns exec {host}"),
        main_process_ip="10.77.0.1",
        env={"GLOO_SOCKET_IFNAME": "link0"},
        **more,
    )


def pids(space):
    return [int(pid) for pid in ip("netns", "pids", space).split()]


@real
def test_processes_of_two_hosts_meet(tmp_path, spaces):
    job = start("gather", tmp_path, on(spaces, num_processes=4))
    job.wait(show=False)
    assert gathered(tmp_path) == [10, 4, 4]
    assert not alive(tmp_path)


@pytest.fixture
def home(tmp_path):
    "A tiny model and five pairs."
    tok = byte_tokenizer()
    small_llama(tok, hidden_size=32, initializer_range=0.2).save_pretrained(tmp_path / "start")
    tok.save_pretrained(tmp_path / "start")
    rows = []
    for i in range(5):
        row = dict(prompt="Say it " + "again " * i, chosen="Yes" + "!" * i, rejected="No.")
        rows.append(json.dumps(row) + "\n")
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    return tmp_path


def trained(home, name, profile):
    "The weights of a stage of training."
    cfg = TrainConfig(
        loss="dpo",
        model=str(home / "start"),
        train_datasets=[str(home / "pairs.jsonl")],
        exp_name=name,
        cache_dir=str(home),
        batch_size=2,
        lr=2e-3,
        warmup=0,
    )
    launch("train", cfg, profile, home / f"job-{name}").wait(show=False)
    return load_file(home / name / "FINAL/model.safetensors")


@real
def test_two_hosts_train_what_one_does(home, spaces):
    one = trained(home, "one", Profile(num_processes=2))
    two = trained(home, "two", on(spaces))
    before = load_file(home / "start/model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], before[name]) for name in before)


@real
def test_two_hosts_share_a_model_out_as_one_does(home, spaces):
    "FSDP2 over the cable: the bits of one host, and of one process to rounding."
    shipped = (SHIPPED / "fsdp2_cpu2.yaml").read_text()
    file = home / "fsdp2_2x1.yaml"
    file.write_text(shipped.replace("num_machines: 1", "num_machines: 2"))
    one = trained(home, "one", Profile(accelerate_config="fsdp2_cpu2"))
    two = trained(home, "two", on(spaces, accelerate_config=str(file)))
    alone = trained(home, "alone", Profile())
    apart = max((one[name] - alone[name]).abs().max().item() for name in alone)
    print(f"one host and two: the same bits; largest difference from one process: {apart:.1e}")
    assert all(torch.equal(one[name], two[name]) for name in alone)
    assert 0 < apart < 1e-4


@real
@pytest.mark.parametrize("what", ["rank", "host"])
def test_what_dies_on_a_host_is_named(what, tmp_path, spaces):
    ada, bob = spaces
    job = start("hang", tmp_path, on(spaces))
    until((tmp_path / "out").exists, 300, "both ranks running")
    until(lambda: len(pids(bob)) >= 3, 300, "supervisor, launcher, rank")
    doomed = pids(bob)
    if what == "rank":
        doomed = [pid for pid in doomed if "RANK" in psutil.Process(pid).environ()]
        doomed = [pid for pid in doomed if psutil.Process(pid).environ().get("RANK") == "1"]
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(StageError) as raised:
        job.wait(show=False)
    seconds = until(lambda: not pids(ada) and not pids(bob), 15, "all gone")
    print(f"{what}: all gone {seconds:.1f} s later")
    error = raised.value
    assert (error.rank, error.host) == (1, bob)
    assert str(error).startswith(f"sample failed: rank 1 on host {bob}, killed by SIGKILL")
    assert not alive(tmp_path)


@real
def test_hosts_that_share_no_folder_are_told(tmp_path, spaces):
    hide = f'mount -t tmpfs none {tmp_path} && exec "$@"'
    start_hidden = f"ip netns exec {{host}} unshare -m sh -c '{hide}' sh"
    job = start("gather", tmp_path, on(spaces, start=start_hidden))
    with pytest.raises(StageError) as raised:
        job.wait(show=False)
    told = str(raised.value)
    assert f"on host {spaces[0]}" in told or f"on host {spaces[1]}" in told
    assert f"{tmp_path}/sample.config.shared is not what the first machine wrote" in told
    assert not alive(tmp_path)


CELL = """
from halos_nb.configs import SampleConfig
from halos_nb.settings import SHIPPED, Profile
from halos_nb.jobs import launch
cfg = SampleConfig(model="hang", output_file="{out}")
two = Profile(
    hosts="{launcher}", start="ip netns exec {{host}}", main_process_ip="10.77.0.1",
    env=dict(GLOO_SOCKET_IFNAME="link0"),
)
job = launch("sample", cfg, two, "{folder}", module="tiny_stage")
job.wait()
"""


@real
def test_no_host_outlives_the_notebook(tmp_path, spaces):
    notebook = papermill(tmp_path, CELL, launcher=", ".join(spaces))
    until((tmp_path / "out").exists, 300, "both ranks running")
    assert all(len(pids(space)) >= 3 for space in spaces)
    notebook.kill()
    seconds = until(lambda: not any([*map(pids, spaces), alive(tmp_path)]), 15, "all gone")
    print(f"all gone after {seconds:.1f} s")
    notebook.communicate(timeout=60)
    assert not (tmp_path / "next").exists()

"""A SLURM of two nodes on this machine, for `make test-slurm`: all of it lives and ends in
namespaces of its own, so no daemon, port or process outlives the tests.

`python tests/slurm_cluster.py COMMAND ...` runs a command where such a cluster can be started.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "ip")
INSIDE = "HALOS_NB_SLURM_TESTS"  # set where a cluster can be started
NAMESPACES = ("--net", "--pid", "--uts", "--mount", "--ipc", "--fork", "--mount-proc")

# both nodes are this machine, under two addresses and two ports
CONF = """
ClusterName=halos
SlurmctldHost=halos(10.77.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
OverTimeLimit=0
SlurmdParameters=config_overrides
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
NodeName=n1 NodeHostname=halos NodeAddr=10.77.0.1 Port=7001 CPUs=4
NodeName=n2 NodeHostname=halos NodeAddr=10.77.0.2 Port=7002 CPUs=4
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=9
"""


def run(*command, check=True, **more):
    "A command's output."
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, **more)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


class Cluster:
    "Two nodes that take jobs."

    def __init__(self, home: Path):
        self.home = home
        for name in ("state", "spool-n1", "spool-n2"):
            (home / name).mkdir(parents=True)
        hosts = "127.0.0.1 localhost\n10.77.0.1 halos n1\n10.77.0.2 n2\n"
        (home / "hosts").write_text(hosts)
        (home / "slurm.conf").write_text(CONF.format(home=home))
        os.environ["SLURM_CONF"] = str(home / "slurm.conf")
        run("mount", "--bind", str(home / "hosts"), "/etc/hosts")
        run("hostname", "halos")
        # a pair of devices, for names are only looked up where there is an address of a network
        run("ip", "link", "add", "c0", "type", "veth", "peer", "name", "c1")
        for device in ("lo", "c0", "c1"):
            run("ip", "link", "set", device, "up")
        for address in ("10.77.0.1/24", "10.77.0.2/24"):
            run("ip", "addr", "add", address, "dev", "c0")
        run("slurmctld", "-c")
        for node in ("n1", "n2"):
            run("slurmd", "-N", node)
        self.until(lambda: self.nodes() == {"n1 idle", "n2 idle"}, what="two idle nodes")

    def nodes(self):
        "The nodes and their states."
        return set(run("sinfo", "-h", "-N", "-o", "%N %t", check=False).splitlines())

    def until(self, condition, seconds=120, what=""):
        "Wait for a condition; the seconds that it took."
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < seconds, (
                f"{what or condition}: not in {seconds} s"
            )
            time.sleep(0.1)
        return time.monotonic() - start

    def job(self, number):
        "What SLURM knows of a job, by its names; {} if it is forgotten."
        text = run("scontrol", "show", "job", "-o", str(number), check=False)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self, number):
        return self.job(number).get("JobState")

    def wait(self, number, state, seconds=300):
        "Wait for a job's state."
        what = f"job {number}, {state}"
        return self.until(lambda: self.state(number) == state, seconds, what)

    def start_again(self, number):
        "Have a job that was requeued started now, not in two minutes as SLURM would."
        self.wait(number, "PENDING")
        time.sleep(5)  # its nodes refuse it for a moment, as one that was ended
        run("scontrol", "update", f"jobid={number}", "StartTime=now")


def why_not():
    "Why no cluster can be started here, or nothing."
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)}: not here (Debian: apt-get install slurmctld slurmd)"
    return "" if os.geteuid() == 0 else "namespaces and slurmd need root"


def main(*command):
    "Run a command in namespaces of its own; with it ends all that it started."
    if problem := why_not():
        sys.exit(problem)
    os.environ[INSIDE] = "yes"
    os.execvp("unshare", ["unshare", *NAMESPACES, "--kill-child", *command])


if __name__ == "__main__":
    main(*sys.argv[1:])

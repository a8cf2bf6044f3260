"""A real Slurm on one machine: each node is a ``slurmd`` in a network namespace of its own."""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

NODES = {"nv9": 9, "nv10": 10}  # the last number of each one's address
CONTROLLER = 254
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare")
GPUS = 2  # of a node; they are names of the null device, which no program here opens

CONFIGURATION = """
ClusterName=test
SlurmctldHost=controller({network}.{controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Credentials that expire soon: a job that is put back starts again after as many seconds.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPort=7817
SlurmdPort=7818
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=1,bf_interval=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=nv9 NodeAddr={network}.9 CPUs=8 CoresPerSocket=8 Gres=gpu:{gpus} State=UNKNOWN
NodeName=nv10 NodeAddr={network}.10 CPUs=8 CoresPerSocket=8 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=nv9,nv10 Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=nv9,nv10 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """What this machine lacks for a Slurm of its own, or None."""
    absent = [program for program in PROGRAMS if not shutil.which(program)]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge, iproute2)"
    if os.geteuid():
        return "network namespaces need root"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False
    )
    return None if tried.returncode == 0 else "no namespaces may be made here"


class Slurm:
    """Asks a running Slurm.

    Args:
        folder: where it keeps everything.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        names = [
            name for name in os.environ if not name.startswith(("SLURM_", "SBATCH_", "TF_CONFIG"))
        ]
        self.environment = {name: os.environ[name] for name in names}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def run(self, *words, check=True) -> str:
        """The output of a command of Slurm's."""
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True, text=True, check=False, env=self.environment, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def submit(self, *words) -> str:
        """Submits a script; the number of the job."""
        return self.run("sbatch", "--parsable", *words).strip()

    def job(self, number) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number, seconds, **expected):
        """Waits until a job is as expected."""
        until = time.monotonic() + seconds
        while True:
            job = self.job(number)
            if all(job[name] == value for name, value in expected.items()):
                return
            assert time.monotonic() < until, (job, self.logs())
            time.sleep(0.5)

    def logs(self) -> str:
        """The ends of what all daemons wrote."""
        return "\n".join(f"{log}: {log.read_text()[-1000:]}" for log in self.folder.glob("*.log"))


@contextlib.contextmanager
def running_slurm(folder: Path):
    """Starts Slurm; in the end nothing of it is left.

    Args:
        folder: an empty folder for all its files.
    """
    tag = os.getpid()
    network = f"198.18.{tag % 256}"  # of a range that is for tests of networks
    with contextlib.ExitStack() as stack:
        _make_network(stack, tag, network)
        slurm = Slurm(folder)
        _configure(folder, network)

        def start(name, *words):
            with (folder / f"{name}.log").open("w") as log:
                daemon = subprocess.Popen(
                    [str(word) for word in words], stdout=log, stderr=log,
                    env=slurm.environment, start_new_session=True,
                )  # fmt: skip
            stack.callback(_stop, daemon)

        def start_as(host, command, *before):
            # With names of its own for itself and for the others.
            script = f"hostname {host} && mount --bind {folder}/hosts /etc/hosts && exec {command}"
            start(host, *before, "unshare", "--uts", "--mount", "bash", "-c", script)

        socket = folder / "munge.socket"
        own = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        start("munged", "munged", "--foreground", "--force", f"--socket={socket}", *own)
        _until(socket.exists, slurm)
        start_as("controller", "slurmctld -D -i -c")
        for node in NODES:
            start_as(node, f"slurmd -D -N {node}", "nsenter", f"--net=/run/netns/{node}-{tag}")
        idle = ["sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D"]
        _until(lambda: slurm.run(*idle, check=False).strip() == str(len(NODES)), slurm)
        stack.callback(_end_jobs, slurm)
        yield slurm


def _make_network(stack, tag, network):
    """A bridge, and on it a namespace for each node."""

    def ip(*words):
        subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)

    bridge = f"nvb{tag}"  # 15 characters at most
    ip("link", "add", bridge, "type", "bridge")
    stack.callback(ip, "link", "del", bridge)
    ip("addr", "add", f"{network}.{CONTROLLER}/24", "dev", bridge)
    ip("link", "set", bridge, "up")
    for node, number in NODES.items():
        namespace, end = f"{node}-{tag}", f"nvv{number}-{tag}"
        ip("netns", "add", namespace)
        stack.callback(ip, "netns", "del", namespace)  # and its link
        ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        stack.callback(ip, "link", "del", end)
        ip("link", "set", end, "master", bridge, "up")
        ip("-n", namespace, "addr", "add", f"{network}.{number}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")
        ip("-n", namespace, "link", "set", "lo", "up")


def _configure(folder, network):
    text = CONFIGURATION.format(folder=folder, network=network, controller=CONTROLLER, gpus=GPUS)
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    for number in range(GPUS):
        os.mknod(folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o600)
    addresses = {"controller": CONTROLLER, **NODES}
    lines = [f"{network}.{number} {name}" for name, number in addresses.items()]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))


def _until(condition, slurm):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, slurm.logs()
        time.sleep(0.2)


def _end_jobs(slurm):
    """Ends the jobs, whose processes would outlive the daemons."""
    for options in (("--full",), ("--full", "--signal=KILL")):
        jobs = slurm.run("squeue", "--noheader", "--format=%A", check=False).split()
        if not jobs:
            return
        slurm.run("scancel", *options, *jobs, check=False)
        until = time.monotonic() + 15
        while time.monotonic() < until and slurm.run("squeue", "--noheader", check=False).strip():
            time.sleep(0.5)


def _stop(daemon):
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()

"""A real Slurm on one machine: each node is a ``slurmd`` in a network namespace of its own.

Everything runs in a process namespace, whose first process ends when this one does, however it ends.
With it the kernel ends all others, and takes away the networks.
"""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

NODES = {"nv9": 9, "nv10": 10}  # the last number of each one's address
GPUS = 2  # of a node; they are names of the null device, which no program here opens
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare")
UNSHARE = (
    "unshare",
    "--net",
    "--uts",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)

# Run by the first process of the namespace, in the folder.
START = """
set -e
export SLURM_CONF=$PWD/slurm.conf
hostname controller
mount --bind hosts /etc/hosts
ip link add bridge type bridge
ip addr add 10.0.0.254/24 dev bridge
ip link set bridge up
ip link set lo up
munged --foreground --force --socket=$PWD/munge.socket --key-file=$PWD/munge.key \\
    --pid-file=$PWD/munge.pid --log-file=$PWD/munge.log --seed-file=$PWD/munge.seed &
until [ -S munge.socket ]; do sleep 0.1; done
slurmctld -D -i -c &
node() {
    unshare --net --uts bash -c "
        hostname $1
        until ip addr add 10.0.0.$2/24 dev eth0; do sleep 0.1; done 2> /dev/null
        ip link set eth0 up
        ip link set lo up
        exec slurmd -D -N $1" &
    until [ $(readlink /proc/$!/ns/net) != $(readlink /proc/$$/ns/net) ]; do sleep 0.1; done
    ip link add link$2 type veth peer name eth0 netns $!
    ip link set link$2 master bridge up
}
node nv9 9
node nv10 10
read  # until the test closes the other end
"""

CONFIGURATION = """
ClusterName=test
SlurmctldHost=controller(10.0.0.254)
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
NodeName=nv9 NodeAddr=10.0.0.9 CPUs=8 CoresPerSocket=8 Gres=gpu:{gpus} State=UNKNOWN
NodeName=nv10 NodeAddr=10.0.0.10 CPUs=8 CoresPerSocket=8 Gres=gpu:{gpus} State=UNKNOWN
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
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "no namespaces may be made here"


class Slurm:
    """Asks a running Slurm.

    Args:
        folder: where it keeps everything.
        pid: of a process in its network.
    """

    def __init__(self, folder: Path, pid: int):
        self.folder = folder
        self._enter = ["nsenter", f"--net=/proc/{pid}/ns/net"]
        names = [
            name for name in os.environ if not name.startswith(("SLURM_", "SBATCH_", "TF_CONFIG"))
        ]
        self.environment = {name: os.environ[name] for name in names}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def run(self, *words, check=True) -> str:
        """The output of a command of Slurm's."""
        done = subprocess.run(
            [*self._enter, *map(str, words)],
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
    _configure(folder)
    with (folder / "daemons.log").open("w") as log:
        first = subprocess.Popen(
            [*UNSHARE, "bash", "-c", START],
            stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip
    slurm = Slurm(folder, first.pid)
    try:
        idle = ["sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D"]
        until = time.monotonic() + 30
        while slurm.run(*idle, check=False).strip() != str(len(NODES)):
            assert first.poll() is None and time.monotonic() < until, slurm.logs()
            time.sleep(0.2)
        yield slurm
    finally:
        first.stdin.close()
        first.wait(30)


def _configure(folder):
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, gpus=GPUS))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    for number in range(GPUS):
        os.mknod(folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o600)
    addresses = {"controller": 254, **NODES}
    lines = [f"10.0.0.{number} {name}" for name, number in addresses.items()]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

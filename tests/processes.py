"""The training command in processes of its own, alone and as workers of a cluster."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

COMMAND = Path(__file__).parent.parent / "train_keras.py"


def start(recipe, root, *more, cluster=None, log=subprocess.DEVNULL, program=COMMAND, resume=True):
    """The command in a process of its own, continuing what is there unless `resume` is not set."""
    environment = dict(os.environ)
    if cluster:
        environment["TF_CONFIG"] = json.dumps(cluster)
    arguments = ["--config", recipe, "--root", root, "--deterministic", *more]
    if resume:
        arguments.append("--cont_training")
    return subprocess.Popen(
        [sys.executable, "-u", program, *map(str, arguments)],
        stdout=log if cluster else subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
    )


def wait_for_training(process):
    """Returns once the process begins to train, or at its end."""
    for line in process.stdout:
        if line.startswith("run:"):
            return


def newest_step(folder):
    steps = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")]
    return max(steps, default=0)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def cluster_environments(count=2):
    """The environment of each of so many workers on this machine."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(count)]}
    tasks = [{"type": "worker", "index": index} for index in range(count)]
    return [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})} for task in tasks]


def start_workers(recipe, root, *more, count=2, own=((), ()), delay=0.0, resume=True, **options):
    """So many workers on this machine, each with a log beside the root.

    Args:
        recipe: of all.
        root: of all.
        more: flags of all.
        count: workers.
        own: flags of the first one alone, and of the second one alone.
        delay: seconds before the second one.
        resume: continue what is there.
        options: of the second one, for `start`.
    """
    hosts = [f"127.0.0.1:{port}" for port in free_ports(count)]
    processes = []
    for index in range(count):
        cluster = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
        time.sleep(delay if index == 1 else 0.0)
        flags = [*more, *(own[index] if index < 2 else ())]
        with open(f"{root}-worker-{index}.log", "a") as log:
            extra = options if index == 1 else {}
            processes.append(
                start(recipe, root, *flags, cluster=cluster, log=log, resume=resume, **extra)
            )
    return processes


def own_lines(text):
    """The lines of standard error, which are all the command's own."""
    return text.splitlines()


def assert_all_finish(processes, root):
    statuses = [process.wait() for process in processes]
    logs = [path.read_text()[-2000:] for path in root.parent.glob(f"{root.name}-worker-*.log")]
    assert not any(statuses), "\n".join(logs)

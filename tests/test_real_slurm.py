"""Training under a real Slurm, with the script of docs/scaling.md."""

import json
import re
import shlex
import sys
import time

import pytest
from processes import COMMAND, newest_step
from slurm_cluster import missing, running_slurm

ROOT = COMMAND.parent
LACKS = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LACKS is not None, reason=f"a real Slurm: {LACKS}"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with running_slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


REPORT = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
from nvae_tf.training.slurm import workers_of_step
assert "tensorflow" not in sys.modules
addresses, rank = workers_of_step(os.environ)
print(json.dumps([rank, os.uname().nodename, addresses, os.environ.get("CUDA_VISIBLE_DEVICES")]))
"""

STEPS = {
    "default": "-N2 -n4",
    "one per node": "-N2 -n2",
    "several per node": "-N2 --ntasks-per-node=3 -m block",
    "cyclic": "-N2 -n6 --ntasks-per-node=3 -m cyclic",
    "cyclic, not evenly": "-N2 -n5 -m cyclic:block",
    "planes": "-N2 -n6 -m plane=2",
    "nodes in another order": "-w nv10,nv9 -N2 -n2",
    "one node": "-N1 -n3",
    "one per GPU": "-N2 -n4 --ntasks-per-node=2 --gpus-per-task=1",
    "one per GPU, otherwise": "-N2 -n4 --ntasks-per-node=2 --gpus-per-node=2 --gpu-bind=single:1",
}


def reports(slurm, *words):
    """What every task of a step computes: rank, its node, all addresses, its GPUs."""
    lines = slurm.run(*words, sys.executable, "-c", REPORT).splitlines()
    return sorted(json.loads(line) for line in lines)


@pytest.mark.parametrize("name", STEPS)
def test_every_task_finds_all_others(slurm, name):
    found = reports(slurm, "srun", *STEPS[name].split())
    assert len(found) > 1 and [rank for rank, *_ in found] == list(range(len(found)))
    hosts = [node for _, node, *_ in found]
    for _, _, addresses, gpus in found:
        assert addresses == found[0][2] and len(set(addresses)) == len(addresses)
        assert [address.partition(":")[0] for address in addresses] == hosts
        if "GPU" in name:
            assert gpus in ("0", "1")


@pytest.mark.parametrize("first, second", [("nv9", "nv10"), ("nv10", "nv9")])
def test_a_step_over_the_components_of_a_heterogeneous_job(slurm, first, second):
    program = shlex.join([sys.executable, "-c", REPORT])
    found = reports(
        slurm, "bash", "-c", f"srun -w {first} -n1 {program} : -w {second} -n2 {program}"
    )
    assert [(rank, node) for rank, node, *_ in found] == [(0, first), (1, second), (2, second)]
    for _, _, addresses, _ in found:
        assert [address.partition(":")[0] for address in addresses] == [first, second, second]


def test_steps_of_one_job_have_ports_of_their_own(slurm):
    both = "srun -n2 -N2 --overlap"
    lines = slurm.run("salloc", "-N2", "-n2", "bash", "-c", f"{both} $0 \"$@\"; {both} $0 \"$@\"",
                      sys.executable, "-c", REPORT).splitlines()  # fmt: skip
    ports = {json.loads(line)[2][0] for line in lines}
    assert len(lines) == 4 and len(ports) == 2


@pytest.mark.parametrize(
    "words, reason",
    [
        ("srun -N2 --ntasks-per-node=2 --gpus-per-node=2", "2 tasks share the 2 GPUs"),
        ("srun -n3 -m arbitrary -w nv10,nv9,nv10", "a task cannot know where the others are"),
    ],
)
def test_what_is_refused(slurm, words, reason):
    program = shlex.join([sys.executable, "-c", REPORT])
    shell = f"{words.format(program)} {program} 2>&1 || true"
    output = slurm.run("bash", "-c", shell)
    assert f"UserError: Slurm: {reason}" in output.replace("this step ", "").replace(
        "with the distribution 'arbitrary' ", ""
    )


def script(name, folder, *command):
    """The script of the documentation, with another command, on two nodes without GPUs."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    (text,) = re.findall(r"```sh\n(#!/bin/bash\n#SBATCH.*?)```", text, re.DOTALL)
    for old, new in (
        ("--nodes=3", "--nodes=2"),
        (" --gpus-per-node=8", ""),
        (
            "python train_keras.py --config celeba256 --data DIR --root /shared/runs --cont_training",
            shlex.join(map(str, command)),
        ),
    ):
        assert text.count(old) == 1, text
        text = text.replace(old, new)
    path = folder / f"{name}.sh"
    path.write_text(text)
    return [f"--output={folder}/{name}.out", path]


def training(name, recipe, folder, *flags):
    """The same for the recipe, in the folder of that name."""
    options = ["--config", recipe, "--root", folder / name, "--cont_training", "--batch_size", "50"]
    return script(name, folder, sys.executable, "-u", COMMAND, *options, *flags)


# Instead of a training: ends with 75 at SIGTERM, and with 0 if it was started again.
STANDS_IN = """
echo "starts $SLURM_RESTART_COUNT"
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
trap 'exit 75' TERM
sleep 100 & wait
"""


def test_a_job_whose_time_is_over_comes_back(slurm, tmp_path):
    job = slurm.submit("--time=2", *script("ends", tmp_path, "bash", "-c", STANDS_IN))
    slurm.wait(job, 60, JobState="COMPLETED", ExitCode="0:0", Restarts="1")
    lines = (tmp_path / "ends.out").read_text().splitlines()
    assert lines.count("starts ") == lines.count("starts 1") == 2


def test_a_cancelled_job_does_not_come_back(slurm, tmp_path):
    job = slurm.submit("--time=60", *script("cancelled", tmp_path, "bash", "-c", STANDS_IN))
    slurm.wait(job, 30, JobState="RUNNING")
    time.sleep(2)
    slurm.run("scancel", job)
    slurm.wait(job, 30, JobState="CANCELLED")
    time.sleep(10)  # twice what a job waits that is put back
    assert slurm.job(job)["JobState"] == "CANCELLED" and slurm.job(job)["Restarts"] == "0"


def test_two_jobs_on_the_same_nodes_and_one_is_preempted(slurm, recipe, tmp_path):
    """The preempted one saves a checkpoint, is put back into the queue, and finishes from there."""
    long = slurm.submit(*training("long", recipe, tmp_path, "--epochs", "14"))
    short = slurm.submit(*training("short", recipe, tmp_path, "--epochs", "2"))
    slurm.wait(short, 30, JobState="RUNNING")
    assert slurm.job(long)["JobState"] == "RUNNING"
    slurm.wait(short, 600, JobState="COMPLETED", ExitCode="0:0")
    output = (tmp_path / "short.out").read_text()
    assert "2 replicas in 2 processes" in output and "test: nelbo" in output

    while newest_step(tmp_path / "long" / "tiny") == 0:
        assert slurm.job(long)["JobState"] == "RUNNING", (tmp_path / "long.out").read_text()
        time.sleep(0.2)
    urgent = slurm.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"
    )
    slurm.wait(urgent, 90, JobState="COMPLETED")
    stopped = newest_step(tmp_path / "long" / "tiny")
    output = (tmp_path / "long.out").read_text()
    assert f"stopped by SIGTERM after step {stopped}:" in output and "test: nelbo" not in output
    slurm.wait(long, 600, JobState="COMPLETED", ExitCode="0:0", Restarts="1")
    output = (tmp_path / "long.out").read_text()
    assert f"continued from step {stopped}" in output and "test: nelbo" in output

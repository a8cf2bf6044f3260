"""Workers that do not join, join late, or are not alike: each says so, and stops."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow as tf
from event_files import scalars
from PIL import Image
from processes import (
    COMMAND,
    assert_all_finish,
    free_ports,
    newest_step,
    own_lines,
    start_workers,
)

import nvae_tf
from nvae_tf.cli import train
from nvae_tf.config import RECIPES, load
from nvae_tf.io.errors import UserError
from nvae_tf.io.lock import exclusive_lock
from nvae_tf.run_folder import RunFolder
from nvae_tf.training.cluster import Cluster, lost_workers

BUSY = Path(__file__).parent.parent / "busy_chief.py"
IMPATIENT = BUSY.with_name("impatient_worker.py")

SMALL = ("--epochs", "2", "--batch_size", "50")


def said(processes, root):
    """Exit status and own line of every worker."""
    statuses = [process.wait(timeout=120) for process in processes]
    lines = []
    for index in range(len(processes)):
        text = (root.parent / f"{root.name}-worker-{index}.log").read_text()
        assert "Traceback" not in text
        (line,) = [line for line in own_lines(text) if line.startswith("error")]
        lines.append(line)
    assert set(statuses) == {2}
    return lines


@pytest.mark.slow
def test_a_worker_that_joins_late(recipe, tmp_path):
    workers = start_workers(recipe, tmp_path / "runs", *SMALL, delay=10.0)
    assert_all_finish(workers, tmp_path / "runs")
    assert "waiting for worker 1" in (tmp_path / "runs-worker-0.log").read_text()


@pytest.mark.slow
def test_a_worker_that_never_joins(recipe, tmp_path):
    workers = start_workers(recipe, tmp_path / "runs", "--join_timeout", "4", count=3, delay=30.0)
    first, second, third = workers
    assert first.wait(timeout=25) == 2  # long before the second one starts
    for worker in (second, third):
        worker.kill()
        worker.wait()
    line = own_lines((tmp_path / "runs-worker-0.log").read_text())[-1]
    assert "did not join within 4 seconds" in line and "worker 1 (127.0.0.1:" in line


@pytest.mark.slow
def test_workers_with_different_configurations(recipe, tmp_path):
    own = (["--learning_rate", "0.01"], ["--learning_rate", "0.02"])
    lines = said(start_workers(recipe, tmp_path / "runs", *SMALL, own=own), tmp_path / "runs")
    for line, rate in zip(lines, ("0.01", "0.02"), strict=True):
        assert "another worker has another configuration" in line
        assert f"learning_rate is {rate} here" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_workers_of_different_versions(recipe, tmp_path):
    other = tmp_path / "other" / "nvae_tf"
    shutil.copytree(nvae_tf.__path__[0], other)
    shutil.copytree(RECIPES, tmp_path / "other" / "configs")
    (other / "version.py").write_text('__version__ = "0.0.1"\n')
    program = shutil.copy(COMMAND, tmp_path / "other")  # which imports what lies beside it
    workers = start_workers(recipe, tmp_path / "runs", *SMALL, program=program)
    lines = said(workers, tmp_path / "runs")
    for line, version in zip(lines, (nvae_tf.__version__, "0.0.1"), strict=True):
        assert "another worker has another version of nvae-tf" in line and version in line


REFUSALS = {
    "folder exists": "holds a run already",
    "another model": "num_channels_enc: 8 does not continue the run in",
    "locked": "another process is training here",
    "no data": "nothing-here",
    "wrong value, which it finds before it meets the others": "batch_size",
}


@pytest.mark.slow
@pytest.mark.parametrize("why", REFUSALS)
def test_a_chief_that_refuses_says_why_on_all_workers(recipe, tmp_path, photographs, why):
    roots = [tmp_path / "runs", tmp_path / "other"]
    more, own = [*SMALL], [["--root", root] for root in roots]
    chief = RunFolder(roots[0] / "tiny")
    if why in ("folder exists", "another model"):
        chief.create(load(str(recipe)))
    if why == "another model":
        more += ["--num_channels_enc", "8", "--num_channels_dec", "8"]
    if why == "no data":
        images = tmp_path / "images"
        images.mkdir()
        for number, image in enumerate(photographs):
            Image.fromarray(image).save(images / f"{number}.png")
        more += ["--dataset", "images", "--image_size", "32", "--num_mixture_dec", "2"]
        own[0] += ["--data", tmp_path / "nothing-here"]
        own[1] += ["--data", images]
    if why.startswith("wrong value"):
        own[0] += ["--batch_size", "0"]
    locked = exclusive_lock(chief.path, "training") if why == "locked" else contextlib.nullcontext()
    with locked:
        workers = start_workers(recipe, roots[0], *more, own=own, resume=why != "folder exists")
        first, second = said(workers, roots[0])
    assert REFUSALS[why] in first and "refused" not in first
    assert re.match(r"error: worker 0( \(127\.0\.0\.1:\d+\))? refused: ", second)
    assert second.endswith(first.removeprefix("error: "))
    assert not roots[1].exists()


@pytest.mark.slow
def test_a_root_that_is_not_shared(recipe, tmp_path):
    """A first start warns, since the chief alone writes; a restart is refused."""
    roots = [tmp_path / "runs", tmp_path / "other"]
    own = [["--root", root] for root in roots]
    options = ("--batch_size", "50", "--eval_every", "9", "--images_every", "9")
    workers = start_workers(
        recipe, roots[0], *options, "--epochs", "1", own=own, program=IMPATIENT, resume=False
    )
    assert_all_finish(workers, roots[0])
    for index in range(2):
        lines = (tmp_path / f"runs-worker-{index}.log").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("warning")]
        assert f"worker 1 does not see the chief's {roots[index] / 'tiny'}: this training" in line
        (tmp_path / f"runs-worker-{index}.log").unlink()
    assert newest_step(roots[0] / "tiny") == 14 and not roots[1].exists()
    assert not list((roots[0] / "tiny").glob(".seen*"))
    workers = start_workers(recipe, roots[0], *options, "--epochs", "2", own=own, program=IMPATIENT)
    first, second = said(workers, roots[0])
    reason = f"{roots[1] / 'tiny' / 'checkpoints' / 'step-14'} cannot be seen on worker 1"
    assert first.startswith(f"error: worker 1 refused: {reason}")
    assert second.startswith(f"error: {reason}")
    assert newest_step(roots[0] / "tiny") == 14 and not roots[1].exists()


@pytest.mark.slow
def test_a_checkpoint_that_another_worker_sees_later(run, recipe, tmp_path):
    """As where NFS keeps what it knows of a folder."""
    roots = [tmp_path / "runs", tmp_path / "other"]
    shutil.copytree(run, roots[0] / "tiny")
    workers = start_workers(
        recipe, roots[0], "--batch_size", "50", "--epochs", "4", own=[["--root", r] for r in roots]
    )
    log = tmp_path / "runs-worker-1.log"
    while "looking for" not in log.read_text():
        assert workers[1].poll() is None
        time.sleep(0.1)
    shutil.copytree(roots[0] / "tiny", roots[1] / "tiny")  # with the chief's mark
    assert_all_finish(workers, roots[0])
    assert "continued from step 42" in (tmp_path / "runs-worker-0.log").read_text()
    assert "warning" not in log.read_text()
    assert newest_step(roots[0] / "tiny") == 56


def resources(process):
    """Threads, resident memory in MiB, and open files of a process."""
    folder = Path(f"/proc/{process.pid}")
    text = (folder / "status").read_text()
    found = dict(re.findall(r"^(Threads|VmRSS):\s+(\d+)", text, re.MULTILINE))
    return int(found["Threads"]), int(found["VmRSS"]) / 1024, len(list((folder / "fd").iterdir()))


@pytest.mark.slow
def test_two_workers_for_hundreds_of_steps(recipe, tmp_path):
    log = tmp_path / "runs-worker-0.log"
    steps = ("--epochs", "17", "--batch_size", "16")  # 44 steps per epoch
    workers = start_workers(recipe, tmp_path / "runs", *steps, "--images_every", "17")
    measured = {}  # by the epochs done
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.2)
        epochs = log.read_text().count("validation nelbo") if log.exists() else 0
        with contextlib.suppress(OSError, KeyError):  # a worker has just ended
            measured.setdefault(epochs, [resources(worker) for worker in workers])
    assert_all_finish(workers, tmp_path / "runs")
    assert newest_step(tmp_path / "runs" / "tiny") == 17 * 44
    assert len(scalars(tmp_path / "runs" / "tiny" / "logs" / "train")["elbo/loss"]) >= 17 * 10
    for worker in range(2):
        rows = [measured[epoch][worker] for epoch in (3, 9, 15)]
        threads, memory, files = zip(*rows, strict=True)
        assert max(threads) < 200 and max(threads) - min(threads) < 20, threads
        assert memory[2] - memory[1] < 30, memory
        assert max(files) < 100 and max(files) - min(files) < 10, files


@pytest.mark.slow
def test_a_chief_that_is_busy_for_long(recipe, tmp_path):
    hosts = [f"127.0.0.1:{port}" for port in free_ports(2)]
    workers = []
    for index, (program, own) in enumerate(((BUSY, ("90",)), (COMMAND, ()))):
        cluster = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
        with open(tmp_path / f"runs-worker-{index}.log", "w") as log:
            command = [sys.executable, "-u", program, *own, "--config", recipe, *SMALL]
            workers.append(
                subprocess.Popen(
                    [*map(str, command), "--root", str(tmp_path / "runs"), "--images_every", "1"],
                    stdout=log, stderr=log, env={**os.environ, "TF_CONFIG": json.dumps(cluster)},
                )
            )  # fmt: skip
    assert_all_finish(workers, tmp_path / "runs")
    assert "busy for 90 s after step 14" in (tmp_path / "runs-worker-0.log").read_text()


def test_only_a_lost_worker_is_called_one():
    both = Cluster(tf.distribute.get_strategy(), worker=0, num_workers=2)
    for kind in (tf.errors.ResourceExhaustedError, tf.errors.InvalidArgumentError):
        with pytest.raises(kind), lost_workers(both):
            raise kind(None, None, "OOM when allocating tensor")
    for kind in (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.InternalError):
        with pytest.raises(UserError, match="another worker"), lost_workers(both):
            raise kind(None, None, "Connection reset by peer")
        with pytest.raises(kind), lost_workers(both._replace(num_workers=1)):
            raise kind(None, None, "Connection reset by peer")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": [], "index": 0}}',
     '{"cluster": 7}', '{"cluster": {"worker": [1, 2]}}',
     '{"cluster": {"worker": ["a:1", "b:2"]}, "task": []}',
     '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"index": 7}}', '{"cluster": {"ps": ["a:1"]}}',
     '{"cluster": {"worker": ["a:1", "b:2"]}, "task": 7}', "[" * 100_000,
     '{"cluster": {"worker": ["a", "b:x"]}, "task": {"index": 0}}',
     '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"index": 1e400}}'],
)  # fmt: skip
def test_a_malformed_cluster(recipe, tmp_path, monkeypatch, capsys, text):
    monkeypatch.setenv("TF_CONFIG", text)
    assert train.main(["--config", str(recipe), "--root", str(tmp_path)]) == 2
    (line,) = own_lines(capsys.readouterr().err)
    assert "TF_CONFIG" in line


def test_a_port_that_is_taken(recipe, tmp_path, monkeypatch, capsys):
    with socket.create_server(("", 0)) as taken:
        hosts = [f"127.0.0.1:{taken.getsockname()[1]}", "127.0.0.1:1"]
        cluster = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": 0}}
        monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
        assert train.main(["--config", str(recipe), "--root", str(tmp_path)]) == 2
    (line,) = own_lines(capsys.readouterr().err)
    assert "cannot listen there" in line

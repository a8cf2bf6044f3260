"""Disks that are full, and folders that go away or may not be written."""

import contextlib
import os
import resource
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from processes import COMMAND, own_lines, start

from nvae_tf.cli import evaluate, prepare, train

IN_A_SMALL_DISK = """
mount -t tmpfs -o size={size} tmpfs {disk} && cp -a {source} {disk}/ || exit 99
{command}
status=$?
cp -a {disk} {copy}
exit $status
"""


@contextlib.contextmanager
def largest_file(size):
    """Within the block no file may grow larger, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_one_line(capsys, *parts):
    (line,) = own_lines(capsys.readouterr().err)
    for part in ("cannot be written", "free space", *parts):
        assert part in line, line


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training(run, recipe, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "tiny")
    before = files(tmp_path / "tiny" / "checkpoints")
    arguments = ["--config", recipe, "--root", tmp_path, "--cont_training", "--epochs", "4"]
    with largest_file(100_000):
        assert train.main([str(word) for word in arguments]) == 2
    assert_one_line(capsys, "checkpoints")
    assert files(tmp_path / "tiny" / "checkpoints") == before
    assert train.main([str(word) for word in arguments]) == 0  # with room again


@pytest.mark.parametrize(
    ("mode", "flags", "limit"),
    [
        ("sample", ["--num_samples", "4"], 1_000),
        pytest.param(
            "sample", ["--num_samples", "4", "--format", "png"], 300, marks=pytest.mark.slow
        ),
        pytest.param(
            "sample", ["--num_samples", "40", "--format", "npz"], 15_000, marks=pytest.mark.slow
        ),
        ("evaluate", ["--num_iw_samples", "1"], 100),
        pytest.param(
            "ood", ["--num_iw_samples", "1", "--max_images", "10"], 100, marks=pytest.mark.slow
        ),
        pytest.param("encode", [], 50_000, marks=pytest.mark.slow),
        ("export", [], 50_000),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_disk_that_fills_up_while_evaluating(run, tmp_path, capsys, mode, flags, limit):
    output = tmp_path / "output"
    arguments = ["--checkpoint", run, "--eval_mode", mode, "--output", output, *flags]
    with largest_file(limit):
        assert evaluate.main([str(word) for word in arguments]) == 2
    assert_one_line(capsys, str(output))
    left = [path.name for path in output.rglob("*")]
    assert left in ([], ["samples_1.png"])  # which is whole, and came first


def test_a_disk_that_fills_up_while_preparing(tmp_path, photographs, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(photographs):
        Image.fromarray(image).save(folder / f"{number}.png")
    arguments = ["images", "--input", folder, "--size", "32", "--output"]
    arguments = [str(word) for word in arguments]
    with largest_file(100_000):
        assert prepare.main([*arguments, str(tmp_path / "out")]) == 2
    assert_one_line(capsys, "tfrecords")
    left = [name for name in files(tmp_path / "out") if name.endswith((".tfrecords", ".part"))]
    # This shard is small: it may be complete, and then is whole, before the other one fails.
    assert left in ([], ["validation/validation-r05-s-0000-of-0001.tfrecords"])
    assert prepare.main([*arguments, str(tmp_path / "out")]) == 0
    assert prepare.main([*arguments, str(tmp_path / "other")]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "other")


@pytest.mark.slow
def test_a_run_and_its_results_are_for_whom_the_users_umask_says(recipe, tmp_path):
    before = os.umask(0o077)
    try:
        arguments = ["--config", recipe, "--root", tmp_path / "runs", "--epochs", 2]
        assert train.main([str(word) for word in arguments]) == 0
        for mode, *flags in (["sample", "--num_samples", 4, "--format", "png"], ["encode"]):
            arguments = ["--checkpoint", tmp_path / "runs" / "tiny", "--eval_mode", mode]
            arguments += ["--output", tmp_path / "runs" / "results", *flags]
            assert evaluate.main([str(word) for word in arguments]) == 0
    finally:
        os.umask(before)
    written = list((tmp_path / "runs").rglob("*"))
    assert any(path.suffix == ".index" for path in written)
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="file systems cannot be mounted here")
@pytest.mark.parametrize("room", [20, 150, 400])  # kilobytes beyond what is there
def test_a_small_file_system_that_fills_up_while_training(run, recipe, tmp_path, room):
    size = sum(path.stat().st_size + 8192 for path in run.rglob("*")) // 1024 + room
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    command = f"{sys.executable} {COMMAND} --config {recipe} --root {disk} --cont_training"
    command += " --epochs 9 --log_every 1 --save_every 5"
    names = dict(size=f"{size}k", disk=disk, source=run, copy=copy, command=command)
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", IN_A_SMALL_DISK.format(**names)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr[-1000:]
    (line,) = own_lines(result.stderr)
    assert "o space left" in line and str(disk) in line
    left = copy / "tiny" / "checkpoints"
    assert not list(left.glob(".*"))
    assert train.main(["--config", str(recipe), "--root", str(copy), "--cont_training"]) == 0
    for path in left.glob("step-*"):
        reader = tf.train.load_checkpoint(str(path / "state"))
        for name in reader.get_variable_to_shape_map():
            assert np.size(reader.get_tensor(name)) > 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="file systems cannot be mounted here")
def test_a_folder_that_may_not_be_written(run, recipe, tmp_path):
    shutil.copytree(run, tmp_path / "tiny")
    before = files(tmp_path / "tiny")
    read_only = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path} && "
    for command in (
        f"{COMMAND} --config {recipe} --root {tmp_path} --cont_training --epochs 4",
        f"{COMMAND.parent / 'evaluate_keras.py'} --checkpoint {tmp_path / 'tiny'} --eval_mode sample",
    ):
        result = subprocess.run(
            ["unshare", "-rm", "sh", "-c", f"{read_only} {sys.executable} {command}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 2
        (line,) = own_lines(result.stderr)
        assert "cannot be written (Read-only file system)" in line
    assert files(tmp_path / "tiny") == before


@pytest.mark.slow
def test_a_folder_that_is_removed_while_training(recipe, tmp_path):
    process = start(recipe, tmp_path, "--save_every", "3", log=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("run:"):
            shutil.rmtree(tmp_path / "tiny")
            break
    _, errors = process.communicate()
    assert process.returncode == 2
    (line,) = own_lines(errors)
    assert "cannot be written (No such file or directory)" in line

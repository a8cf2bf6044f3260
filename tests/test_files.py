"""Files and folders: whole at every moment, and with the permissions that the user asked for."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nvae_tf import config
from nvae_tf.cli import prepare
from nvae_tf.data import catalog
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import (
    atomic_write,
    atomic_write_dir,
    check_writable,
    make_folder,
    read_json,
    temporary_folder,
    write_png,
    write_text,
)
from nvae_tf.io.lock import exclusive_lock
from nvae_tf.model import NVAE
from nvae_tf.run_folder import RunFolder
from nvae_tf.training.checkpoints import CheckpointManager
from nvae_tf.training.optimizers import Adamax
from nvae_tf.training.trainer import Trainer

# Replaces a folder and kills itself just before the system call of that number.
KILLED = """
import os, signal, sys
from pathlib import Path
from nvae_tf.io.files import atomic_write_dir
path, moment, exchanges = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchanges"
calls, counting = 0, False
def watch(event, arguments):
    global calls
    if event == "ctypes.dlsym" and arguments[1] == "renameat2" and not exchanges:
        raise AttributeError  # as on a system that has no such call
    if counting and event in ("os.rename", "os.rmdir", "os.remove", "shutil.rmtree", "ctypes.dlsym"):
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
with atomic_write_dir(path) as temporary:
    for number in range(2):
        (temporary / str(number)).write_text("new")
    sys.addaudithook(watch)
    counting = True
"""


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD, NEW = {"0": "old", "1": "old"}, {"0": "new", "1": "new"}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "results"
    path.mkdir()
    for name, text in OLD.items():
        (path / name).write_text(text)
    return path


def killed_at_every_moment(folder, exchanges):
    """Yields after each kill; what the killed process left is the next one's start."""
    for moment in range(1, 100):
        arguments = [folder, moment, exchanges]
        process = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=False)
        if process.returncode == 0:
            assert moment > 3  # or nothing was tried
            return
        assert process.returncode == -9
        yield
        for name, text in OLD.items():
            (folder / name).write_text(text)
    raise AssertionError("it never came to its end")


def test_a_folder_that_is_replaced_is_there_at_every_moment(folder):
    seen = []
    for _ in killed_at_every_moment(folder, "exchanges"):
        seen.append(content(folder))
    assert OLD in seen and NEW in seen and all(texts in (OLD, NEW) for texts in seen)


def test_where_folders_cannot_be_exchanged_nothing_is_lost_and_the_next_start_mends(folder):
    gaps = 0
    for _ in killed_at_every_moment(folder, "one by one"):
        if not folder.exists():
            gaps += 1
            left = [content(path) for path in folder.parent.iterdir()]
            assert OLD in left and NEW in left
            with pytest.raises(RuntimeError), atomic_write_dir(folder):
                raise RuntimeError("the next command fails, too")
        assert content(folder) in (OLD, NEW)
    assert gaps == 1
    assert content(folder) == NEW


def trainer_and_folder(recipe, path):
    """A trainer of the recipe's model, and the folder of a run without checkpoints."""
    loaded = config.load(str(recipe))
    model = NVAE(loaded.model, catalog.get_dataset_info(loaded.data).image)
    folder = RunFolder(path)
    folder.checkpoints.mkdir()
    return Trainer(model, loaded.train, total_steps=99, optimizer=Adamax()), folder


def test_a_checkpoint_that_a_killed_process_moved_aside_is_continued_from(recipe, tmp_path):
    trainer, folder = trainer_and_folder(recipe, tmp_path)
    checkpoints = CheckpointManager(folder, trainer, keep=2)
    trainer.optimizer.iterations.assign(7)
    path = checkpoints.save()
    aside = path.with_name(".step-7.4567cdef.old.part")

    def leave_both_aside():
        shutil.copytree(path, path.with_name(".step-7.0123abcd.part"))
        path.rename(aside)

    leave_both_aside()
    trainer.optimizer.iterations.assign(0)
    assert checkpoints.restore() == 7 and not aside.exists()
    shutil.rmtree(path.with_name(".step-7.0123abcd.part"))
    leave_both_aside()
    trainer.optimizer.iterations.assign(8)
    checkpoints.save()
    assert {each.name for each in folder.checkpoints.iterdir()} == {"step-7", "step-8"}


def test_a_damaged_newer_checkpoint_does_not_count_among_those_that_are_kept(recipe, tmp_path):
    trainer, folder = trainer_and_folder(recipe, tmp_path)
    for step in (10, 20, 30):
        trainer.optimizer.iterations.assign(step)
        CheckpointManager(folder, trainer, keep=3).save()
    damaged = folder.checkpoints / "step-30" / "state.index"
    damaged.write_bytes(damaged.read_bytes()[:10])
    checkpoints = CheckpointManager(folder, trainer, keep=1)
    assert checkpoints.restore() == 20
    trainer.optimizer.iterations.assign(25)
    checkpoints.save()
    assert {each.name for each in folder.checkpoints.iterdir()} == {"step-25", "step-30"}


def test_a_folder_that_cannot_take_the_name_leaves_the_old_one(folder):
    with pytest.raises(RuntimeError), atomic_write_dir(folder) as temporary:
        (temporary / "0").write_text("half of it")
        raise RuntimeError
    assert content(folder) == OLD and list(folder.parent.iterdir()) == [folder]
    file = folder / "0"
    with pytest.raises(UserError, match="0: cannot be written") as caught, atomic_write_dir(file):
        pass
    assert "\n" not in str(caught.value) and file.read_text() == "old"
    with atomic_write_dir(folder) as temporary:
        (temporary / "0").write_text("new")
    assert content(folder) == {"0": "new"} and list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("mask", [0o077, 0o002, 0o027])
def test_everything_written_has_the_permissions_of_the_users_umask(mask, tmp_path, photographs):
    with umask(mask):
        make_folder(tmp_path / "written" / "deeper")
        with atomic_write(tmp_path / "written" / "file") as temporary:
            assert permissions(temporary) == 0o666 & ~mask  # while it is written, too
            temporary.write_text("text")
        with atomic_write_dir(tmp_path / "written" / "folder") as temporary:
            assert permissions(temporary) == 0o777 & ~mask
            write_png(temporary / "image.png", photographs[0])
        with temporary_folder(tmp_path / "written" / "next") as temporary:
            temporary.rename(tmp_path / "written" / "kept")
        images = tmp_path / "images"
        make_folder(images)
        for number, image in enumerate(photographs[:8]):
            write_png(images / f"{number}.png", image)
        out = tmp_path / "written" / "tfrecords"
        arguments = ["images", "--input", images, "--output", out, "--size", 32]
        arguments += ["--validation", 0.5]
        assert prepare.main([str(word) for word in arguments]) == 0
    paths = list((tmp_path / "written").rglob("*"))
    assert len(paths) > 9
    for path in paths:
        assert permissions(path) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_file_that_is_replaced_takes_new_permissions_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o600)
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and permissions(path) == 0o600
    with umask(0o022), atomic_write(path) as temporary:
        np.save(temporary.open("wb"), np.zeros(3))
    assert permissions(path) == 0o644 and list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_not_replaced_and_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        (tmp_path / f"link to {name}").symlink_to(name)
    before = {path: os.lstat(path)[:2] for path in tmp_path.iterdir()}
    for path in (*before, Path("/"), Path()):
        kind = "is a folder" if path.is_dir() else "a device or a pipe"
        for write in (check_writable, lambda path: write_text(path, "new")):
            with pytest.raises(UserError, match=f"{path.name}: {kind}"):
                write(path)
        with pytest.raises(UserError, match="not readable as JSON"):  # and does not wait for ever
            read_json(path)
    with pytest.raises(UserError, match="/dev/new: a device or a pipe"):
        check_writable(Path("/dev/new"))
    assert {path: os.lstat(path)[:2] for path in tmp_path.iterdir()} == before


def test_a_link_to_a_file_is_replaced_itself(tmp_path):
    (tmp_path / "elsewhere").write_text("old")
    (tmp_path / "link").symlink_to("elsewhere")
    write_text(tmp_path / "link", "new")
    assert content(tmp_path) == {"elsewhere": "old", "link": "new"}
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive_lock(tmp_path / "folder", "training"):
        (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'folder'}: the file system has no locks (")
    assert "another process from training here" in line


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_not_a_file_of_its_own_is_one_line(kind, tmp_path):
    mine, folder = tmp_path / "mine", tmp_path / "run"
    mine.write_text("kept")
    folder.mkdir()
    (folder / ".lock").symlink_to(mine) if kind == "link" else os.mkfifo(folder / ".lock")
    with pytest.raises(UserError, match=r"\.lock: ") as error, exclusive_lock(folder, "training"):
        pass
    assert "\n" not in str(error.value) and mine.read_text() == "kept"


def test_a_locked_folder_is_refused_and_its_lock_file_stays_the_same(tmp_path):
    folder = tmp_path / "new" / "folder"
    with exclusive_lock(folder, "drawing"):
        first = (folder / ".lock").stat().st_ino
        with (
            pytest.raises(UserError, match="folder: another process is drawing here"),
            exclusive_lock(folder, "drawing"),
        ):
            pass
    with pytest.raises(RuntimeError), exclusive_lock(folder, "drawing"):
        raise RuntimeError
    with exclusive_lock(folder, "drawing"):
        assert (folder / ".lock").stat().st_ino == first
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="file: cannot be written"),
        exclusive_lock(tmp_path / "file", "drawing"),
    ):
        pass

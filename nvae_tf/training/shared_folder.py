"""Checks whether all workers see the folder to which the chief writes.

A first start needs no shared folder, since only the chief writes and nobody reads. To continue a run,
one is needed, because every worker restores the checkpoint itself.
"""

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from nvae_tf.io.errors import UserError
from nvae_tf.io.files import write_text
from nvae_tf.run_folder import RunFolder
from nvae_tf.training.cluster import Cluster

# Shared file systems show the files of other machines with a delay: by default NFS caches the contents
# of a folder for up to a minute.
MARK_SECONDS = 60.0
CHECKPOINT_SECONDS = 120.0
LOOK_AGAIN_SECONDS = 1.0

# The beginning of the name of a file that the chief writes for the others to find.
_MARK = ".seen-by-all-"


def compare_folders(folder: RunFolder, cluster: Cluster) -> None:
    """Waits until every worker sees the newest checkpoint that any of them sees.

    All workers have to call this at the same time. If a worker does not see the chief's folder, but no
    checkpoint is missing there, all workers print a warning.

    Args:
        folder: The run's folder, which is the chief's.
        cluster: The workers.

    Raises:
        UserError: A worker does not see the checkpoint, even after two minutes.
    """
    if cluster.num_workers == 1:
        return
    token = secrets.randbits(62)
    with cluster.agreement():
        if cluster.is_chief:
            _remove_marks(folder)
            write_text(folder.path / f"{_MARK}{token:016x}", "")
    tokens, steps = zip(*cluster.gather_from_workers([token, _newest_step(folder)]), strict=True)
    name, newest = f"{_MARK}{tokens[0]:016x}", max(steps)
    try:
        with cluster.agreement():
            checkpoint = folder.checkpoints / f"step-{newest}"
            if not _look(lambda: _newest_step(folder) >= newest, checkpoint, CHECKPOINT_SECONDS):
                raise UserError(
                    f"{checkpoint} cannot be seen on worker {cluster.worker}, though on another "
                    "one: all workers need the same --root, on a file system that they share"
                )
        marked = _look(lambda: name in _names(folder), folder.path / name, MARK_SECONDS)
        seen = [bool(seen) for (seen,) in cluster.gather_from_workers([int(marked)])]
    finally:
        if cluster.is_chief:
            _remove_marks(folder)
    if not all(seen):
        without = ", ".join(str(number) for number, sees in enumerate(seen) if not sees)
        print(
            f"warning: worker {without} does not see the chief's {folder.path}: this training can only "
            "be continued if all workers have the same --root, on a file system that they share",
            flush=True,
        )


def _newest_step(folder: RunFolder) -> int:
    """The step of the newest checkpoint that this process sees, or 0."""
    return max((int(path.name[5:]) for path in folder.list_checkpoints()), default=0)


def _names(folder: RunFolder) -> list[str]:
    try:
        return os.listdir(folder.path)  # which asks an NFS server sooner than a file's name does
    except OSError:
        return []


def _remove_marks(folder: RunFolder) -> None:
    """Removes the marks of this chief, and of an earlier one that was killed."""
    for left in folder.path.glob(f"{_MARK}*"):
        left.unlink(missing_ok=True)


def _look(seen: Callable[[], bool], path: Path, seconds: float) -> bool:
    """Polls for a file of another worker, for up to `seconds`; returns whether it was seen."""
    end = time.monotonic() + seconds
    told = False
    while not seen():
        if time.monotonic() >= end:
            return False
        if not told:
            print(f"looking for {path}, for up to {seconds:g} seconds", flush=True)
            told = True
        time.sleep(LOOK_AGAIN_SECONDS)
    return True

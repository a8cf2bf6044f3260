"""Checkpoints: everything that training changes, saved and restored, each a folder of its own."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from nvae_tf.errors import ConfigError, UserError, reason
from nvae_tf.files import cannot_write, replacing_folder
from nvae_tf.run_folder import RunFolder

NAME = "state"  # of TensorFlow's files in a checkpoint's folder
PARTIAL = ".step-*.part"


class Checkpoints:
    """Saves and restores everything that training changes.

    A checkpoint is written under a temporary name and renamed when it is complete, so that a process
    that is killed at any moment leaves the older ones, and nothing that looks like a newer one.

    Args:
        folder: of the run.
        trainer: whose model, optimiser, singular vectors and counters are kept.
        keep: newest checkpoints that are kept.
        save_every: steps (``"500"``) or minutes (``"10m"``) between checkpoints.
        images_per_step: of all replicas; a run continues with as many only.
    """

    def __init__(
        self,
        folder: RunFolder,
        trainer,
        keep: int,
        save_every: str = "10m",
        images_per_step: int = 0,
    ):
        self.folder, self.keep, self._trainer = folder, keep, trainer
        self._iterations = trainer.optimizer.iterations
        minutes = save_every.endswith("m")
        self._every_steps = None if minutes else int(save_every)
        self._every_seconds = 60.0 * int(save_every[:-1]) if minutes else 0.0
        self._saved_at = time.monotonic()
        self._images_per_step = tf.Variable(images_per_step, dtype=tf.int64, trainable=False)
        self._expected = images_per_step
        self._newest: Path | None = None  # that holds the present state
        self._checkpoint = tf.train.Checkpoint(
            trainer=trainer, images_per_step=self._images_per_step
        )

    def due(self, step: int) -> bool:
        """Whether the time or the step for a checkpoint has come."""
        if self._every_steps:
            return step % self._every_steps == 0
        return time.monotonic() - self._saved_at >= self._every_seconds

    def save(self) -> Path:
        """Writes a checkpoint, named by the step; brings the model up to date for it.

        Raises:
            UserError: it cannot be written; the older ones are intact.
        """
        self._trainer.scatter()
        self._saved_at = time.monotonic()
        parent = self.folder.checkpoints
        path = parent / f"step-{int(self._iterations.numpy())}"
        try:
            for left_behind in parent.glob(PARTIAL):  # by a process that was killed
                shutil.rmtree(left_behind)
            if path == self._newest:  # a run that was complete
                return path
            with replacing_folder(path) as temporary:  # if it exists, `restore` found it damaged
                self._checkpoint.write(str(temporary / NAME))
            self._newest = path
            for old in self.folder.list_checkpoints()[self.keep :]:
                # Renamed first: an interrupted removal must not leave half a checkpoint.
                shutil.rmtree(old.rename(parent / f".{old.name}.part"))
        except (tf.errors.OpError, OSError) as error:
            raise cannot_write(parent, error) from None
        return path

    def restore(self) -> int:
        """Restores the newest checkpoint that is whole, if there is one.

        Returns:
            The steps taken so far.

        Raises:
            UserError: all are damaged, or they are of another model.
            ConfigError: the run had another number of images per step.
        """
        paths = self.folder.list_checkpoints()
        if paths:
            self._newest = newest_whole(
                paths, lambda prefix: self._checkpoint.read(prefix).assert_consumed()
            )
            before = int(self._images_per_step.numpy())
            if before not in (0, self._expected):  # 0: imported, not trained here
                raise ConfigError(
                    f"batch_size: {self.folder.path} was trained with {before} images per step, and "
                    f"batch_size x replicas x accumulate_steps is {self._expected} now; choose them "
                    "so that the product stays"
                )
            self._trainer.gather()
        return int(self._iterations.numpy())


def newest_whole(paths: list[Path], restore: Callable[[str], None]) -> Path:
    """Restores the first checkpoint that is not damaged, and reports those that are.

    Args:
        paths: folders of checkpoints, newest first.
        restore: restores from a prefix of TensorFlow's files, and raises what it likes.

    Returns:
        The one restored.

    Raises:
        UserError: none can be restored.
    """
    for path in paths:
        try:
            restore(str(path / NAME))
            return path
        except Exception as error:  # noqa: BLE001 - a damaged file raises what it likes
            if path is paths[-1]:
                raise UserError(
                    f"{path}: this checkpoint cannot be restored, nor can a newer one ({reason(error)})"
                ) from None
            print(f"warning: {path}: damaged, the one before it is used ({reason(error)})")
    raise UserError("no checkpoint")

"""Saves and restores everything that training changes; each checkpoint is a separate folder."""

import shutil
import time
import zlib
from pathlib import Path

import tensorflow as tf

from nvae_tf.checkpoint_files import check_rows, has_part, restore_newest
from nvae_tf.io.errors import ConfigError
from nvae_tf.io.files import atomic_write_dir, put_back, write_error
from nvae_tf.run_folder import CHECKPOINT_PREFIX, RunFolder

PARTIAL = ".step-*.part"
OPTIONAL = ("averages", "norm_bound")  # of a trainer's attributes


class CheckpointManager:
    """Saves and restores everything that training changes.

    A checkpoint is written under a temporary name and renamed when it is complete. So a process that is
    killed at any moment leaves the older checkpoints intact, and no incomplete one under a final name.

    Args:
        folder: Folder of the run.
        trainer: The `Trainer` whose model, optimiser, singular vectors and counters are saved.
        keep: Number of checkpoints to keep, the newest ones.
        save_every: Steps (``"500"``) or minutes (``"10m"``) between checkpoints.
        images_per_step: Number of images in a step, over all replicas. A run can only be continued with
            the same number.
        num_images: Number of training images, on which epochs and schedules depend. A run can only be
            continued with the same number; 0: it is not known.
    """

    def __init__(
        self,
        folder: RunFolder,
        trainer,
        keep: int,
        save_every: str = "10m",
        images_per_step: int = 0,
        num_images: int = 0,
    ):
        self.folder, self.keep, self.trainer = folder, keep, trainer
        self._iterations = trainer.optimizer.iterations
        minutes = save_every.endswith("m")
        self._every_steps = None if minutes else int(save_every)
        self._every_seconds = 60.0 * int(save_every[:-1]) if minutes else 0.0
        self._saved_at = time.monotonic()
        self._images_per_step = tf.Variable(images_per_step, dtype=tf.int64, trainable=False)
        self._expected_images_per_step = images_per_step
        self._num_images = tf.Variable(num_images, dtype=tf.int64, trainable=False)
        self._expected_num_images = num_images
        self._newest: Path | None = None  # the checkpoint that holds the present state

    def due(self, step: int, count: int = 1) -> bool:
        """Whether a checkpoint is due after the latest `count` steps, by steps or by minutes."""
        if self._every_steps:
            return step % self._every_steps < count
        return time.monotonic() - self._saved_at >= self._every_seconds

    def save(self, again: bool = False) -> Path:
        """Writes a checkpoint, named after the step, and removes the oldest ones.

        Callers have to make sure that training has not diverged.

        Args:
            again: Whether to replace a checkpoint of this step, because weights were changed since.

        Returns:
            The folder of the checkpoint.

        Raises:
            UserError: The checkpoint cannot be written; the older ones are intact.
        """
        self._saved_at = time.monotonic()
        parent = self.folder.checkpoints
        path = parent / f"step-{int(self._iterations.numpy())}"
        put_back(parent)
        try:
            for leftover in parent.glob(PARTIAL):  # left by a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)  # another process may be reading it
            if path == self._newest and not again:  # this state is saved already
                return path
            # An existing folder of this name was found damaged by `restore`.
            with atomic_write_dir(path) as temporary:
                self._parts().write(str(temporary / CHECKPOINT_PREFIX))
            self._newest = path
            paths = self.folder.list_checkpoints()
            for old in paths[paths.index(path) :][self.keep :]:  # newer ones were found damaged
                # Renamed first: an interrupted removal must not leave half a checkpoint.
                shutil.rmtree(old.rename(parent / f".{old.name}.part"), ignore_errors=True)
        except (tf.errors.OpError, OSError) as error:
            raise write_error(parent, error) from None
        return path

    def restore(self) -> int:
        """Restores the newest undamaged checkpoint, if there is one.

        Returns:
            Number of steps taken so far.

        Raises:
            UserError: All checkpoints are damaged or belong to another model, or the folder cannot be
                written.
            ConfigError: The run had another number of images per step, or of training images.
        """
        put_back(self.folder.checkpoints)
        paths = self.folder.list_checkpoints()
        if paths:
            self._newest = restore_newest(paths, self._read)
            before, expected = int(self._images_per_step.numpy()), self._expected_images_per_step
            if before not in (0, expected):  # 0: imported, not trained here
                raise ConfigError(
                    f"batch_size: {self.folder.path} was trained with {before} images per step, and "
                    f"batch_size x replicas x accumulate_steps is {expected} now; choose them "
                    "so that the product stays"
                )
            self._images_per_step.assign(expected)
            before, expected = int(self._num_images.numpy()), self._expected_num_images
            if before not in (0, expected):
                raise ConfigError(
                    f"data: {self.folder.path} was trained on {before} images, and there are now "
                    f"{expected}, with which epochs and schedules would differ; restore the images, or "
                    "begin another run with --init_from"
                )
            self._num_images.assign(expected)
            if self.trainer.averages and not has_part(self._newest / CHECKPOINT_PREFIX, "averages"):
                self.trainer.averages.start()
            self.trainer.forget_bad_steps()
        return int(self._iterations.numpy())

    @property
    def checksum(self) -> int:
        """Checksum of the checkpoint that was restored or saved last; 0 if there is none."""
        if self._newest is None:
            return 0
        # The index holds a checksum of every value.
        return zlib.crc32((self._newest / f"{CHECKPOINT_PREFIX}.index").read_bytes())

    def _parts(self, without: tuple[str, ...] = ()) -> tf.train.Checkpoint:
        """What a checkpoint holds.

        Args:
            without: Names of the trainer's attributes to leave out.
        """
        children = tf.train.TrackableView(self.trainer).children(self.trainer)
        trainer = {name: part for name, part in children.items() if name not in without}
        return tf.train.Checkpoint(
            trainer=tf.train.Checkpoint(**trainer),
            images_per_step=self._images_per_step,
            num_images=self._num_images,
        )

    def _read(self, path: Path) -> None:
        """Reads a checkpoint. Optional parts are read only if it and this run both have them."""
        trainer = self.trainer
        check_rows(
            path,
            {"model/row_names": trainer.model.row_names, "kernel_names": trainer.kernel_names},
        )
        without = tuple(part for part in OPTIONAL if not has_part(path / CHECKPOINT_PREFIX, part))
        status = self._parts(without).read(str(path / CHECKPOINT_PREFIX))
        # In this order, TensorFlow does not list what is left over if the check fails.
        status.expect_partial().assert_existing_objects_matched()

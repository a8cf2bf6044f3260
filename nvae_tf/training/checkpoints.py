"""Checkpoints: everything that training changes, saved and restored."""

from pathlib import Path

import tensorflow as tf

from nvae_tf.errors import UserError
from nvae_tf.files import cannot_write
from nvae_tf.run_folder import RunFolder


class Checkpoints:
    """Saves and restores everything that training changes.

    Args:
        folder: of the run.
        trainer: its model, optimiser (with its slots built) and singular vectors are what is kept.
        keep: newest checkpoints that are kept.
    """

    def __init__(self, folder: RunFolder, trainer, keep: int):
        self._optimizer = trainer.optimizer
        self._checkpoint = tf.train.Checkpoint(
            model=trainer.model, optimizer=trainer.optimizer, spectral=trainer.spectral
        )
        self._manager = tf.train.CheckpointManager(
            self._checkpoint, str(folder.checkpoints), max_to_keep=keep, checkpoint_name="step"
        )

    @property
    def latest(self) -> str | None:
        """The newest checkpoint, or None."""
        return self._manager.latest_checkpoint

    def save(self) -> str:
        """Writes a checkpoint, named by the step.

        Raises:
            UserError: it cannot be written; the older ones are intact.
        """
        try:
            return self._manager.save(checkpoint_number=int(self._optimizer.iterations))
        except (tf.errors.OpError, OSError) as error:
            path = Path(self._manager.directory)
            raise cannot_write(path, error) from None

    def restore(self) -> int:
        """Restores the newest checkpoint, if there is one.

        Returns:
            The steps taken so far.

        Raises:
            UserError: it is damaged or of another model.
        """
        if self.latest:
            try:
                self._checkpoint.restore(self.latest).assert_consumed()
            except Exception as error:  # noqa: BLE001 - a damaged file raises what it likes
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{self.latest}: this checkpoint cannot be restored ({reason}); remove its files "
                    "and its line in the file 'checkpoint' beside it to fall back to the one before"
                ) from None
        return int(self._optimizer.iterations)

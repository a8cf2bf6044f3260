"""The folder of one training run: configuration, checkpoints, logs and pictures."""

from pathlib import Path

import tensorflow as tf

from nvae_tf import config as configuration
from nvae_tf.config import Config
from nvae_tf.errors import UserError
from nvae_tf.files import cannot_write, write_text


class RunFolder:
    """Paths of a run, and its checkpoints.

    Args:
        path: ``ROOT/SAVE``.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.samples = path / "samples.png"
        self.reconstructions = path / "reconstructions.png"

    def open(self, config: Config, resume: bool) -> None:
        """Creates the folder, or with `resume` makes sure that this configuration continues it.

        Raises:
            UserError: a run is there and `resume` is not set; or the one there has another model or
                other data; or the folder cannot be written.
        """
        if self.config_file.exists():
            if not resume:
                raise UserError(
                    f"{self.path} holds a run already: continue it with --cont_training, or choose "
                    "another name with --save"
                )
            self._check_continues(config)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        write_text(self.config_file, config.to_yaml())

    def _check_continues(self, config: Config) -> None:
        before = configuration.load(str(self.config_file)).to_dict()
        after = config.to_dict()
        for name, (part, _) in configuration.KEYS.items():
            # Where the data lies may change, and so may schedule and reports.
            if part != "train" and name != "data" and before[name] != after[name]:
                raise UserError(
                    f"{name}: {after[name]} does not continue the run in {self.path}, which has "
                    f"{before[name]}; start another with --save"
                )


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

"""Callbacks for `fit` and `nvae_tf.train`; each does one of the things that the command does by itself.

They read the model's ``fitting`` (`nvae_tf.training.fitting.TrainingView`): the trainer, and the report
of the latest step.
"""

import dataclasses
import os

import numpy as np
import tensorflow as tf
import tf_keras

from nvae_tf.checks import check_count, check_images
from nvae_tf.config import Config, DataConfig, check_value
from nvae_tf.data.catalog import OWN
from nvae_tf.io.errors import UserError, short_repr
from nvae_tf.io.paths import user_path
from nvae_tf.run_folder import RunFolder
from nvae_tf.training import curves, reports
from nvae_tf.training.checkpoints import CheckpointManager
from nvae_tf.training.cluster import cluster_of
from nvae_tf.training.termination import TerminationSignal


class Callback(tf_keras.callbacks.Callback):
    """Base class of our callbacks. Keras gives them tensors, so that it need not wait for a step."""

    _supports_tf_logs = True

    def release(self) -> None:
        """Releases what belongs to the whole process, such as signal handlers.

        It is called at the end of training, also after a failure, and may be called twice.
        """

    @property
    def trainer(self):
        """The trainer of the model."""
        return self.model.fitting.trainer

    @property
    def step(self) -> int:
        """Number of steps taken so far."""
        return self.model.fitting.step

    @property
    def report(self) -> dict[str, tf.Tensor]:
        """Report of the latest step (see `Trainer.update`)."""
        return self.model.fitting.report

    def passed(self, every: int) -> bool:
        """Whether the steps of the latest call passed a multiple of `every`."""
        return self.step % every < self.model.fitting.count

    def on_epoch_begin(self, epoch, logs=None):
        """Reads the number of steps, since a callback of Keras may have restored a checkpoint."""
        self.model.fitting.read_step()

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files."""
        return self.model.distribute_strategy.extended.should_checkpoint


class Checkpoints(Callback):
    """Saves everything that training changes to the folder of a run, which `nvae_tf.load` can read.

    It saves at the end of each epoch, before its validation, and at the end of training; in between as
    `save_every` says, but then not while steps are being skipped. At the end of training it saves the
    weights that other callbacks have left, such as the best ones.

    Args:
        folder: Path of the folder, which must not hold a run yet.
        save_every: Steps (``"500"``) or minutes (``"10m"``) between checkpoints.
        keep: Number of newest checkpoints to keep.

    Raises:
        ConfigError: `save_every` or `keep` is not allowed.
        UserError: The folder holds a run, or cannot be written.
    """

    def __init__(self, folder, save_every: str = "10m", keep: int = 3):
        super().__init__()
        self.folder = _run_folder(folder)
        self.save_every = check_value("save_every", save_every)
        self.keep = check_value("keep", keep)
        self._files: CheckpointManager | None = None
        self._training = False  # whether a training is under way

    def on_train_begin(self, logs=None):
        """Makes the folder, and writes the configuration and the description of the images."""
        model, trainer, config = self.model, self.trainer, _config(self.model)
        continues = self._files is not None and self._files.trainer is trainer
        with cluster_of(model.distribute_strategy).agreement():
            if self.is_chief and not continues:
                self.folder.check(config, resume=False)
            if self.is_chief:
                self._check_newest(int(trainer.optimizer.iterations.numpy()))
                self.folder.create(config, model.image)
        # On every worker, because it creates a variable.
        self._files = CheckpointManager(self.folder, trainer, self.keep, self.save_every)
        self.model.fitting.weights_were_set, self._training = False, True

    def _check_newest(self, step: int) -> None:
        """Refuses a training that begins before the newest checkpoint, which would hide those of it."""
        newest = self.folder.list_checkpoints()[:1]
        if newest and int(newest[0].name.removeprefix("step-")) > step:
            raise UserError(
                f"{newest[0]}: is of a later step than the {step} of this training; save to another "
                "folder"
            )

    def on_train_batch_end(self, batch, logs=None):
        """Saves a checkpoint if one is due after the latest steps."""
        due = self.is_chief and self._files.due(self.step, self.model.fitting.count)
        if due and not self.trainer.consecutive_skips.numpy():
            self._save()

    def on_test_begin(self, logs=None):
        """Saves a checkpoint before the validation of an epoch, which may take long."""
        if self._training:
            self._save()

    def on_epoch_end(self, epoch, logs=None):
        """Saves a checkpoint, with the weights that other callbacks have left."""
        self._save(again=self.model.fitting.weights_were_set)

    def on_train_end(self, logs=None):
        """Saves a checkpoint, with the weights that other callbacks have left."""
        self._save(again=self.model.fitting.weights_were_set)

    def release(self):
        """Notes that training is over: an `evaluate` afterwards saves nothing."""
        self._training = False

    def _save(self, again=False):
        if self.is_chief and not self.trainer.diverged:
            self._files.save(again)


class Pictures(Callback):
    """Draws samples and reconstructions, as two PNG files and in TensorBoard.

    Args:
        folder: Path of the folder to write to.
        images: Images (n, height, width, channels), floats in [0, 1], of which up to 20 are
            reconstructed.
        every: Number of epochs between pictures; they are also drawn at the end of training.
        seed: Seed of the noise, which is the same every time.

    Raises:
        UserError: The images are not the model's, or the folder cannot be written.
    """

    def __init__(self, folder, images, every: int = 1, seed: int = 1):
        super().__init__()
        check_count("every", every)
        check_value("seed", seed)
        if not isinstance(images, (np.ndarray, tf.Tensor)) or images.ndim != 4 or len(images) == 0:
            raise UserError(
                f"images: {short_repr(images)} is not allowed; expected an array or tensor (n, height, "
                "width, channels)"
            )
        self.folder, self.images = _run_folder(folder), images[: reports.PICTURED]
        self.every, self.seed = every, seed
        self._pictures: reports.PictureWriter | None = None
        self._drawn_at = -1

    def on_train_begin(self, logs=None):
        """Checks the images and prepares the functions that draw."""
        self.model.fitting.weights_were_set = False
        check_images(self.images, self.model.image)
        with cluster_of(self.model.distribute_strategy).agreement():
            if self.is_chief and (
                self._pictures is None or self._pictures.trainer is not self.trainer
            ):
                self._drawn_at = -1
                writer = curves.make_writer(self.folder, "train")
                self._pictures = reports.PictureWriter(
                    self.folder, writer, self.trainer, self.images, self.seed
                )

    def on_epoch_end(self, epoch, logs=None):
        """Draws after every `every` epochs."""
        if (epoch + 1) % self.every == 0:
            self._draw()

    def on_train_end(self, logs=None):
        """Draws with the weights that other callbacks have left, unless they were drawn already."""
        self._draw(again=self.model.fitting.weights_were_set)

    def _draw(self, again=False):
        if self._pictures and (again or self._drawn_at != self.step):
            self._drawn_at = self.step
            self._pictures.draw(self.step)


class Curves(Callback):
    """Writes the command's scalars for TensorBoard, and once the configuration and a step's graph.

    Args:
        folder: Path of the folder of a run; the files go to its subfolder ``logs``.
        every: Number of steps between training scalars, which are written at least ten times an epoch.

    Raises:
        UserError: The files cannot be written.
    """

    def __init__(self, folder, every: int = 100):
        super().__init__()
        check_count("every", every)
        self.folder, self._every = _run_folder(folder), every
        self._curves: curves.CurveWriter | None = None
        self._graph_shown = False

    def on_train_begin(self, logs=None):
        """Opens TensorBoard's files, and writes the configuration."""
        with cluster_of(self.model.distribute_strategy).agreement():
            if self.is_chief:
                images_per_step = self.model.fitting.images_per_step
                self._curves = curves.CurveWriter(self.folder, _config(self.model), images_per_step)

    def on_train_batch_end(self, batch, logs=None):
        """Writes the scalars that are due."""
        steps, fitting = (self.params or {}).get("steps") or self._every, self.model.fitting
        if self._curves:
            every = curves.interval(self._every, steps)
            self._curves.steps(fitting.step, fitting.count, fitting.report_of, every)

    def on_epoch_end(self, epoch, logs=None):
        """Writes the validation's scalars, if there was one, and once the graph of a step of `fit`."""
        if self._curves:
            # Keras's own callback TensorBoard finds the graph in the same place.
            traced = getattr(self.model.train_tf_function, "_concrete_variable_creation_fn", None)
            if traced is not None and not self._graph_shown:
                self._curves.graph(traced.graph)
                self._graph_shown = True
            names = {f"val_{name}": name for name in curves.TAGS}
            scores = {names[key]: value for key, value in (logs or {}).items() if key in names}
            self._curves.epoch(self.step, scores)


class KLPerGroup(Callback):
    """Records the KL of every latent group in the last step of each epoch.

    Attributes:
        history: One array (groups,) per epoch, in nats per image, coarsest group first.
    """

    def __init__(self):
        super().__init__()
        self.history: list[np.ndarray] = []

    def on_epoch_end(self, epoch, logs=None):
        """Adds the epoch's values to `history`."""
        self.history.append(self.report["kl_per_group"].numpy())


class Termination(Callback):
    """Ends training after a step once SIGTERM arrives, on all workers at the same step.

    `fit` then returns as usual, and the callback `Checkpoints` saves if there is one. Keras's
    `BackupAndRestore` then keeps its latest backup, which it would otherwise delete at the end of
    `fit`.

    Args:
        every: Number of steps after which several workers ask each other; one worker checks after
            every step.

    Attributes:
        stopped: Whether this callback has ended training.
    """

    def __init__(self, every: int = 10):
        super().__init__()
        check_count("every", every)
        self.stopped, self._every = False, every
        self._signal, self._cluster = TerminationSignal(), None
        self._backups: list[
            tuple
        ] = []  # callbacks whose settings were changed, with the earlier ones

    def on_train_begin(self, logs=None):
        """Begins to watch for SIGTERM."""
        self.stopped, self._signal = False, TerminationSignal()
        self._cluster = cluster_of(self.model.distribute_strategy)
        self._signal.__enter__()

    def on_train_batch_end(self, batch, logs=None):
        """Ends training if SIGTERM has arrived."""
        if self._cluster.num_workers == 1 or self.passed(self._every):
            self._stop_if_told()

    def on_epoch_end(self, epoch, logs=None):
        """Ends training if SIGTERM has arrived."""
        self._stop_if_told()

    def release(self):
        """Restores the earlier handler of SIGTERM, and the settings of other callbacks."""
        self._signal.__exit__()
        for callback, delete, frequency in self._backups:
            callback.delete_checkpoint, callback.save_freq = delete, frequency
        self._backups = []

    def _stop_if_told(self):
        if self._signal.agreed(self._cluster):
            if self.stopped:
                return
            self.stopped = self.model.stop_training = True
            for callback in self.model.fitting.callbacks:
                if isinstance(callback, tf_keras.callbacks.BackupAndRestore):
                    self._backups.append((callback, callback.delete_checkpoint, callback.save_freq))
                    # Without a frequency it does not back up this epoch as if it were complete.
                    callback.delete_checkpoint, callback.save_freq = False, None


class Divergence(Callback):
    """Ends training with an error if too many steps in a row were skipped (``max_bad_steps``).

    `fit` adds one if there is none, because after that no step changes the weights any more.

    Args:
        every: Number of steps between checks, each of which waits for the device. The end of an epoch
            is checked, too.
    """

    def __init__(self, every: int = 100):
        super().__init__()
        check_count("every", every)
        self._every = every

    def on_train_batch_end(self, batch, logs=None):
        """Raises TrainingDivergedError if training has diverged, every `every` steps."""
        if self.passed(self._every):
            self.model.fitting.check_divergence()

    def on_epoch_end(self, epoch, logs=None):
        """Raises TrainingDivergedError if training has diverged."""
        self.model.fitting.check_divergence()


def _run_folder(folder) -> RunFolder:
    """The run folder at a path; refuses an argument that is not a path."""
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise UserError(
            f"folder: {short_repr(folder)} is not allowed; expected the path of a folder"
        )
    return RunFolder(user_path(str(folder)))


def _config(model) -> Config:
    """The configuration of a model's training, as a run's folder stores it."""
    trainer, images = model.fitting.trainer, model.fitting.images_per_step
    data = DataConfig(dataset=OWN, seed=trainer.seed)
    if images:
        parts = model.distribute_strategy.num_replicas_in_sync * trainer.config.accumulate_steps
        data = dataclasses.replace(data, batch_size=images // parts)
    return Config(model.config, data, trainer.config)

"""What `compile` sets up for `fit`: the command's step, with schedules as long as the call of `fit`."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from nvae_tf import config as configuration
from nvae_tf.checkpoint_files import has_part
from nvae_tf.checks import check_count, checked_callbacks
from nvae_tf.config import Config, TrainConfig, check_value
from nvae_tf.config_keys import LARGEST_INT
from nvae_tf.engine.xla_probe import probe
from nvae_tf.io.errors import ConfigError, TrainingDivergedError, UserError
from nvae_tf.io.text import counted
from nvae_tf.keras_training import check_model_name, check_weights_name
from nvae_tf.training import reports
from nvae_tf.training.callbacks import Callback, Divergence
from nvae_tf.training.fit_data import Batching
from nvae_tf.training.optimizer_choice import as_optimizer
from nvae_tf.training.optimizers import MovingAverage
from nvae_tf.training.schedules import WarmupCosineByEpoch
from nvae_tf.training.steps import (
    Steps,
    check_xla_steps,
    distributed_validation,
    grappler_disabled,
)
from nvae_tf.training.trainer import Trainer, add_sums

NEVER = 2**62  # steps per epoch for the trainer's means, which Keras resets instead
SCORES = ("nelbo", "bpd", "recon", "kl")
REPORTED = (*SCORES, "loss", "beta", "learning_rate")

# Arguments that `compile` refuses, and where the setting is to be made instead.
_ELSEWHERE = {
    "epochs": "it is an argument of fit",
    "save_every": "the callback Checkpoints saves",
    "keep": "the callback Checkpoints saves",
    "log_every": "callbacks write logs",
    "images_every": "the callback Pictures draws",
    "eval_every": "fit has validation_freq",
    "optimizer": "it is the first argument of compile",
    "precision": "it is an argument of NVAE",
    "loss": "the loss is the model's own, the negative ELBO",
    "metrics": "fit reports nelbo, bpd, recon and kl",
    "run_eagerly": "a step is always a graph",
}

# Keys that apply only to our optimisers chosen by name; an optimiser object has its own values.
_SCHEDULED = ("learning_rate", "learning_rate_min", "warmup_epochs", "weight_decay")


class TrainingView:
    """The state of a training that callbacks may read, in `fit` and in the command.

    Args:
        trainer: The trainer.
        given_optimizer: The optimiser as Keras's callbacks know it.
        images_per_step: Number of images per step over all replicas, or None if it is not known.

    Attributes:
        report: Report of the latest step, vectors included (see `Trainer.update`); None before one.
        report_of: Function that returns the report of any step of the latest call (`Steps.report`).
        step: Number of steps taken so far, counted here so that reading it does not wait for the
            device.
        count: Number of steps that the latest call of the graph took.
        weights_were_set: Whether the model's weights were replaced, as `EarlyStopping` does, since this
            was set to False.
        callbacks: The callbacks of the training that is under way, or of the latest one.
    """

    def __init__(self, trainer: Trainer, given_optimizer, images_per_step: int | None = None):
        self.trainer, self.given_optimizer = trainer, given_optimizer
        self.images_per_step = images_per_step
        self.report: dict[str, tf.Tensor] | None = None
        self.report_of: Callable[[int], dict[str, tf.Tensor]] | None = None
        self.step = self.count = 0
        self.weights_were_set = False
        self.callbacks: list[tf_keras.callbacks.Callback] = []

    def note_steps(self, count: int, report_of: Callable[[int], dict[str, tf.Tensor]]) -> None:
        """Records that `count` more steps were taken, and how to get their reports."""
        self.step, self.count = self.step + count, count
        self.report, self.report_of = report_of(-1), report_of

    def read_step(self) -> None:
        """Takes the number of steps from the optimiser, which a checkpoint may have set."""
        self.step = int(self.trainer.optimizer.iterations.numpy())

    def follow_weights(self) -> None:
        """Starts the moving averages anew, after the model's weights were replaced."""
        self.weights_were_set = True
        if self.trainer.averages:
            self.trainer.averages.start()

    def weights_were_loaded(self, prefix) -> None:
        """Starts moving averages anew that a file of weights in TensorFlow's format did not hold.

        Args:
            prefix: Prefix of the names of its files.
        """
        self.weights_were_set = True
        if not has_part(prefix, "averages"):
            self.follow_weights()

    def reset(self) -> None:
        """Does nothing; the command's means start anew by themselves."""

    def check_divergence(self) -> None:
        """Checks that training goes on.

        Raises:
            TrainingDivergedError: Too many steps in a row were skipped (``max_bad_steps``).
        """
        if self.trainer.diverged:
            advice = "continue from a checkpoint of before, if the callback Checkpoints saved one"
            raise TrainingDivergedError(reports.divergence(self.trainer, self.step, advice))


class Fitting(TrainingView):
    """The result of `KerasTraining.compile`: a trainer, with its step and validation for Keras's loops.

    Args:
        model: The model.
        optimizer: As for `KerasTraining.compile`.
        seed: Seed of the noise and of the order of images.
        initialize: Whether the first batch initialises convolutions that ask for it.
        settings: Keys of `TrainConfig` and their values.

    Attributes:
        batching: Checks the images that Keras's methods are given, and makes batches of them.

    Raises:
        ConfigError: A key or its value is not allowed.
        UserError: The optimiser or the seed cannot be used.
    """

    reported = REPORTED

    def __init__(self, model, optimizer, seed: int, initialize: bool, settings: dict[str, Any]):
        check_value("seed", seed)
        self.model, self.strategy = model, model.distribute_strategy
        self._given, self._settings = settings, _checked(settings, model.precision)
        replicas = self.strategy.num_replicas_in_sync
        check_xla_steps(self._settings, replicas)
        xla_problem = probe(self._settings.jit_compile, in_use=True)
        if xla_problem:
            print(f"XLA does not work here ({xla_problem}): training goes on without it")
            self._settings = dataclasses.replace(self._settings, jit_compile="off")
        if self._settings.deterministic:
            tf.config.experimental.enable_op_determinism()
        # The learning rate as a function of the step; None before the first `fit`: constant.
        self._schedule: WarmupCosineByEpoch | None = None
        chosen, name = as_optimizer(optimizer, self._settings, self._learning_rate)
        if chosen is optimizer or hasattr(chosen, "keras_optimizer"):
            for key in _SCHEDULED:
                if key in settings:
                    raise ConfigError(
                        f"{key}: the optimiser that was given has its own; set it there"
                    )
        self._settings = dataclasses.replace(self._settings, optimizer=name)
        trainer = Trainer(
            model, _without_annealing(self._settings), 1, NEVER, seed, optimizer=chosen
        )
        if (
            int(chosen.iterations.numpy()) > 0
        ):  # `prepare` will take this training for a restored one
            trainer.warm_up_spectral_norms()
        super().__init__(trainer, getattr(chosen, "keras_optimizer", chosen))
        self._averages_at_start: np.ndarray | None = None  # the smallest stack of the averages
        self.follow_weights()  # with the averages, which would begin as zeros
        self._needs_preparing, self._initialize = True, initialize
        self._planned: tuple[int, int] | None = None  # steps in all, and in an epoch
        self._sums: list = []  # over the batches of an evaluation so far
        self.batching = Batching(model, replicas, self._settings.accumulate_steps, seed)

    def plan(self, batches, epochs: int, initial_epoch: int, steps_per_epoch: int) -> bool:
        """Makes the schedules span the steps taken so far and those of a call of `fit`.

        Args:
            batches: The batches of the call.
            epochs: Number of the last epoch.
            initial_epoch: Number of epochs before the call.
            steps_per_epoch: Number of steps in an epoch.

        Returns:
            Whether the schedules have changed, so that the step has to be traced again.

        Raises:
            UserError: An argument is wrong.
            ConfigError: The warm-up that was given to `compile` does not fit.
        """
        check_count("epochs", epochs)
        check_count("initial_epoch", initial_epoch, minimum=0)
        if initial_epoch >= epochs:
            raise ConfigError(
                f"initial_epoch: {initial_epoch} is not allowed; expected less than epochs ({epochs})"
            )
        _check_length(batches, steps_per_epoch, epochs - initial_epoch)
        self.read_step()
        total = self.step + (epochs - initial_epoch) * steps_per_epoch
        is_dataset = isinstance(batches, tf.data.Dataset)
        self.images_per_step = batches.element_spec.shape[0] if is_dataset else None
        if self._planned == (total, steps_per_epoch):
            return False
        given = {key: self._given[key] for key in ("warmup_epochs",) if key in self._given}
        whole_epochs = -(-total // steps_per_epoch)
        planned = configuration.override(
            Config(train=self._settings), {"epochs": whole_epochs, **given}
        )
        self._schedule = WarmupCosineByEpoch.from_train_config(
            planned.config.train, steps_per_epoch
        )
        self.trainer.config, self.trainer.total_steps = planned.config.train, total
        self._planned = (total, steps_per_epoch)
        return True

    def read_step(self) -> None:
        """Takes the number of steps from the optimiser, which a checkpoint may have set.

        If the checkpoint held no moving averages, they start anew from the weights.
        """
        before, start = self.step, self._averages_at_start
        super().read_step()
        if self.trainer.averages and self.step != before and start is not None:
            if np.array_equal(_smallest(self.trainer.averages), start):
                self.trainer.averages.start()
            self._averages_at_start = None  # from now on they have values of their own

    def follow_weights(self) -> None:
        """Starts the moving averages anew, after the model's weights were replaced."""
        super().follow_weights()
        if self.trainer.averages:
            self._averages_at_start = _smallest(self.trainer.averages)

    def prepare(self, batches) -> None:
        """Initialises what depends on data, and the singular vectors.

        Does nothing the second time, or where the state of a training has been restored. Weights that
        were loaded, set or trained before `compile` are not initialised from data. A training that
        diverged is given another chance, since its weights may have been replaced.

        Args:
            batches: Batches of images; the first one may be read.

        Raises:
            UserError: The first batch is needed, but is divided among workers.
        """
        if self.trainer.diverged:
            with self.strategy.scope():
                self.trainer.forget_bad_steps()
        restored = int(self.trainer.optimizer.iterations.numpy()) > 0
        if self._needs_preparing and not restored:
            looks = self.model.needs_data_initialization and not self.model.weights_were_given
            looks = looks and self._initialize
            with self.strategy.scope():
                if looks and isinstance(batches, tf.distribute.DistributedDataset):
                    raise UserError(
                        "x: a distributed data set, of which no worker sees a whole batch to "
                        "initialise the convolutions from; expected a tf.data.Dataset or an array"
                    )
                if looks:
                    self.trainer.prepare(next(iter(batches)))
                else:
                    self.trainer.warm_up_spectral_norms()
        self._needs_preparing, self.model.weights_were_given = False, True

    @contextlib.contextmanager
    def running(self, callbacks=()):
        """A context in which steps run under the strategy and without Grappler, as in the command.

        Args:
            callbacks: The callbacks of these steps. Ours are released at the end, also after a failure.
        """
        callbacks = getattr(callbacks, "callbacks", callbacks)  # Keras's CallbackList
        with self.strategy.scope(), grappler_disabled():
            try:
                yield
            finally:
                for callback in callbacks:
                    if isinstance(callback, Callback):
                        callback.release()

    def train_function(self, steps_per_call: tf.Variable):
        """A training step for Keras.

        Args:
            steps_per_call: Number of steps per call, read at each call; if it is above 1 now, the graph
                can take several.

        Returns:
            A function from an iterator over batches to the values in `REPORTED`, and the
            `tf.function` that it runs.
        """
        several = int(steps_per_call.numpy()) > 1
        with self.strategy.scope():
            steps = Steps(self.trainer, self.strategy, several)

        def take_steps(iterator):
            count = int(steps_per_call.numpy())  # the last call of an epoch may take fewer
            steps.take(iterator, count)
            self.note_steps(count, steps.report)
            return {name: self.report[name] for name in REPORTED}

        return take_steps, steps.function

    def test_function(self):
        """A step of evaluation for Keras: a function from an iterator over batches to means so far."""
        with self.strategy.scope():
            run_step = distributed_validation(self.trainer, self.strategy)

        def score_batch(iterator):
            self._sums = add_sums(self._sums, run_step(*next(iterator)))
            means = self.trainer.means(self._sums)
            return {name: means[name] for name in SCORES}

        return score_batch

    def reset(self) -> None:
        """Starts the means of training and of evaluation anew."""
        self.trainer.epoch_sums.assign(tf.zeros_like(self.trainer.epoch_sums))
        self._sums = []

    @contextlib.contextmanager
    def keeping_training_means(self):
        """A context in which resets leave the means of training as they are, for an evaluation."""
        sums = tf.identity(self.trainer.epoch_sums)
        try:
            yield
        finally:
            self.trainer.epoch_sums.assign(sums)

    def training_callbacks(self, callbacks, verbose):
        """The callbacks of a `fit`: those given, a check for divergence, and a bar that shows means."""
        callbacks = checked_callbacks(callbacks)
        for callback in getattr(callbacks, "callbacks", callbacks):
            check_callback(callback, sets_rate=hasattr(self.given_optimizer, "lr"))
        if isinstance(callbacks, tf_keras.callbacks.CallbackList):
            if not any(isinstance(callback, Divergence) for callback in callbacks.callbacks):
                look = Divergence()
                look.set_model(self.model)
                callbacks.append(look)
            self.callbacks = callbacks.callbacks
            return callbacks
        # Ours come last, so that they see what Keras's have done, such as restoring the best weights.
        callbacks.sort(key=lambda callback: isinstance(callback, Callback))
        if not any(isinstance(callback, Divergence) for callback in callbacks):
            callbacks = [*callbacks, Divergence()]
        self.callbacks = callbacks
        return _with_bar(callbacks, verbose)

    def evaluation_callbacks(self, callbacks, verbose):
        """The callbacks of an `evaluate`: those given, and a bar that shows means."""
        callbacks = checked_callbacks(callbacks)
        return _with_bar(callbacks, verbose) if isinstance(callbacks, list) else callbacks

    def _learning_rate(self, steps):
        if self._schedule is None:
            return tf.constant(self._settings.learning_rate, tf.float32)
        return self._schedule(steps)


def _smallest(averages: MovingAverage) -> np.ndarray:
    """The values of the smallest stack of moving averages."""
    return min(averages.values(), key=lambda value: value.shape.num_elements()).numpy()


def check_callback(callback, sets_rate: bool) -> None:
    """Refuses, before the first step, callbacks of Keras that would fail or do nothing later.

    Args:
        callback: The callback.
        sets_rate: Whether callbacks can set the learning rate.

    Raises:
        UserError: It writes a file of a name that is not allowed, monitors a value that is not
            reported, or sets the learning rate where that is not possible.
    """
    kinds, name = tf_keras.callbacks, type(callback).__name__
    monitors = isinstance(callback, (kinds.EarlyStopping, kinds.ReduceLROnPlateau))
    if isinstance(callback, kinds.ModelCheckpoint):
        check = check_weights_name if callback.save_weights_only else check_model_name
        check(callback.filepath)
        monitors = callback.save_best_only
    if monitors and callback.monitor == "val_loss":
        raise UserError(
            f"callbacks: {name} monitors val_loss, which is not reported; "
            'expected monitor="val_nelbo" for example'
        )
    if not sets_rate and isinstance(
        callback, (kinds.LearningRateScheduler, kinds.ReduceLROnPlateau)
    ):
        raise UserError(
            f"callbacks: {name} changes the learning rate of an optimiser of Keras in fit; compile "
            "with one, tf_keras.optimizers.Adamax(1e-3) for example, or use the keys of our schedule"
        )


def _checked(settings: dict[str, Any], precision: str) -> TrainConfig:
    """The settings of `compile` as a `TrainConfig`, whose number of epochs is not known yet."""
    for name in settings:
        if name in _ELSEWHERE:
            raise ConfigError(f"{name}: is not a key of compile: {_ELSEWHERE[name]}")
        if name in configuration.KEYS and configuration.KEYS[name][0] != "train":
            raise ConfigError(
                f"{name}: is not a key of training; it belongs to the section "
                f"{configuration.KEYS[name][0]} of a recipe"
            )
    mixed = precision if precision == "float32" else f"mixed_{precision}"
    base = Config(train=TrainConfig(epochs=LARGEST_INT, precision=mixed))
    return configuration.from_dict(settings, base).train


def _check_length(batches, steps_per_epoch: int, epochs: int) -> None:
    """Refuses a data set that ends before training does, for which Keras would only warn and stop."""
    size = int(batches.cardinality()) if isinstance(batches, tf.data.Dataset) else -1
    wanted = steps_per_epoch * epochs
    if 0 <= size < wanted and size != steps_per_epoch:
        raise UserError(
            f"steps_per_epoch: {steps_per_epoch} in {counted(epochs, 'epoch')} take "
            f"{wanted} batches, and the data set ends after {size}; expected dataset.repeat(), or no "
            "steps_per_epoch"
        )


def _without_annealing(settings: TrainConfig) -> TrainConfig:
    """The settings with a constant KL coefficient, ``kl_max_coeff``."""
    return dataclasses.replace(
        settings,
        kl_anneal_portion=0.0,
        kl_const_portion=0.0,
        kl_const_coeff=settings.kl_max_coeff,
    )


def _with_bar(callbacks: list, verbose) -> list:
    """Adds Keras's bar, told not to average the reported values again, since they are means already."""
    kind = tf_keras.callbacks.ProgbarLogger
    if not verbose or any(isinstance(callback, kind) for callback in callbacks):
        return callbacks
    return [*callbacks, kind(count_mode="steps", stateful_metrics=REPORTED)]

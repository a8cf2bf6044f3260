"""Keras's way to train and score an NVAE: compile, fit, evaluate, predict.

They run the same step as the command, which `nvae_tf.training.trainer` holds. Keras gives these methods
to the model itself, and so `compile` and `export` are the only ones in the package that import upwards.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from nvae_tf import checks
from nvae_tf.io.errors import UserError, short_repr
from nvae_tf.io.paths import user_path


class KerasTraining(tf_keras.Model):
    """The base class of `NVAE`: what Keras's users expect of a model.

    Attributes:
        fitting: How the model is trained (`nvae_tf.training.fitting.Fitting`); None before `compile`.
    """

    fitting: Any = None

    def compile(
        self,
        optimizer="adamax",
        *,
        seed: int = 1,
        steps_per_execution: int = 1,
        initialize_from_data: bool = True,
        **settings,
    ):
        """Prepares the model for training and scoring; within the scope of the strategy that made it.

        Args:
            optimizer: A name: ``"adamax"``, ``"adam"`` or ``"adamw"`` with the recipes' schedule
                (``learning_rate``, ``learning_rate_min``, ``warmup_epochs``), or one of Keras's with
                Keras's defaults. Or an optimiser, `nvae_tf.Adamax` or one of Keras's, which keeps its
                own learning rate.
            seed: Seed of the noise, and of the order in which `fit` takes the images of an array.
            steps_per_execution: Training steps in one call of the graph. With several replicas, a few
                dozen keep TensorFlow's record of exchanges small.
            initialize_from_data: Whether the first batch initialises convolutions that ask for it
                (``res_elu`` only); False for weights that were loaded.
            **settings: Keys of `TrainConfig` that concern the step: objective, schedule, averages and
                precision. `fit` knows the epochs; files are written by callbacks.

        Raises:
            ConfigError: A key or its value is not allowed.
            UserError: It is not an optimiser, or it cannot be used here.
        """
        from nvae_tf.training.fitting import Fitting

        checks.check_count("steps_per_execution", steps_per_execution)
        checks.check_flag("initialize_from_data", initialize_from_data)
        with self.distribute_strategy.scope():
            self.fitting = Fitting(self, optimizer, seed, initialize_from_data, settings)
            # No metrics: Keras would warn of the weights of images that fill up a batch.
            super().compile(steps_per_execution=steps_per_execution, weighted_metrics=[])

    @property
    def optimizer(self):
        """The optimiser that was given to `compile`, or that it made; None before."""
        return self.fitting and self.fitting.given_optimizer

    @optimizer.setter
    def optimizer(self, _):
        """Does nothing; without this, Keras would keep a separate optimiser."""

    @property
    def metrics_names(self):
        """What `train_on_batch` returns, in this order."""
        return list(self._require_fitting().reported)

    def fit(
        self,
        x,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose="auto",
        callbacks=None,
        validation_data=None,
        shuffle: bool = True,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq=1,
    ):
        """Trains the model.

        Schedules span the steps taken so far and those of this call.

        Args:
            x: Images (n, height, width, channels) of floats in [0, 1]; or a `tf.data.Dataset` of
                batches of them, over all replicas, whose labels are ignored. Images of an array that
                do not fill the last batch of an epoch are left out of it.
            batch_size: Images of a step over all replicas, for an array; default: 32.
            epochs: Number of the epoch after which to stop.
            verbose: As in Keras.
            callbacks: Callbacks of Keras, or ours (`nvae_tf.callbacks`).
            validation_data: As for the `x` of `evaluate`, or a tuple that begins with it.
            shuffle: Whether the images of an array come in another order in each epoch.
            initial_epoch: Number of epochs that were trained before.
            steps_per_epoch: Batches in an epoch; needed if the data set does not know its size. If it
                has another number of batches, each epoch goes on in it where the last one ended.
            validation_steps: As for the `steps` of `evaluate`.
            validation_batch_size: As for the `batch_size` of `evaluate`; default: `batch_size`, for an
                array.
            validation_freq: As in Keras.

        Returns:
            Keras's `History`: of each epoch ``nelbo``, ``recon`` and ``kl`` in nats and ``bpd`` in bits
            per dimension, means over its steps; ``loss``, ``beta`` and ``learning_rate`` of its last
            step; and with validation ``val_nelbo``, ``val_bpd``, ``val_recon`` and ``val_kl``.

        Raises:
            UserError: An argument is wrong.
            TrainingDivergedError: Too many steps in a row were skipped.
        """
        fitting = self._require_fitting()
        fitting.read_step()
        batches, steps = fitting.batching.training(
            x, batch_size, steps_per_epoch, shuffle, fitting.step
        )
        if isinstance(validation_freq, (list, tuple, set)):  # numbers of epochs
            validation_freq = list(validation_freq)
        else:
            checks.check_count("validation_freq", validation_freq)
            validation_freq = int(validation_freq)
        if validation_data is not None:
            checks.check_count("validation_batch_size", validation_batch_size, optional=True)
            if isinstance(validation_data, tuple) and validation_data:  # with labels
                validation_data = validation_data[0]
            if validation_batch_size is None and checks.is_array(validation_data):
                validation_batch_size = batch_size
            try:
                validation_data, validation_steps = fitting.batching.evaluation(
                    validation_data, validation_batch_size, validation_steps
                )
            except UserError as error:
                raise UserError(f"validation_data: {error}") from None
        if fitting.plan(batches, epochs, initial_epoch, steps):
            self.train_function = None
        fitting.prepare(batches)
        callbacks = fitting.training_callbacks(callbacks, verbose)
        with fitting.running(callbacks):
            return super().fit(
                fitting.batching.for_replicas(batches),
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_data=validation_data,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps,
                validation_steps=validation_steps,
                validation_freq=validation_freq,
            )

    def train_on_batch(self, x, *, reset_metrics: bool = True, return_dict: bool = False):
        """Takes one step.

        Before the first `fit`, whose length schedules need, the KL coefficient is `kl_max_coeff` and
        the learning rate is that after warm-up.

        Args:
            x: Images (n, height, width, channels) of floats in [0, 1].
            reset_metrics: Whether to report this step alone, instead of means over all steps since the
                last time that this was True.
            return_dict: Whether to return a dictionary instead of a list.

        Returns:
            What `metrics_names` says.

        Raises:
            UserError: The images have another type or shape, or other values.
        """
        fitting = self._require_fitting()
        fitting.batching.check(x)
        fitting.prepare([x])
        with fitting.running(), self._one_step_in_a_call():
            x = fitting.batching.for_replicas(x)
            return super().train_on_batch(x, reset_metrics=reset_metrics, return_dict=return_dict)

    def evaluate(
        self,
        x,
        *,
        batch_size: int | None = None,
        verbose="auto",
        steps: int | None = None,
        callbacks=None,
        return_dict: bool = True,
        **keras_options,
    ):
        """Scores images with one draw of z each; with moving averages of the weights if there are any.

        The draw belongs to the image's place, whatever the batches.

        Args:
            x: Images as for `fit`; all of an array are scored.
            batch_size: Images of a batch over all replicas, for an array; default: 32.
            verbose: As in Keras.
            steps: Batches to score; default: all.
            callbacks: Callbacks of Keras.
            return_dict: Whether the result has names; otherwise it is a list in the same order.
            **keras_options: Further arguments of Keras's `evaluate`; its `fit` has one of its own.

        Returns:
            Means over the images: ``nelbo``, ``recon``, ``kl`` in nats, ``bpd`` in bits per dimension.

        Raises:
            UserError: An argument is wrong.
        """
        fitting = self._require_fitting()
        # `fit` has made its validation data ready, and says so by this argument.
        if "_use_cached_eval_dataset" not in keras_options:
            x, steps = fitting.batching.evaluation(x, batch_size, steps)
            callbacks = fitting.evaluation_callbacks(callbacks, verbose)
        with self._one_step_in_a_call():  # several need a data set that knows its size
            scores = super().evaluate(
                x,
                verbose=verbose,
                steps=steps,
                callbacks=callbacks,
                return_dict=True,
                **keras_options,
            )
        return scores if return_dict else list(scores.values())

    def test_on_batch(self, x, *, return_dict: bool = False):
        """`evaluate` of one batch: ``nelbo``, ``bpd``, ``recon``, ``kl`` in a list, or with names."""
        return self.evaluate(
            x, batch_size=checks.batch_of(x) or 1, verbose=0, return_dict=return_dict
        )

    def set_weights(self, weights):
        """Gives the model other weights, from which moving averages then start anew."""
        before = self.get_weights() if self.fitting is not None else []
        super().set_weights(weights)
        same = map(np.array_equal, before, self.get_weights())
        if self.fitting is not None and not all(same):
            self.fitting.follow_weights()

    def predict(self, x, **options):
        """Reconstructs images with each z from its posterior's mean; arguments as in Keras.

        With the moving averages of the weights if there are any.

        Returns:
            Images (n, height, width, channels) in [0, 1]; for binary images, their means.

        Raises:
            UserError: The images have another type or shape, or other values.
        """
        for name in ("batch_size", "steps"):
            checks.check_count(name, options.get(name), optional=True)
        if isinstance(x, (np.ndarray, tf.Tensor)):
            checks.check_images(x, self.image)
        elif not isinstance(x, tf.distribute.DistributedDataset):
            x, _ = checks.images_of_dataset(x, self.image)
            checks.check_ends(x, options.get("steps"))
        if "callbacks" in options:
            options["callbacks"] = checks.checked_callbacks(options["callbacks"])
        if self.fitting is None:
            return super().predict(x, **options)
        with self.fitting.trainer.evaluated_weights():
            return super().predict(x, **options)

    def predict_step(self, data):
        """Reconstructs the images of a batch, whatever is beside them."""
        images = data[0] if isinstance(data, tuple) else data
        return self.reconstruct(images)

    def make_train_function(self, force=False):
        """The step of `nvae_tf.training.trainer`, as a function of an iterator over batches."""
        if self.train_function is None or force:
            run, graph = self._require_fitting().train_function(self._steps_per_execution)

            def train_function(iterator):
                logs = run(iterator)
                self._train_counter.assign_add(int(self._steps_per_execution.numpy()))
                return logs

            self.train_function, self.train_tf_function = train_function, graph
        return self.train_function

    def make_test_function(self, force=False):
        """The validation of `nvae_tf.training.trainer`, as a function of an iterator over batches."""
        if self.test_function is None or force:
            run = self._require_fitting().test_function()

            def test_function(iterator):
                logs = run(iterator)
                self._test_counter.assign_add(1)
                return logs

            self.test_function = test_function
        return self.test_function

    def save(self, filepath, overwrite: bool = True, **options):
        """Writes the model to a file that `nvae_tf.load` and Keras read.

        Args:
            filepath: Path of the file; its name ends in ``.keras``.
            overwrite: As in Keras.
            **options: As in Keras.

        Raises:
            UserError: The name has another end, or its folder does not exist.
        """
        check_model_name(filepath)
        _check_parent(filepath)
        super().save(filepath, overwrite=overwrite, **options)

    def save_weights(self, filepath, overwrite: bool = True, **options):
        """Writes the weights, and the state of the training in TensorFlow's format, for `load_weights`.

        Args:
            filepath: A path whose name ends in ``.weights.h5``; or what the names of the files begin
                with, for TensorFlow's format.
            overwrite: As in Keras.
            **options: As in Keras.

        Raises:
            UserError: It is a name of Keras's older HDF5 format, which cannot hold the names of rows;
                or its folder does not exist.
        """
        check_weights_name(filepath)
        if str(filepath).endswith(".h5"):  # for the other format TensorFlow makes it
            _check_parent(filepath)
        super().save_weights(filepath, overwrite=overwrite, **options)

    def export(self, filepath) -> Path:
        """Writes a SavedModel that needs TensorFlow alone, with the signatures of docs/serving.md.

        With the moving averages of the weights if there are any.

        Args:
            filepath: The folder that holds all versions, as TensorFlow Serving reads it.

        Returns:
            The folder of the new version, ``filepath/1`` if it is the first.

        Raises:
            UserError: It cannot be written.
        """
        from nvae_tf.evaluation.export import export

        folder = user_path(str(filepath))
        if self.fitting is None:
            return export(self, {}, folder)
        with self.fitting.trainer.evaluated_weights():
            return export(self, {}, folder)

    def reset_metrics(self):
        """Starts the means of training and of evaluation anew."""
        if self.fitting is not None:
            self.fitting.reset()

    def get_compile_config(self):
        """None: a model that was saved is compiled anew."""
        return

    def _trackable_children(self, save_type="checkpoint", **options):
        """What TensorFlow saves: in checkpoints also what training changes besides weights."""
        children = super()._trackable_children(save_type, **options)
        if save_type == "checkpoint" and self.fitting is not None:
            children = {**children, "trainer": self.fitting.trainer}
        return children

    @contextlib.contextmanager
    def _one_step_in_a_call(self):
        """Takes no notice of `steps_per_execution` until the block ends."""
        count = int(self._steps_per_execution.numpy())
        self._steps_per_execution.assign(1)
        try:
            yield
        finally:
            self._steps_per_execution.assign(count)

    def _require_fitting(self):
        if self.fitting is None:
            raise UserError(
                f"{short_repr(self.name)}: the model is not compiled; call compile() first"
            )
        if not hasattr(self.fitting, "batching"):
            raise UserError(
                f"{short_repr(self.name)}: nvae_tf.train trains and scores the model by itself; of "
                "Keras's methods predict() alone can be called meanwhile"
            )
        return self.fitting


def check_model_name(filepath) -> None:
    """Checks the name of a file for a whole model.

    Raises:
        UserError: Its format cannot hold one.
    """
    if not str(filepath).endswith(".keras"):
        raise UserError(
            f"{filepath}: expected a name that ends in .keras; export() writes a SavedModel, and "
            "save_weights() the weights alone"
        )


def _check_parent(filepath) -> None:
    """Refuses a file in a folder that does not exist."""
    parent = os.path.dirname(filepath) or "."
    if not tf.io.gfile.isdir(parent):
        raise UserError(f"{filepath}: there is no folder {parent}; make it first")


def check_weights_name(filepath) -> None:
    """Checks the name of a file for weights.

    Raises:
        UserError: It is a name of Keras's older HDF5 format, which cannot hold the names of rows.
    """
    name = str(filepath)
    if name.endswith((".h5", ".hdf5", ".keras")) and not name.endswith(".weights.h5"):
        raise UserError(
            f"{filepath}: expected a name that ends in .weights.h5, or one without an end for "
            "TensorFlow's format"
        )

"""Training and scoring an NVAE through Keras: compile, fit, evaluate, predict.

These methods run the same step as the command (`nvae_tf.training.trainer`). In Keras they belong to the
model itself, so `compile` and `export` import upwards, as nothing else in the package does.
"""

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from nvae_tf import checks
from nvae_tf.checkpoint_files import has_part
from nvae_tf.engine.weights import walk
from nvae_tf.io.errors import UserError, short_message, short_repr
from nvae_tf.io.files import write_error
from nvae_tf.io.paths import user_path


class KerasTraining(tf_keras.Model):
    """The base class of `NVAE`, with the methods that Keras's users expect of a model.

    Attributes:
        fitting: The training set up by `compile` (`nvae_tf.training.fitting.Fitting`), None before; or
            a `TrainingView` while `nvae_tf.train` runs callbacks.
        weights_were_given: Whether the weights were loaded, set or trained, so that no batch of images
            may initialise them (``res_elu`` only).
    """

    fitting: Any = None
    weights_were_given = False
    _training_to_load: str | None = None  # prefix of files that also hold the state of training

    def compile(
        self,
        optimizer="adamax",
        *,
        seed: int = 1,
        steps_per_execution: int = 1,
        initialize_from_data: bool = True,
        **settings,
    ):
        """Prepares the model for training and scoring, under the strategy in whose scope it was made.

        Args:
            optimizer: A name or an optimiser. ``"adamax"``, ``"adam"`` and ``"adamw"`` follow the
                recipes' schedule (``learning_rate``, ``learning_rate_min``, ``warmup_epochs``); other
                names are Keras's, with Keras's defaults. An optimiser, `nvae_tf.Adamax` or one of
                Keras's, keeps its own learning rate.
            seed: Seed of the noise, and of the order in which `fit` takes the images of an array.
            steps_per_execution: Number of training steps per call of the graph. With several replicas,
                a few dozen keep TensorFlow's record of exchanges small.
            initialize_from_data: Whether the first batch initialises convolutions that ask for it
                (``res_elu`` only), unless weights were loaded, set or trained before.
            **settings: Keys of `TrainConfig` that concern the step: objective, schedule, moving
                averages and compilation. The number of epochs is an argument of `fit`, precision one of
                `NVAE`, and files are written by callbacks.

        Raises:
            ConfigError: A key or its value is not allowed.
            UserError: `optimizer` is not an optimiser, or cannot be used here; or parts of the model
                are frozen.
        """
        from nvae_tf.training.fitting import Fitting

        checks.check_count("steps_per_execution", steps_per_execution)
        checks.check_flag("initialize_from_data", initialize_from_data)
        _check_frozen(self)
        with self.distribute_strategy.scope():
            self.fitting = Fitting(self, optimizer, seed, initialize_from_data, settings)
            # Without metrics, so that Keras does not warn about the weights of images (0 for padding).
            super().compile(steps_per_execution=steps_per_execution, weighted_metrics=[])
        prefix = self._training_to_load
        if prefix is not None and tf.io.gfile.exists(f"{prefix}.index"):
            self.load_weights(prefix)

    @property
    def optimizer(self):
        """The optimiser that `compile` was given or made; None before `compile`."""
        return self.fitting and self.fitting.given_optimizer

    @optimizer.setter
    def optimizer(self, _):
        """Does nothing; without this, Keras would keep a separate optimiser."""

    @property
    def metrics_names(self):
        """Names of the values that `train_on_batch` returns, in their order."""
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

        The schedules span the steps taken so far and those of this call.

        Args:
            x: Images (n, height, width, channels), floats in [0, 1]; or a `tf.data.Dataset` of batches
                of such images for all replicas together, whose labels are ignored. An epoch leaves out
                the images of an array that do not fill its last batch.
            batch_size: Number of images per step over all replicas, for an array; default: 32.
            epochs: Number of the epoch after which training stops.
            verbose: As in Keras.
            callbacks: Callbacks of Keras or of `nvae_tf.callbacks`.
            validation_data: Images as for `x` of `evaluate`, or a tuple whose first entry they are.
            shuffle: Whether each epoch takes the images of an array in a different random order.
            initial_epoch: Number of epochs that were trained before.
            steps_per_epoch: Number of batches per epoch; needed if the data set does not know its size.
                If the data set has more batches, each epoch continues where the last one ended.
            validation_steps: As `steps` of `evaluate`.
            validation_batch_size: As `batch_size` of `evaluate`; default for an array: `batch_size`.
            validation_freq: As in Keras.

        Returns:
            Keras's `History`. Per epoch it has ``nelbo``, ``recon`` and ``kl`` in nats per image and
            ``bpd`` in bits per dimension, all means over the steps of the epoch; ``loss``, ``beta`` and
            ``learning_rate`` of the last step; and with validation ``val_nelbo``, ``val_bpd``,
            ``val_recon`` and ``val_kl``.

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
                    validation_data,
                    validation_batch_size,
                    validation_steps,
                    sized=int(self._steps_per_execution.numpy()) > 1,
                )
            except UserError as error:
                raise UserError(f"validation_data: {error}") from None
        callbacks = fitting.training_callbacks(callbacks, verbose)
        if fitting.plan(batches, epochs, initial_epoch, steps):
            self.train_function = None
        fitting.prepare(batches)
        self._eval_data_handler = None  # Keras keeps that of a call which ended with an error
        # Keras lets the last call of an epoch take fewer steps, and keeps that if training stops there.
        with fitting.running(callbacks), self._steps_in_a_call_kept():
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
        """Takes one training step.

        Schedules need the length of a `fit`. Before the first one, the KL coefficient is
        ``kl_max_coeff`` and the learning rate is that after warm-up.

        Args:
            x: Images (n, height, width, channels), floats in [0, 1].
            reset_metrics: Whether to report this step alone. If not, means are over all steps since the
                last call in which this was True.
            return_dict: Whether to return a dictionary instead of a list.

        Returns:
            The values that `metrics_names` names.

        Raises:
            UserError: The images have a wrong type or shape, values between levels, or a number that
                replicas and passes cannot share equally.
            TrainingDivergedError: Too many steps in a row were skipped.
        """
        fitting = self._require_fitting()
        fitting.batching.check(x)
        fitting.prepare([x])
        with fitting.running(), self._steps_in_a_call_kept(1):
            x = fitting.batching.for_replicas(tf.cast(x, tf.float32))
            values = super().train_on_batch(x, reset_metrics=reset_metrics, return_dict=return_dict)
        fitting.check_divergence()
        return values

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
        """Scores images with one draw of z each, using moving averages of the weights if there are any.

        An image's draw depends on its place among the images, not on how they are batched.

        Args:
            x: Images as for `fit`; all images of an array are scored.
            batch_size: Number of images per batch over all replicas, for an array; default: 32.
            verbose: As in Keras.
            steps: Number of batches to score; default: all.
            callbacks: Callbacks of Keras.
            return_dict: Whether to return a dictionary instead of a list.
            **keras_options: Further arguments of Keras's `evaluate`, including those that only its
                `fit` passes.

        Returns:
            Means over the images, in this order: ``nelbo`` (nats per image), ``bpd`` (bits per
            dimension), ``recon`` and ``kl`` (nats per image).

        Raises:
            UserError: An argument is wrong.
        """
        fitting = self._require_fitting()
        # Keras's `fit` passes this argument, and our `fit` has already batched its validation data.
        if "_use_cached_eval_dataset" not in keras_options:
            x, steps = fitting.batching.evaluation(x, batch_size, steps)
            callbacks = fitting.evaluation_callbacks(callbacks, verbose)
        # Several steps in a call would need a data set that knows its size.
        with self._steps_in_a_call_kept(1), fitting.keeping_training_means():
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
        """Scores one batch as `evaluate` does: a list of nelbo, bpd, recon, kl, or a dictionary."""
        return self.evaluate(
            x, batch_size=checks.batch_of(x) or 1, verbose=0, return_dict=return_dict
        )

    def set_weights(self, weights):
        """Assigns weights; if any of them changes, the moving averages start anew from them."""
        before = self.get_weights() if self.fitting is not None else []
        super().set_weights(weights)
        self.weights_were_given, self._training_to_load = True, None
        same = map(np.array_equal, before, self.get_weights())
        if self.fitting is not None and not all(same):
            self.fitting.follow_weights()

    def load_weights(self, filepath, **options):
        """Reads what `save_weights` wrote.

        Files in TensorFlow's format also hold the state of training, which a model that is not compiled
        yet takes from them when it is compiled. Moving averages that a file does not hold start anew
        from the weights.

        Args:
            filepath: The path that was given to `save_weights`.
            **options: As in Keras.

        Raises:
            UserError: There is no such file, or it cannot be read.
        """
        try:
            result = super().load_weights(filepath, **options)
        except (tf.errors.OpError, OSError) as error:
            raise UserError(
                f"{filepath}: cannot be read as weights ({short_message(error)})"
            ) from None
        self.weights_were_given, self._training_to_load = True, None
        if result is not None:
            result.expect_partial()  # so that TensorFlow does not list what is left over
        if str(filepath).endswith((".h5", ".keras")):
            return result
        if self.fitting is not None:
            self.fitting.weights_were_loaded(filepath)
            # A model that was compiled and not trained has not been initialised from data yet.
            trained = int(self.fitting.trainer.optimizer.iterations.numpy()) > 0
            self.weights_were_given = trained or not has_part(filepath, "optimizer")
        else:
            self._training_to_load = str(filepath)
        return result

    def load_own_variables(self, store):
        """Reads weights from a ``.keras`` or ``.weights.h5`` file; moving averages start anew."""
        super().load_own_variables(store)
        self.weights_were_given, self._training_to_load = True, None
        if self.fitting is not None:
            self.fitting.follow_weights()

    def predict(self, x, **options):
        """Reconstructs images with zero noise, and with the weights' moving averages if there are any.

        Arguments as in Keras.

        Returns:
            Images (n, height, width, channels) in [0, 1]; for binary images, their means.

        Raises:
            UserError: The images have another type or shape, or other values.
        """
        for name in ("batch_size", "steps"):
            checks.check_count(name, options.get(name), optional=True)
        if checks.is_array(x):
            checks.check_images(x, self.image)
            x = x if isinstance(x, np.ndarray) else tf.cast(x, tf.float32)
        elif not isinstance(x, tf.distribute.DistributedDataset):
            x, _ = checks.images_of_dataset(x, self.image)
            checks.check_ends(x, options.get("steps"))
        if "callbacks" in options:
            options["callbacks"] = checks.checked_callbacks(options["callbacks"])
        if self.fitting is None:
            return super().predict(x, **options)
        # Several batches in a call would need a data set that knows its size.
        with self._steps_in_a_call_kept(1), self.fitting.trainer.averaged_weights():
            return super().predict(x, **options)

    def predict_on_batch(self, x):
        """Reconstructs one batch as `predict` does."""
        return self.predict(x, batch_size=checks.batch_of(x) or 1, verbose=0)

    # Keras would have AutoGraph convert all of the model's Python, which takes longer than tracing it.
    @tf.autograph.experimental.do_not_convert
    def predict_step(self, data):
        """Reconstructs the images of a batch; labels beside them are ignored."""
        images = data[0] if isinstance(data, tuple) else data
        return self.reconstruct(images)

    def make_train_function(self, force=False):
        """The step of `nvae_tf.training.trainer` as a function of an iterator over batches."""
        if self.train_function is None or force:
            run, graph = self._require_fitting().train_function(self._steps_per_execution)

            def train_function(iterator):
                logs = run(iterator)
                self._train_counter.assign_add(int(self._steps_per_execution.numpy()))
                return logs

            self.train_function, self.train_tf_function = train_function, graph
        return self.train_function

    def make_test_function(self, force=False):
        """The validation of `nvae_tf.training.trainer` as a function of an iterator over batches."""
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
            filepath: Path of the file, ending in ``.keras``.
            overwrite: As in Keras.
            **options: As in Keras.

        Raises:
            UserError: The path does not end in ``.keras``, its folder does not exist, or the file
                cannot be written, which leaves an earlier one as it was.
        """
        check_model_name(filepath)
        with _replacing(filepath, overwrite) as temporary:
            super().save(temporary, **options)

    def save_weights(self, filepath, overwrite: bool = True, **options):
        """Writes the weights for `load_weights`; in TensorFlow's format also the state of training.

        Args:
            filepath: A path that ends in ``.weights.h5``; any other path is the prefix of the files'
                names in TensorFlow's format.
            overwrite: As in Keras.
            **options: As in Keras.

        Raises:
            UserError: The path has the ending of another format, ``.h5``, ``.hdf5`` or ``.keras``; or
                its folder does not exist; or a file cannot be written, which leaves an earlier one as
                it was.
        """
        check_weights_name(filepath)
        if str(filepath).endswith(".h5"):
            with _replacing(filepath, overwrite) as temporary:
                # HDF5 may crash the process some time after it could not write a file.
                _check_space(filepath, sum(value.nbytes for value in self.get_weights()))
                super().save_weights(temporary, **options)
            return
        try:
            super().save_weights(filepath, overwrite=overwrite, **options)
        except (tf.errors.OpError, OSError) as error:
            raise write_error(filepath, error) from None

    def export(self, filepath) -> Path:
        """Writes a SavedModel that needs only TensorFlow, with the signatures of docs/serving.md.

        It has the moving averages of the weights if there are any.

        Args:
            filepath: Path of the folder of all versions, as TensorFlow Serving expects it.

        Returns:
            The folder of the new version, ``filepath/1`` if it is the first.

        Raises:
            UserError: The folder cannot be written.
        """
        from nvae_tf.evaluation.export import export

        folder = user_path(str(filepath))
        if self.fitting is None:
            return export(self, {}, folder)
        with self.fitting.trainer.averaged_weights():
            return export(self, {}, folder)

    def reset_metrics(self):
        """Starts the means of training and of evaluation anew."""
        if self.fitting is not None:
            self.fitting.reset()

    def get_compile_config(self):
        """None, so that a loaded model has to be compiled again."""
        return

    def _trackable_children(self, save_type="checkpoint", **options):
        """What TensorFlow saves: in checkpoints the trainer as well, with optimiser and counters."""
        children = super()._trackable_children(save_type, **options)
        if save_type == "checkpoint" and self.fitting is not None:
            children = {**children, "trainer": self.fitting.trainer}
        return children

    @contextlib.contextmanager
    def _steps_in_a_call_kept(self, meanwhile: int | None = None):
        """Gives `steps_per_execution` its present value back at the end of the block.

        Does nothing if the model is not compiled, as during `nvae_tf.train`.

        Args:
            meanwhile: Its value in the block; default: the present one.
        """
        if self._steps_per_execution is None:
            yield
            return
        count = int(self._steps_per_execution.numpy())
        self._steps_per_execution.assign(meanwhile or count)
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
        UserError: The name does not end in ``.keras``.
    """
    if not str(filepath).endswith(".keras"):
        raise UserError(
            f"{filepath}: expected a name that ends in .keras; export() writes a SavedModel, and "
            "save_weights() the weights alone"
        )


@contextlib.contextmanager
def _replacing(filepath, overwrite: bool):
    """Yields a path to write a file to, which then replaces `filepath`, or is removed after a failure.

    Raises:
        UserError: The folder does not exist, `filepath` exists and `overwrite` is false, or the file
            cannot be written.
    """
    parent, name = os.path.split(os.fspath(filepath))
    if not tf.io.gfile.isdir(parent or "."):
        raise UserError(f"{filepath}: there is no folder {parent}; make it first")
    if not overwrite and tf.io.gfile.exists(filepath):
        raise UserError(f"{filepath}: exists already")
    # With the name's end, by which Keras knows the format.
    temporary = os.path.join(parent, f".{secrets.token_hex(4)}.{name}")
    try:
        yield temporary
        tf.io.gfile.rename(temporary, os.fspath(filepath), overwrite=True)
    except (tf.errors.OpError, OSError) as error:
        raise write_error(filepath, error) from None
    finally:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.remove(temporary)


def _check_space(filepath, size: int) -> None:
    """Refuses to write a file for which a local disk has no space."""
    parent = os.path.dirname(os.fspath(filepath)) or "."
    if os.path.isdir(parent) and shutil.disk_usage(parent).free < size:
        raise write_error(filepath, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _check_frozen(model) -> None:
    """Refuses a model of which only parts are frozen, since the weights of a shape share a variable."""
    for path, part in walk(model):
        frozen = isinstance(part, tf_keras.layers.Layer) and not part.trainable
        if frozen and model.trainable:
            raise UserError(
                f"{path}: trainable is False; parts of an NVAE cannot be frozen, since all weights of "
                "a shape share a variable"
            )


def check_weights_name(filepath) -> None:
    """Checks the name of a file for weights.

    Raises:
        UserError: The name ends in ``.keras``, or is one of Keras's older HDF5 format, which cannot
            hold the names of rows.
    """
    name = str(filepath)
    if name.endswith((".h5", ".hdf5", ".keras")) and not name.endswith(".weights.h5"):
        raise UserError(
            f"{filepath}: expected a name that ends in .weights.h5, or one without an end for "
            "TensorFlow's format"
        )

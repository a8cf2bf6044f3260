"""Runs Keras's callbacks in the command's own training loop."""

from collections.abc import Callable

import tf_keras

from nvae_tf.training.fitting import REPORTED, SCORES, TrainingView


class KerasLoop:
    """Calls callbacks as `fit` would; without any, it does nothing.

    Args:
        callbacks: The callbacks.
        trainer: The trainer, whose model they are given.
        epochs: Number of epochs of the whole training.
        steps_per_epoch: Steps in an epoch.
        images_per_step: Images in a step, over all replicas.
    """

    def __init__(self, callbacks, trainer, epochs: int, steps_per_epoch: int, images_per_step: int):
        self._model, self._steps_per_epoch = trainer.model, steps_per_epoch
        self._in_epoch = False
        self._list = None
        if callbacks:
            self._model.fitting = TrainingView(trainer, trainer.optimizer, images_per_step)
            self._model.stop_training = False
            self._list = tf_keras.callbacks.CallbackList(
                list(callbacks), model=self._model, epochs=epochs, steps=steps_per_epoch
            )

    @property
    def stopped(self) -> bool:
        """Whether a callback ended training."""
        return self._list is not None and self._model.stop_training

    @property
    def weights_changed(self) -> bool:
        """Whether callbacks have replaced the model's weights since the last step."""
        return self._list is not None and self._model.fitting.weights_were_set

    def begin(self) -> None:
        """Call before training begins."""
        if self._list:
            self._model.fitting.read_step()
            self._list.on_train_begin()

    def before(self, step: int) -> None:
        """Call before the steps that follow `step` others; begins an epoch if it is time."""
        if self._list:
            epoch, place = divmod(step, self._steps_per_epoch)
            if not self._in_epoch:
                self._list.on_epoch_begin(epoch)
            self._in_epoch = True
            self._model.fitting.weights_were_set = False
            self._list.on_train_batch_begin(place)

    def after(self, step: int, count: int, report_of: Callable) -> None:
        """Call after steps.

        Args:
            step: Number of steps taken so far.
            count: Number of steps since `before`.
            report_of: Returns the report of one of these steps (see `Steps.report`).
        """
        if self._list:
            self._model.fitting.note_steps(count, report_of)
            logs = self._model.fitting.report
            self._model._train_counter.assign_add(count)
            place = (step - 1) % self._steps_per_epoch
            self._list.on_train_batch_end(place, {name: logs[name] for name in REPORTED})

    def epoch(self, epoch: int, logs, validation) -> None:
        """Call after an epoch.

        Args:
            epoch: Number of epochs so far.
            logs: Report of the last step.
            validation: Result of the validation, or None.
        """
        if self._list:
            values = {name: float(logs[name]) for name in REPORTED}
            if validation:
                values.update({f"val_{name}": float(validation[name]) for name in SCORES})
            self._list.on_epoch_end(epoch - 1, values)
            self._in_epoch = False

    def end(self) -> bool:
        """Call after training.

        Returns:
            Whether callbacks have replaced the model's weights since the last step, for example by the
            best ones.
        """
        if self._list is not None:
            self._list.on_train_end()
        return self.weights_changed

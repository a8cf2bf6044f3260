"""The learning rate as a function of the optimiser's step count."""

import math

import tensorflow as tf

from nvae_tf.config import TrainConfig


class WarmupCosineByEpoch:
    """Linear warm-up by steps, then a cosine by whole epochs.

    The rate rises from 0 to `peak` over the warm-up. The first epoch after it keeps the peak,
    and the last epoch runs at `floor`.

    Args:
        peak: Learning rate after warm-up.
        floor: Learning rate of the last epoch.
        steps_per_epoch: Number of steps in an epoch.
        epochs: Number of epochs of the whole training.
        warmup_epochs: Number of epochs of the warm-up.
    """

    def __init__(self, peak, floor, steps_per_epoch, epochs, warmup_epochs):
        self.peak, self.floor, self.steps_per_epoch = peak, floor, steps_per_epoch
        self.epochs, self.warmup_epochs = epochs, warmup_epochs

    @classmethod
    def from_train_config(cls, config: TrainConfig, steps_per_epoch: int) -> "WarmupCosineByEpoch":
        """Makes the schedule of a training configuration."""
        return cls(
            config.learning_rate,
            config.learning_rate_min,
            steps_per_epoch,
            config.epochs,
            config.warmup_epochs,
        )

    def __call__(self, step):
        """The learning rate of the step that follows `step` others, a float32 scalar."""
        step = tf.cast(step, tf.int64)
        warmup_steps = self.warmup_epochs * self.steps_per_epoch
        rising = self.peak * tf.cast(step, tf.float32) / max(warmup_steps, 1)
        cosine_epochs = max(self.epochs - self.warmup_epochs - 1, 1)
        epoch = tf.cast(step // self.steps_per_epoch - self.warmup_epochs, tf.float32)
        progress = tf.clip_by_value(epoch / cosine_epochs, 0.0, 1.0)
        falling = self.floor + 0.5 * (self.peak - self.floor) * (1.0 + tf.cos(math.pi * progress))
        return tf.where(step < warmup_steps, rising, falling)

"""A bound on the norm of the gradient that follows training: ``skip_gradient_norm: auto``."""

import math

import tensorflow as tf

from nvae_tf.engine.state import VariableState

FIRST_STEPS = 100  # steps that are only observed, never skipped
RATE = 0.01  # of the running means after that: they follow the latest few hundred steps
LARGEST_DEVIATION = 3.0  # mean deviations that a step may move the means by
DEVIATIONS = 10.0  # mean deviations above the mean logarithm at which steps are skipped
SMALLEST_FACTOR = 10.0  # the bound is at least this many times the typical norm


class GradientNormBound(tf.Module):
    """A running bound on the gradient norm, which single outliers hardly move.

    Let x be the logarithm of the norm, m its running mean and s the running mean of |x - m|. A step is
    skipped if its norm is above ``exp(m + max(10 s, log 10))``. The first 100 steps are never skipped;
    after them x is clipped to m +- 3 s before it enters m and s. The norm is that of ``gradient_norm``
    in TensorBoard, in nats per image and unit of weight.

    Attributes:
        steps: Number of finite steps observed.
        mean: The running mean m.
        deviation: The running mean absolute deviation s.
    """

    def __init__(self):
        super().__init__()
        self.steps = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.mean = tf.Variable(0.0, trainable=False)
        self.deviation = tf.Variable(0.0, trainable=False)

    def allows(self, norm, state=None):
        """Whether a step with this gradient norm may be taken, a boolean scalar tensor."""
        state = state or VariableState()
        width = tf.maximum(DEVIATIONS * state.value(self.deviation), math.log(SMALLEST_FACTOR))
        bound = tf.exp(state.value(self.mean) + width)
        return (norm <= bound) | (state.value(self.steps) < FIRST_STEPS)

    def update(self, norm, finite, state=None) -> None:
        """Updates the running means with a step.

        Args:
            norm: Norm of the gradient, a scalar.
            finite: Whether the step is finite, a boolean scalar; if not, nothing changes.
            state: Where the means are read and written; default: in their variables.
        """
        state = state or VariableState()
        steps, mean = state.value(self.steps), state.value(self.mean)
        deviation = state.value(self.deviation)
        count = tf.cast(steps, tf.float32)
        rate = tf.maximum(1.0 / (count + 1.0), RATE)  # plain means of the first steps
        distance = tf.math.log(tf.maximum(norm, 1e-30)) - mean
        limit = LARGEST_DEVIATION * deviation
        clipped = tf.clip_by_value(distance, -limit, limit)
        distance = tf.where(steps < FIRST_STEPS, distance, clipped)
        # The first step has no mean to compare with: its distance is from 0.
        spread = tf.where(tf.equal(steps, 0), 0.0, tf.abs(distance))
        for variable, value, before in (
            (self.mean, mean + rate * distance, mean),
            (self.deviation, deviation + rate * (spread - deviation), deviation),
        ):
            state.assign(variable, tf.where(finite, value, before))
        state.assign(self.steps, steps + tf.cast(finite, tf.int64))

"""Adamax as NVAE is trained with, and moving averages of weights."""

import tensorflow as tf

from nvae_tf.devices import own_copy
from nvae_tf.layers.compiled import compiled_part
from nvae_tf.training.stacked import Stacked

# Values that are updated together: one part compiles faster than several, but all of its results are
# in memory at once.
PART = 2**24


class Adamax(tf.Module):
    """Adamax with L2 decay inside the gradient and epsilon inside the maximum.

    ``g' = g + weight_decay * w``; ``m = b1 m + (1 - b1) g'``; ``u = max(b2 u, |g'| + epsilon)``;
    ``w -= learning_rate / (1 - b1^t) * m / u``.

    Args:
        learning_rate: a number, or a function from the steps taken to one.
        weight_decay: coefficient of the L2 decay, on every variable.
        beta_1: decay of the mean of gradients.
        beta_2: decay of their largest magnitude.
        epsilon: added to the magnitude before the maximum is taken.

    `build` comes first, then one `apply_gradients` a step.

    Attributes:
        iterations: steps taken, an int64 variable.

    Reference: Kingma & Ba, *Adam*, 2015, section 7.1.
    """

    def __init__(
        self, learning_rate=1e-2, weight_decay=3e-4, beta_1=0.9, beta_2=0.999, epsilon=1e-3
    ):
        super().__init__()
        self._learning_rate = learning_rate
        self.l2, self.beta_1, self.beta_2, self.epsilon = weight_decay, beta_1, beta_2, epsilon
        self.iterations = tf.Variable(0, dtype=tf.int64, trainable=False, name="iterations")

    @property
    def learning_rate(self):
        """Of the next step."""
        rate = self._learning_rate
        return rate(self.iterations) if callable(rate) else tf.constant(rate, tf.float32)

    def build(self, weights: Stacked) -> None:
        """Creates the slots m and u, stacked as the weights."""
        self._weights, self._mean, self._peak = weights, weights.zeros(), weights.zeros()

    def apply_gradients(self, gradients, condition=True) -> None:
        """Takes one step, of the weights' stacks.

        Args:
            gradients: stacked as the weights.
            condition: a scalar; where it is false weights and slots stay, and the step counts.
        """
        step = tf.cast(self.iterations + 1, tf.float32)
        rate = self.learning_rate / (1.0 - tf.pow(self.beta_1, step))
        coefficients = tf.stack([rate, self.l2, self.beta_1, self.beta_2, self.epsilon])
        rows = zip(gradients, self._weights.stacks, self._mean, self._peak, strict=True)
        for part in _parts(rows):
            before = [
                [gradient, *(v.read_value() for v in variables)] for gradient, *variables in part
            ]
            after = _adamax(before, coefficients, condition)
            for (_, *variables), values in zip(part, after, strict=True):
                for variable, value in zip(variables, values, strict=True):
                    own_copy(variable).assign(value)
        own_copy(self.iterations).assign_add(1)


def _parts(rows):
    """Divides rows that begin with a tensor into lists: together in few, none of more than `PART`."""
    parts, size = [], PART
    for row in rows:
        own = row[0].shape.num_elements()
        if size + own > PART:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += own
    return parts


@compiled_part
def _adamax(rows, coefficients, condition):
    """New value, m and u for rows of gradient, value, m and u; if the condition is false, the old."""
    rate, l2, beta_1, beta_2, epsilon = tf.unstack(coefficients)
    updated = []
    for gradient, value, mean, peak in rows:
        decayed = gradient + l2 * value
        new_mean = beta_1 * mean + (1.0 - beta_1) * decayed
        new_peak = tf.maximum(beta_2 * peak, tf.abs(decayed) + epsilon)
        new_value = value - rate * (new_mean / new_peak)
        pairs = (new_value, value), (new_mean, mean), (new_peak, peak)
        updated.append([tf.where(condition, new, old) for new, old in pairs])
    return updated


class MovingAverage(tf.Module):
    """Exponential moving averages of a model's weights.

    Args:
        weights: of the model.
        decay: of the averages, a step; early averages weigh the few steps so far alike.
    """

    def __init__(self, weights: Stacked, decay: float):
        super().__init__()
        self._weights, self.decay, self._averages = weights, decay, weights.zeros()

    @property
    def stacks(self) -> list[tf.Variable]:
        """The averages, stacked as the weights."""
        return list(self._averages)

    def update(self, step, condition=True) -> None:
        """Moves the averages towards the weights' stacks.

        Args:
            step: steps taken, this one included.
            condition: a scalar; where it is false nothing changes.
        """
        done = tf.cast(step, tf.float32)
        decay = tf.minimum(self.decay, (done - 1.0) / (done + 9.0))
        for average, value in zip(self._averages, self._weights.stacks, strict=True):
            moved = decay * average + (1.0 - decay) * value
            own_copy(average).assign(tf.where(condition, moved, average))

"""Adamax as NVAE is trained with, and moving averages of weights, for same-shaped variables at once."""

import contextlib

import tensorflow as tf

from nvae_tf.devices import own_copy


def stacks_by_shape(variables) -> list[list[int]]:
    """Indices of variables, those of one shape together.

    One set of operations then serves all of one shape: a deep model's thousands of variables would
    otherwise cost tens of thousands of graph nodes.
    """
    by_shape = {}
    for index, variable in enumerate(variables):
        by_shape.setdefault(tuple(variable.shape), []).append(index)
    return list(by_shape.values())


def _zeros_for(stacks, variables):
    shapes = [(len(indices), *variables[indices[0]].shape) for indices in stacks]
    return [tf.Variable(tf.zeros(shape), trainable=False) for shape in shapes]


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
        self._stacks = None

    @property
    def learning_rate(self):
        """Of the next step."""
        rate = self._learning_rate
        return rate(self.iterations) if callable(rate) else tf.constant(rate, tf.float32)

    def build(self, variables) -> None:
        """Creates the stacked slots m and u for the variables, which stay the same from then on."""
        self._stacks = stacks_by_shape(variables)
        self._mean = _zeros_for(self._stacks, variables)
        self._peak = _zeros_for(self._stacks, variables)

    def apply_gradients(self, grads_and_vars, condition=True) -> None:
        """Takes one step.

        Args:
            grads_and_vars: (gradient, variable) pairs, always of the same variables.
            condition: a scalar; where it is false weights and slots stay, and the step counts.

        Raises:
            ValueError: a variable without a gradient.
        """
        gradients, variables = zip(*grads_and_vars, strict=True)
        missing = [v.name for g, v in zip(gradients, variables, strict=True) if g is None]
        if missing:
            raise ValueError(f"no gradient for {', '.join(missing)}")
        if self._stacks is None:
            with tf.init_scope():
                self.build(variables)
        step = tf.cast(self.iterations + 1, tf.float32)
        rate = self.learning_rate / (1.0 - tf.pow(self.beta_1, step))
        for indices, mean, peak in zip(self._stacks, self._mean, self._peak, strict=True):
            weights = tf.stack([variables[i] for i in indices])
            gradient = tf.stack([gradients[i] for i in indices]) + self.l2 * weights
            new_mean = self.beta_1 * mean + (1.0 - self.beta_1) * gradient
            new_peak = tf.maximum(self.beta_2 * peak, tf.abs(gradient) + self.epsilon)
            new_weights = weights - rate * (new_mean / new_peak)
            own_copy(mean).assign(tf.where(condition, new_mean, mean))
            own_copy(peak).assign(tf.where(condition, new_peak, peak))
            updated = tf.unstack(tf.where(condition, new_weights, weights))
            for i, value in zip(indices, updated, strict=True):
                own_copy(variables[i]).assign(value)
        own_copy(self.iterations).assign_add(1)


class MovingAverage(tf.Module):
    """Exponential moving averages of a model's trainable variables.

    Args:
        variables: of the model.
        decay: of the averages, a step; early averages weigh the few steps so far alike.
    """

    def __init__(self, variables, decay: float):
        super().__init__()
        self._variables, self.decay = list(variables), decay
        self._stacks = stacks_by_shape(variables)
        self._averages = _zeros_for(self._stacks, variables)

    def update(self, step, condition=True) -> None:
        """Moves the averages towards the variables.

        Args:
            step: steps taken, this one included.
            condition: a scalar; where it is false nothing changes.
        """
        done = tf.cast(step, tf.float32)
        decay = tf.minimum(self.decay, (done - 1.0) / (done + 9.0))
        for indices, average in zip(self._stacks, self._averages, strict=True):
            weights = tf.stack([self._variables[i] for i in indices])
            moved = decay * average + (1.0 - decay) * weights
            own_copy(average).assign(tf.where(condition, moved, average))

    def assign(self) -> None:
        """Gives the variables the averages' values."""
        for indices, average in zip(self._stacks, self._averages, strict=True):
            for i, value in zip(indices, tf.unstack(average), strict=True):
                self._variables[i].assign(value)

    @contextlib.contextmanager
    def applied(self):
        """Within the block the variables have the averages' values."""
        weights = [variable.numpy() for variable in self._variables]
        self.assign()
        try:
            yield
        finally:
            for variable, value in zip(self._variables, weights, strict=True):
                variable.assign(value)

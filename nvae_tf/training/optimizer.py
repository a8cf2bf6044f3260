"""Adamax as NVAE is trained with, working on stacks of same-shaped variables."""

import tensorflow as tf
import tf_keras


class Adamax(tf_keras.optimizers.Optimizer):
    """Adamax with L2 decay inside the gradient and epsilon inside the maximum.

    ``g' = g + weight_decay * w``; ``m = b1 m + (1 - b1) g'``; ``u = max(b2 u, |g'| + epsilon)``;
    ``w -= learning_rate / (1 - b1^t) * m / u``.

    m and u of all variables of one shape are one stacked variable, and one set of operations updates
    them: a deep model's thousands of variables would otherwise cost tens of thousands of graph nodes.

    Args:
        learning_rate: a number or a Keras learning-rate schedule.
        weight_decay: coefficient of the L2 decay, on every variable.
        beta_1: decay of the mean of gradients.
        beta_2: decay of their largest magnitude.
        epsilon: added to the magnitude before the maximum is taken.

    Reference: Kingma & Ba, *Adam*, 2015, section 7.1.
    """

    def __init__(
        self,
        learning_rate=1e-2,
        weight_decay=3e-4,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-3,
        name="Adamax",
    ):
        super().__init__(name=name)
        self._learning_rate = self._build_learning_rate(learning_rate)
        # Not the base class's weight_decay, which is decoupled from the gradient.
        self.l2, self.beta_1, self.beta_2, self.epsilon = weight_decay, beta_1, beta_2, epsilon

    def build(self, var_list):
        """Creates the stacked slots m and u for the variables, which stay fixed from then on."""
        super().build(var_list)
        if getattr(self, "_built", False):
            return
        by_shape = {}
        for index, variable in enumerate(var_list):
            by_shape.setdefault(tuple(variable.shape), []).append(index)
        self._stacks = list(by_shape.values())
        shapes = [(len(indices), *shape) for shape, indices in by_shape.items()]
        self._mean = [self.add_variable(shape, name="mean") for shape in shapes]
        self._peak = [self.add_variable(shape, name="peak") for shape in shapes]
        self._built = True

    def apply_gradients(self, grads_and_vars, name=None):
        """Takes one step.

        Args:
            grads_and_vars: (gradient, variable) pairs, always of the same variables.
            name: ignored.

        Returns:
            The step count.

        Raises:
            ValueError: a variable without a gradient.
        """
        gradients, variables = zip(*grads_and_vars, strict=True)
        missing = [v.name for g, v in zip(gradients, variables, strict=True) if g is None]
        if missing:
            raise ValueError(f"no gradient for {', '.join(missing)}")
        with tf.init_scope():
            self.build(variables)
        self._compute_current_learning_rate()
        step = tf.cast(self.iterations + 1, tf.float32)
        rate = self.learning_rate / (1.0 - tf.pow(self.beta_1, step))
        for indices, mean, peak in zip(self._stacks, self._mean, self._peak, strict=True):
            weights = tf.stack([variables[i] for i in indices])
            gradient = tf.stack([gradients[i] for i in indices]) + self.l2 * weights
            new_mean = mean.assign(self.beta_1 * mean + (1.0 - self.beta_1) * gradient)
            new_peak = peak.assign(tf.maximum(self.beta_2 * peak, tf.abs(gradient) + self.epsilon))
            updated = tf.unstack(weights - rate * (new_mean / new_peak))
            for i, value in zip(indices, updated, strict=True):
                variables[i].assign(value)
        return self.iterations.assign_add(1)

    def get_config(self):
        """The constructor's arguments."""
        return {
            "name": self.name,
            "learning_rate": self._serialize_hyperparameter(self._learning_rate),
            "weight_decay": self.l2,
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }

"""Keras's optimisers, behind the interface of ours."""

from typing import Any

import tensorflow as tf
import tf_keras

from nvae_tf.config import BUILT_IN_OPTIMIZERS
from nvae_tf.engine.state import TensorState
from nvae_tf.io.errors import ConfigError, UserError
from nvae_tf.training.optimizers import Optimizer

# Keras's element-wise optimisers, whose update of a number depends only on that number's own history.
# They can be given stacks of weights; all others are given the weights one by one.
_NAMES = (
    "SGD",
    "RMSprop",
    "Adam",
    "AdamW",
    "Adadelta",
    "Adagrad",
    "Adamax",
    "Nadam",
    "Ftrl",
    "Lion",
)
ELEMENTWISE = {getattr(tf_keras.optimizers, name, None) for name in _NAMES}


class KerasOptimizer(Optimizer):
    """One of Keras's optimisers, which keeps its own learning rate.

    An optimiser that is not element-wise (it may use norms of weights, or factors) updates the weights
    one by one. For that, this object holds a second copy of them.

    Args:
        optimizer: The optimiser.
        l2: Coefficient of L2 decay to add to gradients.

    Attributes:
        keras_optimizer: The optimiser.
    """

    def __init__(self, optimizer, l2: float = 0.0):
        super().__init__(None)
        self.keras_optimizer, self._l2 = optimizer, l2
        self._by_weight = type(optimizer) not in ELEMENTWISE or bool(
            getattr(optimizer, "clipnorm", None)
        )

    def learning_rate_after(self, steps):
        """The Keras optimiser's own learning rate for its next step; `steps` is ignored."""
        rate = self.keras_optimizer.learning_rate
        return tf.cast(
            rate(self.keras_optimizer.iterations) if callable(rate) else rate, tf.float32
        )

    def build(self, variables) -> None:
        """Creates the optimiser's slots and, unless it is element-wise, a variable for each weight.

        Raises:
            UserError: The optimiser has slots for other variables.
        """
        self._stacks, self._rows = list(variables), None
        trained = self._stacks
        if self._by_weight:
            self._rows = [
                [tf.Variable(value, trainable=False) for value in tf.unstack(stack)]
                for stack in variables
            ]
            trained = sum(self._rows, [])
        known = getattr(self.keras_optimizer, "_index_dict", {})
        if known and not all(self.keras_optimizer._var_key(v) in known for v in trained):
            raise UserError(
                f"optimizer: this {type(self.keras_optimizer).__name__} has slots for the weights of "
                "an earlier compile; make a new one"
            )
        if hasattr(self.keras_optimizer, "build"):
            self.keras_optimizer.build(trained)
        else:  # Keras's legacy optimisers
            self.keras_optimizer._create_all_weights(trained)

    def _apply(self, gradients, steps, condition, scope, state) -> None:
        """Lets the optimiser update its variables, and undoes the update if `condition` is false.

        Raises:
            ConfigError: `state` holds tensors, but Keras's optimisers keep their state in variables.
        """
        if isinstance(state, TensorState):
            raise ConfigError(
                "optimizer: one of Keras or TensorFlow Addons keeps its state itself, so that the "
                f"step is not a function; choose {', '.join(BUILT_IN_OPTIMIZERS)}"
            )
        before = [tf.identity(state.value(stack)) for stack in self._stacks]
        pairs: list[tuple[Any, tf.Variable]] = []
        for number, (value, gradient) in enumerate(zip(before, gradients, strict=True)):
            decayed = gradient + self._l2 * value if self._l2 else gradient
            if self._rows is None:
                pairs.append((decayed, self._stacks[number]))
                continue
            rows = self._rows[number]
            for row, row_value in zip(rows, tf.unstack(value), strict=True):
                state.assign(row, row_value)
            pairs += zip(tf.unstack(decayed), rows, strict=True)
        slots = self.keras_optimizer.variables
        slots = list(slots() if callable(slots) else slots)
        slots_before = [tf.identity(state.value(slot)) for slot in slots]
        # The gradients have already been averaged over all replicas.
        self.keras_optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)
        for slot, value in zip(slots, slots_before, strict=True):
            state.assign(slot, tf.where(condition, state.value(slot), value))
        for number, (stack, value) in enumerate(zip(self._stacks, before, strict=True)):
            if self._rows is None:
                changed = state.value(stack)
            else:
                changed = tf.stack([state.value(row) for row in self._rows[number]])
            state.assign(stack, tf.where(condition, changed, value))

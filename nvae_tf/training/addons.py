"""The optimisers of TensorFlow Addons, where that is installed (TensorFlow 2.15)."""

import inspect

import tensorflow as tf

from nvae_tf.config import BUILT_IN_OPTIMIZERS
from nvae_tf.engine.state import TensorState
from nvae_tf.io.errors import ConfigError
from nvae_tf.training.optimizers import Optimizer

INSTALL = 'pip install "nvae-tf[addons]" (Python 3.10 or 3.11, TensorFlow 2.15)'


class AddonsOptimizer(Optimizer):
    """An optimiser of TensorFlow Addons, in place of a built-in one.

    It updates weights one by one, because some optimisers (LAMB) look at each weight as a whole; for
    that it holds the weights a second time. Optimisers that wrap another one (Lookahead, SWA) wrap
    NVAE's Adamax. Decay is the optimiser's own if it has one, or else L2 decay inside the gradient.

    Args:
        name: Name of the class, in any case: ``"lamb"``, ``"lookahead"``.
        learning_rate: A number, or a function from the steps taken to one.
        weight_decay: Coefficient of the decay, on every variable.

    Raises:
        ConfigError: There is no optimiser of that name, or TensorFlow Addons is missing.
    """

    def __init__(self, name, learning_rate, weight_decay=0.0):
        super().__init__(learning_rate)
        self._optimizer, self.l2 = _make(name, lambda: self.learning_rate, weight_decay)

    def build(self, variables) -> None:
        """Makes a variable for each weight, and the optimiser's slots for those."""
        self._stacks = list(variables)
        self._rows = [
            [tf.Variable(value, trainable=False) for value in tf.unstack(stack)]
            for stack in variables
        ]
        self._optimizer._create_all_weights(sum(self._rows, []))

    def _apply(self, gradients, steps, condition, scope, state) -> None:
        """Changes weight by weight, from the stacks' values to the stacks.

        Raises:
            ConfigError: The state is not in variables: those of these optimisers are their own.
        """
        if isinstance(state, TensorState):
            raise ConfigError(
                f"optimizer: one of TensorFlow Addons keeps its state itself, so that the step is not "
                f"a function; choose {', '.join(BUILT_IN_OPTIMIZERS)}"
            )
        pairs = []
        for stack, rows, gradient in zip(self._stacks, self._rows, gradients, strict=True):
            values = zip(rows, tf.unstack(stack), tf.unstack(gradient), strict=True)
            for row, value, row_gradient in values:
                state.assign(row, value)
                pairs.append((row_gradient + self.l2 * value, row))
        slots = self._optimizer.variables()
        before = [tf.identity(slot) for slot in slots]
        # The gradients are means over all replicas already.
        self._optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)
        for slot, value in zip(slots, before, strict=True):
            state.assign(slot, tf.where(condition, slot, value))
        for stack, rows in zip(self._stacks, self._rows, strict=True):
            state.assign(stack, tf.where(condition, tf.stack(rows), stack))


def _make(name, learning_rate, weight_decay):
    """The optimiser, and the L2 decay that remains to be added to gradients."""
    try:
        import tensorflow_addons as tfa
    except ImportError:
        built_in = ", ".join(BUILT_IN_OPTIMIZERS)
        raise ConfigError(
            f"optimizer: {name!r} is not allowed; expected {built_in}, or with TensorFlow Addons one "
            f"of its optimisers: {INSTALL}"
        ) from None
    base = tf.keras.optimizers.legacy.Optimizer
    known = {
        key.lower(): content
        for key, content in vars(tfa.optimizers).items()
        if inspect.isclass(content) and issubclass(content, base) and _is_creatable(content)
    }
    if name.lower() not in known:
        names = ", ".join(sorted([*BUILT_IN_OPTIMIZERS, *(c.__name__ for c in known.values())]))
        raise ConfigError(f"optimizer: {name!r} is not allowed; expected one of {names}")
    optimizer_class = known[name.lower()]
    parameters = inspect.signature(optimizer_class).parameters
    if "optimizer" in parameters:
        return optimizer_class(_adamax(learning_rate)), weight_decay
    arguments = {"learning_rate": learning_rate} if "learning_rate" in parameters else {}
    if "weight_decay" in parameters:
        return optimizer_class(weight_decay=weight_decay, **arguments), 0.0
    return optimizer_class(**arguments), weight_decay


def _is_creatable(optimizer_class):
    """Whether the class can be created from arguments that a recipe has."""
    needed = {
        name
        for name, parameter in inspect.signature(optimizer_class).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    return needed <= {"optimizer", "learning_rate", "weight_decay"}


def _adamax(learning_rate):
    """NVAE's Adamax (see `nvae_tf.training.optimizers.Adamax`) as one of Keras's optimisers."""

    class KerasAdamax(tf.keras.optimizers.legacy.Adamax):
        def _resource_apply_dense(self, grad, var, apply_state=None):
            coefficients = (apply_state or {}).get((var.device, var.dtype.base_dtype))
            coefficients = coefficients or self._fallback_apply_state(
                var.device, var.dtype.base_dtype
            )
            beta_1, beta_2 = coefficients["beta_1_t"], coefficients["beta_2_t"]
            m, u = self.get_slot(var, "m"), self.get_slot(var, "v")  # as in the paper of Adamax
            m = m.assign(beta_1 * m + (1.0 - beta_1) * grad)
            u = u.assign(tf.maximum(beta_2 * u, tf.abs(grad) + 1e-3))
            rate = coefficients["lr_t"] / (1.0 - coefficients["beta_1_power"])
            return var.assign_sub(rate * m / u)

    return KerasAdamax(learning_rate)

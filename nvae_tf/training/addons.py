"""The optimisers of TensorFlow Addons, where that is installed (TensorFlow 2.15)."""

import inspect

import tensorflow as tf

from nvae_tf.config import BUILT_IN_OPTIMIZERS
from nvae_tf.io.errors import ConfigError
from nvae_tf.training.keras_optimizer import KerasOptimizer
from nvae_tf.training.optimizers import Optimizer

INSTALL = 'pip install "nvae-tf[addons]" (Python 3.10 or 3.11, TensorFlow 2.15)'


class AddonsOptimizer(KerasOptimizer):
    """An optimiser of TensorFlow Addons, in place of a built-in one.

    It updates weights one by one, because some optimisers (LAMB) use the norm of each weight.
    Optimisers that wrap another one (Lookahead, SWA) wrap NVAE's Adamax. Weight decay is the
    optimiser's own if it has one, and otherwise L2 decay inside the gradient.

    Args:
        name: Name of the class, in any case: ``"lamb"``, ``"lookahead"``.
        learning_rate: As for `Optimizer`.
        weight_decay: Coefficient of the weight decay, which applies to every variable.

    Raises:
        ConfigError: There is no optimiser of that name, or TensorFlow Addons is missing.
    """

    def __init__(self, name, learning_rate, weight_decay=0.0):
        super().__init__(*_make(name, lambda: self.learning_rate, weight_decay))
        self._learning_rate = learning_rate

    def learning_rate_after(self, steps):
        """The learning rate that the constructor was given, for the step after `steps` others."""
        return Optimizer.learning_rate_after(self, steps)


def _make(name, learning_rate, weight_decay):
    """The optimiser, and the coefficient of the L2 decay that has to be added to gradients."""
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
    """Whether the class needs no arguments other than those that a recipe has."""
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

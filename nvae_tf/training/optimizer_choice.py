"""The optimiser that a configuration names, or that is given to `compile`."""

import tensorflow as tf
import tf_keras

from nvae_tf.config import BUILT_IN_OPTIMIZERS, TrainConfig
from nvae_tf.io.errors import UserError, short_repr
from nvae_tf.training.addons import AddonsOptimizer
from nvae_tf.training.keras_optimizer import KerasOptimizer
from nvae_tf.training.optimizers import Adam, Adamax, AdamW, Optimizer

BUILT_IN = {"adamax": Adamax, "adam": Adam, "adamw": AdamW}
assert tuple(BUILT_IN) == BUILT_IN_OPTIMIZERS


def make_optimizer(config: TrainConfig, learning_rate) -> Optimizer:
    """Makes the optimiser that a configuration names.

    Args:
        config: Gives ``optimizer`` and ``weight_decay``.
        learning_rate: As for `Optimizer`.

    Raises:
        ConfigError: There is no optimiser of that name, or TensorFlow Addons is missing.
    """
    if config.optimizer in BUILT_IN:
        return BUILT_IN[config.optimizer](learning_rate, config.weight_decay)
    return AddonsOptimizer(config.optimizer, learning_rate, config.weight_decay)


def as_optimizer(given, config: TrainConfig, learning_rate) -> tuple[Optimizer, str]:
    """Makes an `Optimizer` of what is given to `compile`; in the scope of the model's strategy.

    Args:
        given: A name, an `Optimizer`, or one of Keras's optimisers.
        config: Gives ``weight_decay`` for our optimisers' names.
        learning_rate: For our optimisers' names: function from the number of steps taken to the
            learning rate.

    Returns:
        The optimiser, and its name in a configuration.

    Raises:
        UserError: `given` is none of these, or cannot be used.
    """
    if isinstance(given, str):
        if given in BUILT_IN:
            return BUILT_IN[given](learning_rate, config.weight_decay), given
        try:
            given = tf_keras.optimizers.get(given)
        except ValueError:
            raise UserError(
                f"optimizer: {short_repr(given)} is not allowed; expected "
                f"{', '.join(BUILT_IN_OPTIMIZERS)}, one of Keras's names, or an optimiser"
            ) from None
    name = type(given).__name__
    if isinstance(given, Optimizer):
        names = {optimizer_class: key for key, optimizer_class in BUILT_IN.items()}
        chosen = given, names.get(type(given), name)
    elif _is_keras_optimizer(given):
        if "LossScale" in name:
            raise UserError(
                f"optimizer: {name} is not supported; make the model with precision='float16', which "
                "scales the loss"
            )
        if getattr(given, "use_ema", False):
            raise UserError(
                f"optimizer: {name} with use_ema is not supported; compile with ema_decay instead"
            )
        chosen = KerasOptimizer(given), name
    else:
        raise UserError(
            f"optimizer: {short_repr(given)} is not allowed; expected a name, nvae_tf.Adamax() or one "
            "of tf_keras.optimizers"
        )
    if not tf.distribute.get_strategy().extended.variable_created_in_scope(given.iterations):
        raise UserError(
            f"optimizer: {name} was made outside of the model's strategy; make both within "
            "strategy.scope()"
        )
    return chosen


def _is_keras_optimizer(value) -> bool:
    kinds = (tf_keras.optimizers.Optimizer, tf_keras.optimizers.legacy.Optimizer)
    return isinstance(value, kinds)

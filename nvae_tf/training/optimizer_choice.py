"""The optimiser that a configuration names."""

from nvae_tf.config import BUILT_IN_OPTIMIZERS, TrainConfig
from nvae_tf.training.addons import AddonsOptimizer
from nvae_tf.training.optimizers import Adam, Adamax, AdamW, Optimizer

BUILT_IN = dict(zip(BUILT_IN_OPTIMIZERS, (Adamax, Adam, AdamW), strict=True))


def make_optimizer(config: TrainConfig, learning_rate) -> Optimizer:
    """Makes the optimiser that a configuration names.

    Args:
        config: Gives ``optimizer`` and ``weight_decay``.
        learning_rate: A number, or a function from the steps taken to one.

    Raises:
        ConfigError: There is no optimiser of that name, or TensorFlow Addons is missing.
    """
    if config.optimizer in BUILT_IN:
        return BUILT_IN[config.optimizer](learning_rate, config.weight_decay)
    return AddonsOptimizer(config.optimizer, learning_rate, config.weight_decay)

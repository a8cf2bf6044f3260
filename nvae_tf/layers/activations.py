"""The activations between convolutions, by name."""

import tensorflow as tf


def swish(x, custom_gradients: bool = False):
    """``x * sigmoid(x)``; with custom gradients only x is stored for the backward pass."""
    return tf.nn.silu(x) if custom_gradients else x * tf.sigmoid(x)


ACTIVATIONS = {
    "none": lambda x, custom_gradients=False: tf.identity(x),
    "elu": lambda x, custom_gradients=False: tf.nn.elu(x),
    "swish": swish,
}


def activate(name: str, x, custom_gradients: bool = False):
    """Applies an activation.

    Args:
        name: One of `ACTIVATIONS`.
        x: A tensor of any shape.
        custom_gradients: See `nvae_tf.engine.scope.Scope`.
    """
    return ACTIVATIONS[name](x, custom_gradients)

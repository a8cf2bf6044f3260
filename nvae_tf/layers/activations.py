"""The activations between convolutions, by name."""

import tensorflow as tf


def swish(x, custom_gradients: bool = False):
    """``x * sigmoid(x)``; with custom gradients only x is stored for the backward pass."""
    return tf.nn.silu(x) if custom_gradients else x * tf.sigmoid(x)


def activate(name: str, x, custom_gradients: bool = False):
    """Applies an activation.

    Args:
        name: One of `ACTIVATIONS`.
        x: A tensor of any shape.
        custom_gradients: See `nvae_tf.engine.scope.Scope`.
    """
    if name == "swish":
        return swish(x, custom_gradients)
    return {"none": tf.identity, "elu": tf.nn.elu}[name](x)


ACTIVATIONS = ("none", "elu", "swish")

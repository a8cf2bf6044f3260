"""The activations that stand between convolutions, by name."""

import tensorflow as tf

from nvae_tf.layers.base import takes_gradients


def swish(x):
    """``x * sigmoid(x)``; where gradients are taken it keeps x alone for the backward pass."""
    return tf.nn.silu(x) if takes_gradients() else x * tf.sigmoid(x)


ACTIVATIONS = {"none": tf.identity, "elu": tf.nn.elu, "swish": swish}

"""The activations that stand between convolutions, by name."""

import tensorflow as tf

ACTIVATIONS = {"none": tf.identity, "elu": tf.nn.elu, "swish": tf.nn.silu}

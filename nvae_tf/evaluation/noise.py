"""Noise that belongs to an image or a sample, not to the batch that it happens to be computed in."""

import math

import tensorflow as tf

from nvae_tf.model import NVAE


def noise_for(model: NVAE, seed, numbers):
    """Standard-normal noise for every group, one row a number.

    Args:
        model: gives the groups' shapes.
        seed: two integers.
        numbers: (n,) int64; a row depends on the seed and its number alone.

    Returns:
        Tensors (n, height, width, latents), one a group, top of the hierarchy first.
    """
    sizes = [math.prod(shape) for shape in model.latent_shapes]

    def row(number):
        own = tf.random.experimental.stateless_fold_in(seed, number)
        return tf.random.stateless_normal([sum(sizes)], own)

    rows = tf.map_fn(row, numbers, fn_output_signature=tf.float32)
    parts = tf.split(rows, sizes, 1)
    return [
        tf.reshape(part, [-1, *shape])
        for part, shape in zip(parts, model.latent_shapes, strict=True)
    ]

"""Random numbers that depend on the index of an image or a sample, not on the batch that it is in."""

import math

import tensorflow as tf

SMALLEST = 2.0**-126  # the smallest normal number above 0 in float32


def normal(shapes, indices, seed):
    """Draws standard-normal noise for each image of a batch.

    An image's noise depends only on the seed and on its index.

    Args:
        shapes: Shapes of the tensors that one image needs.
        indices: Number of images, for the indices from 0 on, or the index of each, integers (batch,).
        seed: Two integers.

    Returns:
        Tensors (batch, *shape), float32, one per shape.
    """
    return _draw(tf.random.stateless_normal, shapes, indices, seed)


def uniform(shapes, indices, seed):
    """Draws uniform noise in the open interval (0, 1); arguments and result as for `normal`."""

    def draw(shape, seed):
        return tf.random.stateless_uniform(shape, seed, minval=SMALLEST)

    return _draw(draw, shapes, indices, seed)


def _draw(draw, shapes, indices, seed):
    """As `normal`; `draw` is a function from a shape and a seed to noise."""
    indices = tf.convert_to_tensor(indices)
    indices = tf.cast(tf.range(indices) if indices.shape.rank == 0 else indices, tf.int64)
    sizes = [math.prod(shape) for shape in shapes]

    def row(index):
        return draw([sum(sizes)], tf.random.experimental.stateless_fold_in(seed, index))

    rows = tf.map_fn(row, indices, fn_output_signature=tf.float32)
    parts = tf.split(rows, sizes, 1)
    return [tf.reshape(part, [-1, *shape]) for part, shape in zip(parts, shapes, strict=True)]

"""Random numbers that belong to an image or a sample, not to the batch it happens to be computed in."""

import math

import tensorflow as tf

SMALLEST = 2.0**-126  # above 0, in float32


def normal(shapes, numbers, seed):
    """Standard-normal noise; see `_draw`."""
    return _draw(tf.random.stateless_normal, shapes, numbers, seed)


def uniform(shapes, numbers, seed):
    """Uniform noise in the open interval (0, 1); see `_draw`."""

    def draw(shape, seed):
        return tf.random.stateless_uniform(shape, seed, minval=SMALLEST)

    return _draw(draw, shapes, numbers, seed)


def _draw(draw, shapes, numbers, seed):
    """Draws one row a number.

    Args:
        draw: from a shape and a seed to noise.
        shapes: of what one image needs: one for each tensor.
        numbers: (batch,) integers, or how many: from 0 on. A row depends on the seed and its number
            alone.
        seed: two integers.

    Returns:
        Tensors (batch, *shape), float32, one a shape.
    """
    numbers = tf.convert_to_tensor(numbers)
    numbers = tf.cast(tf.range(numbers) if numbers.shape.rank == 0 else numbers, tf.int64)
    sizes = [math.prod(shape) for shape in shapes]

    def row(number):
        return draw([sum(sizes)], tf.random.experimental.stateless_fold_in(seed, number))

    rows = tf.map_fn(row, numbers, fn_output_signature=tf.float32)
    parts = tf.split(rows, sizes, 1)
    return [tf.reshape(part, [-1, *shape]) for part, shape in zip(parts, shapes, strict=True)]

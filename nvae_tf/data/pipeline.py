"""Batches of images, as functions of the seed and the place in training alone.

Which image stands where, how it is flipped and how it is binarised are drawn statelessly from (seed,
place), so training can start at any step and sees what it would have seen without stopping.
"""

import numpy as np
import tensorflow as tf

from nvae_tf.config import ImageSpec

# Streams of random numbers, told apart in their seeds.
_ORDER, _FLIP, _BINARIZE = range(3)


def training_batches(
    images: np.ndarray,
    spec: ImageSpec,
    *,
    batch_size: int,
    seed: int,
    flip: bool,
    num_bits: int = 8,
    start_step: int = 0,
) -> tf.data.Dataset:
    """An endless sequence of batches; each epoch is another random order of the images.

    An epoch has ``len(images) // batch_size`` steps; what is left over, other images each time, waits
    for the next.

    Args:
        images: 8-bit, (n, height, width, channels).
        spec: of the images.
        batch_size: images per batch.
        seed: of order and augmentation.
        flip: mirror images at random.
        num_bits: bits per colour value that are kept.
        start_step: batches to pass over.

    Returns:
        Batches (batch_size, height, width, channels), float32 in [0, 1].
    """
    per_epoch = len(images) // batch_size * batch_size
    decode = _decoder(images, spec, num_bits)

    def example(place):
        epoch, position = place // per_epoch, place % per_epoch
        order = _fold(seed, _ORDER, epoch)
        index = tf.random.experimental.index_shuffle(position, order, len(images) - 1)
        image = decode(index, _fold(seed, _BINARIZE, place))
        if flip:
            heads = tf.random.stateless_uniform([], _fold(seed, _FLIP, place)) < 0.5
            image = tf.where(heads, image[:, ::-1], image)
        return image

    places = tf.data.Dataset.range(start_step * batch_size, np.iinfo(np.int64).max)
    examples = places.map(example, num_parallel_calls=tf.data.AUTOTUNE)
    return examples.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def evaluation_batches(
    images: np.ndarray, spec: ImageSpec, *, batch_size: int, seed: int, num_bits: int = 8
) -> tf.data.Dataset:
    """Every image once, in order; the last batch may be smaller.

    Args:
        images: as for `training_batches`.
        spec: of the images.
        batch_size: images per batch.
        seed: of the binarisation.
        num_bits: bits per colour value that are kept.

    Returns:
        Batches (up to batch_size, height, width, channels), float32 in [0, 1].
    """
    decode = _decoder(images, spec, num_bits)
    examples = tf.data.Dataset.range(len(images)).map(
        lambda index: decode(index, _fold(seed, _BINARIZE, index)),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return examples.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def _decoder(images: np.ndarray, spec: ImageSpec, num_bits: int):
    """The function from an index to an image in [0, 1], binarised or reduced to its bits."""
    with tf.device("CPU"):
        stored = tf.constant(images)

    def decode(index, seed):
        image = stored[index]
        if spec.binary:
            grey = tf.cast(image, tf.float32) / 255.0
            return tf.cast(tf.random.stateless_uniform(spec.shape, seed) < grey, tf.float32)
        levels = tf.bitwise.right_shift(image, tf.constant(8 - num_bits, tf.uint8))
        return tf.cast(levels, tf.float32) / (2.0**num_bits - 1.0)

    return decode


def _fold(seed: int, stream: int, number):
    """A seed for one number (an epoch, a place, an image) of one stream."""
    return tf.random.experimental.stateless_fold_in((seed, stream), number)

"""Batches of images, as functions of the seed and the position in training alone.

The order of the images, their crops, flips and binarisation are drawn statelessly from the seed and an
index. So training can resume at any step and sees the same batches as without a stop.
"""

import numpy as np
import tensorflow as tf

from nvae_tf.data.catalog import DatasetInfo
from nvae_tf.data.source import Source
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.machine import usable_cores

# Streams of random numbers, each with its own seed.
_ORDER, _FLIP, _CROP, _BINARIZE = range(4)

PREFETCHED = 4  # batches that are made ahead

# AutoGraph's conversion of our Python takes a second per data set, and changes nothing.
_without_autograph = tf.autograph.experimental.do_not_convert


def training_batches(
    source: Source,
    dataset: DatasetInfo,
    *,
    batch_size: int,
    seed: int,
    num_bits: int | None = None,
    start_step: int = 0,
    worker: int = 0,
    num_workers: int = 1,
    parts: int = 1,
    passes: int = 1,
) -> tf.data.Dataset:
    """Returns an endless sequence of batches, with a new random order of the images in each epoch.

    An epoch has ``len(source) // batch_size`` steps. The images that remain, different ones in each
    epoch, are left out. Each worker reads only its share of a batch; the shares of all workers together
    are the batch that a single worker would read.

    Args:
        source: The training images.
        dataset: Description of the data set.
        batch_size: Number of images per batch, over all workers.
        seed: Seed of order, augmentation and binarisation.
        num_bits: Number of bits per value that are kept; default: all.
        start_step: Number of batches to skip.
        worker: Index of this worker.
        num_workers: Number of workers that share each batch; it must divide the batch size.
        parts: Number of parts into which a worker's share of each batch is split, one per device. The
            parts follow one another in the data set.
        passes: Number of passes in which a batch is computed. In each pass, all devices of all workers
            together get the images that a single device would get in that pass.

    Returns:
        A data set of parts (batch_size / num_workers / parts, height, width, channels), float32 in
        [0, 1], each with the images of the first pass first.
    """
    per_epoch = len(source) // batch_size * batch_size
    share = batch_size // num_workers
    part = share // parts
    part_of_pass = part // passes
    spec = dataset.image

    @_without_autograph
    def example(local_place):
        step, in_share = local_place // share, local_place % share
        replica, in_part = worker * parts + in_share // part, in_share % part
        before = in_part // part_of_pass * num_workers * parts + replica
        place = step * batch_size + before * part_of_pass + in_part % part_of_pass
        epoch, position = place // per_epoch, place % per_epoch
        order = _stream_seed(seed, _ORDER, epoch)
        index = tf.random.experimental.index_shuffle(position, order, len(source) - 1)
        image, _ = source.example(index)
        image = _crop(
            image, spec, tf.random.stateless_uniform([2], _stream_seed(seed, _CROP, place))
        )
        if dataset.flip:
            heads = tf.random.stateless_uniform([], _stream_seed(seed, _FLIP, place)) < 0.5
            # This is ten times as fast as tf.where with a slice of negative step.
            image = tf.cond(heads, lambda: tf.reverse(image, [1]), lambda: image)
        return _to_unit(image, spec, num_bits, _stream_seed(seed, _BINARIZE, place))

    local_places = tf.data.Dataset.range(start_step * share, np.iinfo(np.int64).max)
    examples = local_places.map(example, num_parallel_calls=usable_cores())
    return prefetched(examples.batch(part, drop_remainder=True))


def evaluation_batches(
    source: Source,
    dataset: DatasetInfo,
    *,
    batch_size: int,
    seed: int,
    num_bits: int | None = None,
    with_labels: bool = False,
    by_content: bool = False,
) -> tf.data.Dataset:
    """Returns batches of every image once, in order, cropped to the centre; the last may be smaller.

    Args:
        source: The images.
        dataset: Description of the data set.
        batch_size: Number of images per batch.
        seed: Seed of the binarisation.
        num_bits: Number of bits per value that are kept; default: all.
        with_labels: Whether to yield pairs of images and labels, (up to batch_size,) int64.
        by_content: Whether the binarisation of an image depends on its content instead of its index,
            which makes it the same in every data set.

    Returns:
        Batches (up to batch_size, height, width, channels), float32 in [0, 1].
    """

    @_without_autograph
    def example(index):
        image, label = _evaluation_example(source, dataset.image, index, seed, num_bits, by_content)
        return (image, label) if with_labels else image

    indices = tf.data.Dataset.range(len(source))
    examples = indices.map(example, num_parallel_calls=usable_cores())
    return prefetched(examples.batch(batch_size))


def validation_batches(
    source: Source,
    dataset: DatasetInfo,
    *,
    batch_size: int,
    seed: int,
    num_bits: int | None = None,
    worker: int = 0,
    num_workers: int = 1,
    parts: int = 1,
) -> tf.data.Dataset:
    """Returns batches of equal size which, over all workers, hold every image once.

    Args:
        source: The images.
        dataset: Description of the data set.
        batch_size: Number of images per batch, over all workers.
        seed: Seed of the binarisation.
        num_bits: Number of bits per value that are kept; default: all.
        worker: As for `training_batches`.
        num_workers: As for `training_batches`.
        parts: As for `training_batches`.

    Returns:
        A data set of tuples: images as for `training_batches`, their indices, int64 (batch,), and
        weights, float32 (batch,), which are 0 for images that only fill the last batch and otherwise 1.
    """
    share = batch_size // num_workers
    num_batches = -(-len(source) // batch_size)

    @_without_autograph
    def example(local_place):
        place = local_place // share * batch_size + worker * share + local_place % share
        index = tf.minimum(place, len(source) - 1)
        weight = tf.cast(place < len(source), tf.float32)
        return _evaluation_example(source, dataset.image, index, seed, num_bits)[0], index, weight

    local_places = tf.data.Dataset.range(num_batches * share)
    examples = local_places.map(example, num_parallel_calls=usable_cores())
    return prefetched(examples.batch(share // parts, drop_remainder=True))


def prefetched(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Prefetches batches, without TensorFlow's tuning of data sets.

    The tuning takes more time here than it gains, and its thread makes the end of an iterator, and so
    of a training, wait for up to a minute.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.prefetch(PREFETCHED).with_options(options)


def _evaluation_example(
    source: Source,
    spec: ImageSpec,
    index,
    seed: int,
    num_bits: int | None,
    by_content: bool = False,
):
    """Returns an image as evaluation sees it, and its label."""
    image, label = source.example(index)
    image = _crop(image, spec, tf.constant([0.5, 0.5]))
    if by_content:
        index = tf.strings.to_hash_bucket_fast(
            tf.io.serialize_tensor(image), np.iinfo(np.int64).max
        )
    return _to_unit(image, spec, num_bits, _stream_seed(seed, _BINARIZE, index)), label


def _crop(image, spec: ImageSpec, portions):
    """Crops an image to the spec's size.

    Args:
        image: Levels (height, width, channels), at least of the spec's size.
        spec: The size to crop to.
        portions: Where the crop lies between top and bottom and between left and right, two numbers in
            [0, 1).
    """
    if image.shape[:2] != spec.shape[:2]:
        room = tf.cast(tf.shape(image)[:2] - spec.shape[:2] + 1, tf.float32)
        top, left = tf.unstack(tf.cast(portions * room, tf.int32))
        image = image[top : top + spec.height, left : left + spec.width]
    return tf.ensure_shape(image, spec.shape)


def _to_unit(image, spec: ImageSpec, num_bits: int | None, seed):
    """Converts levels to float32 in [0, 1]: binary images at random, others reduced to `num_bits`."""
    if spec.binary:
        grey = tf.cast(image, tf.float32) / (2.0**spec.bits - 1.0)
        return tf.cast(tf.random.stateless_uniform(spec.shape, seed) < grey, tf.float32)
    num_bits = num_bits or spec.bits
    levels = tf.bitwise.right_shift(image, tf.constant(spec.bits - num_bits, image.dtype))
    return tf.cast(levels, tf.float32) / (2.0**num_bits - 1.0)


def _stream_seed(seed: int, stream: int, index):
    """Returns the seed for an index (of an epoch, a position or an image) in one stream."""
    return tf.random.experimental.stateless_fold_in((seed, stream), index)

"""Checks the images that `fit` and `evaluate` are given, and makes batches of them."""

import numpy as np
import tensorflow as tf

from nvae_tf import checks
from nvae_tf.data.pipeline import prefetched
from nvae_tf.io.errors import UserError
from nvae_tf.io.text import counted

DEFAULT_BATCH_SIZE = 32
CHECKED = 4096  # images whose values are compared with levels at a time
ROUNDING = 1e-3  # allowed distance from a level, in levels
FLOAT_ROUNDING = 2.0**-23  # rounding of the value 1 in float32


class Batching:
    """Makes batches of images for a model.

    Args:
        model: The model.
        replicas: Number of replicas that share a batch.
        passes: Number of passes that share the images of a training step.
        seed: Seed of the order of images.
    """

    def __init__(self, model, replicas: int, passes: int, seed: int):
        self.model, self.replicas, self.passes, self.seed = model, replicas, passes, seed

    def training(
        self, x, batch_size: int | None, steps: int | None, shuffle: bool, first_step: int
    ):
        """Batches of images for training.

        Args:
            x: Images, or a data set of batches (see `KerasTraining.fit`).
            batch_size: Number of images per step, for an array.
            steps: Number of steps per epoch, or None.
            shuffle: Whether each epoch takes the images of an array in a different random order.
            first_step: Number of steps taken before, which changes the orders from call to call.

        Returns:
            A data set of batches of images, and the number of steps per epoch.

        Raises:
            UserError: An argument is wrong.
        """
        checks.check_count("steps_per_epoch", steps, optional=True)
        if not checks.is_array(x):
            return self._training_dataset(x, batch_size, steps)
        size, images = self._checked_array(x, batch_size, self.passes)
        if len(images) < size:
            raise UserError(
                f"batch_size: {size} is not allowed; expected at most the number of images, "
                f"{len(images)}"
            )
        places = tf.data.Dataset.range(len(images))
        if shuffle:
            (seed,) = np.random.SeedSequence([self.seed, first_step]).generate_state(1)
            places = places.shuffle(len(images), int(seed), reshuffle_each_iteration=True)
        if steps is not None:
            places = places.repeat()
        batches = places.batch(size, drop_remainder=True).map(lambda rows: tf.gather(images, rows))
        return prefetched(batches), steps or len(images) // size

    def evaluation(self, x, batch_size: int | None, steps: int | None, sized: bool = False):
        """Batches for evaluation.

        Args:
            x: As for `training`.
            batch_size: Number of images per batch, for an array.
            steps: Number of batches, or None for all.
            sized: Whether Keras has to know the number of batches beforehand. If the data set does not
                know it, they are counted.

        Returns:
            A data set of tuples (images, indices among all images, weights), where the weight is 0 for
            images that only fill a batch and otherwise 1; and how many batches to take, or None for
            all.

        Raises:
            UserError: An argument is wrong.
        """
        checks.check_count("steps", steps, optional=True)
        if isinstance(x, tf.distribute.DistributedDataset):
            if not isinstance(x.element_spec, tuple) or len(x.element_spec) != 3:
                raise UserError(
                    "x: a distributed data set of other elements; expected tuples of images, their "
                    "places among all, and weights"
                )
            if sized and steps is None:
                raise UserError(
                    "steps: are needed beside steps_per_execution for a distributed data set, whose "
                    "size is unknown"
                )
            return x, steps
        if not checks.is_array(x):
            images = self._images_of_dataset(x, batch_size, whole=False)
            checks.check_ends(images, steps)

            def numbered(before, images):
                count = tf.shape(images, tf.int64)[0]
                return before + count, (images, before + tf.range(count), tf.ones(count))

            size = images.element_spec.shape[0]
            if self.replicas > 1 and (size is None or size % self.replicas):
                # Filled batches have another size, so there is another number of them.
                return self._filled(images if steps is None else images.take(steps)), None
            batches = images.scan(tf.constant(0, tf.int64), numbered)
            if sized and steps is None and images.cardinality() < 0:
                count = images.reduce(np.int64(0), lambda count, _: count + 1)
                batches = batches.apply(tf.data.experimental.assert_cardinality(int(count)))
            return batches, steps
        size, images = self._checked_array(x, batch_size, 1)
        total, last = -(-len(images) // size) * size, len(images) - 1

        def batch(places):
            rows = tf.minimum(places, last)
            return tf.gather(images, rows), rows, tf.cast(places <= last, tf.float32)

        batches = tf.data.Dataset.range(total).batch(size, drop_remainder=True).map(batch)
        return prefetched(batches), steps

    def for_replicas(self, images):
        """Reorders the images of a step, of which each replica receives one contiguous part.

        A replica computes its part pass by pass. Each pass should hold the same images over all
        replicas as it would with one. So the images of a pass are divided among the replicas, and the
        part of a replica has its images of the first pass first.

        Args:
            images: The images of a step, or a data set of such batches. A distributed data set is
                returned as it is.
        """
        if self.passes == 1 or self.replicas == 1:
            return images
        if isinstance(images, tf.distribute.DistributedDataset):
            return images
        if isinstance(images, tf.data.Dataset):
            return images.map(self.for_replicas)
        images = tf.convert_to_tensor(images)
        parts = tf.reshape(images, [self.passes, self.replicas, -1, *images.shape[1:]])
        return tf.reshape(tf.transpose(parts, [1, 0, 2, 3, 4, 5]), tf.shape(images))

    def check(self, images) -> None:
        """Checks one batch of a training step.

        Raises:
            UserError: The images have another type or shape, or other values, or cannot be divided.
        """
        checks.check_images(images, self.model.image)
        self._check_divisible("x", checks.batch_of(images), self.passes)
        self._check_levels(images)

    def _filled(self, images) -> tf.data.Dataset:
        """Batches for evaluation of a size that replicas can share; the last one is zero-padded.

        Args:
            images: A data set of batches of images, of any sizes.

        Returns:
            As for `evaluation`, without the number of batches.
        """
        size = int(next(iter(images.take(1))).shape[0])
        size = -(-size // self.replicas) * self.replicas
        single = images.unbatch().enumerate().map(lambda place, one: (one, place, tf.ones(())))
        shapes = (self.model.image.shape, (), ())

        def fill(*batch):
            missing = size - tf.shape(batch[0])[0]
            parts = zip(batch, shapes, strict=True)
            return tuple(
                tf.ensure_shape(
                    tf.pad(part, [[0, missing], *([[0, 0]] * len(shape))]), (size, *shape)
                )
                for part, shape in parts
            )

        # Keras has to know the number of batches where several steps are taken in a call.
        total = images.reduce(
            tf.constant(0, tf.int64), lambda total, batch: total + tf.shape(batch, tf.int64)[0]
        )
        count = -(-int(total) // size)
        filled = single.batch(size).map(fill)
        return filled.apply(tf.data.experimental.assert_cardinality(count))

    def _training_dataset(self, x, batch_size, steps):
        if isinstance(x, tf.distribute.DistributedDataset):
            if steps is None:
                raise UserError(
                    "steps_per_epoch: is needed for a distributed data set, whose size is unknown"
                )
            return x, steps
        images = self._images_of_dataset(x, batch_size)
        self._check_divisible("x", images.element_spec.shape[0], self.passes)
        size = int(x.cardinality())
        if steps is None and size < 0:
            kind = "endless" if size == tf.data.INFINITE_CARDINALITY else "of unknown size"
            raise UserError(
                f"x: a data set that is {kind}; expected steps_per_epoch beside it, the number of its "
                "batches that make an epoch"
            )
        return images, steps or size

    def _images_of_dataset(self, x, batch_size, whole: bool = True) -> tf.data.Dataset:
        """A data set's images alone, checked; with `whole`, batches that replicas can share."""
        x, first = checks.images_of_dataset(x, self.model.image)
        if batch_size is not None:
            raise UserError("batch_size: a data set has its own; expected none beside one")
        size = x.element_spec.shape[0]
        if size is None and self.replicas * self.passes > 1 and whole:
            sharers = self._sharers(self.passes)
            raise UserError(
                f"x: batches of unknown size, which {sharers} cannot share; expected "
                "dataset.batch(size, drop_remainder=True)"
            )
        if whole:
            self._check_divisible("x", size, 1)
        self._check_levels(first)
        return x

    def _checked_array(self, x, batch_size, passes):
        size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
        checks.check_count("batch_size", size)
        if isinstance(x, tf.Variable):
            x = x.read_value()
        self._check_divisible("batch_size", size, passes)
        checks.check_images(x, self.model.image)
        for start in range(0, len(x), CHECKED):
            self._check_levels(x[start : start + CHECKED])
        with tf.device("CPU"):
            x = tf.cast(x, tf.float32) if tf.is_tensor(x) else x
            return size, tf.convert_to_tensor(x, tf.float32)

    def _check_divisible(self, name: str, size: int | None, passes: int) -> None:
        parts = self.replicas * passes
        if size is not None and size % parts:
            raise UserError(
                f"{name}: batches of {size} images; expected a multiple of {parts}, for "
                f"{self._sharers(passes)}"
            )

    def _sharers(self, passes: int) -> str:
        return f"{counted(self.replicas, 'replica')} and {counted(passes, 'accumulated pass')}"

    def _check_levels(self, images) -> None:
        """Refuses values that are not levels of the model's bits, for which there is no likelihood."""
        image, bits = self.model.image, self.model.num_bits
        last = 1 if image.binary else 2**bits - 1
        levels = np.asarray(images, np.float64) * last
        rounding = max(ROUNDING, last * FLOAT_ROUNDING)
        if np.abs(levels - np.round(levels)).max() > rounding:
            advice = (
                "0 or 1: binarise them, images > 0.5 for example"
                if image.binary
                else f"multiples of 1/{last}, the levels of {bits} bits: "
                f"np.round(images.astype('float32') * {last}) / {last} for example"
            )
            raise UserError(f"images: values between levels; expected {advice}")

"""Images by index: the interface of every data set to the pipeline.

The pipeline draws a permutation and fetches images by index. This random access makes the order of
images a function of the seed alone, whatever the number of workers, readers or restarts.
"""

import contextlib
import traceback
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from nvae_tf.io.errors import UserError


class Source:
    """A split of a data set. Subclasses implement ``__len__``, the number of images, and `example`."""

    def __len__(self):
        raise NotImplementedError

    def example(self, index) -> tuple[tf.Tensor, tf.Tensor]:
        """Fetches one image, inside a tf.data function.

        Args:
            index: Index of the image, a scalar int64 tensor.

        Returns:
            The image (height, width, channels), uint8 or, for more than 8 bits, uint16, and its label,
            scalar int64.
        """
        raise NotImplementedError

    def file_names(self) -> list[str]:
        """Names of the files that the images come from, without folders; empty if there are none."""
        return []


class ArraySource(Source):
    """Images in memory.

    Args:
        images: Images (n, height, width, channels), uint8 or uint16.
        labels: Integers (n,); default: zeros.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None):
        labels = np.zeros(len(images), np.int64) if labels is None else labels
        with tf.device("CPU"):
            self.images = tf.constant(images)
            self.labels = tf.constant(np.asarray(labels, np.int64).reshape(-1))

    def __len__(self):
        return len(self.images)

    def example(self, index):
        """Looks up one image and its label."""
        return self.images[index], self.labels[index]


class StackedSource(Source):
    """Grey images stacked three at a time as red, green and blue (stacked MNIST).

    Args:
        grey: Images of digits (n, height, width, 1), with their labels.
        seed: Seed of the permutations that choose which three digits are stacked; there are 2n stacks.
    """

    ROUNDS = 2

    def __init__(self, grey: ArraySource, seed: int):
        self.grey = grey
        rng = np.random.RandomState(seed)
        rounds = [[rng.permutation(len(grey)) for _ in range(3)] for _ in range(self.ROUNDS)]
        with tf.device("CPU"):
            self.triples = tf.constant(np.concatenate([np.stack(r, 1) for r in rounds]))

    def __len__(self):
        return len(self.triples)

    def example(self, index):
        """Stacks three digits; their labels are the digits of one label from 0 to 999."""
        triple = self.triples[index]
        image = tf.concat(tf.unstack(tf.gather(self.grey.images, triple), 3), -1)
        label = tf.reduce_sum(tf.gather(self.grey.labels, triple) * [100, 10, 1])
        return image, label


class EvenlySpread(Source):
    """Evenly spaced images of a source, beginning with the first.

    Args:
        source: The source.
        max_images: Number of images; all if there are fewer.
        without: Indices of images to leave out.
    """

    def __init__(self, source: Source, max_images: int, without: Sequence[int] = ()):
        left = np.setdiff1d(np.arange(len(source), dtype=np.int64), without)
        count = min(len(left), max_images)
        self.source = source
        self.indices = left[np.arange(count, dtype=np.int64) * len(left) // max(count, 1)]

    def __len__(self):
        return len(self.indices)

    def example(self, index):
        """Fetches one of them."""
        return self.source.example(tf.gather(self.indices, index))


class PythonSource(Source):
    """A source that fetches images with Python code, which subclasses implement in `fetch`.

    tf.data turns exceptions into TensorFlow errors, so the first `UserError` is stored here, and
    `reading` raises it instead.

    Args:
        dtype: Type of the images' values, uint8 or uint16.
    """

    def __init__(self, dtype=np.uint8):
        self.dtype = np.dtype(dtype)
        self.failure: UserError | None = None

    def fetch(self, index: int) -> tuple[np.ndarray, int]:
        """Fetches one image (height, width, channels) of the source's type, and its label."""
        raise NotImplementedError

    def example(self, index):
        """Calls `fetch`."""
        image, label, readable = tf.numpy_function(
            self._guarded_fetch, [index], [tf.as_dtype(self.dtype), tf.int64, tf.bool]
        )
        # The failure is raised here, because TensorFlow prints the traceback of a Python exception.
        with tf.control_dependencies([tf.debugging.Assert(readable, ["an image is not readable"])]):
            image = tf.ensure_shape(image, [None, None, None])
        return image, tf.ensure_shape(label, [])

    def _guarded_fetch(self, index):
        try:
            image, label = self.fetch(int(index))
        except UserError as error:
            self.failure = self.failure or error
            return np.zeros((0, 0, 0), self.dtype), np.int64(0), np.bool_(False)
        return image, np.int64(label), np.bool_(True)


@contextlib.contextmanager
def reading(*sources: Source):
    """Raises a source's own `UserError` in place of the TensorFlow error that tf.data turned it into.

    It also ends tf.data's threads when the block fails. These threads call Python for every image of a
    `PythonSource`. If an iterator were freed only at the interpreter's shutdown, it would wait for ever
    for such calls, because Python then stops foreign threads. The frames of a traceback hold iterators,
    so the frames are cleared here, while Python still runs.

    Args:
        sources: The sources that the block reads. Errors stored by earlier blocks are cleared.

    Raises:
        UserError: A source could not deliver an image.
    """
    python_sources = [source for source in sources if isinstance(source, PythonSource)]
    for source in python_sources:
        source.failure = None
    try:
        yield
    except (tf.errors.OpError, UserError, KeyboardInterrupt) as error:
        traceback.clear_frames(error.__traceback__)
        failures = [source.failure for source in python_sources if source.failure]
        if isinstance(error, tf.errors.OpError) and failures:
            raise failures[0] from None
        raise


class CachedSource(PythonSource):
    """Caches the images of another source in memory, so that each is decoded once.

    Args:
        source: Source whose images all have the same shape.
        shape: Height, width and channels of the images.
    """

    def __init__(self, source: PythonSource, shape: tuple[int, int, int]):
        super().__init__(source.dtype)
        self.source = source
        self._images = np.empty((len(source), *shape), source.dtype)
        self._labels = np.zeros(len(source), np.int64)
        self._cached = np.zeros(len(source), bool)

    def __len__(self):
        return len(self.source)

    def file_names(self):
        """The file names of the other source."""
        return self.source.file_names()

    def fetch(self, index):
        """Returns an image from memory, after fetching it the first time."""
        if not self._cached[index]:
            self._images[index], self._labels[index] = self.source.fetch(index)
            self._cached[index] = True
        return self._images[index], self._labels[index]

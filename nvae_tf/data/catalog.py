"""The data sets by name: what each looks like, and where its images are read from."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nvae_tf.config import ImageSpec
from nvae_tf.data import sources
from nvae_tf.errors import ConfigError


@dataclass(frozen=True)
class DataSet:
    """One description per data set; nothing else in the project depends on a data set's name.

    Attributes:
        name: as in the configuration.
        image: what the model has to know of it.
        flip: mirror images at random in training.
        read: reads training and test images from a folder; None where no reader exists yet.
    """

    name: str
    image: ImageSpec
    flip: bool = True
    read: Callable[[str], tuple[np.ndarray, np.ndarray]] | None = None

    def load(self, folder: str) -> tuple[np.ndarray, np.ndarray]:
        """Reads training and test images.

        Args:
            folder: that holds the data; empty for the library's own copy.

        Returns:
            8-bit arrays (n, height, width, channels).

        Raises:
            UserError: the data is missing or not what its name promises.
        """
        if self.read is None:
            raise ConfigError(f"dataset: there is no reader for {self.name} yet")
        return self.read(folder)


_PADDED_BINARY = ImageSpec(32, 1, binary=True, scored_size=28)

_ALL = [
    DataSet("digits", _PADDED_BINARY, flip=False, read=sources.read_digits),
    DataSet("mnist", _PADDED_BINARY, flip=False, read=sources.read_mnist),
    DataSet("cifar10", ImageSpec(32, 3), read=sources.read_cifar10),
    DataSet("celeba_64", ImageSpec(64, 3)),
    DataSet("celeba_256", ImageSpec(256, 3)),
    DataSet("imagenet_32", ImageSpec(32, 3)),
    DataSet("imagenet_64", ImageSpec(64, 3)),
    DataSet("ffhq", ImageSpec(256, 3)),
]
DATASETS = {dataset.name: dataset for dataset in _ALL}


def find(name: str) -> DataSet:
    """The data set of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in DATASETS:
        raise ConfigError(
            f"dataset: {name!r} is not allowed; expected one of {', '.join(DATASETS)}"
        )
    return DATASETS[name]

"""The data sets by name: what their images are like, and how they are opened."""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from nvae_tf.config import AUTO, DataConfig, ImageSpec
from nvae_tf.data import arrays, images, tfrecords
from nvae_tf.data.photographs import read_photos
from nvae_tf.data.source import CachedSource, Source
from nvae_tf.data.where import check_data
from nvae_tf.io.errors import ConfigError, UserError

OWN = "own"  # the data set of a run whose images were given in Python
CACHE_PORTION = 0.25  # of the machine's memory, for images decoded on the fly


@dataclass(frozen=True)
class DatasetInfo:
    """One description per data set; nothing else in the project depends on a data set's name.

    Attributes:
        name: Name in the configuration.
        image: What the model has to know about the images.
        open: Opens the training and the test images in a folder; raises `UserError` if they are
            missing or not what they should be.
        flip: Whether images are mirrored at random in training.
        fid_on_all: Whether FID compares with training and test images, as published for this data
            set, instead of with training images alone.
    """

    name: str
    image: ImageSpec
    open: Callable[[str], tuple[Source, Source]]
    flip: bool = True
    fid_on_all: bool = False


def get_dataset_info(config: DataConfig) -> DatasetInfo:
    """Returns the description of the data set that a configuration names.

    Args:
        config: Section ``data`` of the configuration.

    Raises:
        ConfigError: There is no data set of that name, or it has another ``image_size``.
        UserError: The image size depends on the data set's files, and those are missing.
    """
    dataset = _find_dataset(config)
    flip = dataset.flip if config.flip == AUTO else bool(config.flip)
    return dataclasses.replace(dataset, flip=flip, open=functools.partial(_open, dataset))


def names() -> list[str]:
    """The data sets that a name alone describes."""
    return list(_BUILT_IN)


def given_images(image: ImageSpec) -> DatasetInfo:
    """A data set of images that a user gives, which are not kept.

    Args:
        image: What they are like.
    """
    return DatasetInfo(OWN, image, _not_kept, flip=False)


def _not_kept(_: str):
    raise UserError(
        "own: the images of this run were given in Python and are not kept; score images with "
        "nvae_tf.load(folder) there, or name files with --images"
    )


def _open(dataset: DatasetInfo, folder: str) -> tuple[Source, Source]:
    check_data(DataConfig(dataset=dataset.name, data=folder))
    return dataset.open(folder)


def _find_dataset(config: DataConfig) -> DatasetInfo:
    if config.dataset == OWN:
        _not_kept(config.data)
    if config.dataset == "images":
        return _images(config)
    if config.dataset == "tfrecords":
        if not config.size:
            check_data(config)  # whose tfrecords have the size
        size = config.size[0] if config.size else _only_size(config.data)
        return _tfrecords(config.dataset, size, cropped=config.crop == images.RANDOM)
    dataset = _BUILT_IN.get(config.dataset) or _lsun(config.dataset)
    if dataset is None:
        known = ", ".join(
            [*_BUILT_IN, "lsun_{bedroom,church,tower}_{64,128,256}", "images", "tfrecords"]
        )
        raise ConfigError(f"dataset: {config.dataset!r} is not allowed; expected one of {known}")
    if config.size not in (None, dataset.image.shape[:2]):
        raise ConfigError(
            f"image_size: {config.image_size} is not allowed; the images of {config.dataset} are "
            f"{dataset.image.size_text}"
        )
    for name in ("channels", "bits"):
        chosen, value = getattr(config, name), getattr(dataset.image, name)
        if chosen not in (0, value):
            raise ConfigError(
                f"{name}: {chosen} is not allowed; the images of {config.dataset} have {value}"
            )
    return dataset


def _tfrecords(name: str, size: int, evaluation="validation", cropped=False) -> DatasetInfo:
    """A data set kept as GLOW's tfrecords."""

    def open_splits(folder):
        root = tfrecords.find_root(folder)
        sources = [
            tfrecords.TFRecordSource(root, split, size, cropped) for split in ("train", evaluation)
        ]
        return tuple(sources)

    return DatasetInfo(name, ImageSpec(size, size, 3), open_splits)


def _only_size(folder: str) -> int:
    root = tfrecords.find_root(folder)
    sizes = tfrecords.sizes(root, "train")
    if len(sizes) != 1:
        raise ConfigError(
            f"image_size: {root} holds images of several sizes; choose one of {sizes} with --image_size"
        )
    return sizes[0]


def _images(config: DataConfig) -> DatasetInfo:
    """A plain folder of image files."""
    if not config.size:
        raise ConfigError(
            "image_size: 0 is not allowed with dataset images; give their side in pixels"
        )
    spec = ImageSpec(*config.size, 3)

    def cached_if_small(source):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        bytes_needed = len(source) * math.prod(spec.shape)
        one_shape = config.crop != images.RANDOM
        return (
            CachedSource(source, spec.shape)
            if one_shape and bytes_needed < CACHE_PORTION * memory
            else source
        )

    open_splits = functools.partial(
        images.open_folder, spec=spec, crop=config.crop, wrap=cached_if_small
    )
    return DatasetInfo("images", spec, open_splits)


def _lsun(name: str) -> DatasetInfo | None:
    """An LSUN scene in one of its sizes, or None if the name is not one of those."""
    match = re.fullmatch(r"lsun_(bedroom|church|tower)_(64|128|256)", name)
    return match and _tfrecords(name, int(match[2]), cropped=True)


_PADDED_BINARY = ImageSpec(32, 32, 1, binary=True, scored_size=(28, 28))
_PADDED_COLOUR = ImageSpec(32, 32, 3, scored_size=(28, 28))

_BUILT_IN = {
    dataset.name: dataset
    for dataset in (
        DatasetInfo("digits", _PADDED_BINARY, arrays.read_digits, flip=False),
        DatasetInfo("photos", ImageSpec(32, 32, 3), read_photos),
        DatasetInfo("mnist", _PADDED_BINARY, arrays.read_mnist, flip=False),
        DatasetInfo("omniglot", _PADDED_BINARY, arrays.read_omniglot, flip=False, fid_on_all=True),
        DatasetInfo("stacked_mnist", _PADDED_COLOUR, arrays.read_stacked_mnist, flip=False),
        DatasetInfo("cifar10", ImageSpec(32, 32, 3), arrays.read_cifar10),
        _tfrecords("celeba_64", 64, evaluation="test"),
        dataclasses.replace(_tfrecords("celeba_256", 256), fid_on_all=True),
        _tfrecords("imagenet_32", 32),
        _tfrecords("imagenet_64", 64),
        _tfrecords("ffhq", 256),
    )
}

"""The data sets by name: descriptions of their images, and how to open them."""

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from nvae_tf.config import AUTO, RANDOM, DataConfig
from nvae_tf.data import arrays, images, prepared, settling, survey, tfrecords
from nvae_tf.data.photographs import SIZES as PHOTO_SIZES
from nvae_tf.data.photographs import read_photos
from nvae_tf.data.source import Source
from nvae_tf.data.where import check_data
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import ConfigError, UserError

OWN = "own"  # the data set of a run whose images were given in Python
IMAGES, TFRECORDS = "images", "tfrecords"  # data sets of the user's own files
FOR_FOLDERS = ("alpha", "crop", "strict")  # keys that apply only to the user's own files
FOUND = ("image_size", "channels", "bits", "value_range", "alpha")  # keys that `settle` may change


@dataclass(frozen=True)
class DatasetInfo:
    """The description of a data set.

    Attributes:
        name: Name in the configuration.
        image: Description of the images for the model.
        read: Function from a folder to the sources of training and test images; raises `UserError` if
            they are missing or not as expected.
        flip: Whether images are mirrored at random in training.
        fid_on_all: Whether FID compares with training and test images together, as published results
            for this data set do, instead of with training images alone.
        skipped: Lines about images that cannot be used, to print at the end of a command.
    """

    name: str
    image: ImageSpec
    read: Callable[[str], tuple[Source, Source]]
    flip: bool = True
    fid_on_all: bool = False
    skipped: tuple[str, ...] = ()

    def open(self, folder: str) -> tuple[Source, Source]:
        """Opens the training and the test images.

        Args:
            folder: The folder that holds them; empty for data sets that need none.

        Raises:
            UserError: The images are missing or not as expected, or a folder is given to a data set
                that needs none.
        """
        check_data(DataConfig(dataset=self.name, data=folder))
        return self.read(folder)


class Settled(NamedTuple):
    """A complete configuration, with every open setting resolved, and its data set.

    Attributes:
        config: Section ``data`` with nothing left open.
        dataset: Description of the data set.
        lines: Lines to print about what was found and decided.
    """

    config: DataConfig
    dataset: DatasetInfo
    lines: list[str]


def settle(config: DataConfig) -> Settled:
    """Resolves what a configuration leaves open: size, channels, bits and value range.

    For ``images`` and ``tfrecords`` these depend on the files, which are looked through; for other data
    sets they are known. With the resulting configuration, other files are mapped to levels in exactly
    the same way.

    Args:
        config: Section ``data`` of the configuration.

    Raises:
        ConfigError: As for `get_dataset_info`, or a key does not apply to this data set.
        UserError: Files are missing, or none can be used.
    """
    if config.dataset == IMAGES:
        check_data(config)
        folder = images.look(config)
        settled, lines = folder.decision.config, folder.decision.lines
        return Settled(settled, with_flip(_images(settled, folder), config), lines)
    if config.dataset == TFRECORDS:
        check_data(config)
        config = prepared.settle_prepared(config)
    dataset = with_flip(_find_dataset(config), config)
    # `get_dataset_info`, which evaluation calls, does not check this: runs that were trained with such
    # keys can still be evaluated.
    for name in FOR_FOLDERS if config.dataset != TFRECORDS else ():
        value = getattr(config, name)
        if value != getattr(DataConfig(), name):
            raise ConfigError(
                f"{name}: {value} is not allowed with {config.dataset}; it is for images of your own"
            )
    return Settled(config, dataset, [])


def get_dataset_info(config: DataConfig) -> DatasetInfo:
    """Returns the description of the data set that a configuration names.

    What the configuration leaves open is resolved as by `settle`.

    Args:
        config: Section ``data`` of the configuration.

    Raises:
        ConfigError: There is no data set of that name, or it has another ``image_size``.
        UserError: The image size depends on the data set's files, and those are missing.
    """
    if config.dataset in (IMAGES, TFRECORDS) and settling.is_open(config):
        return settle(config).dataset
    return with_flip(_find_dataset(config), config)


def with_flip(dataset: DatasetInfo, config: DataConfig) -> DatasetInfo:
    """The data set with ``flip`` as the configuration says; ``auto`` keeps the data set's own value."""
    flip = dataset.flip if config.flip == AUTO else bool(config.flip)
    return dataclasses.replace(dataset, flip=flip)


def names() -> list[str]:
    """Names of the built-in data sets."""
    return list(_BUILT_IN)


def given_images(image: ImageSpec) -> DatasetInfo:
    """The description of images that a user gives, which cannot be opened again.

    Args:
        image: Description of the images.
    """
    return DatasetInfo(OWN, image, _not_kept, flip=False)


def _not_kept(_: str):
    raise UserError(
        "own: the images of this run were given in Python and are not kept; load the model in Python "
        "(nvae_tf.load) and score your images, or name files with --images"
    )


def _find_dataset(config: DataConfig) -> DatasetInfo:
    if config.dataset == OWN:
        _not_kept(config.data)
    if config.dataset == IMAGES:
        return _images(config)
    if config.dataset == TFRECORDS:
        cropped = config.crop == RANDOM
        return dataclasses.replace(
            _tfrecords(TFRECORDS, settling.stored_spec(config), cropped=cropped), flip=False
        )
    dataset = _BUILT_IN.get(config.dataset) or _lsun(config.dataset)
    if config.dataset == "photos" and config.size:
        dataset = _photos(config)
    if dataset is None:
        known = ", ".join(
            [*_BUILT_IN, "lsun_{bedroom,church,tower}_{64,128,256}", IMAGES, TFRECORDS]
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
    if config.value_range != AUTO:
        raise ConfigError(
            f"value_range: {config.value_range} is not allowed; it is for {IMAGES} alone"
        )
    return dataset


def _tfrecords(
    name: str, image: ImageSpec | int, evaluation="validation", cropped=False
) -> DatasetInfo:
    """A data set of GLOW's tfrecords; an integer `image` is the size of square 8-bit colour images."""
    spec = ImageSpec(image, image, 3) if isinstance(image, int) else image

    def open_splits(folder):
        root = tfrecords.find_root(folder)
        sources = [
            tfrecords.TFRecordSource(root, split, spec, cropped) for split in ("train", evaluation)
        ]
        return tuple(sources)

    return DatasetInfo(name, spec, open_splits)


def _images(config: DataConfig, looked_through: images.Folder | None = None) -> DatasetInfo:
    """A plain folder of image files.

    Args:
        config: Section ``data`` with nothing left open.
        looked_through: The folder that `config` names, if it was looked through already; default: it is
            looked through when it is opened.
    """

    def open_splits(name):
        if looked_through is not None and name == config.data:
            return images.open_folder(looked_through)
        folder = images.look(dataclasses.replace(config, data=name))
        for line in (*folder.decision.warnings, *_skipped(folder)):
            print(line, flush=True)
        return images.open_folder(folder)

    skipped = tuple(_skipped(looked_through)) if looked_through else ()
    spec = settling.stored_spec(config)
    return DatasetInfo(IMAGES, spec, open_splits, flip=False, skipped=skipped)


def _skipped(folder: images.Folder) -> list[str]:
    decision = folder.decision
    total = len(decision.images) + len(decision.skipped)
    return survey.skipped_lines(decision.skipped, total)


def _photos(config: DataConfig) -> DatasetInfo:
    """The data set ``photos`` in one of the sizes of its crops."""
    height, width = config.size or (0, 0)
    if height != width or height not in PHOTO_SIZES:
        raise ConfigError(
            f"image_size: {config.image_size} is not allowed; the images of photos are "
            + " or ".join(f"{size}x{size}" for size in PHOTO_SIZES)
        )
    opened = functools.partial(read_photos, size=height)
    return DatasetInfo("photos", ImageSpec(height, width, 3), opened)


def _lsun(name: str) -> DatasetInfo | None:
    """An LSUN scene in one of its sizes; None if the name is not that of one."""
    match = re.fullmatch(r"lsun_(bedroom|church|tower)_(64|128|256)", name)
    return match and _tfrecords(name, int(match[2]), cropped=True)


_PADDED_BINARY = ImageSpec(32, 32, 1, binary=True, scored_size=(28, 28))
_PADDED_GREY = ImageSpec(32, 32, 1, bits=5, scored_size=(28, 28), value_range=(0, 255))
_PADDED_COLOUR = ImageSpec(32, 32, 3, scored_size=(28, 28))

_BUILT_IN = {
    dataset.name: dataset
    for dataset in (
        DatasetInfo("digits", _PADDED_BINARY, arrays.read_digits, flip=False),
        DatasetInfo(
            "digits_grey",
            _PADDED_GREY,
            functools.partial(arrays.read_digits, grey=True),
            flip=False,
        ),
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

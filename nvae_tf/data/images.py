"""A folder of image files as a data set: two splits, with each image converted for the model."""

import math
import os
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nvae_tf.config import CENTRE, DROP, RANDOM, SPLIT_SEED, VALIDATION_PORTION, DataConfig
from nvae_tf.data import image_files, levels, settling, survey
from nvae_tf.data.image_files import ImageReader, find_images, search
from nvae_tf.data.settling import Decision
from nvae_tf.data.source import CachedSource, PythonSource
from nvae_tf.data.stored import Item, Stored
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError, one_line
from nvae_tf.io.paths import user_path
from nvae_tf.io.text import counted

CACHE_PORTION = 0.25  # portion of the machine's memory that decoded images may fill, per split
NAME_OTHERS = "name other images, or another model"
FEW_FILES = 10  # with fewer files, single images instead of whole files are held out

# The folder of training images, and names of the one that is held out; the first that exists is taken.
SPLIT_FOLDERS = ("train", "validation", "val", "valid", "test")


def load_image(file, name, spec: ImageSpec, crop: str = CENTRE) -> np.ndarray:
    """Decodes one image with Pillow, turns it upright, and converts it to the levels of a spec.

    Opacity is dropped.

    Args:
        file: Path of a file, or a binary file.
        name: Name of the image in errors.
        spec: Size, channels, bits and value range of the result.
        crop: As for `levels.to_levels`.

    Returns:
        Levels (height, width, channels).

    Raises:
        UnreadableImage: The image cannot be decoded.
        UserError: The image is smaller than the size asked for, or has other channels.
    """
    return _fitted(image_files.decode(file, name), name, spec, crop, DROP)


def _fitted(
    image: Stored, name, spec: ImageSpec, crop: str, alpha: str, named: bool = False
) -> np.ndarray:
    height, width = image.values.shape[:2]
    if height < spec.height or width < spec.width:
        advice = NAME_OTHERS if named else settling.SMALLER_SIZE
        raise UserError(settling.too_small(str(name), height, width, spec.shape[:2], advice))
    try:
        return levels.to_levels(image, spec, crop, alpha)
    except ValueError as error:
        advice = NAME_OTHERS if named else "ask for others with --channels or remove it"
        raise UserError(f"{name}: {error}; {advice}") from None


def split_randomly(
    items: list, portion: float, seed: int, usable: Container | None = None
) -> tuple[list, list]:
    """Splits items at random into training and validation items.

    Args:
        items: The items.
        portion: Portion of the items that are held out for validation.
        seed: Seed of the draw.
        usable: The items that can be used, at least two. A part that would get none of them is
            enlarged, in the order of the draw, until it has one. Default: all items.

    Returns:
        Training and validation items, each in the order of the items.

    Raises:
        UserError: A part would be empty.
    """
    num_validation = round(len(items) * portion)
    if not 0 < num_validation < len(items):
        raise UserError(
            f"{num_validation} of {counted(len(items), 'image')} for validation would leave a split "
            "empty; add images, or choose those for validation (folders train and validation, or "
            "nvae-prepare --validation)"
        )
    order = np.random.RandomState(seed).permutation(len(items)).tolist()
    places = [i for i, item in enumerate(order) if usable is None or items[item] in usable]
    num_validation = min(max(num_validation, places[0] + 1), places[-1])
    held_out = set(order[:num_validation])
    parts = ([], [])
    for index, item in enumerate(items):
        parts[index in held_out].append(item)
    return parts


class FolderSource(PythonSource):
    """Image files, decoded when they are fetched; zero-padded if the spec scores only the centre.

    Args:
        images: Images, or paths of files all of whose images are taken.
        spec: Size, channels, bits and value range of the result.
        crop: As for `levels.to_levels`.
        alpha: As for `levels.to_levels`.
        reader: The reader of the files; default: a new one.
        named: Whether a user named these images for a trained model, for errors' advice.

    Raises:
        UnreadableImage: One of the paths cannot be read.
    """

    def __init__(
        self,
        images: Sequence[Item | Path],
        spec: ImageSpec,
        crop: str = CENTRE,
        alpha: str = DROP,
        reader: ImageReader | None = None,
        named: bool = False,
    ):
        super().__init__(np.uint8 if spec.bits <= 8 else np.uint16)
        self.spec, self.crop, self.alpha, self._named = spec, crop, alpha, named
        self._reader = reader or ImageReader()
        self.items: list[Item] = []
        for image in images:
            self.items += [image] if isinstance(image, Item) else self._reader.items(image)

    def __len__(self):
        return len(self.items)

    def file_names(self):
        """The name of each image's file."""
        return [item.path.name for item in self.items]

    def fetch(self, index):
        """Decodes one image; its label is 0."""
        item, spec = self.items[index], self.spec
        rows, columns = spec.scored_part
        inner = ImageSpec(
            rows.stop - rows.start, columns.stop - columns.start, spec.channels, spec.bits,
            value_range=spec.value_range,
        )  # fmt: skip
        stored = self._reader.read(item)
        image = _fitted(stored, item.name, inner, self.crop, self.alpha, self._named)
        above, left = rows.start, columns.start
        below, right = spec.height - rows.stop, spec.width - columns.stop
        return np.pad(image, [(above, below), (left, right), (0, 0)]), 0


def named_images(
    paths: Iterable[str], spec: ImageSpec, alpha: str, crop: str = CENTRE
) -> FolderSource:
    """A source of the images in files and folders that a user names.

    Args:
        paths: Paths as the user wrote them.
        spec: Size, channels, bits and value range of the result.
        alpha: As for `levels.to_levels`.
        crop: As in the configuration of the model; one at random becomes the one in the centre.

    Raises:
        UserError: A folder holds no image, or a file cannot be read.
    """
    given = [user_path(path) for path in paths]
    files = [file for path in given for file in (find_images(path) if path.is_dir() else [path])]
    crop = CENTRE if crop == RANDOM else crop
    return FolderSource(files, spec, crop, alpha, named=True)


class Folder(NamedTuple):
    """A folder whose images were looked through.

    Attributes:
        splits: Two lists of files, for training and for validation; or a single list of all files if
            the folder is not split.
        decision: The decisions about the images.
        reader: The reader of the files.
    """

    splits: list[list[Path]]
    decision: Decision
    reader: ImageReader


def look(config: DataConfig) -> Folder:
    """Looks through the images of a folder and decides what they become.

    Args:
        config: Section ``data`` of the configuration.

    Raises:
        UserError: There is no such folder, or nothing in it can be used.
    """
    root = user_path(config.data)
    if not config.data or not root.is_dir():
        raise UserError(
            f"{config.data or '--data'}: no such folder; --data names the folder that holds the images"
        )
    # Unlike `Path.is_dir`, `os.path.isdir` does not raise in a folder that cannot be read.
    parts = [root / name for name in SPLIT_FOLDERS if os.path.isdir(root / name)]
    is_split = len(parts) > 1 and parts[0].name == "train"
    places = [search(place) for place in (parts[:2] if is_split else [root])]
    splits = [place.files for place in places]
    reader = ImageReader()
    paths = [path for split in splits for path in split]
    found = survey.look_through(paths, reader, settling.limits(config), config.strict)
    closed = [
        survey.Skipped(Item(path), survey.UNREADABLE_FOLDER, line)
        for place in places
        for path, line in place.unreadable.items()
    ]
    decision = settling.decide(config, found._replace(skipped=closed + found.skipped), root)
    links = [one_line(str(path.relative_to(root))) for place in places for path in place.links]
    if len(parts) == 1:
        decision.lines.append(
            f"not split: {one_line(str(parts[0]))} is alone, so a part of all files is held out; "
            f"folders train and {' or '.join(SPLIT_FOLDERS[1:])} would be the splits"
        )
    if links:
        decision.lines.append(
            f"not followed: {counted(len(links), 'link')} to folders, {links[0]} first; put the "
            "folders themselves there to use what they hold"
        )
    return Folder(splits, decision, reader)


def split(folder: Folder, portion: float, seed: int) -> list[list[Item]]:
    """Returns the usable images for training and for validation.

    If the folder is not split, a portion of its files is drawn for validation, so that the images of a
    file stay together; of few files, single images are drawn. The draw is the same every time. It
    includes files that cannot be used, and is extended until each part has a usable image.

    Args:
        folder: The folder, looked through.
        portion: Portion that is held out for validation.
        seed: Seed of the draw.

    Raises:
        UserError: A split would be empty.
    """
    by_path: dict[Path, list[Item]] = {}
    for facts in folder.decision.images:
        by_path.setdefault(facts.item.path, []).append(facts.item)
    splits = folder.splits
    if len(splits) == 1:
        (files,) = splits
        there, usable = set(files), {facts.item for facts in folder.decision.images}
        broken = {each.item for each in folder.decision.skipped if each.item.path in there}
        items = sorted(usable | broken, key=lambda item: (item.path, item.place or 0))
        if len(files) < FEW_FILES and len(items) != len(files):
            parts = split_randomly(items, portion, seed, usable)
            return _non_empty(folder, [[i for i in part if i in usable] for part in parts])
        splits = list(split_randomly(files, portion, seed, by_path))
    return _non_empty(
        folder, [[i for path in part for i in by_path.get(path, [])] for part in splits]
    )


def _non_empty(folder: Folder, parts: list[list[Item]]) -> list[list[Item]]:
    places = set(folder.splits[0]), set(folder.splits[-1])
    for name, part, files in zip(("training", "validation"), parts, places, strict=True):
        if not part:
            skipped = [each for each in folder.decision.skipped if each.item.path in files]
            raise UserError(f"no image that can be used is left for {name}: {skipped[0].reason}")
    return parts


def open_folder(folder: Folder) -> tuple[PythonSource, PythonSource]:
    """Opens the training and validation images of a folder, cached in memory if they are small enough.

    If the folder holds ``train`` and ``validation``, ``val``, ``valid`` or ``test``, those are the
    splits. Otherwise the
    same tenth is drawn for validation every time (see `split`).

    Args:
        folder: The folder, looked through.

    Raises:
        UserError: A split is empty.
    """
    config = folder.decision.config
    spec = settling.stored_spec(config)
    train, test = (
        _cached_if_small(FolderSource(part, spec, config.crop, config.alpha, folder.reader))
        for part in split(folder, VALIDATION_PORTION, SPLIT_SEED)
    )
    return train, test


def _cached_if_small(source: FolderSource) -> PythonSource:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = len(source) * math.prod(source.spec.shape) * source.dtype.itemsize
    if source.crop == RANDOM or needed >= CACHE_PORTION * memory:
        return source
    return CachedSource(source, source.spec.shape)

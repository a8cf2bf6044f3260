"""Images that go into a file and come out of it: PNGs in a folder, or the test images of a data set."""

from pathlib import Path

import numpy as np
from PIL import Image

from nvae_tf.data import pipeline
from nvae_tf.data.catalog import DatasetInfo
from nvae_tf.data.levels import value_range
from nvae_tf.data.source import Source, reading
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError, short_message, short_repr
from nvae_tf.io.paths import is_regular

MOST_IMAGES = 1 << 20  # in a file
LONGEST_NAME = 255  # bytes, as file systems have it
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by number of channels
DEEP_MODE = "I;16"  # one channel of 16 bits
LARGEST_BYTE, LARGEST_DEEP = 2**8 - 1, 2**16 - 1


class PictureSource:
    """Images of one model.

    Attributes:
        names: Their file names; None if they are numbered.
    """

    names: list[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def levels(self, index: int) -> np.ndarray:
        """The levels of an image, integers (height, width, channels)."""
        raise NotImplementedError


class FolderPictures(PictureSource):
    """The PNG files of a folder.

    Args:
        folder: Path of the folder. Hidden files are ignored; it must hold nothing else.
        spec: What the model's images are like.
        max_level: Their last level.
        limit: Number of images to take, in the order of their names; default: all.

    Raises:
        UserError: The folder holds something else, or nothing.
    """

    def __init__(self, folder: Path, spec: ImageSpec, max_level: int, limit: int | None = None):
        check_png(spec, max_level)
        try:
            found = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
        except OSError as error:
            raise UserError(f"{folder}: not readable ({short_message(error)})") from None
        names = found[:limit]
        if not names:
            raise UserError(f"{folder}: no PNG files here; name a folder that holds them")
        check_names(names, str(folder))
        self.folder, self.names, self.spec, self.max_level = folder, names, spec, max_level

    def __len__(self):
        return len(self.names)

    def levels(self, index):
        """Decodes a file."""
        return read_png(self.folder / self.names[index], self.spec, self.max_level)


class ArrayPictures(PictureSource):
    """Images in memory.

    Args:
        images: Their levels, integers (n, height, width, channels).
    """

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self):
        return len(self.images)

    def levels(self, index):
        """Looks up an image."""
        return self.images[index]


def dataset_pictures(
    source: Source, dataset: DatasetInfo, num_bits: int, seed: int, limit: int | None = None
) -> ArrayPictures:
    """The images of a data set as evaluation sees them.

    Args:
        source: The images.
        dataset: Description of the data set.
        num_bits: Bits per value that the model sees.
        seed: Seed with which binary images are binarised.
        limit: Number of images; default: all.
    """
    max_level = 1 if dataset.image.binary else 2**num_bits - 1
    batches = pipeline.evaluation_batches(
        source, dataset, batch_size=100, seed=seed, num_bits=num_bits
    )
    parts, count = [], min(len(source), limit or MOST_IMAGES)
    with reading(source):
        for images in batches:
            levels = np.rint(np.asarray(images) * max_level)
            parts.append(levels.astype(np.uint8 if max_level < 256 else np.uint16))
            if sum(map(len, parts)) >= count:
                break
    return ArrayPictures(np.concatenate(parts)[:count])


def numbered_name(index: int) -> str:
    """The file name of an image that had none."""
    return f"{index:06d}.png"


def check_names(names: list[str], where: str) -> None:
    """Checks that names are names of PNG files in one folder, each once.

    Args:
        names: The names, from a folder or from a file.
        where: Where they come from, for the error.

    Raises:
        UserError: One is not.
    """
    for name in names:
        size = len(name.encode("utf-8", "surrogatepass"))
        is_plain = name.isprintable() and not set(name) & set('/\\:*?"<>|') and name[:1] != "."
        if not (is_plain and size <= LONGEST_NAME and name.lower().endswith(".png")):
            raise UserError(
                f"{where}: {short_repr(name)} is not a plain name of a PNG file; only those are coded"
            )
    if len({name.lower() for name in names}) != len(names):
        raise UserError(f"{where}: two names differ in capitals alone, or not at all; rename one")
    if len(names) > MOST_IMAGES:
        raise UserError(f"{where}: more than {MOST_IMAGES} images; divide them into several files")


def check_png(spec: ImageSpec, max_level: int) -> None:
    """Checks that images of a model fit into PNGs.

    Raises:
        UserError: They do not.
    """
    low, high = _span(spec)
    whole = low == int(low) and high == int(high)
    if not whole or low < 0 or high > LARGEST_DEEP or high - low < max_level:
        raise UserError(
            f"{max_level + 1} levels that stand for the values {low:g} to {high:g} do not fit into "
            "PNGs, which hold whole numbers up to 65535"
        )
    if _mode(spec) is None:
        raise UserError(
            f"images of {spec.channels} channels and values up to {high:g} cannot be coded; only PNGs "
            "of 1 to 4 channels of 8 bits, or of one of 16, are read and written"
        )


def read_png(path: Path, spec: ImageSpec, max_level: int) -> np.ndarray:
    """Reads a PNG as levels.

    Args:
        path: Path of the file.
        spec: What the model's images are like.
        max_level: The last level.

    Raises:
        UserError: It is not a PNG of exactly the size, the channels and the levels of the model.
    """
    mode, size = _mode(spec), (spec.width, spec.height)
    try:
        if not is_regular(path):
            raise ValueError("not a file")
        with Image.open(path, formats=("PNG",)) as image:
            if image.size == size and image.mode == mode:
                image.load()
            found = (image.size, image.mode, "transparency" in image.info)
            values = np.asarray(image) if found[:2] == (size, mode) else None
    except Exception as error:  # noqa: BLE001 - decoders raise what they like for damaged files
        raise UserError(
            f"{path}: not a readable PNG ({short_message(error)}); mend or remove it"
        ) from None
    if values is None or found[2]:
        seen = f"{found[0][0]}x{found[0][1]}, mode {found[1]}{' with transparency' * found[2]}"
        raise UserError(
            f"{path}: {seen}; the model codes images of exactly {spec.size_text}, mode {mode}, and "
            "nothing is resized or converted"
        )
    values = values.reshape(spec.shape).astype(np.int64)
    low, high = _span(spec)
    levels = np.rint((values - low) * (max_level / (high - low))).astype(np.int64)
    levels = np.clip(levels, 0, max_level)
    if not np.array_equal(_to_values(levels, spec, max_level), values):
        expected = f"{max_level + 1} values from {low:g} to {high:g} only"
        expected = f"{low:g} and {high:g} only" if max_level == 1 else expected
        raise UserError(f"{path}: it holds other values than the model's, {expected}")
    return levels


def write_png(path: Path, levels: np.ndarray, spec: ImageSpec, max_level: int) -> None:
    """Writes levels as a PNG; `read_png` gives them back.

    Args:
        path: Path of the file, in a folder that is not complete yet.
        levels: Levels, integers (height, width, channels).
        spec: What the model's images are like.
        max_level: The last level.
    """
    dtype = np.uint8 if _mode(spec) != DEEP_MODE else np.uint16
    values = _to_values(levels, spec, max_level).astype(dtype)
    image = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)
    image.save(path, "PNG")


def _mode(spec: ImageSpec) -> str | None:
    """Pillow's mode of the PNGs; None if there is none."""
    if _span(spec)[1] <= LARGEST_BYTE:
        return MODES.get(spec.channels)
    return DEEP_MODE if spec.channels == 1 else None


def _span(spec: ImageSpec) -> tuple[float, float]:
    """The values of a PNG that level 0 and the last level stand for."""
    return (0.0, float(LARGEST_BYTE)) if spec.binary else value_range(spec)


def _to_values(levels, spec: ImageSpec, max_level: int):
    """The values of a PNG for levels; another value for each."""
    low, high = _span(spec)
    return np.rint(low + levels * ((high - low) / max_level)).astype(np.int64)

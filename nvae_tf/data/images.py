"""Finds, decodes and resizes image files with Pillow."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nvae_tf.config import CENTRE, RANDOM, SPLIT_SEED, VALIDATION_PORTION, ImageSpec
from nvae_tf.data.source import PythonSource
from nvae_tf.io.errors import UserError, short_message
from nvae_tf.io.paths import is_regular, user_path

# Pillow knows more formats, and some of those start other programs (EPS: Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**26  # 67 million; decoding takes up to 16 bytes of memory per pixel


class UnreadableImage(UserError):
    """A file cannot be decoded as an image."""


def find_images(folder: Path) -> list[Path]:
    """Finds every image file below a folder.

    Args:
        folder: Path of the folder.

    Returns:
        Paths of the files whose names have an image's ending, sorted.

    Raises:
        UserError: There is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder that holds the images")
    Image.init()
    endings = {ending for ending, kind in Image.EXTENSION.items() if kind in FORMATS}
    paths = [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in endings and not name.startswith(".")
    ]
    if not paths:
        raise UserError(f"{folder}: no image files here or below; name the folder that holds them")
    return sorted(paths)


def load_image(file, name, size: int, crop: str) -> np.ndarray:
    """Decodes an image to RGB, turns it upright as its EXIF data say, and resizes it.

    Args:
        file: Path of a file, or a binary file.
        name: Name of the image in errors.
        size: Height and width of the result in pixels; with a random crop, its shorter side.
        crop: ``"centre"``: the middle square; ``"random"``: no crop yet, the shorter side gets the
            size; ``"none"``: the whole image, squeezed into the square.

    Returns:
        8-bit image (height, width, 3).

    Raises:
        UnreadableImage: The image cannot be decoded.
        UserError: The image is smaller than the size asked for.
    """
    image = decode(file, name)
    if min(image.size) < size:
        raise UserError(
            f"{name}: the image is {image.height}x{image.width}, smaller than {size}x{size}; ask for a "
            "smaller size or remove it"
        )
    return np.asarray(resize(image, size, crop))


def decode(file, name) -> Image.Image:
    """Decodes an image to RGB and turns it upright as its EXIF data say.

    Args:
        file: Path of a file, or a binary file.
        name: Name of the image in errors.

    Raises:
        UnreadableImage: The file is not an image in one of `FORMATS`, is damaged, or has more than
            `MAX_PIXELS`.
    """
    try:
        if isinstance(file, Path) and not is_regular(file):
            raise ValueError("not a file")
        with Image.open(file, formats=FORMATS) as stored:
            if stored.width * stored.height > MAX_PIXELS:
                raise ValueError(f"{stored.width}x{stored.height} pixels are too many")
            return _to_rgb(_upright(stored))
    except Exception as error:  # noqa: BLE001 - decoders raise what they like for damaged files
        raise UnreadableImage(
            f"{name}: not a readable image ({short_message(error)}); mend or remove it"
        ) from None


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - damaged EXIF data
        return image


def resize(image: Image.Image, size: int, crop: str) -> Image.Image:
    """Resizes an image as `load_image` does, bilinearly with antialiasing."""
    box = None
    target = (size, size)
    width, height = image.size
    if crop == CENTRE:
        side = min(image.size)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    elif crop == RANDOM:
        scale = size / min(image.size)
        target = max(size, round(width * scale)), max(size, round(height * scale))
    return image.resize(target, Image.Resampling.BILINEAR, box=box)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # Pillow would clip these to 255 instead of scaling them.
        values = np.nan_to_num(np.array(image, np.float32), copy=False)
        values *= 255.0 / (65535.0 if values.max(initial=0.0) > 255.0 else 255.0)
        image = Image.fromarray(np.clip(values, 0, 255, out=values).astype(np.uint8))
    return image.convert("RGB")


def split_randomly(items: list, portion: float, seed: int) -> tuple[list, list]:
    """Splits items at random into training and validation items.

    Args:
        items: The items.
        portion: Portion of the items for validation.
        seed: Seed of the draw.

    Returns:
        Training and validation items, each in the order of the items.

    Raises:
        UserError: A part would be empty.
    """
    num_validation = round(len(items) * portion)
    if not 0 < num_validation < len(items):
        raise UserError(
            f"{len(items)} images with a validation portion of {portion} leave a split empty; add "
            "images or change the portion"
        )
    held_out = set(np.random.RandomState(seed).permutation(len(items))[:num_validation].tolist())
    parts = ([], [])
    for index, item in enumerate(items):
        parts[index in held_out].append(item)
    return parts


class FolderSource(PythonSource):
    """Image files that are decoded when they are fetched, and made grey and padded if the spec says so.

    Args:
        paths: Paths of the image files.
        spec: What the images are to become: their size and channels.
        crop: As for `load_image`.
    """

    def __init__(self, paths: list[Path], spec: ImageSpec, crop: str = CENTRE):
        super().__init__()
        self.paths, self.spec, self.crop = paths, spec, crop

    def __len__(self):
        return len(self.paths)

    def fetch(self, index):
        """Decodes one file; its label is 0."""
        path, spec = self.paths[index], self.spec
        side, _ = spec.scored_size or spec.shape[:2]
        image = load_image(path, path, side, self.crop)
        if spec.channels == 1:
            image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
        rows, columns = spec.scored_part
        above, left = rows.start, columns.start
        below, right = spec.height - rows.stop, spec.width - columns.stop
        return np.pad(image, [(above, below), (left, right), (0, 0)]), 0


def open_folder(
    folder: str, spec: ImageSpec, crop: str, wrap: Callable[[FolderSource], PythonSource]
) -> tuple[PythonSource, PythonSource]:
    """Opens the training and validation images of a plain folder.

    If the folder holds ``train`` and ``validation`` (or ``test``), those are the splits. Otherwise a
    tenth of all images is drawn for validation, always the same.

    Args:
        folder: Folder that holds image files, at any depth.
        spec: What the images are to become: their size and channels.
        crop: As for `load_image`.
        wrap: Applied to both sources.
    """
    root = user_path(folder)
    if not folder or not root.is_dir():
        raise UserError(
            f"{folder or '--data'}: no such folder; --data names the folder that holds the images"
        )
    held_out = [root / name for name in ("validation", "test") if (root / name).is_dir()]
    if held_out and (root / "train").is_dir():
        splits = find_images(root / "train"), find_images(held_out[0])
    else:
        splits = split_randomly(find_images(root), VALIDATION_PORTION, SPLIT_SEED)
    train, test = (wrap(FolderSource(paths, spec, crop)) for paths in splits)
    return train, test

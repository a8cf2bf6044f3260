"""Reads images from files of all supported formats, as the values that the file holds.

The first bytes of a file decide how it is read; only npz and NIfTI files are also told by their names.
A file of several images (pages of a TIFF, slices of a scan, arrays) is read image by image; if its
compression does not allow that, the file is kept in memory.
"""

import collections
import contextlib
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

from nvae_tf.data import scans, tiff
from nvae_tf.data.stored import (
    MAX_IMAGES,
    Item,
    Stored,
    UnreadableImage,
    check_bounds,
    check_inflation,
    stored,
)
from nvae_tf.image_spec import MAX_CHANNELS
from nvae_tf.io import npz
from nvae_tf.io.errors import UserError, short_message
from nvae_tf.io.paths import is_regular

# Pillow knows more formats, and some of those start other programs (EPS: Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
OTHER_ENDINGS = (".npy", ".npz", ".dcm", ".dicom", ".nii", ".nii.gz")
LARGEST_KEPT = 2**31  # bytes of files kept in memory, at most
MOST_OPEN = 64  # files of several images kept open, at most
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ORIENTATION = 0x0112  # EXIF's tag


class FileContent(NamedTuple):
    """The images of an open file.

    Attributes:
        images: Number of images; None if the file is a single image.
        read: Reads the image of an index; may raise any exception if the file is damaged.
        kept: Number of bytes that the file keeps in memory.
        open_files: Number of files that it keeps open.
    """

    images: int | None
    read: Callable[[int], Stored]
    kept: int = 0
    open_files: int = 0


class Found(NamedTuple):
    """The content of a folder and its subfolders.

    Attributes:
        files: Paths of the files with the file extension of an image, sorted.
        unreadable: Dictionary from each folder that cannot be read to the message that refuses it.
        links: Links to folders, which are not followed, sorted.
    """

    files: list[Path]
    unreadable: dict[Path, str]
    links: list[Path]


def search(folder: Path) -> Found:
    """Finds every image file below a folder.

    Args:
        folder: Path of the folder.

    Raises:
        UserError: There is no such folder, it cannot be read, or no image is in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder that holds the images")
    Image.init()
    endings = (*(end for end, kind in Image.EXTENSION.items() if kind in FORMATS), *OTHER_ENDINGS)
    files, links, errors = [], [], []
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        paths = [Path(parent) / name for name in names if not name.startswith(".")]
        files += [path for path in paths if path.name.lower().endswith(endings)]
        links += [Path(parent) / name for name in folders if os.path.islink(Path(parent) / name)]
    unreadable = {
        Path(error.filename): f"{error.filename}: the folder cannot be read "
        f"({short_message(error)}); make it readable or remove it"
        for error in errors
    }
    if not files and unreadable:
        raise UserError(next(iter(unreadable.values())))
    if not files:
        linked = f" (links to folders, as {links[0].name}, are not followed)" if links else ""
        raise UserError(
            f"{folder}: no image files here or below{linked}; name the folder that holds them"
        )
    return Found(sorted(files), unreadable, sorted(links))


def find_images(folder: Path) -> list[Path]:
    """Finds every image file below a folder as `search` does, but refuses folders it cannot read.

    Args:
        folder: Path of the folder.

    Returns:
        Paths of the files, sorted.

    Raises:
        UserError: As for `search`, or a folder below cannot be read.
    """
    found = search(folder)
    for line in found.unreadable.values():
        raise UserError(line)
    return found.files


class ImageReader:
    """Reads images; keeps files that hold several images open or in memory."""

    def __init__(self):
        self._kept: collections.OrderedDict[Path, FileContent] = collections.OrderedDict()
        self._lock = threading.Lock()  # tf.data reads with several threads
        self._unpacking = threading.Lock()

    def items(self, path: Path) -> list[Item]:
        """Returns the images of a file, one `Item` each.

        Raises:
            UnreadableImage: The file cannot be read.
            UserError: The package for its format is not installed.
        """
        with _unreadable(path):
            count = self._open(path).images
            return [Item(path)] if count is None else [Item(path, i) for i in range(count)]

    def read(self, item: Item) -> Stored:
        """Reads an image, turned upright as its EXIF data say.

        Raises:
            UnreadableImage: The file is not an image in a known format, is damaged or too large.
            UserError: The package for its format is not installed.
        """
        with _unreadable(item.name):
            return self._open(item.path).read(item.place or 0)

    def _open(self, path: Path) -> FileContent:
        with self._lock:
            if path in self._kept:
                self._kept.move_to_end(path)
                return self._kept[path]
        # Files that are unpacked into memory as a whole are opened one at a time.
        whole = path.name.lower().endswith((".npz", ".gz"))
        with self._unpacking if whole else contextlib.nullcontext():
            content = self._kept.get(path) or _open(path)
        if content.kept or content.open_files:
            with self._lock:
                self._kept[path] = content
                while len(self._kept) > 1 and self._keeps_too_much():
                    self._kept.popitem(last=False)
        return content

    def _keeps_too_much(self) -> bool:
        contents = self._kept.values()
        return (
            sum(content.kept for content in contents) > LARGEST_KEPT
            or sum(content.open_files for content in contents) > MOST_OPEN
        )


def decode(file, name) -> Stored:
    """Decodes one image with Pillow.

    Args:
        file: Path of a file, or a binary file.
        name: Name of the image in errors.

    Raises:
        UnreadableImage: The file is not an image in one of `FORMATS`, is damaged, or has more than
            `MAX_PIXELS`.
    """
    with _unreadable(name):
        return _read_with_pillow(file)


@contextlib.contextmanager
def _unreadable(name):
    """Turns whatever a decoder raises for damaged files into an `UnreadableImage`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise many kinds
        raise UnreadableImage(
            f"{name}: not a readable image ({short_message(error)}); mend or remove it"
        ) from None


def _open(path: Path) -> FileContent:
    """Opens a file with the reader for its format."""
    if not is_regular(path):
        raise ValueError("not a file")
    with path.open("rb") as file:
        head = file.read(132)
    opened = _open_picture(path, head) or _open_array(path, head) or _open_scan(path, head)
    return opened or FileContent(None, lambda _: _read_with_pillow(path))


def _open_picture(path: Path, head: bytes) -> FileContent | None:
    if head.startswith(PNG_SIGNATURE) and head[24:25] == b"\x10":
        return FileContent(None, lambda _: _read_deep_png(path, head))
    if head[:4] in tiff.SIGNATURES:
        return _open_tiff(path)
    return None


def _open_tiff(path: Path) -> FileContent:
    stack = tiff.TiffImages(path)
    several = stack.count > 1
    return FileContent(
        stack.count if several else None,
        lambda index: stack.read(index, _read_with_pillow),
        open_files=int(several),
    )


def _open_array(path: Path, head: bytes) -> FileContent | None:
    if head.startswith(npz.ARRAY_SIGNATURE):
        array = npz.ArrayFile(path)
        return FileContent(_count(array.shape), lambda index: _image_of(array, index))
    if head.startswith(b"PK\x03\x04") and path.suffix.lower() == ".npz":
        values = npz.read_only_array(path, lambda shape: len(shape) in (2, 3, 4))
        return FileContent(
            _count(values.shape), lambda index: _image_of(values, index), values.nbytes
        )
    return None


def _open_scan(path: Path, head: bytes) -> FileContent | None:
    if head[128:132] == b"DICM":
        return FileContent(scans.count_dicom(path), lambda index: scans.read_dicom(path, index))
    if path.name.lower().endswith((".nii", ".nii.gz")):
        scan = scans.NiftiScan(path)
        return FileContent(scan.count, scan.read, scan.kept)
    return None


def _is_one_image(shape) -> bool:
    """Whether an array is one image, (height, width) or (height, width, channels), not several."""
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] <= MAX_CHANNELS)


def _count(shape) -> int | None:
    """The number of images of an array (n, height, width[, channels]); None if it is one image.

    Raises:
        ValueError: The array is not a number of images, or they are too large.
    """
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"an array of shape {shape}; expected (n, height, width, channels)")
    if _is_one_image(shape):
        check_bounds(*shape)
        return None
    if len(shape) == 4 and shape[3] > MAX_CHANNELS >= shape[1]:
        raise ValueError(
            f"an array of shape {shape}; expected channels last: (n, height, width, channels)"
        )
    check_bounds(*shape[1:])
    if not 0 < shape[0] <= MAX_IMAGES:
        raise ValueError(f"{shape[0]} images")
    return shape[0]


def _image_of(array, index: int) -> Stored:
    return stored(np.asarray(array[:] if _is_one_image(array.shape) else array[index]))


def _read_deep_png(path: Path, head: bytes) -> Stored:
    """Reads a 16-bit PNG with TensorFlow, since Pillow reduces several channels of 16 bits to 8."""
    width, height, _, colour = struct.unpack(">IIBB", head[16:26])
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    check_bounds(height, width, channels)
    check_inflation(path.stat().st_size, 2 * height * width * channels, compressed=True)
    with tf.device("CPU"):
        values = tf.io.decode_png(path.read_bytes(), dtype=tf.uint16).numpy()
    if values.shape != (height, width, channels):
        raise ValueError(f"an image of shape {values.shape} in a file of {width}x{height} pixels")
    with Image.open(path, formats=("PNG",)) as header:
        transparent = header.info.get("transparency")
        if channels in (1, 3) and transparent is not None:  # the only colour that is transparent
            opaque = np.any(values != np.array(transparent, np.uint16), axis=-1, keepdims=True)
            values = np.concatenate([values, opaque * np.uint16(65535)], axis=-1)
        turned = tiff.turn_upright(values, header.getexif().get(ORIENTATION, 1))
    return stored(turned, has_alpha=values.shape[-1] in (2, 4))


def _read_with_pillow(file, page: int = 0) -> Stored:
    with Image.open(file, formats=FORMATS) as image:
        image.seek(page)
        check_bounds(image.height, image.width)
        return _from_pillow(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - damaged EXIF data
        return image


def _from_pillow(image: Image.Image) -> Stored:
    if image.mode.startswith("I;16"):
        return stored(np.array(image).astype(np.uint16))
    if image.mode in ("I", "F"):
        return stored(np.array(image))
    has_alpha = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    return stored(np.array(image.convert(mode + "A" * has_alpha)), has_alpha)

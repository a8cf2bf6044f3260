"""Reads the pages of TIFF files with tifffile, or with Pillow if tifffile cannot decompress them."""

import importlib.util
import logging
import math
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile

from nvae_tf.data.stored import MAX_IMAGES, Stored, check_bounds, check_inflation, stored

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
UNCOMPRESSED, DEFLATE = (1,), (8, 32946)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
HORIZONTAL = 2  # predictor: difference of neighbours, which NumPy can undo
PREMULTIPLIED = 1  # kind of extra sample: opacity that the colours were multiplied by
ALPHA = (PREMULTIPLIED, 2)  # kinds of extra samples that are opacity
# Tags that hold one whole number: sizes of images, strips and tiles, compression, number of channels.
SINGLE = (256, 257, 259, 262, 277, 278, 284, 317, 322, 323, 32997, 32998)
WHOLE_NUMBERS = (1, 3, 4, 13, 16, 18)  # types of such tags
SMALLER = 330  # tag that points to the directories of smaller versions of an image
LONG_POINTERS = (16, 18)  # types of that tag with 64-bit values

# Damaged files are reported by our own messages.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class TiffImages:
    """A TIFF file of one or several images, open as long as the object exists.

    Args:
        path: Path of the file.

    Attributes:
        count: Number of images.

    Raises:
        Exception: The file is damaged.
    """

    def __init__(self, path: Path):
        _check_directories(path)
        self._path, self._lock = path, threading.Lock()
        # OME's metadata may name further files: only this one is opened.
        self._file = tifffile.TiffFile(path, _multifile=False)
        metadata = self._file.ome_metadata
        if metadata is not None:
            _check_ome(metadata)
        self._images = _images(self._file)
        self.count = len(self._images)

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, index: int, read_with_pillow: Callable) -> Stored:
        """Reads one image.

        Args:
            index: Place of the image in the file.
            read_with_pillow: Reads one page of a file, given path and page.

        Raises:
            Exception: The image is damaged.
        """
        with self._lock:
            return _read(self._path, self._images[index], read_with_pillow)


def _read(path: Path, pages: list, read_with_pillow: Callable) -> Stored:
    page = pages[0].aspage()
    check_bounds(page.imagelength, page.imagewidth, page.samplesperpixel * len(pages))
    if not _is_for_tifffile(page):
        if len(pages) > 1:
            raise ValueError(f"channels with the compression {page.compression!r}")
        return _from_libtiff(path, page, read_with_pillow)
    values = [_values(each.aspage()) for each in pages]
    extra = page.extrasamples[-1] if len(pages) == 1 and page.extrasamples else None
    upright = turn_upright(np.concatenate(values, axis=-1), page.tags.valueof(274, 1))
    if extra == PREMULTIPLIED:
        upright = _divide_by_opacity(upright)
    return stored(upright, has_alpha=extra in ALPHA)


def _divide_by_opacity(values: np.ndarray) -> np.ndarray:
    """Undoes the multiplication of an image's colours by its opacity, the last channel."""
    whole = values.dtype.kind in "iu"
    largest = np.iinfo(values.dtype).max if whole else 1.0
    colours, opacity = values[..., :-1].astype(np.float64), values[..., -1:].astype(np.float64)
    colours = np.divide(colours * largest, opacity, out=np.zeros_like(colours), where=opacity > 0)
    if whole:
        colours = np.rint(np.clip(colours, 0, largest))
    return np.concatenate([colours.astype(values.dtype), values[..., -1:]], axis=-1)


def _check_directories(path: Path) -> None:
    """Checks a file's directories, which hold tags and point to further directories.

    tifffile would follow a chain that leads back into itself for ever, and would repeat a tag's list of
    values as often as other tags say.

    Raises:
        ValueError: There are too many directories or tags, the directories are longer together than the
            file, or a tag that should hold one number has several.
        struct.error: A directory is cut off.
    """
    with path.open("rb") as file:
        head = file.read(16)
        order = "<" if head[:2] == b"II" else ">"
        is_big = head[:4] in (b"II+\0", b"MM\0+")
        number, pointer = ("Q", "Q") if is_big else ("H", "I")
        size, pointer_size = struct.calcsize(order + number), struct.calcsize(order + pointer)
        tag_size = 4 + 2 * pointer_size
        offsets = list(struct.unpack_from(order + pointer, head, 8 if is_big else 4))
        whole = room = path.stat().st_size

        def read(offset, length):
            nonlocal room
            room -= length
            if room < 0:
                raise ValueError("its directories are longer than the file")
            file.seek(offset)
            return file.read(length)

        directories = 0
        while offsets:
            start = offsets.pop()
            if not 0 < start < whole:  # the end
                continue
            directories += 1
            (tags,) = struct.unpack(order + number, read(start, size))
            if max(directories + len(offsets), tags) > MAX_IMAGES:
                raise ValueError("too many pages or tags")
            content = read(start + size, tags * tag_size)
            following = read(start + size + tags * tag_size, pointer_size)
            offsets += struct.unpack(order + pointer, following)
            for tag, kind, values, value in struct.iter_unpack(
                f"{order}HH{pointer}{pointer}", content
            ):
                if tag in SINGLE and (values != 1 or kind not in WHOLE_NUMBERS):
                    raise ValueError(f"the tag {tag} with {values} values of type {kind}")
                if tag == SMALLER:
                    if values > MAX_IMAGES:
                        raise ValueError("too many smaller versions")
                    unit = "Q" if kind in LONG_POINTERS else "I"
                    length = values * struct.calcsize(order + unit)
                    # Values that fit into the tag itself take the place of their offset.
                    fits = length <= pointer_size
                    below = struct.pack(order + pointer, value) if fits else read(value, length)
                    offsets += struct.unpack(f"{order}{values}{unit}", below[:length])


def _check_ome(text: str) -> None:
    """Refuses metadata that announce very many images, of which tifffile would make lists.

    Args:
        text: Metadata in OME-XML.

    Raises:
        Exception: The metadata announce too many images, or an attribute is malformed.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:  # tifffile ignores such metadata
        return
    promised = 0.0
    for element in root.iter():
        values = element.attrib
        # The first two axes are those of a single image.
        axes = values.get("DimensionOrder", "")[2:]
        promised += math.prod(abs(int(values[f"Size{axis}"])) for axis in axes)
        promised += abs(int(values.get("PlaneCount", values.get("NumPlanes", 0))))
        if element.tag[:-1].endswith("Along") and "Start" in values:  # an axis within another one
            length = float(values["End"]) - float(values["Start"])
            promised += abs(length / float(values.get("Step", 1)))
        if not promised <= 4 * MAX_IMAGES:
            raise ValueError("its metadata promise too many images")


def _images(file) -> list[list]:
    """The pages of each image: one, or one per channel if channels are stored as separate pages."""
    images = []
    for series in file.series:
        apart = series.axes[: len(series.axes) - len(series.keyframe.axes)]
        shape = series.shape[: len(apart)]
        pages = list(series.pages)
        if len(pages) != int(np.prod(shape, dtype=object)):  # tifffile adds axes for a single page
            apart, shape = "I", (len(pages),)
        if len(pages) > MAX_IMAGES or any(page is None for page in pages):
            raise ValueError("pages are missing or too many")
        grid = np.arange(len(pages)).reshape(shape)
        channels = apart.find("C")
        grid = np.moveaxis(grid, channels, -1) if channels >= 0 else grid[..., None]
        images += [[pages[i] for i in row] for row in grid.reshape(-1, grid.shape[-1])]
    if not images:
        raise ValueError("no pages")
    return images


def _is_for_tifffile(page) -> bool:
    """Whether tifffile alone, or with imagecodecs, decodes a page as it is stored."""
    if page.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
        return False
    own = page.compression in UNCOMPRESSED + DEFLATE and page.predictor in (1, HORIZONTAL)
    own = own and page.bitspersample in (8, 16, 32, 64)
    return own or (importlib.util.find_spec("imagecodecs") is not None)


def _values(page) -> np.ndarray:
    """Decodes a page to (height, width, channels)."""
    check_bounds(page.imagelength, page.imagewidth, page.samplesperpixel)
    if len(page.shape) != len(page.axes) or set(page.axes) - set("YXS"):
        raise ValueError(f"a page with the axes {page.axes}")
    compressed = page.compression not in UNCOMPRESSED
    check_inflation(sum(page.databytecounts), page.size * page.dtype.itemsize, compressed)
    if page.compression in DEFLATE:
        _check_segments(page)
    values = page.asarray()
    for axis in "YXS":
        values = values if axis in page.axes else values[..., None]
    order = [(page.axes + "S").index(axis) for axis in "YXS"]
    values = values.transpose(order)
    if page.photometric == WHITE_IS_ZERO and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    return values


def _check_segments(page) -> None:
    """Refuses a page with strips or tiles that unpack to more bytes than their pixels have."""
    segment = int(np.prod(page.chunks, dtype=object)) * page.dtype.itemsize
    check_bounds(*((*page.chunks, 1)[:2]))
    handle = page.parent.filehandle
    for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        handle.seek(offset)
        unpacked = zlib.decompressobj().decompress(handle.read(size), segment + 1)
        if len(unpacked) > segment:
            raise ValueError("a part that unpacks to more than its pixels")


def _from_libtiff(path: Path, page, read_with_pillow: Callable) -> Stored:
    """Reads a page with Pillow; refuses it if Pillow would lose bits or channels."""
    result = read_with_pillow(path, page.index)
    deep = page.bitspersample > 8 and result.values.dtype == np.uint8
    if deep or page.samplesperpixel > 4:
        raise ValueError(
            f"the compression {getattr(page.compression, 'name', page.compression)} of "
            f"{page.bitspersample} bits and {page.samplesperpixel} channels needs another package: "
            "pip install imagecodecs"
        )
    return result


def turn_upright(values: np.ndarray, orientation) -> np.ndarray:
    """Turns an image (height, width, channels) upright, given EXIF's orientation, 1 to 8."""
    orientation = orientation if orientation in range(2, 9) else 1
    if orientation in (5, 6, 7, 8):
        values = values.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values

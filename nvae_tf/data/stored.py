"""The values of one image as its file holds them, and size limits for all readers."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from nvae_tf.image_spec import MAX_CHANNELS
from nvae_tf.io.errors import UserError

MAX_PIXELS = 2**26  # 67 million; decoding takes up to 16 bytes of memory per pixel
MAX_VALUES = 4 * MAX_PIXELS  # of an image of many channels
MAX_IMAGES = 2**20  # in one file
MAX_INFLATION = 1100  # largest factor by which zlib's format can compress


class UnreadableImage(UserError):
    """A file cannot be decoded as an image."""


class Item(NamedTuple):
    """One image.

    Attributes:
        path: Path of its file.
        place: Its place among the images of the file, from 0; None if the file holds one image.
    """

    path: Path
    place: int | None = None

    @property
    def name(self) -> str:
        """The image's name in errors and lists."""
        return str(self.path) if self.place is None else f"{self.path}, image {self.place}"


class Stored(NamedTuple):
    """The values of an image as its file holds them.

    Attributes:
        values: Array (height, width, channels) of uint8, uint16, int16, int32 or float32.
        has_alpha: Whether the last channel is opacity.
    """

    values: np.ndarray
    has_alpha: bool = False


def check_bounds(height: int, width: int, channels: int = 1) -> None:
    """Refuses an image that would take too much memory, before it is decoded.

    Raises:
        ValueError: The image is empty, is too large or has too many channels.
    """
    if min(height, width, channels) < 1:
        raise ValueError("an image without pixels")
    if height * width > MAX_PIXELS or height * width * channels > MAX_VALUES:
        raise ValueError(f"{width}x{height} pixels are too many")
    if channels > MAX_CHANNELS + 1:
        raise ValueError(f"{channels} channels are too many; at most {MAX_CHANNELS}")


def check_inflation(stored: int, needed: int, compressed: bool) -> None:
    """Refuses a file that is too small to hold the image that its header announces.

    Args:
        stored: Number of bytes in the file.
        needed: Number of bytes of the image.
        compressed: Whether the bytes in the file are compressed, at most as strongly as zlib can.

    Raises:
        ValueError: The file is too small.
    """
    if stored * (MAX_INFLATION if compressed else 1) < needed:
        raise ValueError(f"{stored} bytes cannot hold an image of {needed}")


def stored(values: np.ndarray, has_alpha: bool = False) -> Stored:
    """Converts values to one of the types of `Stored`, without changing integers.

    Booleans become 0 and 255, and floats become float32.

    Args:
        values: Array (height, width) or (height, width, channels) of numbers.
        has_alpha: Whether the last channel is opacity.

    Raises:
        ValueError: The values are not numbers, do not fit into 32-bit signed integers, or none of them
            is finite; or the image is empty or too large.
    """
    values = values[..., None] if values.ndim == 2 else values
    check_bounds(*values.shape)
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b":
        values = values.astype(np.uint8) * np.uint8(255)
    elif kind == "f":
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        if not np.isfinite(values[..., :-1] if has_alpha else values).any():
            raise ValueError("no finite value")
    elif kind == "i" and size <= 2:
        values = values.astype(np.int16)
    elif kind == "u" and size <= 2:
        values = values.astype(f"u{size}")
    elif kind in "iu":
        if max(abs(int(values.min())), abs(int(values.max()))) >= 2**31:
            raise ValueError("integers of more than 31 bits")
        values = values.astype(np.int32)
    else:
        raise ValueError(f"values of type {str(values.dtype)[:40]}")
    return Stored(np.ascontiguousarray(values), has_alpha)


def full_range(dtype) -> tuple[float, float]:
    """The smallest and the largest value of a type; 0 and 1 for floats."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return 0.0, 1.0
    limits = np.iinfo(dtype)
    return float(limits.min), float(limits.max)

"""Images as files hold them: whole levels, and the stored values that those stand for.

A model computes with values in [0, 1]. Level l of b bits is the value l / (2^b - 1), and stands for
the stored value at the same portion of the way through the value range.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf
import tifffile

from nvae_tf.data import levels as levels_of_files
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.files import atomic_write, write_png
from nvae_tf.io.image_grid import to_bytes

PNG_CHANNELS = (1, 3, 4)
BINARY_BITS = 8  # of the means of binary pixels


def to_levels(images, spec: ImageSpec) -> np.ndarray:
    """Rounds images to the levels of their bits; the means of binary pixels to 8 bits.

    Args:
        images: Images (..., height, width, channels) in [0, 1].
        spec: What they are like.

    Returns:
        Levels of the same shape: uint8, or uint16 for more than 8 bits.
    """
    last = last_level(spec)
    levels = np.rint(np.clip(np.asarray(images), 0.0, 1.0) * np.float32(last))
    return levels.astype(np.uint8 if last < 256 else np.uint16)


def from_levels(levels, spec: ImageSpec) -> np.ndarray:
    """The inverse of `to_levels`: float32 in [0, 1]."""
    return np.asarray(levels, np.float32) / np.float32(last_level(spec))


def levels_to_bytes(levels, spec: ImageSpec) -> np.ndarray:
    """Reduces levels to 8 bits; those of 8 bits stay as they are."""
    return to_bytes(from_levels(levels, spec))


def last_level(spec: ImageSpec) -> int:
    """The level that stands for the value 1."""
    return 2 ** (BINARY_BITS if spec.binary else spec.bits) - 1


def value_range(spec: ImageSpec) -> tuple[float, float]:
    """The stored values that level 0 and the last level stand for."""
    return (0.0, float(last_level(spec))) if spec.binary else levels_of_files.value_range(spec)


def stored_values(levels, spec: ImageSpec) -> np.ndarray:
    """The values that levels stand for.

    Args:
        levels: Levels (..., height, width, channels).
        spec: What the images are like.

    Returns:
        Values of the same shape: uint8 or uint16, rounded, if the range is one of whole numbers that
        fit, else float32.
    """
    low, high = value_range(spec)
    step = (high - low) / last_level(spec)
    values = low + np.asarray(levels, np.float64) * step
    whole = low == int(low) and high == int(high) and (step == int(step) or high - low >= 255)
    if whole and low >= 0 and high <= np.iinfo(np.uint16).max:
        return np.rint(values).astype(np.uint8 if high <= np.iinfo(np.uint8).max else np.uint16)
    return values.astype(np.float32)


def ending(spec: ImageSpec) -> str:
    """The ending of the names of image files: ``".png"`` if those can hold the stored values."""
    whole = stored_values(np.zeros(0), spec).dtype != np.float32
    return ".png" if whole and spec.channels in PNG_CHANNELS else ".tif"


def write_image(path: Path, levels: np.ndarray, spec: ImageSpec) -> None:
    """Writes the stored values of an image as PNG or TIFF, atomically.

    Args:
        path: Path of the file, with the `ending`.
        levels: Levels (height, width, channels).
        spec: What the image is like.

    Raises:
        UserError: The file cannot be written.
    """
    values = stored_values(levels, spec)
    if path.suffix == ".png" and values.dtype == np.uint8:
        write_png(path, values)
        return
    with atomic_write(path) as temporary:
        if path.suffix == ".png":
            temporary.write_bytes(tf.io.encode_png(values).numpy())
        elif spec.channels == 1:
            tifffile.imwrite(temporary, values[..., 0], photometric="minisblack")
        else:
            colours = "rgb" if spec.channels == 3 else "minisblack"
            tifffile.imwrite(temporary, values, photometric=colours, planarconfig="contig")

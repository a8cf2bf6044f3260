"""Reads an image of any size as a model's levels, without a change of its size."""

import dataclasses
from pathlib import Path

import numpy as np

from nvae_tf.config import CENTRE, DROP, KEEP, ImageSpec
from nvae_tf.data import levels
from nvae_tf.data.image_files import ImageReader
from nvae_tf.data.stored import Item
from nvae_tf.io.errors import UserError


def read_whole(path: Path, spec: ImageSpec) -> np.ndarray:
    """Reads the first image of a file; colours become grey for a model of one channel.

    Values are mapped to levels as those of training were.

    Args:
        path: Path of the file.
        spec: What the model's images are like; their size may be another one.

    Returns:
        Levels (height, width, channels) of the spec's bits, uint8 or uint16.

    Raises:
        UserError: The file is not readable, or cannot become such an image.
    """
    stored = ImageReader().read(Item(path))
    height, width, channels = stored.values.shape
    kept = stored.has_alpha and channels == spec.channels
    whole = dataclasses.replace(spec, height=height, width=width, scored_size=None)
    try:
        return levels.to_levels(stored, whole, CENTRE, KEEP if kept else DROP)
    except ValueError as error:
        raise UserError(f"{path}: {error}, as the model has; name other images") from None

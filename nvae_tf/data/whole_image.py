"""Reads an image of any size as the levels of a model, without resizing it."""

import dataclasses
from pathlib import Path

import numpy as np

from nvae_tf.config import CENTRE, DROP
from nvae_tf.data import levels
from nvae_tf.data.image_files import ImageReader
from nvae_tf.data.stored import Item
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError


def read_whole(path: Path, spec: ImageSpec, alpha: str = DROP) -> np.ndarray:
    """Reads the first image of a file; colours become grey for a model of one channel.

    Values are mapped to levels as those of training were.

    Args:
        path: Path of the file.
        spec: Description of the model's images, whose size is ignored.
        alpha: What to do with opacity, as in training (see `levels.to_levels`).

    Returns:
        Levels (height, width, channels) of the spec's bits, uint8 or uint16.

    Raises:
        UserError: The file is not readable, or its channels cannot become those of the spec.
    """
    stored = ImageReader().read(Item(path))
    height, width, _ = stored.values.shape
    whole = dataclasses.replace(spec, height=height, width=width, scored_size=None)
    try:
        return levels.to_levels(stored, whole, CENTRE, alpha)
    except ValueError as error:
        raise UserError(
            f"{path}: {error}, the number that the model has; name other images"
        ) from None

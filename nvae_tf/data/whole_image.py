"""Reads an image of any size as the levels of a model, without resizing it."""

import dataclasses
from pathlib import Path

import numpy as np

from nvae_tf.config import CENTRE, DROP
from nvae_tf.data import levels
from nvae_tf.data.image_files import ImageReader
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError


def read_whole(path: Path, spec: ImageSpec, alpha: str = DROP) -> np.ndarray:
    """Reads the image of a file; colours become grey for a model of one channel.

    Values are mapped to levels as those of training were.

    Args:
        path: Path of the file.
        spec: Description of the model's images, whose size is ignored.
        alpha: What to do with opacity, as in training (see `levels.to_levels`).

    Returns:
        Levels (height, width, channels) of the spec's bits, uint8 or uint16.

    Raises:
        UserError: The file is not readable or holds several images, or its channels cannot become
            those of the spec.
    """
    reader = ImageReader()
    items = reader.items(path)
    if len(items) != 1:
        count = "several images" if items else "no image"
        raise UserError(f"{path}: holds {count}; name files of one")
    stored = reader.read(items[0])
    height, width, _ = stored.values.shape
    whole = dataclasses.replace(spec, height=height, width=width, scored_size=None)
    try:
        return levels.to_levels(stored, whole, CENTRE, alpha)
    except ValueError as error:
        raise UserError(
            f"{path}: {error}, the number that the model has; name other images"
        ) from None

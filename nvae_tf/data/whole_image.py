"""Reads an image of any size as a model's levels, without a change of its size."""

from pathlib import Path

import numpy as np

from nvae_tf.config import ImageSpec
from nvae_tf.data.images import decode
from nvae_tf.io.errors import UserError


def read_whole(path: Path, spec: ImageSpec) -> np.ndarray:
    """Reads an image; colours become grey for a model of one channel.

    Args:
        path: Path of the file.
        spec: What the model's images are like; their size may be another one.

    Returns:
        Levels (height, width, channels) of the spec's bits, uint8 or uint16.

    Raises:
        UserError: The file is not readable, or cannot become such an image.
    """
    if spec.channels not in (1, 3) or spec.bits > 8:
        raise UserError(
            f"{path}: images of {spec.channels} channels of {spec.bits} bits cannot be read from a "
            "file of colours; score arrays by nvae_tf.evaluation.tiles.score"
        )
    image = decode(path, path)
    values = np.atleast_3d(np.asarray(image.convert("L") if spec.channels == 1 else image))
    return values >> (8 - spec.bits)

"""The images of a set that are nearest to others: whether a model repeats what it was trained on."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Neighbours(NamedTuple):
    """The nearest images of a set.

    Attributes:
        images: The nearest ones of each image, nearest first, (n, count, height, width, channels).
        distances: Root mean squared difference of values in [0, 1], (n, count).
    """

    images: np.ndarray
    distances: np.ndarray


def nearest(images, batches: Iterable, count: int, part: tuple | None = None) -> Neighbours:
    """Finds the nearest images of a set by the distance of pixels.

    Args:
        images: Images (n, height, width, channels) in [0, 1].
        batches: The set, in batches (batch, height, width, channels) of images in [0, 1].
        count: Number of neighbours of each image; fewer if the set has fewer.
        part: Rows and columns to compare, two slices; default: all.
    """
    rows, columns = part or (slice(None), slice(None))
    images = np.asarray(images, np.float32)
    flat = images[:, rows, columns].reshape(len(images), -1)
    found = np.zeros((len(images), 0, *images.shape[1:]), np.float32)
    squares = np.zeros((len(images), 0), np.float32)
    for batch in batches:
        candidates = np.asarray(batch, np.float32)
        others = candidates[:, rows, columns].reshape(len(candidates), -1)
        distances = (flat**2).sum(1)[:, None] + (others**2).sum(1) - 2.0 * flat @ others.T
        best = np.argsort(distances, 1, kind="stable")[:, :count]
        squares = np.concatenate([squares, np.take_along_axis(distances, best, 1)], 1)
        found = np.concatenate([found, candidates[best]], 1)
        order = np.argsort(squares, 1, kind="stable")[:, :count]
        squares = np.take_along_axis(squares, order, 1)
        found = np.stack([row[chosen] for row, chosen in zip(found, order, strict=True)])
    return Neighbours(found, np.sqrt(np.maximum(squares, 0.0) / flat.shape[1]))

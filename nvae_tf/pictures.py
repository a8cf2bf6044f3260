"""Grids of images."""

import numpy as np

GAP = 2  # pixels between images


def to_bytes(images) -> np.ndarray:
    """Images in [0, 1] as 8-bit ones, values rounded."""
    return np.rint(np.clip(np.asarray(images), 0.0, 1.0) * 255.0).astype(np.uint8)


def grid(images, columns: int) -> np.ndarray:
    """Arranges images row by row, with a grey gap between them.

    Args:
        images: (n, height, width, channels) in [0, 1].
        columns: images in a row.

    Returns:
        One 8-bit image (height', width', channels).
    """
    images = to_bytes(images)
    _, height, width, channels = images.shape
    rows = -(-len(images) // columns)
    shape = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels)
    canvas = np.full(shape, 128, np.uint8)
    for index, image in enumerate(images):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas

"""Images as 8-bit RGB, enlarged where they are small."""

import numpy as np


def to_bytes(images) -> np.ndarray:
    """Converts images in [0, 1] to 8 bits, rounding."""
    return np.rint(np.clip(np.asarray(images), 0.0, 1.0) * 255.0).astype(np.uint8)


def enlarge(images, min_width: int) -> np.ndarray:
    """Enlarges images by repeating their pixels a whole number of times.

    Args:
        images: Images (n, height, width, 1 or 3), 8-bit or in [0, 1].
        min_width: Smallest width of the results in pixels.

    Returns:
        8-bit RGB images (n, height', width', 3).
    """
    images = np.asarray(images)
    images = images if images.dtype == np.uint8 else to_bytes(images)
    times = -(-min_width // images.shape[2])
    images = images.repeat(times, 1).repeat(times, 2)
    return np.broadcast_to(images, (*images.shape[:3], 3))

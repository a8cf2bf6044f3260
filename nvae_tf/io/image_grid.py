"""Images of any number of channels and bits as 8-bit RGB, enlarged where they are small."""

import numpy as np


def to_bytes(images) -> np.ndarray:
    """Converts images in [0, 1] to 8 bits, rounding."""
    return np.rint(np.clip(np.asarray(images), 0.0, 1.0) * 255.0).astype(np.uint8)


def to_rgb(images) -> np.ndarray:
    """The one rule by which images become pictures to look at.

    One channel is grey. Of two, the first is magenta and the second green, so that equal values are
    grey. Three are red, green and blue; of four and more the first three are shown as those.

    Args:
        images: Images (..., height, width, channels) in [0, 1]; 8-bit ones stand for values / 255.

    Returns:
        8-bit RGB images (..., height, width, 3).
    """
    images = np.asarray(images)
    images = images if images.dtype == np.uint8 else to_bytes(images)
    if images.shape[-1] == 1:
        return images.repeat(3, -1)
    return images[..., [0, 1, 0]] if images.shape[-1] == 2 else images[..., :3]


def enlarge(images, min_width: int) -> np.ndarray:
    """Enlarges images by repeating their pixels a whole number of times.

    Args:
        images: Images (n, height, width, channels), as for `to_rgb`.
        min_width: Smallest width of the results in pixels.

    Returns:
        8-bit RGB images (n, height', width', 3).
    """
    images = to_rgb(images)
    times = -(-min_width // images.shape[2])
    return images.repeat(times, 1).repeat(times, 2)

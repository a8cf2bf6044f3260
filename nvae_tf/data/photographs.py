"""The data set ``photos``: crops of the photographs that scikit-image and scikit-learn bundle."""

import numpy as np

from nvae_tf.data.source import ArraySource
from nvae_tf.io.errors import UserError

SIZES = (32, 64)  # of the crops
# The colours of the test photographs occur in the others. Those of flower.jpg do not.
TRAIN = ("astronaut", "coffee", "stereo_motorcycle", "china.jpg", "flower.jpg")
TEST = ("chelsea", "rocket")


def read_photos(folder: str = "", size: int = SIZES[0]) -> tuple[ArraySource, ArraySource]:
    """Cuts square crops out of photographs; no photograph is in both splits.

    Training images overlap by half; test images do not overlap. There are 5,125 training and 386 test
    images of 32x32, or 1,176 and 88 of 64x64.

    Args:
        folder: Ignored, because the photographs come with scikit-image and scikit-learn.
        size: Side of the crops in pixels.

    Returns:
        Training and test images, 8-bit, (n, size, size, 3).

    Raises:
        UserError: scikit-image is not installed.
    """
    return (
        ArraySource(np.concatenate([_crops(read_photograph(n), size, size // 2) for n in TRAIN])),
        ArraySource(np.concatenate([_crops(read_photograph(n), size, size) for n in TEST])),
    )


def read_photograph(name: str) -> np.ndarray:
    """Reads a photograph.

    Args:
        name: A name in `TRAIN` or `TEST`.

    Returns:
        8-bit colours, (height, width, 3).

    Raises:
        UserError: scikit-image is not installed.
    """
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(name)
    try:
        from skimage import data
    except ImportError:
        raise UserError(
            'photos needs the package scikit-image: pip install "nvae-tf[photos]"'
        ) from None
    photograph = getattr(data, name)()
    return photograph[0] if name == "stereo_motorcycle" else photograph  # the left one of two


def _crops(photograph: np.ndarray, size: int, stride: int) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(photograph, (size, size), (0, 1))
    crops = windows[::stride, ::stride].reshape(-1, 3, size, size)
    return np.ascontiguousarray(crops.transpose(0, 2, 3, 1))

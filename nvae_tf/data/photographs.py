"""The data set ``photos``: crops of the photographs that scikit-image and scikit-learn bundle."""

import numpy as np

from nvae_tf.data.source import ArraySource
from nvae_tf.io.errors import UserError

SIZE = 32
TRAIN_STRIDE, TEST_STRIDE = 16, 32  # pixels between crops
TRAIN = ("astronaut", "coffee", "rocket", "china.jpg")
TEST = ("chelsea", "flower.jpg")


def read_photos(folder: str = "") -> tuple[ArraySource, ArraySource]:
    """Cuts crops of 32x32 out of photographs; no photograph is in both splits.

    Training images overlap by half; test images do not overlap.

    Args:
        folder: Ignored, because the photographs come with scikit-image and scikit-learn.

    Returns:
        Training and test images, 8-bit, (n, 32, 32, 3).

    Raises:
        UserError: scikit-image is not installed.
    """
    return (
        ArraySource(np.concatenate([_crops(_photograph(name), TRAIN_STRIDE) for name in TRAIN])),
        ArraySource(np.concatenate([_crops(_photograph(name), TEST_STRIDE) for name in TEST])),
    )


def _photograph(name: str) -> np.ndarray:
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(name)
    try:
        from skimage import data
    except ImportError:
        raise UserError(
            'photos needs the package scikit-image: pip install "nvae-tf[photos]"'
        ) from None
    return getattr(data, name)()


def _crops(photograph: np.ndarray, stride: int) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(photograph, (SIZE, SIZE), (0, 1))
    crops = windows[::stride, ::stride].reshape(-1, 3, SIZE, SIZE)
    return np.ascontiguousarray(crops.transpose(0, 2, 3, 1))

"""Fixtures shared by the tests: a tiny model and real images that come with scikit-learn."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # the reference numbers are a CPU's

import nvae_tf  # noqa: F401, E402 - chooses the Keras that TensorFlow shows

import numpy as np  # noqa: E402 isort: skip
import pytest  # noqa: E402 isort: skip


@pytest.fixture(scope="session")
def photographs():
    """64 crops of 32x32 from scikit-learn's two photographs, 8-bit."""
    from sklearn.datasets import load_sample_images

    crops = [
        image[top : top + 32, left : left + 32]
        for image in load_sample_images().images
        for top in range(0, 320, 64)
        for left in range(0, 448, 64)
    ]
    return np.stack(crops)[:64]

"""Fixtures shared by the tests: a tiny model and real images that come with scikit-learn."""

import gc
import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # the reference numbers are a CPU's

import nvae_tf  # noqa: F401, E402 - sets what TensorFlow reads when it is imported

import numpy as np  # noqa: E402 isort: skip
import pytest  # noqa: E402 isort: skip


# Traced graphs are millions of objects, and looking for garbage among them takes a tenth of the time.
gc.set_threshold(100_000, 20, 100)


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


TINY = """
dataset: digits
batch_size: 100
num_latent_scales: 1
num_groups_per_scale: 2
num_latent_per_group: 4
num_channels_enc: 4
num_channels_dec: 4
num_preprocess_cells: 1
num_postprocess_cells: 1
use_se: true
res_dist: true
epochs: 3
warmup_epochs: 1
weight_decay_norm: 1e-2
log_every: 5
keep: 2
jit_compile: off
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def run(recipe, tmp_path_factory):
    """A finished run: its folder."""
    root = tmp_path_factory.mktemp("runs")
    from nvae_tf.cli.train import main

    assert main(["--config", str(recipe), "--root", str(root)]) == 0
    return root / "tiny"

"""Samples of a model: compiled once for all temperatures, and nothing stays behind."""

import gc
import weakref

import numpy as np
import pytest

from nvae_tf.config import ModelConfig
from nvae_tf.evaluation import sampling
from nvae_tf.image_spec import ImageSpec
from nvae_tf.model import NVAE

pytestmark = pytest.mark.core


def small():
    config = ModelConfig(
        num_groups_per_scale=2, num_latent_per_group=2, num_channels_enc=4, num_channels_dec=4,
        num_preprocess_cells=1, num_postprocess_cells=1,
    )  # fmt: skip
    return NVAE(config, ImageSpec(32, 32, 1, binary=True))


def test_a_model_that_was_sampled_from_can_be_freed():
    model = small()
    images, _ = sampling.sample(model, 3, 0.7, batch_size=2, seed=1)
    assert images.shape == (3, 32, 32, 1)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_temperatures_share_a_graph_and_it_changes_nothing():
    model = small()
    draw = sampling.sampler_function(model)
    for temperature in (0.7, 1.0, 1):
        options = dict(batch_size=4, seed=3)
        shared, _ = sampling.sample(model, 6, temperature, draw=draw, **options)
        np.testing.assert_array_equal(shared, sampling.sample(model, 6, temperature, **options)[0])
    assert draw.experimental_get_tracing_count() == 1

"""The hierarchy as a whole: every architecture, and the sources of z."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from nvae_tf.architectures import ARCHITECTURES
from nvae_tf.config import ModelConfig
from nvae_tf.image_spec import ImageSpec
from nvae_tf.layers.latent_group import FromPosterior, FromPrior, Given
from nvae_tf.model import NVAE

pytestmark = pytest.mark.core

TINY = ModelConfig(
    num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=3, ada_groups=True,
    num_channels_enc=8, num_channels_dec=8, num_preprocess_blocks=1, num_postprocess_blocks=1,
    num_preprocess_cells=2, num_postprocess_cells=2, use_se=True, res_dist=True, num_mixture_dec=2,
)  # fmt: skip
COLOUR = ImageSpec(16, 16, 3)


@pytest.fixture(scope="module")
def model():
    return NVAE(dataclasses.replace(TINY, num_nf=1), COLOUR)


@pytest.fixture(scope="module")
def images(photographs):
    return tf.constant(photographs[:4, ::2, ::2].astype(np.float32) / 255.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains(architecture, images):
    model = NVAE(dataclasses.replace(TINY, arch_instance=architecture), COLOUR)
    noise = model.draw_noise(4, (1, 0))
    model.initialize_from_data(images, noise)
    with tf.GradientTape() as tape:
        output = model(images, noise, training=True)
        recon = -model.log_likelihood(output.parameters, images)
        loss = tf.reduce_mean(recon + tf.reduce_sum(output.kl_per_group, 1))
    gradients = tape.gradient(loss, model.trainable_variables)
    assert output.parameters.shape == (4, 16, 16, 20)
    assert output.kl_per_group.shape == (4, 3)
    assert all(g is not None and np.all(np.isfinite(g)) for g in gradients)
    assert sum(np.any(g.numpy() != 0.0) for g in gradients) > 0.9 * len(gradients)


def test_one_group_needs_no_learned_start(images):
    alone = dict(num_latent_scales=1, num_groups_per_scale=1, ada_groups=False)
    model = NVAE(dataclasses.replace(TINY, **alone), COLOUR)
    assert model.latent_shapes == [(8, 8, 3)]
    assert model(images, model.draw_noise(4, (1, 0))).parameters.shape == (4, 16, 16, 20)
    assert model.sample(2).shape == (2, 16, 16, 3)


def test_encoder_and_decoder_may_differ_in_width(images):
    model = NVAE(dataclasses.replace(TINY, num_channels_enc=12, num_channels_dec=8), COLOUR)
    assert model(images, model.draw_noise(4, (1, 0))).parameters.shape == (4, 16, 16, 20)


def test_latents_come_coarsest_first_and_their_probabilities_add_up(model, images):
    assert model.latent_shapes == [(4, 4, 3), (8, 8, 3), (8, 8, 3)]
    output = model(images, model.draw_noise(4, (1, 0)))
    assert [latent.z.shape[1:] for latent in output.latents] == model.latent_shapes
    # With flows, KL is the difference of the log-probabilities at the sample.
    total = tf.reduce_sum(output.kl_per_group, 1)
    np.testing.assert_allclose(total, output.log_q - output.log_p, rtol=1e-4, atol=1e-3)


def test_flows_transform_the_posterior_that_tfp_sees(model, images):
    group = model.groups[0]
    encoded = model.bottom_up(images)
    top = tf.tile(model.top.value()[None], [4, 1, 1, 1])
    scope = model.scope()
    posterior = group.posterior(top, encoded[0], group.prior_parameters(top, scope), scope)
    z = posterior.sample(seed=(1, 2))
    assert z.shape == (4, *group.latent_shape)
    # A copy, so that TFP cannot answer from what it remembers of the sampling.
    before_flows = posterior.bijector.inverse(tf.identity(z))
    assert np.abs(before_flows - z).max() > 1e-3
    expected = posterior.distribution.log_prob(before_flows)
    np.testing.assert_allclose(posterior.log_prob(tf.identity(z)), expected, rtol=1e-4)


def test_given_latents_decode_to_the_reconstruction(model, images):
    noise = model.draw_noise(4, (1, 0))
    output = model.top_down(FromPosterior(model.bottom_up(images), noise))
    decoded = model.top_down(Given([latent.z for latent in output.latents]))
    np.testing.assert_array_equal(decoded.parameters, output.parameters)


def test_a_given_top_stays_and_the_rest_is_drawn(model):
    first = model.top_down(FromPrior(model.draw_noise(2, (1, 0))))
    fresh = FromPrior(model.draw_noise(2, (2, 0)))
    mixed = model.top_down(Given([first.latents[0].z], fresh))
    np.testing.assert_array_equal(mixed.latents[0].z, first.latents[0].z)
    assert not np.allclose(mixed.latents[1].z, first.latents[1].z)


def test_temperature_scales_each_groups_deviation(model):
    noise = [model.draw_noise(2, (seed, 0)) for seed in (1, 2)]
    cold = [model.top_down(FromPrior(n, 0.0)).latents for n in noise]
    for one, other in zip(*cold, strict=True):
        np.testing.assert_array_equal(one.z, other.z)
    only_top = [model.top_down(FromPrior(n, [1.0, 0.0, 0.0])).latents for n in noise]
    assert not np.allclose(only_top[0][0].z, only_top[1][0].z)
    one, half = (model.top_down(FromPrior(noise[0], t)).latents[0].z for t in (1.0, 0.5))
    np.testing.assert_allclose(half, 0.5 * one, rtol=1e-5)


def test_samples_depend_on_the_seed_alone(model):
    draw = tf.function(lambda seed: model.sample(3, 0.8, seed=seed), autograph=False)
    one, same, other = (draw(tf.constant(seed)).numpy() for seed in ((1, 0), (1, 0), (1, 1)))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    assert one.shape == (3, 16, 16, 3) and one.min() >= 0.0 and one.max() <= 1.0


def test_padding_is_not_scored():
    model = NVAE(TINY, ImageSpec(32, 32, 1, binary=True, scored_size=(28, 28)))
    logits = tf.random.stateless_normal((2, 32, 32, 1), (1, 2))
    image = tf.zeros((2, 32, 32, 1))
    edge = tf.pad(tf.zeros((2, 28, 28, 1)), [(0, 0), (2, 2), (2, 2), (0, 0)], constant_values=1.0)
    np.testing.assert_array_equal(
        model.log_likelihood(logits, image), model.log_likelihood(logits, edge)
    )
    assert model.image.num_dims == 28 * 28
    np.testing.assert_allclose(model.image.bits_per_dim(np.log(2.0) * 784), 1.0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_model_rebuilds_from_its_configuration(precision, images):
    model = NVAE(TINY, COLOUR, precision, name="photographs")
    rebuilt = NVAE.from_config(model.get_config())
    assert (rebuilt.precision, rebuilt.name) == (precision, "photographs")
    assert rebuilt.get_config() == model.get_config()
    rebuilt.set_weights(model.get_weights())
    noise = model.draw_noise(4, (1, 0))
    np.testing.assert_array_equal(
        rebuilt(images, noise).parameters, model(images, noise).parameters
    )

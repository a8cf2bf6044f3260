"""The exact likelihood of images with any number of channels and bits."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

import nvae_tf
from nvae_tf.distributions import (
    DiscretizedLogisticMixture,
    exact_log_mass,
    num_mixture_parameters,
)
from nvae_tf.io.errors import ConfigError

SMALL = dict(
    num_latent_scales=1, num_groups_per_scale=1, num_latent_per_group=2, num_channels_enc=4,
    num_channels_dec=4, num_preprocess_blocks=1, num_postprocess_blocks=1, num_preprocess_cells=1,
    num_postprocess_cells=1, num_mixture_dec=2,
)  # fmt: skip


def drawn_parameters(channels, mixtures, spread, seed):
    count = num_mixture_parameters(channels, mixtures)
    return np.random.default_rng(seed).normal(scale=spread, size=count).astype(np.float32)


def means_and_log_scales(parameters, channels, mixtures):
    """A view of the means and the log-scales in parameters, (channels, 2 or 3, mixtures)."""
    per_channel = 3 if channels == 3 else 2
    values = parameters[mixtures : mixtures + per_channel * channels * mixtures]
    return values.reshape(channels, per_channel, mixtures)


@pytest.mark.parametrize("bits", [5, 8, 10, 12, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("log_scale", [None, -1000.0, -7.0, 0.0, 50.0])
@pytest.mark.parametrize("spread", [1.0, 1000.0])
def test_probabilities_of_all_levels_of_a_value_sum_to_one(channels, bits, log_scale, spread):
    last, mixtures = 2**bits - 1, 3 if channels == 1 else 1
    parameters = drawn_parameters(channels, mixtures, spread, seed=bits)
    values = means_and_log_scales(parameters, channels, mixtures)
    before = np.random.default_rng(0).integers(0, last + 1, channels - 1)
    if log_scale is not None:
        values[-1, 1] = log_scale
    # The channels before the last one are certain: narrow, and shifted by no other.
    values[:-1, 0], values[:-1, 1] = 2.0 * before[:, None] / last - 1.0, -40.0
    if channels == 3:
        values[0, 2] = 0.0
    elif channels == 4:
        parameters[-3 * mixtures : -mixtures] = 0.0
    distribution = DiscretizedLogisticMixture(
        parameters[None, None],
        bits,
        min_log_scale=-40.0 if channels > 1 else "auto",
        channels=channels,
        exact=True,
    )
    images = np.empty((last + 1, 1, 1, channels), np.float32)
    images[..., :-1], images[:, 0, 0, -1] = before / last, np.arange(last + 1) / last
    log_probs = distribution.log_prob(images).numpy().astype(np.float64)
    assert np.exp(log_probs).sum() == pytest.approx(1.0, abs=1e-6)


def test_probabilities_of_all_colours_sum_to_one():
    for channels, bits in ((2, 3), (3, 2), (4, 2)):
        levels = np.linspace(0.0, 1.0, 2**bits, dtype=np.float32)
        colours = np.array(list(itertools.product(levels, repeat=channels)), np.float32)
        parameters = drawn_parameters(channels, 3, 1.0, seed=channels)
        distribution = DiscretizedLogisticMixture(
            parameters[None, None], bits, channels=channels, exact=True
        )
        log_probs = distribution.log_prob(colours[:, None, None]).numpy().astype(np.float64)
        assert np.exp(log_probs).sum() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("bits", [5, 8, 10, 12, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_values_and_gradients_are_finite_at_extremes(channels, bits):
    last = 2**bits - 1
    levels = tf.random.stateless_uniform((8, 8, channels), (1, 2), 0, last + 1, tf.int32)
    images = tf.cast(levels, tf.float32) / last
    for spread in (1.0, 30.0, 1e4):
        count = num_mixture_parameters(channels, 5)
        parameters = spread * tf.random.stateless_normal((8, 8, count), (3, 4))
        with tf.GradientTape() as tape:
            tape.watch(parameters)
            log_prob = DiscretizedLogisticMixture(
                parameters, bits, channels=channels, exact=True
            ).log_prob(images)
        assert np.isfinite(log_prob)
        assert np.all(np.isfinite(tape.gradient(log_prob, parameters)))


def test_edges_of_sixteen_bits_are_those_of_float64():
    last, mean, log_scale = 2**16 - 1, np.float32(-0.73), np.float32(-7.0)
    levels = np.r_[0:20, 8_000:8_020, 30_000, last - 20 : last + 1].astype(np.float64)
    scale, centres = np.exp(np.float64(log_scale)), 2.0 * levels / last - 1.0 - np.float64(mean)
    upper, lower = (centres + 1.0 / last) / scale, (centres - 1.0 / last) / scale
    below, above = -np.logaddexp(0.0, -upper), -np.logaddexp(0.0, lower)
    expected = below + above + np.log(-np.expm1(lower - upper))
    expected[0], expected[-1] = below[0], above[-1]
    shape = (len(levels), 1, 1)
    parameters = np.full(shape, mean), np.full(shape, log_scale)
    found = exact_log_mass(levels.reshape(shape).astype(np.float32), *parameters, last)
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-4, atol=1e-3)


def test_official_and_exact_probabilities_differ_where_the_official_ones_do_not_add_up():
    parameters = drawn_parameters(3, 5, 1.0, seed=1)
    means_and_log_scales(parameters, 3, 5)[:, 1] = -3.0
    official = DiscretizedLogisticMixture(parameters[None, None])
    exact = DiscretizedLogisticMixture(parameters[None, None], exact=True)
    middle = np.full((1, 1, 1, 3), 128 / 255, np.float32)
    np.testing.assert_allclose(official.log_prob(middle), exact.log_prob(middle), rtol=1e-3)
    nearly_white = np.full((1, 1, 1, 3), 254 / 255, np.float32)
    assert official.log_prob(nearly_white)[0] > exact.log_prob(nearly_white)[0] + 0.1
    # With fewer bits no level is counted twice.
    five = [
        DiscretizedLogisticMixture(parameters[None, None], 5, exact=exact).log_prob(
            np.full((1, 1, 1, 3), 30 / 31, np.float32)
        )
        for exact in (False, True)
    ]
    np.testing.assert_allclose(*five, rtol=1e-2)


def test_samples_of_the_exact_distribution_are_levels_drawn_with_their_probabilities():
    parameters = drawn_parameters(2, 2, 0.7, seed=3)
    distribution = DiscretizedLogisticMixture(parameters[None, None], 2, channels=2, exact=True)
    draws = np.rint(distribution.sample(40_000, seed=(1, 2)).numpy()[:, 0, 0] * 3.0)
    pairs = np.array(list(itertools.product(range(4), repeat=2)), np.float32)
    expected = np.exp(distribution.log_prob(pairs[:, None, None] / np.float32(3.0)))
    counted = [np.mean(np.all(draws == pair, 1)) for pair in pairs]
    np.testing.assert_allclose(counted, expected, atol=0.01)


@pytest.mark.parametrize(
    ("image", "parameters"),
    [
        pytest.param((16, 24, 1, 12), 6, marks=pytest.mark.slow),
        ((8, 16, 2, 16), 12),
        pytest.param((16, 16, 3, 10), 20, marks=pytest.mark.slow),
        ((16, 8, 5, 16), 30),
    ],
)
def test_a_model_of_any_image_scores_draws_and_learns(image, parameters):
    spec = nvae_tf.ImageSpec(*image)
    model = nvae_tf.NVAE(image=spec, **SMALL)
    levels = np.random.default_rng(0).integers(0, 2**spec.bits, (2, *spec.shape))
    images = (levels / (2.0**spec.bits - 1.0)).astype(np.float32)
    output = model(images, model.draw_noise(2, 1))
    assert output.parameters.shape == (2, *spec.shape[:2], parameters)
    assert model.likelihood == "exact" and model.num_bits == spec.bits
    bits = model.bits_per_dim(-model.log_likelihood(output.parameters, images))
    assert np.all(bits > 0) and np.all(bits < spec.bits + 5)
    assert model.sample(2).shape == (2, *spec.shape)
    assert model.reconstruct(images).shape == images.shape
    model.compile("adamax")
    assert np.all(np.isfinite(model.train_on_batch(images)))


@pytest.mark.slow
def test_eight_bits_learn_with_the_exact_likelihood(photographs):
    model = nvae_tf.NVAE(image=(32, 32, 3), likelihood="exact", **SMALL)
    model.compile("adamax")
    images = (photographs[:16] / 255.0).astype(np.float32)
    values = [model.train_on_batch(images, return_dict=True)["nelbo"] for _ in range(10)]
    assert np.all(np.isfinite(values)) and values[-1] < 0.9 * values[0]


def test_the_likelihood_is_the_official_one_where_there_is_one():
    colour = (16, 16, 3)
    assert nvae_tf.NVAE(image=colour, **SMALL).likelihood == "official"
    assert nvae_tf.NVAE(image=colour, likelihood="exact", **SMALL).likelihood == "exact"
    assert nvae_tf.NVAE(image=(16, 16, 1), **SMALL).likelihood == "exact"
    with pytest.raises(ConfigError, match="likelihood: official is not allowed for 1 channels"):
        nvae_tf.NVAE(image=(16, 16, 1), likelihood="official", **SMALL)

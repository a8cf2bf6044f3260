"""The distributions, against sums and closed forms."""

import itertools

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
import tensorflow_probability as tfp

from nvae_tf.distributions import (
    DiscretizedLogisticMixture,
    NormalImage,
    bernoulli_image,
    clamped_normal,
    mean_image,
)

pytestmark = pytest.mark.core


def test_clamped_normal_is_the_normal_it_says():
    mu, log_sigma = np.float32([-20.0, 0.3, 4.0]), np.float32([-30.0, 0.0, 9.0])
    clamp = lambda x: 5.0 * np.tanh(np.float64(x) / 5.0)  # noqa: E731
    mean, deviation = clamp(mu), (np.exp(clamp(log_sigma)) + 1e-2) * 0.7
    ours = clamped_normal(mu, log_sigma, temperature=0.7)
    x = np.float32([-4.9, 1.0, 0.0])
    np.testing.assert_allclose(
        ours.log_prob(x), scipy.stats.norm.logpdf(x, mean, deviation), rtol=1e-4
    )
    np.testing.assert_allclose(ours.mean(), mean, rtol=1e-5)
    np.testing.assert_allclose(ours.loc + ours.scale, mean + deviation, rtol=1e-5)
    draws = ours.sample(20000, seed=(1, 2)).numpy()
    np.testing.assert_allclose(draws.std(0), deviation, rtol=0.03)


def test_kl_of_clamped_normals_is_what_samples_say():
    q, p = clamped_normal([0.5], [-1.0]), clamped_normal([0.0], [0.2])
    z = q.sample(100000, seed=(3, 4))
    estimate = tf.reduce_mean(q.log_prob(z) - p.log_prob(z))
    np.testing.assert_allclose(tfp.distributions.kl_divergence(q, p)[0], estimate, rtol=0.02)


def mixture_parameters(shape, mixtures, scale, seed):
    drawn = scale * np.random.default_rng(seed).normal(size=(*shape, 10 * mixtures))
    return tf.constant(drawn, tf.float32)


def test_logistic_mixture_sums_to_one_over_all_colours():
    levels = np.linspace(0.0, 1.0, 4, dtype=np.float32)  # of 2 bits
    colours = np.array(list(itertools.product(levels, repeat=3)), np.float32)
    for seed in range(5):
        distribution = DiscretizedLogisticMixture(
            mixture_parameters((1, 1), 3, 1.0, seed), num_bits=2
        )
        log_probs = distribution.log_prob(colours[:, None, None, :])
        assert log_probs.shape == (64,)
        np.testing.assert_allclose(
            np.exp(log_probs.numpy().astype(np.float64)).sum(), 1.0, rtol=1e-5
        )


def test_logistic_mixture_prefers_the_photograph_it_was_centred_on(photographs):
    image = photographs[:2].astype(np.float32) / 255.0
    means = 2.0 * image - 1.0
    parameters = np.zeros((2, 32, 32, 20), np.float32)
    parameters[..., 2:].reshape(2, 32, 32, 3, 3, 2)[..., 0, :] = means[..., None]
    parameters[..., 2:].reshape(2, 32, 32, 3, 3, 2)[..., 1, :] = -4.0
    distribution = DiscretizedLogisticMixture(tf.constant(parameters))
    np.testing.assert_allclose(mean_image(distribution), image, atol=1e-6)
    matched, swapped = distribution.log_prob(image), distribution.log_prob(image[::-1])
    assert np.all(matched > swapped)
    draws = distribution.sample(50, seed=(5, 6)).numpy()
    assert draws.shape == (50, 2, 32, 32, 3) and draws.min() >= 0.0 and draws.max() <= 1.0
    inner = (image > 0.2) & (image < 0.8)  # away from the clipping at both ends
    np.testing.assert_allclose(draws.mean(0)[inner], image[inner], atol=0.04)


def test_the_image_that_is_shown_for_a_mixture_is_the_official_one_and_not_called_its_mean():
    # Two sharp components: green follows red where that is dark, and does the opposite elsewhere.
    red, follow = np.array([-0.5, 0.5]), np.array([2.0, -2.0])
    rest = np.zeros((3, 3, 2))
    rest[0, 0], rest[:, 1], rest[0, 2] = red, -7.0, follow
    distribution = DiscretizedLogisticMixture(
        tf.constant(np.concatenate([np.zeros(2), rest.ravel()])[None, None], tf.float32)
    )
    # Averaged first, coefficients and red cancel out.
    np.testing.assert_allclose(distribution.mean_image()[0, 0], [0.5, 0.5, 0.5], atol=1e-6)
    drawn = distribution.sample(4000, seed=(1, 2)).numpy()[:, 0, 0]
    expected = (np.mean(np.tanh(follow) * red) + 1.0) / 2.0
    np.testing.assert_allclose(drawn.mean(0), [0.5, expected, 0.5], atol=0.02)
    assert abs(expected - 0.5) > 0.2
    with pytest.raises(NotImplementedError):
        distribution.mean()


def test_temperatures_may_be_whole_numbers_of_any_kind():
    parameters = mixture_parameters((2, 2), 3, 1.0, 0)
    uniform = tf.random.stateless_uniform((2, 2, 6), (1, 2), minval=1e-3)
    expected = DiscretizedLogisticMixture(parameters, temperature=2.0).from_uniform(uniform)
    for two in (2, np.int64(2), tf.constant(2)):
        actual = DiscretizedLogisticMixture(parameters, temperature=two).from_uniform(uniform)
        np.testing.assert_array_equal(actual, expected)
        assert clamped_normal([0.0], [0.0], two).scale == clamped_normal([0.0], [0.0], 2.0).scale


def test_logistic_mixture_is_finite_at_extremes():
    parameters = mixture_parameters((8, 8), 5, 1000.0, 7)
    x = tf.round(tf.random.stateless_uniform((8, 8, 3), (1, 2)) * 255.0) / 255.0
    with tf.GradientTape() as tape:
        tape.watch(parameters)
        log_prob = DiscretizedLogisticMixture(parameters).log_prob(x)
    assert np.isfinite(log_prob)
    assert np.all(np.isfinite(tape.gradient(log_prob, parameters)))


def test_bernoulli_and_normal_images(photographs):
    image = photographs[:2, ..., :1].astype(np.float32) / 255.0
    logits = tf.constant(4.0 * image - 2.0)
    binary = np.float32(image > 0.5)
    probability = 1.0 / (1.0 + np.exp(-logits.numpy().astype(np.float64)))
    expected = np.log(np.where(binary > 0, probability, 1.0 - probability)).sum((1, 2, 3))
    ours = bernoulli_image(logits)
    np.testing.assert_allclose(ours.log_prob(binary), expected, rtol=1e-5)
    np.testing.assert_allclose(ours.mean(), probability, rtol=1e-4)
    assert set(np.unique(ours.sample(seed=(1, 1)))) == {0.0, 1.0}

    parameters = tf.concat([2.0 * image - 1.0, tf.zeros_like(image) - 1.0], -1)
    normal = NormalImage(parameters)
    mean, deviation = 5.0 * np.tanh((2.0 * image - 1.0) / 5.0), np.exp(-5.0 * np.tanh(0.2)) + 0.01
    expected = scipy.stats.norm.logpdf(2.0 * image - 1.0, mean, deviation).sum((1, 2, 3))
    np.testing.assert_allclose(normal.log_prob(image), expected, rtol=1e-4)
    np.testing.assert_allclose(normal.mean(), (mean + 1.0) / 2.0, rtol=1e-4, atol=1e-6)

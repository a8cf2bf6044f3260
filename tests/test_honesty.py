"""Numbers that are reported are what they are called: masses sum to 1, bounds bound, bits are bits."""

import types

import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf
import tensorflow_probability as tfp
from hypothesis import given, settings
from hypothesis import strategies as st

from nvae_tf.config import ModelConfig
from nvae_tf.distributions import DiscretizedLogisticMixture, bernoulli_image, clamped_normal
from nvae_tf.evaluation import likelihood
from nvae_tf.image_spec import ImageSpec
from nvae_tf.model import NVAE

MIXTURES = 4
# Below this mass the official formula, which is ours, takes density times width for a bin.
APPROXIMATED = 1e-5


def colours(bits, red):
    """All colours with these levels of red, (n, 1, 1, 3) in [0, 1].

    With 8 bits those without level 255: officially the highest bin begins at 0.99 (of -1 to 1), so that
    254 has the mass of 254 and 255 together, and 255 is counted a second time.
    """
    levels = np.arange(min(2**bits, 255)) / (2**bits - 1.0)
    grid = np.stack(np.meshgrid(levels[red], levels, levels, indexing="ij"), -1)
    return grid.reshape(-1, 1, 1, 3).astype(np.float32)


def parameters_of(means, log_scales, coefficients, logits):
    """(1, 1, 10 * mixtures) from arrays (3, mixtures) and (mixtures,)."""
    rest = np.stack([means, log_scales, coefficients], 1).reshape(-1)  # (3, 3, mixtures)
    return tf.constant(np.concatenate([logits, rest])[None, None], tf.float32)


@pytest.mark.parametrize("spread", [0.5, 5.0, 1e3, 1e6])
@pytest.mark.parametrize("log_scale", [(-9.0, -5.0), (-4.0, 0.0), (0.0, 8.0)])
@pytest.mark.parametrize("bits", [5, 8])
def test_a_pixels_masses_sum_to_one(bits, log_scale, spread):
    rng = np.random.default_rng(0)
    means = spread * rng.normal(size=(3, MIXTURES))
    levels = range(2**bits)
    if bits == 8:  # 2^24 colours are too many: red is black for certain
        means[0], levels = -1e5, [0]
    coefficients, logits = 3.0 * rng.normal(size=(3, MIXTURES)), spread * rng.normal(size=MIXTURES)
    log_scales = rng.uniform(*log_scale, size=(3, MIXTURES))
    parameters = parameters_of(means, log_scales, coefficients, logits)
    log_masses = DiscretizedLogisticMixture(parameters, bits).log_prob(colours(bits, levels))
    assert np.all(np.isfinite(log_masses))
    total = np.exp(log_masses.numpy().astype(np.float64)).sum()
    np.testing.assert_allclose(total, 1.0, atol=3 * 2**bits * APPROXIMATED)


FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
UNIT = st.floats(0.0, 1.0, width=32)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(FINITE, min_size=20, max_size=20), st.lists(UNIT, min_size=3, max_size=3))
def test_log_probabilities_are_finite_for_any_number(parameters, image):
    parameters = tf.constant(parameters)[None, None]
    image = tf.constant(image)[None, None]
    assert np.isfinite(DiscretizedLogisticMixture(parameters).log_prob(image))
    bits = tf.round(image[..., :1])
    assert np.isfinite(bernoulli_image(parameters[..., :1]).log_prob(bits))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    *[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 4,
    st.floats(-(2.0**50), 2.0**50, width=32),
)
def test_clamped_normals_are_sound_for_any_number(mu, log_sigma, other_mu, other_log_sigma, z):
    q, p = clamped_normal([mu], [log_sigma]), clamped_normal([other_mu], [other_log_sigma])
    assert abs(q.loc) <= 5.0 and 0.016 < q.scale < 149.0
    assert np.isfinite(q.log_prob(z))
    kl = tfp.distributions.kl_divergence(q, p)
    assert np.isfinite(kl) and kl >= -1e-5


class LinearGaussian:
    """x = W z + deviation * noise with z standard normal, and a q that is not the posterior."""

    def __init__(self, rng, latents=3, dimensions=5, deviation=0.7):
        self.weights = rng.normal(size=(latents, dimensions)).astype(np.float32)
        self.stddev = deviation
        covariance = self.weights.T @ self.weights + deviation**2 * np.eye(dimensions)
        self.marginal = scipy.stats.multivariate_normal(np.zeros(dimensions), covariance)
        precision = np.eye(latents) + self.weights @ self.weights.T / deviation**2
        posterior = np.linalg.inv(precision)
        self.encoder = (self.weights.T @ posterior / deviation**2).astype(np.float32)
        self.spread = (1.3 * np.sqrt(np.diag(posterior))).astype(np.float32)

    def draw_noise(self, indices, seed):
        def draw(index):
            seeds = tf.random.experimental.stateless_fold_in(seed, index)
            return tf.random.stateless_normal((len(self.weights),), seeds)

        return [tf.map_fn(draw, indices, fn_output_signature=tf.float32)]

    def bottom_up(self, images):
        return [images]

    def top_down(self, source):
        q = tfp.distributions.Normal(source.encoded[0] @ self.encoder + 0.1, self.spread)
        z = q.mean() + q.stddev() * source.noise[0]
        p = tfp.distributions.Normal(tf.zeros_like(z), 1.0)
        return types.SimpleNamespace(
            parameters=z @ self.weights,
            kl_per_group=tf.reduce_sum(tfp.distributions.kl_divergence(q, p), 1)[:, None],
            log_q=tf.reduce_sum(q.log_prob(z), 1),
            log_p=tf.reduce_sum(p.log_prob(z), 1),
        )

    likelihood = "exact"

    def log_likelihood(self, parameters, images, likelihood):
        return tf.reduce_sum(tfp.distributions.Normal(parameters, self.stddev).log_prob(images), 1)


def test_importance_weighted_estimates_of_a_known_likelihood():
    rng = np.random.default_rng(0)
    toy = LinearGaussian(rng)
    images = toy.marginal.rvs(50, random_state=rng).astype(np.float32)
    exact = toy.marginal.logpdf(images)
    batches = tf.data.Dataset.from_tensor_slices(images).batch(20)
    estimates = [
        likelihood.evaluate(toy, batches, len(images), num_draws=64, chunk=16, seed=seed)
        for seed in range(20)
    ]
    # Estimates of p(x) itself are unbiased; those of its logarithm are bounds.
    ratios = np.exp([-estimate.neg_log_likelihood - exact for estimate in estimates])
    error = ratios.std(0, ddof=1) / np.sqrt(len(ratios))
    assert np.all(np.abs(ratios.mean(0) - 1.0) < 4.5 * error)
    assert ratios.std() < 0.2  # or the assertion above says nothing
    nelbo = np.mean([estimate.nelbo for estimate in estimates], 0)
    assert np.all(nelbo.mean() > -exact.mean()) and np.mean(nelbo > -exact) > 0.9


def test_bits_per_dim_of_bernoulli_pixels_are_their_entropy():
    spec = ImageSpec(16, 16, 1, binary=True)
    probability = np.random.default_rng(0).uniform(0.02, 0.98, spec.shape)
    distribution = bernoulli_image(tf.constant(scipy.special.logit(probability), tf.float32))
    entropy = -scipy.special.xlogy(probability, probability)
    entropy -= scipy.special.xlogy(1.0 - probability, 1.0 - probability)
    expected = entropy.mean() / np.log(2.0)
    images = distribution.sample(4000, seed=(1, 2))
    bits = spec.bits_per_dim(-distribution.log_prob(images).numpy().astype(np.float64))
    assert abs(bits.mean() - expected) < 4.0 * bits.std() / np.sqrt(len(bits))
    assert bits.std() / np.sqrt(len(bits)) < 1e-3


@pytest.mark.parametrize("bits", [5, 8])
def test_bits_per_dim_of_colours_are_their_entropy(bits):
    """For colours without coefficients and with one component, whose channels are independent."""
    levels = 2.0 * np.arange(2**bits) / (2**bits - 1.0) - 1.0
    means, scales = np.array([-0.7, 0.1, 0.9]), np.exp([-3.0, -1.0, -4.0])
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2.0, [np.inf]])
    masses = np.diff(scipy.special.expit((edges - means[:, None]) / scales[:, None]))
    expected = -scipy.special.xlogy(masses, masses).sum(1).mean() / np.log(2.0)
    shape = [value[:, None] for value in (means, np.log(scales), np.zeros(3))]
    distribution = DiscretizedLogisticMixture(parameters_of(*shape, np.zeros(1)), bits)
    drawn = distribution.sample(20_000, seed=(3, 4)).numpy()
    images = np.round(drawn * (2**bits - 1.0)) / (2**bits - 1.0)
    nats = -distribution.log_prob(images.astype(np.float32)).numpy().astype(np.float64)
    bits_per_dim = ImageSpec(1, 1, 3).bits_per_dim(nats)
    assert abs(bits_per_dim.mean() - expected) < 4.0 * bits_per_dim.std() / np.sqrt(
        len(bits_per_dim)
    )
    assert bits_per_dim.std() / np.sqrt(len(bits_per_dim)) < 0.02


@pytest.mark.parametrize("bits", [8, 6])
def test_bits_per_dim_of_a_normal_decoder_are_those_of_masses(bits):
    config = ModelConfig(
        num_groups_per_scale=1, num_latent_per_group=1, num_channels_enc=2, num_channels_dec=2,
        num_preprocess_cells=1, num_postprocess_cells=1, num_mixture_dec=1, num_x_bits=bits,
    )  # fmt: skip
    model, rng, last = NVAE(config, ImageSpec(8, 8, 3)), np.random.default_rng(0), 2**bits - 1
    mean, log_deviation = rng.uniform(-0.8, 0.8, (8, 8, 3)), rng.uniform(-9.0, -1.0, (8, 8, 3))
    parameters = tf.constant(np.concatenate([mean, log_deviation], -1)[None], tf.float32)
    # The mass of a level is what the normal distribution has between the middles to its neighbours.
    mean, deviation = 5.0 * np.tanh(mean / 5.0), np.exp(5.0 * np.tanh(log_deviation / 5.0)) + 1e-2
    edges = (2.0 * np.arange(-0.5, last + 1.0) - last) / last
    masses = np.diff(scipy.stats.norm.cdf(edges, mean[..., None], deviation[..., None]))
    levels = [rng.choice(last + 1, p=pixel / pixel.sum()) for pixel in masses.reshape(-1, last + 1)]
    levels = np.reshape(levels, (8, 8, 3))
    image = (levels / last).astype(np.float32)[None]
    bits_per_dim = model.bits_per_dim(-model.log_likelihood(parameters, image))
    expected = -np.log2(np.take_along_axis(masses, levels[..., None], -1)).mean()
    np.testing.assert_allclose(bits_per_dim, [expected], rtol=0.02)
    assert bits_per_dim < model.num_bits  # than a uniform guess, since the image was drawn from it

    # The masses of all levels do not sum to more than 1 (but for rounding).
    each = np.arange(last + 1)[:, None, None, None] / last * np.ones((1, 8, 8, 3))
    density = model.image_distribution(parameters[0]).scaled.distribution.prob(2.0 * each - 1.0)
    total = np.exp(-np.log(2.0) * model.bits_per_dim(0.0)) * np.sum(density, 0)
    assert total.max() < 1.01 and total.mean() > 0.9

"""Schedules, optimiser and regularisation, each against its formula."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from nvae_tf import objective
from nvae_tf.config import ModelConfig, TrainConfig
from nvae_tf.engine.kernels import SpectralNorms
from nvae_tf.engine.scope import Scope
from nvae_tf.layers.convolution import Conv2D
from nvae_tf.training.keras_optimizer import KerasOptimizer
from nvae_tf.training.optimizers import Adam, Adamax, AdamW, MovingAverage
from nvae_tf.training.schedules import WarmupCosineByEpoch

pytestmark = pytest.mark.core


def test_learning_rate_warms_up_by_steps_and_falls_by_epochs():
    schedule = WarmupCosineByEpoch(1e-2, 1e-4, steps_per_epoch=10, epochs=12, warmup_epochs=2)
    rates = np.array([float(schedule(step)) for step in range(120)])
    np.testing.assert_allclose(rates[:20], 1e-2 * np.arange(20) / 20, rtol=1e-5)
    epochs = rates[20:].reshape(10, 10)
    np.testing.assert_array_equal(epochs, epochs[:, :1].repeat(10, 1))
    cosine = 1e-4 + 0.5 * (1e-2 - 1e-4) * (1 + np.cos(np.pi * np.arange(10) / 9))
    np.testing.assert_allclose(epochs[:, 0], cosine, rtol=1e-4)


def test_kl_coefficient_is_constant_then_linear_then_one():
    config = TrainConfig(kl_const_portion=0.1, kl_anneal_portion=0.4, kl_const_coeff=0.01)
    beta = [float(objective.kl_coefficient(step, 100, config)) for step in range(101)]
    assert beta[:10] == pytest.approx([0.01] * 10)
    assert beta[30] == pytest.approx(0.5)
    assert beta[50:] == [1.0] * 51
    at_once = TrainConfig(kl_const_portion=0.0, kl_anneal_portion=0.0)
    assert float(objective.kl_coefficient(1, 100, at_once)) == 1.0


def test_balancing_holds_until_beta_is_one():
    kl = tf.constant([[4.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    config = ModelConfig(num_latent_scales=2, num_groups_per_scale=2, ada_groups=True)
    alphas = objective.balancing_weights(config)
    assert alphas == [1.0, 2.0, 2.0]
    mean = tf.constant([3.0, 1.0, 0.0])
    balanced, gamma = objective.balance_kl(kl, mean, alphas, tf.constant(0.5))
    size = np.array([3.01, 1.01, 0.01]) / alphas
    np.testing.assert_allclose(gamma, size / size.mean(), rtol=1e-5)
    np.testing.assert_allclose(balanced, kl.numpy() @ gamma.numpy(), rtol=1e-5)
    balanced, gamma = objective.balance_kl(kl, mean, alphas, tf.constant(1.0))
    np.testing.assert_array_equal(gamma, 1.0)
    np.testing.assert_allclose(balanced, [5.0, 3.0])


def test_regularization_is_annealed_log_linearly():
    config = TrainConfig(
        weight_decay_norm=1e-2, weight_decay_norm_anneal=True, weight_decay_norm_init=1.0
    )
    coefficients = [float(objective.regularization_coefficient(b, config)) for b in (0.0, 0.5, 1.0)]
    assert coefficients == pytest.approx([1.0, 0.1, 0.01])
    assert float(objective.regularization_coefficient(0.0, TrainConfig())) == 0.0


def test_adamax_follows_its_formula_on_variables_of_several_shapes():
    rng = np.random.default_rng(0)
    shapes = [(3,), (2, 2), (3,), (), (2, 2)]
    weights = [rng.normal(size=shape) for shape in shapes]
    variables = [tf.Variable(w, dtype=tf.float32) for w in weights]
    optimizer = Adamax(0.1, weight_decay=0.01)
    optimizer.build(variables)
    mean, peak = [np.zeros(s) for s in shapes], [np.zeros(s) for s in shapes]
    for step in range(1, 4):
        gradients = [rng.normal(size=shape) for shape in shapes]
        optimizer.apply_gradients([tf.constant(g, tf.float32) for g in gradients])
        for i, gradient in enumerate(gradients):
            decayed = gradient + 0.01 * weights[i]
            mean[i] = 0.9 * mean[i] + 0.1 * decayed
            peak[i] = np.maximum(0.999 * peak[i], np.abs(decayed) + 1e-3)
            weights[i] = weights[i] - 0.1 / (1 - 0.9**step) * mean[i] / peak[i]
    assert int(optimizer.iterations) == 3
    for variable, weight in zip(variables, weights, strict=True):
        np.testing.assert_allclose(variable, weight, rtol=1e-4, atol=1e-5)


def test_large_stacks_change_as_small_ones_do():
    # Those of 2^20 elements are changed in place, one after the other, and small ones together.
    rng = np.random.default_rng(0)
    shapes = [(2, 1024, 512), (4,), (3, 1024, 512)]
    weights = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    gradients = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def cut(values):
        """The same numbers as small stacks, none of which has 2^20 elements."""
        parts = [part for v in values for part in np.array_split(v.reshape(-1, 4), 8)]
        return [part for part in parts if len(part)]

    def train(values, gradients):
        variables = [tf.Variable(value) for value in values]
        optimizer = Adamax(0.1, weight_decay=0.01)
        optimizer.build(variables)
        averages = MovingAverage(variables, 0.9)

        @tf.function
        def step(condition):
            optimizer.apply_gradients(list(map(tf.constant, gradients)), condition)
            averages.update(optimizer.iterations, condition)

        for condition in (True, False, True):
            step(tf.constant(condition))
        return [
            np.concatenate([np.ravel(v) for v in values]) for values in (variables, averages.stacks)
        ]

    large = train(weights, gradients)
    small = train(cut(weights), cut(gradients))
    for one, other in zip(large, small, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_and_adamw_follow_their_formulas(decoupled):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 3))
    variable, optimizer_class = tf.Variable(weight, dtype=tf.float32), AdamW if decoupled else Adam
    optimizer = optimizer_class(0.1, weight_decay=0.01)
    optimizer.build([variable])
    mean, square = np.zeros((2, 3)), np.zeros((2, 3))
    for step in range(1, 4):
        gradient = rng.normal(size=(2, 3))
        optimizer.apply_gradients([tf.constant(gradient, tf.float32)])
        decayed = gradient if decoupled else gradient + 0.01 * weight
        mean = 0.9 * mean + 0.1 * decayed
        square = 0.999 * square + 0.001 * decayed**2
        size = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        moved = 0.1 * mean / (1 - 0.9**step) / size
        weight = weight - moved - (0.1 * 0.01 * weight if decoupled else 0.0)
    np.testing.assert_allclose(variable, weight, rtol=1e-4, atol=1e-5)


def keras_optimizers() -> list:
    """Every optimiser of Keras, the legacy ones too, with and without a norm per variable."""
    kinds = []
    for module in (tf_keras.optimizers, tf_keras.optimizers.legacy):
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        for kind in (value for value in classes if value is not module.Optimizer):
            for options in ({}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}):
                id_ = "-".join((module.__name__.split(".")[-1], kind.__name__, *options))
                kinds.append(pytest.param(kind, options, id=id_))
    return kinds


@pytest.mark.parametrize(("kind", "options"), keras_optimizers())
def test_keras_optimisers_treat_stacks_as_their_weights(kind, options):
    # Three weights of shape (4, 5) and two of shape (3,), as stacks and one by one.
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape).astype(np.float32) for shape in ((3, 4, 5), (2, 3))]
    stacks = [tf.Variable(value) for value in values]
    weights = [tf.Variable(row) for value in values for row in value]
    ours = KerasOptimizer(kind(learning_rate=0.1, **options))
    ours.build(stacks)
    theirs = kind(learning_rate=0.1, **options)
    for _ in range(3):
        gradients = [rng.normal(size=value.shape).astype(np.float32) for value in values]
        ours.apply_gradients([tf.constant(gradient) for gradient in gradients])
        rows = [tf.constant(row) for gradient in gradients for row in gradient]
        theirs.apply_gradients(zip(rows, weights, strict=True))
    changed = [row for stack in stacks for row in stack.numpy()]
    for one, other in zip(changed, weights, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-6)


def test_spectral_norms_are_the_largest_singular_values():
    layers = [Conv2D(8, 3), Conv2D(8, 3), Conv2D(None, 5), Conv2D(6, 1)]
    for layer in layers:
        layer.build((None, 8, 8, 4))
    spectral = SpectralNorms(layers)
    with tf.GradientTape() as tape:
        total, _, _ = spectral.normalized_kernels({}, xla=False, iterations=300)
    expected = 0.0
    for layer in layers:
        kernel = layer.effective_kernel(Scope()).numpy()
        expected += np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    gradient = tape.gradient(total, layers[0].log_norm.stack)
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0.0)


def test_batch_norm_penalty_adds_largest_scales():
    gammas = [tf.constant([[1.0, -3.0], [0.5, 0.2]]), tf.constant([[2.0, 1.0, 0.0]])]
    assert float(objective.batch_norm_penalty(gammas)) == pytest.approx(3.0 + 0.5 + 2.0)


def test_active_latents_counts_channels_by_mean_kl():
    channel_kl = tf.constant([[0.4, 0.05, 0.0], [0.2, 0.11, 0.3]])
    np.testing.assert_array_equal(objective.active_latents(channel_kl), [1.0, 3.0])

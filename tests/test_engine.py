"""One training step under every setting: precision, memory, skipped steps, moving averages."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from nvae_tf.config import ModelConfig, TrainConfig
from nvae_tf.data import catalog, pipeline
from nvae_tf.data.catalog import DataConfig
from nvae_tf.model import NVAE
from nvae_tf.training.optimizers import Adamax, MovingAverage
from nvae_tf.training.steps import distributed_function, grappler_disabled, whole_step
from nvae_tf.training.trainer import Trainer

MODEL = ModelConfig(
    num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=3, ada_groups=True,
    num_channels_enc=8, num_channels_dec=8, num_preprocess_cells=1, num_postprocess_cells=1,
    use_se=True, res_dist=True,
)  # fmt: skip
TRAIN = TrainConfig(weight_decay_norm=1e-2, kl_anneal_portion=0.5, jit_compile="off")
BATCH = 8


@pytest.fixture(scope="module")
def digits():
    """Batches of digits, binarised, and what they look like."""
    dataset = catalog.get_dataset_info(DataConfig(dataset="digits"))
    train, _ = dataset.open("")
    batches = pipeline.training_batches(train, dataset, batch_size=BATCH, seed=0)
    return [images for images, _ in zip(batches, range(50), strict=False)], dataset.image


@pytest.fixture(scope="module")
def weights(digits):
    """Weights and singular vectors to begin from."""
    tf_keras.utils.set_random_seed(0)
    trainer = make(digits, TRAIN)
    trainer.warm_up_spectral_norms()
    return [variable.numpy() for variable in trainer.variables]


def make(digits, train, weights=None, model=MODEL):
    network = NVAE(model, digits[1], train.precision.removeprefix("mixed_"))
    optimizer = Adamax(2e-3, weight_decay=3e-4)
    trainer = Trainer(network, train, 100, steps_per_epoch=10, seed=1, optimizer=optimizer)
    if weights:
        for variable, value in zip(trainer.variables, weights, strict=True):
            variable.assign(value)
    return trainer


def gradients_of(trainer, images):
    noise = trainer.model.draw_noise(len(images), (1, 0))

    @tf.function(autograph=False)
    def gradients():
        found = trainer.losses_and_gradients(images, noise, 0.5, 1e-2)
        return found.losses.loss, found.gradients, found.statistics

    return gradients()


@pytest.mark.parametrize(
    "architecture", ["res_mbconv", pytest.param("mbconv_res", marks=pytest.mark.slow)]
)
def test_gradient_checkpointing_changes_no_bit(architecture, digits):
    model = dataclasses.replace(MODEL, arch_instance=architecture)
    plain = make(digits, TRAIN, model=model)
    start = [variable.numpy() for variable in plain.variables]
    with grappler_disabled():
        expected = gradients_of(plain, digits[0][0])
        for mode in ("bn_swish", "cells"):
            train = dataclasses.replace(TRAIN, gradient_checkpointing=mode)
            found = gradients_of(make(digits, train, start, model), digits[0][0])
            tf.nest.map_structure(np.testing.assert_array_equal, found, expected)
    assert all(np.any(gradient != 0.0) for gradient in expected[1])


def train(trainer, batches, strategy=None):
    strategy = strategy or tf.distribute.get_strategy()
    run = distributed_function(whole_step(trainer, strategy), strategy)
    logs = [tf.nest.map_structure(np.asarray, run(images)) for images in batches]
    assert run.experimental_get_tracing_count() == 1
    return logs


@pytest.mark.slow
def test_accumulated_passes_make_one_step_of_their_mean(digits, weights):
    halves = digits[0][:2]
    two = make(digits, dataclasses.replace(TRAIN, accumulate_steps=2), weights)
    (logs,) = train(two, [tf.concat(halves, 0)])
    apart = make(digits, TRAIN, weights)
    found = []
    for number, images in enumerate(halves):
        noise = apart.model.draw_noise(number * BATCH + tf.range(BATCH), (1, 0))
        beta = tf.constant(float(logs["beta"]))
        found.append(apart.losses_and_gradients(images, noise, beta, 1e-2))
    mean = [(a + b) / 2.0 for a, b in zip(found[0].gradients, found[1].gradients, strict=True)]
    np.testing.assert_allclose(logs["gradient_norm"], tf.linalg.global_norm(mean), rtol=1e-4)
    np.testing.assert_allclose(logs["loss"], np.mean([one.losses.loss for one in found]), rtol=1e-5)
    apart.optimizer.apply_gradients(mean)
    for ours, expected in zip(
        two.model.trainable_variables, apart.model.trainable_variables, strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_learns_as_float32_does(precision, digits, weights):
    steps = 50 if precision == "mixed_bfloat16" else 12
    logs = {}
    for name in ("float32", precision):
        trainer = make(digits, dataclasses.replace(TRAIN, precision=name), weights)
        trainer.loss_scale.assign(128.0)  # the first scale overflows here, in the image head's bias
        logs[name] = train(trainer, digits[0][:steps])
        assert all(variable.dtype == tf.float32 for variable in trainer.model.variables)
    full, half = ([float(step["loss"]) for step in logs[name]] for name in logs)
    np.testing.assert_allclose(half[0], full[0], rtol=1e-2)
    assert full[-1] < 0.9 * full[0]
    np.testing.assert_allclose(np.mean(half[-5:]), np.mean(full[-5:]), rtol=0.05)
    assert not np.array_equal(half, full)
    assert logs[precision][-1]["skipped_steps"] == 0
    scale = float(logs[precision][-1]["loss_scale"])
    assert scale == (128.0 if precision == "mixed_float16" else 1.0)


def state(trainer):
    kept = [*trainer.model.variables, *trainer.spectral.variables, *trainer.optimizer.variables]
    counter = trainer.optimizer.iterations
    return [variable.numpy() for variable in kept if variable is not counter]


def test_steps_that_are_not_finite_change_nothing_and_are_counted(digits, weights):
    trainer = make(digits, dataclasses.replace(TRAIN, max_bad_steps=3), weights)
    good, bad = digits[0][0], tf.fill(digits[0][0].shape, np.nan)
    strategy = tf.distribute.get_strategy()
    run = distributed_function(whole_step(trainer, strategy), strategy)
    run(good)
    before = state(trainer)
    for _ in range(2):
        logs = run(bad)
    for value, expected in zip(state(trainer), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert int(logs["skipped_steps"]) == 2 and int(trainer.consecutive_skips) == 2
    assert trainer.first_skip_causes.numpy()[0] and trainer.first_skip_causes.numpy()[4:].all()
    run(good)  # the row ends
    assert int(trainer.consecutive_skips) == 0 and int(trainer.optimizer.iterations) == 4
    for _ in range(3):
        run(bad)
    before = state(trainer)
    run(good)  # too late: training has ended
    assert int(trainer.consecutive_skips) == 3
    for value, expected in zip(state(trainer), before, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.slow), dict(ema_decay=0.9, clip_gradient_norm=50.0)],
)
def test_a_step_is_a_function_of_all_that_it_changes(digits, weights, changes):
    train_config = dataclasses.replace(TRAIN, **changes)
    trainer = make(digits, train_config, None if changes else weights)  # averages: more variables
    variables, images = trainer.changed_variables, tf.constant(digits[0][0])
    values = [variable.numpy() for variable in variables]

    @tf.function(autograph=False)
    def step(values, images):
        return trainer.step_function(values, images)

    specs = [tf.TensorSpec(value.shape, value.dtype) for value in values]
    traced = step.get_concrete_function(specs, tf.TensorSpec(images.shape))
    assert not traced.captured_inputs
    with grappler_disabled():
        after, logs = step(values, images)
        for variable, value in zip(variables, values, strict=True):
            np.testing.assert_array_equal(variable, value)
        (expected,) = train(trainer, [images])
    np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=1e-5)
    changed = 0
    for variable, value, before in zip(variables, after, values, strict=True):
        scale = np.max(np.abs(variable.numpy().astype(np.float64)), initial=0.1)
        np.testing.assert_allclose(value, variable, atol=1e-5 * scale)
        changed += np.any(before != value)
    assert changed > 0.8 * len(variables)


@pytest.mark.slow
def test_a_skipped_step_does_not_count_in_the_means_of_its_epoch(digits, weights):
    trainer = make(digits, TRAIN, weights)
    bad = tf.fill(digits[0][0].shape, np.nan)
    first, skipped, second = train(trainer, [digits[0][0], bad, digits[0][1]])
    apart = make(digits, TRAIN, weights)
    apart.steps_per_epoch = 1  # every step is an epoch of its own
    alone = train(apart, [digits[0][0], bad, digits[0][1]])
    np.testing.assert_allclose(skipped["nelbo"], first["nelbo"])
    assert np.isnan(alone[1]["nelbo"]) and int(second["skipped_steps"]) == 1
    for name in ("nelbo", "bpd", "recon", "kl"):
        mean = (float(alone[0][name]) + float(alone[2][name])) / 2
        np.testing.assert_allclose(second[name], mean, rtol=1e-5)


@pytest.mark.slow
def test_means_of_an_epoch_that_begins_in_its_middle(digits, weights):
    trainer = make(digits, TRAIN, weights)
    trainer.optimizer.iterations.assign(5)  # of 10, as after an import
    (logs,) = train(trainer, digits[0][:1])
    np.testing.assert_allclose(logs["kl"], np.sum(logs["kl_per_group"]), rtol=1e-5)


@pytest.mark.slow
def test_overflow_halves_the_loss_scale(digits, weights):
    trainer = make(digits, dataclasses.replace(TRAIN, precision="mixed_float16"), weights)
    trainer.loss_scale.assign(2.0**40)
    logs = train(trainer, digits[0][:2])
    assert float(trainer.loss_scale) == 2.0**38 and int(logs[-1]["skipped_steps"]) == 2


@pytest.mark.slow
def test_large_gradients_are_skipped_or_clipped_on_request(digits, weights):
    norm = float(train(make(digits, TRAIN, weights), digits[0][:1])[0]["gradient_norm"])
    skipping = make(digits, dataclasses.replace(TRAIN, skip_gradient_norm=0.9 * norm), weights)
    assert int(train(skipping, digits[0][:1])[0]["skipped_steps"]) == 1
    passing = make(digits, dataclasses.replace(TRAIN, skip_gradient_norm=1.1 * norm), weights)
    assert int(train(passing, digits[0][:1])[0]["skipped_steps"]) == 0
    # Adamax is blind to the gradient's scale in its first step, but not in its slots.
    clipped = make(digits, dataclasses.replace(TRAIN, clip_gradient_norm=0.5 * norm), weights)
    plain = make(digits, dataclasses.replace(TRAIN, weight_decay=0.0), weights)
    for trainer in (clipped, plain):
        trainer.optimizer.weight_decay = 0.0
        train(trainer, digits[0][:1])
    for half, whole in zip(clipped.optimizer._m, plain.optimizer._m, strict=True):
        np.testing.assert_allclose(half, 0.5 * whole, rtol=1e-3, atol=1e-7)


def test_moving_averages_follow_the_weights():
    variables = [tf.Variable([1.0, 2.0]), tf.Variable(5.0), tf.Variable([3.0, 3.0])]
    moving = MovingAverage(variables, decay=0.5)
    expected = None
    for step in range(1, 30):
        for variable in variables:
            variable.assign_add(tf.ones_like(variable))
        moving.update(tf.constant(step))
        now = [variable.numpy() for variable in variables]
        decay = min(0.5, (step - 1) / (step + 9))
        expected = (
            now
            if step == 1
            else [decay * e + (1 - decay) * n for e, n in zip(expected, now, strict=True)]
        )
    moving.update(tf.constant(30), tf.constant(False))
    for value, average in zip(expected, moving.stacks, strict=True):
        np.testing.assert_allclose(average, value, rtol=1e-5)
    np.testing.assert_array_equal(variables[0], [30.0, 31.0])

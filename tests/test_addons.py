"""The optimisers of TensorFlow Addons, on the TensorFlow line that has them."""

import importlib.util

import numpy as np
import pytest
import tensorflow as tf

from nvae_tf.cli.train import main
from nvae_tf.config import TrainConfig
from nvae_tf.io.errors import ConfigError
from nvae_tf.training.optimizer_choice import make_optimizer
from nvae_tf.training.optimizers import Adamax

pytestmark = pytest.mark.core

HAS_ADDONS = importlib.util.find_spec("tensorflow_addons") is not None
needs_addons = pytest.mark.skipif(not HAS_ADDONS, reason="TensorFlow Addons is not installed")


@pytest.mark.skipif(HAS_ADDONS, reason="TensorFlow Addons is installed")
def test_without_addons_naming_one_of_its_optimisers_is_one_line(recipe, tmp_path, capsys):
    arguments = ["--config", str(recipe), "--root", str(tmp_path), "--optimizer", "lamb"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert 'pip install "nvae-tf[addons]"' in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]


def steps_of(name, gradients, start, **settings):
    """The weights after steps by an optimiser: two variables of one shape, one of another."""
    stacks = [tf.Variable(tf.stack(start[:2])), tf.Variable(tf.stack(start[2:]))]
    optimizer = make_optimizer(TrainConfig(optimizer=name, **settings), 0.1)
    optimizer.build(stacks)
    run = tf.function(optimizer.apply_gradients, autograph=False)
    stacked = [[tf.stack(step[:2]), tf.stack(step[2:])] for step in gradients]
    for step in stacked:
        run(step, tf.constant(True))
    before = [stack.numpy() for stack in stacks]
    run(stacked[0], tf.constant(False))
    for stack, kept in zip(stacks, before, strict=True):
        np.testing.assert_array_equal(stack, kept)
    assert int(optimizer.iterations) == len(gradients) + 1
    return [*stacks[0].numpy(), *stacks[1].numpy()]


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    shapes = [(3, 2), (3, 2), (4,)]
    start = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    gradients = [[rng.normal(size=s).astype(np.float32) for s in shapes] for _ in range(7)]
    return gradients, start


@needs_addons
def test_lamb_looks_at_each_variable_as_a_whole(problem):
    gradients, start = problem
    values = steps_of("LAMB", gradients[:1], start, weight_decay=0.0)
    for value, before, gradient in zip(values, start, gradients[0], strict=True):
        direction = gradient / (np.abs(gradient) + 1e-6)  # the first step of Adam
        trust = np.linalg.norm(before) / np.linalg.norm(direction)
        np.testing.assert_allclose(value, before - 0.1 * trust * direction, rtol=1e-4, atol=1e-5)


@needs_addons
def test_lookahead_wraps_our_adamax(problem):
    gradients, start = problem
    fast = steps_of("adamax", gradients[:5], start, weight_decay=0.01)
    for value, expected in zip(
        steps_of("lookahead", gradients[:5], start, weight_decay=0.01), fast, strict=True
    ):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    fast = steps_of("adamax", gradients[:6], start, weight_decay=0.01)
    slow = steps_of("lookahead", gradients[:6], start, weight_decay=0.01)
    for value, begun, expected in zip(slow, start, fast, strict=True):
        np.testing.assert_allclose(value, begun + 0.5 * (expected - begun), rtol=1e-4, atol=1e-6)


@needs_addons
@pytest.mark.parametrize("name", ["AdamW", "LazyAdam", "NovoGrad", "RectifiedAdam", "SWA", "Yogi"])
def test_other_optimisers_move_the_weights(name, problem):
    gradients, start = problem
    values = steps_of(name, gradients, start)
    for value, before in zip(values, start, strict=True):
        assert np.all(np.isfinite(value)) and np.any(value != before)


@needs_addons
def test_an_unknown_optimiser_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="'lambda' is not allowed; expected one of .*LAMB.*adamw"):
        make_optimizer(TrainConfig(optimizer="lambda"), 0.1)


@needs_addons
def test_training_with_one_continues_from_its_checkpoint(recipe, tmp_path, capsys):
    arguments = ["--config", str(recipe), "--root", str(tmp_path), "--optimizer", "lookahead"]
    assert main([*arguments, "--epochs", "2", "--save", "two"]) == 0
    nelbo = capsys.readouterr().out.split("test: nelbo ")[1].split()[0]
    assert float(nelbo) < 500
    assert main([*arguments, "--epochs", "3", "--save", "two", "--cont_training"]) == 0
    assert main([*arguments[:-1], "yogi", "--epochs", "4", "--save", "two", "--cont_training"]) == 2
    assert "optimizer: yogi does not continue" in capsys.readouterr().err


def test_the_built_in_ones_are_no_add_ons():
    assert isinstance(make_optimizer(TrainConfig(), 0.1), Adamax)

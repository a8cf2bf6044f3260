"""Steps lower to XLA programs for GPUs, on a machine without one.

A list of everything that lowers: ``python -m pytest -m "slow or not slow" tests/test_lowering.py -v``.
"""

import dataclasses
import re

import pytest
import tensorflow as tf

from nvae_tf import config as configuration
from nvae_tf.architectures import ARCHITECTURES
from nvae_tf.config import BUILT_IN_OPTIMIZERS
from nvae_tf.data import catalog
from nvae_tf.engine.scope import Scope
from nvae_tf.engine.state import TensorState
from nvae_tf.engine.weights import rows_of, weights_below
from nvae_tf.model import NVAE
from nvae_tf.training.optimizer_choice import make_optimizer
from nvae_tf.training.programs import flat_step, lower, state_specs
from nvae_tf.training.trainer import Trainer

RECIPES = sorted(path.stem for path in configuration.RECIPES.glob("*.yaml"))
PRECISIONS = {"float32": "f32", "mixed_bfloat16": "bf16", "mixed_float16": "f16"}
BATCH, REPLICAS = 2, 2
# A recipe's kinds of layers in few and narrow ones.
TOY = dict(
    num_groups_per_scale=2, min_groups_per_scale=1, num_channels_enc=8, num_channels_dec=8,
    num_cell_per_cond_enc=1, num_cell_per_cond_dec=1, num_preprocess_cells=1,
    num_postprocess_cells=1, num_latent_per_group=2,
)  # fmt: skip


def make_trainer(recipe, **changes):
    """A trainer of a recipe at toy width, whose steps are for a GPU."""
    base = configuration.load(recipe)
    toy = {**TOY, "num_latent_scales": min(2, base.model.num_latent_scales)}
    config = configuration.from_dict({**toy, **changes}, base)
    image = catalog.get_dataset_info(config.data).image
    model = NVAE(config.model, image, config.train.precision.removeprefix("mixed_"))
    optimizer = make_optimizer(config.train, 1e-3)
    return Trainer(model, config.train, 100, 10, optimizer=optimizer, on_gpu=True)


def check_step(recipe, **changes):
    trainer = make_trainer(recipe, **changes)
    step = flat_step(trainer, BATCH)
    text = lower(step.function, step.specs, text=True)
    check_convolutions(text, trainer.config.precision, trainer.model.config.num_nf)
    # Without barriers XLA would keep what it was asked to compute again.
    barriers = count("opt-barrier", text)
    assert bool(barriers) == (trainer.config.gradient_checkpointing != "none")


def count(operation, text):
    """How often an operation stands in a program, each computation counted once."""
    return len(re.findall(rf" {operation}\(", text))


def check_convolutions(text, precision, flows=0):
    """Convolutions are computed in the precision that was asked for, and nothing asks the host."""
    kinds = set(re.findall(r"= (\w+)\[[^ ]* convolution\(", text))
    assert kinds == {PRECISIONS[precision], *(["f32"] if flows else [])}  # as latents always are
    assert not re.search(r" (infeed|outfeed|send|recv)\(", text)


def slow(*values):
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        ("digits", "mixed_bfloat16"),
        *slow(
            *(
                (name, kind)
                for name in RECIPES
                for kind in PRECISIONS
                if (name, kind) != ("digits", "mixed_bfloat16")
            )
        ),
    ],
)
def test_every_recipe(recipe, precision):
    check_step(recipe, precision=precision)


MODES = {
    "bn_swish": dict(gradient_checkpointing="bn_swish"),
    "cells": dict(gradient_checkpointing="cells"),
    "averages": dict(ema_decay=0.9),
    "accumulated": dict(accumulate_steps=2),
    "clipped": dict(clip_gradient_norm=10.0, skip_gradient_norm=100.0),
    "normal": dict(num_mixture_dec=1),
    "one group": dict(num_groups_per_scale=1, num_latent_scales=1),
    "five scales": dict(num_latent_scales=5),
    **{name: dict(optimizer=name) for name in BUILT_IN_OPTIMIZERS},
    **{name: dict(arch_instance=name) for name in ARCHITECTURES},
    "off": dict(jit_compile="off"),
}


@pytest.mark.parametrize("mode", slow(*([name] for name in MODES)))
def test_every_mode(mode):
    check_step("celeba64", **MODES[mode])


class OneOfReplicas(tf.distribute.ReplicaContext):
    """One of several replicas, whose exchanges are the operations that GPUs exchange by.

    TensorFlow's strategies make those only where GPUs are.
    """

    def __init__(self, exchanges):
        super().__init__(tf.distribute.get_strategy(), 0)
        self.exchanges = exchanges

    num_replicas_in_sync = REPLICAS

    def all_reduce(self, reduce_op, value, options=None):
        assert reduce_op == tf.distribute.ReduceOp.SUM

        def exchange(tensor):
            self.exchanges.append(tensor.shape)
            return tf.raw_ops.CollectiveReduceV2(
                input=tensor, group_size=REPLICAS, group_key=1,
                instance_key=len(self.exchanges), ordering_token=[], merge_op="Add", final_op="Id",
            )  # fmt: skip

        return tf.nest.map_structure(exchange, value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_groups_per_scale=1, num_preprocess_blocks=1, num_postprocess_blocks=1),
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {},
                dict(precision="mixed_bfloat16"),
                dict(precision="mixed_float16", ema_decay=0.9),
                dict(gradient_checkpointing="cells"),
            )
        ),
    ],
)
def test_exchanges_of_several_replicas(changes):
    trainer, exchanges = make_trainer("digits", **changes), []
    step = flat_step(trainer, BATCH)

    def replica(*arguments):
        exchanges.clear()
        with OneOfReplicas(exchanges):
            return step.function(*arguments)

    text = lower(replica, step.specs, text=True)
    check_convolutions(text, trainer.config.precision)
    # One for each batch norm and direction, the balancing of KL, gradients and what is reported.
    assert len(exchanges) > 2 * len(trainer.batch_norms) + len(trainer.weights)
    assert count("all-reduce", text) == len(exchanges)


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        ("digits", "float32"),
        *slow(*((name, kind) for name in ("cifar10", "celeba256") for kind in PRECISIONS)),
    ],
)
@pytest.mark.parametrize("ema_decay", [0.9, pytest.param(0.0, marks=pytest.mark.slow)])
def test_validation(recipe, precision, ema_decay):
    trainer = make_trainer(recipe, precision=precision, ema_decay=ema_decay)
    specs = state_specs(trainer)
    batch = [tf.TensorSpec((BATCH, *trainer.model.image.shape)), tf.TensorSpec(BATCH, tf.int64)]

    def validate(*arguments):
        state = TensorState(trainer.changed_variables, arguments[: len(specs)])
        return trainer.validation_step(*arguments[len(specs) :], state)

    text = lower(validate, [*specs, *batch, tf.TensorSpec(BATCH)], text=True)
    check_convolutions(text, precision, trainer.model.config.num_nf)


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        ("digits", "float32"),
        *slow(*((name, kind) for name in ("cifar10", "celeba256") for kind in PRECISIONS)),
    ],
)
def test_sampling(recipe, precision):
    model = make_trainer(recipe, precision=precision).model
    specs = [tf.TensorSpec(stack.shape, stack.dtype) for stack in model.stacks]
    inputs = [tf.TensorSpec(BATCH, tf.int64), tf.TensorSpec(()), tf.TensorSpec(2, tf.int32)]

    def sample(*arguments):
        indices, temperature, seed = arguments[len(specs) :]
        tensors = {s.ref(): t for s, t in zip(model.stacks, arguments, strict=False)}
        scope = Scope(values=rows_of(weights_below(model), tensors), on_gpu=True)
        return model.sample(indices, temperature, seed=seed, scope=scope)

    check_convolutions(lower(sample, [*specs, *inputs], text=True), precision)


@pytest.mark.slow
def test_depthwise_gradients_are_the_gpus_own_only_there():
    trainer = make_trainer("digits", num_groups_per_scale=1, num_latent_scales=1)
    settings = dataclasses.replace(trainer.config, jit_compile="off")
    for on_gpu, expected in ((True, 0), (False, 1)):
        again = Trainer(trainer.model, settings, 100, 10, optimizer=make_optimizer(settings, 1e-3),
                        on_gpu=on_gpu)  # fmt: skip
        step = flat_step(again, BATCH)
        graph = tf.function(step.function, autograph=False).get_concrete_function(*step.specs).graph
        gradients = [
            node
            for function in graph.as_graph_def().library.function
            for node in function.node_def
            if node.op == "DepthwiseConv2dNativeBackpropFilter"
        ]
        explicit = [node for node in gradients if node.attr["padding"].s == b"EXPLICIT"]
        assert gradients and bool(explicit) == bool(expected)

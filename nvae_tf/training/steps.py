"""The graphs that training runs on all replicas: a step, several steps in one call, a validation.

Every replica runs `nvae_tf.training.trainer` on its part of a batch.
"""

import contextlib
import os
from typing import Any

import tensorflow as tf

from nvae_tf.config import TrainConfig
from nvae_tf.engine.devices import gpu_found
from nvae_tf.engine.xla_flags import check_deterministic
from nvae_tf.io.errors import ConfigError
from nvae_tf.training.trainer import Trainer


def check_xla_steps(config: TrainConfig, replicas: int) -> None:
    """Refuses compiled steps that could not do what is asked of them.

    Args:
        config: Gives ``jit_compile`` and ``deterministic``.
        replicas: Number of replicas.

    Raises:
        ConfigError: Whole steps of several replicas are to be compiled, and XLA cannot exchange values
            here; or steps on GPUs are to give the same bits in every process, and XLA was not told so.
    """
    if config.deterministic and config.jit_compile != "off" and gpu_found():
        check_deterministic(os.environ)
    if config.jit_compile == "on" and replicas > 1 and not gpu_found():
        raise ConfigError(
            f"jit_compile: on is not allowed with {replicas} replicas on CPUs, whose exchanges XLA "
            "cannot compile; expected auto, parts or off"
        )


def on_replicas(function, strategy, jit: bool):
    """A function that every replica runs on its part of the arguments; called in a graph.

    Args:
        function: A function of tensors.
        strategy: Strategy over the replicas.
        jit: Compile with XLA, collectives included.
    """
    # Nothing in a step needs AutoGraph, and tracing takes two thirds of the time without it.
    inner = tf.function(function, autograph=False, jit_compile=True) if jit else function
    return lambda *arguments: strategy.run(inner, arguments)


def first_replica(values, strategy):
    """This process's first replica's part of a structure of values, which are identical on all."""
    return tf.nest.map_structure(lambda v: strategy.experimental_local_results(v)[0], values)


def whole_step(trainer: Trainer, strategy):
    """A step of all replicas, a function of their batch; called in a graph.

    The passes of a step are a loop around the replicas, since a loop within a replica cannot hold
    exchanges.

    Args:
        trainer: The trainer.
        strategy: Strategy over the replicas.
    """
    passes, jit = trainer.config.accumulate_steps, trainer.xla_steps
    if passes == 1:
        return on_replicas(trainer.one_pass_step, strategy, jit)
    add = on_replicas(trainer.add_pass, strategy, jit)
    update = on_replicas(trainer.update, strategy, jit)

    def step(images):
        _, total = tf.while_loop(
            lambda number, _: number < passes,
            lambda number, total: (number + 1, add(total, images, number)),
            (tf.constant(0), strategy.run(trainer.zero_pass)),
            parallel_iterations=1,
        )
        return update(total)

    return step


def distributed_function(function, strategy):
    """A graph of a function of all replicas, with results that are identical on all, from one.

    Args:
        function: From `whole_step` or `on_replicas`.
        strategy: Strategy over the replicas.
    """

    @tf.function(autograph=False)
    def run(*arguments):
        return first_replica(function(*arguments), strategy)

    return run


def distributed_validation(trainer: Trainer, strategy):
    """A graph of `Trainer.validation_step` on all replicas, a function of their batches."""
    step = on_replicas(trainer.validation_step, strategy, trainer.xla_steps)
    return distributed_function(step, strategy)


def several_steps(step, strategy):
    """A function that takes several steps in a row in one call.

    For replicas that exchange values: TensorFlow keeps a record of some 1.6 KB for each exchange in
    each call of a graph, for the life of the process. The steps of one call share their records, so
    that memory grows with the calls and not with the steps.

    Args:
        step: From `whole_step`.
        strategy: Strategy over the replicas.

    Returns:
        A function of an iterator over batches and the number of steps, to the results of all of them,
        each with an axis of steps in front.
    """
    structure = None  # of a step's results, known once one is traced

    def next_step(number, batches, results):
        nonlocal structure
        structure = first_replica(step(next(batches)), strategy)
        flat = [tf.reshape(tf.cast(v, tf.float64), [-1]) for v in tf.nest.flatten(structure)]
        return number + 1, results.write(number, tf.concat(flat, 0))

    @tf.function(autograph=False)
    def run(batches, count):
        _, results = tf.while_loop(
            lambda number, _: number < count,
            lambda number, results: next_step(number, batches, results),
            (0, tf.TensorArray(tf.float64, count)),
            parallel_iterations=1,
        )
        specs = tf.nest.flatten(structure)
        parts = tf.split(results.stack(), [spec.shape.num_elements() for spec in specs], 1)
        values = [
            tf.cast(tf.reshape(part, [-1, *spec.shape]), spec.dtype)
            for part, spec in zip(parts, specs, strict=True)
        ]
        return tf.nest.pack_sequence_as(structure, values)

    return run


class Steps:
    """Takes the steps of a training, one or several in a call of the graph.

    Args:
        trainer: The trainer.
        strategy: Strategy over the replicas.
        several: Whether to take several in a call (see `several_steps`).

    Attributes:
        function: The traced function that takes them.
    """

    def __init__(self, trainer: Trainer, strategy, several: bool):
        whole = whole_step(trainer, strategy)

        def step(batch):  # of which Keras may have made a tuple
            return whole(batch[0] if isinstance(batch, tuple) else batch)

        make = several_steps if several else distributed_function
        self.function, self._several = make(step, strategy), several
        self._reports: Any = None  # of the latest call

    def take(self, batches, count: int) -> None:
        """Takes `count` steps, 1 unless several are taken in a call.

        Args:
            batches: An iterator over batches of images.
            count: Number of steps.
        """
        if self._several:
            self._reports = self.function(batches, tf.constant(count))
        else:
            self._reports = self.function(next(batches))

    def report(self, place: int = -1) -> dict[str, tf.Tensor]:
        """What one of the steps of the latest call reports (see `Trainer.update`).

        Args:
            place: The step's place in the call; -1 is the last.
        """
        if not self._several:
            return self._reports
        return tf.nest.map_structure(lambda values: values[place], self._reports)

    def graph(self, batches):
        """The graph as TensorFlow shows it.

        Args:
            batches: As for `take`.
        """
        arguments = (batches, tf.constant(1)) if self._several else (batches.element_spec,)
        return self.function.get_concrete_function(*arguments).graph


@contextlib.contextmanager
def grappler_disabled():
    """Switches Grappler off on CPUs, so that TensorFlow runs graphs as they were traced.

    Rewriting takes longer than several steps of a deep model and does not make them faster; and with
    gradient checkpointing it rounds differently than without. GPUs keep it, for memory layouts.
    """
    option = "disable_meta_optimizer"
    before = tf.config.optimizer.get_experimental_options().get(option, False)
    if not gpu_found():
        tf.config.optimizer.set_experimental_options({option: True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({option: before})

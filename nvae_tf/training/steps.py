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
    """Refuses combinations of compilation, determinism and replicas that cannot work.

    Args:
        config: Gives ``jit_compile`` and ``deterministic``.
        replicas: Number of replicas.

    Raises:
        ConfigError: ``jit_compile: on`` with several replicas on CPUs, whose exchanges XLA cannot
            compile; or ``deterministic`` with XLA on GPUs, without XLA's flags for it.
    """
    if config.deterministic and config.jit_compile != "off" and gpu_found():
        check_deterministic(os.environ)
    if config.jit_compile == "on" and replicas > 1 and not gpu_found():
        raise ConfigError(
            f"jit_compile: on is not allowed with {replicas} replicas on CPUs, whose exchanges XLA "
            "cannot compile; expected auto, parts or off"
        )


def first_replica(values, strategy):
    """The values of this process's first replica; for values that are identical on all replicas."""
    return tf.nest.map_structure(lambda v: strategy.experimental_local_results(v)[0], values)


def whole_step(trainer: Trainer, strategy):
    """Makes the function that takes a step on all replicas, given their images; call it in a graph.

    With several passes, the loop over passes is outside of the replicas, since a loop within a replica
    cannot hold exchanges.

    Args:
        trainer: The trainer.
        strategy: Strategy over the replicas.
    """

    def compiled(function):
        """The function as one XLA program, exchanges included, if whole steps are compiled."""
        whole = trainer.xla_steps
        return tf.function(function, autograph=False, jit_compile=True) if whole else function

    passes = trainer.config.accumulate_steps
    one_pass_step = compiled(trainer.one_pass_step)
    add_pass, update = compiled(trainer.add_pass), compiled(trainer.update)

    def step(batch):
        images = batch[0] if isinstance(batch, tuple) else batch  # Keras may have wrapped them
        if passes == 1:
            return strategy.run(one_pass_step, (images,))
        _, total = tf.while_loop(
            lambda number, _: number < passes,
            lambda number, total: (number + 1, strategy.run(add_pass, (total, images, number))),
            (tf.constant(0), strategy.run(trainer.zero_pass)),
            parallel_iterations=1,
        )
        return strategy.run(update, (total,))

    return step


def distributed_function(function, strategy):
    """Makes a graph of a function that runs on all replicas; it returns the first replica's results.

    Args:
        function: A function that runs another on all replicas, with identical results on each, such as
            the one from `whole_step`.
        strategy: Strategy over the replicas.
    """

    @tf.function(autograph=False)
    def on_all_replicas(*arguments):
        return first_replica(function(*arguments), strategy)

    return on_all_replicas


def distributed_validation(trainer: Trainer, strategy):
    """Makes a graph of `Trainer.validation_step` that runs on all replicas, given their batches."""
    step = trainer.validation_step
    if trainer.xla_steps:
        step = tf.function(step, autograph=False, jit_compile=True)
    return distributed_function(lambda *batch: strategy.run(step, batch), strategy)


def several_steps(step, strategy):
    """Makes a function that takes several steps in a row in one call.

    It is for replicas that exchange values. TensorFlow keeps a record of some 1.6 KB for each exchange
    in each call of a graph, for the life of the process. The steps of one call share their records, so
    memory grows with the number of calls instead of the number of steps.

    Args:
        step: A function from `whole_step`.
        strategy: Strategy over the replicas.

    Returns:
        A function of an iterator over batches and the number of steps. It returns the results of all
        steps, stacked along a new first axis.
    """
    structure = None  # structure of a step's results, known once a step has been traced

    def next_step(number, batches, results):
        nonlocal structure
        structure = first_replica(step(next(batches)), strategy)
        flat = [tf.reshape(tf.cast(v, tf.float64), [-1]) for v in tf.nest.flatten(structure)]
        return number + 1, results.write(number, tf.concat(flat, 0))

    @tf.function(autograph=False)
    def take_steps(batches, count):
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

    return take_steps


class Steps:
    """Takes training steps, one or several per call of the graph.

    Args:
        trainer: The trainer.
        strategy: Strategy over the replicas.
        several: Whether a call may take several steps (see `several_steps`).

    Attributes:
        function: The traced function that takes the steps.
    """

    def __init__(self, trainer: Trainer, strategy, several: bool):
        step, self._several = whole_step(trainer, strategy), several
        self.function = (several_steps if several else distributed_function)(step, strategy)
        self._reports: Any = None  # of the latest call

    def take(self, batches, count: int) -> None:
        """Takes `count` steps.

        Args:
            batches: An iterator over batches of images.
            count: Number of steps; 1 unless `several` was set.
        """
        if self._several:
            self._reports = self.function(batches, tf.constant(count))
        else:
            self._reports = self.function(next(batches))

    def report(self, place: int = -1) -> dict[str, tf.Tensor]:
        """The report of one step of the latest call (see `Trainer.update`).

        Args:
            place: Index of the step within the call; -1 for the last.
        """
        if not self._several:
            return self._reports
        return tf.nest.map_structure(lambda values: values[place], self._reports)

    def graph(self, batches):
        """The `tf.Graph` of `function`, for TensorBoard.

        Args:
            batches: As for `take`.
        """
        arguments = (batches, tf.constant(1)) if self._several else (batches.element_spec,)
        return self.function.get_concrete_function(*arguments).graph


@contextlib.contextmanager
def grappler_disabled():
    """Disables Grappler on CPUs in a block, so that TensorFlow runs graphs as they were traced.

    Its rewriting takes longer than several steps of a deep model and does not make them faster, and it
    makes results with and without gradient checkpointing differ by rounding. GPUs keep Grappler, for
    memory layouts.
    """
    option = "disable_meta_optimizer"
    before = tf.config.optimizer.get_experimental_options().get(option, False)
    if not gpu_found():
        tf.config.optimizer.set_experimental_options({option: True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({option: before})

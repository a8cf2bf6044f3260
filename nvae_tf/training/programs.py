"""Training steps as single XLA programs, lowered for a platform that this machine need not have.

What is lowered is a pure function of tensors, so a program needs no variables, and shapes are enough to
make it. Tests lower every kind of step for GPUs on machines without one, and `benchmarks/xla_step.py`
writes programs that other machines run.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from nvae_tf.training.trainer import Trainer


class FlatStep(NamedTuple):
    """A training step as a function of a flat list of tensors.

    Attributes:
        function: Of the tensors that stand for `Trainer.changed_variables`, and of images, to the list
            of these tensors after the step, and of what the step reports in the order of `reported`.
        specs: Shapes and types of the function's arguments.
        reported: Names of what is reported.
    """

    function: Callable
    specs: list[tf.TensorSpec]
    reported: list[str]


def state_specs(trainer: Trainer) -> list[tf.TensorSpec]:
    """Shapes and types of all that a step changes, in the order of `Trainer.changed_variables`."""
    # Some variables' own shapes are not static, their values' are.
    return [
        tf.TensorSpec(variable.read_value().shape, variable.dtype)
        for variable in trainer.changed_variables
    ]


def flat_step(trainer: Trainer, batch_size: int) -> FlatStep:
    """A trainer's step with flat arguments and results.

    Args:
        trainer: The trainer; nothing of it changes.
        batch_size: Images of a step.
    """
    specs, reported = state_specs(trainer), []
    count = len(specs)

    def step(*arguments):
        after, logs = trainer.step_function(arguments[:count], arguments[count])
        reported[:] = logs
        return [*after, *logs.values()]

    images = tf.TensorSpec((batch_size, *trainer.model.image.shape))
    return FlatStep(step, [*specs, images], reported)


def lower(
    function: Callable, specs: Sequence[tf.TensorSpec], platform: str = "GPU", text: bool = False
):
    """The XLA program of a function, before any optimisation.

    Args:
        function: Of tensors, which uses no variables.
        specs: Shapes and types of its arguments.
        platform: ``"GPU"`` or ``"CPU"``; no such device is needed.
        text: Whether to return the program as text.

    Returns:
        XLA's `HloModuleProto`, serialized, or the text.
    """
    with_xla = tf.function(function, autograph=False, jit_compile=True)
    program = with_xla.experimental_get_compiler_ir(*specs)
    return program(stage="hlo" if text else "hlo_serialized", platform_name=platform)

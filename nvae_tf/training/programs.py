"""Training steps as single XLA programs, lowered for a platform that this machine need not have.

Steps are lowered as pure functions of tensors, so that a program needs no variables and can be made
from shapes alone. Tests lower every kind of step for GPUs on machines without one, and
`benchmarks/xla_step.py` writes programs that other machines run.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from nvae_tf.training.trainer import Trainer


class FlatStep(NamedTuple):
    """A training step as a function of a flat list of tensors.

    Attributes:
        function: Takes the values of `Trainer.changed_variables` and then images. Returns one list: the
            values after the step, then the reported values in the order of `reported`.
        specs: Shapes and types of the function's arguments.
        reported: Names of the reported values; filled when the function is traced.
    """

    function: Callable
    specs: list[tf.TensorSpec]
    reported: list[str]


def state_specs(trainer: Trainer) -> list[tf.TensorSpec]:
    """Shapes and types of the values of `Trainer.changed_variables`, in their order."""
    # The shapes of some variables are not static; those of their values are.
    return [
        tf.TensorSpec(variable.read_value().shape, variable.dtype)
        for variable in trainer.changed_variables
    ]


def flat_step(trainer: Trainer, batch_size: int) -> FlatStep:
    """A trainer's step with flat arguments and results.

    Args:
        trainer: The trainer, which stays unchanged.
        batch_size: Number of images per step.
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
        function: A function of tensors that uses no variables.
        specs: Shapes and types of its arguments.
        platform: ``"GPU"`` or ``"CPU"``; no such device is needed.
        text: Whether to return the program as text.

    Returns:
        XLA's `HloModuleProto`, serialized, or the text.
    """
    with_xla = tf.function(function, autograph=False, jit_compile=True)
    program = with_xla.experimental_get_compiler_ir(*specs)
    return program(stage="hlo" if text else "hlo_serialized", platform_name=platform)

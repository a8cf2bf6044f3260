"""Regions of a step that XLA compiles where the step as a whole is not compiled.

On CPUs XLA makes arithmetic on long tensors several times faster, since it reads them once, but its
depthwise convolutions are some twenty times slower. So convolutions stay TensorFlow's there, and what
stands between them is compiled. No region holds an exchange between replicas, so they may share a step
of which some regions are compiled.
"""

import functools

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla


def optimization_barrier(tensors) -> list[tf.Tensor]:
    """Returns the same tensors, but hides from XLA that they are the same.

    It is for functions that XLA compiles as a whole.

    What is computed from them is computed after all of them, and not replaced by an equal value that
    was computed before.

    Args:
        tensors: A list of tensors.
    """
    return list(xla.optimization_barrier(*tensors))


def xla_region(function, min_size: int = 0):
    """Makes a function of tensors a region, compiled once for all inputs of the same shapes.

    Args:
        function: A function of tensors or of structures of tensors.
        min_size: Run the function as it is if the first argument has fewer elements: compiling would
            cost more than it saves.

    Returns:
        A function of the same arguments and the keyword ``compile``: whether to use XLA.
    """
    with_xla = tf.function(function, autograph=False, jit_compile=True)

    @functools.wraps(function)
    def run(*arguments, compile: bool):  # noqa: A002
        large = not min_size or arguments[0].shape.num_elements() >= min_size
        return (with_xla if large and compile else function)(*arguments)

    return run

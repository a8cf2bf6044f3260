"""Regions of a step that XLA compiles when the step as a whole is not compiled.

On CPUs XLA makes arithmetic on large tensors several times faster, because it reads them only once, but
its depthwise convolutions are some twenty times slower. So the convolutions are left to TensorFlow, and
the arithmetic between them is compiled. No region holds an exchange between replicas, so regions can
also be compiled in a step that several replicas share.
"""

import functools

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

# Elements of a stack of weights from which on it pays to compile passes over it.
LARGE_STACK = 2**20


def optimization_barrier(tensors) -> list[tf.Tensor]:
    """Returns copies of tensors that XLA cannot recognise as the originals.

    Anything computed from a copy is computed after all of the tensors, and is never replaced by an
    equal value computed earlier. Works only in functions that XLA compiles as a whole.

    Args:
        tensors: A list of tensors.
    """
    return list(xla.optimization_barrier(*tensors))


def xla_region(function, min_size: int = 0):
    """Makes a function an XLA region, which is compiled once per combination of shapes and text.

    Args:
        function: A function of tensors, of structures of tensors, and of text.
        min_size: Smallest number of elements of the first argument for which XLA is used. Below it,
            compiling would cost more than it saves.

    Returns:
        A function of the same arguments and a keyword ``compile``, which says whether to use XLA.
    """
    with_xla = tf.function(function, autograph=False, jit_compile=True)

    @functools.wraps(function)
    def with_or_without_xla(*arguments, compile: bool):  # noqa: A002
        large = not min_size or arguments[0].shape.num_elements() >= min_size
        return (with_xla if large and compile else function)(*arguments)

    return with_or_without_xla

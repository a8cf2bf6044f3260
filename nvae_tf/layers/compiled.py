"""Parts of a step that XLA compiles where the step as a whole is not compiled.

On CPUs XLA makes arithmetic on long tensors several times faster, since it reads them once, but its
depthwise convolutions are some twenty times slower. So convolutions stay TensorFlow's there, and what
stands between them is compiled.
"""

import contextvars
import functools

import tensorflow as tf

from nvae_tf.layers.base import during

_active = contextvars.ContextVar("compiled_parts", default=False)


def compiled_parts(active=True):
    """Within the block, parts are compiled. Not where several replicas share the work."""
    return during(_active, active)


def compiles_parts() -> bool:
    """Whether the code around is in `compiled_parts`."""
    return _active.get()


def compiled_part(function, worthwhile: int = 0):
    """Makes a function of tensors a part: compiled once for all inputs of the same shapes.

    Args:
        function: of tensors, or structures of tensors.
        worthwhile: where the first one has fewer values, the function is not compiled: it would not
            make up for the time that takes.
    """
    compiled = tf.function(function, autograph=False, jit_compile=True)

    @functools.wraps(function)
    def run(*arguments):
        large = not worthwhile or arguments[0].shape.num_elements() >= worthwhile
        return (compiled if large and compiles_parts() else function)(*arguments)

    return run

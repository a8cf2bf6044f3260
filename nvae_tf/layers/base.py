"""What all layers have in common."""

import contextlib
import contextvars

import numpy as np
import tensorflow as tf
import tf_keras

_standing_in = contextvars.ContextVar("standing_in", default=None)
_takes_gradients = contextvars.ContextVar("takes_gradients", default=False)


class Layer(tf_keras.layers.Layer):
    """A Keras layer that computes in the precision of its inputs, whatever the policy in force.

    Its methods compute with ``read(self.weight)``, so that one traced function can serve many layers.
    """

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)


def fresh_seed() -> np.ndarray:
    """A seed for one draw of initial values, from NumPy's generator, which `set_random_seed` seeds.

    For stateless draws: of stateful ones TensorFlow keeps a kernel in memory for each, for ever.
    """
    return np.random.randint(2**31, size=2, dtype=np.int64)


@contextlib.contextmanager
def during(variable: contextvars.ContextVar, value):
    """Within the block, a context variable has another value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def gradients_taken():
    """Within the block, operations may have gradients of their own, where those are better.

    Not elsewhere: a graph with such operations is never freed (TensorFlow registers their gradients,
    with all that they refer to, for the rest of the process).
    """
    return during(_takes_gradients, True)


def takes_gradients() -> bool:
    """Whether the code around is in `gradients_taken`."""
    return _takes_gradients.get()


def read(variable):
    """A layer's variable, or the tensor that stands in for it (see `standing_in`)."""
    return (_standing_in.get() or {}).get(id(variable), variable)


def read_stacked(variables):
    """Variables of one shape, or the tensors that stand in for them, as one tensor (n, *shape)."""
    places = (_standing_in.get() or {}).get(STACKS, {})
    found = [places.get(id(variable)) for variable in variables]
    if None in found or len({id(stack) for stack, _ in found}) > 1:
        return tf.stack([read(variable) for variable in variables])
    stack, indices = found[0][0], [index for _, index in found]
    return stack if indices == list(range(stack.shape[0])) else tf.gather(stack, indices)


STACKS = "stacks"


@contextlib.contextmanager
def standing_in(tensors, stacks=None):
    """Within the block, `read` answers with tensors in place of variables.

    Args:
        tensors: variable's id -> its tensor.
        stacks: variable's id -> (a tensor that holds several of those, its place there), for
            `read_stacked`.
    """
    before = _standing_in.get() or {}
    stacks = {**before.get(STACKS, {}), **(stacks or {})}
    with during(_standing_in, {**before, **tensors, STACKS: stacks}):
        yield

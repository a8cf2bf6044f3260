"""What all layers have in common."""

import contextlib
import contextvars

import tensorflow as tf
import tf_keras

_standing_in = contextvars.ContextVar("standing_in", default=None)


class Layer(tf_keras.layers.Layer):
    """A Keras layer that computes in the precision of its inputs, whatever the policy in force.

    Its methods compute with ``read(self.weight)``, so that one traced function can serve many layers.
    """

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)


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
    token = _standing_in.set({**before, **tensors, STACKS: stacks})
    try:
        yield
    finally:
        _standing_in.reset(token)

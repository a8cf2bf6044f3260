"""Gradient checkpointing: activations computed again in the backward pass instead of kept.

Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016.
"""

import contextlib
import contextvars

import tensorflow as tf

from nvae_tf.layers.convolution import Convolution, current_kernels, given_kernels
from nvae_tf.layers.normalization import observed_statistics, report_statistics

NONE, NORMALIZED, CELLS = "none", "bn_swish", "cells"
_mode = contextvars.ContextVar("checkpointing", default=NONE)


@contextlib.contextmanager
def checkpointing(mode: str):
    """Within the block, what `recomputed` runs is kept (``"none"``) or computed again.

    Args:
        mode: ``"bn_swish"``: batch norm, its activation and the convolution that follows; ``"cells"``:
            whole residual cells.
    """
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def recomputed(mode: str, function, layers, inputs):
    """``function(inputs)``, in the mode given without keeping what it computes on the way.

    Args:
        mode: in which the function is computed again.
        function: of a tensor.
        layers: that it uses.
        inputs: a tensor.
    """
    if _mode.get() != mode:
        return function(inputs)
    seen = {}
    convolutions = [m for layer in layers for m in layer.submodules if isinstance(m, Convolution)]
    convolutions += [layer for layer in layers if isinstance(layer, Convolution)]
    shared = current_kernels()
    kernels = [shared[convolution] for convolution in convolutions] if shared else []

    # Kernels that were computed outside are arguments, or no gradient would reach them.
    @tf.recompute_grad
    def run(inputs, *kernels):
        given = dict(zip(convolutions, kernels, strict=True)) if kernels else None
        with given_kernels(given), observed_statistics() as observed, checkpointing(NONE):
            outputs = function(inputs)
        # The first time is the forward pass; what the second one observes is the same.
        seen.setdefault("statistics", observed)
        return outputs

    outputs = run(inputs, *kernels)
    report_statistics(seen["statistics"])
    return outputs

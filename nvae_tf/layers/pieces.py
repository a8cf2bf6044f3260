"""Pieces of the model: traced once for all that are alike, or computed again in the backward pass.

A piece is a function of tensors that uses the weights of some layers. A deep model has hundreds, of a
few dozen kinds: traced as one function a kind, the graph stays small and starts quickly. Computed
again, a piece keeps nothing but its inputs for the backward pass (Chen et al., *Training Deep Nets with
Sublinear Memory Cost*, 2016).
"""

import contextlib
import contextvars
from typing import NamedTuple

import tensorflow as tf

from nvae_tf.layers.base import during, read, standing_in
from nvae_tf.layers.convolution import (
    Convolution,
    SharedKernel,
    current_kernels,
    shared_kernels,
)
from nvae_tf.layers.normalization import (
    BatchNorm,
    Observed,
    observed_statistics,
    report_statistics,
)

NONE, NORMALIZED, CELLS = "none", "bn_swish", "cells"


class _Settings(NamedTuple):
    recomputed: str = NONE
    functions: dict | None = None  # kind -> _Piece; None: every piece is traced apart


_default = _Settings()
_settings = contextvars.ContextVar("pieces", default=_default)


def pieces(recomputed: str = NONE, shared: bool = False):
    """Within the block, how `run_piece` runs.

    Args:
        recomputed: what is computed again in the backward pass: ``"none"``; ``"bn_swish"``: batch norm,
            its activation and the convolution that follows; ``"cells"``: whole residual cells, and a
            group's draw of its latents and its combiner.
        shared: trace one function for all pieces of a kind. Not inside a `tf.distribute` strategy of
            several replicas, which cannot communicate from within.
    """
    return during(_settings, _Settings(recomputed, {} if shared else None))


def run_piece(function, layers, inputs, *, kind=None, recomputed_in=CELLS):
    """``function(*inputs)``.

    Args:
        function: of tensors; it uses no other tensors, and no other variables than the layers'.
        layers: built layers that it uses.
        inputs: tensors.
        kind: hashable; functions of one kind, run on weights and inputs of the same shapes, are alike.
            Default: none, the piece is a part of a larger one, and never shared.
        recomputed_in: the mode of `pieces` in which the function is computed again.

    Returns:
        Tensors, or a structure of tensors.
    """
    settings = _settings.get()
    again = settings.recomputed == recomputed_in
    shared = settings.functions is not None and kind is not None
    if not again and not shared:
        return function(*inputs)
    weights = _Weights(layers)
    tensors = [*inputs, *weights.values]
    if not shared:
        made = _Piece(function, weights, tensors, again, shared=False)
    else:
        key = (kind, *((tuple(t.shape), t.dtype) for t in tensors))
        if key not in settings.functions:
            settings.functions[key] = _Piece(function, weights, tensors, again, shared=True)
        made = settings.functions[key]
    return made(weights, tensors)


class _Weights:
    """Tensors that a piece's layers compute with, in an order that is alike for alike pieces."""

    def __init__(self, layers):
        modules = [m for layer in layers for m in (layer, *layer.submodules)]
        self.norms = [m for m in modules if isinstance(m, BatchNorm)]
        kernels = current_kernels()
        self.convolutions = [m for m in modules if isinstance(m, Convolution)] if kernels else []
        self.scaled = [c for c in self.convolutions if kernels[c].scale is not None]
        shared = {id(c.kernel) for c in self.convolutions} | {id(c.log_norm) for c in self.scaled}
        self.variables = [
            v for layer in layers for v in layer.trainable_variables if id(v) not in shared
        ]
        self.values = [kernels[c].kernel for c in self.convolutions]
        self.values += [kernels[c].scale for c in self.scaled]
        self.values += [tf.convert_to_tensor(read(v)) for v in self.variables]

    @contextlib.contextmanager
    def replaced(self, values):
        """Within the block, the layers compute with other values."""
        values = iter(values)
        kernels = {c: SharedKernel(next(values)) for c in self.convolutions}
        kernels.update({c: kernels[c]._replace(scale=next(values)) for c in self.scaled})
        others = {id(variable): next(values) for variable in self.variables}
        with shared_kernels(kernels or None), standing_in(others):
            yield


class _Piece:
    """A piece as a function of its inputs and weights."""

    def __init__(self, function, weights, tensors, again, shared):
        self._function, self._weights = function, weights
        self._num_inputs = len(tensors) - len(weights.values)
        self._again, self._shared = again, shared
        self._places = []  # of the batch norms that reported, among the piece's
        self._run = self._recomputed if again else self._compute
        if shared:
            self._run = _traced(self._run, [tf.TensorSpec(t.shape, t.dtype) for t in tensors])

    def __call__(self, weights, tensors):
        outputs, statistics = self._run(*tensors)
        if self._places:
            norms = [weights.norms[place] for place in self._places]
            widths = [norm.gamma.shape[0] for norm in norms]
            parts = tf.split(statistics, [size for width in widths for size in (width, width, 1)])
            triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
            report_statistics({n: Observed(*t) for n, t in zip(norms, triples, strict=True)})
        return outputs

    def _compute(self, *tensors):
        inputs, values = tensors[: self._num_inputs], tensors[self._num_inputs :]
        inner = NONE if self._again else _settings.get().recomputed
        with self._weights.replaced(values), observed_statistics() as observed, pieces(inner):
            outputs = self._function(*inputs)
        self._places = [self._weights.norms.index(norm) for norm in observed]
        # As one vector: every output of its own would cost the backward pass a tensor of zeros.
        statistics = [part for o in observed.values() for part in o]
        return outputs, tf.concat(statistics, 0) if statistics else tf.zeros(0)

    def _recomputed(self, *tensors):
        @tf.custom_gradient
        def run(*tensors):
            return self._compute(*tensors), lambda *upstream: self._gradients(tensors, upstream)

        return run(*tensors)

    def _gradients(self, tensors, upstream):
        if not self._shared:  # or TensorFlow would compute it all again before the backward pass
            with tf.control_dependencies(upstream):
                tensors = [tf.identity(tensor) for tensor in tensors]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            outputs = tf.nest.flatten(self._compute(*tensors))
        return tape.gradient(
            outputs, tensors, output_gradients=upstream, unconnected_gradients="zero"
        )


def _traced(function, specs):
    """One function that all pieces of a kind call."""
    traced = tf.function(
        function, autograph=False, experimental_attributes={"_noinline": True}
    ).get_concrete_function(*specs)
    if traced.captured_inputs:
        names = [tensor.name for tensor in traced.captured_inputs]
        raise ValueError(f"a piece of the model uses more than it was given: {names}")
    return traced

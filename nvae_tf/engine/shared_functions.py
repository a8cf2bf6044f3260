"""Functions that identical blocks share, and blocks that are rematerialized in the backward pass.

A deep model has hundreds of blocks of a few dozen kinds. Traced as one function per kind, the graph
stays small and starts quickly. A rematerialized block (gradient checkpointing) keeps nothing but its
inputs for the backward pass: Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016.
"""

import dataclasses

import tensorflow as tf

from nvae_tf.config import CELLS, NO_REMAT
from nvae_tf.engine.kernels import NormalizedKernel
from nvae_tf.engine.scope import BatchStatistics, Scope
from nvae_tf.engine.weights import Weight, walk


def call_block(function, layers, inputs, scope: Scope, *, uses=None, share=True, remat_when=CELLS):
    """``function(*layers, *inputs, scope=scope)``, shared with identical blocks and rematerialized.

    Args:
        function: Of layers, tensors and a scope; it uses no other tensors or weights than those.
        layers: The layers that it is given.
        inputs: Tensors.
        scope: Says whether functions are shared and what is rematerialized.
        uses: The built layers whose weights it uses; default: `layers`.
        share: Whether the function may be shared; not for a part of a larger block.
        remat_when: The mode of `Scope.rematerialize` in which the block is rematerialized.

    Returns:
        Tensors, or a structure of tensors.
    """
    rematerialize = scope.rematerialize == remat_when
    functions = scope.functions if share else None
    if not rematerialize and functions is None:
        return function(*layers, *inputs, scope=scope)
    weights = _BlockWeights(layers if uses is None else uses, scope)
    tensors = [*inputs, *weights.tensors]
    if functions is None:
        block = _Block(function, layers, weights, len(inputs), scope, rematerialize)
        outputs, statistics = block.run(*tensors)
    else:
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
        key = (function.__qualname__, *map(trace_key, layers), scope.settings, *specs)
        if key not in functions:
            block = _Block(
                function, layers, weights, len(inputs), scope, rematerialize, shared=True
            )
            functions[key] = _traced(block.run, specs)
        outputs, statistics = functions[key](*tensors)
    scope.statistics.update(weights.split_statistics(statistics) if scope.training else {})
    return outputs


def trace_key(layer) -> tuple:
    """What a layer's computation depends on beside tensors: its type and configuration; hashable."""
    config = layer.get_config()
    ignored = ("name", "trainable", "dtype")  # Keras's own, which our layers do not look at
    return (
        type(layer),
        tuple((name, _frozen(value)) for name, value in config.items() if name not in ignored),
    )


def _frozen(value):
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((name, _frozen(entry)) for name, entry in value.items())
    return value


class _BlockWeights:
    """The tensors that a block computes with, in an order that is the same for identical blocks."""

    def __init__(self, layers, scope: Scope):
        found = [pair for layer in layers for pair in (("", layer), *walk(layer))]
        modules = [content for _, content in found if not isinstance(content, Weight)]
        self.norms = [module for module in modules if hasattr(module, "moving_mean")]
        # Kernels that were normalised beforehand come instead of the weights that they are made from.
        self.convolutions = [module for module in modules if module in scope.kernels]
        kernels = [scope.kernels[convolution] for convolution in self.convolutions]
        self.scaled = [kernel.scale is not None for kernel in kernels]
        made = {weight for c in self.convolutions for weight in c.kernel_weights}
        self.others = [
            content
            for _, content in found
            if isinstance(content, Weight)
            and content not in made
            and (content.trainable or not scope.training)
        ]
        self.tensors = [kernel.kernel for kernel in kernels]
        self.tensors += [kernel.scale for kernel in kernels if kernel.scale is not None]
        self.tensors += [scope.value(weight) for weight in self.others]

    def given(self, tensors) -> dict:
        """Other tensors in the place of these, as fields of a `Scope`."""
        tensors = iter(tensors)
        kernels = [next(tensors) for _ in self.convolutions]
        scales = [next(tensors) if scaled else None for scaled in self.scaled]
        return dict(
            kernels=dict(
                zip(self.convolutions, map(NormalizedKernel, kernels, scales), strict=True)
            ),
            values=dict(zip(self.others, tensors, strict=True)),
        )

    def concat_statistics(self, statistics):
        """The statistics of all batch norms as one vector.

        Every output of its own would cost the backward pass a tensor of zeros.
        """
        parts = [part for norm in self.norms for part in statistics[norm]]
        return tf.concat(parts, 0) if parts else tf.zeros(0)

    def split_statistics(self, vector) -> dict:
        """The inverse of `concat_statistics`."""
        if not self.norms:
            return {}
        widths = [norm.moving_mean.shape[0] for norm in self.norms]
        parts = tf.split(vector, [size for width in widths for size in (width, width, 1)])
        triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        return {
            norm: BatchStatistics(*triple) for norm, triple in zip(self.norms, triples, strict=True)
        }


class _Block:
    """A block as a function of inputs and weights to outputs and its batch norms' statistics."""

    def __init__(self, function, layers, weights, num_inputs, scope, rematerialize, shared=False):
        self._function, self._layers, self._weights = function, layers, weights
        self._num_inputs, self._shared = num_inputs, shared
        # What the block is given again with every call is left out: it would be captured.
        self._scope = dataclasses.replace(
            scope,
            rematerialize=NO_REMAT if rematerialize else scope.rematerialize,
            functions=None,
        )
        self.run = self._rematerialized if rematerialize else self._compute

    def _compute(self, *tensors):
        inputs, values = tensors[: self._num_inputs], tensors[self._num_inputs :]
        inner = dataclasses.replace(self._scope, statistics={}, **self._weights.given(values))
        outputs = self._function(*self._layers, *inputs, scope=inner)
        if not inner.training:
            return outputs, tf.zeros(0)
        return outputs, self._weights.concat_statistics(inner.statistics)

    def _rematerialized(self, *tensors):
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
    """One function that all blocks of a kind call."""
    traced = tf.function(
        function, autograph=False, experimental_attributes={"_noinline": True}
    ).get_concrete_function(*specs)
    if traced.captured_inputs:
        names = [tensor.name for tensor in traced.captured_inputs]
        raise ValueError(f"a block of the model uses more than it was given: {names}")
    return traced

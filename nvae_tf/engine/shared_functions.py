"""Functions that identical blocks share, and blocks that are rematerialized in the backward pass.

A deep model has hundreds of blocks of a few dozen kinds. Traced as one function per kind, the graph
stays small and starts quickly. A rematerialized block (gradient checkpointing) keeps nothing but its
inputs for the backward pass: Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016.

Where several replicas share a batch, the batch norms exchange statistics, and exchanges stand between
shared functions. So a block whose batch norms have yet to exchange theirs, such as a residual cell, is
run in the graph of the step, and the blocks that it is made of are shared instead.
"""

import dataclasses

import tensorflow as tf

from nvae_tf.config import CELLS, NO_REMAT
from nvae_tf.engine.kernels import NormalizedKernel
from nvae_tf.engine.scope import Scope
from nvae_tf.engine.weights import Weight, walk
from nvae_tf.engine.xla import optimization_barrier


class SharedFunctions:
    """Traced functions of tensors alone, by what they compute and the shapes of their inputs.

    They belong to no graph, device or replica: all that need one call the same.
    """

    def __init__(self):
        self._traced = {}
        self._graph = tf.Graph()

    def traced(self, key: tuple, function, tensors, has_gradient: bool = True):
        """The function of a key and of the tensors' shapes, traced when it is first asked for.

        Args:
            key: What the function computes; hashable.
            function: The Python function; not called if one of the same key and shapes was traced.
            tensors: Arguments of the shapes that it is to be traced for.
            has_gradient: Whether gradients are taken through it.
        """
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
        key = (key, *specs)
        if key not in self._traced:
            # In the graph of a replica, the replica's device would become a part of the function and of
            # its gradient's. One graph serves all functions, because TensorFlow traces and compiles a
            # region once per graph.
            with self._graph.as_default():
                self._traced[key] = _trace(function, specs, has_gradient)
        return self._traced[key]


def _trace(function, specs, has_gradient: bool):
    traced = tf.function(
        function, autograph=False, experimental_attributes={"_noinline": True}
    ).get_concrete_function(*specs)
    if traced.captured_inputs:
        names = [tensor.name for tensor in traced.captured_inputs]
        raise ValueError(
            f"a block of the model captures tensors that were not passed to it: {names}"
        )
    if has_gradient:
        inputs = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in specs]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = tf.nest.flatten(traced(*inputs))
        tape.gradient(outputs, inputs)
    return traced


def call_shared(function, tensors, scope: Scope, *, has_gradient: bool = True, **settings):
    """``function(*tensors, **settings)``, shared with all calls of the same settings and shapes.

    Args:
        function: A module-level function of tensors and settings.
        tensors: Tensors.
        scope: Says whether functions are shared.
        has_gradient: Whether gradients are taken through it.
        settings: Hashable arguments.
    """

    def run(*tensors):
        return function(*tensors, **settings)

    if scope.functions is None:
        return run(*tensors)
    key = (function.__module__, function.__qualname__, *settings.items())
    return scope.functions.traced(key, run, tensors, has_gradient)(*tensors)


def call_block(function, layers, inputs, scope: Scope, *, uses=None, remat_when=CELLS):
    """``function(*layers, *inputs, scope=scope)``, shared with identical blocks and rematerialized.

    Args:
        function: A function of layers, tensors and a scope, which uses no other tensors or weights.
        layers: The layers that it is given.
        inputs: Tensors.
        scope: Says whether functions are shared and what is rematerialized.
        uses: The built layers whose weights it uses; default: `layers`.
        remat_when: The mode of `Scope.rematerialize` in which the block is rematerialized.

    Returns:
        Tensors, or a structure of tensors.
    """
    rematerialize = scope.rematerialize == remat_when
    if not rematerialize and scope.functions is None:
        return function(*layers, *inputs, scope=scope)
    weights = _BlockTensors(layers if uses is None else uses, scope)
    inner = dataclasses.replace(scope, rematerialize=NO_REMAT) if rematerialize else scope
    block = _Block(function, layers, weights, len(inputs), inner)
    if not (scope.exchanges_statistics and weights.norms) and scope.functions is not None:
        key = (function.__module__, function.__qualname__, *map(trace_key, layers), scope.settings)
        run = block.rematerialized_function if rematerialize else block.function
        tensors = [*inputs, *weights.tensors]
        outputs, statistics = scope.functions.traced(key, run, tensors)(*tensors)
        statistics = weights.split_statistics(statistics)
    elif rematerialize:
        outputs, statistics = block.rematerialized(inputs)
    else:
        return function(*layers, *inputs, scope=scope)
    scope.statistics.update(statistics)
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


class _BlockTensors:
    """The tensors that a block computes with, in an order that is the same for identical blocks.

    Attributes:
        norms: Batch norms of the block that have yet to find out the statistics of their batch.
        differentiable: Those that gradients are taken with respect to.
        constant: The scales of kernels.
    """

    def __init__(self, layers, scope: Scope):
        contents = [pair for layer in layers for pair in (("", layer), *walk(layer))]
        modules = [content for _, content in contents if not isinstance(content, Weight)]
        norms = [module for module in modules if hasattr(module, "moving_mean")]
        self.norms = [norm for norm in norms if norm not in scope.statistics]
        self._exchanged = [norm for norm in norms if norm in scope.statistics]
        # Kernels that were normalised beforehand come instead of the weights that they are made from.
        self._convolutions = [module for module in modules if module in scope.kernels]
        kernels = [scope.kernels[convolution] for convolution in self._convolutions]
        self._scaled = [kernel.scale is not None for kernel in kernels]
        replaced = {weight for c in self._convolutions for weight in c.kernel_weights}
        self._others = [
            content
            for _, content in contents
            if isinstance(content, Weight)
            and content not in replaced
            and (content.trainable or not scope.training)
        ]
        self.differentiable = [kernel.kernel for kernel in kernels]
        self.differentiable += [scope.statistics[norm] for norm in self._exchanged]
        self.differentiable += [scope.value(weight) for weight in self._others]
        self.constant = [kernel.scale for kernel in kernels if kernel.scale is not None]

    @property
    def tensors(self) -> list[tf.Tensor]:
        """All of them."""
        return [*self.differentiable, *self.constant]

    def given(self, tensors) -> dict:
        """Other tensors in the place of `tensors`, as fields of a `Scope`."""
        tensors = iter(tensors)
        kernels = [next(tensors) for _ in self._convolutions]
        statistics = [next(tensors) for _ in self._exchanged]
        values = [next(tensors) for _ in self._others]
        scales = [next(tensors) if scaled else None for scaled in self._scaled]
        return dict(
            kernels=dict(
                zip(self._convolutions, map(NormalizedKernel, kernels, scales), strict=True)
            ),
            statistics=dict(zip(self._exchanged, statistics, strict=True)),
            values=dict(zip(self._others, values, strict=True)),
        )

    def concat_statistics(self, statistics):
        """The statistics of all batch norms as a list of one vector, without gradients, or of none.

        Each separate output would cost the backward pass a tensor of zeros.
        """
        parts = [statistics[norm] for norm in self.norms if norm in statistics]
        return [tf.stop_gradient(tf.concat(parts, 0))] if parts else []

    def split_statistics(self, vectors) -> dict:
        """The inverse of `concat_statistics`."""
        if not vectors:
            return {}
        sizes = [2 * norm.moving_mean.shape[0] + 1 for norm in self.norms]
        return dict(zip(self.norms, tf.split(vectors[0], sizes), strict=True))


class _Block:
    """A block as functions of tensors.

    Args:
        function: As for `call_block`.
        layers: As for `call_block`.
        weights: The tensors of the layers that it uses.
        num_inputs: Number of inputs, which come before those tensors.
        scope: How the block is run.
    """

    def __init__(self, function, layers, weights: _BlockTensors, num_inputs: int, scope: Scope):
        self._function, self._layers, self._weights = function, layers, weights
        self._num_inputs, self._scope = num_inputs, scope

    def function(self, *tensors):
        """The block without its surroundings: of inputs and all tensors of its weights.

        Returns:
            Outputs, and the statistics of its batch norms as from `_BlockTensors.concat_statistics`.
        """
        alone = dataclasses.replace(self._scope, functions=None, replica_row=None)
        outputs, statistics = self._compute(alone, tensors)
        return outputs, self._weights.concat_statistics(statistics)

    def rematerialized_function(self, *tensors):
        """`function` that keeps nothing but its arguments for the backward pass."""

        @tf.custom_gradient
        def run(*tensors):
            outputs, statistics = self.function(*tensors)

            def gradients(*upstream):
                # Statistics, which come last, have no gradients.
                upstream = upstream[: len(upstream) - len(statistics)]
                given, upstream = self._not_before(tensors, upstream)
                with tf.GradientTape() as tape:
                    tape.watch(given)
                    outputs, _ = self.function(*given)
                return tape.gradient(tf.nest.flatten(outputs), given, output_gradients=upstream)

            return (outputs, statistics), gradients

        return run(*tensors)

    def rematerialized(self, inputs):
        """Runs the block in the graph of the step, where its batch norms exchange statistics.

        Args:
            inputs: Its inputs.

        Returns:
            Outputs, and the statistics of its batch norms by layer.
        """
        first = dataclasses.replace(self._scope, differentiated=False)
        by_norm: dict = {}

        # Arguments cost nodes of the graph, so only tensors with gradients are arguments.
        @tf.custom_gradient
        def run(*tensors):
            outputs, statistics = self._compute(first, [*tensors, *self._weights.constant])
            by_norm.update(statistics)

            def gradients(*upstream):
                given, upstream = self._not_before(tensors, upstream)
                inputs, weights = given[: self._num_inputs], given[self._num_inputs :]
                # Otherwise TensorFlow would compute it all again before the backward pass.
                with tf.control_dependencies(upstream):
                    inputs = [tf.identity(tensor) for tensor in inputs]
                again = dataclasses.replace(self._scope, exchanged_statistics=statistics)
                with tf.GradientTape() as tape:
                    tape.watch([*inputs, *weights])
                    outputs, _ = self._compute(again, [*inputs, *weights, *self._weights.constant])
                return tape.gradient(
                    tf.nest.flatten(outputs), [*inputs, *weights], output_gradients=upstream
                )

            return outputs, gradients

        outputs = run(*inputs, *self._weights.differentiable)
        return outputs, {norm: tf.stop_gradient(batch) for norm, batch in by_norm.items()}

    def _not_before(self, tensors, upstream):
        """Tensors and upstream gradients; in compiled steps the former only once the latter are there.

        XLA would otherwise keep what the forward pass computed of the same tensors.
        """
        if not self._scope.xla_step:
            return tensors, upstream
        both = optimization_barrier([*tensors, *upstream])
        return both[: len(tensors)], both[len(tensors) :]

    def _compute(self, scope: Scope, tensors):
        """Outputs, and the statistics of batch norms by layer."""
        inputs, values = tensors[: self._num_inputs], tensors[self._num_inputs :]
        inner = dataclasses.replace(scope, **self._weights.given(values))
        outputs = self._function(*self._layers, *inputs, scope=inner)
        norms = [norm for norm in self._weights.norms if norm in inner.statistics]
        return outputs, {norm: inner.statistics[norm] for norm in norms}

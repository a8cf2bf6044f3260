"""Functions that identical blocks share, and blocks that are rematerialized in the backward pass.

A deep model has hundreds of blocks of a few dozen kinds. Tracing one function per kind keeps the graph
small and quick to start. A rematerialized block (gradient checkpointing) stores only its inputs for the
backward pass: Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016.

When several replicas share a batch, batch norms exchange statistics, and a shared function cannot hold
an exchange. So a block whose batch norms have not exchanged theirs yet, such as a residual cell, runs
in the graph of the step, and the smaller blocks inside it are shared instead.
"""

import dataclasses

import tensorflow as tf

from nvae_tf.config import CELLS, NO_REMAT
from nvae_tf.engine.kernels import NormalizedKernel
from nvae_tf.engine.scope import Scope
from nvae_tf.engine.weights import Weight, walk
from nvae_tf.engine.xla import optimization_barrier


class SharedFunctions:
    """A cache of traced functions, by what they compute and by the shapes and types of their inputs.

    The functions take tensors only, and belong to no particular graph, device or replica, so every
    replica and every step can call them.
    """

    def __init__(self):
        self._traced = {}
        self._graph = tf.Graph()

    def traced(self, key: tuple, function, tensors, has_gradient: bool = True):
        """Returns the function for a key and for the tensors' shapes; traces it on first use.

        Args:
            key: Hashable; identifies what the function computes.
            function: The Python function to trace, unless one was traced for this key and these shapes.
            tensors: Tensors with the shapes and types to trace for.
            has_gradient: Whether to trace the gradient as well.

        Raises:
            ValueError: The function captures a tensor that was not passed to it.
        """
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
        key = (key, *specs)
        if key in self._traced:
            return self._traced[key]
        # Traced in a replica's graph, the function and its gradient would be bound to that replica's
        # device. All functions share one graph, because TensorFlow traces and compiles an XLA region
        # once per graph.
        with self._graph.as_default():
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
        self._traced[key] = traced
        return traced


def call_shared(function, tensors, scope: Scope, *, has_gradient: bool = True, **settings):
    """Computes ``function(*tensors, **settings)``, sharing one trace per settings and shapes.

    Args:
        function: A function of tensors and settings, defined in a module or class.
        tensors: The tensors that it is called with.
        scope: Gives the cache of shared functions; without one, the function is simply called.
        has_gradient: Whether gradients are taken through the call.
        settings: Hashable keyword arguments.
    """

    def with_settings(*tensors):
        return function(*tensors, **settings)

    if scope.functions is None:
        return with_settings(*tensors)
    key = (*_name_of(function), *settings.items())
    return scope.functions.traced(key, with_settings, tensors, has_gradient)(*tensors)


def call_block(function, layers, inputs, scope: Scope, *, uses=None, remat_when=CELLS):
    """Runs ``function(*layers, *inputs, scope=scope)``, shared and rematerialized as the scope says.

    Args:
        function: A function of layers, tensors and a scope, defined in a module or class. It must use
            no other tensors or weights.
        layers: The layers to pass; together with the function they decide which blocks are identical.
        inputs: The tensors to pass.
        scope: Says whether functions are shared and what is rematerialized.
        uses: The built layers whose weights the function reads; default: `layers`.
        remat_when: The value of `Scope.rematerialize` for which the block is rematerialized.

    Returns:
        The function's result: tensors, or a structure of tensors.
    """
    rematerialize = scope.rematerialize == remat_when
    if not rematerialize and scope.functions is None:
        return function(*layers, *inputs, scope=scope)
    inner = dataclasses.replace(scope, rematerialize=NO_REMAT) if rematerialize else scope
    block = _Block(function, layers, layers if uses is None else uses, len(inputs), inner)
    if not (scope.exchanges_statistics and block.norms) and scope.functions is not None:
        key = (*_name_of(function), *map(trace_key, layers), scope.settings)
        run = block.rematerialized_alone if rematerialize else block.run_alone
        tensors = [*inputs, *block.differentiable, *block.constant]
        outputs, vectors = scope.functions.traced(key, run, tensors)(*tensors)
        sizes = [norm.statistics_size for norm in block.norms]
        parts = tf.split(vectors[0], sizes) if vectors else []
        statistics = dict(zip(block.norms, parts, strict=True))
    elif rematerialize:
        outputs, statistics = block.rematerialized_in_step(inputs)
    else:
        return function(*layers, *inputs, scope=scope)
    scope.statistics.update(statistics)
    return outputs


def _name_of(function) -> tuple[str, str]:
    """What identifies a function in the key of a shared trace: its module and qualified name."""
    if "<" in function.__qualname__:  # two of them can have the same name
        raise ValueError(f"{function.__qualname__}: lambdas and inner functions cannot be shared")
    return function.__module__, function.__qualname__


def trace_key(layer) -> tuple:
    """Everything besides tensors that a layer's computation depends on: type and config; hashable."""
    config = layer.get_config()
    ignored = ("name", "trainable", "dtype")  # keys of Keras that our layers do not use
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


class _Block:
    """A block as functions of tensors: its inputs, and what it reads besides them.

    Args:
        function: As for `call_block`.
        layers: As for `call_block`.
        uses: The built layers whose weights the function reads.
        num_inputs: Number of inputs.
        scope: The scope in which the block is run.

    Attributes:
        norms: The block's batch norms whose batch statistics are not in the scope yet.
        differentiable: The tensors besides the inputs that gradients are taken with respect to, in an
            order that identical blocks share: kernels, exchanged statistics and all other weights.
        constant: The scales of normalised kernels, which have no gradients.
    """

    def __init__(self, function, layers, uses, num_inputs: int, scope: Scope):
        self._function, self._layers = function, layers
        self._num_inputs, self._scope = num_inputs, scope
        contents = [content for layer in uses for content in (layer, *dict(walk(layer)).values())]
        modules = [content for content in contents if not isinstance(content, Weight)]
        norms = [module for module in modules if module.statistics_size]
        self.norms = [norm for norm in norms if norm not in scope.statistics]
        self._exchanged = [norm for norm in norms if norm in scope.statistics]
        # Kernels that were normalised beforehand replace the weights that they are computed from.
        self._convolutions = [module for module in modules if module in scope.kernels]
        kernels = [scope.kernels[convolution] for convolution in self._convolutions]
        self._scaled = [kernel.scale is not None for kernel in kernels]
        replaced = {weight for c in self._convolutions for weight in c.kernel_weights}
        self._others = [
            content
            for content in contents
            if isinstance(content, Weight)
            and content not in replaced
            and (content.trainable or not scope.training)
        ]
        self.differentiable = [kernel.kernel for kernel in kernels]
        self.differentiable += [scope.statistics[norm] for norm in self._exchanged]
        self.differentiable += [scope.value(weight) for weight in self._others]
        self.constant = [kernel.scale for kernel in kernels if kernel.scale is not None]

    def run_alone(self, *tensors):
        """Runs the block on its inputs, then `differentiable`, then `constant`; can be shared.

        Returns:
            The outputs, and a list of the batch norms' statistics as one vector without gradients, or
            of nothing. As separate outputs, each would cost the backward pass a tensor of zeros.
        """
        alone = dataclasses.replace(self._scope, functions=None, replica_row=None)
        outputs, statistics = self._compute(alone, tensors)
        parts = [*statistics.values()]
        return outputs, [tf.stop_gradient(tf.concat(parts, 0))] if parts else []

    def rematerialized_alone(self, *tensors):
        """As `run_alone`, but only the arguments are stored for the backward pass."""

        @tf.custom_gradient
        def rematerialized(*tensors):
            outputs, statistics = self.run_alone(*tensors)

            def gradients(*upstream):
                # The statistics come last and have no gradients.
                upstream = upstream[: len(upstream) - len(statistics)]
                given, upstream = self._not_before(tensors, upstream)
                with tf.GradientTape() as tape:
                    tape.watch(given)
                    outputs, _ = self.run_alone(*given)
                return tape.gradient(tf.nest.flatten(outputs), given, output_gradients=upstream)

            return (outputs, statistics), gradients

        return rematerialized(*tensors)

    def rematerialized_in_step(self, inputs):
        """Runs the block rematerialized in the graph of the step, where batch norms can exchange.

        Args:
            inputs: The block's inputs.

        Returns:
            The outputs, and the batch norms' statistics by layer.
        """
        first = dataclasses.replace(self._scope, differentiated=False)
        by_norm: dict = {}

        # Every argument costs graph nodes, so only tensors with gradients are arguments.
        @tf.custom_gradient
        def rematerialized(*tensors):
            outputs, statistics = self._compute(first, [*tensors, *self.constant])
            by_norm.update(statistics)

            def gradients(*upstream):
                given, upstream = self._not_before(tensors, upstream)
                inputs, weights = given[: self._num_inputs], given[self._num_inputs :]
                # Otherwise TensorFlow could rerun the block before the backward pass reaches it.
                with tf.control_dependencies(upstream):
                    inputs = [tf.identity(tensor) for tensor in inputs]
                again = dataclasses.replace(self._scope, exchanged_statistics=statistics)
                with tf.GradientTape() as tape:
                    tape.watch([*inputs, *weights])
                    outputs, _ = self._compute(again, [*inputs, *weights, *self.constant])
                return tape.gradient(
                    tf.nest.flatten(outputs), [*inputs, *weights], output_gradients=upstream
                )

            return outputs, gradients

        outputs = rematerialized(*inputs, *self.differentiable)
        return outputs, {norm: tf.stop_gradient(batch) for norm, batch in by_norm.items()}

    def _not_before(self, tensors, upstream):
        """Returns both; in compiled steps the tensors become available only after the gradients.

        Without this, XLA would recognise the recomputation and keep the forward pass's values instead.
        """
        if not self._scope.xla_step:
            return tensors, upstream
        both = optimization_barrier([*tensors, *upstream])
        return both[: len(tensors)], both[len(tensors) :]

    def _compute(self, scope: Scope, tensors):
        """The outputs, and the batch norms' statistics by layer; tensors as for `run_alone`."""
        inputs, rest = tensors[: self._num_inputs], iter(tensors[self._num_inputs :])
        kernels = [next(rest) for _ in self._convolutions]
        exchanged = {norm: next(rest) for norm in self._exchanged}
        values = {weight: next(rest) for weight in self._others}
        scales = [next(rest) if scaled else None for scaled in self._scaled]
        normalized = map(NormalizedKernel, kernels, scales)
        inner = dataclasses.replace(
            scope,
            kernels=dict(zip(self._convolutions, normalized, strict=True)),
            statistics=exchanged,
            values=values,
        )
        outputs = self._function(*self._layers, *inputs, scope=inner)
        norms = [norm for norm in self.norms if norm in inner.statistics]
        return outputs, {norm: inner.statistics[norm] for norm in norms}

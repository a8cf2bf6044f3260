"""Kernels of a step: normalised once, and their largest singular values, by power iteration."""

import collections
import contextlib
import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from nvae_tf.devices import own_copy
from nvae_tf.layers.base import fresh_seed, read_stacked
from nvae_tf.layers.compiled import compiled_part, compiled_parts, compiles_parts
from nvae_tf.layers.convolution import (
    NORM_EPSILON,
    Convolution,
    SharedKernel,
    scale_to,
    shared_kernels,
)
from nvae_tf.training.stacked import variable_names

ITERATIONS = 4  # a step
WARM_UP_ITERATIONS = 36  # more, before the first step
MINIMUM_NORM = 1e-3
LARGE = 2**20  # values in a stack from which on passes over it are compiled, on CPUs


class SpectralNorms(tf.Module):
    """Singular vectors of every convolution's effective kernel, and the sum of spectral norms.

    Kernels of one shape are computed with together, as one stack: that is what keeps the graph of a
    deep model small.

    Args:
        convolutions: built convolutions.

    Reference: NVAE paper, section 3.2 ("spectral regularization"); Yoshida & Miyato, 2017.
    """

    def __init__(self, convolutions: list[Convolution]):
        super().__init__()
        self.groups = group_alike(convolutions)
        self.left, self.right = [], []  # u (n, outputs) and v (n, inputs) of each group
        for group in self.groups:
            *inputs, outputs = group[0].kernel.shape
            for vectors, size in (
                (self.left, outputs),
                (self.right, inputs[0] * inputs[1] * inputs[2]),
            ):
                drawn = tf.random.stateless_normal((len(group), size), fresh_seed())
                vectors.append(
                    tf.Variable(
                        drawn / tf.norm(drawn, axis=1, keepdims=True),
                        trainable=False,
                        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                    )
                )

    @contextlib.contextmanager
    def shared_kernels(self, iterations: int = ITERATIONS):
        """Within the block, the convolutions use kernels whose scales are computed here, once.

        Args:
            iterations: power iterations, from the stored vectors.

        Yields:
            The sum of ``u' W v`` over all kernels, a scalar whose gradient reaches the kernels alone,
            not the vectors; and the iterated vectors, for `keep`.
        """
        weights = list(map(_weights, self.groups))
        stacks = [_scale(*map(tf.stop_gradient, tensors)) for tensors in weights]
        left, right = ([v.read_value() for v in vectors] for vectors in (self.left, self.right))
        left, right = _iterate(stacks, left, right, iterations)
        totals, kernels = [], {}
        for group, *found in zip(self.groups, weights, stacks, left, right, strict=True):
            total, apart, scales = _differentiable(*found)
            totals.append(total)
            kernels.update(zip(group, map(SharedKernel, apart, scales), strict=True))
        with shared_kernels(kernels):
            yield tf.add_n(totals), left + right

    def names(self, root) -> list[list[str]]:
        """What the kernels of each group are called (see `Stacked.names`)."""
        names = variable_names(root)
        return [[names[layer.kernel.ref()] for layer in group] for group in self.groups]

    def keep(self, vectors, condition=True) -> None:
        """Stores iterated vectors, where the condition (a scalar) holds."""
        for variable, value in zip(self.left + self.right, vectors, strict=True):
            own_copy(variable).assign(tf.where(condition, value, variable))


def group_alike(convolutions) -> list[list[Convolution]]:
    """Groups built convolutions by kernel shape and kind of normalisation, keeping their order."""
    groups = collections.defaultdict(list)
    for layer in convolutions:
        kind = (tuple(layer.kernel.shape), layer.weight_norm, layer.mask is not None)
        groups[kind].append(layer)
    return list(groups.values())


def _weights(group):
    """Masked kernels of a group (n, k, k, inputs, outputs); and log-norms (n, outputs), if any."""
    kernels = read_stacked([layer.kernel for layer in group])
    if group[0].mask:
        kernels = kernels * np.stack([layer.kernel_mask for layer in group])
    if not group[0].weight_norm:
        return [kernels]
    return [kernels, read_stacked([layer.log_norm for layer in group])]


class _Stack(NamedTuple):
    """Kernels of a group, and what normalises them, without gradients.

    Attributes:
        kernels: masked, (n, k, k, inputs, outputs).
        norm: of each output channel, (n, outputs); None without weight norm.
        scale: what brings it to the norm wanted, (n, outputs); None without weight norm.
    """

    kernels: tf.Tensor
    norm: tf.Tensor | None = None
    scale: tf.Tensor | None = None

    def times(self, left):
        """Products W' u, (n, k * k * inputs), of vectors (n, outputs)."""
        return tf.linalg.matvec(self._matrices, left if self.scale is None else self.scale * left)

    def transposed_times(self, right):
        """Products W v, (n, outputs), of vectors (n, k * k * inputs)."""
        products = tf.linalg.matvec(self._matrices, right, transpose_a=True)
        return products if self.scale is None else self.scale * products

    @property
    def size(self) -> int:
        """Values of all kernels."""
        return self.kernels.shape.num_elements()

    @property
    def _matrices(self):
        count, *_, outputs = self.kernels.shape
        return tf.reshape(self.kernels, [count, -1, outputs])


def _scale(kernels, log_norm=None) -> _Stack:
    if log_norm is None:
        return _Stack(kernels)
    norm = _norms(kernels)
    return _Stack(kernels, norm, scale_to(log_norm, norm))


@functools.partial(compiled_part, worthwhile=LARGE)
def _norms(kernels):
    return tf.sqrt(tf.reduce_sum(tf.square(kernels), [1, 2, 3]))


def _iterate(stacks, left, right, iterations):
    """Lists of u and of v of every stack, after so many power iterations."""
    vectors = list(zip(left, right, strict=True))
    for run, large in ((_iterate_large, True), (_iterate_alike, False)):
        places = [i for i, stack in enumerate(stacks) if large == (stack.size >= LARGE)]
        if places:
            own = ([values[i] for i in places] for values in (stacks, left, right))
            found = zip(*run(*own, tf.constant(iterations)), strict=True)
            for place, pair in zip(places, found, strict=True):
                vectors[place] = pair
    left, right = zip(*vectors, strict=True)
    return list(left), list(right)


def _iterate_alike(stacks, left, right, iterations):
    def iterate(left, _):
        right = [_unit(stack.times(u)) for stack, u in zip(stacks, left, strict=True)]
        left = [_unit(stack.transposed_times(v)) for stack, v in zip(stacks, right, strict=True)]
        return left, right

    return tf.while_loop(lambda *_: True, iterate, (left, right), maximum_iterations=iterations)


# One part for all large stacks compiles faster than one for each; all others are not worth it.
_iterate_large = compiled_part(_iterate_alike)


def _unit(vectors):
    return tf.math.l2_normalize(vectors, axis=-1, epsilon=MINIMUM_NORM**2)


def _differentiable(weights, stack: _Stack, left, right):
    """What of a stack depends on its weights.

    Returns:
        The sum of spectral norms, a scalar; its kernels, and their scales or Nones. The kernels get
        the gradients of effective kernels (see `SharedKernel`). Those are carried back through scales
        and spectral norms here, a stack in one go.
    """
    compiled = compiles_parts()

    @tf.custom_gradient
    def run(*_):
        def gradient(of_total, of_effective):
            with compiled_parts(compiled):
                return _gradients(of_effective, of_total * left, right, stack)

        total = tf.reduce_sum(stack.times(left) * right)
        return (total, stack.kernels), gradient

    total, kernels = run(*weights)
    scales = [None] * kernels.shape[0] if stack.scale is None else tf.unstack(stack.scale)
    return total, tf.unstack(kernels), scales


@functools.partial(compiled_part, worthwhile=LARGE)
def _gradients(of_effective, left, right, stack: _Stack):
    """Gradients of a stack's kernels, and of its norms' logarithms where it has them.

    Args:
        of_effective: of the effective kernels, but for the spectral norms' ``left' W right``.
        left: u, times the gradient of the spectral norms, (n, outputs).
        right: v, (n, k * k * inputs).
        stack: whose weights they are.
    """

    def wide(per_output):
        return per_output[:, None, None, None, :]

    kernels, norm, scale = stack
    of_effective += tf.reshape(right, [*kernels.shape[:-1], 1]) * wide(left)
    if norm is None:
        return [of_effective]
    of_scale = tf.reduce_sum(of_effective * kernels, [1, 2, 3])
    of_norm = -of_scale * scale / (norm + NORM_EPSILON)
    through_norm = kernels * wide(tf.math.divide_no_nan(of_norm, norm))
    return [of_effective * wide(scale) + through_norm, of_scale * scale]

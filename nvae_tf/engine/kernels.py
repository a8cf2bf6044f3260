"""Kernels of a step: weight normalisation and spectral norms, for all kernels of a shape at once.

Weight normalisation is written as ``effective = kernel * scale``, and its gradient has two halves, both
in this file. Where a kernel convolves, `NormalizedKernel.effective` hands the gradient with respect to
the effective kernel on as it is. `_kernel_gradients` then applies the chain rule through scales and
spectral norms, once per stack of kernels.
"""

import collections
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from nvae_tf.engine.state import VariableState
from nvae_tf.engine.weights import fresh_seed, stacked
from nvae_tf.engine.xla import xla_region

NORM_EPSILON = 1e-5
ITERATIONS = 4  # power iterations per step
WARM_UP_ITERATIONS = 36  # further ones before the first step
MINIMUM_NORM = 1e-3
LARGE = 2**20  # passes over stacks with at least this many elements are compiled on CPUs


def normalize(kernel, log_norm):
    """Weight normalisation of one kernel, with its ordinary gradient.

    Args:
        kernel: (k, k, in, out), masked already.
        log_norm: Natural logarithms of the norms wanted, (out,).
    """
    return kernel * weight_norm_scale(log_norm, kernel_norm(kernel))


def kernel_norm(kernel):
    """The norm of each output channel's part of a kernel (k, k, in, out): (out,)."""
    return tf.sqrt(tf.reduce_sum(tf.square(kernel), [0, 1, 2]))


def weight_norm_scale(log_norm, norm):
    """The factor that brings output channels of these norms to those wanted, given as logarithms."""
    return tf.exp(log_norm) / (norm + NORM_EPSILON)


class NormalizedKernel(NamedTuple):
    """What a convolution's effective kernel is made from, where that is computed for many at once.

    Only those effective kernels exist that are in use: a kernel and its scales are multiplied where
    they convolve.

    Attributes:
        kernel: Masked, (k, k, input channels per group, output channels). The gradient that it gets is
            the gradient with respect to the *effective* kernel.
        scale: Factor of each output channel, (output channels,); None without weight norm. It gets no
            gradient.
    """

    kernel: tf.Tensor
    scale: tf.Tensor | None = None

    @property
    def effective(self):
        """The kernel that convolves."""
        return self.kernel if self.scale is None else _scaled(self.kernel, self.scale)


@tf.custom_gradient
def _scaled(kernel, scale):
    # The first half of the gradient; the second is `_kernel_gradients`.
    return kernel * scale, lambda upstream: (upstream, None)


class SpectralNorms(tf.Module):
    """Singular vectors of every convolution's effective kernel, and the sum of spectral norms.

    Args:
        convolutions: Built convolutions.

    Attributes:
        groups: The convolutions whose kernels are one stack here: of one shape and normalisation.
        left: Left singular vectors u (n, outputs) of each group, variables.
        right: Right singular vectors v (n, k * k * inputs) of each group, variables.

    Reference: NVAE paper, section 3.2 ("spectral regularization"); Yoshida & Miyato, 2017.
    """

    def __init__(self, convolutions):
        super().__init__()
        self.groups = group_by_kind(convolutions)
        self.left, self.right = [], []
        for group in self.groups:
            *inputs, outputs = group[0].kernel.shape
            for vectors, size in ((self.left, outputs), (self.right, np.prod(inputs))):
                drawn = tf.random.stateless_normal((len(group), size), fresh_seed())
                vectors.append(
                    tf.Variable(
                        drawn / tf.norm(drawn, axis=1, keepdims=True),
                        trainable=False,
                        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                    )
                )

    @property
    def vectors(self) -> list[tf.Variable]:
        """All singular vectors, left ones first."""
        return [*self.left, *self.right]

    def normalized_kernels(
        self, tensors: Mapping, xla: bool, iterations: int = ITERATIONS, state=None
    ):
        """Normalises all kernels, and computes their spectral norms.

        Args:
            tensors: Tensors that stand for the stacks of weights, by reference (see `rows_of`);
                gradients are taken with respect to them.
            xla: Whether to compile what is large (see `nvae_tf.engine.xla`).
            iterations: Power iterations, from the stored vectors.
            state: Where the stored vectors are read (`nvae_tf.engine.state`); default: in their
                variables.

        Returns:
            The sum of ``u' W v`` over all kernels, a scalar whose gradient reaches the kernels alone,
            not the vectors; a dictionary from convolution to `NormalizedKernel`; and the iterated
            vectors, for `update_vectors`.
        """
        weights = [_weights(group, tensors) for group in self.groups]
        stacks = [_scale(*map(tf.stop_gradient, group), xla=xla) for group in weights]
        value = (state or VariableState()).value
        left, right = ([value(v) for v in vectors] for vectors in (self.left, self.right))
        left, right = _iterate(stacks, left, right, iterations, xla)
        totals, kernels = [], {}
        for number, group in enumerate(self.groups):
            total, parts, scales = _differentiable(
                weights[number], stacks[number], left[number], right[number], xla
            )
            totals.append(total)
            kernels.update(zip(group, map(NormalizedKernel, parts, scales), strict=True))
        return tf.add_n(totals), kernels, [*left, *right]

    def update_vectors(self, vectors, condition=True, state=None) -> None:
        """Stores iterated vectors.

        Args:
            vectors: What `normalized_kernels` returned last.
            condition: A scalar; where it is false nothing changes.
            state: As for `normalized_kernels`.
        """
        state = state or VariableState()
        for variable, value in zip(self.vectors, vectors, strict=True):
            state.assign(variable, tf.where(condition, value, state.value(variable)))

    def layout(self, names: Mapping) -> list[list[str]]:
        """The names of the kernels of each group.

        Args:
            names: Each weight's name.
        """
        return [[names[layer.kernel] for layer in group] for group in self.groups]


def group_by_kind(convolutions) -> list[list]:
    """Groups built convolutions by kernel shape and kind of normalisation, keeping their order."""
    groups = collections.defaultdict(list)
    for layer in convolutions:
        kind = (tuple(layer.kernel.shape), layer.weight_norm, layer.mask is not None)
        groups[kind].append(layer)
    return list(groups.values())


def _weights(group, tensors):
    """Masked kernels of a group (n, k, k, inputs, outputs); and log-norms (n, outputs), if any."""
    kernels = stacked([layer.kernel for layer in group], tensors)
    if group[0].mask:
        kernels = kernels * np.stack([layer.kernel_mask for layer in group])
    if not group[0].weight_norm:
        return [kernels]
    return [kernels, stacked([layer.log_norm for layer in group], tensors)]


class _Stack(NamedTuple):
    """Kernels of a group, and what normalises them, without gradients.

    Attributes:
        kernels: Masked, (n, k, k, inputs, outputs).
        norm: Norm of each output channel, (n, outputs); None without weight norm.
        scale: Factor that brings it to the norm wanted, (n, outputs); None without weight norm.
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
        """Elements of all kernels."""
        return self.kernels.shape.num_elements()

    @property
    def _matrices(self):
        count, *_, outputs = self.kernels.shape
        return tf.reshape(self.kernels, [count, -1, outputs])


def _scale(kernels, log_norm=None, *, xla) -> _Stack:
    if log_norm is None:
        return _Stack(kernels)
    norm = _norms(kernels, compile=xla)
    return _Stack(kernels, norm, weight_norm_scale(log_norm, norm))


@functools.partial(xla_region, min_size=LARGE)
def _norms(kernels):
    return tf.sqrt(tf.reduce_sum(tf.square(kernels), [1, 2, 3]))


def _iterate(stacks, left, right, iterations, xla):
    """Lists of u and of v of every stack, after so many power iterations."""
    vectors = list(zip(left, right, strict=True))
    # One region for all large stacks compiles faster than one for each; small ones are not worth it.
    for large in (True, False):
        places = [i for i, stack in enumerate(stacks) if large == (stack.size >= LARGE)]
        if places:
            chosen = ([values[i] for i in places] for values in (stacks, left, right))
            new_left, new_right = _power_iterations(
                *chosen, tf.constant(iterations), compile=large and xla
            )
            for place, *pair in zip(places, new_left, new_right, strict=True):
                vectors[place] = tuple(pair)
    left, right = zip(*vectors, strict=True)
    return list(left), list(right)


@xla_region
def _power_iterations(stacks, left, right, iterations):
    def iterate(left, _):
        right = [_unit(stack.times(u)) for stack, u in zip(stacks, left, strict=True)]
        left = [_unit(stack.transposed_times(v)) for stack, v in zip(stacks, right, strict=True)]
        return left, right

    return tf.while_loop(lambda *_: True, iterate, (left, right), maximum_iterations=iterations)


def _unit(vectors):
    return tf.math.l2_normalize(vectors, axis=-1, epsilon=MINIMUM_NORM**2)


def _differentiable(weights, stack: _Stack, left, right, xla):
    """The outputs for one stack that have gradients: its sum of spectral norms, and its kernels.

    Returns:
        The sum, a scalar; the kernels, and their scales or Nones. The kernels get the gradients with
        respect to effective kernels (see `NormalizedKernel`).
    """

    @tf.custom_gradient
    def run(*_):
        def gradient(d_total, d_effective):
            return _kernel_gradients(d_effective, d_total * left, right, stack, compile=xla)

        total = tf.reduce_sum(stack.times(left) * right)
        return (total, stack.kernels), gradient

    total, kernels = run(*weights)
    scales = [None] * kernels.shape[0] if stack.scale is None else tf.unstack(stack.scale)
    return total, tf.unstack(kernels), scales


@functools.partial(xla_region, min_size=LARGE)
def _kernel_gradients(d_effective, left, right, stack: _Stack):
    """The second half of the gradient: through scales and spectral norms, to a stack's weights.

    Args:
        d_effective: Gradient with respect to the effective kernels, but for that of the spectral norms
            ``u' W v``.
        left: u, times the gradient of the spectral norms, (n, outputs).
        right: v, (n, k * k * inputs).
        stack: The kernels.

    Returns:
        Gradients of the kernels, and of the logarithms of their norms where they are normalised.
    """

    def wide(per_output):
        return per_output[:, None, None, None, :]

    kernels, norm, scale = stack
    # Otherwise TensorFlow computes these products, as large as the kernels, before the forward pass.
    with tf.control_dependencies([d_effective]):
        right, left = tf.identity(right), tf.identity(left)
    d_effective += tf.reshape(right, [*kernels.shape[:-1], 1]) * wide(left)
    if norm is None:
        return [d_effective]
    d_scale = tf.reduce_sum(d_effective * kernels, [1, 2, 3])
    d_norm = -d_scale * scale / (norm + NORM_EPSILON)
    through_norm = kernels * wide(tf.math.divide_no_nan(d_norm, norm))
    return [d_effective * wide(scale) + through_norm, d_scale * scale]

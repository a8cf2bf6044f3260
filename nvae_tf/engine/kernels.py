"""Weight normalisation and spectral norms of a step, for all kernels of one shape at once.

Weight normalisation is written as ``effective = kernel * scale``. Its gradient is computed in two
halves, both in this file. In a convolution, `NormalizedKernel.effective` passes the gradient with
respect to the effective kernel on unchanged. `_kernel_gradients` then applies the chain rule through
scales and spectral norms, once per stack of kernels.
"""

import collections
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from nvae_tf.engine.state import VariableState
from nvae_tf.engine.weights import fresh_seed, stacked
from nvae_tf.engine.xla import LARGE_STACK, xla_region

NORM_EPSILON = 1e-5
ITERATIONS = 4  # power iterations per step
WARM_UP_ITERATIONS = 36  # additional iterations before the first step
MINIMUM_NORM = 1e-3


def normalize(kernel, log_norm):
    """Applies weight normalisation to one kernel, with TensorFlow's own gradient.

    Args:
        kernel: Kernel (k, k, in, out), already masked.
        log_norm: Natural logarithm of each output channel's target norm, (out,).
    """
    return kernel * weight_norm_scale(log_norm, kernel_norm(kernel))


def kernel_norm(kernel):
    """The Euclidean norm of each output channel, (out,), of a kernel (k, k, in, out)."""
    return tf.sqrt(tf.reduce_sum(tf.square(kernel), [0, 1, 2]))


def weight_norm_scale(log_norm, norm):
    """The factor that rescales output channels from `norm` to their target norms ``exp(log_norm)``."""
    return tf.exp(log_norm) / (norm + NORM_EPSILON)


class NormalizedKernel(NamedTuple):
    """A kernel and the scales that normalise it, computed beforehand for many convolutions at once.

    Kernel and scales are multiplied only when the convolution runs, so that no more effective kernels
    are in memory than are in use.

    Attributes:
        kernel: Masked kernel, (k, k, input channels per group, output channels). The gradient that it
            receives is the one with respect to the *effective* kernel.
        scale: Factor for each output channel, (output channels,); None without weight norm. It
            receives no gradient.
    """

    kernel: tf.Tensor
    scale: tf.Tensor | None = None

    @property
    def effective(self):
        """The normalised kernel, shaped as `kernel`."""

        @tf.custom_gradient
        def scaled(kernel, scale):
            # The first half of the gradient; the second is `_kernel_gradients`.
            return kernel * scale, lambda upstream: (upstream, None)

        return self.kernel if self.scale is None else scaled(self.kernel, self.scale)


class SpectralNorms(tf.Module):
    """The singular vectors of all effective kernels, and the sum of the kernels' spectral norms.

    Args:
        convolutions: Built convolutions.

    Attributes:
        groups: The convolutions, grouped by kernel shape and kind of normalisation. The kernels of a
            group are computed as one stack.
        left: One variable per group: left singular vectors u, (n, outputs).
        right: One variable per group: right singular vectors v, (n, k * k * inputs).

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
            tensors: Tensors used in place of the stacks of weights, by the stacks' references (see
                `rows_of`). Gradients are taken with respect to these tensors.
            xla: Whether to compile the passes over large stacks (see `nvae_tf.engine.xla`).
            iterations: Number of power iterations, starting from the stored vectors.
            state: Where the stored vectors are read (`nvae_tf.engine.state`); default: from their
                variables.

        Returns:
            The sum of ``u' W v`` over all kernels, a scalar that is differentiated with respect to the
            kernels but not the vectors; a dictionary from convolution to `NormalizedKernel`; and the
            iterated vectors, for `update_vectors`.
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
        """Stores the iterated singular vectors.

        Args:
            vectors: The vectors that `normalized_kernels` returned.
            condition: A boolean scalar; if it is false, nothing changes.
            state: As for `normalized_kernels`.
        """
        state = state or VariableState()
        for variable, value in zip(self.vectors, vectors, strict=True):
            state.assign(variable, tf.where(condition, value, state.value(variable)))

    def layout(self, names: Mapping) -> list[list[str]]:
        """The names of the kernels, group by group.

        Args:
            names: Dictionary from `Weight` to its name.
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
    """A group's masked kernels (n, k, k, inputs, outputs), and its log-norms (n, outputs), if any."""
    kernels = stacked([layer.kernel for layer in group], tensors)
    if group[0].mask:
        kernels = kernels * np.stack([layer.kernel_mask for layer in group])
    if not group[0].weight_norm:
        return [kernels]
    return [kernels, stacked([layer.log_norm for layer in group], tensors)]


class _KernelStack(NamedTuple):
    """The kernels of a group, with their norms and scales, all without gradients.

    Attributes:
        kernels: Masked kernels, (n, k, k, inputs, outputs).
        norm: Norm of each output channel, (n, outputs); None without weight norm.
        scale: Factor from that norm to the target norm, (n, outputs); None without weight norm.
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


def _scale(kernels, log_norm=None, *, xla) -> _KernelStack:
    if log_norm is None:
        return _KernelStack(kernels)
    norm = _norms(kernels, compile=xla)
    return _KernelStack(kernels, norm, weight_norm_scale(log_norm, norm))


@functools.partial(xla_region, min_size=LARGE_STACK)
def _norms(kernels):
    return tf.sqrt(tf.reduce_sum(tf.square(kernels), [1, 2, 3]))


def _iterate(stacks, left, right, iterations, xla):
    """Lists of u and of v, one tensor per stack, after the given number of power iterations."""
    vectors = list(zip(left, right, strict=True))
    # One region for all large stacks compiles faster than one per stack. Small stacks are not compiled.
    for large in (True, False):
        places = [i for i, stack in enumerate(stacks) if large == (stack.size >= LARGE_STACK)]
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


def _differentiable(weights, stack: _KernelStack, left, right, xla):
    """The differentiable outputs for one stack: its sum of spectral norms, and its kernels.

    Returns:
        The sum, a scalar; a list of kernels; and a list of their scales, or of Nones. The kernels
        receive gradients with respect to the effective kernels (see `NormalizedKernel`).
    """

    @tf.custom_gradient
    def total_and_kernels(*_):
        def gradient(d_total, d_effective):
            return _kernel_gradients(d_effective, d_total * left, right, stack, compile=xla)

        total = tf.reduce_sum(stack.times(left) * right)
        return (total, stack.kernels), gradient

    total, kernels = total_and_kernels(*weights)
    scales = [None] * kernels.shape[0] if stack.scale is None else tf.unstack(stack.scale)
    return total, tf.unstack(kernels), scales


@functools.partial(xla_region, min_size=LARGE_STACK)
def _kernel_gradients(d_effective, left, right, stack: _KernelStack):
    """The second half of the gradient: through scales and spectral norms, to a stack's weights.

    Args:
        d_effective: Gradient with respect to the effective kernels, (n, k, k, inputs, outputs), without
            the part that comes from the spectral norms ``u' W v``.
        left: u times the gradient with respect to the sum of spectral norms, (n, outputs).
        right: v, (n, k * k * inputs).
        stack: The kernels of the group.

    Returns:
        Gradients with respect to the kernels and, with weight norm, to their log-norms.
    """

    def wide(per_output):
        return per_output[:, None, None, None, :]

    kernels, norm, scale = stack
    # Otherwise TensorFlow computes the outer products below, which are as large as the kernels, before
    # the forward pass.
    with tf.control_dependencies([d_effective]):
        right, left = tf.identity(right), tf.identity(left)
    d_effective += tf.reshape(right, [*kernels.shape[:-1], 1]) * wide(left)
    if norm is None:
        return [d_effective]
    d_scale = tf.reduce_sum(d_effective * kernels, [1, 2, 3])
    d_norm = -d_scale * scale / (norm + NORM_EPSILON)
    through_norm = kernels * wide(tf.math.divide_no_nan(d_norm, norm))
    return [d_effective * wide(scale) + through_norm, d_scale * scale]

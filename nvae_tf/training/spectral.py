"""Spectral regularisation: the largest singular value of every kernel, by power iteration."""

import tensorflow as tf

from nvae_tf.devices import own_copy
from nvae_tf.layers.base import fresh_seed
from nvae_tf.layers.compiled import compiled_part
from nvae_tf.layers.convolution import Convolution, KernelStack, group_alike

ITERATIONS = 4  # a step
WARM_UP_ITERATIONS = 36  # more, before the first step
MINIMUM_NORM = 1e-3


class SpectralNorms(tf.Module):
    """Singular vectors of every convolution's effective kernel, and the sum of spectral norms.

    Kernels of one shape are iterated together, as one stack of matrices (output channels, inputs).

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

    def sum(self, stacks: list[KernelStack], iterations: int = ITERATIONS):
        """Sums ``u' W v`` over all kernels, for vectors iterated from the stored ones.

        Args:
            stacks: effective kernels of the groups, from `shared_kernels(self.groups)`.
            iterations: power iterations.

        Returns:
            A scalar, whose gradient reaches the kernels alone, not the vectors; and the vectors, for
            `keep`.
        """
        matrices = [  # (n, inputs, outputs): transposes of the matrices W
            tf.reshape(stack.kernels, [*right.shape, -1])
            for stack, right in zip(stacks, self.right, strict=True)
        ]
        left = [vectors.read_value() for vectors in self.left]
        right = [vectors.read_value() for vectors in self.right]
        return _iterated(matrices, left, right, iterations)

    def keep(self, vectors, condition=True) -> None:
        """Stores iterated vectors, where the condition (a scalar) holds."""
        for variable, value in zip(self.left + self.right, vectors, strict=True):
            own_copy(variable).assign(tf.where(condition, value, variable))


def _iterated(matrices, left, right, iterations):
    """Sum of ``u' W v`` over stacks of matrices, with a gradient for them alone, and new vectors."""

    @tf.custom_gradient
    def run(*matrices):
        norm, us, vs = _power_iterations(matrices, left, right, tf.constant(iterations))

        def gradient(upstream, *_):
            return [v[:, :, None] * (upstream * u)[:, None, :] for u, v in zip(us, vs, strict=True)]

        return (norm, *us, *vs), gradient

    norm, *vectors = run(*matrices)
    return norm, vectors


# All stacks are one part, which compiles faster than one for each.
@compiled_part
def _power_iterations(matrices, left, right, iterations):
    found = [
        _iterate_stack(*stack, iterations) for stack in zip(matrices, left, right, strict=True)
    ]
    norms, left, right = zip(*found, strict=True)
    return tf.add_n(norms), list(left), list(right)


def _iterate_stack(matrices, left, right, iterations):
    def iterate(left, _):
        right = _unit(tf.linalg.matvec(matrices, left))
        return _unit(tf.linalg.matvec(matrices, right, transpose_a=True)), right

    left, right = tf.while_loop(
        lambda *_: True, iterate, (left, right), maximum_iterations=iterations
    )
    return tf.reduce_sum(tf.linalg.matvec(matrices, left) * right), left, right


def _unit(vectors):
    norm = tf.norm(vectors, axis=-1, keepdims=True)
    return vectors / tf.maximum(norm, MINIMUM_NORM)

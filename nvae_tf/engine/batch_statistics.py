"""Batch statistics of a layer over all replicas that share a batch, and their gradient.

A layer needs one exchange per direction. In the forward pass every replica contributes the count, mean
and sum of centred squares of its part, and each replica combines those of all parts exactly (Chan et
al., *Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*, 1979). In the backward
pass the gradients with respect to mean and variance are summed over replicas. All arithmetic is in
float32.
"""

import tensorflow as tf

from nvae_tf.engine.replicas import sum_over_replicas
from nvae_tf.engine.scope import BatchStatistics, Scope
from nvae_tf.engine.shared_functions import call_shared
from nvae_tf.engine.xla import xla_region


def global_statistics(inputs, scope: Scope, exchanged=None):
    """The statistics of a batch over all replicas; inside a replica.

    Args:
        inputs: This replica's maps, (batch, height, width, channels).
        scope: How the layers are run.
        exchanged: The result of an earlier call for the same inputs, which saves the forward exchange;
            gradients are the same as without it.

    Returns:
        A vector (see `BatchStatistics`), whose gradient reaches the inputs of all replicas.
    """

    def exchange():
        parts = call_shared(_local_statistics, [inputs, scope.replica_row], scope)
        return call_shared(_combine, [sum_over_replicas(parts)], scope)

    @tf.custom_gradient
    def with_gradient(inputs):
        statistics = exchange() if exchanged is None else exchanged

        def gradient(upstream):
            tensors = [inputs, statistics, sum_over_replicas(upstream)]
            return call_shared(_input_gradient, tensors, scope, compile=scope.xla_regions)

        return statistics, gradient

    return with_gradient(inputs) if scope.differentiated else exchange()


def _local_statistics(inputs, replica_row):
    """Count, mean and sum of centred squares of this replica's part of the batch.

    Returns:
        A tensor (replicas, 1 + 2 * channels) with these values in this replica's row and zeros in the
        other rows, so that the sum over replicas holds the rows of all.
    """
    inputs = tf.cast(inputs, tf.float32)
    count = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)
    mean = tf.reduce_mean(inputs, [0, 1, 2])
    squares = tf.reduce_sum(tf.math.squared_difference(inputs, mean), [0, 1, 2])
    return replica_row[:, None] * tf.concat([count[None], mean, squares], 0)


def _combine(parts):
    """Combines the statistics of all parts, (replicas, 1 + 2 * channels), to those of the batch."""
    channels = (parts.shape[1] - 1) // 2
    counts, means, squares = tf.split(parts, [1, channels, channels], 1)
    count = tf.reduce_sum(counts, 0)
    mean = tf.reduce_sum(counts * means, 0) / count
    squares = tf.reduce_sum(squares + counts * tf.math.squared_difference(means, mean), 0)
    return BatchStatistics(mean, squares / count, count).vector


@xla_region
def _input_gradient(inputs, statistics, gradient):
    """The gradient of the statistics with respect to a replica's part of the batch.

    Args:
        inputs: This replica's part, (batch, height, width, channels).
        statistics: Statistics of the whole batch, as a vector.
        gradient: Gradient with respect to the statistics, summed over all replicas.
    """
    mean, _, count = BatchStatistics.from_vector(statistics)
    d_mean, d_variance, _ = BatchStatistics.from_vector(gradient / count)
    slope = 2.0 * d_variance
    d_inputs = tf.cast(inputs, tf.float32) * slope + (d_mean - mean * slope)
    return tf.cast(d_inputs, inputs.dtype)

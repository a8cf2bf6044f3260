"""Statistics of a batch that several replicas share, and what batch norm computes with them.

A layer's statistics take one exchange in each direction. Forward, every replica gives the count, the
mean and the sum of centred squares of its part, and all of them combine those of all parts exactly
(Chan et al., *Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*, 1979).
Backward, the sum of the gradients with respect to mean and variance is exchanged. All arithmetic is
float32.
"""

import tensorflow as tf

from nvae_tf.engine.replicas import sum_over_replicas
from nvae_tf.engine.scope import BatchStatistics, Scope
from nvae_tf.engine.shared_functions import call_shared


def global_statistics(inputs, scope: Scope, given: BatchStatistics | None = None):
    """The statistics of a batch over all replicas; inside a replica.

    Args:
        inputs: This replica's maps, (batch, height, width, channels).
        scope: How the layers are run.
        given: The statistics, if they were exchanged already; gradients are as without.

    Returns:
        `BatchStatistics`, whose gradients reach the inputs of all replicas.
    """

    @tf.custom_gradient
    def run(inputs):
        statistics = given
        if statistics is None:
            parts = call_shared(_local_statistics, [inputs, scope.replica_row], scope)
            statistics = call_shared(_combine, [sum_over_replicas(parts)], scope)
        mean, variance, count = statistics

        def gradient(d_mean, d_variance, _):
            sums = sum_over_replicas(tf.concat([d_mean, d_variance], 0))
            return call_shared(_input_gradient, [inputs, mean, count, sums], scope)

        return (mean, variance, count), gradient

    return BatchStatistics(*run(inputs))


def _local_statistics(inputs, replica_row):
    """Count, mean and centred squares of a replica's part, in its row of (replicas, 1 + 2 * channels).

    The other rows are zeros, so that the sum over replicas holds the rows of all.
    """
    inputs = tf.cast(inputs, tf.float32)
    count = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)
    mean = tf.reduce_mean(inputs, [0, 1, 2])
    squares = tf.reduce_sum(tf.math.squared_difference(inputs, mean), [0, 1, 2])
    return replica_row[:, None] * tf.concat([count[None], mean, squares], 0)


def _combine(parts):
    """The statistics of the whole batch, from those of its parts, (replicas, 1 + 2 * channels)."""
    channels = (parts.shape[1] - 1) // 2
    counts, means, squares = tf.split(parts, [1, channels, channels], 1)
    count = tf.reduce_sum(counts, 0)
    mean = tf.reduce_sum(counts * means, 0) / count
    squares = tf.reduce_sum(squares + counts * tf.math.squared_difference(means, mean), 0)
    return BatchStatistics(mean, squares / count, count)


def _input_gradient(inputs, mean, count, sums):
    """The gradient of the statistics with respect to a replica's part of the batch."""
    d_mean, d_variance = tf.split(sums / count, 2)
    slope = 2.0 * d_variance
    gradient = tf.cast(inputs, tf.float32) * slope + (d_mean - mean * slope)
    return tf.cast(gradient, inputs.dtype)

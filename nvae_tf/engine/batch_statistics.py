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
from nvae_tf.engine.xla import xla_region


def global_statistics(inputs, scope: Scope, exchanged=None):
    """The statistics of a batch over all replicas; inside a replica.

    Args:
        inputs: This replica's maps, (batch, height, width, channels).
        scope: How the layers are run.
        exchanged: What this returned before, if it did; gradients are as without.

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
    return BatchStatistics(mean, squares / count, count).vector


@xla_region
def _input_gradient(inputs, statistics, gradient):
    """The gradient of the statistics with respect to a replica's part of the batch.

    Args:
        inputs: The part of the batch.
        statistics: Those of the whole batch, a vector.
        gradient: With respect to the statistics, the sum over all replicas.
    """
    mean, _, count = BatchStatistics.from_vector(statistics)
    d_mean, d_variance, _ = BatchStatistics.from_vector(gradient / count)
    slope = 2.0 * d_variance
    d_inputs = tf.cast(inputs, tf.float32) * slope + (d_mean - mean * slope)
    return tf.cast(d_inputs, inputs.dtype)

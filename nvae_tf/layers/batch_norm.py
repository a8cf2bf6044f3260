"""Batch normalisation followed by an activation, with statistics over all replicas."""

import functools

import tensorflow as tf

from nvae_tf.engine.devices import local_variable, mean_over_replicas, num_replicas
from nvae_tf.engine.scope import BatchStatistics, Scope
from nvae_tf.engine.weights import by_stack
from nvae_tf.engine.xla import xla_region
from nvae_tf.layers.activations import activate
from nvae_tf.layers.base import Constant, Layer

EPSILON = 1e-5
MOMENTUM = 0.95  # portion of the running averages kept at each step; PyTorch calls this 0.05


class BatchNormAct(Layer):
    """Batch normalisation over batch, height and width, then an activation.

    In training it normalises with the biased variance of the global batch. The running variance, which
    evaluation uses, averages the unbiased variance. All of this is computed in float32.

    Args:
        activation: ``"none"``, ``"elu"`` or ``"swish"``.

    Call arguments:
        inputs: Maps (batch, height, width, channels).
        scope: How the layer is run. In training the batch's statistics are used, and stored in
            `Scope.statistics` for `update_running_averages`.

    Output shape: The input's shape.
    Reference: NVAE paper, section 3.2 ("batch normalization").
    """

    def __init__(self, activation="none", **kwargs):
        super().__init__(**kwargs)
        self.activation = activation

    def create(self, input_shape):
        """Creates scale, offset and running averages for the input's channels."""
        shape = (int(input_shape[-1]),)
        zeros, ones = Constant(0.0), Constant(1.0)
        self.gamma, self.beta = self.add_weight(shape, ones), self.add_weight(shape, zeros)
        self.moving_mean = self.add_weight(shape, zeros, trainable=False, kind="moving_mean")
        self.moving_variance = self.add_weight(shape, ones, trainable=False, kind="moving_variance")

    def compute_output_shape(self, input_shape):
        """The input's shape."""
        return input_shape

    def call(self, inputs, scope: Scope):
        """Normalises, then activates."""
        gamma, beta = scope.value(self.gamma), scope.value(self.beta)
        activated = self.activation != "none" and inputs.dtype == tf.float32
        if scope.training and activated and scope.xla_regions:  # these imply a single replica
            outputs, mean, variance = _fused_batch_norm_act(self.activation)(inputs, gamma, beta)
            scope.statistics[self] = BatchStatistics(mean, variance, _elements_per_channel(inputs))
            return outputs
        outputs = tf.cast(inputs, tf.float32)
        if scope.training:
            outputs, scope.statistics[self] = _normalize_by_batch(outputs, gamma, beta)
        else:
            running = scope.given_statistics.get(self)
            if running is None:
                running = scope.value(self.moving_mean), scope.value(self.moving_variance)
            mean, variance = running
            scale = gamma * tf.math.rsqrt(variance + EPSILON)
            outputs = outputs * scale + (beta - mean * scale)
        return activate(self.activation, tf.cast(outputs, inputs.dtype), scope.custom_gradients)

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "activation": self.activation}


def update_running_averages(
    statistics: dict[BatchNormAct, BatchStatistics], condition=True
) -> None:
    """Moves running averages towards the statistics of a batch.

    Args:
        statistics: What `Scope.statistics` holds after a training pass; identical on all replicas.
        condition: A scalar; where it is false nothing changes.
    """
    means = by_stack({norm.moving_mean: batch for norm, batch in statistics.items()})
    variances = by_stack({norm.moving_variance: batch for norm, batch in statistics.items()})
    for (mean, rows), (variance, _) in zip(means, variances, strict=True):
        places = sorted(rows)
        batches = zip(*(rows[row] for row in places), strict=True)
        batch = BatchStatistics(*map(tf.stack, batches))
        for running, statistic in ((mean, batch.mean), (variance, batch.unbiased)):
            whole = len(places) == running.shape[0]
            before = tf.convert_to_tensor(running) if whole else tf.gather(running, places)
            after = before - (1.0 - MOMENTUM) * (before - statistic)
            after = tf.where(condition, after, before)
            if not whole:  # some of the layers whose averages are rows of this stack
                after = tf.tensor_scatter_nd_update(running, [[row] for row in places], after)
            local_variable(running).assign(after)


def _normalize_by_batch(inputs, gamma, beta):
    """Inputs normalised with the statistics of the batch, and these statistics."""
    count = _elements_per_channel(inputs)
    if num_replicas() == 1:
        outputs, mean, variance, _ = _fused_batch_norm(inputs, gamma, beta)
    else:
        mean = mean_over_replicas(tf.reduce_mean(inputs, [0, 1, 2]))
        centred = inputs - mean
        variance = mean_over_replicas(tf.reduce_mean(tf.square(centred), [0, 1, 2]))
        outputs = centred * (gamma * tf.math.rsqrt(variance + EPSILON)) + beta
    return outputs, BatchStatistics(mean, variance, count)


def _elements_per_channel(inputs):
    """Number of elements per channel that the statistics are computed from, float32, (1,)."""
    count = tf.size(inputs) // inputs.shape[-1] * num_replicas()
    return tf.fill([1], tf.cast(count, tf.float32))


def _fused_batch_norm(inputs, gamma, beta):
    """Normalised inputs, mean, biased variance, and the reserved outputs for the gradient operation."""
    outputs, mean, variance, *reserved = tf.raw_ops.FusedBatchNormV3(
        x=inputs, scale=gamma, offset=beta, mean=[], variance=[], epsilon=EPSILON, is_training=True
    )
    count = _elements_per_channel(inputs)
    # The operation's variance is the unbiased one.
    return outputs, mean, variance * (count - 1.0) / count, reserved


@functools.cache
def _fused_batch_norm_act(activation: str):
    """Batch norm and activation that save only their input for the backward pass.

    Everything else that the backward pass needs is recomputed.

    Returns:
        A function from inputs, gamma and beta to outputs, and the batch's mean and biased variance,
        neither of which has a gradient.
    """

    @xla_region
    def activated(normalized):
        return activate(activation, normalized, custom_gradients=True)

    @xla_region
    def activation_gradient(inputs, gamma, beta, mean, variance, upstream):
        scale = gamma * tf.math.rsqrt(variance + EPSILON)
        normalized = inputs * scale + (beta - mean * scale)
        with tf.GradientTape() as tape:
            tape.watch(normalized)
            outputs = activate(activation, normalized, custom_gradients=True)
        return tape.gradient(outputs, normalized, upstream)

    @tf.custom_gradient
    def run(inputs, gamma, beta):
        inputs, gamma, beta = map(tf.convert_to_tensor, (inputs, gamma, beta))
        normalized, mean, variance, reserved = _fused_batch_norm(inputs, gamma, beta)
        outputs = activated(normalized, compile=True)

        def gradient(upstream, *_):
            d_normalized = activation_gradient(
                inputs, gamma, beta, mean, variance, upstream, compile=True
            )
            return tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=d_normalized, x=inputs, scale=gamma, reserve_space_1=reserved[0],
                reserve_space_2=reserved[1], reserve_space_3=reserved[2],
                epsilon=EPSILON, is_training=True,
            )[:3]  # fmt: skip

        return (outputs, mean, variance), gradient

    return run

"""Batch normalisation followed by an activation, with statistics over all replicas."""

import contextlib
import contextvars

import tensorflow as tf
import tf_keras

from nvae_tf.layers.activations import ACTIVATIONS

EPSILON = 1e-5
MOMENTUM = 0.95  # of the running averages (momentum 0.05 in PyTorch's convention)

_observed = contextvars.ContextVar("observed_statistics", default=None)


@contextlib.contextmanager
def observed_statistics():
    """Within the block, layers in training mode report their statistics and keep their running ones.

    Yields:
        A dictionary that fills in the order of the calls: `BatchNorm` -> (mean, biased variance) of its
        batch, each (channels,).
    """
    statistics = {}
    token = _observed.set(statistics)
    try:
        yield statistics
    finally:
        _observed.reset(token)


class BatchNorm(tf_keras.layers.Layer):
    """Batch normalisation over batch, height and width, then an activation.

    Training normalises with the biased variance of the global batch; the running variance, which
    evaluation uses, takes the unbiased one. Always computed in float32.

    Args:
        activation: ``"none"``, ``"elu"`` or ``"swish"``.

    Call arguments:
        inputs: (batch, height, width, channels).
        training: normalise with the batch's statistics and update the running ones.

    Output shape: as the input's.
    Reference: NVAE paper, section 3.2 ("batch normalization").
    """

    def __init__(self, activation="none", **kwargs):
        super().__init__(**kwargs)
        self.activation = activation

    def build(self, input_shape):
        """Creates scale, offset and running statistics for the input's channels."""
        shape = (int(input_shape[-1]),)
        running = dict(
            trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA, dtype="float32"
        )
        self.gamma = self.add_weight("gamma", shape, initializer="ones", dtype="float32")
        self.beta = self.add_weight("beta", shape, initializer="zeros", dtype="float32")
        self.moving_mean = self.add_weight("moving_mean", shape, initializer="zeros", **running)
        self.moving_variance = self.add_weight(
            "moving_variance", shape, initializer="ones", **running
        )
        super().build(input_shape)

    def compute_output_shape(self, input_shape):
        """The input's."""
        return input_shape

    def call(self, inputs, training=False):
        """Normalises, then activates."""
        outputs = tf.cast(inputs, tf.float32)
        outputs = self._with_batch_statistics(outputs) if training else self._with_running(outputs)
        return ACTIVATIONS[self.activation](tf.cast(outputs, inputs.dtype))

    def _with_running(self, inputs):
        scale = self.gamma * tf.math.rsqrt(self.moving_variance + EPSILON)
        return inputs * scale + (self.beta - self.moving_mean * scale)

    def _with_batch_statistics(self, inputs):
        context = tf.distribute.get_replica_context()
        replicas = 1 if context is None else context.num_replicas_in_sync
        count = tf.cast(tf.size(inputs) // inputs.shape[-1] * replicas, tf.float32)
        if replicas == 1:
            outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=inputs, scale=self.gamma, offset=self.beta, mean=[], variance=[],
                epsilon=EPSILON, is_training=True,
            )  # fmt: skip
            biased = variance * (count - 1.0) / count  # the fused op returns the unbiased one
        else:
            mean = _over_replicas(context, tf.reduce_mean(inputs, [0, 1, 2]))
            centred = inputs - mean
            biased = _over_replicas(context, tf.reduce_mean(tf.square(centred), [0, 1, 2]))
            outputs = centred * (self.gamma * tf.math.rsqrt(biased + EPSILON)) + self.beta
            variance = biased * count / (count - 1.0)
        observed = _observed.get()
        if observed is not None:
            observed[self] = mean, biased
        else:
            self.moving_mean.assign_sub((1.0 - MOMENTUM) * (self.moving_mean - mean))
            self.moving_variance.assign_sub((1.0 - MOMENTUM) * (self.moving_variance - variance))
        return outputs

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "activation": self.activation}


def _over_replicas(context, value):
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, value)

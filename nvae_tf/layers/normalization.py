"""Batch normalisation followed by an activation, with statistics over all replicas."""

import contextlib
import contextvars
import functools
from typing import NamedTuple

import tensorflow as tf

from nvae_tf.devices import mean_over_replicas, num_replicas, own_copy
from nvae_tf.layers.activations import ACTIVATIONS
from nvae_tf.layers.base import Layer, during, read
from nvae_tf.layers.compiled import compiled_part, compiled_parts, compiles_parts

EPSILON = 1e-5
MOMENTUM = 0.95  # of the running averages (momentum 0.05 in PyTorch's convention)

_observed = contextvars.ContextVar("observed_statistics", default=None)
_given = contextvars.ContextVar("given_statistics", default=None)


class Observed(NamedTuple):
    """Statistics of a layer's batch, over all replicas.

    Attributes:
        mean: (channels,).
        variance: (channels,), biased.
        count: values that each rests on, float32, (1,).
    """

    mean: tf.Tensor
    variance: tf.Tensor
    count: tf.Tensor


@contextlib.contextmanager
def observed_statistics():
    """Within the block, layers in training mode report their statistics and keep their running ones.

    Yields:
        A dictionary that fills in the order of the calls: `BatchNorm` -> `Observed`.
    """
    statistics = {}
    with during(_observed, statistics):
        yield statistics


def given_statistics(statistics):
    """Within the block, layers in evaluation mode use these statistics instead of their running ones.

    Args:
        statistics: `BatchNorm` -> (mean, biased variance), each (channels,); layers that are not in it
            use their own.
    """
    return during(_given, statistics)


class BatchNorm(Layer):
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
        activated = self.activation != "none" and inputs.dtype == tf.float32
        if training and activated and compiles_parts():
            outputs, mean, variance = _normalized(self.activation)(
                inputs, read(self.gamma), read(self.beta)
            )
            report_statistics({self: Observed(mean, variance, _count(inputs))})
            return outputs
        outputs = tf.cast(inputs, tf.float32)
        outputs = self._with_batch_statistics(outputs) if training else self._with_running(outputs)
        return ACTIVATIONS[self.activation](tf.cast(outputs, inputs.dtype))

    def _with_running(self, inputs):
        running = read(self.moving_mean), read(self.moving_variance)
        mean, variance = (_given.get() or {}).get(self, running)
        scale = read(self.gamma) * tf.math.rsqrt(variance + EPSILON)
        return inputs * scale + (read(self.beta) - mean * scale)

    def _with_batch_statistics(self, inputs):
        if num_replicas() == 1:
            outputs, mean, variance, _ = _fused(inputs, read(self.gamma), read(self.beta))
        else:
            mean = mean_over_replicas(tf.reduce_mean(inputs, [0, 1, 2]))
            centred = inputs - mean
            variance = mean_over_replicas(tf.reduce_mean(tf.square(centred), [0, 1, 2]))
            scale = read(self.gamma) * tf.math.rsqrt(variance + EPSILON)
            outputs = centred * scale + read(self.beta)
        report_statistics({self: Observed(mean, variance, _count(inputs))})
        return outputs

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "activation": self.activation}


def _count(inputs):
    """Values that a channel's statistics rest on."""
    values = tf.size(inputs) // inputs.shape[-1] * num_replicas()
    return tf.fill([1], tf.cast(values, tf.float32))


def _fused(inputs, gamma, beta):
    """Normalised inputs, mean, biased variance, and what `FusedBatchNormGradV3` wants."""
    outputs, mean, variance, *reserved = tf.raw_ops.FusedBatchNormV3(
        x=inputs, scale=gamma, offset=beta, mean=[], variance=[], epsilon=EPSILON, is_training=True
    )
    count = _count(inputs)
    return outputs, mean, variance * (count - 1.0) / count, reserved  # from the unbiased one


@functools.cache
def _normalized(activation):
    """Normalisation and activation that keep nothing but their input for the backward pass.

    Returns:
        A function of inputs, gamma and beta to outputs, and the batch's mean and biased variance, which
        have no gradient.
    """
    activate = ACTIVATIONS[activation]

    @compiled_part
    def activated(normalized):
        return activate(normalized)

    @compiled_part
    def activation_gradient(inputs, gamma, beta, mean, variance, upstream):
        scale = gamma * tf.math.rsqrt(variance + EPSILON)
        normalized = inputs * scale + (beta - mean * scale)
        with tf.GradientTape() as tape:
            tape.watch(normalized)
            outputs = activate(normalized)
        return tape.gradient(outputs, normalized, upstream)

    @tf.custom_gradient
    def run(inputs, gamma, beta):
        inputs, gamma, beta = map(tf.convert_to_tensor, (inputs, gamma, beta))
        normalized, mean, variance, reserved = _fused(inputs, gamma, beta)
        outputs = activated(normalized)

        def gradient(upstream, *_):
            with compiled_parts():
                upstream = activation_gradient(inputs, gamma, beta, mean, variance, upstream)
            return tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=upstream, x=inputs, scale=gamma, reserve_space_1=reserved[0],
                reserve_space_2=reserved[1], reserve_space_3=reserved[2],
                epsilon=EPSILON, is_training=True,
            )[:3]  # fmt: skip

        return (outputs, mean, variance), gradient

    return run


def report_statistics(observed: dict[BatchNorm, Observed]) -> None:
    """Hands statistics to `observed_statistics` where that is active, else to the running ones."""
    collected = _observed.get()
    if collected is not None:
        collected.update(observed)
        return
    for layer, (mean, variance, count) in observed.items():
        unbiased = variance * (count / (count - 1.0))
        for running, seen in ((layer.moving_mean, mean), (layer.moving_variance, unbiased)):
            own_copy(running).assign(moved(running, seen))


def moved(running, seen):
    """Running statistics after a batch in which others were seen."""
    return running - (1.0 - MOMENTUM) * (running - seen)

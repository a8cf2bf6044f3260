"""Batch normalisation followed by an activation, with statistics over all replicas."""

import functools

import tensorflow as tf

from nvae_tf.engine.batch_statistics import global_statistics
from nvae_tf.engine.scope import BatchStatistics, Scope
from nvae_tf.engine.state import VariableState
from nvae_tf.engine.weights import by_stack
from nvae_tf.engine.xla import xla_region
from nvae_tf.layers.base import Constant, Layer

EPSILON = 1e-5
MOMENTUM = 0.95  # share of the running averages that a step keeps; PyTorch's momentum would be 0.05


class BatchNormAct(Layer):
    """Batch normalisation over batch, height and width, then an activation.

    In training the layer normalises with the mean and biased variance of the global batch. The running
    variance, which evaluation uses, is an average of unbiased variances. Statistics and normalisation
    are computed in float32, the activation in the precision of the input.

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

    def exchange_statistics(self, inputs, scope: Scope):
        """Stores the batch statistics over all replicas in the scope, if several share the batch.

        A function that blocks share cannot hold an exchange. Call this before such a function runs the
        layer; `call` then uses the stored statistics.

        Args:
            inputs: As for `call`.
            scope: As for `call`.
        """
        if scope.exchanges_statistics and self not in scope.statistics:
            exchanged = scope.exchanged_statistics.get(self)
            scope.statistics[self] = global_statistics(inputs, scope, exchanged)

    def call(self, inputs, scope: Scope):
        """Normalises, then activates."""
        gamma, beta = scope.value(self.gamma), scope.value(self.beta)
        self.exchange_statistics(inputs, scope)
        if self in scope.statistics:
            normalize = _normalize_and_activate(self.activation, scope.xla_regions)
            return normalize(inputs, scope.statistics[self], gamma, beta)
        activated = self.activation != "none" and inputs.dtype == tf.float32
        if scope.training and activated and scope.xla_regions:
            fused = _fused_batch_norm_act(self.activation)
            outputs, scope.statistics[self] = fused(inputs, gamma, beta)
            return outputs
        outputs = tf.cast(inputs, tf.float32)
        if scope.training:
            outputs, batch, _ = _fused_batch_norm(outputs, gamma, beta)
            scope.statistics[self] = batch.vector
        else:
            mean, variance = self._running_statistics(scope)
            scale = gamma * tf.math.rsqrt(variance + EPSILON)
            outputs = outputs * scale + (beta - mean * scale)
        return activate(self.activation, tf.cast(outputs, inputs.dtype), scope.custom_gradients)

    def _running_statistics(self, scope: Scope):
        if self in scope.given_statistics:
            return scope.given_statistics[self]
        return scope.value(self.moving_mean), scope.value(self.moving_variance)

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "activation": self.activation}


def activate(name: str, x, custom_gradients: bool = False):
    """Applies an activation.

    Args:
        name: ``"none"``, ``"elu"`` or ``"swish"`` (``x * sigmoid(x)``).
        x: A tensor of any shape.
        custom_gradients: Whether to use the swish whose custom gradient stores only x.

    Raises:
        KeyError: There is no activation of that name.
    """
    if name == "swish":
        return tf.nn.silu(x) if custom_gradients else x * tf.sigmoid(x)
    return {"none": tf.identity, "elu": tf.nn.elu}[name](x)


def update_running_averages(
    statistics: dict[BatchNormAct, tf.Tensor], condition=True, state=None
) -> None:
    """Moves running averages towards the statistics of a batch.

    Args:
        statistics: Content of `Scope.statistics` after a training pass; identical on all replicas.
        condition: A boolean scalar; if it is false, nothing changes.
        state: Where the averages are read and written (`nvae_tf.engine.state`); default: in their
            variables.
    """
    state = state or VariableState()
    means = by_stack({norm.moving_mean: batch for norm, batch in statistics.items()})
    variances = by_stack({norm.moving_variance: batch for norm, batch in statistics.items()})
    for (mean, rows), (variance, _) in zip(means, variances, strict=True):
        places = sorted(rows)
        batch = BatchStatistics.from_vector(tf.stack([rows[row] for row in places]))
        for running, statistic in ((mean, batch.mean), (variance, batch.unbiased)):
            everything, whole = state.value(running), len(places) == running.shape[0]
            before = everything if whole else tf.gather(everything, places)
            after = before - (1.0 - MOMENTUM) * (before - statistic)
            after = tf.where(condition, after, before)
            if not whole:  # only some layers with rows in this stack were run
                rows_of_places = [[row] for row in places]
                after = tf.tensor_scatter_nd_update(everything, rows_of_places, after)
            state.assign(running, after)


def _fused_batch_norm(inputs, gamma, beta):
    """Normalises with the batch's own statistics.

    Returns:
        Normalised inputs, the batch's statistics, and the outputs reserved for the gradient operation.
    """
    outputs, mean, variance, *reserved = tf.raw_ops.FusedBatchNormV3(
        x=inputs, scale=gamma, offset=beta, mean=[], variance=[], epsilon=EPSILON, is_training=True
    )
    count = tf.fill([1], tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32))
    # The operation returns the unbiased variance.
    batch = BatchStatistics(mean, variance * (count - 1.0) / count, count)
    return outputs, batch, reserved


@functools.cache
def _fused_batch_norm_act(activation: str):
    """Batch norm and activation as one operation, whose backward pass needs the input only.

    Everything else that the backward pass needs is recomputed.

    Args:
        activation: Name of the activation.

    Returns:
        A function from inputs, gamma and beta to outputs and the batch's statistics, a vector (see
        `BatchStatistics`) without gradients.
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
        normalized, batch, reserved = _fused_batch_norm(inputs, gamma, beta)
        outputs = activated(normalized, compile=True)

        def gradient(upstream, *_):
            d_normalized = activation_gradient(
                inputs, gamma, beta, batch.mean, batch.variance, upstream, compile=True
            )
            return tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=d_normalized, x=inputs, scale=gamma, reserve_space_1=reserved[0],
                reserve_space_2=reserved[1], reserve_space_3=reserved[2],
                epsilon=EPSILON, is_training=True,
            )[:3]  # fmt: skip

        return (outputs, batch.vector), gradient

    return run


@functools.cache
def _normalize_and_activate(activation: str, xla: bool):
    """Batch norm with given statistics and an activation, whose backward pass needs the input only.

    Args:
        activation: Name of the activation.
        xla: Whether to compile the arithmetic.

    Returns:
        A function from inputs, statistics (a vector, see `BatchStatistics`), gamma and beta to outputs,
        which is differentiable with respect to all four.
    """

    @xla_region
    def normalize(inputs, statistics, gamma, beta):
        mean, variance, _ = BatchStatistics.from_vector(statistics)
        scale = gamma * tf.math.rsqrt(variance + EPSILON)
        outputs = (tf.cast(inputs, tf.float32) - mean) * scale + beta
        return activate(activation, tf.cast(outputs, inputs.dtype), custom_gradients=True)

    @xla_region
    def elementwise_gradients(inputs, statistics, gamma, beta, upstream):
        mean, variance, _ = BatchStatistics.from_vector(statistics)
        scale = gamma * tf.math.rsqrt(variance + EPSILON)
        centred = tf.cast(inputs, tf.float32) - mean
        normalized = tf.cast(centred * scale + beta, inputs.dtype)
        with tf.GradientTape() as tape:
            tape.watch(normalized)
            outputs = activate(activation, normalized, custom_gradients=True)
        d_normalized = tf.cast(tape.gradient(outputs, normalized, upstream), tf.float32)
        d_inputs = tf.cast(d_normalized * scale, inputs.dtype)
        return d_inputs, d_normalized, d_normalized * centred

    def vector_gradients(statistics, gamma, d_beta, d_scale):
        _, variance, count = BatchStatistics.from_vector(statistics)
        inverse = tf.math.rsqrt(variance + EPSILON)
        d_gamma = d_scale * inverse
        d_variance = -0.5 * gamma * tf.square(inverse) * d_gamma
        d_mean = -gamma * inverse * d_beta
        return BatchStatistics(d_mean, d_variance, tf.zeros_like(count)).vector, d_gamma

    @tf.custom_gradient
    def run(inputs, statistics, gamma, beta):
        def gradient(upstream):
            d_inputs, *parts = elementwise_gradients(
                inputs, statistics, gamma, beta, upstream, compile=xla
            )
            # Outside of the XLA regions, because XLA's sums over pixels are slow on CPUs.
            d_beta, d_scale = (tf.reduce_sum(part, [0, 1, 2]) for part in parts)
            d_statistics, d_gamma = vector_gradients(statistics, gamma, d_beta, d_scale)
            return d_inputs, d_statistics, d_gamma, d_beta

        return normalize(inputs, statistics, gamma, beta, compile=xla), gradient

    return run

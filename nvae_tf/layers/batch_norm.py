"""Batch normalisation followed by an activation, with statistics over all replicas."""

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
        self.statistics_size = 2 * shape[0] + 1  # of `BatchStatistics.vector`

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
            return _normalize_and_activate(
                inputs, scope.statistics[self], gamma, beta, self.activation, scope.xla_regions
            )
        can_fuse = self.activation != "none" and inputs.dtype == tf.float32
        if scope.training and can_fuse and scope.xla_regions:
            outputs, scope.statistics[self] = _fused_batch_norm_act(
                inputs, gamma, beta, self.activation
            )
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


def _fused_batch_norm_act(inputs, gamma, beta, activation: str):
    """Batch norm and activation as one operation, whose backward pass needs the input only.

    Everything else that the backward pass needs is recomputed. The arithmetic is compiled with XLA.

    Args:
        inputs: Maps (batch, height, width, channels), float32.
        gamma: Scale, (channels,).
        beta: Offset, (channels,).
        activation: Name of the activation.

    Returns:
        The outputs, and the batch's statistics, a vector (see `BatchStatistics`) without gradients.
    """

    @tf.custom_gradient
    def with_gradient(inputs, gamma, beta):
        inputs, gamma, beta = map(tf.convert_to_tensor, (inputs, gamma, beta))
        normalized, batch, reserved = _fused_batch_norm(inputs, gamma, beta)
        outputs = _activate_region(normalized, activation, compile=True)

        def gradient(upstream, *_):
            d_normalized = _activation_gradient(
                inputs, gamma, beta, batch.mean, batch.variance, upstream, activation, compile=True
            )
            return tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=d_normalized, x=inputs, scale=gamma, reserve_space_1=reserved[0],
                reserve_space_2=reserved[1], reserve_space_3=reserved[2],
                epsilon=EPSILON, is_training=True,
            )[:3]  # fmt: skip

        return (outputs, batch.vector), gradient

    return with_gradient(inputs, gamma, beta)


@xla_region
def _activate_region(normalized, activation: str):
    return activate(activation, normalized, custom_gradients=True)


@xla_region
def _activation_gradient(inputs, gamma, beta, mean, variance, upstream, activation: str):
    """The gradient with respect to the normalised inputs, which are computed again."""
    scale = gamma * tf.math.rsqrt(variance + EPSILON)
    normalized = inputs * scale + (beta - mean * scale)
    return _through_activation(normalized, upstream, activation)


def _through_activation(normalized, upstream, activation: str):
    """The gradient with respect to the input of an activation."""
    with tf.GradientTape() as tape:
        tape.watch(normalized)
        outputs = activate(activation, normalized, custom_gradients=True)
    return tape.gradient(outputs, normalized, upstream)


def _normalize_and_activate(inputs, statistics, gamma, beta, activation: str, xla: bool):
    """Batch norm with given statistics and an activation, whose backward pass needs the input only.

    Args:
        inputs: Maps (batch, height, width, channels).
        statistics: The batch's statistics, a vector (see `BatchStatistics`).
        gamma: Scale, (channels,).
        beta: Offset, (channels,).
        activation: Name of the activation.
        xla: Whether to compile the arithmetic.

    Returns:
        The outputs, which are differentiable with respect to all four tensors.
    """

    @tf.custom_gradient
    def with_gradient(inputs, statistics, gamma, beta):
        def gradient(upstream):
            d_inputs, *parts = _elementwise_gradients(
                inputs, statistics, gamma, beta, upstream, activation, compile=xla
            )
            # Outside of the XLA regions, because XLA's sums over pixels are slow on CPUs.
            d_beta, d_scale = (tf.reduce_sum(part, [0, 1, 2]) for part in parts)
            d_statistics, d_gamma = _vector_gradients(statistics, gamma, d_beta, d_scale)
            return d_inputs, d_statistics, d_gamma, d_beta

        outputs = _normalize_region(inputs, statistics, gamma, beta, activation, compile=xla)
        return outputs, gradient

    return with_gradient(inputs, statistics, gamma, beta)


@xla_region
def _normalize_region(inputs, statistics, gamma, beta, activation: str):
    mean, variance, _ = BatchStatistics.from_vector(statistics)
    scale = gamma * tf.math.rsqrt(variance + EPSILON)
    outputs = (tf.cast(inputs, tf.float32) - mean) * scale + beta
    return activate(activation, tf.cast(outputs, inputs.dtype), custom_gradients=True)


@xla_region
def _elementwise_gradients(inputs, statistics, gamma, beta, upstream, activation: str):
    """The inputs' gradient for fixed statistics, and what is summed for those of beta and the scale."""
    mean, variance, _ = BatchStatistics.from_vector(statistics)
    scale = gamma * tf.math.rsqrt(variance + EPSILON)
    centred = tf.cast(inputs, tf.float32) - mean
    normalized = tf.cast(centred * scale + beta, inputs.dtype)
    d_normalized = tf.cast(_through_activation(normalized, upstream, activation), tf.float32)
    d_inputs = tf.cast(d_normalized * scale, inputs.dtype)
    return d_inputs, d_normalized, d_normalized * centred


def _vector_gradients(statistics, gamma, d_beta, d_scale):
    """The gradients with respect to the statistics and gamma."""
    _, variance, count = BatchStatistics.from_vector(statistics)
    inverse = tf.math.rsqrt(variance + EPSILON)
    d_gamma = d_scale * inverse
    d_variance = -0.5 * gamma * tf.square(inverse) * d_gamma
    d_mean = -gamma * inverse * d_beta
    return BatchStatistics(d_mean, d_variance, tf.zeros_like(count)).vector, d_gamma

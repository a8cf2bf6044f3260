"""Convolutions: weight-normalised or plain, masked, dilated, grouped.

Every convolution of the model is a `Conv2D`. All kernels, depthwise ones included, have the layout
(height, width, input channels per group, output channels), so that weight normalisation, the spectral
term and the import of official weights deal with one layout only.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from nvae_tf.engine.kernels import kernel_norm, normalize
from nvae_tf.engine.scope import Scope
from nvae_tf.engine.weights import Weight
from nvae_tf.layers.base import Layer, uniform_fan_in

DATA_INIT_STDDEV = 0.2  # of each output channel, after data-dependent initialisation


class Conv2D(Layer):
    """2D convolution with symmetric padding and an optionally normalised and masked kernel.

    With weight normalisation the effective kernel is ``exp(g) * w / (||w|| + 1e-5)``, where the norm is
    taken over all axes except the output channels, and g is `log_norm`. Padding is
    ``dilation * (k - 1) / 2`` on each side. This also holds at stride 2, where TensorFlow's SAME pads
    the two sides unequally.

    Args:
        filters: Number of output channels; None for a depthwise convolution, which keeps the number of
            channels.
        kernel_size: Height and width of the kernel, odd.
        strides: Stride in both axes, 1 or 2.
        dilation: Dilation in both axes, 1 or 2; 2 with kernel size 3 only.
        groups: Number of groups of channels that are convolved separately.
        use_bias: Whether to add a learned bias.
        weight_norm: Whether to normalise the kernel and learn its norm.
        mask: None, or ``"causal"`` or ``"strictly_causal"``, which hide what comes later in raster
            order (see `causal_mask`).
        mirror: Whether to flip the mask in both spatial axes, so that it hides what comes *earlier*.
        log_norm_shift: Offset that is added to g's initial value.
        data_init: Whether g and the bias are set from the input in a pass with
            `Scope.data_initialization`.

    Raises:
        ValueError: A kernel size, stride or dilation is not supported; or, when the weights are
            created, the channels do not divide into the groups.

    Input shape: (batch, height, width, channels).
    Output shape: (batch, height / strides, width / strides, filters).
    Reference: Salimans & Kingma, *Weight Normalization*, 2016; NVAE paper, section 3.2.
    """

    def __init__(
        self,
        filters,
        kernel_size=1,
        *,
        strides=1,
        dilation=1,
        groups=1,
        use_bias=True,
        weight_norm=True,
        mask=None,
        mirror=False,
        log_norm_shift=0.0,
        data_init=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if kernel_size % 2 == 0 or strides not in (1, 2) or dilation not in (1, 2):
            raise ValueError("kernel_size must be odd, strides and dilation 1 or 2")
        if dilation == 2 and kernel_size != 3:
            raise ValueError("dilation 2 is implemented for kernels of size 3")
        self.filters, self.kernel_size, self.strides = filters, kernel_size, strides
        self.dilation, self.groups, self.use_bias = dilation, groups, use_bias
        self.weight_norm, self.mask, self.mirror = weight_norm, mask, mirror
        self.log_norm_shift, self.data_init = log_norm_shift, data_init

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved separately."""
        return self.filters is None

    def create(self, input_shape):
        """Creates kernel, log-norm and bias for the input's channels."""
        channels = int(input_shape[-1])
        filters = channels if self.depthwise else self.filters
        groups = channels if self.depthwise else self.groups
        if channels % groups or filters % groups:
            raise ValueError(f"{channels} -> {filters} channels cannot form {groups} groups")
        size = self.kernel_size
        shape = (size, size, channels // groups, filters)
        initializer = uniform_fan_in(size * size * channels // groups)
        self.kernel_mask = None
        if self.mask:
            strict = self.mask == "strictly_causal"
            self.kernel_mask = causal_mask(shape, strict=strict, mirror=self.mirror)
        self.kernel = self.add_weight(shape, initializer)
        if self.weight_norm:
            initial_log_norm = LogKernelNorm(self, self.log_norm_shift)
            self.log_norm = self.add_weight((filters,), initial_log_norm)
        if self.use_bias:
            self.bias = self.add_weight((filters,), initializer)

    @property
    def kernel_weights(self) -> list[Weight]:
        """The weights that the effective kernel is computed from."""
        return [self.kernel, self.log_norm] if self.weight_norm else [self.kernel]

    def compute_output_shape(self, input_shape):
        """The input's shape with this layer's channels; height and width are left unknown."""
        channels = input_shape[-1] if self.depthwise else self.filters
        return tf.TensorShape((input_shape[0], None, None, channels))

    def effective_kernel(self, scope: Scope):
        """The masked and normalised kernel (k, k, input channels per group, output channels).

        It comes from `Scope.kernels` if the scope holds one for this layer; otherwise it is computed.
        """
        if self in scope.kernels:
            return scope.kernels[self].effective
        kernel = _masked(scope.value(self.kernel), self.kernel_mask)
        return normalize(kernel, scope.value(self.log_norm)) if self.weight_norm else kernel

    def call(self, inputs, scope: Scope):
        """Convolves a batch of maps."""
        if self.data_init and scope.data_initialization:
            self._initialize_from(inputs)
        kernel = tf.cast(self.effective_kernel(scope), inputs.dtype)
        outputs = self._convolve(inputs, kernel, scope.custom_gradients and not scope.on_gpu)
        return outputs + tf.cast(scope.value(self.bias), inputs.dtype) if self.use_bias else outputs

    def _convolve(self, inputs, kernel, cpu_gradients=False):
        pad, strides = self.kernel_size // 2, self.strides
        if self.dilation == 2 and strides == 2:
            # At stride 2, all taps of a dilated kernel fall on even pixels.
            return tf.nn.conv2d(inputs[:, ::2, ::2], kernel, 1, "SAME")
        if self.dilation == 2:
            # TensorFlow has no gradient for dilated conv2d on CPUs, so the four interleaved maps are
            # convolved separately.
            quarters = tf.space_to_batch(inputs, [2, 2], [[2, 2], [2, 2]])
            quarters = tf.nn.conv2d(quarters, kernel, 1, "VALID")
            return tf.batch_to_space(quarters, [2, 2], [[0, 0]] * 2)
        padding = "SAME"
        if strides == 2:
            inputs = tf.pad(inputs, [[0, 0], [pad, pad], [pad, pad], [0, 0]]) if pad else inputs
            padding = "VALID"
        if self.depthwise:
            # (k, k, 1, C) and TensorFlow's (k, k, C, 1) are the same numbers in the same order.
            kernel = tf.reshape(kernel, [self.kernel_size, self.kernel_size, -1, 1])
            if strides == 1 and cpu_gradients:
                return _depthwise_on_cpus(inputs, kernel)
            return tf.nn.depthwise_conv2d(inputs, kernel, [1, strides, strides, 1], padding)
        if self.groups == 1:
            return tf.nn.conv2d(inputs, kernel, strides, padding)
        # TensorFlow has no gradient for grouped conv2d on CPUs either.
        parts = zip(
            tf.split(inputs, self.groups, -1), tf.split(kernel, self.groups, -1), strict=True
        )
        return tf.concat([tf.nn.conv2d(x, w, strides, padding) for x, w in parts], -1)

    def _initialize_from(self, inputs):
        """Sets log-norm and bias so that this batch's outputs have mean 0 and stddev 0.2."""
        kernel = normalize(self.kernel.value(), tf.zeros(self.log_norm.shape))
        outputs = self._convolve(tf.cast(inputs, tf.float32), kernel)
        mean, variance = tf.nn.moments(outputs, [0, 1, 2])
        count = tf.cast(tf.size(outputs) // tf.size(mean), variance.dtype)
        stddev = tf.sqrt(variance * count / (count - 1.0))
        scale = DATA_INIT_STDDEV / (stddev + 1e-5)
        self.log_norm.assign(tf.math.log(scale))
        self.bias.assign(-mean * scale)

    def get_config(self):
        """The constructor's arguments."""
        names = (
            "filters", "kernel_size", "strides", "dilation", "groups", "use_bias", "weight_norm",
            "mask", "mirror", "log_norm_shift", "data_init",
        )  # fmt: skip
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@tf.custom_gradient
def _depthwise_on_cpus(inputs, kernel):
    """Depthwise convolution at stride 1, with a faster gradient with respect to the kernel.

    oneDNN's implementation of that gradient takes up to 25 times as long as TensorFlow's own, which
    explicit padding selects.
    """
    ones, pad = [1, 1, 1, 1], kernel.shape[0] // 2
    inputs_shape, kernel_shape = tf.shape(inputs), tf.shape(kernel)

    def gradient(upstream):
        d_inputs = tf.nn.depthwise_conv2d_backprop_input(
            inputs_shape, kernel, upstream, ones, "SAME"
        )
        d_kernel = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
            input=inputs, filter_sizes=kernel_shape, out_backprop=upstream, strides=ones,
            padding="EXPLICIT", explicit_paddings=[0, 0, pad, pad, pad, pad, 0, 0],
        )  # fmt: skip
        return d_inputs, d_kernel

    return tf.nn.depthwise_conv2d(inputs, kernel, ones, "SAME"), gradient


class LogKernelNorm(NamedTuple):
    """Initial values of a log-norm: ``ln(||w|| + 0.01) + shift``.

    With shift 0 the effective kernel begins close to w. Used like `nvae_tf.layers.base.Uniform`, but
    after w has its initial values.

    Attributes:
        convolution: The convolution whose kernel is w.
        shift: Offset that is added to the logarithm.
    """

    convolution: Conv2D
    shift: float

    @property
    def key(self):
        """The same key for all, so that the norms of a stack of kernels are computed at once."""
        return LogKernelNorm

    def draw(self, shape, initializers):
        """Computes the log-norms of n convolutions, (n, filters); arguments as for `Uniform.draw`."""
        norms = {}
        for stack in {i.convolution.kernel.stack.ref() for i in initializers}:
            norms[stack] = tf.sqrt(tf.reduce_sum(tf.square(stack.deref()), [1, 2, 3]))
        rows = []
        for layer, _ in initializers:
            if layer.kernel_mask is None:
                rows.append(norms[layer.kernel.stack.ref()][layer.kernel.row])
            else:
                rows.append(kernel_norm(layer.kernel.value() * layer.kernel_mask))
        shifts = tf.constant([[shift] for _, shift in initializers])
        return tf.math.log(tf.stack(rows) + 1e-2) + shifts


def _masked(kernel, mask):
    return kernel if mask is None else kernel * mask


def causal_mask(shape, strict: bool, mirror: bool) -> np.ndarray:
    """The mask of an autoregressive convolution.

    Visible are the rows above, and the pixels to the left in the same row. At the centre pixel the
    channels are ordered: output channel o sees input channel i if i's position in the order is before
    o's (strict), or is not after it.

    Args:
        shape: Shape of the kernel, (k, k, input channels per group, output channels).
        strict: Whether to hide equal positions in the order, too.
        mirror: Whether to flip the mask in both spatial axes. The order of the channels stays.

    Returns:
        A float32 array of zeros and ones, of the kernel's shape.

    Reference: NVAE paper, appendix A (normalizing flow), after PixelCNN and IAF.
    """
    size, _, inputs, outputs = shape
    mask = np.ones(shape, np.float32)
    centre = size // 2
    mask[centre + 1 :] = 0
    mask[centre, centre + 1 :] = 0
    positions = min(inputs, outputs)
    position_in = np.arange(inputs)[:, None] // (inputs // positions)
    position_out = np.arange(outputs) // (outputs // positions)
    visible = position_in < position_out if strict else position_in <= position_out
    mask[centre, centre] = visible
    return mask[::-1, ::-1].copy() if mirror else mask

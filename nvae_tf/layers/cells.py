"""Residual cells of encoder and decoder (paper, section 3.1, figure 3)."""

import re

import numpy as np
import tensorflow as tf

from nvae_tf.config import BN_ACT
from nvae_tf.engine.scope import Scope
from nvae_tf.engine.shared_functions import call_block
from nvae_tf.layers.activations import activate, swish
from nvae_tf.layers.base import Layer, create_chain, uniform_fan_in
from nvae_tf.layers.batch_norm import BatchNormAct
from nvae_tf.layers.convolution import Conv2D

# What a cell does to height and width.
DOWN, NORMAL, UP = "down", "normal", "up"
BRANCH_SCALE = 0.1


class _Widening(Layer):
    """A layer with ``filters`` output channels."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters

    def compute_output_shape(self, input_shape):
        """The input's shape with this layer's channels; height and width are left open."""
        return tf.TensorShape((input_shape[0], None, None, self.filters))

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "filters": self.filters}


class ResidualCell(_Widening):
    """``skip(x) + 0.1 * branch(x)``.

    Args:
        operations: names of the operations in the branch: ``res_elu``, ``res_bnelu``,
            ``res_bnswish``, ``res_bnswish5`` or ``mconv_e{E}k{K}g{G}``.
        filters: output channels.
        direction: ``"down"`` halves height and width, ``"up"`` doubles them, ``"normal"`` keeps them;
            the first operation does it, and changes the channels.
        use_se: end the branch in squeeze-and-excitation.

    Input shape: (batch, height, width, channels).
    Output shape: (batch, height', width', filters).
    Reference: NVAE paper, section 3.1 and figure 3.
    """

    def __init__(self, operations, filters, direction=NORMAL, use_se=True, **kwargs):
        super().__init__(filters, **kwargs)
        self.operations = tuple(operations)
        self.direction, self.use_se = direction, use_se
        directions = (direction,) + (NORMAL,) * (len(self.operations) - 1)
        self.branch = [
            make_operation(name, filters, direction)
            for name, direction in zip(self.operations, directions, strict=True)
        ]
        self.squeeze = SqueezeExcitation() if use_se else None
        self.skip = (
            {DOWN: SkipDown, UP: SkipUp}[direction](filters) if direction != NORMAL else None
        )

    def create(self, input_shape):
        """Makes branch and skip for the input's channels."""
        channels = int(input_shape[-1])
        create_chain(self.branch + ([self.squeeze] if self.squeeze else []), channels)
        create_chain([self.skip] if self.skip else [], channels)

    def call(self, inputs, scope: Scope):
        """Adds skip and branch, in a function that identical cells share."""
        return call_block(ResidualCell.compute, [self], [inputs], scope)

    def compute(self, inputs, scope: Scope):
        """Adds skip and branch."""
        branch = inputs
        for operation in self.branch:
            branch = operation(branch, scope=scope)
        if self.squeeze:
            branch = self.squeeze(branch, scope=scope)
        skip = self.skip(inputs, scope=scope) if self.skip else inputs
        return skip + BRANCH_SCALE * branch

    def get_config(self):
        """The constructor's arguments."""
        names = ("operations", "direction", "use_se")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def make_operation(name, filters, direction):
    """The layer that an operation's name stands for."""
    inverted = re.fullmatch(r"mconv_e(\d+)k(\d+)g(\d+)", name)
    if inverted:
        expansion, kernel_size, groups = map(int, inverted.groups())
        return MBConv(filters, expansion, kernel_size, groups, direction)
    normalization, activation = {
        "res_elu": (False, "elu"), "res_bnelu": (True, "elu"),
        "res_bnswish": (True, "swish"), "res_bnswish5": (True, "swish"),
    }[name]  # fmt: skip
    dilation = 2 if name == "res_bnswish5" else 1
    return NormActConv(filters, normalization, activation, dilation, direction)


class NormActConv(_Widening):
    """Activation (after batch norm or not), then a 3x3 convolution with bias: the ``res_*`` operations.

    Args:
        filters: output channels.
        normalization: batch norm first; without it the convolution is initialised from data.
        activation: ``"elu"`` or ``"swish"``.
        dilation: of the convolution.
        direction: see `ResidualCell`; a doubling stands between activation and convolution.
    """

    def __init__(self, filters, normalization, activation, dilation, direction, **kwargs):
        super().__init__(filters, **kwargs)
        self.normalization, self.activation = normalization, activation
        self.dilation, self.direction = dilation, direction
        self.norm = BatchNormAct(activation) if normalization else None
        self.convolution = Conv2D(
            filters,
            3,
            strides=2 if direction == DOWN else 1,
            dilation=dilation,
            data_init=not normalization,
        )

    def create(self, input_shape):
        """Makes batch norm and convolution for the input's channels."""
        layers = [self.norm, self.convolution] if self.norm else [self.convolution]
        create_chain(layers, int(input_shape[-1]))

    def call(self, inputs, scope: Scope):
        """Activates, doubles the map if asked to, convolves; rematerialized where asked for."""
        function = NormActConv.compute
        return call_block(function, [self], [inputs], scope, share=False, remat_when=BN_ACT)

    def compute(self, inputs, scope: Scope):
        """Activates, doubles the map if asked to, convolves."""
        if self.norm:
            outputs = self.norm(inputs, scope=scope)
        else:
            outputs = activate(self.activation, inputs, scope.custom_gradients)
        if self.direction == UP:
            outputs = nearest_x2(outputs)
        return self.convolution(outputs, scope=scope)

    def get_config(self):
        """The constructor's arguments."""
        names = ("normalization", "activation", "dilation", "direction")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


class MBConv(_Widening):
    """The ``mconv`` operation: expand, convolve each channel apart, project; no bias, no weight norm.

    BN; 1x1 to ``expansion`` times the channels; BN + swish; KxK depthwise (or grouped); BN + swish;
    1x1 to ``filters``; BN.

    Args:
        filters: output channels.
        expansion: hidden channels per input channel.
        kernel_size: of the middle convolution.
        groups: of the middle convolution; 0: depthwise.
        direction: see `ResidualCell`; a doubling comes first, a halving in the middle.

    Reference: NVAE paper, figure 3a; Sandler et al., *MobileNetV2*, 2018.
    """

    def __init__(self, filters, expansion, kernel_size, groups, direction, **kwargs):
        super().__init__(filters, **kwargs)
        self.expansion, self.kernel_size = expansion, kernel_size
        self.groups, self.direction = groups, direction

    def create(self, input_shape):
        """Makes the layers for the input's channels."""
        hidden = self.expansion * int(input_shape[-1])
        plain = dict(use_bias=False, weight_norm=False)
        middle = dict(strides=2 if self.direction == DOWN else 1, **plain)
        if self.groups:
            middle["groups"] = self.groups
        self.norms = [
            BatchNormAct(),
            BatchNormAct("swish"),
            BatchNormAct("swish"),
            BatchNormAct(),
        ]
        self.convolutions = [
            Conv2D(hidden, 1, **plain),
            Conv2D(hidden if self.groups else None, self.kernel_size, **middle),
            Conv2D(self.filters, 1, **plain),
        ]
        in_order = [self.norms[0]]
        for convolution, norm in zip(self.convolutions, self.norms[1:], strict=True):
            in_order += [convolution, norm]
        create_chain(in_order, int(input_shape[-1]))

    def call(self, inputs, scope: Scope):
        """Runs the seven steps in order."""
        outputs = nearest_x2(inputs) if self.direction == UP else inputs
        for pair in zip(self.norms[:3], self.convolutions, strict=True):
            outputs = call_block(
                _normalize_and_convolve, pair, [outputs], scope, share=False, remat_when=BN_ACT
            )
        return self.norms[3](outputs, scope=scope)

    def get_config(self):
        """The constructor's arguments."""
        names = ("expansion", "kernel_size", "groups", "direction")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _normalize_and_convolve(norm, convolution, inputs, scope: Scope):
    return convolution(norm(inputs, scope=scope), scope=scope)


class SqueezeExcitation(Layer):
    """Scales each channel by a gate computed from the means of all channels.

    Mean over the map; dense to max(channels / 16, 4), ReLU; dense to channels, sigmoid.

    Reference: Hu et al., *Squeeze-and-Excitation Networks*, 2018.
    """

    def create(self, input_shape):
        """Makes both dense layers' weights."""
        channels = int(input_shape[-1])
        hidden = max(channels // 16, 4)
        inner, outer = uniform_fan_in(channels), uniform_fan_in(hidden)
        self.reduce_kernel = self.add_weight((channels, hidden), inner)
        self.reduce_bias = self.add_weight((hidden,), inner)
        self.expand_kernel = self.add_weight((hidden, channels), outer)
        self.expand_bias = self.add_weight((channels,), outer)

    def compute_output_shape(self, input_shape):
        """The input's."""
        return input_shape

    def call(self, inputs, scope: Scope):
        """Scales the channels of a (batch, height, width, channels) map."""
        value = scope.value
        gate = tf.reduce_mean(tf.cast(inputs, tf.float32), [1, 2])
        gate = tf.nn.relu(tf.matmul(gate, value(self.reduce_kernel)) + value(self.reduce_bias))
        gate = tf.nn.sigmoid(tf.matmul(gate, value(self.expand_kernel)) + value(self.expand_bias))
        return inputs * tf.cast(gate, inputs.dtype)[:, None, None, :]


class SkipDown(_Widening):
    """Halves a map: swish, then four 1x1 convolutions, each over another quarter of the pixels.

    Args:
        filters: output channels.
    """

    def __init__(self, filters, **kwargs):
        super().__init__(filters, **kwargs)
        quarter = filters // 4
        widths = (quarter, quarter, quarter, filters - 3 * quarter)
        self.convolutions = [Conv2D(width, 1, strides=2) for width in widths]

    def create(self, input_shape):
        """Makes the four convolutions for the input's channels."""
        for convolution in self.convolutions:
            create_chain([convolution], int(input_shape[-1]))

    def call(self, inputs, scope: Scope):
        """(batch, height, width, channels) to (batch, height / 2, width / 2, filters)."""
        # Convolution i looks at one pixel of every 2x2 block: together they are one 2x2 convolution.
        pixels = ((0, 0), (1, 1), (0, 1), (1, 0))
        kernels = [
            tf.pad(
                conv.effective_kernel(scope), [[row, 1 - row], [column, 1 - column], [0, 0], [0, 0]]
            )
            for conv, (row, column) in zip(self.convolutions, pixels, strict=True)
        ]
        kernel = tf.cast(tf.concat(kernels, -1), inputs.dtype)
        biases = [scope.value(conv.bias) for conv in self.convolutions]
        activated = swish(inputs, scope.custom_gradients)
        bias = tf.cast(tf.concat(biases, 0), inputs.dtype)
        return tf.nn.conv2d(activated, kernel, 2, "VALID") + bias


class SkipUp(_Widening):
    """Doubles a map bilinearly, corners aligned, and changes its channels by a 1x1 convolution.

    Args:
        filters: output channels.
    """

    def __init__(self, filters, **kwargs):
        super().__init__(filters, **kwargs)
        self.convolution = Conv2D(filters, 1, use_bias=False)

    def create(self, input_shape):
        """Makes the convolution for the input's channels."""
        create_chain([self.convolution], int(input_shape[-1]))

    def call(self, inputs, scope: Scope):
        """(batch, height, width, channels) to (batch, 2 height, 2 width, filters)."""
        # Officially the map is doubled first. Both steps are linear, one over pixels and one over
        # channels, so they commute, and this order convolves a quarter of the pixels.
        return bilinear_x2(self.convolution(inputs, scope=scope))


def nearest_x2(maps):
    """Doubles height and width by repeating each pixel."""
    _, height, width, channels = maps.shape
    apart = tf.reshape(maps, [-1, height, 1, width, 1, channels])
    tiled = tf.tile(apart, [1, 1, 2, 1, 2, 1])
    return tf.reshape(tiled, [-1, 2 * height, 2 * width, channels])


def bilinear_x2(maps):
    """Doubles height and width by linear interpolation with aligned corners.

    As two small matrix products: unlike TensorFlow's resize, whose gradient on GPUs is not
    deterministic, and which leaves half precision. Written as reshapes and plain products, which
    TFLite can store where the batch is open; `tf.einsum` becomes shapes that it cannot.

    Args:
        maps: (batch, height, width, channels).

    Returns:
        (batch, 2 height, 2 width, channels).
    """
    _, height, width, channels = maps.shape
    rows, columns = (tf.constant(_interpolation(n), maps.dtype) for n in (height, width))
    maps = tf.matmul(rows, tf.reshape(maps, [-1, height, width * channels]))
    maps = tf.matmul(columns, tf.reshape(maps, [-1, width, channels]))
    return tf.reshape(maps, [-1, 2 * height, 2 * width, channels])


def _interpolation(size: int) -> np.ndarray:
    """The (2 size, size) matrix that interpolates linearly, first and last value kept."""
    places = np.arange(2 * size) * ((size - 1) / (2 * size - 1))
    return np.maximum(0.0, 1.0 - np.abs(places[:, None] - np.arange(size))).astype(np.float32)

"""The residual cells of encoder and decoder (paper, section 3.1 and figure 3)."""

import re

import numpy as np
import tensorflow as tf

from nvae_tf.config import BN_ACT
from nvae_tf.engine.scope import Scope
from nvae_tf.engine.shared_functions import call_block
from nvae_tf.layers.base import Layer, create_chain, uniform_fan_in
from nvae_tf.layers.batch_norm import BatchNormAct, activate
from nvae_tf.layers.convolution import Conv2D

DOWN, NORMAL, UP = "down", "normal", "up"  # a cell halves, keeps or doubles height and width
BRANCH_SCALE = 0.1  # factor on the branch when it is added to the skip connection


class _FixedWidthLayer(Layer):
    """A layer with ``filters`` output channels, however many its input has."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters

    def compute_output_shape(self, input_shape):
        """The input's shape with this layer's channels; height and width are left unknown."""
        return tf.TensorShape((input_shape[0], None, None, self.filters))

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "filters": self.filters}


class ResidualCell(_FixedWidthLayer):
    """A residual cell, ``skip(x) + 0.1 * branch(x)``.

    Args:
        operations: Names of the operations in the branch: ``res_elu``, ``res_bnelu``,
            ``res_bnswish``, ``res_bnswish5`` or ``mconv_e{E}k{K}g{G}``.
        filters: Number of output channels.
        direction: ``"down"`` halves height and width, ``"up"`` doubles them, ``"normal"`` keeps them.
            The first operation of the branch does this, and changes the number of channels.
        use_se: Whether the branch ends in squeeze-and-excitation.

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
        self.se = SqueezeExcitation() if use_se else None
        self.skip = (
            {DOWN: SkipDown, UP: SkipUp}[direction](filters) if direction != NORMAL else None
        )

    def create(self, input_shape):
        """Creates the weights of branch and skip for the input's channels."""
        channels = int(input_shape[-1])
        create_chain(self.branch + ([self.se] if self.se else []), channels)
        create_chain([self.skip] if self.skip else [], channels)

    def call(self, inputs, scope: Scope):
        """Runs `compute` as a block, which identical cells may share (see `call_block`)."""
        return call_block(ResidualCell.compute, [self], [inputs], scope)

    def compute(self, inputs, scope: Scope):
        """Runs the branch and adds it to the skip connection."""
        branch = inputs
        for operation in self.branch:
            branch = operation(branch, scope=scope)
        uses = [layer for layer in (self.se, self.skip) if layer]
        return call_block(ResidualCell.add, [self], [inputs, branch], scope, uses=uses)

    def add(self, inputs, branch, scope: Scope):
        """Applies squeeze-and-excitation to the branch, then adds the branch to the skip connection."""
        if self.se:
            branch = self.se(branch, scope=scope)
        skip = self.skip(inputs, scope=scope) if self.skip else inputs
        return skip + BRANCH_SCALE * branch

    def get_config(self):
        """The constructor's arguments."""
        names = ("operations", "direction", "use_se")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def make_operation(name, filters, direction):
    """Makes the layer that an operation's name stands for.

    Args:
        name: Name of the operation, as in `ResidualCell`.
        filters: Number of output channels.
        direction: As in `ResidualCell`.

    Raises:
        KeyError: There is no operation of that name.
    """
    mbconv = re.fullmatch(r"mconv_e(\d+)k(\d+)g(\d+)", name)
    if mbconv:
        expansion, kernel_size, groups = map(int, mbconv.groups())
        return MBConv(filters, expansion, kernel_size, groups, direction)
    normalization, activation = {
        "res_elu": (False, "elu"), "res_bnelu": (True, "elu"),
        "res_bnswish": (True, "swish"), "res_bnswish5": (True, "swish"),
    }[name]  # fmt: skip
    dilation = 2 if name == "res_bnswish5" else 1
    return NormActConv(filters, normalization, activation, dilation, direction)


class NormActConv(_FixedWidthLayer):
    """A ``res_*`` operation: optional batch norm, activation, and a 3x3 convolution with bias.

    Args:
        filters: Number of output channels.
        normalization: Whether batch norm comes first. If not, the convolution is initialised from data.
        activation: ``"elu"`` or ``"swish"``.
        dilation: Dilation of the convolution, 1 or 2.
        direction: As in `ResidualCell`. ``"up"`` doubles the map between activation and convolution;
            ``"down"`` uses a convolution of stride 2.
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
        """Creates the weights of batch norm and convolution for the input's channels."""
        layers = [self.norm, self.convolution] if self.norm else [self.convolution]
        create_chain(layers, int(input_shape[-1]))

    def call(self, inputs, scope: Scope):
        """Runs `compute`, rematerialized if `Scope.rematerialize` is ``"bn_swish"``."""
        if self.norm:
            self.norm.exchange_statistics(inputs, scope)
        return call_block(NormActConv.compute, [self], [inputs], scope, remat_when=BN_ACT)

    def compute(self, inputs, scope: Scope):
        """Normalises and activates, doubles the map in an up cell, and convolves."""
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


class MBConv(_FixedWidthLayer):
    """The ``mconv`` operation, an inverted bottleneck: expand, convolve depthwise, project.

    BN; 1x1 convolution to ``expansion`` times the input's channels; BN + swish; KxK depthwise (or
    grouped) convolution; BN + swish; 1x1 convolution to ``filters`` channels; BN. The convolutions have
    neither bias nor weight normalisation.

    Args:
        filters: Number of output channels.
        expansion: Number of hidden channels per input channel.
        kernel_size: Size of the middle convolution's kernel.
        groups: Number of groups of the middle convolution; 0 for a depthwise one.
        direction: As in `ResidualCell`. ``"up"`` doubles the map first; ``"down"`` gives the middle
            convolution stride 2.

    Reference: NVAE paper, figure 3a; Sandler et al., *MobileNetV2*, 2018.
    """

    def __init__(self, filters, expansion, kernel_size, groups, direction, **kwargs):
        super().__init__(filters, **kwargs)
        self.expansion, self.kernel_size = expansion, kernel_size
        self.groups, self.direction = groups, direction

    def create(self, input_shape):
        """Builds the layers and creates their weights for the input's channels."""
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
        layers = [self.norms[0]]
        for convolution, norm in zip(self.convolutions, self.norms[1:], strict=True):
            layers += [convolution, norm]
        create_chain(layers, int(input_shape[-1]))

    def call(self, inputs, scope: Scope):
        """Runs the seven layers; each batch norm forms a block with the convolution that follows."""
        outputs = nearest_x2(inputs) if self.direction == UP else inputs
        for norm, convolution in zip(self.norms[:3], self.convolutions, strict=True):
            norm.exchange_statistics(outputs, scope)
            layers = [norm, convolution]
            outputs = call_block(
                _normalize_and_convolve, layers, [outputs], scope, remat_when=BN_ACT
            )
        self.norms[3].exchange_statistics(outputs, scope)
        return call_block(BatchNormAct.call, self.norms[3:], [outputs], scope)

    def get_config(self):
        """The constructor's arguments."""
        names = ("expansion", "kernel_size", "groups", "direction")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _normalize_and_convolve(norm, convolution, inputs, scope: Scope):
    return convolution(norm(inputs, scope=scope), scope=scope)


class SqueezeExcitation(Layer):
    """Scales each channel by a gate computed from the means of all channels.

    The gate: mean over the map; dense layer to max(channels // 16, 4) units, ReLU; dense layer to the
    number of channels, sigmoid. It is computed in float32.

    Input and output shape: (batch, height, width, channels).
    Reference: Hu et al., *Squeeze-and-Excitation Networks*, 2018.
    """

    def create(self, input_shape):
        """Creates the weights of both dense layers."""
        channels = int(input_shape[-1])
        hidden = max(channels // 16, 4)
        reduce_init, expand_init = uniform_fan_in(channels), uniform_fan_in(hidden)
        self.reduce_kernel = self.add_weight((channels, hidden), reduce_init)
        self.reduce_bias = self.add_weight((hidden,), reduce_init)
        self.expand_kernel = self.add_weight((hidden, channels), expand_init)
        self.expand_bias = self.add_weight((channels,), expand_init)

    def compute_output_shape(self, input_shape):
        """The input's shape."""
        return input_shape

    def call(self, inputs, scope: Scope):
        """Scales the channels."""
        value = scope.value
        gate = tf.reduce_mean(tf.cast(inputs, tf.float32), [1, 2])
        gate = tf.nn.relu(tf.matmul(gate, value(self.reduce_kernel)) + value(self.reduce_bias))
        gate = tf.nn.sigmoid(tf.matmul(gate, value(self.expand_kernel)) + value(self.expand_bias))
        return inputs * tf.cast(gate, inputs.dtype)[:, None, None, :]


class SkipDown(_FixedWidthLayer):
    """The skip of a down cell: swish, then four 1x1 convolutions whose outputs are concatenated.

    Each convolution sees a different pixel of every 2x2 block.

    Args:
        filters: Number of output channels.

    Input shape: (batch, height, width, channels).
    Output shape: (batch, height / 2, width / 2, filters).
    """

    def __init__(self, filters, **kwargs):
        super().__init__(filters, **kwargs)
        quarter = filters // 4
        widths = (quarter, quarter, quarter, filters - 3 * quarter)
        self.convolutions = [Conv2D(width, 1, strides=2) for width in widths]

    def create(self, input_shape):
        """Creates the weights of the four convolutions for the input's channels."""
        for convolution in self.convolutions:
            create_chain([convolution], int(input_shape[-1]))

    def call(self, inputs, scope: Scope):
        """Halves a batch of maps."""
        # Together they are one 2x2 convolution, in which each kernel is zero except at its own pixel.
        pixels = ((0, 0), (1, 1), (0, 1), (1, 0))
        kernels = [
            tf.pad(
                conv.effective_kernel(scope), [[row, 1 - row], [column, 1 - column], [0, 0], [0, 0]]
            )
            for conv, (row, column) in zip(self.convolutions, pixels, strict=True)
        ]
        kernel = tf.cast(tf.concat(kernels, -1), inputs.dtype)
        biases = [scope.value(conv.bias) for conv in self.convolutions]
        activated = activate("swish", inputs, scope.custom_gradients)
        bias = tf.cast(tf.concat(biases, 0), inputs.dtype)
        return tf.nn.conv2d(activated, kernel, 2, "VALID") + bias


class SkipUp(_FixedWidthLayer):
    """The skip of an up cell: a 1x1 convolution, then bilinear doubling with aligned corners.

    Args:
        filters: Number of output channels.

    Input shape: (batch, height, width, channels).
    Output shape: (batch, 2 height, 2 width, filters).
    """

    def __init__(self, filters, **kwargs):
        super().__init__(filters, **kwargs)
        self.convolution = Conv2D(filters, 1, use_bias=False)

    def create(self, input_shape):
        """Creates the weights of the convolution for the input's channels."""
        create_chain([self.convolution], int(input_shape[-1]))

    def call(self, inputs, scope: Scope):
        """Doubles a batch of maps."""
        # The official implementation doubles first. The two steps are linear, one over pixels and one
        # over channels, so they commute; in this order only a quarter of the pixels is convolved.
        return bilinear_x2(self.convolution(inputs, scope=scope))


def nearest_x2(maps):
    """Doubles height and width by repeating each pixel (nearest neighbour).

    Args:
        maps: Maps (batch, height, width, channels).

    Returns:
        Maps (batch, 2 height, 2 width, channels).
    """
    _, height, width, channels = maps.shape
    pixels = tf.reshape(maps, [-1, height, 1, width, 1, channels])
    tiled = tf.tile(pixels, [1, 1, 2, 1, 2, 1])
    return tf.reshape(tiled, [-1, 2 * height, 2 * width, channels])


def bilinear_x2(maps):
    """Doubles height and width by bilinear interpolation with aligned corners.

    It is computed as two small matrix products, because the gradient of TensorFlow's resize is not
    deterministic on GPUs and its result is always float32. The products use `tf.matmul`, because TFLite
    cannot store the shapes of `tf.einsum` if the batch size is unknown.

    Args:
        maps: Maps (batch, height, width, channels).

    Returns:
        Maps (batch, 2 height, 2 width, channels).
    """
    _, height, width, channels = maps.shape
    rows, columns = (tf.constant(_interpolation(n), maps.dtype) for n in (height, width))
    maps = tf.matmul(rows, tf.reshape(maps, [-1, height, width * channels]))
    maps = tf.matmul(columns, tf.reshape(maps, [-1, width, channels]))
    return tf.reshape(maps, [-1, 2 * height, 2 * width, channels])


def _interpolation(size: int) -> np.ndarray:
    """The matrix (2 size, size) of linear interpolation that keeps the first and the last value."""
    positions = np.arange(2 * size) * ((size - 1) / (2 * size - 1))
    return np.maximum(0.0, 1.0 - np.abs(positions[:, None] - np.arange(size))).astype(np.float32)

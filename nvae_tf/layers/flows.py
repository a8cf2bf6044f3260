"""Normalizing flows on a group's latents: volume-preserving inverse autoregressive flows."""

import functools
import math

import tensorflow as tf
import tensorflow_probability as tfp

from nvae_tf.engine.scope import Scope
from nvae_tf.layers.base import Layer, create_chain
from nvae_tf.layers.convolution import Conv2D

HIDDEN_PER_LATENT = 6  # hidden channels of a shift per latent channel
LOG_TENTH = math.log(0.1)


class MaskedShift(Layer):
    """The shift mu(z) of an inverse autoregressive flow ``z' = z - mu(z)``.

    mu at each latent depends only on the latents before it: pixels in raster order, and within a pixel
    channels in order. It is a masked 3x3 convolution (strictly causal at the centre), ELU, a masked
    depthwise 5x5 convolution, ELU twice, and a masked 1x1 convolution.

    Args:
        mirror: Whether to reverse the raster order (not the order of the channels).

    Input and output shape: (batch, height, width, latents).
    Reference: NVAE paper, appendix A; Kingma et al., *Improved Variational Inference with Inverse
    Autoregressive Flow*, 2016.
    """

    def __init__(self, mirror=False, **kwargs):
        super().__init__(**kwargs)
        self.mirror = mirror

    def create(self, input_shape):
        """Creates the convolutions for the input's latent channels."""
        latents = int(input_shape[-1])
        hidden, mirror = HIDDEN_PER_LATENT * latents, self.mirror
        self.convolutions = [
            Conv2D(hidden, 3, use_bias=False, mask="strictly_causal", mirror=mirror),
            Conv2D(None, 5, use_bias=False, mask="causal", mirror=mirror),
            # A shift that begins ten times smaller keeps the flow near the identity.
            Conv2D(latents, 1, mask="causal", mirror=mirror, log_norm_shift=LOG_TENTH),
        ]
        create_chain(self.convolutions, latents)

    def compute_output_shape(self, input_shape):
        """The input's shape."""
        return input_shape

    def call(self, inputs, scope: Scope):
        """Computes mu(z), shaped as z."""
        widen, spread, project = self.convolutions
        hidden = spread(tf.nn.elu(widen(inputs, scope=scope)), scope=scope)
        # Both ELUs are intended: the first ends the hidden layers, the second begins the projection.
        return project(tf.nn.elu(tf.nn.elu(hidden)), scope=scope)

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "mirror": self.mirror}


class ShiftBijector(tfp.bijectors.Bijector):
    """The inverse autoregressive flow ``z' = z - mu(z)`` of one `MaskedShift`.

    Its event shape is (height, width, latents), and its log-determinant is 0. The inverse is a
    fixed-point iteration: after n rounds the first n latents are exact, and the iteration stops as soon
    as nothing changes. The model itself computes its flows with `IAFCell.call`; the bijector is for
    users of TFP.

    Args:
        shift: A function that computes mu(z), autoregressive as `MaskedShift` is.
        name: Name of the bijector.
    """

    def __init__(self, shift, name="shift"):
        parameters = dict(locals())
        self.shift = shift
        super().__init__(
            forward_min_event_ndims=3,
            is_constant_jacobian=True,
            parameters=parameters,
            name=name,
        )

    def _forward(self, x):
        return x - self.shift(x)

    def _inverse(self, y):
        def changed(_, change):
            return change > 0

        def refine(x, _):
            refined = y + self.shift(x)
            return refined, tf.reduce_max(tf.abs(refined - x))

        latents = tf.reduce_prod(tf.shape(y)[-3:])
        initial = (y, tf.constant(1.0, y.dtype))
        return tf.while_loop(changed, refine, initial, maximum_iterations=latents)[0]

    def _forward_log_det_jacobian(self, x):
        return tf.zeros([], x.dtype)


class IAFCell(Layer):
    """One cell of inverse autoregressive flow: a shift in raster order, then one in the mirrored order.

    Both shifts preserve volume, so the log-determinant of the cell is 0.

    Input and output shape: (batch, height, width, latents).
    Reference: NVAE paper, appendix A.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.shifts = [MaskedShift(mirror=False), MaskedShift(mirror=True)]

    def create(self, input_shape):
        """Creates both shifts for the input's latent channels."""
        create_chain(self.shifts, int(input_shape[-1]))

    def compute_output_shape(self, input_shape):
        """The input's shape."""
        return input_shape

    def bijectors(self, scope: Scope):
        """The cell's bijectors, in the order in which they are applied to z."""
        return [ShiftBijector(functools.partial(shift, scope=scope)) for shift in self.shifts]

    def call(self, inputs, scope: Scope):
        """Applies both shifts to z."""
        for shift in self.shifts:
            inputs = inputs - shift(inputs, scope=scope)
        return inputs

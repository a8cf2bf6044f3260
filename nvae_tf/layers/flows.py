"""Normalizing flows on a group's latents: inverse autoregressive, volume-preserving shifts."""

import functools

import tensorflow as tf
import tensorflow_probability as tfp

from nvae_tf.engine.scope import Scope
from nvae_tf.layers.base import Layer, create_chain
from nvae_tf.layers.convolution import Conv2D

HIDDEN_PER_LATENT = 6


class MaskedShift(Layer):
    """The shift mu(z), in which each latent sees only those before it in raster order.

    Masked 3x3 convolution (centre strictly causal), ELU, masked depthwise 5x5, ELU twice, masked 1x1.

    Args:
        mirror: reverse the raster order (not that of the channels).

    Input and output shape: (batch, height, width, latents).
    Reference: NVAE paper, appendix A.
    """

    def __init__(self, mirror=False, **kwargs):
        super().__init__(**kwargs)
        self.mirror = mirror

    def create(self, input_shape):
        """Makes the convolutions for the input's latent channels."""
        latents = int(input_shape[-1])
        hidden, mirror = HIDDEN_PER_LATENT * latents, self.mirror
        self.convolutions = [
            Conv2D(hidden, 3, use_bias=False, mask="strictly_causal", mirror=mirror),
            Conv2D(None, 5, use_bias=False, mask="causal", mirror=mirror),
            # A shift that starts at a tenth keeps the flow near the identity.
            Conv2D(latents, 1, mask="causal", mirror=mirror, log_norm_shift=LOG_TENTH),
        ]
        create_chain(self.convolutions, latents)

    def compute_output_shape(self, input_shape):
        """The input's."""
        return input_shape

    def call(self, inputs, scope: Scope):
        """Computes mu(z)."""
        widen, spread, project = self.convolutions
        hidden = spread(tf.nn.elu(widen(inputs, scope=scope)), scope=scope)
        # The second ELU is intended: one ends the hidden layers, one begins the projection.
        return project(tf.nn.elu(tf.nn.elu(hidden)), scope=scope)

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), "mirror": self.mirror}


LOG_TENTH = -2.302585092994046


class ShiftBijector(tfp.bijectors.Bijector):
    """The flow ``z' = z - mu(z)`` of one `MaskedShift`; its log-determinant is 0.

    The event is a map (height, width, latents). The inverse, which training never needs (TFP
    remembers what a forward pass came from), is a fixed-point iteration: after n rounds the first n
    latents in raster order are exact, and it stops as soon as nothing changes.

    Args:
        shift: A function with the dependencies of `MaskedShift`, which computes mu.
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
        start = (y, tf.constant(1.0, y.dtype))
        return tf.while_loop(changed, refine, start, maximum_iterations=latents)[0]

    def _forward_log_det_jacobian(self, x):
        return tf.zeros([], x.dtype)


class IAFCell(Layer):
    """One flow cell: a causal shift, then its mirror image.

    Input and output shape: (batch, height, width, latents).
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.shifts = [MaskedShift(mirror=False), MaskedShift(mirror=True)]

    def create(self, input_shape):
        """Makes both shifts for the input's latent channels."""
        create_chain(self.shifts, int(input_shape[-1]))

    def compute_output_shape(self, input_shape):
        """The input's."""
        return input_shape

    def bijectors(self, scope: Scope):
        """The cell's bijectors, first applied first."""
        return [ShiftBijector(functools.partial(shift, scope=scope)) for shift in self.shifts]

    def call(self, inputs, scope: Scope):
        """Transforms z."""
        for shift in self.shifts:
            inputs = inputs - shift(inputs, scope=scope)
        return inputs

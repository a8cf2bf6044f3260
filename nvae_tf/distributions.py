"""The distributions of latents and images, as TensorFlow Probability distributions.

Image distributions have event shape (height, width, channels) and are over images in [0, 1]. Those of
colour images can turn given noise into a sample: `from_uniform` takes `num_uniform` uniform values per
pixel.
"""

import math

import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow_probability import distributions as tfd

from nvae_tf import stateless_random
from nvae_tf.config import AUTO

CLAMP = 5.0
MINIMUM_SCALE = 1e-2  # added to the scale of a normal distribution
MINIMUM_LOG_SCALE = -7.0  # for logistic distributions, officially, whose values have 8 bits


def soft_clamp(x):
    """``5 tanh(x / 5)``: the identity near 0, bounded by 5."""
    return CLAMP * tf.tanh(tf.convert_to_tensor(x) / CLAMP)


def clamped_normal(mu, log_sigma, temperature=1.0, stddev="exp") -> tfd.Normal:
    """A normal distribution whose raw parameters pass through `soft_clamp`.

    Its mean is ``clamp(mu)``, its standard deviation ``(exp(clamp(log_sigma)) + 0.01) * temperature``.

    Args:
        mu: Raw means.
        log_sigma: Logarithms of raw standard deviations, of the same shape.
        temperature: Factor on the standard deviation.
        stddev: ``"softplus"`` for ``log2(1 + 2**x)`` in place of ``exp(x)``: both are about 1 at 0, but
            this one and its gradient stay small (softplus with beta = ln 2).

    References: NVAE paper, section 3.2 and appendix; Hazami et al., *Efficient-VDVAE*, 2022.
    """
    raw = soft_clamp(log_sigma)
    if stddev == "softplus":
        scale = tf.nn.softplus(raw * math.log(2.0)) / math.log(2.0) + MINIMUM_SCALE
    else:
        scale = tf.exp(raw) + MINIMUM_SCALE
    return tfd.Normal(soft_clamp(mu), scale * tf.cast(temperature, scale.dtype))


def from_noise(normal: tfd.Normal, noise):
    """The sample ``mean + stddev * noise`` for standard-normal noise."""
    return normal.loc + normal.scale * noise


def bernoulli_image(logits) -> tfd.Independent:
    """The distribution of an image of independent binary pixels.

    Args:
        logits: Logits of the pixels, (..., height, width, channels).
    """
    return tfd.Independent(tfd.Bernoulli(logits=logits, dtype=logits.dtype), 3)


class NormalImage(tfd.Distribution):
    """Independent normal values; `log_prob` is a density of the image scaled to [-1, 1], in nats.

    The scale is that of the official implementation. Log-densities may be positive, and compare with
    the log-probabilities of other distributions only after `NVAE.bits_per_dim`.

    Args:
        parameters: (..., height, width, 2 * channels): raw means, then logarithms of raw standard
            deviations, as for `clamped_normal`.
        name: Name of the distribution.
    """

    def __init__(self, parameters, name="NormalImage"):
        mu, log_sigma = tf.split(parameters, 2, -1)
        self.scaled = tfd.Independent(clamped_normal(mu, log_sigma), 3)
        super().__init__(
            dtype=mu.dtype,
            reparameterization_type=tfd.FULLY_REPARAMETERIZED,
            validate_args=False,
            allow_nan_stats=False,
            parameters=dict(parameters=parameters),
            name=name,
        )

    def _batch_shape(self):
        return self.scaled.batch_shape

    def _batch_shape_tensor(self):
        return self.scaled.batch_shape_tensor()

    def _event_shape(self):
        return self.scaled.event_shape

    def _event_shape_tensor(self):
        return self.scaled.event_shape_tensor()

    def _log_prob(self, x):
        return self.scaled.log_prob(2.0 * x - 1.0)

    def _sample_n(self, n, seed=None):
        return self.from_uniform(_draw_uniform(self, n, seed))

    def from_uniform(self, uniform):
        """The sample for given noise.

        Args:
            uniform: Values in (0, 1), (..., height, width, channels).
        """
        normal = self.scaled.distribution
        return _to_unit(from_noise(normal, tf.math.ndtri(uniform)))

    @property
    def num_uniform(self) -> int:
        """Number of noise values per pixel."""
        return self.event_shape[-1]

    def _mean(self):
        return _to_unit(self.scaled.mean())


class DiscretizedLogisticMixture(tfd.Distribution):
    """Mixture of discretised logistics over RGB images.

    Within a pixel the mean of green depends on red, and that of blue on red and green.

    Args:
        parameters: (..., height, width, 10 * num_mixtures): the mixture's logits, then for each of R,
            G and B: means, log-scales and coefficients (before tanh).
        num_bits: Bits per value: the distribution is over multiples of 1 / (2^num_bits - 1).
        temperature: Temperature of samples. It divides the mixture's logits and, as in the official
            implementation, the scales too.
        min_log_scale: Smallest log-scale; ``"auto"``: `minimum_log_scale` of the bits.
        name: Name of the distribution.

    Reference: Salimans et al., *PixelCNN++*, 2017.
    """

    def __init__(
        self,
        parameters,
        num_bits=8,
        temperature=1.0,
        min_log_scale=MINIMUM_LOG_SCALE,
        name="DiscretizedLogisticMixture",
    ):
        self.mixtures = parameters.shape[-1] // 10
        self.max_level = 2.0**num_bits - 1.0
        self.temperature = temperature
        shape = tf.shape(parameters)[:-1]
        self.logits = parameters[..., : self.mixtures]  # (..., h, w, M)
        # (..., h, w, 3, M) each; at most five dimensions, since TFLite cannot slice more.
        logistic_parameters = tf.reshape(
            parameters[..., self.mixtures :], tf.concat([shape, [3, 3 * self.mixtures]], 0)
        )
        self.means, log_scales, coefficients = tf.split(logistic_parameters, 3, -1)
        smallest = minimum_log_scale(num_bits) if min_log_scale == AUTO else min_log_scale
        self.log_scales = tf.maximum(log_scales, smallest)
        self.coefficients = tf.tanh(coefficients)
        self._pixels_shape = parameters.shape[:-1]
        super().__init__(
            dtype=parameters.dtype,
            reparameterization_type=tfd.NOT_REPARAMETERIZED,
            validate_args=False,
            allow_nan_stats=False,
            parameters=dict(
                parameters=parameters,
                num_bits=num_bits,
                temperature=temperature,
                min_log_scale=min_log_scale,
            ),
            name=name,
        )

    def _batch_shape(self):
        return self._pixels_shape[:-2]

    def _batch_shape_tensor(self):
        return tf.shape(self.logits)[:-3]

    def _event_shape(self):
        return self._pixels_shape[-2:].concatenate([3])

    def _event_shape_tensor(self):
        return tf.concat([tf.shape(self.logits)[-3:-1], [3]], 0)

    def _log_prob(self, x):
        x = (2.0 * x - 1.0)[..., None]  # (..., h, w, 3, 1)
        red, green = x[..., 0, :], x[..., 1, :]
        to_green, red_to_blue, green_to_blue = tf.unstack(self.coefficients, axis=-2)
        green_shift = to_green * red
        blue_shift = red_to_blue * red + green_to_blue * green
        shifts = [tf.zeros_like(green_shift), green_shift, blue_shift]
        means = self.means + tf.stack(shifts, -2)
        centred = x - means
        inverse_scale = tf.exp(-self.log_scales)
        upper = inverse_scale * (centred + 1.0 / self.max_level)
        lower = inverse_scale * (centred - 1.0 / self.max_level)
        middle = inverse_scale * centred
        mass = tf.sigmoid(upper) - tf.sigmoid(lower)
        # If the mass is lost in rounding, it is the density at the bin's centre times the bin's width.
        log_density = middle - self.log_scales - 2.0 * tf.nn.softplus(middle)
        log_mass = tf.where(
            mass > 1e-5,
            tf.math.log(tf.maximum(mass, 1e-10)),
            log_density - math.log(self.max_level / 2.0),
        )
        log_lowest = upper - tf.nn.softplus(upper)
        log_highest = -tf.nn.softplus(lower)
        log_prob = tf.where(x < -0.999, log_lowest, tf.where(x > 0.99, log_highest, log_mass))
        log_prob = tf.reduce_sum(log_prob, -2) + tf.nn.log_softmax(self.logits)
        return tf.reduce_sum(tf.reduce_logsumexp(log_prob, -1), [-2, -1])

    def _sample_n(self, n, seed=None):
        return self.from_uniform(_draw_uniform(self, n, seed))

    def from_uniform(self, uniform):
        """The sample for given noise.

        Args:
            uniform: Values in (0, 1), (..., height, width, num_mixtures + 3): for the choice of the
                component, then for R, G and B.
        """
        component_uniform, value_uniform = tf.split(uniform, [self.mixtures, 3], -1)
        temperature = tf.cast(self.temperature, self.dtype)
        gumbel = -tf.math.log(-tf.math.log(component_uniform))
        component = tf.argmax(self.logits / temperature + gumbel, -1)
        one_hot = tf.one_hot(component, self.mixtures, dtype=self.dtype)[..., None, :]
        means, log_scales, coefficients = (
            tf.reduce_sum(tensor * one_hot, -1)
            for tensor in (self.means, self.log_scales, self.coefficients)
        )
        logistic = tf.math.log(value_uniform) - tf.math.log1p(-value_uniform)
        values = means + tf.exp(log_scales) / temperature * logistic
        return _to_unit(_shift_colours(values, coefficients))

    @property
    def num_uniform(self) -> int:
        """Number of noise values per pixel."""
        return self.mixtures + 3

    def mean_image(self):
        """The image to show for the distribution, as in the official implementation.

        It is not E[x], which has no closed form (so TFP's `mean` is not implemented): means and
        coefficients are averaged over the components first, and then green is shifted by red, and blue
        by red and green. Values are not rounded to levels.

        Returns:
            Images (..., height, width, 3) in [0, 1].
        """
        weights = tf.nn.softmax(self.logits)[..., None, :]
        means = tf.reduce_sum(weights * self.means, -1)
        coefficients = tf.reduce_sum(weights * self.coefficients, -1)
        return _to_unit(_shift_colours(means, coefficients))


def minimum_log_scale(num_bits: int) -> float:
    """The log-scale that is as many levels wide as the official -7 is with 8 bits."""
    return MINIMUM_LOG_SCALE + math.log(255.0 / (2.0**num_bits - 1.0))


def mean_image(distribution):
    """The image to show for an image distribution: its mean, or `mean_image` of a logistic mixture."""
    mixture = isinstance(distribution, DiscretizedLogisticMixture)
    return distribution.mean_image() if mixture else distribution.mean()


def _draw_uniform(distribution, n, seed):
    """Draws the uniform noise for n samples of an image distribution."""
    batch, event = distribution.batch_shape_tensor(), distribution.event_shape_tensor()
    shape = tf.concat([[n], batch, event[:-1], [distribution.num_uniform]], 0)
    seed = tfp.random.sanitize_seed(seed)
    return tf.random.stateless_uniform(shape, seed, minval=stateless_random.SMALLEST)


def _shift_colours(values, coefficients):
    """R, then G shifted by R, then B shifted by R and G, each clipped to [-1, 1]."""
    to_green, red_to_blue, green_to_blue = tf.unstack(coefficients, axis=-1)
    red, green, blue = tf.unstack(values, axis=-1)
    red = tf.clip_by_value(red, -1.0, 1.0)
    green = tf.clip_by_value(green + to_green * red, -1.0, 1.0)
    blue = tf.clip_by_value(blue + red_to_blue * red + green_to_blue * green, -1.0, 1.0)
    return tf.stack([red, green, blue], -1)


def _to_unit(x):
    """Maps values from [-1, 1] to [0, 1]."""
    return 0.5 * (x + 1.0)

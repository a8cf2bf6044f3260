"""The distributions of latents and images, as TensorFlow Probability distributions.

Image distributions are over images in [0, 1] and have event shape (height, width, channels). The two
that are not binary can also turn given noise into a sample: their `from_uniform` takes `num_uniform`
uniform values per pixel.
"""

import functools
import math
import operator

import tensorflow as tf
import tensorflow_probability as tfp
from tensorflow_probability import distributions as tfd

from nvae_tf import stateless_random
from nvae_tf.config import OFFICIAL
from nvae_tf.image_spec import OFFICIAL_BITS

CLAMP = 5.0
MINIMUM_SCALE = 1e-2  # added to the standard deviation of a clamped normal
MINIMUM_LOG_SCALE = -7.0  # of logistics for values of 8 bits, as in the official implementation


def soft_clamp(x):
    """``5 tanh(x / 5)``, elementwise: close to the identity near 0, bounded by +-5."""
    return CLAMP * tf.tanh(tf.convert_to_tensor(x) / CLAMP)


def clamped_normal(mu, log_sigma, temperature=1.0, stddev="exp") -> tfd.Normal:
    """A normal distribution whose raw parameters pass through `soft_clamp`.

    The mean is ``clamp(mu)``, the standard deviation ``(exp(clamp(log_sigma)) + 0.01) * temperature``.

    Args:
        mu: Raw means.
        log_sigma: Logarithms of raw standard deviations, of the same shape.
        temperature: Factor on the standard deviation.
        stddev: ``"exp"``, or ``"softplus"`` for ``log2(1 + 2**x)`` in place of ``exp(x)`` (softplus
            with beta = ln 2). Both are 1 at 0, but this one grows linearly and has a gradient below 1.

    References: NVAE paper, section 3.2 and appendix; Hazami et al., *Efficient-VDVAE*, 2022.
    """
    raw = soft_clamp(log_sigma)
    if stddev == "softplus":
        scale = tf.nn.softplus(raw * math.log(2.0)) / math.log(2.0) + MINIMUM_SCALE
    else:
        scale = tf.exp(raw) + MINIMUM_SCALE
    return tfd.Normal(soft_clamp(mu), scale * tf.cast(temperature, scale.dtype))


def bernoulli_image(logits) -> tfd.Independent:
    """The distribution of an image of independent binary pixels.

    Args:
        logits: Logits of the pixels, (..., height, width, channels).
    """
    return tfd.Independent(tfd.Bernoulli(logits=logits, dtype=logits.dtype), 3)


class NormalImage(tfd.Distribution):
    """Independent normal values; `log_prob` is the log-density of the image scaled to [-1, 1], in nats.

    The scale is that of the official implementation. Log-densities may be positive, and can be compared
    with the log-probabilities of other distributions only after `NVAE.bits_per_dim`.

    Args:
        parameters: Raw means, then logarithms of raw standard deviations, as for `clamped_normal`,
            (..., height, width, 2 * channels).
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
        return _to_unit(normal.loc + normal.scale * tf.math.ndtri(uniform))

    @property
    def num_uniform(self) -> int:
        """Number of noise values per pixel."""
        return self.event_shape[-1]

    def _mean(self):
        return _to_unit(self.scaled.mean())


class DiscretizedLogisticMixture(tfd.Distribution):
    """Mixture of discretised logistics over images with 1 to 16 channels.

    Within a pixel and a component, the mean of a channel depends linearly on earlier channels. With up
    to three channels it depends on all of them, as in PixelCNN++; with more, only on the one just
    before, so that the number of coefficients grows linearly.

    The official implementation approximates probabilities below 1e-5, and with 8 bits it counts the
    probability of level 255 for level 254, too. Exact probabilities sum to 1 over all levels.

    Args:
        parameters: (..., height, width, `num_mixture_parameters`). First the mixture's logits. Then,
            with three channels, for each of R, G and B: means, log-scales and coefficients (before
            tanh); otherwise for each channel means and log-scales, and after those all coefficients.
        num_bits: Bits per value: the distribution is over multiples of 1 / (2^num_bits - 1).
        temperature: Temperature of samples. It divides the mixture's logits and, as in the official
            implementation, also the scales.
        min_log_scale: Smallest log-scale: a number, ``"official"`` or ``"auto"`` (see
            `minimum_log_scale`).
        channels: Number of channels.
        exact: Whether probabilities are exact and samples are rounded to levels; default: neither, as
            in the official implementation.
        name: Name of the distribution.

    Reference: Salimans et al., *PixelCNN++*, 2017.
    """

    def __init__(
        self,
        parameters,
        num_bits=8,
        temperature=1.0,
        min_log_scale=OFFICIAL,
        channels=3,
        exact=False,
        name="DiscretizedLogisticMixture",
    ):
        parameters = tf.convert_to_tensor(parameters)
        count = len(_chain(channels))
        self.mixtures = parameters.shape[-1] // num_mixture_parameters(channels, 1)
        self.channels, self.exact = channels, exact
        self.max_level = 2.0**num_bits - 1.0
        self.temperature = temperature
        shape = tf.shape(parameters)[:-1]
        self.logits = parameters[..., : self.mixtures]  # (..., h, w, M)
        rest = parameters[..., self.mixtures :]
        # Each is (..., h, w, channels, M); not more than five dimensions, which TFLite could not slice.
        if channels == 3:
            rest = tf.reshape(rest, tf.concat([shape, [3, 3 * self.mixtures]], 0))
            self.means, log_scales, coefficients = tf.split(rest, 3, -1)
        else:
            values = rest[..., : 2 * channels * self.mixtures]
            values = tf.reshape(values, tf.concat([shape, [channels, 2 * self.mixtures]], 0))
            self.means, log_scales = tf.split(values, 2, -1)
            coefficients = tf.reshape(
                rest[..., 2 * channels * self.mixtures :],
                tf.concat([shape, [count, self.mixtures]], 0),
            )
        self.log_scales = tf.maximum(log_scales, minimum_log_scale(num_bits, min_log_scale))
        self.coefficients = tf.tanh(coefficients)  # (..., h, w, coefficients, M)
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
                channels=channels,
                exact=exact,
            ),
            name=name,
        )

    def _batch_shape(self):
        return self._pixels_shape[:-2]

    def _batch_shape_tensor(self):
        return tf.shape(self.logits)[:-3]

    def _event_shape(self):
        return self._pixels_shape[-2:].concatenate([self.channels])

    def _event_shape_tensor(self):
        return tf.concat([tf.shape(self.logits)[-3:-1], [self.channels]], 0)

    def _log_prob(self, x):
        return tf.reduce_sum(self.pixel_log_prob(x), [-2, -1])

    def pixel_log_prob(self, x):
        """log p of each pixel (all channels together) in nats, (..., height, width).

        Args:
            x: Images (..., height, width, channels) in [0, 1].
        """
        scaled = (2.0 * x - 1.0)[..., None]  # (..., h, w, channels, 1)
        values, coefficients = tf.unstack(scaled, axis=-2), tf.unstack(self.coefficients, axis=-2)
        shifts = [
            channel_shift(values, coefficients, channel, self.channels)
            for channel in range(1, self.channels)
        ]
        means = self.means
        if shifts:
            means += tf.stack([tf.zeros_like(shifts[0]), *shifts], -2)
        if self.exact:
            levels = tf.round(x * self.max_level)[..., None]
            log_prob = exact_log_mass(levels, means, self.log_scales, self.max_level)
        else:
            log_prob = _official_log_mass(scaled, means, self.log_scales, self.max_level)
        log_prob = tf.reduce_sum(log_prob, -2) + tf.nn.log_softmax(self.logits)
        return tf.reduce_logsumexp(log_prob, -1)

    def _sample_n(self, n, seed=None):
        return self.from_uniform(_draw_uniform(self, n, seed))

    def from_uniform(self, uniform):
        """The sample for given noise.

        Args:
            uniform: Values in (0, 1), (..., height, width, num_mixtures + channels): first those that
                choose the component, then one per channel.

        Returns:
            Images (..., height, width, channels) in [0, 1].
        """
        component_uniform, value_uniform = tf.split(uniform, [self.mixtures, self.channels], -1)
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
        return _to_unit(self._shifted(values, coefficients, to_levels=self.exact))

    @property
    def num_uniform(self) -> int:
        """Number of noise values per pixel."""
        return self.mixtures + self.channels

    def mean_image(self):
        """The image to show for the distribution, as in the official implementation.

        It is not E[x], which has no closed form (so TFP's `mean` is not implemented). Instead, means
        and coefficients are averaged over the components, and then each channel is shifted according to
        the channels before it. Values are not rounded to levels.

        Returns:
            Images (..., height, width, channels) in [0, 1].
        """
        weights = tf.nn.softmax(self.logits)[..., None, :]
        means = tf.reduce_sum(weights * self.means, -1)
        coefficients = tf.reduce_sum(weights * self.coefficients, -1)
        return _to_unit(self._shifted(means, coefficients, to_levels=False))

    def _shifted(self, values, coefficients, to_levels: bool):
        """Shifts each channel according to those before it, clips to [-1, 1], and maybe rounds."""
        coefficients, shifted = tf.unstack(coefficients, axis=-1), []
        for channel, mean in enumerate(tf.unstack(values, axis=-1)):
            shift = channel_shift(shifted, coefficients, channel, self.channels) if channel else 0.0
            value = tf.clip_by_value(mean + shift, -1.0, 1.0)
            if to_levels:
                level = tf.round(_to_unit(value) * self.max_level)
                value = 2.0 * level / self.max_level - 1.0
            shifted.append(value)
        return tf.stack(shifted, -1)


def num_mixture_parameters(channels: int, mixtures: int) -> int:
    """Number of parameters per pixel of a mixture of discretised logistics.

    Args:
        channels: Number of channels.
        mixtures: Number of components.
    """
    return mixtures * (1 + 2 * channels + len(_chain(channels)))


def minimum_log_scale(num_bits: int, chosen: float | str) -> float:
    """The smallest log-scale of the logistics.

    Args:
        num_bits: Bits per value.
        chosen: A number, which is returned as it is; ``"auto"``: the log-scale that spans as many
            levels as -7 does with 8 bits; ``"official"``: -7 up to 8 bits, and beyond as ``"auto"``.
    """
    if not isinstance(chosen, str):
        return chosen
    if chosen == OFFICIAL and num_bits <= OFFICIAL_BITS:
        return MINIMUM_LOG_SCALE
    return MINIMUM_LOG_SCALE + math.log(255.0 / (2.0**num_bits - 1.0))


def _official_log_mass(x, means, log_scales, max_level):
    """Logarithms of the probabilities of levels, as the official implementation approximates them.

    Args:
        x: Values in [-1, 1], (..., channels, 1).
        means: Means of the logistics on the scale [-1, 1], (..., channels, M).
        log_scales: Logarithms of the logistics' scales, of the same shape.
        max_level: The last level.

    Returns:
        Natural logarithms, (..., channels, M).
    """
    centred = x - means
    inverse_scale = tf.exp(-log_scales)
    upper = inverse_scale * (centred + 1.0 / max_level)
    lower = inverse_scale * (centred - 1.0 / max_level)
    middle = inverse_scale * centred
    mass = tf.sigmoid(upper) - tf.sigmoid(lower)
    # A mass too small for the difference is approximated: density at the bin's centre times its width.
    log_density = middle - log_scales - 2.0 * tf.nn.softplus(middle)
    log_mass = tf.where(
        mass > 1e-5,
        tf.math.log(tf.maximum(mass, 1e-10)),
        log_density - math.log(max_level / 2.0),
    )
    log_lowest = upper - tf.nn.softplus(upper)
    log_highest = -tf.nn.softplus(lower)
    return tf.where(x < -0.999, log_lowest, tf.where(x > 0.99, log_highest, log_mass))


def exact_log_mass(level, means, log_scales, max_level):
    """Logarithms of the exact probabilities of levels, which sum to 1 over all levels.

    Level l has the logistic's mass between l - 1/2 and l + 1/2, and the outermost levels also have all
    mass beyond. With F the logistic function, ``F(u) - F(v) = F(u) F(-v) (1 - exp(v - u))``, whose
    logarithm stays accurate where the difference of two sigmoids would be 0. Edges are computed from
    whole numbers in units of half a level, in which the range of values is [-max_level, max_level]. So
    neighbouring levels share an edge to the bit, even with 16 bits.

    Args:
        level: Whole numbers from 0 to `max_level`, as floats, (..., channels, 1).
        means: Means of the logistics on the scale [-1, 1], (..., channels, M).
        log_scales: Logarithms of the logistics' scales, of the same shape.
        max_level: The last level.

    Returns:
        Natural logarithms, (..., channels, M).
    """
    middle = means * max_level
    per_half_level = tf.exp(-log_scales) / max_level
    upper = (2.0 * level + (1.0 - max_level) - middle) * per_half_level
    lower = (2.0 * level - (1.0 + max_level) - middle) * per_half_level
    log_below_upper, log_above_lower = -tf.nn.softplus(-upper), -tf.nn.softplus(lower)
    log_inner = log_below_upper + log_above_lower
    # log(1 - exp(-w)) of the width w, for small w by its series, to round only once. Values and
    # gradients are finite for every w >= 0.
    width, small = 2.0 * per_half_level, 1e-2
    wide, narrow = tf.maximum(width, small), tf.minimum(width, small)
    log_narrow = log_inner - narrow / 2.0 + tf.square(narrow) / 24.0 - log_scales
    log_inner = tf.where(
        width < small,
        log_narrow + math.log(2.0 / max_level),
        log_inner + tf.math.log(-tf.math.expm1(-wide)),
    )
    log_mass = tf.where(level > 0.0, log_inner, log_below_upper)
    return tf.where(level < max_level, log_mass, log_above_lower)


def _chain(channels: int) -> list[tuple[int, int]]:
    """Pairs of a channel and an earlier one that shifts its mean, in the order of coefficients."""
    first = (lambda channel: 0) if channels <= 3 else (lambda channel: max(channel - 1, 0))
    return [(c, before) for c in range(channels) for before in range(first(c), c)]


def channel_shift(values, coefficients, channel: int, channels: int):
    """The amount by which a channel's mean is shifted, given the values of the channels before it.

    Args:
        values: List of tensors, the value of each channel in [-1, 1].
        coefficients: List of tensors, one coefficient per pair of `_chain`.
        channel: Index of the channel, not 0.
        channels: Number of channels.
    """
    pairs = zip(_chain(channels), coefficients, strict=True)
    terms = [coefficient * values[before] for (c, before), coefficient in pairs if c == channel]
    return functools.reduce(operator.add, terms)


def pixel_log_prob(distribution, x):
    """log p of each pixel under an image distribution; `log_prob` is the sum over pixels.

    Args:
        distribution: One of the image distributions of this module.
        x: Images (..., height, width, channels) in [0, 1].

    Returns:
        Log-probabilities in nats, (..., height, width).
    """
    if isinstance(distribution, DiscretizedLogisticMixture):
        return distribution.pixel_log_prob(x)
    if isinstance(distribution, NormalImage):
        distribution, x = distribution.scaled, 2.0 * x - 1.0
    return tf.reduce_sum(distribution.distribution.log_prob(x), -1)


def mean_image(distribution):
    """The image to show for a distribution: its mean, or for a logistic mixture its `mean_image`."""
    mixture = isinstance(distribution, DiscretizedLogisticMixture)
    return distribution.mean_image() if mixture else distribution.mean()


def _draw_uniform(distribution, n, seed):
    """Draws the uniform noise for n samples, (n, *batch, height, width, num_uniform)."""
    batch, event = distribution.batch_shape_tensor(), distribution.event_shape_tensor()
    shape = tf.concat([[n], batch, event[:-1], [distribution.num_uniform]], 0)
    seed = tfp.random.sanitize_seed(seed)
    return tf.random.stateless_uniform(shape, seed, minval=stateless_random.SMALLEST)


def _to_unit(x):
    """Maps values from [-1, 1] to [0, 1]."""
    return 0.5 * (x + 1.0)

"""Distributions as whole numbers, which encoder and decoder compute identically to the bit.

What a coder needs of a distribution is a function from symbols to the sum of the frequencies below them
(`nvae_tf.compression.rans.Cumulative`). Here it is computed in float64 from the model's float32
parameters, with SciPy's functions, which treat each value alone: wherever in an array a value stands,
its result is the same. Both directions also ask for arrays of the same shapes.
"""

import math

import numpy as np
from scipy.special import expit, log_expit, log_softmax, logsumexp, ndtr, ndtri, softmax

from nvae_tf.compression.rans import TOTAL
from nvae_tf.distributions import channel_shift

NUM_BINS = 1 << 12  # of a latent
SPREAD = 1.5  # the bins are equal in mass under a normal that is as many times as wide as the prior


class LatentBins:
    """A division of the axis of a latent into bins, in units of its prior's standard deviation.

    The bins hold equal parts of a normal distribution that is wider than the prior: so there are more
    of them in the prior's tails than if they held equal parts of the prior, which helps latents whose
    posterior lies there. The frequencies of bins under the prior are one table for all latents.

    Args:
        count: Number of bins.
        spread: Standard deviation of that normal distribution, in those of the prior.

    Attributes:
        count: Number of bins.
        edges: Where bins begin and the last one ends, float64 (count + 1,).
        centres: The values of z that stand for the bins, float32 (count,).
        table: Sums of the prior's frequencies, uint64 (count + 1,).
    """

    def __init__(self, count: int = NUM_BINS, spread: float = SPREAD):
        self.count = count
        portions = np.arange(count + 1) / count
        self.edges = spread * ndtri(portions)
        self.centres = (spread * ndtri(portions[:-1] + 0.5 / count)).astype(np.float32)
        # Each bin gets a frequency of 1 at least, since the posterior may choose any.
        below = np.floor(ndtr(self.edges) * (TOTAL - count)).astype(np.uint64)
        self.table = below + np.arange(count + 1, dtype=np.uint64)

    def prior(self, _, bins):
        """The prior's `Cumulative`."""
        return self.table[bins]

    def from_words(self, words: np.ndarray) -> np.ndarray:
        """Bins drawn from the prior.

        Args:
            words: Uniform 64-bit numbers, uint64 (n,).
        """
        return np.searchsorted(self.table, words % TOTAL, side="right") - 1


class Posterior:
    """The bins' distribution under the posteriors of some latents.

    Bins far from a posterior's mean have frequency 0: they are never popped, so nobody pushes them.

    Args:
        bins: The bins.
        prior: Mean and standard deviation of each latent's prior, float32 (n,).
        posterior: Mean and standard deviation of each latent's posterior, float32 (n,).
    """

    def __init__(self, bins: LatentBins, prior, posterior):
        prior_mean, prior_stddev = (np.asarray(part, np.float64) for part in prior)
        mean, stddev = (np.asarray(part, np.float64) for part in posterior)
        self.edges = bins.edges
        self.offset, self.scale = (prior_mean - mean) / stddev, prior_stddev / stddev

    def __call__(self, positions, bins):
        """The posteriors' `Cumulative`."""
        standard = self.offset[positions] + self.scale[positions] * self.edges[bins]
        return np.floor(ndtr(standard) * TOTAL).astype(np.uint64)


class BinaryPixels:
    """The distribution of an image of pixels that are 0 or 1.

    Args:
        logits: Logits of the pixels, float32 (n,).
    """

    def __init__(self, logits):
        self._logits = np.asarray(logits, np.float64)
        ones = np.rint(expit(self._logits) * TOTAL)
        zeros = TOTAL - np.clip(ones, 1, TOTAL - 1).astype(np.uint64)
        self.table = np.stack([np.zeros_like(zeros), zeros, np.full_like(zeros, TOTAL)], 1)

    def __call__(self, positions, values):
        """The pixels' `Cumulative`."""
        return self.table[positions, values]

    def neg_log_likelihood(self, values) -> float:
        """-log p(x | z) of an image, in nats.

        Args:
            values: Its pixels, 0 or 1, (n,).
        """
        return -float(log_expit(np.where(values == 1, self._logits, -self._logits)).sum())


class Levels:
    """The distribution of one channel's levels, given the channels before it.

    Args:
        weights: Weights of the components, (n, M).
        middle: Means of the logistics in half levels, (n, M) (see `distributions.exact_log_mass`).
        per_half_level: The inverse of their scales in half levels, (n, M).
        max_level: The last level.
    """

    def __init__(self, weights, middle, per_half_level, max_level: int):
        self.weights, self.middle, self.per_half_level = weights, middle, per_half_level
        self.count = max_level + 1
        self.start = -(1.0 + max_level)  # where level 0 would begin, if it did not hold all below

    def __call__(self, positions, levels):
        """The levels' `Cumulative`."""
        edges = self._standard(positions, levels)
        below = (self.weights[positions] * expit(edges)).sum(-1)
        # Each level gets 2 at least, of which rounding may take 1.
        room = TOTAL - 2 * self.count
        inner = np.floor(np.minimum(below, 1.0) * room).astype(np.uint64)
        inner += 2 * levels.astype(np.uint64)
        return np.where(levels <= 0, 0, np.where(levels >= self.count, TOTAL, inner)).astype(
            np.uint64
        )

    def log_mass(self, levels):
        """Logarithms of each component's probability of levels (n,), as in `exact_log_mass`."""
        positions = np.arange(len(levels))
        lower = self._standard(positions, levels)
        upper = lower + 2.0 * self.per_half_level
        log_below_upper, log_above_lower = log_expit(upper), log_expit(-lower)
        inner = log_below_upper + log_above_lower + np.log(-np.expm1(-2.0 * self.per_half_level))
        lowest, highest = (levels <= 0)[:, None], (levels >= self.count - 1)[:, None]
        return np.where(lowest, log_below_upper, np.where(highest, log_above_lower, inner))

    def _standard(self, positions, levels):
        edges = (2.0 * levels + self.start)[:, None]
        return (edges - self.middle[positions]) * self.per_half_level[positions]


class ColourPixels:
    """The distribution of an image under a mixture of logistics, channel by channel.

    Args:
        logits: Logits of the components, float32 (n, M).
        means: Means of the channels on the scale [-1, 1], float32 (n, channels, M).
        log_scales: Logarithms of their scales, of the same shape.
        coefficients: How means depend on channels before, float32 (n, coefficients, M).
        max_level: The last level.
    """

    def __init__(self, logits, means, log_scales, coefficients, max_level: int):
        self._log_weights = log_softmax(np.asarray(logits, np.float64), axis=-1)
        self._means = np.asarray(means, np.float64)
        self._per_half_level = np.exp(-np.asarray(log_scales, np.float64)) / max_level
        self._coefficients = np.moveaxis(np.asarray(coefficients, np.float64), 1, 0)
        self._max_level = max_level
        self._values: list[np.ndarray] = []
        self.channels = self._means.shape[1]
        self.neg_log_likelihood = 0.0  # of the levels so far, in nats

    def next_channel(self) -> Levels:
        """The distribution of the next channel's levels, given those of the channels before."""
        channel, means = len(self._values), self._means[:, len(self._values)]
        if channel:
            means = means + channel_shift(self._values, self._coefficients, channel, self.channels)
        return Levels(
            softmax(self._log_weights, axis=-1),
            means * self._max_level,
            self._per_half_level[:, channel],
            self._max_level,
        )

    def observe(self, distribution: Levels, levels: np.ndarray) -> None:
        """Takes the levels of a channel into account, for those after it.

        Args:
            distribution: What `next_channel` returned.
            levels: The levels, integers (n,).
        """
        joint = self._log_weights + distribution.log_mass(levels)
        log_mass = logsumexp(joint, axis=-1, keepdims=True)
        self._log_weights = joint - log_mass
        self.neg_log_likelihood -= float(log_mass.sum())
        self._values.append((2.0 * levels / self._max_level - 1.0)[:, None])


def bits(nats: float) -> float:
    """Converts nats to bits."""
    return nats / math.log(2.0)

"""Typicality: how far an image's measurements are from those of training images, above or below."""

from typing import NamedTuple

import numpy as np

from nvae_tf.evaluation.ood import Measurements
from nvae_tf.io.errors import UserError

NAME = "typicality"
RULE = (
    "squared Mahalanobis distance (Ledoit-Wolf covariance) from training images of: reconstruction, KL "
    "of each group, L>(k-1) - L>k of each group; chosen without outliers"
)
SMALLEST_SPREAD = 1e-6  # nats; a group that nothing uses has no spread at all


class Typical(NamedTuple):
    """Training images' mean, standard deviation and inverse correlation of the measurements.

    Attributes:
        mean: Means, (measurements,).
        spread: Standard deviations, (measurements,).
        precision: Inverse of the shrunk covariance of standardised measurements, (measurements,
            measurements).
        num_images: Number of the training images.
    """

    mean: np.ndarray
    spread: np.ndarray
    precision: np.ndarray
    num_images: int

    def score(self, measured: Measurements) -> np.ndarray:
        """The squared distance of each image, (images,); near 1 per measurement for training images."""
        standardised = (_vectors(measured) - self.mean) / self.spread
        return np.einsum("ni,ij,nj->n", standardised, self.precision, standardised)


def fit(measured: Measurements) -> Typical:
    """Fits typicality to training images.

    Args:
        measured: Measurements of training images.

    Raises:
        UserError: There are fewer than two images, or a measurement is not finite.
    """
    from sklearn.covariance import LedoitWolf

    vectors = _vectors(measured)
    if len(vectors) < 2 or not np.isfinite(vectors).all():
        raise UserError(
            f"typicality: {len(vectors)} training images with finite likelihoods; it needs two or more "
            "(--fit_images), and a model whose likelihoods are all finite"
        )
    mean, spread = vectors.mean(0), np.maximum(vectors.std(0), SMALLEST_SPREAD)
    covariance = LedoitWolf().fit((vectors - mean) / spread)
    return Typical(mean, spread, covariance.precision_, len(vectors))


def _vectors(measured: Measurements) -> np.ndarray:
    """Reconstruction, KL per group, and what each group adds to the bound, (images, 2 groups + 1)."""
    reconstruction = measured.nelbo - measured.kl.sum(1)
    added = measured.bounds[:, :-1] - measured.bounds[:, 1:]
    return np.concatenate([reconstruction[:, None], measured.kl, added], 1)

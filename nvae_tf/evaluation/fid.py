"""Distances between two sets of images by their features: FID, KID, precision and recall."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvae_tf.io import npz as array_file
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import atomic_write

KEPT_FEATURES = 10_000  # of a set, for KID and for precision and recall
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
CHUNK = 2000  # rows of a matrix of distances computed at once


class Statistics(NamedTuple):
    """What is kept of a set's features.

    Attributes:
        mean: (features,), float64.
        covariance: (features, features), float64, with divisor n - 1.
        features: of some of the images, (up to `KEPT_FEATURES`, features), float32; None where only
            mean and covariance are known.
    """

    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray | None = None

    def save(self, path: Path) -> None:
        """Writes an .npz file; pytorch-fid reads its ``mu`` and ``sigma``."""
        arrays: dict[str, Any] = {"mu": self.mean, "sigma": self.covariance}
        if self.features is not None:
            arrays["features"] = self.features
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Reads an .npz file, ours or pytorch-fid's.

        Raises:
            UserError: it is missing, unreadable, or holds no finite ``mu`` and ``sigma`` that match.
        """
        try:
            arrays = array_file.read(path, ("mu", "sigma"), optional=["features"])
        except UserError as error:
            raise UserError(f"{error}; make statistics with --eval_mode fid_stats") from None
        mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
        features = arrays.get("features")
        shapes = mean.ndim == 1 and mean.size > 0 and covariance.shape == mean.shape * 2
        if features is not None:
            shapes = shapes and features.ndim == 2 and features.shape[1:] == mean.shape
        if not shapes or not all(np.all(np.isfinite(array)) for array in arrays.values()):
            found = ", ".join(f"{name} of shape {array.shape}" for name, array in arrays.items())
            raise UserError(
                f"{path}: {found} are no FID statistics, or not finite; make them with --eval_mode "
                "fid_stats"
            )
        return cls(mean, covariance, features)


class Accumulator:
    """Mean and covariance of features that come in batches, in float64, without holding them all."""

    def __init__(self):
        self.count, self._kept, self._num_kept = 0, [], 0

    def add(self, features: np.ndarray) -> None:
        """Takes a batch, (n, features)."""
        if self._num_kept < KEPT_FEATURES:
            kept = np.asarray(features[: KEPT_FEATURES - self._num_kept], np.float32)
            self._kept.append(kept)
            self._num_kept += len(kept)
        features = np.asarray(features, np.float64)
        if self.count == 0:
            # Sums of what differs from a value near the mean lose nothing to cancellation.
            self._origin = features.mean(0)
            self._sum = np.zeros_like(self._origin)
            self._products = np.zeros((len(self._origin),) * 2)
        centred = features - self._origin
        self.count += len(features)
        self._sum += centred.sum(0)
        self._products += centred.T @ centred

    def statistics(self) -> Statistics:
        """What was accumulated.

        Raises:
            UserError: fewer than two images.
        """
        if self.count < 2:
            raise UserError(f"statistics need at least two images; there are {self.count}")
        offset = self._sum / self.count
        covariance = (self._products - np.outer(offset, self._sum)) / (self.count - 1)
        return Statistics(self._origin + offset, covariance, np.concatenate(self._kept))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """The Frechet distance of two normal distributions.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``, the trace of the root as the sum of roots of the
    eigenvalues of ``S1^(1/2) S2 S1^(1/2)``, which is symmetric: no complex residue, and nothing to
    regularise where a covariance is singular.

    Reference: Heusel et al., *GANs Trained by a Two Time-Scale Update Rule*, 2017.

    Raises:
        UserError: the statistics are of features of different lengths.
    """
    if one.mean.shape != other.mean.shape:
        raise UserError(
            f"FID statistics of {len(other.mean)} features do not compare with {len(one.mean)} features"
        )
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ other.covariance @ root)
    trace = np.trace(one.covariance) + np.trace(other.covariance)
    trace -= 2.0 * np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    return float(np.sum((one.mean - other.mean) ** 2) + trace)


def kernel_distance(one: np.ndarray, other: np.ndarray, seed: int = 0) -> float:
    """KID: the unbiased squared MMD under the kernel ``(x y / d + 1)^3``, averaged over subsets.

    Args:
        one: features, (n, d).
        other: features, (m, d).
        seed: of the subsets.

    Reference: Binkowski et al., *Demystifying MMD GANs*, 2018.
    """
    rng = np.random.RandomState(seed)
    size = min(KID_SUBSET_SIZE, len(one), len(other))

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def within(x):
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (size * (size - 1))

    found = []
    for _ in range(KID_SUBSETS):
        x, y = (
            features[rng.choice(len(features), size, replace=False)].astype(np.float64)
            for features in (one, other)
        )
        found.append(within(x) + within(y) - 2.0 * kernel(x, y).mean())
    return float(np.mean(found))


def precision_recall(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """Portion of generated images among the real ones, and of real ones among the generated.

    An image is among a set if it is nearer to one of its members than that member's third neighbour.

    Args:
        real: features, (n, d).
        generated: features, (m, d).

    Reference: Kynkaanniemi et al., *Improved Precision and Recall Metric*, 2019.
    """

    def covered(points, by):
        radii = np.concatenate(
            [
                # The smallest distance is a member's to itself.
                np.partition(_squared_distances(by[i : i + CHUNK], by), NEIGHBOURS, 1)[
                    :, NEIGHBOURS
                ]
                for i in range(0, len(by), CHUNK)
            ]
        )
        inside = [
            np.any(_squared_distances(points[i : i + CHUNK], by) <= radii, 1)
            for i in range(0, len(points), CHUNK)
        ]
        return float(np.concatenate(inside).mean())

    return covered(generated, real), covered(real, generated)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2.0 * x @ y.T
    return np.maximum(squares, 0.0)


def compare(reference: Statistics, generated: Statistics) -> dict[str, float]:
    """Every distance that the statistics allow.

    Returns:
        ``fid``; and ``kid``, ``precision`` and ``recall`` where the reference holds features.
    """
    report = {"fid": frechet_distance(reference, generated)}
    known, drawn = reference.features, generated.features
    if known is not None and drawn is not None and min(len(known), len(drawn)) > NEIGHBOURS:
        report["kid"] = kernel_distance(known, drawn)
        precision, recall = precision_recall(known, drawn)
        report.update(precision=precision, recall=recall)
    return report

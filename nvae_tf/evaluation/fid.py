"""Distances between two sets of images by their features: FID, KID, precision and recall."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvae_tf.io import npz
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import atomic_write

KEPT_FEATURES = 10_000  # images of a set whose features are kept, for KID, precision and recall
KEEPING_SEED = 0  # of the draw of these images
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # the k of precision and recall's k-th nearest neighbour
CHUNK = 2000  # rows of a distance matrix that are computed at once


class Statistics(NamedTuple):
    """Statistics of the features of a set of images.

    Attributes:
        mean: Mean, (features,), float64.
        covariance: Unbiased covariance, (features, features), float64.
        features: Features of all images or of a random `KEPT_FEATURES` of them, (n, features), float32;
            None if only mean and covariance are known.
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
            UserError: The file is missing or unreadable, or its arrays are not finite or do not match.
        """
        try:
            arrays = npz.read(path, ("mu", "sigma"), optional=["features"])
        except UserError as error:
            raise UserError(f"{error}; make statistics with --eval_mode fid_stats") from None
        mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
        features = arrays.get("features")
        match = mean.ndim == 1 and mean.size > 0 and covariance.shape == mean.shape * 2
        if features is not None:
            match = match and features.ndim == 2 and features.shape[1:] == mean.shape
        if not match or not all(np.all(np.isfinite(array)) for array in arrays.values()):
            content = ", ".join(f"{name} of shape {array.shape}" for name, array in arrays.items())
            raise UserError(
                f"{path}: {content} are not FID statistics, or not finite; make them with --eval_mode "
                "fid_stats"
            )
        return cls(mean, covariance, features)


class FeatureStatistics:
    """Accumulates features batch by batch; mean and covariance in float64, without storing them all."""

    def __init__(self):
        self.count, self._kept = 0, []
        self._rng = np.random.RandomState(KEEPING_SEED)

    def add(self, features: np.ndarray) -> None:
        """Adds the features of a batch of images, (n, features)."""
        # Images of a folder come class by class, so those that are kept are drawn (reservoir sampling).
        for number, row in enumerate(np.asarray(features, np.float32), self.count):
            # Copied, because a view would keep its whole batch in memory.
            if number < KEPT_FEATURES:
                self._kept.append(row.copy())
            elif (place := self._rng.randint(number + 1)) < KEPT_FEATURES:
                self._kept[place] = row.copy()
        features = np.asarray(features, np.float64)
        if self.count == 0:
            # Sums of differences from a value near the mean do not suffer from cancellation.
            self._origin = features.mean(0)
            self._sum = np.zeros_like(self._origin)
            self._products = np.zeros((len(self._origin),) * 2)
        centred = features - self._origin
        self.count += len(features)
        self._sum += centred.sum(0)
        self._products += centred.T @ centred

    def statistics(self) -> Statistics:
        """The statistics of all features added.

        Raises:
            UserError: There are fewer than two images.
        """
        if self.count < 2:
            raise UserError(f"statistics need at least two images; there are {self.count}")
        offset = self._sum / self.count
        covariance = (self._products - np.outer(offset, self._sum)) / (self.count - 1)
        return Statistics(self._origin + offset, covariance, np.stack(self._kept))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """The Frechet distance of two normal distributions.

    It is ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``. The trace of the root is computed as the sum
    of the square roots of the eigenvalues of ``S1^(1/2) S2 S1^(1/2)``. That matrix is symmetric, so the
    result has no imaginary part, and singular covariances need no regularisation.

    Args:
        one: Statistics of one set of images.
        other: Statistics of the other set.

    Raises:
        UserError: The statistics are of features of different lengths.

    Reference: Heusel et al., *GANs Trained by a Two Time-Scale Update Rule*, 2017.
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
        one: Features of one set of images, (n, d).
        other: Features of the other set, (m, d).
        seed: Seed of the random subsets.

    Reference: Binkowski et al., *Demystifying MMD GANs*, 2018.
    """
    rng = np.random.RandomState(seed)
    size = min(KID_SUBSET_SIZE, len(one), len(other))

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def within(x):
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (size * (size - 1))

    distances = []
    for _ in range(KID_SUBSETS):
        x, y = (
            features[rng.choice(len(features), size, replace=False)].astype(np.float64)
            for features in (one, other)
        )
        distances.append(within(x) + within(y) - 2.0 * kernel(x, y).mean())
    return float(np.mean(distances))


def precision_recall(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """Precision and recall of generated images.

    Precision is the portion of generated images that the real ones cover; recall is the portion of real
    images that the generated ones cover. A set covers an image that is at least as near to one of its
    members as that member's third nearest neighbour in the set.

    Args:
        real: Features of real images, (n, d).
        generated: Features of generated images, (m, d).

    Returns:
        Precision and recall.

    Reference: Kynkaanniemi et al., *Improved Precision and Recall Metric*, 2019.
    """

    def portion_covered(points, members):
        radii = []
        for i in range(0, len(members), CHUNK):
            distances = _squared_distances(members[i : i + CHUNK], members)
            # Of the sorted distances the first is a member's to itself.
            radii.append(np.partition(distances, NEIGHBOURS, 1)[:, NEIGHBOURS])
        radius = np.concatenate(radii)
        covered = [
            np.any(_squared_distances(points[i : i + CHUNK], members) <= radius, 1)
            for i in range(0, len(points), CHUNK)
        ]
        return float(np.concatenate(covered).mean())

    return portion_covered(generated, real), portion_covered(real, generated)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2.0 * x @ y.T
    return np.maximum(squares, 0.0)


def compare(reference: Statistics, generated: Statistics) -> dict[str, float]:
    """Computes every distance that the statistics allow.

    Args:
        reference: Statistics of real images.
        generated: Statistics of generated images.

    Returns:
        ``fid``; and ``kid``, ``precision`` and ``recall`` if both hold features of enough images.

    Raises:
        UserError: The statistics are of features of different lengths.
    """
    report = {"fid": frechet_distance(reference, generated)}
    real, fake = reference.features, generated.features
    if real is not None and fake is not None and min(len(real), len(fake)) > NEIGHBOURS:
        report["kid"] = kernel_distance(real, fake)
        precision, recall = precision_recall(real, fake)
        report.update(precision=precision, recall=recall)
    return report

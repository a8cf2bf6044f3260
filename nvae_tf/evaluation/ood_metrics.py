"""How well a score separates two sets of images, with bootstrap intervals."""

import numpy as np

RESAMPLES = 1000
LARGEST_TABLE = 1 << 20  # numbers; more bootstrap samples are computed one part after the other
CONFIDENCE = 0.95
METRICS = ("auroc", "aupr", "fpr95")


def separation(inside: np.ndarray, outside: np.ndarray, seed: int) -> dict[str, list[float]]:
    """How well a score tells outliers (the positives, which should score higher) from the others.

    Equal to scikit-learn's `roc_auc_score`, `average_precision_score` and `roc_curve`, for many
    bootstrap samples at once. Both sets are resampled, each by itself.

    Args:
        inside: Scores of images like the training images, (n,).
        outside: Scores of outliers, (m,).
        seed: Seed of the bootstrap.

    Returns:
        ``auroc``, the area under the ROC curve; ``aupr``, the average precision; ``fpr95``, the portion
        of `inside` above the highest threshold that 95 % of `outside` reach. Each as value, and lower
        and upper end of the 95 % interval.
    """
    sets, rng = (outside, inside), np.random.default_rng(seed)
    rows = max(LARGEST_TABLE // (len(outside) + len(inside)), 1)
    parts = [_metrics(outside, inside, *(np.ones((1, len(part))) for part in sets))]
    for first in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - first)
        counts = [_resampled(rng, len(part), count) for part in sets]
        parts.append(_metrics(outside, inside, *counts))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return {name: _interval(values) for name, values in zip(METRICS, columns, strict=True)}


def _interval(values: np.ndarray) -> list[float]:
    """The first value, and an interval of the others that holds it.

    Images that a bootstrap sample holds twice are ties, which raise the average precision a little:
    where all samples agree, the value itself could lie outside.
    """
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(values[1:], [tail, 1.0 - tail])
    return [float(values[0]), float(min(low, values[0])), float(max(high, values[0]))]


def _resampled(rng, size: int, samples: int) -> np.ndarray:
    """How often each of `size` images is drawn in each bootstrap sample, (samples, size)."""
    return rng.multinomial(size, np.full(size, 1.0 / size), samples).astype(float)


def _metrics(outside, inside, outside_counts, inside_counts):
    """The three metrics of every row of counts, (rows,) each."""
    thresholds, places = np.unique(np.concatenate([outside, inside]), return_inverse=True)
    places = len(thresholds) - 1 - places  # the highest threshold first
    true = _at_or_above(places[: len(outside)], outside_counts, len(thresholds))
    false = _at_or_above(places[len(outside) :], inside_counts, len(thresholds))
    recall, false_rate = true / true[:, -1:], false / false[:, -1:]
    heights = (recall[:, 1:] + recall[:, :-1]) / 2.0
    auroc = np.sum(np.diff(false_rate, axis=1) * heights, 1)
    found = np.maximum(true + false, 1.0)
    aupr = np.sum(np.diff(recall, axis=1) * (true / found)[:, 1:], 1)
    reached = np.argmax(recall >= 0.95, 1)
    return auroc, aupr, np.take_along_axis(false_rate, reached[:, None], 1)[:, 0]


def _at_or_above(places, counts, num_thresholds: int) -> np.ndarray:
    """Images that reach each threshold, from none to all, (rows, thresholds + 1)."""
    table = np.zeros((len(counts), num_thresholds + 1))
    np.add.at(table.T, places + 1, counts.T)
    return np.cumsum(table, 1)

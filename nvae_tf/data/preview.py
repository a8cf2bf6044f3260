"""Shows what training will see of a data set: counts, values, images, and the speed of reading."""

import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from nvae_tf import config as configuration
from nvae_tf.config import check_image
from nvae_tf.data import catalog, pipeline
from nvae_tf.data.source import Source, reading
from nvae_tf.io.files import write_png
from nvae_tf.io.labelled_grid import Band, labelled_grid
from nvae_tf.io.text import counted

COLUMNS, ROWS = 10, 6
LABELS_READ = 1000  # number of labels read to find their range
BINS, BAR = 16, 40  # of the histogram: number of bins, and length of the longest bar


def preview(config: configuration.Config, picture: Path, seconds: float) -> None:
    """Prints counts, shapes, labels, values and throughput, and writes a grid of training images.

    Args:
        config: Configuration, of which the section ``data`` and ``num_x_bits`` are used.
        picture: Path of the PNG to write.
        seconds: Number of seconds for which the throughput is measured.

    Raises:
        UserError: The data is missing or damaged, or the picture cannot be written.
    """
    settled = catalog.settle(config.data)
    for line in settled.lines:
        print(line)
    dataset = settled.dataset
    sources = dataset.open(config.data.data)
    check_image(config.model, dataset.image)
    with reading(*sources):
        spec = dataset.image
        kind = "binary" if spec.binary else f"{spec.bits} bits"
        channels = counted(spec.channels, "channel")
        mirrored = "mirrored at random" if dataset.flip else "not mirrored"
        print(f"{dataset.name}: {spec.size_text}, {channels}, {kind}, {mirrored}")
        for name, source in zip(("training", "test"), sources, strict=True):
            low, high = _label_range(source)
            print(f"{name}: {len(source)} images, labels {low} to {high}")
        batches = pipeline.training_batches(
            sources[0],
            dataset,
            batch_size=min(config.data.batch_size, len(sources[0])),
            seed=config.data.seed,
            num_bits=config.model.x_bits(dataset.image),
        )
        images = np.concatenate(list(batches.unbatch().batch(COLUMNS * ROWS).take(1)))
        levels = 2 ** (1 if spec.binary else config.model.x_bits(spec))
        print(f"levels of {len(images)} images:")
        for line in histogram(images, levels):
            print(line)
        note = "in the order of training, after augmentation and reduction of bits"
        title = f"Training images of {dataset.name}"
        write_png(picture, labelled_grid([Band(images)], COLUMNS, title, note))
        print(f"pipeline: {_throughput(batches, seconds):,.0f} images/s")
        for line in dataset.skipped:
            print(line)
        print(f"written: {picture}")


def histogram(images: np.ndarray, levels: int) -> list[str]:
    """A histogram as text.

    Args:
        images: Images with values in [0, 1].
        levels: Number of levels that values can have.

    Returns:
        A line with the smallest level, the largest level and the number of different ones; then a line
        per bin.
    """
    found = np.rint(images.astype(np.float64) * (levels - 1)).astype(np.int64)
    bins = min(BINS, levels)
    counts = np.bincount((found * bins // levels).ravel(), minlength=bins)
    different = len(np.unique(found))
    lines = [f"  {found.min():,} to {found.max():,} of {levels:,}, {different:,} different"]
    for index, count in enumerate(counts):
        first, last = -(-index * levels // bins), -(-(index + 1) * levels // bins) - 1
        name = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        bar = "#" * round(BAR * count / counts.max())
        lines.append(f"  {name:>16} {count / found.size:6.1%} {bar}".rstrip())
    return lines


def _label_range(source: Source) -> tuple[int, int]:
    """The smallest and the largest label among evenly spaced images of a source."""
    indices = np.linspace(0, len(source) - 1, min(LABELS_READ, len(source))).astype(np.int64)
    dataset = tf.data.Dataset.from_tensor_slices(indices).map(lambda i: source.example(i)[1])
    labels = [int(label) for label in dataset]
    return min(labels), max(labels)


def _throughput(batches: tf.data.Dataset, seconds: float) -> float:
    iterator = iter(batches)
    next(iterator)
    count, start = 0, time.perf_counter()
    with tqdm(unit="image", desc="pipeline", leave=False, disable=None) as bar:
        while time.perf_counter() - start < seconds:
            size = len(next(iterator))
            count += size
            bar.update(size)
    return count / (time.perf_counter() - start)

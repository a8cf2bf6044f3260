"""Shows what training will see of a data set: counts, values, images, and the speed of reading."""

import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from nvae_tf import config as configuration
from nvae_tf.data import catalog, pipeline
from nvae_tf.data.source import Source, reading
from nvae_tf.io.files import write_png
from nvae_tf.io.labelled_grid import Band, labelled_grid

COLUMNS, ROWS = 10, 6


def preview(config: configuration.Config, picture: Path, seconds: float) -> None:
    """Prints counts, shapes, labels and throughput, and writes a grid of training images.

    Args:
        config: Configuration; its data section and ``num_x_bits`` are used.
        picture: Path of the PNG to write.
        seconds: Number of seconds to measure the throughput for.

    Raises:
        UserError: The data is missing or damaged, or the picture cannot be written.
    """
    dataset = catalog.get_dataset_info(config.data)
    sources = dataset.open(config.data.data)
    with reading(*sources):
        spec = dataset.image
        kind = "binary" if spec.binary else "colour"
        print(f"{dataset.name}: {spec.height}x{spec.width}, {spec.channels} channels, {kind}")
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
        values = len(np.unique(images))
        print(f"values: {images.min():.3f} to {images.max():.3f}, {values} different")
        note = "in the order of training, after augmentation and reduction of bits"
        title = f"Training images of {dataset.name}"
        write_png(picture, labelled_grid([Band(images)], COLUMNS, title, note))
        print(f"pipeline: {_throughput(batches, seconds):,.0f} images/s")
        print(f"written: {picture}")


def _label_range(source: Source, max_images: int = 1000) -> tuple[int, int]:
    """Returns the smallest and the largest label among images spread over the source."""
    indices = np.linspace(0, len(source) - 1, min(max_images, len(source))).astype(np.int64)
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

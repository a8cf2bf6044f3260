#!/usr/bin/env python3
"""Draws docs/pictures/digits.png from a run: samples, reconstructions, an interpolation, a traversal.

python docs/make_picture.py runs/digits
"""

import argparse
from pathlib import Path

import numpy as np

from nvae_tf.config import data_override
from nvae_tf.data import catalog, pipeline
from nvae_tf.evaluation import latents, sampling
from nvae_tf.evaluation.loading import load
from nvae_tf.evaluation.stored_images import from_levels
from nvae_tf.io.files import make_folder, write_png
from nvae_tf.io.labelled_grid import Band, labelled_grid

PICTURES = Path(__file__).parent / "pictures"
COLUMNS, TEMPERATURE, SEED = 12, 0.8, 1
START = 5  # index of the sample with which traversals begin


def bands(run: str) -> list[Band]:
    """The rows of the picture.

    Args:
        run: Path of a run's folder, or anything else that `loading.load` takes.
    """
    loaded = load(run, data_override(None))
    model, dataset = loaded.model, catalog.get_dataset_info(loaded.config.data)
    options = dict(batch_size=2 * COLUMNS, seed=SEED)
    levels, _ = sampling.sample(model, 2 * COLUMNS, TEMPERATURE, **options)
    _, test = dataset.open(loaded.config.data.data)
    batches = pipeline.evaluation_batches(test, dataset, num_bits=model.num_bits, **options)
    images = next(iter(batches)).numpy()[:COLUMNS]
    reconstructed = latents.reconstruct(model, images, SEED).images
    noise = latents.prior_noise(model, images[:2])
    start, end = ([tensor[i : i + 1] for tensor in noise] for i in (0, 1))
    way = latents.interpolate(model, start, end, COLUMNS - 2)[0]
    way = np.concatenate([images[:1], way, images[1:2]])
    noise = model.draw_noise([START], (SEED, 0))
    rows = latents.traverse(model, noise, [0, len(noise) - 1], COLUMNS, TEMPERATURE, SEED)[0]
    return [
        Band(from_levels(levels, model.image), f"samples at\ntemperature {TEMPERATURE:g}"),
        Band(images, "test images"),
        Band(reconstructed, "reconstructions"),
        Band(way, "from one test image\nto another"),
        Band(rows[0], "the noise of the\ncoarsest group changes"),
        Band(rows[1], "the noise of the\nfinest group changes"),
    ]


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of a run")
    arguments = parser.parse_args()
    make_folder(PICTURES)
    path = PICTURES / "digits.png"
    write_png(path, labelled_grid(bands(arguments.run), COLUMNS))
    print(f"written: {path}")


if __name__ == "__main__":
    main()

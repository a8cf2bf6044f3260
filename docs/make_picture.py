#!/usr/bin/env python3
"""Draws a picture of a run: samples, reconstructions, an interpolation, traversals.

python docs/make_picture.py runs/docs/digits docs/pictures/digits.png
"""

import argparse

import numpy as np

from nvae_tf.config import data_override
from nvae_tf.data import catalog, pipeline
from nvae_tf.evaluation import latents, sampling
from nvae_tf.evaluation.loading import LoadedModel, load
from nvae_tf.evaluation.stored_images import from_levels
from nvae_tf.io.files import make_folder, write_png
from nvae_tf.io.image_grid import enlarge
from nvae_tf.io.labelled_grid import MIN_WIDTH, Band, labelled_grid
from nvae_tf.io.paths import user_path

COLUMNS, TEMPERATURE, SEED = 12, 0.8, 1
START = 5  # index of the sample with which traversals begin


def bands(loaded: LoadedModel) -> list[Band]:
    """The rows of the picture.

    Args:
        loaded: The model.
    """
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


def note(loaded: LoadedModel, images: np.ndarray) -> str:
    """A line about the picture: recipe, step, what its pixels are, and how much they are enlarged.

    Args:
        loaded: The model.
        images: Some of the images, (n, height, width, channels).
    """
    scale = enlarge(images[:1], MIN_WIDTH).shape[2] // images.shape[2]
    samples = loaded.model.pixels_of_samples
    means = "means of p(x | z)"  # all other images that are not the data set's
    pixels = means if samples == means else f"samples: {samples}; all else: {means}"
    return f"recipe {loaded.config.data.dataset}, step {loaded.step:,}; {pixels}; pixels x{scale}"


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("output", metavar="OUT", type=user_path, help="the picture, a PNG")
    arguments = parser.parse_args()
    loaded = load(arguments.run, data_override(None))
    rows = bands(loaded)
    name = loaded.config.data.dataset
    make_folder(arguments.output.parent)
    picture = labelled_grid(rows, COLUMNS, f"NVAE on {name}", note(loaded, rows[0].images))
    write_png(arguments.output, picture)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()

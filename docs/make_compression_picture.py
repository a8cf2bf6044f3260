#!/usr/bin/env python3
"""Draws docs/pictures/compression.png: images, and below each the bits that each of its pixels takes.

python docs/make_compression_picture.py runs/docs/digits runs/docs/photos docs/pictures/compression.png
"""

import argparse
from pathlib import Path

import numpy as np

from nvae_tf.compression.cdfs import BinaryPixels, ColourPixels
from nvae_tf.compression.fingerprint import use_one_thread
from nvae_tf.compression.network import Network
from nvae_tf.compression.pictures import dataset_pictures
from nvae_tf.compression.rans import TOTAL, interval
from nvae_tf.data import catalog
from nvae_tf.evaluation import loading
from nvae_tf.io.files import make_folder, write_png
from nvae_tf.io.labelled_grid import Band, labelled_grid

COUNT, WIDTH = 8, 96  # images of each kind, and their width in pixels
WHITE = 0.999  # the quantile of bits that is drawn white


def pixel_bits(network: Network, levels: np.ndarray) -> np.ndarray:
    """Bits of each pixel of an image, (height, width), with each z at its posterior's mean."""
    s = network.start()
    for group, maps in enumerate(network.bottom_up(levels)):
        state = network.before(group, s)
        s = network.after(group, state, network.posterior(group, state, maps)[0])
    parameters = [part.reshape(-1, *part.shape[2:]) for part in network.image_parameters(s)]
    flat = levels.reshape(-1, levels.shape[-1]).astype(np.int64)
    positions, bits = np.arange(len(flat)), np.zeros(len(flat))
    if network.model.image.binary:
        _, frequencies = interval(BinaryPixels(parameters[0].ravel()), positions, flat[:, 0])
        bits -= np.log2(frequencies / TOTAL)
    else:
        colours = ColourPixels(*parameters, network.max_level)
        for channel in flat.T:
            distribution = colours.next_channel()
            bits -= np.log2(interval(distribution, positions, channel)[1] / TOTAL)
            colours.observe(distribution, channel)
    return bits.reshape(levels.shape[:2])


def bands(checkpoint: str) -> list[Band]:
    """A row of test images, and a row of their pixels' bits.

    Args:
        checkpoint: Path of a run's folder, or anything else that `loading.load` takes.
    """
    loaded = loading.load(checkpoint)
    dataset = catalog.get_dataset_info(loaded.config.data)
    _, test = dataset.open(loaded.config.data.data)
    network = Network(loaded.model)
    images = dataset_pictures(test, dataset, loaded.model.num_bits, seed=1).images
    images = images[np.linspace(0, len(images) - 1, COUNT).astype(int)]
    bits = np.stack([pixel_bits(network, levels) for levels in images])
    print(f"{checkpoint}: up to {bits.max():.1f} bits per pixel, {bits.mean():.2f} in the mean")
    shown = images * (255 // network.max_level)
    white = np.quantile(bits, WHITE)
    costs = np.round(255 * bits / white).clip(0, 255)[..., None]
    return [
        Band(shown.astype(np.uint8), f"{loaded.config.data.dataset}:\ntest images"),
        Band(costs.astype(np.uint8), f"bits of each pixel\nblack: 0, white: {white:.1f}"),
    ]


def main() -> None:
    """Draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    use_one_thread()
    rows = [band for run in arguments.runs for band in bands(run)]
    scale = -(-WIDTH // rows[0].images.shape[2])
    note = f"each z at its posterior's mean; pixels x{scale}"
    make_folder(arguments.picture.parent)
    picture = labelled_grid(rows, COUNT, "What each pixel takes in a lossless file", note, WIDTH)
    write_png(arguments.picture, picture)


if __name__ == "__main__":
    main()

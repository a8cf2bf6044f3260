#!/usr/bin/env python3
"""Draws docs/pictures/compression.png: images, and below each the bits that each of its pixels takes.

python docs/make_compression_picture.py runs/digits runs/photos docs/pictures/compression.png
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
from nvae_tf.io.files import write_png
from nvae_tf.io.image_grid import enlarge

COUNT, WIDTH = 8, 96  # images of each kind, and their width in pixels


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


def rows(checkpoint: str) -> np.ndarray:
    """A row of test images, and a row of their pixels' bits, as one 8-bit RGB image."""
    loaded = loading.load(checkpoint)
    dataset = catalog.get_dataset_info(loaded.config.data)
    _, test = dataset.open(loaded.config.data.data)
    network = Network(loaded.model)
    images = dataset_pictures(test, dataset, loaded.model.num_bits, seed=1).images
    images = images[np.linspace(0, len(images) - 1, COUNT).astype(int)]
    bits = np.stack([pixel_bits(network, levels) for levels in images])
    print(f"{checkpoint}: up to {bits.max():.1f} bits per pixel, {bits.mean():.2f} in the mean")
    shown = images * (255 // network.max_level)
    costs = np.round(255 * bits / np.quantile(bits, 0.999)).clip(0, 255)[..., None]
    both = [np.broadcast_to(part, (*bits.shape, 3)) for part in (shown, costs)]
    large = [enlarge(part.astype(np.uint8), WIDTH) for part in both]
    return np.concatenate([np.concatenate(list(row), 1) for row in large])


def main() -> None:
    """Draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    use_one_thread()
    write_png(arguments.picture, np.concatenate([rows(run) for run in arguments.runs]))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Why a chain's coded NELBO may differ from the model's own: which draws bits-back coding pops.

``python benchmarks/popped_draws.py runs/docs/photos --first 126 --count 60`` puts images onto one
stack, with no latent left out: first as `nvae-compress` does, and then with the stack's bits exchanged
for random ones before each image. It prints the NELBO of both beside the model's own, in nats per
image, and for each group the standard deviation of the draws in units of their posterior's, which
would be 1.
"""

import argparse
import math

import numpy as np
from compression import own_nelbo

from nvae_tf.compression.cdfs import LatentBins, Posterior
from nvae_tf.compression.codec import Codec
from nvae_tf.compression.fingerprint import use_one_thread
from nvae_tf.compression.network import Network
from nvae_tf.compression.pictures import PictureSource, dataset_pictures
from nvae_tf.compression.rans import Stack
from nvae_tf.data import catalog
from nvae_tf.evaluation import loading

LANES = 64
CENTRES = LatentBins().centres


class RecordingStack(Stack):
    """A stack that keeps the draws of latents, in units of their posterior's standard deviation."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.draws: list[np.ndarray] = []

    def pop(self, cumulative, positions, num_symbols):
        """Pops symbols, as `Stack` does."""
        symbols = super().pop(cumulative, positions, num_symbols)
        if isinstance(cumulative, Posterior):
            draws = cumulative.offset[positions] + cumulative.scale[positions] * CENTRES[symbols]
            self.draws.append(draws)
        return symbols

    def exchange_bits(self, generator) -> None:
        """Makes the bits of the stack uniform, whatever was pushed."""
        self.heads ^= generator.integers(0, 1 << 32, len(self.heads), dtype=np.uint64)
        self.words[...] ^= generator.integers(0, 1 << 32, len(self.words), dtype=np.uint32)


def chain(model, pictures: PictureSource, images: range, exchange: bool):
    """The NELBO of each image in nats, and the standard deviations of the draws of each group."""
    latents = [np.zeros(int(np.prod(shape)), bool) for shape in model.latent_shapes]
    codec = Codec(Network(model), latents, False, LANES, 1)
    generator = np.random.default_rng(1)
    stack = RecordingStack.random(
        LANES, lambda count: generator.integers(0, 1 << 32, count, dtype=np.uint32)
    )
    nelbo = []
    for index in images:
        if exchange:
            stack.exchange_bits(generator)
        nelbo.append(codec.encode(stack, pictures.levels(index), index) * math.log(2))
    groups = len(latents)
    stddevs = [np.concatenate(stack.draws[group::groups]).std() for group in range(groups)]
    return np.array(nelbo), stddevs


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="the folder of a run on digits or photos")
    parser.add_argument("--first", type=int, default=0, help="the first test image (default: 0)")
    parser.add_argument("--count", type=int, default=60, help="default: 60")
    arguments = parser.parse_args()
    use_one_thread()
    loaded = loading.load(arguments.checkpoint)
    dataset = catalog.get_dataset_info(loaded.config.data)
    _, test = dataset.open(loaded.config.data.data)
    images = range(arguments.first, arguments.first + arguments.count)
    pictures = dataset_pictures(test, dataset, loaded.model.num_bits, 1, images.stop)
    white = 255 if dataset.image.binary else 1
    own = own_nelbo(loaded.model, pictures.images[images.start :] * white) * math.log(2)
    print(f"the model's own NELBO, 10 draws: {own.mean():.1f} nats")
    for name, exchange in (("as it is", False), ("bits exchanged", True)):
        nelbo, stddevs = chain(loaded.model, pictures, images, exchange)
        gap = nelbo - own
        print(
            f"{name}: {nelbo.mean():.1f} nats, {gap.mean():+.1f} +- "
            f"{gap.std() / math.sqrt(len(gap)):.1f} to that; standard deviations of draws, coarsest "
            f"group first: {', '.join(f'{stddev:.2f}' for stddev in stddevs)}"
        )


if __name__ == "__main__":
    main()

"""What a file leaves out: latents whose posterior is their prior's, and padding that is always 0.

Popped with the posterior and pushed with the prior, such a latent adds nothing to the file but initial
bits: some 12 each, for nothing. A decoder cannot know an image's posterior before it has the image, so
the choice is made once for a file, and written into it. What is left out is drawn from the prior, by
noise that both directions share: the bound that is coded is that of a posterior which is the prior
there.
"""

import numpy as np
from tqdm import tqdm

from nvae_tf.compression.network import Network

MOST_IMAGES = 256  # that are looked at
SMALLEST_GAIN = 1.0  # KL in bits over all images of a file from which on a latent is coded


def choose(network: Network, images, seed: int) -> tuple[list[np.ndarray], bool]:
    """Chooses what is left out.

    Args:
        network: The network.
        images: The images of a file (`nvae_tf.compression.pictures.PictureSource`).
        seed: Seed of the draws of z.

    Returns:
        For each group which latents are left out, bool (latents,); and whether padding is left out.
    """
    padded = all(_has_empty_padding(network, images.levels(i)) for i in range(len(images)))
    count = min(len(images), MOST_IMAGES)
    indices = np.linspace(0, len(images) - 1, count).round().astype(int)
    sums = [np.zeros(int(np.prod(shape))) for shape in network.model.latent_shapes]
    for index in tqdm(indices, unit="image", desc="choose latents", disable=None):
        _add_kl(network, images.levels(int(index)), seed + int(index), sums)
    scale = len(images) / count / np.log(2.0)
    return [total * scale < SMALLEST_GAIN for total in sums], padded


def _has_empty_padding(network: Network, levels) -> bool:
    return int(levels.sum()) == int(levels[network.model.image.scored_part].sum())


def _add_kl(network: Network, levels, seed: int, sums) -> None:
    """Adds the KL of every latent of an image, in nats."""
    noise = np.random.Generator(np.random.Philox(seed))
    s = network.start()
    for group, maps in enumerate(network.bottom_up(levels)):
        state = network.before(group, s)
        posterior = network.posterior(group, state, maps)
        mean, stddev = (part.astype(np.float64) for part in posterior)
        prior_mean, prior_stddev = (part.astype(np.float64) for part in state.prior)
        ratio = stddev / prior_stddev
        distance = (mean - prior_mean) / prior_stddev
        sums[group] += 0.5 * (ratio**2 + distance**2 - 1.0) - np.log(ratio)
        z = mean + stddev * noise.standard_normal(len(mean))
        s = network.after(group, state, z.astype(np.float32))

"""NELBO and importance-weighted log-likelihood (paper, section 4.1)."""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from nvae_tf.engine.devices import on_devices, shard, unshard
from nvae_tf.layers.latent_group import FromPosterior
from nvae_tf.model import NVAE


class Likelihoods(NamedTuple):
    """What was found for each image, in nats.

    Attributes:
        nelbo: negative evidence lower bound, averaged over the draws, (images,).
        neg_log_likelihood: importance-weighted estimate of -log p(x), (images,).
    """

    nelbo: np.ndarray
    neg_log_likelihood: np.ndarray


def draw_terms(model: NVAE, encoded, images, noise):
    """NELBO terms and log importance weights of one draw of z for each image.

    Args:
        model: the model.
        encoded: from `NVAE.bottom_up`.
        images: (batch, height, width, channels).
        noise: one tensor a group.

    Returns:
        recon + KL, and log p(x, z) - log q(z | x), each (batch,), in nats.
    """
    output = model.top_down(FromPosterior(encoded, noise))
    recon = -model.log_likelihood(output.parameters, images)
    nelbo = recon + tf.reduce_sum(output.kl_per_group, 1)
    return nelbo, output.log_p - output.log_q - recon


def evaluate(
    model: NVAE,
    batches: tf.data.Dataset,
    num_images: int,
    *,
    num_draws: int,
    chunk: int,
    seed: int,
) -> Likelihoods:
    """Estimates both likelihoods of every image.

    The bottom-up pass runs once for each image, the top-down pass once for each draw. An image's noise
    depends on the seed and the image's number alone.

    Args:
        model: the model.
        batches: the images, in order.
        num_images: how many there are.
        num_draws: K, of z for each image.
        chunk: draws of an image computed at once.
        seed: of the noise.
    """

    def terms(encoded, images, numbers):
        draws = tf.shape(numbers)[1]
        tiled = [tf.repeat(maps, draws, 0) for maps in encoded]
        noise = model.draw_noise(tf.reshape(numbers, [-1]), (seed, 0))
        of_draws = draw_terms(model, tiled, tf.repeat(images, draws, 0), noise)
        return [tf.reshape(term, tf.shape(numbers)) for term in of_draws]

    encode, run_terms = on_devices(model.bottom_up), on_devices(terms)
    found, start = [], 0
    with tqdm(total=num_images, unit="image", desc="evaluate", disable=None) as bar:
        for images in batches:
            shares, count = shard(images), len(images)
            encoded = encode(shares)
            nelbo, log_mean = np.zeros(count), np.full(count, -np.inf)
            for first in range(0, num_draws, chunk):
                draws = np.arange(first, min(first + chunk, num_draws), dtype=np.int64)
                numbers = np.arange(start, start + count)[:, None] * num_draws + draws
                terms_found = run_terms(encoded, shares, shard(numbers))
                of_draws, log_weights = unshard(terms_found, count)
                nelbo += of_draws.numpy().astype(np.float64).sum(1)
                weights = log_weights.numpy().astype(np.float64)
                log_mean = np.logaddexp(log_mean, np.logaddexp.reduce(weights, 1))
            found.append((nelbo / num_draws, math.log(num_draws) - log_mean))
            start += count
            bar.update(count)
    nelbo, negative = (np.concatenate(column) for column in zip(*found, strict=True))
    return Likelihoods(nelbo, negative)


def summarize(likelihoods: Likelihoods, bits_per_dim) -> dict[str, dict[str, float | None]]:
    """Mean and standard error over the images, in nats and in bits per dimension.

    Args:
        likelihoods: from `evaluate`.
        bits_per_dim: turns nats into bits per dimension.
    """
    in_nats = {
        "nelbo": likelihoods.nelbo,
        "neg_log_likelihood": likelihoods.neg_log_likelihood,
    }
    in_bits = {
        "bpd_nelbo": bits_per_dim(likelihoods.nelbo),
        "bpd_log_likelihood": bits_per_dim(likelihoods.neg_log_likelihood),
    }
    return {
        name: {
            "mean": float(values.mean()),
            "standard_error": float(values.std(ddof=1) / math.sqrt(len(values)))
            if len(values) > 1
            else None,
        }
        for name, values in {**in_nats, **in_bits}.items()
    }

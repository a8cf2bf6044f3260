"""NELBO and importance-weighted log-likelihood (paper, section 4.1)."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from nvae_tf.checks import check_count
from nvae_tf.config import EXACT, OFFICIAL, check_image
from nvae_tf.engine.devices import on_devices, shard, unshard
from nvae_tf.io.errors import UserError
from nvae_tf.layers.latent_group import FromPosterior
from nvae_tf.model import NVAE

BOTH = "both"


class Likelihoods(NamedTuple):
    """Estimates for each image, in nats.

    Attributes:
        nelbo: Negative evidence lower bound, averaged over the draws, (images,).
        neg_log_likelihood: Importance-weighted estimate of -log p(x), (images,).
    """

    nelbo: np.ndarray
    neg_log_likelihood: np.ndarray


def draw_terms(model: NVAE, encoded, images, noise):
    """NELBO and log importance weight of one draw of z for each image.

    Args:
        model: The model.
        encoded: The encoder's maps, from `NVAE.bottom_up`.
        images: Images (batch, height, width, channels) in [0, 1].
        noise: Standard-normal tensors, one per group, shaped as its z.

    Returns:
        -log p(x | z) + KL, and log p(x, z) - log q(z | x), each (batch,), in nats.
    """
    output = model.top_down(FromPosterior(encoded, noise))
    return _terms(model, output, images, model.likelihood)


def _terms(model: NVAE, output, images, kind: str):
    """What `draw_terms` returns, for what `NVAE.top_down` returned and for a kind of likelihood."""
    recon = -model.log_likelihood(output.parameters, images, kind)
    nelbo = recon + tf.reduce_sum(output.kl_per_group, 1)
    return nelbo, output.log_p - output.log_q - recon


def kinds_of(model: NVAE, asked: str | None) -> list[str]:
    """The kinds of likelihood by which a model's images are scored, the model's own first.

    Args:
        model: The model.
        asked: ``"official"``, ``"exact"`` or ``"both"``; None: the model's own.

    Raises:
        UserError: The images have no such likelihood.
    """
    if asked is None:
        return [model.likelihood]
    if model.image.binary:
        raise UserError(
            f"likelihood: {asked} is not allowed for binary images, whose pixels are Bernoulli"
        )
    kinds = [OFFICIAL, EXACT] if asked == BOTH else [asked]
    for kind in kinds:
        check_image(dataclasses.replace(model.config, likelihood=kind), model.image)
    return sorted(kinds, key=lambda kind: kind != model.likelihood)


def name_of(model: NVAE, kind: str) -> str:
    """What reports call a kind of likelihood of a model's images."""
    if model.image.binary:
        return "Bernoulli"
    return "normal density" if model.config.num_mixture_dec == 1 else kind


def evaluate(
    model: NVAE,
    batches: tf.data.Dataset,
    num_images: int,
    *,
    num_draws: int,
    chunk: int,
    seed: int,
) -> Likelihoods:
    """`evaluate_kinds` for the model's own kind of likelihood."""
    kinds, options = [model.likelihood], dict(num_draws=num_draws, chunk=chunk, seed=seed)
    return evaluate_kinds(model, batches, num_images, kinds, **options)[model.likelihood]


def evaluate_kinds(
    model: NVAE,
    batches: tf.data.Dataset,
    num_images: int,
    kinds: list[str],
    *,
    num_draws: int,
    chunk: int,
    seed: int,
) -> dict[str, Likelihoods]:
    """Estimates NELBO and -log p(x) of every image.

    The bottom-up pass runs once per image, the top-down pass once per draw. An image's noise depends
    only on the seed, the image's index and the number of draws. All kinds of likelihood score the
    same draws.

    Args:
        model: The model.
        batches: Batches of images (batch, height, width, channels) in [0, 1], in order.
        num_images: Number of images in all batches.
        kinds: Kinds of likelihood, from `kinds_of`.
        num_draws: K, the number of draws of z for each image.
        chunk: Number of draws of each image that are computed at once.
        seed: Seed of the noise.

    Returns:
        The estimates by each kind.

    Raises:
        UserError: A number is not allowed, or there are no images.
    """
    check_count("num_draws", num_draws)
    check_count("chunk", chunk)
    check_count("seed", seed, minimum=0)

    def terms(encoded, images, indices):
        draws = tf.shape(indices)[1]
        repeated = [tf.repeat(maps, draws, 0) for maps in encoded]
        noise = model.draw_noise(tf.reshape(indices, [-1]), (seed, 0))
        output, images = model.top_down(FromPosterior(repeated, noise)), tf.repeat(images, draws, 0)
        by_kind = [_terms(model, output, images, kind) for kind in kinds]
        shape = tf.concat([tf.shape(indices), [len(kinds)]], 0)
        return [tf.reshape(tf.stack(term, -1), shape) for term in zip(*by_kind, strict=True)]

    encode, run_terms = on_devices(model.bottom_up), on_devices(terms)
    estimates, start = [], 0
    with tqdm(total=num_images, unit="image", desc="evaluate", disable=None) as bar:
        for images in batches:
            image_shards, count = shard(images), len(images)
            encoded = encode(image_shards)
            nelbo, log_sum = np.zeros((count, len(kinds))), np.full((count, len(kinds)), -np.inf)
            for first in range(0, num_draws, chunk):
                draws = np.arange(first, min(first + chunk, num_draws), dtype=np.int64)
                indices = np.arange(start, start + count)[:, None] * num_draws + draws
                term_shards = run_terms(encoded, image_shards, shard(indices))
                draw_nelbo, log_weights = unshard(term_shards, count)
                nelbo += draw_nelbo.numpy().astype(np.float64).sum(1)
                log_weights = log_weights.numpy().astype(np.float64)
                log_sum = np.logaddexp(log_sum, np.logaddexp.reduce(log_weights, 1))
            estimates.append((nelbo / num_draws, math.log(num_draws) - log_sum))
            start += count
            bar.update(count)
    if not estimates:
        raise UserError("batches: there are no images")
    nelbo, negative = (np.concatenate(column) for column in zip(*estimates, strict=True))
    return {kind: Likelihoods(nelbo[:, k], negative[:, k]) for k, kind in enumerate(kinds)}


def summarize(likelihoods: Likelihoods, bits_per_dim) -> dict[str, dict[str, float | None]]:
    """Mean and standard error over the images, in nats and in bits per dimension.

    Args:
        likelihoods: What `evaluate` returned.
        bits_per_dim: Function from nats to bits per dimension.

    Returns:
        ``mean`` and ``standard_error`` (None for a single image) of ``nelbo`` and
        ``neg_log_likelihood`` in nats, and of ``bpd_nelbo`` and ``bpd_log_likelihood`` in bits per
        dimension.
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

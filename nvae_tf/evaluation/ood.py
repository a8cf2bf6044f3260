"""Scores of how unlike the training images an image is, which use the hierarchy of latents.

Havtorn et al., *Hierarchical VAEs Know What They Don't Know*, ICML 2021: L>k is the importance-weighted
bound in which the k finest groups come from their conditional prior and only the coarser ones from the
posterior, and LLR>k = L - L>k is what the k finest groups add by looking at the image. Serrà et al.,
*Input Complexity and Out-of-Distribution Detection with Likelihood-Based Generative Models*, ICLR 2020:
-log p less the size of the losslessly compressed image.
"""

import hashlib
import io
import itertools
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image
from tqdm import tqdm

from nvae_tf.engine.devices import on_devices, shard, unshard
from nvae_tf.engine.scope import Scope
from nvae_tf.image_spec import ImageSpec
from nvae_tf.layers.latent_group import FromPosterior, FromPrior, GroupOutput, LatentGroup
from nvae_tf.model import NVAE


class PosteriorAbove:
    """Source of latents from the posterior for the coarsest groups, and from the prior for the rest.

    The latents that come from the prior cancel in the importance weight: their KL, log q and log p are
    0, so that `NVAEOutput.log_p` and `NVAEOutput.log_q` are those of the coarsest groups.

    Args:
        encoded: The encoder's maps, one per group, top of the hierarchy first.
        noise: Standard-normal tensors, one per group, shaped as its z.
        cuts: How many of the coarsest groups come from the posterior, for each image, (batch,).
    """

    def __init__(self, encoded, noise, cuts):
        self.posterior, self.prior = FromPosterior(encoded, noise), FromPrior(noise)
        self.cuts, self.batch_size = cuts, self.posterior.batch_size

    def __call__(self, group: LatentGroup, index: int, s, scope: Scope) -> GroupOutput:
        """Draws a group's z from its posterior or its prior."""
        inferred = self.posterior(group, index, s, scope)
        generated = self.prior(group, index, s, scope)
        above = index < self.cuts
        above_map = above[:, None, None, None]
        return inferred._replace(
            z=tf.where(above_map, inferred.z, generated.z),
            kl=tf.where(above_map, inferred.kl, 0.0),
            log_q=tf.where(above, inferred.log_q, 0.0),
            log_p=tf.where(above, inferred.log_p, 0.0),
        )


class Measurements(NamedTuple):
    """What the scores of images are made of; each row depends on image, seed and model alone.

    Attributes:
        bounds: L>k in nats for k from 0 (the full bound) to the number of groups (all latents from the
            prior), (images, groups + 1).
        nelbo: Negative evidence lower bound, averaged over the draws, in nats, (images,).
        kl: KL of each group, averaged over the draws, in nats, coarsest first, (images, groups).
        compressed: Bits of the losslessly compressed image, (images,).
    """

    bounds: np.ndarray
    nelbo: np.ndarray
    kl: np.ndarray
    compressed: np.ndarray


def measure(
    model: NVAE,
    batches,
    num_images: int,
    *,
    num_draws: int,
    chunk: int,
    seed: int,
    title: str = "ood",
) -> Measurements:
    """Measures images; the bottom-up pass runs once, the top-down pass once per draw and bound.

    All bounds of a draw take the same noise, which makes their differences precise. The noise of an
    image depends on the seed and on the image's content alone (`content_keys`).

    Args:
        model: The model.
        batches: Batches of images (batch, height, width, channels) in [0, 1].
        num_images: Number of images in all batches.
        num_draws: Number of draws of z for each image.
        chunk: Number of top-down passes of each image that are computed at once.
        seed: Seed of the noise.
        title: What the progress bar says.
    """
    groups = len(model.groups)

    def terms(encoded, images, keys, cuts):
        passes, flat_cuts = tf.shape(keys)[1], tf.reshape(cuts, [-1])
        repeated = [tf.repeat(maps, passes, 0) for maps in encoded]
        noise = model.draw_noise(tf.reshape(keys, [-1]), (seed, 0))
        output = model.top_down(PosteriorAbove(repeated, noise, flat_cuts))
        log_p_x = model.log_likelihood(output.parameters, tf.repeat(images, passes, 0))
        columns = [
            (log_p_x + output.log_p - output.log_q)[:, None],
            log_p_x[:, None],
            output.kl_per_group,
        ]
        return tf.reshape(tf.concat(columns, 1), [tf.shape(keys)[0], passes, groups + 2])

    encode, run_terms = on_devices(model.bottom_up), on_devices(terms)
    num_passes, parts = num_draws * (groups + 1), []
    with tqdm(total=num_images, unit="image", desc=title, disable=None) as bar:
        for batch in batches:
            images = np.asarray(batch)
            count, image_shards = len(images), shard(images)
            encoded = encode(image_shards)
            log_sums = np.full((count, groups + 1), -np.inf)
            kl, recon = np.zeros((count, groups)), np.zeros(count)
            for first in range(0, num_passes, chunk):
                numbers = np.arange(first, min(first + chunk, num_passes))
                draws, replaced = np.divmod(numbers, groups + 1)
                keys, cuts = content_keys(images, draws), groups - replaced
                all_cuts = shard(np.broadcast_to(cuts, (count, len(cuts))))
                result = unshard(run_terms(encoded, image_shards, shard(keys), all_cuts), count)
                table = result.numpy().astype(np.float64)
                for place, k in enumerate(replaced):
                    log_sums[:, k] = np.logaddexp(log_sums[:, k], table[:, place, 0])
                for place in np.flatnonzero(replaced == 0).tolist():
                    recon -= table[:, place, 1] / num_draws
                    kl += table[:, place, 2:] / num_draws
            compressed = compressed_bits(images, model.image, model.num_bits)
            bounds = log_sums - math.log(num_draws)
            parts.append((bounds, recon + kl.sum(1), kl, compressed))
            bar.update(count)
    return Measurements(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def content_keys(images: np.ndarray, draws) -> np.ndarray:
    """A number for each draw of each image, from the image's content.

    Args:
        images: Images (n, height, width, channels), float32.
        draws: Numbers of the draws, (draws,).

    Returns:
        int64 (n, draws); equal images have equal numbers.
    """

    def key(content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=8).digest()

    contents = [key(np.ascontiguousarray(image, "<f4").tobytes()) for image in images]
    keys = [
        key(content + int(draw).to_bytes(8, "little")) for content in contents for draw in draws
    ]
    return np.frombuffer(b"".join(keys), "<i8").astype(np.int64).reshape(len(images), len(draws))


def compressed_bits(images: np.ndarray, spec: ImageSpec, num_bits: int) -> np.ndarray:
    """Size of each image's scored part after lossless compression.

    The smaller of PNG and lossless WebP; for binary images, PNG of one bit per pixel counts too. Images
    that are neither grey nor coloured, or have more than 8 bits, are PNGs channel by channel.

    Args:
        images: Images (n, height, width, channels) in [0, 1].
        spec: What they are like.
        num_bits: Bits per value.

    Returns:
        Bits, (n,).
    """
    rows, columns = spec.scored_part
    largest = 2.0 ** (1 if spec.binary else num_bits) - 1.0
    levels = np.rint(np.asarray(images)[:, rows, columns] * largest)
    return np.array([8.0 * _smallest_file(image, spec, num_bits) for image in levels])


def _smallest_file(levels: np.ndarray, spec: ImageSpec, num_bits: int) -> int:
    """Bytes of an image of whole levels, (height, width, channels)."""
    if not spec.binary and (num_bits > 8 or spec.channels not in (1, 3)):
        kind = np.uint8 if num_bits <= 8 else np.uint16
        channels = [Image.fromarray(channel) for channel in levels.astype(kind).transpose(2, 0, 1)]
        return sum(_file_size(channel, "PNG", optimize=True) for channel in channels)
    if spec.binary and spec.channels not in (1, 3):
        channels = [Image.fromarray(channel > 0) for channel in levels.transpose(2, 0, 1)]
        return sum(_file_size(channel, "PNG", optimize=True) for channel in channels)
    scale = 255 if spec.binary else 1
    values = (levels * scale).astype(np.uint8)
    image = Image.fromarray(values[..., 0] if spec.channels == 1 else values)
    sizes = [
        _file_size(image, "PNG", optimize=True),
        _file_size(image.convert("RGB"), "WEBP", lossless=True, quality=100, method=6),
    ]
    if spec.binary and spec.channels == 1:
        sizes.append(_file_size(image.convert("1", dither=Image.Dither.NONE), "PNG", optimize=True))
    return min(sizes)


def _file_size(image: Image.Image, kind: str, **options) -> int:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.tell()


def scale_boundaries(model: NVAE) -> list[int]:
    """The k at which whole scales come from the prior: the finest scale, the two finest, and so on."""
    sizes = [shape[:2] for shape in model.latent_shapes]
    per_scale = [len(list(same)) for _, same in itertools.groupby(reversed(sizes))]
    return list(itertools.accumulate(per_scale))


def chosen_k(model: NVAE) -> int:
    """The k of LLR>k that is chosen without outliers: only the coarsest group sees the image."""
    return max(len(model.groups) - 1, 1)


def scores(model: NVAE, measured: Measurements) -> dict[str, np.ndarray]:
    """The scores of images, each higher for an image that is less like the training images.

    Args:
        model: The model.
        measured: What `measure` returned.

    Returns:
        Arrays (images,) by name: ``neg_log_p``, ``nelbo``, ``kl_scale_0`` (the coarsest scale) and so
        on, ``neg_l_gt_1`` (-L>1) and ``llr_gt_1`` (LLR>1) to the number of groups, in nats;
        ``complexity``, in bits.
    """
    groups, full = len(model.groups), measured.bounds[:, 0]
    columns = {"neg_log_p": -full, "nelbo": measured.nelbo}
    starts = [groups - k for k in reversed(scale_boundaries(model))]
    for scale, (start, end) in enumerate(itertools.pairwise([*starts, groups])):
        columns[f"kl_scale_{scale}"] = measured.kl[:, start:end].sum(1)
    for k in range(1, groups + 1):
        columns[f"neg_l_gt_{k}"] = -measured.bounds[:, k]
    for k in range(1, groups + 1):
        columns[f"llr_gt_{k}"] = full - measured.bounds[:, k]
    columns["complexity"] = model.bits_per_dim(-full) * model.image.num_dims - measured.compressed
    return columns

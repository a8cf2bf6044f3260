"""The latents of a trained model: reconstruction, interpolation, traversal, encoding."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from nvae_tf.checks import check_count, check_groups
from nvae_tf.engine.devices import on_devices, shard, unshard
from nvae_tf.engine.scope import Scope
from nvae_tf.evaluation.likelihood import draw_terms
from nvae_tf.layers.latent_group import FromPosterior, FromPrior, GroupOutput
from nvae_tf.model import NVAE

BATCH = 100  # images per batch, unless callers say otherwise


class RecordNoise:
    """Source of given latents that records the prior noise which would produce them.

    After the walk over the groups, `FromPrior` with `noise` would draw the same latents (see
    `nvae_tf.layers.latent_group`).

    Args:
        latents: z of every group, top of the hierarchy first.
    """

    def __init__(self, latents):
        self.latents, self.noise = latents, []
        self.batch_size = tf.shape(latents[0])[0]

    def __call__(self, group, index, s, scope: Scope) -> GroupOutput:
        """Returns a group's z, and records its noise."""
        z, prior = self.latents[index], group.prior(group.prior_parameters(s, scope))
        self.noise.append((z - prior.loc) / prior.scale)
        return GroupOutput(z)


def prior_noise(model: NVAE, images, batch_size: int = BATCH):
    """The noise from which the prior would draw the latents (posterior means) of images.

    Args:
        model: The model.
        images: Images (n, height, width, channels) in [0, 1].
        batch_size: Images per batch.

    Returns:
        Tensors (n, height, width, latents), one per group.
    """

    def encode_noise(images):
        source = RecordNoise([latent.z for latent in model.encode(images)])
        model.top_down(source)
        return source.noise

    return _in_batches(encode_noise, batch_size)([images])


class Reconstructions(NamedTuple):
    """Reconstructions of images.

    Attributes:
        images: Means of p(x | z), (n, height, width, channels) in [0, 1].
        nelbo: NELBO of each original with this draw of z, in nats, (n,).
        mse: Mean squared error of each image over its scored part, for values in [0, 1], (n,).
    """

    images: np.ndarray
    nelbo: np.ndarray
    mse: np.ndarray


def reconstruct(model: NVAE, images, seed: int, batch_size: int = BATCH) -> Reconstructions:
    """Encodes images with one draw of z each, and decodes them.

    Args:
        model: The model.
        images: Images (n, height, width, channels) in [0, 1].
        seed: Seed of the draws.
        batch_size: Images per batch.
    """
    rows, columns = model.image.scored_part

    def run(images, indices):
        noise = model.draw_noise(indices, (seed, 0))
        nelbo, _ = draw_terms(model, model.bottom_up(images), images, noise)
        reconstructed = model.reconstruct(images, noise)
        errors = tf.square(reconstructed - images)[:, rows, columns]
        return reconstructed, nelbo, tf.reduce_mean(errors, [1, 2, 3])

    indices = tf.range(len(images), dtype=tf.int64)
    return Reconstructions(*_in_batches(run, batch_size)([images, indices]))


def interpolate(
    model: NVAE, start, end, steps: int, temperature: float = 1.0, batch_size: int = BATCH
) -> np.ndarray:
    """Interpolates between images, along arcs in the noise space of the prior.

    A straight line between two draws from a standard normal would pass through values whose norm is too
    small, which the prior practically never draws. On an arc all values are likely.

    Args:
        model: The model.
        start: Noise of the first images, one tensor per group, from `prior_noise` or `NVAE.draw_noise`.
        end: Noise of the last images, like `start`.
        steps: Number of images in each row, both ends included.
        temperature: Factor on the priors' standard deviations.
        batch_size: Images per batch.

    Returns:
        Means of p(x | z), (batch, steps, height, width, channels).

    Raises:
        UserError: There are no steps.
    """
    check_count("steps", steps)
    decode = _noise_decoder(model, temperature, batch_size)
    rows = [
        decode([_on_arc(a, b, t) for a, b in zip(start, end, strict=True)])
        for t in tqdm(np.linspace(0.0, 1.0, steps), unit="step", desc="interpolate", disable=None)
    ]
    return np.stack(rows, 1)


def traverse(
    model: NVAE,
    noise,
    groups: list[int],
    steps: int,
    temperature: float,
    seed: int,
    batch_size: int = BATCH,
) -> np.ndarray:
    """Renders images while the noise of one group changes and that of all others stays.

    The group's noise makes half a turn: it goes from the given noise through a fresh draw to the
    negative of the given noise.

    Args:
        model: The model.
        noise: Noise at which the traversals start, one tensor (n, height, width, latents) per group.
        groups: Indices of the groups to change, one at a time.
        steps: Number of images in each row; the first is the image of the given noise.
        temperature: Factor on the priors' standard deviations.
        seed: Seed of the fresh draws, which are the same for all n.
        batch_size: Images per batch.

    Returns:
        Means of p(x | z), (n, groups, steps, height, width, channels).

    Raises:
        UserError: There are no steps, or no such groups.
    """
    check_count("steps", steps)
    check_groups(groups, len(model.groups))
    decode = _noise_decoder(model, temperature, batch_size)
    fresh = model.draw_noise([1], (seed, 0))
    angles = tf.reshape(tf.linspace(0.0, math.pi, steps), [-1, 1, 1, 1])

    def row(start, group):
        changed = [tf.repeat(tensor, steps, 0) for tensor in start]
        changed[group] = tf.cos(angles) * start[group] + tf.sin(angles) * fresh[group]
        return decode(changed)

    starts = [[tensor[n : n + 1] for tensor in noise] for n in range(len(noise[0]))]
    with tqdm(total=len(starts) * len(groups), unit="row", desc="traverse", disable=None) as bar:
        rows = []
        for start in starts:
            rows.append([])
            for group in groups:
                rows[-1].append(row(start, group))
                bar.update()
    return np.stack(rows)


def influence(
    model: NVAE, num_samples: int, temperature: float, seed: int, batch_size: int = BATCH
) -> np.ndarray:
    """Measures how much each group changes an image, by a fresh draw of that group's noise alone.

    Args:
        model: The model.
        num_samples: Number of images to average over.
        temperature: Factor on the priors' standard deviations.
        seed: Seed of the noise.
        batch_size: Images per batch.

    Returns:
        Root mean squared change of the means of p(x | z), for values in [0, 1], (groups,).
    """
    decode = _noise_decoder(model, temperature, batch_size)
    noise, fresh = (model.draw_noise(num_samples, (seed, stream)) for stream in (0, 1))
    before = decode(noise)
    changes = []
    for group in tqdm(range(len(noise)), unit="group", desc="influence", disable=None):
        after = decode([*noise[:group], fresh[group], *noise[group + 1 :]])
        changes.append(math.sqrt(np.mean(np.square(after - before))))
    return np.array(changes)


class Encoded(NamedTuple):
    """Latents of a batch of images.

    Attributes:
        z: z of the selected groups, (batch, height, width, latents) each: the posterior's means after
            the flows, given those of the groups before.
        mean: Means of these groups' posteriors before the flows, shaped as z.
        stddev: Standard deviations of these groups' posteriors before the flows, shaped as z.
        kl: KL of every image and group in nats, (batch, groups), with one draw of z from the posterior.
            Its sum over the groups is the KL in the NELBO of that draw. With the means for z it would
            usually be smaller.
    """

    z: list[np.ndarray]
    mean: list[np.ndarray]
    stddev: list[np.ndarray]
    kl: np.ndarray


def encode_batches(model: NVAE, batches, groups: list[int], seed: int) -> Iterator[Encoded]:
    """Encodes batches of images.

    Args:
        model: The model.
        batches: Batches of images, (batch, height, width, channels) in [0, 1].
        groups: Indices of the groups whose latents are returned. The KL is that of all groups.
        seed: Seed of the draws of z for the KL. An image's noise depends only on the seed and on the
            image's index over all batches, as in `likelihood.evaluate` with one draw.

    Yields:
        The latents of each batch.

    Raises:
        UserError: There are no such groups.
    """
    check_groups(groups, len(model.groups))

    def encode(images, indices):
        encoded, noise = model.bottom_up(images), model.draw_noise(indices, (seed, 0))
        kl = model.top_down(FromPosterior(encoded, noise)).kl_per_group
        no_noise = [tf.zeros_like(tensor) for tensor in noise]
        latents = model.top_down(FromPosterior(encoded, no_noise)).latents
        selected = [latents[group] for group in groups]
        fields = ("z", "mean", "stddev")
        return [[getattr(latent, name) for latent in selected] for name in fields], kl

    run, start = on_devices(encode), 0
    for images in batches:
        indices = tf.range(start, start + len(images), dtype=tf.int64)
        tensors = unshard(run(shard(images), shard(indices)), len(images))
        (z, mean, stddev), kl = tf.nest.map_structure(lambda tensor: tensor.numpy(), tensors)
        start += len(images)
        yield Encoded(z, mean, stddev, kl)


def mean_channel_kl(model: NVAE, batches, seed: int) -> np.ndarray:
    """KL of every latent channel, from which the objective counts active latents.

    Args:
        model: The model.
        batches: Batches of images, (batch, height, width, channels) in [0, 1].
        seed: Seed of the draws of z, as for `encode_batches`.

    Returns:
        Mean KL over the images in nats, summed over each channel's map, (groups, latents).
    """

    def channel_kl(images, indices):
        noise = model.draw_noise(indices, (seed, 0))
        return model.top_down(FromPosterior(model.bottom_up(images), noise)).kl_per_channel

    run, start, total = on_devices(channel_kl), 0, np.zeros(())
    for images in batches:
        indices = tf.range(start, start + len(images), dtype=tf.int64)
        shards = run(shard(images), shard(indices))
        total = total + unshard(shards, len(images)).numpy().astype(np.float64).sum(0)
        start += len(images)
    return total / start


def _noise_decoder(model: NVAE, temperature: float, batch_size: int):
    """A function from noise to the means of p(x | z), as an array."""

    def decode(*noise):
        return model.render(model.top_down(FromPrior(noise, temperature)).parameters)

    return _in_batches(decode, batch_size)


def _in_batches(function, batch_size: int):
    """Makes a function that runs another on the devices, batch by batch, and joins the results.

    Args:
        function: A function of tensors (rows, ...) to a structure of such tensors.
        batch_size: Rows per batch.

    Returns:
        A function of a list of such tensors to a structure of arrays.
    """
    run = on_devices(function)

    def run_all(tensors):
        parts = []
        for start in range(0, len(tensors[0]), batch_size):
            batch = [tensor[start : start + batch_size] for tensor in tensors]
            parts.append(unshard(run(*map(shard, batch)), len(batch[0])))
        return tf.nest.map_structure(lambda *values: np.concatenate(values), *parts)

    return run_all


def _on_arc(start, end, t: float):
    """The point at portion t of the arc from `start` to `end`, image by image."""
    axes = [1, 2, 3]
    product = tf.reduce_sum(start * end, axes, keepdims=True)
    norms = tf.sqrt(
        tf.reduce_sum(start**2, axes, keepdims=True) * tf.reduce_sum(end**2, axes, keepdims=True)
    )
    angle = tf.acos(tf.clip_by_value(product / tf.maximum(norms, 1e-12), -1.0, 1.0))
    straight = (1.0 - t) * start + t * end
    arc = (tf.sin((1.0 - t) * angle) * start + tf.sin(t * angle) * end) / tf.maximum(
        tf.sin(angle), 1e-6
    )
    return tf.where(tf.sin(angle) < 1e-3, straight, arc)

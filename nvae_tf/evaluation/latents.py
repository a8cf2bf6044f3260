"""What the latents of a trained model hold: reconstruction, interpolation, traversal, encoding."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from nvae_tf.engine.devices import on_devices, shard, unshard
from nvae_tf.engine.scope import Scope
from nvae_tf.evaluation.likelihood import draw_terms
from nvae_tf.layers.latent_group import FromPosterior, FromPrior, GroupOutput
from nvae_tf.model import NVAE


class RecordNoise:
    """A source of latents (see `nvae_tf.layers.latent_group`): those given, noting their noise.

    After the walk `noise` holds what `FromPrior` would have to be given to draw the same latents.

    Args:
        latents: z of every group, top of the hierarchy first.
    """

    def __init__(self, latents):
        self.latents, self.noise = latents, []
        self.batch_size = tf.shape(latents[0])[0]

    def __call__(self, group, index, s, scope: Scope) -> GroupOutput:
        """Hands out a group's z."""
        z, prior = self.latents[index], group.prior(s, scope)
        self.noise.append((z - prior.loc) / prior.scale)
        return GroupOutput(z)


def prior_noise(model: NVAE, images):
    """The noise from which the prior would draw the latents (posterior means) of images.

    Args:
        model: the model.
        images: (batch, height, width, channels) in [0, 1].

    Returns:
        Tensors (batch, height, width, latents), one a group.
    """

    def find(images):
        source = RecordNoise([latent.z for latent in model.encode(images)])
        model.top_down(source)
        return source.noise

    return unshard(on_devices(find)(shard(images)), len(images))


class Reconstructions(NamedTuple):
    """Images and what became of them.

    Attributes:
        images: (n, height, width, channels), means of p(x | z).
        nelbo: of each image with this draw of z, in nats, (n,).
        mse: mean squared error of each image over its scored part, values in [0, 1], (n,).
    """

    images: np.ndarray
    nelbo: np.ndarray
    mse: np.ndarray


def reconstruct(model: NVAE, images, seed: int) -> Reconstructions:
    """Encodes images with one draw of z each, and decodes them."""
    edge = (model.image.size - (model.image.scored_size or model.image.size)) // 2
    scored = slice(edge, model.image.size - edge)

    def run(images, numbers):
        noise = model.draw_noise(numbers, (seed, 0))
        nelbo, _ = draw_terms(model, model.bottom_up(images), images, noise)
        found = model.reconstruct(images, noise)
        errors = tf.square(found - images)[:, scored, scored]
        return found, nelbo, tf.reduce_mean(errors, [1, 2, 3])

    numbers = tf.range(len(images), dtype=tf.int64)
    found = on_devices(run)(shard(images), shard(numbers))
    return Reconstructions(*(part.numpy() for part in unshard(found, len(images))))


def interpolate(model: NVAE, start, end, steps: int, temperature: float = 1.0) -> np.ndarray:
    """Images between images, along arcs in the noise space of the prior.

    On the way between two draws of a standard normal a straight line would pass through values that the
    prior never draws, with too small a norm. An arc keeps in-betweens likely.

    Args:
        model: the model.
        start: noise, one tensor a group, from `prior_noise` or `NVAE.draw_noise`.
        end: noise of as many images.
        steps: images in each row, both ends included.
        temperature: of the latents.

    Returns:
        Means of p(x | z), (batch, steps, height, width, channels).
    """
    draw = _image_of_noise(model, temperature)
    rows = [
        draw([_on_arc(a, b, t) for a, b in zip(start, end, strict=True)])
        for t in np.linspace(0.0, 1.0, steps)
    ]
    return np.stack(rows, 1)


def traverse(
    model: NVAE, noise, groups: list[int], steps: int, temperature: float, seed: int
) -> np.ndarray:
    """Images while the noise of one group changes and that of all others stays.

    A group's noise makes half a turn: from the noise given, by way of a fresh draw, to the opposite of
    the noise given.

    Args:
        model: The model.
        noise: The noise that the walks start from, one tensor (n, height, width, latents) a group.
        groups: The groups to be changed, one at a time.
        steps: Images in each row; the first is that of the noise given.
        temperature: Factor on the priors' deviations.
        seed: Seed of the fresh draws, which are the same for all n.

    Returns:
        Means of p(x | z), (n, groups, steps, height, width, channels).
    """
    draw = _image_of_noise(model, temperature)
    fresh = model.draw_noise([1], (seed, 0))
    angles = tf.reshape(tf.linspace(0.0, math.pi, steps), [-1, 1, 1, 1])

    def row(start, group):
        turned = [tf.repeat(tensor, steps, 0) for tensor in start]
        turned[group] = tf.cos(angles) * start[group] + tf.sin(angles) * fresh[group]
        return draw(turned)

    starts = [[tensor[n : n + 1] for tensor in noise] for n in range(len(noise[0]))]
    return np.stack([[row(start, group) for group in groups] for start in starts])


def influence(model: NVAE, num_samples: int, temperature: float, seed: int) -> np.ndarray:
    """How much each group changes an image: a fresh draw of its noise, all other noise kept.

    Returns:
        Root of the mean squared change of the images' means, values in [0, 1], (groups,).
    """
    draw = _image_of_noise(model, temperature)
    noise, fresh = (model.draw_noise(num_samples, (seed, stream)) for stream in (0, 1))
    before = draw(noise)
    found = []
    for group in range(len(noise)):
        after = draw([*noise[:group], fresh[group], *noise[group + 1 :]])
        found.append(math.sqrt(np.mean(np.square(after - before))))
    return np.array(found)


class Encoded(NamedTuple):
    """Latents of a batch of images.

    Attributes:
        z: z of the groups asked for, where the posteriors' means lead to (behind the flows),
            (batch, height, width, latents).
        mean: Means of those groups' posteriors on that way, shaped as z.
        stddev: Standard deviations of those groups' posteriors on that way, shaped as z.
        kl: KL of every group and image in nats, (batch, groups), with one draw of z from the posterior:
            summed over the groups it is the KL of that draw's NELBO. On the way of the means it is
            usually smaller.
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
        groups: The groups whose latents are wanted; the KL is that of all.
        seed: Seed of the z that the KL is computed with. An image's noise depends on the seed and on
            the image's number over all batches alone, as in `likelihood.evaluate` with one draw.
    """

    def encode(images, numbers):
        encoded, noise = model.bottom_up(images), model.draw_noise(numbers, (seed, 0))
        kl = model.top_down(FromPosterior(encoded, noise)).kl_per_group
        no_noise = [tf.zeros_like(tensor) for tensor in noise]
        latents = model.top_down(FromPosterior(encoded, no_noise)).latents
        chosen = [latents[group] for group in groups]
        fields = ("z", "mean", "stddev")
        return [[getattr(latent, name) for latent in chosen] for name in fields], kl

    run, start = on_devices(encode), 0
    for images in batches:
        numbers = tf.range(start, start + len(images), dtype=tf.int64)
        found = unshard(run(shard(images), shard(numbers)), len(images))
        (z, mean, stddev), kl = tf.nest.map_structure(lambda tensor: tensor.numpy(), found)
        start += len(images)
        yield Encoded(z, mean, stddev, kl)


def _image_of_noise(model: NVAE, temperature: float):
    """A function from noise to the means of p(x | z), as an array."""
    run = on_devices(
        lambda noise: model.render(model.top_down(FromPrior(noise, temperature)).parameters)
    )
    return lambda noise: unshard(run([shard(n) for n in noise]), len(noise[0])).numpy()


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

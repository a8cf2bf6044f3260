"""Samples, and batch-norm statistics that suit their temperature."""

import math
import time
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from nvae_tf.errors import UserError
from nvae_tf.evaluation.noise import noise_for
from nvae_tf.layers.latent_group import FromPrior
from nvae_tf.layers.normalization import observed_statistics
from nvae_tf.model import NVAE
from nvae_tf.pictures import to_bytes

READJUSTING_STREAM, SAMPLING_STREAM = 1, 0  # of noise


def readjust_batch_norm(
    model: NVAE, temperature: float, *, batches: int, batch_size: int, seed: int
) -> int:
    """Replaces the decoder's batch-norm statistics by those of samples at a temperature.

    Every layer's mean and variance are pooled over all values of all batches, exactly, in float64.
    Batches that are not finite are left out.

    Args:
        model: whose statistics are replaced.
        temperature: of the samples.
        batches: of samples.
        batch_size: samples in each.
        seed: of the samples.

    Returns:
        How many batches were left out.

    Raises:
        UserError: no batch was finite; the statistics are unchanged.

    Reference: NVAE paper, section 4.2 ("readjusting batch norm").
    """
    layers = []

    @tf.function(autograph=False)
    def observe(number):
        numbers = number * batch_size + tf.range(batch_size, dtype=tf.int64)
        noise = noise_for(model, (seed, READJUSTING_STREAM), numbers)
        with observed_statistics() as statistics:
            model.top_down(FromPrior(noise, temperature), training=True)
        layers[:] = statistics
        return [tf.concat(part, 0) for part in zip(*statistics.values(), strict=True)]

    total, total_square, used = 0.0, 0.0, 0
    for number in tqdm(range(batches), unit="batch", desc="readjust", disable=None):
        mean, variance = (
            part.numpy().astype(np.float64) for part in observe(tf.constant(number, tf.int64))
        )
        if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(variance))):
            continue
        total, total_square, used = total + mean, total_square + variance + mean**2, used + 1
    if used == 0:
        raise UserError(
            f"none of {batches} batches of samples at temperature {temperature} is finite; sample "
            "without --readjust_bn or at a lower --temp"
        )
    mean = total / used
    variance = total_square / used - mean**2
    ends = np.cumsum([layer.moving_mean.shape[0] for layer in layers])[:-1]
    for layer, m, v in zip(layers, np.split(mean, ends), np.split(variance, ends), strict=True):
        layer.moving_mean.assign(m.astype(np.float32))
        layer.moving_variance.assign(v.astype(np.float32))
    return batches - used


def sample_batches(
    model: NVAE, num_samples: int, temperature: float, *, batch_size: int, seed: int
) -> Iterator[np.ndarray]:
    """Draws images, a batch at a time.

    Args:
        model: the model.
        num_samples: how many in all.
        temperature: of the latents, and of colour pixels.
        batch_size: images computed at once; their pixels are drawn by the batch.
        seed: of the samples.

    Yields:
        8-bit images (up to batch_size, height, width, channels).

    Raises:
        UserError: an image is not finite.
    """

    @tf.function(autograph=False)
    def draw(number):
        numbers = number * batch_size + tf.range(batch_size, dtype=tf.int64)
        noise = noise_for(model, (seed, SAMPLING_STREAM), numbers)
        pixels = tf.random.experimental.stateless_fold_in((seed, SAMPLING_STREAM), number)
        return model.sample(noise, temperature, pixels)

    with tqdm(total=num_samples, unit="image", desc="sample", disable=None) as bar:
        for number in range(math.ceil(num_samples / batch_size)):
            drawn = draw(tf.constant(number, tf.int64)).numpy()
            if not np.all(np.isfinite(drawn)):
                raise UserError(
                    f"samples at temperature {temperature} are not finite; try a lower --temp, and "
                    "--readjust_bn"
                )
            images = to_bytes(drawn)[: num_samples - number * batch_size]
            bar.update(len(images))
            yield images


def sample(
    model: NVAE, num_samples: int, temperature: float, *, batch_size: int, seed: int
) -> tuple[np.ndarray, float]:
    """Draws images (see `sample_batches`).

    Returns:
        8-bit images (num_samples, height, width, channels), and images per second; the first batch,
        which includes compiling, counts only if it is the only one.
    """
    batches = sample_batches(model, num_samples, temperature, batch_size=batch_size, seed=seed)
    begin = time.perf_counter()
    first = next(batches)
    compiled = time.perf_counter()
    others = list(batches)
    if others:
        rate = sum(map(len, others)) / (time.perf_counter() - compiled)
    else:
        rate = len(first) / (compiled - begin)
    return np.concatenate([first, *others]), rate

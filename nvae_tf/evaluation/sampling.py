"""Samples, and batch-norm statistics that suit their temperature."""

import math
import time
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from nvae_tf.engine.devices import on_devices, shard, unshard
from nvae_tf.engine.weights import assign_all
from nvae_tf.io.errors import UserError
from nvae_tf.io.image_grid import to_bytes
from nvae_tf.layers.batch_norm import BatchNormAct
from nvae_tf.layers.latent_group import FromPrior
from nvae_tf.model import NVAE

READJUSTING_STREAM, SAMPLING_STREAM = 1, 0  # of noise

Statistics = dict[
    BatchNormAct, tuple[np.ndarray, np.ndarray]
]  # mean and variance, (channels,) each


def batch_norm_statistics(
    model: NVAE, temperature: float, *, batches: int, batch_size: int, seed: int
) -> tuple[Statistics, int]:
    """The decoder's batch-norm statistics over samples at a temperature.

    Every layer's mean and variance are pooled over all values of all batches, exactly, in float64.
    Batches that are not finite are left out.

    Args:
        model: The model.
        temperature: Factor on the deviations of the latents' priors.
        batches: How many batches of samples.
        batch_size: Samples in each.
        seed: Seed of the samples.

    Returns:
        Each layer's statistics, float32, and how many batches were left out.

    Raises:
        UserError: No batch was finite.

    Reference: NVAE paper, section 4.2 ("readjusting batch norm").
    """
    layers = []

    def observe(numbers):
        noise = model.draw_noise(numbers, (seed, READJUSTING_STREAM))
        scope = model.scope(training=True)
        model.top_down(FromPrior(noise, temperature), scope)
        layers[:] = scope.statistics
        mean, variance, _ = zip(*scope.statistics.values(), strict=True)
        return [tf.concat(mean, 0), tf.concat(variance, 0)]

    # The statistics are those of the whole batch on every device. Parts of one size are needed for
    # that: where there are none, every device computes the whole batch.
    strategy = tf.distribute.get_strategy()
    divisible = batch_size % strategy.num_replicas_in_sync == 0
    run_observe = on_devices(observe)

    def statistics_of(number):
        numbers = number * batch_size + tf.range(batch_size, dtype=tf.int64)
        found = run_observe(shard(numbers) if divisible else numbers)
        return [strategy.experimental_local_results(part)[0].numpy() for part in found]

    total, total_square, used = 0.0, 0.0, 0
    for number in tqdm(range(batches), unit="batch", desc="readjust", disable=None):
        mean, variance = (part.astype(np.float64) for part in statistics_of(number))
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
    statistics = {
        layer: (m.astype(np.float32), v.astype(np.float32))
        for layer, m, v in zip(layers, np.split(mean, ends), np.split(variance, ends), strict=True)
    }
    return statistics, batches - used


def readjust_batch_norm(model: NVAE, statistics: Statistics) -> None:
    """Replaces the running statistics of the statistics' layers (see `batch_norm_statistics`)."""
    assign_all({layer.moving_mean: mean for layer, (mean, _) in statistics.items()})
    assign_all({layer.moving_variance: variance for layer, (_, variance) in statistics.items()})


def compiled_sampler(model: NVAE):
    """Compiles a model's `NVAE.sample`: one graph a batch size, whatever the temperature and the seed.

    Args:
        model: The model.

    Returns:
        What `sample` and `sample_batches` take as `draw`, so that several calls share the graphs. It
        belongs to the strategy in whose scope it is first called.
    """
    return on_devices(
        lambda numbers, temperature, seed: model.sample(numbers, temperature, seed=seed)
    )


def sample_batches(
    model: NVAE, num_samples: int, temperature: float, *, batch_size: int, seed: int, draw=None
) -> Iterator[np.ndarray]:
    """Draws images, a batch at a time.

    Args:
        model: The model.
        num_samples: How many images in all.
        temperature: Factor on the deviations of the latents' priors, and of colour pixels.
        batch_size: Images computed at once.
        seed: Seed of the images; an image depends on it and on its place among all.
        draw: The model's `compiled_sampler`; by default one that is made for this call.

    Yields:
        8-bit images (up to batch_size, height, width, channels).

    Raises:
        UserError: An image is not finite.
    """
    draw = draw or compiled_sampler(model)
    at, stream = tf.constant(temperature, tf.float32), tf.constant((seed, SAMPLING_STREAM))
    with tqdm(total=num_samples, unit="image", desc="sample", disable=None) as bar:
        for number in range(math.ceil(num_samples / batch_size)):
            numbers = number * batch_size + tf.range(batch_size, dtype=tf.int64)
            drawn = unshard(draw(shard(numbers), at, stream), batch_size).numpy()
            if not np.all(np.isfinite(drawn)):
                raise UserError(
                    f"samples at temperature {temperature} are not finite; try a lower --temp, and "
                    "--readjust_bn"
                )
            images = to_bytes(drawn)[: num_samples - number * batch_size]
            bar.update(len(images))
            yield images


def sample(
    model: NVAE, num_samples: int, temperature: float, *, batch_size: int, seed: int, draw=None
) -> tuple[np.ndarray, float]:
    """Draws images; arguments and errors as for `sample_batches`.

    Returns:
        8-bit images (num_samples, height, width, channels), and images per second; the first batch,
        which includes compiling, counts only if it is the only one.
    """
    options = dict(batch_size=batch_size, seed=seed, draw=draw)
    batches = sample_batches(model, num_samples, temperature, **options)
    begin = time.perf_counter()
    first = next(batches)
    compiled = time.perf_counter()
    others = list(batches)
    if others:
        rate = sum(map(len, others)) / (time.perf_counter() - compiled)
    else:
        rate = len(first) / (compiled - begin)
    return np.concatenate([first, *others]), rate

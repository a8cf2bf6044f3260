"""Samples, and batch-norm statistics readjusted for their temperature."""

import math
import time
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from nvae_tf.checks import check_count
from nvae_tf.engine.devices import on_devices, shard, unshard
from nvae_tf.engine.scope import BatchStatistics
from nvae_tf.engine.weights import assign_all
from nvae_tf.evaluation.stored_images import to_levels
from nvae_tf.io.errors import UserError
from nvae_tf.layers.batch_norm import BatchNormAct
from nvae_tf.layers.latent_group import FromPrior
from nvae_tf.model import NVAE

READJUSTING_STREAM, SAMPLING_STREAM = 1, 0  # second integers of the seeds of noise

# Mean and biased variance of each layer, (channels,) each.
NormStatistics = dict[BatchNormAct, tuple[np.ndarray, np.ndarray]]


def batch_norm_statistics(
    model: NVAE, temperature: float, *, batches: int, batch_size: int, seed: int
) -> tuple[NormStatistics, int]:
    """Computes the decoder's batch-norm statistics over samples at a temperature.

    The mean and variance of each layer are those of all values in all batches together, computed
    exactly in float64, not as running averages. Batches with values that are not finite are left out.

    Args:
        model: The model.
        temperature: Factor on the priors' standard deviations.
        batches: Number of batches of samples.
        batch_size: Number of samples in each batch.
        seed: Seed of the samples.

    Returns:
        The statistics of each layer, float32, and the number of batches that were left out.

    Raises:
        UserError: No batch was finite.

    Reference: NVAE paper, section 4.2 ("readjusting batch norm").
    """
    layers = []

    def sample_statistics(indices):
        noise = model.draw_noise(indices, (seed, READJUSTING_STREAM))
        scope = model.scope(training=True)
        model.top_down(FromPrior(noise, temperature), scope)
        layers[:] = scope.statistics
        batches = map(BatchStatistics.from_vector, scope.statistics.values())
        means, variances, _ = zip(*batches, strict=True)
        return [tf.concat(means, 0), tf.concat(variances, 0)]

    # Every device returns the statistics of the whole batch. `shard` repeats rows where a batch cannot
    # be divided, and those would count twice: then every device computes the whole batch.
    strategy = tf.distribute.get_strategy()
    divisible = batch_size % strategy.num_replicas_in_sync == 0
    run = on_devices(sample_statistics)

    def batch_statistics(batch):
        indices = batch * batch_size + tf.range(batch_size, dtype=tf.int64)
        per_device = run(shard(indices) if divisible else indices)
        return [strategy.experimental_local_results(tensor)[0].numpy() for tensor in per_device]

    total, total_square, used = 0.0, 0.0, 0
    for batch in tqdm(range(batches), unit="batch", desc="readjust", disable=None):
        mean, variance = (tensor.astype(np.float64) for tensor in batch_statistics(batch))
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


def readjust_batch_norm(model: NVAE, statistics: NormStatistics) -> None:
    """Replaces a model's running statistics.

    Args:
        model: The model.
        statistics: What `batch_norm_statistics` returned for this model.
    """
    assign_all({layer.moving_mean: mean for layer, (mean, _) in statistics.items()})
    assign_all({layer.moving_variance: variance for layer, (_, variance) in statistics.items()})


def sampler_function(model: NVAE):
    """Compiles a model's `NVAE.sample`: one graph per batch size, for all temperatures and seeds.

    Args:
        model: The model.

    Returns:
        The argument `draw` of `sample` and `sample_batches`, with which several calls share the graphs.
        It belongs to the strategy in whose scope it is first called.
    """
    return on_devices(
        lambda indices, temperature, seed: model.sample(indices, temperature, seed=seed)
    )


def sample_batches(
    model: NVAE, num_samples: int, temperature: float, *, batch_size: int, seed: int, draw=None
) -> Iterator[np.ndarray]:
    """Draws images, a batch at a time.

    Args:
        model: The model.
        num_samples: Number of images in all.
        temperature: Factor on the priors' standard deviations, and temperature of colour pixels.
        batch_size: Number of images per batch.
        seed: Seed of the images. An image depends only on the seed and on its index over all batches.
        draw: The model's `sampler_function`; default: one for this call alone.

    Yields:
        Levels (up to batch_size, height, width, channels), as from `to_levels`.

    Raises:
        UserError: An argument is wrong, or an image is not finite.
    """
    check_count("num_samples", num_samples)
    check_count("batch_size", batch_size)
    check_count("seed", seed, minimum=0)
    draw = draw or sampler_function(model)
    draw_temperature = tf.constant(temperature, tf.float32)
    draw_seed = tf.constant((seed, SAMPLING_STREAM))
    with tqdm(total=num_samples, unit="image", desc="sample", disable=None) as bar:
        for batch in range(math.ceil(num_samples / batch_size)):
            indices = batch * batch_size + tf.range(batch_size, dtype=tf.int64)
            shards = draw(shard(indices), draw_temperature, draw_seed)
            values = unshard(shards, batch_size).numpy()
            if not np.all(np.isfinite(values)):
                raise UserError(
                    f"samples at temperature {temperature} are not finite; try a lower --temp, and "
                    "--readjust_bn"
                )
            images = to_levels(values, model.image)[: num_samples - batch * batch_size]
            bar.update(len(images))
            yield images


def sample(
    model: NVAE, num_samples: int, temperature: float, *, batch_size: int, seed: int, draw=None
) -> tuple[np.ndarray, float]:
    """Draws images; arguments and errors as for `sample_batches`.

    Returns:
        Levels (num_samples, height, width, channels), as from `to_levels`, and images per second. The
        first batch, which includes compiling, counts only if it is the only one.
    """
    options = dict(batch_size=batch_size, seed=seed, draw=draw)
    batches = sample_batches(model, num_samples, temperature, **options)
    start = time.perf_counter()
    first = next(batches)
    first_end = time.perf_counter()
    others = list(batches)
    if others:
        rate = sum(map(len, others)) / (time.perf_counter() - first_end)
    else:
        rate = len(first) / (first_end - start)
    return np.concatenate([first, *others]), rate

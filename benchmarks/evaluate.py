#!/usr/bin/env python3
"""Importance-weighted draws per second, and how much faster than as many full passes.

python benchmarks/evaluate.py --config cifar10 --batch_size 1 --draws 16 --iw_chunk 16

A full pass encodes, draws z and decodes, as the official implementation does for every draw. Weights
are random. Prints one JSON line last.
"""

import statistics
import time

from measuring import fresh_model, make_parser, peak_memory_gib, random_images, run

from nvae_tf.cli.flags import at_least
from nvae_tf.config import Config


def measure(config: Config, arguments) -> dict:
    """Evaluates the same images both ways, `--repeats` times after a first one."""
    import tensorflow as tf

    from nvae_tf.evaluation import likelihood

    model = fresh_model(config)
    images = random_images(model, config.data.batch_size)
    starts = []

    def batches():
        for _ in range(arguments.repeats + 1):
            starts.append(time.perf_counter())
            yield images

    likelihood.evaluate(
        model,
        batches(),
        len(images) * (arguments.repeats + 1),
        num_draws=arguments.draws,
        chunk=arguments.iw_chunk,
        seed=1,
    )
    starts.append(time.perf_counter())
    our_seconds = statistics.median(b - a for a, b in zip(starts[1:], starts[2:], strict=False))

    @tf.function(autograph=False)
    def full_pass(draw):
        noise = model.draw_noise(draw * len(images) + tf.range(len(images)), (1, 0))
        return likelihood.draw_terms(model, model.bottom_up(images), images, noise)

    def time_passes():
        start = time.perf_counter()
        for draw in range(arguments.draws):
            full_pass(tf.constant(draw))[1].numpy()
        return time.perf_counter() - start

    time_passes()
    full_seconds = statistics.median(time_passes() for _ in range(arguments.repeats))
    draws = len(images) * arguments.draws
    return {
        "batch_size": len(images),
        "draws": arguments.draws,
        "iw_chunk": arguments.iw_chunk,
        "draws_per_second": round(draws / our_seconds, 3),
        "full_passes_per_second": round(draws / full_seconds, 3),
        "ratio": round(full_seconds / our_seconds, 2),
        "peak_memory_gib": round(peak_memory_gib(), 3),
    }


if __name__ == "__main__":
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--draws", type=at_least(1), default=16, metavar="N", help="default: 16")
    parser.add_argument("--iw_chunk", type=at_least(1), default=16, metavar="N", help="default: 16")
    parser.add_argument("--repeats", type=at_least(1), default=3, metavar="N", help="default: 3")
    raise SystemExit(run(parser, measure))

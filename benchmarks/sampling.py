#!/usr/bin/env python3
"""Samples per second of a recipe's model, by batch size.

python benchmarks/sampling.py --config cifar10 --batches 1 4 16

Weights are random. `first_seconds` is the time of the first batch, which includes tracing. Prints one
JSON line last.
"""

import statistics
import time

from measuring import fresh_model, make_parser, peak_memory_gib, run

from nvae_tf.cli.flags import at_least
from nvae_tf.config import Config


def measure(config: Config, arguments) -> dict:
    """Draws `--repeats` batches of every size, after a first one."""
    from nvae_tf.evaluation.sampling import sample_batches

    model, results = fresh_model(config), []
    for size in arguments.batches:
        times = [time.perf_counter()]
        batches = sample_batches(
            model, size * (arguments.repeats + 1), 0.7, batch_size=size, seed=1
        )
        for _ in batches:
            times.append(time.perf_counter())
        first, *others = (b - a for a, b in zip(times, times[1:], strict=False))
        rate = size / statistics.median(others)
        results.append(
            {
                "batch_size": size,
                "first_seconds": round(first, 2),
                "samples_per_second": round(rate, 3),
            }
        )
        print(results[-1], flush=True)
    return {
        "parameters": model.num_parameters,
        "batches": results,
        "peak_memory_gib": round(peak_memory_gib(), 3),
    }


if __name__ == "__main__":
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--batches", type=at_least(1), nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--repeats", type=at_least(1), default=3, metavar="N", help="default: 3")
    raise SystemExit(run(parser, measure))

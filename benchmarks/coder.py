#!/usr/bin/env python3
"""What a coder's precision costs bits-back coding, without a network.

pip install constriction
python benchmarks/coder.py

Latents with posteriors of many widths are popped with their posteriors and pushed with the prior. With
enough precision they cost log q - log p of what was drawn, and `excess bits` is what they cost beyond
that. Ours is compared with constriction's `AnsCoder`, whose Python models have 24 bits and give every
bin a frequency of 1 at least: so it draws from the far tails of a posterior once in a while, which
`tail draws` counts (farther than 6 standard deviations from its mean).
"""

import argparse
import time

import constriction
import numpy as np

from nvae_tf.compression import cdfs, rans

WIDTH = 6.0  # standard deviations


def latents(count: int, seed: int = 0):
    """Means and standard deviations of posteriors, whose prior is standard normal."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=count) * 0.7, np.exp(-rng.exponential(size=count) * 0.7)


def measure_ours(mean, stddev, num_bins: int, lanes: int) -> dict:
    """Excess bits, tail draws and milliseconds of ours, per 1,000 latents."""
    bins, noise = cdfs.LatentBins(num_bins), np.random.Philox(1)
    stack = rans.Stack.random(
        lanes, lambda n: (noise.random_raw(n) >> np.uint64(32)).astype(np.uint32)
    )
    prior = (np.zeros(len(mean)), np.ones(len(mean)))
    distribution = cdfs.Posterior(bins, prior, (mean, stddev))
    positions, before, began = np.arange(len(mean)), stack.bits, time.monotonic()
    chosen = stack.pop(distribution, positions, bins.count)
    stack.push(*rans.interval(bins.prior, positions, chosen))
    seconds = time.monotonic() - began
    _, q = rans.interval(distribution, positions, chosen)
    _, p = rans.interval(bins.prior, positions, chosen)
    ideal = np.log2(q.astype(float) / p.astype(float)).sum()
    z = bins.centres[chosen].astype(float)
    return _row(stack.bits - before - ideal, z, mean, stddev, seconds)


def measure_constriction(mean, stddev, num_bins: int) -> dict:
    """The same for constriction: bins of equal width between -8 and 8."""
    edge = num_bins // 2
    scale = 8.0 / edge
    model = constriction.stream.model.QuantizedGaussian(-edge, edge - 1)
    seeds = np.random.default_rng(1).integers(0, 2**32, 40 * len(mean) // 32 + 64, dtype=np.uint32)
    coder = constriction.stream.stack.AnsCoder(seeds, seal=True)
    before, began = coder.num_bits(), time.monotonic()
    chosen = coder.decode(model, mean / scale, stddev / scale)
    coder.encode_reverse(chosen, model, np.zeros(len(mean)), np.full(len(mean), 1.0 / scale))
    seconds = time.monotonic() - began
    z = chosen * scale
    log_q = -0.5 * ((z - mean) / stddev) ** 2 - np.log(stddev)
    ideal = ((log_q + 0.5 * z**2) / np.log(2)).sum()
    return _row(coder.num_bits() - before - ideal, z, mean, stddev, seconds)


def _row(excess, z, mean, stddev, seconds) -> dict:
    thousands = len(mean) / 1000
    tails = np.abs((z - mean) / stddev) > WIDTH
    return {
        "excess": excess / thousands,
        "tails": tails.sum() / thousands,
        "ms": 1000 * seconds / thousands,
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200_000, help="latents (default: 200000)")
    mean, stddev = latents(parser.parse_args().count)
    print("Per 1,000 latents:")
    print("| coder | bins | tail draws | excess bits | ms |")
    print("| --- | --- | --- | --- | --- |")
    for power in (10, 12, 14, 16):
        rows = {
            f"ours, {rans.PRECISION} bits, 16 lanes": measure_ours(mean, stddev, 2**power, 16),
            "constriction, 24 bits": measure_constriction(mean, stddev, 2**power),
        }
        for name, row in rows.items():
            numbers = f"{row['tails']:.3f} | {row['excess']:.2f} | {row['ms']:.1f}"
            print(f"| {name} | 2^{power} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Compares the training step of two checkouts, which run in turn on this machine.

git worktree add ../before COMMIT
python benchmarks/pairs.py ../before . --pairs 5 -- --config digits --steps 60

Each runs its own `benchmarks/train_step.py` with the flags after ``--``, with the packages of this
Python. Prints each pair, and the medians with the median ratio, new to old, and the range of the
ratios: of five pairs the range holds the true median 15 times out of 16.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from nvae_tf.cli.flags import at_least

QUANTITIES = (
    "graph_nodes",
    "build_seconds",
    "trace_seconds",
    "first_step_seconds",
    "step_seconds",
    "peak_memory_gib",
)


def measure(checkout: Path, flags: list[str]) -> dict:
    """Runs a checkout's benchmark in a process of its own; returns what it prints.

    Args:
        checkout: Path of the checkout.
        flags: Flags of its `benchmarks/train_step.py`.
    """
    done = subprocess.run(
        [sys.executable, "benchmarks/train_step.py", *flags],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        raise SystemExit(f"error: {checkout}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="path of a checkout")
    parser.add_argument("new", type=Path, help="path of another one")
    parser.add_argument("--pairs", type=at_least(1), default=5, metavar="N", help="default: 5")
    parser.add_argument("flags", nargs="+", help="after --: flags of train_step.py")
    arguments = parser.parse_args()
    checkouts = (arguments.old.resolve(), arguments.new.resolve())
    for checkout in checkouts:
        if not (checkout / "benchmarks" / "train_step.py").is_file():
            parser.error(f"{checkout}: no checkout with benchmarks/train_step.py")
    pairs = []
    for number in range(arguments.pairs):
        order = (0, 1) if number % 2 == 0 else (1, 0)  # neither is always first
        results = {place: measure(checkouts[place], arguments.flags) for place in order}
        pairs.append([results[0], results[1]])
        print(json.dumps(pairs[-1]), flush=True)
    print("| quantity | old | new | median ratio | range |")
    print("| --- | --- | --- | --- | --- |")
    for name in QUANTITIES:
        values = [(old[name], new[name]) for old, new in pairs]
        if any(not before or after is None for before, after in values):
            continue
        old, new = (statistics.median(column) for column in zip(*values, strict=True))
        ratios = [after / before for before, after in values]
        print(
            f"| {name} | {old:,.4g} | {new:,.4g} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()

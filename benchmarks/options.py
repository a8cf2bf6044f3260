#!/usr/bin/env python3
"""What each option of training does to `digits` and `photos`, within what a CPU can train.

``python benchmarks/options.py OUT --dataset digits`` trains once without options and once with each,
and prints a table; runs that are complete in OUT are not repeated.
"""

import argparse
import json
import time
from pathlib import Path

import nvae_tf
from nvae_tf.evaluation.logs import read_logs

OPTIONS: dict[str, dict] = {
    "none": {},
    "kl_max_coeff 0.7": dict(kl_max_coeff=0.7),
    "latent_stddev softplus": dict(latent_stddev="softplus"),
    "skip_gradient_norm auto": dict(skip_gradient_norm="auto"),
    "ema_decay 0.99": dict(ema_decay=0.99),
    # With 8 bits the floor is the official one, and nothing changes.
    "num_x_bits 5": dict(num_x_bits=5),
    "num_x_bits 5, min_log_scale auto": dict(num_x_bits=5, min_log_scale="auto"),
}
FOR_COLOURS = ("num_x_bits 5", "num_x_bits 5, min_log_scale auto")


def run(out: Path, dataset: str, name: str, epochs: int) -> dict:
    """Trains with an option, and returns what the table says of it."""
    folder = out / dataset / name.replace(" ", "_").replace(",", "")
    results = folder / "results.json"
    if not results.exists():
        began = time.monotonic()
        scores = nvae_tf.train(dataset, folder=folder, epochs=epochs, **OPTIONS[name])
        norms = read_logs(folder / "logs").scalars["optimizer/gradient_norm"].curves["train"]
        later = [norm for _, norm in norms[len(norms) // 5 :]]  # after the first, wild ones
        row = {**scores, "seconds": time.monotonic() - began, "largest_norm": max(later)}
        results.write_text(json.dumps(row))
    return json.loads(results.read_text())


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", choices=("digits", "photos"), required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--option", choices=OPTIONS, help="train with this one alone, print no table"
    )
    arguments = parser.parse_args()
    names = [n for n in OPTIONS if n not in FOR_COLOURS or arguments.dataset == "photos"]
    if arguments.option:
        run(arguments.out, arguments.dataset, arguments.option, arguments.epochs)
        return
    rows = {name: run(arguments.out, arguments.dataset, name, arguments.epochs) for name in names}
    print("| option | NELBO, nats | bits per dim | recon | KL | largest gradient norm | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        scores = f"{row['nelbo']:.1f} | {row['bpd']:.4f} | {row['recon']:.1f} | {row['kl']:.1f}"
        print(f"| {name} | {scores} | {row['largest_norm']:.0f} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    main()

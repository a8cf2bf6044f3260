"""Starts from a trained model: digits 0 to 4 first, then 5 to 9, against 5 to 9 from new weights.

Run it where `nvae_tf` is installed: ``python examples/start_from_trained.py OUT``. It takes three
trainings of digits and writes their run folders to OUT.
"""

import argparse
from pathlib import Path

import nvae_tf
from nvae_tf.config import DataConfig
from nvae_tf.data import catalog


def digits_by_label(labels):
    """Training and test images of some of scikit-learn's digits, and their description."""
    dataset = catalog.get_dataset_info(DataConfig(dataset="digits"))
    parts = []
    for source in dataset.open(""):
        chosen = [label in labels for label in source.labels.numpy()]
        parts.append(source.images.numpy()[chosen])
    return dict(dataset=tuple(parts), image=dataset.image)


def main() -> None:
    """Trains three times, and prints the NELBO of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=20, help="of the trainings from new weights")
    parser.add_argument(
        "--few", type=int, default=8, help="epochs of the one that starts from another"
    )
    arguments = parser.parse_args()
    first, second = digits_by_label(range(5)), digits_by_label(range(5, 10))
    out, epochs = arguments.out, arguments.epochs
    nvae_tf.train("digits", **first, folder=out / "first", epochs=epochs)
    new = nvae_tf.train("digits", **second, folder=out / "new", epochs=epochs)
    started = nvae_tf.train(
        "digits",
        **second,
        folder=out / "started",
        epochs=arguments.few,
        init_from=out / "first",
        warmup_epochs=1,
        kl_anneal_portion=0.0,
    )
    print(f"digits 5 to 9, {epochs} epochs from new weights: nelbo {new['nelbo']:.2f} nats")
    print(
        f"digits 5 to 9, {arguments.few} epochs from digits 0 to 4: nelbo {started['nelbo']:.2f} nats"
    )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What a recipe costs, counted from its training graph, and what to expect of more GPUs.

python benchmarks/cost_model.py cifar10 celeba256 --teraflops 10 --gigabytes 100
"""

import argparse
import contextlib
import io

import nvae_tf  # noqa: F401 - chooses the Keras that TensorFlow shows

import tensorflow as tf  # isort: skip

from nvae_tf import config as configuration
from nvae_tf.data import catalog
from nvae_tf.layers.batch_norm import BatchNormAct
from nvae_tf.model import NVAE

LATENCY = 20e-6  # seconds of one small all-reduce
REPLICAS = (1, 2, 4, 8, 16, 24)


def count(name: str) -> dict[str, float]:
    """Parameters, floating-point operations of a training image, and collectives of a step.

    Operations are those that TensorFlow's profiler knows (convolutions, matrix products and their
    gradients, elementwise arithmetic), for a forward and a backward pass of one image. The spectral
    term and the optimiser, whose cost does not grow with the batch, are left out.
    """
    config = configuration.load(name)
    spec = catalog.get_dataset_info(config.data).image
    model = NVAE(config.model, spec)

    @tf.function(autograph=False)
    def run(images):
        noise = [tf.zeros((1, *shape)) for shape in model.latent_shapes]
        with tf.GradientTape() as tape:
            output = model(images, noise, training=True)
            nelbo = tf.reduce_sum(output.kl_per_group) - model.log_likelihood(
                output.parameters, images
            )
        return nelbo, tape.gradient(nelbo, model.trainable_variables)

    graph = run.get_concrete_function(tf.TensorSpec((1, *spec.shape))).graph
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    with contextlib.redirect_stdout(io.StringIO()):
        profile = tf.compat.v1.profiler.profile(graph, options=options)
    return {
        "parameters": model.num_parameters,
        "flops": profile.total_float_ops,
        "batch_norms": sum(isinstance(layer, BatchNormAct) for layer in model.submodules),
        "batch": config.data.batch_size,
    }


def efficiency(costs: dict[str, float], replicas: int, flops: float, bandwidth: float) -> float:
    """Portion of linear scaling: compute over compute and communication, none of it overlapped.

    Args:
        costs: from `count`.
        replicas: that share a step.
        flops: of one replica that the model reaches, a second.
        bandwidth: of the slowest link of the ring, bytes a second.
    """
    if replicas == 1:
        return 1.0
    compute = costs["batch"] * costs["flops"] / flops
    gradients = 2.0 * (replicas - 1) / replicas * 4.0 * costs["parameters"] / bandwidth
    # Mean and variance of every batch norm, forward and backward, one after the other.
    statistics = 4.0 * costs["batch_norms"] * LATENCY
    return compute / (compute + gradients + statistics)


def main() -> None:
    """Prints a table of costs and one of efficiencies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", help="recipes")
    parser.add_argument("--teraflops", type=float, default=10.0, help="that a GPU reaches here")
    parser.add_argument("--gigabytes", type=float, default=100.0, help="a second between GPUs")
    arguments = parser.parse_args()
    print("| recipe | parameters | gradient bytes | GFLOPs an image | batch norms |")
    print("| --- | --- | --- | --- | --- |")
    rows = {}
    for name in arguments.configs:
        costs = rows[name] = count(name)
        print(
            f"| {name} | {costs['parameters'] / 1e6:.1f} M | {costs['parameters'] * 4 / 1e6:.0f} MB | "
            f"{costs['flops'] / 1e9:.1f} | {costs['batch_norms']} |",
            flush=True,
        )
    print("\n| recipe | " + " | ".join(f"{n} GPUs" for n in REPLICAS) + " |")
    print("| --- |" + " --- |" * len(REPLICAS))
    rates = arguments.teraflops * 1e12, arguments.gigabytes * 1e9
    for name, costs in rows.items():
        found = [f"{efficiency(costs, n, *rates):.0%}" for n in REPLICAS]
        print(f"| {name} | " + " | ".join(found) + " |")


if __name__ == "__main__":
    main()

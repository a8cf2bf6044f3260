#!/usr/bin/env python3
"""What a recipe costs, counted from its training graph, and what to expect of more GPUs.

python benchmarks/cost_model.py cifar10 celeba256 --teraflops 10 --gigabytes 100 10
"""

import argparse
import contextlib
import io

import nvae_tf  # noqa: F401 - chooses the Keras that TensorFlow shows

import tensorflow as tf  # isort: skip

from nvae_tf import config as configuration
from nvae_tf.data import catalog
from nvae_tf.model import NVAE

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
        "batch_norms": len(model.batch_norms),
        "channels": sum(norm.moving_mean.shape[0] for norm in model.batch_norms),
        "batch": config.data.batch_size,
    }


def efficiency(
    costs: dict[str, float], replicas: int, flops: float, bandwidth: float, latency: float
) -> float:
    """Portion of linear scaling: compute over compute and communication, none of it overlapped.

    Args:
        costs: What `count` returned.
        replicas: Number of replicas that share a step.
        flops: Operations per second that one replica reaches with this model.
        bandwidth: Bytes per second of the slowest link of the ring.
        latency: Seconds that one small all-reduce takes.
    """
    if replicas == 1:
        return 1.0
    compute = costs["batch"] * costs["flops"] / flops
    # One exchange per batch norm and direction, one after the other. Forward, the parts of all replicas
    # (count, mean and centred squares) are exchanged, backward the sum of one such vector.
    vectors = 4.0 * (2 * costs["channels"] + costs["batch_norms"])
    exchanged = 4.0 * costs["parameters"] + vectors * (replicas + 1)
    transfer = 2.0 * (replicas - 1) / replicas * exchanged / bandwidth
    return compute / (compute + transfer + 2.0 * costs["batch_norms"] * latency)


def main() -> None:
    """Prints a table of costs, and one of efficiencies for each bandwidth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", help="recipes")
    parser.add_argument("--teraflops", type=float, default=10.0, help="that a GPU reaches here")
    parser.add_argument(
        "--gigabytes", type=float, nargs="+", default=[100.0], help="per second between GPUs"
    )
    parser.add_argument(
        "--latency", type=float, default=20.0, help="microseconds of one small all-reduce"
    )
    arguments = parser.parse_args()
    print("| recipe | parameters | gradients | GFLOPs per image | batch norms |")
    print("| --- | --- | --- | --- | --- |")
    rows = {}
    for name in arguments.configs:
        costs = rows[name] = count(name)
        print(
            f"| {name} | {costs['parameters'] / 1e6:.1f} M | {costs['parameters'] * 4 / 1e6:.0f} MB | "
            f"{costs['flops'] / 1e9:.1f} | {costs['batch_norms']} |",
            flush=True,
        )
    for gigabytes in arguments.gigabytes:
        rates = arguments.teraflops * 1e12, gigabytes * 1e9, arguments.latency * 1e-6
        print(f"\n| {gigabytes:g} GB/s | " + " | ".join(f"{n} GPUs" for n in REPLICAS) + " |")
        print("| --- |" + " --- |" * len(REPLICAS))
        for name, costs in rows.items():
            shares = [f"{efficiency(costs, n, *rates):.0%}" for n in REPLICAS]
            print(f"| {name} | " + " | ".join(shares) + " |")


if __name__ == "__main__":
    main()

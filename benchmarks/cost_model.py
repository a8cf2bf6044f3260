#!/usr/bin/env python3
"""What a recipe costs, counted from its training graph, and what to expect of more GPUs.

python benchmarks/cost_model.py cifar10 celeba256 --teraflops 10 --gigabytes 100 10
python benchmarks/cost_model.py cifar10 celeba256 --roofline
"""

import argparse
import contextlib
import io
import math
from typing import NamedTuple

from measuring import fresh_model  # first: it imports nvae_tf

import tensorflow as tf  # isort: skip

from nvae_tf import config as configuration

REPLICAS = (1, 2, 4, 8, 16, 24)


class Card(NamedTuple):
    """A GPU's peaks as NVIDIA publishes them, without sparsity.

    Attributes:
        half: bfloat16 and float16 operations with float32 sums per second.
        tf32: TF32 operations per second, in which float32 convolutions are computed.
        bandwidth: Bytes per second of its memory.
    """

    half: float
    tf32: float
    bandwidth: float


CARDS = {
    "A100 (SXM, 80 GB)": Card(312e12, 156e12, 2039e9),
    "H100 (SXM)": Card(989e12, 494e12, 3350e9),
    "RTX 4090": Card(165.2e12, 82.6e12, 1008e9),
}
ITEM_BYTES = {10: 2, 11: 4, 16: 2}  # of XLA's types F16, F32 and BF16


def count(name: str) -> dict[str, float]:
    """Parameters, floating-point operations of a training image, and collectives of a step.

    Operations are those that TensorFlow's profiler knows (convolutions, matrix products and their
    gradients, elementwise arithmetic), for a forward and a backward pass of one image. The spectral
    term and the optimiser, whose cost does not grow with the batch, are left out.
    """
    config = configuration.load(name)
    model = fresh_model(config)

    @tf.function(autograph=False)
    def run(images):
        noise = [tf.zeros((1, *shape)) for shape in model.latent_shapes]
        with tf.GradientTape() as tape:
            output = model(images, noise, training=True)
            nelbo = tf.reduce_sum(output.kl_per_group) - model.log_likelihood(
                output.parameters, images
            )
        return nelbo, tape.gradient(nelbo, model.trainable_variables)

    graph = run.get_concrete_function(tf.TensorSpec((1, *model.image.shape))).graph
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


class Operation(NamedTuple):
    """A convolution or matrix product of a program.

    Attributes:
        flops: Its operations; those with padding count, too.
        bytes: What it has to read and write.
        half: Whether it is computed in half precision.
    """

    flops: float
    bytes: float
    half: bool

    def seconds(self, card: Card) -> float:
        """The least time that a card takes for it."""
        peak = card.half if self.half else card.tf32
        return max(self.flops / peak, self.bytes / card.bandwidth)


def program_of(name: str, precision: str):
    """XLA's `HloModuleProto` of a recipe's training step at its batch size; and that size."""
    from tensorflow.compiler.xla.service import hlo_pb2

    from nvae_tf.training.optimizer_choice import make_optimizer
    from nvae_tf.training.programs import flat_step, lower
    from nvae_tf.training.trainer import Trainer

    config = configuration.override(configuration.load(name), {"precision": precision}).config
    settings, batch = config.train, config.data.batch_size
    optimizer = make_optimizer(settings, 1e-3)
    trainer = Trainer(fresh_model(config), settings, 1000, optimizer=optimizer, on_gpu=True)
    step = flat_step(trainer, batch)
    return hlo_pb2.HloModuleProto.FromString(lower(step.function, step.specs)), batch


def operations(program) -> tuple[list[Operation], float]:
    """The operations of a program that take arithmetic, and the bytes of its inputs and results.

    What a loop repeats counts once: loops hold the power iterations and the noise.

    Args:
        program: XLA's `HloModuleProto`.
    """
    computations = {computation.id: computation for computation in program.computations}
    found: dict[int, list[Operation]] = {}

    def of(number: int) -> list[Operation]:
        if number not in found:
            shapes = {i.id: i.shape for i in computations[number].instructions}
            total = []
            for instruction in computations[number].instructions:
                if instruction.opcode in ("convolution", "dot"):
                    operands = [shapes[operand] for operand in instruction.operand_ids]
                    total.append(_operation(instruction, operands))
                elif instruction.opcode in ("call", "while", "conditional", "fusion"):
                    for called in instruction.called_computation_ids:
                        total += of(called)
            found[number] = total
        return found[number]

    entry = program.host_program_shape
    ends = sum(map(_bytes, [*entry.parameters, *(entry.result.tuple_shapes or [entry.result])]))
    return of(program.entry_computation_id), ends


def _operation(instruction, operands) -> Operation:
    left, right = operands
    outputs = math.prod(instruction.shape.dimensions)
    if instruction.opcode == "dot":
        summed = instruction.dot_dimension_numbers.lhs_contracting_dimensions
        terms = math.prod(left.dimensions[axis] for axis in summed)
    else:
        axis = instruction.convolution_dimension_numbers.kernel_input_feature_dimension
        # At a stride, the gradient of the input has zeros between values, which need no arithmetic.
        terms = right.dimensions[axis] * math.prod(
            one.size / one.base_dilation for one in instruction.window.dimensions
        )
    moved = sum(map(_bytes, (instruction.shape, left, right)))
    return Operation(2.0 * outputs * terms, moved, ITEM_BYTES.get(left.element_type) == 2)


def _bytes(shape) -> float:
    return math.prod(shape.dimensions) * ITEM_BYTES.get(shape.element_type, 4)


def print_roofline(names: list[str], precisions: list[str]) -> None:
    """Prints the most images per second that cards allow.

    A convolution takes as long as its arithmetic or its memory traffic, whichever is longer, and one
    follows the other; inputs and results of the step are moved once. All other operations cost nothing.
    """
    head = ["recipe", "precision", "batch", "GFLOPs per image", "GB per step", *CARDS]
    for line in (head, ["---"] * len(head)):
        print("| " + " | ".join(line) + " |")
    for name in names:
        for precision in precisions:
            program, batch = program_of(name, precision)
            parts, ends = operations(program)
            flops = sum(part.flops for part in parts)
            moved = sum(part.bytes for part in parts) + ends
            cells = [
                name,
                precision,
                str(batch),
                f"{flops / batch / 1e9:.1f}",
                f"{moved / 1e9:.1f}",
            ]
            for card in CARDS.values():
                seconds = sum(part.seconds(card) for part in parts) + ends / card.bandwidth
                cells.append(f"{batch / seconds:.0f}")
            print("| " + " | ".join(cells) + " |", flush=True)


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
    parser.add_argument(
        "--roofline", action="store_true", help="the most images per second that cards allow"
    )
    parser.add_argument(
        "--precisions", nargs="+", default=["mixed_bfloat16", "float32"], help="for --roofline"
    )
    arguments = parser.parse_args()
    if arguments.roofline:
        print_roofline(arguments.configs, arguments.precisions)
        return
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

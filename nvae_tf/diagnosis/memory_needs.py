"""About how much memory a training step takes, and flags with which it takes less.

Run as a program with a configuration as JSON, this module counts what the estimate is made from.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from nvae_tf.config import BN_ACT, CELLS, NO_REMAT, Config, from_dict
from nvae_tf.diagnosis.findings import Finding, ok, problem, warning
from nvae_tf.diagnosis.system import GIB, half_precision
from nvae_tf.io.child_process import run_module

COUNT_SECONDS = 300.0
RESERVED = 1.0  # GiB that the libraries and the framework take
# Weights, a gradient, two slots of the optimiser, and one for what is computed from them meanwhile.
COPIES_OF_WEIGHTS = 5
# How often the maps at the convolutions are in memory at once, by gradient checkpointing. The first is
# XLA's on CPUs for four small models (2.04 to 2.12); the others follow from what docs/performance.md
# says that checkpointing saves.
COPIES_OF_MAPS = {NO_REMAT: 2.1, BN_ACT: 1.0, CELLS: 0.7}


class Counts(NamedTuple):
    """What the estimate is made from.

    Attributes:
        parameters: Weights of the model.
        map_values: Values of all maps that enter or leave a convolution, for one image.
    """

    parameters: int
    map_values: int


def count(config: Config) -> Counts:
    """Counts weights, and the values of maps of a forward pass."""
    import tensorflow as tf

    from nvae_tf.data import catalog
    from nvae_tf.model import NVAE

    image = catalog.get_dataset_info(config.data).image
    model = NVAE(config.model, image)

    @tf.function(autograph=False)
    def forward(images):
        return model(images, training=True).parameters

    graph = forward.get_concrete_function(tf.TensorSpec((1, *image.shape))).graph
    values = 0
    for operation in graph.get_operations():
        if operation.type in ("Conv2D", "DepthwiseConv2dNative"):
            for tensor in (operation.inputs[0], *operation.outputs):
                values += tensor.shape.num_elements() or 0
    return Counts(model.num_parameters, values)


def estimate(counts: Counts, config: Config) -> float:
    """GiB that a training step takes."""
    train = config.train
    copies = COPIES_OF_WEIGHTS + bool(train.ema_decay)
    size = 4 if train.precision == "float32" else 2
    values = COPIES_OF_MAPS[train.gradient_checkpointing] * counts.map_values
    maps = config.data.batch_size * values * size
    return RESERVED + (4 * copies * counts.parameters + maps) / GIB


def check_fit(
    config: Config, available: float, where: str, capability: list[int] | None = None
) -> list[Finding]:
    """Whether a recipe fits, or which flags make it fit.

    Args:
        config: The recipe.
        available: GiB that are there.
        where: The device whose memory it is, in words.
        capability: Compute capability of the GPU that has the least; default: it is unknown, or there
            is no GPU.
    """
    words = [json.dumps(config.to_dict())]
    # On the CPU, so that no GPU's memory is taken.
    outcome = run_module(__name__, words, seconds=COUNT_SECONDS, CUDA_VISIBLE_DEVICES="-1")
    if outcome.problem:
        return [
            problem(
                f"the recipe's model cannot be made ({outcome.problem})",
                "see whether the same recipe trains on another machine; if not, choose a smaller model",
            )
        ]
    counts = Counts(*outcome.result)
    needed = estimate(counts, config)
    text = f"a training step takes about {needed:.0f} GiB; {where} has {available:.0f}"
    if needed < 0.8 * available:
        return [ok(text)]
    changes = list(cheaper(config, half_precision(capability)))
    for flags, smaller in changes:
        if estimate(counts, smaller) < 0.8 * available:
            advice = f"{flags} makes it {estimate(counts, smaller):.0f} GiB"
            level = warning if needed < available else problem
            return [level(text, advice)]
    least = min(estimate(counts, smaller) for _, smaller in changes)
    return [problem(text, f"no flags make it less than {least:.0f} GiB: choose a smaller model")]


def cheaper(config: Config, half: str | None) -> Iterator[tuple[str, Config]]:
    """Flags that make a step smaller, those that cost least first, and what they give.

    Args:
        config: The recipe.
        half: The precision of 16 bits to advise; None: none.
    """
    batch, passes = config.data.batch_size, config.train.accumulate_steps
    while batch >= 1:
        for precision in dict.fromkeys((config.train.precision, half or config.train.precision)):
            for remat in (config.train.gradient_checkpointing, CELLS):
                flags: dict[str, Any] = {}
                if precision != config.train.precision:
                    flags["precision"] = precision
                if remat != config.train.gradient_checkpointing:
                    flags["gradient_checkpointing"] = remat
                if batch != config.data.batch_size:
                    flags["batch_size"], flags["accumulate_steps"] = batch, passes
                text = " ".join(f"--{name} {value}" for name, value in flags.items())
                yield text, from_dict(flags, config)
        batch, passes = batch // 2, passes * 2


if __name__ == "__main__":
    print(json.dumps(count(from_dict(json.loads(sys.argv[1])))))

#!/usr/bin/env python3
"""What a training step costs: graph, seconds, memory.

python benchmarks/train_step.py --config celeba256 --batch_size 1 --gradient_checkpointing cells

Every key of a recipe is a flag. The images are random: no data set is needed, and the cost of a step
does not depend on them. Prints one JSON line last.
"""

import json
import resource
import statistics
import time

from nvae_tf import config as configuration
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import Parser, add_config_flags, at_least, overrides

GIB = 2.0**30


def graph_nodes(concrete_function) -> int:
    """Operations of a traced function, those of all functions that it calls included, each once."""
    graph = concrete_function.graph.as_graph_def()
    library = {function.signature.name: function.node_def for function in graph.library.function}
    nodes, waiting, seen = 0, [graph.node], set()
    while waiting:
        body = waiting.pop()
        nodes += len(body)
        for node in body:
            called = {value.func.name for value in node.attr.values() if value.func.name}
            waiting += [library[name] for name in called - seen]
            seen |= called
    return nodes


def peak_memory_gib() -> float:
    """The device's peak on a GPU, else this process's resident peak, so far."""
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def measure(config: configuration.Config, steps: int) -> dict:
    """Builds the recipe's model, traces a step, runs it once, then `steps` times more."""
    import nvae_tf  # noqa: F401 - chooses the Keras that TensorFlow shows

    import tensorflow as tf  # isort: skip

    from nvae_tf.data import catalog
    from nvae_tf.model import NVAE
    from nvae_tf.training.optimizer import Adamax
    from nvae_tf.training.trainer import Trainer, compiled, graphs_as_written, uses_xla

    settings = config.train
    spec = catalog.describe(config.data).image
    begin = time.perf_counter()
    model = NVAE(config.model, spec, settings.precision.removeprefix("mixed_"))
    optimizer = Adamax(1e-3, weight_decay=settings.weight_decay)
    trainer = Trainer(model, settings, total_steps=1000, optimizer=optimizer)
    built = time.perf_counter()
    images = tf.random.uniform((config.data.batch_size * settings.accumulate_steps, *spec.shape))
    if spec.binary:
        images = tf.round(images)
    jit = uses_xla(settings)
    step = compiled(trainer.train_step, tf.distribute.get_strategy(), jit)
    ready = time.perf_counter()
    nodes = graph_nodes(step.get_concrete_function(tf.TensorSpec(images.shape)))
    traced = time.perf_counter()
    print(f"built in {built - begin:.1f} s, traced in {traced - ready:.1f} s", flush=True)

    def run():
        start = time.perf_counter()
        float(step(images)["loss"])  # waits for the device
        seconds = time.perf_counter() - start
        print(f"step: {seconds:.2f} s, peak {peak_memory_gib():.2f} GiB", flush=True)
        return seconds

    with graphs_as_written():
        first, *others = (run() for _ in range(steps + 1))
    median = statistics.median(others) if others else first
    return {
        "parameters": sum(v.shape.num_elements() for v in model.trainable_variables),
        "graph_nodes": nodes,
        "build_seconds": round(built - begin, 2),
        "trace_seconds": round(traced - ready, 2),
        "first_step_seconds": round(first, 2),
        "step_seconds": round(median, 4),
        "images_per_second": round(len(images) / median, 4),
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "batch_size": config.data.batch_size,
        "precision": settings.precision,
        "jit_compile": jit,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "accumulate_steps": settings.accumulate_steps,
    }


def main() -> int:
    """Prints one line of JSON last."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=at_least(0), default=5, metavar="N", help="after the first")
    add_config_flags(parser)
    arguments = parser.parse_args()

    def work():
        config = configuration.load(arguments.config, overrides(arguments))
        print(json.dumps(measure(config, arguments.steps)))

    return run_command(work, if_interrupted="nothing is kept")


if __name__ == "__main__":
    raise SystemExit(main())

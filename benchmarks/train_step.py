#!/usr/bin/env python3
"""What a training step costs: graph, seconds, memory.

python benchmarks/train_step.py --config celeba256 --batch_size 1 --gradient_checkpointing cells

Every key of a recipe is a flag. No data set is needed: images are random. Prints one JSON line last.
"""

import statistics
import time

from measuring import (
    fresh_model,
    make_parser,
    peak_memory_gib,
    random_images,
    run,
)

from nvae_tf.cli.flags import at_least
from nvae_tf.config import Config


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


def measure(config: Config, arguments) -> dict:
    """Builds the recipe's model, traces a step, runs it once, then `--steps` times more."""
    import tensorflow as tf

    from nvae_tf.training.optimizers import Adamax
    from nvae_tf.training.trainer import Trainer, compiled, grappler_disabled, uses_xla

    settings = config.train
    begin = time.perf_counter()
    model = fresh_model(config)
    optimizer = Adamax(1e-3, weight_decay=settings.weight_decay)
    trainer = Trainer(model, settings, total_steps=1000, optimizer=optimizer)
    built = time.perf_counter()
    images = random_images(model, config.data.batch_size * settings.accumulate_steps)
    jit = uses_xla(settings)
    step = compiled(trainer.train_step, tf.distribute.get_strategy(), jit)
    ready = time.perf_counter()
    nodes = graph_nodes(step.get_concrete_function(tf.TensorSpec(images.shape)))
    traced = time.perf_counter()
    print(f"built in {built - begin:.1f} s, traced in {traced - ready:.1f} s", flush=True)

    def timed():
        start = time.perf_counter()
        float(step(images)["loss"])  # waits for the device
        seconds = time.perf_counter() - start
        print(f"step: {seconds:.2f} s, peak {peak_memory_gib():.2f} GiB", flush=True)
        return seconds

    with grappler_disabled():
        first, *others = (timed() for _ in range(arguments.steps + 1))
    median = statistics.median(others) if others else first
    return {
        "parameters": model.num_parameters,
        "latent_groups": len(model.groups),
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


if __name__ == "__main__":
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=at_least(0), default=5, metavar="N", help="after the first")
    raise SystemExit(run(parser, measure))

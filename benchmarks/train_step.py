#!/usr/bin/env python3
"""What a training step costs: graph, exchanges, seconds, memory.

python benchmarks/train_step.py --config celeba256 --batch_size 1 --gradient_checkpointing cells
NVAE_SPLIT_CPU=1 python benchmarks/train_step.py --config digits --world_size 2 --batch_size 16

Every key of a recipe is a flag. No data set is needed: images are random. Several processes take part
as in training, through TF_CONFIG. Each prints one JSON line last; what was not measured is null.
"""

import contextlib
import os
import statistics
import time

import numpy as np
from measuring import (
    fresh_model,
    make_parser,
    peak_memory_gib,
    random_images,
    run,
)

from nvae_tf.cli.flags import at_least
from nvae_tf.config import Config

STEPS_IN_A_CALL = 10  # of several replicas
EXCHANGES = ("Collective", "Nccl")  # what the names of operations that exchange values begin with


def count_operations(concrete_function, loops: list[int]) -> tuple[int, int]:
    """Operations of a traced step with those of functions that it calls, each once; and exchanges.

    Args:
        concrete_function: The step.
        loops: How many times the exchanges in the body of a loop count, of the outermost loop first.
    """
    graph = concrete_function.graph.as_graph_def()
    library = {function.signature.name: function.node_def for function in graph.library.function}
    operations, exchanges, waiting, seen = 0, 0, [(graph.node, 1, loops)], set()
    while waiting:
        body, times, loops = waiting.pop()
        operations += len(body)
        exchanges += times * sum(node.op.startswith(EXCHANGES) for node in body)
        for node in body:
            is_loop = loops and node.op in ("While", "StatelessWhile")
            inside = (times * loops[0], loops[1:]) if is_loop else (times, loops)
            called = {value.func.name for value in node.attr.values() if value.func.name} - seen
            waiting += [(library[name], *inside) for name in called]
            seen |= called
    return operations, exchanges


def measure(config: Config, arguments) -> dict:
    """Builds the recipe's model, traces a step, and runs it `--steps` times after a first one.

    Several replicas take up to ten steps in one call, as they do in training; the median is that of the
    calls' means.
    """
    import tensorflow as tf

    from nvae_tf.training.cluster import connect
    from nvae_tf.training.optimizer_choice import make_optimizer
    from nvae_tf.training.schedules import WarmupCosineByEpoch
    from nvae_tf.training.steps import (
        check_xla_steps,
        distributed_function,
        grappler_disabled,
        several_steps,
        whole_step,
    )
    from nvae_tf.training.trainer import Trainer

    settings, cluster = config.train, connect(arguments.world_size)
    strategy, alone = cluster.strategy, cluster.replicas == 1
    check_xla_steps(settings, cluster.replicas)
    with strategy.scope():
        begin = time.perf_counter()
        model = fresh_model(config)
        schedule = WarmupCosineByEpoch.from_train_config(settings, steps_per_epoch=100)
        optimizer = make_optimizer(settings, schedule)
        trainer = Trainer(model, settings, total_steps=1000, optimizer=optimizer)
        built = time.perf_counter()
        images = random_images(model, config.data.batch_size * settings.accumulate_steps)
        step, loops = whole_step(trainer, strategy), [settings.accumulate_steps]
        if alone:
            take, inputs = distributed_function(step, strategy), lambda _: [images]
        else:  # as training does
            repeated = tf.data.Dataset.from_tensors(images).repeat()
            batches = iter(strategy.distribute_datasets_from_function(lambda _: repeated))
            take, inputs = (
                several_steps(step, strategy),
                lambda count: [batches, tf.constant(count)],
            )
            loops = [1, *loops]
        ready = time.perf_counter()
        graph = take.get_concrete_function(*inputs(1))
        operations, exchanges = count_operations(graph, loops)
        traced = time.perf_counter()
        print(f"built in {built - begin:.1f} s, traced in {traced - ready:.1f} s", flush=True)

        def timed(count):
            start = time.perf_counter()
            np.asarray(take(*inputs(count))["loss"])  # waits for the device
            seconds = (time.perf_counter() - start) / count
            print(f"step: {seconds:.2f} s, peak {peak_memory_gib():.2f} GiB", flush=True)
            return seconds

        in_a_call = 1 if alone else STEPS_IN_A_CALL
        with grappler_disabled():
            seconds = [timed(1)] if arguments.steps else []
            for done in range(0, arguments.steps, in_a_call):
                seconds.append(timed(min(in_a_call, arguments.steps - done)))
        cluster.gather_from_workers([1])  # a worker that ends first would be called lost
    median = statistics.median(seconds[1:]) if seconds else None
    here = cluster.replicas // cluster.num_workers
    threads = None
    with contextlib.suppress(OSError):  # where there is no /proc
        threads = len(os.listdir("/proc/self/task"))
    return {
        "parameters": model.num_parameters,
        "latent_groups": len(model.groups),
        "replicas": cluster.replicas,
        "graph_nodes": operations,
        "collectives": exchanges // here,
        "build_seconds": round(built - begin, 2),
        "trace_seconds": round(traced - ready, 2),
        "first_step_seconds": round(seconds[0], 2) if seconds else None,
        "step_seconds": round(median, 4) if seconds else None,
        "images_per_second": round(len(images) * cluster.replicas / median, 4) if seconds else None,
        "peak_memory_gib": round(peak_memory_gib(), 3) if seconds else None,
        "threads": threads,
        "batch_size": config.data.batch_size,
        "precision": settings.precision,
        "jit_compile": trainer.xla_steps,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "accumulate_steps": settings.accumulate_steps,
    }


if __name__ == "__main__":
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--steps",
        type=at_least(0),
        default=5,
        metavar="N",
        help="steps after the first one; 0: the step is traced and not run",
    )
    parser.add_argument(
        "--world_size", type=at_least(1), metavar="N", help="devices of this machine (default: all)"
    )
    raise SystemExit(run(parser, measure))

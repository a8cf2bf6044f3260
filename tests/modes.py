"""Six steps of a small model on real digits in many modes, on all processes and devices that take part.

Run as a program by `test_replicas.py`: ``python modes.py OUT --modes plain,cells --world_size 2``.

TF_CONFIG says which workers there are; the chief writes losses and weights of every mode to OUT.
"""

import argparse
import importlib
import json
import sys
import zlib

import numpy as np

import nvae_tf  # noqa: F401 - sets what TensorFlow reads when it is imported

import tensorflow as tf  # isort: skip
import tf_keras  # isort: skip

from nvae_tf import config as configuration
from nvae_tf.data import catalog
from nvae_tf.data.source import reading
from nvae_tf.training import run
from nvae_tf.training.batches import TrainingData, step_counts
from nvae_tf.training.cluster import Cluster, connect
from nvae_tf.training.steps import Steps, grappler_disabled

STEPS, GLOBAL_BATCH = 6, 24
SMALL = dict(num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=2, num_latent_scales=2)
MODES = {
    "plain": {},
    "bn_swish": dict(gradient_checkpointing="bn_swish"),
    "cells": dict(gradient_checkpointing="cells"),
    "accumulate": dict(accumulate_steps=2),
    "ema": dict(ema_decay=0.9),
    "bfloat16": dict(precision="mixed_bfloat16"),
    "float16": dict(precision="mixed_float16"),
    "clip": dict(clip_gradient_norm=50),
    "adamw": dict(optimizer="adamw", learning_rate=1e-3),
    "res_bnelu": dict(arch_instance="res_bnelu"),
    "flows": dict(num_nf=1),
    "all": dict(gradient_checkpointing="cells", accumulate_steps=2, ema_decay=0.9, num_nf=1),
    "off": dict(jit_compile="off"),
    # One stack of weights has 42 MiB: its gradient is exchanged in parts, and it is changed in place.
    "large": dict(
        num_channels_enc=80,
        num_channels_dec=80,
        jit_compile="off",
        accumulate_steps=2,
        ema_decay=0.9,
    ),
}


def workers_with_devices(count):
    """A cluster whose workers have several CPU devices each; TensorFlow's strategy uses only one."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    parts = [tf.config.LogicalDeviceConfiguration()] * count
    tf.config.set_logical_device_configuration(cpu, parts)
    module = importlib.import_module("tensorflow.python.distribute.collective_all_reduce_strategy")

    class Extended(module.CollectiveAllReduceExtended):
        def _initialize_local_devices(self, cluster_resolver, worker_device):
            devices = [f"{worker_device}/device:CPU:{number}" for number in range(count)]
            return tuple(devices), "CPU"

    class Strategy(tf.distribute.MultiWorkerMirroredStrategy):
        def __init__(self, resolver):
            options = tf.distribute.experimental.CommunicationOptions()
            extended = Extended(self, cluster_resolver=resolver, communication_options=options)
            tf.distribute.Strategy.__init__(self, extended)

    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    return Cluster(Strategy(resolver), resolver.task_id, 2)


def copies(cluster, variable):
    """The values of a variable on every replica of this process."""
    return [np.asarray(v) for v in cluster.strategy.experimental_local_results(variable)]


def train(name, cluster):
    """Trains in one mode, and returns what is compared."""
    changes = {**SMALL, **MODES[name]}
    passes = changes.get("accumulate_steps", 1)
    changes["batch_size"] = GLOBAL_BATCH // cluster.replicas // passes
    config = configuration.from_dict(changes, base=configuration.load("digits"))
    tf_keras.utils.set_random_seed(config.data.seed)
    dataset = catalog.get_dataset_info(config.data)
    sources = dataset.open(config.data.data)
    with reading(*sources), cluster.strategy.scope(), grappler_disabled():
        counts = step_counts(config, cluster, len(sources[0]))
        data = TrainingData(config, cluster, counts, dataset, sources)
        trainer = run.build_trainer(config, dataset, counts, config.train.jit_compile)
        trainer.prepare(data.first_images(1))
        steps = Steps(trainer, cluster.strategy, several=cluster.replicas > 1)
        batches, count = data.training(0), STEPS if cluster.replicas > 1 else 1
        losses = []
        while len(losses) < STEPS:
            steps.take(batches, count)
            losses += [float(steps.report(place)["loss"]) for place in range(-count, 0)]
        stacks = [*trainer.weights, *trainer.model.stacks, *trainer.spectral.vectors]
        stacks += trainer.averages.stacks if trainer.averages else []
        values = [copies(cluster, stack) for stack in stacks]
        batches = None
    identical = all(np.array_equal(value[0], other) for value in values for other in value)
    flat = np.concatenate([value[0].ravel() for value in values])
    # Each worker's as well.
    sums = cluster.gather_from_workers([zlib.crc32(flat.tobytes())])
    identical = identical and all(other == sums[0] for other in sums)
    return dict(loss=np.array(losses), weights=flat, identical=np.array(identical))


def main() -> None:
    """Trains in the modes that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--world_size", type=int)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each worker")
    arguments = parser.parse_args()
    if arguments.devices > 1:
        cluster = workers_with_devices(arguments.devices)
    else:
        cluster = connect(arguments.world_size, 100)
    if arguments.deterministic:
        tf.config.experimental.enable_op_determinism()
    results = {}
    for name in arguments.modes.split(","):
        for key, value in train(name, cluster).items():
            results[f"{name}/{key}"] = value
        loss = results[f"{name}/loss"]
        line = dict(mode=name, loss=loss.tolist(), identical=bool(results[f"{name}/identical"]))
        print(json.dumps(line), flush=True)
    if cluster.is_chief:
        np.savez(arguments.out, **results)


if __name__ == "__main__":
    sys.exit(main())

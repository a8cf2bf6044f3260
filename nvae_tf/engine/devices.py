"""The devices of this machine that work on a batch together, through `tf.distribute`.

with local_strategy().scope():
    model = NVAE(...)
    encode = on_devices(model.bottom_up)
    maps = unshard(encode(shard(images)), len(images))
"""

import functools
import os

import tensorflow as tf

from nvae_tf.io.errors import UserError
from nvae_tf.io.machine import usable_cores


def gpu_found() -> bool:
    """Whether TensorFlow finds a GPU: what `Scope.on_gpu` and ``jit_compile: auto`` are by default."""
    return bool(tf.config.list_physical_devices("GPU"))


def local_strategy(num_devices: int | None = None) -> tf.distribute.Strategy:
    """A strategy over devices of this machine.

    Args:
        num_devices: Number of devices; default: all GPUs, or the CPU if there is none. If there is no
            GPU and ``NVAE_SPLIT_CPU=1`` is in the environment, the CPU is divided into that many
            devices: nothing gets faster, but several devices can be tried out.

    Raises:
        UserError: There are fewer GPUs.
    """
    gpus = tf.config.list_physical_devices("GPU")
    count = num_devices or max(len(gpus), 1)
    if count == 1:
        return tf.distribute.get_strategy()
    if not gpus and os.environ.get("NVAE_SPLIT_CPU") == "1":
        _divide_cpu(count)
    elif count > len(gpus):
        advice = "" if gpus else "; to try them out on the CPU, set NVAE_SPLIT_CPU=1"
        raise UserError(
            f"--world_size: {count} GPUs were asked for; TensorFlow finds {len(gpus) or 'none'} here"
            f"{advice}"
        )
    kind = "GPU" if gpus else "CPU"
    return tf.distribute.MirroredStrategy([f"{kind}:{number}" for number in range(count)])


def _divide_cpu(count: int) -> None:
    (cpu,) = tf.config.list_physical_devices("CPU")
    if len(tf.config.get_logical_device_configuration(cpu) or ()) == count:
        return
    cores = usable_cores()
    try:
        # Every operation would take all cores otherwise, and those of the other devices wait for them.
        tf.config.threading.set_intra_op_parallelism_threads(max(1, cores // count))
        parts = [tf.config.LogicalDeviceConfiguration()] * count
        tf.config.set_logical_device_configuration(cpu, parts)
    except RuntimeError:
        raise UserError("the CPU must be divided before TensorFlow is first used") from None


def describe_devices(strategy: tf.distribute.Strategy) -> str:
    """What this process computes with, as text: the GPUs' names, or the CPU and its cores.

    Args:
        strategy: Strategy over the replicas of this process, and of others.
    """
    # The default strategy refuses to name its device.
    alone = strategy.num_replicas_in_sync == 1
    replicas = 1 if alone else len(strategy.extended.worker_devices)
    gpus = tf.config.list_physical_devices("GPU")[:replicas]
    if not gpus:
        cores = usable_cores()
        divided = f", divided into {replicas}" if replicas > 1 else ""
        return f"CPU, {cores} cores{divided} (no GPU found)"
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    names = [detail.get("device_name", "GPU") for detail in details]
    return ", ".join(
        f"{names.count(name)} x {name}" if names.count(name) > 1 else name
        for name in dict.fromkeys(names)
    )


def shard(batch):
    """Divides a batch among the devices; parts are of one size, the last rows repeated if need be.

    Args:
        batch: A tensor, (rows, ...).

    Returns:
        A value that `on_devices` takes.
    """
    strategy, rows = tf.distribute.get_strategy(), len(batch)
    if strategy.num_replicas_in_sync == 1:
        return tf.convert_to_tensor(batch)
    each = -(-rows // strategy.num_replicas_in_sync)

    def part(context):
        own = context.replica_id_in_sync_group * each + tf.range(each)
        return tf.gather(batch, tf.minimum(own, rows - 1))

    return strategy.experimental_distribute_values_from_function(part)


def on_devices(function):
    """Compiles a function; every device runs it on its share of the arguments."""

    def run(*shares):
        return tf.distribute.get_strategy().run(function, shares)

    # A partial, because TensorFlow counts traces, and warns of many, by the code of a function, which
    # all functions made here would share.
    return tf.function(functools.partial(run), autograph=False, reduce_retracing=True)


def unshard(values, rows: int):
    """Puts the devices' parts of a result together again.

    Args:
        values: What a function from `on_devices` returned; tensors (rows, ...).
        rows: Number of rows of the batch that was divided.
    """
    strategy = tf.distribute.get_strategy()
    return tf.nest.map_structure(
        lambda value: tf.concat(strategy.experimental_local_results(value), 0)[:rows], values
    )

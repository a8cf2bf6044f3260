"""The devices of this machine that share a batch, through `tf.distribute`.

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
    """Whether TensorFlow finds a GPU; decides ``jit_compile: auto`` and the trainer's ``on_gpu``."""
    return bool(tf.config.get_visible_devices("GPU"))


def local_strategy(num_devices: int | None = None) -> tf.distribute.Strategy:
    """A strategy over devices of this machine.

    Args:
        num_devices: Number of devices; default: all GPUs, or the CPU if there is none. Without a GPU,
            ``NVAE_SPLIT_CPU=1`` in the environment divides the CPU into that many logical devices,
            which is not faster but allows several devices to be tried out.

    Raises:
        UserError: There are fewer GPUs than asked for, or the CPU cannot be divided any more because
            TensorFlow has been used already.
    """
    gpus = tf.config.get_visible_devices("GPU")
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
        # Otherwise every operation takes all cores, and the operations of other devices have to wait.
        tf.config.threading.set_intra_op_parallelism_threads(max(1, cores // count))
        parts = [tf.config.LogicalDeviceConfiguration()] * count
        tf.config.set_logical_device_configuration(cpu, parts)
    except RuntimeError:
        raise UserError("the CPU must be divided before TensorFlow is first used") from None


def describe_devices(strategy: tf.distribute.Strategy) -> str:
    """Describes the devices of this process: the names of the GPUs, or the CPU's number of cores.

    Args:
        strategy: Strategy over all replicas, those of other processes included.
    """
    # The default strategy refuses to name its device.
    alone = strategy.num_replicas_in_sync == 1
    replicas = 1 if alone else len(strategy.extended.worker_devices)
    gpus = tf.config.get_visible_devices("GPU")[:replicas]
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
    """Divides a batch into parts of equal size, one per device; the last row is repeated as needed.

    Args:
        batch: A tensor, (rows, ...).

    Returns:
        An argument for a function from `on_devices`.
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
    """Makes a graph of a function, which every device runs on its part of the (sharded) arguments."""

    def run(*shares):
        return tf.distribute.get_strategy().run(function, shares)

    # TensorFlow counts traces per code object and warns if there are many. All functions made here
    # would share that of `run`; a partial has none.
    return tf.function(functools.partial(run), autograph=False, reduce_retracing=True)


def unshard(values, rows: int):
    """Concatenates the devices' parts of a result; the inverse of `shard`.

    Args:
        values: Result of a function from `on_devices`: a structure of tensors (rows, ...).
        rows: Number of rows of the batch before `shard`.
    """
    strategy = tf.distribute.get_strategy()
    return tf.nest.map_structure(
        lambda value: tf.concat(strategy.experimental_local_results(value), 0)[:rows], values
    )

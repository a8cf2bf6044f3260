"""Who takes part in a training: one device, all GPUs of a machine, or several machines."""

import contextlib
import functools
import json
import os
import zlib
from typing import NamedTuple

import tensorflow as tf

from nvae_tf.engine.devices import local_strategy
from nvae_tf.io.errors import UserError
from nvae_tf.training.rendezvous import JOIN_SECONDS, wait_for_all

TASKS = ("chief", "worker")


class Cluster(NamedTuple):
    """This process's part in a training.

    Attributes:
        strategy: over all replicas.
        worker: this process's number, from 0; worker 0 is the chief, the only one that writes.
        num_workers: processes.
    """

    strategy: tf.distribute.Strategy
    worker: int = 0
    num_workers: int = 1

    @property
    def is_chief(self) -> bool:
        """Whether this process writes."""
        return self.worker == 0

    @property
    def replicas(self) -> int:
        """Devices of all workers."""
        return self.strategy.num_replicas_in_sync

    def sum_over_workers(self, values: list[int]) -> list[int]:
        """Adds up whole numbers that every worker gives; all have to ask at the same time."""
        if self.num_workers == 1:
            return values
        found = _summing(self.strategy)(tf.constant(values, tf.int64))
        each = self.replicas // self.num_workers
        return [int(value) // each for value in found]

    def disagreements(self, own: dict[str, str]) -> list[str]:
        """Which of some named texts are not alike on all workers; all have to ask at the same time.

        Args:
            own: name -> text of this worker; the names are the same on all.
        """
        # Numbers are alike if the sum of their squares is the least that their sum allows.
        digests = [zlib.crc32(text.encode(errors="replace")) >> 8 for text in own.values()]
        found = self.sum_over_workers([*digests, *(digest**2 for digest in digests)])
        totals, squares = found[: len(own)], found[len(own) :]
        return [
            name
            for name, total, square in zip(own, totals, squares, strict=True)
            if square * self.num_workers != total**2
        ]


@functools.lru_cache(maxsize=1)
def _summing(strategy):
    def add(values):
        own = tf.identity(values)  # on the replica's device
        return tf.distribute.get_replica_context().all_reduce("SUM", own)

    @tf.function(autograph=False)
    def run(values):
        return strategy.experimental_local_results(strategy.run(add, [values]))[0]

    return run


def connect(num_devices: int | None = None, join_seconds: float = JOIN_SECONDS) -> Cluster:
    """Finds out what this process is part of, and meets the other workers if there are any.

    Several machines: ``TF_CONFIG`` in the environment, as TensorFlow defines it, or Slurm's variables.

    Args:
        num_devices: of this machine, without other workers; default: all GPUs, or the CPU.
        join_seconds: to wait for the other workers.

    Raises:
        UserError: ``TF_CONFIG`` is malformed, or the other workers do not answer.
    """
    resolver, worker, hosts = _resolver()
    if resolver is None:
        return Cluster(local_strategy(num_devices))
    if num_devices is not None:
        raise UserError("--world_size is for one machine; several use all of their GPUs")
    wait_for_all(hosts, worker, join_seconds)
    try:
        # Without a timeout for collectives: with one TensorFlow starts a thread for each collective of
        # every step, which sleeps until the timeout. Heartbeats find dead workers within seconds.
        strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise lost_worker(error) from None
    return Cluster(strategy, worker, len(hosts))


# What collectives fail with when another worker ends or cannot be reached.
_LOST = (
    tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError,
    tf.errors.InternalError, tf.errors.UnavailableError,
)  # fmt: skip


@contextlib.contextmanager
def lost_workers(cluster: Cluster):
    """Raises a `UserError` about a lost worker in place of what its loss makes TensorFlow raise."""
    try:
        yield
    except _LOST as error:
        if cluster.num_workers == 1:
            raise
        raise lost_worker(error) from None


def lost_worker(error: Exception) -> UserError:
    """The error to raise when collective operations fail."""
    return UserError(
        f"another worker cannot be reached or has ended ({type(error).__name__}; its own log says "
        "why); start all workers again, with --cont_training if there is a checkpoint"
    )


def _resolver():
    """TensorFlow's resolver of the cluster, or None; this worker's number; and all addresses."""
    if "TF_CONFIG" in os.environ:
        return _from_tf_config(os.environ["TF_CONFIG"])
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdigit() and int(tasks) > 1:
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver()
        hosts = resolver.cluster_spec().job_tasks("worker")  # which sets the task's number
        return resolver, int(resolver.task_id), hosts
    return None, 0, []


def _from_tf_config(text: str):
    def refuse(reason):
        raise UserError(
            f"TF_CONFIG: {reason}; expected "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
        )

    try:
        content = json.loads(text)
        cluster = {kind: list(hosts) for kind, hosts in content.get("cluster", {}).items()}
        if not all(isinstance(host, str) for hosts in cluster.values() for host in hosts):
            raise ValueError("an address is no text")
        task = content.get("task", {})
        kind, index = task.get("type", "worker"), int(task.get("index", 0))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        refuse(f"not understood ({error})")
    unknown = [name for name in cluster if name not in TASKS]
    if unknown:
        refuse(f"task type {unknown[0]!r} is not used here")
    hosts = [host for name in TASKS for host in cluster.get(name, [])]
    if len(hosts) <= 1:
        return None, 0, hosts
    if kind not in cluster or not 0 <= index < len(cluster[kind]):
        refuse(f"there is no task {kind} {index}")
    before = len(cluster.get("chief", [])) if kind == "worker" else 0
    return tf.distribute.cluster_resolver.TFConfigClusterResolver(), before + index, hosts

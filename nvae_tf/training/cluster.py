"""Who takes part in a training: one device, all GPUs of a machine, or several machines."""

import contextlib
import functools
import os
import zlib
from typing import NamedTuple

import tensorflow as tf

from nvae_tf.engine.devices import gpu_found, local_strategy
from nvae_tf.io.errors import UserError, one_line, short_message
from nvae_tf.io.machine import usable_cores
from nvae_tf.training.rendezvous import JOIN_SECONDS, tell_others, wait_for_all
from nvae_tf.training.slurm import workers_of_step
from nvae_tf.training.tf_config import TASKS, read_tf_config

LONGEST_REASON = 1024  # bytes of what other workers are told
LAST_WORDS_SECONDS = 15.0  # for others that start at the same time, to hear why this one does not


class Cluster(NamedTuple):
    """This process's part in a training.

    Attributes:
        strategy: Strategy over all replicas.
        worker: This process's index, from 0; worker 0 is the chief, the only one that writes.
        num_workers: Number of processes.
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

    def gather_from_workers(self, values: list[int]) -> list[list[int]]:
        """The whole numbers that every worker gives, worker by worker.

        All workers have to call this at the same time.

        Args:
            values: This worker's numbers; every worker gives as many.
        """
        if self.num_workers == 1:
            return [values]
        by_replica = _gathering(self.strategy)(tf.constant(values, tf.int64)).numpy()
        replicas_per_worker = self.replicas // self.num_workers
        return by_replica[::replicas_per_worker].tolist()

    def say(self, text: str) -> None:
        """Prints a line, in the process that writes."""
        if self.is_chief:
            print(text, flush=True)

    def sum_over_workers(self, values: list[int]) -> list[int]:
        """Sums over the workers of what `gather_from_workers` gathers."""
        return [sum(column) for column in zip(*self.gather_from_workers(values), strict=True)]

    def disagreements(self, texts: dict[str, str]) -> list[str]:
        """Which of some named texts differ between workers; all have to call this at the same time.

        Args:
            texts: Name -> text of this worker; the names are the same on all workers.
        """
        digests = [zlib.crc32(text.encode(errors="replace")) for text in texts.values()]
        columns = zip(*self.gather_from_workers(digests), strict=True)
        return [name for name, column in zip(texts, columns, strict=True) if len(set(column)) > 1]

    @contextlib.contextmanager
    def agreement(self):
        """Runs a block of checks on every worker; if they fail on one, all of them raise.

        All workers enter the block at the same time. In it they do not wait for each other.

        Raises:
            UserError: The block has failed on other workers alone; the error says why.
        """
        failure = None
        try:
            yield
        except _LOST:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the others should not wait
            failure = error
        reasons = self._gather_reasons(failure) if self.num_workers > 1 else []
        if any(reasons):
            with contextlib.suppress(*_LOST):
                # A worker that ended at once could take along what others have not received yet.
                self.gather_from_workers([1])
        if failure is not None:
            raise failure
        for number, reason in enumerate(reasons):
            if reason:
                raise UserError(f"worker {number} refused: {reason}")

    def _gather_reasons(self, failure: Exception | None) -> list[str]:
        """The failure of each worker, as text; empty for workers without one."""
        text = ""
        if failure is not None:
            text = str(failure) if isinstance(failure, UserError) else short_message(failure)
            text = one_line(text) or type(failure).__name__
        content = text.encode(errors="backslashreplace")[:LONGEST_REASON]
        rows = self.gather_from_workers(list(content.ljust(LONGEST_REASON, b"\0")))
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


@functools.lru_cache(maxsize=1)
def _gathering(strategy):
    def gather(values):
        local = tf.identity(values)[None]  # on the replica's device
        return tf.distribute.get_replica_context().all_gather(local, axis=0)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.int64)])
    def run(values):
        return strategy.experimental_local_results(strategy.run(gather, [values]))[0]

    return run


def connect(num_devices: int | None = None, join_seconds: float = JOIN_SECONDS) -> Cluster:
    """Finds out what this process is part of, and meets the other workers if there are any.

    Several machines: ``TF_CONFIG`` in the environment, as TensorFlow defines it, or without it Slurm's
    variables (`nvae_tf.training.slurm`).

    Args:
        num_devices: Devices of this machine, without other workers; default: all GPUs, or the CPU.
        join_seconds: Seconds to wait for the other workers.

    Raises:
        UserError: ``TF_CONFIG`` or Slurm's variables are malformed, or the other workers do not answer.
    """
    resolver, worker, hosts = _resolver()
    if resolver is None:
        return Cluster(local_strategy(num_devices))
    if num_devices is not None:
        refused = UserError("--world_size is for one machine; several use all of their GPUs")
        refuse_to_join(refused)
        raise refused
    wait_for_all(hosts, worker, join_seconds)
    _divide_cores(hosts, worker)
    try:
        # Without a timeout for collectives: with one TensorFlow starts a thread for each collective of
        # every step, which sleeps until the timeout. Heartbeats find dead workers within seconds.
        strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except _LOST as error:
        raise lost_worker(error) from None
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise UserError(
            f"this worker cannot be a part of the cluster ({one_line(short_message(error))}); its "
            "process must not have used TensorFlow before, and its port must be free"
        ) from None
    return Cluster(strategy, worker, len(hosts))


def _divide_cores(hosts: list[str], worker: int) -> None:
    """Gives each of several workers on this machine's CPU its part of the cores.

    Otherwise each starts as many threads as there are cores, and they keep each other waiting between
    exchanges: two workers on two cores take a third longer. Where a scheduler has bound this process to
    some of the cores, or the environment says how many threads to use, that stays.

    Args:
        hosts: The workers' addresses.
        worker: Number of this worker.
    """
    names = [address.rpartition(":")[0] for address in hosts]
    here, cores = names.count(names[worker]), os.cpu_count() or 1
    bound = usable_cores() < cores
    if here == 1 or bound or gpu_found():
        return
    threading, threads = tf.config.threading, max(cores // here, 1)
    with contextlib.suppress(RuntimeError):  # TensorFlow was used before
        if "TF_NUM_INTRAOP_THREADS" not in os.environ:
            threading.set_intra_op_parallelism_threads(threads)
        if "TF_NUM_INTEROP_THREADS" not in os.environ:
            threading.set_inter_op_parallelism_threads(threads)


def cluster_of(strategy: tf.distribute.Strategy) -> Cluster:
    """This process's part in a training under a strategy that was made elsewhere.

    Args:
        strategy: The strategy.
    """
    resolver = strategy.cluster_resolver
    if resolver is None or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return Cluster(strategy)
    tasks = resolver.cluster_spec().as_dict()
    counts = [len(tasks.get(kind, ())) for kind in TASKS]
    before = counts[0] if resolver.task_type == "worker" else 0
    return Cluster(strategy, before + (resolver.task_id or 0), max(sum(counts), 1))


def refuse_to_join(error: UserError) -> None:
    """Tells the other workers, if there are any, why this one does not meet them.

    Args:
        error: What this worker ends with.
    """
    with contextlib.suppress(UserError):  # the first error is the one to report
        resolver, worker, hosts = _resolver()
        if resolver is not None:
            tell_others(hosts, worker, str(error), LAST_WORDS_SECONDS)


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
        hosts, worker = read_tf_config(os.environ["TF_CONFIG"])
        if len(hosts) <= 1:
            return None, 0, hosts
        return tf.distribute.cluster_resolver.TFConfigClusterResolver(), worker, hosts
    hosts, worker = workers_of_step(os.environ)
    if not hosts:
        return None, 0, []
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": hosts}),
        task_type="worker",
        task_id=worker,
        # Those that Slurm bound to this task. Asking for them does not take them yet.
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
        rpc_layer="grpc",
    )
    return resolver, worker, hosts

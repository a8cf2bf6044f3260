"""The processes and devices of a training: one device, all GPUs of a machine, or several machines."""

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

LONGEST_REASON = 1024  # bytes of a failure's text that are sent to other workers
LAST_WORDS_SECONDS = 15.0  # time to tell workers that are starting, too, why this one ends


class Cluster(NamedTuple):
    """This process's part in a training.

    Attributes:
        strategy: Strategy over all replicas.
        worker: This process's index, from 0. Worker 0 is the chief, the only one that writes files.
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
        """Number of replicas (devices) over all workers."""
        return self.strategy.num_replicas_in_sync

    def gather_from_workers(self, values: list[int]) -> list[list[int]]:
        """Gathers a list of whole numbers from every worker.

        All workers have to call this at the same time.

        Args:
            values: This worker's numbers; all workers give equally many.

        Returns:
            One list per worker, in the order of their indices.
        """
        if self.num_workers == 1:
            return [values]
        by_replica = _gathering(self.strategy)(tf.constant(values, tf.int64)).numpy()
        replicas_per_worker = self.replicas // self.num_workers
        return by_replica[::replicas_per_worker].tolist()

    def wait_for_others(self) -> None:
        """Waits until all workers have called this, or until one of them has ended."""
        with contextlib.suppress(*_LOST):
            self.gather_from_workers([1])

    def say(self, text: str) -> None:
        """Prints a line, in the process that writes."""
        if self.is_chief:
            print(text, flush=True)

    def sum_over_workers(self, values: list[int]) -> list[int]:
        """Sums the numbers that `gather_from_workers` gathers, element by element, over workers."""
        return [sum(column) for column in zip(*self.gather_from_workers(values), strict=True)]

    def disagreements(self, texts: dict[str, str]) -> list[str]:
        """The names of texts that differ between workers; all have to call this at the same time.

        Args:
            texts: Dictionary from name to this worker's text, with the same names on all workers.
        """
        digests = [zlib.crc32(text.encode(errors="replace")) for text in texts.values()]
        columns = zip(*self.gather_from_workers(digests), strict=True)
        return [name for name, column in zip(texts, columns, strict=True) if len(set(column)) > 1]

    @contextlib.contextmanager
    def agreement(self):
        """Runs a block of checks on every worker; if it fails on one worker, all of them raise.

        All workers have to enter the block at the same time, and must not wait for each other in it.

        Raises:
            UserError: The block failed only on other workers; the error gives the reason. A failure on
                this worker is raised as it is.
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
            # A worker that ended at once could cut off messages that others have yet to receive.
            self.wait_for_others()
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
    """Makes this process's strategy, after meeting the other workers if there are any.

    Several workers are configured by ``TF_CONFIG`` in the environment, as TensorFlow defines it, or
    else by Slurm's variables (`nvae_tf.training.slurm`).

    Args:
        num_devices: Number of this machine's devices to use, for training without other workers;
            default: all GPUs, or the CPU.
        join_seconds: Seconds to wait for the other workers.

    Raises:
        UserError: ``TF_CONFIG`` or Slurm's variables are malformed; other workers do not answer;
            `num_devices` is given with several workers; or there are fewer GPUs.
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
    """Divides the cores among workers that share this machine's CPU.

    Otherwise each starts as many threads as there are cores, and they keep each other waiting between
    exchanges: two workers on two cores take a third longer. If a scheduler has bound this process to
    some of the cores, or the environment sets numbers of threads, these settings stay.

    Args:
        hosts: The workers' addresses.
        worker: Index of this worker.
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
    """This process's part in a training whose strategy was made elsewhere.

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
    """Tells the other workers, if there are any, why this one does not join.

    Args:
        error: The error with which this worker ends.
    """
    with contextlib.suppress(UserError):  # the first error is the one to report
        resolver, worker, hosts = _resolver()
        if resolver is not None:
            tell_others(hosts, worker, str(error), LAST_WORDS_SECONDS)


# Errors of collectives when another worker ends or cannot be reached.
_LOST = (
    tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError,
    tf.errors.InternalError, tf.errors.UnavailableError,
)  # fmt: skip


@contextlib.contextmanager
def lost_workers(cluster: Cluster):
    """Turns TensorFlow's errors after the loss of a worker into a `UserError` that says so."""
    try:
        yield
    except _LOST as error:
        if cluster.num_workers == 1:
            raise
        raise lost_worker(error) from None


def lost_worker(error: Exception) -> UserError:
    """The error to raise when collective operations fail."""
    return UserError(
        f"another worker cannot be reached or has ended ({type(error).__name__}: "
        f"{one_line(short_message(error))}); its own log may say why; start all workers again, with "
        "--cont_training if there is a checkpoint"
    )


def _resolver():
    """TensorFlow's cluster resolver, or None; this worker's index; and the addresses of all workers."""
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
        # The GPUs that Slurm bound to this task. Listing them does not initialise them yet.
        num_accelerators={"GPU": len(tf.config.get_visible_devices("GPU"))},
        rpc_layer="grpc",
    )
    return resolver, worker, hosts

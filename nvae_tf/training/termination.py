"""Ending training early on SIGTERM, and how often several workers ask each other about it."""

import signal
import threading
import time
from typing import Any

from nvae_tf.training.cluster import Cluster


class Pace:
    """Decides how many steps several workers take before they ask each other whether to go on.

    The steps take about `SECONDS`: more would make workers slow to stop; fewer would cost time, and
    memory (see `nvae_tf.training.steps.several_steps`). A series of steps never runs past a checkpoint
    that is due by steps, or past the end of an epoch.

    Args:
        steps_per_epoch: Steps in an epoch.
        save_every: Interval between checkpoints; only one in steps (``"500"``) matters here.
    """

    SECONDS, MOST = 5.0, 100

    def __init__(self, steps_per_epoch: int, save_every: str):
        self._due_every = [steps_per_epoch]
        if save_every.isdigit():
            self._due_every.append(int(save_every))
        self._wanted, self._since, self._taken = 1, 0.0, 1
        self.milliseconds = 0  # time per step of the latest series, in this process

    def steps(self, step: int) -> int:
        """Number of steps to take after `step` others; starts the clock for them."""
        self._since = time.monotonic()
        self._taken = min(self._wanted, *(every - step % every for every in self._due_every))
        return self._taken

    def done(self, logs) -> None:
        """Measures the time of the steps that were taken; `logs` is the report of the last one."""
        float(logs["loss"])  # waits for the device
        self.milliseconds = round(1000 * (time.monotonic() - self._since) / self._taken)

    def adapt(self, milliseconds: float) -> None:
        """Chooses the next number of steps from the time of one, which must be equal on all workers."""
        self._wanted = max(1, min(self.MOST, int(1000 * self.SECONDS / max(milliseconds, 1.0))))


class TerminationSignal:
    """A context that records SIGTERM, which announces that the machine is about to be taken away.

    Attributes:
        stop_agreed: Whether a callback of any worker has ended training.
    """

    def __init__(self):
        self._requested = self._agreed = self.stop_agreed = False
        self._before: Any = None  # what SIGTERM does outside of the block

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        if self._before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, *_):
        self._requested = True

    def agreed(self, cluster: Cluster, pace: Pace | None = None, stop: bool = False) -> bool:
        """Whether any worker has received SIGTERM; all workers have to call this at the same time.

        Args:
            cluster: The workers.
            pace: If given, it is adapted to the workers' mean time per step.
            stop: Whether a callback of this worker has ended training.
        """
        if not self._agreed:
            milliseconds = pace.milliseconds if pace else 0
            told, total, stops = cluster.sum_over_workers(
                [int(self._requested), milliseconds, int(stop)]
            )
            self._agreed, self.stop_agreed = told > 0, stops > 0
            if pace:
                pace.adapt(total / cluster.num_workers)
        return self._agreed

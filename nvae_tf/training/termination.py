"""When training ends before its last step: SIGTERM, and how often several workers ask about it."""

import signal
import threading
import time
from typing import Any

from nvae_tf.training.cluster import Cluster


class Pace:
    """How many steps several workers take before they ask each other whether to go on.

    So many that it takes some seconds: more would make them slow to stop, fewer cost time, and memory
    (see `nvae_tf.training.steps.several_steps`). They end where something is due after a step.

    Args:
        steps_per_epoch: Steps in an epoch.
        save_every: Steps between checkpoints, if they are counted in steps.
    """

    SECONDS, MOST = 5.0, 100

    def __init__(self, steps_per_epoch: int, save_every: str):
        self._due_every = [steps_per_epoch]
        if save_every.isdigit():
            self._due_every.append(int(save_every))
        self._wanted, self._since, self._taken = 1, 0.0, 1
        self.milliseconds = 0  # that a step of the latest ones took in this process

    def steps(self, step: int) -> int:
        """How many steps to take after `step` others."""
        self._since = time.monotonic()
        self._taken = min(self._wanted, *(every - step % every for every in self._due_every))
        return self._taken

    def done(self, logs) -> None:
        """Measures the steps that were taken, from what the last of them reports."""
        float(logs["loss"])  # waits for the device
        self.milliseconds = round(1000 * (time.monotonic() - self._since) / self._taken)

    def adapt(self, milliseconds: float) -> None:
        """Chooses the number of steps by what one takes; the same on all workers."""
        self._wanted = max(1, min(self.MOST, int(1000 * self.SECONDS / max(milliseconds, 1.0))))


class Termination:
    """Notes SIGTERM, which announces that the machine is about to be taken away.

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
        """Whether SIGTERM has told any worker to stop; all workers have to ask at the same time.

        Args:
            cluster: The workers.
            pace: Adapted to what the workers' latest steps took, if it is given.
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

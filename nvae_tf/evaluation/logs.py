"""What a run's TensorBoard files tell of its training."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from nvae_tf.run_folder import SESSION

MAX_POINTS = 500  # of a curve that are kept


class Scalar(NamedTuple):
    """A quantity that training reported.

    Attributes:
        description: What it is, as training described it.
        curves: Points (step, value) by ``train`` or ``validation``.
    """

    description: str
    curves: dict[str, list[tuple[int, float]]]


class Logs(NamedTuple):
    """What is in the files.

    Attributes:
        scalars: The quantities by their tags.
        sessions: How each process of the training was started, oldest first.
        began: Time of the first entry, in seconds since 1970; None if there is none.
        ended: Time of the last entry.
        seconds: How long training took: the sum over its processes, without the time between them.
    """

    scalars: dict[str, Scalar]
    sessions: list[str]
    began: float | None
    ended: float | None
    seconds: float


def read_logs(folder: Path) -> Logs:
    """Reads a run's TensorBoard files.

    Args:
        folder: Path of the folder that holds ``train`` and ``validation``; it need not exist.
    """
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    scalars: dict[str, Scalar] = {}
    sessions, starts, times = [], [], []
    for split in ("train", "validation"):
        if not (folder / split).is_dir():
            continue
        events = EventAccumulator(str(folder / split), size_guidance={TENSORS: MAX_POINTS})
        events.Reload()
        for tag in events.Tags()["tensors"]:
            entries, about = events.Tensors(tag), events.SummaryMetadata(tag)
            times += [entry.wall_time for entry in entries]
            kind = about.plugin_data.plugin_name
            if kind == "text" and tag == SESSION:
                texts = [tf.make_ndarray(entry.tensor_proto) for entry in entries]
                sessions += [text.item().decode() for text in texts]
                starts += [entry.wall_time for entry in entries]
            elif kind == "scalars":
                points = [(e.step, float(tf.make_ndarray(e.tensor_proto))) for e in entries]
                finite = [point for point in points if np.isfinite(point[1])]
                if finite:
                    scalar = scalars.setdefault(tag, Scalar(about.summary_description, {}))
                    scalar.curves[split] = finite
    began, ended = min(times, default=None), max(times, default=None)
    return Logs(scalars, sessions, began, ended, _seconds(starts, times))


def _seconds(starts: list[float], times: list[float]) -> float:
    """How long processes ran, each from its start to its last entry.

    Args:
        starts: When each started.
        times: When something was reported by any of them.
    """
    starts = sorted(starts)
    total = 0.0
    for number, start in enumerate(starts, 1):
        following = starts[number] if number < len(starts) else float("inf")
        total += max((time for time in times if start <= time < following), default=start) - start
    return total

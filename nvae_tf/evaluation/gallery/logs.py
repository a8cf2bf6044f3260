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
    """

    scalars: dict[str, Scalar]
    sessions: list[str]
    began: float | None
    ended: float | None


def read_logs(folder: Path) -> Logs:
    """Reads a run's TensorBoard files.

    Args:
        folder: Path of the folder that holds ``train`` and ``validation``; it need not exist.
    """
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    scalars: dict[str, Scalar] = {}
    sessions, times = [], []
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
            elif kind == "scalars":
                points = [(e.step, float(tf.make_ndarray(e.tensor_proto))) for e in entries]
                finite = [point for point in points if np.isfinite(point[1])]
                if finite:
                    scalar = scalars.setdefault(tag, Scalar(about.summary_description, {}))
                    scalar.curves[split] = finite
    return Logs(scalars, sessions, min(times, default=None), max(times, default=None))

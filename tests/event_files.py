"""What TensorBoard's event files hold."""

import tensorflow as tf


def graphs(folder):
    """The number of graphs in the event files of a folder."""
    events = (
        event
        for path in folder.glob("events*")
        for event in tf.compat.v1.train.summary_iterator(str(path))
    )
    return sum(bool(event.graph_def) for event in events)


def scalars(folder):
    """tag -> [(step, value)] of every event file in a folder."""
    points_by_tag = {}
    for path in sorted(folder.glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                content = tf.make_ndarray(value.tensor)
                points_by_tag.setdefault(value.tag, []).append((event.step, content))
    return points_by_tag

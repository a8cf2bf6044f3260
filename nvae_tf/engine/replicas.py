"""Replicas that train on one batch together: which one this is, and what they exchange.

`sum_over_replicas` and `mean_over_replicas` are exchanges (collective operations), which all replicas
have to reach. An exchange stands in the graph of the step itself, never within a function that blocks
share: so one trace of such a function serves all replicas, and no compiled region holds an exchange.
"""

import tensorflow as tf

PACK_BYTES = 2**25  # exchanged at once; gradients are exchanged pack by pack


def num_replicas() -> int:
    """Replicas that work on the batch of the code around; 1 outside of replicas."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def replica_index():
    """The number of this replica among all, from 0, an int32 scalar tensor."""
    context = tf.distribute.get_replica_context()
    return tf.cast(context.replica_id_in_sync_group, tf.int32)


def replica_row():
    """A one-hot vector (replicas,) that marks this replica; None if it has the batch for itself."""
    return tf.one_hot(replica_index(), num_replicas()) if num_replicas() > 1 else None


def sum_over_replicas(values):
    """The sum over all replicas of a structure of tensors, in one exchange; inside a replica."""
    if num_replicas() == 1:
        return values
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


def mean_over_replicas(values):
    """The mean over all replicas of a structure of float32 tensors; inside a replica.

    Large structures are exchanged in packs, one after the other: an exchange between machines holds its
    tensors in memory up to five times.
    """
    if num_replicas() == 1:
        return values
    tensors, count = tf.nest.flatten(values), tf.constant(num_replicas(), tf.float32)
    means, before = [[] for _ in tensors], []  # of each tensor, in parts; of the latest pack
    for pack in _packs([tensor.shape.num_elements() for tensor in tensors]):
        with tf.control_dependencies(before):
            parts = [_part(tensors[number], *part) for number, *part in pack]
            before = [part / count for part in sum_over_replicas(parts)]
        for (number, *_), mean in zip(pack, before, strict=True):
            means[number].append(mean)
    joined = [
        parts[0] if len(parts) == 1 else tf.reshape(tf.concat(parts, 0), tensor.shape)
        for parts, tensor in zip(means, tensors, strict=True)
    ]
    return tf.nest.pack_sequence_as(values, joined)


def _packs(lengths: list[int]) -> list[list[tuple[int, int, int]]]:
    """What is exchanged at once: lists of (a tensor's index, first element, the one after the last).

    Args:
        lengths: Number of elements of each tensor.
    """
    most, packs, size = PACK_BYTES // tf.float32.size, [[]], 0
    for number, length in enumerate(lengths):
        for start in range(0, max(length, 1), most):
            stop = min(start + most, length)
            if packs[-1] and size + stop - start > most:
                packs.append([])
                size = 0
            packs[-1].append((number, start, stop))
            size += stop - start
    return packs


def _part(tensor, start: int, stop: int):
    """Some of a tensor's elements; all of them in their shape."""
    if stop - start == tensor.shape.num_elements():
        return tensor
    return tf.reshape(tensor, [-1])[start:stop]

"""Replicas that train on one batch together: their number and index, and sums and means over them.

`sum_over_replicas` and `mean_over_replicas` are exchanges (collective operations), which all replicas
have to reach. Exchanges are part of the step's own graph, never of a function that blocks share. So one
trace of such a function serves all replicas, and no compiled region holds an exchange.
"""

import tensorflow as tf

PACK_BYTES = 2**25  # size of the packs in which `mean_over_replicas` exchanges large structures


def num_replicas() -> int:
    """Number of replicas that share the batch of the calling code; 1 outside of replicas."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def replica_index():
    """Index of this replica among all, from 0, an int32 scalar tensor; inside a replica."""
    context = tf.distribute.get_replica_context()
    return tf.cast(context.replica_id_in_sync_group, tf.int32)


def replica_row():
    """A one-hot vector (replicas,) that marks this replica; None if there is only one."""
    return tf.one_hot(replica_index(), num_replicas()) if num_replicas() > 1 else None


def sum_over_replicas(values):
    """The sum over all replicas of a structure of tensors, in one exchange; inside a replica."""
    if num_replicas() == 1:
        return values
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


def mean_over_replicas(values):
    """The mean over all replicas of a structure of float32 tensors; inside a replica.

    Large structures are exchanged in packs, one after the other, because an exchange between machines
    takes up to five times the memory of its tensors.
    """
    if num_replicas() == 1:
        return values
    tensors, count = tf.nest.flatten(values), tf.constant(num_replicas(), tf.float32)
    # The parts of each tensor's mean; and those of the latest pack.
    means, before = [[] for _ in tensors], []
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
    """Divides tensors into packs of at most `PACK_BYTES`.

    Args:
        lengths: Number of elements of each tensor.

    Returns:
        For each pack a list of (index of a tensor, first element, last element + 1).
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
    """A range of a tensor's elements, flat; the tensor itself if the range is all of it."""
    if stop - start == tensor.shape.num_elements():
        return tensor
    return tf.reshape(tensor, [-1])[start:stop]

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

    Large structures are exchanged in packs, one after the other, so that of what is packed no more than
    one pack is in memory twice.
    """
    if num_replicas() == 1:
        return values
    packs, size = [[]], 0
    for tensor in tf.nest.flatten(values):
        tensor_bytes = tensor.shape.num_elements() * tensor.dtype.size
        if packs[-1] and size + tensor_bytes > PACK_BYTES:
            packs.append([])
            size = 0
        packs[-1].append(tensor)
        size += tensor_bytes
    means, before, count = [], [], tf.constant(num_replicas(), tf.float32)
    for pack in packs:
        with tf.control_dependencies(before):
            before = [tensor / count for tensor in sum_over_replicas(pack)]
        means += before
    return tf.nest.pack_sequence_as(values, means)

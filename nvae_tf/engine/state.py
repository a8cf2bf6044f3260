"""Where a training step reads and writes what it changes: in variables, or in tensors.

A step takes one of these as an argument. With `VariableState` it changes the variables, each replica
its copy; with `TensorState` it is a pure function of tensors that stand for the variables.
"""

from collections.abc import Sequence

import tensorflow as tf

from nvae_tf.engine.replicas import num_replicas


class VariableState:
    """The variables themselves, of the replica that makes it."""

    def __init__(self):
        self._strategy, self._replica = None, 0
        if num_replicas() > 1:
            context = tf.distribute.get_replica_context()
            # Asked for once: TensorFlow makes an operation for every answer.
            self._replica = int(tf.get_static_value(context.replica_id_in_sync_group))
            self._strategy = context.strategy

    def local(self, variable):
        """This replica's copy of a variable; outside of replicas, the variable itself.

        Assigning to it changes that copy alone, at once, without talking to other devices: for values
        that all devices compute identically.
        """
        if self._strategy is None:
            return variable
        copies = self._strategy.experimental_local_results(variable)
        return copies[self._replica % len(copies)]

    def value(self, variable) -> tf.Tensor:
        """The present value of a variable."""
        return self.local(variable).read_value()

    def assign(self, variable, value) -> None:
        """Changes a variable on this replica, which all replicas do identically."""
        self.local(variable).assign(value)


class TensorState:
    """Tensors used in place of variables; the variables themselves do not change.

    Args:
        variables: The variables.
        tensors: A tensor for each.
    """

    def __init__(self, variables: Sequence[tf.Variable], tensors: Sequence[tf.Tensor]):
        self._order = [variable.ref() for variable in variables]
        self._tensors = dict(zip(self._order, tensors, strict=True))

    def value(self, variable) -> tf.Tensor:
        """The tensor that stands for a variable."""
        return self._tensors[variable.ref()]

    def assign(self, variable, value) -> None:
        """Lets another tensor stand for a variable."""
        self._tensors[variable.ref()] = value

    @property
    def tensors(self) -> list[tf.Tensor]:
        """The tensors, in the order of the variables."""
        return [self._tensors[reference] for reference in self._order]

"""Where a training step reads and writes its state: in variables, or in tensors.

A step takes one of these classes as an argument. With `VariableState` each replica changes its own copy
of the variables; with `TensorState` the step is a pure function of tensors.
"""

from collections.abc import Sequence

import tensorflow as tf

from nvae_tf.engine.replicas import num_replicas


class VariableState:
    """State in the variables themselves. Create it inside the replica that uses it."""

    def __init__(self):
        self._strategy, self._replica = None, 0
        if num_replicas() > 1:
            context = tf.distribute.get_replica_context()
            # Read once, because every access creates an operation.
            self._replica = int(tf.get_static_value(context.replica_id_in_sync_group))
            self._strategy = context.strategy

    def local(self, variable):
        """This replica's copy of a variable; outside of replicas, the variable itself.

        Assigning to the copy changes no other and involves no communication. Use it for values that
        all devices compute identically.
        """
        if self._strategy is None:
            return variable
        copies = self._strategy.experimental_local_results(variable)
        return copies[self._replica % len(copies)]

    def value(self, variable) -> tf.Tensor:
        """The current value of a variable on this replica."""
        return self.local(variable).read_value()

    def assign(self, variable, value) -> None:
        """Changes this replica's copy of a variable. All replicas must assign the same value."""
        self.local(variable).assign(value)


class TensorState:
    """State in tensors that are used in place of variables; the variables do not change.

    Args:
        variables: The variables.
        tensors: The value of each variable.
    """

    def __init__(self, variables: Sequence[tf.Variable], tensors: Sequence[tf.Tensor]):
        self._order = [variable.ref() for variable in variables]
        self._tensors = dict(zip(self._order, tensors, strict=True))

    def value(self, variable) -> tf.Tensor:
        """The tensor that is used in place of a variable.

        Raises:
            KeyError: The variable is not one of those that the constructor was given.
        """
        return self._tensors[variable.ref()]

    def assign(self, variable, value) -> None:
        """Replaces the tensor that is used in place of a variable."""
        self._tensors[variable.ref()] = value

    @property
    def tensors(self) -> list[tf.Tensor]:
        """The current tensors, in the order of the constructor's variables."""
        return [self._tensors[reference] for reference in self._order]

"""Where a training step reads and writes what it changes: in variables, or in tensors.

A step takes one of these as an argument. With `VariableState` it changes the variables, each replica
its copy; with `TensorState` it is a pure function of tensors that stand for the variables.
"""

from collections.abc import Sequence

import tensorflow as tf

from nvae_tf.engine.replicas import LocalVariables


class VariableState:
    """The variables themselves, of the replica that makes it.

    Attributes:
        local: The replica's copy of each variable.
    """

    def __init__(self):
        self.local = LocalVariables()

    def value(self, variable) -> tf.Tensor:
        """The present value of a variable."""
        return self.local[variable].read_value()

    def assign(self, variable, value) -> None:
        """Changes a variable on this replica, which all replicas do identically."""
        self.local[variable].assign(value)


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

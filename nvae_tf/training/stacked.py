"""Variables of one shape held together: a deep model's thousands of weights as a few dozen tensors.

One set of operations then serves all of one shape. Done apart, an optimiser's step alone would cost a
deep model tens of thousands of graph nodes.
"""

import contextlib

import tensorflow as tf

from nvae_tf.devices import own_copy
from nvae_tf.layers.base import standing_in


class Stacked:
    """Variables in a fixed order, and their values stacked: one tensor (n, *shape) for each shape.

    Args:
        variables: of a model.
    """

    def __init__(self, variables):
        self.variables = list(variables)
        by_shape = {}
        for index, variable in enumerate(self.variables):
            by_shape.setdefault(tuple(variable.shape), []).append(index)
        self._indices = list(by_shape.values())

    def _groups(self):
        return [[self.variables[i] for i in indices] for indices in self._indices]

    def zeros(self) -> list[tf.Variable]:
        """New variables shaped as the stacks, for slots of an optimiser."""
        shapes = [(len(group), *group[0].shape) for group in self._groups()]
        return [tf.Variable(tf.zeros(shape), trainable=False) for shape in shapes]

    def read(self) -> list[tf.Tensor]:
        """The variables' values, as stacks."""
        return [tf.stack(group) for group in self._groups()]

    def stack(self, values) -> list[tf.Tensor]:
        """Stacks of tensors given in the variables' order."""
        return [tf.stack([values[i] for i in indices]) for indices in self._indices]

    def split(self, stacks) -> list[tf.Tensor]:
        """The tensors in stacks, in the variables' order."""
        values = [None] * len(self.variables)
        for indices, stack in zip(self._indices, stacks, strict=True):
            for index, value in zip(indices, tf.unstack(stack), strict=True):
                values[index] = value
        return values

    def assign(self, stacks) -> None:
        """Gives the variables new values; inside a replica, its own copies."""
        for variable, value in zip(self.variables, self.split(stacks), strict=True):
            own_copy(variable).assign(value)

    @contextlib.contextmanager
    def replaced(self, stacks):
        """Within the block, layers compute with values from stacks in place of the variables'."""
        places = {
            id(variable): (stack, place)
            for group, stack in zip(self._groups(), stacks, strict=True)
            for place, variable in enumerate(group)
        }
        values = zip(map(id, self.variables), self.split(stacks), strict=True)
        with standing_in(dict(values), places):
            yield

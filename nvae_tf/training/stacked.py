"""Variables of one shape held together: a deep model's thousands of weights as a few dozen tensors.

One set of operations then serves all of one shape. Done apart, reading, updating and assigning them
would cost a deep model tens of thousands of graph nodes.
"""

import contextlib

import tensorflow as tf

from nvae_tf.layers.base import standing_in


class Stacked:
    """Variables in a fixed order, and their values stacked: one variable (n, *shape) for each shape.

    Training changes the stacks alone. The variables, which layers and checkpoints know, follow at
    `scatter`; what is assigned to them counts from the next `gather`.

    Args:
        variables: of a model.

    Attributes:
        variables: as given.
        stacks: what holds the values during training.
    """

    def __init__(self, variables):
        self.variables = list(variables)
        by_shape = {}
        for index, variable in enumerate(self.variables):
            by_shape.setdefault(tuple(variable.shape), []).append(index)
        self._indices = list(by_shape.values())
        self.stacks = [
            tf.Variable(tf.stack(group), trainable=False, name="stack") for group in self._groups()
        ]

    def _groups(self):
        return [[self.variables[i] for i in indices] for indices in self._indices]

    def gather(self) -> None:
        """Gives the stacks the variables' values."""
        for stack, group in zip(self.stacks, self._groups(), strict=True):
            stack.assign(tf.stack(group))

    def scatter(self, stacks=None) -> None:
        """Gives the variables the stacks' values, or those of others of the same shapes."""
        stacks = self.stacks if stacks is None else stacks
        for variable, value in zip(self.variables, self.split(stacks), strict=True):
            variable.assign(value)

    def zeros(self) -> list[tf.Variable]:
        """New variables shaped as the stacks, for slots of an optimiser."""
        return [tf.Variable(tf.zeros(stack.shape), trainable=False) for stack in self.stacks]

    def names(self, root) -> list[list[str]]:
        """What the rows of each stack are called: attributes from a root, ``"stem/kernel"``.

        Args:
            root: What holds the variables, a model.
        """
        names = variable_names(root)
        return [[names[variable.ref()] for variable in group] for group in self._groups()]

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

    @contextlib.contextmanager
    def replaced(self, stacks=None):
        """Within the block, layers compute with the stacks' values, or those of others."""
        stacks = self.stacks if stacks is None else stacks
        places = {
            id(variable): (stack, place)
            for group, stack in zip(self._groups(), stacks, strict=True)
            for place, variable in enumerate(group)
        }
        values = zip(map(id, self.variables), self.split(stacks), strict=True)
        with standing_in(dict(values), places):
            yield


def variable_names(root) -> dict:
    """The names of all variables below an object, by their references.

    Args:
        root: A Keras layer or model, or a `tf.Module`.

    Returns:
        ``variable.ref()`` -> the attributes that lead to it, ``"stem/kernel"``.
    """
    view, names, queue, seen = tf.train.TrackableView(root), {}, [("", root)], set()
    for path, parent in queue:  # grows while it is walked: shortest paths first
        for attribute, child in view.children(parent).items():
            name = f"{path}/{attribute}" if path else attribute
            if isinstance(child, tf.Variable):
                names.setdefault(child.ref(), name)
            elif id(child) not in seen:
                seen.add(id(child))
                queue.append((name, child))
    return names

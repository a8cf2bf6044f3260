"""Weights as rows of stacks: one variable holds all weights of the same shape.

A deep model has thousands of weights of a few dozen shapes. Reading, updating and saving them one by
one would cost tens of thousands of graph nodes; as stacks they cost a few dozen. A layer holds a
`Weight`, which says where its values are; the variables belong to the outermost layer or model.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
import tensorflow as tf

WEIGHT = "weight"  # the kind of all trainable weights


def fresh_seed() -> np.ndarray:
    """A seed for one draw of initial values, from NumPy's generator, which `set_random_seed` seeds.

    Use it with stateless random operations: each stateful one would leave a cached kernel in the
    process for ever.
    """
    return np.random.randint(2**31, size=2, dtype=np.int64)


class Weight:
    """One weight of a layer: a row of a stack.

    Args:
        shape: Shape of the weight.
        initializer: Draws the initial values (see `nvae_tf.layers.base.Uniform`). The weights of a
            stack whose initializers have equal keys are drawn together.
        trainable: Whether gradients are taken with respect to the weight.
        kind: Weights of the same kind and shape share a stack.

    Attributes:
        stack: The variable (n, *shape) that holds the values; None until `stack_weights` is called.
        row: Index of this weight's row in the stack; -1 until then.
    """

    def __init__(self, shape, initializer, trainable: bool = True, kind: str = WEIGHT):
        self.shape = tf.TensorShape(shape)
        self.initializer, self.trainable, self.kind = initializer, trainable, kind
        self.stack: Any = None
        self.row = -1

    def value(self) -> tf.Tensor:
        """The weight's values, read from its stack."""
        return self.stack[self.row]

    def numpy(self) -> np.ndarray:
        """The weight's values as an array."""
        return self.value().numpy()

    def assign(self, value) -> None:
        """Assigns new values, outside of graphs; `assign_all` is faster for many weights.

        Args:
            value: A tensor or array of the weight's shape.

        Raises:
            ValueError: The value has another shape.
        """
        assign_all({self: value})

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.numpy(), dtype)


def walk(root, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every layer and weight below a layer once, in the order in which attributes were set.

    Attributes whose names begin with an underscore are skipped.

    Args:
        root: A Keras layer or model.
        path: Prefix of all paths.

    Yields:
        The path of attributes from the root (``"stem/kernel"``), and the layer or `Weight`.
    """
    yield from _walk(root, path, set())


def _walk(root, path, seen):
    for attribute, content in vars(root).items():
        if not attribute.startswith("_"):
            yield from _walk_content(content, f"{path}/{attribute}" if path else attribute, seen)


def _walk_content(content, path, seen):
    if isinstance(content, list | tuple):
        for number, entry in enumerate(content):
            yield from _walk_content(entry, f"{path}/{number}", seen)
    elif isinstance(content, Weight | tf.Module) and content not in seen:
        seen.add(content)
        if isinstance(content, Weight):
            yield path, content
        elif hasattr(content, "call"):
            yield path, content
            yield from _walk(content, path, seen)


def weights_below(root) -> list[Weight]:
    """The weights below a layer, in the order of `walk`."""
    return [content for _, content in walk(root) if isinstance(content, Weight)]


def stack_weights(root) -> list[tf.Variable]:
    """Creates the variables of all weights below a layer, one per kind and shape.

    Args:
        root: The outermost layer or model, whose weights have no variables yet.

    Returns:
        The stacks, which the root has to keep as an attribute.
    """
    groups: dict[tuple, list[Weight]] = {}
    for weight in weights_below(root):
        groups.setdefault((weight.kind, tuple(weight.shape)), []).append(weight)
    # Convolution kernels first, because log-norms are initialised from them.
    stacks = {key: _make_stack(groups[key]) for key in sorted(groups, key=lambda key: -len(key[1]))}
    return [stacks[key] for key in groups]


def _make_stack(weights: list[Weight]) -> tf.Variable:
    shape = weights[0].shape
    rows: dict[Any, list[int]] = {}
    for row, weight in enumerate(weights):
        rows.setdefault(weight.initializer.key, []).append(row)
    drawn = []
    for those in rows.values():
        initializers = [weights[row].initializer for row in those]
        drawn.append(initializers[0].draw((len(those), *shape), initializers))
    value = drawn[0] if len(drawn) == 1 else tf.dynamic_stitch(list(rows.values()), drawn)
    trainable = weights[0].trainable
    stack = tf.Variable(
        value,
        trainable=trainable,
        aggregation=tf.VariableAggregation.NONE
        if trainable
        else tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
    for row, weight in enumerate(weights):
        weight.stack, weight.row = stack, row
    return stack


def rows_of(weights: Iterable[Weight], tensors: Mapping) -> dict[Weight, tf.Tensor]:
    """The values of weights, read from tensors that are used in place of their stacks.

    Args:
        weights: The weights.
        tensors: Dictionary from a stack's reference (`tf.Variable.ref`) to a tensor of its shape.

    Returns:
        Dictionary from weight to its row; without the weights whose stacks are not in `tensors`.
    """
    rows = {reference: tf.unstack(tensor) for reference, tensor in tensors.items()}
    return {w: rows[w.stack.ref()][w.row] for w in weights if w.stack.ref() in rows}


def stacked(weights: list[Weight], tensors: Mapping) -> tf.Tensor:
    """Stacks the values of weights of one shape into one tensor (n, *shape).

    Args:
        weights: The weights.
        tensors: As for `rows_of`; stacks that are missing there are read from their variables.
    """

    def tensor_of(stack):
        return tensors.get(stack.ref(), stack)

    stack = weights[0].stack
    if any(weight.stack is not stack for weight in weights):  # of layers that were built separately
        return tf.stack([tensor_of(weight.stack)[weight.row] for weight in weights])
    rows, tensor = [weight.row for weight in weights], tensor_of(stack)
    if rows == list(range(stack.shape[0])):
        return tf.convert_to_tensor(tensor)
    return tf.gather(tensor, rows)


def by_stack(values: Mapping[Weight, Any]) -> list[tuple[tf.Variable, dict[int, Any]]]:
    """Groups values by the stacks that their weights belong to.

    Args:
        values: Dictionary from weight to any value.

    Returns:
        Pairs of a stack and a dictionary from row to value.
    """
    groups: dict[Any, dict[int, Any]] = {}
    for weight, value in values.items():
        groups.setdefault(weight.stack.ref(), {})[weight.row] = value
    return [(reference.deref(), rows) for reference, rows in groups.items()]


def assign_all(values: Mapping[Weight, Any]) -> None:
    """Assigns new values to weights, one assignment per stack; outside of graphs.

    Args:
        values: Dictionary from weight to a tensor or array of its shape.

    Raises:
        ValueError: A value has another shape than its weight.
    """
    for weight, value in values.items():
        if np.shape(value) != tuple(weight.shape):
            raise ValueError(f"a weight of shape {weight.shape} cannot hold {np.shape(value)}")
    for stack, rows in by_stack(values):
        content = np.array(stack.numpy())
        for row, value in rows.items():
            content[row] = value
        stack.assign(content)


def layout(root) -> list[list[str]]:
    """The names of the rows of each stack below a layer (see `walk`), stack by stack."""
    names: dict[Any, list[str]] = {}
    for path, content in walk(root):
        if isinstance(content, Weight):
            names.setdefault(content.stack.ref(), []).append(path)
    return list(names.values())


class OtherRowsError(ValueError):
    """The rows of saved stacks belong to other weights than the rows of this model's stacks."""


class RowNames(tf.train.experimental.PythonState):
    """The names of the rows of stacks, saved beside them and compared when they are restored.

    Rows have no names of their own, so a stack of another model would fit wherever its shape does.

    Args:
        names: The names of the rows of each stack, stack by stack (see `layout`).
    """

    def __init__(self, names: list[list[str]]):
        self._names = names

    def serialize(self) -> str:
        """Returns the names as JSON."""
        return json.dumps(self._names)

    def deserialize(self, value) -> None:
        """Compares saved names with the names of this object.

        Args:
            value: The result of `serialize` when the stacks were saved.

        Raises:
            OtherRowsError: They differ; the error names the first difference.
        """
        saved = json.loads(value)
        if saved != self._names:
            rows = zip_longest(sum(saved, []), sum(self._names, []), fillvalue="no row")
            differing = (pair for pair in rows if pair[0] != pair[1])
            there, here = next(differing, ("another division into stacks",) * 2)
            raise OtherRowsError(
                "its weights are in another order, or of another model: "
                f"{there} stands where {here} is expected"
            )

"""Weights as rows of stacks: one variable holds all weights of a shape.

A deep model has thousands of weights of a few dozen shapes. Read, updated and saved one by one they
would cost tens of thousands of graph nodes; as stacks they cost a few dozen. A layer holds a `Weight`,
which says where its values are; the variables themselves belong to the outermost layer or model.
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
        initializer: Gives initial values (see `nvae_tf.layers.base.Uniform`). Those with equal keys are
            called together.
        trainable: Whether gradients are taken with respect to it.
        kind: Weights of one kind and shape share a stack.

    Attributes:
        stack: The variable (n, *shape) that holds the values; None until `stack_weights`.
        row: The place in it.
    """

    def __init__(self, shape, initializer, trainable: bool = True, kind: str = WEIGHT):
        self.shape = tf.TensorShape(shape)
        self.initializer, self.trainable, self.kind = initializer, trainable, kind
        self.stack: Any = None
        self.row = -1

    def value(self) -> tf.Tensor:
        """The values, read from the stack."""
        return self.stack[self.row]

    def numpy(self) -> np.ndarray:
        """The values, as an array."""
        return self.value().numpy()

    def assign(self, value) -> None:
        """Changes the values; for many weights `assign_all` is faster.

        Args:
            value: A tensor or array of the weight's shape.
        """
        assign_all({self: value})

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.numpy(), dtype)


def walk(root, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every layer and weight below a layer, in the order in which they were made, each once.

    Args:
        root: A Keras layer or model.
        path: What its attributes' names begin with.

    Yields:
        The attributes that lead there (``"stem/kernel"``), and the layer or `Weight`.
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
    """The weights below a layer, in the order in which they were made."""
    return [content for _, content in walk(root) if isinstance(content, Weight)]


def stack_weights(root) -> list[tf.Variable]:
    """Makes the variables for all weights below a layer, one for each kind and shape.

    Args:
        root: The outermost layer or model, whose weights have no variables yet.

    Returns:
        The stacks, for the root to keep.
    """
    groups: dict[tuple, list[Weight]] = {}
    for weight in weights_below(root):
        groups.setdefault((weight.kind, tuple(weight.shape)), []).append(weight)
    # Convolution kernels first: some vectors begin at values that depend on them.
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
    """The values of weights, taken from tensors that replace their stacks.

    Args:
        weights: The weights.
        tensors: A stack's reference -> a tensor of its shape.

    Returns:
        Each weight's row.
    """
    rows = {reference: tf.unstack(tensor) for reference, tensor in tensors.items()}
    return {w: rows[w.stack.ref()][w.row] for w in weights if w.stack.ref() in rows}


def stacked(weights: list[Weight], tensors: Mapping) -> tf.Tensor:
    """The values of weights of one shape as one tensor (n, *shape).

    Args:
        weights: The weights.
        tensors: As for `rows_of`; stacks that are not in it are read.
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

    Returns:
        Each stack, and the values by row.
    """
    groups: dict[Any, dict[int, Any]] = {}
    for weight, value in values.items():
        groups.setdefault(weight.stack.ref(), {})[weight.row] = value
    return [(reference.deref(), rows) for reference, rows in groups.items()]


def assign_all(values: Mapping[Weight, Any]) -> None:
    """Changes the values of weights, each stack at once; outside of graphs.

    Args:
        values: Tensors or arrays, each of its weight's shape.

    Raises:
        ValueError: A value has another shape.
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
    """Saved stacks have rows that belong to other weights than the rows here."""


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
        """Compares saved names with those here.

        Args:
            value: What `serialize` returned, when the stacks were saved.

        Raises:
            OtherRowsError: They differ; the error names the first that does.
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

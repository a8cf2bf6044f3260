"""Checkpoints as files: what is saved of a model's layout, and which checkpoint of a run is read.

Writing them is training's (`nvae_tf.training.checkpoints`); training and evaluation read them.
"""

import json
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import tensorflow as tf

from nvae_tf.io.errors import UserError, short_message

NAME = "state"  # of TensorFlow's files in a checkpoint's folder
LAYOUT_KEY = "layout/.ATTRIBUTES/py_state"  # where TensorFlow keeps a PythonState


class Layout(tf.train.experimental.PythonState):
    """Which weight stands where in the stacks of a checkpoint.

    Slots of optimisers, moving averages and singular vectors are saved as stacks, whose rows belong to
    weights by position alone. So their names are saved too, and compared before anything is restored.

    Args:
        names: For each kind of stack the names of its rows, stack by stack.
    """

    def __init__(self, names: dict[str, list[list[str]]]):
        self.names = names

    def serialize(self) -> str:
        """The names as JSON, for a checkpoint."""
        return json.dumps(self.names)

    def deserialize(self, value: str) -> None:
        """Changes nothing: `check` has compared the names."""

    def check(self, path: Path) -> None:
        """Makes sure that the rows of a checkpoint's stacks are the rows of these.

        Args:
            path: Folder of the checkpoint.

        Raises:
            UserError: They are not, or the checkpoint does not say what they are.
        """
        reader = tf.train.load_checkpoint(str(path / NAME))
        if LAYOUT_KEY not in reader.get_variable_to_shape_map():
            raise UserError(f"{path}: this checkpoint is of another version of nvae-tf")
        saved = json.loads(reader.get_tensor(LAYOUT_KEY))
        for kind, stacks in self.names.items():
            ours, theirs = sum(stacks, []), sum(saved.get(kind, []), [])
            if stacks != saved.get(kind):
                differing = (pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1])
                here, there = next(differing, ("another division into stacks",) * 2)
                raise UserError(
                    f"{path}: its {kind} are in another order, or of another model: {there} stands "
                    f"where {here} is expected; evaluate and continue it with the version that wrote it"
                )


def has_averages(path: Path) -> bool:
    """Whether a checkpoint holds moving averages of the weights.

    Args:
        path: Folder of the checkpoint.
    """
    names = tf.train.load_checkpoint(str(path / NAME)).get_variable_to_shape_map()
    return any(name.startswith("trainer/averages/") for name in names)


def newest_whole(paths: list[Path], restore: Callable[[Path], None]) -> Path:
    """Restores the first checkpoint that is not damaged, and reports those that are.

    Args:
        paths: folders of checkpoints, newest first.
        restore: Restores from a checkpoint's folder; may raise any exception.

    Returns:
        The one restored.

    Raises:
        UserError: None can be restored; or what `restore` raises of that kind.
    """
    for path in paths:
        try:
            restore(path)
            return path
        except UserError:  # whole, but not of this model
            raise
        except Exception as error:  # noqa: BLE001 - a damaged file raises what it likes
            if path is paths[-1]:
                raise UserError(
                    f"{path}: this checkpoint cannot be restored, nor can a newer one "
                    f"({short_message(error)})"
                ) from None
            print(f"warning: {path}: damaged, the one before it is used ({short_message(error)})")
    raise UserError("no checkpoint")

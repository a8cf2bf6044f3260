"""Reading checkpoints: the saved layout of a model's stacks, and the newest undamaged checkpoint.

`nvae_tf.training.checkpoints` writes checkpoints; training and evaluation read them.
"""

import json
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import tensorflow as tf

from nvae_tf.io.errors import UserError, short_message

PREFIX = "state"  # of the names of TensorFlow's files in a checkpoint's folder
LAYOUT_KEY = "layout/.ATTRIBUTES/py_state"  # where TensorFlow keeps a PythonState


class Layout(tf.train.experimental.PythonState):
    """The names of the weights in the rows of a checkpoint's stacks.

    Slots of optimisers, moving averages and singular vectors are saved as stacks, whose rows belong to
    weights by position alone. Therefore the names are saved, too, and compared before a restore.

    Args:
        names: For each kind of stack the names of its rows, stack by stack.
    """

    def __init__(self, names: dict[str, list[list[str]]]):
        self.names = names

    def serialize(self) -> str:
        """Returns the names as JSON, for a checkpoint."""
        return json.dumps(self.names)

    def deserialize(self, value: str) -> None:
        """Changes nothing, because `check` has compared the names before the restore."""

    def check(self, path: Path) -> None:
        """Checks that the rows of a checkpoint's stacks belong to the same weights as the rows here.

        Args:
            path: Folder of the checkpoint.

        Raises:
            UserError: They do not, or the checkpoint does not hold their names.
        """
        reader = tf.train.load_checkpoint(str(path / PREFIX))
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
    return has_part(path, "averages")


def has_part(path: Path, part: str) -> bool:
    """Whether a checkpoint holds values of one of the trainer's attributes.

    Args:
        path: Folder of the checkpoint.
        part: Name of the attribute.
    """
    names = tf.train.load_checkpoint(str(path / PREFIX)).get_variable_to_shape_map()
    return any(name.startswith(f"trainer/{part}/") for name in names)


def restore_newest(paths: list[Path], restore: Callable[[Path], None]) -> Path:
    """Restores the newest checkpoint that is not damaged, and warns about those that are.

    Args:
        paths: Folders of checkpoints, newest first.
        restore: Restores from a checkpoint's folder; may raise any exception.

    Returns:
        The folder of the checkpoint that was restored.

    Raises:
        UserError: No checkpoint can be restored, or `restore` raised it.
    """
    for path in paths:
        try:
            restore(path)
            return path
        except UserError:  # not damaged, but of another model
            raise
        except Exception as error:  # noqa: BLE001 - a damaged file raises what it likes
            if path is paths[-1]:
                newer = ", nor can a newer one" if len(paths) > 1 else ""
                raise UserError(
                    f"{path}: this checkpoint cannot be restored{newer} ({short_message(error)})"
                ) from None
            print(f"warning: {path}: damaged, the one before it is used ({short_message(error)})")
    raise UserError("no checkpoint")

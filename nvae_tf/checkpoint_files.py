"""Reading checkpoints: what they hold, and which one of a run is read.

`nvae_tf.training.checkpoints` writes checkpoints; training and evaluation read them.
"""

from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from nvae_tf.engine.weights import OtherRowsError, RowNames
from nvae_tf.io.errors import UserError, short_message
from nvae_tf.run_folder import CHECKPOINT_PREFIX


def check_rows(path: Path, rows: dict[str, RowNames]) -> None:
    """Checks that a checkpoint's stacks hold the same weights as those here, before it is restored.

    Args:
        path: Folder of the checkpoint.
        rows: The names of the rows here, by their attributes below the trainer.

    Raises:
        UserError: They do not, or the checkpoint does not hold their names.
    """
    reader = tf.train.load_checkpoint(str(path / CHECKPOINT_PREFIX))
    for attribute, names in rows.items():
        key = f"trainer/{attribute}/.ATTRIBUTES/py_state"  # where TensorFlow keeps a PythonState
        if not reader.has_tensor(key):
            raise UserError(f"{path}: this checkpoint is of another version of nvae-tf")
        try:
            names.deserialize(reader.get_tensor(key))
        except OtherRowsError as error:
            raise UserError(
                f"{path}: {error}; evaluate and continue it with the version that wrote it"
            ) from None


def has_part(prefix: Path | str, part: str) -> bool:
    """Whether a checkpoint holds values of one of the trainer's attributes.

    Args:
        prefix: Path of the checkpoint's files, up to where their names differ.
        part: Name of the attribute.
    """
    names = tf.train.load_checkpoint(str(prefix)).get_variable_to_shape_map()
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

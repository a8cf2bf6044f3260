"""Finds a trained model: a run, one of its checkpoints, or an official file. Imports no TensorFlow."""

import itertools
from pathlib import Path
from typing import NamedTuple

from nvae_tf.io.errors import UserError
from nvae_tf.io.paths import is_regular, user_path
from nvae_tf.run_folder import CHECKPOINT_PREFIX, RunFolder

MAX_LISTED = 8  # runs that an error lists
MAX_ENTRIES = 10_000  # entries of a folder that are looked at


class ModelLocation(NamedTuple):
    """Where a trained model is.

    Attributes:
        path: Path of the run's folder; of an official file, the path of the file.
        checkpoints: Paths of the checkpoints to try, best first; empty for an official file.
    """

    path: Path
    checkpoints: list[Path]


def locate(text: str) -> ModelLocation:
    """Finds a trained model.

    Args:
        text: Path of a run's folder; of a checkpoint in it, ``checkpoints/step-N``; or of an official
            ``.pt`` file.

    Raises:
        UserError: There is no trained model at the path; the error lists the runs near it.
    """
    given = user_path(text)
    if given.is_dir():
        if is_regular(given / f"{CHECKPOINT_PREFIX}.index"):
            # Resolved, since the parents of a relative path or of a link are not the run's folders.
            return ModelLocation(given.resolve().parent.parent, [given])
        checkpoints = RunFolder(given).list_checkpoints()
        if checkpoints:
            return ModelLocation(given, checkpoints)
        raise UserError(
            f"{given}: no checkpoint here; name the folder of a run (ROOT/SAVE){_runs_near(given)}"
        )
    if given.suffix == ".h5" and is_regular(given):
        raise UserError(
            f"{given}: weights alone, without their model; make that in Python and call its "
            "load_weights, or name a run"
        )
    if given.suffix == ".keras" and is_regular(given):
        raise UserError(
            f"{given}: a saved model without its run: load it with nvae_tf.load, or name a run"
        )
    if is_regular(given):
        return ModelLocation(given, [])
    raise UserError(f"{given}: no such run, checkpoint or PyTorch file{_runs_near(given)}")


def _runs_near(given: Path) -> str:
    """The runs in a folder, beside it or in ``runs``, as the end of an error's text."""
    for folder in (given, given.parent, Path("runs")):
        runs = [str(path) for path in _run_folders(folder) if RunFolder(path).list_checkpoints()]
        if runs:
            more = f" and {len(runs) - MAX_LISTED} more" if len(runs) > MAX_LISTED else ""
            return f"; runs are {', '.join(runs[:MAX_LISTED])}{more}"
    return "; there are no runs beside it, nor in runs/"


def _run_folders(folder: Path) -> list[Path]:
    """The run folders in a folder, with or without checkpoints."""
    try:
        entries = itertools.islice(folder.iterdir(), MAX_ENTRIES)
        return sorted(path for path in entries if is_regular(RunFolder(path).config_file))
    except OSError:
        return []

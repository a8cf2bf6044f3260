"""Where a trained model is: a run, one of its checkpoints, or an official file; knows no TensorFlow."""

import itertools
from pathlib import Path
from typing import NamedTuple

from nvae_tf.io.errors import UserError
from nvae_tf.io.paths import is_regular, user_path
from nvae_tf.run_folder import RunFolder

LISTED = 8  # runs in an error
LOOKED_AT = 10_000  # entries of a folder, at most


class Place(NamedTuple):
    """Where a trained model is.

    Attributes:
        path: Path of the run's folder; of an official file, the path of the file.
        checkpoints: Paths of the checkpoints to try, best first; none: it is an official file.
    """

    path: Path
    checkpoints: list[Path]


def locate(text: str) -> Place:
    """Finds a trained model.

    Args:
        text: Path of a run's folder; or of a checkpoint in it, ``checkpoints/step-N``; or of an
            official ``.pt`` file.

    Raises:
        UserError: Nothing of the kind is there; the line lists the runs that are.
    """
    given = user_path(text)
    if given.is_dir():
        if any(is_regular(path) for path in given.glob("*.index")):
            # Its parents are asked for: a relative path may have none, and a link has others.
            return Place(given.resolve().parent.parent, [given])
        checkpoints = RunFolder(given).list_checkpoints()
        if checkpoints:
            return Place(given, checkpoints)
        raise UserError(
            f"{given}: no checkpoint here; name the folder of a run (ROOT/SAVE){_runs_near(given)}"
        )
    if is_regular(given):
        return Place(given, [])
    raise UserError(f"{given}: no such run, checkpoint or PyTorch file{_runs_near(given)}")


def _runs_near(given: Path) -> str:
    """The runs in a folder, beside it or in ``runs``, as text to append."""
    for folder in (given, given.parent, Path("runs")):
        runs = [str(path) for path in _entries(folder) if RunFolder(path).list_checkpoints()]
        if runs:
            more = f" and {len(runs) - LISTED} more" if len(runs) > LISTED else ""
            return f"; runs are {', '.join(runs[:LISTED])}{more}"
    return "; there are no runs beside it, nor in runs/"


def _entries(folder: Path) -> list[Path]:
    """Folders of runs, with or without checkpoints."""
    try:
        found = itertools.islice(folder.iterdir(), LOOKED_AT)
        return sorted(path for path in found if is_regular(RunFolder(path).config_file))
    except OSError:
        return []

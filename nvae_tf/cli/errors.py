"""Errors of commands: one line on standard error, and an exit status."""

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable

from nvae_tf.io.errors import TrainingDivergedError, UserError, one_line, short_message

SOFTWARE_ERROR = 1
USER_ERROR = 2
DIVERGED = 3
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def run_command(command: Callable[[], None], if_interrupted: str) -> int:
    """Runs a command; a user's mistake or a failure around it becomes one line, not a traceback.

    A mistake in this software itself is printed with its traceback, and gives status 1.

    Args:
        command: what to run.
        if_interrupted: what a user who interrupted it should know.

    Returns:
        The exit status.
    """
    _print_any_name()
    # Large images are refused with a line of our own, and odd metadata do not matter.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"interrupted; {if_interrupted}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        text = _explanation(error)
        if text is None:  # a mistake in this software
            # Printed here, and not by Python at its end: an iterator that the traceback still held then
            # could wait for ever (see `nvae_tf.data.source.reading`).
            traceback.print_exc()
            return SOFTWARE_ERROR
        print(f"error: {one_line(text)}", file=sys.stderr)
        return DIVERGED if isinstance(error, TrainingDivergedError) else USER_ERROR
    return 0


def _print_any_name() -> None:
    """File names may hold bytes that are no text; printing them must not fail."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="backslashreplace")


def _explanation(error: Exception) -> str | None:
    """What an error means for the user, if it comes from outside of this software."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        # What Python still has to write at its end would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "nobody reads the output any more"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {short_message(error)}"
    if isinstance(error, MemoryError):
        return "not enough memory; choose a smaller --batch_size"
    return _of_tensorflow(error) if "tensorflow" in sys.modules else None


def _of_tensorflow(error: Exception) -> str | None:
    from tensorflow import errors

    if isinstance(error, errors.ResourceExhaustedError) and "No space" not in str(error):
        tensor = re.search(r"OOM when allocating tensor with shape\[[\d,]*\]", str(error))
        said = tensor[0] if tensor else short_message(error)
        return (
            f"not enough memory on the device ({said}); choose a smaller --batch_size, with "
            "--accumulate_steps for training, or --gradient_checkpointing cells"
        )
    outside = (
        errors.ResourceExhaustedError, errors.NotFoundError, errors.PermissionDeniedError,
        errors.FailedPreconditionError, errors.DataLossError, errors.UnavailableError,
    )  # fmt: skip
    return short_message(error) if isinstance(error, outside) else None

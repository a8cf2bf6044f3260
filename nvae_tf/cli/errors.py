"""Errors of commands: one line on standard error, and an exit status."""

import gc
import logging
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
STOPPED_EARLY = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
INTERRUPTED = 130  # 128 + SIGINT, as shells count

# New objects after which Python looks for cycles among the youngest. With its default of 700 it does so
# 1,800 times while TensorFlow is imported and celeba256 is traced: a tenth of that time, for nothing.
GARBAGE_THRESHOLD = 10_000


def run_command(command: Callable[..., int | None], *arguments, if_interrupted: str) -> int:
    """Runs a command; a user's mistake or an outside failure becomes one line instead of a traceback.

    An error in this software itself is printed with its traceback, and gives status 1.

    Args:
        command: The function to run, which may return an exit status; None is 0.
        *arguments: Its arguments.
        if_interrupted: What a user who interrupts it should know, as a part of a line.

    Returns:
        The exit status.
    """
    # A process may be started with these closed (``>&-``), and what prints expects something there.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - open to the end
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    _print_any_name()
    # Images that are too large raise an error anyway, and odd metadata do not matter.
    warnings.filterwarnings("ignore", module=r"(PIL|pydicom|nibabel|tifffile)\b")
    for name in ("tifffile", "pydicom", "nibabel"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    thresholds = gc.get_threshold()
    gc.set_threshold(GARBAGE_THRESHOLD)
    try:
        status = command(*arguments) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"interrupted; {if_interrupted}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        text = _explanation(error)
        if text is None:  # an error in this software
            # If Python printed the traceback at its end, an iterator that the traceback holds could
            # wait for ever (see `nvae_tf.data.source.reading`).
            traceback.print_exc()
            return SOFTWARE_ERROR
        print(f"error: {one_line(text)}", file=sys.stderr)
        return DIVERGED if isinstance(error, TrainingDivergedError) else USER_ERROR
    finally:
        gc.set_threshold(*thresholds)
    return status


def _print_any_name() -> None:
    """Lets standard output print file names with bytes that are not text."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="backslashreplace")


def _explanation(error: Exception) -> str | None:
    """Returns what an error means for the user, or None if it is an error in this software."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        # Otherwise what Python still has to write at its end would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "the output's reader has closed it"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {short_message(error)}"
    if isinstance(error, MemoryError):
        return "not enough memory; choose a smaller --batch_size"
    return _explain_tensorflow(error) if "tensorflow" in sys.modules else None


def _explain_tensorflow(error: Exception) -> str | None:
    from tensorflow import errors

    if isinstance(error, errors.ResourceExhaustedError) and "No space" not in str(error):
        tensor = re.search(r"OOM when allocating tensor with shape\[[\d,]*\]", str(error))
        detail = tensor[0] if tensor else short_message(error)
        return (
            f"not enough memory on the device ({detail}); choose a smaller --batch_size, with "
            "--accumulate_steps for training, or --gradient_checkpointing cells"
        )
    outside_failures = (
        errors.ResourceExhaustedError, errors.NotFoundError, errors.PermissionDeniedError,
        errors.FailedPreconditionError, errors.DataLossError, errors.UnavailableError,
    )  # fmt: skip
    return short_message(error) if isinstance(error, outside_failures) else None

"""Errors of commands: one line on standard error, and an exit status."""

import sys
from collections.abc import Callable

from nvae_tf.errors import Diverged, UserError

USER_ERROR = 2
DIVERGED = 3
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def run_command(command: Callable[[], None], if_interrupted: str) -> int:
    """Runs a command; a user's mistake becomes one line instead of a traceback.

    Args:
        command: what to run.
        if_interrupted: what a user who interrupted it should know.

    Returns:
        The exit status.
    """
    try:
        command()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return DIVERGED if isinstance(error, Diverged) else USER_ERROR
    except KeyboardInterrupt:
        print(f"interrupted; {if_interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 0


def one_line(error: Exception) -> str:
    """An error's text, with line breaks and control characters (of file names, say) escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))

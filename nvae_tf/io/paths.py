"""Paths that users name."""

from pathlib import Path

from nvae_tf.io.errors import UserError, short_message, short_repr


def user_path(text: str) -> Path:
    """The path that a user wrote, ``~`` expanded.

    Raises:
        UserError: there is no such user, or it can be no path.
    """
    try:
        path = Path(text).expanduser()
        path.exists()  # raises if the name is too long, say
        if "\0" in str(path):
            raise ValueError("it holds a zero byte")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{short_repr(text)}: not usable as a path ({short_message(error)})"
        ) from None
    return path


def is_regular(path: Path) -> bool:
    """`Path.is_file`, but false where that raises; from a pipe or a device reading might never end."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False

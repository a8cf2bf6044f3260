"""Paths that users name."""

from pathlib import Path

from nvae_tf.io.errors import UserError, short_message, short_repr


def user_path(text: str) -> Path:
    """Turns what a user wrote into a path, with ``~`` expanded.

    Raises:
        UserError: There is no such user, or the text cannot be a path.
    """
    try:
        path = Path(text).expanduser()
        path.exists()  # raises if the name is too long, for example
        if "\0" in str(path):
            raise ValueError("it holds a zero byte")
        str(path).encode()  # raises if the name is not text, with which TensorFlow can do nothing
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{short_repr(text)}: not usable as a path ({short_message(error)})"
        ) from None
    return path


def is_regular(path: Path) -> bool:
    """Like `Path.is_file`, but False instead of an exception.

    Guards against pipes and devices, from which reading might never end.
    """
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False

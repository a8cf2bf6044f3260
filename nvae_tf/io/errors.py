"""Errors that users see, and helpers that turn other exceptions into one line."""

import re
import reprlib

# The names of graph nodes that TensorFlow adds to its messages, which only programmers need.
_GRAPH_NODES = re.compile(r"\{\{\w+ \S*\}\}\s*|\s*\[Op:\w+\].*")
LONGEST = 2000  # characters of a line
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


class UserError(Exception):
    """What went wrong, where, and what to do: one line, printed by the commands without traceback."""


class ConfigError(UserError):
    """A configuration key is unknown, of the wrong type or impossible; the text names key and remedy.

    Args:
        text: The line.
        keys: The keys whose values do not go together although each is allowed alone; the text names
            the first of them.
    """

    def __init__(self, text: str, keys: tuple[str, ...] = ()):
        super().__init__(text)
        self.keys = keys


class TrainingDivergedError(UserError):
    """Training ended because too many of its steps in a row were skipped."""


def short_message(error: Exception, max_length: int = 200) -> str:
    """The message of another library's error, as a part of a line.

    Args:
        error: The error.
        max_length: Largest number of characters; a longer message loses its middle.
    """
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    text = _GRAPH_NODES.sub("", text) or type(error).__name__
    half = max_length // 2  # the cause is as often at the end as at the beginning
    return text if len(text) <= max_length else f"{text[:half]} ... {text[-half:]}"


def short_repr(value) -> str:
    """The `repr` of a value from outside, shortened however large or deep the value is."""
    try:
        return _SHORT.repr(value)
    except Exception:  # noqa: BLE001 - Python refuses to print integers of thousands of digits
        return f"a {type(value).__name__}"


def one_line(text: str) -> str:
    """Escapes line breaks and control characters (in file names, for example), and cuts a long text."""
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: LONGEST + 1])
    return escaped if len(escaped) <= LONGEST else escaped[:LONGEST] + "..."

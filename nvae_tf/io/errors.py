"""Errors that stand for a user's mistake or an outside failure, and how others are told in one line."""

import re
import reprlib

# Where in a graph TensorFlow was, which is for programmers.
_OF_GRAPHS = re.compile(r"\{\{\w+ \S*\}\}\s*|\s*\[Op:\w+\].*")
LONGEST = 2000  # characters of a line
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


class UserError(Exception):
    """What went wrong, where, and what to do: one line, printed by the commands without traceback."""


class ConfigError(UserError):
    """A configuration key that is unknown, of the wrong type or impossible; names key and remedy.

    Args:
        text: The line.
        keys: The keys whose values do not go together, where each is fine alone; the one that the
            text names is the first.
    """

    def __init__(self, text: str, keys: tuple[str, ...] = ()):
        super().__init__(text)
        self.keys = keys


class TrainingDivergedError(UserError):
    """Training ended because its steps were no longer finite."""


def short_message(error: Exception, most: int = 200) -> str:
    """What another library's error says, as a part of a line."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    text = _OF_GRAPHS.sub("", text) or type(error).__name__
    # The cause stands last as often as first.
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def short_repr(value) -> str:
    """A value from outside as a part of a line: short, however large or deep it is."""
    try:
        return _SHORT.repr(value)
    except Exception:  # noqa: BLE001 - Python refuses to print integers of thousands of digits
        return f"a {type(value).__name__}"


def one_line(text: str) -> str:
    """A text with line breaks and control characters (of file names, say) escaped, cut if too long."""
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: LONGEST + 1])
    return escaped if len(escaped) <= LONGEST else escaped[:LONGEST] + "..."

"""What a check found: whether it is in order, what it is, and what to do."""

from typing import NamedTuple

OK, WARNING, PROBLEM = LEVELS = ("ok", "warning", "problem")


class Finding(NamedTuple):
    """One line of the diagnosis.

    Attributes:
        level: ``"ok"``, ``"warning"`` (it works, but less well) or ``"problem"``.
        text: What was found.
        remedy: What to do about it.
    """

    level: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.level:<8} {self.text}{remedy}"


def ok(text: str) -> Finding:
    """A finding that is in order."""
    return Finding(OK, text)


def warning(text: str, remedy: str = "") -> Finding:
    """A finding with which everything works, but less well."""
    return Finding(WARNING, text, remedy)


def problem(text: str, remedy: str = "") -> Finding:
    """A finding with which something does not work."""
    return Finding(PROBLEM, text, remedy)

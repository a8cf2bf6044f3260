"""Numbers as text for readers."""


def counted(number: int, name: str) -> str:
    """A number and what it counts: ``1 channel``, ``3 channels``, ``2 passes``."""
    plural = "es" if name.endswith("s") else "s"
    return f"{number} {name}{'' if number == 1 else plural}"


def duration(seconds: float) -> str:
    """A duration as text: ``"42 s"``, ``"3 min 5 s"``, ``"2 h 10 min"``, ``"3 d 4 h"``."""
    seconds = round(seconds)
    for size, unit, small_size, small_unit in (
        (86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"),
    ):  # fmt: skip
        if seconds >= size:
            small = seconds % size // small_size
            return f"{seconds // size} {unit}" + (f" {small} {small_unit}" if small else "")
    return f"{seconds} s"

"""What a configuration key is: its type, its default, its help text, and the values it may take."""

import dataclasses
import re
from typing import Any, get_args

from nvae_tf.io.errors import ConfigError, short_repr

LARGEST_INT = 2**31 - 1  # whole numbers are TensorFlow's int32
LARGEST_FLOAT = 3e38  # other numbers are float32
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def key(
    default,
    help,
    *,
    minimum=None,
    above=None,
    maximum=None,
    below=None,
    choices=None,
    even=False,
    words=(),
    pattern=None,
):
    """A configuration key: its default, its help text and the values it may take.

    A key with `words` takes one of those in place of a value of its type. A `pattern` is a regular
    expression for a text, and what it stands for in words; such a text may be given as an integer.
    """
    metadata = dict(
        help=help, minimum=minimum, above=above, maximum=maximum, below=below, choices=choices,
        even=even, words=words, pattern=pattern,
    )  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """The base of a recipe's sections: every value is checked, and converted to its key's type."""

    def __post_init__(self):
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises a `ConfigError` unless a value is one of the choices."""
    if value not in choices:
        raise ConfigError(
            f"{name}: {short_repr(value)} is not allowed; expected one of {', '.join(choices)}"
        )


def checked(field: dataclasses.Field, value: Any) -> Any:
    """Converts a value to the field's type, or raises a ConfigError that says what is allowed."""

    def refuse(allowed: str):
        raise ConfigError(
            f"{field.name}: {short_repr(value)} is not allowed; expected {allowed}"
        ) from None

    converted = value
    number, words = number_type(field), field.metadata["words"]
    alternative = f"{', '.join(words)} or " if words else ""
    if isinstance(value, str) and value in words:
        return value
    if value_type(field) is bool:
        converted = BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(converted, bool):
            refuse(alternative + "true or false")
    elif number:
        kind = alternative + ("a whole number" if number is int else "a number")
        try:
            if isinstance(value, bool) or (number is int and isinstance(value, float)):
                raise ValueError
            # Python would read 8_0 as 80, and accept the digits of every script.
            if isinstance(value, str) and not NUMBER.fullmatch(value):
                raise ValueError
            converted = number(value)
        except (ValueError, TypeError, OverflowError):
            refuse(kind + allowed_range(field))
        if not _in_range(field, converted):
            refuse(kind + allowed_range(field))
        largest = LARGEST_INT if number is int else LARGEST_FLOAT
        if not -largest <= converted <= largest:  # NaN is refused, too
            refuse(f"{kind} of at most {largest}")
    else:
        pattern, meaning = field.metadata["pattern"] or (".*", "text")
        if field.metadata["pattern"] and isinstance(value, int) and not isinstance(value, bool):
            converted = str(value)
        if field.metadata["choices"]:
            meaning = f"one of {', '.join(field.metadata['choices'])}"
        if not isinstance(converted, str) or not re.fullmatch(pattern, converted, re.ASCII | re.S):
            refuse(meaning)
    if field.metadata["choices"]:
        check_choice(field.name, converted, field.metadata["choices"])
    return converted


def value_type(field: dataclasses.Field) -> type:
    """The type of a key's values, apart from words that it takes as well."""
    return (get_args(field.type) or (field.type,))[0]


def number_type(field: dataclasses.Field) -> type[int] | type[float] | None:
    """The type of a key's numbers; None if its values are not numbers."""
    return value_type(field) if value_type(field) in (int, float) else None


def _in_range(field: dataclasses.Field, value: float) -> bool:
    limits = field.metadata
    return not (
        (limits["minimum"] is not None and value < limits["minimum"])
        or (limits["above"] is not None and value <= limits["above"])
        or (limits["maximum"] is not None and value > limits["maximum"])
        or (limits["below"] is not None and value >= limits["below"])
        or (limits["even"] and value % 2)
    )


def allowed_range(field: dataclasses.Field) -> str:
    """The limits of a key's values as text to append: ``", at least 1, even"``, or an empty text."""
    limits = field.metadata
    texts = [
        limits["minimum"] is not None and f"at least {limits['minimum']}",
        limits["above"] is not None and f"above {limits['above']}",
        limits["maximum"] is not None and f"at most {limits['maximum']}",
        limits["below"] is not None and f"below {limits['below']}",
        limits["even"] and "even",
    ]
    return "".join(f", {text}" for text in texts if text)

"""What a search may vary: configuration keys and the values that each may take.

A space is a YAML file with a line for each key::

    learning_rate: {float: [1e-3, 3e-2], log: true}
    num_channels_enc: {int: [4, 16], step: 4}
    use_se: {choice: [true, false]}

This module knows no TensorFlow and no keras-tuner.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from nvae_tf.config import KEYS, TRUTHS, check_value, read_yaml
from nvae_tf.io.errors import ConfigError

CHOICE, INT, FLOAT = "choice", "int", "float"
FORMS = "{choice: [A, B, ...]}, {int: [LOW, HIGH], step: N} or {float: [LOW, HIGH], log: true}"


class Dimension(NamedTuple):
    """A configuration key and the values that it may take.

    Attributes:
        name: of the key.
        kind: ``"choice"``, ``"int"`` or ``"float"``.
        values: all of them; of numbers the lowest and the highest.
        step: between whole numbers; None: 1, or of a logarithmic scale.
        log: draw from a logarithmic scale.
    """

    name: str
    kind: str
    values: tuple
    step: int | None = None
    log: bool = False


def load_space(path: Path) -> list[Dimension]:
    """Reads a space.

    Raises:
        ConfigError: it is missing or not understood, or names a key or a value that is not allowed.
    """
    try:
        content = read_yaml(path)
        if not content:
            raise ConfigError("no key to search")
        return [_dimension(name, given) for name, given in content.items()]
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _dimension(name: str, given: Any) -> Dimension:
    def refuse(reason: str):
        raise ConfigError(f"{name}: {reason}; expected {FORMS}") from None

    kinds = [kind for kind in (CHOICE, INT, FLOAT) if isinstance(given, dict) and kind in given]
    if len(kinds) != 1:
        refuse(f"{given!r} is not understood")
    (kind,) = kinds
    options = {key: value for key, value in given.items() if key != kind}
    values, step, log = given[kind], options.pop("step", None), options.pop("log", "false")
    if options:
        refuse(f"{next(iter(options))!r} is not understood")
    if not isinstance(values, list) or not values:
        refuse(f"{values!r} is no list of values")
    values = tuple(check_value(name, value) for value in values)
    if not isinstance(log, str) or log.lower() not in TRUTHS:
        refuse(f"log: {log!r} is not true or false")
    log = TRUTHS[log.lower()]
    if kind == CHOICE:
        if step is not None or log:
            refuse("a choice has no step or log")
        if len(set(values)) != len(values):
            refuse("a value is given twice")
        return Dimension(name, kind, values)
    if KEYS[name][1].type is not {INT: int, FLOAT: float}[kind]:
        refuse(f"its values are no {kind}s")
    if len(values) != 2 or values[0] >= values[1]:
        refuse(f"{list(values)} is no lowest and highest value")
    if step is not None:
        if kind == FLOAT or log or not re.fullmatch("[1-9][0-9]{0,8}", str(step)):
            refuse(f"step {step} is not allowed here")
        step = int(step)
    if log and values[0] <= 0:
        refuse("a logarithmic scale begins above 0")
    return Dimension(name, kind, values, step, log)

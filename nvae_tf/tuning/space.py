"""The space of a search: configuration keys and the values that each may take.

A space is a YAML file with a line for each key::

    learning_rate: {float: [1e-3, 3e-2], log: true}
    num_channels_enc: {int: [4, 16], step: 4}
    use_se: {choice: [true, false]}

This module knows neither TensorFlow nor keras-tuner.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from nvae_tf.config import KEYS, check_value, read_yaml
from nvae_tf.config_keys import BOOLEANS, number_type
from nvae_tf.io.errors import ConfigError

CHOICE, INT, FLOAT = "choice", "int", "float"
# Keys that all trials share: which images are scored and by which measure, how long a trial is, and
# what only concerns speed, memory or the files of a run.
SHARED = (
    "dataset", "data", "image_size", "channels", "bits", "value_range", "alpha", "strict", "crop",
    "seed", "likelihood", "num_x_bits", "epochs", "jit_compile", "gradient_checkpointing",
    "deterministic", "max_bad_steps", "save_every", "log_every", "eval_every", "images_every", "keep",
)  # fmt: skip
CHECKED = 10_000  # values between the ends of a range, which are looked at
FORMS = "{choice: [A, B, ...]}, {int: [LOW, HIGH], step: N} or {float: [LOW, HIGH], log: true}"


class Dimension(NamedTuple):
    """A configuration key and the values that it may take.

    Attributes:
        name: Name of the key.
        kind: ``"choice"``, ``"int"`` or ``"float"``.
        values: All values of a choice; the lowest and the highest of numbers.
        step: Distance between whole numbers; None: 1, or chosen by a logarithmic scale.
        log: Whether to draw from a logarithmic scale.
    """

    name: str
    kind: str
    values: tuple
    step: int | None = None
    log: bool = False


def load_space(path: Path) -> list[Dimension]:
    """Reads a space.

    Args:
        path: Path of the YAML file.

    Returns:
        What may vary, in the order of the file.

    Raises:
        ConfigError: The file is missing or not understood, or names a key that trials share, or a key
            or a value that is not allowed.
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

    if name in SHARED:
        raise ConfigError(
            f"{name}: is the same for all trials, which differ in their model and its training alone; "
            f"choose it with --{name}"
        )
    kinds = [kind for kind in (CHOICE, INT, FLOAT) if isinstance(given, dict) and kind in given]
    if len(kinds) != 1:
        refuse(f"{given!r} is not understood")
    (kind,) = kinds
    options = {key: value for key, value in given.items() if key != kind}
    values, step, log = given[kind], options.pop("step", None), options.pop("log", "false")
    if options:
        refuse(f"{next(iter(options))!r} is not understood")
    if not isinstance(values, list) or not values:
        refuse(f"{values!r} is not a list of values")
    values = tuple(check_value(name, value) for value in values)
    if not isinstance(log, str) or log.lower() not in BOOLEANS:
        refuse(f"log: {log!r} is not true or false")
    log = BOOLEANS[log.lower()]
    if kind == CHOICE:
        if step is not None or log:
            refuse("a choice has no step or log")
        if len(set(values)) != len(values):
            refuse("a value is given twice")
        return Dimension(name, kind, values)
    if number_type(KEYS[name][1]) is not {INT: int, FLOAT: float}[kind]:
        refuse(f"its values are not of type {kind}")
    if any(isinstance(value, str) for value in values):
        refuse("its ends are not numbers")
    if len(values) != 2 or values[0] >= values[1]:
        refuse(f"{list(values)} is not a lowest and a highest value")
    if step is not None:
        if kind == FLOAT or log or not re.fullmatch("[1-9][0-9]{0,8}", str(step)):
            refuse(f"step {step} is not allowed here")
        step = int(step)
    if log and values[0] <= 0:
        refuse("a logarithmic scale begins above 0")
    if kind == INT:
        for value in range(values[0], values[1] + 1, step or 1)[:CHECKED]:
            try:
                check_value(name, value)
            except ConfigError as error:
                raise ConfigError(f"{error}; choose a step that leaves it out") from None
    return Dimension(name, kind, values, step, log)

"""The flags of all commands; each configuration key is a flag of the same name."""

import argparse
import difflib
import itertools
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nvae_tf.config import KEYS, SECTIONS, Overridden, check_value, data_override, load, override
from nvae_tf.config_keys import LARGEST_INT, allowed_range, number_type, value_type
from nvae_tf.io.errors import ConfigError, UserError, one_line
from nvae_tf.io.paths import user_path

TITLES = {"model": "model", "data": "data", "train": "training"}


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line, and accepts no abbreviated flags."""

    def __init__(self, **options):
        super().__init__(**{**options, "allow_abbrev": False})

    def parse_known_args(self, args=None, namespace=None):
        """Parses; refuses a flag that does not exist before it looks for missing ones."""
        words = sys.argv[1:] if args is None else list(args)
        for word in itertools.takewhile(lambda word: word != "--", words):
            flag = word.partition("=")[0]
            if re.match("--?[a-zA-Z]", flag) and " " not in word:
                self._check_flag(flag)
        return super().parse_known_args(words, namespace)

    def error(self, message):
        """Prints the line and exits with status 2."""
        print(f"error: {one_line(message)} (see --help)", file=sys.stderr)
        raise SystemExit(2)

    def _check_flag(self, flag: str) -> None:
        known = {name.lstrip("-"): name for name in self._option_string_actions}
        if flag not in known.values():
            near = difflib.get_close_matches(flag.lstrip("-"), known, 1)
            hint = f"; did you mean {known[near[0]]}?" if near else ""
            self.error(f"unrecognized arguments: {flag}{hint}")


def program(usual: str) -> str:
    """Returns the name of the running command for its help.

    Args:
        usual: Name in a checkout; it is used unless the command was started by an installed name
            such as ``nvae-train``.
    """
    name = Path(sys.argv[0]).name
    return name if name.startswith("nvae-") else usual


def add_config_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds ``--config`` and one flag for every configuration key, grouped by section.

    Args:
        parser: The parser.
        required: Whether ``--config`` has to be given.
    """
    parser.add_argument(
        "--config",
        required=required,
        metavar="NAME|FILE",
        help="recipe: the name of a file in configs/, or the path of a YAML file",
    )
    for part in SECTIONS:
        names = [name for name, (section, _) in KEYS.items() if section == part]
        add_key_flags(parser.add_argument_group(TITLES[part]), names)


def add_key_flags(group, names) -> None:
    """Adds one flag per named configuration key to a parser or to a group of a parser."""
    for name in names:
        _, field = KEYS[name]
        default = "empty" if field.default == "" else field.default
        help_text = f"{field.metadata['help']}{allowed_range(field)} (default: {default})"
        options: dict[str, Any] = dict(
            dest=name, default=argparse.SUPPRESS, help=help_text.replace("%", "%%")
        )
        if value_type(field) is bool and field.metadata["words"]:
            metavar = "|".join(["true", "false", *field.metadata["words"]])
            options.update(nargs="?", const=True, metavar=metavar)
            group.add_argument(
                f"--no-{name}", dest=name, action="store_const", const=False,
                default=argparse.SUPPRESS, help=f"the same as --{name} false",
            )  # fmt: skip
        elif value_type(field) is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.metadata["choices"]:
            options["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
        else:
            kind = {int: "N", float: "X", None: "TEXT"}[number_type(field)]
            options["metavar"] = "|".join([kind, *field.metadata["words"]])
        group.add_argument(f"--{name}", **options)


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the configuration keys that were given as flags, and their values.

    Raises:
        ConfigError: A value is not allowed.
    """
    given = {name: value for name, value in vars(arguments).items() if name in KEYS}
    given.update(data_override(given.get("data")))
    try:
        return {name: check_value(name, value) for name, value in given.items()}
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None


def configured(arguments: argparse.Namespace) -> Overridden:
    """Reads the recipe of ``--config`` and changes the keys that were given as flags.

    Raises:
        ConfigError: The recipe or a value is not allowed, or values do not go together.
    """
    recipe, given = load(arguments.config), overrides(arguments)
    try:
        return override(recipe, given)
    except ConfigError as error:
        if error.keys[0] in given:
            raise ConfigError(f"--{error}") from None
        flags = " and ".join(f"--{name}" for name in error.keys if name in given)
        raise ConfigError(f"{flags} with {arguments.config}: {error}") from None


def named_folder(arguments: argparse.Namespace) -> Path:
    """Returns the folder ROOT/SAVE of the flags; SAVE is the configuration's name by default.

    Raises:
        UserError: The folder would not be in ROOT.
    """
    name = arguments.save or Path(arguments.config).stem
    outside = Path(name).is_absolute() or ".." in Path(name).parts or name.startswith("~")
    if outside or name in ("", "."):
        raise UserError(f"--save: {name!r} is not allowed; expected the name of a folder in --root")
    return user_path(arguments.root) / user_path(name)


class FlagRelation(NamedTuple):
    """A flag that has an effect only beside others, or only without them.

    Attributes:
        name: Name of the flag.
        choices: The choices for which this holds.
        others: Names of the other flags.
        needed: Whether one of the others is needed; if not, none of them may be given.
    """

    name: str
    choices: tuple[str, ...]
    others: tuple[str, ...]
    needed: bool


def parse_for_choice(
    parser: Parser,
    argv: list[str] | None,
    choice: str,
    used: Mapping[str, Iterable[str]],
    relations: Iterable[FlagRelation] = (),
) -> argparse.Namespace:
    """Parses the arguments of a command that does one of several things.

    A flag that the chosen one does not use ends the command, as every other mistake in a flag.

    Args:
        parser: The parser.
        argv: Arguments of the command; None: those of the process.
        choice: Name of the argument that chooses: ``"--eval_mode"``, for example.
        used: Names of the flags that only some choices use, by the choices that use them.
        relations: Flags that have an effect only beside others, or only without them.
    """
    not_given = object()
    names = list(dict.fromkeys(itertools.chain(*used.values())))
    arguments = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, not_given)))
    chosen = getattr(arguments, choice.lstrip("-"))
    given = {name for name in names if getattr(arguments, name) is not not_given}
    for name, choices, others, needed in relations:
        if name in given and chosen in choices and bool(given & set(others)) != needed:
            flags = " or ".join(f"--{other}" for other in others)
            parser.error(f"--{name}: has no effect {'without' if needed else 'beside'} {flags}")
    for name in names:
        if getattr(arguments, name) is not not_given and name not in used[chosen]:
            title = f"{choice} {chosen}" if choice.startswith("-") else chosen
            users = listed([other for other in used if name in used[other]])
            parser.error(f"--{name}: not for {title}; it is for {users}")
        if getattr(arguments, name) is not_given:
            default = parser.get_default(name)
            if default is argparse.SUPPRESS:
                delattr(arguments, name)
            else:
                setattr(arguments, name, default)
    return arguments


def listed(names: list[str]) -> str:
    """Names as a part of a sentence: ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def nonempty(text: str) -> str:
    """A flag's type: a name or a path. A variable of the shell that is not set gives an empty text."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text is not allowed; expected a name or a path")
    return text


def at_least(minimum: int, maximum: int = LARGEST_INT):
    """Returns a flag's type: whole numbers from `minimum` to `maximum`, that of 32 bits by default."""

    def whole_number(text: str) -> int:
        if not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(
                f"{text[:20]} is not allowed; expected {minimum} to {maximum}"
            )
        return int(text)

    return whole_number


def positive(text: str) -> float:
    """A flag's type: a finite number above 0."""
    if not 0.0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text[:20]} is not allowed; expected a number above 0")
    return float(text)


def portion(text: str) -> float:
    """A flag's type: a number from 0 to 1."""
    if not 0.0 <= float(text) <= 1.0:
        raise argparse.ArgumentTypeError(
            f"{text[:20]} is not allowed; expected a number from 0 to 1"
        )
    return float(text)

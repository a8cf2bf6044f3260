"""Flags made from the configuration's keys: each key is a flag of the same name."""

import argparse
import sys

from nvae_tf.config import KEYS, SECTIONS, allowed_range

TITLES = {"model": "model", "data": "data", "train": "training"}


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line."""

    def error(self, message):
        """Prints the line and exits with status 2."""
        print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config`` and one flag for every configuration key, grouped by section."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME|FILE",
        help="recipe: the name of a file in configs/, or the path of a YAML file",
    )
    groups = {part: parser.add_argument_group(TITLES[part]) for part in SECTIONS}
    for name, (part, field) in KEYS.items():
        help_text = f"{field.metadata['help']}{allowed_range(field)} (default: {field.default})"
        options = dict(dest=name, default=argparse.SUPPRESS, help=help_text.replace("%", "%%"))
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.metadata["choices"]:
            options["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
        else:
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[field.type]
        groups[part].add_argument(f"--{name}", **options)


def overrides(arguments: argparse.Namespace) -> dict:
    """The configuration keys that were given as flags, values still as text."""
    return {name: value for name, value in vars(arguments).items() if name in KEYS}

"""The command ``nvae-doctor``."""

import sys

from nvae_tf.cli.errors import SOFTWARE_ERROR, run_command
from nvae_tf.cli.flags import Parser, add_config_flags, configured, overrides, program
from nvae_tf.data.where import check_data
from nvae_tf.diagnosis.findings import LEVELS, OK, PROBLEM, WARNING, Finding
from nvae_tf.io.errors import UserError, one_line
from nvae_tf.io.text import counted


def main(argv: list[str] | None = None) -> int:
    """Says whether this machine can train, and what to do if not.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0, 1 if there is a problem, or 2 for a mistake in the arguments.
    """
    parser = Parser(
        prog=program("nvae-doctor"),
        usage="%(prog)s [--config NAME [--KEY VALUE ...]]",
        description="Say whether this machine can train: versions, GPUs, libraries, XLA, memory, "
        "limits, other workers. With a recipe, say whether it fits, too.",
    )
    add_config_flags(parser, required=False)
    arguments = parser.parse_args(argv)

    def command():
        config = configured(arguments).config if arguments.config else None
        if config is None and (given := overrides(arguments)):
            raise UserError(f"--{next(iter(given))}: changes a recipe; name that with --config")
        if config is not None:
            check_data(config.data)
        from nvae_tf.diagnosis.checks import diagnose

        counts = dict.fromkeys(LEVELS, 0)
        for finding in diagnose(config):
            counts[finding.level] += 1
            print(one_line(str(finding)), flush=True)
        level = PROBLEM if counts[PROBLEM] else WARNING if counts[WARNING] else OK
        text = ", ".join(counted(counts[level], level) for level in (PROBLEM, WARNING))
        print(Finding(level, text, "do what the lines above say" if level != OK else ""))
        return SOFTWARE_ERROR if counts[PROBLEM] else 0

    return run_command(command, if_interrupted="nothing was changed")


if __name__ == "__main__":
    sys.exit(main())

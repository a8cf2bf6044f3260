"""The command ``nvae-inspect``."""

import sys

from nvae_tf import config as configuration
from nvae_tf.cli.chatter import keep_out
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import Parser, add_key_flags, nonempty, overrides, positive, program
from nvae_tf.io.files import check_writable
from nvae_tf.io.paths import user_path

KEYS = (
    "dataset", "data", "image_size", "channels", "bits", "value_range", "alpha", "crop", "flip",
    "strict", "num_x_bits", "batch_size", "seed",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Shows what training will see of a data set.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake or failure, which one line on standard error explains.
    """
    parser = Parser(
        prog=program("nvae-inspect"),
        description="Show what training will see of a data set.",
    )
    add_key_flags(parser, KEYS)
    parser.add_argument(
        "--output",
        type=nonempty,
        default="inspect.png",
        metavar="FILE",
        help="picture (default: inspect.png)",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=3.0,
        help="how long to measure the throughput (default: 3)",
    )
    arguments = parser.parse_args(argv)
    if argv is None:  # this process is the command
        keep_out()

    def command():
        config = configuration.from_dict(overrides(arguments))
        picture = user_path(arguments.output)
        check_writable(picture)
        # TensorFlow takes seconds to import: only after the flags are known to be right.
        from nvae_tf.data.preview import preview

        preview(config, picture, arguments.seconds)

    return run_command(command, if_interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main())

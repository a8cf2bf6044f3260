"""The command ``nvae-decompress``."""

import dataclasses
import json
import sys

from nvae_tf.cli.chatter import keep_out
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import Parser, nonempty, program
from nvae_tf.evaluation.locate import locate
from nvae_tf.io.paths import user_path


def main(argv: list[str] | None = None) -> int:
    """Writes the images of a file that ``nvae-compress`` wrote.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake or failure, which one line on standard error explains.
    """
    parser = Parser(
        prog=program("nvae-decompress"),
        description="Write the images of a file that nvae-compress wrote, as PNGs.",
    )
    parser.add_argument(
        "--checkpoint",
        type=nonempty,
        required=True,
        metavar="PATH",
        help="the model that the file was made with: a run's folder, or one of its checkpoints",
    )
    parser.add_argument("--input", type=nonempty, required=True, metavar="FILE", help="the file")
    parser.add_argument(
        "--output",
        type=nonempty,
        required=True,
        metavar="DIR",
        help="the folder for the images; it must be empty",
    )
    arguments = parser.parse_args(argv)
    if argv is None:  # this process is the command
        keep_out()
    return run_command(_decompress, arguments, if_interrupted="nothing was written")


def _decompress(arguments) -> None:
    locate(arguments.checkpoint)
    # TensorFlow takes seconds to import: only after the flags are known to be right.
    from nvae_tf.compression.fingerprint import use_one_thread

    use_one_thread()
    import tensorflow as tf

    from nvae_tf.compression import file_format
    from nvae_tf.compression.files import decompress
    from nvae_tf.evaluation import loading

    path, folder = user_path(arguments.input), user_path(arguments.output)
    file_format.read(path)  # a damaged file is refused before the model is loaded
    with tf.device("CPU"):
        model = loading.load(arguments.checkpoint).model
        report = decompress(model, path, folder)
    print(f"written: {report.images} images to {folder}")
    print_report(report)


def print_report(report) -> None:
    """Prints where the bits of a file are, as the last line: JSON."""
    print(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    sys.exit(main())

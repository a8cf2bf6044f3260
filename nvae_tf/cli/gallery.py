"""The command ``nvae-gallery``."""

import shlex
import sys
import time

from nvae_tf.cli.chatter import keep_out
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import Parser, at_least, nonempty, program
from nvae_tf.evaluation.gallery.amounts import NUM_IMAGES
from nvae_tf.evaluation.locate import locate
from nvae_tf.io.files import check_writable, write_text
from nvae_tf.io.paths import user_path


def main(argv: list[str] | None = None) -> int:
    """Shows a trained model in one HTML file.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake or failure, which one line on standard error explains.
    """
    parser = Parser(
        prog=program("nvae-gallery"),
        description="Show a trained model in one HTML file.",
    )
    parser.add_argument(
        "run",
        type=nonempty,
        help="the folder of a run, one of its checkpoints, or an official .pt file",
    )
    parser.add_argument(
        "--output",
        type=nonempty,
        metavar="FILE",
        help="the page (default: gallery.html in the run's folder)",
    )
    parser.add_argument("--data", metavar="DIR", help="where the data set is now")
    parser.add_argument("--seed", type=at_least(0), default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--num_images",
        type=at_least(1),
        default=NUM_IMAGES,
        metavar="N",
        help="test images for the KL of each group, and for likelihoods if this step was not evaluated "
        f"(default: {NUM_IMAGES})",
    )
    arguments = parser.parse_args(argv)
    if argv is None:  # this process is the command
        keep_out()

    def command():
        location = locate(arguments.run).path
        folder = location if location.is_dir() else location.parent
        # Before minutes of computing, not after them.
        path = user_path(arguments.output) if arguments.output else folder / "gallery.html"
        check_writable(path)
        # TensorFlow takes seconds to import: only after the flags are known to be right.
        from nvae_tf.evaluation.gallery.page import build

        start = time.monotonic()
        words = ["nvae-gallery", *(sys.argv[1:] if argv is None else argv)]
        page = build(
            arguments.run,
            arguments.data,
            arguments.seed,
            arguments.num_images,
            command=shlex.join(words),
        )
        write_text(path, page)
        megabytes, seconds = len(page.encode()) / 1e6, time.monotonic() - start
        print(f"written: {path} ({megabytes:.1f} MB, {seconds:.0f} s)")

    return run_command(command, if_interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main())

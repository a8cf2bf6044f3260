"""The command ``nvae-prepare``."""

import sys
from pathlib import Path

from nvae_tf.cli.chatter import keep_out
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import Parser, at_least, portion, program
from nvae_tf.config import CENTRE, CROPS, SPLIT_SEED, VALIDATION_PORTION
from nvae_tf.io.errors import UserError
from nvae_tf.io.paths import is_regular, user_path


def main(argv: list[str] | None = None) -> int:
    """Prepares a data set.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake or failure, which one line on standard error explains.
    """
    arguments = _parser().parse_args(argv)
    if argv is None:  # this process is the command
        keep_out()
    return run_command(
        lambda: _prepare(arguments), if_interrupted="the same command continues from here"
    )


def _parser() -> Parser:
    parser = Parser(
        prog=program("nvae-prepare"),
        description="Write images as tfrecords in GLOW's layout.",
    )
    parser.add_argument(
        "source",
        choices=("images", "celeba", "ffhq", "lsun", "tar"),
        help="images: any folder of image files; celeba: aligned images and their split file; ffhq: "
        "the 1024x1024 PNGs; lsun: a scene's LMDBs; tar: GLOW's celeba-tfr.tar or "
        "imagenet-oord-tfr.tar, which is only unpacked",
    )
    parser.add_argument("--input", required=True, metavar="PATH", help="folder, or the tar")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the tfrecords")
    parser.add_argument(
        "--size",
        type=at_least(8),
        metavar="N",
        help="side of the images in pixels, a power of two (celeba: 64, ffhq: 256)",
    )
    parser.add_argument(
        "--crop",
        choices=CROPS,
        default=CENTRE,
        help="images: centre square; random: cropped anew on every visit of training; none: the whole "
        "image is squeezed into the square (default: centre)",
    )
    parser.add_argument(
        "--validation",
        type=portion,
        default=VALIDATION_PORTION,
        metavar="X",
        help="images and ffhq: portion held out at random (default: 0.1)",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=SPLIT_SEED,
        metavar="N",
        help="seed of that draw (default: 0)",
    )
    return parser


def _prepare(arguments) -> None:
    # TensorFlow takes seconds to import: only after the flags are known to be right.
    from nvae_tf.data import prepare as preparing

    source, output = user_path(arguments.input), user_path(arguments.output)
    if arguments.source == "tar":
        if not is_regular(source):
            raise UserError(f"{source}: no such file; --input names the tar")
        _report(preparing.unpack(source, output), output)
        return
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; --input names the folder of the images")
    size = arguments.size or {"celeba": 64, "ffhq": 256}.get(arguments.source)
    if not size or size & (size - 1) or size > preparing.LARGEST_SIZE:
        raise UserError(
            f"--size: {size} is not allowed; expected a power of two, 8 to {preparing.LARGEST_SIZE}"
        )
    settings = {"source": arguments.source, "size": size}
    if arguments.source in ("images", "ffhq"):
        chosen = ("crop", "validation", "seed")
        settings.update({name: getattr(arguments, name) for name in chosen})
    if arguments.source == "celeba":
        items = preparing.celeba_items(source, size)
    elif arguments.source == "lsun":
        items = preparing.lsun_items(source, size)
    else:
        items = preparing.image_items(
            source, size, arguments.crop, arguments.validation, arguments.seed
        )
    manifest = preparing.prepare(items, size, output, settings)
    _report(manifest["counts"], output)
    if manifest["unreadable"]:
        listed = output / preparing.MANIFEST
        print(f"skipped {len(manifest['unreadable'])} unreadable images, listed in {listed}")


def _report(counts: dict[str, int], output: Path) -> None:
    print("written: " + ", ".join(f"{count} images in {name}" for name, count in counts.items()))
    print(f"tfrecords: {output}")


if __name__ == "__main__":
    sys.exit(main())

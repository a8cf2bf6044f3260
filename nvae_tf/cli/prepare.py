"""The command ``nvae-prepare``."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from nvae_tf.cli.chatter import keep_out
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import (
    Parser,
    add_key_flags,
    at_least,
    nonempty,
    overrides,
    parse_for_choice,
    portion,
    program,
)
from nvae_tf.config import CENTRE, CROPS, SPLIT_SEED, VALIDATION_PORTION, DataConfig, check_value
from nvae_tf.io.errors import ConfigError, UserError
from nvae_tf.io.paths import is_regular, user_path

FOLDER_KEYS = ("channels", "bits", "value_range", "alpha", "strict")
FLAGS = {  # of the sources, apart from those of all
    "images": ("size", "crop", *FOLDER_KEYS, "validation", "seed"),
    "celeba": ("size",),
    "ffhq": ("size", "crop", "validation", "seed"),
    "lsun": ("size",),
    "tar": (),
}
USUAL_SIZES = {"celeba": "64", "ffhq": "256", "images": "0"}


def main(argv: list[str] | None = None) -> int:
    """Prepares a data set.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake or failure, which one line on standard error explains.
    """
    arguments = parse_for_choice(_parser(), argv, "source", FLAGS)
    if argv is None:  # this process is the command
        keep_out()
    return run_command(_prepare, arguments, if_interrupted="the same command continues from here")


def _parser() -> Parser:
    parser = Parser(
        prog=program("nvae-prepare"),
        description="Write images as tfrecords in GLOW's layout.",
    )
    parser.add_argument(
        "source",
        choices=tuple(FLAGS),
        help="images: any folder of image files; celeba: aligned images and their split file; ffhq: "
        "the 1024x1024 PNGs; lsun: a scene's LMDBs; tar: GLOW's celeba-tfr.tar or "
        "imagenet-oord-tfr.tar, which is only unpacked",
    )
    parser.add_argument(
        "--input", type=nonempty, required=True, metavar="PATH", help="folder, or the tar"
    )
    parser.add_argument(
        "--output", type=nonempty, required=True, metavar="DIR", help="folder of the tfrecords"
    )
    parser.add_argument(
        "--size",
        metavar="N|WxH",
        help="size of the images in pixels: their side (64), or for images also width x height "
        "(96x64). Default: celeba 64, ffhq 256, images: the largest multiple of 32 up to 256 that "
        "90%% of them reach",
    )
    parser.add_argument(
        "--crop",
        choices=CROPS,
        default=CENTRE,
        help="images and ffhq: cut to the centre; random: cropped anew on every visit of training; "
        "none: the whole image is squeezed into the size (default: centre)",
    )
    add_key_flags(parser.add_argument_group("images"), FOLDER_KEYS)
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
        help="images and ffhq: seed of that draw (default: 0)",
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
    if arguments.source == "images" and _is_within(output, source):
        raise UserError(
            f"--output: {output} would put tfrecords among the images of {source}; name a folder "
            "elsewhere"
        )
    task = _task(arguments, source, preparing)
    for line in task.lines:
        print(line, flush=True)
    manifest = preparing.prepare(task, output)
    _report(manifest["counts"], output)
    if manifest["skipped"]:
        from nvae_tf.data.survey import count_kinds, first_lines
        from nvae_tf.io.text import counted

        skipped, listed = manifest["skipped"], output / preparing.MANIFEST
        kinds = count_kinds(skipped.values())
        print(f"skipped: {counted(len(skipped), 'image')} ({kinds}), listed in {listed}")
        for line in first_lines([f"{name}: {kind}" for name, kind in skipped.items()]):
            print(line)


def _is_within(output: Path, source: Path) -> bool:
    """Whether what is written would be in the folder of the images, or below it."""
    folder = os.path.realpath(source)
    written = (os.path.realpath(output / split) for split in ("train", "validation"))
    return any(Path(path).is_relative_to(folder) for path in written)


def _task(arguments, source: Path, preparing):
    """What the flags ask to prepare."""
    size = arguments.size or USUAL_SIZES.get(arguments.source)
    if size is None:
        raise UserError(f"--size is needed for {arguments.source}: 64, 128 or 256")
    try:
        config = DataConfig(image_size=check_value("image_size", size))
    except ConfigError:
        raise UserError(
            f"--size: {size} is not allowed; expected a side (64), or width x height (96x64)"
        ) from None
    if config.size:
        preparing.check_size(config.size)
    settings = {"source": arguments.source}
    if arguments.source in ("images", "ffhq"):
        chosen = ("crop", "validation", "seed")
        settings.update({name: getattr(arguments, name) for name in chosen})
    if arguments.source == "images":
        given = {name: v for name, v in overrides(arguments).items() if name in FOLDER_KEYS}
        config = replace(config, data=str(source), crop=arguments.crop, **given)
        return preparing.folder_task(config, arguments.validation, arguments.seed, settings)
    side, width = config.size or (0, 0)
    if side != width or not side or side & (side - 1):
        raise UserError(
            f"--size: {size} is not allowed for {arguments.source}; expected a power of two"
        )
    if arguments.source == "celeba":
        return preparing.celeba_task(source, side, settings)
    if arguments.source == "lsun":
        return preparing.lsun_task(source, side, settings)
    return preparing.faces_task(source, side, arguments.validation, arguments.seed, settings)


def _report(counts: dict[str, int], output: Path) -> None:
    print("written: " + ", ".join(f"{count} images in {name}" for name, count in counts.items()))
    print(f"tfrecords: {output}")


if __name__ == "__main__":
    sys.exit(main())

"""The command ``evaluate_keras.py``."""

from collections.abc import Callable
from typing import NamedTuple

from nvae_tf.cli import measure, ood, show, tile
from nvae_tf.cli.chatter import keep_out
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import (
    FlagRelation,
    Parser,
    at_least,
    nonempty,
    parse_for_choice,
    positive,
    program,
)
from nvae_tf.cli.measure import FID_SAMPLES, GRID_IMAGES
from nvae_tf.cli.model import READJUSTING_BATCH, READJUSTING_BATCHES
from nvae_tf.evaluation.locate import locate
from nvae_tf.io.errors import UserError
from nvae_tf.io.paths import user_path


class Mode(NamedTuple):
    """What ``--eval_mode`` names.

    Attributes:
        run: The function that does it.
        flags: The flags that it uses, apart from those that all modes use.
    """

    run: Callable
    flags: tuple[str, ...] = ()


IMAGES = ("eval_on_train", "images", "indices")
DRAWN = ("num_iw_samples", "iw_chunk")
READJUSTED = ("readjust_bn", "readjust_batches")
MODES = {
    "evaluate": Mode(measure.evaluate, ("eval_on_train", *DRAWN, "likelihood")),
    "sample": Mode(measure.sample, ("temp", *READJUSTED, "num_samples", "format")),
    "fid_stats": Mode(measure.fid_stats, ("inception",)),
    "evaluate_fid": Mode(
        measure.evaluate_fid, ("temp", *READJUSTED, "num_samples", "inception", "fid_stats")
    ),
    "reconstruct": Mode(show.reconstruct, IMAGES),
    "interpolate": Mode(show.interpolate, (*IMAGES, "temp", "num_samples", "steps", "animation")),
    "traverse": Mode(show.traverse, (*IMAGES, "temp", "steps", "groups")),
    "encode": Mode(show.encode, ("eval_on_train", "images", "groups")),
    "export": Mode(show.export, ("readjust_temps", "readjust_batches")),
    "card": Mode(show.card),
    "tiles": Mode(tile.tiles, ("images", "stride", "groups")),
    "ood": Mode(
        ood.ood,
        (
            "eval_on_train",
            "images",
            *DRAWN,
            "against",
            "against_data",
            "max_images",
            "fit_images",
        ),
    ),
}
RELATIONS = (
    FlagRelation("eval_on_train", ("reconstruct", "encode", "ood"), ("images",), False),
    FlagRelation("eval_on_train", ("interpolate", "traverse"), ("indices",), True),
    FlagRelation("num_samples", ("interpolate",), ("images", "indices"), False),
    FlagRelation("temp", ("interpolate",), ("images", "indices"), False),
    FlagRelation("readjust_batches", ("sample", "evaluate_fid"), ("readjust_bn",), True),
    FlagRelation("readjust_batches", ("export",), ("readjust_temps",), True),
)
DRAWS = {"ood": 10}  # of z for each image, where they are not USUAL_DRAWS
USUAL_DRAWS = 100
LONGEST_ROW = 10_000  # images, which are in memory together


def main(argv: list[str] | None = None) -> int:
    """Evaluates a model.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake or failure, which one line on standard error explains.
    """
    flags = {name: mode.flags for name, mode in MODES.items()}
    arguments = parse_for_choice(_parser(), argv, "--eval_mode", flags, RELATIONS)
    if arguments.num_iw_samples is None:
        arguments.num_iw_samples = DRAWS.get(arguments.eval_mode, USUAL_DRAWS)
    if argv is None:  # this process is the command
        keep_out()

    def run():
        locate(arguments.checkpoint)
        for path in map(user_path, arguments.images or ()):
            if not path.exists():
                raise UserError(f"--images: {path}: no such file or folder")
        # TensorFlow takes seconds to import: only after the flags are known to be right.
        from nvae_tf.engine.devices import local_strategy

        with local_strategy(arguments.world_size).scope():
            MODES[arguments.eval_mode].run(arguments)

    return run_command(run, if_interrupted="no half-written file is left")


def _parser() -> Parser:
    parser = Parser(
        prog=program("evaluate_keras.py"),
        description="Likelihood, samples, FID, outliers, latents and exports of a trained NVAE.",
    )
    parser.add_argument(
        "--checkpoint",
        type=nonempty,
        required=True,
        metavar="PATH",
        help="a run's folder, one of its checkpoints, or a .pt file of the official implementation",
    )
    parser.add_argument(
        "--eval_mode",
        choices=tuple(MODES),
        default="evaluate",
        help="default: evaluate, the likelihood; fid_stats makes the statistics of the data that "
        "evaluate_fid compares with",
    )
    parser.add_argument(
        "--output",
        type=nonempty,
        metavar="DIR",
        help="folder for the results (default: the run's folder)",
    )
    parser.add_argument("--seed", type=at_least(0), default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--batch_size",
        type=at_least(1),
        metavar="N",
        help="images per batch (default: 100)",
        default=100,
    )
    parser.add_argument(
        "--world_size",
        type=at_least(1),
        metavar="N",
        help="GPUs of this machine that share each batch, with the same results as one alone "
        "(default: all)",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="where the data set is (default: where training had it)"
    )

    def add(group, name: str, help: str, **options) -> None:
        """Adds a flag that some modes use."""
        modes = ", ".join(mode for mode, (_, flags) in MODES.items() if name in flags)
        group.add_argument(f"--{name}", help=f"{modes}: {help}", **options)

    images = parser.add_argument_group("which images")
    add(
        images,
        "eval_on_train",
        "the training images instead of the test images",
        action="store_true",
    )
    add(
        images,
        "images",
        "image files and folders of them, instead of the data set; tiles: image files of any size",
        nargs="+",
        type=nonempty,
        metavar="PATH",
    )
    add(
        images,
        "indices",
        "indices of images, from 0",
        nargs="+",
        type=at_least(0),
        metavar="N",
    )
    likelihood = parser.add_argument_group("likelihood")
    add(
        likelihood,
        "num_iw_samples",
        "draws of z for each image; the paper's numbers take 1000 (default: "
        f"{USUAL_DRAWS}; ood: {DRAWS['ood']})",
        type=at_least(1),
        metavar="K",
    )
    add(
        likelihood,
        "iw_chunk",
        "draws of an image computed at once; more is faster and takes more memory (default: 1)",
        type=at_least(1),
        default=1,
        metavar="N",
    )
    add(
        likelihood,
        "likelihood",
        "which probabilities of colour pixels to report (default: those of training)",
        choices=("official", "exact", "both"),
    )
    outliers = parser.add_argument_group("outliers")
    add(
        outliers,
        "against",
        "images to tell from the test images: a folder, or the name of a data set of the same size "
        "(default: none; the test images or --images are ranked and outliers among them marked)",
        metavar="DIR|DATASET",
    )
    add(
        outliers,
        "against_data",
        "where the data set that --against names is, if it needs a folder",
        type=nonempty,
        metavar="DIR",
    )
    add(
        outliers,
        "max_images",
        "images of each set; of a larger set, N at equal distances (default: 500)",
        type=at_least(2),
        default=500,
        metavar="N",
    )
    add(
        outliers,
        "fit_images",
        "training images that typicality is fitted to, at equal distances (default: 500)",
        type=at_least(2),
        default=500,
        metavar="N",
    )
    sampling = parser.add_argument_group("samples")
    add(sampling, "temp", "temperature (default: 1.0)", type=positive, default=1.0, metavar="T")
    add(
        sampling,
        "num_samples",
        f"images to draw (default: {GRID_IMAGES}; evaluate_fid: {FID_SAMPLES}); interpolate: pairs of "
        "images (default: 1)",
        type=at_least(1),
        metavar="N",
    )
    add(
        sampling,
        "format",
        "also write every sample: as PNG files, or as one .npz array (default: none)",
        choices=("none", "png", "npz"),
        default="none",
    )
    add(
        sampling,
        "readjust_bn",
        "first replace batch norm's statistics by those of samples at this temperature",
        action="store_true",
    )
    add(
        sampling,
        "readjust_temps",
        "bake in batch-norm statistics readjusted for samples at these temperatures",
        nargs="+",
        type=positive,
        default=[],
        metavar="T",
    )
    add(
        sampling,
        "readjust_batches",
        f"batches of {READJUSTING_BATCH} samples for such statistics (default: "
        f"{READJUSTING_BATCHES})",
        type=at_least(1),
        default=READJUSTING_BATCHES,
        metavar="N",
    )
    fid = parser.add_argument_group("FID")
    add(
        fid,
        "inception",
        "Inception's weights: pytorch-fid's .pth file, or the frozen graph of 2015 or its archive "
        "(default: the .pth file in Keras's cache, fetched once)",
        type=nonempty,
        metavar="FILE",
    )
    add(
        fid,
        "fid_stats",
        "statistics of the data, from --eval_mode fid_stats or from pytorch-fid",
        type=nonempty,
        metavar="FILE",
    )
    latents = parser.add_argument_group("latents and tiles")
    add(
        latents,
        "steps",
        "images in a row, both ends included (default: 10)",
        type=at_least(2, LONGEST_ROW),
        default=10,
        metavar="N",
    )
    add(
        latents,
        "animation",
        "kind of the animation beside the strip (default: gif)",
        choices=("gif", "webp"),
        default="gif",
    )
    add(
        latents,
        "groups",
        "latent groups, 0 the coarsest (default: all; for tiles: none)",
        nargs="+",
        type=at_least(0),
        metavar="N",
    )
    add(
        latents,
        "stride",
        "pixels from a tile to the next (default: half a tile)",
        type=at_least(1),
        metavar="N",
    )
    return parser

"""The command ``evaluate_keras.py``."""

from nvae_tf.cli import measure, ood, show, tile
from nvae_tf.cli.chatter import keep_out
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import Parser, at_least, positive, program
from nvae_tf.cli.measure import FID_SAMPLES, GRID_IMAGES, READJUSTING_BATCH, READJUSTING_BATCHES
from nvae_tf.evaluation.locate import locate

MODES = {
    "evaluate": measure.evaluate,
    "sample": measure.sample,
    "fid_stats": measure.fid_stats,
    "evaluate_fid": measure.evaluate_fid,
    "reconstruct": show.reconstruct,
    "interpolate": show.interpolate,
    "traverse": show.traverse,
    "encode": show.encode,
    "export": show.export,
    "card": show.card,
    "tiles": tile.tiles,
    "ood": ood.ood,
}
DRAWS = {"ood": 10}  # of z for each image, where they are not USUAL_DRAWS
USUAL_DRAWS = 100


def main(argv: list[str] | None = None) -> int:
    """Evaluates a model.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake or failure, which one line on standard error explains.
    """
    arguments = _parser().parse_args(argv)
    if arguments.num_iw_samples is None:
        arguments.num_iw_samples = DRAWS.get(arguments.eval_mode, USUAL_DRAWS)
    if argv is None:  # this process is the command
        keep_out()

    def run():
        locate(arguments.checkpoint)
        # TensorFlow takes seconds to import: only after the flags are known to be right.
        from nvae_tf.engine.devices import local_strategy

        with local_strategy(arguments.world_size).scope():
            MODES[arguments.eval_mode](arguments)

    return run_command(run, if_interrupted="no half-written file is left")


def _parser() -> Parser:
    parser = Parser(
        prog=program("evaluate_keras.py"),
        description="Likelihood, samples, FID, outliers, latents and exports of a trained NVAE.",
    )
    parser.add_argument(
        "--checkpoint",
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
        "--output", metavar="DIR", help="folder for the results (default: the run's folder)"
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
    images = parser.add_argument_group("which images (modes that look at images)")
    images.add_argument(
        "--data", metavar="DIR", help="where the data set is (default: where training had it)"
    )
    images.add_argument(
        "--eval_on_train",
        action="store_true",
        help="evaluate, reconstruct, interpolate, traverse, encode, ood: the training images instead "
        "of the test images",
    )
    images.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="reconstruct, interpolate, traverse, encode, ood: image files and folders of them, "
        "instead of the data set; tiles: image files of any size",
    )
    images.add_argument(
        "--indices",
        nargs="+",
        type=at_least(0),
        metavar="N",
        help="reconstruct, interpolate, traverse, encode: indices of images, from 0",
    )
    likelihood = parser.add_argument_group("evaluate and ood")
    likelihood.add_argument(
        "--num_iw_samples",
        type=at_least(1),
        metavar="K",
        help="draws of z for each image; the paper's numbers take 1000 (default: "
        f"{USUAL_DRAWS}; ood: {DRAWS['ood']})",
    )
    likelihood.add_argument(
        "--iw_chunk",
        type=at_least(1),
        default=1,
        metavar="N",
        help="draws of an image computed at once; more is faster and takes more memory (default: 1)",
    )
    likelihood.add_argument(
        "--likelihood",
        choices=("official", "exact", "both"),
        help="which probabilities of colour pixels to report (default: those of training)",
    )
    outliers = parser.add_argument_group("ood")
    outliers.add_argument(
        "--against",
        metavar="DIR|DATASET",
        help="images to tell from the test images: a folder, or the name of a data set of the same "
        "size (default: none; the test images or --images are ranked and outliers among them marked)",
    )
    outliers.add_argument(
        "--against_data",
        metavar="DIR",
        help="where the data set that --against names is, if it needs a folder",
    )
    outliers.add_argument(
        "--max_images",
        type=at_least(2),
        default=500,
        metavar="N",
        help="images of each set; of a larger set, N at equal distances (default: 500)",
    )
    outliers.add_argument(
        "--fit_images",
        type=at_least(2),
        default=500,
        metavar="N",
        help="training images that typicality is fitted to, at equal distances (default: 500)",
    )
    sampling = parser.add_argument_group("sample, evaluate_fid, interpolate and traverse")
    sampling.add_argument(
        "--temp", type=positive, default=1.0, metavar="T", help="temperature (default: 1.0)"
    )
    sampling.add_argument(
        "--readjust_bn",
        action="store_true",
        help="sample, evaluate_fid: first replace batch norm's statistics by those of samples at "
        "this temperature",
    )
    sampling.add_argument(
        "--readjust_batches",
        type=at_least(1),
        default=READJUSTING_BATCHES,
        metavar="N",
        help=f"batches of {READJUSTING_BATCH} samples for that (default: {READJUSTING_BATCHES})",
    )
    sampling.add_argument(
        "--num_samples",
        type=at_least(1),
        metavar="N",
        help=f"images to draw (default: {GRID_IMAGES}; for FID {FID_SAMPLES})",
    )
    sampling.add_argument(
        "--format",
        choices=("none", "png", "npz"),
        default="none",
        help="sample: also write every sample: as PNG files, or as one .npz array (default: none)",
    )
    fid = parser.add_argument_group("fid_stats and evaluate_fid")
    fid.add_argument(
        "--inception",
        metavar="FILE",
        help="Inception's weights: pytorch-fid's .pth file, or the frozen graph of 2015 or its "
        "archive (default: the .pth file in Keras's cache, fetched once)",
    )
    fid.add_argument(
        "--fid_stats",
        metavar="FILE",
        help="statistics of the data, from --eval_mode fid_stats or from pytorch-fid",
    )
    latents = parser.add_argument_group("interpolate, traverse and encode")
    latents.add_argument(
        "--steps",
        type=at_least(2),
        default=10,
        metavar="N",
        help="images in a row, both ends included (default: 10)",
    )
    latents.add_argument(
        "--animation",
        choices=("gif", "webp"),
        default="gif",
        help="kind of the animation beside the strip (default: gif)",
    )
    latents.add_argument(
        "--groups",
        nargs="+",
        type=at_least(0),
        metavar="N",
        help="latent groups, 0 the coarsest (default: all)",
    )
    tiles = parser.add_argument_group("tiles")
    tiles.add_argument(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="pixels from a tile to the next (default: half a tile)",
    )
    export = parser.add_argument_group("export")
    export.add_argument(
        "--readjust_temps",
        nargs="+",
        type=positive,
        default=[],
        metavar="T",
        help="bake in batch-norm statistics readjusted for samples at these temperatures",
    )
    return parser

"""The command ``nvae-compress``."""

import sys
from dataclasses import replace

from nvae_tf.cli.chatter import keep_out
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import Parser, at_least, nonempty, program
from nvae_tf.evaluation.locate import locate
from nvae_tf.io.errors import UserError
from nvae_tf.io.paths import user_path


def main(argv: list[str] | None = None) -> int:
    """Writes images into a file without loss.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake or failure, which one line on standard error explains.
    """
    arguments = _parser().parse_args(argv)
    if argv is None:  # this process is the command
        keep_out()
    return run_command(_compress, arguments, if_interrupted="nothing was written")


def _compress(arguments) -> None:
    locate(arguments.checkpoint)
    # TensorFlow takes seconds to import: only after the flags are known to be right.
    from nvae_tf.compression.fingerprint import use_one_thread

    use_one_thread()
    import tensorflow as tf

    from nvae_tf.cli.decompress import print_report
    from nvae_tf.compression.files import compress
    from nvae_tf.compression.network import check_can_code
    from nvae_tf.evaluation import loading

    with tf.device("CPU"):
        loaded = loading.load(arguments.checkpoint)
        check_can_code(loaded.model)
        path = user_path(arguments.output)
        report = compress(loaded.model, _pictures(arguments, loaded), path)
    print(f"written: {path}")
    print_report(report)


def _pictures(arguments, loaded):
    """The images that the flags name."""
    from nvae_tf.compression.pictures import FolderPictures, dataset_pictures
    from nvae_tf.config import DataConfig, data_override
    from nvae_tf.data import catalog

    model, trained_on = loaded.model, loaded.config.data
    folder, own = user_path(arguments.input), arguments.input == trained_on.dataset
    if folder.is_dir() and not own:
        if arguments.data is not None:
            raise UserError("--data: is for a data set, and --input is a folder")
        max_level = 1 if model.image.binary else 2**model.num_bits - 1
        return FolderPictures(folder, model.image, max_level, arguments.limit)
    data = trained_on if own else DataConfig(dataset=arguments.input)
    data = replace(data, **data_override(arguments.data))
    try:
        dataset = catalog.get_dataset_info(data)
    except UserError as error:
        raise UserError(f"--input: no such folder, nor a data set: {error}") from None
    if dataset.image != model.image:
        raise UserError(
            f"--input: the images of {arguments.input} are not of the model's size and kind, "
            f"{model.image.size_text}; nothing is resized or converted"
        )
    _, test = dataset.open(data.data)
    return dataset_pictures(test, dataset, model.num_bits, arguments.seed, arguments.limit)


def _parser() -> Parser:
    parser = Parser(
        prog=program("nvae-compress"),
        description="Write images into a file without loss, with a trained model as the codec.",
    )
    parser.add_argument(
        "--checkpoint",
        type=nonempty,
        required=True,
        metavar="PATH",
        help="a run's folder, or one of its checkpoints",
    )
    parser.add_argument(
        "--input",
        type=nonempty,
        required=True,
        metavar="DIR|DATASET",
        help="a folder of PNGs of exactly the model's size, or the name of a data set, whose test "
        "images are taken",
    )
    parser.add_argument(
        "--output", type=nonempty, required=True, metavar="FILE", help="the file to write"
    )
    parser.add_argument("--data", metavar="DIR", help="where the data set is")
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="the first N images alone (default: all)"
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=1,
        metavar="N",
        help="seed with which a data set of binary images is binarised (default: 1)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

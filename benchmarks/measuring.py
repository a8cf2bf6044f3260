"""Functions that the benchmarks share: a recipe's model with random weights, images, memory, output."""

import json
import resource

import nvae_tf  # noqa: F401 - chooses the Keras that TensorFlow shows
from nvae_tf import config as configuration
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import Parser, add_config_flags, configured

GIB = 2.0**30


def make_parser(description: str) -> Parser:
    """A parser with the flags of a recipe."""
    parser = Parser(description=description)
    add_config_flags(parser)
    return parser


def run(parser: Parser, measure, words: list[str] | None = None) -> int:
    """Measures, and prints the result as one line of JSON.

    Args:
        parser: A parser from `make_parser`.
        measure: Function from the configuration and the parsed flags to the result, a dictionary.
        words: The command line; default: the process's.

    Returns:
        The exit status.
    """
    arguments = parser.parse_args(words)

    def work():
        config = configured(arguments).config
        print(json.dumps(measure(config, arguments)))

    return run_command(work, if_interrupted="nothing is kept")


def fresh_model(config: configuration.Config, kind=None):
    """The recipe's model with random weights.

    Args:
        config: The recipe.
        kind: A class derived from `NVAE`; default: `NVAE` itself.
    """
    from nvae_tf.data import catalog
    from nvae_tf.model import NVAE

    precision = config.train.precision.removeprefix("mixed_")
    return (kind or NVAE)(config.model, catalog.get_dataset_info(config.data).image, precision)


def random_images(model, count: int):
    """Images of noise; the cost of a step does not depend on their content."""
    import tensorflow as tf

    images = tf.random.uniform((count, *model.image.shape))
    return tf.round(images) if model.image.binary else images


def peak_memory_gib() -> float:
    """The peak of the device's memory on a GPU, otherwise that of this process's resident memory."""
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB

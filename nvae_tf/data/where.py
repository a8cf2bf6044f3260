"""What ``--data`` has to name for each data set, and where to get it. Does not import TensorFlow."""

import re

from nvae_tf.config import DataConfig
from nvae_tf.io.errors import UserError

# Keras fetches the data sets that are not listed here.
_BUNDLED = ("digits", "digits_grey", "photos")  # with scikit-learn and scikit-image
_NEEDED = {
    "omniglot": "fetch chardata.mat of the IWAE release; --data names its folder",
    "celeba_64": "fetch CelebA's aligned images and prepare them with "
    "'nvae-prepare celeba'; --data names the folder that it writes",
    "celeba_256": "fetch celeba-tfr.tar of GLOW's release (github.com/openai/glow) and unpack it; "
    "--data names its folder",
    "imagenet_(32|64)": "fetch imagenet-oord-tfr.tar of GLOW's release (github.com/openai/glow) and "
    "unpack it; --data names its folder",
    "ffhq": "fetch FFHQ's PNGs of 1024x1024 and prepare them with "
    "'nvae-prepare ffhq'; --data names the folder that it writes",
    "lsun_(bedroom|church|tower)_(64|128|256)": "fetch the scene's LMDBs and prepare them with "
    "'nvae-prepare lsun'; --data names the folder that it writes",
    "images": "--data names the folder of your images",
    "tfrecords": "--data names the folder of the tfrecords",
}


def check_data(config: DataConfig) -> None:
    """Checks that ``--data`` is given if the data set needs it, and not if it would be ignored.

    Args:
        config: Section ``data`` of the configuration.

    Raises:
        UserError: The data set needs a folder and the configuration does not name one, or it reads none
            and the configuration does.
    """
    if config.dataset in _BUNDLED and config.data:
        raise UserError(
            f"{config.dataset} reads no folder, so leave out --data {config.data}; for the images "
            "there say --dataset images (docs/data.md)"
        )
    advice = _advice(config.dataset)
    if advice and not config.data:
        raise UserError(f"{config.dataset} needs --data: {advice} (docs/data.md)")


def needs_data(dataset: str) -> bool:
    """Whether a data set needs ``--data``, because it cannot be fetched automatically."""
    return _advice(dataset) is not None


def _advice(dataset: str) -> str | None:
    """Where to get a data set that cannot be fetched automatically; None if it can be."""
    advice = [line for pattern, line in _NEEDED.items() if re.fullmatch(pattern, dataset)]
    return advice[0] if advice else None

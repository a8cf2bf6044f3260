"""What ``--data`` has to name for each data set, and where that comes from; knows no TensorFlow."""

import re

from nvae_tf.config import DataConfig
from nvae_tf.io.errors import UserError

# Those that are missing here come with scikit-learn or are fetched by Keras.
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
    """Says what to fetch, where a data set is to be read that cannot be fetched for the user.

    Raises:
        UserError: The data set needs a folder and the configuration names none.
    """
    if config.data:
        return
    for name, what in _NEEDED.items():
        if re.fullmatch(name, config.dataset):
            raise UserError(f"{config.dataset} needs --data: {what} (docs/data.md)")

"""What `import nvae_tf` offers beside classes: a trained model from wherever it is."""

import json
import zipfile
from pathlib import Path

from nvae_tf.evaluation import loading
from nvae_tf.io.errors import UserError, short_message
from nvae_tf.io.paths import is_regular, user_path
from nvae_tf.model import NVAE

LARGEST_KERAS_CONFIG = 1_000_000  # bytes of the configuration in a .keras file; ours has 2,000


def load(path: str) -> NVAE:
    """Loads a trained model.

    Args:
        path: Path of a run's folder; of a checkpoint in it, ``checkpoints/step-N``; of an official
            ``.pt`` file; or of a ``.keras`` file that `NVAE.save` wrote.

    Returns:
        The model with its trained weights; with moving averages, if training kept them. It has to be
        compiled before it is trained or scored by Keras's methods.

    Raises:
        UserError: There is no trained model at the path, or it is damaged.
    """
    given = user_path(str(path))
    if given.suffix == ".keras":
        return _load_keras(given)
    for folder in (given, *sorted(given.glob("[0-9]*"))):
        if is_regular(folder / "saved_model.pb"):
            raise UserError(
                f"{given}: an export, which is no NVAE any more but a program with signatures: load it "
                f"with tf.saved_model.load({str(folder)!r}) (docs/serving.md), or name the run"
            )
    return loading.load(str(path)).model


def _load_keras(path: Path) -> NVAE:
    """Reads a ``.keras`` file: values for the weights of an `NVAE`, and nothing that could run."""
    if not is_regular(path):
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo("config.json")
            if member.file_size > LARGEST_KERAS_CONFIG:
                raise ValueError(f"a configuration of {member.file_size} bytes")
            content = json.loads(archive.read(member))
        if content["class_name"] != "NVAE":
            raise ValueError(f"a {str(content['class_name'])[:40]}, not an NVAE")
        model = NVAE.from_config(content["config"])
        model.load_weights(path)
    except Exception as error:  # noqa: BLE001 - a damaged archive raises what it likes
        raise UserError(f"{path}: not readable as a saved NVAE ({short_message(error)})") from None
    return model

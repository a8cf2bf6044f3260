"""A trained model from a run's folder, one of its checkpoints, or an official PyTorch file."""

from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from nvae_tf import config as configuration
from nvae_tf import torch_import
from nvae_tf.config import Config
from nvae_tf.data import catalog
from nvae_tf.errors import UserError
from nvae_tf.model import NVAE
from nvae_tf.run_folder import RunFolder


class Loaded(NamedTuple):
    """A trained model and where it comes from.

    Attributes:
        model: with its weights, in float32.
        config: that it was trained with.
        step: training steps that it took.
        folder: where results belong: the run's folder, or that of the PyTorch file.
    """

    model: NVAE
    config: Config
    step: int
    folder: Path


def load(path: str, data_overrides: dict | None = None) -> Loaded:
    """Loads a trained model.

    Args:
        path: a run's folder; or a checkpoint in it, with or without ``.index``; or an official
            ``.pt`` file.
        data_overrides: configuration keys that say where the data is now.

    Raises:
        UserError: nothing of the kind is there, or it is damaged.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        folder = RunFolder(given)
        checkpoint = tf.train.latest_checkpoint(str(folder.checkpoints))
        if not checkpoint:
            raise UserError(f"{given}: no checkpoint here; name the folder of a run (ROOT/SAVE)")
    elif given.with_suffix(".index").is_file():
        checkpoint, folder = str(given.with_suffix("")), RunFolder(given.parent.parent)
    elif given.is_file():
        return _load_official(given, data_overrides)
    else:
        raise UserError(f"{given}: no such run, checkpoint or PyTorch file")
    config = configuration.from_dict(
        data_overrides or {}, configuration.load(str(folder.config_file))
    )
    model = NVAE(config.model, catalog.describe(config.data).image)
    step = tf.Variable(0, dtype=tf.int64)
    # The optimiser's slots and the singular vectors stay unread.
    saved = tf.train.Checkpoint(model=model, optimizer=tf.train.Checkpoint(_iterations=step))
    try:
        saved.restore(checkpoint).assert_existing_objects_matched().expect_partial()
    except Exception as error:  # noqa: BLE001 - a damaged file raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint}: this checkpoint cannot be restored ({reason})") from None
    return Loaded(model, config, int(step), folder.path)


def _load_official(path: Path, data_overrides) -> Loaded:
    official = torch_import.read(path)
    config = configuration.from_dict(data_overrides or {}, official.config)
    model = NVAE(config.model, catalog.describe(config.data).image)
    torch_import.load_state(model, official.state)
    return Loaded(model, config, official.step, path.parent)

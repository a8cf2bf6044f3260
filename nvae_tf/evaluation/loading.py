"""A trained model from a run's folder, one of its checkpoints, or an official PyTorch file."""

from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from nvae_tf import config as configuration
from nvae_tf import torch_import
from nvae_tf.checkpoint_files import check_rows, has_part, restore_newest
from nvae_tf.config import Config
from nvae_tf.data import catalog
from nvae_tf.evaluation.locate import locate
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError
from nvae_tf.io.paths import is_regular
from nvae_tf.model import NVAE
from nvae_tf.run_folder import CHECKPOINT_PREFIX, RunFolder


class LoadedModel(NamedTuple):
    """A trained model and where it comes from.

    Attributes:
        model: The model with its trained weights, in float32.
        config: The configuration that it was trained with.
        step: Number of training steps that it took.
        folder: Path of the folder for results: the run's folder, or that of the PyTorch file.
        file: Name of the PyTorch file; None for a run.
    """

    model: NVAE
    config: Config
    step: int
    folder: Path
    file: str | None = None


def load(path: str, data_overrides: dict | None = None) -> LoadedModel:
    """Loads a trained model.

    Args:
        path: Path of a run's folder; of a checkpoint in it, ``checkpoints/step-N``; or of an official
            ``.pt`` file.
        data_overrides: Configuration keys of the data that replace those of training.

    Raises:
        UserError: There is no trained model at the path, or it is damaged.
    """
    location = locate(path)
    if not location.checkpoints:
        return _load_official(location.path, data_overrides)
    folder = RunFolder(location.path)
    if not is_regular(folder.config_file):
        raise UserError(
            f"{folder.config_file}: no such file, and without it the run's model is not known; put it "
            "back, or name another run"
        )
    config = configuration.from_dict(
        data_overrides or {}, configuration.load(str(folder.config_file))
    )
    model = NVAE(config.model, _image(config, folder))
    step = tf.Variable(0, dtype=tf.int64)

    def restore(path: Path) -> None:
        check_rows(path, {"model/row_names": model.row_names})
        # The optimiser's slots and the singular vectors are not read.
        _read(path, model=model, optimizer=tf.train.Checkpoint(iterations=step))
        if config.train.ema_decay and has_part(path / CHECKPOINT_PREFIX, "averages"):
            _read(path, averages=tf.train.Checkpoint(stacks=model.trainable_variables))

    restore_newest(location.checkpoints, restore)
    return LoadedModel(model, config, int(step.numpy()), folder.path)


def _image(config: Config, folder: RunFolder) -> ImageSpec:
    if config.data.dataset == catalog.OWN:
        return folder.own_images()["image"]
    return catalog.get_dataset_info(config.data).image


def _read(path: Path, **parts) -> None:
    """Restores parts of the trainer from a checkpoint.

    Args:
        path: Path of the checkpoint.
        **parts: Objects to restore, by their attribute names in the trainer.
    """
    saved = tf.train.Checkpoint(trainer=tf.train.Checkpoint(**parts))
    # `expect_partial` first: it keeps TensorFlow from listing what is left over, if the check fails.
    saved.read(str(path / CHECKPOINT_PREFIX)).expect_partial().assert_existing_objects_matched()


def _load_official(path: Path, data_overrides) -> LoadedModel:
    official = torch_import.read(path)
    config = configuration.from_dict(data_overrides or {}, official.config)
    model = NVAE(config.model, catalog.get_dataset_info(config.data).image)
    torch_import.load_state(model, official.state)
    return LoadedModel(model, config, official.step, path.parent, path.name)

"""NVAE (Vahdat & Kautz, NeurIPS 2020) in TensorFlow.

The package computes with Keras 2 (the ``tf-keras`` package), because Keras 3 has no training under
``MultiWorkerMirroredStrategy``. Which Keras ``tf.keras`` shows is left to the process: the two work
side by side, imported in any order.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

from nvae_tf.version import __version__

if TYPE_CHECKING:
    from nvae_tf import config
    from nvae_tf.api import load, train
    from nvae_tf.config import Config, DataConfig, ModelConfig, TrainConfig, list_recipes
    from nvae_tf.image_spec import ImageSpec
    from nvae_tf.model import NVAE
    from nvae_tf.training import callbacks
    from nvae_tf.training.optimizers import Adamax

# What `import nvae_tf` offers, and the modules that are imported when a name is first used: TensorFlow
# takes seconds.
_MODULES = {
    "Adamax": "nvae_tf.training.optimizers",
    "Config": "nvae_tf.config",
    "DataConfig": "nvae_tf.config",
    "ImageSpec": "nvae_tf.image_spec",
    "ModelConfig": "nvae_tf.config",
    "NVAE": "nvae_tf.model",
    "TrainConfig": "nvae_tf.config",
    "list_recipes": "nvae_tf.config",
    "load": "nvae_tf.api",
    "train": "nvae_tf.api",
}

_SUBMODULES = {"callbacks": "nvae_tf.training.callbacks", "config": "nvae_tf.config"}

__all__ = [
    "Adamax",
    "Config",
    "DataConfig",
    "ImageSpec",
    "ModelConfig",
    "NVAE",
    "TrainConfig",
    "__version__",
    "callbacks",
    "config",
    "list_recipes",
    "load",
    "train",
]

if "tensorflow" not in sys.modules:  # which reads this when it is imported
    # TensorFlow turns oneDNN's convolutions on by itself only on some CPUs; where AVX2 is all there is,
    # training steps take half the time with them.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(_SUBMODULES[name])
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__():
    return sorted({*globals(), *_MODULES, *_SUBMODULES})

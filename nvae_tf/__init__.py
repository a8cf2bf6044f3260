"""NVAE (Vahdat & Kautz, NeurIPS 2020) in TensorFlow.

The package uses the Keras 2 API (the ``tf-keras`` package), because Keras 3's ``fit`` does not run
under ``MultiWorkerMirroredStrategy``. TensorFlow decides which Keras it shows the first time
``tf.keras`` is used, so import ``nvae_tf`` before that, or set ``TF_USE_LEGACY_KERAS=1``.
"""

import os
import sys

from nvae_tf.version import __version__

__all__ = ["__version__"]

os.environ["TF_USE_LEGACY_KERAS"] = "1"
# TensorFlow's C++ start-up chatter (missing CUDA, CPU features) would bury our one-line messages.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# TensorFlow turns oneDNN's convolutions on by itself only on some CPUs; where AVX2 is all there is,
# training steps take half the time with them.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

if "tensorflow" in sys.modules:
    _layer = sys.modules["tensorflow"].keras.layers.Layer
    if _layer.__module__.startswith("keras."):
        raise ImportError(
            "nvae_tf needs the Keras 2 API, but Keras 3 is already active in this process: import "
            "nvae_tf before using tf.keras, or set TF_USE_LEGACY_KERAS=1 before Python starts"
        )

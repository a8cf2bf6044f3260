"""NVAE (Vahdat & Kautz, NeurIPS 2020) in TensorFlow.

The package computes with Keras 2 (the ``tf-keras`` package), because Keras 3 has no training under
``MultiWorkerMirroredStrategy``. Which Keras ``tf.keras`` shows is left to the process: the two work
side by side, imported in any order.
"""

import os
import sys

from nvae_tf.version import __version__

__all__ = ["__version__"]

if "tensorflow" not in sys.modules:  # which reads this when it is imported
    # TensorFlow turns oneDNN's convolutions on by itself only on some CPUs; where AVX2 is all there is,
    # training steps take half the time with them.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

"""Features of images from the Inception graph of 2015, which published FIDs rest on."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from nvae_tf.errors import UserError

ARCHIVE = "http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz"
GRAPH = "classify_image_graph_def.pb"
INPUT, OUTPUT = "Mul:0", "pool_3:0"  # after the graph's own resize and scaling; 2048 features
SIZE = 299

Features = Callable[[np.ndarray], np.ndarray]


def load(path: str | None) -> Features:
    """Loads the graph.

    Args:
        path: of the graph, or of the archive that it comes in.

    Returns:
        A function from 8-bit images (n, height, width, 1 or 3) to features (n, 2048). Images are
        resized as the PyTorch port does, whose FIDs are the published ones: bilinear with half-pixel
        centres, without antialiasing.

    Raises:
        UserError: no path, no such file, or not that graph.
    """
    if not path:
        raise UserError(
            f"FID needs the Inception graph of 2015: fetch {ARCHIVE} and give --inception its path"
        )
    given = Path(path).expanduser()
    try:
        content = _from_archive(given) if tarfile.is_tarfile(given) else given.read_bytes()
        graph = tf.compat.v1.GraphDef.FromString(content)
        network = tf.compat.v1.wrap_function(
            lambda images: tf.import_graph_def(
                graph, input_map={INPUT: images}, return_elements=[OUTPUT]
            ),
            [tf.TensorSpec((None, SIZE, SIZE, 3))],
        )
    except OSError as error:
        raise UserError(f"{given}: cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - protobuf and TensorFlow raise many kinds
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{given}: not the Inception graph ({reason}); fetch {ARCHIVE}") from None

    def features(images: np.ndarray) -> np.ndarray:
        values = tf.cast(images, tf.float32)
        values = tf.broadcast_to(values, (*images.shape[:3], 3))
        scaled = (tf.image.resize(values, (SIZE, SIZE)) - 128.0) / 128.0
        (found,) = network(scaled)
        return tf.reshape(found, [len(images), -1]).numpy()

    return features


def _from_archive(path: Path) -> bytes:
    with tarfile.open(path) as archive:
        for member in archive:
            if Path(member.name).name == GRAPH and member.isfile():
                return archive.extractfile(member).read()
    raise UserError(f"{path}: holds no {GRAPH}; fetch {ARCHIVE}")

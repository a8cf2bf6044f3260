"""Features of images from the Inception network of 2015, which published FIDs rest on.

Its weights come in two forms: the original frozen graph, and the PyTorch port that pytorch-fid uses and
that published FIDs of NVAE come from. The port is what is fetched where no file is given.
"""

import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow.python.framework import op_def_registry

from nvae_tf.engine.devices import on_devices, shard, unshard
from nvae_tf.io import torch_file
from nvae_tf.io.errors import UserError, short_message, short_repr
from nvae_tf.io.files import download_errors
from nvae_tf.io.paths import is_regular, user_path

PORT = "pt_inception-2015-12-05-6726825d.pth"
PORT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PORT_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{PORT}"
GRAPH = "classify_image_graph_def.pb"
INPUT, OUTPUT = "Mul:0", "pool_3:0"  # after the graph's own resize and scaling; 2048 features
SIZE = 299
LARGEST_GRAPH = 2**29  # bytes; the real one has 95 million
EPSILON = 1e-3  # of the network's batch norms

Features = Callable[[np.ndarray], np.ndarray]


def load(path: str | None) -> Features:
    """Loads the network.

    Args:
        path: of the PyTorch port, of the frozen graph, or of the archive that the graph comes in;
            None: the port in Keras's cache, fetched once and verified.

    Returns:
        A function from 8-bit images (n, height, width, 1 or 3) to features (n, 2048). Images are
        resized as the port does: bilinear with half-pixel centres, without antialiasing.

    Raises:
        UserError: no such file, not that network, or the download failed.
    """
    given = user_path(path) if path else _fetch()
    if not is_regular(given):
        raise UserError(f"{given}: cannot be read (no such file)")
    try:
        if given.suffix == ".pth":
            return from_port(torch_file.arrays(torch_file.load(given), given))
        return _from_graph(
            _from_archive(given) if tarfile.is_tarfile(given) else given.read_bytes()
        )
    except OSError as error:
        raise UserError(f"{given}: cannot be read ({error.strerror})") from None
    except Exception as error:  # noqa: BLE001 - protobuf and TensorFlow raise many kinds
        raise UserError(
            f"{given}: not the Inception network of 2015 ({short_message(error)}); fetch {PORT_URL}"
        ) from None


def from_port(state: dict[str, np.ndarray]) -> Features:
    """Features from the weights of the PyTorch port.

    Args:
        state: arrays by the port's keys.

    Raises:
        UserError: a weight is missing or of the wrong shape.
    """
    plain = tf_keras.applications.InceptionV3(
        include_top=False, weights=None, input_shape=(SIZE, SIZE, 3), pooling="avg"
    )
    # The one place where the network of 2015 differs: its last block pools maxima.
    last = [m for m in plain.layers if isinstance(m, tf_keras.layers.AveragePooling2D)][-1]
    network = tf_keras.models.clone_model(
        plain,
        clone_function=lambda layer: (
            tf_keras.layers.MaxPooling2D(3, 1, "same")
            if layer is last
            else type(layer).from_config(layer.get_config())
        ),
    )
    convolutions = _of_kind(network, tf_keras.layers.Conv2D)
    norms = _of_kind(network, tf_keras.layers.BatchNormalization)
    for name, convolution, norm in zip(_port_names(), convolutions, norms, strict=True):
        keys = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        missing = [key for key in keys if f"{name}.{key}" not in state]
        if missing:
            raise UserError(f"{name}.{missing[0]} is missing")
        kernel, scale, offset, mean, variance = (state[f"{name}.{key}"] for key in keys)
        kernel = np.transpose(kernel, (2, 3, 1, 0))
        if kernel.shape != convolution.kernel.shape or mean.shape != norm.moving_mean.shape:
            raise UserError(f"{name}.conv.weight is of another shape")
        # Keras's norms here have no scale: it goes into the kernel, with the deviation.
        factor = scale / np.sqrt(variance + EPSILON)
        convolution.set_weights([kernel * factor])
        norm.set_weights([offset, mean * factor, np.full_like(variance, 1.0 - EPSILON)])
    return _features(lambda images: network(images / 127.5 - 1.0, training=False))


def _from_graph(content: bytes) -> Features:
    graph = _between(tf.compat.v1.GraphDef.FromString(content))
    _check_computes_alone(graph)

    def network(images):
        (found,) = tf.graph_util.import_graph_def(
            graph, input_map={INPUT: (images - 128.0) / 128.0}, return_elements=[OUTPUT]
        )
        return tf.reshape(found, [tf.shape(images)[0], -1])

    features = _features(network)
    features(np.zeros((1, SIZE, SIZE, 3), np.uint8))  # a graph without these tensors fails here
    return features


def _between(graph):
    """The part of a graph from `INPUT` to `OUTPUT`, without the decoding of JPEG before it."""
    first, last = (name.partition(":")[0] for name in (INPUT, OUTPUT))
    for node in graph.node:
        if node.name == first:
            node.Clear()
            node.name, node.op = first, "Placeholder"
            node.attr["dtype"].type = tf.float32.as_datatype_enum
    return tf.compat.v1.graph_util.extract_sub_graph(graph, [last])


def _check_computes_alone(graph) -> None:
    """Refuses a graph that does more than compute with numbers.

    A graph is a program: it may hold operations that read and write files, whose names are strings.
    """
    numbers = (tf.float16, tf.float32, tf.float64, tf.uint8, tf.int32, tf.int64, tf.bool)
    if graph.library.function:
        raise UserError("a graph with functions of its own")
    for node in graph.node:
        operation = op_def_registry.get(node.op)
        if operation is None or (operation.is_stateful and node.op != "CheckNumerics"):
            raise UserError(f"a graph with the operation {short_repr(node.op)}")
        fixed = [argument.type for argument in (*operation.input_arg, *operation.output_arg)]
        given = [value.type for value in node.attr.values() if value.type]
        listed = [kind for value in node.attr.values() for kind in value.list.type]
        if any(kind and tf.dtypes.as_dtype(kind) not in numbers for kind in fixed + given + listed):
            raise UserError(
                f"a graph with the operation {short_repr(node.op)} on other than numbers"
            )


def _features(network) -> Features:
    """Makes features of 8-bit images from a network on (n, 299, 299, 3) values of 0 to 255."""

    def resized(images):
        values = tf.image.resize(tf.cast(images, tf.float32), (SIZE, SIZE))
        return network(tf.broadcast_to(values, [tf.shape(images)[0], SIZE, SIZE, 3]))

    run = on_devices(resized)
    return lambda images: unshard(run(shard(images)), len(images)).numpy()


def _of_kind(network, kind):
    """Layers of a kind in the order of their creation, which the numbers in their names tell."""
    layers = [layer for layer in network.layers if isinstance(layer, kind)]
    return sorted(layers, key=lambda layer: int((re.findall(r"_(\d+)$", layer.name) or [0])[0]))


def _port_names() -> list[str]:
    """The port's convolutions in the order in which Keras creates the same ones."""
    double = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
    blocks = {
        ("5b", "5c", "5d"): ["branch1x1", "branch5x5_1", "branch5x5_2", *double, "branch_pool"],
        ("6a",): ["branch3x3", *double],
        ("6b", "6c", "6d", "6e"): [
            "branch1x1",
            *[f"branch7x7_{i}" for i in (1, 2, 3)],
            *[f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)],
            "branch_pool",
        ],
        ("7a",): ["branch3x3_1", "branch3x3_2", *[f"branch7x7x3_{i}" for i in (1, 2, 3, 4)]],
        ("7b", "7c"): [
            *["branch1x1", "branch3x3_1", "branch3x3_2a", "branch3x3_2b"],
            *["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a", "branch3x3dbl_3b"],
            "branch_pool",
        ],
    }
    stem = [f"Conv2d_{name}" for name in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
    mixed = [
        f"Mixed_{block}.{name}"
        for group, names in blocks.items()
        for block in group
        for name in names
    ]
    return stem + mixed


def _fetch() -> Path:
    with download_errors(
        "the Inception network", f"fetch {PORT_URL} and give --inception its path"
    ):
        return Path(
            tf_keras.utils.get_file(
                PORT,
                PORT_URL,
                cache_subdir="models",
                file_hash=PORT_SHA256,
                hash_algorithm="sha256",
            )
        )


def _from_archive(path: Path) -> bytes:
    with tarfile.open(path) as archive:
        for member in archive:
            if Path(member.name).name == GRAPH and member.isfile():
                content = archive.extractfile(member)
                assert content is not None  # of a regular file
                if member.size > LARGEST_GRAPH:
                    raise UserError(f"{GRAPH} of {member.size} bytes")
                return content.read()
    raise UserError(f"holds no {GRAPH}")

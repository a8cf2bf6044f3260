"""Features of images from the Inception network of 2015, with which published FIDs were computed.

Its weights exist in two forms: the original frozen graph, and the PyTorch port of pytorch-fid, which
gave the published FIDs of NVAE. If no file is given, the port is downloaded.
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
INPUT, OUTPUT = "Mul:0", "pool_3:0"  # the image after the graph's resize and scaling; 2048 features
SIZE = 299  # height and width of the network's input
MAX_GRAPH_SIZE = 2**29  # bytes; the real graph has 95 million
EPSILON = 1e-3  # added to variances by the network's batch norms

Features = Callable[[np.ndarray], np.ndarray]


def load(path: str | None) -> Features:
    """Loads the network.

    Args:
        path: Path of the PyTorch port, of the frozen graph, or of the archive that the graph was
            published in. None: the port in Keras's cache, which is downloaded once and verified.

    Returns:
        A function from 8-bit images (n, height, width, 1 or 3) to features (n, 2048). Images are
        resized as in the port: bilinear with half-pixel centres, without antialiasing.

    Raises:
        UserError: There is no such file, it is not that network, or the download failed.
    """
    file = user_path(path) if path else _fetch()
    if not is_regular(file):
        raise UserError(f"{file}: cannot be read (no such file)")
    try:
        if file.suffix == ".pth":
            return from_port(torch_file.arrays(torch_file.load(file), file))
        return _from_graph(_from_archive(file) if tarfile.is_tarfile(file) else file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except Exception as error:  # noqa: BLE001 - protobuf and TensorFlow raise many kinds
        raise UserError(
            f"{file}: not the Inception network of 2015 ({short_message(error)}); fetch {PORT_URL}"
        ) from None


def from_port(state: dict[str, np.ndarray]) -> Features:
    """Builds the network with the weights of the PyTorch port.

    Args:
        state: Arrays by the port's keys.

    Returns:
        A function as for `load`.

    Raises:
        UserError: A weight is missing or has the wrong shape.
    """
    keras_network = tf_keras.applications.InceptionV3(
        include_top=False, weights=None, input_shape=(SIZE, SIZE, 3), pooling="avg"
    )
    # Keras's network differs in one place: in 2015 the last block had max pooling.
    poolings = _layers_of_type(keras_network, tf_keras.layers.AveragePooling2D)
    network = tf_keras.models.clone_model(
        keras_network,
        clone_function=lambda layer: (
            tf_keras.layers.MaxPooling2D(3, 1, "same")
            if layer is poolings[-1]
            else type(layer).from_config(layer.get_config())
        ),
    )
    convolutions = _layers_of_type(network, tf_keras.layers.Conv2D)
    norms = _layers_of_type(network, tf_keras.layers.BatchNormalization)
    for name, convolution, norm in zip(_port_names(), convolutions, norms, strict=True):
        keys = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        missing = [key for key in keys if f"{name}.{key}" not in state]
        if missing:
            raise UserError(f"{name}.{missing[0]} is missing")
        kernel, scale, offset, mean, variance = (state[f"{name}.{key}"] for key in keys)
        kernel = np.transpose(kernel, (2, 3, 1, 0))
        if kernel.shape != convolution.kernel.shape or mean.shape != norm.moving_mean.shape:
            raise UserError(f"{name}.conv.weight has the wrong shape")
        # Batch norms of this network have no scale in Keras: the kernel is multiplied by it instead,
        # and divided by the standard deviation.
        factor = scale / np.sqrt(variance + EPSILON)
        convolution.set_weights([kernel * factor])
        norm.set_weights([offset, mean * factor, np.full_like(variance, 1.0 - EPSILON)])
    return _features(lambda images: network(images / 127.5 - 1.0, training=False))


def _from_graph(content: bytes) -> Features:
    graph = _extract_network(tf.compat.v1.GraphDef.FromString(content))
    _check_only_computes(graph)

    def network(images):
        (features,) = tf.graph_util.import_graph_def(
            graph, input_map={INPUT: (images - 128.0) / 128.0}, return_elements=[OUTPUT]
        )
        return tf.reshape(features, [tf.shape(images)[0], -1])

    features = _features(network)
    features(np.zeros((1, SIZE, SIZE, 3), np.uint8))  # fails now if the graph lacks these tensors
    return features


def _extract_network(graph):
    """The part of a graph from `INPUT` to `OUTPUT`, without the decoding of JPEG files before it."""
    input_node, output_node = (name.partition(":")[0] for name in (INPUT, OUTPUT))
    for node in graph.node:
        if node.name == input_node:
            node.Clear()
            node.name, node.op = input_node, "Placeholder"
            node.attr["dtype"].type = tf.float32.as_datatype_enum
    return tf.compat.v1.graph_util.extract_sub_graph(graph, [output_node])


def _check_only_computes(graph) -> None:
    """Refuses a graph that does more than compute with numbers.

    A graph is a program: it may hold operations that read and write files, whose names are strings.

    Raises:
        UserError: It holds functions, stateful operations, or values that are not numbers.
    """
    numeric = (tf.float16, tf.float32, tf.float64, tf.uint8, tf.int32, tf.int64, tf.bool)
    if graph.library.function:
        raise UserError("a graph with functions in it")
    for node in graph.node:
        operation = op_def_registry.get(node.op)
        if operation is None or (operation.is_stateful and node.op != "CheckNumerics"):
            raise UserError(f"a graph with the operation {short_repr(node.op)}")
        types = [argument.type for argument in (*operation.input_arg, *operation.output_arg)]
        for value in node.attr.values():
            types += [value.type, *value.list.type]
        # 0 stands for a type that an attribute chooses.
        if any(dtype and tf.dtypes.as_dtype(dtype) not in numeric for dtype in types):
            raise UserError(
                f"a graph with the operation {short_repr(node.op)} on values that are not numbers"
            )


def _features(network) -> Features:
    """Turns a network on (n, 299, 299, 3) values of 0 to 255 into a function of 8-bit images."""

    def resized(images):
        values = tf.image.resize(tf.cast(images, tf.float32), (SIZE, SIZE))
        return network(tf.broadcast_to(values, [tf.shape(images)[0], SIZE, SIZE, 3]))

    run = on_devices(resized)
    return lambda images: unshard(run(shard(images)), len(images)).numpy()


def _layers_of_type(network, layer_type):
    """Layers of a type in the order of their creation, given by the numbers in their names."""
    layers = [layer for layer in network.layers if isinstance(layer, layer_type)]
    return sorted(layers, key=lambda layer: int((re.findall(r"_(\d+)$", layer.name) or [0])[0]))


def _port_names() -> list[str]:
    """The port's names of the convolutions, in the order in which Keras creates them."""
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
                if member.size > MAX_GRAPH_SIZE:
                    raise UserError(f"{GRAPH} of {member.size} bytes")
                return content.read()
    raise UserError(f"holds no {GRAPH}")

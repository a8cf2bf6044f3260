"""Readers of the data sets that fit in memory: 8-bit arrays (n, height, width, channels)."""

import codecs
import contextlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import tf_keras
from PIL import Image

from nvae_tf.errors import UserError

CIFAR_SHAPE = (3, 32, 32)
CIFAR_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR_TEST = ["test_batch"]


def read_digits(folder: str = "") -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 bundled handwritten digits, 8x8, in the layout of MNIST.

    Enlarged to 28x28 (bilinear) and padded to 32x32; a fixed random fifth is the test set. They are
    the test set of *Optical Recognition of Handwritten Digits* (Alpaydin & Kaynak, UCI, 1998).

    Args:
        folder: ignored; the images come with scikit-learn.
    """
    from sklearn.datasets import load_digits

    small = (load_digits().images * (255.0 / 16.0)).round().astype(np.uint8)
    large = [Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR) for image in small]
    images = _pad_to_32(np.stack([np.asarray(image) for image in large]))
    images = images[np.random.RandomState(0).permutation(len(images))]
    num_test = len(images) // 5
    return images[num_test:], images[:num_test]


def read_mnist(folder: str = "") -> tuple[np.ndarray, np.ndarray]:
    """MNIST, padded to 32x32, from ``mnist.npz``.

    Args:
        folder: that holds ``mnist.npz`` as Keras publishes it; empty: Keras's cache or download.

    Raises:
        UserError: the file is missing, unreadable or not MNIST.
    """
    if not folder:
        with _download("MNIST", "mnist.npz", "the folder that holds it"):
            (train, _), (test, _) = tf_keras.datasets.mnist.load_data()
        return _pad_to_32(train), _pad_to_32(test)
    path = _existing(folder) / "mnist.npz"
    if not path.is_file():
        raise UserError(f"{path}: no such file; put Keras's mnist.npz there")
    try:
        with np.load(path, allow_pickle=False) as archive:
            splits = [archive["x_train"], archive["x_test"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not readable as MNIST ({_reason(error)}); fetch Keras's mnist.npz again"
        ) from None
    for name, images in zip(("x_train", "x_test"), splits, strict=True):
        if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or len(images) == 0:
            raise UserError(
                f"{path}: {name} holds {images.dtype} of shape {images.shape}; MNIST is uint8 of "
                "shape (n, 28, 28); fetch Keras's mnist.npz again"
            )
    return _pad_to_32(splits[0]), _pad_to_32(splits[1])


def read_cifar10(folder: str = "") -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10 from its extracted Python or binary version.

    Args:
        folder: the extracted folder (``cifar-10-batches-py`` or ``cifar-10-batches-bin``) or the one
            that holds it; empty: Keras's cache or download.

    Raises:
        UserError: a file is missing, unreadable or not a batch of CIFAR-10.
    """
    if not folder:
        with _download("CIFAR-10", "cifar-10-batches-py", "the folder that holds it"):
            (train, _), (test, _) = tf_keras.datasets.cifar10.load_data()
        return train, test
    folder = _existing(folder)
    for directory in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        if (directory / "data_batch_1").is_file():
            return _batches(directory, "", _read_cifar_pickle)
        if (directory / "data_batch_1.bin").is_file():
            return _batches(directory, ".bin", _read_cifar_binary)
    raise UserError(
        f"{folder}: no data_batch_1 here, in cifar-10-batches-py or in cifar-10-batches-bin; give "
        "the folder that CIFAR-10 was extracted to"
    )


def _batches(directory: Path, ending: str, read) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for names in (CIFAR_TRAIN, CIFAR_TEST):
        paths = [directory / f"{name}{ending}" for name in names]
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path}: no such file; extract CIFAR-10 again, it is incomplete")
        flat = np.concatenate([read(path) for path in paths])
        arrays.append(flat.reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1))
    return arrays[0], arrays[1]


def _read_cifar_binary(path: Path) -> np.ndarray:
    record = 1 + int(np.prod(CIFAR_SHAPE))  # a label, then the image
    content = np.fromfile(path, np.uint8)
    if len(content) == 0 or len(content) % record:
        raise UserError(
            f"{path}: {len(content)} bytes are not a whole number of records of {record}; extract "
            "CIFAR-10 again"
        )
    return content.reshape(-1, record)[:, 1:]


def _read_cifar_pickle(path: Path) -> np.ndarray:
    try:
        data = np.asarray(
            _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()[b"data"]
        )
        if data.dtype != np.uint8 or data.shape[1:] != (int(np.prod(CIFAR_SHAPE)),):
            raise ValueError(f"it holds {data.dtype} of shape {data.shape}")
    except Exception as error:  # noqa: BLE001 - a broken pickle can raise anything
        raise UserError(
            f"{path}: not readable as a batch of CIFAR-10 ({_reason(error)}); extract it again"
        ) from None
    return data


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers, and refuses anything that could run code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module, name):
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _pad_to_32(images: np.ndarray) -> np.ndarray:
    return np.pad(images, [(0, 0), (2, 2), (2, 2)])[..., None]


def _existing(folder: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; --data names the folder that holds the data set")
    return path


@contextlib.contextmanager
def _download(title: str, file: str, where: str):
    """Turns whatever a failed download raises into the way out."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - Keras raises bare Exception here
        raise UserError(
            f"{title} could not be downloaded ({_reason(error)}); fetch {file} on another machine and "
            f"give --data {where}"
        ) from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

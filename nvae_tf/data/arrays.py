"""Readers of the data sets that fit in memory; each returns the training and the test images."""

from pathlib import Path

import numpy as np
import tf_keras
from PIL import Image

from nvae_tf.data.source import ArraySource, Source, StackedSource
from nvae_tf.io import npz, safe_pickle
from nvae_tf.io.errors import UserError, short_message, short_repr
from nvae_tf.io.files import download_errors
from nvae_tf.io.paths import is_regular, user_path

Splits = tuple[Source, Source]  # training and test images

CIFAR_SHAPE = (3, 32, 32)
CIFAR_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR_TEST = ["test_batch"]


def read_digits(folder: str = "", grey: bool = False) -> Splits:
    """Reads the 1,797 handwritten digits of 8x8 pixels that scikit-learn bundles, sized like MNIST.

    They are enlarged to 28x28 (bilinear) and padded to 32x32; a fixed random fifth is the test set. The
    digits are the test set of *Optical Recognition of Handwritten Digits* (Alpaydin & Kaynak, UCI,
    1998).

    Args:
        folder: Ignored, because the images come with scikit-learn.
        grey: Whether to return 5-bit images. The original digits have 17 levels, 0 to 16. Values in
            between, which arise from enlarging, are rounded to these levels, and the levels are spread
            over the 32 levels of 5 bits, so that 16 becomes 31. So 15 of the 32 levels never occur.

    Returns:
        Training and test images, of 8 or 5 bits, (n, 32, 32, 1).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = (digits.images * (255.0 / 16.0)).round().astype(np.uint8)
    large = [Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR) for image in small]
    images, labels = _pad_to_32(np.stack([np.asarray(image) for image in large])), digits.target
    if grey:
        levels = np.rint(images * (16.0 / 255.0))
        images = np.rint(levels * (31.0 / 16.0)).astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(images))
    num_test = len(images) // 5
    train, test = order[num_test:], order[:num_test]
    return ArraySource(images[train], labels[train]), ArraySource(images[test], labels[test])


def read_mnist(folder: str = "") -> tuple[ArraySource, ArraySource]:
    """Reads MNIST from ``mnist.npz``, padded to 32x32.

    Args:
        folder: Folder that holds Keras's ``mnist.npz``; empty: Keras's cache or download.

    Returns:
        Training and test images, 8-bit, (n, 32, 32, 1).

    Raises:
        UserError: The file is missing, unreadable or not MNIST.
    """
    if not folder:
        with download_errors(
            "MNIST", "fetch mnist.npz on another machine and give --data its folder"
        ):
            train, test = tf_keras.datasets.mnist.load_data()
        return ArraySource(_pad_to_32(train[0]), train[1]), ArraySource(
            _pad_to_32(test[0]), test[1]
        )
    path = _existing_folder(folder) / "mnist.npz"
    if not is_regular(path):
        raise UserError(f"{path}: no such file; put Keras's mnist.npz there")
    try:
        arrays = npz.read(path, ("x_train", "y_train", "x_test", "y_test"))
    except UserError as error:
        raise UserError(f"{error}; fetch Keras's mnist.npz again") from None
    sources = []
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        is_mnist = images.dtype == np.uint8 and images.ndim == 3 and images.shape[1:] == (28, 28)
        if not is_mnist or len(images) == 0 or labels.shape != (len(images),):
            raise UserError(
                f"{path}: x_{part} and y_{part} hold {images.dtype} of shapes {images.shape} and "
                f"{labels.shape}; expected uint8, (n, 28, 28) and (n,); fetch Keras's mnist.npz again"
            )
        sources.append(ArraySource(_pad_to_32(images), labels))
    return sources[0], sources[1]


def read_stacked_mnist(folder: str = "") -> Splits:
    """Reads stacked MNIST: three digits as red, green and blue, twice as many images as MNIST has.

    Args:
        folder: As for `read_mnist`.

    Returns:
        Training and test images, 8-bit, (n, 32, 32, 3).
    """
    train, test = read_mnist(folder)
    return StackedSource(train, seed=0), StackedSource(test, seed=1)


def read_omniglot(folder: str = "") -> Splits:
    """Reads OMNIGLOT in the version of the IWAE release, padded to 32x32.

    Args:
        folder: Folder that holds ``chardata.mat``.

    Returns:
        24,345 training and 8,070 test images, 8-bit, (n, 32, 32, 1).

    Raises:
        UserError: The file is missing, unreadable or not that of the release.
    """
    from scipy.io import loadmat

    path = _existing_folder(folder) / "chardata.mat"
    if not is_regular(path):
        raise UserError(f"{path}: no such file; put chardata.mat of the IWAE release there")
    try:
        content = loadmat(path, variable_names=["data", "testdata"])
        splits = [np.asarray(content[name], np.float64) for name in ("data", "testdata")]
    except Exception as error:  # noqa: BLE001 - SciPy raises many kinds for a damaged file
        raise UserError(
            f"{path}: not readable as chardata.mat ({short_message(error)}); fetch it again"
        ) from None
    sources = []
    for name, columns in zip(("data", "testdata"), splits, strict=True):
        in_range = columns.size > 0 and columns.min() >= 0.0 and columns.max() <= 1.0
        if columns.ndim != 2 or columns.shape[0] != 28 * 28 or not in_range:
            raise UserError(
                f"{path}: {name} has shape {columns.shape}; expected (784, n), values 0 to 1; fetch it "
                "again"
            )
        # Matlab stores the pixels of an image column by column.
        images = columns.T.reshape(-1, 28, 28).transpose(0, 2, 1)
        sources.append(ArraySource(_pad_to_32(np.rint(images * 255.0).astype(np.uint8))))
    return sources[0], sources[1]


def read_cifar10(folder: str = "") -> Splits:
    """Reads CIFAR-10 from its extracted Python or binary version.

    Args:
        folder: The extracted folder (``cifar-10-batches-py`` or ``cifar-10-batches-bin``) or its
            parent; empty: Keras's cache or download.

    Returns:
        Training and test images, 8-bit, (n, 32, 32, 3).

    Raises:
        UserError: A file is missing, unreadable or not a batch of CIFAR-10.
    """
    if not folder:
        advice = "fetch cifar-10-batches-py on another machine and give --data its folder"
        with download_errors("CIFAR-10", advice):
            train, test = tf_keras.datasets.cifar10.load_data()
        return ArraySource(*train), ArraySource(*test)
    root = _existing_folder(folder)
    for directory in (root, root / "cifar-10-batches-py", root / "cifar-10-batches-bin"):
        if (directory / "data_batch_1").is_file():
            return _read_cifar_files(directory, "", _read_cifar_pickle)
        if (directory / "data_batch_1.bin").is_file():
            return _read_cifar_files(directory, ".bin", _read_cifar_binary)
    raise UserError(
        f"{folder}: no data_batch_1 here, in cifar-10-batches-py or in cifar-10-batches-bin; give "
        "the folder that CIFAR-10 was extracted to"
    )


def _read_cifar_files(directory: Path, ending: str, read) -> Splits:
    sources = []
    for names in (CIFAR_TRAIN, CIFAR_TEST):
        paths = [directory / f"{name}{ending}" for name in names]
        for path in paths:
            if not is_regular(path):
                raise UserError(f"{path}: no such file; extract CIFAR-10 again, it is incomplete")
        flat, labels = map(np.concatenate, zip(*map(read, paths), strict=True))
        images = flat.reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1)
        sources.append(ArraySource(images, labels))
    return sources[0], sources[1]


def _read_cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    record = 1 + int(np.prod(CIFAR_SHAPE))  # a label, then the image
    content = np.fromfile(path, np.uint8)
    if len(content) == 0 or len(content) % record:
        raise UserError(
            f"{path}: {len(content)} bytes are not a whole number of records of {record}; extract "
            "CIFAR-10 again"
        )
    records = content.reshape(-1, record)
    return records[:, 1:], records[:, 0]


def _read_cifar_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            content = safe_pickle.load(file, _ARRAY_FACTORIES)
        # Python 2 wrote the names, so they are bytes unless pickletools has decoded them.
        content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        data, labels = content["data"].array, np.asarray(content["labels"], np.int64)
        if data.dtype != np.uint8 or data.shape != (len(labels), int(np.prod(CIFAR_SHAPE))):
            raise ValueError(f"it holds {data.dtype} of shape {data.shape}")
    except Exception as error:  # noqa: BLE001 - a broken pickle can raise anything
        raise UserError(
            f"{path}: not readable as a batch of CIFAR-10 ({short_message(error)}); extract it again"
        ) from None
    return data, labels


class _PickledArray(safe_pickle.Object):
    """Takes the place of a NumPy array while a pickle is read; its state follows later."""

    def __init__(self, *_):
        self.array = None

    def set_state(self, state):
        """Makes the array from its shape, type and bytes."""
        _, shape, dtype, column_major, content = state
        if isinstance(content, str):  # Python 2's strings
            content = content.encode("latin-1")
        order = "F" if column_major else "C"
        self.array = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


class _PickledType(safe_pickle.Object):
    """Takes the place of the NumPy type uint8 while a pickle is read; refuses any other type."""

    def __init__(self, code, *_):
        if code not in ("u1", "|u1", "uint8"):
            raise safe_pickle.UnsafePickle(f"an array of type {short_repr(code)}")
        self.dtype = np.dtype(np.uint8)

    def set_state(self, state):
        """Ignores the byte order, because CIFAR's numbers are single bytes."""


def _bytes_of_text(text, encoding):
    """Takes the place of `codecs.encode`, which Python 3 uses for bytes in pickles of old protocols."""
    if encoding not in ("latin1", "latin-1"):
        raise safe_pickle.UnsafePickle(f"text in the encoding {short_repr(encoding)}")
    return text.encode("latin-1")


_ARRAY_FACTORIES: safe_pickle.Factories = {
    "numpy.core.multiarray _reconstruct": _PickledArray,
    "numpy._core.multiarray _reconstruct": _PickledArray,
    "numpy ndarray": _PickledArray,
    "numpy dtype": _PickledType,
    "_codecs encode": _bytes_of_text,
}


def _pad_to_32(images: np.ndarray) -> np.ndarray:
    return np.pad(images, [(0, 0), (2, 2), (2, 2)])[..., None]


def _existing_folder(folder: str) -> Path:
    path = user_path(folder)
    if not folder or not path.is_dir():
        raise UserError(
            f"{folder or '--data'}: no such folder; --data names the folder that holds the data set"
        )
    return path

"""Reads checkpoint files of PyTorch without PyTorch, and without running any code in them.

Two layouts exist: a zip archive (since PyTorch 1.6) and a sequence of pickles followed by raw numbers.
In both, tensors refer to storages outside the pickle, which are read only when they are needed.
"""

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nvae_tf.io import safe_pickle
from nvae_tf.io.errors import UserError, short_message, short_repr
from nvae_tf.io.paths import is_regular

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_EXPANSION = (
    4  # largest size of a file's tensors in memory, in sizes of the file (bfloat16 doubles)
)

_BFLOAT16 = "bfloat16"  # unknown to NumPy: two bytes, the upper half of a float32
STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16",
    "BFloat16Storage": _BFLOAT16, "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


class Tensor(NamedTuple):
    """A tensor that has not been read yet.

    Attributes:
        read: Returns the tensor's storage, one-dimensional.
        offset: Position of the first element in the storage.
        shape: Shape of the tensor.
        strides: Strides in elements.
    """

    read: Callable[[], np.ndarray]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def numpy(self) -> np.ndarray:
        """Reads the tensor's values.

        Raises:
            UserError: The tensor does not lie within its storage.
        """
        storage = self.read()
        shape, strides = tuple(self.shape), tuple(self.strides)
        valid = len(shape) == len(strides) and all(
            isinstance(n, int) and n >= 0 for n in (self.offset, *shape, *strides)
        )
        empty = valid and 0 in shape
        reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if valid else 0
        if not valid or (not empty and self.offset + reach >= len(storage)):
            raise UserError("a tensor that does not lie within its storage")
        # Overlapping strides could make a huge tensor of a small storage.
        if not empty and np.prod(shape, dtype=object) > len(storage):
            raise UserError("a tensor larger than its storage")
        size = storage.itemsize
        view = np.lib.stride_tricks.as_strided(
            storage[self.offset :], shape, [s * size for s in strides], writeable=False
        )
        return np.array(view)


class _StorageType(NamedTuple):
    dtype: str

    def read(self, content: bytes, little_endian: bool = True) -> np.ndarray:
        order: Literal["<", ">"] = "<" if little_endian else ">"
        if self.dtype == _BFLOAT16:
            halves = np.frombuffer(content, order + "u2").astype(np.uint32)
            return (halves << 16).view(np.float32)
        return np.frombuffer(content, np.dtype(self.dtype).newbyteorder(order))

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == _BFLOAT16 else np.dtype(self.dtype).itemsize


def _rebuild_tensor(storage, offset, shape, strides, *_):
    return Tensor(storage, offset, shape, strides)


def _not_called(*_):
    raise safe_pickle.UnsafePickle("a call of a type")


# The classes and functions that a checkpoint may name, and what is called instead.
FACTORIES: safe_pickle.Factories = {
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch Size": lambda sizes=(): tuple(sizes),
    "torch device": lambda *arguments: arguments,
    "collections OrderedDict": safe_pickle.OrderedDict,
    "argparse Namespace": safe_pickle.Namespace,
    **{f"torch {name}": _not_called for name in STORAGES},
}


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint.

    Args:
        path: Path of the ``.pt`` file.

    Returns:
        The dictionary that was saved, with tensors as `Tensor` and namespaces as dictionaries.

    Raises:
        UserError: The file is missing, damaged, not a PyTorch file, or asks for code.
    """
    if not is_regular(path):
        raise UserError(f"{path}: no such file")
    try:
        content = _load_zip(path) if zipfile.is_zipfile(path) else _load_legacy(path)
    except safe_pickle.UnsafePickle as error:
        raise UserError(f"{path}: refused, nothing of it was run: it holds {error}") from None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged archive raises what it likes
        raise UserError(
            f"{path}: not a readable PyTorch checkpoint ({short_message(error, 100)})"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint: holds a {type(content).__name__}, not a dict")
    return content


def arrays(tensors: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a dictionary that `load` returned.

    Args:
        tensors: The tensors by name.
        path: Path of the ``.pt`` file.

    Returns:
        The values of each tensor by name.

    Raises:
        UserError: A value is not a tensor, a tensor is damaged, or the tensors are much larger than
            the file, which means that many share one storage.
    """
    values: dict[str, np.ndarray] = {}
    bytes_left = MAX_EXPANSION * path.stat().st_size
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {short_repr(key)} is not a tensor")
        try:
            values[key] = tensor.numpy()
        except UserError as error:
            raise UserError(f"{path}: {short_repr(key)}: {error}") from None
        except Exception as error:  # noqa: BLE001 - a damaged archive raises what it likes
            raise UserError(
                f"{path}: {short_repr(key)}: damaged ({short_message(error, 100)})"
            ) from None
        bytes_left -= values[key].nbytes
        if bytes_left < 0:
            raise UserError(f"{path}: refused: its tensors would unfold to much more than the file")
    return values


def _load_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.split("/")[1:] == ["data.pkl"]]
        if len(names) != 1:
            raise UserError(f"{path}: not a PyTorch checkpoint: a zip archive without one data.pkl")
        root = names[0].partition("/")[0]
        # PyTorch does not compress. An archive that unpacks to more than its own size is a bomb.
        if any(info.file_size > info.compress_size for info in archive.infolist()):
            raise UserError(f"{path}: not a PyTorch checkpoint: a compressed archive")
        byteorder = f"{root}/byteorder"
        little = byteorder not in archive.namelist() or archive.read(byteorder) != b"big"

        def persistent_load(reference):
            storage_type, key, count = _storage_reference(reference)

            def read():
                with zipfile.ZipFile(path) as archive:
                    content = archive.read(f"{root}/data/{key}")
                if len(content) != count * storage_type.itemsize:
                    raise UserError(f"{path}: storage {key} is damaged")
                return storage_type.read(content, little)

            return read

        with archive.open(names[0]) as file:
            return safe_pickle.load(file, FACTORIES, persistent_load)


def _load_legacy(path: Path) -> Any:
    # The first byte and the number of elements of each storage, by its key.
    positions: dict[str, tuple[int, int]] = {}
    types: dict[str, _StorageType] = {}

    def persistent_load(reference):
        storage_type, key, _ = _storage_reference(reference)
        types[key] = storage_type

        def read():
            start, count = positions[key]
            with path.open("rb") as file:
                file.seek(start)
                return storage_type.read(file.read(count * storage_type.itemsize))

        return read

    with path.open("rb") as file:
        if safe_pickle.load(file, {}) != LEGACY_MAGIC:
            raise UserError(f"{path}: not a PyTorch checkpoint")
        if safe_pickle.load(file, {}) != LEGACY_PROTOCOL:
            raise UserError(f"{path}: an unknown version of PyTorch's format")
        safe_pickle.load(file, {})  # sizes of the writing machine's integers
        content = safe_pickle.load(file, FACTORIES, persistent_load)
        keys = safe_pickle.load(file, {})
        size = path.stat().st_size
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            start = file.tell()
            if key not in types or count < 0 or start + count * types[key].itemsize > size:
                raise UserError(f"{path}: storage {key!r} is damaged or cut off")
            positions[key] = (start, count)
            file.seek(start + count * types[key].itemsize)
    return content


def _storage_reference(reference) -> tuple[_StorageType, str, int]:
    kind, storage_type, key, _, count, *_ = reference
    if kind != "storage":
        raise safe_pickle.UnsafePickle("a reference to something that is not a storage")
    named = isinstance(storage_type, safe_pickle.Global)
    name = storage_type.name.removeprefix("torch ") if named else ""
    if name not in STORAGES or not isinstance(key, str):
        raise safe_pickle.UnsafePickle("a storage of an unknown type")
    return _StorageType(STORAGES[name]), key, count

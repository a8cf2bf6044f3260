"""Reads checkpoint files of PyTorch without PyTorch, and without running any code in them.

Two layouts exist: a zip archive (since PyTorch 1.6) and a sequence of pickles followed by raw numbers.
In both, tensors refer to storages that lie outside the pickle; they are read only when asked for.
"""

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nvae_tf.io import safe_pickle as plain_pickle
from nvae_tf.io.errors import UserError, short_message, short_repr
from nvae_tf.io.paths import is_regular

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
UNFOLDING = 4  # times a file's size that its tensors may have in memory: bfloat16 doubles

_BFLOAT16 = "bfloat16"  # NumPy has none: two bytes, the upper half of a float32
STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16",
    "BFloat16Storage": _BFLOAT16, "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


class Tensor(NamedTuple):
    """A tensor that has not been read yet.

    Attributes:
        read: returns its storage, one-dimensional.
        offset: of its first element in the storage.
        shape: of the tensor.
        strides: in elements.
    """

    read: Callable[[], np.ndarray]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def numpy(self) -> np.ndarray:
        """The tensor's values.

        Raises:
            UserError: it does not lie within its storage.
        """
        storage = self.read()
        shape, strides = tuple(self.shape), tuple(self.strides)
        sound = len(shape) == len(strides) and all(
            isinstance(n, int) and n >= 0 for n in (self.offset, *shape, *strides)
        )
        empty = sound and 0 in shape
        reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if sound else 0
        if not sound or (not empty and self.offset + reach >= len(storage)):
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
    raise plain_pickle.UnsafePickle("a call of a type")


# What a checkpoint may name, and the plain data that takes its place.
FACTORIES: plain_pickle.Factories = {
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch Size": lambda sizes=(): tuple(sizes),
    "torch device": lambda *arguments: arguments,
    "collections OrderedDict": plain_pickle.OrderedDict,
    "argparse Namespace": plain_pickle.Namespace,
    **{f"torch {name}": _not_called for name in STORAGES},
}


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint.

    Args:
        path: of the file.

    Returns:
        The dictionary that was saved, tensors as `Tensor` and namespaces as dictionaries.

    Raises:
        UserError: no such file, not a PyTorch file, damaged, or one that asks for code.
    """
    if not is_regular(path):
        raise UserError(f"{path}: no such file")
    try:
        content = _load_zip(path) if zipfile.is_zipfile(path) else _load_legacy(path)
    except plain_pickle.UnsafePickle as error:
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
    """Reads the tensors of a dictionary that `load` found in a file.

    Args:
        tensors: by name.
        path: of the file.

    Raises:
        UserError: something else is among them, one is damaged, or they are larger than their file,
            which means that many share one storage.
    """
    found: dict[str, np.ndarray] = {}
    room = UNFOLDING * path.stat().st_size
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {short_repr(key)} is no tensor")
        try:
            found[key] = tensor.numpy()
        except UserError as error:
            raise UserError(f"{path}: {short_repr(key)}: {error}") from None
        except Exception as error:  # noqa: BLE001 - a damaged archive raises what it likes
            raise UserError(
                f"{path}: {short_repr(key)}: damaged ({short_message(error, 100)})"
            ) from None
        room -= found[key].nbytes
        if room < 0:
            raise UserError(f"{path}: refused: its tensors would unfold to much more than the file")
    return found


def _load_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.split("/")[1:] == ["data.pkl"]]
        if len(names) != 1:
            raise UserError(f"{path}: not a PyTorch checkpoint: a zip archive without one data.pkl")
        root = names[0].partition("/")[0]
        # PyTorch stores without compression; an archive that unpacks to more than it is, is a bomb.
        if any(info.file_size > info.compress_size for info in archive.infolist()):
            raise UserError(f"{path}: not a PyTorch checkpoint: a compressed archive")
        byteorder = f"{root}/byteorder"
        little = byteorder not in archive.namelist() or archive.read(byteorder) != b"big"

        def persistent(reference):
            storage_type, key, count = _storage_reference(reference)

            def read():
                with zipfile.ZipFile(path) as again:
                    content = again.read(f"{root}/data/{key}")
                if len(content) != count * storage_type.itemsize:
                    raise UserError(f"{path}: storage {key} is damaged")
                return storage_type.read(content, little)

            return read

        with archive.open(names[0]) as file:
            return plain_pickle.load(file, FACTORIES, persistent)


def _load_legacy(path: Path) -> Any:
    positions: dict[str, tuple[int, int]] = {}  # key -> byte and count of elements
    types: dict[str, _StorageType] = {}

    def persistent(reference):
        storage_type, key, _ = _storage_reference(reference)
        types[key] = storage_type

        def read():
            start, count = positions[key]
            with path.open("rb") as again:
                again.seek(start)
                return storage_type.read(again.read(count * storage_type.itemsize))

        return read

    with path.open("rb") as file:
        if plain_pickle.load(file, {}) != LEGACY_MAGIC:
            raise UserError(f"{path}: not a PyTorch checkpoint")
        if plain_pickle.load(file, {}) != LEGACY_PROTOCOL:
            raise UserError(f"{path}: an unknown version of PyTorch's format")
        plain_pickle.load(file, {})  # sizes of the writing machine's integers
        content = plain_pickle.load(file, FACTORIES, persistent)
        keys = plain_pickle.load(file, {})
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
        raise plain_pickle.UnsafePickle("a reference to something that is no storage")
    named = isinstance(storage_type, plain_pickle.Global)
    name = storage_type.name.removeprefix("torch ") if named else ""
    if name not in STORAGES or not isinstance(key, str):
        raise plain_pickle.UnsafePickle("a storage of an unknown type")
    return _StorageType(STORAGES[name]), key, count

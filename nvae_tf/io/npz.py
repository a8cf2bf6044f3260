"""Reads NumPy's .npz and .npy files from anywhere: plain numbers alone, and memory within a bound."""

import math
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Literal

import numpy as np

from nvae_tf.io.errors import UserError, short_message
from nvae_tf.io.paths import is_regular

LARGEST = 2**30  # bytes of all arrays together
ARRAY_SIGNATURE = b"\x93NUMPY"
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read(path: Path, names: Iterable[str], optional: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Reads some of a file's arrays.

    Args:
        path: Path of the .npz file.
        names: Names of arrays that have to be there.
        optional: Names of arrays that are read if they are there.

    Returns:
        The arrays by name.

    Raises:
        UserError: The file or an array is missing, damaged or of another type than numbers, or the
            arrays together are larger than `LARGEST`.
    """
    if not is_regular(path):
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            stored = set(archive.namelist())
            wanted = [*names, *(name for name in optional if f"{name}.npy" in stored)]
            members = {name: archive.getinfo(f"{name}.npy") for name in wanted}
            if sum(member.file_size for member in members.values()) > LARGEST:
                raise ValueError(f"arrays of more than {LARGEST} bytes")
            return {name: _read_array(archive, member) for name, member in members.items()}
    except Exception as error:  # noqa: BLE001 - a damaged archive raises what it likes
        raise UserError(f"{path}: not readable as an .npz file ({short_message(error)})") from None


def read_only_array(path: Path, is_wanted: Callable[[tuple[int, ...]], bool]) -> np.ndarray:
    """Reads the one array of a file whose shape is wanted, whatever its name.

    Args:
        path: Path of the .npz file.
        is_wanted: Whether an array of a shape is.

    Raises:
        ValueError: There is none, or more than one, or it is damaged or too large.
        Exception: The archive is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        wanted = []
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    shape, *_ = _read_header(file, member.file_size)
                wanted += [member] if is_wanted(shape) else []
        if len(wanted) != 1:
            raise ValueError(f"{len(wanted)} arrays that could be images; expected one")
        if wanted[0].file_size > LARGEST:
            raise ValueError(f"an array of more than {LARGEST} bytes")
        return _read_array(archive, wanted[0])


class ArrayFile:
    """The array of a .npy file, read entry by entry along its first axis.

    Args:
        path: Path of the file.

    Raises:
        ValueError: It is damaged or not an array of numbers, or is stored column by column and larger
            than `LARGEST`.
    """

    def __init__(self, path: Path):
        self._path = path
        with path.open("rb") as file:
            self.shape, by_columns, self.dtype = _read_header(file, path.stat().st_size)
            self._offset = file.tell()
        self._order: Literal["F", "C"] = "F" if by_columns else "C"

    def __getitem__(self, index) -> np.ndarray:
        """Reads one entry, or with ``[:]`` all."""
        if isinstance(index, slice) or self._order == "F":
            size = math.prod(self.shape)
            if size * self.dtype.itemsize > LARGEST:
                raise ValueError(f"an array of more than {LARGEST} bytes that is read as a whole")
            return self._read(0, size).reshape(self.shape, order=self._order)[index]
        size = math.prod(self.shape[1:])
        return self._read(index * size, size).reshape(self.shape[1:])

    def _read(self, start: int, count: int) -> np.ndarray:
        offset = self._offset + start * self.dtype.itemsize
        values = np.fromfile(self._path, self.dtype, count, offset=offset)
        if len(values) != count:
            raise ValueError("the file ends within an array")
        return values


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        _read_header(file, member.file_size)
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _read_header(file: IO[bytes], file_size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads shape, whether it is stored by columns, and type of an array.

    NumPy allocates what the header asks for, so the header is compared with the size beforehand.

    Raises:
        ValueError: They are not those of an array of numbers of that many bytes.
    """
    version = np.lib.format.read_magic(file)
    if version not in _HEADER_READERS:
        raise ValueError(f"an array of the unknown format {version}")
    shape, by_columns, dtype = _HEADER_READERS[version](file)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of type {str(dtype)[:40]}")
    if math.prod(shape) * dtype.itemsize != file_size - file.tell():
        raise ValueError("an array whose shape is not that of its bytes")
    return shape, by_columns, dtype

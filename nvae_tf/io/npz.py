"""Reads NumPy's .npz files from anywhere: plain numbers alone, and memory within a bound."""

import io
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nvae_tf.io.errors import UserError, short_message
from nvae_tf.io.paths import is_regular

LARGEST = 2**30  # bytes of all arrays together
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read(path: Path, names: Iterable[str], optional: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Some of a file's arrays.

    Args:
        path: of the file.
        names: of arrays that have to be there.
        optional: names of arrays that are read if they are there.

    Raises:
        UserError: the file or an array is missing, damaged, of another type than numbers, or all
            together are larger than `LARGEST`.
    """
    if not is_regular(path):
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            there = set(archive.namelist())
            wanted = [*names, *(name for name in optional if f"{name}.npy" in there)]
            infos = {name: archive.getinfo(f"{name}.npy") for name in wanted}
            if sum(info.file_size for info in infos.values()) > LARGEST:
                raise ValueError(f"arrays of more than {LARGEST} bytes")
            return {name: _array(archive.read(info)) for name, info in infos.items()}
    except Exception as error:  # noqa: BLE001 - a damaged archive raises what it likes
        raise UserError(f"{path}: not readable as an .npz file ({short_message(error)})") from None


def _array(content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"an array of the unknown format {version}")
    shape, column_major, dtype = _HEADERS[version](file)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of type {str(dtype)[:40]}")
    if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError("an array whose shape is not that of its bytes")
    flat = np.frombuffer(content, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if column_major else "C")

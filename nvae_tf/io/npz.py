"""Reads NumPy's .npz files from anywhere: plain numbers alone, and memory within a bound."""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nvae_tf.io.errors import UserError, short_message
from nvae_tf.io.paths import is_regular

LARGEST = 2**30  # bytes of all arrays together
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


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    # NumPy allocates what the header asks for, so the header is compared with the size beforehand.
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADER_READERS:
            raise ValueError(f"an array of the unknown format {version}")
        shape, _, dtype = _HEADER_READERS[version](file)
        if dtype.kind not in "biuf":
            raise ValueError(f"an array of type {str(dtype)[:40]}")
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError("an array whose shape is not that of its bytes")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)

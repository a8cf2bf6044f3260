"""Reads the slices of medical scans: DICOM with pydicom, NIfTI with nibabel, both optional."""

import contextlib
import gzip
from pathlib import Path

import numpy as np

from nvae_tf.data.stored import MAX_IMAGES, Stored, check_bounds, check_inflation, stored
from nvae_tf.io.errors import UserError

DEFLATED = "1.2.840.10008.1.2.1.99"  # transfer syntax of DICOM files that are compressed as a whole
MAX_VOLUME = 2**30  # bytes of a compressed NIfTI file after unpacking, at most
MAX_HEADER = 2**20  # bytes of a NIfTI file before its values, at most


def count_dicom(path: Path) -> int | None:
    """The number of frames of a DICOM file; None if it is one.

    Raises:
        Exception: The file is damaged.
        UserError: pydicom is not installed.
    """
    frames = int(_dicom(path, only_header=True).get("NumberOfFrames") or 1)
    if not 0 < frames <= MAX_IMAGES:
        raise ValueError(f"{frames} frames")
    return None if frames == 1 else frames


def read_dicom(path: Path, index: int) -> Stored:
    """Reads one frame of a DICOM file, rescaled to the file's unit (such as Hounsfield units).

    Raises:
        Exception: The file is damaged.
        UserError: pydicom is not installed.
    """
    content = _dicom(path)
    height, width, channels = content.Rows, content.Columns, content.get("SamplesPerPixel", 1)
    check_bounds(height, width, channels)
    frames = int(content.get("NumberOfFrames") or 1)
    check_inflation(len(content.PixelData), height * width * channels * frames // 8, True)
    from pydicom.pixels import apply_modality_lut, pixel_array

    values = pixel_array(content, index=index if frames > 1 else None)
    if channels == 1:
        if content.PhotometricInterpretation == "MONOCHROME1":  # the smallest value is white
            signed = content.PixelRepresentation == 1
            values = (-1 if signed else 2**content.BitsStored - 1) - values.astype(np.int64)
        values = _whole_numbers(apply_modality_lut(values, content))
    return stored(values)


def _whole_numbers(values: np.ndarray) -> np.ndarray:
    """Converts floats to int32 if that changes no value."""
    small = values.dtype.kind == "f" and np.abs(values).max() < 2**31
    whole = small and np.array_equal(values, np.rint(values))
    return values.astype(np.int32) if whole else values


def _dicom(path: Path, only_header: bool = False):
    try:
        import pydicom
    except ImportError:
        raise _missing("DICOM", "pydicom") from None
    # pydicom would unpack such a file without any limit on its size.
    if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == DEFLATED:
        raise ValueError("a deflated DICOM file")
    return pydicom.dcmread(path, stop_before_pixels=only_header)


class NiftiScan:
    """The slices of a NIfTI file along its third and further axes, with the second axis upwards.

    Args:
        path: Path of the file. The values of a compressed file are kept in memory.

    Attributes:
        count: Number of slices; None if it is one.
        kept: Number of bytes kept in memory.

    Raises:
        Exception: The file is damaged.
        UserError: nibabel is not installed.
    """

    def __init__(self, path: Path):
        try:
            import nibabel
        except ImportError:
            raise _missing("NIfTI", "nibabel") from None
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        kind = _nifti_kind(nibabel, path, compressed)
        with gzip.open(path) if compressed else path.open("rb") as file:
            header = kind.header_class.from_fileobj(file, check=True)
        self.shape = tuple(int(side) for side in header.get_data_shape())
        if len(self.shape) < 2 or header.get_data_dtype().kind not in "iuf":
            raise ValueError(f"values {header.get_data_dtype()} of shape {self.shape}")
        check_bounds(self.shape[1], self.shape[0])
        slices = int(np.prod(self.shape[2:], dtype=object))
        if not 0 < slices <= MAX_IMAGES or not 0 <= header.get_data_offset() <= MAX_HEADER:
            raise ValueError(f"a volume of shape {self.shape}")
        self.count = None if slices == 1 else slices
        size = int(np.prod(self.shape, dtype=object)) * header.get_data_dtype().itemsize
        check_inflation(path.stat().st_size, size, compressed)
        if compressed and size > MAX_VOLUME:
            raise ValueError(f"a compressed volume of {size} bytes; unpack it")
        with gzip.open(path) if compressed else contextlib.nullcontext(str(path)) as opened:
            self._proxy = nibabel.arrayproxy.ArrayProxy(opened, header, mmap=False)
            self._values = self._proxy.get_unscaled() if compressed else None
        self.kept = 0 if self._values is None else self._values.nbytes

    def read(self, index: int) -> Stored:
        """Reads one slice."""
        place = np.unravel_index(index, self.shape[2:]) if len(self.shape) > 2 else ()
        chosen = (slice(None), slice(None), *(int(i) for i in place))
        if self._values is None:
            return stored(np.rot90(self._proxy[chosen]))
        values, slope, offset = self._values[chosen], self._proxy.slope, self._proxy.inter
        return stored(np.rot90(values if (slope, offset) == (1, 0) else values * slope + offset))


def _nifti_kind(nibabel, path: Path, compressed: bool):
    """nibabel's class for NIfTI-1 or NIfTI-2, told apart by the header's length, its first number."""
    with gzip.open(path) if compressed else path.open("rb") as file:
        length = file.read(4)
    known = {348: nibabel.Nifti1Image, 540: nibabel.Nifti2Image}
    for order in ("little", "big"):
        if int.from_bytes(length, order) in known:
            return known[int.from_bytes(length, order)]
    raise ValueError("no NIfTI header")


def _missing(what: str, package: str) -> UserError:
    return UserError(f'reading {what} needs the package {package}: pip install "nvae-tf[medical]"')

"""Reads and writes GLOW's tfrecords, the format of every large data set here.

Files are named ``DIR/train/train-rRR-s-SSSS-of-NNNN.tfrecords`` and ``DIR/validation/validation-...``.
RR is the binary logarithm of the size. Each record is a ``tf.train.Example`` with ``shape`` (height,
width, channels), ``data`` (the image's bytes) and ``label``.

As an extension, images may have other sizes, with names ``train-96x64-s-...`` (width x height), and
other numbers of bits than 8. Those have the feature ``bits``, and above 8 bits their ``data`` holds
little-endian 16-bit values.

For each record, a file holds its length (8 bytes, little-endian), a checksum of these 8 bytes, the
record, and a checksum of the record (4 bytes per checksum).
"""

import mmap
import re
import struct
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import tensorflow as tf

from nvae_tf.data.source import PythonSource
from nvae_tf.image_spec import MAX_BITS, ImageSpec
from nvae_tf.io.errors import UserError
from nvae_tf.io.paths import is_regular, user_path

SHARD = re.compile(
    r"(?P<split>\w+)-(r(?P<log>\d\d)|(?P<width>[1-9]\d{0,4})x(?P<height>[1-9]\d{0,4}))"
    r"-s-(?P<index>\d{4,9})-of-(?P<count>\d{4,9})\.tfrecords"
)
HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
LARGEST_RECORD = 2**28  # bytes
FETCH_AGAIN = "fetch or prepare this file again"


Size = tuple[int, int]  # height and width in pixels


def shard_name(split: str, size: Size, index: int, count: int) -> str:
    """Returns the name of a shard of images of a size (height, width)."""
    return f"{split}-{_size_name(size)}-s-{index:04d}-of-{count:04d}.tfrecords"


def _size_name(size: Size) -> str:
    height, width = size
    if height == width and height & (height - 1) == 0:
        return f"r{height.bit_length() - 1:02d}"
    return f"{width}x{height}"


def size_of(match: re.Match) -> Size:
    """The height and width of the images, from the name of a shard (a match of `SHARD`)."""
    if match["log"]:
        return 2 ** int(match["log"]), 2 ** int(match["log"])
    return int(match["height"]), int(match["width"])


def size_text(size: Size) -> str:
    """A size as users write it: the side of a square, or width x height."""
    height, width = size
    return str(width) if height == width else f"{width}x{height}"


def find_root(folder: str) -> Path:
    """Finds the folder that holds ``train/``: the given one, or one below, as archives unpack to.

    Args:
        folder: Path as the user wrote it.

    Raises:
        UserError: There is no such folder, or more than one.
    """
    start = user_path(folder)
    if not folder or not start.is_dir():
        raise UserError(
            f"{folder or '--data'}: no such folder; --data names the folder that holds the tfrecords"
        )
    roots = {
        path.parent.parent
        for path in start.rglob("train/train-*.tfrecords")
        if SHARD.fullmatch(path.name)
    }
    if len(roots) != 1:
        present = (
            ", ".join(map(str, sorted(roots)))
            or "nothing like train/train-r08-s-0000-of-0120.tfrecords"
        )
        raise UserError(
            f"{start}: expected one set of tfrecords below this folder, found {present}"
        )
    return roots.pop()


def sizes(root: Path, split: str) -> list[Size]:
    """Returns the image sizes in which a split is present, height and width in pixels."""
    matches = (SHARD.fullmatch(path.name) for path in (root / split).glob("*.tfrecords"))
    return sorted({size_of(match) for match in matches if match and match["split"] == split})


def find_shards(root: Path, split: str, size: Size) -> list[Path]:
    """Finds the shards of a split in one size, in order.

    Raises:
        UserError: There are none, or one is missing.
    """
    present = {}
    for path in (root / split).glob(f"{split}-{_size_name(size)}-s-*.tfrecords"):
        match = SHARD.fullmatch(path.name)
        if match:
            present.setdefault(int(match["count"]), {})[int(match["index"])] = path
    others = ", ".join(f"{width}x{height}" for height, width in sizes(root, split))
    if not others:
        raise UserError(
            f"{root / split}: the tfrecords of the split {split} are missing; fetch or prepare them "
            "again"
        )
    if not present:
        raise UserError(
            f"{root / split}: no tfrecords of {size[1]}x{size[0]} images (files {_size_name(size)})"
            f"; sizes present: {others}; ask for one of those"
        )
    if len(present) > 1:
        raise UserError(
            f"{root / split}: shards of different sets are mixed (of {sorted(present)}); keep one set"
        )
    ((count, shards),) = present.items()
    missing = [index for index in range(count) if index not in shards]
    if missing:
        first = shard_name(split, size, missing[0], count)
        raise UserError(
            f"{root / split / first}: shard missing, with {len(missing)} of {count} in all; fetch or "
            "prepare it again"
        )
    return [shards[index] for index in range(count)]


class Example(NamedTuple):
    """The content of a record.

    Attributes:
        image: Levels (height, width, channels), uint8 or uint16.
        label: The label, a whole number.
        bits: Number of bits per value of the image.
    """

    image: np.ndarray
    label: int
    bits: int


class Shard:
    """Random access to the records of one file.

    Args:
        path: Path of the shard.

    Raises:
        UserError: The file ends within a record, or a length is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        if not is_regular(path):
            raise UserError(f"{path}: not a file; {FETCH_AGAIN}")
        try:
            size = path.stat().st_size
            # The file does not stay open: ImageNet has more shards than a process may hold open files.
            with path.open("rb") as file:
                if not size:
                    self.offsets = self._scan(b"", size)
                else:
                    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                        self.offsets = self._scan(content, size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {FETCH_AGAIN}") from None

    def _scan(self, content, size: int) -> np.ndarray:
        offsets, offset = [], 0
        while offset < size:
            if offset + HEADER.size > size:
                raise self._damaged(offset, "the file ends within a record's header")
            length, checksum = HEADER.unpack_from(content, offset)
            if checksum != masked_crc(content[offset : offset + 8]):
                raise self._damaged(offset, "the record's length does not match its checksum")
            end = offset + HEADER.size + length + FOOTER.size
            if end > size:
                raise self._damaged(offset, "the file ends within this record")
            if length > LARGEST_RECORD:
                raise self._damaged(offset, f"a record of {length} bytes is not an image")
            offsets.append(offset)
            offset = end
        return np.array(offsets, np.int64)

    def record(self, index: int) -> bytes:
        """Reads the bytes of a record.

        Raises:
            UserError: The bytes do not match their checksum, or the file is gone.
        """
        offset = int(self.offsets[index])
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                length, _ = HEADER.unpack(file.read(HEADER.size))
                data = file.read(min(length, LARGEST_RECORD))
                (checksum,) = FOOTER.unpack(file.read(FOOTER.size))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        except struct.error:
            raise self._damaged(offset, "the file ends within this record") from None
        if checksum != masked_crc(data):
            raise self._damaged(offset, "the record does not match its checksum")
        return data

    def example(self, index: int) -> Example:
        """Reads a record.

        Raises:
            UserError: The record is not an example, or shape and bytes disagree.
        """
        data = self.record(index)
        try:
            features = tf.train.Example.FromString(data).features.feature
            shape = tuple(features["shape"].int64_list.value[:4])
            (pixels,) = features["data"].bytes_list.value[:2]
            label = next(iter(features["label"].int64_list.value), 0)
            bits = next(iter(features["bits"].int64_list.value), 8)
        except Exception:  # noqa: BLE001 - protobuf's own classes differ by its implementation
            raise self.damaged(index, "the record is not an example with shape and data") from None
        if not 0 < bits <= MAX_BITS:
            raise self.damaged(index, f"its image has {bits} bits")
        dtype = np.dtype(np.uint8 if bits <= 8 else "<u2")
        needed = len(shape) == 3 and min(shape) > 0 and np.prod(shape, dtype=object)
        if not needed or needed * dtype.itemsize != len(pixels):
            raise self.damaged(index, f"its shape {shape} is not that of its {len(pixels)} bytes")
        values = np.frombuffer(pixels, dtype).reshape(shape)
        if bits not in (8, 16) and values.max() >= 2**bits:
            raise self.damaged(index, f"its image has values beyond {bits} bits")
        return Example(values, label, bits)

    def damaged(self, index: int, what: str) -> UserError:
        """The error that refuses a record."""
        return self._damaged(int(self.offsets[index]), what)

    def _damaged(self, offset, what) -> UserError:
        return UserError(f"{self.path}: {what}, at byte {offset}; {FETCH_AGAIN}")


class TFRecordSource(PythonSource):
    """The images of one split in one size.

    Args:
        root: Folder that holds the splits.
        split: ``train``, ``validation`` or ``test``.
        spec: Size, channels and bits of the images.
        cropped: Whether the pipeline crops the images; then one side may be larger than the spec's.

    Raises:
        UserError: A shard is missing or damaged, or the split is empty.
    """

    def __init__(self, root: Path, split: str, spec: ImageSpec, cropped: bool = False):
        super().__init__(np.uint8 if spec.bits <= 8 else np.uint16)
        self.spec, self.cropped = spec, cropped
        self.shards = [Shard(path) for path in find_shards(root, split, spec.shape[:2])]
        self.ends = np.cumsum([len(shard.offsets) for shard in self.shards])
        if len(self) == 0:
            raise UserError(f"{root / split}: the tfrecords hold no images; {FETCH_AGAIN}")

    def __len__(self):
        return int(self.ends[-1])

    def file_names(self):
        """The names of the shards."""
        return [shard.path.name for shard in self.shards]

    def fetch(self, index):
        """Reads one record."""
        shard_index = int(np.searchsorted(self.ends, index, side="right"))
        shard = self.shards[shard_index]
        record_index = index - (int(self.ends[shard_index - 1]) if shard_index else 0)
        image, label, bits = shard.example(record_index)
        height, width, channels = image.shape
        spec = self.spec
        if channels != spec.channels:
            raise shard.damaged(
                record_index, f"its image has {channels} channels, not {spec.channels}"
            )
        if bits != spec.bits:
            raise shard.damaged(record_index, f"its image has {bits} bits, not {spec.bits}")
        larger = (height == spec.height) + (width == spec.width)
        if height < spec.height or width < spec.width or larger < (1 if self.cropped else 2):
            raise UserError(
                f"{shard.path}: the image at byte {shard.offsets[record_index]} is {width}x{height}, "
                f"not {spec.size_text}; {FETCH_AGAIN}"
            )
        return image.astype(self.dtype, copy=False), label


def serialize(image: np.ndarray, label: int = 0, bits: int = 8) -> bytes:
    """Serializes an image (height, width, channels), uint8 or uint16, as a ``tf.train.Example``."""
    example = tf.train.Example()
    features = example.features.feature
    features["shape"].int64_list.value.extend(image.shape)
    features["data"].bytes_list.value.append(image.astype("u1" if bits <= 8 else "<u2").tobytes())
    features["label"].int64_list.value.append(label)
    if bits != 8:
        features["bits"].int64_list.value.append(bits)
    return example.SerializeToString()


def masked_crc(data: bytes) -> int:
    """Computes TensorFlow's masked CRC-32C."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

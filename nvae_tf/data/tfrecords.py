"""Reads and writes GLOW's tfrecords, the format of every large data set here.

``DIR/train/train-rRR-s-SSSS-of-NNNN.tfrecords`` and ``DIR/validation/validation-rRR-...``, where RR
is the binary logarithm of the size. Each record is a ``tf.train.Example`` with ``shape`` (height,
width, channels), ``data`` (the image's bytes) and ``label``.

A file holds, for each record: its length (8 bytes, little-endian), a checksum of those 8 bytes, the
record, and its checksum (4 bytes each).
"""

import mmap
import re
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import tensorflow as tf

from nvae_tf.data.source import PythonSource
from nvae_tf.io.errors import UserError
from nvae_tf.io.paths import is_regular, user_path

SHARD = re.compile(
    r"(?P<split>\w+)-r(?P<bits>\d\d)-s-(?P<index>\d{4})-of-(?P<count>\d{4})\.tfrecords"
)
HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
LARGEST_RECORD = 2**28  # bytes
FETCH_AGAIN = "fetch or prepare this file again"


def shard_name(split: str, size: int, index: int, count: int) -> str:
    """Returns the name of a shard."""
    return f"{split}-r{size.bit_length() - 1:02d}-s-{index:04d}-of-{count:04d}.tfrecords"


def find_root(folder: str, splits=("train",)) -> Path:
    """Finds the folder that holds ``train/``: the one given, or one below it, as archives unpack to.

    Args:
        folder: Path as the user wrote it.
        splits: Names of splits, of which the folder has to hold one.

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
        for split in splits
        for path in start.rglob(f"{split}/{split}-r*.tfrecords")
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


def sizes(root: Path, split: str) -> list[int]:
    """Returns the image sizes in which a split is present, in pixels."""
    matches = (SHARD.fullmatch(path.name) for path in (root / split).glob("*.tfrecords"))
    return sorted(
        {2 ** int(match["bits"]) for match in matches if match and match["split"] == split}
    )


def find_shards(root: Path, split: str, size: int) -> list[Path]:
    """Finds the shards of a split in one size, in order.

    Raises:
        UserError: There are none, or one is missing.
    """
    present = {}
    for path in (root / split).glob(f"{split}-r{size.bit_length() - 1:02d}-s-*.tfrecords"):
        match = SHARD.fullmatch(path.name)
        if match:
            present.setdefault(int(match["count"]), {})[int(match["index"])] = path
    if not present:
        others = ", ".join(f"{s}x{s}" for s in sizes(root, split)) or "none"
        raise UserError(
            f"{root / split}: no tfrecords of {size}x{size} images (files r{size.bit_length() - 1:02d})"
            f"; sizes present: {others}; choose one with --image_size"
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

    def example(self, index: int, channels: int) -> tuple[np.ndarray, int]:
        """Reads the image (height, width, channels) and the label of a record.

        Raises:
            UserError: The record is not an example, or shape and bytes disagree.
        """
        data = self.record(index)
        try:
            features = tf.train.Example.FromString(data).features.feature
            shape = tuple(features["shape"].int64_list.value[:4])
            (pixels,) = features["data"].bytes_list.value[:2]
            label = next(iter(features["label"].int64_list.value), 0)
        except Exception:  # noqa: BLE001 - protobuf's own classes differ by its implementation
            raise self._damaged(
                int(self.offsets[index]), "the record is not an example with shape and data"
            ) from None
        if len(shape) != 3 or min(shape) < 1 or np.prod(shape, dtype=object) != len(pixels):
            raise self._damaged(
                int(self.offsets[index]),
                f"its shape {shape} is not that of its {len(pixels)} bytes",
            )
        if shape[2] != channels:
            raise self._damaged(
                int(self.offsets[index]), f"its image has {shape[2]} channels, not {channels}"
            )
        return np.frombuffer(pixels, np.uint8).reshape(shape), label

    def _damaged(self, offset, what) -> UserError:
        return UserError(f"{self.path}: {what}, at byte {offset}; {FETCH_AGAIN}")


class TFRecordSource(PythonSource):
    """The images of one split in one size.

    Args:
        root: Folder that holds the splits.
        split: ``train``, ``validation`` or ``test``.
        size: Height and width of the images in pixels.
        cropped: Whether the pipeline crops the images, which may then be larger on one side.
        channels: Number of channels of the images.

    Raises:
        UserError: A shard is missing or damaged, or the split is empty.
    """

    def __init__(self, root: Path, split: str, size: int, cropped: bool = False, channels: int = 3):
        super().__init__()
        self.size, self.cropped, self.channels = size, cropped, channels
        self.shards = [Shard(path) for path in find_shards(root, split, size)]
        self.ends = np.cumsum([len(shard.offsets) for shard in self.shards])
        if len(self) == 0:
            raise UserError(f"{root / split}: the tfrecords hold no images; {FETCH_AGAIN}")

    def __len__(self):
        return int(self.ends[-1])

    def fetch(self, index):
        """Reads one record."""
        shard_index = int(np.searchsorted(self.ends, index, side="right"))
        shard = self.shards[shard_index]
        record_index = index - (int(self.ends[shard_index - 1]) if shard_index else 0)
        image, label = shard.example(record_index, self.channels)
        height, width, _ = image.shape
        fits = min(height, width) == self.size and (self.cropped or height == width)
        if not fits:
            raise UserError(
                f"{shard.path}: the image at byte {shard.offsets[record_index]} is {height}x{width}, "
                f"not {self.size}x{self.size}; {FETCH_AGAIN}"
            )
        return image, label


def serialize(image: np.ndarray, label: int = 0) -> bytes:
    """Serializes an image (height, width, channels) as a ``tf.train.Example``."""
    example = tf.train.Example()
    features = example.features.feature
    features["shape"].int64_list.value.extend(image.shape)
    features["data"].bytes_list.value.append(image.tobytes())
    features["label"].int64_list.value.append(label)
    return example.SerializeToString()


def masked_crc(data: bytes) -> int:
    """Computes TensorFlow's masked CRC-32C."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

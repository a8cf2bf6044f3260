"""The file: what it says of itself, the coder's stack, and a checksum of all.

    8 bytes  MAGIC, which ends in the version of the format
    4 bytes  size of the header, little-endian, as all numbers
    4 bytes  number of words of the stack
    header   JSON, compressed with zlib
    stack    the states of the lanes, 8 bytes each, then the words, 4 bytes each
    32 bytes SHA-256 of everything before

The checksum is compared before anything else is read, and every length is bounded.
"""

import base64
import dataclasses
import hashlib
import json
import struct
import zlib
from pathlib import Path

import numpy as np

from nvae_tf.compression.pictures import MOST_IMAGES, check_names, numbered_name
from nvae_tf.compression.rans import LOWEST
from nvae_tf.io.errors import UserError, short_message
from nvae_tf.io.files import atomic_write
from nvae_tf.io.paths import is_regular

MAGIC = b"\x8fNVAEBB\x01"
SIZES = struct.Struct("<II")
CHECKSUM = 32  # bytes
BLOCK = 64  # images that share a checksum
LARGEST_FILE = 1 << 33  # bytes
LARGEST_HEADER = 1 << 26  # bytes, when it is no longer compressed
MOST_LANES = 1 << 10
MOST_LATENTS = 1 << 26


@dataclasses.dataclass
class Header:
    """What a file says of itself.

    Attributes:
        made_with: All that is known of what numbers depend on (`nvae_tf.compression.fingerprint`).
        trial: A digest of an image of noise, coded.
        count: Number of images.
        names: Their file names; None if they are numbered.
        checksums: A digest of every 64 images, as hexadecimal text.
        left_out: The latents that are not coded, one bit each, in base64.
        padded: Whether all images have padding of 0, which is not coded.
        lanes: Number of states of the coder.
        initial_words: Number of random words that the coder began with.
        nelbo_bits: Negative evidence lower bound of the draws that were made, over all images.
    """

    made_with: dict[str, str]
    trial: str
    count: int
    names: list[str] | None
    checksums: list[str]
    left_out: str
    padded: bool
    lanes: int
    initial_words: int
    nelbo_bits: float

    def name(self, index: int) -> str:
        """The file name of an image."""
        return numbered_name(index) if self.names is None else self.names[index]

    def left_out_of(self, sizes: list[int]) -> list[np.ndarray]:
        """For each group which latents are not coded, bool (latents,).

        Args:
            sizes: Number of latents of each group.

        Raises:
            ValueError: The file is about another number of latents.
        """
        packed = np.frombuffer(base64.b64decode(self.left_out, validate=True), np.uint8)
        if len(packed) != -(-sum(sizes) // 8):
            raise ValueError("another number of latents")
        flat = np.unpackbits(packed, count=sum(sizes)).astype(bool)
        return np.split(flat, np.cumsum(sizes)[:-1])

    def check(self) -> None:
        """Checks types and bounds.

        Raises:
            ValueError: Something is not as `write` writes it.
            UserError: A name is not allowed.
        """
        numbers = {
            "count": (self.count, 1, MOST_IMAGES),
            "lanes": (self.lanes, 1, MOST_LANES),
            "initial_words": (self.initial_words, 0, LARGEST_FILE),
        }
        for name, (value, lowest, highest) in numbers.items():
            if type(value) is not int or not lowest <= value <= highest:
                raise ValueError(f"{name} is out of range")
        texts = isinstance(self.made_with, dict) and _are_texts(
            [self.trial, *self.made_with.keys(), *self.made_with.values()]
        )
        types = isinstance(self.nelbo_bits, float) and isinstance(self.padded, bool)
        if not texts or not types or not np.isfinite(self.nelbo_bits):
            raise ValueError("a field is of another type")
        if not isinstance(self.left_out, str) or len(self.left_out) > MOST_LATENTS // 4:
            raise ValueError("left_out is out of range")
        if not _are_texts(self.checksums) or len(self.checksums) != -(-self.count // BLOCK):
            raise ValueError("checksums are missing")
        if self.names is not None:
            if not _are_texts(self.names) or len(self.names) != self.count:
                raise ValueError("names are missing")
            check_names(self.names, "names in the file")


def pack_left_out(left_out: list[np.ndarray]) -> str:
    """The text of `Header.left_out`."""
    return base64.b64encode(np.packbits(np.concatenate(left_out)).tobytes()).decode("ascii")


def block_checksum(images: list[np.ndarray]) -> str:
    """The digest of up to `BLOCK` images' levels."""
    digest = hashlib.sha256()
    for levels in images:
        digest.update(levels.astype("<u2").tobytes())
    return digest.hexdigest()[:16]


def write(path: Path, header: Header, heads: np.ndarray, words: np.ndarray) -> int:
    """Writes a file atomically.

    Args:
        path: Path of the file.
        header: What it says of itself.
        heads: The states of the coder, uint64 (lanes,).
        words: Its words, uint32.

    Returns:
        The file's size in bytes.
    """
    header.check()
    packed = zlib.compress(json.dumps(dataclasses.asdict(header)).encode(), 9)
    content = b"".join(
        [
            MAGIC,
            SIZES.pack(len(packed), len(words)),
            packed,
            heads.astype("<u8").tobytes(),
            words.astype("<u4").tobytes(),
        ]
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(content + hashlib.sha256(content).digest())
    return len(content) + CHECKSUM


def read(path: Path) -> tuple[Header, np.ndarray, np.ndarray, int]:
    """Reads a file.

    Args:
        path: Path of the file.

    Returns:
        The header, the states, uint64 (lanes,), the words, uint32, and the file's size in bytes.

    Raises:
        UserError: It is not such a file, is of another version, or is damaged.
    """
    content = _read_bytes(path)
    if content[: len(MAGIC) - 1] != MAGIC[:-1]:
        raise UserError(f"{path}: not a file that nvae-compress wrote")
    if hashlib.sha256(content[:-CHECKSUM]).digest() != content[-CHECKSUM:]:
        raise UserError(f"{path}: damaged (its checksum is another); fetch it again")
    if content[len(MAGIC) - 1] != MAGIC[-1]:
        raise UserError(f"{path}: of another version of the format; use the nvae-tf that made it")
    try:
        return *_parse(content), len(content)
    except (ValueError, TypeError, KeyError, zlib.error, RecursionError, struct.error) as error:
        raise UserError(f"{path}: damaged ({short_message(error)}); fetch it again") from None


def is_ours(path: Path) -> bool:
    """Whether a file begins as those of this format do."""
    if not is_regular(path):
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC) - 1) == MAGIC[:-1]


def _read_bytes(path: Path) -> bytes:
    try:
        if not is_regular(path):
            raise ValueError("no such file")
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({short_message(error)})") from None


def _parse(content: bytes) -> tuple[Header, np.ndarray, np.ndarray]:
    start = len(MAGIC) + SIZES.size
    header_size, num_words = SIZES.unpack(content[len(MAGIC) : start])
    packed = content[start : start + header_size]
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(packed, LARGEST_HEADER)
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("the header is too large or has no end")
    header = Header(**json.loads(text))
    header.check()
    stack = content[start + header_size : -CHECKSUM]
    if len(stack) != 8 * header.lanes + 4 * num_words:
        raise ValueError("it is too short or too long")
    heads = np.frombuffer(stack, "<u8", header.lanes).astype(np.uint64)
    words = np.frombuffer(stack, "<u4", num_words, 8 * header.lanes).astype(np.uint32)
    if (heads < LOWEST).any():
        raise ValueError("a state is too small")
    return header, heads, words


def _are_texts(values) -> bool:
    """Whether values are a list of texts; a text or a dictionary of texts is none."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)

"""Images to a file, and back."""

import dataclasses
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nvae_tf.compression import file_format, fingerprint, left_out
from nvae_tf.compression.codec import Codec
from nvae_tf.compression.file_format import BLOCK, Header
from nvae_tf.compression.network import Network
from nvae_tf.compression.pictures import PictureSource, check_png, write_png
from nvae_tf.compression.rans import Exhausted, Stack
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import atomic_write_dir, check_writable, make_folder
from nvae_tf.model import NVAE

SEED = 1  # of initial bits, and of latents that are not coded
VALUES_PER_LANE = 64  # values of an image for each lane of the coder, at least
VALUES_PER_LANE_OF_ALL = 1024  # the same of all images together


@dataclasses.dataclass
class Report:
    """Where the bits of a file are: payload, initial and overhead bits make up its size.

    Attributes:
        images: Number of images.
        nelbo_bits: Negative evidence lower bound of the draws that were made: what is to be expected of
            `payload_bits`.
        payload_bits: What the images added to the coder's stack.
        initial_bits: Random bits that the stack began with; they are lost.
        overhead_bits: Header, checksums, and what the coder's states hold beyond that.
    """

    images: int
    payload_bits: int
    initial_bits: int
    nelbo_bits: int
    overhead_bits: int


def compress(model: NVAE, pictures: PictureSource, path: Path) -> Report:
    """Writes images into a file, without loss.

    Args:
        model: The model; for good compression, trained on images like these.
        pictures: The images.
        path: Path of the file; it is replaced if it is one of ours.

    Raises:
        UserError: Images of this model cannot be coded, one is not of its kind, or the file cannot be
            written.
    """
    if path.exists() and not file_format.is_ours(path):
        raise UserError(f"{path}: there is another file already; remove it, or choose another name")
    check_writable(path)  # before hours of coding, not after them
    network = Network(model)
    check_png(model.image, network.max_level)
    latents, padded = left_out.choose(network, pictures, SEED)
    codec = Codec(network, latents, padded, _lanes(model, len(pictures)), SEED)
    stack, nelbo, checksums, block = _initial_stack(codec), 0.0, [], []
    before = stack.bits
    for index in tqdm(range(len(pictures)), unit="image", desc="compress", disable=None):
        levels = pictures.levels(index)
        nelbo += codec.encode(stack, levels, index)
        if not np.isfinite(nelbo):
            raise UserError(
                f"image {index}: the model's numbers are not finite there; train it longer, or with "
                "other settings"
            )
        block.append(levels)
        if len(block) == BLOCK or index == len(pictures) - 1:
            checksums.append(file_format.block_checksum(block))
            block = []
    header = Header(
        made_with=fingerprint.made_with(model),
        trial=fingerprint.trial_digest(codec),
        count=len(pictures),
        names=pictures.names,
        checksums=checksums,
        left_out=file_format.pack_left_out(latents),
        padded=padded,
        lanes=codec.lanes,
        initial_words=len(stack.drawn),
        nelbo_bits=nelbo,
    )
    size = file_format.write(path, header, stack.heads, stack.words)
    return _report(header, stack.bits - before, size)


def decompress(model: NVAE, path: Path, folder: Path) -> Report:
    """Writes the images of a file into a folder, as PNGs.

    Args:
        model: The model that the file was made with.
        path: Path of the file.
        folder: Path of the folder, which does not exist or is empty.

    Raises:
        UserError: The file is damaged, was made with another model or on another kind of machine, or
            the folder cannot be written; then nothing is written.
    """
    if folder.exists() and folder.resolve() == Path.cwd():
        raise UserError(
            f"{folder}: is the current folder, which cannot be replaced; name another one"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not an empty folder; remove it, or choose another name")
    header, heads, words, size = file_format.read(path)
    fingerprint.check_same(fingerprint.made_with(model), header.made_with, path)
    try:
        parts = header.left_out_of([int(np.prod(shape)) for shape in model.latent_shapes])
    except ValueError:
        raise UserError(f"{path}: made with another model; name the one it was made with") from None
    codec = Codec(Network(model), parts, header.padded, header.lanes, SEED)
    if fingerprint.trial_digest(codec) != header.trial:
        raise UserError(
            f"{path}: this machine computes other numbers than the one that made it, although all that "
            "is known of both is the same; decode it there"
        )
    stack = Stack(heads, words)
    before = stack.bits
    make_folder(folder.parent)
    with atomic_write_dir(folder) as temporary:
        try:
            _decode_into(temporary, codec, header, stack)
            whole = _is_initial(codec, stack, header.initial_words)
        except Exhausted:
            whole = False
        if not whole:
            raise UserError(
                f"{path}: damaged, or the decoder computes other numbers; nothing written"
            )
    return _report(header, before - stack.bits, size)


def _decode_into(folder: Path, codec: Codec, header: Header, stack: Stack) -> None:
    """Decodes the images, the last one first; writes each 64 once their checksum is right."""
    block: list[np.ndarray] = []
    for index in tqdm(
        range(header.count - 1, -1, -1), unit="image", desc="decompress", disable=None
    ):
        block.insert(0, codec.decode(stack, index))
        if index % BLOCK == 0:
            if file_format.block_checksum(block) != header.checksums[index // BLOCK]:
                raise Exhausted
            for place, levels in enumerate(block):
                path = folder / header.name(index + place)
                write_png(path, levels, codec.network.model.image, codec.network.max_level)
            block = []


def _initial_stack(codec: Codec) -> Stack:
    """The stack of random bits that encoding begins with, always the same."""
    noise = np.random.Philox(key=codec.seed, counter=[0, 0, 0, 1 << 63])
    return Stack.random(
        codec.lanes, lambda count: (noise.random_raw(count) >> np.uint64(32)).astype(np.uint32)
    )


def _is_initial(codec: Codec, stack: Stack, count: int) -> bool:
    """Whether a stack is again what encoding began with, and the words that were drawn."""
    initial = _initial_stack(codec)
    if len(stack.words) != count or not np.array_equal(stack.heads, initial.heads):
        return False
    return np.array_equal(stack.words[::-1], initial.draw(count))


def _lanes(model: NVAE, count: int) -> int:
    """A power of 2: more lanes are faster, but each costs 64 bits."""
    values = int(np.prod(model.image.shape))
    lanes = min(values // VALUES_PER_LANE, values * count // VALUES_PER_LANE_OF_ALL)
    return min(1 << (max(lanes, 1).bit_length() - 1), file_format.MOST_LANES)


def _report(header: Header, bits: float, size: int) -> Report:
    payload, initial = round(bits), 32 * (header.lanes + header.initial_words)
    return Report(
        images=header.count,
        payload_bits=payload,
        initial_bits=initial,
        nelbo_bits=round(header.nelbo_bits),
        overhead_bits=8 * size - payload - initial,
    )

"""Looks through a folder of images: sizes, channels, values, and images that cannot be used."""

import concurrent.futures
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nvae_tf.data.image_files import ImageReader
from nvae_tf.data.stored import Item, Stored, UnreadableImage, full_range
from nvae_tf.io.errors import one_line
from nvae_tf.io.machine import usable_cores

UNREADABLE, TOO_SMALL, OTHER_CHANNELS = "unreadable", "too small", "of other channels"
UNREADABLE_FOLDER = "unreadable as a whole folder"
LISTED = 10  # number of skipped images that are named


class Facts(NamedTuple):
    """The properties of one image. Values do not include opacity.

    Attributes:
        item: The image.
        height: Height in pixels.
        width: Width in pixels.
        channels: Number of channels apart from opacity.
        has_alpha: Whether the image has opacity.
        is_transparent: Whether some pixels are not fully opaque.
        dtype: Type of the values.
        low: Smallest finite value.
        high: Largest finite value.
        not_numbers: Number of values that are NaN or infinite.
        outside: Number of finite values outside the range that was asked for.
    """

    item: Item
    height: int
    width: int
    channels: int
    has_alpha: bool
    is_transparent: bool
    dtype: np.dtype
    low: float
    high: float
    not_numbers: int
    outside: int

    @property
    def size_text(self) -> str:
        """Width x height."""
        return f"{self.width}x{self.height}"


class Skipped(NamedTuple):
    """An image that is not used, or a folder that cannot be read.

    Attributes:
        item: The image; for a folder, its path.
        kind: The kind of reason, a few words by which skipped images are counted.
        reason: The message that refuses the image.
    """

    item: Item
    kind: str
    reason: str


class Survey(NamedTuple):
    """The images of some files.

    Attributes:
        images: Readable images, in the order of the files.
        skipped: Unreadable images.
    """

    images: list[Facts]
    skipped: list[Skipped]


def look_through(
    paths: Iterable[Path],
    reader: ImageReader,
    limits: tuple[float, float] | None = None,
    strict: bool = False,
) -> Survey:
    """Reads every image of some files, on all cores and with a progress bar.

    Args:
        paths: The files.
        reader: The reader of the files.
        limits: The range of values that was asked for; values outside it are counted.
        strict: Whether to raise an error for the first unreadable image instead of skipping it.

    Raises:
        UnreadableImage: An image is unreadable and `strict` is set.
        UserError: The package for a format is not installed.
    """
    paths = list(paths)
    images, skipped = [], []
    with (
        concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool,
        tqdm(total=len(paths), unit="file", desc="survey", leave=False, disable=None) as bar,
    ):
        futures = [pool.submit(_look_into, path, reader, limits) for path in paths]
        try:
            for future in futures:
                for found in future.result():
                    if isinstance(found, Facts):
                        images.append(found)
                    elif strict:
                        raise UnreadableImage(found.reason)
                    else:
                        skipped.append(found)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Survey(images, skipped)


def _look_into(path: Path, reader: ImageReader, limits) -> list[Facts | Skipped]:
    try:
        items = reader.items(path)
    except UnreadableImage as error:
        return [Skipped(Item(path), UNREADABLE, str(error))]
    found: list[Facts | Skipped] = []
    for item in items:
        try:
            found.append(_facts(item, reader.read(item), limits))
        except UnreadableImage as error:
            found.append(Skipped(item, UNREADABLE, str(error)))
    return found


def _facts(item: Item, image: Stored, limits) -> Facts:
    values = image.values[..., :-1] if image.has_alpha else image.values
    opaque = full_range(values.dtype)[1]
    transparent = image.has_alpha and bool((image.values[..., -1] < opaque).any())
    not_numbers = 0
    finite = values
    if values.dtype.kind == "f":
        is_finite = np.isfinite(values)
        not_numbers = values.size - int(is_finite.sum())
        finite = values[is_finite] if not_numbers else values
    low, high = float(finite.min()), float(finite.max())
    outside = 0
    if limits and (low < limits[0] or high > limits[1]):
        outside = int(((finite < limits[0]) | (finite > limits[1])).sum())
    height, width, channels = values.shape
    return Facts(
        item, height, width, channels, image.has_alpha, transparent, values.dtype, low, high,
        not_numbers, outside,
    )  # fmt: skip


def describe(images: list[Facts]) -> str:
    """One line: how many images, bits, values, channels and sizes."""
    types = sorted({facts.dtype for facts in images}, key=str)
    bits = sorted({8 * dtype.itemsize for dtype in types if dtype.kind != "f"})
    words = [f"{' and '.join(map(str, bits))} bits"] if bits else []
    words += ["floating point"] if any(dtype.kind == "f" for dtype in types) else []
    low, high = min(f.low for f in images), max(f.high for f in images)
    channels = sorted({facts.channels for facts in images})
    names = {1: "grey", 3: "colour"}
    colours = " and ".join(names.get(count, f"{count} channels") for count in channels)
    by_area = sorted(images, key=lambda facts: (facts.height * facts.width, facts.width))
    sizes = list(dict.fromkeys(facts.size_text for facts in (by_area[0], by_area[-1])))
    return ", ".join(
        [
            f"{len(images):,} images",
            " and ".join(words),
            f"values {number(low)} to {number(high)}",
            colours,
            " to ".join(sizes),
        ]
    )


def number(value: float) -> str:
    """A value as text for users: whole numbers have commas between thousands."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.6g}"


def skipped_line(skipped: list[Skipped], total: int) -> str:
    """How many images are skipped, and why, in one line."""
    kinds = count_kinds(each.kind for each in skipped)
    return f"skipped: {len(skipped):,} of {total:,} images ({kinds})"


def count_kinds(kinds: Iterable[str]) -> str:
    """How often each kind of reason occurs, such as ``3 too small, 1 unreadable``."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(Counter(kinds).items()))


def first_lines(reasons: list[str]) -> list[str]:
    """The first `LISTED` reasons, indented, and a line with the number of further ones."""
    lines = [f"  {one_line(reason)}" for reason in reasons[:LISTED]]
    more = len(reasons) - LISTED
    return lines + ([f"  and {more:,} more"] if more > 0 else [])


def skipped_lines(skipped: list[Skipped], total: int) -> list[str]:
    """How many images are skipped and why, then the first of them by name; empty if there are none."""
    if not skipped:
        return []
    return [skipped_line(skipped, total), *first_lines([each.reason for each in skipped])]

"""Chooses size, channels, bits and value range for the images of a folder, if the user has not."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nvae_tf.config import AUTO, DROP, FULL, KEEP, DataConfig
from nvae_tf.config_keys import LARGEST_FLOAT
from nvae_tf.data import levels
from nvae_tf.data.stored import full_range
from nvae_tf.data.survey import (
    OTHER_CHANNELS,
    TOO_SMALL,
    Facts,
    Skipped,
    Survey,
    count_kinds,
    describe,
    number,
    skipped_line,
)
from nvae_tf.image_spec import MAX_BITS, MAX_CHANNELS, ImageSpec
from nvae_tf.io.errors import ConfigError, UserError

STEP, LARGEST_FOUND = 32, 256  # pixels: a chosen size is a multiple of STEP, at most LARGEST_FOUND
REACHING = 0.9  # portion of the images that have to be at least of the chosen size
SMALLER_SIZE = "ask for a smaller size or remove it"  # advice about an image that is too small
DARK = 1 / 16  # portion of the range; if all values are below it, pictures look black


class Decision(NamedTuple):
    """The decisions about a folder of images.

    Attributes:
        config: Section ``data`` of the configuration with nothing left open.
        images: The images that are used.
        skipped: The images that are not used.
        lines: Lines to print about what was found and decided.
        warnings: Those of the lines that matter even if nothing was left to decide.
    """

    config: DataConfig
    images: list[Facts]
    skipped: list[Skipped]
    lines: list[str]
    warnings: list[str]


def is_open(config: DataConfig) -> bool:
    """Whether a configuration leaves size, channels, bits or value range of images open."""
    chosen = config.size and config.channels and config.bits
    return not chosen or config.value_range in (AUTO, FULL)


def limits(config: DataConfig) -> tuple[float, float] | None:
    """The smallest and the largest value of ``value_range``; None if it is ``auto`` or ``full``.

    Raises:
        ConfigError: The values are not finite, or not in rising order.
    """
    if config.value_range in (AUTO, FULL):
        return None
    low, high = map(float, config.value_range.split(","))
    if not -LARGEST_FLOAT <= low < high <= LARGEST_FLOAT:
        raise ConfigError(
            f"value_range: {config.value_range} is not allowed; expected a smaller and a larger value, "
            f"up to {LARGEST_FLOAT:g}"
        )
    return low, high


def stored_spec(config: DataConfig) -> ImageSpec:
    """The description of the images under a configuration that leaves nothing open."""
    assert config.size is not None
    span = limits(config)
    is_levels = span == (0.0, 2.0**config.bits - 1.0)
    return ImageSpec(
        *config.size, config.channels, config.bits, value_range=None if is_levels else span
    )


def decide(config: DataConfig, survey: Survey, folder: Path) -> Decision:
    """Decides size, channels, bits and value range, and leaves out what does not fit.

    Args:
        config: Section ``data`` of the configuration, as the user has written it.
        survey: What the folder holds.
        folder: Path of the folder, for errors.

    Raises:
        UserError: No image can be used, or one cannot be used and ``strict`` is set.
        ConfigError: Settings contradict each other or the images.
    """
    total = len(survey.images) + len(survey.skipped)
    if not survey.images:
        raise _nothing_left(folder, survey.skipped, total)
    lines = [describe(survey.images)]
    images, skipped = survey.images, list(survey.skipped)
    config, images = _channels(config, images, skipped, lines)
    config = _size(config, images, folder, lines)
    images = _large_enough(config, images, skipped)
    if config.strict and skipped:
        raise UserError(skipped[0].reason)
    if not images:
        raise _nothing_left(folder, skipped, total)
    warnings: list[str] = []
    config = _values(config, images, lines, warnings)
    lines += warnings
    if skipped:
        lines.append(f"{skipped_line(skipped, total)}, listed at the end; --strict refuses them")
    skipped.sort(key=lambda each: (each.item.path, each.item.place or 0))
    return Decision(config, images, skipped, lines, warnings)


def _nothing_left(folder: Path, skipped: list[Skipped], total: int) -> UserError:
    kinds = count_kinds(each.kind for each in skipped)
    return UserError(
        f"{folder}: none of the {total} images can be used ({kinds}); the first: "
        f"{skipped[0].reason}"
    )


def _channels(config: DataConfig, images: list[Facts], skipped: list[Skipped], lines: list[str]):
    """Decides ``alpha`` and ``channels``, and leaves out images that cannot have these channels."""
    transparent = sum(facts.is_transparent for facts in images)
    if transparent and config.alpha == DROP:
        lines.append(
            f"alpha: {transparent:,} images are transparent in places; that is dropped, and what "
            "lies under it becomes image (--alpha white, black or keep)"
        )
    with_alpha = any(facts.has_alpha for facts in images)
    alpha = config.alpha if with_alpha or config.channels else DROP
    if config.alpha == KEEP and not with_alpha:
        lines.append(
            "alpha: keep was asked for, and no image has opacity"
            + (": it is 1 everywhere" if alpha == KEEP else ", so there is no such channel")
        )
    kept = int(alpha == KEEP)
    counts = Counter(facts.channels for facts in images)
    if config.channels:
        colours = config.channels - kept
        if not colours:
            raise ConfigError("channels: 1 is not allowed with alpha keep, which is a channel more")
    else:
        colours = counts.most_common(1)[0][0]
        if colours == 1 and counts[3]:
            colours = 3
        if colours + kept > MAX_CHANNELS:
            raise ConfigError(f"alpha: keep is not allowed with images of {colours} channels")
    if counts[1] and counts[3] and colours in (1, 3):
        what = "grey is repeated" if colours == 3 else "colours become grey"
        lines.append(
            f"channels: {counts[1]:,} images are grey and {counts[3]:,} in colour; {what} "
            "(--channels 1 or 3)"
        )
    fitting = []
    for facts in images:
        if levels.can_become(facts.channels, colours):
            fitting.append(facts)
        else:
            reason = (
                f"{facts.item.name}: the image has {facts.channels} channels, which cannot become "
                f"{colours}; ask for others with --channels or remove it"
            )
            if facts.has_alpha and facts.channels + 1 == colours:
                reason += " (with its opacity as a channel: --alpha keep)"
            skipped.append(Skipped(facts.item, OTHER_CHANNELS, reason))
    return dataclasses.replace(config, channels=colours + kept, alpha=alpha), fitting


def _size(config: DataConfig, images: list[Facts], folder: Path, lines: list[str]) -> DataConfig:
    if config.size or not images:
        return config
    sides = sorted((min(facts.height, facts.width) for facts in images), reverse=True)
    reached = sides[math.ceil(REACHING * len(sides)) - 1]
    side = min(reached // STEP * STEP, LARGEST_FOUND)
    if not side:
        raise UserError(
            f"{folder}: the images are too small for a size to be found ({REACHING:.0%} of them reach "
            f"{reached} pixels); choose one with --image_size, or enlarge them"
        )
    lines.append(
        f"image_size: {side}, the largest multiple of {STEP} up to {LARGEST_FOUND} that "
        f"{REACHING:.0%} of the images reach (--image_size)"
    )
    return dataclasses.replace(config, image_size=str(side))


def _large_enough(config: DataConfig, images: list[Facts], skipped: list[Skipped]) -> list[Facts]:
    height, width = config.size or (1, 1)
    large = []
    for facts in images:
        if facts.height >= height and facts.width >= width:
            large.append(facts)
        else:
            reason = too_small(facts.item.name, facts.height, facts.width, (height, width))
            skipped.append(Skipped(facts.item, TOO_SMALL, reason))
    return large


def too_small(
    name: str, height: int, width: int, size: tuple[int, int], advice: str = SMALLER_SIZE
) -> str:
    """The message that refuses an image which is smaller than `size` (height, width)."""
    return f"{name}: the image is {width}x{height}, smaller than {size[1]}x{size[0]}; {advice}"


def _values(
    config: DataConfig, images: list[Facts], lines: list[str], warnings: list[str]
) -> DataConfig:
    """Decides ``bits`` and ``value_range``."""
    asked, types = config.value_range, {facts.dtype for facts in images}
    low, high = min(facts.low for facts in images), max(facts.high for facts in images)
    span = limits(config) or _find_range(asked, types, low, high)
    bits = config.bits or _find_bits(types, span)
    settled = dataclasses.replace(config, bits=bits, value_range=",".join(map(_exact, span)))
    words = asked if asked in (AUTO, FULL) else "as given"
    lines.append(
        f"values: {number(span[0])} to {number(span[1])} become {2**bits:,} levels, {bits} bits "
        f"(--value_range {words}, --bits)"
    )
    outside = sum(facts.outside for facts in images)
    if limits(config) and outside:
        affected = sum(facts.outside > 0 for facts in images)
        warnings.append(
            f"clipped: {outside:,} values of {affected:,} images are outside {settled.value_range}"
        )
    not_numbers = sum(facts.not_numbers for facts in images)
    if not_numbers:
        warnings.append(
            f"not numbers: {not_numbers:,} values are NaN or infinite, and become the nearest end of "
            "the range (NaN: the smallest value)"
        )
    dark = high - span[0] < DARK * (span[1] - span[0])
    if low == high:
        warnings.append(f"flat: every value is {number(low)}, so that all images are alike")
    elif dark or high - low < DARK * (span[1] - span[0]):
        what = (
            f"dark: no value is above {number(high)} of {number(span[1])}, so that images will look "
            "black"
            if dark
            else f"flat: all values are between {number(low)} and {number(high)}, a small part of the "
            "range"
        )
        warnings.append(f"{what}; --value_range={_exact(low)},{_exact(high)} uses all levels")
    if len({dtype.itemsize for dtype in types}) > 1:
        counts = Counter(str(facts.dtype) for facts in images)
        kinds = ", ".join(f"{count:,} of {name}" for name, count in sorted(counts.items()))
        lines.append(f"types: values of several types are mapped in the same way ({kinds})")
    return settled


def _find_range(asked: str, types: set[np.dtype], low: float, high: float) -> tuple[float, float]:
    has_floats = any(dtype.kind == "f" for dtype in types)
    if asked == FULL:
        if has_floats:
            raise ConfigError(
                "value_range: full is not allowed for floating-point values; expected MIN,MAX"
            )
        if any(dtype.itemsize > 2 for dtype in types):
            raise ConfigError(
                "value_range: full is not allowed for integers of 32 bits, of which one level would "
                "hold 65,536; expected auto or MIN,MAX"
            )
        ends = [full_range(dtype) for dtype in types]
        return min(end[0] for end in ends), max(end[1] for end in ends)
    if has_floats:
        if low >= 0.0 and high <= 1.0:
            return 0.0, 1.0
        return low, high if high > low else low + max(1.0, abs(low) / 2**20)
    if low >= 0.0:
        return 0.0, 2.0 ** max(8, int(high).bit_length()) - 1.0
    # Negative integers, such as Hounsfield units: one level per whole number, from the smallest on.
    bits = max(8, int(high - low).bit_length())
    return low, low + 2.0**bits - 1.0


def _find_bits(types: set[np.dtype], span: tuple[float, float]) -> int:
    """Enough bits for one level per whole number in the range, 8 to 16; 16 for floats."""
    if any(dtype.kind == "f" for dtype in types):
        return MAX_BITS
    return min(max(8, int(span[1] - span[0]).bit_length()), MAX_BITS)


def _exact(value: float) -> str:
    """A value as text for the configuration, from which float32 is recovered exactly."""
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else f"{value:.9g}"

"""Converts the values in a file to the levels that a model is trained on: size, channels, bits."""

import numpy as np
from PIL import Image

from nvae_tf.config import BLACK, CENTRE, DROP, KEEP, RANDOM
from nvae_tf.data.stored import Stored, full_range
from nvae_tf.image_spec import ImageSpec

GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of ITU-R 601-2
RESAMPLING = Image.Resampling.BILINEAR


def value_range(spec: ImageSpec) -> tuple[float, float]:
    """The stored values that become level 0 and the last level."""
    return spec.value_range or (0.0, 2.0**spec.bits - 1.0)


def colours(image: Stored) -> int:
    """The number of channels apart from opacity."""
    return image.values.shape[-1] - image.has_alpha


def can_become(own: int, wanted: int) -> bool:
    """Whether an image of `own` channels, apart from opacity, can become one of `wanted` channels."""
    return own == wanted or {own, wanted} == {1, 3}


def to_levels(image: Stored, spec: ImageSpec, crop: str = CENTRE, alpha: str = DROP) -> np.ndarray:
    """Maps an image's values to levels, and resizes it bilinearly with antialiasing.

    Images that are 8-bit before and after are resized as such; others are resized in float32, channel
    by channel. Values outside the value range are clipped to it, and NaN becomes its smallest value.

    Args:
        image: The image, not smaller than the spec's size.
        spec: Size, channels, bits and value range of the result.
        crop: ``"centre"``: scale the largest centred box of the spec's aspect ratio; ``"random"``: do
            not crop yet, but scale the image so that it covers the spec's size; ``"none"``: scale the
            whole image to the spec's size, which may distort it.
        alpha: What to do with opacity: ``"drop"`` it; lay the image on ``"white"`` or ``"black"``; or
            ``"keep"`` it as the last channel.

    Returns:
        Levels (height, width, channels), uint8 or, for more than 8 bits, uint16. With ``"random"``,
        height or width may be larger than the spec's.

    Raises:
        ValueError: The image's channels cannot become those of the spec.
    """
    low, high = value_range(spec)
    wanted = spec.channels - (alpha == KEEP)
    if not can_become(colours(image), wanted):
        raise ValueError(f"{colours(image)} channels cannot become {wanted}")
    values, opacity = _opacity(image)
    is_plain = values.dtype == np.uint8 and spec.bits == 8 and (low, high) == (0.0, 255.0)
    if not is_plain:
        values = _to_unit(values, low, high)
    if opacity is not None and alpha not in (DROP, KEEP):
        ground = 0.0 if alpha == BLACK else 255.0 if is_plain else 1.0
        values = _lay_on(values, opacity, ground)
    values = _with_channels(values, wanted)
    if alpha == KEEP:
        opacity = np.ones((*values.shape[:2], 1), np.float32) if opacity is None else opacity
        opacity = np.rint(opacity * 255.0).astype(np.uint8) if is_plain else opacity
        values = np.concatenate([values, opacity], axis=-1)
    resized = resize(values, spec.shape[:2], crop)
    if is_plain:
        return resized
    levels = np.rint(resized.astype(np.float64) * (2.0**spec.bits - 1.0))
    return levels.astype(np.uint8 if spec.bits <= 8 else np.uint16)


def _opacity(image: Stored) -> tuple[np.ndarray, np.ndarray | None]:
    """Splits an image into values and opacity; opacity is in [0, 1], (height, width, 1), or None."""
    if not image.has_alpha:
        return image.values, None
    values, opacity = image.values[..., :-1], image.values[..., -1:].astype(np.float32)
    _, opaque = full_range(image.values.dtype)
    return values, np.clip(np.nan_to_num(opacity) / np.float32(opaque), 0.0, 1.0)


def _to_unit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Maps values from a range to [0, 1], float32."""
    finite = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return ((np.clip(finite, low, high) - low) / (high - low)).astype(np.float32)


def _lay_on(values: np.ndarray, opacity: np.ndarray, ground: float) -> np.ndarray:
    laid = values * opacity + np.float32(ground) * (1.0 - opacity)
    return np.rint(laid).astype(np.uint8) if values.dtype == np.uint8 else laid


def _with_channels(values: np.ndarray, wanted: int) -> np.ndarray:
    """Converts between 1 and 3 channels: colours become grey, or grey is repeated."""
    if values.shape[-1] == wanted:
        return values
    if wanted == 3:
        return values.repeat(3, axis=-1)
    if values.dtype == np.uint8:
        return np.array(Image.fromarray(np.ascontiguousarray(values)).convert("L"))[..., None]
    return (values @ GREY)[..., None]


def resize(values: np.ndarray, size: tuple[int, int], crop: str) -> np.ndarray:
    """Resizes an image (height, width, channels) of uint8 or float32 as `to_levels` does."""
    height, width = values.shape[:2]
    box, target = _box(height, width, size, crop)
    if values.dtype == np.uint8 and values.shape[-1] == 3:
        colour = Image.fromarray(np.ascontiguousarray(values))
        return np.array(colour.resize(target, RESAMPLING, box=box))
    channels = [
        np.array(Image.fromarray(np.ascontiguousarray(channel)).resize(target, RESAMPLING, box=box))
        for channel in np.moveaxis(values, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def _box(height: int, width: int, size: tuple[int, int], crop: str):
    """The box to scale (left, top, right, bottom; None: all), and the target size (width, height)."""
    high, wide = size
    if crop == CENTRE:
        box_width, box_height = min(width, height * wide // high), min(height, width * high // wide)
        left, top = (width - box_width) // 2, (height - box_height) // 2
        return (left, top, left + box_width, top + box_height), (wide, high)
    if crop == RANDOM:
        scale = max(high / height, wide / width)
        return None, (max(wide, round(width * scale)), max(high, round(height * scale)))
    return None, (wide, high)

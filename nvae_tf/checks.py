"""What the model's methods check of their arguments, so that a wrong one is one line.

Types and shapes are checked wherever they are known; values where they are at hand: of numbers, NumPy's
arrays and eager tensors. No check adds an operation to a graph.
"""

import math

import numpy as np
import tensorflow as tf

from nvae_tf.config import ImageSpec
from nvae_tf.io.errors import UserError, short_repr

ROUNDING = 1e-3  # by which pixels may leave [0, 1]


def check_images(images, spec: ImageSpec) -> None:
    """Makes sure that images are what a model takes.

    Args:
        images: Array or tensor (batch, height, width, channels) of floats in [0, 1].
        spec: The model's images.

    Raises:
        UserError: They are something else.
    """
    expected = (None, *spec.shape)
    dtype, shape = _dtype(images), _shape(images)
    if dtype is None:
        raise UserError(f"images: {_kind(images)}; expected an array or tensor {_text(expected)}")
    if not dtype.is_floating:
        raise UserError(
            f"images: {_kind(images)}; expected floats in [0, 1], 8-bit values divided by 255"
        )
    if shape is not None and not _fits(shape, expected):
        raise UserError(
            f"images: shape {_text(shape)}; expected {_text(expected)}: {_remedy(shape, spec)}"
        )
    if _at_hand(images) and 0 not in images.shape:
        values = np.asarray(images)
        lowest, highest = float(values.min()), float(values.max())
        if not (lowest >= -ROUNDING and highest <= 1.0 + ROUNDING):
            raise UserError(
                f"images: values from {lowest:g} to {highest:g}; expected floats in [0, 1], 8-bit "
                "values divided by 255"
            )


def _remedy(shape: tuple, spec: ImageSpec) -> str:
    """What to do about images of another shape."""
    size, channels = spec.size, spec.channels
    inner = spec.scored_size or size
    whole: dict[tuple, str] = {spec.shape: "add the batch axis, images[None]"}
    each: dict[tuple, str] = {
        (channels, size, size): "put channels last, tf.transpose(images, [0, 2, 3, 1])",
        (size, size, 1): "repeat the grey channel, tf.repeat(images, 3, -1)",
        (size, size, 3): "make them grey, tf.image.rgb_to_grayscale(images)",
        (inner, inner, channels): f"add {(size - inner) // 2} pixels of 0 on every side",
    }
    if channels == 1:
        whole[size, size] = "add the batch and the channel axis, images[None, ..., None]"
        each[size, size] = "add the channel axis, images[..., None]"
    otherwise = "bring them to the size and the channels of the images of training"
    return whole.get(shape) or each.get(shape[1:]) or otherwise


def check_maps(name: str, maps, shapes: list, batch: int | None, all_groups: bool = True) -> None:
    """Makes sure that there is one tensor per latent group, of the group's shape.

    Args:
        name: What the tensors are called in errors.
        maps: List or tuple of tensors (batch, height, width, latents), top of the hierarchy first.
        shapes: (height, width, latents) of every group.
        batch: Rows of each tensor; None where it is not known.
        all_groups: Whether every group needs one; else the first groups may have one.

    Raises:
        UserError: They are something else.
    """
    expected = f"{len(shapes)} tensors, one per latent group"
    if not isinstance(maps, (list, tuple)):
        raise UserError(f"{name}: {_kind(maps)}; expected a list of {expected}")
    if len(maps) > len(shapes) or (all_groups and len(maps) < len(shapes)):
        most = "" if all_groups else "at most "
        raise UserError(f"{name}: a list of {len(maps)}; expected {most}{expected}")
    for group, (tensor, wanted) in enumerate(zip(maps, shapes, strict=False)):
        what = f"{name}: that of group {group} is"
        dtype, shape = _dtype(tensor), _shape(tensor)
        if dtype is None or not dtype.is_floating:
            z = ", its z" if hasattr(tensor, "z") else ""
            raise UserError(f"{what} {_kind(tensor)}; expected a tensor of floats{z}")
        if not _fits(shape, (None, *wanted)):
            raise UserError(f"{what} of shape {_text(shape)}; expected {_text((None, *wanted))}")
        rows = batch_of(tensor)
        batch = rows if batch is None else batch
        if rows not in (None, batch):
            raise UserError(f"{what} for a batch of {rows}; expected one of {batch}")


def check_parameters(parameters, spec: ImageSpec, count: int) -> None:
    """Makes sure that parameters are those of a model's image distribution.

    Args:
        parameters: Tensor (batch, height, width, parameters).
        spec: The model's images.
        count: Parameters of a pixel.

    Raises:
        UserError: They are something else.
    """
    expected, shape = (None, spec.size, spec.size, count), _shape(parameters)
    if _dtype(parameters) is None or not _fits(shape, expected):
        found = _kind(parameters) if shape is None else f"shape {_text(shape)}"
        raise UserError(f"parameters: {found}; expected a tensor {_text(expected)}")


def check_numbers(numbers) -> None:
    """Makes sure that images are counted or numbered.

    Args:
        numbers: How many images, or the number of each: an integer, or integers (batch,).

    Raises:
        UserError: It is something else.
    """
    values = np.asarray(numbers) if isinstance(numbers, (int, float, list, tuple)) else numbers
    dtype, shape = _dtype(values), _shape(values)
    if dtype is None or not dtype.is_integer or (shape is not None and len(shape) > 1):
        found = f"{_kind(numbers)}, shape {_text(shape)}" if shape else _kind(numbers)
        raise UserError(f"numbers: {found}; expected how many images, or the number of each")
    if shape == () and _at_hand(values) and int(values) < 1:
        raise UserError(f"numbers: {int(values)} images; expected at least 1")


def as_seed(seed):
    """A seed as TensorFlow's stateless operations take it.

    Args:
        seed: Two integers, or one: 3 stands for (3, 0).

    Raises:
        UserError: It is something else.
    """
    if _dtype(seed) is not None and _dtype(seed).is_integer and _fits(_shape(seed), (2,)):
        return seed
    parts = tuple(seed) if isinstance(seed, (list, tuple)) else (seed, 0)
    if len(parts) == 2 and all(map(_is_integer, parts)):
        return parts
    raise UserError(f"seed: {short_repr(seed)}; expected an integer, or two, of 64 bits")


def as_temperature(temperature, num_groups: int, above_zero: bool = False):
    """A temperature as a float32 tensor.

    Args:
        temperature: A number, or one for each latent group.
        num_groups: GroupOutput groups of the model.
        above_zero: Whether 0 is not allowed, as where pixels are drawn at it.

    Raises:
        UserError: It is something else, or negative.
    """
    expected = f"a number, or one for each of {num_groups} groups"
    try:
        values = tf.cast(temperature, tf.float32)
    except (TypeError, ValueError, tf.errors.OpError):
        raise UserError(f"temperature: {short_repr(temperature)}; expected {expected}") from None
    shape = _shape(values)
    if not any(_fits(shape, allowed) for allowed in ((), (1,), (num_groups,))):
        raise UserError(f"temperature: shape {_text(shape)}; expected {expected}")
    if _at_hand(temperature):
        lowest, highest = np.min(temperature), np.max(temperature)
        if not (lowest >= 0 and highest < math.inf) or (above_zero and lowest == 0):
            wanted = "above 0, at which colours are drawn" if above_zero else "at least 0"
            found = lowest if highest < math.inf else highest
            raise UserError(f"temperature: {found:g}; expected {wanted}")
    return values


def batch_of(tensor) -> int | None:
    """The rows of a tensor, where they are known."""
    shape = _shape(tensor)
    return shape[0] if shape else None


def _dtype(value) -> tf.DType | None:
    """The type of an array's or tensor's values; None of anything else."""
    try:
        return tf.as_dtype(value.dtype) if hasattr(value, "shape") else None
    except (AttributeError, TypeError):
        return None


def _shape(value) -> tuple | None:
    """An array's or tensor's shape, None for sizes that are not known; None of anything else."""
    shape = tf.TensorShape(getattr(value, "shape", None))
    return None if shape.rank is None else tuple(shape.as_list())


def _fits(shape: tuple | None, expected: tuple) -> bool:
    """Whether a shape may be the expected one."""
    return tf.TensorShape(shape).is_compatible_with(expected)


def _at_hand(value) -> bool:
    """Whether the values are known now, and not only when a graph runs."""
    if isinstance(value, (list, tuple)):
        return all(map(_at_hand, value))
    plain = isinstance(value, (int, float, np.ndarray, np.generic))
    return plain or (isinstance(value, tf.Tensor) and hasattr(value, "numpy"))


def _is_integer(value) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    dtype = _dtype(value)
    return dtype is not None and dtype.is_integer and _fits(_shape(value), ())


def _kind(value) -> str:
    dtype = _dtype(value)
    return f"of type {type(value).__name__ if dtype is None else dtype.name}"


def _text(shape: tuple | None) -> str:
    """A shape as it is written; a size that is not known is the batch's."""
    if shape is None:
        return "unknown"
    sizes = ["batch" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"

"""Checks of the arguments of the model's methods; a wrong argument is an error of one line.

Types and shapes are checked if they are known. Values are checked only of numbers, NumPy arrays and
eager tensors, so that no check adds an operation to a graph.
"""

import math

import numpy as np
import tensorflow as tf
import tf_keras

from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError, short_repr

ROUNDING = 1e-3  # by which pixels may lie outside [0, 1]


def check_images(images, spec: ImageSpec) -> None:
    """Checks images.

    Args:
        images: Array or tensor (batch, height, width, channels) of floats in [0, 1].
        spec: Specification of the model's images.

    Raises:
        UserError: The images have another type or shape, or other values.
    """
    expected = (None, *spec.shape)
    dtype, shape = _dtype(images), _shape(images)
    if dtype is None:
        raise UserError(
            f"images: {_type_text(images)}; expected an array or tensor {_shape_text(expected)}"
        )
    if not dtype.is_floating:
        raise UserError(f"images: {_type_text(images)}; expected {_values_text(spec)}")
    if shape is not None and not _fits(shape, expected):
        raise UserError(
            f"images: shape {_shape_text(shape)}; expected {_shape_text(expected)}: "
            f"{_remedy(shape, spec)}"
        )
    if shape is not None and shape[0] == 0:
        raise UserError("images: a batch of no images; expected one at least")
    check_values("images", images, spec)


def check_values(name: str, images, spec: ImageSpec) -> None:
    """Checks that the values of images lie in [0, 1], if they are known.

    Args:
        name: Name of the argument.
        images: Array or tensor of floats.
        spec: Specification of the model's images.

    Raises:
        UserError: They do not, or are not finite.
    """
    if _is_concrete(images):
        values = np.asarray(images)
        lowest, highest = float(values.min()), float(values.max())
        if not (lowest >= -ROUNDING and highest <= 1.0 + ROUNDING):
            raise UserError(
                f"{name}: values from {lowest:g} to {highest:g}; expected {_values_text(spec)}"
            )


def _values_text(spec: ImageSpec) -> str:
    """What a model expects as the values of images."""
    return f"floats in [0, 1], {spec.bits}-bit values divided by {2**spec.bits - 1}"


def _remedy(shape: tuple, spec: ImageSpec) -> str:
    """What a user can do about images of another shape."""
    height, width, channels = spec.shape
    rows, columns = spec.scored_part
    inner = (rows.stop - rows.start, columns.stop - columns.start)
    above, left = rows.start, columns.start
    padding = f"add {above} pixels of 0 on every side"
    if above != left:
        padding = f"add {above} rows of 0 above and below, and {left} columns left and right"
    by_shape: dict[tuple, str] = {spec.shape: "add the batch axis, images[None]"}
    by_image_shape: dict[tuple, str] = {
        (channels, height, width): "put channels last, tf.transpose(images, [0, 2, 3, 1])",
        (width, height, channels): "exchange height and width, tf.transpose(images, [0, 2, 1, 3])",
        (*inner, channels): padding,
    }
    if channels == 3:
        by_image_shape[height, width, 1] = "repeat the grey channel, tf.repeat(images, 3, -1)"
    if channels == 1:
        by_image_shape[height, width, 3] = "make them grey, tf.image.rgb_to_grayscale(images)"
        by_shape[height, width] = "add the batch and the channel axis, images[None, ..., None]"
        by_image_shape[height, width] = "add the channel axis, images[..., None]"
    default = "bring them to the size and the channels of the images of training"
    return by_shape.get(shape) or by_image_shape.get(shape[1:]) or default


def is_array(x) -> bool:
    """Whether images are given as one array or tensor, and not as a data set."""
    return isinstance(x, (np.ndarray, tf.Tensor, tf.Variable))


def check_count(name: str, value, minimum: int = 1, optional: bool = False) -> None:
    """Checks that an argument is a whole number.

    Args:
        name: Name of the argument.
        value: Its value.
        minimum: Smallest value.
        optional: Whether None is allowed.

    Raises:
        UserError: It is another value.
    """
    is_count = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not (optional and value is None) and not (is_count and value >= minimum):
        raise UserError(
            f"{name}: {short_repr(value)} is not allowed; expected a whole number, at least {minimum}"
        )


def check_flag(name: str, value) -> None:
    """Checks that an argument is True or False.

    Args:
        name: Name of the argument.
        value: Its value.

    Raises:
        UserError: It is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise UserError(f"{name}: {short_repr(value)} is not allowed; expected True or False")


def check_groups(groups, num_groups: int) -> None:
    """Checks indices of latent groups.

    Args:
        groups: The indices.
        num_groups: Number of groups of the model.

    Raises:
        UserError: It is not a list of them.
    """
    numbers = range(num_groups)
    if not isinstance(groups, (list, tuple, range, np.ndarray)) or not all(
        g in numbers for g in groups
    ):
        raise UserError(
            f"groups: {short_repr(groups)} is not allowed; expected a list of numbers from 0, the "
            f"coarsest, to {num_groups - 1}"
        )


def checked_callbacks(callbacks):
    """Callbacks as a list; a list of Keras's own kind stays as it is.

    Args:
        callbacks: A callback, several, or None.

    Raises:
        UserError: There is something else among them.
    """
    if isinstance(callbacks, tf_keras.callbacks.CallbackList):
        return callbacks
    if callbacks is None or isinstance(callbacks, tf_keras.callbacks.Callback):
        callbacks = [callbacks] if callbacks else []
    if isinstance(callbacks, (list, tuple)):
        strange = [c for c in callbacks if not isinstance(c, tf_keras.callbacks.Callback)]
        if not strange:
            return list(callbacks)
        callbacks = strange[0]
    raise UserError(
        f"callbacks: {short_repr(callbacks)} is not allowed; expected callbacks of tf_keras or of "
        "nvae_tf.callbacks"
    )


def images_of_dataset(
    dataset: tf.data.Dataset, spec: ImageSpec
) -> tuple[tf.data.Dataset, tf.Tensor]:
    """The images alone of a data set of batches; the first batch is checked.

    Args:
        dataset: Batches of images, or tuples that begin with one.
        spec: Specification of the model's images.

    Returns:
        A data set of batches of images, float32, and the first batch.

    Raises:
        UserError: It is no data set, or holds something else, or nothing.
    """
    if not isinstance(dataset, tf.data.Dataset):
        raise UserError(
            f"x: of type {type(dataset).__name__}; expected an array or tensor of images, or a "
            "tf.data.Dataset of batches of them"
        )
    element = dataset.element_spec
    if isinstance(element, tuple) and element:
        dataset, element = dataset.map(lambda images, *_: images), element[0]
    if not isinstance(element, tf.TensorSpec):
        raise UserError(
            f"x: a data set of {short_repr(element)}; expected batches of images, or tuples that "
            "begin with one"
        )
    if element.shape.rank == 3:
        raise UserError("x: a data set of single images; expected batches, dataset.batch(32)")
    check_images(element, spec)
    first = next(iter(dataset.take(1)), None)
    if first is None:
        raise UserError("x: an empty data set")
    check_images(first, spec)
    if element.dtype != tf.float32:
        dataset = dataset.map(lambda images: tf.cast(images, tf.float32))
    return dataset, first


def check_ends(dataset: tf.data.Dataset, steps: int | None) -> None:
    """Checks that there is an end to the batches that are asked for.

    Args:
        dataset: The batches.
        steps: How many to take; None for all.

    Raises:
        UserError: All of an endless data set are asked for.
    """
    if steps is None and dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise UserError("x: an endless data set; say how many batches to take")


def check_maps(name: str, maps, shapes: list, batch: int | None, all_groups: bool = True) -> None:
    """Checks tensors that are shaped as the latents of the groups.

    Args:
        name: Name of the argument, for errors.
        maps: List or tuple of tensors (batch, height, width, latents), top of the hierarchy first.
        shapes: Shape (height, width, latents) of every group's latents.
        batch: Batch size of each tensor; None if it is unknown.
        all_groups: Whether every group needs a tensor. If not, the first groups may have one.

    Raises:
        UserError: They are not a list, their number is wrong, or one has another type or shape.
    """
    expected = f"{len(shapes)} tensors, one per latent group"
    if not isinstance(maps, (list, tuple)):
        raise UserError(f"{name}: {_type_text(maps)}; expected a list of {expected}")
    if len(maps) > len(shapes) or (all_groups and len(maps) < len(shapes)):
        most = "" if all_groups else "at most "
        raise UserError(f"{name}: a list of {len(maps)}; expected {most}{expected}")
    for group, (tensor, expected_shape) in enumerate(zip(maps, shapes, strict=False)):
        prefix = f"{name}: that of group {group} is"
        dtype, shape = _dtype(tensor), _shape(tensor)
        if dtype is None or not dtype.is_floating:
            z = ", its z" if hasattr(tensor, "z") else ""
            raise UserError(f"{prefix} {_type_text(tensor)}; expected a tensor of floats{z}")
        if not _fits(shape, (None, *expected_shape)):
            expected = _shape_text((None, *expected_shape))
            raise UserError(f"{prefix} of shape {_shape_text(shape)}; expected {expected}")
        rows = batch_of(tensor)
        batch = rows if batch is None else batch
        if rows not in (None, batch):
            raise UserError(f"{prefix} for a batch of {rows}; expected one of {batch}")


def check_parameters(parameters, spec: ImageSpec, count: int) -> None:
    """Checks the parameters of an image distribution.

    Args:
        parameters: Tensor (batch, height, width, parameters).
        spec: Specification of the model's images.
        count: Number of parameters per pixel.

    Raises:
        UserError: It is not a tensor, or has another shape.
    """
    expected, shape = (None, spec.height, spec.width, count), _shape(parameters)
    if _dtype(parameters) is None or not _fits(shape, expected):
        actual = _type_text(parameters) if shape is None else f"shape {_shape_text(shape)}"
        raise UserError(f"parameters: {actual}; expected a tensor {_shape_text(expected)}")


def check_indices(indices) -> None:
    """Checks the indices of images, or their number.

    Args:
        indices: Number of images, an integer; or the index of each, integers (batch,).

    Raises:
        UserError: It has another type or shape, or is an integer below 1.
    """
    values = np.asarray(indices) if isinstance(indices, (int, float, list, tuple)) else indices
    dtype, shape = _dtype(values), _shape(values)
    if dtype is None or not dtype.is_integer or (shape is not None and len(shape) > 1):
        actual = _type_text(indices)
        actual = f"{actual}, shape {_shape_text(shape)}" if shape else actual
        raise UserError(f"indices: {actual}; expected the number of images, or the index of each")
    if shape == () and _is_concrete(values) and int(values) < 1:
        raise UserError(f"indices: {int(values)} images; expected at least 1")


def as_seed(seed):
    """Converts a seed to what TensorFlow's stateless operations take.

    Args:
        seed: Two integers, or one: 3 stands for (3, 0).

    Returns:
        Two integers.

    Raises:
        UserError: It is not one or two integers of 64 bits.
    """
    if _dtype(seed) is not None and _dtype(seed).is_integer and _fits(_shape(seed), (2,)):
        return seed
    parts = tuple(seed) if isinstance(seed, (list, tuple)) else (seed, 0)
    if len(parts) == 2 and all(map(_is_integer, parts)):
        return parts
    raise UserError(f"seed: {short_repr(seed)}; expected an integer, or two, of 64 bits")


def as_temperature(temperature, num_groups: int, above_zero: bool = False):
    """Converts a temperature to a float32 tensor.

    Args:
        temperature: A number, or one per latent group.
        num_groups: Number of latent groups of the model.
        above_zero: Whether 0 is refused too, because pixels are drawn at this temperature.

    Returns:
        A tensor of shape (), (1,) or (groups,).

    Raises:
        UserError: It is not a number, has another shape, or is negative or not finite.
    """
    expected = f"a number, or one for each of {num_groups} groups"
    try:
        values = tf.cast(temperature, tf.float32)
    except (TypeError, ValueError, tf.errors.OpError):
        raise UserError(f"temperature: {short_repr(temperature)}; expected {expected}") from None
    shape = _shape(values)
    if not any(_fits(shape, allowed) for allowed in ((), (1,), (num_groups,))):
        raise UserError(f"temperature: shape {_shape_text(shape)}; expected {expected}")
    if _is_concrete(temperature):
        lowest, highest = np.min(temperature), np.max(temperature)
        if not (lowest >= 0 and highest < math.inf) or (above_zero and lowest == 0):
            limit = "above 0, at which colours are drawn" if above_zero else "at least 0"
            refused = lowest if highest < math.inf else highest
            raise UserError(f"temperature: {refused:g}; expected {limit}")
    return values


def batch_of(tensor) -> int | None:
    """The batch size of a tensor; None if it is unknown."""
    shape = _shape(tensor)
    return shape[0] if shape else None


def _dtype(value) -> tf.DType | None:
    """The type of the values of an array or tensor; None for anything else."""
    try:
        return tf.as_dtype(value.dtype) if hasattr(value, "shape") else None
    except (AttributeError, TypeError):
        return None


def _shape(value) -> tuple | None:
    """The shape of an array or tensor, with None for unknown sizes; None for anything else."""
    shape = tf.TensorShape(getattr(value, "shape", None))
    return None if shape.rank is None else tuple(shape.as_list())


def _fits(shape: tuple | None, expected: tuple) -> bool:
    """Whether a shape may be the expected one."""
    return tf.TensorShape(shape).is_compatible_with(expected)


def _is_concrete(value) -> bool:
    """Whether the values are known now, not only when a graph is run."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_concrete, value))
    numeric = isinstance(value, (int, float, np.ndarray, np.generic))
    return numeric or (isinstance(value, tf.Tensor) and hasattr(value, "numpy"))


def _is_integer(value) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    dtype = _dtype(value)
    return dtype is not None and dtype.is_integer and _fits(_shape(value), ())


def _type_text(value) -> str:
    dtype = _dtype(value)
    return f"of type {type(value).__name__ if dtype is None else dtype.name}"


def _shape_text(shape: tuple | None) -> str:
    """A shape as text; an unknown size is that of the batch."""
    if shape is None:
        return "unknown"
    sizes = ["batch" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"

"""A data set of images that are given in Python."""

import zlib
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from nvae_tf.data.catalog import OWN, DatasetInfo
from nvae_tf.data.source import ArraySource, Source
from nvae_tf.image_spec import ImageSpec, image_spec
from nvae_tf.io.errors import UserError, short_repr

LARGEST = 2**33  # bytes of a tf.data.Dataset that is read into memory, at most


class OwnImages(NamedTuple):
    """Images that are given in Python.

    Attributes:
        info: Description of the data set.
        sources: Training and test images.
        facts: Numbers of images and a checksum, which identify the images in a run's folder.
    """

    info: DatasetInfo
    sources: tuple[Source, Source]
    facts: dict[str, int]


def own_images(dataset, image: ImageSpec | None = None) -> OwnImages:
    """Makes a data set of images.

    Args:
        dataset: Training and test images: each an array (n, height, width, channels) of levels, uint8
            or uint16, or a finite `tf.data.Dataset` of such images or batches of them, alone or first
            in a tuple, which is read into memory.
        image: The images' description; default: images of 8 bits of their shape. Those of uint16 need
            one, which says how many bits they have.

    Raises:
        UserError: The images are of another type or shape, or do not fit the description.
    """
    if not isinstance(dataset, (tuple, list)) or len(dataset) != 2:
        raise UserError(f"dataset: {_kind(dataset)}; expected a pair of training and test images")
    train, test = (
        _as_array(name, images) for name, images in zip(("training", "test"), dataset, strict=True)
    )
    if image is None and np.uint16 in (train.dtype, test.dtype):
        height, width, channels = train.shape[1:]
        raise UserError(
            "dataset: images of uint16 do not say how many bits they have; expected a description "
            f"beside them, image=ImageSpec({height}, {width}, {channels}, bits=12) for example"
        )
    spec = image_spec(image if image is not None else train.shape[1:])
    train, test = (
        _fitting(name, images, spec) for name, images in (("training", train), ("test", test))
    )
    checksum = 0
    for images in (train, test):
        checksum = zlib.crc32(np.ascontiguousarray(images).data, checksum)
    identity = {"training": len(train), "test": len(test), "crc32": checksum}
    sources = ArraySource(train), ArraySource(test)
    return OwnImages(DatasetInfo(OWN, spec, lambda _: sources, flip=False), sources, identity)


def _as_array(name: str, images) -> np.ndarray:
    if isinstance(images, tf.data.Dataset):
        images = _read(name, images)
    elif isinstance(images, tf.Tensor):
        images = images.numpy()
    if not isinstance(images, np.ndarray):
        raise UserError(
            f"dataset: {name} images {_kind(images)}; expected an array (n, height, width, channels) "
            "of uint8 or uint16, or a tf.data.Dataset"
        )
    if images.dtype not in (np.uint8, np.uint16) or images.ndim != 4 or 0 in images.shape:
        raise UserError(
            f"dataset: {name} images {images.dtype} of shape {images.shape}; expected levels, uint8 "
            "(values 0 to 255) or uint16, of shape (n, height, width, channels)"
        )
    return images


def _fitting(name: str, images: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Converts images to uint8 or uint16 as their bits need; refuses what does not fit the spec."""
    if images.shape[1:] != spec.shape:
        raise UserError(
            f"dataset: {name} images of shape {images.shape[1:]}; expected {spec.shape}"
        )
    last = 2**spec.bits - 1
    if images.max() > last:
        raise UserError(
            f"dataset: {name} images have values up to {images.max()}; expected levels from 0 to "
            f"{last}, the last one of {spec.bits} bits"
        )
    return images.astype(np.uint8 if spec.bits <= 8 else np.uint16, copy=False)


def _read(name: str, dataset: tf.data.Dataset) -> np.ndarray:
    """Reads all images of a data set."""
    spec = dataset.element_spec
    if isinstance(spec, tuple) and spec:
        dataset, spec = dataset.map(lambda images, *_: images), spec[0]
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank not in (3, 4):
        raise UserError(
            f"dataset: {name} data set of {short_repr(spec)}; expected images, or batches of them"
        )
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise UserError(f"dataset: {name} data set is endless; expected one with an end")
    parts, size = [], 0
    for part in dataset.as_numpy_iterator():
        parts.append(part if spec.shape.rank == 4 else part[None])
        size += parts[-1].nbytes
        if parts[-1].shape[1:] != parts[0].shape[1:]:
            raise UserError(
                f"dataset: {name} data set of images of several shapes, {parts[0].shape[1:]} and "
                f"{parts[-1].shape[1:]}; expected one"
            )
        if size > LARGEST:
            raise UserError(
                f"dataset: {name} data set of more than {LARGEST} bytes, which is read into memory; "
                "train on one of this size by model.fit"
            )
    if not parts:
        raise UserError(f"dataset: {name} data set is empty")
    return np.concatenate(parts)


def _kind(value) -> str:
    return f"of type {type(value).__name__}"

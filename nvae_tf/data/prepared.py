"""Reads from tfrecords what their images are like: size, channels, bits and value range."""

import dataclasses
from pathlib import Path

from nvae_tf.config import AUTO, DROP, FULL, NONE, RANDOM, DataConfig, check_value
from nvae_tf.data import tfrecords
from nvae_tf.io.errors import ConfigError, UserError
from nvae_tf.io.files import read_json

MANIFEST = "prepare.json"


def settle_prepared(config: DataConfig) -> DataConfig:
    """Completes a configuration with the properties of the tfrecords that it names.

    Args:
        config: Section ``data`` of the configuration.

    Raises:
        ConfigError: The tfrecords have several sizes and none was chosen; they have other channels,
            bits, value range or transparency than those asked for; or ``crop`` is ``none``.
        UserError: There are no tfrecords, or they are damaged.
    """
    root = tfrecords.find_root(config.data)
    size = config.size or _only_size(root)
    first = _first_example(root, size)
    bits, channels = first.bits, first.image.shape[-1]
    settings = _settings(root)
    span = settings.get("value_range", f"0,{2**bits - 1}")
    alpha = settings.get("alpha", DROP)
    if config.crop == NONE:
        raise ConfigError(f"crop: none is not allowed; the tfrecords in {root} have their shape")
    for name, value, open_values in (
        ("channels", channels, (0,)),
        ("bits", bits, (0,)),
        ("value_range", span, (AUTO, FULL)),
        ("alpha", alpha, (DROP,)),
    ):
        asked = getattr(config, name)
        if asked not in open_values and _comparable(asked) != _comparable(value):
            raise ConfigError(
                f"{name}: {asked} is not allowed; the tfrecords in {root} have {value}"
            )
    return dataclasses.replace(
        config,
        image_size=tfrecords.size_text(size),
        channels=channels,
        bits=bits,
        value_range=span,
        alpha=alpha,
        crop=settings.get("crop", config.crop),
    )


def _only_size(root: Path) -> tfrecords.Size:
    sizes = tfrecords.sizes(root, "train")
    if len(sizes) != 1:
        several = ", ".join(map(tfrecords.size_text, sizes))
        raise ConfigError(
            f"image_size: {root} holds images of several sizes; choose one of {several} with "
            "--image_size"
        )
    return sizes[0]


def _first_example(root: Path, size: tfrecords.Size) -> tfrecords.Example:
    for path in tfrecords.find_shards(root, "train", size):
        shard = tfrecords.Shard(path)
        if len(shard.offsets):
            return shard.example(0)
    raise UserError(f"{root / 'train'}: the tfrecords hold no images; {tfrecords.FETCH_AGAIN}")


def _comparable(value):
    """A value in a form in which ``0,255`` and ``0,255.0`` are equal."""
    return [float(end) for end in value.split(",")] if "," in str(value) else value


def _settings(root: Path) -> dict[str, str]:
    """The settings with which ``nvae-prepare`` was run that matter to training, if any.

    ``crop`` is one of them only if it is ``random``, since the images are then still to be cropped.

    Raises:
        UserError: The file is unreadable.
    """
    path = root / MANIFEST
    if not path.exists():
        return {}
    try:
        settings = read_json(path)["settings"]
        names = [name for name in ("value_range", "alpha") if settings.get(name) is not None]
        names += ["crop"] if settings.get("crop") == RANDOM else []
        return {name: check_value(name, settings[name]) for name in names}
    except (AttributeError, KeyError, TypeError, UserError):
        raise UserError(f"{path}: unreadable; prepare the folder again") from None

"""A run's images and their outlier scores: which images, how they are read, and which stand out."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nvae_tf.config import DataConfig
from nvae_tf.data import catalog, levels, pipeline
from nvae_tf.data.images import named_images
from nvae_tf.data.source import EvenlySpread, Source, reading
from nvae_tf.data.where import needs_data
from nvae_tf.evaluation import ood, typicality
from nvae_tf.evaluation.loading import LoadedModel
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import ConfigError, UserError
from nvae_tf.io.paths import user_path


class Settings(NamedTuple):
    """How images are scored.

    Attributes:
        num_draws: Number of draws of z for each image.
        chunk: Number of top-down passes of each image that are computed at once.
        batch_size: Images per batch.
        seed: Seed of the noise and of the binarisation.
        max_images: Largest number of images of a set; of a larger one, that many at equal distances.
        fit_images: Largest number of training images that typicality is fitted to.
    """

    num_draws: int = 10
    chunk: int = 1
    batch_size: int = 100
    seed: int = 1
    max_images: int = 500
    fit_images: int = 500


class ImageSet(NamedTuple):
    """Images as the model sees them.

    Attributes:
        title: What they are, for reports.
        names: Name of each image: its file, or its index in its data set.
        images: (n, height, width, channels), float32 in [0, 1].
    """

    title: str
    names: list[str]
    images: np.ndarray


class Scored(NamedTuple):
    """An image set and its scores.

    Attributes:
        set: The images.
        measured: What the scores are made of.
        scores: Arrays (n,) by name; see `nvae_tf.evaluation.ood.scores`; and ``typicality``, if a
            fit was given.
    """

    set: ImageSet
    measured: ood.Measurements
    scores: dict[str, np.ndarray]


def split(
    loaded: LoadedModel, train: bool, settings: Settings, without: Sequence[int] = ()
) -> ImageSet:
    """The training or the test images of a run.

    Args:
        loaded: The model of the run.
        train: Whether to read training images.
        settings: How they are read.
        without: Indices of images to leave out.

    Raises:
        UserError: They were given in Python, and so are not kept; or they cannot be read.
    """
    if loaded.config.data.dataset == catalog.OWN:
        raise UserError(
            "ood: the images of this run were given in Python and are not kept; scores are compared "
            "with theirs: call nvae_tf.evaluation.ood_run.score in Python with your images"
        )
    dataset = catalog.get_dataset_info(loaded.config.data)
    source = dataset.open(loaded.config.data.data)[0 if train else 1]
    return _read("train" if train else "test", source, dataset, None, loaded, settings, without)


def files(loaded: LoadedModel, paths: list[str], settings: Settings) -> ImageSet:
    """Images of files and of folders of them, read as ``dataset: images`` is, in the model's size.

    Raises:
        UserError: A file or folder is missing, has no image, or has one that is too small.
    """
    dataset = catalog.given_images(loaded.model.image)
    config = loaded.config.data
    source = named_images(paths, dataset.image, config.alpha, config.crop)
    names = [item.name for item in source.items]
    return _read(", ".join(paths), source, dataset, names, loaded, settings)


def against(loaded: LoadedModel, name: str, settings: Settings, data: str = "") -> ImageSet:
    """The images of a folder, or the test images of the data set of a name.

    Args:
        loaded: The model, whose size the images get.
        name: Path of a folder, or name of a data set.
        settings: How they are read.
        data: Path of the folder that the data set of this name is in, if it needs one.

    Raises:
        UserError: There is no such folder or data set, or its images are not like the model's.
    """
    if name == catalog.IMAGES:
        raise UserError(
            f"--against {name}: has a value range of its own; name the folder: --against DIR"
        )
    known = name in catalog.names()  # ./mnist is a folder of that name
    if not data and name and not known and (user_path(name).exists() or "/" in name):
        if not user_path(name).is_dir():
            raise UserError(f"--against {name}: no such folder; name a folder of images")
        return files(loaded, [name], settings)
    wanted = loaded.model.image
    try:
        dataset = _described(name, data, wanted)
        if _kind(dataset.image) != _kind(wanted):
            raise UserError(
                f"its images are {_kind(dataset.image)}; the model's are {_kind(wanted)}"
            )
        spans = levels.value_range(dataset.image), levels.value_range(wanted)
        if spans[0] != spans[1]:
            raise UserError(
                "its levels are of values from {:g} to {:g}; the model's from {:g} to {:g}".format(
                    *spans[0], *spans[1]
                )
            )
        source = dataset.open(data)[1]
    except ConfigError:
        raise UserError(f"--against {name}: {_what_there_is(data, wanted)}") from None
    except UserError as error:
        advice = str(error).replace("--data", "--against_data")
        raise UserError(f"--against {name}: {advice}") from None
    return _read(name, source, dataset, None, loaded, settings)


def _described(name: str, data: str, wanted: ImageSpec) -> catalog.DatasetInfo:
    """The data set of a name, with images like the wanted ones if it has a choice."""
    config = DataConfig(dataset=name, data=data)
    like_it = dataclasses.replace(
        config, image_size=wanted.size_text, channels=wanted.channels, bits=wanted.bits
    )
    try:
        return catalog.get_dataset_info(like_it)
    except ConfigError:  # it has none
        return catalog.get_dataset_info(config)


def _what_there_is(data: str, wanted: ImageSpec) -> str:
    """Advice for a name that is neither a folder's nor a data set's."""
    if data:
        return "no such data set; --against_data is the folder of a data set that --against names"
    like_it = [
        name + " (with --against_data)" * needs_data(name)
        for name in catalog.names()
        if _kind(_described(name, "", wanted).image) == _kind(wanted)
    ]
    others = f", or one of {', '.join(like_it)}" if like_it else ""
    return f"no such folder or data set; name a folder of images{others}"


def _kind(spec: ImageSpec) -> str:
    kind = "binary" if spec.binary else f"{spec.bits}-bit"
    return f"{kind} {spec.width}x{spec.height}x{spec.channels}"


def _read(
    title, source: Source, dataset, names, loaded: LoadedModel, settings: Settings, without=()
):
    chosen = EvenlySpread(source, settings.max_images, without)
    if not len(chosen):
        raise UserError(
            f"ood: all {len(source)} {title} images are scored, and none is left to say what is "
            "typical; choose a smaller --max_images"
        )
    batches = pipeline.evaluation_batches(
        chosen,
        dataset,
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_bits=loaded.model.num_bits,
        by_content=True,
    )
    with reading(source):
        images = np.concatenate([batch.numpy() for batch in batches])
    names = names or [str(index) for index in range(len(source))]
    return ImageSet(title, [names[index] for index in chosen.indices], images)


def score(
    loaded: LoadedModel,
    images: ImageSet,
    settings: Settings,
    fit: typicality.Typical | None = None,
) -> Scored:
    """Scores a set of images.

    Args:
        loaded: The model.
        images: The images.
        settings: How they are scored.
        fit: What is typical; default: there is no score ``typicality``.
    """
    size = settings.batch_size
    batches = [images.images[start : start + size] for start in range(0, len(images.images), size)]
    measured = ood.measure(
        loaded.model,
        batches,
        len(images.images),
        num_draws=settings.num_draws,
        chunk=settings.chunk,
        seed=settings.seed,
        title=f"ood: {images.title[-30:]}",
    )
    columns = ood.scores(loaded.model, measured)
    for name, values in columns.items():
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise UserError(
                f"{images.title}, image {images.names[wrong[0]]}: {name} is {values[wrong[0]]}; the "
                "model's numbers are not finite there; leave the image out, or train the model longer"
            )
    if fit is not None:
        columns[typicality.NAME] = fit.score(measured)
    return Scored(images, measured, columns)


def fit(loaded: LoadedModel, settings: Settings, without: Sequence[int] = ()) -> typicality.Typical:
    """Fits typicality to `Settings.fit_images` training images of a run.

    Args:
        loaded: The model of the run.
        settings: How they are scored.
        without: Indices of training images to leave out, since they will be scored themselves: images
            that typicality was fitted to would look too typical.
    """
    settings = settings._replace(max_images=settings.fit_images)
    return fit_to(loaded, split(loaded, True, settings, without), settings)


def fit_to(loaded: LoadedModel, images: ImageSet, settings: Settings) -> typicality.Typical:
    """Fits typicality to images; for runs whose training images are not kept."""
    return typicality.fit(score(loaded, images, settings).measured)


class Extremes(NamedTuple):
    """The images of a set that are most and least like the training images.

    Attributes:
        typical: The most typical images first, (count, height, width, channels) in [0, 1].
        typical_scores: Their scores, (count,).
        untypical: The least typical images first.
        untypical_scores: Their scores, (count,).
    """

    typical: np.ndarray
    typical_scores: np.ndarray
    untypical: np.ndarray
    untypical_scores: np.ndarray


def extremes(scored: Scored, count: int) -> Extremes:
    """The most and least typical images of a scored set; for example for a gallery.

        settings = Settings(num_draws=1, max_images=200, fit_images=200)
        test = split(loaded, False, settings)
        extremes(score(loaded, test, settings, fit(loaded, settings)), 12)

    Args:
        scored: What `score` returned.
        count: Number of images at each end, or fewer if there are fewer.
    """
    values, images = scored.scores[typicality.NAME], scored.set.images
    order = np.argsort(values, kind="stable")
    low, high = order[:count], order[::-1][:count]
    return Extremes(images[low], values[low], images[high], values[high])

"""What the page shows, computed or read from the run's folder; knows no HTML."""

import dataclasses
from typing import NamedTuple

import numpy as np

from nvae_tf.evaluation import latents, sampling
from nvae_tf.evaluation.gallery.amounts import (
    START,
    TEMPERATURE,
    TEMPERATURES,
    Amounts,
    amounts_for,
)
from nvae_tf.evaluation.gallery.from_data import DataContent, of_data_set
from nvae_tf.evaluation.loading import LoadedModel
from nvae_tf.evaluation.logs import Logs, read_logs
from nvae_tf.evaluation.scores import Score, evaluated, fid
from nvae_tf.evaluation.stored_images import from_levels
from nvae_tf.io.errors import UserError
from nvae_tf.objective import active_latents
from nvae_tf.run_folder import RunFolder

BATCH = 100  # samples that are drawn together


class Group(NamedTuple):
    """What is known about a latent group.

    Attributes:
        shape: (height, width, latents) of its z.
        influence: Change of a pixel by a fresh draw of the group's noise (`latents.influence`).
        kl: KL of the test images in nats, mean over `Measured.num_images` of them; or None.
        active: Number of its latent channels that the objective counts as active; None without images.
    """

    shape: tuple[int, int, int]
    influence: float
    kl: float | None
    active: int | None


@dataclasses.dataclass
class GalleryContent:
    """All that the page shows.

    Attributes:
        loaded: The model.
        scores: Numbers that measure it.
        samples: Images (n, height, width, channels) in [0, 1] by temperature.
        film: Images (n, height, width, channels) of each moment.
        traversals: Images (groups, steps, height, width, channels) of the groups in `traversed`.
        traversed: Indices of the groups that are traversed.
        groups: All groups, coarsest first.
        data: What needs the data set, or the reason why it could not be read.
        logs: What the run's logs tell.
    """

    loaded: LoadedModel
    scores: list[Score]
    samples: dict[float, np.ndarray]
    film: list[np.ndarray]
    traversals: np.ndarray
    traversed: list[int]
    groups: list[Group]
    data: DataContent | str
    logs: Logs


def collect(loaded: LoadedModel, seed: int, num_images: int) -> GalleryContent:
    """Computes what the page shows; bars on a terminal say how far it is.

    Args:
        loaded: The model.
        seed: Seed of samples and of draws of z.
        num_images: Number of test images for what is measured here.

    Raises:
        UserError: Samples are not finite.
    """
    model = loaded.model
    amounts = amounts_for(model.image)
    samples = _samples(model, amounts.wall, seed)
    scores = evaluated(loaded)
    data: DataContent | str
    try:
        queries = samples[TEMPERATURE][: amounts.queries]
        data = of_data_set(loaded, amounts, queries, seed, num_images)
        scores = scores or data.scores
    except UserError as error:
        print(f"left out: what needs the data set ({error})")
        data = str(error)
    traversed, traversals = _traversals(model, amounts, seed)
    return GalleryContent(
        loaded=loaded,
        scores=[*scores, *fid(loaded)],
        samples=samples,
        film=_film(model, amounts, seed),
        traversals=traversals,
        traversed=traversed,
        groups=_groups(model, amounts, seed, data),
        data=data,
        logs=read_logs(RunFolder(loaded.folder).logs),
    )


def _samples(model, count: int, seed: int) -> dict[float, np.ndarray]:
    draw = sampling.sampler_function(model)
    options = dict(batch_size=min(count, BATCH), seed=seed, draw=draw)
    levels = {t: sampling.sample(model, count, t, **options)[0] for t in TEMPERATURES}
    return {t: from_levels(values, model.image) for t, values in levels.items()}


def _film(model, amounts: Amounts, seed: int) -> list[np.ndarray]:
    """Films through samples, along arcs in the noise space of the prior, that end where they begin."""
    stations = [
        model.draw_noise(amounts.films, (seed, stream)) for stream in range(amounts.stations)
    ]
    # All ways at once, since each call makes a graph of its own.
    start = [np.concatenate(maps) for maps in zip(*stations, strict=True)]
    end = [np.roll(maps, -amounts.films, 0) for maps in start]
    rows = latents.interpolate(model, start, end, amounts.frames + 1, TEMPERATURE)[:, :-1]
    ways = rows.reshape(amounts.stations, amounts.films, *rows.shape[1:])
    return [images for way in ways for images in way.swapaxes(0, 1)]


def _traversals(model, amounts: Amounts, seed: int) -> tuple[list[int], np.ndarray]:
    count = len(model.groups)
    chosen = np.linspace(0, count - 1, min(count, amounts.traversed)).round().astype(int).tolist()
    noise = model.draw_noise([START], (seed, sampling.SAMPLING_STREAM))
    rows = latents.traverse(model, noise, chosen, amounts.steps, TEMPERATURE, seed)
    return chosen, rows[0]


def _groups(model, amounts: Amounts, seed: int, data: DataContent | str) -> list[Group]:
    influence = latents.influence(model, amounts.influenced, TEMPERATURE, seed)
    kl = active = [None] * len(model.groups)
    if isinstance(data, DataContent) and data.measured:
        channel_kl = data.measured.channel_kl
        kl = channel_kl.sum(1).tolist()
        active = active_latents(channel_kl).numpy().astype(int).tolist()
    rows = zip(model.latent_shapes, influence.tolist(), kl, active, strict=True)
    return [Group(*row) for row in rows]

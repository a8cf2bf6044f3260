"""What the page shows of a data set: test images, training images, and what the model makes of them."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from nvae_tf.data import catalog, pipeline
from nvae_tf.data.source import reading
from nvae_tf.evaluation import latents, likelihood, ood_run
from nvae_tf.evaluation.gallery.amounts import Amounts
from nvae_tf.evaluation.loading import LoadedModel
from nvae_tf.evaluation.neighbours import Neighbours, nearest
from nvae_tf.evaluation.scores import Score, evaluated, likelihood_scores
from nvae_tf.io.errors import UserError

DRAWS = 10  # of z for each image, for -log p(x), if it was not evaluated before
BATCH = 100
NEIGHBOURS = 3
SEARCHED = 50_000  # training images at most, among which neighbours are looked for
RANKED = 200  # test images that are ranked by how typical they are, and training images to compare
COMPARED = 64  # test images whose distance to the training images is told

Result = TypeVar("Result")


class Near(NamedTuple):
    """Samples and the training images nearest to them.

    Attributes:
        samples: Images (n, height, width, channels) in [0, 1].
        found: The nearest training images.
        test_distance: Median distance of a test image to the nearest training image.
        searched: Number of training images that were looked at.
    """

    samples: np.ndarray
    found: Neighbours
    test_distance: float
    searched: int


class Ways(NamedTuple):
    """Interpolations.

    Attributes:
        pairs: Test images at the ends, (n, 2, height, width, channels).
        between: Images on the way between them, (n, steps, height, width, channels).
    """

    pairs: np.ndarray
    between: np.ndarray


class ImagePairs(NamedTuple):
    """Test images and what the model makes of them, both (n, height, width, channels)."""

    originals: np.ndarray
    images: np.ndarray


class Measured(NamedTuple):
    """What the latents of test images say.

    Attributes:
        channel_kl: Mean KL of every latent channel in nats, (groups, latents).
        num_images: Number of test images over which it was averaged.
    """

    channel_kl: np.ndarray
    num_images: int


class DataContent(NamedTuple):
    """What needs the data set; None stands for what is not shown.

    Attributes:
        ways: Interpolations between test images.
        reconstructions: Test images and their reconstructions.
        near: Samples and training images.
        extremes: The most and the least typical of some test images; not of large images.
        measured: KL of every latent channel.
        scores: NELBO and -log p(x) of test images; empty if they were evaluated before.
        left_out: Why a part could not be computed, by the name of its attribute.
    """

    ways: Ways | None
    reconstructions: ImagePairs | None
    near: Near | None
    extremes: ood_run.Extremes | None
    measured: Measured | None
    scores: list[Score]
    left_out: dict[str, str]


def of_data_set(
    loaded: LoadedModel, amounts: Amounts, queries, seed: int, num_images: int
) -> DataContent:
    """Computes what needs the data set; bars on a terminal say how far it is.

    A part that cannot be computed is left out, and a line says why.

    Args:
        loaded: The model.
        amounts: How much is shown.
        queries: Samples whose neighbours are looked for, (n, height, width, channels) in [0, 1].
        seed: Seed of draws of z.
        num_images: Number of test images that are measured.

    Raises:
        UserError: The data set cannot be read.
    """
    data = DataSet(loaded, seed)
    left_out: dict[str, str] = {}

    def part(name: str, compute: Callable[[], Result]) -> Result | None:
        try:
            return compute()
        except UserError as error:
            print(f"left out: {name.replace('_', ' ')} ({error})")
            left_out[name] = str(error)
            return None

    return DataContent(
        part("ways", lambda: data.ways(amounts)),
        part("reconstructions", lambda: data.reconstructions(amounts)),
        part("near", lambda: data.near(queries)),
        part("extremes", lambda: data.extremes(amounts.extremes)),
        part("measured", lambda: data.measured(num_images)),
        [] if evaluated(loaded) else part("scores", lambda: data.scores(num_images)) or [],
        left_out,
    )


class DataSet:
    """The data set that a model was trained on, and what is computed from it.

    Args:
        loaded: The model.
        seed: Seed of draws of z.

    Raises:
        UserError: The data set cannot be read.
    """

    def __init__(self, loaded: LoadedModel, seed: int):
        self.loaded, self.model, self.seed = loaded, loaded.model, seed
        self.data_seed = loaded.config.data.seed  # the images of training's pictures
        self.info = catalog.get_dataset_info(loaded.config.data)
        self.train, self.test = self.info.open(loaded.config.data.data)
        with reading(self.test):
            images, labels = next(iter(self._batches(self.test, with_labels=True)))
        self.images, self.labels = images.numpy(), labels.numpy()

    def _batches(self, source, **options):
        return pipeline.evaluation_batches(
            source,
            self.info,
            batch_size=BATCH,
            seed=self.data_seed,
            num_bits=self.model.num_bits,
            **options,
        )

    def _first(self, source, count: int, title: str = ""):
        """Batches of the first images, with a bar if it has a title."""
        left = min(count, len(source))
        with tqdm(total=left, unit="image", desc=title, disable=None if title else True) as bar:
            for batch in self._batches(source):
                yield batch[:left].numpy()
                bar.update(min(left, len(batch)))
                left -= len(batch)
                if left <= 0:
                    return

    def measured(self, count: int) -> Measured:
        """Mean KL of every latent channel over the first test images."""
        with reading(self.test):
            batches = self._first(self.test, count, "KL")
            kl = latents.mean_channel_kl(self.model, batches, self.seed)
        return Measured(kl, min(count, len(self.test)))

    def scores(self, count: int) -> list[Score]:
        """The likelihood of the first test images."""
        count = min(count, len(self.test))
        with reading(self.test):
            batches = self._first(self.test, count)
            options = dict(num_draws=DRAWS, chunk=1, seed=self.seed)
            results = likelihood.evaluate(self.model, batches, count, **options)
        origin = "all" if count == len(self.test) else f"the first {count:,} of"
        summary = likelihood.summarize(results, self.model.bits_per_dim)
        kind = likelihood.name_of(self.model, self.model.likelihood)
        return likelihood_scores(summary, DRAWS, f"{origin} {len(self.test):,} test images", kind)

    def ways(self, amounts: Amounts) -> Ways:
        """Pairs of test images, of different labels where there are some, and the ways between them."""
        chosen = _different_pairs(self.labels, amounts.interpolations)
        if not chosen:
            raise UserError(f"the test set has {len(self.images)} images; interpolations need two")
        ends = self.images[np.array(chosen).ravel()]
        noise = latents.prior_noise(self.model, ends)
        start, end = ([tensor[first::2] for tensor in noise] for first in (0, 1))
        pairs = ends.reshape(-1, 2, *ends.shape[1:])
        return Ways(pairs, latents.interpolate(self.model, start, end, amounts.steps))

    def reconstructions(self, amounts: Amounts) -> ImagePairs:
        """Test images and their reconstructions."""
        originals = self.images[: amounts.reconstructed]
        images = latents.reconstruct(self.model, originals, self.seed).images
        return ImagePairs(originals, images)

    def near(self, samples: np.ndarray) -> Near:
        """The training images nearest to samples, and how near they are to test images.

        Distances are over the scored part, since nothing was trained on what lies around it.
        """
        queries = np.concatenate([samples, self.images[:COMPARED]])
        with reading(self.train):
            batches = self._first(self.train, SEARCHED, "neighbours")
            found = nearest(queries, batches, NEIGHBOURS, self.model.image.scored_part)
        count = len(samples)
        return Near(
            samples,
            Neighbours(found.images[:count], found.distances[:count]),
            float(np.median(found.distances[count:, 0])),
            min(SEARCHED, len(self.train)),
        )

    def extremes(self, count: int) -> ood_run.Extremes | None:
        """The test images that are most and least like the training images; None if 0 are asked for."""
        if not count:
            return None
        settings = ood_run.Settings(
            num_draws=1, max_images=RANKED, fit_images=RANKED, seed=self.seed
        )
        test = ood_run.split(self.loaded, False, settings)
        fit = ood_run.fit(self.loaded, settings)
        return ood_run.extremes(ood_run.score(self.loaded, test, settings, fit), count)


def _different_pairs(labels, count: int) -> list[tuple[int, int]]:
    """Pairs of indices, each used once, whose labels differ if possible."""
    left, pairs = list(range(len(labels))), []
    while len(left) > 1 and len(pairs) < count:
        one = left.pop(0)
        other = next((i for i in left if labels[i] != labels[one]), left[0])
        left.remove(other)
        pairs.append((one, other))
    return pairs

"""The batches of a training run as one worker sees them, and the numbers of batches and steps."""

from typing import Any, NamedTuple

from nvae_tf.config import Config
from nvae_tf.data import pipeline
from nvae_tf.data.catalog import DatasetInfo
from nvae_tf.data.source import Source
from nvae_tf.io.errors import ConfigError
from nvae_tf.io.text import counted
from nvae_tf.training.cluster import Cluster


class StepCounts(NamedTuple):
    """Batch and step counts derived from the configuration.

    Attributes:
        images_per_pass: Number of images in a pass, over all replicas.
        images_per_step: Number of images in a step: `images_per_pass` times ``accumulate_steps``.
        steps_per_epoch: Number of steps in an epoch; images that do not fill a step are left out.
        total_steps: Number of steps of the whole training.
    """

    images_per_pass: int
    images_per_step: int
    steps_per_epoch: int
    total_steps: int


def step_counts(config: Config, cluster: Cluster, num_images: int) -> StepCounts:
    """Counts the batches and steps of a training.

    Args:
        config: Configuration of the run.
        cluster: This process's part in the training.
        num_images: Number of images in the training set.

    Raises:
        ConfigError: The images do not fill one step.
    """
    passes = config.train.accumulate_steps
    per_pass = config.data.batch_size * cluster.replicas
    steps_per_epoch = num_images // (per_pass * passes)
    if steps_per_epoch == 0:
        raise ConfigError(
            f"batch_size: {config.data.batch_size} is not allowed; expected at most the {num_images} "
            f"training images of {config.data.dataset}, divided by "
            f"{counted(cluster.replicas, 'replica')} and {counted(passes, 'accumulated pass')}"
        )
    total = steps_per_epoch * config.train.epochs
    return StepCounts(per_pass, per_pass * passes, steps_per_epoch, total)


class TrainingData:
    """The batches of a training, as one worker sees them.

    Args:
        config: Configuration of the run.
        cluster: This process's part in the training.
        counts: Batch and step counts.
        dataset: Description of the data set.
        sources: Training and test images.
    """

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        counts: StepCounts,
        dataset: DatasetInfo,
        sources: tuple[Source, Source],
    ):
        self._cluster, self._counts = cluster, counts
        self._dataset, self._sources = dataset, sources
        self._view: dict[str, Any] = dict(
            seed=config.data.seed, num_bits=config.model.x_bits(dataset.image)
        )
        self._share = dict(
            worker=cluster.worker,
            num_workers=cluster.num_workers,
            parts=cluster.replicas // cluster.num_workers,
        )

    def first_images(self, size: int):
        """The first `size` training images, (size, height, width, channels) in [0, 1]."""
        batches = pipeline.training_batches(
            self._sources[0], self._dataset, batch_size=size, **self._view
        )
        return next(iter(batches))

    def test_images(self, size: int):
        """The first `size` test images, or all if there are fewer."""
        batches = pipeline.evaluation_batches(
            self._sources[1], self._dataset, batch_size=size, **self._view
        )
        return next(iter(batches))

    def training(self, start_step: int):
        """An iterator over the batches after a step, distributed over this worker's replicas."""
        size = self._counts.images_per_step
        return iter(
            self._cluster.strategy.distribute_datasets_from_function(
                lambda _: pipeline.training_batches(
                    self._sources[0], self._dataset, batch_size=size, start_step=start_step,
                    passes=size // self._counts.images_per_pass, **self._view, **self._share,
                )
            )
        )  # fmt: skip

    def validation(self):
        """Batches (images, indices, weights) of the test set, distributed over the replicas."""
        size = self._counts.images_per_pass
        return self._cluster.strategy.distribute_datasets_from_function(
            lambda _: pipeline.validation_batches(
                self._sources[1], self._dataset, batch_size=size, **self._view, **self._share
            )
        )

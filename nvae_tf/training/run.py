"""A training run, from its configuration to its last checkpoint."""

import contextlib
import functools
import itertools
import signal
import threading
from typing import NamedTuple

import tensorflow as tf
import tf_keras

from nvae_tf import __version__
from nvae_tf.config import KEYS, Config, check_image
from nvae_tf.data import catalog, pipeline
from nvae_tf.data.source import Source, reading
from nvae_tf.devices import describe_devices
from nvae_tf.errors import ConfigError, Diverged, UserError
from nvae_tf.lock import alone_in
from nvae_tf.model import NVAE
from nvae_tf.run_folder import RunFolder
from nvae_tf.training import reports
from nvae_tf.training.checkpoints import Checkpoints
from nvae_tf.training.cluster import Cluster, lost_workers
from nvae_tf.training.optimizer import make_optimizer
from nvae_tf.training.reports import PICTURED
from nvae_tf.training.schedules import WarmupCosine
from nvae_tf.training.trainer import Trainer, compiled, graphs_as_written, uses_xla


def train(
    config: Config,
    folder: RunFolder,
    resume: bool = False,
    cluster: Cluster | None = None,
    epochs: int | None = None,
) -> dict[str, float] | None:
    """Trains the model of a configuration, and leaves everything in the run's folder.

    Args:
        config: the recipe.
        folder: where the run is kept; with several workers, a folder that all of them see.
        resume: continue the run that is there, from its newest checkpoint.
        cluster: who takes part; default: this process's default device.
        epochs: end after so many of the configuration's epochs, whose schedules stay; default: all.

    Returns:
        The test set's ``nelbo``, ``recon`` and ``kl`` in nats and ``bpd`` in bits per dimension; None
        if SIGTERM ended training early, with a checkpoint.

    Raises:
        UserError: the data, the configuration or the folder do not allow it, another process trains
            in the folder, or a worker was lost or is of another kind.
        Diverged: too many steps in a row were not finite.
    """
    cluster = cluster or Cluster(tf.distribute.get_strategy())
    _check_alike(config, resume, cluster)
    folder.check(config, resume)
    dataset = catalog.describe(config.data)
    check_image(config.model, dataset.image)
    sources = dataset.open(config.data.data)
    if config.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    tf_keras.utils.set_random_seed(config.data.seed)
    with (
        lost_workers(cluster),
        reading(*sources),
        alone_in(folder.path, "training") if cluster.is_chief else contextlib.nullcontext(),
        cluster.strategy.scope(),
        graphs_as_written(),
        Termination() as termination,
    ):
        folder.check(config, resume)  # again: another process may have trained here until now
        results = _train(config, folder, cluster, dataset, sources, termination, epochs)
        cluster.sum_over_workers([1])  # a worker that left earlier would count as lost
        return results


class _Settings(NamedTuple):
    """What is counted before anything is built.

    Attributes:
        images_per_pass: of all replicas.
        images_per_step: the same times the passes of a step.
        steps_per_epoch: whole steps in the training set.
        total_steps: of the whole training.
    """

    images_per_pass: int
    images_per_step: int
    steps_per_epoch: int
    total_steps: int


def _count(config: Config, cluster: Cluster, num_images: int) -> _Settings:
    passes = config.train.accumulate_steps
    per_pass = config.data.batch_size * cluster.replicas
    steps_per_epoch = num_images // (per_pass * passes)
    if steps_per_epoch == 0:
        raise ConfigError(
            f"batch_size: {config.data.batch_size} is not allowed; expected at most the {num_images} "
            f"training images of {config.data.dataset}, divided by {cluster.replicas} replicas and "
            f"{passes} accumulated passes"
        )
    total = steps_per_epoch * config.train.epochs
    return _Settings(per_pass, per_pass * passes, steps_per_epoch, total)


class _Data:
    """The batches of a training, as one worker sees them.

    Args:
        config: of the run.
        cluster: who takes part.
        counts: sizes of batches.
        dataset: description of the data.
        sources: training and test images.
    """

    def __init__(self, config: Config, cluster: Cluster, counts: _Settings, dataset, sources):
        self._cluster, self._counts, self._dataset, self._sources = (
            cluster,
            counts,
            dataset,
            sources,
        )
        self._view = dict(seed=config.data.seed, num_bits=config.model.num_x_bits)
        self._share = dict(
            worker=cluster.worker,
            num_workers=cluster.num_workers,
            parts=cluster.replicas // cluster.num_workers,
        )

    def first_images(self, size: int):
        """The first images of the training."""
        batches = pipeline.training_batches(
            self._sources[0], self._dataset, batch_size=size, **self._view
        )
        return next(iter(batches))

    def test_images(self):
        """The first images of the test set, for pictures."""
        batches = pipeline.evaluation_batches(
            self._sources[1], self._dataset, batch_size=PICTURED, **self._view
        )
        return next(iter(batches))

    def training(self, start_step: int):
        """An iterator over the replicas' parts of the batches that follow a step."""
        size = self._counts.images_per_step
        return iter(
            self._cluster.strategy.distribute_datasets_from_function(
                lambda _: pipeline.training_batches(
                    self._sources[0], self._dataset, batch_size=size, start_step=start_step,
                    **self._view, **self._share,
                )
            )
        )  # fmt: skip

    def validation(self):
        """The replicas' parts of the test set."""
        size = self._counts.images_per_pass
        return self._cluster.strategy.distribute_datasets_from_function(
            lambda _: pipeline.validation_batches(
                self._sources[1], self._dataset, batch_size=size, **self._view, **self._share
            )
        )


def _train(
    config: Config,
    folder: RunFolder,
    cluster: Cluster,
    dataset: catalog.DataSet,
    sources: tuple[Source, Source],
    termination: "Termination",
    epochs: int | None,
) -> dict[str, float] | None:
    settings = config.train
    say = functools.partial(print, flush=True) if cluster.is_chief else lambda *_: None

    shared = f"; {cluster.replicas} replicas in {cluster.num_workers} processes"
    say(f"device: {describe_devices(cluster.strategy)}" + (shared if cluster.replicas > 1 else ""))

    # Data. One image of each split is read before anything is written.
    counts = _count(config, cluster, len(sources[0]))
    data = _Data(config, cluster, counts, dataset, sources)
    say(
        f"data: {dataset.name}, {len(sources[0])} training and {len(sources[1])} test images, "
        f"{counts.images_per_step} per step"
    )
    test_images, _ = data.test_images(), data.first_images(1)

    # Model and optimiser.
    trainer = _build_trainer(config, dataset, counts)
    model = trainer.model
    say(f"model: {model.num_parameters:,} parameters, {len(model.groups)} latent groups")

    # Start, or resume.
    checkpoints = Checkpoints(
        folder, trainer, settings.keep, settings.save_every, counts.images_per_step
    )
    start_step = _start(config, folder, cluster, trainer, checkpoints, data, counts)
    say(f"run: {folder.path}" + (f", continued from step {start_step}" if start_step else ""))

    # Train.
    end = counts.steps_per_epoch * min(epochs or settings.epochs, settings.epochs)
    validate = _validation(trainer, data, cluster, termination)
    if cluster.is_chief:
        report = _make_reports(config, folder, counts, end, model, test_images)
    if start_step < end:
        say("compiling: the first step takes longer than the others, minutes for deep models")
    run_step = compiled(trainer.train_step, cluster.strategy, uses_xla(settings))
    batches, results = data.training(start_step), None
    for step in range(start_step + 1, end + 1):
        logs = run_step(next(batches))
        epoch, left = divmod(step, counts.steps_per_epoch)
        last = step == end
        if left == 0 or step % settings.log_every == 0:
            _check_divergence(trainer, step, folder)
        if cluster.is_chief:
            report.step(step, logs)
            # Not in a row of skipped steps, which may be the start of a divergence; and before
            # validation, which may take long.
            if left == 0 or (checkpoints.due(step) and not trainer.skipped_in_row):
                checkpoints.save()
            if left == 0:
                report.trained(step)
        if left == 0:
            results = validate() if last or epoch % settings.eval_every == 0 else None
        if not (last and results) and termination.agreed(cluster, step):
            _check_divergence(trainer, step, folder)
            if cluster.is_chief:
                report.close()
                say(f"stopped by SIGTERM after step {step}: {checkpoints.save()}")
            return None
        if cluster.is_chief and left == 0:
            report.epoch(epoch, step, logs, results)
            if last or epoch % settings.images_every == 0:
                _draw(report, trainer, step)

    # Report.
    if start_step >= end:  # the run was complete already, but perhaps for its validation
        results = validate()
        if cluster.is_chief and results:
            _draw(report, trainer, end)
    if results is None:
        say("stopped by SIGTERM; training was complete")
        return None
    return {name: float(results[name]) for name in ("nelbo", "bpd", "recon", "kl")}


def _start(config, folder, cluster, trainer, checkpoints, data: _Data, counts: _Settings) -> int:
    """Restores the newest checkpoint, or prepares a new training; returns the steps taken so far."""
    start_step = checkpoints.restore()
    _check_same_start(cluster, start_step)
    if cluster.is_chief:
        folder.create(config)
    if start_step == 0:
        # Only some architectures look at images here, and those at all images of a step.
        needed = counts.images_per_step if trainer.model.needs_data_initialization else 1
        trainer.prepare(data.first_images(needed))
    return start_step


def _draw(report: reports.Reports, trainer: Trainer, step: int) -> None:
    with trainer.evaluated_weights():
        report.pictures(step)


def _make_reports(config, folder, counts: _Settings, end: int, model, test_images):
    progress = reports.Progress(
        config.train.epochs, counts.steps_per_epoch, counts.images_per_step, end
    )
    return reports.Reports(folder, config, progress, model, test_images)


def _build_trainer(config: Config, dataset: catalog.DataSet, counts: _Settings) -> Trainer:
    settings = config.train
    model = NVAE(config.model, dataset.image, settings.precision.removeprefix("mixed_"))
    schedule = WarmupCosine.from_train_config(settings, counts.steps_per_epoch)
    optimizer = make_optimizer(settings, schedule)
    steps = counts.total_steps, counts.steps_per_epoch
    return Trainer(model, settings, *steps, config.data.seed, optimizer)


def _validation(trainer: Trainer, data: _Data, cluster: Cluster, termination: "Termination"):
    """A function that validates, and answers None if SIGTERM ended that early."""
    run_step = compiled(trainer.validation_step, cluster.strategy, uses_xla(trainer.config))

    def validate():
        number = itertools.count(1)
        return trainer.validate(
            run_step, data.validation(), stop=lambda: termination.agreed(cluster, next(number))
        )

    return validate


def _check_divergence(trainer: Trainer, step: int, folder: RunFolder) -> None:
    if trainer.diverged:
        latest = next(iter(folder.list_checkpoints()), None)
        raise Diverged(reports.divergence(trainer, step, latest))


def _check_alike(config: Config, resume: bool, cluster: Cluster) -> None:
    """Makes sure that all workers were started alike.

    Raises:
        UserError: they were not.
    """
    versions = {
        "nvae-tf": f"{__version__} {' '.join(KEYS)}",
        "TensorFlow": tf.__version__,
    }
    different = cluster.disagreements(versions)
    if different:
        raise UserError(
            f"another worker has another version of {' and '.join(different)} (here: nvae-tf "
            f"{__version__}, TensorFlow {tf.__version__}); install the same on all"
        )
    # Where the data is may differ from machine to machine.
    flags = {name: str(value) for name, value in config.to_dict().items() if name != "data"}
    different = cluster.disagreements({**flags, "cont_training": str(resume)})
    if different:
        here = ", ".join(f"{name} is {flags.get(name, resume)} here" for name in different)
        raise UserError(
            f"another worker has another configuration: {here}; start all workers alike"
        )


def _check_same_start(cluster: Cluster, start_step: int) -> None:
    """Makes sure that all workers found the same checkpoint.

    Raises:
        UserError: they did not.
    """
    if cluster.disagreements({"step": str(start_step)}):
        raise UserError(
            f"this worker continues from step {start_step} and another one does not: all workers need "
            "the same --root, on a file system that they share"
        )


class Termination:
    """Notes SIGTERM, which announces that the machine is about to be taken away."""

    AGREEING_EVERY = 10  # batches; several workers have to wait for each other to agree

    def __init__(self):
        self._requested = self._agreed = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_):
        self._requested = True

    def agreed(self, cluster: Cluster, number: int) -> bool:
        """Whether any worker was told to stop; all of them stop after the same batch.

        Args:
            cluster: the workers.
            number: of the batch that all of them have just done.
        """
        if not self._agreed and (cluster.num_workers == 1 or number % self.AGREEING_EVERY == 0):
            self._agreed = cluster.sum_over_workers([int(self._requested)])[0] > 0
        return self._agreed

"""A training run, from its configuration to its last checkpoint."""

import contextlib
import dataclasses
import functools
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf
import tf_keras

from nvae_tf import __version__
from nvae_tf.config import Config, ModelConfig, check_image
from nvae_tf.data import catalog
from nvae_tf.data.own import OwnImages
from nvae_tf.data.source import Source, reading
from nvae_tf.engine.devices import describe_devices
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import ConfigError, TrainingDivergedError
from nvae_tf.io.lock import exclusive_lock
from nvae_tf.model import NVAE
from nvae_tf.run_folder import RunFolder
from nvae_tf.training import reports
from nvae_tf.training.batches import StepCounts, TrainingData, step_counts
from nvae_tf.training.checkpoints import CheckpointManager
from nvae_tf.training.cluster import Cluster, lost_workers
from nvae_tf.training.curves import interval
from nvae_tf.training.keras_loop import KerasLoop
from nvae_tf.training.optimizer_choice import make_optimizer
from nvae_tf.training.reports import PICTURED
from nvae_tf.training.same_start import check_same_flags, check_same_images, check_same_start
from nvae_tf.training.schedules import WarmupCosineByEpoch
from nvae_tf.training.shared_folder import compare_folders
from nvae_tf.training.steps import (
    Steps,
    check_xla_steps,
    distributed_validation,
    grappler_disabled,
)
from nvae_tf.training.termination import Pace, TerminationSignal
from nvae_tf.training.trainer import Trainer

# Keys of the model's configuration and of its images on which weights do not depend.
MODEL_KEYS_WITHOUT_WEIGHTS = ("likelihood", "min_log_scale", "num_x_bits")
IMAGE_KEYS_WITHOUT_WEIGHTS = ("bits", "value_range", "scored_size")

AGREEING_EVERY = 10  # validation batches after which several workers agree whether to go on


def train(
    config: Config,
    folder: RunFolder,
    resume: bool = False,
    cluster: Cluster | None = None,
    epochs: int | None = None,
    *,
    own: OwnImages | None = None,
    callbacks: Sequence[tf_keras.callbacks.Callback] = (),
    start_from: NVAE | None = None,
    hparams: dict | None = None,
    xla_problem: str | None = None,
) -> dict[str, float] | None:
    """Trains the model of a configuration, and leaves everything in the run's folder.

    Args:
        config: The recipe.
        folder: Folder of the run. To continue a run, all workers have to see the same folder.
        resume: Whether to continue the run in the folder, from its newest checkpoint.
        cluster: This process's part in the training; default: a single process with the current
            strategy.
        epochs: Number of the configuration's epochs after which to end; schedules are unaffected.
            Default: all.
        own: The images, if they were given in Python.
        callbacks: Callbacks of Keras or of `nvae_tf.callbacks`.
        start_from: A trained model whose weights and running averages a new run begins with.
        hparams: Values for TensorBoard's tab HParams; default: the whole configuration.
        xla_problem: Why XLA does not work in this process, or None. If it does not work in one of the
            workers, nothing is compiled.

    Returns:
        The test set's ``nelbo``, ``recon`` and ``kl`` in nats and ``bpd`` in bits per dimension; None
        if SIGTERM ended training early, with a checkpoint.

    Raises:
        UserError: The data, the configuration or the folder cannot be used; another process trains in
            the folder; a worker was lost or was started differently; or `start_from` is not the
            configuration's model.
        TrainingDivergedError: Too many steps in a row were skipped.
    """
    cluster = cluster or Cluster(tf.distribute.get_strategy())
    with lost_workers(cluster):
        check_same_flags(config, resume, cluster, own, start_from)
        facts = own.facts if own else None
        with cluster.agreement():
            folder.check_free(resume)
            if own:
                dataset = catalog.with_flip(own.info, config.data)
            else:
                settled = catalog.settle(config.data)  # what is open about the images
                config = dataclasses.replace(config, data=settled.config)
                dataset = settled.dataset
                for line in settled.lines:
                    cluster.say(line)
            folder.check(config, resume, facts, dataset.image)
            check_image(config.model, dataset.image)
            if start_from is not None:
                check_start(start_from, config.model, dataset.image)
            sources = dataset.open(config.data.data)
            check_xla_steps(config.train, cluster.replicas)
        check_same_images(config, cluster, sources)
        jit_compile = _jit_compile(config, xla_problem, cluster)
    if config.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    tf_keras.utils.set_random_seed(config.data.seed)
    with (
        lost_workers(cluster),
        reading(*sources),
        _claimed(config, folder, resume, cluster, facts, dataset.image),
        cluster.strategy.scope(),
        grappler_disabled(),
        TerminationSignal() as termination,
    ):
        run = _set_up(
            config,
            folder,
            cluster,
            dataset,
            sources,
            epochs,
            jit_compile,
            facts,
            start_from,
            hparams,
        )
        del start_from  # another copy of all weights
        results = _train_epochs(config, folder, cluster, run, termination, callbacks)
        cluster.wait_for_others()  # a worker that ends first would count as lost
        for line in dataset.skipped:
            cluster.say(line)
        return results


def _jit_compile(config: Config, xla_problem: str | None, cluster: Cluster) -> str:
    """The configuration's ``jit_compile``, or ``off`` if XLA does not work in one of the workers."""
    # All workers do the same, since replicas have to compute identical updates.
    if not any(broken for (broken,) in cluster.gather_from_workers([int(xla_problem is not None)])):
        return config.train.jit_compile
    where = f"here ({xla_problem})" if xla_problem else "in another worker"
    cluster.say(f"XLA does not work {where}: training goes on as with --jit_compile off")
    return "off"


@contextlib.contextmanager
def _claimed(config: Config, folder: RunFolder, resume: bool, cluster: Cluster, facts, image):
    """Holds the run's folder for this training: the chief locks it, and all workers look for it."""
    with contextlib.ExitStack() as held:
        with cluster.agreement():
            if cluster.is_chief:
                held.enter_context(exclusive_lock(folder.path, "training"))
            # Checked again, because another process may have trained here until now.
            folder.check(config, resume, facts, image)
        compare_folders(folder, cluster)
        yield


class _Run(NamedTuple):
    """The parts of a training, once everything is built.

    Attributes:
        trainer: The trainer, which holds the model.
        data: The batches.
        checkpoints: Saves and restores the state.
        report: Progress, curves and pictures; None in processes that do not write.
        start_step: Number of steps taken before.
        end: Step after which this process ends.
        counts: Batch and step counts.
    """

    trainer: Trainer
    data: TrainingData
    checkpoints: CheckpointManager
    report: reports.Reports | None
    start_step: int
    end: int
    counts: StepCounts


def _set_up(
    config: Config,
    folder: RunFolder,
    cluster: Cluster,
    dataset: catalog.DatasetInfo,
    sources: tuple[Source, Source],
    epochs: int | None,
    jit_compile: str,
    facts: dict[str, int] | None,
    start_from: NVAE | None,
    hparams: dict | None,
) -> _Run:
    """Builds everything, and restores the newest checkpoint or prepares a new training."""
    settings, say = config.train, cluster.say
    shared = f"; {cluster.replicas} replicas in {cluster.num_workers} processes"
    devices = describe_devices(cluster.strategy) + (shared if cluster.replicas > 1 else "")
    say(f"device: {devices}")

    # Data. One image of each split is read before anything is written.
    with cluster.agreement():
        counts = step_counts(config, cluster, len(sources[0]))
        data = TrainingData(config, cluster, counts, dataset, sources)
        test_images, _ = data.test_images(PICTURED), data.first_images(1)
    say(
        f"data: {dataset.name}, {len(sources[0])} training and {len(sources[1])} test images, "
        f"{counts.images_per_step} per step"
    )

    # Model and optimiser.
    trainer = build_trainer(config, dataset, counts, jit_compile)
    model = trainer.model
    say(f"model: {model.num_parameters:,} parameters, {len(model.groups)} latent groups")

    # Start, or resume.
    sizes = counts.images_per_step, len(sources[0])
    checkpoints = CheckpointManager(folder, trainer, settings.keep, settings.save_every, *sizes)
    with cluster.agreement():
        start_step = checkpoints.restore()
        checksum = checkpoints.checksum
    check_same_start(cluster, start_step, checksum)
    with cluster.agreement():
        # Only some architectures need images here, and those need all images of a step.
        needed = counts.images_per_step if model.needs_data_initialization else 1
        images = data.first_images(needed) if start_step == 0 else None
        if cluster.is_chief:
            folder.create(config, dataset.image if facts else None, facts)
    if start_step == 0 and start_from is not None:
        model.set_weights(start_from.get_weights())
        trainer.warm_up_spectral_norms()
    elif start_step == 0:
        trainer.prepare(images)
    if start_step == 0 and trainer.averages:  # for callbacks that use them before the first step
        trainer.averages.start()
    say(f"run: {folder.path}" + (f", continued from step {start_step}" if start_step else ""))

    end = counts.steps_per_epoch * min(epochs or settings.epochs, settings.epochs)
    report = None
    if cluster.is_chief:
        progress = reports.Progress(
            settings.epochs, counts.steps_per_epoch, counts.images_per_step, end
        )
        report = reports.Reports(folder, config, progress, trainer, test_images, hparams)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        report.curves.session(start_step, f"nvae-tf {__version__}: {command}; {devices}")
    return _Run(trainer, data, checkpoints, report, start_step, end, counts)


def _train_epochs(
    config: Config,
    folder: RunFolder,
    cluster: Cluster,
    run: _Run,
    termination: TerminationSignal,
    callbacks: Sequence[tf_keras.callbacks.Callback],
) -> dict[str, float] | None:
    settings, steps_per_epoch = config.train, run.counts.steps_per_epoch
    trainer, report, step = run.trainer, run.report, run.start_step
    loop = KerasLoop(
        callbacks, trainer, settings.epochs, steps_per_epoch, run.counts.images_per_step
    )
    validate = _validation(trainer, run.data, cluster, termination)
    if step < run.end:
        cluster.say(
            "compiling: the first step takes longer than the others, minutes for deep models"
        )

    steps = Steps(trainer, cluster.strategy, several=cluster.replicas > 1)
    batches, results = run.data.training(step), None
    log_every = interval(settings.log_every, steps_per_epoch)
    pace = Pace(steps_per_epoch, settings.save_every)
    loop.begin()
    while step < run.end:
        loop.before(step)
        count = pace.steps(step) if cluster.replicas > 1 else 1
        steps.take(batches, count)
        logs, step = steps.report(), step + count
        epoch, left = divmod(step, steps_per_epoch)
        last = step == run.end
        if cluster.replicas > 1:
            pace.done(logs)
        if left == 0 or step % log_every < count:
            _check_divergence(trainer, step, folder)
        if report:
            _report_steps(run, report, step, count, steps, left == 0)
        loop.after(step, count, steps.report)
        results = None
        if left == 0:
            results = validate() if last or epoch % settings.eval_every == 0 else None
            loop.epoch(epoch, logs, results)
        if not (last and results) and termination.agreed(cluster, pace, loop.stopped):
            _check_divergence(trainer, step, folder)
            # Saved first: callbacks may take long to end, and put back weights of earlier steps.
            changed = loop.weights_changed
            _save_early(run, cluster, f"stopped by SIGTERM after step {step}", again=changed)
            loop.end()
            return None
        if report and left == 0:
            report.epoch(epoch, step, logs, results, functools.partial(steps.graph, batches))
            if last or epoch % settings.images_every == 0:
                report.pictures.draw(step)
        if termination.stop_agreed:
            break

    return _finish(run, cluster, step, results, loop.end(), validate)


def _finish(
    run: _Run, cluster: Cluster, step: int, results, changed: bool, validate
) -> dict[str, float] | None:
    """Saves and scores what training ended with.

    Args:
        run: The parts of the training.
        cluster: This process's part in it.
        step: Number of steps taken.
        results: Result of the validation after the last step, or None.
        changed: Whether callbacks have replaced the model's weights since.
        validate: Scores the test set; returns None if SIGTERM ended the validation.

    Returns:
        As for `train`.
    """
    if step < run.end:
        _save_early(run, cluster, f"stopped by a callback after step {step}", again=True)
    elif changed and run.report:
        run.checkpoints.save(again=True)
    if results is None or changed:
        results = validate()
    if results is None:
        cluster.say("stopped by SIGTERM; training was complete")
        return None
    if run.report and (changed or run.start_step >= run.end):
        run.report.pictures.draw(step)
    return {name: float(results[name]) for name in ("nelbo", "bpd", "recon", "kl")}


def _report_steps(
    run: _Run, report: reports.Reports, step: int, count: int, steps: Steps, ends_epoch: bool
) -> None:
    report.steps(step, count, steps.report)
    # The end of an epoch is always saved, and before validation, which may take long. Within an epoch
    # nothing is saved while steps are being skipped, which may be the start of a divergence.
    if ends_epoch or (run.checkpoints.due(step) and not run.trainer.consecutive_skips.numpy()):
        run.checkpoints.save()
    if ends_epoch:
        report.progress.trained(step)


def _save_early(run: _Run, cluster: Cluster, what: str, again: bool) -> None:
    """Saves a checkpoint and prints its path, in the process that writes."""
    if run.report:
        run.report.progress.close()
        cluster.say(f"{what}: {run.checkpoints.save(again)}")


def check_start(model: NVAE, config: ModelConfig, image: ImageSpec) -> None:
    """Checks that a training can begin with the weights of a model.

    Args:
        model: The trained model.
        config: Configuration of the model that is to be trained.
        image: Description of its images.

    Raises:
        ConfigError: The two models have different weights or images.
    """
    sections = (
        (config, model.config, MODEL_KEYS_WITHOUT_WEIGHTS),
        (image, model.image, IMAGE_KEYS_WITHOUT_WEIGHTS),
    )
    for ours, theirs, ignored in sections:
        for name, value in dataclasses.asdict(ours).items():
            before = getattr(theirs, name)
            if name not in ignored and value != before:
                raise ConfigError(
                    f"{name}: {value} does not start from the model of --init_from, which has "
                    f"{before}; expected the same model and images of the same size and kind"
                )


def build_trainer(
    config: Config, dataset: catalog.DatasetInfo, counts: StepCounts, jit_compile: str
) -> Trainer:
    """Makes the model, its optimiser and its trainer; in the strategy's scope.

    Args:
        config: Configuration of the run.
        dataset: Description of the data set.
        counts: Batch and step counts.
        jit_compile: Value used in place of the configuration's ``jit_compile``.
    """
    settings = dataclasses.replace(config.train, jit_compile=jit_compile)
    model = NVAE(config.model, dataset.image, settings.precision.removeprefix("mixed_"))
    schedule = WarmupCosineByEpoch.from_train_config(settings, counts.steps_per_epoch)
    optimizer = make_optimizer(settings, schedule)
    steps = counts.total_steps, counts.steps_per_epoch
    return Trainer(model, settings, *steps, config.data.seed, optimizer=optimizer)


def _validation(
    trainer: Trainer, data: TrainingData, cluster: Cluster, termination: TerminationSignal
):
    """Makes a function that scores the test set, and returns None if SIGTERM ended that early."""
    run_step = distributed_validation(trainer, cluster.strategy)

    def validate():
        number = itertools.count(1)
        # Agreeing makes several workers wait for each other.
        every = 1 if cluster.num_workers == 1 else AGREEING_EVERY

        def stop():
            return next(number) % every == 0 and termination.agreed(cluster)

        return trainer.validate(run_step, data.validation(), stop)

    return validate


def _check_divergence(trainer: Trainer, step: int, folder: RunFolder) -> None:
    if trainer.diverged:
        latest = next(iter(folder.list_checkpoints()), None)
        checkpoint = (
            f"the newest checkpoint is {latest} (if training diverges again from there, remove it and "
            "continue from the one before)"
            if latest
            else "there is no checkpoint yet"
        )
        raise TrainingDivergedError(reports.divergence(trainer, step, checkpoint))

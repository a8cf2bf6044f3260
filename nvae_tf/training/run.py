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
from nvae_tf.config import KEYS, Config, ImageSpec, ModelConfig, check_image
from nvae_tf.data import catalog, pipeline
from nvae_tf.data.own import OwnImages
from nvae_tf.data.source import Source, reading
from nvae_tf.engine.devices import describe_devices
from nvae_tf.io.errors import ConfigError, TrainingDivergedError, UserError
from nvae_tf.io.lock import exclusive_lock
from nvae_tf.model import NVAE, model_digest
from nvae_tf.run_folder import RunFolder
from nvae_tf.training import reports
from nvae_tf.training.checkpoints import Checkpoints
from nvae_tf.training.cluster import Cluster, lost_workers
from nvae_tf.training.curves import interval
from nvae_tf.training.keras_loop import KerasLoop
from nvae_tf.training.optimizer_choice import make_optimizer
from nvae_tf.training.reports import PICTURED
from nvae_tf.training.schedules import WarmupCosineByEpoch
from nvae_tf.training.shared_folder import compare_folders
from nvae_tf.training.termination import Pace, Termination
from nvae_tf.training.trainer import (
    Trainer,
    check_xla_steps,
    distributed_function,
    distributed_validation,
    grappler_disabled,
    several_steps,
    step_results,
    whole_step,
)

# Keys of the model's configuration and of its images that weights do not depend on.
WITHOUT_WEIGHTS = ("likelihood", "min_log_scale", "num_x_bits")
OF_VALUES = ("bits", "value_range", "scored_size")

AGREEING_EVERY = 10  # batches of a validation, after which several workers agree whether to go on


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
        folder: Where the run is kept; with several workers, a folder that all of them see.
        resume: Continue the run that is there, from its newest checkpoint.
        cluster: Who takes part; default: this process's default device.
        epochs: End after this many of the configuration's epochs, whose schedules stay; default: all.
        own: The images, if the configuration does not name them.
        callbacks: Callbacks of Keras, or ours.
        start_from: A trained model whose weights and running averages a new run begins with.
        hparams: Values for TensorBoard's tab HParams; default: the whole configuration.
        xla_problem: Why XLA does not work in this process; then nothing is compiled, whatever the
            configuration says.

    Returns:
        The test set's ``nelbo``, ``recon`` and ``kl`` in nats and ``bpd`` in bits per dimension; None
        if SIGTERM ended training early, with a checkpoint.

    Raises:
        UserError: The data, the configuration or the folder do not allow it, another process trains
            in the folder, a worker was lost or was started differently, or the model to start from is
            another one.
        TrainingDivergedError: Too many steps in a row were not finite.
    """
    cluster = cluster or Cluster(tf.distribute.get_strategy())
    with lost_workers(cluster):
        _check_same_flags(config, resume, cluster, own, start_from)
        facts = own.facts if own else None
        with cluster.agreement():
            folder.check_free(resume)
            config, dataset = _settle(config, cluster, own)
            folder.check(config, resume, facts, dataset.image)
            check_image(config.model, dataset.image)
            if start_from is not None:
                check_start(start_from, config.model, dataset.image)
            sources = dataset.open(config.data.data)
            check_xla_steps(config.train, cluster.replicas)
        _check_same_images(config, cluster, sources)
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
        Termination() as termination,
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
        results = _train(config, folder, cluster, run, termination, callbacks)
        cluster.gather_from_workers([1])  # if one worker ended first, the others would call it lost
        if cluster.is_chief:
            for line in dataset.skipped:
                print(line, flush=True)
        return results


def _jit_compile(config: Config, xla_problem: str | None, cluster: Cluster) -> str:
    """The configuration's ``jit_compile``, or ``off`` if XLA does not work in one of the workers."""
    # All of them, since replicas have to compute identical updates.
    if not any(broken for (broken,) in cluster.gather_from_workers([int(xla_problem is not None)])):
        return config.train.jit_compile
    if cluster.is_chief:
        where = f"here ({xla_problem})" if xla_problem else "in another worker"
        print(f"XLA does not work {where}: training goes on as with --jit_compile off", flush=True)
    return "off"


@contextlib.contextmanager
def _claimed(config: Config, folder: RunFolder, resume: bool, cluster: Cluster, facts, image):
    """Holds the run's folder for this training, which the chief locks and all workers have to see."""
    with contextlib.ExitStack() as held:
        with cluster.agreement():
            if cluster.is_chief:
                held.enter_context(exclusive_lock(folder.path, "training"))
            # Again: another process may have trained here until now.
            folder.check(config, resume, facts, image)
        compare_folders(folder, cluster)
        yield


class StepCounts(NamedTuple):
    """Batch and step counts derived from the configuration.

    Attributes:
        images_per_pass: Images in one pass of all replicas.
        images_per_step: The same times the passes of a step.
        steps_per_epoch: Whole steps in the training set.
        total_steps: Steps of the whole training.
    """

    images_per_pass: int
    images_per_step: int
    steps_per_epoch: int
    total_steps: int


def _step_counts(config: Config, cluster: Cluster, num_images: int) -> StepCounts:
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
    return StepCounts(per_pass, per_pass * passes, steps_per_epoch, total)


class _Data:
    """The batches of a training, as one worker sees them.

    Args:
        config: Configuration of the run.
        cluster: Who takes part.
        counts: Sizes of batches.
        dataset: Description of the data.
        sources: Training and test images.
    """

    def __init__(self, config: Config, cluster: Cluster, counts: StepCounts, dataset, sources):
        self._cluster, self._counts, self._dataset, self._sources = (
            cluster,
            counts,
            dataset,
            sources,
        )
        self._view = dict(seed=config.data.seed, num_bits=config.model.x_bits(dataset.image))
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
                    passes=size // self._counts.images_per_pass, **self._view, **self._share,
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


class _Run(NamedTuple):
    """What a training works with, once everything is built.

    Attributes:
        trainer: The model, and what changes it.
        data: The batches.
        checkpoints: Where the state goes.
        report: What is told and drawn; None in processes that do not write.
        start_step: Steps taken before.
        end: Step after which training is complete.
        steps_per_epoch: Steps in an epoch.
        images_per_step: Images in a step, over all replicas.
    """

    trainer: Trainer
    data: _Data
    checkpoints: Checkpoints
    report: reports.Reports | None
    start_step: int
    end: int
    steps_per_epoch: int
    images_per_step: int


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
    settings, say = config.train, _say(cluster)
    shared = f"; {cluster.replicas} replicas in {cluster.num_workers} processes"
    devices = describe_devices(cluster.strategy) + (shared if cluster.replicas > 1 else "")
    say(f"device: {devices}")

    # Data. One image of each split is read before anything is written.
    with cluster.agreement():
        counts = _step_counts(config, cluster, len(sources[0]))
        data = _Data(config, cluster, counts, dataset, sources)
        test_images, _ = data.test_images(), data.first_images(1)
    say(
        f"data: {dataset.name}, {len(sources[0])} training and {len(sources[1])} test images, "
        f"{counts.images_per_step} per step"
    )

    # Model and optimiser.
    trainer = _build_trainer(config, dataset, counts, jit_compile)
    model = trainer.model
    say(f"model: {model.num_parameters:,} parameters, {len(model.groups)} latent groups")

    # Start, or resume.
    checkpoints = Checkpoints(
        folder, trainer, settings.keep, settings.save_every, counts.images_per_step
    )
    image = dataset.image if facts else None
    create = functools.partial(folder.create, config, image, facts)
    start_step = _start(create, cluster, trainer, checkpoints, data, counts, start_from)
    say(f"run: {folder.path}" + (f", continued from step {start_step}" if start_step else ""))

    end = counts.steps_per_epoch * min(epochs or settings.epochs, settings.epochs)
    report = None
    if cluster.is_chief:
        progress = reports.Progress(
            settings.epochs, counts.steps_per_epoch, counts.images_per_step, end
        )
        report = reports.Reports(folder, config, progress, model, test_images, hparams)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        report.session(start_step, f"nvae-tf {__version__}: {command}; {devices}")
    sizes = counts.steps_per_epoch, counts.images_per_step
    return _Run(trainer, data, checkpoints, report, start_step, end, *sizes)


def _train(
    config: Config,
    folder: RunFolder,
    cluster: Cluster,
    run: _Run,
    termination: Termination,
    callbacks: Sequence[tf_keras.callbacks.Callback],
) -> dict[str, float] | None:
    settings, say = config.train, _say(cluster)
    trainer, report, step = run.trainer, run.report, run.start_step
    watched = KerasLoop(
        callbacks, trainer, settings.epochs, run.steps_per_epoch, run.images_per_step
    )
    validate = _validation(trainer, run.data, cluster, termination)
    if step < run.end:
        say("compiling: the first step takes longer than the others, minutes for deep models")

    take_steps, graph = _steps_in_a_call(trainer, cluster)
    batches, results = run.data.training(step), None
    log_every = interval(settings.log_every, run.steps_per_epoch)
    pace = Pace(run.steps_per_epoch, settings.save_every)
    watched.begin()
    while step < run.end:
        watched.before(step)
        count = pace.steps(step) if cluster.replicas > 1 else 1
        logs_of = take_steps(batches, count)
        logs, step = logs_of(-1), step + count
        epoch, left = divmod(step, run.steps_per_epoch)
        last = step == run.end
        if cluster.replicas > 1:
            pace.done(logs)
        if left == 0 or step % log_every < count:
            _check_divergence(trainer, step, folder)
        if report:
            _report_steps(run, report, step, count, logs_of, left == 0)
        watched.after(step, count, logs)
        if left == 0:
            results = validate() if last or epoch % settings.eval_every == 0 else None
            watched.epoch(epoch, logs, results)
        if not (last and results) and termination.agreed(cluster, pace):
            _check_divergence(trainer, step, folder)
            changed = watched.end()
            _save_early(run, say, f"stopped by SIGTERM after step {step}", again=changed)
            return None
        if report and left == 0:
            report.epoch(epoch, step, logs, results, functools.partial(graph, batches))
            if last or epoch % settings.images_every == 0:
                _draw(report, trainer, step)
        if watched.stopped:
            break

    return _finish(run, step, results, watched.end(), validate, say)


def _finish(run: _Run, step: int, results, changed: bool, validate, say) -> dict[str, float] | None:
    """Saves and scores what training ended with.

    Args:
        run: What training worked with.
        step: Steps taken.
        results: The last validation, or None.
        changed: Whether callbacks have given the model other weights since.
        validate: Scores the test set; None if SIGTERM ended that.
        say: Prints a line.

    Returns:
        As for `train`.
    """
    if step < run.end:
        _save_early(run, say, f"stopped by a callback after step {step}", again=True)
    elif changed and run.report:
        run.checkpoints.save(again=True)
    if results is None or changed:
        results = validate()
    if results is None:
        say("stopped by SIGTERM; training was complete")
        return None
    if run.report and (changed or run.start_step >= run.end):
        _draw(run.report, run.trainer, step)
    return {name: float(results[name]) for name in ("nelbo", "bpd", "recon", "kl")}


def _report_steps(
    run: _Run, report: reports.Reports, step: int, count: int, logs_of, ends_epoch: bool
) -> None:
    report.steps(step, count, logs_of)
    # Not in a row of skipped steps, which may be the start of a divergence; and before validation,
    # which may take long.
    if ends_epoch or (run.checkpoints.due(step) and not run.trainer.skipped_in_row):
        run.checkpoints.save()
    if ends_epoch:
        report.trained(step)


def _save_early(run: _Run, say, what: str, again: bool = False) -> None:
    """Saves, and says so, in the process that writes."""
    if run.report:
        run.report.close()
        say(f"{what}: {run.checkpoints.save(again)}")


def _start(
    create, cluster, trainer, checkpoints, data: _Data, counts: StepCounts, start_from: NVAE | None
) -> int:
    """Restores the newest checkpoint, or prepares a new training; returns the steps taken so far."""
    with cluster.agreement():
        start_step = checkpoints.restore()
    _check_same_start(cluster, start_step)
    with cluster.agreement():
        # Only some architectures need images here, and those need all images of a step.
        needed = counts.images_per_step if trainer.model.needs_data_initialization else 1
        images = data.first_images(needed) if start_step == 0 else None
        if cluster.is_chief:
            create()
    if start_step == 0 and start_from is not None:
        trainer.model.set_weights(start_from.get_weights())
        trainer.warm_up_spectral_norms()
    elif start_step == 0:
        trainer.prepare(images)
    return start_step


def check_start(model: NVAE, config: ModelConfig, image: ImageSpec) -> None:
    """Checks that a training can begin with the weights of a model.

    Args:
        model: The trained model.
        config: The model that is to be trained.
        image: Its images.

    Raises:
        ConfigError: They are not the same model.
    """
    sections = ((config, model.config, WITHOUT_WEIGHTS), (image, model.image, OF_VALUES))
    for ours, theirs, ignored in sections:
        for name, value in dataclasses.asdict(ours).items():
            before = getattr(theirs, name)
            if name not in ignored and value != before:
                raise ConfigError(
                    f"{name}: {value} does not start from the model of --init_from, which has "
                    f"{before}; expected the same model and images of the same size and kind"
                )


def _say(cluster: Cluster):
    """A function that prints a line, in the process that writes."""
    return functools.partial(print, flush=True) if cluster.is_chief else lambda *_: None


def _draw(report: reports.Reports, trainer: Trainer, step: int) -> None:
    with trainer.evaluated_weights():
        report.pictures(step)


def _build_trainer(
    config: Config, dataset: catalog.DatasetInfo, counts: StepCounts, jit_compile: str
) -> Trainer:
    settings = dataclasses.replace(config.train, jit_compile=jit_compile)
    model = NVAE(config.model, dataset.image, settings.precision.removeprefix("mixed_"))
    schedule = WarmupCosineByEpoch.from_train_config(settings, counts.steps_per_epoch)
    optimizer = make_optimizer(settings, schedule)
    steps = counts.total_steps, counts.steps_per_epoch
    return Trainer(model, settings, *steps, config.data.seed, optimizer=optimizer)


def _validation(trainer: Trainer, data: _Data, cluster: Cluster, termination: Termination):
    """A function that validates, and returns None if SIGTERM ended that early."""
    run_step = distributed_validation(trainer, cluster.strategy)

    def validate():
        number = itertools.count(1)
        # Several workers wait for each other to agree.
        every = 1 if cluster.num_workers == 1 else AGREEING_EVERY

        def stop():
            return next(number) % every == 0 and termination.agreed(cluster)

        return trainer.validate(run_step, data.validation(), stop)

    return validate


def _steps_in_a_call(trainer: Trainer, cluster: Cluster):
    """How steps are taken.

    Returns:
        A function of an iterator over batches and a number of steps, to a function of a step's place
        among those (-1 is the last) to what it reports; and a function of the iterator to the graph
        that it runs.
    """
    step = whole_step(trainer, cluster.strategy)
    if cluster.replicas > 1:
        take = several_steps(step, cluster.strategy)

        def take_several(batches, count):
            return functools.partial(step_results, take(batches, tf.constant(count)))

        return (
            take_several,
            lambda batches: take.get_concrete_function(batches, tf.constant(1)).graph,
        )
    run_step = distributed_function(step, cluster.strategy)

    def take_one(batches, _):
        logs = run_step(next(batches))
        return lambda _: logs

    return (
        take_one,
        lambda batches: run_step.get_concrete_function(batches.element_spec).graph,
    )


def _check_divergence(trainer: Trainer, step: int, folder: RunFolder) -> None:
    if trainer.diverged:
        latest = next(iter(folder.list_checkpoints()), None)
        raise TrainingDivergedError(reports.divergence(trainer, step, latest))


def _check_same_flags(
    config: Config, resume: bool, cluster: Cluster, own, start_from: NVAE | None
) -> None:
    """Makes sure that all workers run the same version with the same configuration.

    Raises:
        UserError: They do not.
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
    flags["images"] = str(own and own.facts)
    flags["init_from"] = "not given"
    if start_from is not None and cluster.num_workers > 1:
        flags["init_from"] = f"a model of checksum {model_digest(start_from)[:8]}"
    different = cluster.disagreements({**flags, "cont_training": str(resume)})
    if different:
        here = ", ".join(f"{name} is {flags.get(name, resume)} here" for name in different)
        raise UserError(
            f"another worker has another configuration: {here}; start all workers with the same flags"
        )


def _settle(
    config: Config, cluster: Cluster, own: OwnImages | None
) -> tuple[Config, catalog.DatasetInfo]:
    """Finds out what the configuration leaves open of the images; the chief prints it."""
    if own:
        return config, own.info
    settled = catalog.settle(config.data)
    if cluster.is_chief:
        for line in settled.lines:
            print(line, flush=True)
    return dataclasses.replace(config, data=settled.config), settled.dataset


def _check_same_images(config: Config, cluster: Cluster, sources: Sequence[Source]) -> None:
    """Makes sure that all workers found the same images.

    Raises:
        UserError: They did not.
    """
    found = {name: str(getattr(config.data, name)) for name in catalog.FOUND}
    found["number of images"] = " and ".join(str(len(source)) for source in sources)
    different = cluster.disagreements(found)
    if different:
        here = ", ".join(f"{name} is {found[name]} here" for name in different)
        raise UserError(
            f"another worker found other images: {here}; give all workers the same files in --data"
        )


def _check_same_start(cluster: Cluster, start_step: int) -> None:
    """Makes sure that all workers found the same checkpoint.

    Raises:
        UserError: They did not.
    """
    if cluster.disagreements({"step": str(start_step)}):
        raise UserError(
            f"this worker continues from step {start_step} and another one does not: all workers need "
            "the same --root, on a file system that they share"
        )

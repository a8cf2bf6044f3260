"""A training run, from its configuration to its last checkpoint."""

import functools

import tensorflow as tf
import tf_keras

from nvae_tf.config import Config, check_image
from nvae_tf.data import catalog, pipeline
from nvae_tf.data.source import Source, reading
from nvae_tf.errors import ConfigError
from nvae_tf.model import NVAE
from nvae_tf.run_folder import RunFolder
from nvae_tf.training import callbacks
from nvae_tf.training.checkpoints import Checkpoints
from nvae_tf.training.optimizer import Adamax
from nvae_tf.training.schedules import WarmupCosine
from nvae_tf.training.trainer import Trainer


def train(config: Config, folder: RunFolder, resume: bool = False) -> dict[str, float]:
    """Trains the model of a configuration, and leaves everything in the run's folder.

    Args:
        config: the recipe.
        folder: where the run is kept.
        resume: continue the run that is there, from its newest checkpoint.

    Returns:
        The test set's ``nelbo``, ``recon`` and ``kl`` in nats and ``bpd`` in bits per dimension.

    Raises:
        UserError: the data, the configuration or the folder do not allow it.
    """
    folder.check(config, resume)
    dataset = catalog.describe(config.data)
    check_image(config.model, dataset.image)
    sources = dataset.open(config.data.data)
    with reading(*sources):
        return _train(config, folder, dataset, *sources)


def _train(
    config: Config,
    folder: RunFolder,
    dataset: catalog.DataSet,
    train_source: Source,
    test_source: Source,
) -> dict[str, float]:
    # Data. A first look at it comes before anything is written.
    batch_size, seed = config.data.batch_size, config.data.seed
    steps_per_epoch = len(train_source) // batch_size
    if steps_per_epoch == 0:
        raise ConfigError(
            f"batch_size: {batch_size} is not allowed; expected at most the {len(train_source)} "
            f"training images of {dataset.name}"
        )
    print(f"data: {dataset.name}, {len(train_source)} training and {len(test_source)} test images")
    view = dict(batch_size=batch_size, seed=seed, num_bits=config.model.num_x_bits)
    training_batches = functools.partial(pipeline.training_batches, train_source, dataset, **view)
    test_batches = pipeline.evaluation_batches(test_source, dataset, **view)
    first_images = next(iter(training_batches()))
    test_images = next(iter(test_batches))

    # Model and optimiser.
    tf_keras.utils.set_random_seed(seed)
    model = NVAE(config.model, dataset.image)
    trainer = Trainer(model, config.train, steps_per_epoch * config.train.epochs, seed)
    schedule = WarmupCosine.from_train_config(config.train, steps_per_epoch)
    optimizer = Adamax(schedule, weight_decay=config.train.weight_decay)
    optimizer.build(model.trainable_variables)
    # On CPUs XLA's depthwise convolutions are many times slower.
    trainer.compile(optimizer=optimizer, jit_compile=bool(tf.config.list_physical_devices("GPU")))
    parameters = sum(variable.shape.num_elements() for variable in model.trainable_variables)
    print(f"model: {parameters:,} parameters, {len(model.groups)} latent groups")

    # Start, or resume.
    folder.create(config)
    checkpoints = Checkpoints(folder, trainer, config.train.keep)
    start_step = checkpoints.restore()
    if start_step == 0:
        trainer.prepare(first_images)
    print(f"run: {folder.path}" + (f", continued from step {start_step}" if start_step else ""))

    # Train.
    epochs, eval_every = config.train.epochs, config.train.eval_every
    history = trainer.fit(
        training_batches(start_step=start_step),
        steps_per_epoch=steps_per_epoch,
        initial_epoch=start_step // steps_per_epoch,
        epochs=epochs,
        validation_data=test_batches,
        validation_freq=[e for e in range(1, epochs + 1) if e % eval_every == 0 or e == epochs],
        callbacks=[
            callbacks.Progress(epochs, steps_per_epoch),
            callbacks.StopOnNaN(checkpoints, config.train.log_every),
            callbacks.TensorBoard(folder, config),
            callbacks.SaveCheckpoint(checkpoints),
            callbacks.Pictures(folder, config, test_images),
        ],
        verbose=0,
    ).history

    # Report.
    names = ("nelbo", "bpd", "recon", "kl")
    if not history:  # the run was complete already
        results = trainer.evaluate(test_batches, verbose=0, return_dict=True)
        return {name: float(results[name]) for name in names}
    return {name: float(history[f"val_{name}"][-1]) for name in names}

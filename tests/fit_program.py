"""Trains on real digits by the command and by `fit`, with the same batches, into two run folders.

Run as a program by `test_fit.py`: ``python fit_program.py OUT --world_size 2``. TF_CONFIG says which
workers there are.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import nvae_tf  # noqa: F401 - sets what TensorFlow reads when it is imported

import tensorflow as tf  # isort: skip
import tf_keras  # isort: skip

from nvae_tf import callbacks
from nvae_tf import config as configuration
from nvae_tf.data import catalog, pipeline
from nvae_tf.run_folder import RunFolder
from nvae_tf.training import run
from nvae_tf.training.cluster import connect

GLOBAL_BATCH, EPOCHS, SEED = 200, 2, 1
SETTINGS = dict(warmup_epochs=1, weight_decay_norm=1e-2, ema_decay=0.9, jit_compile="off")
SMALL = dict(
    num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=2, num_latent_scales=2,
    num_latent_per_group=4,
)  # fmt: skip


def main() -> None:
    """Trains twice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--world_size", type=int)
    parser.add_argument("--accumulate_steps", type=int, default=1)
    arguments = parser.parse_args()
    cluster, passes = connect(arguments.world_size, 100), arguments.accumulate_steps
    settings = {**SETTINGS, "accumulate_steps": passes}
    changes = {**SMALL, **settings, "epochs": EPOCHS, "seed": SEED, "deterministic": True}
    changes["batch_size"] = GLOBAL_BATCH // cluster.replicas // passes
    config = configuration.from_dict(changes, base=configuration.load("digits"))
    by_command = run.train(config, RunFolder(arguments.out / "command"), cluster=cluster)

    dataset = catalog.get_dataset_info(config.data)
    train, test = dataset.open("")
    view = dict(seed=SEED, batch_size=GLOBAL_BATCH)
    per_worker = cluster.replicas // cluster.num_workers
    share = dict(worker=cluster.worker, num_workers=cluster.num_workers, parts=per_worker)
    distribute = cluster.strategy.distribute_datasets_from_function
    batches = distribute(lambda _: pipeline.training_batches(train, dataset, **view, **share))
    images = np.concatenate(list(pipeline.evaluation_batches(test, dataset, **view)))
    if cluster.replicas == 1 or passes > 1:  # as most do it
        batches = pipeline.training_batches(train, dataset, **view)
    with cluster.strategy.scope():
        tf_keras.utils.set_random_seed(SEED)
        model = nvae_tf.NVAE(config.model, dataset.image)
        model.compile(**settings, seed=SEED, deterministic=True)
    history = model.fit(
        batches,
        epochs=EPOCHS,
        steps_per_epoch=len(train) // GLOBAL_BATCH,
        validation_data=images,
        validation_batch_size=GLOBAL_BATCH,
        callbacks=[callbacks.Checkpoints(arguments.out / "fit"), callbacks.Termination()],
        verbose=2 if cluster.is_chief else 0,
    )
    batches = tf.data.Dataset.from_tensor_slices(images).batch(70)  # the last one is smaller
    scores = model.evaluate(batches, verbose=0)
    some = [model.evaluate(batches, steps=2, verbose=0), model.evaluate(images[:140], verbose=0)]
    # As EarlyStopping does with the best weights.
    model.set_weights([0.5 * weight for weight in model.get_weights()])
    trainer = model.fitting.trainer
    follow = all(map(np.array_equal, trainer.weights, trainer.averages.values()))
    if passes == 1:
        front = try_the_rest(arguments.out, model, images, cluster)
    last = {name: values[-1] for name, values in history.history.items()}
    if cluster.is_chief:
        results = {"fit": {k: float(v) for k, v in last.items()}, "command": by_command}
        results["averages_follow"] = follow
        results["front"] = front if passes == 1 else {}
        results["evaluated"] = {k: float(v) for k, v in scores.items()}
        results["two batches"] = [float(score["nelbo"]) for score in some]
        (arguments.out / "results.json").write_text(json.dumps(results))
    cluster.gather_from_workers([1])


def try_the_rest(out, model, images, cluster):
    """Loads what `fit` saved, reconstructs, and trains on arrays, from these weights too."""
    with cluster.strategy.scope():
        loaded = nvae_tf.load(out / "fit")
        predicted = loaded.predict(images[:100], batch_size=20, verbose=0)
        alone = loaded.reconstruct(tf.constant(images[:100]))
    arrays = (255 * images[:300]).astype(np.uint8), (255 * images[300:]).astype(np.uint8)
    options = dict(**SMALL, image=model.image, epochs=1, batch_size=50, jit_compile="off")
    with cluster.strategy.scope():
        new = nvae_tf.train("digits", arrays, folder=out / "new", **options)
        begun = nvae_tf.train(
            "digits", arrays, folder=out / "begun", init_from=out / "fit", **options
        )
        refused = []
        for elsewhere in ("new", "nowhere"):
            start = out / ("fit" if cluster.is_chief else elsewhere)
            try:
                folder = out / f"from-{elsewhere}"
                nvae_tf.train("digits", arrays, folder=folder, init_from=start, **options)
                refused.append("")
            except nvae_tf.io.errors.UserError as error:
                refused.append(str(error))
    difference = float(np.abs(predicted - alone.numpy()).max())
    return {"difference": difference, "new": new, "begun": begun, "refused": refused}


if __name__ == "__main__":
    sys.exit(main())

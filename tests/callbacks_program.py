"""Trains on real digits by `fit` on several workers, with callbacks of ours and of Keras.

Run as a program by `test_fit.py`: ``python callbacks_program.py OUT``. TF_CONFIG says which workers
there are; the strategy is made as the documentation of TensorFlow says.
"""

import json
import sys
from pathlib import Path

import nvae_tf

import tensorflow as tf  # isort: skip
import tf_keras  # isort: skip

from nvae_tf.config import DataConfig
from nvae_tf.data import catalog, pipeline

SMALL = dict(
    num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=2, num_latent_scales=1
)  # fmt: skip


def main() -> None:
    """Trains, and prints what this worker saw as JSON."""
    out = Path(sys.argv[1])
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    index = strategy.cluster_resolver.task_id
    dataset = catalog.get_dataset_info(DataConfig(dataset="digits"))
    train, test = (
        next(iter(pipeline.evaluation_batches(source, dataset, batch_size=count, seed=1))).numpy()
        for source, count in zip(dataset.open(""), (600, 90), strict=True)
    )
    with strategy.scope():
        tf_keras.utils.set_random_seed(1)
        model = nvae_tf.NVAE.from_recipe("digits", **SMALL)
        model.compile(jit_compile="off", ema_decay=0.9)
    ours, kl = nvae_tf.callbacks, nvae_tf.callbacks.KLPerGroup()
    callbacks = [
        ours.Checkpoints(out / "run"), ours.Pictures(out / "run", test), ours.Curves(out / "run"), kl,
        ours.Termination(), ours.Divergence(),
        tf_keras.callbacks.TensorBoard(str(out / f"logs{index}")),
        tf_keras.callbacks.EarlyStopping("val_nelbo", patience=1, restore_best_weights=True),
        tf_keras.callbacks.CSVLogger(out / f"log{index}.csv"),
        tf_keras.callbacks.BackupAndRestore(str(out / "backup")),
    ]  # fmt: skip
    history = model.fit(
        train, batch_size=100, epochs=3, validation_data=test, callbacks=callbacks, verbose=0
    )
    step = model.train_on_batch(train[:100], return_dict=True)
    seen = {"val_nelbo": history.history["val_nelbo"], "step": float(step["nelbo"])}
    print(json.dumps({**seen, "epochs with KL": len(kl.history)}))


if __name__ == "__main__":
    main()

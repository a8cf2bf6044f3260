"""`compile`, `fit`, `evaluate` and `predict`: the command's training as Keras's users start it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from event_files import graphs, scalars
from processes import cluster_environments

import nvae_tf
from nvae_tf import config as configuration
from nvae_tf.config import DataConfig
from nvae_tf.data import catalog, pipeline
from nvae_tf.engine.weights import RowNames, layout
from nvae_tf.io.errors import TrainingDivergedError, UserError
from nvae_tf.training.optimizers import Adam

pytestmark = pytest.mark.core

PROGRAM = Path(__file__).parent / "fit_program.py"
SMALL = dict(
    num_latent_scales=1, num_groups_per_scale=2, num_latent_per_group=4, num_channels_enc=4,
    num_channels_dec=4, num_preprocess_cells=1, num_postprocess_cells=1, use_se=True, res_dist=True,
)  # fmt: skip


def checkpoint(folder):
    """The newest checkpoint's values by name."""
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    reader = tf.train.load_checkpoint(str(newest / "state"))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith("trainer/")]
    return {name: reader.get_tensor(name) for name in names if "epoch_sums" not in name}


def train_both_ways(out, topology, passes):
    """Trains by the command and by `fit`, in processes of their own; returns what they report."""
    variables = [{}]
    flags = ["--accumulate_steps", str(passes)]
    if topology == "two devices":
        variables, flags = [{"NVAE_SPLIT_CPU": "1"}], [*flags, "--world_size", "2"]
    elif topology == "two workers":
        variables = cluster_environments()
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, out, *flags], env={**os.environ, **own},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for own in variables
    ]  # fmt: skip
    errors = [process.communicate()[1] for process in processes]
    assert not any(process.returncode for process in processes), errors[0][-3000:]
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("topology", ["one device", "two devices", "two workers"])
def test_fit_gives_the_commands_weights_on_every_topology(topology, passes, tmp_path):
    results = train_both_ways(tmp_path, topology, passes)
    by_command, by_fit = checkpoint(tmp_path / "command"), checkpoint(tmp_path / "fit")
    assert by_command.keys() == by_fit.keys()
    for name, value in by_command.items():
        np.testing.assert_array_equal(by_fit[name], value, err_msg=name)
    assert results["averages_follow"]
    two_batches, their_images = results["two batches"]
    assert two_batches == pytest.approx(their_images, rel=1e-5)
    for name, value in results["command"].items():
        np.testing.assert_allclose(results["fit"][f"val_{name}"], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(results["evaluated"][name], value, rtol=1e-5, err_msg=name)
    if passes == 1:  # load, predict and train
        front = results["front"]
        assert front["difference"] < 1e-4
        assert front["begun"]["nelbo"] < front["new"]["nelbo"]
        several = topology == "two workers"
        assert ("init_from is a model of checksum" in front["refused"][0]) == several
        assert ("nowhere: no such run" in front["refused"][1]) == several


@pytest.mark.slow
def test_all_callbacks_work_on_two_workers_of_a_strategy_of_ones_own(tmp_path):
    program = PROGRAM.parent / "callbacks_program.py"
    processes = [
        subprocess.Popen(
            [sys.executable, program, tmp_path], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **own},
        )
        for own in cluster_environments()
    ]  # fmt: skip
    outputs = [process.communicate() for process in processes]
    assert not any(process.returncode for process in processes), outputs[0][1][-3000:]
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    assert first == second and first["epochs with KL"] == len(first["val_nelbo"])
    assert first["step"] < first["val_nelbo"][0]
    run = tmp_path / "run"
    assert (run / "samples.png").is_file() and nvae_tf.load(run).num_parameters > 1000
    # The chief alone writes: one session's files.
    assert len(list((run / "logs" / "validation").glob("events*"))) == 1
    assert graphs(run / "logs" / "train") == 1


def test_fit_gives_the_commands_weights_to_the_bit(run, recipe, tmp_path):
    config = configuration.load(str(recipe))
    dataset = catalog.get_dataset_info(config.data)
    train, test = dataset.open("")
    view = dict(batch_size=config.data.batch_size, seed=config.data.seed)
    tf_keras.utils.set_random_seed(config.data.seed)
    model = nvae_tf.NVAE(config.model, dataset.image)
    keys = ("warmup_epochs", "weight_decay_norm", "jit_compile")
    model.compile(**{key: getattr(config.train, key) for key in keys}, seed=config.data.seed)
    history = model.fit(
        pipeline.training_batches(train, dataset, **view),
        epochs=config.train.epochs,
        steps_per_epoch=len(train) // config.data.batch_size,
        callbacks=[nvae_tf.callbacks.Checkpoints(tmp_path / "fit")],
        verbose=0,
    )
    by_command, by_fit = checkpoint(run), checkpoint(tmp_path / "fit")
    assert by_command.keys() == by_fit.keys()
    for name, value in by_command.items():
        np.testing.assert_array_equal(by_fit[name], value, err_msg=name)
    assert history.history["beta"][-1] == 1.0


@pytest.fixture(scope="module")
def digits():
    """Binary images of digits: 600 for training, 90 for evaluation."""
    dataset = catalog.get_dataset_info(DataConfig(dataset="digits"))
    train, test = dataset.open("")
    batches = [
        next(iter(pipeline.evaluation_batches(source, dataset, batch_size=count, seed=1))).numpy()
        for source, count in ((train, 600), (test, 90))
    ]
    return tuple(batches)


def new_model(optimizer="adamax", **settings):
    tf_keras.utils.set_random_seed(1)
    image = nvae_tf.ImageSpec(32, 32, 1, binary=True, scored_size=(28, 28))
    model = nvae_tf.NVAE(image=image, **SMALL)
    model.compile(optimizer, **{"jit_compile": "off", **settings})
    return model


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A model after two calls of fit with every kind of callback, the histories, and the folder."""
    folder = tmp_path_factory.mktemp("fit")
    train, test = digits
    model, steps = new_model(ema_decay=0.5), []
    ours = nvae_tf.callbacks
    kl = ours.KLPerGroup()
    callbacks = [
        ours.Checkpoints(folder / "run"), ours.Pictures(folder / "run", test), kl,
        ours.Curves(folder / "run", every=4), ours.Termination(), ours.Divergence(),
        tf_keras.callbacks.TensorBoard(folder / "logs", histogram_freq=1, update_freq=1),
        tf_keras.callbacks.CSVLogger(folder / "log.csv"),
        tf_keras.callbacks.EarlyStopping("val_nelbo", patience=5, restore_best_weights=True),
        tf_keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(logs)),
    ]  # fmt: skip
    options = dict(batch_size=100, validation_data=test, verbose=0)
    first = model.fit(train, epochs=3, callbacks=callbacks, **options)
    second = model.fit(train, epochs=5, initial_epoch=3, **options)
    return model, first.history, second.history, steps, kl, folder


def test_fit_trains_and_says_how(trained, digits):
    model, first, second, steps, _, _ = trained
    assert {"nelbo", "bpd", "recon", "kl", "val_nelbo", "val_kl", "learning_rate"} <= first.keys()
    assert len(first["nelbo"]) == 3 and len(second["nelbo"]) == 2 and len(steps) == 3 * 6
    nelbo = [*first["nelbo"], *second["nelbo"]]
    assert nelbo[-1] < 0.75 * nelbo[0]
    np.testing.assert_allclose(
        np.array(first["nelbo"]), np.array(first["recon"]) + first["kl"], rtol=1e-5
    )
    np.testing.assert_allclose(
        first["bpd"], np.array(first["nelbo"]) / (784 * np.log(2)), rtol=1e-5
    )
    # The means over an epoch's steps.
    losses = [float(logs["nelbo"]) for logs in steps]
    assert losses[5] == pytest.approx(first["nelbo"][0]) and losses[6] != pytest.approx(losses[5])
    assert int(model.optimizer.iterations) == 30
    # The default warm-up of 5 epochs was shortened to 2, and then to 4; the last epoch is the slowest.
    assert max(first["learning_rate"]) == pytest.approx(1e-2, rel=0.1)
    scores = model.evaluate(digits[1], verbose=0)
    assert scores["nelbo"] == pytest.approx(second["val_nelbo"][-1], rel=1e-5)
    odd = model.evaluate(tf.data.Dataset.from_tensor_slices(digits[1]).batch(40), verbose=0)
    assert odd["nelbo"] == pytest.approx(scores["nelbo"], rel=1e-5)  # whatever the batches


def test_callbacks_of_keras_and_ours_leave_what_they_promise(trained, digits):
    model, first, _, _, kl, folder = trained
    assert len(kl.history) == 3 and kl.history[0].shape == (2,)
    points = scalars(folder / "run" / "logs" / "train")
    # An epoch has 6 steps, and ten values are more than it has.
    assert [step for step, _ in points["elbo/nelbo"]] == list(range(1, 19))
    assert points["kl_per_group/00"][-1][1] == pytest.approx(kl.history[-1][0], rel=1e-5)
    assert float(points["speed/images_per_second"][0][1]) > 0
    assert len(scalars(folder / "run" / "logs" / "validation")["elbo/nelbo"]) == 3
    assert graphs(folder / "run" / "logs" / "train") == 1
    rows = (folder / "log.csv").read_text().splitlines()
    assert len(rows) == 4 and float(rows[1].split(",")[rows[0].split(",").index("nelbo")]) > 0
    assert list((folder / "logs" / "train").glob("events*"))
    loaded = nvae_tf.load(folder / "run")
    assert loaded.image == model.image and loaded.config == model.config
    score = loaded.compile() or loaded.evaluate(digits[1], verbose=0)
    assert score["nelbo"] == pytest.approx(first["val_nelbo"][-1], rel=1e-5)
    assert (folder / "run" / "samples.png").stat().st_size > 1000
    with pytest.raises(UserError, match="holds a run already"):
        model.fit(digits[0], callbacks=[nvae_tf.callbacks.Checkpoints(folder / "run")], verbose=0)


def test_predict_reconstructs_with_the_averages_and_train_on_batch_takes_a_step(trained, digits):
    model, *_ = trained
    images = digits[1][:10]
    reconstructed = model.predict(images, batch_size=4, verbose=0)
    assert (
        reconstructed.shape == images.shape and 0 <= reconstructed.min() <= reconstructed.max() <= 1
    )
    assert np.mean((reconstructed - images) ** 2) < 0.9 * np.mean((images.mean() - images) ** 2)
    with model.fitting.trainer.averaged_weights():
        np.testing.assert_allclose(reconstructed, model.reconstruct(images), atol=1e-5)
    scores = model.evaluate(images, verbose=0, return_dict=True, workers=1)
    assert sorted(scores) == ["bpd", "kl", "nelbo", "recon"]
    assert model.evaluate(images, verbose=0, return_dict=False) == list(scores.values())
    model = new_model()
    values = [model.train_on_batch(digits[0][:50], return_dict=True) for _ in range(8)]
    assert values[0]["beta"] == 1.0 and values[-1]["nelbo"] < 0.9 * values[0]["nelbo"]
    assert model.metrics_names[:4] == ["nelbo", "bpd", "recon", "kl"]
    assert len(model.train_on_batch(digits[0][:50])) == len(model.metrics_names)


def test_a_compiled_model_is_saved_and_continued(trained, digits, tmp_path):
    model, *_ = trained
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "weights")
    model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(
        UserError, match=r"^model: expected a name that ends in \.keras; export\(\)"
    ):
        model.save("model")
    with pytest.raises(UserError, match=r"^model\.h5: expected a name that ends in \.weights\.h5"):
        model.save_weights("model.h5")
    loaded = nvae_tf.load(tmp_path / "model.keras")
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    other = new_model()
    # As if its rows were those of other weights.
    other.row_names = RowNames(layout(other.groups[0]))
    with pytest.raises(ValueError, match="its weights are in another order, or of another model"):
        other.load_weights(tmp_path / "weights")
    exported = tf.saved_model.load(str(model.export(tmp_path / "served")))
    with model.fitting.trainer.averaged_weights():
        expected = model.reconstruct(digits[1][:4])
    outputs = exported.signatures["reconstruct"](images=tf.constant(digits[1][:4]))
    np.testing.assert_allclose(outputs["reconstructions"], expected, atol=1e-5)
    continued = new_model(ema_decay=0.5)
    continued.load_weights(tmp_path / "weights")  # the optimiser's state too
    assert int(continued.optimizer.iterations) == int(model.optimizer.iterations)
    batch = digits[0][:50]
    before = continued.fitting.trainer.spectral.vectors[0].numpy()
    np.testing.assert_array_equal(before, model.fitting.trainer.spectral.vectors[0])
    assert np.isfinite(continued.train_on_batch(batch)).all()


@pytest.mark.slow
def test_a_training_continues_exactly_from_saved_weights(digits, tmp_path):
    options = dict(batch_size=50, epochs=2, shuffle=False, verbose=0)
    model = new_model(weight_decay_norm=1e-2)
    model.fit(digits[0][:200], **{**options, "epochs": 1})
    model.save_weights(tmp_path / "weights")
    model.fit(digits[0][:200], initial_epoch=1, **options)
    continued = new_model(weight_decay_norm=1e-2)
    continued.load_weights(tmp_path / "weights")
    continued.fit(digits[0][:200], initial_epoch=1, **options)
    for one, other in zip(model.get_weights(), continued.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_moving_averages_begin_at_the_weights_and_follow_loaded_ones(digits, tmp_path):
    plain = new_model()
    expected = plain.evaluate(digits[1], verbose=0)["nelbo"]
    model = new_model(ema_decay=0.99)  # of the same seed
    assert model.evaluate(digits[1], verbose=0)["nelbo"] == expected
    for name in ("weights.weights.h5", "weights"):
        plain.save_weights(tmp_path / name)
        model.set_weights([0.5 * weight for weight in model.get_weights()])
        assert model.evaluate(digits[1], verbose=0)["nelbo"] != expected
        model.load_weights(tmp_path / name)
        assert model.evaluate(digits[1], verbose=0)["nelbo"] == expected


def test_weights_that_are_loaded_before_compile_bring_the_state_of_training(trained, tmp_path):
    model, *_ = trained
    model.save_weights(tmp_path / "weights")
    image = nvae_tf.ImageSpec(32, 32, 1, binary=True, scored_size=(28, 28))
    other = nvae_tf.NVAE(image=image, **SMALL)
    other.load_weights(tmp_path / "weights")
    other.compile(jit_compile="off", ema_decay=0.5)
    assert int(other.optimizer.iterations) == int(model.optimizer.iterations) > 0
    trainers = model.fitting.trainer, other.fitting.trainer
    for one, two in zip(*(trainer.averages.stacks for trainer in trainers), strict=True):
        np.testing.assert_array_equal(one, two)
    other.set_weights([0 * value for value in other.get_weights()])
    other.compile(jit_compile="off")
    assert not any(value.any() for value in other.get_weights())


def test_files_that_cannot_be_written_leave_the_earlier_ones(trained, tmp_path, monkeypatch):
    model, *_ = trained
    files = [tmp_path / "model.keras", tmp_path / "model.weights.h5"]
    model.save(files[0])
    model.save_weights(files[1])
    before = [file.read_bytes() for file in files]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a disk that is full
    try:
        with pytest.raises(UserError, match="model.keras: cannot be written") as error:
            model.save(files[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    # HDF5 itself may crash the process some time after it could not write.
    free = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match="model.weights.h5: cannot be written .*No space left"):
        model.save_weights(files[1])
    assert [file.read_bytes() for file in files] == before
    assert set(tmp_path.iterdir()) == set(files)
    with pytest.raises(UserError, match="exists already"):
        model.save(files[0], overwrite=False)


def test_batches_of_unknown_number_are_predicted(digits):
    model, images = new_model(steps_per_execution=4, ema_decay=0.5), digits[1][:10]
    unknown = dataset_of(images, 3).filter(lambda _: True)
    expected = model.predict(images, verbose=0)
    np.testing.assert_allclose(model.predict(unknown, verbose=0), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict_on_batch(images), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict(tf.Variable(images), verbose=0), expected, atol=1e-6)
    for average in model.fitting.trainer.averages.stacks:
        average.assign(0.9 * average)
    averaged = model.predict_on_batch(images)
    assert np.abs(averaged - expected).max() > 1e-4
    np.testing.assert_allclose(averaged, model.predict(images, verbose=0), atol=1e-6)


@pytest.mark.slow
def test_callbacks_serve_one_model_each(digits, tmp_path):
    folder, (train, test) = tmp_path / "run", digits
    ours = nvae_tf.callbacks
    callbacks = [ours.Checkpoints(folder), ours.Pictures(tmp_path / "pictures", test)]
    model, options = new_model(), dict(batch_size=200, verbose=0)
    model.save_weights(tmp_path / "start")
    model.fit(train, callbacks=callbacks, **options)
    first = (tmp_path / "pictures" / "reconstructions.png").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        new_model().fit(train, callbacks=callbacks, **options)
    other = new_model(learning_rate=1e-3, learning_rate_min=1e-4)
    other.fit(train, callbacks=callbacks[1:], **options)
    assert (tmp_path / "pictures" / "reconstructions.png").read_bytes() != first
    model.load_weights(tmp_path / "start")
    with pytest.raises(UserError, match="step-3: is of a later step than the 0 of this training"):
        model.fit(train, callbacks=callbacks, **options)


@pytest.mark.slow
def test_termination_serves_several_trainings(digits):
    termination, epochs = nvae_tf.callbacks.Termination(), []
    stop = tf_keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: os.kill(os.getpid(), signal.SIGTERM)
    )
    model, options = new_model(), dict(batch_size=200, verbose=0)
    model.fit(digits[0], callbacks=[stop, termination], **options)
    assert termination.stopped and int(model.optimizer.iterations) == 1
    count = tf_keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    model.fit(digits[0], epochs=2, callbacks=[termination, count], **options)
    assert epochs == [0, 1] and not termination.stopped


@pytest.mark.slow
def test_a_refused_fit_changes_nothing_and_skipped_steps_are_saved(digits, tmp_path):
    model = new_model(skip_gradient_norm=1e-9)
    with pytest.raises(UserError, match="callbacks: 3 is not allowed"):
        model.fit(digits[0], epochs=100, callbacks=[3])
    assert model.train_on_batch(digits[0][:50], return_dict=True)["beta"] == 1.0
    callbacks = [nvae_tf.callbacks.Checkpoints(tmp_path / "run")]
    model.fit(digits[0][:100], batch_size=50, callbacks=callbacks, verbose=0)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-3"]


@pytest.mark.slow
def test_averages_that_a_restored_checkpoint_lacks_start_from_its_weights(digits, tmp_path):
    model = new_model()
    model.train_on_batch(digits[0][:50])
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    other, seen = new_model(ema_decay=0.999), []

    def compare(batch, logs):
        seen.append(
            [
                np.array_equal(a, w)
                for a, w in zip(
                    other.fitting.trainer.averages.stacks, other.trainable_variables, strict=True
                )
            ]
        )

    look = tf_keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: tf.train.Checkpoint(model=other).read(path).expect_partial(),
        on_train_batch_begin=compare,
    )
    other.fit(digits[0][:50], batch_size=50, callbacks=[look], verbose=0)
    assert all(seen[0])


@pytest.mark.slow
def test_compiling_again_leaves_weights_that_were_initialised_from_data(digits):
    image = nvae_tf.ImageSpec(32, 32, 1, binary=True, scored_size=(28, 28))
    model = nvae_tf.NVAE(image=image, arch_instance="res_elu", **SMALL)
    model.compile(jit_compile="off")
    drawn = model.get_weights()
    model.train_on_batch(digits[0][:100])
    before = model.get_weights()
    assert max(np.abs(a - b).max() for a, b in zip(drawn, before, strict=True)) > 0.1
    model.compile(learning_rate=1e-9, learning_rate_min=1e-10, jit_compile="off")
    model.train_on_batch(digits[0][100:200])
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_an_evaluation_within_an_epoch_leaves_the_means_of_training(digits):
    plain, scored = new_model(), new_model()
    score = tf_keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_: scored.evaluate(digits[1], verbose=0)
    )
    options = dict(batch_size=200, verbose=0)
    expected = plain.fit(digits[0], **options).history
    assert scored.fit(digits[0], callbacks=[score], **options).history == expected


@pytest.mark.slow
def test_a_fit_after_one_that_failed_validates_on_its_own_images(digits):
    model = new_model()
    options = dict(batch_size=200, verbose=0)
    fail = tf_keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        model.fit(digits[0], validation_data=digits[1], callbacks=[fail], **options)
    scores = model.fit(digits[0], validation_data=digits[1][:30], **options).history["val_nelbo"]
    expected = model.evaluate(digits[1][:30], verbose=0)["nelbo"]
    assert scores == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.slow
def test_several_steps_in_a_call_score_and_train_on_batches_too(digits):
    model, once = new_model(steps_per_execution=4), new_model()
    expected = once.evaluate(digits[1], verbose=0)
    everything = tf.data.Dataset.from_tensor_slices(digits[1]).filter(lambda image: True)
    for size in (15, 40):  # 6 batches and 3, and Keras does not know how many
        scores = model.evaluate(everything.batch(size), verbose=0)
        assert scores["nelbo"] == pytest.approx(expected["nelbo"], rel=1e-5)
    one, other = (m.train_on_batch(digits[0][:50], return_dict=True) for m in (model, once))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert model.test_on_batch(digits[1])[0] != pytest.approx(expected["nelbo"])
    validated = once.fit(
        tf.Variable(digits[0][:100]),
        batch_size=50,
        validation_data=dataset_of(digits[1]),
        verbose=0,
    )
    assert np.isfinite(validated.history["val_nelbo"]).all()
    validated = model.fit(
        digits[0][:200], batch_size=50, validation_data=everything.batch(20), verbose=0
    )
    expected = model.evaluate(digits[1], verbose=0)["nelbo"]
    assert validated.history["val_nelbo"] == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.slow
def test_sigterm_ends_fit_after_the_step(digits, tmp_path):
    steps, termination = [], nvae_tf.callbacks.Termination()

    def kill(batch, logs):
        steps.append(batch)
        if batch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    callbacks = [
        tf_keras.callbacks.LambdaCallback(on_train_batch_end=kill),
        nvae_tf.callbacks.Checkpoints(tmp_path),
        termination,
    ]
    new_model().fit(digits[0], batch_size=100, epochs=3, callbacks=callbacks, verbose=0)
    assert termination.stopped and steps == [0, 1]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-2"]


class Watching(tf_keras.callbacks.Callback):
    """Records the checkpoints when a validation begins, and sends SIGTERM during it."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.seen = folder, []

    def on_test_begin(self, logs=None):
        self.seen.append(sorted(path.name for path in self.folder.glob("checkpoints/step-*")))

    def on_test_batch_end(self, batch, logs=None):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_an_epoch_is_saved_before_its_validation(digits, tmp_path):
    save, termination = nvae_tf.callbacks.Checkpoints(tmp_path), nvae_tf.callbacks.Termination()
    look = Watching(tmp_path)
    model = new_model()
    # Keras calls them in this order, which `fit` would change.
    callbacks = tf_keras.callbacks.CallbackList([save, look, termination], model=model)
    options = dict(batch_size=300, validation_data=digits[1], verbose=0)
    model.fit(digits[0], epochs=3, callbacks=callbacks, **options)
    assert look.seen == [["step-2"]] and termination.stopped
    model.train_on_batch(digits[0][:50])
    model.evaluate(digits[1], callbacks=[save], verbose=0)  # not a part of the training
    assert look.seen == [["step-2"]] and len(list(tmp_path.glob("checkpoints/step-*"))) == 1


@pytest.mark.slow
def test_sigterm_keeps_the_backup_that_a_restart_needs(digits, tmp_path):
    def fit(last):
        steps = []

        def kill(batch, logs):
            steps.append(batch)
            if len(steps) == last:
                os.kill(os.getpid(), signal.SIGTERM)

        callbacks = [
            tf_keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            tf_keras.callbacks.LambdaCallback(on_train_batch_end=kill),
            nvae_tf.callbacks.Termination(),
        ]
        model = new_model()
        model.fit(digits[0], batch_size=200, epochs=2, callbacks=callbacks, verbose=0)
        return int(model.optimizer.iterations), len(steps)

    assert fit(last=4) == (4, 4)  # in the second of two epochs of three steps
    assert list((tmp_path / "backup").rglob("*.index"))
    assert fit(last=0) == (6, 3)  # from the end of the first epoch
    assert not list((tmp_path / "backup").rglob("*.index"))


@pytest.mark.slow
def test_loaded_weights_are_not_initialised_from_data(digits, tmp_path):
    image = nvae_tf.ImageSpec(32, 32, 1, binary=True, scored_size=(28, 28))
    models = [nvae_tf.NVAE(image=image, arch_instance="res_elu", **SMALL) for _ in range(3)]
    given, before, after = models
    given.save_weights(tmp_path / "weights")  # in TensorFlow's format, without a training
    for model in (before, after):
        if model is before:
            model.load_weights(tmp_path / "weights")
        model.compile(learning_rate=1e-9, learning_rate_min=1e-10, jit_compile="off")
        if model is after:
            model.load_weights(tmp_path / "weights")
        model.train_on_batch(digits[0][:100])
        for one, other in zip(given.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


class Failing(tf_keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise RuntimeError("from a callback")


@pytest.mark.slow
def test_a_failure_in_fit_gives_sigterm_back(digits):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="from a callback"):
        new_model().fit(
            digits[0], callbacks=[nvae_tf.callbacks.Termination(), Failing()], verbose=0
        )
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_call_of_fit_takes_the_images_in_another_order(digits):
    batching = new_model().fitting.batching
    orders = []
    for first_step in (0, 0, 2):
        batches, steps = batching.training(digits[0], 250, None, True, first_step)
        assert steps == 2
        orders.append(np.concatenate(list(batches)))
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()


class SetBack(tf_keras.callbacks.Callback):
    """Gives the model the weights that it began with, as EarlyStopping gives it its best ones."""

    def on_train_begin(self, logs=None):
        self.weights = self.model.get_weights()

    def on_train_end(self, logs=None):
        self.model.set_weights(self.weights)


@pytest.mark.slow
def test_checkpoints_hold_what_other_callbacks_leave(digits, tmp_path):
    model, kept = new_model(ema_decay=0.5), SetBack()
    checkpoints = nvae_tf.callbacks.Checkpoints(tmp_path / "run")
    model.fit(digits[0], batch_size=200, epochs=2, callbacks=[checkpoints, kept], verbose=0)
    loaded = nvae_tf.load(tmp_path / "run")  # with the averages as weights
    for one, other, at_first in zip(
        model.get_weights(), loaded.get_weights(), kept.weights, strict=True
    ):
        np.testing.assert_array_equal(one, at_first)
        np.testing.assert_allclose(other, at_first, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_several_steps_in_a_call_train_and_report_alike(digits, tmp_path):
    weights = {}
    for count in (1, 4):
        model, folder = new_model(steps_per_execution=count), tmp_path / str(count)
        callbacks = [
            nvae_tf.callbacks.Checkpoints(folder, save_every="5", keep=9),
            nvae_tf.callbacks.Curves(folder, every=3),
            tf_keras.callbacks.TensorBoard(tmp_path / "keras" / str(count), update_freq=5),
        ]
        model.fit(digits[0], batch_size=100, epochs=2, callbacks=callbacks, verbose=0)
        weights[count] = model.get_weights()
    for one, several in zip(*weights.values(), strict=True):
        np.testing.assert_allclose(several, one, atol=1e-3)
    # Calls take 4, 2, 4 and 2 steps: the fifth step ends in the second.
    saved = {path.name for path in (tmp_path / "4" / "checkpoints").glob("step-*")}
    assert saved == {"step-6", "step-10", "step-12"}
    steps = [step for step, _ in scalars(tmp_path / "4" / "logs" / "train")["elbo/kl"]]
    assert steps == list(range(1, 13))  # an epoch has 6, and ten values are more than it has


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_backup_and_restore_continues_where_it_was(digits, tmp_path):
    def fit(interrupt):
        model = new_model()

        def maybe_fail(epoch, logs):
            if epoch == 1 and interrupt:
                raise Interrupted

        callbacks = [
            tf_keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False),
            tf_keras.callbacks.LambdaCallback(on_epoch_begin=maybe_fail),
        ]
        options = dict(batch_size=100, epochs=3, shuffle=False, verbose=0)
        return model, model.fit(digits[0], callbacks=callbacks, **options).history

    with pytest.raises(Interrupted):
        fit(interrupt=True)
    model, history = fit(interrupt=False)
    assert len(history["nelbo"]) == 2 and int(model.optimizer.iterations) == 18
    plain = new_model()
    expected = plain.fit(digits[0], batch_size=100, epochs=3, shuffle=False, verbose=0).history
    np.testing.assert_array_equal(history["nelbo"], expected["nelbo"][1:])
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def weights_after(optimizer, digits, steps=2, **settings):
    model = new_model(optimizer, **settings)
    before = model.get_weights()
    for step in range(steps):
        model.train_on_batch(digits[0][50 * step : 50 * (step + 1)])
    return model, before, model.get_weights()


@pytest.mark.slow
def test_keras_adam_is_ours(digits):
    # A first step moves each number by the rate, whatever its gradient.
    ours = weights_after(Adam(1e-3, epsilon=1e-12), digits, steps=1)[2]
    for kind in (tf_keras.optimizers.Adam, tf_keras.optimizers.legacy.Adam):
        theirs = weights_after(kind(1e-3, epsilon=1e-12), digits, steps=1)[2]
        for one, other in zip(ours, theirs, strict=True):
            assert np.mean(np.abs(one - other)) < 1e-5  # numbers with tiny gradients are rounded


@pytest.mark.slow
def test_norms_per_variable_are_of_weights_not_of_stacks(digits):
    rate, norm = 0.1, 1e-3
    sgd = tf_keras.optimizers.SGD(rate, clipnorm=norm)
    model, before, after = weights_after(sgd, digits, steps=1)
    for _, old, new in zip(model.trainable_variables, before, after, strict=False):
        moved = np.sqrt(np.sum(np.square(new - old).reshape(len(old), -1), 1))
        assert 0.5 * rate * norm < moved.max() < 1.05 * rate * norm
    assert len(model.weights) == len(before)  # the copies are not the model's


@pytest.mark.slow
def test_a_given_optimiser_keeps_its_learning_rate(digits):
    model = new_model(tf_keras.optimizers.SGD(3e-4))
    history = model.fit(
        digits[0], epochs=2, batch_size=200, verbose=0,
        callbacks=[tf_keras.callbacks.LearningRateScheduler(lambda epoch: 3e-4 / (epoch + 1))],
    ).history  # fmt: skip
    np.testing.assert_allclose(history["learning_rate"], [3e-4, 1.5e-4], rtol=1e-5)
    model = new_model(nvae_tf.Adamax(2e-3))
    history = model.fit(digits[0], epochs=2, batch_size=200, verbose=0).history
    np.testing.assert_allclose(history["learning_rate"], [2e-3, 2e-3], rtol=1e-5)


@pytest.mark.slow
def test_divergence_ends_fit_with_one_line(digits):
    model = new_model(nvae_tf.Adamax(1e30), max_bad_steps=3)
    with pytest.raises(TrainingDivergedError, match="3 steps in a row, up to step") as error:
        model.fit(digits[0], batch_size=50, epochs=3, verbose=0)
    assert "\n" not in str(error.value)
    # Other weights are given another chance: their first step is taken.
    good = new_model().get_weights()
    model.set_weights(good)
    model.train_on_batch(digits[0][:50])
    assert not all(map(np.array_equal, model.get_weights(), good))
    with pytest.raises(TrainingDivergedError, match="3 steps in a row"):
        for _ in range(6):
            model.train_on_batch(digits[0][:50])


@pytest.fixture(scope="module")
def untrained():
    return new_model()


def compiled_twice(optimizer):
    model = new_model(optimizer)
    model.compile(optimizer, jit_compile="off")


def with_frozen_stem():
    model = new_model()
    model.stem.trainable = False
    model.compile()


def dataset_of(images, size=50):
    return tf.data.Dataset.from_tensor_slices(images).batch(size)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.fit(x, epochs=0), "epochs: 0 is not allowed; expected a whole number"),
        (lambda m, x: m.fit(x, epochs=2, initial_epoch=2), "initial_epoch: 2 .* less than epochs"),
        (lambda m, x: m.fit(x[:9]), "batch_size: 32 is not allowed; .* number of images, 9"),
        (lambda m, x: m.fit(x, batch_size=0), "batch_size: 0 is not allowed"),
        (lambda m, x: m.fit(x[:, :28, :28]), r"images: shape \(batch, 28, 28, 1\).* add 2 pixels|"
                                             r"images: shape \(600, 28, 28, 1\)"),
        (lambda m, x: m.fit((x * 255).astype(np.uint8)), "images: of type uint8; expected floats"),
        (lambda m, x: m.fit(x * 255), "images: values from 0 to 255"),
        (lambda m, x: m.fit(x * 0.5), "images: values between levels; expected 0 or 1"),
        (lambda m, x: m.fit("digits"), "x: of type str; expected an array or tensor of images"),
        (lambda m, x: m.fit(tf.data.Dataset.from_tensor_slices(x)), "single images; expected batch"),
        (lambda m, x: m.fit(dataset_of(x).repeat()), "x: a data set that is endless; .* steps_per_ep"),
        (lambda m, x: m.fit(dataset_of(x).filter(lambda _: True)), "of unknown size; .* steps_per_ep"),
        (lambda m, x: m.fit(dataset_of(x).take(0)), "x: an empty data set"),
        (lambda m, x: m.fit(dataset_of(x * 2)), "images: values from 0 to 2"),
        (lambda m, x: m.fit(dataset_of({"image": x})), "x: a data set of .*; expected batches of im"),
        (lambda m, x: m.fit(x, validation_data=x[:5, :9]), "images: shape"),
        (lambda m, x: m.fit(x, validation_data="x"), "validation_data: x: of type str"),
        (lambda m, x: m.fit(x, callbacks=[3]), "callbacks: 3 is not allowed; expected callbacks of"),
        (lambda m, x: nvae_tf.callbacks.Checkpoints("x", keep=0), "keep: 0 is not allowed"),
        (lambda m, x: nvae_tf.callbacks.Checkpoints("x", "soon"), "save_every: 'soon' is not allow"),
        (
            lambda m, x: m.fit(x, callbacks=[nvae_tf.callbacks.Curves(f"{__file__}/x")]),
            "test_fit.py/x",
        ),
        (lambda m, x: nvae_tf.callbacks.Curves("x", every=0), "every: 0 is not allowed"),
        (lambda m, x: nvae_tf.callbacks.Termination(every=0), "every: 0 is not allowed"),
        (lambda m, x: nvae_tf.Adamax("fast"), "learning_rate: 'fast' is not allowed"),
        (lambda m, x: nvae_tf.Adamax(beta_1=2), "beta_1: 2 is not allowed; .* below 1"),
        (lambda m, x: m.fit(dataset_of(x), epochs=2, steps_per_epoch=7), "take 14 .* ends after 12"),
        (lambda m, x: m.fit(x, validation_freq=0), "validation_freq: 0 is not allowed"),
        (lambda m, x: nvae_tf.callbacks.Pictures("x", None), "images: None is not allowed"),
        (lambda m, x: nvae_tf.callbacks.Pictures("x", np.zeros(3)), r"images: array\(.* expected an a"),
        (lambda m, x: nvae_tf.callbacks.Checkpoints(None), "folder: None is not allowed; expected the"),
        (lambda m, x: nvae_tf.callbacks.Curves(""), "folder: '' is not allowed"),
        (lambda m, x: m.predict(x, callbacks=3), "callbacks: 3 is not allowed; expected callbacks of"),
        (lambda m, x: m.save("nowhere/m.keras"), "nowhere/m.keras: there is no folder nowhere; make"),
        (lambda m, x: m.save_weights("nowhere/m.weights.h5"), "there is no folder nowhere"),
        (lambda m, x: new_model(initialize_from_data="x"), "initialize_from_data: 'x' is not allowed"),
        (lambda m, x: m.predict("x"), "x: of type str"),
        (lambda m, x: m.predict(x, batch_size=0), "batch_size: 0 is not allowed"),
        (lambda m, x: m.predict(dataset_of(x).repeat()), "x: an endless data set"),
        (lambda m, x: m.predict(dataset_of(x * 3)), "images: values from 0 to 3"),
        (lambda m, x: m.predict(dataset_of(x[:, :9])), "images: shape"),
        (lambda m, x: m.predict(x * 255), "images: values from 0 to 255"),
        (lambda m, x: m.evaluate(x, steps=0), "steps: 0 is not allowed"),
        (lambda m, x: m.evaluate(dataset_of(x).repeat()), "x: an endless data set"),
        (lambda m, x: m.train_on_batch(x[0]), r"images: shape \(32, 32, 1\)"),
        (lambda m, x: new_model(3), "optimizer: 3 is not allowed; expected a name, nvae_tf.Adamax"),
        (lambda m, x: new_model("adamaxx"), "optimizer: 'adamaxx' is not allowed; expected adamax"),
        (lambda m, x: new_model(learning_rate=-1), "learning_rate: -1 is not allowed"),
        (lambda m, x: new_model(nvae_tf.Adamax(), weight_decay=0), "weight_decay: the optimiser that"),
        (lambda m, x: new_model(epochs=3), "epochs: is not a key of compile: it is an argument of fit"),
        (lambda m, x: new_model(num_nf=3), "num_nf: is not a key of training"),
        (lambda m, x: new_model(learning_rat=1), "did you mean learning_rate"),
        (lambda m, x: new_model(warmup_epochs=3).fit(x, epochs=2), "warmup_epochs: 3 is not allowed"),
        (lambda m, x: nvae_tf.NVAE(image=(32, 32, 3), **SMALL).fit(x), "not compiled; call compile"),
        (lambda m, x: m.fit(x[:0]), "images: a batch of no images"),
        (lambda m, x: m.train_on_batch(x[:0]), "images: a batch of no images"),
        (lambda m, x: m.evaluate(np.repeat(x, 8, 0) * np.linspace(1, 0.9, 4800)[:, None, None, None]),
         "images: values between levels"),
        (lambda m, x: m.test_on_batch(None), "x: of type NoneType"),
        (lambda m, x: m.fit(x, validation_data=x, validation_batch_size=0), "validation_batch_size: 0"),
        (lambda m, x: m.fit(x, callbacks=tf_keras.callbacks.ModelCheckpoint("a")), "^a: expected a na"),
        (lambda m, x: m.fit(x, callbacks=tf_keras.callbacks.ReduceLROnPlateau("nelbo")),
         "callbacks: ReduceLROnPlateau changes the learning rate"),
        (lambda m, x: m.fit(x, callbacks=tf_keras.callbacks.EarlyStopping()),
         'EarlyStopping monitors val_loss, which is not reported; expected monitor="val_nelbo"'),
        (lambda m, x: m.fit(x, callbacks=tf_keras.callbacks.ModelCheckpoint(
            "a.keras", save_best_only=True)), "ModelCheckpoint monitors val_loss"),
        (lambda m, x: m.load_weights("nowhere/w"), "^nowhere/w: cannot be read as weights"),
        (lambda m, x: m.load_weights("nowhere.weights.h5"), "^nowhere.weights.h5: cannot be read as"),
        (lambda m, x: compiled_twice(tf_keras.optimizers.SGD(1e-4, clipnorm=1.0)),
         "optimizer: this SGD has slots for the weights of an earlier compile; make a new one"),
        (lambda m, x: compiled_twice(nvae_tf.Adamax()),
         "optimizer: this Adamax has slots for the weights of an earlier compile; make a new one"),
        (lambda m, x: nvae_tf.Adamax(epsilon=0.0), "epsilon: 0.0 is not allowed; expected a number"),
        (lambda m, x: with_frozen_stem(), "^stem: trainable is False; parts of an NVAE cannot be"),
        (lambda m, x: new_model(loss="mse"), "loss: is not a key of compile: the loss is the model's"),
        (lambda m, x: new_model(steps_per_execution=1.5), "steps_per_execution: 1.5 is not allowed"),
        (lambda m, x: new_model(seed=2**31), "seed: 2147483648 is not allowed; expected"),
        (lambda m, x: new_model(seed=-1), "seed: -1 is not allowed; expected"),
        (lambda m, x: nvae_tf.callbacks.Pictures("x", x, seed=2**31), "seed: 2147483648 is not allo"),
        (lambda m, x: new_model(accumulate_steps=3).fit(dataset_of(x), epochs=2),
         "batches of unknown size, which 1 replica and 3 accumulated passes cannot share"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_line(untrained, digits, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(untrained, digits[0])
    assert "\n" not in str(error.value)

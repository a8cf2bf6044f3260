"""`nvae_tf.train`: the command as a function, on images that are given in Python."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import nvae_tf
from nvae_tf.cli.evaluate import main as evaluate
from nvae_tf.cli.train import main
from nvae_tf.config import DataConfig
from nvae_tf.data import catalog, pipeline
from nvae_tf.data.own import own_images
from nvae_tf.evaluation.loading import load
from nvae_tf.io.errors import UserError
from nvae_tf.training.run import check_start

pytestmark = pytest.mark.core

REFERENCE = Path(__file__).parent / "reference"
BINARY = nvae_tf.ImageSpec(32, 32, 1, binary=True, scored_size=(28, 28))


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's digits as arrays of 8 bits: training and test images."""
    sources = catalog.get_dataset_info(DataConfig(dataset="digits")).open("")
    return tuple(source.images.numpy() for source in sources)


def weights(folder):
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    reader = tf.train.load_checkpoint(str(newest / "state"))
    names = reader.get_variable_to_shape_map()
    return {name: reader.get_tensor(name) for name in names if name.startswith("trainer/")}


class Seen(tf_keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.calls, self.logs, self.reconstructed = [], [], None

    def on_train_begin(self, logs=None):
        self.calls.append("begin")

    def on_epoch_end(self, epoch, logs=None):
        self.calls.append(epoch)
        self.logs.append(logs)

    def on_train_end(self, logs=None):
        self.calls.append("end")
        self.reconstructed = self.model.predict(np.zeros((2, 32, 32, 1), np.float32), verbose=0)


@pytest.fixture(scope="module")
def own(recipe, digits, tmp_path_factory):
    """A run on arrays, with callbacks: its folder, what was returned, and what they saw."""
    folder = tmp_path_factory.mktemp("own") / "digits"
    seen, kl = Seen(), nvae_tf.callbacks.KLPerGroup()
    callbacks = [seen, kl, tf_keras.callbacks.CSVLogger(folder.parent / "log.csv")]
    results = nvae_tf.train(str(recipe), digits, callbacks, folder=folder, image=BINARY)
    return folder, results, seen, kl


@pytest.mark.slow
def test_own_images_train_as_the_same_images_by_name_do(own, run):
    folder, *_ = own
    by_name, by_array = weights(run), weights(folder)
    assert by_name.keys() == by_array.keys()
    for name, value in by_name.items():
        np.testing.assert_array_equal(by_array[name], value, err_msg=name)


class StopsInAnEpoch(tf_keras.callbacks.Callback):
    """Ends training within the second epoch, and asks the model for a score."""

    refused = ""

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = self.model.fitting.step == 20
        try:
            self.model.evaluate(np.zeros((2, 32, 32, 1), np.float32), verbose=0)
        except UserError as error:
            self.refused = str(error)


@pytest.mark.slow
def test_a_callback_that_ends_training_within_an_epoch(recipe, digits, tmp_path):
    stops, folder = StopsInAnEpoch(), tmp_path / "run"
    results = nvae_tf.train(str(recipe), digits, [stops], folder=folder, image=BINARY)
    assert "nvae_tf.train trains and scores the model by itself" in stops.refused
    assert [path.name for path in (folder / "checkpoints").iterdir() if "20" in path.name]
    info = own_images(digits, BINARY).info
    batches = pipeline.evaluation_batches(info.open("")[1], info, batch_size=50, seed=1)
    images = np.concatenate(list(batches))
    model = nvae_tf.load(folder)
    model.compile()
    scores = model.evaluate(images, verbose=0)
    assert results["nelbo"] == pytest.approx(scores["nelbo"], rel=1e-4)


def test_callbacks_are_called_as_by_fit(own):
    folder, results, seen, kl = own
    assert seen.calls == ["begin", 0, 1, 2, "end"] and seen.reconstructed.shape == (2, 32, 32, 1)
    assert seen.logs[-1]["val_nelbo"] == pytest.approx(results["nelbo"])
    assert len(kl.history) == 3 and len((folder.parent / "log.csv").read_text().splitlines()) == 4


def test_the_folder_says_what_the_images_were_and_is_evaluated(own, digits, capsys):
    folder, *_ = own
    content = json.loads((folder / "images.json").read_text())
    assert content["training"] == len(digits[0]) and content["test"] == len(digits[1])
    assert content["image"]["height"] == 32 and content["image"]["binary"]
    assert "dataset: own" in (folder / "config.yaml").read_text()
    arguments = ["--checkpoint", str(folder), "--eval_mode"]
    assert evaluate([*arguments, "sample", "--num_samples", "4", "--temp", "0.7"]) == 0
    assert evaluate([*arguments, "evaluate"]) == 2
    assert "own: the images of this run were given in Python" in capsys.readouterr().err
    picture = str(folder / "samples.png")
    assert evaluate([*arguments, "reconstruct", "--images", picture]) == 0


@pytest.mark.slow
def test_a_run_on_own_images_continues_with_the_same_ones_alone(own, recipe, digits, tmp_path):
    folder, *_ = own
    options = dict(image=BINARY, epochs=4, resume=True)
    results = nvae_tf.train(str(recipe), digits, folder=folder, **options)
    assert np.isfinite(results["nelbo"]) and (folder / "checkpoints" / "step-56").is_dir()
    other = (digits[0][::-1], digits[1])
    with pytest.raises(UserError, match="dataset: other images than those of the run in .*crc32"):
        nvae_tf.train(str(recipe), other, folder=folder, **options)
    with pytest.raises(UserError, match="holds a run already"):
        nvae_tf.train(str(recipe), digits, folder=folder, image=BINARY)


def test_own_images_are_mirrored_if_the_key_says_so(digits):
    given = own_images(digits, BINARY).info
    mirrored = {
        flip: catalog.with_flip(given, DataConfig(flip=flip)).flip for flip in ("auto", False, True)
    }
    assert mirrored == {"auto": False, False: False, True: True}


@pytest.mark.slow
def test_a_data_set_trains_and_a_callback_stops_it(recipe, digits, tmp_path):
    labels = np.zeros(len(digits[0]), np.int64)
    train = tf.data.Dataset.from_tensor_slices((digits[0], labels)).batch(64)
    test = tf.data.Dataset.from_tensor_slices(digits[1])
    stop = tf_keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(stop.model, "stop_training", True)
    )
    options = dict(folder=tmp_path / "r", image=BINARY, flip=True)
    results = nvae_tf.train(str(recipe), (train, test), [stop], **options)
    assert "flip: true" in (tmp_path / "r" / "config.yaml").read_text()
    steps = [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()]
    assert steps == ["step-14"] and np.isfinite(results["nelbo"])


@pytest.mark.slow
def test_a_new_run_begins_with_the_weights_of_another(run, recipe, digits, tmp_path, capsys):
    first = Seen()
    nvae_tf.train(
        str(recipe), digits, [first], folder=tmp_path / "tuned", image=BINARY, init_from=run,
        epochs=1, learning_rate=1e-4, learning_rate_min=1e-5,
    )  # fmt: skip
    before = nvae_tf.load(run)
    before.compile()
    images = (digits[1] > 127).astype(np.float32)
    score = before.evaluate(images, verbose=0)["nelbo"]
    tuned = nvae_tf.load(tmp_path / "tuned")
    tuned.compile()
    # With a small learning rate an epoch changes little: from new weights it would be above 500.
    assert tuned.evaluate(images, verbose=0)["nelbo"] == pytest.approx(score, rel=0.1)
    arguments = ["--config", str(recipe), "--root", str(tmp_path), "--init_from", str(run)]
    assert main([*arguments, "--save", "a", "--num_groups_per_scale", "3"]) == 2
    assert "num_groups_per_scale: 3 does not start from" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "nowhere"), "--save", "b"]) == 2
    assert "nowhere: no such run" in capsys.readouterr().err
    assert not (tmp_path / "a" / "config.yaml").exists()


@pytest.mark.slow
def test_sigterm_saves_the_weights_of_its_step_whatever_callbacks_put_back(
    recipe, digits, tmp_path
):
    def train(folder, *callbacks, **options):
        return nvae_tf.train(
            str(recipe), digits, callbacks, folder=tmp_path / folder, image=BINARY, **options
        )

    def kill(epoch, logs):
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train("whole")
    # The best value is that of the first epoch, whose weights Keras puts back at the end of training.
    best = tf_keras.callbacks.EarlyStopping(
        "beta", mode="min", patience=9, restore_best_weights=True
    )
    stopped = tf_keras.callbacks.LambdaCallback(on_epoch_end=kill)
    assert train("stopped", best, stopped) is None
    train("stopped", resume=True)
    whole, continued = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    for name, value in whole.items():
        np.testing.assert_array_equal(continued[name], value, err_msg=name)


def folder_of_checkpoints():
    """The folder of a run whose configuration somebody removed."""
    Path("removed/checkpoints/step-5").mkdir(parents=True)
    return "removed"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, d: nvae_tf.train(3), "config: 3 is not allowed; expected a recipe's name"),
        (lambda c, d: nvae_tf.train("cifar11"), "no configuration 'cifar11'"),
        (lambda c, d: nvae_tf.train("celeba64"), "celeba_64 needs --data"),
        (lambda c, d: nvae_tf.train(nvae_tf.config.Config()), "folder: None is not allowed"),
        (lambda c, d: nvae_tf.train(c, d, image=BINARY, flip=3), "flip: 3 is not allowed"),
        (lambda c, d: nvae_tf.train(c, image=BINARY), "image: is for a dataset that is given"),
        (lambda c, d: nvae_tf.train(c, d, bits=12), "bits: is for a recipe's own data set"),
        (
            lambda c, d: nvae_tf.train(c, d, [nvae_tf.callbacks.Termination()], image=BINARY),
            "Termination is for fit",
        ),
        (
            lambda c, d: nvae_tf.train(
                c, d, [tf_keras.callbacks.BackupAndRestore("backup")], image=BINARY
            ),
            "BackupAndRestore is for fit; train continues from its own checkpoints with resume=True",
        ),
        (
            lambda c, d: nvae_tf.train(
                c, d, [tf_keras.callbacks.LearningRateScheduler(lambda e: 0.1)], image=BINARY
            ),
            "LearningRateScheduler changes the learning rate of an optimiser of Keras in fit",
        ),
        (
            lambda c, d: nvae_tf.train(
                c, d, [tf_keras.callbacks.ModelCheckpoint("a.h5", save_weights_only=True)]
            ),
            "^a.h5: expected a name that ends in .weights.h5",
        ),
        (
            lambda c, d: nvae_tf.train(
                c, d, [nvae_tf.callbacks.Checkpoints("run")], folder="run", image=BINARY
            ),
            "Checkpoints is for fit",
        ),
        (lambda c, d: nvae_tf.train(c, d, folder=folder_of_checkpoints()), "holds a run already"),
        (lambda c, d: nvae_tf.train(c, d[0]), "dataset: of type ndarray; expected a pair"),
        (lambda c, d: nvae_tf.train(c, d, likelihood="official"), "official .* for 1 channels"),
        (
            lambda c, d: nvae_tf.train(c, (d[0] / 255, d[1])),
            "training images float64 of shape .* ui",
        ),
        (lambda c, d: nvae_tf.train(c, (d[0], d[1][0])), "test images uint8 of shape"),
        (lambda c, d: nvae_tf.train(c, (d[0], [1])), "test images of type list; expected an array"),
        (
            lambda c, d: nvae_tf.train(c, (d[0], d[1][:, :28]), image=BINARY),
            "test images of shape",
        ),
        (lambda c, d: nvae_tf.train(c, d, image=BINARY, epoch=3), "'epoch'; did you mean epochs"),
        (
            lambda c, d: nvae_tf.train(c, d, image=BINARY, init_from="nowhere"),
            "nowhere: no such run",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(recipe, digits, tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        call(str(recipe), digits)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("config.yaml"))


def test_an_official_file_starts_a_model_whose_bits_are_automatic():
    loaded = load(str(REFERENCE / "cifar10_flow.pt"))
    config, image = loaded.model.config, loaded.model.image
    assert config.num_x_bits == 8
    check_start(loaded.model, dataclasses.replace(config, num_x_bits="auto"), image)
    with pytest.raises(UserError, match="num_latent_scales: 5 does not start from the model"):
        check_start(loaded.model, dataclasses.replace(config, num_latent_scales=5), image)
    with pytest.raises(UserError, match="height: 64 does not start from the model"):
        check_start(loaded.model, config, dataclasses.replace(image, height=64))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt", "keras"])
def test_a_file_is_a_start_too(kind, run, digits, tmp_path):
    path = REFERENCE / "mnist.pt"
    if kind == "keras":
        path = tmp_path / "model.keras"
        nvae_tf.load(run).save(path)
    before = nvae_tf.load(path)
    config = nvae_tf.config.Config(
        before.config,
        DataConfig(batch_size=100),
        nvae_tf.TrainConfig(epochs=1, warmup_epochs=0, learning_rate=1e-6, learning_rate_min=1e-7),
    )
    nvae_tf.train(
        config, digits, folder=tmp_path / "run", image=BINARY, init_from=path, jit_compile="off"
    )
    # With so small a learning rate an epoch changes nearly nothing.
    for one, other in zip(before.weights, nvae_tf.load(tmp_path / "run").weights, strict=True):
        if one.trainable:
            np.testing.assert_allclose(one, other, atol=1e-3)


class SetBack(tf_keras.callbacks.Callback):
    """Gives the model the weights that it began with, as EarlyStopping gives it its best ones."""

    def __init__(self, at_end_of):
        super().__init__()
        self.at_end_of = at_end_of

    def on_train_begin(self, logs=None):
        self.before = self.model.get_weights()

    def on_epoch_end(self, epoch, logs=None):
        if self.at_end_of == "epoch":  # as tf_keras 2.15 does
            self.model.set_weights(self.before)
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        if self.at_end_of == "training":
            self.model.set_weights(self.before)


@pytest.mark.slow
@pytest.mark.parametrize("at_end_of", ["epoch", "training"])
def test_a_run_ends_with_the_weights_that_callbacks_leave(at_end_of, recipe, tmp_path):
    back = SetBack(at_end_of)
    results = nvae_tf.train(str(recipe), callbacks=[back], folder=tmp_path / "run", ema_decay=0.9)
    model = nvae_tf.load(tmp_path / "run")  # with the averages as weights
    for one, other in zip(model.get_weights(), back.before, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    assert results["nelbo"] > 500  # nothing was learnt

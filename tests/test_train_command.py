"""``train_keras.py`` from end to end, on a model small enough for seconds."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from event_files import graphs, scalars
from PIL import Image
from processes import COMMAND, own_lines

from nvae_tf import config
from nvae_tf.cli.train import main

pytestmark = pytest.mark.core


def weights(folder):
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    reader = tf.train.load_checkpoint(str(newest / "state"))
    shapes = reader.get_variable_to_shape_map()
    return {
        name: reader.get_tensor(name) for name in shapes if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
    }


def test_a_run_leaves_what_it_promises(run, recipe):
    assert config.load(str(run / "config.yaml")) == config.load(str(recipe))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-28", "step-42"]
    for name, rows in (("samples.png", 8), ("reconstructions.png", 4)):
        image = Image.open(run / name)
        assert image.width > 10 * 64 and image.height > rows * 64  # and labels
        assert len(np.unique(np.asarray(image))) > 20
    assert not list(run.rglob("*.part"))


def test_tensorboard_holds_curves_pictures_and_configuration(run):
    train, validation = scalars(run / "logs" / "train"), scalars(run / "logs" / "validation")
    for tag in (
        "elbo/nelbo", "elbo/bpd", "elbo/recon", "elbo/kl", "elbo/loss", "elbo/beta",
        "optimizer/lambda", "optimizer/learning_rate", "optimizer/spectral_loss",
        "optimizer/batch_norm_loss", "optimizer/gradient_norm", "elbo/active_latents",
        "speed/images_per_second", "speed/step_milliseconds", "speed/memory_gigabytes",
        "kl_per_group/00", "kl_per_group/01",
        "gamma_per_group/01", "active_latents_per_group/00", "configuration", "reconstructions",
        "samples/temperature_0.7", "samples/temperature_1.0",
    ):  # fmt: skip
        assert tag in train, tag
    assert "num_latent_per_group: 4" in str(train["configuration"][0][1])
    assert [step for step, _ in validation["elbo/nelbo"]] == [14, 28, 42]
    nelbo = [float(value) for _, value in validation["elbo/nelbo"]]
    bpd = [float(value) for _, value in validation["elbo/bpd"]]
    np.testing.assert_allclose(bpd, np.array(nelbo) / (784 * np.log(2)), rtol=1e-5)
    assert float(train["elbo/beta"][-1][1]) == 1.0
    assert len(train["elbo/loss"]) >= 10 * 3  # epochs
    assert all(0 < float(value) < 1e5 for _, value in train["speed/images_per_second"])


def test_tensorboard_holds_a_graph_hyperparameters_and_what_scalars_are(run):
    metadata = {}
    for folder in ("train", "validation"):
        for path in (run / "logs" / folder).glob("events*"):
            for event in tf.compat.v1.train.summary_iterator(str(path)):
                metadata.update({value.tag: value.metadata for value in event.summary.value})
    assert graphs(run / "logs" / "train") == 1
    assert "nats" in metadata["elbo/nelbo"].summary_description
    session = metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"num_latent_per_group" in session and b"learning_rate" in session


def test_training_lowers_the_nelbo(run):
    nelbo = [float(value) for _, value in scalars(run / "logs" / "train")["elbo/nelbo"]]
    assert nelbo[-1] < 0.8 * nelbo[0]


def test_a_run_is_not_overwritten(run, recipe, capsys):
    before = weights(run)
    status = main(["--config", str(recipe), "--root", str(run.parent)])
    assert status == 2 and "--cont_training" in capsys.readouterr().err
    assert weights(run).keys() == before.keys()


def test_another_model_does_not_continue_a_run(run, recipe, capsys):
    arguments = ["--config", str(recipe), "--root", str(run.parent), "--cont_training"]
    assert main([*arguments, "--num_latent_per_group", "5"]) == 2
    assert "num_latent_per_group: 5 does not continue" in capsys.readouterr().err


def test_nan_ends_training_with_the_last_checkpoint_intact(run, recipe, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "tiny")
    before = weights(tmp_path / "tiny")
    arguments = [
        "--config",
        str(recipe),
        "--root",
        str(tmp_path),
        "--cont_training",
        "--epochs",
        "5",
    ]
    wild = ["--learning_rate", "1e30", "--max_bad_steps", "3", "--log_every", "1"]
    assert main([*arguments, *wild]) == 3
    error = capsys.readouterr().err
    assert "3 steps in a row" in error and error.count("\n") == 1
    assert "first not finite: the KL of groups 0, 1" in error
    assert (
        "learning_rate" in error and "the newest checkpoint is " in error and "step-42 (" in error
    )
    after = weights(tmp_path / "tiny")
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def run_command(*arguments, limit=None):
    """The command in its own process; `limit`: largest file in bytes, as on a full disk."""
    import resource

    def restrict():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, str(COMMAND), *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=restrict if limit else None,
        cwd=os.sep,  # any folder
    )


def test_an_unwritable_folder_is_one_line(recipe, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    result = run_command("--config", str(recipe), "--root", str(tmp_path / "file"))
    assert result.returncode == 2
    (line,) = own_lines(result.stderr)
    assert "cannot be written" in line and "another folder" in line


@pytest.mark.slow
def test_a_full_disk_is_one_line(recipe, tmp_path):
    result = run_command("--config", str(recipe), "--root", str(tmp_path), limit=100_000)
    assert result.returncode == 2
    (line,) = own_lines(result.stderr)
    assert "cannot be written" in line and "checkpoints" in line
    assert "AutoGraph" not in result.stderr  # nor any other talk of TensorFlow's about our code
    assert not list(tmp_path.rglob("*.index"))
    assert not list(tmp_path.rglob("*.part"))

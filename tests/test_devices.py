"""Devices that share a batch give the numbers of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from nvae_tf.cli import train
from nvae_tf.cli.evaluate import main
from nvae_tf.data.arrays import read_digits
from nvae_tf.engine.devices import local_strategy
from nvae_tf.evaluation import fid
from nvae_tf.io.errors import UserError

COMMANDS = {
    "evaluate": "--num_iw_samples 3 --iw_chunk 2 --batch_size 50",
    "sample": "--temp 0.8 --readjust_bn --readjust_batches 3 --num_samples 25 --batch_size 11 "
    "--format npz",
    "evaluate_fid": "--num_samples 25 --batch_size 11",
}


@pytest.fixture(scope="module")
def fid_files(tmp_path_factory):
    """A stand-in for the Inception graph (means of patches), and statistics of digits by it."""
    folder = tmp_path_factory.mktemp("fid")
    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(tf.float32, (None, 299, 299, 3), "images")
        tf.nn.avg_pool2d(tf.multiply(images, 1.0, name="Mul"), 99, 99, "VALID", name="pool_3")
    (folder / "graph.pb").write_bytes(graph.as_graph_def().SerializeToString())
    accumulator = fid.FeatureStatistics()
    accumulator.add(
        read_digits()[1].images.numpy()[:, 2:-2, 2:-2, 0].reshape(-1, 28 * 28)[:, ::30][:, :27]
    )
    accumulator.statistics().save(folder / "stats.npz")
    return f" --inception {folder / 'graph.pb'} --fid_stats {folder / 'stats.npz'}"


@pytest.mark.slow
def test_two_devices_find_what_one_finds(run, fid_files, tmp_path):
    def commands(output, *more):
        common = ["--checkpoint", str(run), "--output", str(output), *more]
        modes = {**COMMANDS, "evaluate_fid": COMMANDS["evaluate_fid"] + fid_files}
        return [[*common, "--eval_mode", mode, *text.split()] for mode, text in modes.items()]

    for arguments in commands(tmp_path / "one"):
        assert main(arguments) == 0
    # The CPU can be divided only before TensorFlow is first used.
    divided = commands(tmp_path / "two", "--world_size", "2")
    script = f"from nvae_tf.cli.evaluate import main\nfor a in {divided}: assert main(a) == 0"
    environment = {**os.environ, "NVAE_SPLIT_CPU": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)

    one, two = (
        {path.name: path for path in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, keys in (
        ("evaluate.json", ("nelbo", "neg_log_likelihood")),
        ("fid.json", ("fid", "kid", "recall")),
    ):
        reports = [json.loads(files[name].read_text()) for files in (one, two)]
        for key in keys:
            assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-5)
    images = [
        np.load(files["samples_0.8_readjusted.npz"])["images"].astype(int) for files in (one, two)
    ]
    assert images[0].shape == (25, 32, 32, 1)
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("value", [None, "", "0"])
def test_gpus_that_are_not_there_are_not_made_up(run, recipe, tmp_path, monkeypatch, capsys, value):
    monkeypatch.delenv("NVAE_SPLIT_CPU", raising=False)
    if value is not None:
        monkeypatch.setenv("NVAE_SPLIT_CPU", value)
    for command, arguments in (
        (train.main, ["--config", str(recipe), "--root", str(tmp_path)]),
        (main, ["--checkpoint", str(run), "--output", str(tmp_path)]),
    ):
        assert command([*arguments, "--world_size", "2"]) == 2
        error = capsys.readouterr().err
        assert "--world_size: 2 GPUs were asked for; TensorFlow finds none here" in error
        assert "NVAE_SPLIT_CPU=1" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_whole_steps_of_several_cpus_are_not_compiled(recipe, tmp_path):
    script = Path(__file__).parent.parent / "train_keras.py"
    flags = ["--jit_compile", "on", "--world_size", "2", "--batch_size", "50"]
    done = subprocess.run(
        [sys.executable, script, "--config", recipe, "--root", tmp_path, *flags],
        env={**os.environ, "NVAE_SPLIT_CPU": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: jit_compile: on is not allowed with 2 replicas on CPUs")
    assert done.stderr.count("\n") == 1


def test_a_cpu_in_use_is_not_divided(monkeypatch):
    monkeypatch.setenv("NVAE_SPLIT_CPU", "1")
    tf.zeros(1)
    with pytest.raises(UserError, match="before TensorFlow is first used"):
        local_strategy(5)

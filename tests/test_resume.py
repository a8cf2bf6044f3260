"""Exact resume: killed and continued runs end with the weights of one that was never stopped."""

import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from processes import (
    COMMAND,
    assert_all_finish,
    newest_step,
    start,
    start_workers,
    wait_for_training,
)

import nvae_tf
from nvae_tf import config
from nvae_tf.cli.evaluate import main as evaluate
from nvae_tf.cli.train import main
from nvae_tf.data import catalog
from nvae_tf.io.errors import ConfigError
from nvae_tf.model import NVAE
from nvae_tf.run_folder import RunFolder
from nvae_tf.training.checkpoints import CheckpointManager
from nvae_tf.training.optimizers import Adamax
from nvae_tf.training.trainer import Trainer

KILLS = 10
EPOCHS = 8  # of 14 steps


def final_state(folder):
    """Every variable of a run's newest checkpoint."""
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    reader = tf.train.load_checkpoint(str(newest / "state"))
    names = [n for n in reader.get_variable_to_shape_map() if n.endswith("VARIABLE_VALUE")]
    return newest.name, {name: reader.get_tensor(name) for name in names}


def assert_same_to_the_bit(one, other):
    (one_step, one), (other_step, other) = final_state(one), final_state(other)
    assert one_step == other_step and one.keys() == other.keys() and len(one) > 100
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_sigterm_saves_and_exits_with_75(recipe, tmp_path):
    process = start(recipe, tmp_path, "--save_every", "100")
    wait_for_training(process)
    process.send_signal(signal.SIGTERM)  # while the first step is traced
    output, _ = process.communicate()
    assert process.returncode == 75 and "stopped by SIGTERM after step 1:" in output
    assert newest_step(tmp_path / "tiny") == 1


@pytest.mark.slow
def test_sigterm_before_training_exits_with_75_too(recipe, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", COMMAND, "--config", recipe, "--root", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()  # which names the device
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75
    assert "Traceback" not in errors


@pytest.mark.slow
def test_sigterm_for_one_worker_ends_both_with_75(recipe, tmp_path):
    workers = start_workers(recipe, tmp_path / "runs", "--epochs", "500", "--batch_size", "50")
    while newest_step(tmp_path / "runs" / "tiny") == 0:
        assert not any(worker.poll() for worker in workers)
        time.sleep(0.05)
    workers[1].send_signal(signal.SIGTERM)
    assert [worker.wait(timeout=120) for worker in workers] == [75, 75]
    assert "stopped by SIGTERM after step" in (tmp_path / "runs-worker-0.log").read_text()


def command(recipe, root, *flags):
    return main(["--config", str(recipe), "--root", str(root), *flags])


@pytest.mark.slow
def test_the_last_good_checkpoint_trains_on(recipe, tmp_path, capsys):
    assert command(recipe, tmp_path, "--epochs", "2") == 0
    resume = ("--cont_training", "--epochs", "4", "--save_every", "1", "--max_bad_steps", "3")
    # Every step is skipped. Training has ended with step 31, and notices at step 35.
    assert command(recipe, tmp_path, *resume, "--skip_gradient_norm", "1e-9") == 3
    assert "step-28 (if training diverges again" in capsys.readouterr().err
    _, before = final_state(tmp_path / "tiny")
    assert newest_step(tmp_path / "tiny") == 28
    assert command(recipe, tmp_path, *resume) == 0
    name, after = final_state(tmp_path / "tiny")
    assert name == "step-56"
    moved = [key for key in before if "model/" in key and np.any(before[key] != after[key])]
    assert len(moved) > 10 and all(np.all(np.isfinite(after[key])) for key in moved)
    assert int(after["trainer/consecutive_skips/.ATTRIBUTES/VARIABLE_VALUE"]) == 0


def test_a_saved_row_of_bad_steps_is_forgotten(digits_trainer, tmp_path):
    trainer, checkpoints = digits_trainer(tmp_path)
    trainer.consecutive_skips.assign(trainer.config.max_bad_steps)
    checkpoints.save()
    again, checkpoints = digits_trainer(tmp_path)
    checkpoints.restore()
    assert not again.diverged


def test_the_images_of_a_step_are_known_after_an_import(digits_trainer, tmp_path):
    _, imported = digits_trainer(tmp_path)  # without a number of images per step
    imported.save()
    trainer, checkpoints = digits_trainer(tmp_path, images_per_step=50)
    checkpoints.restore()
    trainer.optimizer.iterations.assign(1)
    checkpoints.save()
    _, half = digits_trainer(tmp_path, images_per_step=25)
    with pytest.raises(ConfigError, match="was trained with 50 images per step"):
        half.restore()


def test_a_run_goes_on_with_as_many_images_as_before(digits_trainer, tmp_path):
    _, checkpoints = digits_trainer(tmp_path, num_images=1438)
    checkpoints.save()
    _, fewer = digits_trainer(tmp_path, num_images=1400)
    with pytest.raises(ConfigError, match="was trained on 1438 images, and there are now 1400"):
        fewer.restore()


@pytest.fixture
def digits_trainer(recipe):
    """Makes a trainer of the tiny recipe, and its checkpoints."""

    def make(path, **sizes):
        loaded = config.load(str(recipe))
        model = NVAE(loaded.model, catalog.get_dataset_info(loaded.data).image)
        trainer = Trainer(model, loaded.train, total_steps=10, optimizer=Adamax())
        folder = RunFolder(path)
        folder.checkpoints.mkdir(exist_ok=True)
        return trainer, CheckpointManager(folder, trainer, 3, **sizes)

    return make


@pytest.mark.slow
def test_moving_averages_switched_on_and_off(recipe, tmp_path, capsys):
    assert command(recipe, tmp_path, "--epochs", "2") == 0
    resume = ("--cont_training", "--ema_decay")
    assert command(recipe, tmp_path, *resume, "0.9", "--epochs", "3") == 0
    nelbo = capsys.readouterr().out.split("test: nelbo ")[-1].split()[0]
    assert float(nelbo) < 500  # they began from the weights, not from zeros
    _, state = final_state(tmp_path / "tiny")
    assert any("averages" in name for name in state)
    assert command(recipe, tmp_path, *resume, "0", "--epochs", "4") == 0
    _, state = final_state(tmp_path / "tiny")
    assert not any("averages" in name for name in state)
    assert "damaged" not in capsys.readouterr().out


def test_a_checkpoint_without_the_names_of_its_rows(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "tiny")
    (newest, *older) = RunFolder(folder).list_checkpoints()
    for path in (newest, *older):
        shutil.rmtree(path)
    newest.mkdir()
    tf.train.Checkpoint(trainer=tf.train.Checkpoint(step=tf.Variable(1))).write(newest / "state")
    assert evaluate(["--checkpoint", str(folder), "--num_iw_samples", "1"]) == 2
    said = f"error: {newest}: this checkpoint is of another version of nvae-tf\n"
    assert capsys.readouterr().err == said


@pytest.mark.slow
def test_a_model_whose_weights_stand_in_another_order(recipe, tmp_path):
    ema = ("--ema_decay", "0.9", "--epochs", "2")
    assert command(recipe, tmp_path, *ema) == 0
    other = tmp_path / "other" / "nvae_tf"
    shutil.copytree(Path(nvae_tf.__file__).parent, other)
    shutil.copytree(config.RECIPES, tmp_path / "other" / "configs")
    cells = other / "layers" / "cells.py"
    source = cells.read_text()
    norm = "        self.norm = BatchNormAct(activation) if normalization else None\n"
    assert source.count(norm) == 1  # made before the convolution; now after it
    begin = source.index(norm)
    end = source.index("\n\n", begin)
    rest = source[begin + len(norm) : end]
    cells.write_text(source[:begin] + rest + "\n" + norm.rstrip() + source[end:])
    for name, flags in (
        ("evaluate_keras.py", ["--checkpoint", tmp_path / "tiny", "--num_iw_samples", "1"]),
        ("train_keras.py", ["--config", recipe, "--root", tmp_path, "--cont_training", *ema]),
    ):
        program = shutil.copy(COMMAND.parent / name, tmp_path / "other")
        words = [sys.executable, program, *map(str, flags)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "its weights are in another order" in done.stderr


@pytest.mark.slow
def test_killed_at_random_moments(recipe, tmp_path, capsys):
    options = ("--epochs", EPOCHS, "--save_every", "1")
    assert start(recipe, tmp_path / "whole", *options).wait() == 0
    folder, moments = tmp_path / "killed" / "tiny", random.Random(0)
    process = start(recipe, tmp_path / "killed", *options)
    wait_for_training(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75 and newest_step(folder) == 1
    log = []
    for kill in range(KILLS):
        process = start(recipe, tmp_path / "killed", *options)
        wait_for_training(process)
        before = newest_step(folder)
        if kill % 2:  # in the middle of writing a checkpoint
            until = time.monotonic() + 60
            while not list(folder.glob("checkpoints/.step-*")) and time.monotonic() < until:
                pass
        else:
            while newest_step(folder) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 1.5))
        process.kill()
        process.wait()
        partial = [path.name for path in folder.glob("checkpoints/.*")]
        log.append((newest_step(folder), partial))
        assert newest_step(folder) < EPOCHS * 14
    assert start(recipe, tmp_path / "killed", *options).wait() == 0
    with capsys.disabled():
        print(f"\n{KILLS} kills; newest checkpoint, and what was half written: {log}")
    assert any(partial for _, partial in log)
    assert_same_to_the_bit(tmp_path / "whole" / "tiny", folder)
    assert not list(folder.glob("checkpoints/.*"))


@pytest.mark.slow
def test_one_worker_of_two_is_killed_and_both_are_started_again(recipe, tmp_path):
    options = ("--epochs", "3", "--save_every", "4", "--batch_size", "50")
    workers = start_workers(recipe, tmp_path / "whole", *options)
    assert_all_finish(workers, tmp_path / "whole")
    folder = tmp_path / "killed" / "tiny"
    for victim in (1, 0):
        workers = start_workers(recipe, tmp_path / "killed", *options)
        before = newest_step(folder)
        while newest_step(folder) == before:
            time.sleep(0.05)
        workers[victim].kill()
        survivor = workers[1 - victim]
        assert survivor.wait(timeout=120) == 2  # an error, not a freeze
    workers = start_workers(recipe, tmp_path / "killed", *options)
    assert_all_finish(workers, tmp_path / "killed")
    assert_same_to_the_bit(tmp_path / "whole" / "tiny", folder)


@pytest.mark.slow
def test_workers_that_share_a_batch_train_as_one_alone(recipe, tmp_path, monkeypatch):
    assert start(recipe, tmp_path / "one", "--epochs", "2").wait() == 0
    workers = start_workers(recipe, tmp_path / "two", "--epochs", "2", "--batch_size", "50")
    assert_all_finish(workers, tmp_path / "two")
    # And a run that changes from one worker to two devices on its way.
    assert start(recipe, tmp_path / "both", "--epochs", "2", "--save_every", "20").wait() == 0
    for path in sorted((tmp_path / "both" / "tiny" / "checkpoints").glob("step-*")):
        if path.name != "step-14":
            shutil.rmtree(path)
    moved = ("--epochs", "2", "--batch_size", "50", "--world_size", "2")
    monkeypatch.setenv("NVAE_SPLIT_CPU", "1")
    assert start(recipe, tmp_path / "both", *moved).wait() == 0
    (step, expected), *others = (final_state(tmp_path / r / "tiny") for r in ("one", "two", "both"))
    for other_step, found in others:
        assert other_step == step
        for name, value in expected.items():
            # Offsets that the next batch norm takes away again are moved by rounding alone.
            scale = np.abs(value).max(initial=0.1) if value.dtype.kind == "f" else 0.0
            np.testing.assert_allclose(found[name], value, atol=1e-3 * scale, err_msg=name)


def test_another_number_of_images_per_step_does_not_continue(run, recipe, capsys):
    arguments = ["--config", str(recipe), "--root", str(run.parent), "--cont_training"]
    assert main([*arguments, "--batch_size", "50"]) == 2
    error = capsys.readouterr().err
    assert "100 images per step" in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, recipe, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "tiny")
    checkpoints = tmp_path / "tiny" / "checkpoints"
    data = checkpoints / "step-42" / "state.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:1000])
    arguments = ["--config", str(recipe), "--root", str(tmp_path), "--cont_training"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "step-42: damaged" in output and "continued from step 28" in output
    (_, again), (_, whole) = final_state(tmp_path / "tiny"), final_state(run)
    for name, value in whole.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    for path, cut in itertools.product(checkpoints.glob("step-*/state.*"), [10]):
        path.write_bytes(path.read_bytes()[:cut])
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "cannot be restored" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
        '{"cluster": {"worker": ["a:1", "b:1"], "ps": ["c:1"]}, "task": {"type": "worker"}}',
    ],
)
def test_a_wrong_tf_config_is_one_line(text, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TF_CONFIG", text)
    assert main(["--config", str(recipe), "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: TF_CONFIG: ") and error.count("\n") == 1

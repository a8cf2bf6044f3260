"""``tune_keras.py``: spaces, and searches whose trials really train."""

import csv
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tensorflow as tf

from nvae_tf import config
from nvae_tf.cli.tune import main
from nvae_tf.io.errors import ConfigError, UserError
from nvae_tf.io.lock import exclusive_lock
from nvae_tf.tuning.space import SHARED, Dimension, load_space
from nvae_tf.tuning.trial import run_trial

COMMAND = Path(__file__).parent.parent / "tune_keras.py"
# A trial must end within seconds.
TOY = ["--epochs", "1", "--warmup_epochs", "0", "--batch_size", "300", "--max_bad_steps", "2"]


def test_a_space_is_read(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "learning_rate: {float: [1e-3, 3e-2], log: true}\n"
        "num_channels_enc: {int: [4, 16], step: 4}\n"
        "use_se: {choice: [true, false]}\n"
    )
    assert load_space(path) == [
        Dimension("learning_rate", "float", (1e-3, 3e-2), None, True),
        Dimension("num_channels_enc", "int", (4, 16), 4, False),
        Dimension("use_se", "choice", (True, False), None, False),
    ]
    bundled = Path(__file__).parent.parent / "examples" / "digits_space.yaml"
    assert "learning_rate" in [dimension.name for dimension in load_space(bundled)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: {float: [1e-3, 1e-2]}", "did you mean learning_rate"),
        ("learning_rate: 0.1", "is not understood"),
        ("learning_rate: {float: [1e-3, 1e-2], lgo: true}", "'lgo' is not understood"),
        ("learning_rate: {float: [1e-2, 1e-3]}", "not a lowest and a highest"),
        ("learning_rate: {float: [0.0, 1e-3]}", "expected a number, above 0"),
        ("learning_rate_min: {float: [0.0, 1e-3], log: true}", "begins above 0"),
        ("learning_rate: {int: [1, 2]}", "its values are not of type int"),
        ("num_nf: {int: [0, 2], log: true, step: 1}", "step 1 is not allowed"),
        ("num_nf: {int: [0, 2], step: 1_0}", "step 1_0 is not allowed"),
        (
            "num_channels_enc: {int: [4, 6]}",
            "5 is not allowed; .* even; choose a step that leaves it",
        ),
        ("num_nf: {int: [0, 2], log: maybe}", "log: 'maybe' is not true or false"),
        ("min_log_scale: {float: [auto, -1]}", "its ends are not numbers"),
        ("use_se: {choice: [true, true]}", "a value is given twice"),
        ("use_se: {choice: [maybe]}", "expected true or false"),
        ("use_se: {choice: []}", "not a list of values"),
        *(
            (f"{key}: {{choice: [1]}}", f"{key}: is the same for all trials.*--{key}")
            for key in SHARED
        ),
        ("{}", "no key to search"),
        ("- 1", "expected lines"),
    ],
)
def test_a_wrong_space_is_one_line(text, message, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_space(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def tune(folder, recipe, space, *flags):
    path = folder / "space.yaml"
    path.write_text(space)
    arguments = ["--config", str(recipe), "--root", str(folder), "--save", "search"]
    return main([*arguments, "--space", str(path), *TOY, *flags])


def table(folder):
    with (folder / "search" / "trials.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def searched(recipe, tmp_path_factory):
    """A random search in which some trials cannot succeed."""
    folder = tmp_path_factory.mktemp("tuning")
    space = (
        "learning_rate: {choice: [1e-2, 1e30]}\n"
        "warmup_epochs: {choice: [0, 5]}\n"
        "use_se: {choice: [true]}\n"
        "flip: {choice: [true]}\n"
    )
    flags = ["--algorithm", "random", "--max_trials", "4"]
    assert tune(folder, recipe, space, *flags) == 0
    return folder


@pytest.mark.slow
def test_failed_trials_do_not_end_a_search(searched):
    rows = {(row["learning_rate"], row["warmup_epochs"]): row for row in table(searched)}
    assert len(rows) == 4
    assert rows["0.01", "0"]["status"] == "completed" and float(rows["0.01", "0"]["bpd"]) > 0
    assert rows["1e+30", "0"]["status"] == "failed"
    assert "2 steps in a row" in rows["1e+30", "0"]["message"]
    assert "warmup_epochs: 5 is not allowed" in rows["0.01", "5"]["message"]


def test_a_trial_that_fails_is_one_line(recipe, tmp_path):
    settings = config.load(str(recipe))
    with pytest.raises(UserError, match="^FileNotFoundError: No such file"):
        run_trial(settings, tmp_path / "failed", {}, parent=tmp_path / "removed")

    def kill():
        while not multiprocessing.active_children():
            time.sleep(0.05)
        multiprocessing.active_children()[0].kill()

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        with pytest.raises(UserError, match="^its process was killed by SIGKILL, possibly out of"):
            run_trial(settings, tmp_path / "killed", {})
        killed.result()


@pytest.mark.slow
def test_trials_shorten_the_recipes_warm_up(recipe, tmp_path, capsys):
    (tmp_path / "space.yaml").write_text("use_se: {choice: [true]}\n")
    arguments = ["--config", str(recipe), "--root", str(tmp_path), "--save", "search"]
    arguments += ["--space", str(tmp_path / "space.yaml"), "--algorithm", "random"]
    assert main([*arguments, "--max_trials", "1", "--batch_size", "300", "--epochs", "1"]) == 0
    said = "warmup_epochs: 0 instead of the recipe's 1, to fit into 1 epoch"
    assert said in capsys.readouterr().out
    (row,) = table(tmp_path)
    assert (row["status"], row["epochs"]) == ("completed", "1")
    best = config.load(str(tmp_path / "search" / "best.yaml"))
    assert (best.train.epochs, best.train.warmup_epochs) == (1, 0)


@pytest.mark.slow
def test_the_best_trial_becomes_a_recipe(searched):
    best = config.load(str(searched / "search" / "best.yaml"))
    (done,) = [row for row in table(searched) if row["status"] == "completed"]
    assert best == config.load(str(searched / "search" / f"trial_{done['trial']}" / "config.yaml"))
    assert best.train.learning_rate == 1e-2 and best.train.epochs == 1 and best.model.use_se is True
    assert best.data.flip is True


@pytest.mark.slow
def test_trials_are_in_tensorboards_hparams_tab(searched):
    (done,) = [row for row in table(searched) if row["status"] == "completed"]
    logs = searched / "search" / f"trial_{done['trial']}" / "logs" / "validation"
    tags = {
        value.tag
        for path in logs.glob("events*")
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    }
    assert {"_hparams_/session_start_info", "elbo/bpd", "elbo/nelbo"} <= tags


@pytest.mark.slow
def test_a_search_is_continued_only_on_request(searched, recipe, capsys):
    space = (searched / "space.yaml").read_text()
    flags = ["--algorithm", "random", "--max_trials", "4"]
    assert tune(searched, recipe, space, *flags) == 2
    assert "--resume" in capsys.readouterr().err
    assert tune(searched, recipe, space, *flags, "--resume") == 0  # nothing is left to try
    assert len(table(searched)) == 4
    for more, name in (
        (["--objective", "nelbo"], "objective"),
        (["--algorithm", "bayesian"], "algorithm"),
        (["--epochs", "7"], "epochs"),
    ):
        assert tune(searched, recipe, space, *flags, "--resume", *more) == 2
        assert f"{name}: " in (error := capsys.readouterr().err) and "does not continue" in error
    assert tune(searched, recipe, "use_se: {choice: [true]}", *flags, "--resume") == 2
    assert "space: " in capsys.readouterr().err
    with exclusive_lock(searched / "search", "tuning"):
        assert tune(searched, recipe, space, *flags, "--resume") == 2
    assert "another process is tuning here" in capsys.readouterr().err


def test_what_keras_tuner_cannot_do_is_refused(recipe, tmp_path, monkeypatch, capsys):
    assert tune(tmp_path, recipe, "use_se: {choice: [true]}", "--save", "q[7]") == 2
    assert "takes *?[ in names for patterns; choose another" in capsys.readouterr().err
    for flags, message in (
        (["--max_trials", "3"], "--max_trials: hyperband's number of trials follows from"),
        (["--algorithm", "random", "--factor", "2"], "--factor: is for --algorithm hyperband"),
    ):
        assert tune(tmp_path, recipe, "use_se: {choice: [true]}", *flags) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    assert tune(tmp_path, recipe, "use_se: {choice: [true]}") == 2
    assert (
        "KERASTUNER_ORACLE_IP: is set, but not all of KERASTUNER_TUNER_ID"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("algorithm", ["hyperband", "bayesian", "random"])
def test_no_trial_starts_after_the_time_is_over(algorithm, recipe, tmp_path, capsys):
    space = (
        "learning_rate: {float: [1e-3, 3e-2], log: true}\n"
        "flip: {choice: [auto, true]}\n"
        "skip_gradient_norm: {choice: [auto, 100]}\n"
    )
    flags = ["--algorithm", algorithm, "--max_minutes", "1e-9"]
    assert tune(tmp_path, recipe, space, *flags) == 2
    assert "no trial was completed" in capsys.readouterr().err
    assert table(tmp_path) == []


@pytest.mark.slow
def test_hyperband_goes_on_from_shorter_trials(recipe, tmp_path):
    space = "learning_rate: {float: [1e-3, 3e-2], log: true}\n"
    flags = ["--epochs", "2", "--factor", "2", "--max_minutes", "0.7"]
    assert tune(tmp_path, recipe, space, *flags) == 0
    rows = table(tmp_path)
    short, long = ([row for row in rows if row["epochs"] == epochs] for epochs in "12")
    assert short
    for row in long:
        trial = json.loads(
            (tmp_path / "search" / f"trial_{row['trial']}" / "trial.json").read_text()
        )
        parent = trial["hyperparameters"]["values"].get("tuner/trial_id")
        if parent:
            names = {
                path.name
                for path in (tmp_path / f"search/trial_{row['trial']}/checkpoints").iterdir()
            }
            assert {"step-4", "step-8"} <= names


def two_trials(recipe, folder):
    """The command for a search of two trials, in a separate process."""
    (folder / "space.yaml").write_text("learning_rate: {choice: [1e-2, 2e-2]}\n")
    return [
        sys.executable, str(COMMAND), "--config", str(recipe), "--root", str(folder), "--save",
        "search", "--space", str(folder / "space.yaml"), "--algorithm", "random", "--max_trials", "2",
        *TOY,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_search_goes_on_with_its_trial(recipe, tmp_path):
    command = two_trials(recipe, tmp_path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch 1/1"):
                process.kill()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["status"] for row in table(tmp_path)] == ["completed", "completed"]


@pytest.mark.slow
def test_workers_share_a_search(recipe, tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = two_trials(recipe, tmp_path)
    shared = {**os.environ, "KERASTUNER_ORACLE_IP": "localhost", "KERASTUNER_ORACLE_PORT": port}
    processes = [
        subprocess.Popen(command, env={**shared, "KERASTUNER_TUNER_ID": name})
        for name in ("chief", "tuner0")
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert [row["status"] for row in table(tmp_path)] == ["completed", "completed"]

"""What a new user types first, and what the commands answer."""

import os
import shlex
import subprocess
import sys

import pytest
from processes import COMMAND

from nvae_tf import config
from nvae_tf.cli import (
    compress,
    decompress,
    evaluate,
    gallery,
    import_official,
    inspect,
    prepare,
    train,
    tune,
)


@pytest.mark.slow
def test_one_epoch_and_then_more(recipe, tmp_path, capsys):
    arguments = ["--config", str(recipe), "--root", str(tmp_path)]
    assert train.main([*arguments, "--epochs", "1"]) == 0
    line = "warmup_epochs: 0 instead of the recipe's 1, to fit into 1 epoch"
    assert capsys.readouterr().out.splitlines()[0] == line
    used = config.load(str(tmp_path / "tiny" / "config.yaml")).train
    assert (used.epochs, used.warmup_epochs) == (1, 0)
    # More epochs bring the recipe's own warm-up back.
    arguments += ["--init_from", str(tmp_path / "gone")]  # the model that it once began with
    assert train.main([*arguments, "--epochs", "2", "--cont_training"]) == 0
    output = capsys.readouterr().out
    assert "warmup_epochs" not in output
    assert f"--init_from: the run in {tmp_path / 'tiny'} has begun already" in output
    used = config.load(str(tmp_path / "tiny" / "config.yaml")).train
    assert (used.epochs, used.warmup_epochs) == (2, 1)


def test_a_warm_up_that_is_asked_for_has_to_fit(recipe, tmp_path, capsys):
    arguments = ["--config", str(recipe), "--root", str(tmp_path), "--epochs", "1"]
    assert train.main([*arguments, "--warmup_epochs", "1"]) == 2
    error = capsys.readouterr().err
    assert error == "error: --warmup_epochs: 1 is not allowed; expected less than epochs (1)\n"
    assert not list(tmp_path.iterdir())


def run_python(*words, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True, text=True, check=False, env={**environment, **variables},
    )  # fmt: skip


@pytest.mark.slow
def test_standard_error_of_a_training_is_empty(recipe, tmp_path):
    done = run_python(COMMAND, "--config", recipe, "--root", tmp_path, "--epochs", "1")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_tensorflows_messages_are_there_for_who_asks(recipe, tmp_path):
    arguments = (COMMAND, "--config", recipe, "--root", tmp_path, "--dataset", "nosuch")
    quiet, loud = run_python(*arguments), run_python(*arguments, TF_CPP_MIN_LOG_LEVEL="0")
    assert quiet.stderr.startswith("error: dataset: 'nosuch'") and quiet.stderr.count("\n") == 1
    assert "oneDNN" in loud.stderr or "rebuild TensorFlow" in loud.stderr
    assert loud.stderr.splitlines()[-1] + "\n" == quiet.stderr


@pytest.mark.slow
def test_what_ends_tensorflow_is_shown(recipe, tmp_path):
    arguments = (COMMAND, "--config", recipe, "--root", tmp_path, "--jit_compile", "on")
    done = run_python(*arguments, XLA_FLAGS="--nonsense")
    assert done.returncode not in (0, 2)  # TensorFlow ends the process
    assert "--nonsense" in done.stderr and "oneDNN" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            ("-m", "nvae_tf.cli.gallery", "RUN", "--output", "OUT/page.html"),
            marks=pytest.mark.slow,
        ),
        (
            "-m",
            "nvae_tf.cli.inspect",
            "--dataset",
            "digits",
            "--seconds",
            "0.1",
            "--output",
            "OUT/new/x",
        ),
        (
            "-m",
            "nvae_tf.cli.compress",
            "--checkpoint",
            "RUN",
            "--input",
            "digits",
            "--limit",
            "1",
            "--output",
            "OUT/x",
        ),
        pytest.param(("-m", "nvae_tf.cli.inspect", "--dataset", "nosuch"), marks=pytest.mark.slow),
        pytest.param(
            ("-m", "nvae_tf.cli.prepare", "tar", "--input", "/nowhere", "--output", "OUT"),
            marks=pytest.mark.slow,
        ),
        ("-m", "nvae_tf.cli.import_official", "/nowhere", "OUT"),
        ("-m", "nvae_tf.cli.compress", "--checkpoint", "/nowhere", "--input", "a", "--output", "b"),
        (
            "-m",
            "nvae_tf.cli.decompress",
            "--checkpoint",
            "/nowhere",
            "--input",
            "a",
            "--output",
            "b",
        ),
    ],
    ids=lambda words: " ".join(words[1:]),
)
def test_no_command_lets_chatter_through(run, tmp_path, words):
    done = run_python(
        *(word.replace("RUN", str(run)).replace("OUT", str(tmp_path)) for word in words)
    )
    if done.returncode == 0:
        assert done.stderr == ""
    else:
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [pytest.param(">&-", marks=pytest.mark.slow), ">&- 2>&-"])
def test_nobody_has_to_listen(run, tmp_path, closed):
    """As under cron and daemons, which may start a command with its streams closed."""
    words = [COMMAND.parent / "evaluate_keras.py", "--checkpoint", run, "--eval_mode", "sample"]
    words += ["--num_samples", "2", "--output", tmp_path]
    command = shlex.join([sys.executable, *map(str, words)])
    done = subprocess.run(
        f"exec {command} {closed}", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "") and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["samples_1.png"]


WITHOUT_TENSORFLOW = """
import sys
from nvae_tf.cli import {command}
assert {command}.main({arguments}) == 2
assert "tensorflow" not in sys.modules
"""


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--config", "celeba256"], "celeba_256 needs --data: fetch celeba-tfr.tar"),
        ("train", ["--config", "ffhq256"], "ffhq needs --data: fetch FFHQ's PNGs"),
        ("train", ["--config", "imagenet32"], "needs --data: fetch imagenet-oord-tfr.tar"),
        (
            "train",
            ["--config", "digits", "--data", "."],
            "digits reads no folder, so leave out --data",
        ),
        ("train", ["--config", "digits", "--dataset", "omniglot"], "fetch chardata.mat"),
        ("train", ["--config", "digits", "--dataset", "lsun_tower_64"], "prepare lsun"),
        ("tune", ["--config", "celeba64", "--space", "/"], "fetch CelebA's aligned images"),
        ("evaluate", ["--checkpoint", "/nowhere"], "/nowhere: no such run"),
    ],
)
def test_mistakes_are_found_before_tensorflow_starts(command, arguments, message):
    done = run_python("-c", WITHOUT_TENSORFLOW.format(command=command, arguments=arguments))
    assert done.returncode == 0, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert command == "evaluate" or "docs/data.md" in done.stderr


@pytest.mark.parametrize(
    ("main", "started_as", "name"),
    [
        (train.main, "/usr/bin/nvae-train", "nvae-train"),
        (train.main, "train_keras.py", "train_keras.py"),
        (evaluate.main, "/usr/bin/nvae-evaluate", "nvae-evaluate"),
        (evaluate.main, "./evaluate_keras.py", "evaluate_keras.py"),
        (tune.main, "/usr/bin/nvae-tune", "nvae-tune"),
        (tune.main, "tune_keras.py", "tune_keras.py"),
        (prepare.main, "/usr/bin/nvae-prepare", "nvae-prepare"),
        (inspect.main, "/usr/bin/nvae-inspect", "nvae-inspect"),
        (gallery.main, "nvae_tf/cli/gallery.py", "nvae-gallery"),
        (import_official.main, "nvae_tf/cli/import_official.py", "nvae-import"),
        (compress.main, "nvae_tf/cli/compress.py", "nvae-compress"),
        (decompress.main, "nvae_tf/cli/decompress.py", "nvae-decompress"),
    ],
)
def test_help_has_the_name_that_the_command_was_started_by(
    main, started_as, name, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [started_as])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: {name} ")

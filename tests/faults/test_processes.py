"""Commands that are interrupted, killed, started twice, or watched."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from processes import COMMAND, newest_step, own_lines, start, wait_for_training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nvae_tf.cli import prepare, train

EVALUATE = COMMAND.parent / "evaluate_keras.py"


def run_python(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-u", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_two_trainings_in_one_folder(recipe, tmp_path, capsys):
    first = start(recipe, tmp_path, "--epochs", "500")
    wait_for_training(first)
    flags = ["--config", str(recipe), "--root", str(tmp_path)]
    assert train.main([*flags, "--cont_training"]) == 2
    (line,) = own_lines(capsys.readouterr().err)
    assert "another process is training here" in line
    assert train.main(flags) == 2 and "holds a run already" in capsys.readouterr().err
    assert first.poll() is None
    first.kill()
    first.wait()
    assert train.main([*flags, "--cont_training", "--epochs", "2"]) == 0  # its lock went with it


def test_two_preparations_of_one_folder(tmp_path, photographs, capsys):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for number, image in enumerate(photographs[:20]):
        Image.fromarray(image).save(folder / f"{number}.png")
    script = (
        "import sys, time, nvae_tf.data.images as images\n"
        "images.FolderSource.fetch = lambda *_: time.sleep(600)  # so that it is held up\n"
        "from nvae_tf.cli import prepare\nsys.exit(prepare.main(sys.argv[1:]))"
    )
    arguments = [
        "images",
        "--input",
        folder,
        "--output",
        out,
        "--size",
        "32",
        "--validation",
        "0.5",
    ]
    first = run_python("-c", script, *arguments)
    while not list(out.rglob("*.part")):
        assert first.poll() is None
        time.sleep(0.05)
    assert prepare.main([str(word) for word in arguments]) == 2
    (line,) = own_lines(capsys.readouterr().err)
    assert "another process is preparing data here" in line
    first.kill()
    first.communicate()
    assert prepare.main([str(word) for word in arguments]) == 0  # goes on after the kill
    assert not list(out.rglob("*.part"))


STAGES = {
    "start": None,
    "data read": "data:",
    "model built": "model:",
    "first step": "run:",
    "training": "epoch 1/",
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_while_training(recipe, tmp_path, stage):
    process = run_python(COMMAND, "--config", recipe, "--root", tmp_path, "--epochs", "500")
    if STAGES[stage] is None:
        time.sleep(1.5)
    else:
        for line in process.stdout:
            if line.startswith(STAGES[stage]):
                break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    (line,) = own_lines(errors)
    assert line.startswith("interrupted; the same command with --cont_training continues")
    if stage == "training":
        assert newest_step(tmp_path / "tiny") >= 14


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("evaluate", ["--num_iw_samples", "100000"]),
        ("ood", ["--num_iw_samples", "100000"]),
        ("sample", ["--num_samples", "100000"]),
        ("encode", []),
        ("export", ["--readjust_temps", "0.5"]),
        ("traverse", ["--steps", "100000"]),
    ],
)
def test_ctrl_c_while_evaluating(run, tmp_path, mode, more):
    process = run_python(
        EVALUATE, "--checkpoint", run, "--eval_mode", mode, "--output", tmp_path / "out", *more
    )
    for line in process.stdout:
        if line.startswith("model:"):
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    (line,) = own_lines(errors)
    assert line.startswith("interrupted")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", ["2", "1"])
def test_sigterm_while_validating(recipe, tmp_path, capsys, epochs):
    options = ["--batch_size", "2", "--epochs", epochs, "--save_every", "5000"]
    process = start(recipe, tmp_path, *options)
    folder = tmp_path / "tiny"
    while newest_step(folder) == 0:  # saved before validation starts
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    # Also where all steps were taken, because the results of the run are still missing.
    assert process.returncode == 75
    assert "stopped by SIGTERM after step 719:" in output and "validation" not in output
    flags = ["--config", str(recipe), "--root", str(tmp_path), "--cont_training", "--deterministic"]
    assert train.main([*flags, *options]) == 0
    output = capsys.readouterr().out
    assert "continued from step 719" in output and "test: nelbo" in output


@pytest.mark.slow
def test_a_reader_that_leaves(recipe, tmp_path):
    process = run_python(COMMAND, "--config", recipe, "--root", tmp_path)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 2
    assert own_lines(errors) == ["error: the output's reader has closed it"]


@pytest.mark.slow
def test_tensorboard_reads_while_training_writes(recipe, tmp_path):
    process = start(recipe, tmp_path, "--epochs", "6", "--log_every", "1")
    wait_for_training(process)
    logs, seen = tmp_path / "tiny" / "logs" / "train", []
    while process.poll() is None:
        if logs.is_dir():
            events = EventAccumulator(str(logs), size_guidance={"tensors": 0})
            events.Reload()
            if "elbo/nelbo" in events.Tags()["tensors"]:
                seen.append([event.step for event in events.Tensors("elbo/nelbo")])
    process.communicate()
    assert process.returncode == 0 and len(seen) > 3
    for before, after in zip(seen, seen[1:], strict=False):
        assert after[: len(before)] == before  # nothing half-written, nothing lost
    events = EventAccumulator(str(logs), size_guidance={"tensors": 0})
    events.Reload()
    assert [event.step for event in events.Tensors("elbo/nelbo")] == list(range(1, 6 * 14 + 1))


@pytest.mark.slow
def test_a_clock_that_goes_backwards(recipe, tmp_path, monkeypatch, capsys):
    now = [2e9]

    def backwards():
        now[0] -= 1000.0
        return now[0]

    arguments = ["--config", str(recipe), "--root", str(tmp_path), "--epochs", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", backwards)
        assert train.main(arguments) == 0
    checkpoints = tmp_path / "tiny" / "checkpoints"
    # And a newer checkpoint that is dated before the older one.
    os.utime(checkpoints / "step-14", (2e9, 2e9))
    os.utime(checkpoints / "step-28", (1e9, 1e9))
    shutil.rmtree(tmp_path / "tiny" / "logs")
    assert train.main([*arguments[:-1], "3", "--cont_training"]) == 0
    assert "continued from step 28" in capsys.readouterr().out


@pytest.mark.slow
def test_training_on_a_damaged_image_always_ends(photographs, tmp_path):
    """In one start of seven the process once waited for ever, after it had printed its error.

    The image is damaged after the folder was looked through; one that was before is skipped.
    """
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, image in enumerate(photographs):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    flags = ["--config", "digits", "--dataset", "images", "--data", folder, "--image_size", "32"]
    small = ["--num_channels_enc", "4", "--num_channels_dec", "4", "--num_groups_per_scale", "1"]
    for attempt in range(10):
        root = ["--root", tmp_path / f"runs-{attempt}", "--jit_compile", "off", "--batch_size", "8"]
        Image.fromarray(photographs[40]).save(folder / "040.png")
        process = run_python(COMMAND, *flags, *small, "--num_mixture_dec", "2", *root)
        while not process.stdout.readline().startswith("run: "):
            assert process.poll() is None
        (folder / "040.png").write_bytes(b"not an image")
        _, error = process.communicate(timeout=120)
        assert process.returncode == 2, error
        (line,) = own_lines(error)
        assert "040.png: not a readable image" in line

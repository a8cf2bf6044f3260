"""A step that was exported from TensorFlow gives the same losses in JAX, and bad files one line.

``JAX_PYTHON`` may name the Python of another environment that has JAX, whose NumPy may be too new for
this one's TensorFlow.
"""

import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "xla_step.py"
SMALL = (
    "--num_channels_enc 4 --num_channels_dec 4 --num_groups_per_scale 1 "
    "--num_preprocess_cells 1 --num_postprocess_cells 1"
)


def start(python, *words):
    command = [python, SCRIPT, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def jax_python():
    if "JAX_PYTHON" not in os.environ:
        pytest.importorskip("jax")
    return os.environ.get("JAX_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("step") / "digits.step"
    done = start(
        sys.executable, "export", "--config", "digits", "--batch_size", 4, *SMALL.split(), path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout.splitlines()[-1])["losses"]) == 3
    return path


def changed(path, target, **fields):
    """A copy of a step with other fields in its description."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        about = {**json.loads(old.read("about.json")), **fields}
        new.writestr("about.json", json.dumps(about))
        new.writestr("program.hlo.xz", old.read("program.hlo.xz"))
    return target


@pytest.mark.slow
def test_jax_finds_tensorflows_losses(jax_python, digits, tmp_path):
    done = start(jax_python, "run", digits, "--repeat", 2, "--profile", tmp_path / "profile")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loss_difference"] < 1e-5
    assert result["images_per_second"] > 0.0 and result["temporary_bytes"] > 0
    assert result["seconds_by_category"]["convolutions"] > 0.0

    wrong = changed(digits, tmp_path / "wrong.step", losses=[1.0])
    small = ["--memory_gib", 0.001]
    for words, expected in (([wrong], "differ from TensorFlow's"), ([digits, *small], "smaller")):
        done = start(jax_python, "run", *words, "--repeat", 1)
        assert done.returncode == 1 and not done.stdout
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ") and expected in last and "Traceback" not in done.stderr


ABOUT = dict(format="nvae-tf training step", version=1, inputs=[], replaced=0, reported=["loss"])


def make(path, about, program=b"", cut=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("about.json", json.dumps(about))
        archive.writestr("program.hlo.xz", lzma.compress(program)[:cut])


@pytest.mark.parametrize("problem", ["missing", "empty", "text", "cut", "format", "version", "xz"])
def test_bad_files_are_one_line(problem, tmp_path):
    path = tmp_path / "bad.step"
    make(path, ABOUT, b"program" * 1000)
    if problem == "missing":
        path.unlink()
    elif problem == "empty":
        path.write_bytes(b"")
    elif problem == "text":
        path.write_text("not a step")
    elif problem == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif problem == "format":
        make(path, {**ABOUT, "format": "another"})
    elif problem == "version":
        make(path, {**ABOUT, "version": 99})
    else:
        make(path, ABOUT, b"program" * 1000, cut=-20)
    done = start(sys.executable, "run", path)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert str(path) in done.stderr

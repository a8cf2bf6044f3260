"""The benchmarks run, and print what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = (
    "--num_channels_enc 4 --num_channels_dec 4 --num_groups_per_scale 1 "
    "--num_preprocess_cells 1 --num_postprocess_cells 1"
)
TOY = f"--config digits --jit_compile off {SMALL}"


def result_of(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "promised"),
    [
        (
            "train_step.py",
            "--steps 1 --batch_size 4",
            "parameters graph_nodes trace_seconds first_step_seconds step_seconds "
            "images_per_second peak_memory_gib precision jit_compile",
        ),
        ("sampling.py", "--batches 1 2 --repeats 1", "parameters batches peak_memory_gib"),
        (
            "evaluate.py",
            "--batch_size 2 --draws 4 --iw_chunk 2 --repeats 1",
            "draws_per_second full_passes_per_second ratio",
        ),
    ],
)
def test_the_last_line_is_json(script, flags, promised):
    output = result_of([sys.executable, BENCHMARKS / script, *TOY.split(), *flags.split()])
    result = json.loads(output.splitlines()[-1])
    assert set(promised.split()) <= set(result)
    assert all(value is not None for value in result.values())


@pytest.mark.slow
def test_the_matrix_of_gpus_has_a_row_for_every_run(monkeypatch):
    for name, value in (("RECIPES", "digits"), ("PRECISIONS", "float32"), ("JIT", "off")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    toy = [*SMALL.split(), "--steps", "1", "--batch_size", "4"]
    lines = result_of(["bash", BENCHMARKS / "gpu_matrix.sh", *toy]).splitlines()
    assert lines[-1].startswith("| digits | float32 | off | 4 |")
    failed = result_of(["bash", BENCHMARKS / "gpu_matrix.sh", *toy, "--num_latent_scales", "9"])
    assert "failed" in failed.splitlines()[-1]

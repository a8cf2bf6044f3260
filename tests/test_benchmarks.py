"""The benchmarks run, and print what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import cluster_environments

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


def two_replicas(topology, rematerialization):
    """What every process of a cluster prints of the digits recipe's step, which is only traced."""
    command = [sys.executable, BENCHMARKS / "train_step.py", "--config", "digits"]
    command += ["--steps", "0", "--batch_size", "4", "--gradient_checkpointing", rematerialization]
    environments = [{"NVAE_SPLIT_CPU": "1"}]
    if topology == "two devices":
        command += ["--world_size", "2"]
    else:
        environments = cluster_environments()
    processes = [
        subprocess.Popen(
            list(map(str, command)), env={**os.environ, **own}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for own in environments
    ]  # fmt: skip
    outputs = [process.communicate() for process in processes]
    assert not any(process.returncode for process in processes), outputs[0][1][-2000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "plain", "rematerialized"),
    [("two devices", 25_000, 25_000), ("two workers", 15_000, 16_000)],
)
def test_replicas_are_lean(topology, plain, rematerialized):
    collectives = set()
    for rematerialization, nodes in (("none", plain), ("cells", rematerialized)):
        for result in two_replicas(topology, rematerialization):
            assert result["replicas"] == 2 and result["threads"] > 1
            assert result["step_seconds"] is result["peak_memory_gib"] is None
            assert result["graph_nodes"] < nodes
            collectives.add(result["collectives"])
    (exchanges,) = collectives  # what is computed again exchanges nothing
    assert 0 < exchanges <= 110


@pytest.mark.slow
def test_an_option_of_training_is_measured(tmp_path):
    script = [sys.executable, BENCHMARKS / "options.py", tmp_path, "--dataset", "digits"]
    result_of([*script, "--option", "kl_max_coeff 0.7", "--epochs", "2"])
    (found,) = tmp_path.rglob("results.json")
    result = json.loads(found.read_text())
    assert 0 < result["nelbo"] < 1000 and result["largest_norm"] > 0


@pytest.mark.slow
def test_two_checkouts_are_compared_in_pairs():
    checkout = BENCHMARKS.parent
    command = [sys.executable, BENCHMARKS / "pairs.py", checkout, checkout, "--pairs", "1", "--"]
    output = result_of([*command, *TOY.split(), "--steps", "1", "--batch_size", "4"])
    rows = [line.split(" | ") for line in output.splitlines() if line.startswith("| ")]
    ratios = {row[0].strip("| "): row[3] for row in rows[2:]}
    assert ratios["graph_nodes"] == "1.00" and float(ratios["step_seconds"]) > 0
    old, new = json.loads(output.splitlines()[0])
    assert old["images_per_second"] != new["images_per_second"]  # both were measured


@pytest.mark.slow
def test_the_matrix_of_gpus_has_a_row_for_every_run(monkeypatch, tmp_path):
    small = dict(
        RECIPES="digits", PRECISIONS="float32", REMATS="none", BATCHES="one", STEPS="1",
        KINDS="tensorflow", PYTHON=sys.executable, FLAGS=SMALL,
    )  # fmt: skip
    # With JAX and PyTorch in environments of their own, those run, too.
    for kind in ("jax", "torch"):
        if f"{kind.upper()}_PYTHON" in os.environ:
            small["KINDS"] += f" {kind}"
    small["TORCH_FLAGS"] = "--channels_last"
    for name, value in small.items():
        monkeypatch.setenv(name, value)
    matrix = ["bash", BENCHMARKS / "gpu_matrix.sh"]
    for command in ("export", "run", "run"):
        result_of([*matrix, command, tmp_path])
    made = sorted(path.name for path in tmp_path.glob("*.json"))
    assert len(made) == 1 + 3 + ("jax" in small["KINDS"]) + ("torch" in small["KINDS"])
    lines = result_of([*matrix, "table", tmp_path]).splitlines()
    assert any(line.startswith("| digits | float32 | none | 1 |") for line in lines)

    (tmp_path / "digits-float32-none-1.tensorflow-on.json").unlink()
    monkeypatch.setenv("FLAGS", "--num_latent_scales 9")
    result_of([*matrix, "run", tmp_path])
    (failed,) = tmp_path.glob("*.failed")
    assert "num_latent_scales" in failed.read_text()


def test_the_matrix_needs_a_folder_that_has_something(tmp_path):
    script = BENCHMARKS / "gpu_matrix.sh"
    for words in (["run", tmp_path / "none"], ["table", tmp_path], []):
        environment = {**os.environ, "PYTHON": sys.executable}
        command = ["bash", script, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1


def test_ratios_are_of_the_best_runs(tmp_path):
    ours = dict(images_per_second=30.0, peak_memory_gib=1.0, compile_seconds=9.0)
    ours["seconds_by_category"] = {"convolutions": 0.02, "rest": 0.01}
    flags = dict(channels_last=True, compile=False, cuda_graphs=False)
    for kind, result in (
        ("jax", ours),
        ("torch1", dict(images_per_second=10.0, peak_memory_gib=2.0, **flags)),
        ("torch2", dict(images_per_second=5.0, peak_memory_gib=9.0, **flags)),
    ):
        (tmp_path / f"cifar10-float32-none-8.{kind}.json").write_text(json.dumps(result))
    (tmp_path / "cifar10-float32-none-16.jax.failed").write_text("error: too little memory")
    lines = result_of([sys.executable, BENCHMARKS / "matrix_table.py", tmp_path]).splitlines()
    row = "30.0 | 1.00 | 9 | 10.0 | 2.00 | channels_last | 3.00 | 0.50 |"
    assert (
        f"| cifar10 | float32 | none | 8 | {row}" in lines
        and "| cifar10 | float32 | none | 8 | 20.0 | 10.0 |" in lines
    )
    assert any("failed: error: too little memory" in line for line in lines)

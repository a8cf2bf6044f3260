"""`compile`, `fit`, `evaluate` and `predict`: the command's training as Keras's users start it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from processes import free_ports

pytestmark = pytest.mark.core

PROGRAM = Path(__file__).parent / "fit_program.py"
SMALL = dict(
    num_latent_scales=1, num_groups_per_scale=2, num_latent_per_group=4, num_channels_enc=4,
    num_channels_dec=4, num_preprocess_cells=1, num_postprocess_cells=1, use_se=True, res_dist=True,
)  # fmt: skip


def checkpoint(folder):
    """The newest checkpoint's values by name."""
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    reader = tf.train.load_checkpoint(str(newest / "state"))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith("trainer/")]
    return {name: reader.get_tensor(name) for name in names if "epoch_sums" not in name}


def train_both_ways(out, topology):
    """Trains by the command and by `fit`, in processes of their own; returns what they report."""
    variables = [{}]
    flags = []
    if topology == "two devices":
        variables, flags = [{"NVAE_SPLIT_CPU": "1"}], ["--world_size", "2"]
    elif topology == "two workers":
        cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
        tasks = [{"cluster": cluster, "task": {"type": "worker", "index": i}} for i in range(2)]
        variables = [{"TF_CONFIG": json.dumps(task)} for task in tasks]
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, out, *flags], env={**os.environ, **own},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for own in variables
    ]  # fmt: skip
    errors = [process.communicate()[1] for process in processes]
    assert not any(process.returncode for process in processes), errors[0][-3000:]
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    "topology",
    [
        "one device",
        pytest.param("two devices", marks=pytest.mark.slow),
        pytest.param("two workers", marks=pytest.mark.slow),
    ],
)
def test_fit_gives_the_commands_weights_to_the_bit(topology, tmp_path):
    results = train_both_ways(tmp_path, topology)
    by_command, by_fit = checkpoint(tmp_path / "command"), checkpoint(tmp_path / "fit")
    assert by_command.keys() == by_fit.keys()
    for name, value in by_command.items():
        np.testing.assert_array_equal(by_fit[name], value, err_msg=name)
    for name, value in results["command"].items():
        np.testing.assert_allclose(results["fit"][f"val_{name}"], value, rtol=1e-5, err_msg=name)

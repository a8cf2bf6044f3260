"""Replicas that share a batch train as one device does, in every mode."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import modes
import numpy as np
import pytest
from processes import cluster_environments

PROGRAM = Path(modes.__file__)
TOPOLOGIES = ("two devices", "two workers", "two workers of two devices")
# The largest difference of losses and of weights, relative to the largest weight.
TOLERANCES = {"bfloat16": (1e-4, 1e-3), "float16": (1e-4, 1e-3), "adamw": (1e-6, 5e-4)}
TOLERANCE = (1e-6, 1e-5)


def start(out, *flags, **environment):
    return subprocess.Popen(
        [sys.executable, PROGRAM, out, *flags],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(out, topology, *flags):
    """Trains on a topology, and returns what its chief wrote, by mode and quantity."""
    if topology == "one":
        processes = [start(out, *flags)]
    elif topology == "two devices":
        processes = [start(out, *flags, "--world_size", "2", NVAE_SPLIT_CPU="1")]
    else:
        devices = "2" if topology == "two workers of two devices" else "1"
        processes = [
            start(out, *flags, "--devices", devices, **variables)
            for variables in cluster_environments()
        ]
    errors = [process.communicate()[1] for process in processes]
    assert not any(process.returncode for process in processes), errors[0][-2000:]
    with np.load(out) as archive:
        return {key: archive[key] for key in archive.files}


def differences(expected, other, mode):
    """The largest relative difference of losses, and of weights relative to the largest."""
    loss = np.max(np.abs(other[f"{mode}/loss"] / expected[f"{mode}/loss"] - 1.0))
    weights, others = expected[f"{mode}/weights"], other[f"{mode}/weights"]
    return loss, np.max(np.abs(weights - others)) / np.max(np.abs(weights))


def compare(expected, other, chosen):
    rows = [(mode, *differences(expected, other, mode)) for mode in chosen]
    for mode, loss, weights in rows:
        print(f"{mode:12} loss {loss:.1e}  weights {weights:.1e}")
    for mode, loss, weights in rows:
        loss_tolerance, weight_tolerance = TOLERANCES.get(mode, TOLERANCE)
        assert loss <= loss_tolerance and weights <= weight_tolerance, mode
        assert other[f"{mode}/identical"], f"{mode}: replicas differ"


def test_two_devices_train_as_one_does(tmp_path):
    flags = ("--modes", "all")
    one = run(tmp_path / "one.npz", "one", *flags)
    compare(one, run(tmp_path / "two.npz", "two devices", *flags), ["all"])


def test_tensors_of_any_size_are_averaged_in_packs():
    script = """
        import numpy as np, tensorflow as tf
        from nvae_tf.engine.replicas import PACK_BYTES, mean_over_replicas
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        shapes = [(3,), (5, PACK_BYTES // 8), (), (0, 3), (7, 2)]  # the second one needs three packs
        values = [[tf.random.stateless_normal(s, (r, n)) for n, s in enumerate(shapes)] for r in (0, 1)]

        @tf.function
        def run():
            def replica():
                number = tf.distribute.get_replica_context().replica_id_in_sync_group
                return mean_over_replicas([tf.stack(pair)[number] for pair in zip(*values)])
            return strategy.run(replica)

        for number, mean in enumerate(run()):
            expected = (values[0][number] + values[1][number]) / 2.0
            for part in strategy.experimental_local_results(mean):
                assert part.shape == expected.shape
                np.testing.assert_allclose(part, expected, rtol=1e-6)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "one.npz", "one", "--deterministic")


@pytest.fixture(scope="module", params=TOPOLOGIES)
def trained(request, tmp_path_factory):
    """A topology, and what it wrote after training in every mode; both tests below use it."""
    out = tmp_path_factory.mktemp("replicas") / "first.npz"
    return request.param, run(out, request.param, "--deterministic")


@pytest.mark.slow
def test_every_mode_trains_as_one_device_does(trained, one_device, capsys):
    topology, results = trained
    with capsys.disabled():
        print(f"\n{topology}")
        compare(one_device, results, modes.MODES)


@pytest.mark.slow
def test_deterministic_replicas_give_the_same_bits_twice(trained, tmp_path):
    topology, first = trained
    second = run(tmp_path / "second.npz", topology, "--deterministic")
    for key, value in first.items():
        np.testing.assert_array_equal(second[key], value, err_msg=key)

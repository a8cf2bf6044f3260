"""`nvae-doctor` finds what is wrong, says what to do, and never crashes."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from nvae_tf import config as configuration
from nvae_tf.diagnosis import memory_needs
from nvae_tf.diagnosis.cuda_libraries import check_libraries
from nvae_tf.diagnosis.findings import OK, PROBLEM, WARNING
from nvae_tf.diagnosis.system import check_gpus, check_limits, gpu_memory, half_precision
from nvae_tf.diagnosis.versions import check_versions
from nvae_tf.diagnosis.workers import check_workers
from nvae_tf.engine.xla_flags import check_deterministic, make_deterministic
from nvae_tf.engine.xla_probe import xla_problem
from nvae_tf.io.errors import ConfigError

RECIPE = ["--config", "celeba256", "--num_channels_enc", "8", "--num_channels_dec", "8"]


def doctor(*words, **variables):
    command = [sys.executable, "-m", "nvae_tf.cli.doctor", *words]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def levels(findings):
    return [finding.level for finding in findings]


@pytest.fixture
def ports():
    """A port where something listens, and one where nothing does."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield listener.getsockname()[1], free.getsockname()[1]


def tf_config(*hosts, index=0):
    return json.dumps({"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}})


@pytest.mark.slow
def test_everything_at_once_is_told_line_by_line(tmp_path, ports):
    (tmp_path / "libcudart.so.12").write_bytes(b"not a library")
    done = doctor(
        *RECIPE, "--batch_size", "100000",
        CUDA_VISIBLE_DEVICES="0", LD_LIBRARY_PATH=str(tmp_path), XLA_FLAGS="--no_such_flag",
        TF_CONFIG=tf_config("127.0.0.1:1", f"127.0.0.1:{ports[0]}", index=1),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    *lines, total = done.stdout.splitlines()
    assert all(re.match(r"(ok|warning|problem) +\S", line) for line in lines)
    problems = [line for line in lines if line.startswith("problem")]
    assert total.startswith(f"problem  {len(problems)} problems, 1 warning;")
    for text in ("CUDA_VISIBLE_DEVICES is '0'", str(tmp_path), "XLA does not work", "cannot listen",
                 "takes about"):  # fmt: skip
        assert any(text in line for line in problems), text
    assert any("model is made next" in line for line in lines)  # before the slowest check
    assert any("worker 0 (127.0.0.1:1): the machine answers" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "no_such_recipe"], "no_such_recipe"),
        (["--batch_size", "8"], "--batch_size: changes a recipe; name that with --config"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    done = doctor(*flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr


def test_workers(ports):
    listening, free = (f"127.0.0.1:{port}" for port in ports)
    assert levels(check_workers(tf_config("127.0.0.1:0"))) == [PROBLEM]
    assert levels(check_workers(tf_config(free))) == [OK]
    own = f"127.0.0.1:{ports[1]}"
    found = check_workers(tf_config(listening, "127.0.0.1:1", "no-such-host.invalid:80", index=0))
    assert levels(found) == [OK, PROBLEM, WARNING, PROBLEM]  # its own port is taken
    assert "cannot listen there" in found[1].text and "no-such-host.invalid" in found[3].text
    found = check_workers(tf_config("127.0.0.1:1", listening, own, index=0))
    assert "worker 1" in found[-2].text and found[-2].level == OK


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cluster": 3}', tf_config("a", "b", index=7)])
def test_a_malformed_cluster_is_a_problem(text):
    (found,) = check_workers(text)
    assert found.level == PROBLEM and found.text.startswith("TF_CONFIG: ")


def test_damaged_and_missing_libraries(tmp_path, monkeypatch):
    (tmp_path / "libcudart.so.12").write_bytes(b"not a library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    for driver_here in (True, False):
        found = check_libraries("12.5.1", "9", driver_here)
        damaged = [finding for finding in found if str(tmp_path) in finding.text]
        assert levels(damaged) == [PROBLEM] and "LD_LIBRARY_PATH" in damaged[0].remedy
    assert levels(check_libraries("99.1", None, True)) == [WARNING]


def test_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert levels(check_gpus([], True, driver_here=False)) == [PROBLEM]
    assert levels(check_gpus([], True, driver_here=True)) == [PROBLEM]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert levels(check_gpus([], True, driver_here=True)) == [OK]
    capabilities = [("K80", [3, 7]), ("T4", [7, 5]), ("H100", [9, 0]), ("unknown", None)]
    found = check_gpus(capabilities, True, driver_here=True)
    assert levels(found) == [WARNING, WARNING, OK, OK]


def test_hidden_gpus_have_no_memory(tmp_path, monkeypatch):
    """With a stand-in for NVIDIA's tool, which lists two GPUs, or those that `--id` names."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$*" in *--id=1*) ;; *) echo 1024, 2048;; esac\necho 3072, 4096\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_memory() == [(1.0, 2.0), (3.0, 4.0)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu_memory() == [(3.0, 4.0)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_memory() == []


def test_versions_and_limits_of_this_machine():
    assert levels(check_versions()) == [OK]
    assert OK in levels(check_limits())


def test_flags_that_make_a_recipe_fit():
    config = configuration.load("cifar10")
    counts = memory_needs.Counts(parameters=10**8, map_values=10**8)
    needed = memory_needs.estimate(counts, config)
    changes = list(memory_needs.cheaper(config, "mixed_bfloat16"))
    smaller = [memory_needs.estimate(counts, c) for _, c in changes]
    assert smaller[0] == needed and min(smaller) < needed / 2
    for flags, changed in changes:
        images = changed.data.batch_size * changed.train.accumulate_steps
        assert 0.5 * config.data.batch_size <= images <= config.data.batch_size
        assert ("--batch_size" in flags) == (changed.data.batch_size != config.data.batch_size)


@pytest.mark.parametrize(
    ("capability", "precision"),
    [([6, 1], "float32"), ([7, 5], "mixed_float16"), ([8, 0], "mixed_bfloat16")],
)
def test_no_gpu_is_advised_a_precision_that_it_lacks(capability, precision):
    config = configuration.load("cifar10")
    changes = memory_needs.cheaper(config, half_precision(capability))
    assert {changed.train.precision for _, changed in changes} == {"float32", precision}


def test_the_probe_outlives_a_child_that_dies_or_hangs(monkeypatch):
    assert xla_problem() is None
    assert xla_problem(seconds=0.1) == "no answer within 0.1 seconds"
    monkeypatch.setenv("XLA_FLAGS", "--no_such_flag_of_xla")
    reason = xla_problem()
    assert "no_such_flag_of_xla" in reason


def test_deterministic_xla_is_known_to_xla_and_leaves_the_users_flags(monkeypatch):
    environment = {"XLA_FLAGS": "--xla_gpu_autotune_level=2"}
    make_deterministic(environment)
    make_deterministic(environment)
    *ours, users = environment["XLA_FLAGS"].split()
    assert users == "--xla_gpu_autotune_level=2" and len(ours) == 2
    monkeypatch.setenv("XLA_FLAGS", environment["XLA_FLAGS"])
    assert xla_problem() is None  # a flag that XLA does not know would end the child
    with pytest.raises(ConfigError, match="deterministic: compiled steps on GPUs need XLA_FLAGS="):
        check_deterministic(environment)
    environment = {}
    make_deterministic(environment)
    check_deterministic(environment)

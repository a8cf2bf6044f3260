"""The model against the numbers of the official implementation."""

from pathlib import Path

import numpy as np
import parity
import pytest

pytestmark = pytest.mark.core

HERE = Path(__file__).parent
BUNDLED = sorted((HERE / "reference").glob("*.npz"))
# Too large to bundle, used where it lies beside the checkout.
LARGE = sorted((HERE.parent.parent / "shared" / "reference").glob("celeba64*.npz"))


MODES = [
    pytest.param("mnist", dict(jit_compile="auto"), marks=pytest.mark.slow),
    ("cifar10_flow", dict(jit_compile="auto", gradient_checkpointing="cells")),
    pytest.param(
        "cifar10_normal_decoder",
        dict(jit_compile="off", gradient_checkpointing="bn_swish"),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("path", BUNDLED + LARGE, ids=lambda path: path.stem)
def test_every_quantity_agrees_with_the_reference(path):
    rows = parity.run(path, jit_compile="off")
    assert [row for row in rows if not row.ok] == []
    quantities = {row.quantity for row in rows}
    assert {"eval/logits", "sample/logits", "train/0/loss", "train/2/sr_loss"} <= quantities


@pytest.mark.parametrize(("name", "settings"), MODES, ids=str)
def test_no_mode_of_training_changes_a_number(name, settings):
    rows = parity.run(HERE / "reference" / f"{name}.npz", **settings)
    assert [row for row in rows if not row.ok] == []


def test_an_official_checkpoint_gives_the_same_numbers():
    rows = parity.run(HERE / "reference" / "cifar10_normal_decoder.pt", jit_compile="off")
    assert all(row.ok for row in rows)
    assert {"state/stem.weight", "train/2/loss"} <= {row.quantity for row in rows}


def test_a_wrong_weight_is_noticed(tmp_path, capsys):
    with np.load(HERE / "reference" / "cifar10_normal_decoder.npz") as archive:
        arrays = dict(archive)
    arrays["state/stem.bias"] = arrays["state/stem.bias"] + 0.01
    np.savez(tmp_path / "wrong.npz", **arrays)
    assert parity.main([str(tmp_path / "wrong.npz"), "--jit_compile", "off"]) == 1
    assert "eval/logits" in capsys.readouterr().out


def test_a_missing_weight_is_named(tmp_path, capsys):
    with np.load(HERE / "reference" / "cifar10_normal_decoder.npz") as archive:
        arrays = {key: archive[key] for key in archive.files if key != "state/stem.bias"}
    np.savez(tmp_path / "short.npz", **arrays)
    assert parity.main([str(tmp_path / "short.npz")]) == 2
    error = capsys.readouterr().err
    assert "stem.bias missing" in error and "Traceback" not in error

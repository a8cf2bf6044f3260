"""Official checkpoint files: read without PyTorch, to the bit, and without running what they hold."""

import argparse
import collections
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from nvae_tf import config, torch_import
from nvae_tf.cli import import_official
from nvae_tf.io import safe_pickle as plain_pickle
from nvae_tf.io import torch_file
from nvae_tf.io.errors import UserError

HERE = Path(__file__).parent
BUNDLED = HERE / "reference"
LARGE = HERE.parent.parent / "shared" / "reference" / "celeba64_5bit_flow.pt"
FILES = sorted(BUNDLED.glob("*.pt")) + ([LARGE] if LARGE.is_file() else [])


class Named(pickle.Pickler):
    """Pickles stand-ins for PyTorch's classes under PyTorch's names (and storages outside)."""

    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None


class Storage:
    def __init__(self, key, array, legacy=False):
        self.array = array
        self.reference = ("storage", FloatStorage, key, "cpu", array.size)
        self.reference += (None,) if legacy else ()


class FloatStorage:
    pass


def _rebuild_tensor_v2(*_):
    pass


FloatStorage.__module__ = "torch"
FloatStorage.__qualname__ = "FloatStorage"
_rebuild_tensor_v2.__module__ = "torch._utils"


class Rebuilt:
    def __init__(self, storage, shape):
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        self.arguments = (
            storage,
            0,
            tuple(shape),
            tuple(strides),
            False,
            collections.OrderedDict(),
        )

    def __reduce__(self):
        return _rebuild_tensor_v2, self.arguments


@pytest.fixture(autouse=True)
def torch_names(monkeypatch):
    """PyTorch's modules, as far as Python's pickler looks them up."""
    import sys
    import types

    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.FloatStorage, utils._rebuild_tensor_v2 = FloatStorage, _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def dump(value):
    buffer = io.BytesIO()
    Named(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def write_zip(path, value, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", dump(value))
        for storage in storages:
            archive.writestr(f"model/data/{storage.reference[2]}", storage.array.tobytes())


def write_legacy(path, value, storages=()):
    parts = [
        pickle.dumps(part, protocol=2)
        for part in (torch_file.LEGACY_MAGIC, 1001, {"little_endian": True})
    ]
    parts += [dump(value), pickle.dumps([s.reference[2] for s in storages], protocol=2)]
    parts += [struct.pack("<q", s.array.size) + s.array.tobytes() for s in storages]
    path.write_bytes(b"".join(parts))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reference_files_import_to_the_bit(path):
    official = torch_import.read(path)
    with np.load(path.with_suffix(".npz")) as archive:
        state = {key[6:]: archive[key] for key in archive.files if key.startswith("state/")}
        flags = json.loads(str(archive["config"]))
    assert official.state.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(official.state[key], array, err_msg=key)
        assert official.state[key].dtype == array.dtype
    assert official.config.model == torch_import.model_config(flags)
    assert official.config.data.dataset == flags["dataset"]


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_both_layouts_hold_the_same(write, tmp_path):
    values = np.arange(24, dtype=np.float32) / 7.0
    storages = [
        Storage("0", values, write is write_legacy),
        Storage("1", values[:2], write is write_legacy),
    ]
    flags = argparse.Namespace(num_nf=2, use_se=True, dataset="cifar10")
    state = collections.OrderedDict(a=Rebuilt(storages[0], (2, 3, 4)), b=Rebuilt(storages[1], (2,)))
    state._metadata = {"": {"version": 1}}
    write(tmp_path / "model.pt", {"state_dict": state, "args": flags, "epoch": 3}, storages)
    content = torch_file.load(tmp_path / "model.pt")
    assert (
        content["args"] == {"num_nf": 2, "use_se": True, "dataset": "cifar10"}
        and content["epoch"] == 3
    )
    np.testing.assert_array_equal(content["state_dict"]["a"].numpy(), values.reshape(2, 3, 4))
    np.testing.assert_array_equal(content["state_dict"]["b"].numpy(), values[:2])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_code_in_a_file_is_refused_by_name_and_not_run(write, tmp_path):
    path = tmp_path / "model.pt"
    write(path, {"state_dict": {}, "args": Malicious(tmp_path / "ran")})
    with pytest.raises(
        UserError, match=r"refused, nothing of it was run: .*posix.system"
    ) as caught:
        torch_import.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    pickle.loads(dump(Malicious(tmp_path / "ran")))  # what Python's own unpickler does with it
    assert (tmp_path / "ran").exists()


def edited(path, tmp_path, edit):
    """A copy of a reference file whose pickle's bytes were edited."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "edited.pt", "w") as out:
        for name in archive.namelist():
            content = archive.read(name)
            out.writestr(name, edit(content) if name.endswith("data.pkl") else content)
    return tmp_path / "edited.pt"


def test_damaged_files_are_one_line(tmp_path):
    path = FILES[0]
    whole = path.read_bytes()
    for content in (
        b"",
        b"not a checkpoint",
        whole[:1000],
        whole[: len(whole) // 2],
        pickle.dumps(7),
    ):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(UserError, match="bad.pt") as caught:
            torch_import.read(tmp_path / "bad.pt")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="damaged pickle|without an end"):
        torch_import.read(edited(path, tmp_path, lambda content: content[:5000]))
    with pytest.raises(UserError, match="missing.pt"):
        torch_import.read(tmp_path / "missing.pt")


def test_a_tensor_must_lie_within_its_storage(tmp_path):
    values = Storage("0", np.zeros(4, np.float32))
    for shape in ((5,), (2, 3)):
        write_zip(tmp_path / "model.pt", {"state_dict": {"a": Rebuilt(values, shape)}}, [values])
        with pytest.raises(UserError, match="storage"):
            torch_file.load(tmp_path / "model.pt")["state_dict"]["a"].numpy()
    huge = Rebuilt(values, (2,))
    huge.arguments = (values, 0, (10**6, 10**6), (0, 0), False, {})
    write_zip(tmp_path / "model.pt", {"state_dict": {"a": huge}}, [values])
    with pytest.raises(UserError, match="larger than its storage"):
        torch_file.load(tmp_path / "model.pt")["state_dict"]["a"].numpy()


def test_random_edits_never_escape_as_other_errors(tmp_path):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(FILES[0]) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        content = archive.read(name)
    refused = 0
    for _ in range(300):
        mutated = bytearray(content)
        for at in rng.integers(0, len(mutated), 5):
            mutated[at] = rng.integers(256)
        try:
            plain_pickle.load(
                io.BytesIO(bytes(mutated)), torch_file.FACTORIES, lambda reference: reference
            )
        except plain_pickle.UnsafePickle as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


def test_old_files_lack_some_flags():
    flags = dict(num_channels_enc=8, num_channels_dec=8, dataset="cifar10")
    model = torch_import.model_config(flags)
    assert (model.ada_groups, model.min_groups_per_scale, model.num_mixture_dec) == (False, 1, 10)


def test_an_imported_run_is_a_run_folder(tmp_path, capsys):
    path = BUNDLED / "cifar10_normal_decoder.pt"
    assert import_official.main([str(path), str(tmp_path / "run")]) == 0
    assert config.load(str(tmp_path / "run" / "config.yaml")).data.dataset == "cifar10"
    from nvae_tf.evaluation.loading import load

    ours, theirs = load(str(tmp_path / "run")), load(str(path))
    for one, other in zip(ours.model.get_weights(), theirs.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert ours.step == theirs.step
    assert import_official.main([str(path), str(tmp_path / "run")]) == 2
    assert "holds a run already" in capsys.readouterr().err

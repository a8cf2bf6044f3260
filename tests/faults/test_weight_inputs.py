"""Checkpoints of PyTorch, statistics and graphs that are damaged, or made to do harm."""

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from harness import damaged
from hypothesis import given
from hypothesis import strategies as st

from nvae_tf import torch_import
from nvae_tf.evaluation import fid, inception
from nvae_tf.io import npz as npz_files
from nvae_tf.io import torch_file
from nvae_tf.io.errors import UserError

REFERENCE = Path(__file__).parents[1] / "reference" / "cifar10_normal_decoder.pt"
WHOLE = REFERENCE.read_bytes()
with zipfile.ZipFile(REFERENCE) as archive:
    ROOT = archive.namelist()[0].partition("/")[0]
    PICKLE = archive.read(f"{ROOT}/data.pkl")


def zipped(
    content=PICKLE, storages=((f"{ROOT}/data/0", bytes(400)),), name=f"{ROOT}/data.pkl", **options
):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr(name, content)
        for path, data in storages:
            archive.writestr(path, data)
    return file.getvalue()


def read(folder, content):
    (folder / "x.pt").write_bytes(content)
    return torch_import.read(folder / "x.pt")


@given(content=st.one_of(damaged(WHOLE), st.binary(max_size=300)))
def test_damaged_checkpoints(counts, tmp_path, content):
    counts.check(lambda: read(tmp_path, content))


@given(
    content=damaged(
        PICKLE, [b"cos\nsystem\n(S'touch ran'\ntR", b"((((", b"]q\0h\0a", b"}q\0h\0h\0s"]
    )
)
def test_damaged_pickles_in_checkpoints(counts, tmp_path, content):
    counts.check(lambda: read(tmp_path, zipped(content)))
    assert not (tmp_path / "ran").exists()


# Programs of the pickle machine: every operation, with arguments that fit and that do not.
NAMES = [b"torch._utils\n_rebuild_tensor_v2\n", b"torch\nFloatStorage\n", b"collections\nOrderedDict\n",
         b"argparse\nNamespace\n", b"torch\nSize\n", b"os\nsystem\n", b"builtins\neval\n"]  # fmt: skip
OPERATIONS = st.one_of(
    st.sampled_from(
        [
            bytes([code])
            for code in b"NII(})]le.t\x85\x86\x87aeus0Rb\x81Q2\x88\x89\x8f\x90\x91\x94\x93"
        ]
    ),
    st.sampled_from([b"c" + name for name in NAMES]),
    st.integers(0, 255).map(lambda n: b"K" + bytes([n])),
    st.integers(0, 9).map(lambda n: b"q" + bytes([n])),
    st.integers(0, 9).map(lambda n: b"h" + bytes([n])),
    st.binary(max_size=9).map(lambda b: b"\x8a" + bytes([len(b)]) + b),
    st.sampled_from(
        [b"X\x07\0\0\0storage", b"X\x01\0\0\x000", b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8]
    ),
    st.binary(max_size=3),
)


@given(program=st.lists(OPERATIONS, max_size=40))
def test_random_programs_as_pickles(counts, tmp_path, program):
    counts.check(lambda: read(tmp_path, zipped(b"\x80\x02" + b"".join(program) + b".")))


def state(tensors: bytes) -> bytes:
    """A checkpoint's pickle with these pairs of its ``state_dict``."""
    return b"\x80\x02}(X\x0a\0\0\0state_dict}(" + tensors + b"uX\x04\0\0\0args}u."


def tensor(shape, strides, count=100, key=b"0", offset=0) -> bytes:
    """A tensor in that pickle."""
    number = lambda n: b"\x8a\x09" + int(n).to_bytes(9, "little", signed=True)  # noqa: E731
    numbers = lambda values: b"(" + b"".join(map(number, values)) + b"t"  # noqa: E731
    text = lambda b: b"X" + struct.pack("<I", len(b)) + b  # noqa: E731
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(key) + text(b"cpu")
    storage += number(count) + b"tQ"
    arguments = storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def named(pairs) -> bytes:
    return b"".join(b"X" + struct.pack("<I", len(k)) + k + v for k, v in pairs)


LARGE = [(f"{ROOT}/data/0", bytes(400_000))]
BOMBS = {
    "nested key": b"\x80\x02}" + b")" + b"\x85" * 1_500_000 + b"Ns.",
    "endless": b"\x80\x02" + b"N0" * 2_000_000 + b".",
    "nested value": b"\x80\x02)" + b"\x85" * 1_500_000 + b".",
    "doubling key": b"\x80\x02})q\0" + b"h\0h\0\x86q\0" * 200 + b"Ns.",
    "doubling name": b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 60 + b"h\0\x93.",
    "doubling argument": state(
        b"X\1\0\0\0ctorch\nSize\n(" + b")q\0" + b"h\0h\0\x86q\0" * 60 + b"tR"
    ),
    "copied list": b"\x80\x02]("
    + b"K\1" * 300_000
    + b"eq\0ctorch\nSize\nq\1"
    + b"h\1h\0\x85R" * 9_000
    + b".",
    "updated for ever": b"\x80\x02}("
    + b"".join(b"J" + struct.pack("<i", n) + b"N" for n in range(300_000))
    + b"uq\0cargparse\nNamespace\n)R"
    + b"h\0b" * 9_000
    + b".",
    "marks": b"\x80\x02" + b"N" * 500_000 + b"(t" * 500_000 + b".",
    "huge number": b"\x80\x02\x8b" + struct.pack("<i", 4_000_000) + b"\1" * 4_000_000 + b".",
    "huge text": b"\x80\x02X" + struct.pack("<I", 2**31) + b"x.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "cycle": b"\x80\x02]q\0h\0a}q\1X\1\0\0\0ah\1s0h\0.",
    "cyclic state": state(b"X\1\0\0\0a]q\0h\0a"),
}
TENSORS = {
    "huge": tensor([2**60], [1]),
    "wide strides": tensor([2, 2], [2**62, 1]),
    "overlapping": tensor([10_000, 10_000], [0, 0]),
    "negative": tensor([-1], [1]),
    "outside": tensor([100], [1], offset=50),
    "no storage": tensor([1], [1], key=b"77"),
    "path": tensor([1], [1], key=b"../../../../etc/passwd"),
    "wrong count": tensor([1], [1], count=2**62),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_as_pickles(counts, tmp_path, name):
    assert isinstance(counts.check(lambda: read(tmp_path, zipped(BOMBS[name]))), UserError)


@pytest.mark.parametrize("name", TENSORS)
def test_impossible_tensors(counts, tmp_path, name):
    content = zipped(state(named([(b"a", TENSORS[name])])))
    assert isinstance(counts.check(lambda: read(tmp_path, content)), UserError)


def test_archives_of_several_kinds(counts, tmp_path):
    good = state(named([(b"a", tensor([100], [1]))]))
    assert counts.check(lambda: read(tmp_path, zipped(good))).state["a"].shape == (100,)
    shared = state(named((b"%d" % n, tensor([100_000], [1], 100_000)) for n in range(2_000)))
    encrypted = bytearray(zipped(good))
    encrypted[6] |= 1
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    bad = {
        "many tensors of one storage": zipped(shared, LARGE),
        "compressed": zipped(
            good, [(f"{ROOT}/data/0", bytes(10**8))], compression=zipfile.ZIP_DEFLATED
        ),
        "encrypted": bytes(encrypted),
        "two pickles": zipped(good, [("other/data.pkl", good)]),
        "no pickle": zipped(good, name="data.pkl"),
        "paths": zipped(good, [("../../escaped", b"x"), ("/tmp/escaped", b"x")]),
        "wrong sum": zipped(good).replace(bytes(400), b"\1" + bytes(399)),
    }
    for name, content in bad.items():
        assert isinstance(counts.check(lambda c=content: read(tmp_path, c)), UserError), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]


LEGACY = b"".join(
    pickle.dumps(part, protocol=2)
    for part in (torch_file.LEGACY_MAGIC, 1001, {"little_endian": True})
)
OLD = LEGACY + state(named([(b"a", tensor([100], [1]))])) + pickle.dumps(["0"], protocol=2)
OLD += struct.pack("<q", 100) + bytes(400)


@given(content=st.one_of(damaged(OLD), st.binary(max_size=40).map(lambda more: LEGACY + more)))
def test_damaged_files_of_the_old_layout(counts, tmp_path, content):
    counts.check(lambda: read(tmp_path, content))


def test_the_undamaged_files_are_read(counts, tmp_path):
    assert counts.check(lambda: read(tmp_path, OLD)).state["a"].shape == (100,)
    assert len(counts.check(lambda: read(tmp_path, WHOLE)).state) > 100


def npz(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


STATISTICS = npz(
    {"mu": np.arange(4.0), "sigma": np.eye(4), "features": np.ones((5, 4), np.float32)}
)


def statistics(folder, content):
    (folder / "x.npz").write_bytes(content)
    return fid.Statistics.load(folder / "x.npz")


@given(content=st.one_of(damaged(STATISTICS), st.binary(max_size=200)))
def test_damaged_statistics(counts, tmp_path, content):
    result = counts.check(lambda: statistics(tmp_path, content))
    if not isinstance(result, UserError):
        assert np.isfinite(fid.frechet_distance(result, result))


@st.composite
def headers(draw):
    """An array whose header says anything."""
    shape = draw(st.lists(st.sampled_from([0, 1, 4, -1, 2**31, 2**62]), max_size=3))
    kind = draw(
        st.sampled_from(
            ["<f8", ">f4", "|O", "<U9", "|V0", "|S0", "<M8[s]", "|b1", "<c16", "f8,f8", "x"]
        )
    )
    text = f"{{'descr': '{kind}', 'fortran_order': {draw(st.booleans())}, 'shape': {tuple(shape)}}}"
    text = draw(st.sampled_from([text, "[" * 3000, "{'descr': __import__('os')}", text[:-9], ""]))
    version = draw(st.sampled_from([b"\1\0", b"\2\0", b"\3\0", b"\xff\0"]))
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text.encode() + draw(st.binary(max_size=40))


@given(mean=headers(), covariance=headers())
def test_statistics_with_impossible_headers(counts, tmp_path, mean, covariance):
    content = zipped(mean, [("sigma.npy", covariance)], name="mu.npy")
    counts.check(lambda: statistics(tmp_path, content))


def test_bombs_as_statistics(counts, tmp_path):
    huge = b"\x93NUMPY\1\0v\0{'descr': '<f8', 'fortran_order': False, 'shape': (%d,)}" % (2**34)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("mu.npy", "w", force_zip64=True) as file:
            for _ in range(npz_files.LARGEST // 2**24 + 1):
                file.write(bytes(2**24))
        archive.writestr("sigma.npy", b"")
    objects = npz({"mu": np.array([{}], object), "sigma": np.eye(1)})
    single = io.BytesIO()
    np.save(single, np.eye(3))
    for content in (packed.getvalue(), zipped(huge, [("sigma.npy", huge)], name="mu.npy"), objects,
                    single.getvalue()):  # fmt: skip
        assert isinstance(counts.check(lambda c=content: statistics(tmp_path, c)), UserError)


def graph_of(build) -> bytes:
    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(tf.float32, (None, 299, 299, 3), "images")
        build(tf.multiply(images, 1.0, name="Mul"))
    return graph.as_graph_def().SerializeToString()


def pooled(images):
    tf.nn.avg_pool2d(images, 99, 99, "VALID", name="pool_3")


GRAPH = graph_of(pooled)


@given(content=st.one_of(damaged(GRAPH), st.binary(max_size=100)))
def test_damaged_graphs(counts, tmp_path, content):
    (tmp_path / "x.pb").write_bytes(content)
    counts.check(lambda: inception.load(str(tmp_path / "x.pb")))


def test_graphs_that_do_more_than_compute(counts, tmp_path):
    target = str(tmp_path / "written")

    def writes(images):
        with tf.control_dependencies([tf.io.write_file(target, "x")]):
            pooled(images)

    def reads(images):
        content = tf.io.decode_raw(tf.io.read_file("/etc/passwd"), tf.uint8)
        pooled(images + tf.reduce_sum(tf.cast(content, tf.float32)))

    def calls(images):
        pooled(tf.numpy_function(lambda x: x, [images], tf.float32))

    def loops(images):
        pooled(tf.while_loop(lambda x: True, lambda x: (x + 1.0,), [images])[0])

    for build in (writes, reads, calls, loops):
        (tmp_path / "x.pb").write_bytes(graph_of(build))
        result = counts.check(lambda: inception.load(str(tmp_path / "x.pb")))
        assert isinstance(result, UserError) and "a graph with" in str(result), (build, result)
    (tmp_path / "x.pb").write_bytes(GRAPH)
    features = counts.check(lambda: inception.load(str(tmp_path / "x.pb")))
    assert features(np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, 27)
    member = tarfile.TarInfo(f"../../{inception.GRAPH}")
    member.size = inception.MAX_GRAPH_SIZE + 1
    (tmp_path / "x.tgz").write_bytes(gzip.compress(member.tobuf() + bytes(10_240)))
    assert isinstance(counts.check(lambda: inception.load(str(tmp_path / "x.tgz"))), UserError)
    assert not (tmp_path / "written").exists()

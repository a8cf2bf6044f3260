"""Distances between sets of images, against their definitions."""

import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf

from nvae_tf.cli.evaluate import main
from nvae_tf.evaluation import fid, inception
from nvae_tf.io.errors import UserError


def accumulate(features, batch=7):
    accumulator = fid.FeatureStatistics()
    for start in range(0, len(features), batch):
        accumulator.add(features[start : start + batch])
    return accumulator.statistics()


def random_features(count, size, seed, rank=None):
    rng = np.random.default_rng(seed)
    rank = rank or size
    return rng.normal(size=(count, rank)) @ rng.normal(size=(rank, size)) + rng.normal(size=size)


def test_statistics_are_mean_and_covariance_whatever_the_batches():
    features = random_features(50, 6, 0) + 1e6  # an offset that naive sums would drown in
    for batch in (1, 7, 50):
        statistics = accumulate(features, batch)
        np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.covariance, np.cov(features.T), rtol=1e-7)
    with pytest.raises(UserError, match="at least two images; there are 1"):
        accumulate(features[:1])


@pytest.mark.parametrize(
    ("counts", "rank"),
    [((200, 150), 40), ((20, 200), 40), ((20, 15), 40), ((200, 150), 5)],
    ids=["regular", "one singular", "both singular", "low rank"],
)
def test_frechet_distance_is_that_of_a_matrix_root(counts, rank):
    sets = [random_features(count, 40, seed, rank) for seed, count in enumerate(counts)]
    one, other = map(accumulate, sets)
    # tr (S1 S2)^(1/2) is the sum of singular values of X1 X2', for centred X with S = X'X / (n - 1).
    halves = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in sets]
    trace = np.linalg.svd(halves[0] @ halves[1].T, compute_uv=False).sum()
    if counts == (200, 150) and rank == 40:  # SciPy's root is exact where nothing is singular
        root = scipy.linalg.sqrtm(one.covariance @ other.covariance)
        np.testing.assert_allclose(np.trace(root).real, trace, rtol=1e-8)
    expected = np.sum((one.mean - other.mean) ** 2)
    expected += np.trace(one.covariance + other.covariance) - 2.0 * trace
    np.testing.assert_allclose(fid.frechet_distance(one, other), expected, rtol=1e-6)


def test_frechet_distance_of_known_normals():
    identity = fid.Statistics(np.zeros(3), np.eye(3))
    moved = fid.Statistics(np.array([3.0, 4.0, 0.0]), 4.0 * np.eye(3))
    assert fid.frechet_distance(identity, moved) == pytest.approx(25.0 + 3.0)
    singular = fid.Statistics(np.zeros(3), np.diag([1.0, 0.0, 0.0]))
    assert fid.frechet_distance(singular, singular) == pytest.approx(0.0, abs=1e-12)
    assert fid.frechet_distance(identity, singular) == pytest.approx(2.0)
    with pytest.raises(UserError, match="2 features do not compare with 3"):
        fid.frechet_distance(identity, fid.Statistics(np.zeros(2), np.eye(2)))


def test_features_are_kept_from_everywhere_in_a_large_set(monkeypatch):
    monkeypatch.setattr(fid, "KEPT_FEATURES", 100)
    numbers = np.arange(1000.0)[:, None] * np.ones((1, 2))
    kept = accumulate(numbers, batch=33).features[:, 0]
    assert len(set(kept)) == 100 and 400 < kept.mean() < 600
    np.testing.assert_array_equal(accumulate(numbers, batch=1000).features[:, 0], kept)


def test_kid_is_the_unbiased_estimate():
    one, other = (random_features(30, 5, seed).astype(np.float32) for seed in (0, 1))
    kernel = lambda x, y: (float(np.float64(x) @ np.float64(y)) / 5 + 1.0) ** 3  # noqa: E731
    within = [
        np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])
        for s in (one, other)
    ]
    between = np.mean([kernel(x, y) for x in one for y in other])
    expected = sum(within) - 2.0 * between
    assert fid.kernel_distance(one, other) == pytest.approx(expected, rel=1e-6)
    halves = np.split(random_features(2000, 5, 2).astype(np.float32), 2)
    assert abs(fid.kernel_distance(*halves)) < 0.02 * abs(fid.kernel_distance(halves[0], one))


def test_precision_and_recall_tell_quality_from_variety():
    real = np.concatenate(
        [random_features(100, 2, 0) * 0.1, random_features(100, 2, 0) * 0.1 + 50.0]
    )
    assert fid.precision_recall(real, real) == (1.0, 1.0)
    assert fid.precision_recall(real, real + 1000.0) == (0.0, 0.0)
    precision, recall = fid.precision_recall(
        real, real[:100]
    )  # half of the modes, each sample good
    assert precision == 1.0 and recall == pytest.approx(0.5, abs=0.02)


def test_statistics_files_go_both_ways(tmp_path):
    statistics = accumulate(random_features(20, 4, 0))
    statistics.save(tmp_path / "ours.npz")
    loaded = fid.Statistics.load(tmp_path / "ours.npz")
    for one, other in zip(statistics, loaded, strict=True):
        np.testing.assert_array_equal(one, other)
    np.savez(tmp_path / "theirs.npz", mu=statistics.mean, sigma=statistics.covariance)
    theirs = fid.Statistics.load(tmp_path / "theirs.npz")
    report = fid.compare(theirs, statistics)
    assert report.keys() == {"fid"} and report["fid"] == pytest.approx(0.0, abs=1e-9)
    assert fid.compare(loaded, statistics).keys() == {"fid", "kid", "precision", "recall"}


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.eye(2)},
        {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
        {"mu": np.array([object()]), "sigma": np.eye(1)},
    ],
)
def test_broken_statistics_are_named(arrays, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match="bad.npz: .*fid_stats") as caught:
        fid.Statistics.load(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A small graph with the Inception graph's names: 7x7 means of the scaled image, 3 channels."""
    path = tmp_path_factory.mktemp("graph") / inception.GRAPH
    with tf.Graph().as_default() as small:
        images = tf.compat.v1.placeholder(tf.float32, (None, 299, 299, 3), "images")
        scaled = tf.multiply(images, 1.0, name="Mul")
        tf.nn.avg_pool2d(scaled, 42, 42, "VALID", name="pool_3")
    path.write_bytes(small.as_graph_def().SerializeToString())
    return path


def test_features_come_from_the_graph_after_its_own_resize(graph, tmp_path, photographs):
    features = inception.load(str(graph))
    actual = features(photographs[:4])
    assert actual.shape == (4, 7 * 7 * 3)
    resized = tf.image.resize(tf.cast(photographs[:4], tf.float32), (299, 299))
    expected = tf.nn.avg_pool2d((resized - 128.0) / 128.0, 42, 42, "VALID")
    np.testing.assert_allclose(actual, tf.reshape(expected, [4, -1]), rtol=1e-4, atol=1e-5)
    grey = features(photographs[:2, ..., :1])
    np.testing.assert_array_equal(grey.reshape(2, -1, 3)[..., 0], grey.reshape(2, -1, 3)[..., 2])
    with tarfile.open(tmp_path / "inception.tgz", "w:gz") as archive:
        archive.add(graph, f"somewhere/{graph.name}")
    np.testing.assert_array_equal(
        inception.load(str(tmp_path / "inception.tgz"))(photographs[:4]), actual
    )


@pytest.mark.slow
def test_features_of_the_port_are_pytorchs(photographs):
    """Weights drawn by name, and what a PyTorch network of pytorch-fid's layout makes of them."""
    with np.load(Path(__file__).parent / "features" / "inception.npz") as file:
        shapes, expected = json.loads(str(file["shapes"])), file["features"]

    def draw(key, shape):
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        if key.endswith("conv.weight"):
            return rng.standard_normal(shape, np.float32) * np.float32(
                np.sqrt(2 / np.prod(shape[1:]))
            )
        if key.endswith(("bn.weight", "running_var")):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)

    state = {key: draw(key, shape) for key, shape in shapes.items()}
    actual = inception.from_port(state)(photographs[:3])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * expected.max())
    del state["Mixed_7c.branch_pool.bn.bias"]
    with pytest.raises(UserError, match="Mixed_7c.branch_pool.bn.bias is missing"):
        inception.from_port(state)


def test_a_missing_or_wrong_network_says_what_to_fetch(tmp_path):
    (tmp_path / "wrong.pb").write_bytes(b"hello")
    (tmp_path / "other.pb").write_bytes(tf.Graph().as_graph_def().SerializeToString())
    (tmp_path / "wrong.pth").write_bytes(b"hello")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=f"{path.name}.*fetch http.*{inception.PORT}") as caught:
            inception.load(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="missing.pb: cannot be read"):
        inception.load(str(tmp_path / "missing.pb"))


def test_without_a_network_one_line_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(
        UserError, match="could not be downloaded .*; fetch http.* --inception"
    ) as e:
        inception.load(None)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.rglob("*.pth"))


def test_fid_from_the_command_line(run, graph, tmp_path, capsys):
    common = ["--checkpoint", str(run), "--inception", str(graph), "--output", str(tmp_path)]
    assert main([*common, "--eval_mode", "fid_stats"]) == 0
    statistics = fid.Statistics.load(tmp_path / "fid_stats.npz")
    assert statistics.features.shape == (1438, 147)
    evaluate = [
        *common,
        "--eval_mode",
        "evaluate_fid",
        "--fid_stats",
        str(tmp_path / "fid_stats.npz"),
    ]
    reports = []
    for arguments in (
        ["--temp", "1.0"],
        ["--temp", "0.1"],
        ["--temp", "1.0", "--batch_size", "30"],
    ):
        assert main([*evaluate, "--num_samples", "90", *arguments]) == 0
        reports.append(json.loads((tmp_path / "fid.json").read_text()))
    assert "FID" in capsys.readouterr().out
    one, cold, batched = reports
    assert one["fid"] > 0.0 and 0.0 <= one["precision"] <= 1.0
    assert (one["temperature"], cold["temperature"], one["num_samples"]) == (1.0, 0.1, 90)
    assert one["fid"] != cold["fid"]  # the temperature is used
    np.testing.assert_allclose(batched["fid"], one["fid"], rtol=1e-3)
    assert main([*common, "--eval_mode", "evaluate_fid"]) == 2
    assert "--fid_stats" in capsys.readouterr().err

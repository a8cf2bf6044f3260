"""Outlier scores that use the hierarchy, and the mode ``ood``."""

import csv
import json
import math
import os
import re
import shutil
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from nvae_tf.cli.evaluate import main
from nvae_tf.config import Config, ModelConfig
from nvae_tf.data.source import ArraySource, EvenlySpread
from nvae_tf.evaluation import likelihood, ood, ood_run, typicality
from nvae_tf.evaluation.loading import LoadedModel, load
from nvae_tf.evaluation.ood_metrics import separation
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError
from nvae_tf.layers.latent_group import FromPrior, Given
from nvae_tf.model import NVAE

CONFIG = ModelConfig(
    num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=3, ada_groups=False,
    num_channels_enc=8, num_channels_dec=8, num_preprocess_blocks=1, num_postprocess_blocks=1,
    num_preprocess_cells=1, num_postprocess_cells=1, res_dist=True, num_mixture_dec=2, num_nf=1,
)  # fmt: skip
GROUPS, DRAWS = 4, 3


@pytest.fixture(scope="module")
def model():
    return NVAE(CONFIG, ImageSpec(16, 16, 3))  # with a flow on every posterior


@pytest.fixture(scope="module")
def images(photographs):
    return photographs[:6, ::2, ::2].astype(np.float32) / np.float32(255.0)


def measured(model, batches, **options):
    settings = dict(num_draws=DRAWS, chunk=4, seed=1) | options
    return ood.measure(model, batches, sum(map(len, batches)), **settings)


def log_mean(weights):
    return np.logaddexp.reduce(np.array(weights, np.float64), 0) - math.log(len(weights))


def test_all_groups_from_the_posterior_are_the_full_bound(model, images):
    keys, result = ood.content_keys(images, range(DRAWS)), measured(model, [images])
    terms = [
        likelihood.draw_terms(
            model, model.bottom_up(images), images, model.draw_noise(keys[:, draw], (1, 0))
        )
        for draw in range(DRAWS)
    ]
    nelbo, log_weights = zip(*terms, strict=True)
    assert result.bounds.shape == (len(images), GROUPS + 1)
    np.testing.assert_allclose(result.bounds[:, 0], log_mean(log_weights), rtol=1e-5)
    np.testing.assert_allclose(result.nelbo, np.mean(nelbo, 0), rtol=1e-5)


def test_no_group_from_the_posterior_is_the_priors_likelihood(model, images):
    keys, result = ood.content_keys(images, range(DRAWS)), measured(model, [images])
    log_p_x = [
        model.log_likelihood(
            model.top_down(FromPrior(model.draw_noise(keys[:, draw], (1, 0)))).parameters, images
        )
        for draw in range(DRAWS)
    ]
    np.testing.assert_allclose(result.bounds[:, -1], log_mean(log_p_x), rtol=1e-5)


def test_in_between_only_the_coarse_groups_count(model, images):
    """One group from the posterior: its latents, with the others' prior noise, give L>3."""
    keys, result = ood.content_keys(images, [0]), measured(model, [images], num_draws=1)
    noise = model.draw_noise(keys[:, 0], (1, 0))
    top = model.encode(images, noise)[0]
    output = model.top_down(Given([top.z], FromPrior(noise)))
    expected = model.log_likelihood(output.parameters, images) + top.log_p - top.log_q
    np.testing.assert_allclose(result.bounds[:, GROUPS - 1], expected, rtol=1e-5)
    np.testing.assert_allclose(
        result.kl, tf.stack([latent.kl_per_image for latent in model.encode(images, noise)], 1),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_a_score_depends_on_image_seed_and_model_alone(model, images):
    together = ood.scores(model, measured(model, [images]))
    backwards = images[::-1]
    apart = ood.scores(
        model, measured(model, [backwards[:1], backwards[1:4], backwards[4:]], chunk=1)
    )
    other_seed = ood.scores(model, measured(model, [images], seed=2))
    for name, values in together.items():
        scale = np.abs(together["neg_log_p"]).max()
        np.testing.assert_allclose(values, apart[name][::-1], rtol=1e-5, atol=2e-6 * scale)
        assert name == "complexity" or not np.array_equal(values, other_seed[name])


def test_images_that_are_scored_can_be_left_out_of_the_fit():
    source = ArraySource(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1))
    scored = EvenlySpread(source, 4)
    rest = EvenlySpread(source, 4, scored.indices)
    assert scored.indices.tolist() == [0, 2, 5, 7] and rest.indices.tolist() == [1, 3, 6, 8]
    assert len(EvenlySpread(source, 4, range(10))) == 0


def test_scores_add_up(model, images):
    result = measured(model, [images])
    columns = ood.scores(model, result)
    assert ood.scale_boundaries(model) == [2, 4]
    np.testing.assert_allclose(columns["kl_scale_0"], result.kl[:, :2].sum(1))
    np.testing.assert_allclose(columns["kl_scale_1"], result.kl[:, 2:].sum(1))
    for k in range(1, GROUPS + 1):
        difference = columns[f"neg_l_gt_{k}"] - columns["neg_log_p"]
        np.testing.assert_allclose(columns[f"llr_gt_{k}"], difference, rtol=1e-6, atol=1e-6)
    bits = columns["neg_log_p"] / math.log(2.0)
    np.testing.assert_allclose(columns["complexity"], bits - result.compressed)


def test_smooth_images_compress_better_than_noise():
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)) / 255.0
    both = np.concatenate([np.full_like(noise, 0.5), noise])
    smooth, rough = ood.compressed_bits(both, ImageSpec(32, 32, 3), 8)
    assert smooth < 1500 and 8 * noise.size < rough < 8.5 * noise.size
    for spec, bits in (
        (ImageSpec(32, 32, 1, binary=True), 1),
        (ImageSpec(32, 32, 1, bits=12), 12),
        (ImageSpec(32, 32, 4), 8),
        (ImageSpec(32, 32, 1), 5),
    ):
        levels = 2**bits
        rough = np.random.default_rng(0).integers(0, levels, (1, *spec.shape)) / (levels - 1.0)
        empty, full = ood.compressed_bits(np.concatenate([0 * rough, rough]), spec, bits)
        assert empty < 0.3 * full and 0.95 * bits * rough.size < full < 2.1 * bits * rough.size


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_are_scikit_learns(ties):
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0, 1, 70), rng.normal(1, 2, 40)
    if ties:
        inside, outside = inside.round(), outside.round()
    labels, values = np.repeat([0, 1], [70, 40]), np.concatenate([inside, outside])
    results = separation(inside, outside, seed=0)
    false, true, _ = roc_curve(labels, values, drop_intermediate=False)
    assert results["auroc"][0] == pytest.approx(roc_auc_score(labels, values))
    assert results["aupr"][0] == pytest.approx(average_precision_score(labels, values))
    assert results["fpr95"][0] == pytest.approx(false[true >= 0.95].min())
    for value, low, high in results.values():
        assert low <= value <= high and low < high


def test_large_sets_are_resampled_in_parts():
    """A table of all bootstrap samples of these sets alone would take 64 MB, and there are several."""
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0, 1, 4000), rng.normal(1, 1, 4000)
    tracemalloc.start()
    value, low, high = separation(inside, outside, seed=0)["auroc"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert value == pytest.approx(roc_auc_score([0] * 4000 + [1] * 4000, [*inside, *outside]))
    assert low < value < high < low + 0.03
    assert peak < 100e6


def test_intervals_are_as_wide_as_the_areas_spread():
    """The standard deviation over fresh sets of images is that of a normal with this interval."""
    rng = np.random.default_rng(0)
    areas = [
        separation(rng.normal(0, 1, 100), rng.normal(1, 1, 100), seed)["auroc"]
        for seed in range(30)
    ]
    values, low, high = np.array(areas).T
    assert np.mean(high - low) / 3.92 == pytest.approx(values.std(), rel=0.5)


def test_typicality_has_two_tails():
    rng = np.random.default_rng(0)

    def measurements(shift):
        bounds = np.cumsum(rng.normal(-20 - shift, 2, (200, 4)), 1)
        kl = rng.normal(10 + shift, 1, (200, 3))
        return ood.Measurements(bounds, kl.sum(1) + rng.normal(50, 3, 200), kl, np.zeros(200))

    fit = typicality.fit(measurements(0))
    usual, above, below = (fit.score(measurements(shift)) for shift in (0, 8, -8))
    assert roc_auc_score([0] * 200 + [1] * 200, np.r_[usual, above]) > 0.95
    assert roc_auc_score([0] * 200 + [1] * 200, np.r_[usual, below]) > 0.95
    assert usual.mean() == pytest.approx(7, rel=0.15)  # one per measurement


def write_images(folder, images):
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def noise_folder(tmp_path_factory):
    noise = np.random.default_rng(0).integers(0, 2, (12, 28, 28), np.uint8) * 255
    return write_images(tmp_path_factory.mktemp("ood") / "noise", noise)


FEW = ["--num_iw_samples", "2", "--max_images", "40", "--fit_images", "30"]


def test_noise_is_untypical(run, noise_folder, tmp_path, capsys):
    flags = ["--checkpoint", str(run), "--eval_mode", "ood", "--output", str(tmp_path), *FEW]
    assert main([*flags, "--against", str(noise_folder)]) == 0
    report = json.loads((tmp_path / "ood.json").read_text())
    assert report["fit"] == {"set": "train", "count": 30}
    assert report["num_iw_samples"] == 2 and report["images"] == [
        {"set": "test", "count": 40},
        {"set": str(noise_folder), "count": 12},
    ]
    chosen = report["scores"][report["chosen"]["score"]]
    assert chosen["auroc"][0] > 0.95 and chosen["auroc"][1] <= chosen["auroc"][0]
    assert {"neg_log_p", "nelbo", "kl_scale_0", "llr_gt_1", "llr_gt_2", "complexity"} < set(
        report["scores"]
    )
    with (tmp_path / "ood.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 52 and {row["set"] for row in rows} == {"test", str(noise_folder)}
    assert rows[-1]["image"].endswith(".png") and float(rows[-1]["typicality"]) > 0
    assert Image.open(tmp_path / "ood.png").width > 500
    printed = capsys.readouterr().out
    assert "ood.json" in printed and "chosen" in printed


@pytest.mark.slow
def test_without_a_second_set_outliers_are_marked(run, noise_folder, tmp_path):
    flags = ["--checkpoint", str(run), "--eval_mode", "ood", *FEW]
    assert main([*flags, "--images", str(noise_folder), "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "ood.json").read_text())
    assert report["threshold"]["quantile"] == 0.95 and report["threshold"]["of"] == "test"
    with (tmp_path / "ood.csv").open() as file:
        rows = list(csv.DictReader(file))
    marks = [float(row["typicality"]) > report["threshold"]["value"] for row in rows]
    assert len(marks) == 12 and sum(marks) == report["outliers"] >= 10
    assert [int(row["outlier"]) for row in rows] == marks
    by_rank = sorted(rows, key=lambda row: int(row["rank"]))
    assert [int(row["rank"]) for row in by_rank] == list(range(1, 13))
    values = [float(row["typicality"]) for row in by_rank]
    assert values == sorted(values, reverse=True)


@pytest.mark.slow
def test_the_threshold_is_the_test_sets_also_for_training_images(run, tmp_path):
    flags = ["--checkpoint", str(run), "--eval_mode", "ood", *FEW]
    reports = []
    for name, more in (("test", []), ("train", ["--eval_on_train"])):
        assert main([*flags, *more, "--output", str(tmp_path / name)]) == 0
        reports.append(json.loads((tmp_path / name / "ood.json").read_text()))
        with (tmp_path / name / "ood.csv").open() as file:
            assert {row["set"] for row in csv.DictReader(file)} == {name}
    assert reports[0]["threshold"] == reports[1]["threshold"]
    assert reports[1]["threshold"]["of"] == "test"


def test_grey_files_are_binarised_by_their_content(run, tmp_path):
    """An image is the same to a binary model wherever it stands in its set, and in its folder."""
    grey = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    loaded = load(str(run))
    some, all_ = write_images(tmp_path / "a", grey[1:]), write_images(tmp_path / "b", grey)
    seen = [
        ood_run.files(loaded, [str(folder)], ood_run.Settings()).images for folder in (some, all_)
    ]
    np.testing.assert_array_equal(seen[0], seen[1][1:])
    assert set(np.unique(seen[1])) == {0.0, 1.0} and 0.3 < seen[1][:, 2:-2, 2:-2].mean() < 0.7
    assert not np.array_equal(seen[1][0], seen[1][1])
    other = ood_run.files(loaded, [str(some)], ood_run.Settings(seed=2)).images
    assert not np.array_equal(other, seen[0])


def test_typicality_does_not_depend_on_how_many_images_are_scored(run):
    loaded, fits = load(str(run)), []
    for count in (5, 20):
        settings = ood_run.Settings(num_draws=1, max_images=count, fit_images=10)
        fits.append(ood_run.fit(loaded, settings))
    np.testing.assert_array_equal(fits[0].mean, fits[1].mean)
    assert fits[0].num_images == fits[1].num_images == 10


def test_a_data_set_has_the_models_size_where_it_can(tmp_path):
    """`photos` has images of 32x32 and of 64x64."""
    large = LoadedModel(NVAE(CONFIG, ImageSpec(64, 64, 3)), Config(), 0, tmp_path)
    settings = ood_run.Settings(max_images=2)
    assert ood_run.against(large, "photos", settings).images.shape == (2, 64, 64, 3)


def test_the_extremes_are_sorted(run):
    settings = ood_run.Settings(num_draws=1, max_images=30, fit_images=30)
    loaded = load(str(run))
    test = ood_run.split(loaded, False, settings)
    scored = ood_run.score(loaded, test, settings, ood_run.fit(loaded, settings))
    ends = ood_run.extremes(scored, 4)
    assert ends.typical.shape == ends.untypical.shape == (4, 32, 32, 1)
    values = scored.scores["typicality"]
    np.testing.assert_array_equal(ends.typical_scores, np.sort(values)[:4])
    np.testing.assert_array_equal(ends.untypical_scores, np.sort(values)[::-1][:4])


def test_a_name_that_is_not_text_is_written_with_backslashes(run, noise_folder, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, image in zip((b"/a\xff.png", b"/b.png"), noise_folder.iterdir(), strict=False):
        shutil.copy(image, os.fsencode(folder) + name)
    arguments = ["--checkpoint", str(run), "--eval_mode", "ood", "--images", str(folder)]
    numbers = ["--num_iw_samples", "1", "--max_images", "4", "--fit_images", "20"]
    assert main([*arguments, *numbers, "--output", str(tmp_path / "out")]) == 0
    assert "a\\udcff.png" in (tmp_path / "out" / "ood.csv").read_text()


def test_mistakes_are_one_line(run, noise_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    small = write_images(tmp_path / "small", np.zeros((1, 8, 8), np.uint8))
    loaded = load(str(run))
    for message, name in {
        "no such folder or data set": "nowhere",
        "nowhere/near: no such folder": "nowhere/near",
        "no image files here": str(tmp_path / "empty"),
        "smaller than 28x28": str(small),
        "its images are 8-bit 32x32x3; the model's are binary 32x32x1": "photos",
        "no such folder or data set; name a folder of images, or one of digits, mnist, omniglot (with "
        "--against_data)": "",
        "omniglot needs --against_data": "omniglot",
        "its images are 8-bit 64x64x3": "celeba_64",
        "lsun_church_64: its images": "lsun_church_64",
        "tfrecords needs --against_data": "tfrecords",
        "images: has a value range of its own; name the folder: --against DIR": "images",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            ood_run.against(loaded, name, ood_run.Settings())
        assert "\n" not in str(caught.value)
    for message, flags in {
        "do not go together": ["--against", "mnist", "--images", str(noise_folder)],
        "nowhere: no such folder or data set": ["--against", "nowhere"],
        "nowhere: no such data set": ["--against", "nowhere", "--against_data", str(tmp_path)],
        "a data set that --against names": ["--against_data", str(tmp_path)],
    }.items():
        folder = tmp_path / "output"
        arguments = ["--checkpoint", str(run), "--eval_mode", "ood", "--output", str(folder)]
        assert main([*arguments, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not list(folder.glob("*"))

"""The latent API and the modes that show latents."""

import dataclasses
import importlib
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from nvae_tf.cli.evaluate import main
from nvae_tf.config import ModelConfig
from nvae_tf.evaluation import latents, likelihood
from nvae_tf.image_spec import ImageSpec
from nvae_tf.layers.latent_group import FromPrior
from nvae_tf.model import NVAE

DOCS = Path(__file__).parent.parent / "docs"

CONFIG = ModelConfig(
    num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=3, ada_groups=True,
    num_channels_enc=8, num_channels_dec=8, num_preprocess_blocks=1, num_postprocess_blocks=1,
    num_preprocess_cells=1, num_postprocess_cells=1, res_dist=True, num_mixture_dec=2, num_nf=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return NVAE(CONFIG, ImageSpec(16, 16, 3))


@pytest.fixture(scope="module")
def images(photographs):
    return tf.constant(photographs[:3, ::2, ::2].astype(np.float32) / 255.0)


def test_decoding_what_was_encoded_is_the_reconstruction(model, images):
    for noise in (None, model.draw_noise(3, (1, 0))):
        encoded = model.encode(images, noise)
        decoded = model.decode([latent.z for latent in encoded], seed=(5, 0))
        np.testing.assert_array_equal(decoded, model.reconstruct(images, noise, seed=(5, 0)))
        assert [latent.z.shape for latent in encoded] == [(3, *s) for s in model.latent_shapes]
    for latent in encoded:
        assert latent.mean.shape == latent.stddev.shape == latent.kl.shape == latent.z.shape
        assert latent.kl_per_image.shape == (3,) and np.all(latent.stddev > 0.0)
    plain = NVAE(dataclasses.replace(CONFIG, num_nf=0), ImageSpec(16, 16, 3))
    for latent in plain.encode(images):  # without flows, no noise means the posterior's mean
        np.testing.assert_array_equal(latent.z, latent.mean)


def test_given_groups_are_left_alone(model, images):
    top = [model.encode(images)[0].z]
    one, other = (model.sample(3, latents=top, seed=(seed, 0)) for seed in (1, 2))
    assert np.abs(one - other).max() > 1e-3
    everything = [latent.z for latent in model.encode(images)]
    one, other = (model.sample(3, latents=everything, temperature=0.5, seed=(1, s)) for s in (0, 0))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(
        model.render(model.top_down(FromPrior(model.draw_noise(3, (1, 0)))).parameters),
        model.decode([z.z for z in model.top_down(FromPrior(model.draw_noise(3, (1, 0)))).latents]),
        atol=1e-6,
    )


def test_a_sample_depends_on_its_index_not_on_its_batch(model):
    draw = tf.function(lambda indices: model.sample(indices, 0.9, seed=(4, 0)), autograph=False)
    batch, part = draw(tf.range(6)), draw(tf.constant([4, 1]))
    np.testing.assert_allclose(part, tf.gather(batch, [4, 1]), atol=1e-5)


def test_the_temperature_zero_leaves_nothing_to_chance(model):
    cold = [model.top_down(FromPrior(model.draw_noise(2, (s, 0)), 0.0)).parameters for s in (1, 2)]
    np.testing.assert_array_equal(*cold)
    only_top = [1.0] + [0.0] * (len(model.groups) - 1)
    one, other = (
        model.top_down(FromPrior(model.draw_noise(2, (s, 0)), only_top)).latents for s in (1, 2)
    )
    assert np.abs(one[0].z - other[0].z).max() > 0.1


def test_the_prior_draws_encoded_latents_from_their_noise(model, images):
    noise = latents.prior_noise(model, images)
    drawn = model.top_down(FromPrior(noise)).latents
    for latent, encoded in zip(drawn, model.encode(images), strict=True):
        np.testing.assert_allclose(latent.z, encoded.z, atol=1e-4)


def test_results_do_not_depend_on_the_batch_size(model, images):
    whole, parts = (latents.reconstruct(model, images, 3, size) for size in (100, 1))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    noise, again = (latents.prior_noise(model, images, size) for size in (100, 1))
    for one, other in zip(noise, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_interpolations_begin_and_end_at_their_images(model, images):
    noise = latents.prior_noise(model, images)
    start, end = [n[:1] for n in noise], [n[1:2] for n in noise]
    rows = latents.interpolate(model, start, end, steps=5)
    assert rows.shape == (1, 5, 16, 16, 3)
    expected = model.reconstruct(images)
    np.testing.assert_allclose(rows[0, 0], expected[0], atol=1e-4)
    np.testing.assert_allclose(rows[0, -1], expected[1], atol=1e-4)
    same = latents.interpolate(model, start, start, steps=3)
    np.testing.assert_allclose(same[0, 1], same[0, 0], atol=1e-4)


def test_traversals_change_one_group(model):
    noise = model.draw_noise(2, (3, 0))
    rows = latents.traverse(model, noise, [0, 2], steps=4, temperature=1.0, seed=3)
    assert rows.shape == (2, 2, 4, 16, 16, 3)
    starts = model.render(model.top_down(FromPrior(noise)).parameters)
    opposite = [noise[0], noise[1], -noise[2], *noise[3:]]
    ends = model.render(model.top_down(FromPrior(opposite)).parameters)
    for image_rows, start, end in zip(rows, starts, ends, strict=True):
        for row in image_rows:
            np.testing.assert_allclose(row[0], start, atol=1e-5)
            assert np.abs(row[1:] - row[0]).max() > 1e-4
        np.testing.assert_allclose(image_rows[1, -1], end, atol=1e-4)
    assert latents.influence(model, 4, 1.0, seed=1).shape == (len(model.groups),)


@pytest.mark.parametrize("num_flows", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_kl_of_the_groups_adds_up_to_that_of_the_nelbo(images, num_flows):
    model = NVAE(dataclasses.replace(CONFIG, num_nf=num_flows), ImageSpec(16, 16, 3))
    for layer in model.submodules:  # far from the start, where the posteriors are nearly the priors
        if hasattr(layer, "posterior_sampler"):
            layer.posterior_sampler.bias.assign(tf.fill(layer.posterior_sampler.bias.shape, 0.7))
    batches = list(latents.encode_batches(model, [images[:2], images[2:]], [0], seed=5))
    kl = np.concatenate([batch.kl for batch in batches])
    assert kl.shape == (3, len(model.groups))
    # The same noise as that of the images' first draw in an evaluation.
    noise = model.draw_noise(3, (5, 0))
    nelbo, _ = likelihood.draw_terms(model, model.bottom_up(images), images, noise)
    recon = -model.log_likelihood(model(images, noise).parameters, images)
    np.testing.assert_allclose(kl.sum(1), nelbo - recon, rtol=1e-4)
    shown = latents.reconstruct(model, images, seed=5)  # as in the gallery, beside the bars
    np.testing.assert_allclose(shown.nelbo, kl.sum(1) + recon, rtol=1e-4)
    at_means = model.encode(images)
    assert np.abs(kl.sum(1) / sum(latent.kl_per_image for latent in at_means) - 1.0).max() > 1e-3
    for batch, part in zip(batches, (slice(0, 2), slice(2, 3)), strict=True):
        for name in ("z", "mean", "stddev"):  # but these are where the means lead to
            np.testing.assert_allclose(
                getattr(batch, name)[0], getattr(at_means[0], name)[part], atol=1e-5
            )


@pytest.fixture
def command(run, tmp_path):
    def call(mode, *arguments):
        line = ["--checkpoint", run, "--output", tmp_path / "out", "--eval_mode", mode, *arguments]
        assert main(list(map(str, line))) == 0
        return tmp_path / "out"

    return call


def test_reconstructions_are_shown_and_scored(command, run, tmp_path, capsys):
    Image.new("RGB", (60, 40), "black").save(tmp_path / "black.png")
    output = command("reconstruct", "--images", tmp_path / "black.png")
    (entry,) = json.loads((output / "reconstruct.json").read_text())
    assert entry["image"].endswith("black.png") and entry["mse"] < 0.3 and entry["nelbo"] > 0.0
    output = command("reconstruct", "--indices", 7, 2)
    entries = json.loads((output / "reconstruct.json").read_text())
    assert [entry["image"] for entry in entries] == ["test 7", "test 2"]
    assert Image.open(output / "reconstruct.png").width > 2 * 2 * 32
    assert "nelbo" in capsys.readouterr().out


def test_interpolations_and_traversals_are_written(command):
    output = command("interpolate", "--num_samples", 2, "--steps", 3, "--animation", "webp")
    assert Image.open(output / "interpolate.webp").n_frames == 4  # there and back
    assert Image.open(output / "interpolate.png").height > 2 * 64
    output = command("interpolate", "--indices", 0, 1, "--steps", 4)
    assert Image.open(output / "interpolate.gif").n_frames == 6
    output = command("traverse", "--groups", 1, "--steps", 3)
    assert 64 < Image.open(output / "traverse.png").height < 3 * 64  # a row, and a title
    assert len(json.loads((output / "traverse.json").read_text())) == 2
    output = command("traverse", "--indices", 3, 8, "--steps", 2)  # as many as steps
    assert Image.open(output / "traverse.png").height > 2 * 2 * 64


def test_a_data_set_and_a_folder_are_encoded(command, tmp_path):
    with np.load(command("encode", "--groups", 1, "--batch_size", 64) / "latents.npz") as file:
        assert file["mean_01"].shape == file["z_01"].shape == (359, 8, 8, 4)
        assert file["kl"].shape == (359, 2) and set(file["labels"]) == set(range(10))
        assert "mean_00" not in file.files
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.jpg"):
        Image.fromarray(np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3)).save(
            folder / name
        )
    with np.load(command("encode", "--images", folder) / "latents.npz") as file:
        assert [name.rpartition("/")[2] for name in file["names"]] == ["a.jpg", "b.png"]
        assert file["mean_00"].shape == (2, 8, 8, 4)


@pytest.mark.slow
def test_the_tables_of_the_page_can_be_written_again(run, command, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    script = runpy.run_path(str(DOCS / "make_latents_table.py"))
    filled = importlib.import_module("markdown_tables").filled
    page = (DOCS / "latents.md").read_text(encoding="utf-8")
    tables = script["tables"](str(run))
    groups, points = ([line.strip("| ").split(" | ") for line in table[2:]] for table in tables)
    assert [row[:2] for row in groups[:2]] == [["0", "8x8x4"], ["1", "8x8x4"]]
    with np.load(command("encode", "--seed", 1) / "latents.npz") as file:
        kl = file["kl"].mean(0)
    shown = [float(row[-1].removesuffix(" nats")) for row in groups]
    np.testing.assert_allclose(shown, [*kl, kl.sum()], atol=0.006)
    assert [row[0] for row in points][0] == "groups 0, 1" and len(points) == 3
    assert all(0.0 <= float(value) <= 1.0 for row in points for value in row[1:])
    # The page has these tables, and with them filled in its other lines are as they were.
    new = filled(page, tables)
    assert all("\n".join(table) in new for table in tables)
    prose = [line for line in page.split("\n") if not line.startswith("|")]
    assert [line for line in new.split("\n") if not line.startswith("|")] == prose


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval_mode", "encode", "--groups", "2"], "no group 2; there are 2"),
        (["--eval_mode", "reconstruct", "--indices", "359"], "no image 359; there are 359"),
        (["--eval_mode", "interpolate", "--indices", "1"], "an even number"),
        (["--eval_mode", "reconstruct", "--images", "/nowhere.png"], "/nowhere.png"),
        (["--eval_mode", "encode", "--images", __file__], "not a readable image"),
        (
            [
                "--eval_mode",
                "interpolate",
                "--num_samples",
                "1200",
                "--animation",
                "webp",
                "--steps=2",
            ],
            "interpolate.webp: frames of",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, run, tmp_path, capsys):
    common = ["--checkpoint", str(run), "--output", str(tmp_path / "out")]
    assert main([*common, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.glob("out/*"))

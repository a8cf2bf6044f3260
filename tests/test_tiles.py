"""Images larger than those of training: on an image of the model's size nothing is new."""

import numpy as np
import pytest
import tifffile
from PIL import Image
from sklearn.datasets import load_sample_image

import nvae_tf
from nvae_tf.cli.evaluate import main
from nvae_tf.data.whole_image import read_whole
from nvae_tf.evaluation import latents, tiles
from nvae_tf.io.errors import UserError

TINY = dict(
    num_latent_scales=1, num_groups_per_scale=2, num_latent_per_group=4, num_channels_enc=8,
    num_channels_dec=8, num_preprocess_blocks=1, num_postprocess_blocks=1, num_preprocess_cells=1,
    num_postprocess_cells=1, num_mixture_dec=2, res_dist=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def photograph():
    """A photograph of 8 bits, (427, 640, 3)."""
    return load_sample_image("china.jpg")


@pytest.fixture(scope="module")
def run(photograph, tmp_path_factory):
    """A small model of crops of 16x24 (width x height) of the photograph, as a run's folder."""
    rows, columns = np.mgrid[0:400:24, 0:620:8]
    crops = [
        photograph[r : r + 24, c : c + 16] for r, c in zip(rows.flat, columns.flat, strict=True)
    ]
    train = np.stack(crops)
    folder = tmp_path_factory.mktemp("tiles") / "run"
    nvae_tf.train(
        "photos", (train, train[::40]), folder=folder, epochs=2, batch_size=64, warmup_epochs=0,
        jit_compile="off", **TINY,
    )  # fmt: skip
    return folder


def test_an_image_of_the_models_size_is_scored_as_usual(run, photograph):
    model = nvae_tf.load(run)
    image = photograph[100:124, 50:66].astype(np.float32) / 255.0
    result = tiles.score(model, image, seed=4, groups=[1])
    encoded = model(image[None], model.draw_noise(1, (4, 0)))
    np.testing.assert_allclose(result.z[0], encoded.latents[1].z, rtol=1e-4, atol=1e-5)
    usual = latents.reconstruct(model, image[None], seed=4)
    np.testing.assert_allclose(result.reconstruction, usual.images[0], atol=1e-5)
    total = result.neg_log_likelihood.sum() + result.kl.sum()
    np.testing.assert_allclose(total, usual.nelbo[0], rtol=1e-4)
    np.testing.assert_allclose(result.bits.mean(), model.bits_per_dim(usual.nelbo[0]), rtol=1e-4)
    assert result.kl.shape == (1, 2) and result.positions.tolist() == [[0, 0]]


def test_padded_images_are_scored_without_their_padding():
    spec = nvae_tf.ImageSpec(32, 32, 1, bits=5, scored_size=(28, 28))
    model = nvae_tf.NVAE(image=spec, **TINY)
    grey = np.round(load_sample_image("flower.jpg")[:28, :28, :1] * (31 / 255)) / 31
    grey = grey.astype(np.float32)
    result = tiles.score(model, grey)
    usual = latents.reconstruct(model, np.pad(grey, [(2, 2), (2, 2), (0, 0)])[None], seed=1)
    np.testing.assert_allclose(result.bits.mean(), model.bits_per_dim(usual.nelbo[0]), rtol=1e-4)
    assert result.reconstruction.shape == (28, 28, 1)


def test_noise_in_a_corner_stands_out_on_a_map_of_the_images_size(run, photograph):
    model, image = nvae_tf.load(run), photograph[:101, :150].copy()
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3))
    image[-30:, -40:] = noise
    result = tiles.score(model, image.astype(np.float32) / 255.0, batch_size=32)
    assert result.bits.shape == result.neg_log_likelihood.shape == (101, 150)
    assert result.reconstruction.shape == (101, 150, 3)
    rows, columns = result.positions.T
    assert rows.max() == 101 - 24 and columns.max() == 150 - 16
    inside, outside = result.bits[-25:, -35:], result.bits[:60, :100]
    assert inside.mean() > outside.mean() + 1.0
    assert np.percentile(inside, 10) > np.percentile(outside, 90)


def test_the_command_writes_a_picture_and_arrays(run, photograph, tmp_path, capsys):
    Image.fromarray(photograph[:40, :50]).save(tmp_path / "image.png")
    line = ["--checkpoint", run, "--eval_mode", "tiles", "--output", tmp_path / "out"]
    line += ["--images", tmp_path / "image.png", "--stride", 16, "--groups", 1]
    assert main(list(map(str, line))) == 0
    assert "50x40, 8 tiles" in capsys.readouterr().out
    with np.load(tmp_path / "out" / "tiles_image.npz") as file:
        assert file["bits"].shape == (40, 50) and file["kl"].shape == (8, 2)
        assert file["reconstruction"].dtype == np.uint8
        assert len(file["z_01"]) == 8 and "z_00" not in file
    assert Image.open(tmp_path / "out" / "tiles_image.png").width >= 3 * 50


def test_mistakes_are_one_line(run, photograph, tmp_path, capsys):
    Image.fromarray(photograph[:23, :50]).save(tmp_path / "small.png")
    common = ["--checkpoint", str(run), "--eval_mode", "tiles", "--output", str(tmp_path / "out")]
    Image.fromarray(photograph[:24, :50]).save(tmp_path / "good.png")
    good = ["--images", str(tmp_path / "good.png")]
    np.save(tmp_path / "many.npy", np.stack([photograph[:64, :64]] * 3))
    small = [*good, str(tmp_path / "small.png")]
    for arguments, message in (
        (small, "small.png: image: 50x23 pixels are fewer than a tile of 16x24"),
        ([*good, str(tmp_path)], "is a folder; tiles needs the image files"),
        ([], "tiles needs --images"),
        (["--images", str(tmp_path / "many.npy")], "many.npy: holds several images; name files of"),
    ):
        assert main([*common, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list((tmp_path / "out").iterdir())  # not even what the good image gives
    model = nvae_tf.NVAE(image=(24, 16, 3), **TINY)
    with pytest.raises(UserError, match="stride: 17 is not allowed; expected 1 to 16"):
        tiles.score(model, np.zeros((30, 30, 3), np.float32), stride=17)
    for image, options, message in (
        ("x", {}, "image: 'x' is not allowed; expected an array"),
        (np.full((30, 30, 3), 200.0), {}, "image: values from 200 to 200; expected floats in"),
        (np.full((30, 30, 3), np.nan), {}, "image: values from nan to nan"),
        (np.zeros((30, 30, 3)), dict(stride=8.5), "stride: 8.5 is not allowed"),
        (np.zeros((30, 30, 3)), dict(batch_size=0), "batch_size: 0 is not allowed"),
        (np.zeros((30, 30, 3)), dict(groups=[9]), "groups: .9. is not allowed"),
    ):
        with pytest.raises(UserError, match=message):
            tiles.score(model, image, **options)


def test_a_scan_of_twelve_bits_is_read_as_the_model_sees_it(tmp_path):
    spec = nvae_tf.ImageSpec(24, 16, 1, bits=12)
    grey = (load_sample_image("flower.jpg")[:60, :70, 1].astype(np.uint16) << 4) + 5
    tifffile.imwrite(tmp_path / "scan.tiff", grey)
    Image.fromarray(load_sample_image("flower.jpg")[:60, :70]).save(tmp_path / "colour.png")
    levels = read_whole(tmp_path / "scan.tiff", spec)
    np.testing.assert_array_equal(levels[..., 0], grey)
    assert read_whole(tmp_path / "colour.png", spec).shape == (60, 70, 1)

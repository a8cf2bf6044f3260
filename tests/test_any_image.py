"""Images that are not square, grey, of many channels or many bits, from training to the gallery."""

import json
import re

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_sample_image

import nvae_tf
from nvae_tf.cli.evaluate import main
from nvae_tf.cli.gallery import main as gallery
from nvae_tf.evaluation import likelihood
from nvae_tf.io.errors import UserError

TINY = dict(
    num_latent_scales=2, num_groups_per_scale=1, num_latent_per_group=2, num_channels_enc=4,
    num_channels_dec=4, num_preprocess_blocks=1, num_postprocess_blocks=1, num_preprocess_cells=1,
    num_postprocess_cells=1, num_mixture_dec=2, res_dist=True,
)  # fmt: skip
SPECS = {
    "12 bits": nvae_tf.ImageSpec(24, 16, 1, bits=12, value_range=(0, 4095)),
    "4 channels": nvae_tf.ImageSpec(16, 16, 4),
    "16 bits": nvae_tf.ImageSpec(16, 24, 3, bits=16),
}


def crops(spec, count=72):
    """Crops of a photograph as levels; channels beyond the third and bits beyond the eighth are brought
    in by shifted copies, so that every level may occur."""
    image = load_sample_image("china.jpg").astype(np.float64)
    shifted = np.roll(image, 3, (0, 1)) / 256.0
    image = np.concatenate([image, image[..., ::-1]], -1)[..., : spec.channels]
    shifted = np.concatenate([shifted, shifted], -1)[..., : spec.channels]
    levels = np.floor((image + shifted) / 256.0 * 2**spec.bits)
    rows, columns = (side - size for side, size in zip(image.shape, spec.shape[:2], strict=False))
    places = [(31 * n % rows, 47 * n % columns) for n in range(count)]
    images = np.stack([levels[r : r + spec.height, c : c + spec.width] for r, c in places])
    return images.astype(np.uint8 if spec.bits <= 8 else np.uint16)


@pytest.fixture(
    scope="module",
    params=[
        "16 bits",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("12 bits", "4 channels")),
    ],
)
def trained(request, tmp_path_factory):
    """A description of images, and the folder of a run on them."""
    spec = SPECS[request.param]
    images, folder = crops(spec), tmp_path_factory.mktemp("any") / "run"
    results = nvae_tf.train(
        "digits", (images[:64], images[64:]), folder=folder, image=spec, epochs=1, batch_size=16,
        jit_compile="off", **TINY,
    )  # fmt: skip
    assert 0.0 < results["bpd"] < 1.5 * spec.bits
    return spec, folder


@pytest.fixture
def command(trained, tmp_path, capsys):
    def call(mode, *arguments):
        line = ["--checkpoint", trained[1], "--output", tmp_path, "--eval_mode", mode, *arguments]
        assert main(list(map(str, line))) == 0
        return capsys.readouterr().out

    return call


def assert_holds(path, columns, rows, spec):
    """That a picture has room for so many enlarged images, and not for more rows."""
    times = -(-64 // spec.width)
    with Image.open(path) as picture:
        assert picture.mode == "RGB" and picture.width >= columns * times * spec.width
        assert rows * times * spec.height <= picture.height < (rows + 3) * times * (spec.height + 8)


def test_training_leaves_pictures_and_the_description(trained):
    spec, folder = trained
    assert_holds(folder / "samples.png", 10, 8, spec)
    assert_holds(folder / "reconstructions.png", 8, 2, spec)
    assert nvae_tf.load(folder).image == spec


def test_samples_are_files_of_stored_values(trained, command, tmp_path):
    spec, _ = trained
    options = ("--num_samples", 4, "--seed", 3)
    command("sample", *options, "--format", "npz")
    with np.load(tmp_path / "samples_1.npz") as file:
        levels, value_range = file["images"], file["value_range"]
    last = 2**spec.bits - 1
    assert levels.shape == (4, *spec.shape)
    assert levels.dtype == (np.uint8 if spec.bits == 8 else np.uint16)
    assert value_range.tolist() == [0, last] and last // 4 < levels.max() <= last
    command("sample", *options, "--format", "png")
    files = sorted((tmp_path / "samples_1").iterdir())
    dtype = tf.uint8 if spec.bits == 8 else tf.uint16
    read = [tf.io.decode_png(path.read_bytes(), dtype=dtype).numpy() for path in files]
    np.testing.assert_array_equal(np.stack(read), levels)
    assert_holds(tmp_path / "samples_1.png", 4, 1, spec)


def test_interpolations_and_traversals_are_pictures(trained, command, tmp_path):
    spec, _ = trained
    command("interpolate", "--steps", 3)
    assert_holds(tmp_path / "interpolate.png", 3, 1, spec)
    assert Image.open(tmp_path / "interpolate.gif").n_frames == 4
    command("traverse", "--steps", 4, "--groups", 0, 1)
    assert_holds(tmp_path / "traverse.png", 4, 2, spec)


def test_photographs_are_reconstructed(trained):
    from nvae_tf.evaluation import latents, stored_images
    from nvae_tf.io.labelled_grid import labelled_grid, reconstruction_bands

    spec, folder = trained
    model = nvae_tf.load(folder)
    images = stored_images.from_levels(crops(spec)[64:], spec)
    results = latents.reconstruct(model, images, seed=1)
    assert results.images.shape == images.shape and np.all(results.mse < 0.3)
    model.compile()
    scores = model.evaluate(images, verbose=0)
    assert scores["nelbo"] == pytest.approx(results.nelbo.mean(), rel=0.2)
    bands = reconstruction_bands(images, results.images, 4, [["nats"]] * len(images))
    picture = labelled_grid(bands, 4)
    assert picture.shape[0] > 2 * spec.height and picture.shape[2] == 3


def test_exports_compute_what_the_model_computes(trained, command, tmp_path):
    spec, folder = trained
    command("export")
    export = tf.saved_model.load(str(tmp_path / "1")).signatures
    scalars = dict(batch_size=tf.constant(3), temperature=tf.constant(1.0), seed=tf.constant(3))
    images, model = export["sample"](**scalars)["images"].numpy(), nvae_tf.load(folder)
    expected = model.sample(3, seed=3).numpy()
    assert images.shape == (3, *spec.shape)
    np.testing.assert_allclose(images, expected, atol=1e-4)
    reconstructed = export["reconstruct"](tf.constant(expected))["reconstructions"].numpy()
    np.testing.assert_allclose(reconstructed, model.reconstruct(expected), atol=1e-4)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    channels = "1 channel" if spec.channels == 1 else f"{spec.channels} channels"
    assert f"{spec.width}x{spec.height} (width x height), {channels}, {spec.bits}-bit" in card
    assert f"{spec.bits}-bit, values 0 to {2**spec.bits - 1:,}" in card
    exact = spec.channels != 3 or spec.bits > 8
    assert f"| likelihood of pixels | {'exact' if exact else 'official'} |" in card


def test_the_gallery_shows_them(trained, tmp_path):
    spec, folder = trained
    assert gallery([str(folder), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert text.count("<img") >= 6  # samples at 5 temperatures, and traversals
    assert f"{spec.width}x{spec.height} (width x height)" in text


@pytest.mark.slow
def test_fid_is_for_grey_and_colour(tmp_path, capsys):
    images = crops(SPECS["4 channels"], 8)
    nvae_tf.train(
        "digits", (images[:4], images[4:]), folder=tmp_path / "run", epochs=1, batch_size=4,
        warmup_epochs=0, jit_compile="off", **TINY,
    )  # fmt: skip
    line = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path)]
    assert main([*line, "--eval_mode", "fid_stats"]) == 2
    error = capsys.readouterr().err
    assert "FID: is not defined for images of 4 channels" in error and error.count("\n") == 1


@pytest.mark.slow
def test_fit_takes_wide_images_of_four_channels():
    model = nvae_tf.NVAE(image=(64, 96, 4), **TINY)
    spec = nvae_tf.ImageSpec(64, 96, 4)
    images = crops(spec, 16).astype(np.float32) / 255.0
    model.compile(jit_compile="off")
    history = model.fit(images, batch_size=8, epochs=1, verbose=0)
    assert np.isfinite(history.history["nelbo"]).all()
    assert model.sample(2).shape == (2, 64, 96, 4)


@pytest.mark.slow
def test_fit_and_evaluate_take_floats_of_any_precision():
    spec = nvae_tf.ImageSpec(16, 16, 3)
    model = nvae_tf.NVAE(image=spec, **TINY)
    model.compile(jit_compile="off")
    images = crops(spec, 8) / 255.0
    assert images.dtype == np.float64
    expected = model.evaluate(images.astype(np.float32), verbose=0)
    for given in (images, tf.constant(images)):
        assert model.evaluate(given, verbose=0) == expected
        assert (
            model.evaluate(tf.data.Dataset.from_tensor_slices(given).batch(8), verbose=0)
            == expected
        )
        assert model.predict(given, verbose=0).dtype == np.float32
    model.train_on_batch(tf.constant(images))
    history = model.fit(tf.data.Dataset.from_tensor_slices(images).batch(4), verbose=0).history
    assert np.isfinite(history["nelbo"]).all()


@pytest.mark.slow
def test_fit_takes_every_level_of_sixteen_bits():
    model = nvae_tf.NVAE(image=nvae_tf.ImageSpec(16, 16, 1, bits=16), **TINY)
    model.compile(jit_compile="off")
    # 256 images hold each of the 65,536 levels once.
    images = (np.arange(2**16) / (2**16 - 1)).astype(np.float32).reshape(256, 16, 16, 1)
    model.fit(images, batch_size=128, epochs=1, verbose=0)
    with pytest.raises(UserError, match="values between levels; expected multiples of 1/65535"):
        model.fit(images + 0.3 / 65535, batch_size=128, epochs=1, verbose=0)
    with pytest.raises(UserError, match="floats in \\[0, 1\\], 16-bit values divided by 65535"):
        model.fit(images * 65535, batch_size=128, epochs=1, verbose=0)


@pytest.mark.parametrize(
    ("dtype", "image", "message"),
    [
        (np.uint16, None, "images of uint16 do not say how many bits"),
        (
            np.uint16,
            nvae_tf.ImageSpec(24, 16, 1, bits=10),
            "training images have values up to 4\\d\\d\\d; expected levels from 0 to 1023",
        ),
        (np.float32, SPECS["12 bits"], "images float32 .* expected levels, uint8"),
    ],
)
def test_arrays_that_do_not_fit_are_one_line(dtype, image, message, tmp_path):
    images = crops(SPECS["12 bits"], 4).astype(dtype)
    with pytest.raises(UserError, match=message) as error:
        nvae_tf.train("digits", (images, images), folder=tmp_path / "run", image=image, **TINY)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_both_likelihoods_differ_where_level_254_occurs():
    model = nvae_tf.NVAE(image=(16, 16, 3), **TINY)
    rng = np.random.default_rng(0)
    images = crops(nvae_tf.ImageSpec(16, 16, 3), 8).clip(0, 253)
    bright = images.copy()
    bright[rng.random(bright.shape) < 0.2] = 254
    options = dict(num_draws=3, chunk=2, seed=1)
    kinds = likelihood.kinds_of(model, "both")
    assert kinds == ["official", "exact"]
    for given, same in ((images, True), (bright, False)):
        batches = [(given / 255.0).astype(np.float32)]
        both = likelihood.evaluate_kinds(model, batches, 8, kinds, **options)
        alone = likelihood.evaluate(model, batches, 8, **options)
        np.testing.assert_array_equal(both["official"].nelbo, alone.nelbo)
        official, exact = both["official"], both["exact"]
        for one, other in zip(official, exact, strict=True):
            if same:
                np.testing.assert_allclose(one, other, rtol=1e-5)
            else:  # officially level 254 has the mass of 255, too
                assert np.all(one < other - 1.0)


@pytest.mark.slow
def test_evaluation_says_which_likelihood_it_reports(tmp_path, capsys):
    pytest.importorskip("skimage")
    folder = tmp_path / "run"
    nvae_tf.train(
        "photos",
        folder=folder,
        epochs=1,
        warmup_epochs=0,
        batch_size=400,
        jit_compile="off",
        **TINY,
    )
    line = ["--checkpoint", str(folder), "--num_iw_samples", "1", "--likelihood"]
    assert main([*line, "both"]) == 0
    assert re.findall("likelihood: (.*)", capsys.readouterr().out) == ["official", "exact"]
    report = json.loads((folder / "evaluate.json").read_text())
    assert report["likelihood"] == "official"
    official, exact = report["bpd_nelbo"]["mean"], report["exact"]["bpd_nelbo"]["mean"]
    assert official == pytest.approx(exact, rel=0.01) and official != exact
    assert main(["--checkpoint", str(folder), "--eval_mode", "card"]) == 0
    card = (folder / "MODEL_CARD.md").read_text()
    nelbo = report["exact"]["nelbo"]
    mean, error = nelbo["mean"], nelbo["standard_error"]
    assert f"| NELBO, exact | {mean:.2f} ± {error:.2f} nats" in card


def test_likelihoods_that_images_do_not_have_are_one_line():
    binary = nvae_tf.NVAE(image=(16, 16, 1), binary=True, **TINY)
    with pytest.raises(UserError, match="both is not allowed for binary images"):
        likelihood.kinds_of(binary, "both")
    grey = nvae_tf.NVAE(image=(16, 16, 1), **TINY)
    assert likelihood.kinds_of(grey, None) == ["exact"]
    with pytest.raises(UserError, match="official is not allowed for 1 channels of 8 bits"):
        likelihood.kinds_of(grey, "both")

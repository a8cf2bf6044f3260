"""The package as a Keras user meets it: `import nvae_tf`, new models, loaded models."""

import io
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest

import nvae_tf
from nvae_tf.io.errors import UserError

pytestmark = pytest.mark.core

SMALL = dict(
    num_latent_scales=2, num_groups_per_scale=2, ada_groups=True, num_latent_per_group=3,
    num_channels_enc=4, num_channels_dec=4, num_preprocess_cells=1, num_postprocess_cells=1,
    num_mixture_dec=2,
)  # fmt: skip

LAZY = """
import sys, nvae_tf
assert {"NVAE", "load", "list_recipes", "__version__"} <= set(dir(nvae_tf))
assert "cifar10" in nvae_tf.list_recipes() and "digits" in nvae_tf.list_recipes()
print(nvae_tf.ModelConfig(num_latent_scales=2).groups_per_scale, nvae_tf.ImageSpec(32, 32, 3).shape)
assert not {"tensorflow", "tf_keras"} & set(sys.modules), "TensorFlow was imported"
from nvae_tf import NVAE
assert "tensorflow" in sys.modules and NVAE is nvae_tf.NVAE
"""


def test_tensorflow_is_imported_with_the_first_name_that_needs_it():
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "(10, 10) (32, 32, 3)"
    with pytest.raises(AttributeError, match="no attribute 'NVEA'"):
        nvae_tf.NVEA  # noqa: B018


def test_the_same_model_by_recipe_by_dataclasses_and_by_keywords():
    from_recipe = nvae_tf.NVAE.from_recipe("cifar10", **SMALL, num_nf=0, num_cell_per_cond_enc=1)
    image = nvae_tf.ImageSpec(32, 32, 3)
    from_classes = nvae_tf.NVAE(from_recipe.config, image)
    others = dict(use_se=True, res_dist=True, num_cell_per_cond_dec=2)
    others.update(num_preprocess_blocks=1, num_postprocess_blocks=1)
    from_keywords = nvae_tf.NVAE(image=(32, 32, 3), **SMALL, **others)
    for model in (from_classes, from_keywords):
        assert (model.config, model.image) == (from_recipe.config, from_recipe.image)
    assert nvae_tf.NVAE(from_recipe.config, image, num_nf=1).config.num_nf == 1
    assert nvae_tf.NVAE.from_recipe("digits", **SMALL).image.binary
    binary = nvae_tf.NVAE(image=(32, 32, 1), binary=True, precision="bfloat16", **SMALL)
    assert binary.image.binary and binary.precision == "bfloat16"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nvae_tf.NVAE, r"image: None .* expected \(height, width, channels\)"),
        (lambda: nvae_tf.NVAE(image=(32, 32)), r"image: \(32, 32\) is not allowed"),
        (lambda: nvae_tf.NVAE({"num_nf": 1}, (32, 32, 3)), "config: .* expected a ModelConfig"),
        (lambda: nvae_tf.NVAE(image=(32, 32, 3), nun_nf=1), "'nun_nf'; did you mean num_nf"),
        (lambda: nvae_tf.NVAE(image=(32, 32, 3), epochs=1), "epochs: is not a key of a model"),
        (lambda: nvae_tf.NVAE(image=(32, 32, 3), num_nf=-1), "num_nf: -1 is not allowed"),
        (lambda: nvae_tf.NVAE(image=(32, 32, 3), precision="half"), "precision: 'half' is not"),
        (lambda: nvae_tf.NVAE(image=(36, 36, 3), num_latent_scales=2), "num_latent_scales: images"),
        (
            lambda: nvae_tf.NVAE(image=(36, 60, 3), num_latent_scales=3),
            "of 60x36 .* the nearest sizes for that are 48x32 and 64x48",
        ),
        (
            lambda: nvae_tf.NVAE(image=nvae_tf.ImageSpec(32, 32, 1), binary=True),
            "binary: True is not allowed beside an ImageSpec that says False",
        ),
        (lambda: nvae_tf.ModelConfig(arch_instance="x"), "arch_instance: 'x' is not allowed"),
        (lambda: nvae_tf.ModelConfig(arch_instance=3), "expected one of res_mbconv"),
        (lambda: nvae_tf.TrainConfig(epochs=0), "epochs: 0 is not allowed"),
        (lambda: nvae_tf.NVAE.from_recipe(3), "3: not usable as a path"),
        (lambda: nvae_tf.NVAE.from_recipe("cifar11"), "no configuration 'cifar11'"),
        (lambda: nvae_tf.NVAE.from_recipe("cifar10", epochs=3), "epochs: is not a key of a model"),
        (lambda: nvae_tf.load("nowhere"), "nowhere: no such run"),
        (lambda: nvae_tf.load("nowhere.keras"), "nowhere.keras: no such file"),
    ],
)
def test_a_mistake_is_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_without_noise_a_model_computes_at_the_posteriors_means(photographs):
    model = nvae_tf.NVAE(image=(32, 32, 3), **SMALL)
    images = photographs[:3].astype(np.float32) / 255.0
    zeros = [np.zeros((3, *shape), np.float32) for shape in model.latent_shapes]
    np.testing.assert_array_equal(model(images).parameters, model(images, zeros).parameters)
    np.testing.assert_array_equal(model(images).latents[0].z, model.encode(images)[0].z)
    with pytest.raises(UserError, match="images: shape"):
        model(images[0])


def test_the_summary_names_encoder_decoder_scale_and_group():
    model = nvae_tf.NVAE(image=(32, 32, 3), name="small", **SMALL)
    assert "'small': 8-bit images 32x32x3, 1 + 2 latent groups" in repr(model)
    lines = []
    model.summary(print_fn=lines.append)
    rows = [tuple(part.strip() for part in line.split("  ") if part.strip()) for line in lines]
    shapes = {row[0]: row[1] for row in rows if len(row) == 3}
    assert shapes["stem"] == "(None, 32, 32, 4)"
    assert shapes["encoder scale 1 group 2"] == shapes["encoder scale 1 group 1"]
    assert shapes["encoder scale 1 group 1"] == "(None, 8, 8, 16)"
    assert shapes["encoder scale 0 group 0"] == "(None, 4, 4, 32)"
    assert shapes["decoder scale 0 group 0"] == "(None, 4, 4, 32)"
    assert (
        shapes["decoder up to scale 1"] == shapes["decoder scale 1 group 2"] == "(None, 8, 8, 16)"
    )
    assert shapes["image head"] == "(None, 32, 32, 20)"
    counts = sum(int(row[2].replace(",", "")) for row in rows[3:] if len(row) == 3)
    others = sum(int(np.prod(v.shape)) for v in model.non_trainable_variables)
    assert counts == model.num_parameters + others
    assert f"Parameters: {model.num_parameters:,}" in lines[-1]


def test_a_run_a_checkpoint_and_a_keras_file_are_loaded(run, tmp_path):
    model = nvae_tf.load(str(run))
    (newest, _) = sorted((run / "checkpoints").iterdir(), reverse=True)
    model.save(tmp_path / "model.keras")
    images = np.zeros((2, 32, 32, 1), np.float32)
    for path in (newest, tmp_path / "model.keras"):
        loaded = nvae_tf.load(path)
        np.testing.assert_array_equal(loaded(images).parameters, model(images).parameters)
    content = (tmp_path / "model.keras").read_bytes()
    (tmp_path / "half.keras").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="half.keras: not readable as a saved NVAE"):
        nvae_tf.load(tmp_path / "half.keras")
    # A file whose rows belong to weights of other names.
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with h5py.File(io.BytesIO(members["model.weights.h5"]), "r+") as weights:
        names = weights["vars/row_names"]
        names[...] = np.frombuffer(names[()].tobytes().replace(b"norms/0", b"norms/9"), np.uint8)
        weights.flush()
        members["model.weights.h5"] = weights.id.get_file_image()
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    with pytest.raises(UserError, match="norms/9/gamma stands where .*norms/0/gamma is"):
        nvae_tf.load(tmp_path / "other.keras")
    (tmp_path / "export" / "1").mkdir(parents=True)
    (tmp_path / "export" / "1" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(UserError, match="an export, .* tf.saved_model.load"):
        nvae_tf.load(tmp_path / "export")

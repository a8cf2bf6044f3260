"""Configuration: recipes, flags, and what is refused."""

import re

import pytest

from nvae_tf import config
from nvae_tf.cli.train import main
from nvae_tf.config import ModelConfig, check_image
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import ConfigError

pytestmark = pytest.mark.core

RECIPES = {
    # name: (groups per scale, batch, channels, blocks, cells, flows, bits, learning rate, lambda)
    "mnist": ((10, 5), 200, 32, 2, 3, 0, 8, 1e-2, 1e-2),
    "cifar10": ((30,), 32, 128, 1, 2, 1, 8, 1e-2, 1e-2),
    "celeba64": ((20, 10, 5), 16, 64, 1, 2, 1, 8, 1e-2, 1e-1),
    "imagenet32": ((28,), 24, 192, 1, 2, 1, 8, 1e-2, 1e-2),
    "celeba256": ((16, 8, 4, 4, 4), 4, 30, 1, 2, 2, 5, 1e-2, 1e-2),
    "ffhq256": ((16, 8, 4, 4, 4), 4, 30, 1, 2, 2, 5, 8e-3, 1e-1),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_the_paper_says(name):
    recipe = config.load(name)
    model, train = recipe.model, recipe.train
    assert RECIPES[name] == (
        model.groups_per_scale,
        recipe.data.batch_size,
        model.num_channels_enc,
        model.num_preprocess_blocks,
        model.num_preprocess_cells,
        model.num_nf,
        model.x_bits(ImageSpec(32, 32, 3)),
        train.learning_rate,
        train.weight_decay_norm,
    )
    assert model.use_se and model.res_dist and model.num_latent_per_group == 20
    assert model.num_cell_per_cond_enc == model.num_cell_per_cond_dec == 2


@pytest.mark.parametrize("path", sorted(config.RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_fits_its_images_and_survives_writing(path, tmp_path):
    from nvae_tf.data import catalog

    recipe = config.load(path.stem)
    check_image(recipe.model, catalog.get_dataset_info(recipe.data).image)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert config.load(str(tmp_path / "resolved.yaml")) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_chanels_enc": 16}, "did you mean num_channels_enc"),
        ({"num_channels_enc": 15}, "num_channels_enc: 15 .* even"),
        ({"num_groups_per_scale": 0}, "num_groups_per_scale: 0 .* at least 1"),
        ({"num_nf": 1.5}, "num_nf: 1.5 .* whole number"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' .* number, above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
        ({"num_x_bits": 17}, "num_x_bits: 17 .* auto or a whole number, at least 1, at most 16"),
        ({"image_size": "96x"}, "image_size: '96x' .* a side .64., or width x height .96x64."),
        ({"value_range": "4095,0,"}, "value_range: '4095,0,' .* auto, full or MIN,MAX"),
        ({"flip": "sometimes"}, "flip: 'sometimes' .* auto or true or false"),
        ({"likelihood": "better"}, "likelihood: 'better' .* auto, official, exact"),
        ({"use_se": "maybe"}, "use_se: 'maybe' .* true or false"),
        ({"num_nf": True}, "num_nf: True .* whole number"),
        ({"arch_instance": "resnet"}, "arch_instance: 'resnet' .* res_mbconv"),
        ({"dataset": 7}, "dataset: 7 .* text"),
        ({"weight_decay_norm_anneal": True}, "weight_decay_norm: 0 .* above 0"),
        ({"num_preprocess_blocks": 1}, "num_postprocess_blocks: 2 must equal"),
        ({"epochs": 5}, "warmup_epochs: 5 .* less than epochs"),
        ({"learning_rate_min": 0.1}, "learning_rate_min: 0.1 .* at most learning_rate"),
        ({"arch_instance": "mbconv_den", "num_channels_enc": 12}, "multiple of 8"),
    ],
)
def test_impossible_values_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config.from_dict(values)
    assert "\n" not in str(caught.value)


def test_text_stands_for_its_value():
    values = {"learning_rate": "1e-2", "num_nf": "3", "use_se": "true", "weight_decay": 1}
    built = config.from_dict(values)
    assert built.train.learning_rate == 0.01 and built.model.num_nf == 3
    assert built.model.use_se is True and built.train.weight_decay == 1.0


def test_yaml_means_what_it_says(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "jit_compile: off\nuse_se: yes\nres_dist: True\nada_groups: 'false'\nkeep: 010\n"
        "learning_rate: 1e-2\nlearning_rate_min: .001\nweight_decay: +3.\nsave_every: 500\n"
        "data: 2024-01-01\nepochs: !!int 7\n"
    )
    read = config.load(str(path))
    assert (read.train.jit_compile, read.train.save_every, read.data.data) == (
        "off",
        "500",
        "2024-01-01",
    )
    assert read.model.use_se and read.model.res_dist and not read.model.ada_groups
    assert (read.train.keep, read.train.epochs, read.train.weight_decay) == (10, 7, 3.0)
    assert (read.train.learning_rate, read.train.learning_rate_min) == (0.01, 0.001)


@pytest.mark.parametrize(
    ("given", "warmup", "note"),
    [
        ({}, 5, None),
        ({"epochs": 6}, 5, None),
        ({"epochs": "5"}, 4, "warmup_epochs: 4 instead of the recipe's 5, to fit into 5 epochs"),
        ({"epochs": 1}, 0, "warmup_epochs: 0 instead of the recipe's 5, to fit into 1 epoch"),
        ({"epochs": 1, "warmup_epochs": 0}, 0, None),
        ({"epochs": 20, "warmup_epochs": 19}, 19, None),
    ],
)
def test_a_recipes_warm_up_gives_way_to_the_epochs_given(given, warmup, note):
    recipe = config.load("mnist")
    overridden, printed = config.override(recipe, given)
    assert (overridden.train.warmup_epochs, printed) == (warmup, note)
    assert overridden.train.epochs == int(given.get("epochs", 400))


@pytest.mark.parametrize("given", [{"epochs": 4, "warmup_epochs": 4}, {"warmup_epochs": 400}])
def test_a_warm_up_that_is_given_has_to_fit(given):
    with pytest.raises(ConfigError, match="warmup_epochs: .* is not allowed; expected less than"):
        config.override(config.load("mnist"), given)


def test_a_model_that_halves_too_often_is_refused():
    with pytest.raises(ConfigError, match="num_latent_scales: .* at most 5 times"):
        check_image(ModelConfig(num_latent_scales=5), ImageSpec(32, 32, 3))
    with pytest.raises(ConfigError, match="of 100x64 .* halved at most 2 .* 96x64 and 104x64$"):
        check_image(ModelConfig(num_latent_scales=2), ImageSpec(64, 100, 3))


@pytest.mark.parametrize(
    ("keys", "image", "message"),
    [
        (dict(num_x_bits=9), (32, 32, 3), "num_x_bits: 9 is not allowed; the images have 8 bits"),
        (dict(likelihood="official"), (32, 32, 1), "likelihood: official .* 1 channels of 8 bits"),
        (dict(likelihood="official"), (32, 32, 3, 12), "official is not .* 3 channels of 12 bits"),
        (
            dict(likelihood="exact", num_mixture_dec=1),
            (32, 32, 3),
            "exact is not .* normal density",
        ),
    ],
)
def test_a_model_that_does_not_fit_its_images_is_refused(keys, image, message):
    with pytest.raises(ConfigError, match=message):
        check_image(ModelConfig(**keys), ImageSpec(*image))


def test_sizes_are_width_x_height():
    sizes = {text: config.DataConfig(image_size=text).size for text in ("0", "64", "96x64")}
    assert sizes == {"0": None, "64": (64, 64), "96x64": (64, 96)}
    assert config.from_dict({"image_size": 64}).data.size == (64, 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            (32, 32.0, 3),
            "width: 32.0 is not allowed in an ImageSpec; expected a whole number above 0",
        ),
        ((0, 32, 3), "height: 0 is not allowed"),
        ((32, 32, True), "channels: True is not allowed"),
        (
            (32, 32, 3, 8, "yes"),
            "binary: 'yes' is not allowed in an ImageSpec; expected True or False",
        ),
        (
            (32, 32, 3, 8, False, 28),
            "scored_size: 28 is not allowed; expected the height and width",
        ),
        ((32, 32, 3, 8, False, (28, 33)), r"scored_size: \(28, 33\) .* of images of 32x32"),
        ((32, 48, 17), "channels: 17 is not allowed .* a whole number from 1 to 16"),
        ((32, 32, 3, 17), "bits: 17 is not allowed .* a whole number from 1 to 16"),
        ((32, 32, 3, 8, False, None, (1, 1)), r"value_range: \(1, 1\) is not allowed; .* smallest"),
    ],
)
def test_images_that_do_not_exist_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        ImageSpec(*values)


def test_the_scored_centre_of_padded_images():
    padded = ImageSpec(32, 32, 1, binary=True, scored_size=(28, 20))
    assert padded.scored_part == (slice(2, 30), slice(6, 26))
    assert padded.num_dims == 28 * 20 and ImageSpec(32, 32, 3).num_dims == 32 * 32 * 3


def test_groups_halve_from_the_finest_scale_with_a_minimum():
    adaptive = dict(ada_groups=True, num_latent_scales=4, num_groups_per_scale=9)
    assert ModelConfig(**adaptive, min_groups_per_scale=3).groups_per_scale == (9, 4, 3, 3)
    assert ModelConfig(num_latent_scales=2, num_groups_per_scale=3).groups_per_scale == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "celebA"], "no configuration 'celebA': .* celeba256, .*digits"),
        (["--config", "digits", "--num_nf", "-1"], "num_nf: '-1' .* at least 0"),
        (
            ["--config", "digits", "--learning_rate", "fast"],
            "error: --learning_rate: 'fast' is not",
        ),
        (["--config", "digits", "--epochs", "many"], "error: --epochs: 'many' is not"),
        (["--config", "digits", "--save_every", "5x"], "error: --save_every: '5x' is not"),
        (
            ["--config", "digits", "--warmup_epochs", "20"],
            "--warmup_epochs: 20 .* less than epochs",
        ),
        (
            ["--config", "digits", "--epochs", "2", "--warmup_epochs", "2"],
            "--warmup_epochs: 2 is not",
        ),
        (
            ["--config", "digits", "--learning_rate", "1e-9"],
            "--learning_rate with digits: learning_ra",
        ),
        (
            ["--config", "digits", "--num_channel", "8"],
            "--num_channel; did you mean --num_ch",
        ),
        (["--config", "digits", "--learning_rat=3"], "did you mean --learning_rate\\?"),
        (["--config", "digits", "--no_use_se"], "did you mean --no-use_se\\?"),
        (["--confg", "digits"], "--confg; did you mean --config\\?"),
        (["--config", "digits", "--zzzzzzz"], "unrecognized arguments: --zzzzzzz \\(see"),
        (["--config", "digits", "--dataset", "svhn"], "dataset: 'svhn' .* digits"),
        (["--config", "cifar10", "--image_size", "64"], "image_size: 64 .* 32x32"),
        (["--config", "celeba64", "--dataset", "images", "--data", "/n"], "/n: no such folder"),
        (["--config", "digits", "--value_range", "0,9"], "value_range: 0,9 .* for images alone"),
        (
            ["--config", "digits", "--bits", "5"],
            "bits: 5 is not allowed; the images of digits have 8",
        ),
        (["--config", "celeba64"], "celeba_64 needs --data: .*prepare celeba.*docs/data.md"),
        (["--config", "celeba64", "--data", "/nowhere"], "/nowhere: no such folder"),
        (["--config", "digits", "--num_latent_scales", "9"], "can be halved at most 5 times"),
        (["--config", "digits", "--batch_size", "5000"], "batch_size: 5000 .* 1438"),
        (["--config", "cifar10", "--data", "/nowhere"], "/nowhere: no such folder"),
        ([], "--config"),
    ],
)
def test_the_command_answers_mistakes_with_one_line(arguments, message, tmp_path, capsys):
    try:
        status = main([*arguments, "--root", str(tmp_path)])
    except SystemExit as error:  # argparse's own way out
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert re.search(message, captured.err)
    assert ".yaml" not in captured.err  # no file is to blame
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {".lock"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 7\nepochs: 8\n", "a key is given twice"),
        ("- 1\n- 2\n", "expected lines of the form"),
        ("epochs: [1\n", "not a readable YAML file"),
        ("epochs: !!python/object:os.system {}\n", "not a readable YAML file"),
        ("1: 2\n", "unknown configuration key '1'"),
        ("keep: 1:30\n", "keep: '1:30' is not allowed; expected a whole number"),
        ("batch_size: 8_0\n", "batch_size: '8_0' is not allowed; expected a whole number"),
        ("learning_rate: 1_0.5\n", "learning_rate: '1_0.5' is not allowed; expected a number"),
        ("epochs:\n", "epochs: None is not allowed; expected a whole number"),
        ("data: ~\n", "data: None is not allowed; expected text"),
        (
            "jit_compile: yes\n",
            "jit_compile: 'yes' is not allowed; expected one of auto, on, parts, off",
        ),
        ("epochs: 4\nwarmup_epochs: 4\n", "warmup_epochs: 4 is not allowed; expected less than"),
    ],
)
def test_broken_files_are_named(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(str(path))
    assert str(path) in str(caught.value)


def test_help_shows_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name, (_, field) in config.KEYS.items():
        assert f"--{name}" in text
        assert str(field.default) in text

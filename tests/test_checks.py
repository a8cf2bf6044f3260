"""The model's methods say in one line what is wrong with an argument, and take whatever is right."""

import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from nvae_tf.config import ModelConfig
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError
from nvae_tf.model import NVAE

pytestmark = pytest.mark.core

SMALL = ModelConfig(
    num_groups_per_scale=2, num_latent_per_group=3, num_channels_enc=4, num_channels_dec=4,
    num_preprocess_cells=1, num_postprocess_cells=1, num_mixture_dec=2,
)  # fmt: skip
DIGITS = np.random.default_rng(0).integers(0, 2, (2, 32, 32, 1)).astype(np.float32)
COLOURS = np.random.default_rng(1).uniform(size=(2, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def binary():
    return NVAE(SMALL, ImageSpec(32, 32, 1, binary=True, scored_size=(28, 28)))


@pytest.fixture(scope="module")
def colour():
    return NVAE(SMALL, ImageSpec(16, 16, 3))


def refused(call, message):
    with pytest.raises(UserError) as caught:
        call()
    assert re.match(message, str(caught.value)) and "\n" not in str(caught.value)


def latents_of(model, images):
    return [latent.z for latent in model.encode(images)]


# Wrong images for the binary model, and what is said of them.
GREY = {
    "one image": (DIGITS[0], r"images: shape \(32, 32, 1\); expected \(batch, .* images\[None\]"),
    "one map": (DIGITS[0, ..., 0], r"images: shape \(32, 32\); .* images\[None, ..., None\]"),
    "no channels": (DIGITS[..., 0], r"images: shape \(2, 32, 32\); .* images\[..., None\]"),
    "not padded": (DIGITS[:, 2:30, 2:30], r"images: shape \(2, 28, .* add 2 pixels of 0 on every"),
    "colours": (DIGITS.repeat(3, -1), r"images: shape \(2, 32, 32, 3\); .*rgb_to_grayscale"),
    "another size": (DIGITS[:, ::2, ::2], r"images: shape \(2, 16, 16, 1\); .*bring them to"),
    "8-bit": (np.uint8(255 * DIGITS), "images: of type uint8; .* divided by 255"),
    "booleans": (DIGITS > 0.5, "images: of type bool; expected floats"),
    "a list": ([DIGITS[0], DIGITS[1]], r"images: of type list; expected an array or tensor \(batch,"),
    "nothing": (None, "images: of type NoneType; expected an array"),
}  # fmt: skip
VALUES = {
    "0 to 255": (255.0 * DIGITS, "images: values from 0 to 255; .* divided by 255"),
    "-1 to 1": (2.0 * DIGITS - 1.0, "images: values from -1 to 1; expected floats in"),
    "not a number": (DIGITS * np.nan, "images: values from nan to nan"),
}


@pytest.mark.parametrize("kind", GREY | VALUES)
@pytest.mark.parametrize("how", [np.asarray, tf.constant], ids=["array", "tensor"])
def test_wrong_images_are_one_line(kind, how, binary):
    images, message = (GREY | VALUES)[kind]
    images = images if images is None or isinstance(images, list) else how(images)
    noise = binary.draw_noise(2, 1)
    refused(lambda: binary.encode(images), message)
    refused(lambda: binary.reconstruct(images), message)
    refused(lambda: binary.bottom_up(images), message)
    refused(lambda: binary(images, noise), message)
    parameters = tf.zeros((2, 32, 32, 1))
    refused(lambda: binary.log_likelihood(parameters, images), message)


@pytest.mark.parametrize("kind", GREY)
def test_wrong_images_are_one_line_in_graphs_too(kind, binary):
    images, message = GREY[kind]
    if not isinstance(images, np.ndarray):
        return
    encode = tf.function(lambda x: latents_of(binary, x), autograph=False)
    refused(lambda: encode(tf.constant(images)), message)
    shape = (None, *images.shape[1:])
    if len(shape) == 4:
        symbolic = tf_keras.Input(shape[1:], dtype=images.dtype)
        refused(lambda: binary.encode(symbolic), message.replace(r"\(2,", r"\(batch,"))


def test_values_in_a_graph_are_checked_if_they_are_known_and_cost_nothing_if_not(binary, colour):
    known = tf.function(lambda: latents_of(binary, 255.0 * DIGITS), autograph=False)
    refused(known, "images: values from 0 to 255")
    refused(tf.function(lambda: binary.sample(1, -1.0), autograph=False), "temperature: -1")
    call = tf.function(lambda x, noise: colour(x, noise, training=True), autograph=False)
    draw = tf.function(lambda n, t, s: colour.sample(n, t, seed=s), autograph=False)
    graphs = [
        call.get_concrete_function(tf.constant(COLOURS), colour.draw_noise(2, 1)).graph,
        draw.get_concrete_function(tf.constant(2), tf.constant(0.5), tf.constant((1, 0))).graph,
    ]
    for graph in graphs:
        definition = graph.as_graph_def()
        nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
        assert not [node.name for node in nodes if "Assert" in node.op or "check" in node.name]
    assert np.all(np.isfinite(draw(tf.constant(2), tf.constant(0.5), tf.constant((1, 0)))))


def test_images_of_every_float_type_and_rounding_are_taken(colour):
    expected = latents_of(colour, COLOURS)
    kinds = (np.float64, tf.constant, lambda x: x + 1e-6, np.asfortranarray)
    for kind in kinds:
        for actual, z in zip(latents_of(colour, kind(COLOURS)), expected, strict=True):
            np.testing.assert_allclose(actual, z, atol=1e-4)
    for kind in (np.float16, lambda x: tf.cast(x, tf.bfloat16)):
        for actual, z in zip(latents_of(colour, kind(COLOURS)), expected, strict=True):
            np.testing.assert_allclose(actual, z, atol=0.3)
    open_shape = tf.function(
        lambda x: latents_of(colour, x), autograph=False, input_signature=[tf.TensorSpec(None)]
    )
    np.testing.assert_allclose(open_shape(COLOURS)[0], expected[0], atol=1e-4)


def test_wrong_noise_and_latents_are_one_line(colour):
    noise, z = colour.draw_noise(2, 1), latents_of(colour, COLOURS)
    for wrong, message in (
        (noise[:1], "noise: a list of 1; expected 2 tensors, one per latent group"),
        (noise[0], "noise: of type float32; expected a list of 2"),
        (
            [noise[0], noise[1][..., :2]],
            r"noise: that of group 1 is of shape \(2, 4, 4, 2\); expec",
        ),
        ([noise[0], None], "noise: that of group 1 is of type NoneType; expected a tensor"),
        (colour.draw_noise(3, 1), "noise: that of group 0 is for a batch of 3; expected one of 2"),
    ):
        refused(lambda wrong=wrong: colour.encode(COLOURS, wrong), message)
        refused(lambda wrong=wrong: colour.reconstruct(COLOURS, wrong), message)
        refused(lambda wrong=wrong: colour(COLOURS, noise=wrong), message)
    for wrong, message in (
        (z[:1], "latents: a list of 1; expected 2 tensors"),
        ([*z, z[0]], "latents: a list of 3; expected 2 tensors"),
        (
            colour.encode(COLOURS),
            "latents: that of group 0 is of type GroupOutput; .* floats, its z",
        ),
        ([z[0], z[1][:1]], "latents: that of group 1 is for a batch of 1; expected one of 2"),
        ([z[0][0], z[1]], r"latents: that of group 0 is of shape \(4, 4, 3\)"),
        ([tf.cast(z[0], tf.int32), z[1]], "latents: that of group 0 is of type int32; expected a"),
    ):
        refused(lambda wrong=wrong: colour.decode(wrong), message)
    refused(
        lambda: colour.sample(4, latents=z[:1]), "latents: that of group 0 is for a batch of 2;"
    )
    refused(
        lambda: colour.sample(2, latents=[*z, z[0]]), "latents: a list of 3; expected at most 2"
    )
    refused(lambda: colour.render(tf.zeros((2, 16, 16, 9))), r"parameters: shape \(2, 16, 16, 9\)")
    refused(lambda: colour.log_likelihood([1.0], COLOURS), "parameters: of type list; expected")
    assert colour.sample(2, latents=tuple(z[:1])).shape == (2, 16, 16, 3)


@pytest.mark.parametrize("seed", [3, np.int64(3), (3, 0), [3, 0], np.array([3, 0])])
def test_a_seed_is_one_integer_or_two(seed, colour):
    expected = colour.sample(2, seed=(3, 0))
    for form in (seed, tf.constant(seed)):
        np.testing.assert_array_equal(colour.sample(2, seed=form), expected)
        np.testing.assert_array_equal(
            colour.decode(latents_of(colour, COLOURS), form),
            colour.decode(latents_of(colour, COLOURS), (3, 0)),
        )
    assert np.abs(colour.sample(2, seed=(3, 1)) - expected).max() > 0.1


@pytest.mark.parametrize("seed", [1.5, "1", (1, 2, 3), (1,), True, None, (1, 0.5), 2**64, [[1, 2]]])
def test_anything_else_is_no_seed(seed, colour):
    for call in (colour.sample, colour.draw_noise):
        refused(lambda call=call: call(2, seed=seed), "seed: .*; expected an integer, or two")
    if seed is not None:  # which means the mean
        refused(lambda: colour.decode(latents_of(colour, COLOURS), seed), "seed: ")


@pytest.mark.parametrize("temperature", [1, np.int32(1), [1, 1.0], np.ones(2), tf.constant(1)])
def test_temperatures_may_be_whole_numbers(temperature, binary, colour):
    for model in (binary, colour):
        expected = model.sample(4, 1.0, seed=2)
        np.testing.assert_array_equal(model.sample(4, temperature, seed=2), expected)


def test_wrong_temperatures_are_one_line(binary, colour):
    for wrong, message in (
        (-0.5, "temperature: -0.5; expected at least 0"),
        ([0.5, -1], "temperature: -1; expected at least 0"),
        (tf.constant(-0.5), "temperature: -0.5"),
        (float("nan"), "temperature: nan"),
        (float("inf"), "temperature: inf"),
        ("hot", "temperature: 'hot'; expected a number, or one for each of 2 groups"),
        (None, "temperature: None; expected a number"),
        ([0.5, 0.5, 0.5], r"temperature: shape \(3,\); expected a number, or one for each of 2"),
    ):
        refused(lambda wrong=wrong: binary.sample(2, wrong), message)
    assert np.ptp(binary.sample(3, 0.0, seed=1), axis=0).max() < 1e-6  # no noise, one image
    refused(lambda: colour.sample(2, 0), "temperature: 0; expected above 0, at which colours")


def test_images_are_given_by_their_number_or_their_indices(colour):
    expected = colour.sample(3)
    for indices in (3, np.int64(3), tf.constant(3), [0, 1, 2], np.arange(3), tf.range(3)):
        np.testing.assert_array_equal(colour.sample(indices), expected)
    for wrong, message in (
        (0, "indices: 0 images; expected at least 1"),
        (tf.constant(-2), "indices: -2 images"),
        (2.0, "indices: of type float; expected the number of images, or the index"),
        ("2", "indices: of type str"),
        ([[1, 2]], r"indices: of type list, shape \(1, 2\)"),
    ):
        refused(lambda wrong=wrong: colour.sample(wrong), message)
        refused(lambda wrong=wrong: colour.draw_noise(wrong, 1), message)


def test_keras_models_are_made_of_it_saved_and_cloned(colour, tmp_path):
    inputs = tf_keras.Input((16, 16, 3))
    functional = tf_keras.Model(inputs, [latent.z for latent in colour.encode(inputs)])
    expected = latents_of(colour, COLOURS)
    functional.save(tmp_path / "encoder.keras")
    loaded = tf_keras.models.load_model(tmp_path / "encoder.keras", {"NVAE": NVAE})
    cloned = tf_keras.models.clone_model(functional)
    cloned.set_weights(functional.get_weights())
    for model in (functional, loaded, cloned):
        for z, wanted in zip(model(COLOURS), expected, strict=True):
            np.testing.assert_allclose(z, wanted, atol=1e-5)
    refused(
        lambda: colour.encode(tf_keras.Input((28, 28, 3))), r"images: shape \(batch, 28, 28, 3\)"
    )
    colour.save(tmp_path / "whole.keras")
    whole = tf_keras.models.load_model(tmp_path / "whole.keras", {"NVAE": NVAE})
    np.testing.assert_allclose(latents_of(whole, COLOURS)[0], expected[0], atol=1e-5)

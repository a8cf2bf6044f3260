"""Images as files hold them: levels, stored values, PNG and TIFF."""

import numpy as np
import pytest
import tensorflow as tf
import tifffile
from PIL import Image

from nvae_tf.evaluation import stored_images
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.image_grid import to_bytes, to_rgb
from nvae_tf.io.labelled_grid import Band, labelled_grid


@pytest.fixture(scope="module")
def grey(photographs):
    """One photograph's grey values in [0, 1], with as many different ones as 16 bits allow."""
    colours = photographs[:1].astype(np.float64) / 255.0
    return (colours @ [[0.299], [0.587], [0.114]]).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 5, 8, 10, 12, 16])
def test_levels_are_those_of_the_bits_and_lead_back(grey, bits):
    spec = ImageSpec(32, 32, 1, bits=bits)
    levels = stored_images.to_levels(grey, spec)
    assert levels.dtype == (np.uint8 if bits <= 8 else np.uint16)
    np.testing.assert_allclose(levels, grey * (2.0**bits - 1), atol=0.51)
    every = np.arange(2**bits)
    np.testing.assert_array_equal(
        stored_images.to_levels(stored_images.from_levels(every, spec), spec), every
    )


def test_eight_bits_are_bytes(grey):
    spec = ImageSpec(32, 32, 1)
    levels = stored_images.to_levels(grey, spec)
    np.testing.assert_array_equal(levels, to_bytes(grey))
    np.testing.assert_array_equal(stored_images.levels_to_bytes(levels, spec), levels)


def test_means_of_binary_pixels_are_not_thresholded(grey):
    spec = ImageSpec(32, 32, 1, bits=1, binary=True)
    np.testing.assert_array_equal(stored_images.to_levels(grey, spec), to_bytes(grey))


# Channels, bits and value range; then the kind of file, and the values of the outermost levels in it.
FILES = [
    (1, 8, None, ".png", "uint8", (0, 255)),
    (3, 8, None, ".png", "uint8", (0, 255)),
    (1, 12, (0, 4095), ".png", "uint16", (0, 4095)),
    (3, 16, None, ".png", "uint16", (0, 65535)),
    (4, 10, (0, 1023), ".png", "uint16", (0, 1023)),
    (1, 8, (0, 65535), ".png", "uint16", (0, 65535)),
    (4, 8, None, ".png", "uint8", (0, 255)),
    (2, 12, None, ".tif", "uint16", (0, 4095)),
    (6, 8, None, ".tif", "uint8", (0, 255)),
    (1, 12, (-1024, 3071), ".tif", "float32", (-1024, 3071)),
    (3, 8, (0.0, 1.0), ".tif", "float32", (0, 1)),
]


@pytest.mark.parametrize(("channels", "bits", "value_range", "ending", "dtype", "ends"), FILES)
def test_files_hold_stored_values(grey, tmp_path, channels, bits, value_range, ending, dtype, ends):
    spec = ImageSpec(32, 24, channels, bits=bits, value_range=value_range)
    images = np.concatenate([np.roll(grey[0, :, :24], c, 0) for c in range(channels)], -1)
    images[0, 0], images[1, 0] = 0.0, 1.0
    levels = stored_images.to_levels(images, spec)
    assert stored_images.ending(spec) == ending
    path = tmp_path / f"image{ending}"
    stored_images.write_image(path, levels, spec)
    if ending == ".tif":
        read = tifffile.imread(path)
    else:
        read = tf.io.decode_png(path.read_bytes(), dtype=tf.dtypes.as_dtype(dtype)).numpy()
    read = read.reshape(spec.shape)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read[0, 0], ends[0])
    np.testing.assert_array_equal(read[1, 0], ends[1])
    portion = (read.astype(np.float64) - ends[0]) / (ends[1] - ends[0])
    np.testing.assert_allclose(portion, images, atol=0.51 / (2**bits - 1))
    assert not list(tmp_path.glob(".*"))


def test_twelve_bits_are_read_by_others_as_they_are(grey, tmp_path):
    spec = ImageSpec(32, 32, 1, bits=12, value_range=(0, 4095))
    levels = stored_images.to_levels(grey[0], spec)
    stored_images.write_image(tmp_path / "image.png", levels, spec)
    with Image.open(tmp_path / "image.png") as image:
        np.testing.assert_array_equal(np.asarray(image), levels[..., 0])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_every_image_becomes_a_picture_by_one_rule(photographs, channels):
    stacked = np.concatenate([photographs[:6], photographs[6:12], photographs[12:18]], -1)
    images = stacked[:, :24, :, :channels]  # 24 rows, 32 columns
    shown = to_rgb(images)
    assert shown.shape == (6, 24, 32, 3) and shown.dtype == np.uint8
    order = {1: [0, 0, 0], 2: [0, 1, 0]}.get(channels, [0, 1, 2])
    np.testing.assert_array_equal(shown, images[..., order])
    np.testing.assert_array_equal(to_rgb(images / 255.0), shown)
    picture = labelled_grid([Band(images)], 3)
    assert picture.shape == (2 * 52 - 4, 3 * 68 - 4, 3)  # enlarged twice
    np.testing.assert_array_equal(picture[52:100:2, 68:132:2], shown[4])
    captioned = labelled_grid([Band(images[:2] / 255.0, "", [["a", "b"], ["c", "d"]])], 2)
    assert captioned.shape[0] > 48 + 2 * 12 and captioned.shape[1] == 2 * 64 + 4


def test_values_of_whole_numbers_are_pngs_whatever_the_levels():
    deep = ImageSpec(32, 32, 1, bits=16, value_range=(0.0, 4095.0))
    levels = np.array([0, 16, 65535], np.uint16)
    values = stored_images.stored_values(levels, deep)
    assert values.dtype == np.uint16 and values.tolist() == [0, 1, 4095]
    assert stored_images.ending(deep) == ".png"
    assert stored_images.ending(ImageSpec(32, 32, 1, bits=16, value_range=(0.0, 1.0))) == ".tif"

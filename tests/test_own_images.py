"""Folders of images of every kind: what is found, what becomes of it, and what is said."""

import contextlib
import dataclasses
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tifffile
from PIL import Image

from nvae_tf import config as configuration
from nvae_tf.cli import inspect, train
from nvae_tf.config import CENTRE, NONE, RANDOM, DataConfig
from nvae_tf.data import catalog, image_files, images, levels, pipeline
from nvae_tf.data.stored import Item, Stored
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import ConfigError, UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def picture():
    """scikit-learn's photograph of a flower, 427x640, 8-bit."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images[1]


@pytest.fixture(scope="module")
def grey(picture):
    """The same in grey with 12 bits, by sums of its channels."""
    return (picture.astype(np.uint32).sum(-1) * 4095 // 765).astype(np.uint16)


def crops(image, count=20, size=40):
    return [image[8 * i : 8 * i + size, 11 * i : 11 * i + size] for i in range(count)]


def write_png(path, image):
    """Writes a PNG of 16 bits, grey or colour, which Pillow cannot."""
    image = image if image.ndim == 3 else image[..., None]
    path.write_bytes(tf.io.encode_png(image).numpy())


def settled(folder, **keys):
    return catalog.settle(DataConfig(dataset="images", data=str(folder), **keys))


def opened(folder, **keys):
    """What was settled, and all images in order: training images, then validation's."""
    found = settled(folder, **keys)
    sources = found.dataset.open(str(folder))
    return found, np.stack([source.fetch(i)[0] for source in sources for i in range(len(source))])


def test_twelve_bits_in_files_of_sixteen_are_not_black(tmp_path, grey):
    for i, crop in enumerate(crops(grey)):
        write_png(tmp_path / f"{i:02d}.png", crop)
    found, seen = opened(tmp_path, image_size="40")
    high = max(int(crop.max()) for crop in crops(grey))
    assert found.lines[0] == (
        f"20 images, 16 bits, values {min(int(c.min()) for c in crops(grey))} to {high:,}, grey, 40x40"
    )
    assert "values: 0 to 4,095 become 4,096 levels, 12 bits" in found.lines[1]
    config = found.config
    assert (config.channels, config.bits, config.value_range) == (1, 12, "0,4095")
    assert found.dataset.image == ImageSpec(40, 40, 1, 12)
    # At the files' own size nothing is lost.
    assert seen.dtype == np.uint16
    expected = {crop.tobytes() for crop in map(np.ascontiguousarray, crops(grey))}
    assert {image.tobytes() for image in seen} == expected
    batches = pipeline.evaluation_batches(
        found.dataset.open(str(tmp_path))[0], found.dataset, batch_size=18, seed=0
    )
    unit = next(iter(batches)).numpy()
    assert unit.shape == (18, 40, 40, 1) and 0.2 < unit.mean() < 0.9


def test_what_was_settled_is_found_again_without_looking_for_a_range(tmp_path, grey):
    folder, other = tmp_path / "one", tmp_path / "other"
    for name, divisor in ((folder, 1), (other, 8)):  # the other is darker: alone, it has 9 bits
        name.mkdir()
        for i, crop in enumerate(crops(grey)):
            write_png(name / f"{i:02d}.png", crop // divisor)
    found, _ = opened(folder)
    assert found.config.image_size == "32" and settled(other).config.bits == 9
    assert catalog.settle(found.config).config == found.config
    dataset = catalog.get_dataset_info(found.config)
    light, dark = (
        np.stack([dataset.open(str(name))[0].fetch(i)[0] for i in range(18)])
        for name in (folder, other)
    )
    np.testing.assert_allclose(dark, light / 8.0, atol=1.5)


def test_a_float_tiff_from_0_to_1_is_not_black(tmp_path, grey):
    for i, crop in enumerate(crops(grey)):
        tifffile.imwrite(tmp_path / f"{i:02d}.tif", crop.astype(np.float32) / 4095)
    found, seen = opened(tmp_path, image_size="40")
    assert "20 images, floating point, values 0" in found.lines[0]
    assert (found.config.bits, found.config.value_range) == (16, "0,1")
    expected = {np.rint(c / 4095.0 * 65535).astype(np.uint16).tobytes() for c in crops(grey)}
    assert {image.tobytes() for image in seen} == expected
    assert opened(tmp_path, image_size="40", bits=8)[1].dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_hounsfield_units_from_a_negative_to_a_positive_number(dtype, tmp_path, grey):
    for i, crop in enumerate(crops(grey)):
        values = crop.astype(np.int32) - 1000
        values[0, 0], values[0, 1] = -1000, 3000
        tifffile.imwrite(tmp_path / f"{i:02d}.tif", values.astype(dtype))
    found, seen = opened(tmp_path, image_size="40")
    if dtype == np.int16:  # a level for each number
        assert (found.config.bits, found.config.value_range) == (12, "-1000,3095")
        assert seen[:, 0, 0, 0].max() == 0 and seen[:, 0, 1, 0].min() == 4000
    else:
        assert (found.config.bits, found.config.value_range) == (16, "-1000,3000")
        assert seen[:, 0, 0, 0].max() == 0 and seen[:, 0, 1, 0].min() == 65535
    assert found.dataset.image.value_range == tuple(map(float, found.config.value_range.split(",")))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_transparency_in_its_four_modes(dtype, tmp_path, picture):
    opaque = np.iinfo(dtype).max
    scale = opaque // 255
    for i, crop in enumerate(crops(picture)):
        image = np.concatenate([crop, np.full((40, 40, 1), 255, np.uint8)], axis=-1).astype(dtype)
        image *= dtype(scale)
        image[:20, :, 3] = 0
        write_png(tmp_path / f"{i:02d}.png", image)
    notice = "alpha: 20 images are transparent in places; that is dropped"
    seen = {}
    for mode in ("drop", "white", "black", "keep"):
        found, seen[mode] = opened(tmp_path, image_size="40", alpha=mode)
        assert any(line.startswith(notice) for line in found.lines) == (mode == "drop")
        assert found.config.channels == (4 if mode == "keep" else 3)
        assert found.config.bits == 8 * np.dtype(dtype).itemsize
    expected = {(crop * dtype(scale)).astype(dtype).tobytes() for crop in crops(picture)}
    assert {image.tobytes() for image in seen["drop"]} == expected
    for mode, ground in (("white", opaque), ("black", 0)):
        assert (seen[mode][:, :20] == ground).all()
        np.testing.assert_array_equal(seen[mode][:, 20:], seen["drop"][:, 20:])
    np.testing.assert_array_equal(seen["keep"][..., :3], seen["drop"])
    assert (seen["keep"][:, :20, :, 3] == 0).all() and (seen["keep"][:, 20:, :, 3] == opaque).all()


def test_opaque_images_give_no_notice_and_keep_what_they_have(tmp_path, picture):
    for i, crop in enumerate(crops(picture)):
        Image.fromarray(crop).convert("RGBA" if i else "RGB").save(tmp_path / f"{i:02d}.png")
    found = settled(tmp_path)
    assert not any("alpha" in line for line in found.lines) and found.config.channels == 3
    _, seen = opened(tmp_path, alpha="keep", image_size="40")
    assert seen.shape[-1] == 4 and (seen[..., 3] == 255).all()
    for path in tmp_path.iterdir():
        Image.open(path).convert("RGB").save(path)
    config = settled(tmp_path, alpha="keep").config
    assert (config.alpha, config.channels) == ("drop", 3)


def test_text_is_mirrored_only_if_that_is_asked_for(tmp_path):
    from PIL import ImageDraw

    text = Image.new("L", (64, 32), "white")
    ImageDraw.Draw(text).text((4, 8), "READ ME", fill="black")
    for i in range(20):
        text.save(tmp_path / f"{i:02d}.png")
    straight = np.asarray(text)[..., None]
    for flip, orientations in (("auto", 1), (False, 1), (True, 2)):
        found = settled(tmp_path, flip=flip, image_size="64x32")
        assert found.dataset.image.shape == (32, 64, 1)
        source, _ = found.dataset.open(str(tmp_path))
        batches = pipeline.training_batches(source, found.dataset, batch_size=18, seed=1)
        seen = np.rint(next(iter(batches)).numpy() * 255)
        assert len({image.tobytes() for image in seen}) == orientations
        assert (seen == straight).all((1, 2, 3)).any()


def test_small_and_broken_files_are_skipped_with_counts(tmp_path, picture):
    for i, crop in enumerate(crops(picture)):
        Image.fromarray(crop).save(tmp_path / f"{i:02d}.png")
    Image.fromarray(picture[:39, :100]).save(tmp_path / "low.png")
    Image.fromarray(picture[:100, :39]).save(tmp_path / "narrow.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "00.png").read_bytes()[:900])
    (tmp_path / "empty.tif").write_bytes(b"")
    found, seen = opened(tmp_path, image_size="40")
    assert len(seen) == 20
    head = "skipped: 4 of 24 images (2 too small, 2 unreadable)"
    assert any(line.startswith(head) for line in found.lines)
    assert found.dataset.skipped[0] == head and len(found.dataset.skipped) == 5
    for word in ("low.png: the image is 100x39, smaller than 40x40", "cut.png: not a readable"):
        assert any(word in line for line in found.dataset.skipped)
    with pytest.raises(UserError, match=r"(cut|empty).*: not a readable image") as caught:
        settled(tmp_path, image_size="40", strict=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"none of the 24 images can be used \(22 too small, 2 unr"):
        settled(tmp_path, image_size="640")


def test_a_size_is_found_that_most_images_reach(tmp_path, picture):
    for i in range(19):
        Image.fromarray(picture[: 110 + i, : 140 + i]).save(tmp_path / f"{i:02d}.jpg")
    Image.fromarray(picture[:50, :50]).save(tmp_path / "small.jpg")
    found = settled(tmp_path)
    assert found.config.image_size == "96" and len(found.dataset.skipped) == 2
    assert (
        "image_size: 96, the largest multiple of 32 up to 256 that 90% of the images reach"
        in (found.lines[1])
    )
    assert "colour, 50x50 to 158x128" in found.lines[0]
    with pytest.raises(UserError, match="too small for a size to be found"):
        small = tmp_path / "small"
        small.mkdir()
        for i in range(4):
            Image.fromarray(picture[:20, :20]).save(small / f"{i}.png")
        settled(small)


def test_grey_and_colour(tmp_path, picture):
    for i, crop in enumerate(crops(picture)):
        Image.fromarray(crop).convert("L" if i % 2 else "RGB").save(tmp_path / f"{i:02d}.png")
    found, seen = opened(tmp_path, image_size="40")
    assert found.config.channels == 3 and seen.shape[-1] == 3
    assert any("10 images are grey and 10 in colour; grey is repeated" in x for x in found.lines)
    _, one = opened(tmp_path, image_size="40", channels=1)
    luma = {np.array(Image.fromarray(c).convert("L"))[..., None].tobytes() for c in crops(picture)}
    assert {image.tobytes() for image in one} == luma
    two = dict(photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "two.tif", np.zeros((40, 40, 2), np.uint8), **two)
    found = settled(tmp_path)  # one odd file changes nothing for the others
    assert found.config.channels == 3 and any("grey is repeated" in x for x in found.lines)
    (tmp_path / "two.tif").unlink()
    for i in range(0, 20, 2):
        (tmp_path / f"{i:02d}.png").unlink()
    assert settled(tmp_path).config.channels == 1
    _, three = opened(tmp_path, image_size="40", channels=3)
    assert (three[..., :1] == three).all()


def test_images_of_other_channels_are_skipped(tmp_path, grey):
    many = np.stack([grey, grey // 2, grey // 3, grey // 4, grey // 5], -1)
    plain = dict(photometric="minisblack", planarconfig="contig")
    for i, crop in enumerate(crops(many)):
        tifffile.imwrite(tmp_path / f"{i:02d}.tif", crop, **plain)
    tifffile.imwrite(tmp_path / "seven.tif", np.zeros((40, 40, 7), np.uint16), **plain)
    found, seen = opened(tmp_path, image_size="40")
    assert found.config.channels == 5 and seen.shape == (20, 40, 40, 5)
    assert {i.tobytes() for i in seen} == {np.ascontiguousarray(c).tobytes() for c in crops(many)}
    assert "(1 of other channels)" in found.dataset.skipped[0]
    with pytest.raises(UserError, match="none of the 21 images"):
        settled(tmp_path, channels=3, image_size="40")


def test_a_colour_png_of_16_bits_keeps_them(tmp_path, picture):
    noise = np.random.RandomState(0).randint(0, 256, picture.shape).astype(np.uint16)
    deep = picture.astype(np.uint16) * 256 + noise
    for i, crop in enumerate(crops(deep)):
        write_png(tmp_path / f"{i:02d}.png", crop)
    found, seen = opened(tmp_path, image_size="40")
    assert (found.config.channels, found.config.bits) == (3, 16)
    assert {i.tobytes() for i in seen} == {np.ascontiguousarray(c).tobytes() for c in crops(deep)}


def test_the_transparent_colour_of_a_png_of_16_bits(tmp_path, picture):
    image = picture[:40, :40].astype(np.uint16) * 257
    colour = image[3, 5]
    data = tf.io.encode_png(image).numpy()
    key = b"tRNS" + colour.astype(">u2").tobytes()
    chunk = struct.pack(">I", 6) + key + struct.pack(">I", zlib.crc32(key))
    end = data.index(b"IDAT") - 4
    (tmp_path / "clear.png").write_bytes(data[:end] + chunk + data[end:])
    (seen,) = all_of(tmp_path / "clear.png")
    np.testing.assert_array_equal(seen[..., :3], image)
    transparent = np.all(image == colour, axis=-1)
    np.testing.assert_array_equal(seen[..., 3], np.where(transparent, 0, 65535))


def test_colours_that_were_multiplied_by_their_opacity(tmp_path, picture):
    opacity = np.tile(np.linspace(128, 255, 40, dtype=np.uint8), (40, 1))[..., None]
    multiplied = np.rint(picture[:40, :40] * (opacity / 255.0)).astype(np.uint8)
    image = np.concatenate([multiplied, opacity], -1)
    path = tmp_path / "glass.tif"
    tifffile.imwrite(path, image, photometric="rgb", extrasamples=["assocalpha"])
    (seen,) = all_of(path)
    difference = seen[..., :3].astype(int) - picture[:40, :40]
    assert np.abs(difference).max() <= 1
    np.testing.assert_array_equal(seen[..., 3:], opacity)


def test_a_stack_of_many_pages_is_read_page_by_page(tmp_path, grey):
    pages = np.stack(crops(grey, 30))
    with tifffile.TiffWriter(tmp_path / "many.tif") as writer:
        for page in pages:
            writer.write(page, metadata=None)
    reader = image_files.ImageReader()
    items = reader.items(tmp_path / "many.tif")
    for place in (29, 0, 17, 29):
        np.testing.assert_array_equal(reader.read(items[place]).values[..., 0], pages[place])


def test_no_more_than_64_stacks_are_open_at_a_time(tmp_path, grey):
    reader, before = image_files.ImageReader(), len(os.listdir("/proc/self/fd"))
    for i in range(70):
        pages = np.stack([grey[i : i + 8, :8]] * 2)
        tifffile.imwrite(tmp_path / f"{i}.tif", pages, photometric="minisblack")
        reader.read(reader.items(tmp_path / f"{i}.tif")[1])
    assert len(os.listdir("/proc/self/fd")) - before == image_files.MOST_OPEN


def test_an_array_of_twelve_channels_is_one_image(tmp_path, grey):
    cube = np.stack([grey[i : i + 40, :40] for i in range(12)], -1)
    np.save(tmp_path / "cube.npy", cube)
    np.savez(tmp_path / "flat.npz", image=grey[:40, :40])
    (seen,), (flat,) = all_of(tmp_path / "cube.npy"), all_of(tmp_path / "flat.npz")
    np.testing.assert_array_equal(seen, cube)
    np.testing.assert_array_equal(flat[..., 0], grey[:40, :40])


def test_integers_of_32_bits_have_no_full_range(tmp_path, grey):
    for i, crop in enumerate(crops(grey)):
        tifffile.imwrite(tmp_path / f"{i}.tif", crop.astype(np.uint32))
    with pytest.raises(ConfigError, match="full is not allowed for integers of 32 bits"):
        settled(tmp_path, image_size="40", value_range="full")
    lines = settled(tmp_path, image_size="40", value_range="-1000000,1000000").lines
    assert any(line.startswith("flat: all values are between") for line in lines)


def test_a_given_range_clips_and_counts(tmp_path, grey):
    for i, crop in enumerate(crops(grey)):
        write_png(tmp_path / f"{i:02d}.png", crop)
    found, seen = opened(tmp_path, image_size="40", value_range="500,1523")
    outside = sum(int(((crop < 500) | (crop > 1523)).sum()) for crop in crops(grey))
    assert outside and any(line.startswith(f"clipped: {outside:,} values") for line in found.lines)
    assert found.config.bits == 10
    levels_of = {(np.clip(c, 500, 1523) - 500).tobytes() for c in crops(grey)}
    assert {image.tobytes() for image in seen} == levels_of
    full = settled(tmp_path, value_range="full")
    assert (full.config.bits, full.config.value_range) == (16, "0,65535")
    assert any(line.startswith("dark: no value is above") for line in full.lines) == (
        max(c.max() for c in crops(grey)) < 4096
    )


def test_a_settled_folder_is_opened_with_its_warnings_alone(tmp_path, grey, capsys):
    for i, crop in enumerate(crops(grey)):
        values = crop.astype(np.float32)
        values[3, 4] = np.nan
        tifffile.imwrite(tmp_path / f"{i:02d}.tif", values)
    for value_range, warned in (
        ("1000,1500", ["clipped: ", "not numbers: "]),
        ("0,1e6", ["not numbers: ", "dark: "]),
        ("-1000000,1000000", ["not numbers: ", "flat: "]),
    ):
        found = settled(tmp_path, image_size="40", value_range=value_range)
        capsys.readouterr()
        catalog.get_dataset_info(found.config).open(str(tmp_path))
        lines = capsys.readouterr().out.splitlines()
        assert all(line.startswith(kind) for line, kind in zip(lines, warned, strict=True))
        assert set(lines) <= set(found.lines)


def test_masks_of_few_values_get_a_notice(tmp_path, grey):
    for i, crop in enumerate(crops(grey)):
        Image.fromarray((crop > 2000).astype(np.uint8)).save(tmp_path / f"{i:02d}.png")
    found = settled(tmp_path)
    assert found.config.bits == 8
    assert any("dark: no value is above 1 of 255" in line for line in found.lines)
    _, seen = opened(tmp_path, value_range="0,1", bits=1, image_size="40")
    assert set(np.unique(seen)) == {0, 1}


def test_images_without_a_finite_value_are_skipped(tmp_path, grey):
    for i, crop in enumerate(crops(grey)):
        tifffile.imwrite(tmp_path / f"{i:02d}.tif", crop / np.float32(4095))
    tifffile.imwrite(tmp_path / "nan.tif", np.full((40, 40), np.nan, np.float32))
    np.save(tmp_path / "huge.npy", np.full((40, 40), 1e300))
    found, seen = opened(tmp_path, image_size="40")
    assert len(seen) == 20 and "skipped: 2 of 22 images (2 unreadable)" in found.dataset.skipped
    assert sum("not a readable image (no finite value)" in x for x in found.dataset.skipped) == 2
    assert not any(line.startswith(("not numbers", "dark", "flat")) for line in found.lines)


@pytest.mark.parametrize("value", [0.0, 7.0, 1e20])
def test_images_of_one_value_get_no_advice_about_a_range(value, tmp_path):
    for i in range(10):
        tifffile.imwrite(tmp_path / f"{i}.tif", np.full((40, 40), value, np.float32))
    found = settled(tmp_path)
    low, high = map(float, found.config.value_range.split(","))
    assert low < high and settled(tmp_path, value_range=found.config.value_range)
    (line,) = [line for line in found.lines if line.startswith(("dark", "flat"))]
    assert "so that all images are alike" in line and "--value_range" not in line


def test_dark_floats_are_not_told_the_range_that_they_have(tmp_path, grey):
    for i, crop in enumerate(crops(grey)):
        tifffile.imwrite(tmp_path / f"{i:02d}.tif", crop / np.float32(4095 * 50))
    found = settled(tmp_path)
    (line,) = [line for line in found.lines if line.startswith("dark")]
    assert found.config.value_range == "0,1" and "--value_range 0,1 uses" not in line


@pytest.mark.parametrize("value_range", ["5,3", "5,5", "0,1e400"])
def test_a_range_without_two_finite_ends_is_one_line(value_range, tmp_path, grey):
    for i, crop in enumerate(crops(grey)):
        write_png(tmp_path / f"{i:02d}.png", crop)
    with pytest.raises(
        ConfigError, match=f"value_range: {value_range} is not allowed; expected a sm"
    ):
        settled(tmp_path, value_range=value_range)


@pytest.mark.parametrize("flags", [["--alpha", "keep"], ["--crop", "random"], ["--strict"]])
@pytest.mark.parametrize("dataset", ["digits", "lsun_tower_64"])
def test_flags_for_folders_of_images_are_refused_elsewhere(dataset, flags, tmp_path, capsys):
    recipe = ["--config", "digits"] if dataset == "digits" else ["--config", "celeba64"]
    data = [] if dataset == "digits" else ["--dataset", dataset, "--data", str(ROOT)]
    assert train.main([*recipe, *data, "--root", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    expected = rf"{flags[0][2:]}: .* is not allowed with {dataset}; it is for images of"
    assert re.search(expected, error)
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_numbers_that_are_none_are_counted_and_black(tmp_path, grey):
    for i, crop in enumerate(crops(grey)):
        values = crop.astype(np.float32)
        values[3, 4], values[5, 6] = np.nan, np.inf
        tifffile.imwrite(tmp_path / f"{i:02d}.tif", values)
    found, seen = opened(tmp_path, image_size="40", value_range="0,4095")
    assert any(line.startswith("not numbers: 40 values") for line in found.lines)
    assert (seen[:, 3, 4] == 0).all() and (seen[:, 5, 6] == 65535).all()


@pytest.mark.parametrize("crop", [CENTRE, RANDOM, NONE])
def test_eight_bits_are_resized_as_pillow_does_and_others_alike(crop, picture):
    """The float path agrees with Pillow's 8-bit one, which it cannot do better than to half a level."""
    for size in ((64, 64), (64, 96), (96, 40)):
        spec = ImageSpec(*size, 3)
        plain = levels.to_levels(Stored(picture), spec, crop)
        deep = levels.to_levels(
            Stored(picture.astype(np.uint16)), dataclasses.replace(spec, value_range=(0, 255)), crop
        )
        assert plain.dtype == deep.dtype == np.uint8 and plain.shape == deep.shape
        assert np.abs(plain.astype(int) - deep).max() <= 1
        if crop == RANDOM:
            assert plain.shape[0] == size[0] or plain.shape[1] == size[1]
            assert plain.shape[0] >= size[0] and plain.shape[1] >= size[1]
        else:
            assert plain.shape == (*size, 3)
    whole = Image.fromarray(picture)
    box = (106, 0, 533, 427)
    expected = {
        CENTRE: whole.resize((64, 64), Image.BILINEAR, box=box),
        RANDOM: whole.resize((96, 64), Image.BILINEAR),
        NONE: whole.resize((64, 64), Image.BILINEAR),
    }[crop]
    seen = levels.to_levels(Stored(picture), ImageSpec(64, 64, 3), crop)
    np.testing.assert_array_equal(seen, np.asarray(expected))


def all_of(path):
    reader = image_files.ImageReader()
    return [reader.read(item).values for item in reader.items(path)]


def test_pages_planes_and_channels_of_tiffs(tmp_path, grey, picture):
    pages = np.stack(crops(grey, 5))
    tifffile.imwrite(tmp_path / "stack.tif", pages)
    tifffile.imwrite(tmp_path / "plain.tif", pages, metadata=None, compression="zlib", predictor=2)
    tifffile.imwrite(tmp_path / "deep.tif", picture.astype(np.uint16) * 3, photometric="rgb")
    planes = np.moveaxis(picture, -1, 0)
    tifffile.imwrite(tmp_path / "planes.tif", planes, photometric="rgb", planarconfig="separate")
    cells = pages[:4].reshape(2, 2, 40, 40)
    tifffile.imwrite(tmp_path / "imagej.tif", cells, imagej=True, metadata={"axes": "ZCYX"})
    tifffile.imwrite(tmp_path / "cells.ome.tif", cells, metadata={"axes": "CZYX"})
    with tifffile.TiffWriter(tmp_path / "two.tif") as writer:
        writer.write(pages[0])
        writer.write(grey[:50, :60])
    Image.fromarray(pages[0]).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    tifffile.imwrite(tmp_path / "inverse.tif", 65535 - pages[0], photometric="miniswhite")
    for name in ("stack.tif", "plain.tif"):
        np.testing.assert_array_equal(np.stack(all_of(tmp_path / name))[..., 0], pages)
    np.testing.assert_array_equal(all_of(tmp_path / "deep.tif")[0], picture.astype(np.uint16) * 3)
    np.testing.assert_array_equal(all_of(tmp_path / "planes.tif")[0], picture)
    np.testing.assert_array_equal(
        np.stack(all_of(tmp_path / "imagej.tif")), np.moveaxis(cells, 1, -1)
    )
    ome = np.stack(all_of(tmp_path / "cells.ome.tif"))
    np.testing.assert_array_equal(ome, np.moveaxis(cells, 0, -1))
    assert [image.shape for image in all_of(tmp_path / "two.tif")] == [(40, 40, 1), (50, 60, 1)]
    for name in ("lzw.tif", "inverse.tif"):
        np.testing.assert_array_equal(all_of(tmp_path / name)[0][..., 0], pages[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_whatever_reads_them(orientation, tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = orientation
    small = picture[:30, :20]
    Image.fromarray(small).save(tmp_path / "eight.png", exif=exif)
    tag = (274, "H", 1, orientation, True)
    tifffile.imwrite(tmp_path / "x.tif", small, photometric="rgb", extratags=[tag])
    by_pillow, by_tifffile = all_of(tmp_path / "eight.png")[0], all_of(tmp_path / "x.tif")[0]
    np.testing.assert_array_equal(by_pillow, by_tifffile)
    assert by_pillow.shape == ((30, 20, 3) if orientation < 5 else (20, 30, 3))


def test_arrays_are_images(tmp_path, grey, picture):
    stack = np.stack(crops(grey, 12))
    np.save(tmp_path / "grey.npy", stack)
    np.save(tmp_path / "columns.npy", np.asfortranarray(stack))
    np.save(tmp_path / "one.npy", picture)
    labels = np.arange(12)
    np.savez_compressed(tmp_path / "colour.npz", y=labels, x=np.stack(crops(picture, 12)))
    for name in ("grey.npy", "columns.npy"):
        np.testing.assert_array_equal(np.stack(all_of(tmp_path / name))[..., 0], stack)
    np.testing.assert_array_equal(all_of(tmp_path / "one.npy")[0], picture)
    np.testing.assert_array_equal(np.stack(all_of(tmp_path / "colour.npz")), crops(picture, 12))
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(UserError, match=r"labels.npy: not a readable image \(an array of shape"):
        all_of(tmp_path / "labels.npy")
    np.save(tmp_path / "first.npy", np.moveaxis(np.stack(crops(picture, 12)), -1, 1))
    with pytest.raises(UserError, match=r"first.npy: .* \(12, 3, 40, 40\); expected channels last"):
        all_of(tmp_path / "first.npy")
    np.savez(tmp_path / "two.npz", a=stack, b=stack)
    with pytest.raises(UserError, match="2 arrays that could be images"):
        all_of(tmp_path / "two.npz")


def test_images_of_a_file_are_in_one_split_if_there_are_files_enough(tmp_path, grey):
    for i in range(10):
        pages = np.stack(crops(grey, 4))
        tifffile.imwrite(tmp_path / f"{i}.tif", pages, photometric="minisblack")
    train_images, held_out = settled(tmp_path).dataset.open(str(tmp_path))
    assert (len(train_images), len(held_out)) == (36, 4)
    assert len({item.path for item in held_out.source.items}) == 1
    for i in range(1, 10):
        (tmp_path / f"{i}.tif").unlink()
    np.save(tmp_path / "more.npy", np.stack(crops(grey)))
    train_images, held_out = settled(tmp_path).dataset.open(str(tmp_path))
    assert (len(train_images), len(held_out)) == (22, 2)


def test_a_held_out_file_that_cannot_be_used_gives_way_to_the_next_of_the_draw(tmp_path, grey):
    for i, crop in enumerate(crops(grey, 10)):
        write_png(tmp_path / f"{i}.png", crop)

    def files():
        splits = settled(tmp_path).dataset.open(str(tmp_path))
        return [[item.path.name for item in source.source.items] for source in splits]

    trained_on, (held_out,) = files()
    before = (tmp_path / "7.png").read_bytes()
    (tmp_path / "7.png").write_bytes(b"")
    assert "7.png" in trained_on
    assert files() == [[name for name in trained_on if name != "7.png"], [held_out]]
    (tmp_path / "7.png").write_bytes(before)
    (tmp_path / held_out).write_bytes(b"")
    assert files() == files()
    others, (instead,) = files()
    assert sorted([*others, instead]) == trained_on
    for name in others:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"left for \w+: .*0.png: not a readable image") as caught:
        files()
    assert "\n" not in str(caught.value)


def test_an_image_of_few_files_gives_way_too(tmp_path, grey):
    pages = np.stack(crops(grey, 10)).astype(np.float32)
    np.save(tmp_path / "pages.npy", pages)
    _, held_out = settled(tmp_path).dataset.open(str(tmp_path))
    (item,) = held_out.source.items
    pages[item.place] = np.nan
    np.save(tmp_path / "pages.npy", pages)
    train_images, instead = settled(tmp_path).dataset.open(str(tmp_path))
    assert (len(train_images), len(instead)) == (8, 1) and instead.source.items != [item]


def test_splits_given_as_folders_stay_as_they_are(tmp_path, grey):
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        for i, crop in enumerate(crops(grey, 3)):
            write_png(tmp_path / name / f"{i}.png", crop)
    for path in (tmp_path / "validation").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="left for validation: .*validation/0.png: not a readable"):
        settled(tmp_path).dataset.open(str(tmp_path))


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_other_names_of_the_second_split_and_one_that_is_alone(name, tmp_path, grey):
    for folder, count in (("train", 4), (name, 2)):
        (tmp_path / folder).mkdir()
        for i, crop in enumerate(crops(grey, count)):
            write_png(tmp_path / folder / f"{folder}{i}.png", crop)
    found = settled(tmp_path)
    train, test = found.dataset.open(str(tmp_path))
    assert {item[:3] for item in train.file_names()} == {"tra"}
    assert {item[:3] for item in test.file_names()} == {name[:3]}
    assert not any(line.startswith("not split") for line in found.lines)
    (tmp_path / name).rename(tmp_path / "other")
    (line,) = [line for line in settled(tmp_path).lines if line.startswith("not split")]
    assert "train is alone" in line


def test_named_files_are_squeezed_as_the_models_images_were(tmp_path, picture):
    Image.fromarray(picture[:80, :120]).save(tmp_path / "wide.png")
    spec, name = ImageSpec(40, 40, 3), str(tmp_path / "wide.png")
    squeezed = images.named_images([name], spec, "drop", "none").fetch(0)[0]
    expected = Image.fromarray(picture[:80, :120]).resize((40, 40), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(squeezed, np.asarray(expected))
    centre, cropped = (
        images.named_images([name], spec, "drop", crop).fetch(0)[0] for crop in ("centre", "random")
    )
    np.testing.assert_array_equal(centre, cropped)
    assert not np.array_equal(centre, squeezed)


def test_one_picture_is_too_few_in_one_line_about_images(tmp_path, grey, capsys):
    write_png(tmp_path / "alone.png", grey[:64, :64])
    assert inspect.main(["--dataset", "images", "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "0 of 1 image for validation would leave a split empty; add images" in error
    assert "portion" not in error


@contextlib.contextmanager
def as_somebody():
    """As a user who may not read everything, as root may."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_folders_that_cannot_be_read_are_skipped_or_refused(grey):
    with tempfile.TemporaryDirectory() as name:
        folder, closed = Path(name), Path(name) / "closed"
        folder.chmod(0o755)
        closed.mkdir()
        for i, crop in enumerate(crops(grey)):
            write_png((closed if i < 8 else folder) / f"{i:02d}.png", crop)
        closed.chmod(0)
        line = "closed: the folder cannot be read (Permission denied); make it readable"
        with as_somebody():
            found, seen = opened(folder, image_size="40")
            with pytest.raises(UserError) as strict:
                settled(folder, strict=True)
            with pytest.raises(UserError) as named:
                images.named_images([name], ImageSpec(40, 40, 1), "drop")
            with pytest.raises(UserError) as alone:
                settled(closed)
        folder.chmod(0)
        with as_somebody(), pytest.raises(UserError) as top:
            settled(folder)
        folder.chmod(0o755)
        closed.chmod(0o755)
    head = "skipped: 1 of 13 images (1 unreadable as a whole folder)"
    assert found.dataset.skipped[0] == head and line in found.dataset.skipped[1]
    assert len(seen) == 12
    assert all(line in str(caught.value) for caught in (strict, named, alone))
    assert str(top.value).startswith(f"{name}: the folder cannot be read (Permission denied)")


def test_links_to_folders_are_not_followed_and_named(tmp_path, grey):
    cats, folder, linked = tmp_path / "cats", tmp_path / "images", tmp_path / "linked"
    for place in (cats, folder, linked):
        place.mkdir()
    for i, crop in enumerate(crops(grey)):
        write_png(cats / f"{i:02d}.png", crop)
        write_png(folder / f"{i:02d}.png", crop)
    (folder / "more").symlink_to(cats)
    (folder / "again").symlink_to(folder)
    found, seen = opened(folder)
    assert len(seen) == 20 and not found.dataset.skipped
    assert any(line.startswith("not followed: 2 links to folders, again") for line in found.lines)
    (linked / "cats").symlink_to(cats)
    with pytest.raises(
        UserError, match=r"no image files .*\(links to folders, as cats, are not fol"
    ):
        settled(linked)
    assert len(opened(linked / "cats")[1]) == 20


def write_dicom(path, image, photometric="MONOCHROME2", **elements):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    content = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    content.PhotometricInterpretation, content.SamplesPerPixel = photometric, 1
    content.BitsAllocated, content.BitsStored, content.HighBit = 16, 12, 11
    content.PixelRepresentation = 0
    content.Rows, content.Columns = image.shape[-2:]
    if image.ndim == 3:
        content.NumberOfFrames = len(image)
    content.PixelData = image.astype("<u2").tobytes()
    for name, value in elements.items():
        setattr(content, name, value)
    content.save_as(path, enforce_file_format=True)


def test_dicom_slices_in_hounsfield_units(tmp_path, grey):
    for i, crop in enumerate(crops(grey)):
        write_dicom(tmp_path / f"{i:02d}.dcm", crop, RescaleSlope=1, RescaleIntercept=-1024)
    found, seen = opened(tmp_path, image_size="40")
    low = min(int(crop.min()) for crop in crops(grey)) - 1024
    assert found.config.value_range.startswith(f"{low},") and found.config.bits == 12
    hounsfield = {(c.astype(int) - 1024 - low).astype(np.uint16).tobytes() for c in crops(grey)}
    assert {image.tobytes() for image in seen} == hounsfield
    write_dicom(tmp_path / "frames", np.stack(crops(grey, 3)))
    np.testing.assert_array_equal(np.stack(all_of(tmp_path / "frames"))[..., 0], crops(grey, 3))
    write_dicom(tmp_path / "inverse", 4095 - grey, "MONOCHROME1")
    np.testing.assert_array_equal(all_of(tmp_path / "inverse")[0][..., 0], grey)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_nifti_slices(ending, tmp_path, grey):
    nibabel = pytest.importorskip("nibabel")
    volume = np.stack([np.rot90(crop, -1) for crop in crops(grey, 6)], -1).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / f"scan.{ending}")
    seen = np.stack(all_of(tmp_path / f"scan.{ending}"))
    assert seen.dtype == np.int16
    np.testing.assert_array_equal(seen[..., 0], crops(grey, 6))
    scaled = nibabel.Nifti1Image(volume, np.eye(4))
    scaled.header.set_slope_inter(0.5, -10)
    nibabel.save(scaled, tmp_path / f"scaled.{ending}")
    seen = np.stack(all_of(tmp_path / f"scaled.{ending}"))[..., 0]
    np.testing.assert_array_equal(seen, np.stack(crops(grey, 6)) * 0.5 - 10)


@pytest.mark.parametrize(("package", "name"), [("pydicom", "x.dcm"), ("nibabel", "x.nii")])
def test_a_missing_package_is_one_line_that_says_how_to_install_it(
    package, name, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(bytes(128) + (b"DICM" if name == "x.dcm" else b"") + bytes(400))
    with pytest.raises(UserError, match=rf'needs the package {package}: pip install "nvae-tf'):
        settled(tmp_path)


def test_images_that_are_not_square(tmp_path, picture):
    for i in range(20):
        Image.fromarray(picture[i : i + 100, i : i + 130]).save(tmp_path / f"{i:02d}.png")
    found, seen = opened(tmp_path, image_size="96x64")
    assert found.dataset.image.shape == (64, 96, 3) and seen.shape == (20, 64, 96, 3)
    # The box of that shape in the middle of 130x100 is 130x86.
    middle = Image.fromarray(picture[:100, :130]).resize(
        (96, 64), Image.BILINEAR, box=(0, 7, 130, 93)
    )
    assert any((image == np.asarray(middle)).all() for image in seen)
    found = settled(tmp_path, image_size="96x64", crop="random")
    source, _ = found.dataset.open(str(tmp_path))
    batches = pipeline.training_batches(source, found.dataset, batch_size=18, seed=1).take(6)
    varied = np.concatenate([batch.numpy() for batch in batches])
    assert varied.shape == (108, 64, 96, 3) and len({image.tobytes() for image in varied}) > 60


TINY = [
    "--num_latent_scales",
    "1",
    "--num_groups_per_scale",
    "2",
    "--num_latent_per_group",
    "2",
    "--num_channels_enc",
    "4",
    "--num_channels_dec",
    "4",
    "--num_preprocess_cells",
    "1",
    "--num_postprocess_cells",
    "1",
    "--num_mixture_dec",
    "2",
    "--batch_size",
    "6",
    "--epochs",
    "1",
    "--warmup_epochs",
    "0",
    "--jit_compile",
    "off",
]


@pytest.mark.slow
def test_a_run_records_what_was_found_and_goes_on_with_the_same(recipe, tmp_path, grey, capsys):
    folder = tmp_path / "scans"
    folder.mkdir()
    for i, crop in enumerate(crops(grey)):
        tifffile.imwrite(folder / f"{i:02d}.tif", crop)
    arguments = ["--config", str(recipe), "--dataset", "images", "--data", str(folder)]
    arguments += ["--root", str(tmp_path / "runs"), *TINY]
    assert train.main(arguments) == 0
    assert "values: 0 to 4,095 become 4,096 levels, 12 bits" in capsys.readouterr().out
    written = configuration.load(str(tmp_path / "runs" / "tiny" / "config.yaml")).data
    assert (written.image_size, written.channels, written.bits) == ("32", 1, 12)
    assert written.value_range == "0,4095"
    more = [*arguments, "--cont_training", "--epochs", "2"]
    for i, crop in enumerate(crops(grey)):
        tifffile.imwrite(folder / f"{i:02d}.tif", crop // 4)
    assert train.main(more) == 2
    assert "bits: 10 does not continue the run in" in capsys.readouterr().err
    assert train.main([*more, "--bits", "12", "--value_range", "0,4095"]) == 0


def test_inspect_shows_sizes_values_and_what_is_skipped(tmp_path, grey, capsys):
    folder = tmp_path / "scans"
    folder.mkdir()
    for i, crop in enumerate(crops(grey)):
        tifffile.imwrite(folder / f"{i:02d}.tif", crop)
    (folder / "broken.tif").write_bytes(b"II*\0")
    arguments = ["--dataset", "images", "--data", str(folder), "--seconds", "0.1", "--flip"]
    picture = tmp_path / "seen.png"
    assert inspect.main([*arguments, "--output", str(picture)]) == 0
    out = capsys.readouterr().out
    assert (
        "20 images, 16 bits, values" in out and "images: 32x32, 1 channel, 12 bits, mirrored" in out
    )
    assert "of 4,096," in out and "3,840 to 4,095" in out and "#" in out
    assert "skipped: 1 of 21 images (1 unreadable)" in out and "broken.tif: not a readable" in out
    assert Image.open(picture).size[0] > 300
    assert inspect.main([*arguments, "--output", str(picture), "--strict"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_breaks_after_it_was_looked_through_is_one_line(tmp_path, picture):
    for i, crop in enumerate(crops(picture)):
        Image.fromarray(crop).save(tmp_path / f"{i:02d}.png")
    source, _ = settled(tmp_path).dataset.open(str(tmp_path))
    source.source.items[0].path.unlink()
    with pytest.raises(UserError, match="not a readable image") as caught:
        source.fetch(0)
    assert "\n" not in str(caught.value)
    other = images.FolderSource([Item(tmp_path / "05.png")], ImageSpec(64, 64, 3))
    with pytest.raises(UserError, match="the image is 40x40, smaller than 64x64"):
        other.fetch(0)


@pytest.mark.slow
def test_deep_scans_and_wide_pictures_from_files_to_a_gallery(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "examples" / "any_image.sh", tmp_path, *TINY],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "120 images, 16 bits, values 0 to 4,0" in done.stdout
    for name, size, kind in (("scans", (32, 32), "I;16"), ("wide", (96, 64), "RGB")):
        assert (tmp_path / "runs" / name / "gallery.html").is_file()
        assert (tmp_path / "export" / name / "saved_model.pb").is_file()
        samples = sorted((tmp_path / "samples" / name).rglob("*.png"))
        kinds = set()
        for path in samples:
            with Image.open(path) as image:
                kinds.add((image.size, image.mode))
        assert (size, kind) in kinds, kinds

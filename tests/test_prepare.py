"""Every source that ``prepare`` knows, on small real images; and folders trained from directly."""

import io
import json
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow as tf
import tifffile
from PIL import Image

from nvae_tf.cli import prepare as prepare_command
from nvae_tf.cli import train
from nvae_tf.config import CENTRE, NONE, RANDOM, DataConfig
from nvae_tf.data import catalog, images, pipeline, prepare, tfrecords
from nvae_tf.data.source import reading
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import ConfigError, UserError
from nvae_tf.io.lock import exclusive_lock

SMALL = ImageSpec(32, 32, 3)


@pytest.fixture(scope="module")
def pictures():
    """scikit-learn's two photographs, 427x640."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


@pytest.fixture
def folder(tmp_path, pictures):
    """Twenty photographs of several sizes and formats, nested, one with a strange name."""
    root = tmp_path / "photos"
    (root / "deeper" / "still").mkdir(parents=True)
    for i in range(20):
        crop = pictures[i % 2].crop((10 * i, 5 * i, 10 * i + 120 + i, 5 * i + 90))
        place = root / ("deeper/still" if i % 3 == 0 else "")
        crop.save(place / f"a photo\n{i:02d}.{('jpg', 'png', 'webp', 'bmp')[i % 4]}")
    (root / "notes.txt").write_text("not an image")
    return root


def run(*arguments):
    return prepare_command.main([str(a) for a in arguments])


def records(root, split, side):
    """The images as TensorFlow's own reader reads them."""
    loaded = []
    for path in tfrecords.find_shards(root, split, (side, side)):
        for record in tf.data.TFRecordDataset(str(path)):
            features = tf.train.Example.FromString(record.numpy()).features.feature
            shape = features["shape"].int64_list.value
            loaded.append(
                np.frombuffer(features["data"].bytes_list.value[0], np.uint8).reshape(shape)
            )
    return loaded


def test_a_folder_becomes_tfrecords_that_train(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("images", "--input", folder, "--output", out, "--size", 32) == 0
    assert "18 images in train, 2 images in validation" in capsys.readouterr().out
    train = records(out, "train", 32)
    assert len(train) == 18 and all(image.shape == (32, 32, 3) for image in train)
    dataset = catalog.get_dataset_info(DataConfig(dataset="tfrecords", data=str(out)))
    source, validation = dataset.open(str(out))
    assert len(validation) == 2
    np.testing.assert_array_equal([source.fetch(i)[0] for i in range(18)], train)
    manifest = json.loads((out / prepare.MANIFEST).read_text())
    assert manifest["counts"] == {"train": 18, "validation": 2} and manifest["skipped"] == {}


def test_a_centre_crop_is_pillows(folder, tmp_path, pictures):
    path = folder / "deeper" / "still" / "a photo\n03.bmp"
    with Image.open(path) as image:
        width, height = image.size
        left = (width - height) // 2
        expected = image.crop((left, 0, left + height, height)).resize((32, 32), Image.BILINEAR)
    centre = images.load_image(path, path, SMALL, CENTRE)
    np.testing.assert_allclose(centre, np.asarray(expected), atol=3)
    squeezed = images.load_image(path, path, SMALL, NONE)
    assert squeezed.shape == (32, 32, 3) and not np.array_equal(squeezed, centre)
    assert images.load_image(path, path, SMALL, RANDOM).shape == (
        32,
        round(width * 32 / height),
        3,
    )


def test_random_crops_move_in_training_and_stay_in_evaluation(folder, tmp_path):
    out = tmp_path / "out"
    arguments = ("--size", 32, "--crop", "random", "--validation", 0.5)
    assert run("images", "--input", folder, "--output", out, *arguments) == 0
    small = catalog.get_dataset_info(DataConfig(dataset="tfrecords", data=str(out), crop="random"))
    source, _ = small.open(str(out))
    assert small.image.shape == (32, 32, 3)
    wide = source.fetch(0)[0]
    assert wide.shape[0] == 32 and wide.shape[1] > 38
    batches = pipeline.evaluation_batches(source, small, batch_size=10, seed=0)
    centre = np.rint(next(iter(batches))[0] * 255.0)
    left = (wide.shape[1] - 32 + 1) // 2
    np.testing.assert_array_equal(centre, wide[:, left : left + 32])
    epochs = pipeline.training_batches(source, small, batch_size=10, seed=0).take(8)
    seen = {image.tobytes() for batch in epochs for image in batch.numpy()}
    assert len(seen) > 50
    settled = catalog.settle(DataConfig(dataset="tfrecords", data=str(out)))
    assert settled.config.crop == "random"  # without the flag, too


def test_files_of_every_mode_are_read(tmp_path, pictures):
    picture = pictures[0].crop((0, 0, 64, 64))
    grey = np.asarray(picture.convert("L"))
    modes = {
        "rgba.png": picture.convert("RGBA"),
        "palette.png": picture.quantize(64),
        "cmyk.jpg": picture.convert("CMYK"),
        "grey.png": picture.convert("L"),
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "animated.gif": picture.quantize(64),
    }
    for name, image in modes.items():
        image.save(tmp_path / name)
        spec = ImageSpec(32, 32, 3, value_range=(0, 65535) if name == "deep.png" else None)
        loaded = images.load_image(tmp_path / name, name, spec, CENTRE)
        close = np.abs(loaded.astype(int).mean() - np.asarray(picture).astype(int).mean())
        assert loaded.shape == (32, 32, 3) and close < 12, name
    turned = Image.Exif()
    turned[0x0112] = 6  # turn right to see it upright
    picture.crop((0, 0, 64, 32)).save(tmp_path / "turned.jpg", exif=turned, quality=95)
    upright = images.load_image(tmp_path / "turned.jpg", "turned", SMALL, NONE)
    sideways = (
        picture.crop((0, 0, 64, 32)).rotate(-90, expand=True).resize((32, 32), Image.BILINEAR)
    )
    assert np.abs(upright.astype(int) - np.asarray(sideways)).mean() < 6


def test_preparing_continues_and_keeps_complete_shards(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "IMAGES_PER_SHARD", 5)
    out = tmp_path / "out"
    arguments = ("images", "--input", folder, "--output", out, "--size", 32)
    assert run(*arguments) == 0
    whole = {path.name: path.read_bytes() for path in (out / "train").iterdir()}
    assert len(whole) == 4
    kept, gone, cut = sorted((out / "train").iterdir())[:3]
    stamp = kept.stat().st_mtime_ns
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-5])
    (out / "train" / f".{cut.name}.killed.part").write_bytes(b"half a shard")
    assert run(*arguments) == 0
    out_of_it = capsys.readouterr().out
    assert f"{cut.name}: damaged, and written again" in out_of_it
    assert "kept: 3 of 5 shards, which were complete" in out_of_it
    assert kept.stat().st_mtime_ns == stamp
    assert {path.name: path.read_bytes() for path in (out / "train").iterdir()} == whole
    assert run(*arguments[:-1], 64) == 2
    assert "prepared with another size" in capsys.readouterr().err
    first = next(folder.glob("*.*"))
    first.rename(first.with_name(f"other{first.suffix}"))
    assert run(*arguments) == 2  # or images could be in both splits
    assert "prepared with another list of images" in capsys.readouterr().err
    (out / prepare.MANIFEST).unlink()
    assert run(*arguments) == 2
    assert "holds tfrecords of another origin" in capsys.readouterr().err


def test_unreadable_images_are_skipped_and_listed_or_refused(folder, tmp_path, monkeypatch, capsys):
    broken = folder / "broken.jpg"
    broken.write_bytes((folder / "deeper/still/a photo\n00.jpg").read_bytes()[:700])
    out = tmp_path / "out"
    assert run("images", "--input", folder, "--output", out, "--size", 32) == 0
    manifest = json.loads((out / prepare.MANIFEST).read_text())
    assert manifest["skipped"] == {"broken.jpg": "unreadable"}
    assert sum(manifest["counts"].values()) == 20
    status = run("images", "--input", folder, "--output", out, "--size", 32)
    assert status == 0 and "skipped: 1 image (1 unreadable)" in capsys.readouterr().out
    (folder / "worse.png").write_bytes(b"")
    arguments = ("images", "--input", folder, "--size", 32)
    assert run(*arguments, "--output", tmp_path / "other") == 0
    assert "skipped: 2 of 22 images (2 unreadable)" in capsys.readouterr().out
    assert run(*arguments, "--output", tmp_path / "strict", "--strict") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "broken.jpg: not a readable image" in error
    assert not (tmp_path / "strict").exists()


def test_grey_of_12_bits_that_is_not_square_makes_the_way_through_tfrecords(
    tmp_path, pictures, capsys
):
    source, out = tmp_path / "scans", tmp_path / "out"
    source.mkdir()
    values = np.asarray(pictures[0]).astype(np.uint32).sum(-1) * 4000 // 765 - 1000
    for i in range(20):
        crop = values[5 * i : 5 * i + 64, 9 * i : 9 * i + 96].astype(np.int16)
        crop[0, :2] = -1000, 3000
        tifffile.imwrite(source / f"{i:02d}.tif", crop)
    arguments = ("images", "--input", source, "--output", out, "--size", "48x32")
    assert run(*arguments, "--crop", "none") == 0
    printed = capsys.readouterr().out
    assert "20 images, 16 bits, values -1,000 to 3,000, grey, 96x64" in printed
    assert "become 4,096 levels, 12 bits" in printed
    (shard,) = (out / "train").iterdir()
    assert shard.name == "train-48x32-s-0000-of-0001.tfrecords"
    (record, *_) = tf.data.TFRecordDataset(str(shard)).as_numpy_iterator()
    features = tf.train.Example.FromString(record).features.feature
    assert list(features["bits"].int64_list.value) == [12]
    first = np.frombuffer(features["data"].bytes_list.value[0], "<u2").reshape(32, 48, 1)
    plain = dict(image_size="48x32", crop="none")
    folder = catalog.settle(DataConfig(dataset="images", data=str(source), **plain))
    prepared = catalog.settle(DataConfig(dataset="tfrecords", data=str(out)))
    for name in ("image_size", "channels", "bits", "value_range"):
        assert getattr(prepared.config, name) == getattr(folder.config, name)
    assert prepared.config.value_range == "-1000,3095"
    assert (
        prepared.dataset.image
        == folder.dataset.image
        == ImageSpec(32, 48, 1, 12, value_range=(-1000, 3095))
    )
    for one, other in zip(
        prepared.dataset.open(str(out)), folder.dataset.open(str(source)), strict=True
    ):
        assert len(one) == len(other) and one.dtype == np.uint16
        for i in range(len(one)):
            np.testing.assert_array_equal(one.fetch(i)[0], other.fetch(i)[0])
    np.testing.assert_array_equal(one.fetch(0)[0].shape, first.shape)
    with pytest.raises(ConfigError, match="bits: 8 is not allowed; the tfrecords in .* have 12"):
        catalog.settle(DataConfig(dataset="tfrecords", data=str(out), bits=8))
    with pytest.raises(ConfigError, match="alpha: white is not allowed; .* have drop"):
        catalog.settle(DataConfig(dataset="tfrecords", data=str(out), alpha="white"))
    with pytest.raises(ConfigError, match="crop: none is not allowed"):
        catalog.settle(DataConfig(dataset="tfrecords", data=str(out), crop="none"))
    # The same command does nothing; one with other bits is refused.
    stamp = shard.stat().st_mtime_ns
    assert run(*arguments, "--crop", "none") == 0 and shard.stat().st_mtime_ns == stamp
    assert run(*arguments, "--crop", "none", "--bits", "8") == 2
    assert "prepared with another bits" in capsys.readouterr().err


def test_prepare_finds_a_size_and_skips_what_is_smaller(folder, tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(folder / "small.png")
    assert run("images", "--input", folder, "--output", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "image_size: 64, the largest" in out and "skipped: 1 image (1 too small)" in out
    manifest = json.loads((tmp_path / "out" / prepare.MANIFEST).read_text())
    assert manifest["skipped"] == {"small.png": "too small"}
    assert manifest["settings"]["size"] == "64"
    assert records(tmp_path / "out", "train", 64)[0].shape == (64, 64, 3)


def test_faces_may_miss_one_in_a_hundred(tmp_path, pictures, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(10):
        pictures[0].crop((8 * i, 0, 8 * i + 300, 300)).save(source / f"{i:05d}.png")
    for name in ("broken.png", "worse.png"):
        (source / name).write_bytes(b"")
    assert run("ffhq", "--input", source, "--output", tmp_path / "out") == 2
    assert "2 of 12 images are unreadable, more than 1: broken.png" in capsys.readouterr().err
    for number, name in enumerate(("broken.png", "worse.png")):  # mended
        pictures[0].crop((number, 9, number + 300, 309)).save(source / name)
    assert run("ffhq", "--input", source, "--output", tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / prepare.MANIFEST).read_text())
    assert manifest["skipped"] == {} and sum(manifest["counts"].values()) == 12
    assert not list((tmp_path / "out").rglob("*.unreadable"))


def test_a_preparation_that_wrote_nothing_does_not_block_another(tmp_path, pictures, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(10):
        pictures[0].crop((8 * i, 0, 8 * i + 64, 48)).save(source / f"{i:05d}.png")
    arguments = ("ffhq", "--input", source, "--output", out)
    assert run(*arguments) == 2
    assert "is 64x48, smaller than 256x256; ask for a smaller size" in capsys.readouterr().err
    assert run(*arguments, "--size", 32) == 0
    assert run(*arguments, "--size", 16) == 2
    assert "was prepared with another size" in capsys.readouterr().err
    assert len(records(out, "train", 32)) == 9


def test_tfrecords_are_not_written_among_the_images(folder, tmp_path, capsys):
    (tmp_path / "train").symlink_to(folder)
    for output in (folder, folder / "deeper" / "out", tmp_path):
        assert run("images", "--input", folder, "--output", output, "--size", 32) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --output: {output} would put tfrecords among the images")
        assert error.count("\n") == 1 and not list(tmp_path.rglob("*.json"))


def test_a_portion_for_a_folder_that_is_split_already_gets_a_notice(folder, tmp_path, capsys):
    (folder / "deeper").rename(folder / "train")
    (folder / "validation").mkdir()
    for path in folder.glob("*.*"):
        path.rename(folder / "validation" / path.name)
    arguments = ("images", "--input", folder, "--size", 32, "--output")
    assert run(*arguments, tmp_path / "one", "--validation", 0) == 0
    notice = "validation: 0 is not used, because the folder is split already"
    assert notice in capsys.readouterr().out
    assert run(*arguments, tmp_path / "two") == 0
    assert "not used" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images", "--size", "128"], "20 images can be used .20 too small.*than 128x128"),
        (["images", "--size", "4"], "--size: 4 is not allowed; expected sides of 8 to 4096"),
        (["images", "--size", "1x2x3"], "--size: 1x2x3 is not allowed; expected a side"),
        (["celeba", "--size", "33"], "--size: 33 is not allowed for celeba; expected a power"),
        (["ffhq", "--size", "96x64"], "--size: 96x64 is not allowed for ffhq"),
        (["celeba", "--bits", "5"], "--bits: not for celeba; it is for images "),
        (["celeba", "--crop", "none"], "--crop: not for celeba; it is for images and ffhq "),
        (["lsun", "--seed", "1"], "--seed: not for lsun; it is for images and ffhq "),
        (["tar", "--size", "64"], "--size: not for tar"),
        (["lsun"], "--size is needed for lsun"),
        (["images", "--size", "32", "--validation", "0"], "0 of 20 images for validation would"),
        (["celeba"], "no list_eval_partition.txt"),
        (["lsun", "--size", "32"], "expected one folder .*_train_lmdb"),
        (["tar"], "no such file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, folder, tmp_path, capsys):
    try:
        status = run(*arguments, "--input", folder, "--output", tmp_path / "out")
    except SystemExit as error:  # a mistake in a flag
        status = error.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert status == 2 and len(lines) == 1
    assert re.search(message, lines[0])


def test_celeba_by_its_own_split_and_crop(tmp_path, pictures):
    aligned = tmp_path / "in" / "img_align_celeba"
    aligned.mkdir(parents=True)
    lines = []
    for i in range(12):
        face = pictures[i % 2].crop((8 * i, 4 * i, 8 * i + 178, 4 * i + 218))
        face.save(aligned / f"{i:06d}.png")
        lines.append(f"{i:06d}.png {0 if i < 8 else 1 if i < 10 else 2}")
    (tmp_path / "in" / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    assert run("celeba", "--input", tmp_path / "in", "--output", out) == 0
    train, test = (records(out, split, 64) for split in ("train", "test"))
    assert (len(train), len(records(out, "validation", 64)), len(test)) == (8, 2, 2)
    face = pictures[0].crop((0, 0, 178, 218)).crop((15, 40, 163, 188))
    np.testing.assert_array_equal(train[0], np.asarray(face.resize((64, 64), Image.BILINEAR)))
    _, evaluated = catalog.get_dataset_info(DataConfig(dataset="celeba_64")).open(str(out))
    np.testing.assert_array_equal(evaluated.fetch(0)[0], test[0])


def test_ffhq_is_split_at_random_but_always_the_same(tmp_path, pictures):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(10):
        pictures[i % 2].crop((8 * i, 4 * i, 8 * i + 300, 4 * i + 300)).save(source / f"{i:05d}.png")
    for out in ("a", "b"):
        assert run("ffhq", "--input", source, "--output", tmp_path / out) == 0
    one, other = (records(tmp_path / out, "validation", 256) for out in ("a", "b"))
    assert len(one) == 1
    np.testing.assert_array_equal(one, other)


def test_lsun_databases(tmp_path, pictures):
    lmdb = pytest.importorskip("lmdb")
    (tmp_path / "in").mkdir()
    for part, count in (("train", 6), ("val", 2)):
        with lmdb.open(
            str(tmp_path / "in" / f"church_outdoor_{part}_lmdb"), map_size=1 << 24
        ) as base:
            for i in range(count):
                content = io.BytesIO()
                pictures[i % 2].crop((9 * i, 0, 9 * i + 200, 150)).save(
                    content, "WEBP", lossless=True
                )
                with base.begin(write=True) as transaction:
                    transaction.put(f"{i:040d}".encode(), content.getvalue())
    out = tmp_path / "out"
    assert run("lsun", "--input", tmp_path / "in", "--output", out, "--size", 64) == 0
    dataset = catalog.get_dataset_info(DataConfig(dataset="lsun_church_64"))
    train, validation = dataset.open(str(out))
    assert (len(train), len(validation)) == (6, 2)
    whole = pictures[0].crop((0, 0, 200, 150)).resize((85, 64), Image.BILINEAR)
    np.testing.assert_array_equal(train.fetch(0)[0], np.asarray(whole))
    batch = next(iter(pipeline.training_batches(train, dataset, batch_size=6, seed=0)))
    assert batch.shape == (6, 64, 64, 3)


def test_the_official_tar_is_unpacked_and_nothing_escapes(folder, tmp_path, capsys):
    prepared = tmp_path / "prepared"
    assert run("images", "--input", folder, "--output", prepared, "--size", 32) == 0
    archive = tmp_path / "imagenet-oord-tfr.tar"
    shard = next((prepared / "train").iterdir())
    with tarfile.open(archive, "w") as tar:
        tar.add(prepared, "mnt/host/imagenet-oord-tfr")
        tar.add(shard, f"../../escaped/{shard.name}.txt")
        tar.add(shard, "/etc/escaped.tfrecords")
        link = tarfile.TarInfo(f"train/{shard.name.replace('0000-of', '0001-of')}")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    out = tmp_path / "out"
    capsys.readouterr()
    assert run("tar", "--input", archive, "--output", out) == 0
    assert "18 images in train 32x32, 2 images in validation 32x32" in capsys.readouterr().out
    assert sorted(p.name for p in out.rglob("*.tfrecords")) == sorted(
        p.name for p in prepared.rglob("*.tfrecords")
    )
    assert not list(tmp_path.rglob("*escaped*"))
    assert run("tar", "--input", archive, "--output", prepared) == 2
    assert "prepared: was prepared from images; choose another" in capsys.readouterr().err
    archive.write_bytes(archive.read_bytes()[:30000])
    assert run("tar", "--input", archive, "--output", tmp_path / "cut") == 2
    assert "cannot be unpacked" in capsys.readouterr().err


def test_unpacking_is_for_one_process_alone(folder, tmp_path, capsys):
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    assert run("images", "--input", folder, "--output", prepared, "--size", 32) == 0
    with tarfile.open(tmp_path / "glow.tar", "w") as tar:
        tar.add(prepared, "glow")
    with exclusive_lock(out, "preparing data"):
        assert run("tar", "--input", tmp_path / "glow.tar", "--output", out) == 2
        assert "out: another process is preparing data here" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [".lock"]
    (out / "train").mkdir(parents=True)
    (out / "train" / ".shard.killed.part").write_bytes(b"half of it")
    assert run("tar", "--input", tmp_path / "glow.tar", "--output", out) == 0
    assert [path.name for path in out.rglob(".*")] == [".lock"]
    (tmp_path / "glow.tar").write_bytes(b"no tar")
    assert run("tar", "--input", tmp_path / "glow.tar", "--output", tmp_path / "new") == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]


WARNED = """
import sys, warnings
import nvae_tf.data.images
warnings.warn_explicit("odd metadata", UserWarning, "PIL/Image.py", 1, module="PIL.Image")
"""


@pytest.mark.slow
def test_pillows_warnings_are_the_commands_to_silence_and_nobody_elses(folder, tmp_path):
    shown = subprocess.run(
        [sys.executable, "-c", WARNED], capture_output=True, text=True, check=True
    )
    assert "UserWarning: odd metadata" in shown.stderr
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")  # Pillow calls it a bomb
    command = [sys.executable, "-m", "nvae_tf.cli.prepare", "images", "--size", "32"]
    command += ["--input", str(folder), "--output", str(tmp_path / "out")]
    silent = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Bomb" not in silent.stderr and "skipped: 1 image (1 unreadable)" in silent.stdout


def test_a_plain_folder_needs_no_preparation(folder):
    config = DataConfig(dataset="images", data=str(folder), image_size="32")
    dataset = catalog.get_dataset_info(config)
    train, test = dataset.open(str(folder))
    assert (len(train), len(test)) == (18, 2)
    with reading(train):
        batches = pipeline.training_batches(train, dataset, batch_size=6, seed=0).take(6)
        seen = np.concatenate([batch.numpy() for batch in batches])
    # Images of one's own are not mirrored, so each is there as it is, twice.
    assert seen.shape == (36, 32, 32, 3) and len({image.tobytes() for image in seen}) == 18
    (folder / "deeper" / "a new one.jpg").write_bytes(b"\xff\xd8 not a JPEG")
    train, test = catalog.get_dataset_info(config).open(str(folder))
    assert len(train) + len(test) == 20  # it is skipped
    train.source.items[3].path.write_bytes(b"broken after the folder was looked through")
    with (
        pytest.raises(UserError, match="not a readable image"),
        reading(train, test),
    ):
        for source in (train, test):
            list(pipeline.evaluation_batches(source, dataset, batch_size=4, seed=0))


@pytest.mark.slow
def test_training_on_a_plain_folder(folder, tmp_path, capsys):
    small = """
        --num_latent_scales 1 --num_groups_per_scale 2 --no-ada_groups --num_latent_per_group 2
        --num_channels_enc 4 --num_channels_dec 4 --num_preprocess_cells 1 --num_postprocess_cells 1
        --num_cell_per_cond_enc 1 --num_cell_per_cond_dec 1 --num_nf 0 --num_mixture_dec 2
        --batch_size 6 --epochs 2 --warmup_epochs 0
    """
    arguments = ["--config", "celeba64", "--dataset", "images", "--data", str(folder)]
    arguments += ["--image_size", "64", "--root", str(tmp_path / "runs"), *small.split()]
    assert train.main(arguments) == 0
    (folder / "broken.png").write_bytes(b"")
    assert train.main([*arguments, "--save", "broken", "--strict"]) == 2
    assert not (tmp_path / "runs" / "broken").exists()
    assert train.main([*arguments, "--save", "skipped"]) == 0
    last = capsys.readouterr().out.splitlines()
    assert "skipped: 1 of 21 images (1 unreadable)" in last
    assert any("broken.png: not a readable image" in line for line in last)


def test_an_lsun_database_without_images_is_one_line(tmp_path, capsys):
    lmdb = pytest.importorskip("lmdb")
    (tmp_path / "in").mkdir()
    for part in ("train", "val"):
        lmdb.open(str(tmp_path / "in" / f"church_outdoor_{part}_lmdb"), map_size=1 << 20).close()
    assert run("lsun", "--input", tmp_path / "in", "--output", tmp_path / "out", "--size", 64) == 2
    assert "church_outdoor_train_lmdb: holds no images" in capsys.readouterr().err

"""GLOW's tfrecords: read as others write them, and every way in which they can be broken."""

import os
import shutil

import numpy as np
import pytest
import tensorflow as tf

from nvae_tf.cli import inspect
from nvae_tf.cli.train import main
from nvae_tf.config import DataConfig
from nvae_tf.data import catalog, pipeline
from nvae_tf.data.source import reading
from nvae_tf.io.errors import ConfigError, UserError


def example(image, label=0, shape=None):
    """A record as GLOW's own script makes it, without our writer."""
    int64 = lambda values: tf.train.Feature(int64_list=tf.train.Int64List(value=values))  # noqa: E731
    data = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()]))
    feature = {"shape": int64(shape or image.shape), "data": data, "label": int64([label])}
    feature["attr"] = int64([1] * 40)
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def write_shards(root, images, split, shards, bits=5):
    (root / split).mkdir(parents=True)
    for i, part in enumerate(np.array_split(np.arange(len(images)), shards)):
        name = f"{split}-r{bits:02d}-s-{i:04d}-of-{shards:04d}.tfrecords"
        with tf.io.TFRecordWriter(str(root / split / name)) as writer:
            for number in part:
                writer.write(example(images[number], label=int(number)))


@pytest.fixture
def glow(tmp_path, photographs):
    """54 training images in 4 shards and 10 for validation in 2, where archives unpack to."""
    root = tmp_path / "mnt" / "host" / "imagenet-oord-tfr"
    write_shards(root, photographs[:54], "train", 4)
    write_shards(root, photographs[54:], "validation", 2)
    return root


def open_dataset(folder, **keys):
    dataset = catalog.get_dataset_info(
        DataConfig(data=str(folder), **{"dataset": "imagenet_32", **keys})
    )
    return dataset, *dataset.open(str(folder))


def all_images(source, dataset):
    with reading(source):
        batches = pipeline.evaluation_batches(source, dataset, batch_size=16, seed=0)
        return np.concatenate([np.rint(batch * 255.0).astype(np.uint8) for batch in batches])


def test_records_are_read_in_order_with_their_labels(glow, photographs):
    dataset, train, validation = open_dataset(glow)
    assert (len(train), len(validation)) == (54, 10)
    np.testing.assert_array_equal(all_images(train, dataset), photographs[:54])
    np.testing.assert_array_equal(all_images(validation, dataset), photographs[54:])
    assert [train.fetch(i)[1] for i in (0, 20, 53)] == [0, 20, 53]


def test_any_folder_above_will_do_and_the_size_is_found(glow, tmp_path, photographs):
    for folder in (glow, glow.parent, tmp_path):
        dataset, train, _ = open_dataset(folder, dataset="tfrecords")
        assert dataset.image.shape == (32, 32, 3) and len(train) == 54
    small = np.ascontiguousarray(photographs[:4, ::2, ::2])
    write_shards(glow / "more", small, "train", 1, bits=4)
    (glow / "more/train/train-r04-s-0000-of-0001.tfrecords").rename(
        glow / "train/train-r04-s-0000-of-0001.tfrecords"
    )
    with pytest.raises(ConfigError, match=r"choose one of 16, 32 with --image_size"):
        open_dataset(glow, dataset="tfrecords")
    assert open_dataset(glow, dataset="tfrecords", image_size="32")[0].image.shape == (32, 32, 3)


def test_shards_are_not_held_open(glow):
    before = len(os.listdir("/proc/self/fd"))
    _, train, validation = open_dataset(glow)
    train.fetch(0), validation.fetch(0)
    assert len(os.listdir("/proc/self/fd")) <= before
    (glow / "train" / "train-r05-s-0000-of-0004.tfrecords").unlink()
    with pytest.raises(UserError, match="s-0000-of-0004.tfrecords: cannot be read"):
        train.fetch(0)


def test_an_epoch_is_one_pass_whatever_the_number_of_shards(glow, tmp_path, photographs):
    write_shards(tmp_path / "other", photographs[:54], "train", 3)
    write_shards(tmp_path / "other", photographs[54:], "validation", 1)
    orders = []
    for folder in (glow, tmp_path / "other"):
        dataset, train, _ = open_dataset(folder)
        batches = pipeline.training_batches(train, dataset, batch_size=9, seed=5)
        orders.append(np.concatenate([batch.numpy() for batch in batches.take(6)]))
    np.testing.assert_array_equal(*orders)
    # Mirrored or not, every photograph is there once.
    key = lambda image: min(image.tobytes(), np.ascontiguousarray(image[:, ::-1]).tobytes())  # noqa: E731
    expected = sorted(map(key, (photographs[:54] / np.float32(255.0)).astype(np.float32)))
    assert sorted(map(key, orders[0])) == expected


@pytest.mark.slow
def test_training_from_tfrecords(glow, tmp_path, capsys):
    tiny = """
        num_latent_scales: 1
        num_groups_per_scale: 2
        num_latent_per_group: 2
        num_channels_enc: 4
        num_channels_dec: 4
        num_preprocess_cells: 1
        num_postprocess_cells: 1
        num_mixture_dec: 2
        num_x_bits: 5
        epochs: 2
        warmup_epochs: 0
    """
    (tmp_path / "tiny.yaml").write_text(tiny)
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--dataset", "imagenet_32"]
    arguments += ["--data", str(glow), "--root", str(tmp_path / "runs"), "--batch_size", "18"]
    assert main(arguments) == 0
    assert "54 training and 10 test images" in capsys.readouterr().out


def damage(kind, path, image):
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-100])
    elif kind == "header cut":
        path.write_bytes(content + b"\x01\x02")
    elif kind == "length flipped":
        content[1] ^= 1
        path.write_bytes(content)
    elif kind == "pixel flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "gone empty":
        path.write_bytes(b"")
    else:
        record = {
            "shape lies": lambda: example(image, shape=(32, 32, 4)),
            "negative shape": lambda: example(image, shape=(-32, -32, 3)),
            "another size": lambda: example(np.ascontiguousarray(image[:16, :16])),
            "grey": lambda: example(np.ascontiguousarray(image[..., :1])),
            "no example": lambda: b"\xff\xff\xff",
            "no data": lambda: tf.train.Example().SerializeToString(),
        }[kind]()
        with tf.io.TFRecordWriter(str(path)) as writer:
            writer.write(record)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "shard missing, with 1 of 4 in all"),
        ("truncated", "the file ends within this record, at byte "),
        ("header cut", "the file ends within a record's header, at byte "),
        ("length flipped", "length does not match its checksum, at byte 0"),
        ("pixel flipped", "the record does not match its checksum, at byte "),
        ("shape lies", r"its shape \(32, 32, 4\) is not that of its 3072 bytes, at byte 0"),
        ("negative shape", r"its shape \(-32, -32, 3\) is not"),
        ("another size", "the image at byte 0 is 16x16, not 32x32"),
        ("grey", "its image has 1 channels, not 3"),
        ("no example", "not an example with shape and data"),
        ("no data", "not an example with shape and data"),
    ],
)
def test_broken_tfrecords_are_named(kind, message, glow, photographs):
    path = glow / "train" / "train-r05-s-0002-of-0004.tfrecords"
    damage(kind, path, photographs[0])
    with pytest.raises(UserError, match=message) as caught:
        dataset, train, _ = open_dataset(glow)
        all_images(train, dataset)
    assert str(path) in str(caught.value) and "again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_split_is_refused(glow, photographs):
    for path in (glow / "validation").iterdir():
        damage("gone empty", path, photographs[0])
    with pytest.raises(UserError, match="validation: the tfrecords hold no images"):
        open_dataset(glow)


@pytest.mark.parametrize("dataset", ["imagenet_32", "tfrecords"])
def test_a_split_that_is_gone_is_named(dataset, glow):
    shutil.rmtree(glow / "validation")
    with pytest.raises(
        UserError, match="the split validation are missing; fetch or prepare"
    ) as caught:
        open_dataset(glow, dataset=dataset)
    assert "image_size" not in str(caught.value)


def test_a_wrong_resolution_or_folder_is_refused(glow, tmp_path):
    with pytest.raises(UserError, match="no tfrecords of 64x64 images .*present: 32x32"):
        open_dataset(glow, dataset="imagenet_64")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: expected one set of tfrecords .* found nothing"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_dataset(tmp_path / "nowhere")


def test_inspect_shows_what_training_sees(glow, tmp_path, capsys):
    picture = tmp_path / "seen.png"
    arguments = ["--dataset", "imagenet_32", "--data", str(glow), "--num_x_bits", "2"]
    assert inspect.main([*arguments, "--output", str(picture), "--seconds", "0.2"]) == 0
    out = capsys.readouterr().out
    assert (
        "imagenet_32: 32x32, 3 channels, 8 bits, mirrored at random" in out
        and "training: 54 images, labels 0 to 53" in out
    )
    assert "0 to 3 of 4, 4 different" in out and "images/s" in out
    from PIL import Image

    assert {0, 85, 170, 255} <= set(np.asarray(Image.open(picture)).ravel())
    assert inspect.main(["--dataset", "imagenet_32", "--data", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.count("\n") == 1

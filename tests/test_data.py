"""Data sets and the batches made of them."""

import io
import pickle
import struct

import numpy as np
import pytest

from nvae_tf.config import DataConfig
from nvae_tf.data import catalog, pipeline
from nvae_tf.data.catalog import DatasetInfo
from nvae_tf.data.source import ArraySource
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError

COLOUR = DatasetInfo("photographs", ImageSpec(32, 32, 3), read=None, flip=False)
FLIPPED = DatasetInfo("photographs", ImageSpec(32, 32, 3), read=None)


def load(name, folder=""):
    """Training and test images of a data set as arrays, and the description."""
    dataset = catalog.get_dataset_info(DataConfig(dataset=name))
    return [source.images.numpy() for source in dataset.open(str(folder))], dataset


def take(batches, count):
    return [batch.numpy() for batch in batches.take(count)]


def test_digits_are_1797_real_images_in_a_fixed_split():
    (train, test), digits = load("digits")
    assert (len(train), len(test)) == (1438, 359)
    assert train.shape[1:] == digits.image.shape and train.dtype == np.uint8
    (reloaded, _), _ = load("digits")
    np.testing.assert_array_equal(train, reloaded)
    seen = {image.tobytes() for image in train}
    # A handful of the 8x8 digits are identical.
    assert sum(image.tobytes() in seen for image in test) < 5


def test_an_epoch_shows_every_image_once_in_another_order(photographs):
    batches = pipeline.training_batches(ArraySource(photographs), COLOUR, batch_size=16, seed=3)
    epochs = [np.concatenate(take(batches.skip(4 * e), 4)) for e in range(2)]
    originals = sorted((photographs / np.float32(255.0)).astype(np.float32).tolist())
    for epoch in epochs:
        assert sorted(epoch.tolist()) == originals
    assert not np.array_equal(*epochs)


def test_training_starts_at_any_step(photographs):
    source = ArraySource(photographs)

    def batches(seed=3, start_step=0):
        return pipeline.training_batches(
            source, FLIPPED, batch_size=10, seed=seed, start_step=start_step
        )

    whole, tail, other = (
        take(batches(), 9),
        take(batches(start_step=5), 4),
        take(batches(seed=4), 9),
    )
    np.testing.assert_array_equal(whole[5:], tail)
    assert not np.array_equal(whole, other)


def test_workers_share_the_batches_of_one(photographs):
    source, options = ArraySource(photographs), dict(batch_size=12, seed=3, start_step=2)
    alone = take(pipeline.training_batches(source, FLIPPED, **options), 6)
    parts = [
        take(pipeline.training_batches(source, FLIPPED, worker=w, num_workers=3, **options), 6)
        for w in range(3)
    ]
    for whole, *shares in zip(alone, *parts, strict=True):
        assert [len(share) for share in shares] == [4, 4, 4]
        np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_half_of_the_images_are_mirrored(photographs):
    same = photographs[:1].repeat(200, 0)
    batches = pipeline.training_batches(ArraySource(same), FLIPPED, batch_size=200, seed=1)
    seen = take(batches, 1)[0]
    image = (photographs[0] / np.float32(255.0)).astype(np.float32)
    straight = (np.abs(seen - image).max((1, 2, 3)) == 0).sum()
    mirrored = (np.abs(seen - image[:, ::-1]).max((1, 2, 3)) == 0).sum()
    assert straight + mirrored == 200 and 60 < mirrored < 140


def test_binarisation_is_drawn_anew_in_training_and_fixed_in_evaluation():
    (train, test), digits = load("digits")
    same = ArraySource(train[:1].repeat(500, 0))
    batch = take(pipeline.training_batches(same, digits, batch_size=500, seed=1), 1)[0]
    assert set(np.unique(batch)) == {0.0, 1.0}
    np.testing.assert_allclose(batch.mean(0), train[0] / 255.0, atol=0.1)

    def evaluated(batch_size):
        batches = pipeline.evaluation_batches(
            ArraySource(test), digits, batch_size=batch_size, seed=1
        )
        return np.concatenate([batch.numpy() for batch in batches])

    assert evaluated(100).shape == (359, 32, 32, 1)
    np.testing.assert_array_equal(evaluated(100), evaluated(7))


@pytest.mark.parametrize("bits", [8, 5, 1])
def test_bits_are_reduced_as_specified(bits, photographs):
    batches = pipeline.evaluation_batches(
        ArraySource(photographs), COLOUR, batch_size=64, seed=0, num_bits=bits
    )
    x = photographs / 255.0
    expected = np.floor(255.0 * x / 2 ** (8 - bits)) / (2**bits - 1)
    np.testing.assert_allclose(take(batches, 1)[0], expected, rtol=1e-6)


def write_mnist(path, images):
    labels = np.arange(len(images)) % 10
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)


def test_mnist_is_read_from_a_folder_and_padded(tmp_path, photographs):
    images = photographs[:, 2:30, 2:30, 0]
    write_mnist(tmp_path / "mnist.npz", images)
    (train, test), _ = load("mnist", tmp_path)
    assert train.shape == (64, 32, 32, 1)
    np.testing.assert_array_equal(train[:, 2:30, 2:30, 0], images)
    assert not train[:, :2].any() and not train[:, :, 30:].any()


def cifar_batch(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def python_2_pickle(flat):
    """A batch as the CIFAR-10 that people download holds it: written by Python 2, strings for bytes."""
    size = struct.pack("<i", len(flat))
    return b"".join([
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR",
        b"(K\x01(J" + size + b"M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR",
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
        b"T" + struct.pack("<i", flat.size) + flat.tobytes() + b"tb",
        b"U\x06labels](" + b"K\x03" * len(flat) + b"eu.",
    ])  # fmt: skip


@pytest.mark.parametrize("kind", ["py", "py2", "bin"])
def test_cifar10_is_read_from_its_extracted_folder(kind, tmp_path, photographs):
    folder = tmp_path / f"cifar-10-batches-{kind.rstrip('2')}"
    folder.mkdir()
    for i, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        flat = cifar_batch(photographs[10 * i : 10 * i + 10])
        if kind == "py2":
            (folder / name).write_bytes(python_2_pickle(flat))
        elif kind == "py":
            content = {b"data": flat, b"labels": [0] * 10, b"batch_label": b"batch"}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        else:
            np.pad(flat, [(0, 0), (1, 0)]).tofile(folder / f"{name}.bin")
    for data in (tmp_path, folder):
        (train, test), _ = load("cifar10", data)
        np.testing.assert_array_equal(train, photographs[:50])
        np.testing.assert_array_equal(test, photographs[50:60])
    (folder / ("test_batch" + (".bin" if kind == "bin" else ""))).unlink()
    with pytest.raises(UserError, match="test_batch.*no such file"):
        load("cifar10", tmp_path)


class Malicious:
    def __reduce__(self):
        return print, ("code ran",)


def broken_files(photographs):
    npz = io.BytesIO()
    write_mnist(npz, photographs[:, 2:30, 2:30, 0])
    wrong_shape, objects = io.BytesIO(), io.BytesIO()
    write_mnist(wrong_shape, photographs[:, :20, :20, 0])
    np.savez(objects, x_train=np.array([Malicious()], object), x_test=np.zeros(3))
    return {
        "truncated": npz.getvalue()[:2000],
        "not an archive": b"hello",
        "empty": b"",
        "wrong shape": wrong_shape.getvalue(),
        "objects": objects.getvalue(),
    }


@pytest.mark.parametrize("kind", ["truncated", "not an archive", "empty", "wrong shape", "objects"])
def test_a_broken_mnist_is_named(kind, tmp_path, photographs, capsys):
    path = tmp_path / "mnist.npz"
    path.write_bytes(broken_files(photographs)[kind])
    with pytest.raises(UserError) as caught:
        load("mnist", tmp_path)
    message = str(caught.value)
    assert str(path) in message and "again" in message and "\n" not in message
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Malicious()),
        pickle.dumps({b"data": Malicious()}),
        pickle.dumps({b"data": np.zeros((3, 5), np.uint8)}, protocol=2),
        b"\x80\x02garbage",
        b"",
    ],
)
def test_a_broken_or_malicious_cifar_batch_is_refused_and_runs_nothing(content, tmp_path, capsys):
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="data_batch_1: not readable as a batch of CIFAR-10"):
        load("cifar10", tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_a_missing_mnist_says_where_to_put_it(tmp_path):
    with pytest.raises(UserError, match="mnist.npz: no such file; put Keras's mnist.npz there"):
        load("mnist", tmp_path)


def test_stacked_mnist_pairs_every_digit_twice_in_every_channel(tmp_path, photographs):
    write_mnist(tmp_path / "mnist.npz", photographs[:, 2:30, 2:30, 0])
    dataset = catalog.get_dataset_info(DataConfig(dataset="stacked_mnist"))
    assert dataset.image.num_dims == 3 * 28 * 28
    train, _ = dataset.open(str(tmp_path))
    assert len(train) == 128
    stacks, labels = zip(*(train.example(i) for i in range(128)), strict=True)
    grey, digit = train.grey.images.numpy()[..., 0], train.grey.labels.numpy()
    for channel, hundred in enumerate((100, 10, 1)):
        values = sorted(stack.numpy()[..., channel].tolist() for stack in stacks)
        assert values == sorted(grey.repeat(2, 0).tolist())
        digits = [int(label) // hundred % 10 for label in labels]
        assert digits == [int(digit[i]) for i in train.triples.numpy()[:, channel]]


def test_omniglot_is_read_upright(tmp_path, photographs):
    from scipy.io import savemat

    images = photographs[:, 2:30, 2:30, 0]
    columns = images.transpose(0, 2, 1).reshape(64, -1).T / 255.0  # Matlab's order
    savemat(tmp_path / "chardata.mat", {"data": columns, "testdata": columns[:, :5]})
    (train, test), dataset = load("omniglot", tmp_path)
    assert dataset.image.binary and dataset.image.num_dims == 784
    assert (len(train), len(test)) == (64, 5)
    np.testing.assert_array_equal(train[:, 2:30, 2:30, 0], images)
    (tmp_path / "chardata.mat").write_bytes(b"MATLAB 5.0 but not really")
    with pytest.raises(UserError, match="chardata.mat: not readable.*fetch it again"):
        load("omniglot", tmp_path)

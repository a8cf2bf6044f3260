"""Lossless files: the coder, its distributions, whole files both ways, and what is refused."""

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy.special import ndtr

from nvae_tf import NVAE, ImageSpec, ModelConfig
from nvae_tf.cli.compress import main as compress_main
from nvae_tf.cli.decompress import main as decompress_main
from nvae_tf.compression import file_format, files, fingerprint
from nvae_tf.compression.cdfs import BinaryPixels, LatentBins, Levels, Posterior
from nvae_tf.compression.network import Network
from nvae_tf.compression.pictures import ArrayPictures, FolderPictures, check_png, write_png
from nvae_tf.compression.rans import LOWEST, TOTAL, Exhausted, Stack, interval, intervals
from nvae_tf.distributions import exact_log_mass
from nvae_tf.evaluation.stored_images import last_level, stored_values
from nvae_tf.io.errors import UserError
from nvae_tf.layers.latent_group import Given

TINY = ModelConfig(
    num_latent_scales=1,
    num_groups_per_scale=2,
    num_latent_per_group=3,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    num_mixture_dec=3,
    num_nf=0,
    use_se=True,
    res_dist=True,
)


def random_words(seed):
    noise = np.random.Philox(seed)
    return lambda count: (noise.random_raw(count) >> np.uint64(32)).astype(np.uint32)


def table_of(symbols, count):
    """Frequencies of symbols as a `Cumulative`, each symbol at least once, and their entropy."""
    shares = np.bincount(symbols, minlength=count) / len(symbols)
    frequencies = 1 + np.floor(shares * (TOTAL - count)).astype(np.int64)
    frequencies[shares.argmax()] += TOTAL - frequencies.sum()
    table = np.concatenate([[0], np.cumsum(frequencies)]).astype(np.uint64)
    entropy = -np.log2(frequencies[symbols] / TOTAL).sum()
    return (lambda _, chosen: table[chosen]), entropy, frequencies


@pytest.mark.parametrize("lanes", [1, 7, 64])
def test_the_coder_is_as_short_as_the_entropy(photographs, lanes):
    symbols = photographs[:8, ..., 0].ravel().astype(np.int64)
    cumulative, entropy, _ = table_of(symbols, 256)
    positions, stack = np.arange(len(symbols)), Stack(np.full(lanes, LOWEST))
    stack.push(*interval(cumulative, positions, symbols))
    assert abs(stack.bits - entropy) < 1e-4 * entropy + lanes
    stored = 64 * lanes + 32 * len(stack.words)
    assert stored < stack.bits + 64 * lanes + 32
    copy = Stack(stack.heads, stack.words)
    np.testing.assert_array_equal(copy.pop(cumulative, positions, 256), symbols)
    assert (copy.heads == LOWEST).all() and not len(copy.words)
    with pytest.raises(Exhausted):
        copy.pop(cumulative, positions, 256)


def test_the_coder_is_as_short_as_constriction(photographs):
    constriction = pytest.importorskip("constriction")
    symbols = photographs[:8, ..., 1].ravel().astype(np.int32)
    cumulative, _, frequencies = table_of(symbols, 256)
    model = constriction.stream.model.Categorical(frequencies / TOTAL, perfect=False)
    theirs = constriction.stream.stack.AnsCoder()
    theirs.encode_reverse(symbols, model)
    ours = Stack([LOWEST])
    ours.push(*interval(cumulative, np.arange(len(symbols)), symbols.astype(np.int64)))
    assert abs(ours.bits / theirs.num_bits() - 1) < 1e-3


def test_gaussian_latents_are_as_short_as_constriction():
    """Latents in bins of width 1, where both quantise alike: ours are of any width."""
    constriction = pytest.importorskip("constriction")
    rng, count, edge = np.random.default_rng(3), 8000, 128
    mean, stddev = rng.normal(0, 20, count), np.exp(rng.uniform(-1, 2.5, count))
    symbols = np.rint(rng.normal(mean, stddev)).astype(np.int32)
    theirs = constriction.stream.stack.AnsCoder()
    quantised = constriction.stream.model.QuantizedGaussian(-edge, edge - 1)
    theirs.encode_reverse(symbols, quantised, mean, stddev)
    bins, positions = LatentBins(2 * edge), np.arange(count)
    bins.edges = np.concatenate([[-np.inf], np.arange(1 - edge, edge) - 0.5, [np.inf]])
    posterior = Posterior(bins, (np.zeros(count), np.ones(count)), (mean, stddev))
    ours = Stack(np.full(64, LOWEST))
    ours.push(*interval(posterior, positions, symbols.astype(np.int64) + edge))
    assert ours.bits / count > 2.5
    assert abs(ours.bits / theirs.num_bits() - 1) < 2e-3
    np.testing.assert_array_equal(theirs.decode(quantised, mean, stddev), symbols)
    np.testing.assert_array_equal(ours.pop(posterior, positions, bins.count) - edge, symbols)


def test_symbols_without_a_place_are_refused():
    """A damaged stack can yield latents that no posterior would: frequencies of 0."""
    stack = Stack(np.full(2, LOWEST))
    with pytest.raises(Exhausted):
        stack.push(np.uint64([0, 1]), np.uint64([1, 0]))


def test_popping_draws_and_pushing_gives_the_bits_back():
    bins, rng, count = LatentBins(), np.random.default_rng(1), 500
    prior = rng.normal(size=count), np.exp(rng.normal(size=count))
    posterior = prior[0] + rng.normal(size=count) * prior[1], prior[1] * rng.uniform(0.05, 1, count)
    distribution, positions = Posterior(bins, prior, posterior), np.arange(count)
    stack = Stack.random(8, random_words(2))
    heads, before = stack.heads.copy(), stack.bits
    chosen = stack.pop(distribution, positions, bins.count)
    z = prior[0] + prior[1] * bins.centres[chosen]
    standard = (z - posterior[0]) / posterior[1]
    assert abs(standard.mean()) < 0.15 and abs(standard.std() - 1) < 0.1
    # Popped with q and pushed with p: the KL divergence, in the mean.
    stack.push(*interval(bins.prior, positions, chosen))
    ratio = posterior[1] / prior[1]
    distance = (posterior[0] - prior[0]) / prior[1]
    kl = (0.5 * (ratio**2 + distance**2 - 1) - np.log(ratio)).sum() / np.log(2)
    assert abs((stack.bits - before) / kl - 1) < 0.1
    np.testing.assert_array_equal(stack.pop(bins.prior, positions, bins.count), chosen)
    stack.push(*intervals(distribution, positions, chosen, 8))
    np.testing.assert_array_equal(stack.heads, heads)
    np.testing.assert_array_equal(stack.words[::-1], stack.drawn)


def test_bins_have_the_masses_of_the_normal_distributions():
    bins = LatentBins()
    masses = np.diff(bins.table.astype(np.int64))
    assert masses.sum() == TOTAL and masses.min() >= 1
    np.testing.assert_allclose(masses / TOTAL, np.diff(ndtr(bins.edges)), atol=3e-8)
    q = Posterior(bins, ([0.3], [2.0]), ([1.0], [0.5]))
    cumulative = q(np.zeros(bins.count + 1, int), np.arange(bins.count + 1)).astype(np.int64)
    assert cumulative[0] == 0 and cumulative[-1] == TOTAL and (np.diff(cumulative) >= 0).all()
    edges = 0.3 + 2.0 * bins.edges
    np.testing.assert_allclose(cumulative / TOTAL, ndtr((edges - 1.0) / 0.5), atol=1e-8)


@pytest.mark.parametrize("num_bits", [1, 5, 8, 12])
def test_levels_have_the_exact_likelihood(num_bits):
    max_level, rng = 2**num_bits - 1, np.random.default_rng(num_bits)
    means = rng.uniform(-1.5, 1.5, (6, 4)).astype(np.float32)
    log_scales = rng.uniform(-9, 1, (6, 4)).astype(np.float32)
    weights = rng.dirichlet(np.ones(4), 6)
    levels = Levels(weights, means * float(max_level), np.exp(-log_scales) / max_level, max_level)
    for pixel in range(6):
        all_levels = np.arange(max_level + 2)
        cumulative = levels(np.full(max_level + 2, pixel), all_levels).astype(np.int64)
        assert cumulative[0] == 0 and cumulative[-1] == TOTAL and (np.diff(cumulative) >= 1).all()
        log_mass = exact_log_mass(
            tf.cast(all_levels[:-1, None], tf.float32),
            means[pixel],
            log_scales[pixel],
            float(max_level),
        )
        masses = (np.exp(log_mass.numpy().astype(np.float64)) * weights[pixel]).sum(-1)
        floor = 4 * (max_level + 1) / TOTAL
        np.testing.assert_allclose(np.diff(cumulative) / TOTAL, masses, rtol=1e-3, atol=floor)


def test_pixels_that_are_certain_can_be_coded():
    pixels = BinaryPixels(np.float32([-200.0, 200.0, 0.0]))
    _, frequencies = interval(pixels, np.arange(3), np.array([1, 0, 1]))
    assert frequencies.tolist() == [1, 1, TOTAL // 2]


KINDS = {
    "binary": ImageSpec(32, 32, 1, binary=True),
    "binary, padded": ImageSpec(32, 32, 1, binary=True, scored_size=(28, 26)),
    "grey, 12 bits": ImageSpec(32, 32, 1, bits=12, value_range=(1000, 9190)),
    "colour": ImageSpec(32, 32, 3),
    "colour, 5 of 8 bits": ImageSpec(32, 32, 3),
    "colour, padded": ImageSpec(32, 32, 3, scored_size=(20, 30)),
    "four channels": ImageSpec(32, 32, 4),
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request, photographs):
    """A model of each kind, and real images of its kind as levels."""
    spec = KINDS[request.param]
    config = dataclasses.replace(TINY, num_x_bits=5) if "5 of" in request.param else TINY
    tf.random.set_seed(1)
    np.random.seed(1)
    model = NVAE(config, spec)
    images = photographs[:5].astype(np.int64)
    if spec.binary:
        images = (images[..., 1:2] > 100).astype(np.int64)
    elif spec.bits == 12:
        images = images[..., :1] * 16 + images[..., 1:2] % 16
    elif spec.channels == 4:
        images = np.concatenate([images, images[..., :1]], -1)
    if "padded" in request.param:
        padding = np.ones(images.shape, bool)
        rows, columns = spec.scored_part
        padding[:, rows, columns] = False
        images = np.where(padding, 0, images)
    return model, images >> (3 if "5 of" in request.param else 0)


def test_every_kind_of_image_comes_back(kind, tmp_path):
    model, images = kind
    report = files.compress(model, ArrayPictures(images), tmp_path / "file.nvae")
    again = files.decompress(model, tmp_path / "file.nvae", tmp_path / "out")
    assert report == again
    size = (tmp_path / "file.nvae").stat().st_size
    assert report.payload_bits + report.initial_bits + report.overhead_bits == 8 * size
    assert abs(report.payload_bits / report.nelbo_bits - 1) < 0.01
    max_level = Network(model).max_level
    pictures = FolderPictures(tmp_path / "out", model.image, max_level)
    assert pictures.names == [f"{index:06d}.png" for index in range(5)]
    for index, image in enumerate(images):
        np.testing.assert_array_equal(pictures.levels(index), image)
        if max_level == last_level(model.image):  # as evaluation writes images
            with Image.open(tmp_path / "out" / pictures.names[index]) as picture:
                values = np.asarray(picture).reshape(image.shape)
            np.testing.assert_array_equal(values, stored_values(image, model.image))


def test_padding_costs_bits_only_where_it_is_not_empty(tmp_path, photographs):
    np.random.seed(1)
    model = NVAE(TINY, KINDS["binary, padded"])
    images = (photographs[:3, ..., :1] > 100).astype(np.int64)
    empty = images.copy()
    empty[:, :2] = empty[:, -2:] = empty[:, :, :3] = empty[:, :, -3:] = 0
    reports = []
    for name, levels in (("full", images), ("empty", empty)):
        file, out = tmp_path / f"{name}.nvae", tmp_path / name
        reports.append(files.compress(model, ArrayPictures(levels), file))
        files.decompress(model, file, out)
        for index, image in enumerate(levels):
            with Image.open(out / f"{index:06d}.png") as picture:
                np.testing.assert_array_equal(np.asarray(picture), 255 * image[..., 0])
    padding = 3 * (32 * 32 - 28 * 26)  # of weights that are random: about a bit each
    assert reports[0].payload_bits - reports[1].payload_bits > padding / 2


def test_the_bound_is_that_of_the_model(kind):
    """-log p(x | z), in float64 and step by step, is TFP's of the model's own walk."""
    model, images = kind
    network, latents = Network(model), []
    codec, s = files.Codec(network, [], False, 16, 1), network.start()
    for group, shape in enumerate(model.latent_shapes):
        state = network.before(group, s)
        z = state.prior[0] * np.ones(np.prod(shape), np.float32)
        latents.append(tf.constant(z.reshape(1, *shape)))
        s = network.after(group, state, z)
    stack = Stack.random(16, random_words(1))
    nats = codec._push_image(stack, network.image_parameters(s), images[0])
    parameters = model.top_down(Given(latents)).parameters
    distribution = model.image_distribution(parameters)
    if not model.image.binary:
        distribution = distribution.copy(exact=True)
    x = (images[:1] / network.max_level).astype(np.float32)
    assert nats == pytest.approx(-float(distribution.log_prob(x)[0]), rel=1e-4)
    assert nats / np.log(2) == pytest.approx(stack.bits, rel=1e-3, abs=16)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, photographs):
    """A colour model, and a file of its images."""
    np.random.seed(2)
    model = NVAE(TINY, KINDS["colour"])
    path = tmp_path_factory.mktemp("packed") / "file.nvae"
    files.compress(model, ArrayPictures(photographs[:3].astype(np.int64)), path)
    return model, path


def test_names_are_kept(packed, tmp_path, photographs):
    model, _ = packed
    (tmp_path / "in").mkdir()
    names = ["Zürich 2.png", "a.PNG", "b.png"]
    for name, image in zip(names, photographs, strict=False):
        write_png(tmp_path / "in" / name, image, model.image, 255)
    pictures = FolderPictures(tmp_path / "in", model.image, 255)
    files.compress(model, pictures, tmp_path / "file.nvae")
    files.decompress(model, tmp_path / "file.nvae", tmp_path / "out")
    for name in names:
        before, after = (np.asarray(Image.open(tmp_path / part / name)) for part in ("in", "out"))
        np.testing.assert_array_equal(before, after)


def refusal(action, *arguments) -> str:
    with pytest.raises(UserError) as error:
        action(*arguments)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_other_models_are_refused(packed, tmp_path):
    model, path = packed
    np.random.seed(3)
    other = NVAE(TINY, KINDS["colour"])
    assert "other weights" in refusal(files.decompress, other, path, tmp_path / "out")
    file = rewritten(path, tmp_path / "file.nvae", left_out="AAAA")
    assert "another model" in refusal(files.decompress, model, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewritten(path, target, **fields):
    """A file with other fields in its header, and a checksum that is right."""
    header, heads, words, _ = file_format.read(path)
    changed = dataclasses.replace(header, **fields)
    checks, file_format.Header.check = file_format.Header.check, lambda self: None
    try:
        file_format.write(target, changed, heads, words)
    finally:
        file_format.Header.check = checks
    return target


NAMES_OF_WHAT_DIFFERS = [
    "nvae-tf", "tensorflow", "tf-keras", "numpy", "CPU", "threads", "batch", "settings",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES_OF_WHAT_DIFFERS)
def test_what_differs_is_named(packed, tmp_path, name):
    model, path = packed
    made_with = {**file_format.read(path)[0].made_with, name: "another"}
    file = rewritten(path, tmp_path / "file.nvae", made_with=made_with)
    assert f"made with {name} 'another'" in refusal(files.decompress, model, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_numbers_are_refused_although_all_else_is_the_same(packed, tmp_path):
    model, path = packed
    file = rewritten(path, tmp_path / "file.nvae", trial="0" * 16)
    assert "computes other numbers" in refusal(files.decompress, model, file, tmp_path / "out")


@pytest.mark.parametrize(
    "fields",
    [
        {"names": ["../a.png", "b.png", "c.png"]},
        {"names": ["/a.png", "b.png", "c.png"]},
        {"names": ["a.png", "A.png", "c.png"]},
        {"names": ["a.png", "b.sh", "c.png"]},
        {"names": [".a.png", "b.png", "c.png"]},
        {"names": ["a.png", "b.png"]},
        {"names": [1, 2, 3]},
        {"count": 10**9},
        {"count": -1},
        {"lanes": 10**6},
        {"lanes": True},
        {"checksums": []},
        {"checksums": {"a": "b"}},
        {"checksums": "a"},
        {"names": {"a.png": "", "b.png": "", "c.png": ""}},
        {"names": "abc"},
        {"made_with": {"model": {"a": "b"}}},
        {"left_out": "A" * 7},
        {"left_out": 5},
        {"padded": 1},
        {"trial": 1},
        {"initial_words": 10**12},
        {"nelbo_bits": "many"},
        {"made_with": [1]},
    ],
)
def test_headers_out_of_bounds_are_refused(packed, tmp_path, fields):
    model, path = packed
    file = rewritten(path, tmp_path / "file.nvae", **fields)
    refusal(files.decompress, model, file, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.nvae"]


def damage(content: bytes, rng) -> bytes:
    """Content with a byte changed, cut off, lengthened, or with a part moved."""
    place = int(rng.integers(len(content)))
    way = rng.integers(4)
    if way == 0:
        return content[:place]
    if way == 1:
        return content + bytes(rng.integers(0, 256, 5, dtype=np.uint8))
    if way == 2:
        return content[:place] + content[place + 1 :] + content[place : place + 1]
    flipped = content[place] ^ (1 << int(rng.integers(8)))
    return content[:place] + bytes([flipped]) + content[place + 1 :]


def check_damaged(model, content, tmp_path, number) -> None:
    """A damaged file is refused, or was not damaged: never a wrong image, and nothing is left."""
    rng, file = np.random.default_rng(number), tmp_path / "damaged.nvae"
    damaged = damage(content, rng)
    file.write_bytes(damaged)
    if damaged != content:
        refusal(files.decompress, model, file, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged.nvae"]


def test_damaged_files_are_refused(packed, tmp_path):
    model, path = packed
    for number in range(100):
        check_damaged(model, path.read_bytes(), tmp_path, number)


@pytest.fixture(scope="module")
def small(tmp_path_factory, photographs):
    """A model of one group, whose files are decoded within a fraction of a second, and a file."""
    np.random.seed(5)
    config = dataclasses.replace(TINY, num_groups_per_scale=1, use_se=False)
    model = NVAE(config, ImageSpec(8, 8, 1, binary=True, scored_size=(6, 6)))
    images = np.zeros((3, 8, 8, 1), np.int64)
    images[:, 1:7, 1:7] = photographs[:3, 8:14, 8:14, :1] > 100
    path = tmp_path_factory.mktemp("small") / "file.nvae"
    files.compress(model, ArrayPictures(images), path)
    return model, path


ANY_VALUE = [-1, 2**70, 0.5, math.nan, "", "text", [], ["a"], [["a"]], {}, {"a": "b"}, {"a": 1}]


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_damage_behind_a_right_checksum_is_refused(small, tmp_path, capfd):
    """Damage of what is decoded, and of what the header says of it."""
    model, path = small
    content, file = path.read_bytes()[: -file_format.CHECKSUM], tmp_path / "file.nvae"
    header, heads, words, _ = file_format.read(path)
    stack, rng = 8 * len(heads) + 4 * len(words), np.random.default_rng(0)
    for number in range(40):
        place = len(content) - 1 - int(rng.integers(stack))
        changed = bytes([content[place] ^ (1 << number % 8)])
        damaged = content[:place] + changed + content[place + 1 :]
        file.write_bytes(damaged + hashlib.sha256(damaged).digest())
        assert "damaged" in refusal(files.decompress, model, file, tmp_path / "out")
    fields = dataclasses.asdict(header)
    wrong = [
        (name, value)
        for name, right in fields.items()
        for value in ANY_VALUE
        if type(value) is not type(right)
    ]
    other = {"count": 4, "initial_words": header.initial_words + 1, "padded": not header.padded}
    for name, value in [*wrong, *other.items(), ("trial", "0"), ("checksums", ["0"])]:
        rewritten(path, file, **{name: value})
        refusal(files.decompress, model, file, tmp_path / "out")
    assert len(wrong) > 80
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.nvae"]
    printed = capfd.readouterr().err
    assert "Traceback" not in printed and "Warning" not in printed


def test_models_that_cannot_be_coded_are_refused():
    flows = NVAE(dataclasses.replace(TINY, num_nf=1), KINDS["colour"])
    assert "flows" in refusal(Network, flows)
    normal = NVAE(dataclasses.replace(TINY, num_mixture_dec=1), KINDS["colour"])
    assert "densities" in refusal(Network, normal)


def test_other_pictures_are_refused(tmp_path, photographs):
    colour, binary = KINDS["colour"], KINDS["binary"]

    def written(image, name="a.png", **options):
        folder = tmp_path / f"folder{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        image.save(folder / name, **options)
        return folder

    picture = Image.fromarray(photographs[0])

    def levels(folder, spec, max_level):
        return FolderPictures(folder, spec, max_level).levels(0)

    larger = written(picture.resize((33, 32)))
    assert "33x32" in refusal(levels, larger, colour, 255)
    assert "mode L" in refusal(levels, written(picture.convert("L")), colour, 255)
    assert "mode P" in refusal(levels, written(picture.convert("P")), colour, 255)
    clear = written(picture, transparency=(0, 0, 0))
    assert "transparency" in refusal(levels, clear, colour, 255)
    assert "0 and 255 only" in refusal(levels, written(picture.convert("L")), binary, 1)
    assert "not a plain name" in refusal(levels, written(picture, "a.jpg"), colour, 255)
    no_png = written(picture, "a.png", format="JPEG")
    assert "not a readable PNG" in refusal(levels, no_png, colour, 255)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no PNG files" in refusal(levels, empty, colour, 255)


def test_values_that_a_png_cannot_hold_are_refused():
    for spec, message in (
        (
            ImageSpec(32, 32, 1, bits=12, value_range=(-1024, 3071)),
            "values -1024 to 3071 do not fit",
        ),
        (ImageSpec(32, 32, 1, bits=12, value_range=(0, 1)), "4096 levels .* 0 to 1 do not fit"),
        (ImageSpec(32, 32, 3, bits=12), "3 channels and values up to 4095 cannot be coded"),
    ):
        with pytest.raises(UserError, match=message):
            check_png(spec, 2**spec.bits - 1)


def test_nothing_that_is_there_is_lost(packed, tmp_path, photographs, monkeypatch):
    model, path = packed
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "is the current folder" in refusal(files.decompress, model, path, Path("."))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "not an empty folder" in refusal(files.decompress, model, path, tmp_path / "out")
    (tmp_path / "mine.txt").write_text("mine")
    pictures = ArrayPictures(photographs[:1].astype(np.int64))
    assert "another file" in refusal(files.compress, model, pictures, tmp_path / "mine.txt")


class Unread(ArrayPictures):
    """Images of which none is ever looked at."""

    def levels(self, index):
        """Fails."""
        raise AssertionError(f"image {index} was read")


def test_a_place_that_cannot_be_written_is_told_before_the_coding(packed, tmp_path, photographs):
    (tmp_path / "file").write_text("in the way")
    pictures = Unread(photographs[:1].astype(np.int64))
    error = refusal(files.compress, packed[0], pictures, tmp_path / "file" / "images.nvae")
    assert "cannot be written" in error


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def test_the_commands(run, tmp_path, capsys):
    common = ["--checkpoint", str(run)]
    file, out = str(tmp_path / "digits.nvae"), str(tmp_path / "out")
    assert compress_main([*common, "--input", "digits", "--limit", "5", "--output", file]) == 0
    report = last_json(capsys.readouterr().out)
    assert decompress_main([*common, "--input", file, "--output", out]) == 0
    assert last_json(capsys.readouterr().out) == report
    assert set(report) == {
        "images",
        "payload_bits",
        "initial_bits",
        "nelbo_bits",
        "overhead_bits",
    }
    assert abs(report["payload_bits"] / report["nelbo_bits"] - 1) < 0.01
    again = str(tmp_path / "again.nvae")
    assert compress_main([*common, "--input", out, "--output", again]) == 0
    assert last_json(capsys.readouterr().out)["payload_bits"] == report["payload_bits"]
    for arguments in (
        ["--input", "photos", "--output", file],
        ["--input", "nowhere", "--output", file],
    ):
        assert compress_main([*common, *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: --input")
    assert decompress_main([*common, "--input", str(run / "config.yaml"), "--output", out]) == 2
    assert "not a file that nvae-compress wrote" in capsys.readouterr().err


def test_the_digest_is_that_of_the_weights():
    np.random.seed(4)
    model = NVAE(TINY, KINDS["colour"])
    before = fingerprint.model_digest(model)
    assert before == fingerprint.model_digest(model)
    stack = model.stacks[0]
    values = stack.numpy()
    values.flat[0] = np.nextafter(values.flat[0], np.float32(9))
    stack.assign(values)
    assert fingerprint.model_digest(model) != before


def command(module, *arguments):
    """Runs a command in a process of its own, and returns its last line."""
    result = subprocess.run(
        [sys.executable, "-m", f"nvae_tf.cli.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return last_json(result.stdout)


@pytest.mark.slow
def test_a_new_process_decodes_all_test_digits(run, tmp_path):
    from nvae_tf.data import catalog
    from nvae_tf.evaluation import loading

    file, out = tmp_path / "digits.nvae", tmp_path / "out"
    report = command("compress", "--checkpoint", run, "--input", "digits", "--output", file)
    assert report["images"] == 359
    assert report["payload_bits"] < 1.01 * report["nelbo_bits"]
    assert command("decompress", "--checkpoint", run, "--input", file, "--output", out) == report
    loaded = loading.load(str(run))
    dataset = catalog.get_dataset_info(loaded.config.data)
    _, test = dataset.open("")
    from nvae_tf.compression.pictures import dataset_pictures

    pictures = dataset_pictures(test, dataset, loaded.model.num_bits, seed=1)
    for index in range(359):
        with Image.open(out / f"{index:06d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), 255 * pictures.levels(index)[..., 0])


@pytest.mark.slow
def test_a_thousand_damaged_files_are_refused(packed, tmp_path):
    model, path = packed
    for number in range(1000):
        check_damaged(model, path.read_bytes(), tmp_path, number)

"""Data sets that are damaged, or made to do harm."""

import gzip
import importlib.util
import io
import json
import os
import re
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import tensorflow as tf
import tifffile
from harness import damaged
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from nvae_tf.cli import prepare as prepare_command
from nvae_tf.config import CENTRE, DataConfig
from nvae_tf.data import arrays, catalog, image_files, images, levels, prepare, tfrecords
from nvae_tf.data.stored import full_range
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError

SIZE = 8
SPEC = ImageSpec(SIZE, SIZE, 3)
PHOTOGRAPH = Image.fromarray(load_sample_images().images[0]).resize((20, 16))


def framed(record: bytes) -> bytes:
    length = struct.pack("<Q", len(record))
    crcs = [struct.pack("<I", tfrecords.masked_crc(part)) for part in (length, record)]
    return length + crcs[0] + record + crcs[1]


def read_all(folder, content, spec=SPEC):
    """Every image of a split that is one shard of these bytes."""
    path = folder / "train" / tfrecords.shard_name("train", (SIZE, SIZE), 0, 1)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = tfrecords.TFRecordSource(folder, "train", spec)
    examples = [source.fetch(index) for index in range(len(source))]
    assert all(image.shape == spec.shape for image, _ in examples)
    assert all(image.max(initial=0) < 2**spec.bits for image, _ in examples)
    return examples


CROPS = [np.asarray(PHOTOGRAPH.crop((i, i, i + SIZE, i + SIZE))) for i in range(4)]
SHARD = b"".join(framed(tfrecords.serialize(crop, label=7)) for crop in CROPS)


DEEP = ImageSpec(SIZE, SIZE, 3, bits=12)
DEEP_SHARD = b"".join(
    framed(tfrecords.serialize(crop.astype(np.uint16) * 16, label=7, bits=12)) for crop in CROPS
)


@given(content=st.one_of(damaged(SHARD), st.binary(max_size=100)))
def test_damaged_tfrecords(counts, tmp_path, content):
    counts.check(lambda: read_all(tmp_path, content))


@given(record=damaged(tfrecords.serialize(CROPS[0].astype(np.uint16) * 16, bits=12)))
def test_damaged_records_of_12_bits(counts, tmp_path, record):
    assert len(read_all(tmp_path, DEEP_SHARD, DEEP)) == 4
    counts.check(lambda: read_all(tmp_path, framed(record), DEEP))


@st.composite
def examples(draw):
    """Records with right checksums around what is not an image."""
    shape = draw(st.lists(st.sampled_from([-1, 0, 1, 3, SIZE, 2**31, 2**62]), max_size=5))
    example = tf.train.Example()
    feature = example.features.feature
    if draw(st.booleans()):
        feature["shape"].int64_list.value.extend(draw(st.sampled_from([shape, [SIZE, SIZE, 3]])))
    else:
        feature["shape"].float_list.value.extend(map(float, shape))
    pixels = draw(st.sampled_from([b"", bytes(3 * SIZE * SIZE), bytes(100), CROPS[0].tobytes()]))
    feature["data"].bytes_list.value.extend([pixels] * draw(st.integers(0, 2)))
    kind = draw(st.sampled_from(["int", "bytes", "none"]))
    if kind == "int":
        feature["label"].int64_list.value.extend([draw(st.integers(-(2**63), 2**63 - 1))] * 2)
    elif kind == "bytes":
        feature["label"].bytes_list.value.append(b"cat")
    return example.SerializeToString()


@given(records=st.lists(st.one_of(examples(), st.binary(max_size=200)), max_size=3))
def test_records_that_are_no_images(counts, tmp_path, records):
    counts.check(lambda: read_all(tmp_path, b"".join(map(framed, records))))


def test_records_of_millions_of_numbers(counts, tmp_path):
    example = tf.train.Example()
    for name in ("shape", "label"):
        example.features.feature[name].int64_list.value.extend([1] * 5_000_000)
    example.features.feature["data"].bytes_list.value.extend([b""] * 1_000_000)
    record = framed(example.SerializeToString())
    assert isinstance(counts.check(lambda: read_all(tmp_path, record)), UserError)


def encoded(kind, image=PHOTOGRAPH, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def numpy_file(save, *arrays, **named):
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def dicom(values, frames=1, syntax=b"1.2.840.10008.1.2.1"):
    """A DICOM file as scanners write it, by hand: explicit lengths, little-endian."""
    height, width = values.shape[-2:]

    def element(group, number, kind, value):
        value += b"\0" * (len(value) % 2)
        size = "<HH2sxxI" if kind in (b"OB", b"OW") else "<HH2sH"
        return struct.pack(size, group, number, kind, len(value)) + value

    def short(group, number, value):
        return element(group, number, b"US", struct.pack("<H", value))

    meta = element(2, 0x10, b"UI", syntax)
    head = element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta
    body = short(0x28, 2, 1) + element(0x28, 4, b"CS", b"MONOCHROME2")
    body += element(0x28, 8, b"IS", str(frames).encode()) if frames > 1 else b""
    for number, value in ((0x10, height), (0x11, width), (0x100, 16), (0x101, 16), (0x102, 15)):
        body += short(0x28, number, value)
    body += short(0x28, 0x103, 0) + element(0x28, 0x1052, b"DS", b"-1024")
    body += element(0x28, 0x1053, b"DS", b"1")
    return bytes(128) + b"DICM" + head + body + element(0x7FE0, 0x10, b"OW", values.tobytes())


def nifti(values):
    """A NIfTI-1 file of slices (n, height, width) of uint16, by hand."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *values.shape[::-1], 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, 512, 16)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<f", header, 108, 352.0)
    header[344:348] = b"n+1\0"
    return bytes(header) + values[:, ::-1].tobytes()


GREY = np.asarray(PHOTOGRAPH.convert("L"))
COLOUR = np.asarray(PHOTOGRAPH)
DEEP_GREY, DEEP_COLOUR = GREY.astype(np.uint16) * 257, COLOUR.astype(np.uint16) * 257
PAGES = np.stack([DEEP_GREY] * 3)
TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
SCANS = {
    "ct.dcm": ("pydicom", dicom(DEEP_GREY)),
    "frames.dcm": ("pydicom", dicom(PAGES, 3)),
    "scan.nii": ("nibabel", nifti(PAGES)),
    "scan.nii.gz": ("nibabel", gzip.compress(nifti(PAGES))),
}
FILES = {
    "jpeg": encoded("JPEG"),
    "progressive.jpg": encoded("JPEG", progressive=True),
    "cmyk.jpg": encoded("JPEG", PHOTOGRAPH.convert("CMYK")),
    "grey.jpg": encoded("JPEG", PHOTOGRAPH.convert("L")),
    "exif.jpg": encoded("JPEG", exif=TURNED),
    "png": encoded("PNG"),
    "sixteen.png": encoded("PNG", Image.fromarray(DEEP_GREY)),
    "deep.png": tf.io.encode_png(DEEP_COLOUR).numpy(),
    "deep alpha.png": tf.io.encode_png(np.dstack([DEEP_COLOUR, DEEP_GREY])).numpy(),
    "palette.png": encoded("PNG", PHOTOGRAPH.quantize(16), transparency=b"\0" * 16),
    "alpha.png": encoded("PNG", PHOTOGRAPH.convert("RGBA")),
    "bilevel.png": encoded("PNG", PHOTOGRAPH.convert("1")),
    "animated.gif": encoded("GIF", save_all=True, append_images=[PHOTOGRAPH] * 3),
    "animated.webp": encoded("WEBP", save_all=True, append_images=[PHOTOGRAPH] * 3),
    "webp": encoded("WEBP"),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "float.tiff": encoded("TIFF", PHOTOGRAPH.convert("F")),
    "lzw.tiff": encoded("TIFF", Image.fromarray(DEEP_GREY), compression="tiff_lzw"),
    "palette.tiff": encoded("TIFF", PHOTOGRAPH.quantize(16)),
    "deep.tiff": tiff(DEEP_COLOUR, photometric="rgb", compression="zlib", predictor=2),
    "planes.tiff": tiff(
        np.moveaxis(DEEP_COLOUR, -1, 0), photometric="rgb", planarconfig="separate"
    ),
    "grey pages.tiff": tiff(PAGES, photometric="minisblack"),
    "grey plain pages.tiff": tiff(PAGES, photometric="minisblack", metadata=None, bigtiff=True),
    "grey tiles.tiff": tiff(DEEP_GREY, tile=(16, 16), compression="zlib", byteorder=">"),
    "cells.tiff": tiff(np.moveaxis(DEEP_COLOUR, -1, 0), imagej=True, metadata={"axes": "CYX"}),
    "cells.ome.tiff": tiff(np.moveaxis(DEEP_COLOUR, -1, 0), ome=True, metadata={"axes": "CYX"}),
    "grey.npy": numpy_file(np.save, PAGES),
    "colour.npz": numpy_file(np.savez_compressed, images=COLOUR[None].repeat(3, 0), y=np.arange(3)),
    **{
        f"grey {name}": content
        for name, (package, content) in SCANS.items()
        if importlib.util.find_spec(package)
    },
    "ppm": encoded("PPM"),
}


def decode(path, content):
    """Every image of a file, of which the first comes back, in 8-bit colour."""
    path.write_bytes(content)
    reader = image_files.ImageReader()
    seen = []
    for item in reader.items(path)[:5]:
        values = reader.read(item).values
        ends = (0, 255) if values.dtype.kind == "f" else full_range(values.dtype)
        ends = (-1024, 64511) if path.suffix == ".dcm" else ends
        spec = ImageSpec(SIZE, SIZE, 3, value_range=ends)
        image, _ = images.FolderSource([item], spec, reader=reader).fetch(0)
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        seen.append(image)
    return seen[0]


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_image_looks_the_same(counts, tmp_path, kind):
    whole = FILES[kind]
    image = counts.check(lambda: decode(tmp_path / f"x.{kind}", whole))
    expected = levels.resize(COLOUR, (SIZE, SIZE), CENTRE).astype(float)
    if kind.startswith(("sixteen", "grey", "bilevel", "float", "lzw")):
        image, expected = image.mean(-1), expected.mean(-1)
    if kind != "exif.jpg":  # which is turned
        assert np.abs(image - expected).mean() < (60 if kind == "bilevel.png" else 20)
    for end in range(0, len(whole), max(1, len(whole) // 20)):
        counts.check(lambda end=end: decode(tmp_path / f"x.{kind}", whole[:end]))


@pytest.mark.parametrize("kind", FILES)
@given(data=st.data())
def test_damaged_images(counts, tmp_path, kind, data):
    content = data.draw(damaged(FILES[kind]))
    counts.check(lambda: decode(tmp_path / f"x.{kind}", content))


def png_of(width, height):
    """A PNG that says it has so many pixels, all black, in a thousandth of the bytes."""
    packer = zlib.compressobj()
    rows = [packer.compress(bytes(1 + min(width, 10_000))) for _ in range(min(height, 10_000))]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", b"".join(rows) + packer.flush()),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def test_bombs_and_impostors_as_images(counts, tmp_path):
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(ran) (w) file closefile\n"
    cases = {
        "100 megapixels.png": png_of(10_000, 10_000),
        "huge.png": png_of(2**31 - 1, 2**31 - 1),
        "wide.png": png_of(2**30, 1),
        "script.eps": text,
        "script.png": text,
        "empty.jpg": b"",
        "text.webp": b"a text",
    }
    for name, content in cases.items():
        result = counts.check(lambda name=name, content=content: decode(tmp_path / name, content))
        assert isinstance(result, UserError), name
    assert not (tmp_path / "ran").exists()


def numpy_header(shape, kind="<u2"):
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape!r}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()


def ome_of(sizes, planes, modulo):
    """A TIFF of one image with OME's metadata."""
    text = f"""<?xml version="1.0" encoding="UTF-8"?>
    <OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="I:0"><Pixels ID="P:0"
    DimensionOrder="XYZCT" Type="uint16" SizeX="20" SizeY="16" SizeC="1" SizeT="1"
    {sizes or 'SizeZ="1"'}>{planes or '<TiffData IFD="0"/>'}</Pixels></Image><StructuredAnnotations>
    <XMLAnnotation ID="A:0" Namespace="openmicroscopy.org/omero/dimension/modulo"><Value><Modulo>
    {modulo}</Modulo></Value></XMLAnnotation></StructuredAnnotations></OME>"""
    return tiff(np.zeros((16, 20), np.uint16), description=text, metadata=None)


def bombs():
    """Small files that promise or unpack to very much."""
    deep = bytearray(png_of(10_000, 10_000))
    deep[24] = 16  # bits
    zeros = tiff(np.zeros((64, 64), np.uint16), compression="zlib")
    strip = zlib.compress(bytes(2**26))
    with tifffile.TiffFile(io.BytesIO(zeros)) as file:
        offset, size = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
        place = file.pages[0].tags["StripByteCounts"].offset + 8
        place_of_offset = file.pages[0].tags["StripOffsets"].offset + 8
    bomb = bytearray(zeros) + strip
    struct.pack_into("<I", bomb, place, len(strip))
    struct.pack_into("<I", bomb, place_of_offset, len(zeros))
    assert size and offset
    loop = bytearray(tiff(PAGES, photometric="minisblack", metadata=None))
    with tifffile.TiffFile(io.BytesIO(bytes(loop))) as file:
        last = file.pages[2].offset
        (tags,) = struct.unpack_from("<H", loop, last)
        struct.pack_into("<I", loop, last + 2 + 12 * tags, file.pages[1].offset)
    # Three numbers of channels, each of which tifffile would repeat for every pixel.
    repeated = bytearray(FILES["planes.tiff"])
    with tifffile.TiffFile(io.BytesIO(bytes(repeated))) as file:
        page_tags = file.pages[0].tags
        struct.pack_into("<I", repeated, page_tags["ImageLength"].offset + 8, 2**31)
        struct.pack_into("<II", repeated, page_tags["SamplesPerPixel"].offset + 4, 3, 200)
        struct.pack_into("<H", repeated, page_tags["BitsPerSample"].offset, 0)
    archive = io.BytesIO()
    with (
        zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(numpy_header((33, 2**12, 2**12)))
        for _ in range(33 * 2**5):
            member.write(bytes(2**20))
    volume = bytearray(nifti(PAGES))
    struct.pack_into("<3h", volume, 42, 8000, 8000, 100)
    return {
        "deep.png": bytes(deep),
        "strip.tif": bytes(bomb),
        "loop.tif": bytes(loop),
        "repeated.tif": bytes(repeated),
        "sizes.ome.tif": ome_of('SizeZ="300000000"', "", ""),
        "planes.ome.tif": ome_of("", '<TiffData IFD="0" PlaneCount="300000000"/>', ""),
        "steps.ome.tif": ome_of(
            "", "", '<ModuloAlongT Type="phase" Start="0" End="3e8" Step="1"/>'
        ),
        "promise.npy": numpy_header((2**40, 64, 64)),
        "objects.npy": numpy_header((64, 64), "|O") + bytes(64 * 64 * 8),
        "archive.npz": archive.getvalue(),
        "promise.nii": bytes(volume),
        "promise.nii.gz": gzip.compress(bytes(volume)),
        "deflated.dcm": dicom(DEEP_GREY, syntax=b"1.2.840.10008.1.2.1.99"),
        "frames.dcm": dicom(DEEP_GREY, frames=2**20),
    }


def test_bombs_of_every_reader(counts, tmp_path):
    for name, content in bombs().items():
        result = counts.check(lambda name=name, content=content: decode(tmp_path / name, content))
        assert isinstance(result, UserError), name


def test_a_tiff_cannot_name_other_files(counts, tmp_path):
    tifffile.imwrite(tmp_path / "secret.tif", DEEP_GREY)
    secret = (tmp_path / "secret.tif").read_bytes()
    text = f"""<?xml version="1.0" encoding="UTF-8"?>
    <OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="P:0"
    DimensionOrder="XYZCT" Type="uint16" SizeX="20" SizeY="16" SizeZ="2" SizeC="1" SizeT="1">
    <Channel ID="C:0" SamplesPerPixel="1"/><TiffData IFD="0" FirstZ="0" PlaneCount="1"/>
    <TiffData IFD="0" FirstZ="1" PlaneCount="1"><UUID FileName="secret.tif">urn:uuid:{"1" * 8}</UUID>
    </TiffData></Pixels></Image></OME>"""
    content = tiff(np.zeros((16, 20), np.uint16), description=text, metadata=None)
    (tmp_path / "bait.ome.tif").write_bytes(content)
    reader = image_files.ImageReader()

    def read():
        path = tmp_path / "bait.ome.tif"
        return np.stack([reader.read(item).values for item in reader.items(path)])

    result = counts.check(read)
    assert isinstance(result, UserError) or not result.any()
    assert (tmp_path / "secret.tif").read_bytes() == secret


@given(data=st.data())
def test_a_folder_with_damaged_files_is_skipped_or_used(counts, tmp_path, data):
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for number in range(10):
        (folder / f"{number}.png").write_bytes(FILES["png"])
    kind = data.draw(st.sampled_from(sorted(FILES)))
    path = folder / f"damaged.{kind}"
    path.write_bytes(data.draw(damaged(FILES[kind])))
    config = DataConfig(dataset="images", data=str(folder), image_size="8", channels=3, bits=8)

    def settle():
        settled = catalog.settle(config)
        train, test = settled.dataset.open(str(folder))
        assert len(train) + len(test) >= 10
        for source in (train, test):
            for index in range(len(source)):
                source.fetch(index)

    assert not isinstance(counts.check(settle), UserError)
    path.unlink()


def test_odd_entries_of_a_folder(counts, tmp_path):
    folder = tmp_path / "images"
    (folder / "deeper.png").mkdir(parents=True)
    for number in range(20):
        (folder / f"{number}\n\x1b[31m.png").write_bytes(FILES["png"])
    os.mkfifo(folder / "pipe.png")
    (folder / "loop").symlink_to(folder)
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "nowhere.png").symlink_to("nosuch")
    (folder / "self.png").symlink_to("self.png")
    (folder / os.fsdecode(b"\xff\xfe.png")).write_bytes(FILES["png"])
    for path in images.find_images(folder):
        counts.check(lambda path=path: images.FolderSource([path], SPEC).fetch(0))
    assert counts.accepted == 21 and counts.refused == 4
    for entry in ("pipe.png", "endless.png", "nowhere.png", "self.png"):
        (folder / entry).unlink()
    arguments = ["images", "--input", str(folder), "--output", str(tmp_path / "out"), "--size", "8"]
    assert not counts.check_command(prepare_command.main, arguments).startswith("error")


LIST = b"".join(b"%06d.jpg %d\n" % (number, number % 3) for number in range(12))


@given(content=st.one_of(damaged(LIST, [b"../../x 0\n", b"/etc/passwd 0\n", b"\xff"]), st.binary()))
def test_damaged_lists_of_splits(counts, tmp_path, content):
    for number in range(12):
        (tmp_path / f"{number:06d}.jpg").write_bytes(FILES["jpeg"])
    (tmp_path / "list_eval_partition.txt").write_bytes(content)
    counts.check(lambda: prepare.celeba_task(tmp_path, 64, {}))


@given(
    content=st.one_of(
        damaged(b'{"settings": {"size": 8}}', [b"[" * 5000, b"9" * 5000]), st.binary()
    )
)
def test_damaged_manifests(counts, tmp_path, content):
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for number in range(4):
        (folder / f"{number}.png").write_bytes(FILES["png"])
    out = tmp_path / "out"
    (out / "train").mkdir(parents=True, exist_ok=True)
    (out / prepare.MANIFEST).write_bytes(content)
    (out / "train" / "train-r03-s-0000-of-0001.unreadable").write_bytes(content)
    task = prepare.folder_task(DataConfig(image_size="8", data=str(folder)), 0.5, 0, {})
    counts.check(lambda: prepare.prepare(task._replace(settings={"size": 8}), out))


def archive(members):
    """A tar of (name, content or a kind of link) pairs."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            else:
                info.type, info.linkname = content
            tar.addfile(info, io.BytesIO(content if isinstance(content, bytes) else b""))
    return file.getvalue()


NAMES = [
    tfrecords.shard_name(split, (SIZE, SIZE), index, 2)
    for split in ("train", "validation")
    for index in (0, 1)
]
GOOD = archive([(f"celeba-tfr/{name}", SHARD) for name in NAMES])
ESCAPES = [
    archive([(f"{before}{NAMES[0]}", SHARD), *[(name, SHARD) for name in NAMES]])
    for before in ("../../", "/tmp/", "/", "a/../../")
] + [
    archive([(NAMES[0], (kind, target)), *[(name, SHARD) for name in NAMES]])
    for kind in (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
    )
    for target in ("/etc/passwd", "../../x")
]


@given(content=st.one_of(damaged(GOOD), st.sampled_from(ESCAPES), st.binary(max_size=600)))
def test_archives(counts, tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    counts.check(lambda: prepare.unpack(tmp_path / "x.tar", tmp_path / "out"))
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert all(tfrecords.SHARD.fullmatch(name) for name in written - {".lock"})
    assert {path.name for path in tmp_path.iterdir()} <= {"x.tar", "out"}


@pytest.mark.parametrize("damage", ["checksum", "bits", "end"])
def test_a_damaged_compressed_archive_is_not_taken_for_a_full_disk(damage, counts, tmp_path):
    place = tarfile.BLOCKSIZE + len(SHARD) // 2  # in the middle of the first shard
    first, second = bytearray(gzip.compress(GOOD[:place])), gzip.compress(GOOD[place:])
    if damage == "checksum":
        first[-8] ^= 1
    elif damage == "bits":
        second = second[:10] + b"\xff" * 50  # after the header of gzip
    else:
        second = b""
    (tmp_path / "x.tar.gz").write_bytes(first + second)
    error = counts.check(lambda: prepare.unpack(tmp_path / "x.tar.gz", tmp_path / "out"))
    assert re.search("x.tar.gz: cannot be unpacked .*; fetch it again", str(error))


BATCH = (
    b"\x80\x02}q\0(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\0"
    b"\x85U\x01b\x87Rq\x04(K\x01K\x02M\0\x0c\x86cnumpy\ndtype\nq\x05U\x02u1K\0K\x01\x87Rq\x06(K\x03"
    b"U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89T\0\x18\0\0"
    + bytes(6144)
    + b"tbU\x06labels]"
    b"(K\x01K\x02eu."
)


@given(
    content=st.one_of(
        damaged(BATCH, [b"0" * 50, b"((((", b"cos\nsystem\n(S'touch ran'\ntR"]), st.binary()
    )
)
def test_damaged_batches_of_cifar(counts, tmp_path, content):
    (tmp_path / "data_batch_1").write_bytes(content)
    for name in (*arrays.CIFAR_TRAIN[1:], *arrays.CIFAR_TEST):
        (tmp_path / name).write_bytes(BATCH)
    counts.check(lambda: arrays.read_cifar10(str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_the_undamaged_files_are_read(counts, tmp_path):
    assert len(counts.check(lambda: read_all(tmp_path, SHARD))) == 4
    (tmp_path / "x.tar").write_bytes(GOOD)
    image_counts = counts.check(lambda: prepare.unpack(tmp_path / "x.tar", tmp_path / "out"))
    assert image_counts == {"train 8x8": 8, "validation 8x8": 8}
    for name in (*arrays.CIFAR_TRAIN, *arrays.CIFAR_TEST):
        (tmp_path / name).write_bytes(BATCH)
    train, _ = counts.check(lambda: arrays.read_cifar10(str(tmp_path)))
    assert len(train) == 10
    assert json.dumps(image_counts)

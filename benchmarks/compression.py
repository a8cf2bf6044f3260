#!/usr/bin/env python3
"""Sizes of lossless files: a trained model against PNG, WebP, JPEG XL and zstd.

pip install zstandard imagecodecs
python benchmarks/compression.py runs/digits OUT --alone 30

Takes the first `--count` test images of the run's data set. It writes them into one file with the
command nvae-compress, reads them in another process with nvae-decompress, and compares every pixel;
then the first `--alone` images, each in a file of its own. Seconds per image leave out what a command
takes for one image. Prints a table and, as the last line, JSON, which also has the model's own NELBO.
"""

import argparse
import io
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import zstandard
from PIL import Image

LEVEL = 22  # of zstd, its highest


def encode_png(values: np.ndarray) -> bytes:
    """PNG with Pillow's optimisation; binary images with one bit per pixel."""
    return _pillow(values, "PNG", optimize=True)


def encode_webp(values: np.ndarray) -> bytes:
    """WebP, lossless, at its slowest."""
    return _pillow(values, "WEBP", lossless=True, quality=100, method=6)


def encode_jxl(values: np.ndarray) -> bytes:
    """JPEG XL, lossless, at effort 9."""
    return imagecodecs.jpegxl_encode(values.squeeze(), lossless=True, effort=9)


FORMATS = {"PNG, optimised": encode_png, "WebP": encode_webp, "JPEG XL": encode_jxl}


def _pillow(values, name, **options) -> bytes:
    image = Image.fromarray(values.squeeze())
    if name == "PNG" and image.mode == "L" and set(np.unique(values)) <= {0, 255}:
        image = image.convert("1", dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def one_picture(images: np.ndarray) -> np.ndarray:
    """All images side by side in one picture, as square as may be."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:count] = images
    cells = cells.reshape(rows, columns, height, width, channels)
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def other_formats(images: np.ndarray) -> dict[str, dict[str, int]]:
    """Bytes in other formats: each image alone, those files in one archive, and one large picture."""
    zstd = zstandard.ZstdCompressor(level=LEVEL)
    sizes = {}
    for name, encode in FORMATS.items():
        files = [encode(image) for image in images]
        sizes[name] = {
            "alone": sum(map(len, files)),
            "archive": len(zstd.compress(b"".join(files))),
            "one picture": len(encode(one_picture(images))),
        }
    raw = np.packbits(images > 127) if set(np.unique(images)) <= {0, 255} else images
    sizes["raw pixels"] = {"alone": raw.nbytes, "archive": len(zstd.compress(raw.tobytes()))}
    return sizes


def cpu_seconds() -> float:
    """Seconds that all ended child processes took so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def command(name: str, *arguments) -> tuple[dict, float]:
    """Runs a command in a process of its own; its last line, and its seconds on the CPU.

    It computes with one thread: so they are those that pass on a machine with nothing else to do.
    """
    began = cpu_seconds()
    result = subprocess.run(
        [sys.executable, "-m", f"nvae_tf.cli.{name}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1]), cpu_seconds() - began


def read_images(folder: Path) -> np.ndarray:
    """The PNGs of a folder, 8-bit, (n, height, width, channels)."""
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    return images.reshape(*images.shape[:3], -1)


def both_ways(checkpoint: str, source, out: Path, limit: int) -> tuple[dict, np.ndarray, list]:
    """Compresses and decompresses; the report, the images that came back, and the seconds."""
    file, folder = out / f"{limit}.nvae", out / f"{limit}"
    common = ("--checkpoint", checkpoint)
    report, forth = command(
        "compress", *common, "--input", source, "--limit", limit, "--output", file
    )
    again, back = command("decompress", *common, "--input", file, "--output", folder)
    assert again == report
    report["bytes"] = file.stat().st_size
    return report, read_images(folder), [forth, back]


def random_crops(count: int, folder: Path) -> None:
    """Writes crops of 32x32 at random places of the test photographs of `photos` as PNGs."""
    from nvae_tf.data.photographs import TEST, read_photograph

    folder.mkdir()
    photographs, rng = [read_photograph(name) for name in TEST], np.random.default_rng(0)
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        top, left = (rng.integers(0, side - 31) for side in photograph.shape[:2])
        crop = photograph[top : top + 32, left : left + 32]
        Image.fromarray(crop).save(folder / f"{index:05d}.png")


def alone(checkpoint: str, images: np.ndarray, out: Path) -> list[dict]:
    """Each image in a file of its own: the reports."""
    from nvae_tf.compression.files import compress, decompress
    from nvae_tf.compression.pictures import ArrayPictures
    from nvae_tf.evaluation import loading

    model, reports = loading.load(checkpoint).model, []
    max_level = 1 if model.image.binary else 2**model.num_bits - 1
    for index, image in enumerate(images):
        file, folder = out / f"alone{index}.nvae", out / f"alone{index}"
        levels = np.rint(image / 255 * max_level).astype(np.int64)
        reports.append(vars(compress(model, ArrayPictures(levels[None]), file)))
        reports[-1]["bytes"] = file.stat().st_size
        if index < 3:
            decompress(model, file, folder)
            np.testing.assert_array_equal(read_images(folder)[0], image)
    return reports


def own_nelbo(model, images: np.ndarray) -> np.ndarray:
    """The model's own NELBO of images in bits, with every latent from its posterior; 10 draws."""
    import tensorflow as tf

    from nvae_tf.evaluation import likelihood

    kind = model.likelihood if model.image.binary else "exact"
    batches = tf.data.Dataset.from_tensor_slices((images / 255).astype(np.float32)).batch(100)
    options = dict(num_draws=10, chunk=1, seed=1)
    estimates = likelihood.evaluate_kinds(model, batches, len(images), [kind], **options)
    return estimates[kind].nelbo / math.log(2)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="the folder of a run on digits or photos")
    parser.add_argument("out", type=Path, help="a folder that does not exist")
    parser.add_argument("--count", type=int, default=359, help="default: 359")
    parser.add_argument(
        "--crops", type=int, help="instead so many crops of the test photographs, in a folder"
    )
    parser.add_argument("--alone", type=int, default=30, help="default: 30")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    from nvae_tf.compression.fingerprint import use_one_thread

    use_one_thread()
    from nvae_tf.data import catalog
    from nvae_tf.evaluation import loading

    loaded = loading.load(arguments.checkpoint)
    data = loaded.config.data
    from nvae_tf.compression.pictures import dataset_pictures

    dataset = catalog.get_dataset_info(data)
    _, test = dataset.open(data.data)
    if arguments.crops:
        source = arguments.out / "crops"
        random_crops(arguments.crops, source)
        expected = read_images(source)
    else:
        source = data.dataset
        expected = dataset_pictures(test, dataset, loaded.model.num_bits, 1, arguments.count).images
        white = 255 if dataset.image.binary else 1
        expected = (expected * white).astype(np.uint8)
    _, _, start = both_ways(arguments.checkpoint, source, arguments.out, 1)
    report, images, seconds = both_ways(arguments.checkpoint, source, arguments.out, len(expected))
    np.testing.assert_array_equal(images, expected)
    each = [
        (all_ - one) / max(len(images) - 1, 1) for all_, one in zip(seconds, start, strict=True)
    ]
    sizes = other_formats(images)
    reports = alone(arguments.checkpoint, images[: arguments.alone], arguments.out)
    first = other_formats(images[: arguments.alone])
    print("| format | each alone | in one archive | as one picture |")
    print("| --- | --- | --- | --- |")
    for name, row in sizes.items():
        print(f"| {name} | {' | '.join(str(row.get(way, '')) for way in WAYS)} |")
    nelbo = own_nelbo(loaded.model, images)
    results = {
        "chain": report,
        "own_nelbo_bits": float(nelbo.sum()),
        "own_nelbo_bits_alone": float(nelbo[: arguments.alone].mean()),
        "seconds_per_image": [round(value, 4) for value in each],
        "seconds_of_one": [round(value, 2) for value in start],
        "other_formats": sizes,
        "images_alone": len(reports),
        "alone": {
            name: sum(one[name] for one in reports) / max(len(reports), 1) for name in report
        },
        "alone_other_formats": {name: row["alone"] for name, row in first.items()},
    }
    print(json.dumps(results))


WAYS = ("alone", "archive", "one picture")

if __name__ == "__main__":
    main()

"""Writes images from any source as GLOW's tfrecords.

    nvae-prepare images --input DIR --output DIR --size 64

The output holds ``train/`` and ``validation/`` (for CelebA also ``test/``) and ``prepare.json``, which
says what was done. A shard is written under a temporary name and renamed when it is complete, so the
same command continues where it was stopped.
"""

import concurrent.futures
import functools
import io
import json
import os
import tarfile
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from nvae_tf.config import RANDOM, VALIDATION_PORTION, DataConfig
from nvae_tf.data import image_files, images, levels, settling, survey, tfrecords
from nvae_tf.data.prepared import MANIFEST
from nvae_tf.data.stored import UnreadableImage
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError, one_line, short_message
from nvae_tf.io.files import atomic_write, make_folder, read_json, write_error, write_text
from nvae_tf.io.lock import exclusive_lock
from nvae_tf.io.machine import usable_cores
from nvae_tf.io.paths import is_regular, user_path

CELEBA_SIZE = 218, 178  # height and width of the aligned images
CELEBA_BOX = (15, 40, 178 - 15, 218 - 30)  # left, top, right, bottom
CELEBA_SPLITS = {"0": "train", "1": "validation", "2": "test"}
PREPARING = "preparing data"  # what the process that holds an output's lock does
IMAGES_PER_SHARD = 1000
MAX_UNREADABLE = 0.01  # portion of all images
LARGEST_LIST = 2**26  # bytes; CelebA's has 3 million
SMALLEST_SIZE, LARGEST_SIZE = 8, 4096  # height and width of the images in pixels


class ImageToWrite(NamedTuple):
    """One image to write.

    Attributes:
        name: Name of the image in errors.
        load: Returns the levels of the image (height, width, channels), uint8 or uint16.
    """

    name: str
    load: Callable[[], np.ndarray]


class Job(NamedTuple):
    """One shard to write: its path, its images and their bits per value."""

    path: Path
    items: list[ImageToWrite]
    bits: int


class Task(NamedTuple):
    """A data set to write.

    Attributes:
        splits: The images of each split.
        spec: Size, channels and bits of the images to write.
        settings: Settings that the images depend on; an output prepared with others is not continued.
        skipped: Dictionary from the name of each image that is left out already to the reason.
        lines: Lines to print about the images.
        may_skip: Whether any number of images may be unreadable, instead of `MAX_UNREADABLE`.
        strict: Whether no image may be unreadable.
    """

    splits: dict[str, list[ImageToWrite]]
    spec: ImageSpec
    settings: dict[str, Any]
    skipped: dict[str, str] = {}
    lines: Sequence[str] = ()
    may_skip: bool = False
    strict: bool = False


def prepare(task: Task, output: Path) -> dict:
    """Writes the splits as tfrecords.

    Args:
        task: The data set to write.
        output: Path of the output folder, created if needed. Complete shards in it are kept.

    Returns:
        The content of ``prepare.json``: settings, the number of images of each split, and the images
        left out.

    Raises:
        UserError: Too many images are unreadable, one is too small, or the output cannot be written
            or was prepared with other settings.
    """
    with exclusive_lock(output, PREPARING):
        return _prepare_locked(task, output)


def _prepare_locked(task: Task, output: Path) -> dict:
    splits, spec = task.splits, task.spec
    names = json.dumps({split: [item.name for item in items] for split, items in splits.items()})
    settings = {**task.settings, "list of images": zlib.crc32(names.encode())}
    _check_output(output, settings)
    jobs = []
    for split, items in splits.items():
        make_folder(output / split)
        _remove_partial(output / split)
        count = -(-len(items) // IMAGES_PER_SHARD)
        for index, part in enumerate(np.array_split(np.arange(len(items)), count)):
            path = output / split / tfrecords.shard_name(split, spec.shape[:2], index, count)
            jobs.append(Job(path, [items[i] for i in part], spec.bits))
    total = sum(map(len, splits.values()))
    limit = total if task.may_skip else max(1, int(MAX_UNREADABLE * total))
    limit = 0 if task.strict else limit
    unreadable = _run(jobs, total, limit)
    counts = dict.fromkeys(splits, 0)
    for job in jobs:
        counts[job.path.parent.name] += len(tfrecords.Shard(job.path).offsets)
    for split, items in splits.items():
        skipped = sum(item.name in unreadable for item in items)
        if counts[split] + skipped != len(items):
            raise UserError(
                f"{output / split}: holds {counts[split]} images, expected {len(items) - skipped}; "
                "remove the folder and prepare it again"
            )
    left_out = {**task.skipped, **dict.fromkeys(sorted(unreadable), survey.UNREADABLE)}
    manifest = {"settings": settings, "counts": counts, "skipped": left_out}
    write_text(output / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _remove_partial(folder: Path) -> None:
    """Removes partial files of a killed command; the lock ensures that no other command is running."""
    for path in folder.glob(".*.part"):
        path.unlink()


def _check_output(output: Path, settings: dict) -> None:
    manifest = output / MANIFEST
    if manifest.exists() and any(output.glob("*/*.tfrecords")):
        try:
            before = read_json(manifest)["settings"]
            if not isinstance(before, dict):
                raise TypeError
        except (UserError, KeyError, TypeError):
            raise UserError(
                f"{manifest}: unreadable; remove the folder and prepare it again"
            ) from None
        if before != settings:
            different = ", ".join(k for k in settings if before.get(k) != settings[k])
            raise UserError(
                f"{output}: was prepared with another {different}; choose another --output or remove it"
            )
    elif any(output.glob("*/*.tfrecords")):
        raise UserError(
            f"{output}: holds tfrecords of another origin; choose another --output or remove it"
        )
    else:
        write_text(manifest, json.dumps({"settings": settings}, indent=1) + "\n")


def _run(jobs: list[Job], total: int, limit: int) -> set[str]:
    """Writes the shards on all cores; returns the names of unreadable images.

    Raises:
        UserError: More than `limit` images are unreadable, or a shard cannot be written.
    """
    unreadable, kept = set(), 0
    with (
        # Pillow releases Python's lock while it decodes and resizes, so threads use every core.
        concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool,
        tqdm(total=total, unit="image", desc="prepare", disable=None) as bar,
    ):
        stop = threading.Event()
        futures = [pool.submit(_write_shard, job, bar.update, stop) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                skipped, was_kept = future.result()
                unreadable |= skipped
                kept += was_kept
                if len(unreadable) > limit:
                    first = "; ".join(sorted(unreadable)[:3])
                    raise UserError(
                        f"{len(unreadable)} of {total} images are unreadable, more than {limit}: "
                        f"{first}...; mend or remove them"
                    )
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if kept:
        print(
            f"kept: {kept} of {len(jobs)} shards, which were complete; if images have changed since, "
            "remove the output and prepare it again"
        )
    return unreadable


def _write_shard(
    job: Job, progress: Callable[[int], Any], stop: threading.Event
) -> tuple[set[str], bool]:
    """Writes one shard, unless it is complete.

    Returns:
        The names of its unreadable images, and whether it was complete and kept.

    A shard of which images were unreadable is written again, since they may have been mended.
    """
    skipped_file = job.path.with_suffix(".unreadable")
    try:
        is_complete = len(tfrecords.Shard(job.path).offsets) == len(job.items)
        if is_complete and not skipped_file.exists():
            progress(len(job.items))
            return set(), True
    except UserError:
        if job.path.exists():
            tqdm.write(f"warning: {one_line(str(job.path))}: damaged, and written again")
    skipped = set()
    with atomic_write(job.path) as temporary:
        try:
            with tf.io.TFRecordWriter(str(temporary)) as writer:
                for item in job.items:
                    if stop.is_set():  # another shard has failed, and its error ends the command
                        raise concurrent.futures.CancelledError
                    try:
                        writer.write(tfrecords.serialize(item.load(), bits=job.bits))
                    except UnreadableImage:
                        skipped.add(item.name)
                    progress(1)
        except tf.errors.OpError as error:
            raise write_error(job.path, error) from None
        if skipped:
            write_text(skipped_file, json.dumps(sorted(skipped)))
        else:
            skipped_file.unlink(missing_ok=True)
    return skipped, False


def folder_task(config: DataConfig, validation: float, seed: int, settings: dict) -> Task:
    """Makes the task for a folder of images, which are split at random unless the folder is split.

    Args:
        config: Section ``data`` of a configuration: the folder, and what its images become.
        validation: Portion of the images that is held out for validation.
        seed: Seed of the split.
        settings: Further settings that the output depends on.

    Raises:
        UserError: No image can be used.
    """
    folder = images.look(config)
    decision = folder.decision
    spec = settling.stored_spec(decision.config)
    check_size(spec.shape[:2])
    parts = images.split(folder, validation, seed)
    root = user_path(config.data)

    def name(item):
        return str(item._replace(path=item.path.relative_to(root)).name)

    def load(item):
        source = images.FolderSource(
            [item], spec, decision.config.crop, decision.config.alpha, folder.reader
        )
        return source.fetch(0)[0]

    splits = {
        split: [ImageToWrite(name(item), functools.partial(load, item)) for item in part]
        for split, part in zip(("train", "validation"), parts, strict=True)
    }
    found = ("channels", "bits", "value_range", "alpha", "crop")
    settings = {
        **settings,
        "size": decision.config.image_size,
        **{key: getattr(decision.config, key) for key in found},
    }
    skipped = {name(each.item): each.kind for each in decision.skipped}
    lines = list(decision.lines)
    if len(folder.splits) > 1 and validation != VALIDATION_PORTION:
        lines.append(
            f"validation: {validation:g} is not used, because the folder is split already "
            "(--validation)"
        )
    return Task(
        splits,
        spec,
        settings,
        skipped,
        lines,
        may_skip=not config.strict,
        strict=config.strict,
    )


def check_size(size: tuple[int, int]) -> None:
    """Checks that a size (height, width) is neither too small nor too large.

    Raises:
        UserError: The size is too small or too large.
    """
    if not SMALLEST_SIZE <= min(size) <= max(size) <= LARGEST_SIZE:
        raise UserError(
            f"--size: {tfrecords.size_text(size)} is not allowed; expected sides of {SMALLEST_SIZE} to "
            f"{LARGEST_SIZE} pixels"
        )


def faces_task(folder: Path, size: int, validation: float, seed: int, settings: dict) -> Task:
    """Makes the task for FFHQ's images, split at random; arguments as for `folder_task`."""
    paths = image_files.find_images(folder)
    parts = images.split_randomly(paths, validation, seed)
    spec = ImageSpec(size, size, 3)

    def items(paths):
        load = functools.partial(images.load_image, spec=spec, crop=settings["crop"])
        return [
            ImageToWrite(str(path.relative_to(folder)), functools.partial(load, path, path))
            for path in paths
        ]

    splits = {"train": items(parts[0]), "validation": items(parts[1])}
    return Task(splits, spec, {**settings, "size": size})


def celeba_task(folder: Path, size: int, settings: dict) -> Task:
    """Makes the task for CelebA's aligned images: the official split, cropped to 148x148 faces.

    Raises:
        UserError: The images or the split file are missing, or an image has another size.
    """
    lists = sorted(folder.rglob("list_eval_partition.txt"))
    if not lists:
        raise UserError(
            f"{folder}: no list_eval_partition.txt here or below; it is the split file of CelebA"
        )
    paths = {path.name: path for path in image_files.find_images(folder)}
    splits = {name: [] for name in CELEBA_SPLITS.values()}
    for line in _lines(lists[0]):
        name, _, part = line.partition(" ")
        if part.strip() not in CELEBA_SPLITS:
            raise UserError(f"{lists[0]}: cannot read the line {line[:40]!r}; fetch the file again")
        if name not in paths:
            raise UserError(f"{folder}: {name} is missing; extract CelebA's aligned images again")
        load = functools.partial(_load_celeba, paths[name], size)
        splits[CELEBA_SPLITS[part.strip()]].append(ImageToWrite(name, load))
    empty = [split for split in ("train", "validation") if not splits[split]]
    if empty:
        raise UserError(f"{lists[0]}: names no image for {empty[0]}; fetch the file again")
    splits = {split: items for split, items in splits.items() if items}
    return Task(splits, ImageSpec(size, size, 3), {**settings, "size": size})


def _lines(path: Path) -> list[str]:
    """Reads the lines of a small text file."""
    try:
        if not is_regular(path) or path.stat().st_size > LARGEST_LIST:
            raise ValueError("not a list of CelebA's splits")
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not readable ({short_message(error)}); fetch the file again"
        ) from None


def _load_celeba(path: Path, size: int) -> np.ndarray:
    image = image_files.decode(path, path)
    height, width = image.values.shape[:2]
    if (height, width) != CELEBA_SIZE:
        raise UserError(
            f"{path}: the image is {width}x{height}; CelebA's aligned images are "
            f"{CELEBA_SIZE[1]}x{CELEBA_SIZE[0]}"
        )
    left, top, right, bottom = CELEBA_BOX
    face = image._replace(values=image.values[top:bottom, left:right])
    return levels.to_levels(face, ImageSpec(size, size, 3))


def lsun_task(folder: Path, size: int, settings: dict) -> Task:
    """Makes the task for an LSUN scene: the LMDBs ``*_train_lmdb`` and ``*_val_lmdb`` below a folder.

    Raises:
        UserError: An LMDB is missing, damaged or empty, or the package lmdb is not installed.
    """
    try:
        import lmdb
    except ImportError:
        raise UserError(
            'reading LSUN needs the package lmdb: pip install "nvae-tf[lsun]"'
        ) from None
    splits, spec = {}, ImageSpec(size, size, 3)
    for split, pattern in (("train", "*_train_lmdb"), ("validation", "*_val_lmdb")):
        paths = sorted(folder.rglob(pattern))
        if len(paths) != 1:
            raise UserError(
                f"{folder}: expected one folder {pattern} here or below, found {len(paths)}"
            )
        (path,) = paths
        try:
            database = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
            with database.begin() as transaction:
                keys = list(transaction.cursor().iternext(values=False))
        except lmdb.Error as error:
            raise UserError(f"{path}: not a readable LMDB ({error}); extract it again") from None
        if not keys:
            raise UserError(f"{path}: holds no images; fetch and extract it again")

        def load(key, database=database, path=path):
            with database.begin() as transaction:
                content = io.BytesIO(transaction.get(key))
            return images.load_image(content, f"{path}, key {key!r}", spec, RANDOM)

        splits[split] = [
            ImageToWrite(f"{path.name} {key!r}", functools.partial(load, key)) for key in keys
        ]
    return Task(splits, spec, {**settings, "size": size})


def unpack(archive: Path, output: Path) -> dict[str, int]:
    """Unpacks the tfrecords of GLOW's official tar into `output`, and nothing else.

    Args:
        archive: Path of the tar.
        output: Path of the output folder, created if needed. Complete shards in it are kept.

    Returns:
        Dictionary from split and size (``"train 256x256"``) to the number of images.

    Raises:
        UserError: The archive is damaged, incomplete, or holds no tfrecords; or another process
            prepares data in `output`.
    """
    with exclusive_lock(output, PREPARING):
        for split in ("train", "validation"):
            _remove_partial(output / split)
        return _unpack_locked(archive, output)


def _unpack_locked(archive: Path, output: Path) -> dict[str, int]:
    if (output / MANIFEST).exists():
        raise UserError(f"{output}: was prepared from images; choose another --output for a tar")
    splits: set[tuple[str, tfrecords.Size]] = set()
    try:
        with (
            tarfile.open(archive) as tar,
            tqdm(
                total=archive.stat().st_size, unit="B", unit_scale=True, desc="unpack", disable=None
            ) as bar,
        ):
            for member in tar:
                match = tfrecords.SHARD.fullmatch(os.path.basename(member.name))
                if match and member.isfile() and match["split"] in ("train", "validation"):
                    _unpack_member(tar, member, output / match["split"])
                    splits.add((match["split"], tfrecords.size_of(match)))
                bar.n = member.offset_data + member.size
                bar.refresh()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - tarfile and each compression have their own kinds
        raise UserError(
            f"{archive}: cannot be unpacked ({short_message(error)}); fetch it again"
        ) from None
    if not splits:
        raise UserError(f"{archive}: holds no tfrecords; expected celeba-tfr.tar or its like")
    counts = {}
    for split, size in sorted(splits):
        shards = tfrecords.find_shards(output, split, size)
        counts[f"{split} {size[1]}x{size[0]}"] = sum(
            len(tfrecords.Shard(p).offsets) for p in shards
        )
    return counts


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    path = folder / os.path.basename(member.name)
    make_folder(folder)
    if path.exists() and path.stat().st_size == member.size:
        return
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        content = tar.extractfile(member)
        assert content is not None  # `_unpack_locked` has checked that it is a regular file
        while block := _read_block(content):
            file.write(block)


def _read_block(content) -> bytes:
    """Reads the next bytes of a tar's member.

    Raises:
        tarfile.ReadError: The tar cannot be read. It takes the place of an OSError, which would be
            taken for an error of the file that is written.
    """
    try:
        return content.read(1 << 20)
    except OSError as error:
        raise tarfile.ReadError(short_message(error)) from None

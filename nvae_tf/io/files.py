"""Files written so that a crash or a full disk never leaves half of one, and small ones read."""

import contextlib
import ctypes
import errno
import glob
import json
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from nvae_tf.io.errors import UserError, short_message

OLD = ".old.part"  # ending of a folder that another one takes the place of


def read_json(path: Path, most: int = 2**27):
    """What a JSON file holds.

    Raises:
        UserError: it is missing, damaged, or larger than `most` bytes.
    """
    try:
        if path.stat().st_size > most:
            raise ValueError(f"larger than {most} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({short_message(error)})") from None


@contextlib.contextmanager
def atomic_write(path: Path):
    """Yields a temporary file beside `path`, which takes its name if the block succeeds.

    It has the permissions that the user's umask leaves. A process that is killed leaves it behind, as
    ``.NAME.*.part``, and what was at `path` before.

    Raises:
        UserError: the folder or the disk does not take the file; what was there is unchanged.
    """
    temporary = _beside(path)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(path: Path):
    """Yields an empty folder beside `path`, which is removed in the end, unless it was renamed.

    As for the rest, it is like `atomic_write`.
    """
    temporary = _beside(path)
    try:
        temporary.mkdir()
        yield temporary
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_write_dir(path: Path):
    """As `atomic_write`, for a folder and all that the block puts into it.

    The old and the new folder change names in one step, so that at every moment one of them is there.
    Only where the system has no such step (NFS, macOS) there is a moment between two renames: a
    process killed in it leaves both, whole, as ``.NAME.*.old.part`` and ``.NAME.*.part``, and the next
    one to replace this folder puts the old one back first.
    """
    with temporary_folder(path) as temporary:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*{OLD}"):
            if path.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(path)
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        yield temporary
        if not path.exists():
            temporary.rename(path)
        elif not _exchanged(temporary, path):
            old = temporary.with_suffix(OLD)
            path.rename(old)
            try:
                temporary.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A name for what is not complete yet: hidden, and of this process alone."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def _exchanged(one: Path, other: Path) -> bool:
    """Lets two folders change names in one step; whether the system could."""
    try:
        rename = ctypes.CDLL(None).renameat2  # of Linux
    except AttributeError:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextlib.contextmanager
def download_errors(title: str, advice: str):
    """Turns whatever a failed download by Keras raises into a `UserError` that gives advice."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - Keras raises bare Exception here
        raise UserError(
            f"{title} could not be downloaded ({short_message(error)}); {advice}"
        ) from None


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, unless they are there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes an 8-bit image (height, width, 1 or 3 channels), whole or not at all."""
    with atomic_write(path) as temporary:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, "PNG")


def write_animation(path: Path, frames: np.ndarray, milliseconds: int = 80) -> None:
    """Writes 8-bit RGB frames (n, height, width, 3), there and back in a loop, as GIF or WebP."""
    pictures = [Image.fromarray(frame) for frame in [*frames, *frames[-2:0:-1]]]
    options = {"lossless": True} if path.suffix == ".webp" else {"optimize": False}
    with atomic_write(path) as temporary:
        pictures[0].save(
            temporary,
            path.suffix[1:].upper(),
            save_all=True,
            append_images=pictures[1:],
            duration=milliseconds,
            loop=0,
            **options,
        )


def write_error(path: Path, error: Exception) -> UserError:
    """The error to raise when writing failed."""
    return UserError(
        f"{path}: cannot be written ({short_message(error)}); free space or permissions there, or "
        "choose another folder"
    )

"""Atomic file writes, and JSON reading."""

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
from nvae_tf.io.paths import is_regular

OLD = ".old.part"  # ending of the name of a folder that is being replaced
FRAME_MILLISECONDS = 80  # how long an animation shows a frame
LONGEST_SIDES = {".gif": 65535, ".webp": 16383}  # pixels of an animation, at most


def read_json(path: Path, max_size: int = 2**27):
    """Reads a JSON file.

    Args:
        path: Path of the file.
        max_size: Largest size of the file in bytes.

    Returns:
        The value that the file holds.

    Raises:
        UserError: The file is missing, damaged or too large, or is a device or a pipe.
    """
    try:
        if path.stat().st_size > max_size:
            raise ValueError(f"larger than {max_size} bytes")
        if not is_regular(path):
            raise ValueError("not a regular file")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({short_message(error)})") from None


@contextlib.contextmanager
def atomic_write(path: Path):
    """Replaces a file in one step: yields a temporary file that is renamed if the block succeeds.

    The file gets the permissions that the user's umask leaves. A process that is killed leaves the
    temporary file behind, as ``.NAME.*.part``, and the old file unchanged. A link to a file is replaced
    itself, so that nothing is written outside the folder: a run from elsewhere may hold any link.

    Args:
        path: Path of the file to write; the temporary one is in the same folder.

    Raises:
        UserError: The file cannot be written there, and the old file is unchanged; or the path is that
            of a folder, a device or a pipe, or of a link to one.
    """
    _check_replaceable(path)
    temporary = _temporary_path(path)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(path: Path):
    """Yields an empty folder beside `path` and removes it at the end, unless the block renamed it.

    Permissions, leftovers and errors are as for `atomic_write`.
    """
    temporary = _temporary_path(path)
    try:
        temporary.mkdir()
        yield temporary
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_write_dir(path: Path):
    """Replaces a folder in one step: like `atomic_write`, for all that the block puts into it.

    The old and the new folder exchange their names in one step, so one of them is there at every
    moment. Where the system cannot do that (NFS, macOS), two renames follow each other: a process that
    is killed between them leaves both folders complete, as ``.NAME.*.old.part`` and ``.NAME.*.part``,
    and the next one that replaces the folder calls `put_back` first.
    """
    with temporary_folder(path) as temporary:
        put_back(path.parent, glob.escape(path.name))
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in [*names, "."]:
                _flush(Path(folder, name))
        if not path.exists():
            temporary.rename(path)
        elif not _exchange(temporary, path):
            old = temporary.with_suffix(OLD)
            path.rename(old)
            try:
                temporary.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        _flush(path.parent)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk, where a power cut leaves them.

    Raises:
        OSError: The file's content cannot be written.
    """
    is_folder = path.is_dir()
    # Some file systems cannot do this for folders.
    with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def put_back(parent: Path, name: str = "*") -> None:
    """Gives folders their names back that a process was replacing when it was killed.

    An old folder whose new one is in place is removed. Several processes may call this at the same
    time, but not while another one replaces a folder of such a name.

    Args:
        parent: Folder that holds them.
        name: Pattern of their names; default: all.

    Raises:
        UserError: One cannot be renamed.
    """
    for old in parent.glob(f".{name}.????????{OLD}"):
        path = parent / old.name[1 : -len(OLD)].rpartition(".")[0]
        try:
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(path)
        except FileNotFoundError:  # another process has put it back
            pass
        except OSError as error:
            raise write_error(path, error) from None


def _temporary_path(path: Path) -> Path:
    """A hidden path in the same folder that no other process uses, for what is not complete yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders in one step; returns False if the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2  # Linux only
    except AttributeError:
        return False
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return (
        rename(current_folder, os.fsencode(one), current_folder, os.fsencode(other), exchange) == 0
    )


@contextlib.contextmanager
def download_errors(title: str, advice: str):
    """Turns whatever a failed download by Keras raises into a `UserError` that gives advice.

    Args:
        title: Name of what is downloaded.
        advice: What to do instead, as a part of a line.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - Keras raises bare Exception here
        raise UserError(
            f"{title} could not be downloaded ({short_message(error)}); {advice}"
        ) from None


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, unless they exist."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from None


def check_writable(path: Path) -> None:
    """Checks that a file can be written, before it is known what: makes its folder, and leaves no file.

    Raises:
        UserError: `atomic_write` would raise it.
    """
    make_folder(path.parent)
    _check_replaceable(path)
    temporary = _temporary_path(path)
    try:
        temporary.touch()
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _check_replaceable(path: Path) -> None:
    """Refuses what a file must not replace: folders, devices, pipes, links to them, and all of /dev."""
    try:
        is_folder, is_other = path.is_dir(), path.exists() and not path.is_file()
    except OSError as error:  # the folder may not be searched, for example
        raise write_error(path, error) from None
    if is_folder:
        raise UserError(f"{path}: is a folder; name a file in it")
    if is_other or os.path.realpath(path.parent) == "/dev":
        raise UserError(f"{path}: a device or a pipe, which is not replaced; name a file")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically; bytes of file names that are not text become backslashes."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content) -> None:
    """Writes a JSON file atomically.

    Raises:
        UserError: The file cannot be written, or a number is not finite, which JSON does not have.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError:
        raise UserError(
            f"{path}: not written, since numbers of the model are not finite; train it longer, or with "
            "other settings"
        ) from None
    write_text(path, text + "\n")


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes an 8-bit image (height, width, 1 or 3 channels) as PNG, atomically."""
    with atomic_write(path) as temporary:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, "PNG")


def write_animation(path: Path, frames: np.ndarray) -> None:
    """Writes an animation that plays forwards and backwards in a loop, atomically.

    Args:
        path: Path of the file, which ends in ``.gif`` or ``.webp``.
        frames: 8-bit RGB images (n, height, width, 3).

    Raises:
        UserError: The file cannot be written, or the format does not hold images of that size.
    """
    height, width = frames.shape[1:3]
    if max(height, width) > LONGEST_SIDES[path.suffix]:
        raise UserError(
            f"{path}: frames of {width}x{height} are too large for this format; make fewer images at "
            "once"
        )
    pictures = [Image.fromarray(frame) for frame in [*frames, *frames[-2:0:-1]]]
    options = {"lossless": True} if path.suffix == ".webp" else {"optimize": False}
    with atomic_write(path) as temporary:
        pictures[0].save(
            temporary,
            path.suffix[1:].upper(),
            save_all=True,
            append_images=pictures[1:],
            duration=FRAME_MILLISECONDS,
            loop=0,
            **options,
        )


def write_error(path: Path, error: Exception) -> UserError:
    """Returns the error to raise when a file could not be written."""
    return UserError(
        f"{path}: cannot be written ({short_message(error)}); free space or permissions there, or "
        "choose another folder"
    )

"""Files written so that a crash or a full disk never leaves half of one, and small ones read."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from nvae_tf.errors import UserError, reason


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
        raise UserError(f"{path}: not readable as JSON ({reason(error)})") from None


@contextlib.contextmanager
def replacing(path: Path):
    """Yields a temporary path beside `path`, which takes its name if the block succeeds.

    Raises:
        UserError: the folder or the disk does not take the file; what was there is unchanged.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part"
        )
        os.close(handle)
        os.chmod(temporary, 0o644)
        yield Path(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


@contextlib.contextmanager
def replacing_folder(path: Path):
    """As `replacing`, for a folder and all that the block puts into it."""
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        temporary.chmod(0o755)
        yield temporary
        if path.exists():
            # Renamed first: an interrupted removal must not leave half of it.
            shutil.rmtree(path.rename(temporary.with_suffix(".old.part")))
        temporary.rename(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def downloading(title: str, advice: str):
    """Turns whatever a failed download by Keras raises into a `UserError` that gives advice."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - Keras raises bare Exception here
        raise UserError(f"{title} could not be downloaded ({reason(error)}); {advice}") from None


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, unless they are there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes an 8-bit image (height, width, 1 or 3 channels), whole or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, "PNG")


def write_animation(path: Path, frames: np.ndarray, milliseconds: int = 80) -> None:
    """Writes 8-bit RGB frames (n, height, width, 3), there and back in a loop, as GIF or WebP."""
    pictures = [Image.fromarray(frame) for frame in [*frames, *frames[-2:0:-1]]]
    options = {"lossless": True} if path.suffix == ".webp" else {"optimize": False}
    with replacing(path) as temporary:
        pictures[0].save(
            temporary,
            path.suffix[1:].upper(),
            save_all=True,
            append_images=pictures[1:],
            duration=milliseconds,
            loop=0,
            **options,
        )


def cannot_write(path: Path, error: Exception) -> UserError:
    """The error to raise when writing failed."""
    return UserError(
        f"{path}: cannot be written ({reason(error)}); free space or permissions there, or choose "
        "another folder"
    )

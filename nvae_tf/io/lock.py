"""A folder for one process alone."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from nvae_tf.io.errors import UserError
from nvae_tf.io.files import make_folder, write_error


@contextlib.contextmanager
def exclusive_lock(folder: Path, doing: str):
    """Within the block no other process is in such a block for the same folder.

    Args:
        folder: made, if need be, and then removed again if nothing was put into it.
        doing: what is done there, for the error.

    Raises:
        UserError: another process is there, or the folder cannot be written.
    """
    existed = folder.exists()
    make_folder(folder)
    path = folder / ".lock"
    try:
        lock = _locked(path)
    except BlockingIOError:
        raise UserError(
            f"{folder}: another process is {doing} here; wait for it or end it"
        ) from None
    except OSError as error:
        raise write_error(path, error) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            path.unlink()
            if not existed:
                folder.rmdir()
        lock.close()


def _locked(path: Path):
    """A file that this process alone has locked; the system unlocks it when the process ends."""
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                file.close()
                raise
            return file  # a file system without locks
        # Whoever held it before may have removed it in between, for others to make anew.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()

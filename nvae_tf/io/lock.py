"""A lock that lets one process at a time work in a folder."""

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from nvae_tf.io.errors import UserError, short_message
from nvae_tf.io.files import make_folder, write_error

NAME = ".lock"
# The file system has none.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def exclusive_lock(folder: Path, doing: str):
    """Holds an exclusive lock on a folder; the system releases it when the process ends.

    The hidden file that is locked stays in the folder. If it were removed, one process could hold the
    removed file and another a new one of the same name.

    Where the file system has no locks, a warning says so, and nothing is locked.

    Args:
        folder: Path of the folder, which is created if need be.
        doing: What this process does there, for the error that another process gets.

    Raises:
        UserError: Another process holds the lock, or the folder cannot be written.
    """
    make_folder(folder)
    path = folder / NAME
    try:
        # Neither a link, which a run from elsewhere may hold, nor a pipe, which would block.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise write_error(path, error) from None
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path}: not a regular file; remove it")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is {doing} here; wait for it or end it"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise write_error(path, error) from None
            print(
                f"warning: {folder}: the file system has no locks ({short_message(error)}), so nothing "
                f"keeps another process from {doing} here at the same time",
                flush=True,
            )
        yield

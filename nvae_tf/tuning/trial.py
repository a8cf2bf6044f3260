"""One trial of a search: a training in a separate process.

A trial that runs out of memory, or that the system kills, fails without ending the search, and the next
one finds the memory of all devices free.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from nvae_tf.config import Config
from nvae_tf.engine.xla_flags import make_deterministic
from nvae_tf.io.errors import UserError, short_message
from nvae_tf.io.files import write_text
from nvae_tf.run_folder import RunFolder


class TrialStopped(UserError):
    """A trial was told to stop, and has left a checkpoint."""


def run_trial(
    config: Config,
    path: Path,
    searched: dict,
    epochs: int | None = None,
    parent: Path | None = None,
) -> dict[str, float]:
    """Trains in a separate process and waits for it.

    Args:
        config: Configuration of the trial.
        path: Folder of the trial; a training that it already holds is continued.
        searched: Values of the keys that the search varies, for TensorBoard.
        epochs: Number of epochs after which to end; default: all of the configuration's.
        parent: Folder of a trial with the same values and fewer epochs, to continue from.

    Returns:
        The test set's ``nelbo``, ``recon`` and ``kl`` in nats and ``bpd`` in bits per dimension.

    Raises:
        UserError: The training raised it or failed, or its process was killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    stderr = _copy_stderr()
    process = context.Process(
        target=_in_child, args=(sender, stderr, config, path, searched, epochs, parent), daemon=True
    )
    process.start()
    sender.close()
    if stderr:
        stderr.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(_how_it_ended(process.exitcode)) from None
    except BaseException:  # an interruption: the training leaves a checkpoint
        process.terminate()
        raise
    finally:
        process.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _how_it_ended(status: int | None) -> str:
    """Why a process that sent nothing has ended."""
    if status is None or status >= 0:
        return f"its process ended with status {status}, without a result"
    return f"its process was killed by {signal.Signals(-status).name}, possibly out of memory"


def _copy_stderr() -> Connection | None:
    """Copies the connection of `sys.stderr`, to hand it to a child; None if that is not possible.

    A child inherits only file descriptor 2, which may be a pipe (`nvae_tf.cli.chatter`) although this
    process shows its progress on a terminal.
    """
    try:
        return Connection(os.dup(sys.stderr.fileno()), readable=False)
    except (AttributeError, OSError):
        return None


def _in_child(sender, stderr, *arguments):
    if stderr:
        sys.stderr = os.fdopen(os.dup(stderr.fileno()), "w", buffering=1, errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the parent, which ends this process in order
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        sender.send(_train(*arguments))
    except UserError as error:
        sender.send(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the search goes on
        traceback.print_exc()
        sender.send(UserError(f"{type(error).__name__}: {short_message(error)}"))


def _follow_parent():
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _train(config, path, searched, epochs, parent):
    if config.train.deterministic:
        make_deterministic(os.environ)
    from nvae_tf.engine.xla_probe import probe
    from nvae_tf.training.cluster import connect
    from nvae_tf.training.run import train

    folder = RunFolder(path)
    if parent and not folder.config_file.exists():
        _copy(RunFolder(parent), folder)
    resume = folder.config_file.exists()
    xla_problem = probe(config.train.jit_compile)  # before this process takes the GPUs' memory
    results = train(
        config, folder, resume, connect(), epochs, hparams=searched, xla_problem=xla_problem
    )
    if results is None:
        raise TrialStopped("stopped, with a checkpoint")
    return results


def _copy(source: RunFolder, target: RunFolder) -> None:
    """Copies what training continues from, the configuration last, because it makes a folder a run."""
    for path in source.list_checkpoints()[:1]:
        copied = target.checkpoints / path.name
        if not copied.exists():  # by a process that was killed before it copied the configuration
            temporary = target.checkpoints / f".{path.name}.part"
            shutil.copytree(path, temporary, dirs_exist_ok=True)
            temporary.rename(copied)
    write_text(target.config_file, source.config_file.read_text(encoding="utf-8"))

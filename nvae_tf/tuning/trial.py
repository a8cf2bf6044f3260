"""One trial of a search: a training in a process of its own.

So a trial that runs out of memory, or that the system kills, fails alone, and the next one finds the
memory of all devices free.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from nvae_tf.config import Config
from nvae_tf.io.errors import UserError
from nvae_tf.run_folder import RunFolder


class TrialStopped(UserError):
    """The trial was told to stop and left a checkpoint."""


def run_trial(
    config: Config,
    path: Path,
    searched: dict,
    epochs: int | None = None,
    parent: Path | None = None,
) -> dict[str, float]:
    """Trains, in a process of its own, and waits for it.

    Args:
        config: of the trial.
        path: the trial's folder; a training that is there already is continued.
        searched: the keys that the search varies, and their values, for TensorBoard.
        epochs: end after so many of the configuration's; default: all.
        parent: folder of a trial with the same values and fewer epochs, to go on from.

    Returns:
        The test set's ``nelbo``, ``recon`` and ``kl`` in nats and ``bpd`` in bits per dimension.

    Raises:
        UserError: whatever the training raises; or its process was killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    words = _own_stderr()
    process = context.Process(
        target=_in_child, args=(sender, words, config, path, searched, epochs, parent), daemon=True
    )
    process.start()
    sender.close()
    if words:
        words.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"its process was killed (exit status {process.exitcode}), perhaps for want of memory"
        ) from None
    except BaseException:  # an interruption: the training leaves a checkpoint
        process.terminate()
        raise
    finally:
        process.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _own_stderr() -> Connection | None:
    """Where this process's own words go, to hand to a child; None: it cannot be handed on.

    A child would inherit file descriptor 2 alone, which may be a pipe (`nvae_tf.cli.chatter`) where
    this process shows its progress on a terminal.
    """
    try:
        return Connection(os.dup(sys.stderr.fileno()), readable=False)
    except (AttributeError, OSError):
        return None


def _in_child(sender, words, *arguments):
    if words:
        sys.stderr = os.fdopen(os.dup(words.fileno()), "w", buffering=1, errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's, which ends this process in order
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        sender.send(_train(*arguments))
    except UserError as error:
        sender.send(error)


def _follow_parent():
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _train(config, path, searched, epochs, parent):
    from nvae_tf.training.cluster import connect
    from nvae_tf.training.run import train

    folder = RunFolder(path)
    if parent and not folder.config_file.exists():
        _copy(RunFolder(parent), folder)
    resume = folder.config_file.exists()
    results = train(config, folder, resume, connect(), epochs)
    if results is None:
        raise TrialStopped("stopped, with a checkpoint")
    _report(folder, searched)
    return results


def _copy(source: RunFolder, target: RunFolder) -> None:
    """Copies what training continues from; the configuration last, since a run begins with it."""
    for path in source.list_checkpoints()[:1]:
        temporary = target.checkpoints / f".{path.name}.part"
        shutil.copytree(path, temporary, dirs_exist_ok=True)
        temporary.rename(target.checkpoints / path.name)
    shutil.copyfile(source.config_file, target.config_file)


def _report(folder: RunFolder, searched: dict) -> None:
    """Tells TensorBoard's HParams tab what was tried; its metrics are the validation's scalars."""
    import tensorflow as tf
    from tensorboard.plugins.hparams import api as hparams

    writer = tf.summary.create_file_writer(str(folder.logs / "validation"))
    with writer.as_default():
        hparams.hparams(searched, trial_id=folder.path.name)
    writer.close()

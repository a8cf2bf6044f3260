"""Filters what TensorFlow's C++ code writes to standard error, so that a command shows what matters.

That code writes to file descriptor 2, bypassing Python: about eight lines before a command's first
word, most of them notices, and one an error that only says that there is no GPU. `keep_out` puts a
process behind the descriptor that passes on all other lines. It has to be a separate process, because
what TensorFlow writes while it aborts the command has to be passed on, too.

Run as a program, this file is that process. It needs only Python's standard library.
"""

import atexit
import contextlib
import os
import re
import select
import signal
import subprocess
import sys

LEVEL = "TF_CPP_MIN_LOG_LEVEL"  # environment variable: the lowest level that TensorFlow writes
END = b"\0"  # follows the last output of a command
LINE_TIMEOUT = 0.2  # seconds to wait for the rest of a line
END_TIMEOUT = 5.0  # seconds to wait, at most, until the last output is passed on
MAX_LINE = 1 << 16  # bytes of a line that waits for its end

# The beginning of a message: as absl writes it (E0000 00:00:1700000000.000000  1234 file.cc:1] ...), or
# as TensorFlow 2.15 does (2024-01-01 00:00:00.000000: E path/file.cc:1] ...).
_MESSAGE = re.compile(
    rb"(?:(?P<absl>[IWEF])\d{4} [\d:.]+ +\d+ |\d{4}-\d\d-\d\d [\d:.]+: (?P<older>[IWEF]) )\S+:\d+\] "
)
# Warnings and errors that mean nothing to a user, and lines that belong to notices.
_KNOWN = re.compile(
    rb"All log messages before absl::InitializeLog\(\) is called are written to STDERR"
    rb"|To enable the following instructions: .*rebuild TensorFlow"
    # There is no GPU, or none that this process may use. Other failures of cuInit are shown.
    rb"|failed call to cuInit: .*(?:UNKNOWN ERROR \(303\)|CUDA_ERROR_NO_DEVICE)"
    rb"|Could not find (?:cuda drivers|TensorRT)"
    rb"|Unable to register cu\w+ factory|computation placer already registered"
    rb"|SetPriority unimplemented for this stream"
    rb"|oneDNN supports \w+ only on platforms with"
    # Python raises exceptions for these.
    rb"|OP_REQUIRES failed at|^\s+\[\[\{\{node [^}]*\}\}\]\]\s*$"
    rb"|tensor_slice_reader\.cc:\d+\] Could not open"
    rb"|Local rendezvous is aborting with status"
    rb"|will not be optimized because the dataset does not implement"
    rb"|exceeds 10% of free system memory"
    # Optimisation of the graph and its kernels on GPUs.
    rb"|meta_optimizer\.cc:\d+\] \w+ failed"
    rb"|[Dd]elay kernel|disabling parallel compilation|ptxas (?:info|warning) +:"
)


def keep_out() -> None:
    """Keeps TensorFlow's chatter out of this process's standard error, from now to its end.

    `sys.stderr` stays what it is, a terminal for example. Nothing changes if the user has set
    ``TF_CPP_MIN_LOG_LEVEL``, if TensorFlow is already imported, or if standard error is closed or is
    not descriptor 2.
    """
    if LEVEL in os.environ or "tensorflow" in sys.modules or not _writes_to_2(sys.stderr):
        return
    try:
        chatter_filter = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the command
        )
    except OSError:  # no process can be started, so the chatter stays
        return
    assert chatter_filter.stdin is not None
    os.environ[LEVEL] = "1"
    original = os.dup(2)
    os.dup2(chatter_filter.stdin.fileno(), 2)
    chatter_filter.stdin.close()
    sys.stderr = os.fdopen(
        original, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors
    )
    atexit.register(_end, chatter_filter)


def _writes_to_2(stream) -> bool:
    try:
        return stream is not None and stream.fileno() == 2
    except (OSError, ValueError):  # it is closed, or not a file
        return False


def _end(chatter_filter: subprocess.Popen) -> None:
    """Waits until everything so far is passed on, so that it comes before the shell's prompt."""
    assert chatter_filter.stdout is not None
    with contextlib.suppress(OSError):
        os.write(2, END)
        select.select([chatter_filter.stdout], [], [], END_TIMEOUT)


def is_chatter(line: bytes) -> bool:
    """Whether a line is known to mean nothing to a user."""
    prefix = _MESSAGE.match(line)
    level = prefix and (prefix["absl"] or prefix["older"])
    return level == b"I" or (level != b"F" and bool(_KNOWN.search(line)))


def _filter_lines() -> None:
    """Copies standard input to standard error, without chatter, and closes standard output at `END`."""
    held, begun = b"", False  # the part of a line so far, and whether its beginning is passed on
    while True:
        # Wait for the end of a message, because only then is it known what it says.
        waiting = held and not _MESSAGE.match(held)
        ready, _, _ = select.select([0], [], [], LINE_TIMEOUT if waiting else None)
        block = os.read(0, MAX_LINE) if ready else b""
        ended, over = END in block, ready and not block
        *lines, held = (held + block.replace(END, b"")).split(b"\n")
        for line in lines:
            if begun or not is_chatter(line):
                _pass_on(line + b"\n")
            begun = False
        if held and (ended or not block or len(held) > MAX_LINE):
            if begun or not is_chatter(held):
                _pass_on(held)
            held, begun = b"", True
        if ended:
            with contextlib.suppress(OSError):
                os.close(1)
        if over:
            return


def _pass_on(text: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more, and the command should go on
        while text:
            text = text[os.write(2, text) :]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it to every process of a step
    _filter_lines()

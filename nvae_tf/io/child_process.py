"""Modules of this package as programs in child processes, which may die in place of this one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nvae_tf.io.errors import one_line

PACKAGE = Path(__file__).resolve().parent.parent
LONGEST_REASON = 300  # characters


class Outcome(NamedTuple):
    """What became of a child process.

    Attributes:
        result: The JSON value on the last line that it printed; None if it failed.
        problem: Why it failed, as a part of a line; None if it did not.
    """

    result: Any = None
    problem: str | None = None


def run_module(module: str, words: Sequence[str] = (), *, seconds: float, **variables) -> Outcome:
    """Runs a module as a program and waits for it.

    Args:
        module: Its name; it prints a line of JSON last.
        words: Its arguments.
        seconds: Seconds to wait at most.
        variables: Changes of its environment.
    """
    environment = {**os.environ, **variables}
    path = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    environment["PYTHONSAFEPATH"] = "1"  # or a queue.py in the current folder would be imported
    command = [sys.executable, "-m", module, *words]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=seconds, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome(problem=f"no answer within {seconds:g} seconds")
    except OSError as error:
        return Outcome(problem=f"the process could not be started ({error.strerror})")
    if done.returncode:
        return Outcome(problem=_reason(done.returncode, done.stderr))
    try:
        return Outcome(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return Outcome(problem="it printed no result")


def _reason(status: int, stderr: bytes) -> str:
    """How a process ended, and the last line that it wrote."""
    ended = f"exit status {status}"
    if status < 0:
        ended = f"killed by {signal.Signals(-status).name}"
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    return f"{ended}: {one_line(lines[-1].strip())[:LONGEST_REASON]}" if lines else ended

"""What this machine is, in a few words for those who read its numbers."""

import os
import platform
import re
from pathlib import Path

CPUS = Path("/proc/cpuinfo")


def machine_name() -> str:
    """Name and number of the processors that this process may use: ``AMD EPYC 7B13, 2 CPU cores``."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    text = f"{cores} CPU core" + ("" if cores == 1 else "s")
    return f"{_processor()}, {text}"


def _processor() -> str:
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$", CPUS.read_text(errors="replace"), re.MULTILINE
        )
    except OSError:
        found = None
    name = found[1].strip() if found else ""
    # A virtual machine may hide the name.
    return name if name and name.lower() != "unknown" else platform.machine()

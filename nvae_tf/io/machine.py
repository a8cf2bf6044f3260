"""What this machine has: its processors in a few words, and the cores that may be used."""

import os
import platform
import re
from pathlib import Path

CPUS = Path("/proc/cpuinfo")


def usable_cores() -> int:
    """Number of CPU cores that this process may use; a scheduler may have bound it to some of them."""
    return len(os.sched_getaffinity(0))


def machine_name() -> str:
    """Name and number of the processors that this process may use: ``AMD EPYC 7B13, 2 CPU cores``."""
    cores = usable_cores()
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

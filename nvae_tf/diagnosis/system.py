"""What the operating system gives a training: GPUs and their driver, memory, limits."""

import contextlib
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from nvae_tf.diagnosis.findings import Finding, ok, problem, warning

GIB = 2.0**30
FEWEST_FILES = 4096  # open ones: every worker, reader and device takes some
SMALLEST_SHARED_MEMORY = 1.0  # GiB; NCCL exchanges through it, and Docker gives 64 MiB
OLDEST_DRIVER = {"12": 525, "13": 580}  # by the first number of CUDA's version
NVIDIA_SMI_SECONDS = 20.0


class GPUMemory(NamedTuple):
    """Memory of a GPU in GiB."""

    free: float
    total: float


def query_gpus(fields: str, which: str | None = None) -> list[list[str]]:
    """What NVIDIA's tool says of each GPU; nothing if there is no such tool, or it fails.

    Args:
        fields: Names of its properties, with commas between them.
        which: Numbers or identifiers of GPUs, with commas between them; an empty text: none; default:
            all.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None or which == "":
        return []
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if which is not None:
        command.append(f"--id={which}")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]


def gpu_memory() -> list[GPUMemory]:
    """Memory of the GPUs that this process may use, as far as NVIDIA's tool knows it."""
    memories = []
    for row in query_gpus("memory.free,memory.total", os.environ.get("CUDA_VISIBLE_DEVICES")):
        with contextlib.suppress(ValueError):
            free, total = map(float, row)
            memories.append(GPUMemory(free / 1024, total / 1024))
    return memories


def available_memory() -> float | None:
    """GiB of the machine's memory that processes may still take; None if that is unknown."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(match[1]) / 2**20 if match else None


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None if there is none, or it does not say."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        match = re.search(r"Kernel Module\D+?(\d+\.[\d.]+)", text)
        if match:
            return match[1]
    rows = query_gpus("driver_version")
    return rows[0][0] if rows else None


def check_driver(cuda: str) -> list[Finding]:
    """Whether the NVIDIA driver is new enough for TensorFlow's CUDA."""
    version, oldest = driver_version(), OLDEST_DRIVER.get(cuda.partition(".")[0])
    if version is None:
        return [ok("an NVIDIA driver, whose version is unknown")]
    if oldest and int(version.partition(".")[0]) < oldest:
        return [
            problem(
                f"NVIDIA driver {version} is too old for CUDA {cuda}", f"install {oldest} or newer"
            )
        ]
    return [ok(f"NVIDIA driver {version}")]


def check_gpus(gpus: list, built_for_gpus: bool, driver_here: bool) -> list[Finding]:
    """The GPUs that TensorFlow finds, or why it finds none.

    Args:
        gpus: Name and compute capability of each.
        built_for_gpus: Whether TensorFlow can use any.
        driver_here: Whether there is an NVIDIA driver.
    """
    if gpus:
        return [_gpu(name, capability) for name, capability in gpus]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not re.match(r"\d|GPU-|MIG-", visible):
        return [ok(f"no GPU: CUDA_VISIBLE_DEVICES is {visible!r}, which hides all")]
    named = f"CUDA_VISIBLE_DEVICES is {visible!r}, and " if visible else ""
    if not driver_here:
        if named:
            return [
                problem(
                    f"{named}there is no NVIDIA driver",
                    "unset it to train on the CPU, or install the driver",
                )
            ]
        return [ok("no NVIDIA driver (libcuda.so.1 is not found): training runs on the CPU")]
    if not built_for_gpus:
        return [problem("this TensorFlow was built without CUDA", "install TensorFlow for Linux")]
    return [
        problem(
            f"{named}TensorFlow finds no GPU, although there is an NVIDIA driver",
            "correct CUDA_VISIBLE_DEVICES, or see to the libraries below",
        )
    ]


def half_precision(capability) -> str | None:
    """The precision of 16 bits that a GPU computes fast; None if there is none.

    Args:
        capability: Its compute capability, two numbers; None if it is unknown.
    """
    if not capability or tuple(capability) >= (8, 0):
        return "mixed_bfloat16"
    return "mixed_float16" if tuple(capability) >= (7, 0) else None


def _gpu(name: str, capability) -> Finding:
    if not capability:
        return ok(f"GPU {name}")
    text = f"GPU {name}, compute capability {'.'.join(map(str, capability))}"
    half = half_precision(capability)
    if half is None:
        return warning(text, "it has no tensor cores: keep --precision float32")
    if half == "mixed_float16":
        return warning(text, f"it has no bfloat16: use --precision {half} or float32")
    return ok(text)


def check_memory() -> list[Finding]:
    """The memory that is free on the GPUs and on the machine."""
    findings = []
    for number, memory in enumerate(gpu_memory()):
        text = f"GPU {number}: {memory.free:.1f} of {memory.total:.1f} GiB are free"
        taken = memory.free < 0.8 * memory.total
        findings.append(
            warning(text, "another process has the rest (nvidia-smi names it)")
            if taken
            else ok(text)
        )
    available = available_memory()
    if available is not None:
        findings.append(ok(f"memory: {available:.1f} GiB are available"))
    return findings


def check_limits() -> list[Finding]:
    """Limits of open files and of shared memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    findings = [ok(f"open files: up to {soft}")]
    if soft < FEWEST_FILES:
        findings = [
            warning(
                f"open files: up to {soft}, which several workers may exceed",
                f"ulimit -n {min(hard, 65536) if hard > soft else 65536}",
            )
        ]
    with contextlib.suppress(OSError):
        size = shutil.disk_usage("/dev/shm").total / GIB
        text = f"shared memory: {size:.2f} GiB"
        small = size < SMALLEST_SHARED_MEMORY
        findings.append(
            warning(text, "several GPUs may need more: docker run --shm-size 8g")
            if small
            else ok(text)
        )
    return findings

"""The CUDA libraries that TensorFlow loads, and where they come from.

Run as a program, this module loads every library that its arguments name; a damaged one may end the
process.
"""

import ctypes
import json
import re
import sys
import sysconfig
from pathlib import Path

from nvae_tf.diagnosis.findings import Finding, ok, problem, warning
from nvae_tf.io.child_process import run_module

INSTALL = 'pip install "nvae-tf[gpu]"'
# By the first number of the CUDA version that TensorFlow was built for; in the order of their loading.
LIBRARIES = {
    "12": (
        "libcudart.so.12", "libnvJitLink.so.12", "libcublasLt.so.12", "libcublas.so.12",
        "libcufft.so.11", "libcusparse.so.12", "libcusolver.so.11", "libcupti.so.12",
        "libnccl.so.2",
    ),
    "13": (
        "libcudart.so.13", "libnvJitLink.so.13", "libcublasLt.so.13", "libcublas.so.13",
        "libcufft.so.12", "libcusparse.so.12", "libcusolver.so.12", "libcupti.so.13",
        "libnccl.so.2",
    ),
}  # fmt: skip
LOAD_SECONDS = 60.0
ABSENT = re.compile(r"^(\S+): cannot open shared object file: No such file")


def check_libraries(cuda: str, cudnn: str | None, driver_here: bool) -> list[Finding]:
    """Which of the libraries load.

    Args:
        cuda: Version of CUDA that TensorFlow was built for.
        cudnn: Version of cuDNN that it was built for.
        driver_here: Whether there is an NVIDIA driver; without one nothing needs the libraries.
    """
    names = list(LIBRARIES.get(cuda.partition(".")[0], ()))
    if cudnn:
        names.append(f"libcudnn.so.{cudnn.partition('.')[0]}")
    if not names:
        return [
            warning(
                f"CUDA {cuda} is unknown here: its libraries were not checked",
                "TensorFlow's own page on GPUs says which it needs",
            )
        ]
    outcome = run_module(__name__, names, seconds=LOAD_SECONDS)
    if outcome.problem:
        return [
            problem(
                f"the CUDA libraries cannot be loaded ({outcome.problem})",
                f"look for damaged ones in LD_LIBRARY_PATH, or {INSTALL} anew",
            )
        ]
    missing = [name for name, error in outcome.result.items() if error and ABSENT.match(error)]
    findings = [
        problem(
            f"{name} does not load ({error})",
            "remove that file, or its folder from LD_LIBRARY_PATH; TensorFlow looks there first",
        )
        for name, error in outcome.result.items()
        if error and name not in missing
    ]
    if missing and driver_here:
        findings.append(problem(f"not found: {', '.join(missing)}", INSTALL))
    elif missing:
        findings.append(ok(f"CUDA libraries: {len(missing)} are missing, which no GPU here needs"))
    return findings or [ok(f"CUDA libraries: all {len(names)} load (CUDA {cuda}, cuDNN {cudnn})")]


def driver_loads() -> bool:
    """Whether the NVIDIA driver's library is there and loads."""
    name = "libcuda.so.1"
    outcome = run_module(__name__, [name], seconds=LOAD_SECONDS)
    return outcome.problem is None and not outcome.result[name]


def load(names: list[str]) -> dict[str, str]:
    """Loads libraries as TensorFlow does: from the system's paths, else from NVIDIA's wheels.

    Args:
        names: File names.

    Returns:
        For each an empty text, or why it does not load.
    """
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    results = {}
    for name in names:
        results[name] = error = _try(name)
        if error.startswith(f"{name}: cannot open"):  # nowhere on the system's paths
            for path in sorted(packages.glob(f"*/lib/{name}")):
                results[name] = _try(str(path))
    return results


def _try(name: str) -> str:
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    print(json.dumps(load(sys.argv[1:])))

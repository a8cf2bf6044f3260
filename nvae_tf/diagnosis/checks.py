"""All checks of `nvae-doctor`, one after the other; none of them ends the command."""

import os
from collections.abc import Callable, Iterator

from nvae_tf.config import Config
from nvae_tf.diagnosis import memory_needs, system
from nvae_tf.diagnosis.cuda_libraries import check_libraries, driver_loads
from nvae_tf.diagnosis.findings import Finding, ok, problem, warning
from nvae_tf.diagnosis.versions import check_versions
from nvae_tf.diagnosis.workers import check_workers
from nvae_tf.engine.xla_probe import xla_problem
from nvae_tf.io.child_process import run_module
from nvae_tf.io.errors import short_message

REPORT = "nvae_tf.diagnosis.tensorflow_report"
IMPORT_SECONDS, EXCHANGE_SECONDS = 120.0, 120.0


def diagnose(config: Config | None = None) -> Iterator[Finding]:
    """Checks this machine.

    Args:
        config: A recipe whose memory is compared with the machine's; default: none.

    Yields:
        What was found, as soon as it is.
    """
    yield from _guarded(check_versions)
    outcome = run_module(REPORT, seconds=IMPORT_SECONDS)
    report = outcome.result or {}
    if outcome.problem:
        yield problem(
            f"TensorFlow cannot be imported ({outcome.problem})", "pip install nvae-tf anew"
        )
    else:
        yield ok(f"Keras {report['tf_keras']} is used; tf.keras shows {report['tf.keras']}")
    driver_here = driver_loads()
    gpus, cuda = report.get("gpus", []), report.get("cuda")
    if report:
        yield from _guarded(lambda: system.check_gpus(gpus, bool(cuda), driver_here))
    if cuda and driver_here:
        yield from _guarded(lambda: system.check_driver(cuda))
    if cuda:
        yield from _guarded(lambda: check_libraries(cuda, report["cudnn"], driver_here))
    if report:
        yield from _guarded(_check_xla)
    if len(gpus) > 1:
        yield from _guarded(_check_exchange)
    yield from _guarded(system.check_memory)
    yield from _guarded(system.check_limits)
    if "TF_CONFIG" in os.environ:
        yield from _guarded(lambda: check_workers(os.environ["TF_CONFIG"]))
    if config and report:
        yield ok(
            "the recipe's model is made next, to see what memory it takes: minutes for deep ones"
        )
        yield from _guarded(lambda: _check_recipe(config, gpus))


def _guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check finds, or that it failed."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - the other checks still say something
        text = f"a check failed itself ({type(error).__name__}: {short_message(error)})"
        return [problem(text, "the other lines are right nevertheless; please report this one")]


def _check_xla() -> list[Finding]:
    reason = xla_problem()
    if reason is None:
        return [ok("XLA compiles and runs")]
    return [problem(f"XLA does not work here ({reason})", "train with --jit_compile off")]


def _check_exchange() -> list[Finding]:
    outcome = run_module(REPORT, ["exchange"], seconds=EXCHANGE_SECONDS)
    if outcome.problem is None:
        return [ok("NCCL adds up over all GPUs")]
    return [
        problem(
            f"GPUs cannot exchange values ({outcome.problem})",
            "NCCL_DEBUG=INFO says more; NCCL_P2P_DISABLE=1 avoids direct transfers",
        )
    ]


def _check_recipe(config: Config, gpus: list) -> list[Finding]:
    """Whether a recipe fits; for GPUs by the least memory and the least capability."""
    if gpus:
        free = [memory.free for memory in system.gpu_memory()]
        if not free:
            return [
                warning(
                    "the GPUs' memory is unknown: the recipe was not compared with it",
                    "make nvidia-smi work, which says how much there is",
                )
            ]
        least = min((capability for _, capability in gpus if capability), default=None)
        return memory_needs.check_fit(config, min(free), "the GPU with the least", least)
    available = system.available_memory()
    if available is None:
        return [
            warning(
                "the machine's memory is unknown: the recipe was not compared with it",
                "compare what free -g says with the tables in docs/performance.md",
            )
        ]
    return memory_needs.check_fit(config, available, "the machine")

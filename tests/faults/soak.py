#!/usr/bin/env python3
"""Trains, kills, resumes, evaluates, samples and exports in a loop, and watches what grows.

    python tests/faults/soak.py --minutes 60 --output soak

Training runs in separate processes, which are killed (`kill -9`) within two and a half minutes and
started again; every other command runs in this one process, time after time. Resident memory, open
files and threads of both are read from /proc. Prints a table last, and exits with status 1 if a command
failed or something grew.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "train_keras.py"
# Seconds of a training process that are not judged: building, tracing, first pictures.
WARM_UP = 75.0
EVERY = 2.0  # seconds between readings
COMMANDS = {
    "evaluate": ["--num_iw_samples", "2", "--iw_chunk", "2"],
    "sample": ["--temp", "0.8", "--format", "npz"],
    "export": [],
}
MAX_GROWTH = {"memory_mib": 0.05, "files": 0.0, "threads": 0.0}  # from the first third to the last


def reading(pid) -> dict[str, float]:
    """Resident memory in MiB, open files and threads of a process."""
    proc = Path("/proc") / str(pid)
    pages = int((proc / "statm").read_text().split()[1])
    return {
        "memory_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "files": len(os.listdir(proc / "fd")),
        "threads": len(os.listdir(proc / "task")),
    }


def train(root: Path, name: str, config: str, seconds: float) -> tuple[list[dict], int]:
    """Trains until the end, or kills the process after so many seconds; readings and exit status."""
    arguments = ["--config", config, "--root", root, "--save", name, "--cont_training"]
    with (root / "train.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, TRAIN, *map(str, arguments)], stdout=log, stderr=subprocess.STDOUT
        )
        begin, readings = time.monotonic(), []
        while process.poll() is None and time.monotonic() - begin < seconds:
            time.sleep(EVERY)
            if time.monotonic() - begin >= WARM_UP:
                with contextlib.suppress(OSError):  # it may have just ended
                    readings.append(reading(process.pid))
        if process.poll() is None:
            process.kill()
        return [entry for entry in readings if entry["memory_mib"]], process.wait()


def thirds(readings: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Medians of the first and the last third, and the growth, of every quantity."""
    table = {}
    for key in MAX_GROWTH:
        values = [entry[key] for entry in readings]
        third = max(1, len(values) // 3)
        first, last = statistics.median(values[:third]), statistics.median(values[-third:])
        table[key] = (first, last, last / first - 1.0)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--output", type=Path, default=Path("soak"))
    parser.add_argument("--config", default="digits")
    arguments = parser.parse_args()
    from nvae_tf.cli import evaluate

    root = arguments.output.resolve()
    root.mkdir(parents=True, exist_ok=True)
    until, moments = time.monotonic() + 60.0 * arguments.minutes, random.Random(0)
    counts = dict.fromkeys(["killed", "finished", "failed", *COMMANDS], 0)
    evaluating, training, run = [], [], 0
    with (root / "soak.jsonl").open("a") as log:
        while time.monotonic() < until:
            name = f"run-{run}"
            readings, status = train(root, name, arguments.config, moments.uniform(30.0, 150.0))
            counts["killed" if status < 0 else "failed" if status else "finished"] += 1
            if len(readings) >= 6:
                training.append(thirds(readings))
            if list((root / name / "checkpoints").glob("step-*")):
                for mode, flags in COMMANDS.items():
                    output = root / "export" if mode == "export" else root / name
                    common = ["--checkpoint", root / name, "--eval_mode", mode, "--output", output]
                    ended = evaluate.main([str(word) for word in [*common, *flags]])
                    counts[mode if ended == 0 else "failed"] += 1
                shutil.rmtree(root / "export", ignore_errors=True)
                gc.collect()
                evaluating.append(reading("self"))
            if status == 0:
                shutil.rmtree(root / name)
                run += 1
            log.write(
                json.dumps({"status": status, "evaluate": evaluating[-1:], "train": training[-1:]})
                + "\n"
            )
            log.flush()
            minutes = (until - time.monotonic()) / 60.0
            print(f"{counts}; {minutes:.0f} minutes left", flush=True)

    print("\ncounts:", json.dumps(counts))
    print("| | first third | last third | growth |\n| --- | --- | --- | --- |")
    grew = []
    # This process warms up, too: every command, every shape.
    warm = thirds(evaluating[len(evaluating) // 3 :])
    for key, limit in MAX_GROWTH.items():
        worst = max(training, key=lambda table, key=key: table[key][2])
        rows = {"this process": warm, f"training, the worst of {len(training)} processes": worst}
        for name, table in rows.items():
            first, last, more = table[key]
            print(f"| {name}: {key} | {first:.0f} | {last:.0f} | {100 * more:+.1f} % |")
            grew += [f"{key} of {name}"] if more > limit else []
    print(f"log: {root / 'soak.jsonl'}")
    if grew or counts["failed"]:
        print(f"error: {counts['failed']} failures; grew: {', '.join(grew) or 'nothing'}")
    return int(bool(grew or counts["failed"]))


if __name__ == "__main__":
    sys.exit(main())

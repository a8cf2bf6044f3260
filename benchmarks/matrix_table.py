#!/usr/bin/env python3
"""Tables of what `gpu_matrix.sh` has measured: speed, memory, ratios, and where the time goes."""

import json
import sys
from pathlib import Path

KEYS = ("recipe", "precision", "checkpointing", "batch")


def read(folder: Path) -> dict[tuple, dict[str, dict | str]]:
    """By recipe, precision, checkpointing and batch: the result of each kind of run, or its error."""
    results: dict[tuple, dict] = {}
    for path in sorted(folder.glob("*-*-*-*.*")):
        name, kind, ending = (*path.name.rsplit(".", 2), "", "")[:3]
        if ending not in ("json", "failed") or kind == "export":
            continue
        recipe, precision, remat, batch = name.rsplit("-", 3)
        text = path.read_text(encoding="utf-8", errors="replace")
        result = json.loads(text) if ending == "json" else text.strip()
        results.setdefault((recipe, precision, remat, int(batch)), {})[kind] = result
    return results


def best(runs: dict, kind: str) -> tuple[str, dict] | None:
    """The fastest of the runs of a kind, and its name; None if all failed."""
    results = [
        (name, result)
        for name, result in runs.items()
        if name.startswith(kind) and isinstance(result, dict)
    ]
    return max(results, key=lambda pair: pair[1]["images_per_second"]) if results else None


def cell(runs: dict, kind: str) -> list[str]:
    """Images per second and GiB, or what the run failed with."""
    fastest = best(runs, kind)
    if fastest:
        return [f"{fastest[1]['images_per_second']:.1f}", f"{fastest[1]['peak_memory_gib']:.2f}"]
    errors = [result for name, result in runs.items() if name.startswith(kind)]
    return [f"failed: {errors[0][:60]}" if errors else "-", ""]


def variant(result: dict) -> str:
    """How PyTorch ran."""
    names = [name for name in ("channels_last", "compile", "cuda_graphs") if result[name]]
    return " + ".join(names) or "eager"


def row(key: tuple, runs: dict) -> list[str]:
    """A row of the first table."""
    ours, theirs = best(runs, "jax"), best(runs, "torch")
    seconds, ratios, how = "", ["", ""], ""
    if ours:
        seconds = f"{ours[1]['compile_seconds']:.0f}"
    if theirs:
        how = variant(theirs[1])
    if ours and theirs:
        ratios = [
            f"{ours[1][name] / theirs[1][name]:.2f}"
            for name in ("images_per_second", "peak_memory_gib")
        ]
    cells = [*map(str, key), *cell(runs, "jax"), seconds, *cell(runs, "torch"), how, *ratios]
    for jit in ("on", "parts", "off"):
        result = runs.get(f"tensorflow-{jit}")
        cells.append(f"{result['images_per_second']:.1f}" if isinstance(result, dict) else "")
    return cells


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, without columns that are empty."""
    columns = [number for number in range(len(head)) if any(r[number] for r in rows)]
    for line in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(line[number] for number in columns) + " |")


def main() -> int:
    """Prints the tables."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path()
    results = read(folder)
    if not results:
        print(
            f"error: nothing was measured in {folder}; gpu_matrix.sh run does it", file=sys.stderr
        )
        return 1
    device = folder / "device.txt"
    print(f"Device: {device.read_text().strip() if device.exists() else 'unknown'}\n")
    head = [
        *KEYS, "images/s", "GiB", "compiling, s", "PyTorch: images/s", "GiB", "how",
        "speed, ratio", "memory, ratio", "TensorFlow, XLA on", "XLA for parts", "XLA off",
    ]  # fmt: skip
    print_table(head, [row(key, runs) for key, runs in results.items()])
    print("\nLargest batch that fitted:\n")
    largest: dict[tuple, dict[str, int]] = {}
    for (*kind, batch), runs in results.items():
        for name in ("jax", "torch"):
            fitted = largest.setdefault(tuple(kind), {})
            if best(runs, name):
                fitted[name] = max(batch, fitted.get(name, 0))
    rows = [
        [*kind, *(str(fitted.get(n, "-")) for n in ("jax", "torch"))]
        for kind, fitted in largest.items()
    ]
    print_table([*KEYS[:-1], "this project", "PyTorch"], rows)
    parts = {
        key: runs["jax"]["seconds_by_category"]
        for key, runs in results.items()
        if isinstance(runs.get("jax"), dict) and runs["jax"]["seconds_by_category"]
    }
    if parts:
        print("\nMilliseconds of a step:\n")
        names = list(next(iter(parts.values())))
        rows = [
            [*map(str, key), *(f"{1000 * p[n]:.1f}" for n in names)] for key, p in parts.items()
        ]
        print_table([*KEYS, *names], rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Writes the tables of docs/compression.md, from runs of the recipes digits and photos.

python docs/make_compression_tables.py runs/digits runs/photos

It needs the packages imagecodecs and zstandard.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from markdown_tables import markdown, write_tables

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "compression.md"
SIZES = ["format", "each alone", "in one archive", "as one picture"]
BITS = [
    "images", "payload, bits", "coded NELBO, bits", "ratio", "the model's own NELBO, bits",
    "payload to that", "initial bits", "header, checksums, final state",
]  # fmt: skip


class Case(NamedTuple):
    """A set of images that the page shows.

    Attributes:
        run: The recipe of the run.
        images: What the images are, in the table of bits.
        single: What one of them is.
        flags: Flags of benchmarks/compression.py.
        show_single: Whether the table of bits has a row for images alone.
    """

    run: str
    images: str
    single: str
    flags: tuple[str, ...]
    show_single: bool


CASES = (
    Case("digits", "359 digits", "digit", ("--count", "359"), True),
    Case("photos", "386 photos", "crop of `photos`", ("--count", "386", "--alone", "5"), True),
    Case(
        "photos",
        "500 crops at random places of the test photographs (`--crops 500`), a folder of PNGs",
        "crop",
        ("--crops", "500", "--alone", "5"),
        False,
    ),
)


def measured(run: str, case: Case) -> dict:
    """What benchmarks/compression.py reports.

    Args:
        run: Path of the run's folder.
        case: The images, and how many of them.
    """
    program = DOCS.parent / "benchmarks" / "compression.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, program, run, Path(folder) / "files", *case.flags]
        print(f"{case.images}: {' '.join(map(str, command[1:]))}", flush=True)
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def sizes_table(report: dict) -> list[str]:
    """Bytes in each format, for all images of a case together.

    Args:
        report: What `measured` returns.
    """
    chain, each = report["chain"], report["alone"]["bytes"]
    rounded = float(f"{each * chain['images']:.4g}")
    together = f"about {rounded:,.0f} ({each:,.0f} for each of {report['images_alone']})"
    rows = [["**nvae-compress**", together, f"**{chain['bytes']:,}**, one chain", ""]]
    for name, sizes in report["other_formats"].items():
        ways = ("alone", "archive", "one picture")
        rows.append([name, *(f"{sizes[way]:,}" if way in sizes else "" for way in ways)])
    return markdown([SIZES, *rows])


def bits_table(reports: list[dict]) -> list[str]:
    """Bits of the payload beside the bounds, for every case, and for images alone.

    Args:
        reports: What `measured` returns, for each of `CASES`.
    """
    rows = [
        _bits(f"{case.images}, one chain", report["chain"], report["own_nelbo_bits"])
        for case, report in zip(CASES, reports, strict=True)
    ]
    for case, report in zip(CASES, reports, strict=True):
        if case.show_single:
            name = f"one {case.single} alone, mean of {report['images_alone']}"
            rows.append(_bits(name, report["alone"], report["own_nelbo_bits_alone"]))
    return markdown([BITS, *rows])


def _bits(name: str, report: dict, own_nelbo: float) -> list[str]:
    payload, coded = report["payload_bits"], report["nelbo_bits"]
    return [
        name, f"{payload:,.0f}", f"{coded:,.0f}", f"{payload / coded:.4f}", f"{own_nelbo:,.0f}",
        f"{payload / own_nelbo:.4f}", f"{report['initial_bits']:,.0f}",
        f"{report['overhead_bits']:,.0f}",
    ]  # fmt: skip


def main():
    """Measures the runs that the command line names, and writes the tables into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for recipe in ("digits", "photos"):
        parser.add_argument(recipe, help=f"the folder of a run of the recipe {recipe}")
    runs = vars(parser.parse_args())
    reports = [measured(runs[case.run], case) for case in CASES]
    seconds = [report["seconds_per_image"] for report in reports]
    write_tables(PAGE, [*map(sizes_table, reports), bits_table(reports)])
    print(f"seconds per image, encoded and decoded: {seconds}")


if __name__ == "__main__":
    main()

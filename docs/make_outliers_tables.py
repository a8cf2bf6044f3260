"""Writes the tables of docs/outliers.md and its picture, from runs of the recipes digits and photos.

python docs/make_outliers_tables.py runs/digits runs/photos
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from markdown_tables import write_tables

DOCS = Path(__file__).resolve().parent
PAGE, PICTURE = DOCS / "outliers.md", DOCS / "pictures" / "outliers.png"
COUNT = 60  # images of each kind
SHOWN = "letters"  # the kind of outliers in the picture


def areas(run: str, folder: Path) -> list[str]:
    """The table that examples/outliers.py prints, its lines.

    Args:
        run: Path of the run's folder.
        folder: Where it writes images and results.
    """
    program = DOCS.parent / "examples" / "outliers.py"
    command = [sys.executable, program, run, folder, "--count", str(COUNT)]
    print(" ".join(map(str, command[1:])), flush=True)
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [line for line in output.splitlines() if line.startswith("|")]


def main():
    """Scores outliers with the runs that the command line names, and writes tables and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for recipe in ("digits", "photos"):
        parser.add_argument(recipe, help=f"the folder of a run of the recipe {recipe}")
    runs = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        tables = [areas(run, Path(folder) / recipe) for recipe, run in runs.items()]
        shutil.copyfile(Path(folder) / "digits" / "results" / SHOWN / "ood.png", PICTURE)
    write_tables(PAGE, tables)


if __name__ == "__main__":
    main()

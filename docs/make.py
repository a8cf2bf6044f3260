#!/usr/bin/env python3
"""Makes the pictures and tables of the documents, from models that it trains itself.

python docs/make.py            makes what is out of date: trains digits (about 5 minutes on two CPU
                               cores) and photos (about 30) if they are not in runs/, and draws
python docs/make.py --check    says what is out of date, and exits with 1 if anything is
python docs/make.py latents    makes one product, out of date or not

A product is out of date if one of the files that it follows from has changed since it was made, or if
what it writes is missing. docs/made.json says when, how and where each was made, and the captions in
the documents say it, too.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from nvae_tf.io.files import write_text
from nvae_tf.version import __version__

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RECORDS = DOCS / "made.json"
RUNS = ("digits", "photos")


class Product(NamedTuple):
    """What one command makes.

    Attributes:
        command: The command, below the root of the checkout.
        sources: Files that it follows from, by patterns below the root, apart from its own script.
        writes: Files that it writes, below the root.
        runs: The trained models that it needs, names of recipes.
    """

    command: str
    sources: tuple[str, ...]
    writes: tuple[str, ...]
    runs: tuple[str, ...] = ()


MODEL = (
    "nvae_tf/model.py",
    "nvae_tf/layers/*.py",
    "nvae_tf/distributions.py",
    "nvae_tf/objective.py",
)
PRODUCTS = {
    "configuration": Product(
        "python docs/make_configuration.py", ("nvae_tf/config.py",), ("docs/configuration.md",)
    ),
    "latents": Product(
        "python docs/make_latents_table.py runs/digits", MODEL, ("docs/latents.md",), ("digits",)
    ),
    "picture": Product(
        "python docs/make_picture.py runs/digits",
        (*MODEL, "nvae_tf/io/labelled_grid.py"),
        ("docs/pictures/digits.png",),
        ("digits",),
    ),
    "compression": Product(
        "python docs/make_compression_picture.py runs/digits runs/photos docs/pictures/compression.png",
        (*MODEL, "nvae_tf/compression/*.py"),
        ("docs/pictures/compression.png",),
        ("digits", "photos"),
    ),
}
CAPTION = re.compile(r"(<!-- made by docs/make.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def digest(product: Product) -> str:
    """A digest of the files that a product follows from."""
    script = product.command.split()[1]
    recipes = [f"configs/{run}.yaml" for run in product.runs]
    content = hashlib.sha256()
    for pattern in (script, *recipes, *product.sources):
        for path in sorted(ROOT.glob(pattern)):
            content.update(path.read_bytes())
    return content.hexdigest()[:16]


def reason(name: str, records: dict) -> str | None:
    """Why a product is out of date; None if it is not."""
    product, record = PRODUCTS[name], records.get(name)
    missing = [path for path in product.writes if not (ROOT / path).exists()]
    if missing:
        return f"{missing[0]} is missing"
    if record is None:
        return "it was never recorded"
    return None if record["sources"] == digest(product) else "what it follows from has changed"


def call(command: str) -> float:
    """Runs a command in the root of the checkout; returns its seconds."""
    print(f"$ {command}", flush=True)
    words = command.split()
    start = time.monotonic()
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)
    return time.monotonic() - start


def make(name: str, records: dict) -> None:
    """Makes a product, and records it."""
    product = PRODUCTS[name]
    for run in product.runs:
        if not (ROOT / "runs" / run / "checkpoints").is_dir():
            call(f"python train_keras.py --config {run}")
    seconds = call(product.command)
    records[name] = {
        "command": product.command,
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "version": __version__,
        "sources": digest(product),
    }
    write_text(RECORDS, json.dumps(records, indent=1, sort_keys=True) + "\n")


def write_captions(records: dict) -> None:
    """Writes command, time and machine below the pictures and tables of the documents."""

    def caption(match):
        record = records.get(match[2])
        if record is None:
            return match[0]
        made = f"`{record['command']}`, {record['seconds']} s on {record['machine']}"
        return f"{match[1]}*{made}; version {record['version']}, {record['date']}*\n{match[3]}"

    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        written = CAPTION.sub(caption, text)
        if written != text:
            write_text(page, written)


def main() -> int:
    """Makes, or says, what is out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("products", nargs="*", metavar="PRODUCT", help=", ".join(PRODUCTS))
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.products if name not in PRODUCTS]
    if unknown:
        parser.error(f"no product {unknown[0]}; there are {', '.join(PRODUCTS)}")
    records = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}
    reasons = {name: reason(name, records) for name in PRODUCTS}
    outdated = [name for name in PRODUCTS if reasons[name]]
    if arguments.check:
        for name in outdated:
            print(f"{name}: {reasons[name]}; python docs/make.py {name}")
        print(f"{len(PRODUCTS) - len(outdated)} of {len(PRODUCTS)} products are up to date")
        return 1 if outdated else 0
    for name in arguments.products or outdated:
        make(name, records)
    write_captions(records)
    print(f"made: {', '.join(arguments.products or outdated) or 'nothing; all is up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

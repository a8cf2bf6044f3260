#!/usr/bin/env python3
"""Makes the pictures and tables of the documents, from models that it trains itself.

python docs/make.py            makes what is out of date, and trains what that needs in runs/docs/NAME
                               (docs/made.json says how long that took)
python docs/make.py --check    says what is out of date, and exits with 1 if anything is
python docs/make.py latents    makes one product, out of date or not

A product is out of date if one of the files that it follows from has changed since it was made, if the
run behind it was trained with other files or another recipe, or if what it writes is missing. Comments
and docstrings do not count. A run that was stopped is continued; one that is out of date is trained
anew, and its folder in runs/docs is replaced. One that somebody trained there by hand is taken if its
configuration is the recipe's.

docs/made.json says when, how and where each was made and from which run, and so do the captions.
"""

import argparse
import ast
import datetime
import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import time
import tokenize
from pathlib import Path
from typing import NamedTuple

import yaml

from nvae_tf import config as configuration
from nvae_tf.evaluation.logs import read_logs
from nvae_tf.io.files import make_folder, read_json, write_text
from nvae_tf.io.machine import machine_name
from nvae_tf.io.text import duration
from nvae_tf.run_folder import RunFolder
from nvae_tf.version import __version__

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RECORDS = DOCS / "made.json"
RUNS_FOLDER = "runs/docs"
RUN_RECORD = "made.json"  # in a run's folder: from which sources its training began

# What the weights follow from, besides the recipe. What only reports, saves or exchanges is not here.
MODEL = (
    "nvae_tf/architectures.py",
    "nvae_tf/model.py",
    "nvae_tf/layers/*.py",
    "nvae_tf/distributions.py",
    "nvae_tf/engine/batch_statistics.py",
    "nvae_tf/engine/kernels.py",
    "nvae_tf/engine/weights.py",
    "nvae_tf/stateless_random.py",
)
TRAINING = (
    *MODEL,
    "nvae_tf/objective.py",
    "nvae_tf/data/arrays.py",
    "nvae_tf/data/photographs.py",
    "nvae_tf/data/pipeline.py",
    "nvae_tf/training/optimizers.py",
    "nvae_tf/training/batches.py",
    "nvae_tf/training/schedules.py",
    "nvae_tf/training/steps.py",
    "nvae_tf/training/trainer.py",
)
# The trained models, and the flags of their training besides the recipe.
RUNS: dict[str, str] = {"digits": "", "photos": ""}


class Product(NamedTuple):
    """What one command makes.

    Attributes:
        command: The command, below the root of the checkout.
        sources: Files that it follows from, by patterns below the root, apart from its own script.
        writes: Files that it writes, below the root.
        runs: The trained models that it needs, names in `RUNS`.
        programs: Programs of which one must be there; without them it is left as it is.
        packages: Python packages that it needs besides the project's; without them it is left as it is.
    """

    command: str
    sources: tuple[str, ...]
    writes: tuple[str, ...]
    runs: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


LATENTS = (*MODEL, "nvae_tf/evaluation/latents.py")
PICTURE = (
    *LATENTS,
    "nvae_tf/evaluation/sampling.py",
    "nvae_tf/io/labelled_grid.py",
    "nvae_tf/io/image_grid.py",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PRODUCTS = {
    "configuration": Product(
        "python docs/make_configuration.py",
        ("nvae_tf/config.py", "nvae_tf/config_keys.py"),
        ("docs/configuration.md",),
    ),
    "latents": Product(
        "python docs/make_latents_table.py runs/docs/digits",
        LATENTS,
        ("docs/latents.md",),
        ("digits",),
    ),
    "picture": Product(
        "python docs/make_picture.py runs/docs/digits docs/pictures/digits.png",
        PICTURE,
        ("docs/pictures/digits.png",),
        ("digits",),
    ),
    "photographs": Product(
        "python docs/make_picture.py runs/docs/photos docs/pictures/photos.png",
        PICTURE,
        ("docs/pictures/photos.png",),
        ("photos",),
    ),
    "compression": Product(
        "python docs/make_compression_picture.py runs/docs/digits runs/docs/photos "
        "docs/pictures/compression.png",
        (
            *MODEL,
            "nvae_tf/compression/cdfs.py",
            "nvae_tf/compression/network.py",
            "nvae_tf/io/labelled_grid.py",
            "nvae_tf/io/image_grid.py",
        ),
        ("docs/pictures/compression.png",),
        ("digits", "photos"),
    ),
    "compression_tables": Product(
        "python docs/make_compression_tables.py runs/docs/digits runs/docs/photos",
        (
            *MODEL,
            "benchmarks/compression.py",
            "nvae_tf/compression/*.py",
            "nvae_tf/data/photographs.py",
        ),
        ("docs/compression.md",),
        ("digits", "photos"),
        packages=("imagecodecs", "zstandard"),
    ),
    "outliers_tables": Product(
        "python docs/make_outliers_tables.py runs/docs/digits runs/docs/photos",
        (
            *MODEL,
            "examples/outliers.py",
            "nvae_tf/evaluation/ood*.py",
            "nvae_tf/evaluation/typicality.py",
            "nvae_tf/evaluation/likelihood.py",
        ),
        ("docs/outliers.md", "docs/pictures/outliers.png"),
        ("digits", "photos"),
    ),
    "screenshots": Product(
        "python docs/make_screenshots.py runs/docs/digits docs/pictures",
        (*PICTURE, "nvae_tf/evaluation/gallery/*"),
        tuple(
            f"docs/pictures/gallery_{width}_{scheme}.png"
            for width in (400, 1300)
            for scheme in ("light", "dark")
        ),
        ("digits",),
        BROWSERS,
    ),
}
CAPTION = re.compile(r"(<!-- made by docs/make.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def digest(*patterns: str) -> str:
    """A digest of files, without what does not change what they do.

    Args:
        patterns: Patterns below the root of the checkout.
    """
    content = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                content.update(essence(path))
    return content.hexdigest()[:16]


def essence(path: Path) -> bytes:
    """What a file says: Python without comments, docstrings and spaces; YAML without comments.

    Args:
        path: Path of the file.
    """
    if path.suffix == ".yaml":
        return json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), sort_keys=True).encode()
    if path.suffix != ".py":
        return path.read_bytes()
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            for row in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
                lines[row] = ""
    return "".join("".join(lines).split()).encode()


def run_digest(name: str) -> str:
    """A digest of what a run's weights follow from: recipe, flags and sources."""
    sources = digest(f"configs/{name}.yaml", *TRAINING)
    return hashlib.sha256(f"{sources} {RUNS[name]}".encode()).hexdigest()[:16]


def product_digest(product: Product) -> str:
    """A digest of the files that a product follows from, apart from its runs."""
    return digest(product.command.split()[1], *product.sources)


def reason(name: str, records: dict) -> str | None:
    """Why a product is out of date; None if it is not.

    Args:
        name: Name of the product.
        records: What docs/made.json says.
    """
    product, record = PRODUCTS[name], records.get("products", {}).get(name)
    missing = [path for path in product.writes if not (ROOT / path).exists()]
    if missing:
        return f"{missing[0]} is missing"
    if record is None:
        return "it was never recorded"
    if record["command"] != product.command:
        return f"it was made with `{record['command']}`"
    if record["sources"] != product_digest(product):
        return "what it follows from has changed"
    outdated = (_run_reason(run, record["runs"].get(run), records) for run in product.runs)
    return next(filter(None, outdated), None)


def missing_tools(product: Product) -> str | None:
    """Which programs or packages a product lacks on this machine; None if it can be made.

    Args:
        product: The product.
    """
    if product.programs and not any(map(shutil.which, product.programs)):
        return f"there is none of {', '.join(product.programs)}"
    packages = [name for name in product.packages if importlib.util.find_spec(name) is None]
    return (
        f"there is no {', '.join(packages)}: pip install {' '.join(packages)}" if packages else None
    )


def _run_reason(run: str, there: dict | None, records: dict) -> str | None:
    """Why the run behind a product is out of date; None if it is not."""
    if there is None or there["sources"] != run_digest(run):
        return f"what the training of {run} follows from has changed"
    return None if there == _identity(records["runs"][run]) else f"{run} was trained anew"


def call(command: str) -> float:
    """Runs a command in the root of the checkout; returns its seconds."""
    print(f"$ {command}", flush=True)
    words = command.split()
    start = time.monotonic()
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)
    return time.monotonic() - start


def train(name: str, records: dict) -> None:
    """Trains a run to its end, unless it is there and up to date, and records it.

    Args:
        name: Name of the run.
        records: What docs/made.json says; it is changed.
    """
    folder, sources = RunFolder(ROOT / RUNS_FOLDER / name), run_digest(name)
    done = records["runs"].get(name)
    newest = folder.list_checkpoints()[:1]
    step = int(newest[0].name.removeprefix("step-")) if newest else None
    if done and _began_with(folder) == done["sources"] == sources and step == done["step"]:
        return
    begun = folder.config_file.exists()
    if begun and _began_with(folder, name) != sources:
        print(f"{folder.path}: other sources or another recipe; it is trained anew")
        shutil.rmtree(folder.path)
        begun = False
    command = (
        f"python train_keras.py --config {name} --root {RUNS_FOLDER} --save {name} {RUNS[name]}"
    )
    command = command.strip()
    make_folder(folder.path)
    write_text(folder.path / RUN_RECORD, json.dumps({"sources": sources}) + "\n")
    call(f"{command} --cont_training" if begun else command)
    logs = read_logs(folder.logs)
    records["runs"][name] = {
        "command": command,
        "date": datetime.date.fromtimestamp(logs.ended or time.time()).isoformat(),
        "seconds": round(logs.seconds),
        "machine": machine_name(),
        "version": __version__,
        "step": int(folder.list_checkpoints()[0].name.removeprefix("step-")),
        "sources": sources,
    }
    save(records)


def _began_with(folder: RunFolder, name: str | None = None) -> str | None:
    """The digest with which a run began; of one that was begun by hand, that of its recipe now.

    Args:
        folder: The run's folder.
        name: Name of the run, to look at its configuration if there is no record; default: not to.
    """
    record = folder.path / RUN_RECORD
    if record.exists():
        return read_json(record)["sources"]
    if name is None:
        return None
    flags = iter(RUNS[name].replace("--", "").split())
    overrides = {key: yaml.safe_load(value) for key, value in zip(flags, flags, strict=True)}
    wanted = configuration.load(name).to_dict() | overrides
    there = configuration.load(str(folder.config_file)).to_dict()
    return run_digest(name) if there == wanted else None


def _identity(run: dict) -> dict:
    """What tells one training from another."""
    return {key: run[key] for key in ("step", "sources", "date")}


def make(name: str, records: dict) -> None:
    """Makes a product, and records it.

    Args:
        name: Name of the product.
        records: What docs/made.json says; it is changed.
    """
    product = PRODUCTS[name]
    for run in product.runs:
        train(run, records)
    sources = product_digest(product)
    seconds = call(product.command)
    records["products"][name] = {
        "command": product.command,
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
        "machine": machine_name(),
        "version": __version__,
        "sources": sources,
        "runs": {run: _identity(records["runs"][run]) for run in product.runs},
    }
    save(records)


def save(records: dict) -> None:
    """Writes docs/made.json."""
    write_text(RECORDS, json.dumps(records, indent=1, sort_keys=True) + "\n")


def caption(name: str, records: dict) -> str:
    """How a product was made: command, time, machine, and the training behind it.

    Args:
        name: Name of the product, which has a record.
        records: What docs/made.json says.
    """
    record = records["products"][name]
    text = f"`{record['command']}`, {duration(record['seconds'])} on {record['machine']}"
    for run in record["runs"]:
        trained = records["runs"][run]
        where = "" if trained["machine"] == record["machine"] else f" on {trained['machine']}"
        text += (
            f"; before, `{trained['command']}`, {duration(trained['seconds'])} for "
            f"{trained['step']:,} steps{where}"
        )
    return f"*{text}; version {record['version']}, {record['date']}*"


def write_captions(records: dict) -> None:
    """Writes command, time and machine below the pictures and tables of the documents."""

    def written_by(match):
        if match[2] not in records["products"]:
            return match[0]
        return f"{match[1]}{caption(match[2], records)}\n{match[3]}"

    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        written = CAPTION.sub(written_by, text)
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
    there = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}
    records = {"runs": there.get("runs", {}), "products": there.get("products", {})}
    reasons = {name: reason(name, records) for name in PRODUCTS}
    outdated = [name for name in PRODUCTS if reasons[name]]
    if arguments.check:
        for name in outdated:
            print(f"{name}: {reasons[name]}; python docs/make.py {name}")
        print(f"{len(PRODUCTS) - len(outdated)} of {len(PRODUCTS)} products are up to date")
        return 1 if outdated else 0
    made = []
    for name in arguments.products or outdated:
        if lacking := missing_tools(PRODUCTS[name]):
            print(f"{name}: left as it is, for {lacking}")
            continue
        make(name, records)
        made.append(name)
    write_captions(records)
    print(f"made: {', '.join(made) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

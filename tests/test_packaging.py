"""The wheel and the source distribution: complete, and usable away from the checkout."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of both files, built from what git would hand out."""
    source = tmp_path_factory.mktemp("source") / "nvae-tf"
    ignored = shutil.ignore_patterns(
        ".git", "runs", "build", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    output = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(output),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return output


def test_both_hold_recipes_types_and_licence(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "nvae_tf/configs/celeba256.yaml",
        "nvae_tf/py.typed",
        "nvae_tf/evaluation/gallery/page.html",
        "nvae_tf/tuning/search.py",
    } <= names
    assert any(re.search(r"dist-info/(licenses/)?LICENSE$", name) for name in names)
    assert not any(name.startswith(("tests", "benchmarks")) for name in names)
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    assert {"configs/digits.yaml", "nvae_tf/py.typed", "README.md", "LICENSE"} <= names


def test_the_wheel_runs_away_from_the_checkout(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    code = (
        "import nvae_tf.config as c; print(c.RECIPES, c.load('celeba256').model.groups_per_scale)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(target) in done.stdout and "(16, 8, 4, 4, 4)" in done.stdout
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    lines = declared["options.entry_points"]["console_scripts"].split("\n")
    scripts = [line.partition("=")[0].strip() for line in lines if line.strip()]
    assert {"nvae-train", "nvae-gallery", "nvae-decompress"} <= set(scripts)
    for script in scripts:
        command = [sys.executable, str(target / "bin" / script), "--help"]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "usage" in done.stdout.lower(), script

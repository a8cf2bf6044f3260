#!/usr/bin/env python3
"""Photographs a run's gallery in a browser: on a phone and on a desktop, light and dark.

python docs/make_screenshots.py runs/docs/digits docs/pictures
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from nvae_tf.evaluation.gallery.page import build
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import atomic_write, make_folder, write_text
from nvae_tf.io.paths import user_path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {400: 900, 1300: 1000}  # width of the window -> height of the picture
WINDOW = 1400  # a window cannot be as narrow as a phone, but a frame in it can
FRAME = """<!DOCTYPE html><body style="margin:0">
<iframe src="page.html" width="{width}" height="{height}" style="border:0;display:block"></iframe>"""
LOADING = 10_000  # milliseconds that the page has


def photograph(browser: str, folder: Path, width: int, dark: bool, output: Path) -> None:
    """Takes one picture.

    Args:
        browser: Path of Chromium or Chrome.
        folder: Folder that holds ``page.html``; the browser's files are put there.
        width: Width of the page in pixels.
        dark: Whether the reader prefers dark colours.
        output: The picture, a PNG.
    """
    height, shot = SIZES[width], folder / "shot.png"
    write_text(folder / "frame.html", FRAME.format(width=width, height=height))
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--virtual-time-budget={LOADING}",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={WINDOW},{height}",
        f"--screenshot={shot}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        (folder / "frame.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(shot) as picture, atomic_write(output) as temporary:
        picture.crop((0, 0, width, height)).save(temporary, "PNG", optimize=True)
    print(f"written: {output}")


def main() -> None:
    """Makes the page, and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("output", metavar="OUT", type=user_path, help="a folder for the pictures")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(f"there is no browser here: install one of {', '.join(BROWSERS)}")
    make_folder(arguments.output)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = build(arguments.run, command=f"nvae-gallery {arguments.run}")
        write_text(folder / "page.html", page)
        for width in SIZES:
            for scheme in ("light", "dark"):
                output = arguments.output / f"gallery_{width}_{scheme}.png"
                photograph(browser, folder, width, scheme == "dark", output)


if __name__ == "__main__":
    main()

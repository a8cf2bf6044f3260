"""Tells images of other kinds from the test images of a run, by several scores.

    python examples/outliers.py runs/digits kinds

changes the test images, and makes letters and photographs, in the size of the model; writes each kind
as a folder of PNGs into the folder `kinds`; and calls ``evaluate_keras.py --eval_mode ood --against``
for each. It prints the area under the ROC curve of some scores, with its 95 % interval: 1 separates
perfectly, 0.5 not at all, below 0.5 is the wrong way round. docs/outliers.md explains the scores and
shows the result.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from nvae_tf.cli.evaluate import main
from nvae_tf.evaluation import ood_run
from nvae_tf.evaluation.loading import load
from nvae_tf.evaluation.stored_images import ending, to_levels, write_image
from nvae_tf.io.files import make_folder

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", help="the folder of a run, or an official .pt file")
parser.add_argument("out", type=Path, help="folder for the images and the results of each kind")
parser.add_argument("--count", type=int, default=100, help="images of each kind (default: 100)")
parser.add_argument(
    "--fit", type=int, default=200, help="training images for the fit (default: 200)"
)
parser.add_argument("--draws", type=int, default=3, help="draws of z per image (default: 3)")
parser.add_argument("--only", metavar="KIND", help="only the kinds whose names begin so")
options = parser.parse_args()

loaded = load(options.run)
spec = loaded.model.image
test = ood_run.split(loaded, False, ood_run.Settings(max_images=options.count))
rows, columns = spec.scored_part
inner = test.images[:, rows, columns]  # without the padding
height, width, channels = inner.shape[1:]
rng = np.random.default_rng(0)


def letter(index):
    """A white capital on black."""
    image = Image.new("L", (width, height))
    font = ImageFont.load_default(height * (0.6 + 0.1 * (index // 26 % 5)))
    character, centre = chr(ord("A") + index % 26), (width / 2, height / 2)
    ImageDraw.Draw(image).text(centre, character, 255, font, anchor="mm")
    return np.asarray(image)[..., None] / 255.0


def rough_letter(index):
    """A letter made as the digits are: 8x8, enlarged, and for a binary model drawn pixel by pixel."""
    image = Image.fromarray((letter(index)[..., 0] * 255).astype(np.uint8))
    small = image.resize((8, 8), Image.Resampling.BOX)
    grey = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))[..., None] / 255.0
    return rng.random(grey.shape) < grey if spec.binary else grey


def photograph(index):
    """A crop of one of scikit-learn's photographs; for grey and binary models, its brightness."""
    crops = load_sample_images().images[index % 2]
    top, left = rng.integers(0, [crops.shape[0] - height, crops.shape[1] - width])
    crop = crops[top : top + height, left : left + width] / 255.0
    return crop if channels == 3 else crop.mean(-1, keepdims=True)


def as_model_sees(images):
    """Values that the model knows: levels, or for a binary model 0 and 1 from a threshold of 0.5."""
    levels = 1 if spec.binary else 2**loaded.model.num_bits - 1
    return np.broadcast_to(np.rint(np.asarray(images) * levels) / levels, inner.shape)


count, flat = range(len(inner)), inner.reshape(len(inner), -1, channels)
kinds = {
    "empty": np.zeros_like(inner),
    "uniform noise": rng.random(inner.shape),
    "pixels shuffled": rng.permuted(flat, axis=1).reshape(inner.shape),
    "negative": 1.0 - inner,
    "upside down (180 degrees)": inner[:, ::-1, ::-1],
    "letters": [letter(index) for index in count],
    "letters made as the digits are": [rough_letter(index) for index in count],
}
if height == width:
    kinds["turned by 90 degrees"] = np.rot90(inner, axes=(1, 2))
if channels in (1, 3) and loaded.config.data.dataset != "photos":  # which are photographs
    kinds["photographs"] = [photograph(index) for index in count]

lines = []
for kind in [kind for kind in kinds if kind.startswith(options.only or "")]:
    name = kind.partition(" (")[0].replace(" ", "_")
    folder, results = options.out / name, options.out / "results" / name
    make_folder(folder)
    for old in folder.glob(f"[0-9][0-9][0-9][0-9]{ending(spec)}"):  # of a call with more images
        old.unlink()
    for index, image in enumerate(to_levels(as_model_sees(kinds[kind]), spec)):
        write_image(folder / f"{index:04d}{ending(spec)}", image, spec)
    flags = ["--checkpoint", options.run, "--eval_mode", "ood", "--output", str(results)]
    numbers = ["--max_images", options.count, "--fit_images", options.fit]
    numbers += ["--num_iw_samples", options.draws]
    print(f"{kind}:", flush=True)
    if status := main([*flags, *map(str, numbers), "--against", str(folder)]):
        raise SystemExit(status)
    report = json.loads((results / "ood.json").read_text())
    chosen = report["chosen_llr"]["score"], report["chosen"]["score"]
    shown = ["neg_log_p", "complexity", *chosen]
    areas = [report["scores"][score]["auroc"] for score in shown]
    cells = ["{:.3f} ({:.3f} to {:.3f})".format(*area) for area in areas]
    lines.append(f"| {' | '.join([kind, *cells])} |")

print("| against | " + " | ".join(f"`{score}`" for score in shown) + " |")
print("| --- |" + " --- |" * len(shown))
print("\n".join(lines))

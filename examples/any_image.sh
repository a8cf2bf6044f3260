#!/usr/bin/env bash
# Deep grey scans and wide colour pictures, from files to samples, an export and a web page.
#
#   bash examples/any_image.sh OUT [any flag of train_keras.py]
#
# Makes two folders from the photographs that scikit-learn bundles: 120 TIFFs of 16 bits that hold values of 12
# bits, as X-ray detectors write them, and 120 PNGs of 96x64 pixels in colour. Trains on each for ten epochs.
set -euo pipefail
out=$1
shift

python - "$out" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from sklearn.datasets import load_sample_images

out = Path(sys.argv[1])
for folder in ("scans", "wide"):
    (out / folder).mkdir(parents=True, exist_ok=True)
images = load_sample_images().images
greys = [image.astype(np.uint32).sum(-1) * 4095 // 765 for image in images]
random = np.random.RandomState(1)
for number in range(120):
    which, (height, width) = number % 2, images[number % 2].shape[:2]
    top, left = random.randint(height - 64), random.randint(width - 96)
    grey = greys[which][top : top + 32, left : left + 32].astype(np.uint16)
    tifffile.imwrite(out / "scans" / f"{number:03d}.tif", grey)
    colours = images[which][top : top + 64, left : left + 96]
    Image.fromarray(colours).save(out / "wide" / f"{number:03d}.png")
PYTHON

for name in scans wide; do
    python train_keras.py --config digits --dataset images --data "$out/$name" --root "$out/runs" \
        --save "$name" --batch_size 12 --epochs 10 --warmup_epochs 1 --num_mixture_dec 5 "$@"
    run=$out/runs/$name
    python evaluate_keras.py --checkpoint "$run" --eval_mode evaluate
    python evaluate_keras.py --checkpoint "$run" --eval_mode sample --num_samples 4 --format png \
        --output "$out/samples/$name"
    python evaluate_keras.py --checkpoint "$run" --eval_mode export --output "$out/export/$name"
    nvae-gallery "$run"
done

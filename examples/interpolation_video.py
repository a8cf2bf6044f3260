"""Makes a film through samples of a trained model, which ends where it begins.

    python examples/interpolation_video.py runs/digits film.webp

Between two samples the film follows an arc in the noise space of the prior, along which every image is
one that the prior could have drawn. The ending of the film's name chooses the format: .webp or .gif.
"""

import argparse
from pathlib import Path

import numpy as np

from nvae_tf.evaluation.latents import interpolate
from nvae_tf.evaluation.loading import load
from nvae_tf.io.files import write_animation
from nvae_tf.io.labelled_grid import Band, labelled_grid

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", help="the folder of a run, or an official .pt file")
parser.add_argument("film", type=Path, help="the file to write: .webp or .gif")
parser.add_argument("--stations", type=int, default=5, help="samples on the way (default: 5)")
parser.add_argument(
    "--steps", type=int, default=12, help="images from one sample to the next (default: 12)"
)
parser.add_argument("--rows", type=int, default=3, help="N x N films side by side (default: 3)")
parser.add_argument("--temp", type=float, default=0.8, help="temperature (default: 0.8)")
parser.add_argument("--seed", type=int, default=1)
options = parser.parse_args()
if options.film.suffix not in (".webp", ".gif"):
    parser.error(f"{options.film}: expected a name that ends in .webp or .gif")

model = load(options.run).model
count = options.rows**2
stations = [model.draw_noise(count, (options.seed, stream)) for stream in range(options.stations)]
frames = []
for number, (start, end) in enumerate(zip(stations, stations[1:] + stations[:1], strict=True), 1):
    rows = interpolate(model, start, end, options.steps + 1, options.temp)
    frames += [labelled_grid([Band(rows[:, i])], options.rows) for i in range(options.steps)]
    print(f"{number}/{options.stations}")
write_animation(options.film, np.stack(frames))
print(f"written: {options.film}")

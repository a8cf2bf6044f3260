"""``train_keras.py`` whose first pictures take as many seconds as the first argument says."""

import sys
import time

from nvae_tf.cli.train import main
from nvae_tf.training.reports import PictureWriter

seconds, draw = float(sys.argv.pop(1)), PictureWriter.draw


def draw_late(pictures, step):
    PictureWriter.draw = draw
    print(f"busy for {seconds:g} s after step {step}", flush=True)
    time.sleep(seconds)
    draw(pictures, step)


PictureWriter.draw = draw_late
sys.exit(main())

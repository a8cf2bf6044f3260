"""Samples from an export with TensorFlow only: python sample_savedmodel.py EXPORT/1 samples.png"""

import sys

import tensorflow as tf

folder, picture = sys.argv[1:]
sample = tf.saved_model.load(folder).signatures["sample"]
arguments = dict(batch_size=tf.constant(16), temperature=tf.constant(0.7), seed=tf.constant(1))
images = sample(**arguments)["images"]  # (16, height, width, channels), in [0, 1]
images = images[..., :3] if images.shape[-1] > 2 else images[..., :1]  # what a PNG shows
rows = [tf.concat(tf.unstack(images[i : i + 4]), 1) for i in range(0, 16, 4)]
grid = tf.cast(tf.round(tf.concat(rows, 0) * 255.0), tf.uint8)
tf.io.write_file(picture, tf.io.encode_png(grid))
print(f"written: {picture}")

"""Lossless files of images, by bits-back coding with a trained model."""

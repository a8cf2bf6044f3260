"""The version of this package, readable without importing TensorFlow."""

__version__ = "0.2.0.dev0"

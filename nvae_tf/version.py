"""The version of this package, readable without importing TensorFlow."""

__version__ = "0.1.0"

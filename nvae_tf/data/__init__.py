"""Reading and preparing images. This package knows neither model nor training."""

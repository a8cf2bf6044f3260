"""Reading and preparing images. Knows neither model nor training."""

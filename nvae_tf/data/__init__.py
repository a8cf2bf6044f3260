"""Where images come from. This package knows neither model nor training."""

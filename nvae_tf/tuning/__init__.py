"""Search for better values of a recipe's keys, with keras-tuner."""

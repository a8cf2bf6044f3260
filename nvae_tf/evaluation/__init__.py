"""What a trained model is asked for: likelihood and samples. Knows model and data, not training."""

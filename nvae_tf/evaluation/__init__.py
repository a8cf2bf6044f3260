"""What a trained model is asked for. Of training it uses only what reading a checkpoint takes."""

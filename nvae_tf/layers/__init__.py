"""The building blocks of NVAE. They know nothing of the model, of training, files or flags."""

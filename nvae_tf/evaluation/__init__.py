"""Evaluation of trained models: likelihoods, samples, latents, FID, export. Imports no training."""

"""How the model is trained: trainer, optimiser, schedules, checkpoints, reports."""

"""Studies: many runs of the trainer, and what comes out of them together. Nothing of the training imports this."""

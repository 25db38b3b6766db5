"""The training step and the epoch around it."""

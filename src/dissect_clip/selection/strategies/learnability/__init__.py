"""Learnability and JEST: compare the model in training with a reference model."""

"""Models and losses of open_clip."""

"""Settings of a run, the command line that they make, and their validation."""

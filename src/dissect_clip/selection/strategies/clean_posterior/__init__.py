"""Draw by the probability that a pair is clean."""

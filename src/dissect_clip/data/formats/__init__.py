"""Formats that samples are read from."""

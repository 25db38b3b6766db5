"""The command line; one module a command."""

from dissect_clip.cli.train import main

__all__ = ["main"]

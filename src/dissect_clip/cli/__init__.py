"""The command line; one module a command."""

from dissect_clip.cli.main import main

__all__ = ["main"]

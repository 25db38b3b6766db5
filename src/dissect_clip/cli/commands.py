"""Commands beside training, by name: ``dissect-clip NAME FLAGS``. Each is a module with ``main``, imported when run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """Where a command is, and what it does."""

    module: str  # its main(argv) returns the exit status
    summary: str  # a line for --help


COMMANDS: dict[str, Command] = {
    "evaluate": Command("dissect_clip.cli.evaluate", "evaluate a checkpoint on CLIP_benchmark's data sets"),
}


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run a command of COMMANDS on its flags; returns the exit status."""
    status: int = importlib.import_module(COMMANDS[name].module).main(argv)
    return status

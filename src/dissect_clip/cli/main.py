"""The command line: which command is meant, and its exit status.

Imports no torch, and neither do the commands' own modules: help and errors in flags answer at once. What a command
needs to do its work is imported when it begins to do it.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """Where a command is, and what it does."""

    module: str  # its main(argv) returns the exit status
    summary: str  # a line for --help


COMMANDS: dict[str, Command] = {
    "train": Command("dissect_clip.cli.train", "train a model, also without this word: dissect-clip FLAGS"),
    "evaluate": Command("dissect_clip.cli.evaluate", "evaluate a checkpoint on datasets in CLIP_benchmark's layout"),
    "index": Command("dissect_clip.cli.index", "count the samples of shards ahead of training"),
    "score": Command("dissect_clip.cli.score", "score every sample of a dataset with a model, without training"),
    "coreset": Command("dissect_clip.cli.coreset", "choose part of a dataset by a record or by scores"),
    "export": Command("dissect_clip.cli.export", "write part of a dataset as new shards"),
    "clean-report": Command("dissect_clip.cli.clean_report", "summarise the clean.parquet of a run"),
    "reproduce": Command("dissect_clip.cli.reproduce", "run a grid of experiments and make its tables"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the words name, ``train`` if the first of them is a flag; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and not words[0].startswith("-") else "train"
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        print(f"error: {name!r} is no command{hint}: give one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(COMMANDS[name].module).main(words)
    return status

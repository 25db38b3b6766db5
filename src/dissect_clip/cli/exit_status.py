"""The exit statuses of all commands, and how a command's errors become one. Imports no torch."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator

from dissect_clip.errors import SetupError, TrainingError, printable

EXIT_TRAINING = 1
"""The work could not continue, or a part of it failed."""

EXIT_SETUP = 2
"""Flags, data or files are wrong: nothing was trained or written."""

EXIT_REQUEUE = 75
"""A scheduler's signal ended the run, and all is saved: start the same command again (EX_TEMPFAIL)."""

EXIT_INTERRUPT = 130
"""Ctrl-C, as shells have it."""

STATUSES = {
    0: "done",
    EXIT_TRAINING: "the work could not continue, or a part of it failed",
    EXIT_SETUP: "flags, data or files are wrong; nothing was trained or written",
    EXIT_REQUEUE: "stopped by a scheduler's signal, all is saved: start the same command again",
    EXIT_INTERRUPT: "stopped by Ctrl-C",
}
"""What each exit status means."""


def is_first_rank() -> bool:
    """Whether this process is the first of its run, by what torchrun or Slurm put into the environment."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


@contextlib.contextmanager
def only_first_rank_prints() -> Iterator[None]:
    """Within the block, before the processes know each other, only the first of them prints."""
    if is_first_rank():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def run_alone(work: Callable[[], int]) -> int:
    """Do the work of a command that is a single process; its exit status, or that of the error that ended it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return work()
    except SetupError as error:
        status, message = EXIT_SETUP, str(error)
    except (TrainingError, OSError) as error:
        status, message = EXIT_TRAINING, printable(str(error))
    except KeyboardInterrupt:
        status, message = EXIT_INTERRUPT, "interrupted"
    print(f"error: {message}", file=sys.stderr)
    return status

"""What a run shows on the console and writes to its log file: lines, a progress bar, tables.

The console shows this project's lines and all warnings; the log file also holds what other libraries log. On a
terminal a progress bar and tables stand in for the long lines with all values, which are for files and scripts.
Messages quote names and captions of the data, so nothing in them may move a cursor or look like another line.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from dissect_clip.distributed.world import World
from dissect_clip.errors import printable

NOT_ON_TERMINAL = {"terminal": False}
"""``extra`` of a log line with values that the bar or a table shows on a terminal."""

ONLY_ON_TERMINAL = {"terminal": True}
"""``extra`` of what is only for people: neither log files nor scripts get it."""

_FORMAT = "%(asctime)s | %(levelname)s | %(message)s"
_TIME = "%Y-%m-%d,%H:%M:%S"
_HANDLERS = ("dissect_clip.console", "dissect_clip.file")
_STEPS_AVERAGED = 100
_SECONDS_BETWEEN_DRAWS = 0.2
_NARROW, _WIDE = 40, 120


class _Formatter(logging.Formatter):
    """Lines of printable characters; continuation lines of a message are indented, so that none can be forged."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)).replace("\n", "\n    ")


class _Console(logging.Handler):
    """Lines on stderr, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _File(logging.FileHandler):
    """Lines in a file. If one cannot be written, as to a full disk, it is lost; the console reports it once."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            tqdm.write(f"cannot write {self.baseFilename}: {error}; lines are lost there", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of lines that were lost
            super().close()


def _suits(terminal: bool) -> Callable[[logging.LogRecord], bool]:
    """A filter for the lines that are meant for a terminal, or for everything else."""
    return lambda record: record.__dict__.get("terminal", terminal) == terminal


def _is_ours_or_a_warning(record: logging.LogRecord) -> bool:
    # open_clip describes each model it builds on the root logger, and other libraries are as talkative.
    return record.levelno >= logging.WARNING or record.name.startswith("dissect_clip")


def close_logging() -> None:
    """Remove what :func:`setup_logging` added."""
    for handler in [handler for handler in logging.root.handlers if handler.get_name() in _HANDLERS]:
        logging.root.removeHandler(handler)
        handler.close()
    logging.captureWarnings(False)


def _add(handler: logging.Handler, name: str, line_format: str, level: int) -> None:
    handler.set_name(name)
    handler.setFormatter(_Formatter(line_format, datefmt=_TIME))
    handler.setLevel(level)
    logging.root.addHandler(handler)


def setup_logging(path: Path | None, level: int, world: World) -> None:
    """Log to stderr, and to ``path`` if it is given; a second call replaces the first. Not collective.

    Rank 0 shows lines from ``level`` on, other ranks only warnings, with their rank before them. At DEBUG the console
    shows the lines of all libraries. Python's warnings become log lines, which do not tear the progress bar.
    """
    close_logging()
    console = _Console()
    console.addFilter(_suits(terminal=sys.stderr.isatty()))
    if world.is_main and level > logging.DEBUG:
        console.addFilter(_is_ours_or_a_warning)
    prefix = "" if world.is_main else f"[rank {world.rank}] "
    _add(console, _HANDLERS[0], prefix + _FORMAT, level if world.is_main else logging.WARNING)
    if path is not None:
        file = _File(path, encoding="utf-8")
        file.addFilter(_suits(terminal=False))
        _add(file, _HANDLERS[1], _FORMAT, level)
    logging.root.setLevel(level if world.is_main or path is not None else logging.WARNING)
    logging.captureWarnings(True)


def aligned(values: Mapping[str, float], width: int) -> str:
    """A table of names and values, column by column, in as many columns as ``width`` characters hold.

    Floats have 4 decimals; the values of a column are aligned at their right end.
    """
    texts = {name: short(value) for name, value in values.items()}
    left = max((len(name) for name in texts), default=0)
    right = max((len(text) for text in texts.values()), default=0)
    cells = [f"{name:<{left}}  {text:>{right}}" for name, text in texts.items()]
    columns = max(1, (width + 3) // (left + right + 5))
    rows = math.ceil(len(cells) / columns)
    return "\n".join("   ".join(cells[row::rows]) for row in range(rows))


def short(value: float) -> str:
    """A float with 4 decimals, an integer as it is."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def terminal_width() -> int:
    """Characters that a line of a table may have on the terminal, beside its indent of 4."""
    return min(max(shutil.get_terminal_size().columns, _NARROW), _WIDE) - 4


class Progress:
    """One bar over the optimizer steps of a run, on the terminal of rank 0; nothing elsewhere. A context manager.

    Shows the last loss that was logged, the best sum of recalls so far, and the time left of the run, estimated from
    the seconds of the last steps and of the evaluations so far. Saves and a loader's start are in it if they lie
    between two steps of an epoch. It reads the wall clock only, never the device.

    Args:
        epochs: of the run.
        steps: optimizer steps in an epoch.
        evaluated: the epochs, counted from 1, at whose end there is an evaluation.
        best: sum of recalls of earlier evaluations, in [0, 600]; minus infinity without any.
        shown: False for no bar at all; True for one if stderr is a terminal.
        clock: seconds.
    """

    def __init__(
        self,
        epochs: int = 1,
        steps: int = 1,
        evaluated: Collection[int] = (),
        best: float = -math.inf,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._epochs = epochs
        self._steps = steps
        self._evaluated = evaluated
        self._best = best
        self._clock = clock
        self._loss: float | None = None
        self._done = 0
        self._last = clock()  # when the last step ended
        self._drawn = clock()
        self._is_first = True  # whether the next step is the first in its epoch
        self._timed = 0
        self._step_seconds = 0.0
        self._evaluations = 0
        self._evaluation_seconds = 0.0
        self._evaluations_left = len(evaluated)
        self._bar = tqdm(
            total=epochs * steps,
            leave=False,
            delay=1e-9,  # no drawing before the first epoch
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            disable=None if shown else True,  # tqdm takes None for "only on a terminal"
        )

    @contextlib.contextmanager
    def epoch(self, epoch: int, done: int) -> Iterator[Progress]:
        """An epoch, counted from 0, of which ``done`` steps were done before."""
        self._done = epoch * self._steps + done
        self._evaluations_left = sum(after > epoch for after in self._evaluated)
        self._is_first = True
        self._last = self._clock()
        self._draw(f"Epoch {epoch + 1}/{self._epochs}")
        yield self

    def advance(self) -> None:
        """One step is done."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        if self._is_first:  # it waits for the loader to start, and for a compiler: no measure if there is a better one
            self._step_seconds = self._step_seconds if self._timed else seconds
        else:
            self._timed += 1
            self._step_seconds += (seconds - self._step_seconds) / min(self._timed, _STEPS_AVERAGED)
        self._is_first = False
        self._done += 1
        if now - self._drawn >= _SECONDS_BETWEEN_DRAWS:
            self._draw()

    def show(self, loss: float) -> None:
        """Show this loss beside the bar."""
        self._loss = loss

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Time an evaluation."""
        self._draw("Evaluation")
        begin = self._clock()
        yield
        self._evaluations += 1
        self._evaluation_seconds += self._clock() - begin

    def show_recall(self, recall_sum: float) -> None:
        """Show the sum of recalls of an evaluation if it is the best so far."""
        self._best = max(self._best, recall_sum)

    def seconds_left(self) -> float | None:
        """Of the run, estimated; None before the first step."""
        if not self._step_seconds:
            return None
        seconds = (self._epochs * self._steps - self._done) * self._step_seconds
        if self._evaluations:
            seconds += self._evaluations_left * self._evaluation_seconds / self._evaluations
        return seconds

    def _draw(self, title: str | None = None) -> None:
        if self._bar.disable:
            return
        self._drawn = self._clock()
        if title is not None:
            self._bar.set_description_str(title, refresh=False)
        self._bar.n = self._done
        left = self.seconds_left()
        parts = [] if left is None else [f"{tqdm.format_interval(left)} left"]
        parts += [] if self._loss is None else [f"loss {self._loss:#.4g}"]
        parts += [f"best R@Sum {self._best:.1f}"] if self._best >= 0 else []
        self._bar.set_postfix_str(", ".join(parts), refresh=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

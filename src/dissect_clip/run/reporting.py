"""What a run says: log lines, a progress bar, and metrics to JSON lines, TensorBoard and wandb.

The console shows this project's lines and everybody's warnings; the log file holds what other libraries say, too.
Messages quote names and captions of the data, so nothing in them may move a cursor or look like another line.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Protocol

from tqdm import tqdm

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError, TrainingError, printable
from dissect_clip.run.folder import RunFolder, automatic_name

log = logging.getLogger(__name__)

_FORMAT = "%(asctime)s | %(levelname)s | %(message)s"
_TIME = "%Y-%m-%d,%H:%M:%S"
_HANDLERS = ("dissect_clip.console", "dissect_clip.file")


class _Formatter(logging.Formatter):
    """Lines of printable characters; those that continue a message are indented, so that none can be forged."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)).replace("\n", "\n    ")


class _Console(logging.Handler):
    """Lines on stderr that leave a progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _File(logging.FileHandler):
    """Lines in a file. Those that cannot be written, as to a full disk, are lost there; the console says so once."""

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


def _is_for_the_console(record: logging.LogRecord) -> bool:
    # open_clip describes each model it builds on the root logger, and other libraries are as talkative.
    return record.levelno >= logging.WARNING or record.name.startswith("dissect_clip")


def close_logging() -> None:
    """Take away what :func:`setup_logging` added."""
    for handler in [handler for handler in logging.root.handlers if handler.get_name() in _HANDLERS]:
        logging.root.removeHandler(handler)
        handler.close()


def _add(handler: logging.Handler, name: str, line_format: str, level: int) -> None:
    handler.set_name(name)
    handler.setFormatter(_Formatter(line_format, datefmt=_TIME))
    handler.setLevel(level)
    logging.root.addHandler(handler)


def setup_logging(path: Path | None, level: int, world: World) -> None:
    """Log to stderr, and to ``path`` where it is given; a second call replaces the first. Not collective.

    Rank 0 shows lines from ``level`` on, other ranks only warnings, with their rank before them. At DEBUG the console
    shows the lines of all libraries.
    """
    close_logging()
    console = _Console()
    if world.is_main and level > logging.DEBUG:
        console.addFilter(_is_for_the_console)
    prefix = "" if world.is_main else f"[rank {world.rank}] "
    _add(console, _HANDLERS[0], prefix + _FORMAT, level if world.is_main else logging.WARNING)
    if path is not None:
        _add(_File(path, encoding="utf-8"), _HANDLERS[1], _FORMAT, level)
    logging.root.setLevel(level if world.is_main or path is not None else logging.WARNING)


class Progress:
    """A bar over the steps of an epoch on the terminal of rank 0; nothing elsewhere. A context manager.

    ``initial`` steps were done before.
    """

    def __init__(self, world: World, total: int, description: str, initial: int = 0) -> None:
        # tqdm takes None for "only on a terminal".
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=None if world.is_main else True,
        )

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def show(self, **values: float | str) -> None:
        """Show these values beside the bar. Called when something is logged, not in every step."""
        self._bar.set_postfix(values, refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


class Reporter(Protocol):
    """Takes the metrics of a run somewhere. Not collective; metrics are plain numbers."""

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report metrics of training after ``step`` optimizer steps of the run."""

    def evaluation(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Report metrics of an evaluation after ``epoch`` complete epochs and ``step`` optimizer steps."""

    def close(self) -> None:
        """Write out what is waiting."""


def _json_number(value: float) -> float | None:
    """A number that JSON can hold: what is not finite is null."""
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _cut_torn_line(path: Path) -> None:
    """Cut off what stands behind the last line break: a line that was torn when the run died."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def evaluated_epochs(results: Path) -> set[int]:
    """The epochs whose evaluation is in a ``results.jsonl``; lines that cannot be read are passed over."""
    epochs = set()
    for line in results.read_bytes().splitlines() if results.exists() else ():
        try:
            epochs.add(int(json.loads(line)["epoch"]))
        except (ValueError, TypeError, KeyError):
            continue
    return epochs


class JsonLines:
    """One JSON object a line: training to ``train``, evaluations to ``results`` as OpenCLIP writes them.

    The files are opened for each line, which is then out of this process's hands. What an earlier process of the run
    left torn is cut off. A line that cannot be written is a TrainingError; with ``keep_going`` it is lost, and the log
    says so.
    """

    def __init__(self, train: Path, results: Path, keep_going: bool = False) -> None:
        self._train = train
        self._results = results
        self._keep_going = keep_going
        self._lost = 0  # lines in a row
        for path in (train, results):
            _cut_torn_line(path)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append ``{"step": ..., ...}``."""
        self._append(self._train, {"step": step, **metrics})

    def evaluation(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics with their ``epoch``."""
        self._append(self._results, {**metrics, "epoch": epoch})

    def _append(self, path: Path, metrics: Mapping[str, float]) -> None:
        plain = {name: _json_number(value) for name, value in metrics.items()}
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain, allow_nan=False) + "\n")
        except OSError as error:
            if not self._keep_going:
                raise TrainingError(
                    f"cannot write {path}: {error}. Make room for it; --resume latest then goes on from the last "
                    "checkpoint"
                ) from error
            self._lose(path, error)
        else:
            if self._lost:
                log.warning("%s can be written again; %d lines are lost", path, self._lost)
            self._lost = 0

    def _lose(self, path: Path, error: OSError) -> None:
        if self._lost == 0:
            log.error(
                "cannot write %s: %s. Training goes on (--on-save-error continue); lines are lost until it can be "
                "written", path, error,
            )  # fmt: skip
        self._lost += 1
        with contextlib.suppress(OSError):
            _cut_torn_line(path)

    def close(self) -> None:
        """Nothing is waiting."""


def _optional(module: str, package: str) -> ModuleType:
    """Import what only ``--report-to`` needs.

    Raises:
        SetupError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SetupError(f"--report-to {package} needs the package {package}: pip install {package}") from error


class TensorBoard:
    """Scalars for TensorBoard: ``train/...`` over steps, ``val/...`` over epochs, as in OpenCLIP.

    Its writer does not recover from an error. That is a TrainingError; with ``keep_going`` the log says so, and nothing
    more is written.
    """

    def __init__(self, folder: Path, keep_going: bool = False) -> None:
        self._writer = _optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))
        self._folder = folder
        self._keep_going = keep_going
        self._failed = False

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._keep_going:
                raise TrainingError(f"cannot write to {self._folder}: {error}. Make room for it") from error
            if not self._failed:
                log.error(
                    "cannot write to %s: %s. Training goes on (--on-save-error continue), and TensorBoard gets nothing "
                    "more until the run is started again; train.jsonl has the metrics, too", self._folder, error,
                )  # fmt: skip
            self._failed = True

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add scalars at ``step``."""
        with self._writing():
            for name, value in metrics.items():
                self._writer.add_scalar(f"train/{name}", value, step)

    def evaluation(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Add scalars at ``epoch``."""
        with self._writing():
            for name, value in metrics.items():
                self._writer.add_scalar(f"val/{name}", value, epoch)

    def close(self) -> None:
        """Write out the events."""
        with self._writing():
            self._writer.close()


class Wandb:
    """A run of Weights & Biases, with the keys that OpenCLIP logs."""

    def __init__(self, config: Config, name: str) -> None:
        self._run = _optional("wandb", "wandb").init(
            project=config.run.wandb_project_name,
            name=name,
            id=re.sub(r"[/\\#?%:]", "-", name),  # what wandb refuses in an id
            notes=config.run.wandb_notes,
            resume="auto" if config.checkpoint.resume == "latest" else None,
            config=config.flat(),
        )

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log at ``step``, which is a value of its own, too."""
        values = {f"train/{name}": value for name, value in metrics.items()}
        self._run.log({**values, "step": step}, step=step)

    def evaluation(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Log at ``step`` with the ``epoch``."""
        values = {f"val/{name}": value for name, value in metrics.items()}
        self._run.log({**values, "epoch": epoch}, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Reporters:
    """Several reporters as one; of none, it is the null object."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass on to each."""
        for reporter in self.reporters:
            reporter.train(step, metrics)

    def evaluation(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Pass on to each."""
        for reporter in self.reporters:
            reporter.evaluation(epoch, step, metrics)

    def close(self) -> None:
        """Close each."""
        for reporter in self.reporters:
            reporter.close()


def _wanted(config: Config, run: RunFolder | None) -> list[Reporter]:
    asked = set(config.run.report_to.replace(",", " ").split())
    asked |= {"tensorboard", "wandb"} if "all" in asked else set()
    reporters: list[Reporter] = []
    keep_going = config.checkpoint.on_save_error == "continue"
    if run is not None:
        reporters.append(JsonLines(run.train_log, run.results, keep_going))
    if "tensorboard" in asked:
        if run is None:
            raise SetupError("--report-to tensorboard writes to the run folder: leave --logs none out")
        reporters.append(TensorBoard(run.tensorboard, keep_going))
    if "wandb" in asked:
        name = run.name if run is not None else config.run.name or automatic_name(config, datetime.now())
        reporters.append(Wandb(config, name))
    return reporters


def make_reporter(config: Config, run: RunFolder | None, world: World) -> Reporter:
    """All that ``--report-to`` asks for, and JSON lines where there is a run folder; on rank 0 only. Collective.

    Raises:
        SetupError: if a package is missing, or there is no folder for TensorBoard.
    """
    reporters: list[Reporter] = []
    world.on_main(lambda: reporters.extend(_wanted(config, run)))
    return Reporters(*reporters)

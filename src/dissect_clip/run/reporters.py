"""The metrics of a run to JSON lines, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError, TrainingError
from dissect_clip.run.folder import RunFolder, automatic_name

log = logging.getLogger(__name__)


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


def earlier_evaluations(results: Path) -> dict[int, dict[str, Any]]:
    """The evaluations in a ``results.jsonl`` by epoch, the last of each; lines that cannot be read are left out."""
    evaluations = {}
    for line in results.read_bytes().splitlines() if results.exists() else ():
        try:
            metrics = json.loads(line)
            evaluations[int(metrics["epoch"])] = metrics
        except (ValueError, TypeError, KeyError):
            continue
    return evaluations


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

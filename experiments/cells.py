"""Cells of a study: command lines that are run to their end once, each in a process of its own, whatever comes between.

    <runs>/<cell>/          the run folder of src/main.py
    <runs>/<cell>.log       what the process said; held locked for as long as any of its processes lives
    <runs>/<cell>.json      the command, and the exit status once there is one

A cell that is finished is never run again. One that was cut off goes on from its own checkpoints, or from the start
where it has none. Several processes, also on several machines, may work on the same folder: a cell that is locked is
left alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from dissect_clip.errors import SetupError

CUT_OFF = (75, 130)
"""Exit statuses of a training that was asked to stop, and saved."""

_TAIL = 15  # lines of a log
_POLL = 0.5  # seconds between two looks at a running cell
_TRIES = 5


@dataclass(frozen=True)
class Cell:
    """A run that is to be made. ``command`` is what it is of: that of a finished cell must not change.

    ``words`` is what is typed after the program, where it differs from ``command``: folders may move.
    """

    name: str  # of its files
    label: str  # for people
    command: tuple[str, ...]
    words: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()  # in front of the program instead of the Python that runs this
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def identity(self) -> list[str]:
        """What is compared with the command of an earlier run."""
        return [*self.launcher, *self.command]


@dataclass(frozen=True)
class Evaluation:
    """A command line that evaluates the trained model on another set, in the folder ``<cell>/evaluation/<name>``."""

    name: str
    command: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """What is known of a cell: the command of the last attempt, and how it ended (None while it is not over)."""

    command: list[str]
    status: int | None
    seconds: float = 0.0  # of the last attempt's process
    stopped: bool = False  # by a signal, not by itself
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # command and status of each, by name

    def outcomes(self) -> list[int | None]:
        """The exit statuses of training and evaluations."""
        return [self.status, *(found["status"] for found in self.evaluations.values())]


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A signal asked for the end; what was running has saved and ended."""


class Busy(Exception):  # noqa: N818 - nothing went wrong
    """Another process has the cell."""


@dataclass(frozen=True)
class Runs:
    """A folder of cells, and the program that their commands are for."""

    folder: Path
    program: tuple[str, ...]  # with the Python that runs it, for cells without a launcher
    cwd: Path | None = None

    def run_folder(self, cell: Cell) -> Path:
        """Where the training of a cell writes."""
        return self.folder / cell.name

    def log(self, cell: Cell) -> Path:
        """What the processes of a cell said, of all attempts since it was last begun anew."""
        return self.folder / f"{cell.name}.log"

    def evaluation_folder(self, cell: Cell, evaluation: Evaluation) -> Path:
        """Where an evaluation of a cell writes."""
        return self.run_folder(cell) / "evaluation" / evaluation.name

    def note_file(self, cell: Cell) -> Path:
        """Where the note of a cell is."""
        return self.folder / f"{cell.name}.json"

    def note(self, cell: Cell) -> Note | None:
        """What is known of a cell; None before its first attempt."""
        file = self.note_file(cell)
        return Note(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def status(self, cell: Cell) -> int | None:
        """The exit status of the last attempt; None where there is none."""
        note = self.note(cell)
        return None if note is None else note.status

    def state(self, cell: Cell) -> str:
        """One of "done", "running", "failed", "cut off" and "waiting".

        A cell that lacks an evaluation is cut off. One that failed with another command than it has now is waiting.
        """
        if self._is_running(cell):
            return "running"
        note = self.note(cell)
        if note is None or (note.status != 0 and note.command != cell.identity):
            return "waiting"
        if note.status == 0 and all(self._is_evaluated(note, evaluation) for evaluation in cell.evaluations):
            return "done"
        wrong = [status for status in note.outcomes() if status not in (0, None, *CUT_OFF)]
        return "failed" if wrong and not note.stopped else "cut off"

    def check_unchanged(self, cell: Cell) -> None:
        """Stop where a finished cell was another one.

        Raises:
            SetupError: says which flags differ.
        """
        note = self.note(cell)
        if note is None:
            return
        pairs = [(note.command, cell.identity)] if note.status == 0 else []
        for evaluation in cell.evaluations:
            if self._is_evaluated(note, evaluation):
                pairs.append((note.evaluations[evaluation.name]["command"], list(evaluation.command)))
        for before, now in pairs:
            if before != now:
                raise SetupError(
                    f"{self.note_file(cell)} is of another command, and finished: {difference(before, now)}. Put it "
                    "back, work in another folder, or delete this file to run the cell anew"
                )

    def tail(self, cell: Cell) -> str:
        """The end of the log."""
        log = self.log(cell)
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return "\n".join(text.splitlines()[-_TAIL:])

    def run(self, cell: Cell, *, resume: bool, watch: Callable[[], None] = lambda: None) -> int:
        """Run a cell to its end; the exit status of what failed, or 0.

        SIGTERM, SIGUSR1 and SIGINT are passed on as one SIGTERM, at which training saves and ends.

        Args:
            resume: go on from checkpoints of an attempt that was cut off; otherwise begin anew.
            watch: called every half second while something runs.

        Raises:
            Busy: another process has the cell.
            Interrupted: a signal asked for the end.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(cell) as log:
            note = self.note(cell)
            if note is None or note.status != 0:
                note = self._train(cell, log, note, resume, watch)
            if note.status == 0:
                note = self._evaluate(cell, log, note, watch)
            return next((status for status in note.outcomes() if status), 0)

    def _train(self, cell: Cell, log: TextIO, before: Note | None, resume: bool, watch: Callable[[], None]) -> Note:
        same = before is not None and before.command == cell.identity
        if not (resume and same and any((self.run_folder(cell) / "checkpoints").glob("epoch_*.pt"))):
            shutil.rmtree(self.run_folder(cell), ignore_errors=True)
            log.truncate(0)
        note = Note(cell.identity, None)
        self._write(cell, note)
        began = time.perf_counter()
        status, asked = self._call(cell, cell.words or cell.command, log, watch)
        seconds = round(time.perf_counter() - began, 2)
        note = replace(note, status=status, seconds=seconds, stopped=asked and status != 0)
        return self._written(cell, note, asked)

    def _evaluate(self, cell: Cell, log: TextIO, note: Note, watch: Callable[[], None]) -> Note:
        for evaluation in cell.evaluations:
            if self._is_evaluated(note, evaluation):
                continue
            shutil.rmtree(self.evaluation_folder(cell, evaluation), ignore_errors=True)
            status, asked = self._call(cell, evaluation.words, log, watch)
            found = {"command": list(evaluation.command), "status": status}
            stopped = asked and status != 0
            note = replace(note, stopped=stopped, evaluations={**note.evaluations, evaluation.name: found})
            note = self._written(cell, note, asked)
        return note

    def _call(self, cell: Cell, words: Sequence[str], log: TextIO, watch: Callable[[], None]) -> tuple[int, bool]:
        """Run one command line; its exit status, and whether a signal asked for its end."""
        program = (*cell.launcher, *self.program[1:]) if cell.launcher else self.program
        return _supervise([*program, *words], log, self.cwd, watch)

    def _written(self, cell: Cell, note: Note, asked: bool) -> Note:
        """The note, once it is on the disk.

        Raises:
            Interrupted: where a signal has ``asked`` for the end.
        """
        self._write(cell, note)
        if asked:
            raise Interrupted
        return note

    @staticmethod
    def _is_evaluated(note: Note, evaluation: Evaluation) -> bool:
        return evaluation.name in note.evaluations and note.evaluations[evaluation.name]["status"] == 0

    def _write(self, cell: Cell, note: Note) -> None:
        file = self.note_file(cell)
        partial = file.with_suffix(".json.tmp")
        partial.write_text(json.dumps(vars(note), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, file)

    def _is_running(self, cell: Cell) -> bool:
        log = self.log(cell)
        if not log.exists():
            return False
        with log.open("r+", encoding="utf-8") as file:
            return not _lock(file)

    @contextlib.contextmanager
    def _locked(self, cell: Cell) -> Iterator[TextIO]:
        with self.log(cell).open("a", encoding="utf-8") as file:
            for _ in range(_TRIES):  # somebody may be looking whether it is locked
                if _lock(file):
                    break
                time.sleep(_POLL / _TRIES)
            else:
                raise Busy
            yield file


def _lock(file: TextIO) -> bool:
    """Whether the lock of an open file could be had; it goes with the last process that has inherited the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise SetupError(f"cannot lock {file.name}: {error.strerror}. Use a file system that has locks") from error
    return True


def _supervise(command: Sequence[str], log: TextIO, cwd: Path | None, watch: Callable[[], None]) -> tuple[int, bool]:
    """Exit status of a process, and whether a signal to this one has asked for its end.

    The process has a session of its own, so that Ctrl-C comes here only, and is passed on once. What it says goes to
    ``log``, which it holds open, and so locked, even where this process is killed.
    """
    # Other programs on the cores would make threads that wait by spinning many times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    asked: list[int] = []
    # Before the process starts, so that no signal is lost.
    before = {
        n: signal.signal(n, lambda n, _: asked.append(n)) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        with subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd, env=environment,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                return _wait(process, asked, watch), bool(asked)
            except BaseException:
                _kill(process)
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes], asked: Sequence[int], watch: Callable[[], None]) -> int:
    """Wait for the end; the first signal is passed on as SIGTERM, a second Ctrl-C kills."""
    passed_on = False
    while True:
        if asked and not passed_on:
            process.terminate()
            passed_on = True
        elif asked.count(signal.SIGINT) > 1:
            _kill(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL)
        watch()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and the others of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _settings(words: Sequence[str]) -> list[str]:
    """A command line as flags with their values: ``["--lr 0.1", "--select"]``."""
    found: list[str] = []
    for word in words:
        if word.startswith("--") or not found:
            found.append(shlex.quote(word))
        else:
            found[-1] += f" {shlex.quote(word)}"
    return found


def difference(before: Sequence[str], now: Sequence[str]) -> str:
    """As in "was `--lr 0.1`, now `--lr 0.2`"; for command lines that differ."""
    old, new = _settings(before), _settings(now)
    gone, come = [s for s in old if s not in new], [s for s in new if s not in old]
    if not gone and not come:
        return "its flags stand in another order"
    return f"was `{' '.join(gone)}`, now `{' '.join(come)}`"


def read_results(file: Path) -> list[dict[str, Any]]:
    """The evaluations of a ``results.jsonl`` by epoch; where an epoch comes twice, its last line.

    A line that is torn, as of a run that was killed, is passed over.
    """
    found: dict[int, dict[str, Any]] = {}
    for line in file.read_bytes().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found[row["epoch"]] = row
    return [found[epoch] for epoch in sorted(found)]

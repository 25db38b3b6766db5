"""Cells: how commands are compared, results read, and captions swapped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from grids import FAKE

from dissect_clip.errors import SetupError
from experiments.cells import Cell, Note, Runs, difference, read_results


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("--lr 1 --select", "--lr 2 --select", "was `--lr 1`, now `--lr 2`"),
        ("--lr 1", "--lr 1 --select --wd 0", "was ``, now `--select --wd 0`"),
        ("torchrun -n 8 --lr 1", "torchrun -n 4 --lr 1", "was `torchrun -n 8`, now `torchrun -n 4`"),
        ("--lr 1 --wd 2", "--wd 2 --lr 1", "its flags are in another order"),
    ],
)
def test_what_differs_between_commands(before: str, now: str, told: str):
    assert difference(before.split(), now.split()) == told


def test_of_an_epoch_that_comes_twice_the_later_line_counts(tmp_path: Path):
    file = tmp_path / "results.jsonl"
    assert read_results(file) == []
    file.write_text('{"epoch": 2, "a": 1}\n{"epoch": 1, "a": 2}\n{"epoch": 2, "a": 3}\n{"epoch": 3, "a"')
    assert read_results(file) == [{"epoch": 1, "a": 2}, {"epoch": 2, "a": 3}]


@pytest.mark.parametrize(
    ("note", "state"),
    [
        (None, "waiting"),
        (Note(["--lr", "1"], None), "cut off"),
        (Note(["--lr", "1"], 0), "done"),
        (Note(["--lr", "1"], 1), "failed"),
        (Note(["--lr", "1"], -9), "failed"),
        (Note(["--lr", "1"], 75), "cut off"),
        (Note(["--lr", "1"], 1, stopped=True), "cut off"),  # torchrun ends with 1, whatever its processes end with
        (Note(["--lr", "2"], 1), "waiting"),
        (Note(["--lr", "2"], None), "waiting"),
    ],
)
def test_states(note: Note | None, state: str, tmp_path: Path):
    runs, cell = Runs(tmp_path, FAKE), Cell("c", "c", ("--lr", "1"))
    if note is not None:
        runs.note_file(cell).write_text(json.dumps(vars(note)))
    assert runs.state(cell) == state


def test_a_finished_cell_of_another_command_is_refused(tmp_path: Path):
    runs, cell = Runs(tmp_path, FAKE), Cell("c", "c", ("--lr", "1"))
    runs.note_file(cell).write_text(json.dumps({"command": ["--lr", "2"], "status": 1, "seconds": 3.0}))
    runs.check_unchanged(cell)
    runs.note_file(cell).write_text(json.dumps({"command": ["--lr", "2"], "status": 0, "seconds": 3.0}))
    with pytest.raises(SetupError, match="is finished, with another command: was `--lr 2`, now `--lr 1`"):
        runs.check_unchanged(cell)

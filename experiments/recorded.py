"""Finished runs read from the ``*.jsonl`` files of collected grids."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dissect_clip.errors import SetupError
from experiments.cells import CellKey
from experiments.grid import Grid
from experiments.results import RECALLS, Run


def read_recorded(folders: Iterable[Path]) -> dict[CellKey, Run]:
    """The runs in all ``*.jsonl`` of these folders, or of the folders in them when they hold none themselves.

    Raises:
        SetupError: a folder has no such file, a line is not one that was written by a collection, or a cell stands
            there twice with different figures.
    """
    runs: dict[CellKey, Run] = {}
    places: dict[CellKey, str] = {}
    for folder in folders:
        files = sorted(folder.glob("*.jsonl")) or sorted(folder.glob("*/*.jsonl"))
        if not files:
            raise SetupError(f"--from {folder}: there is no .jsonl in it; give a folder that --collect has written")
        for file in files:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    run = _run(line)
                except (ValueError, TypeError, KeyError) as error:
                    raise SetupError(
                        f"{file}: line {number} is not a run that --collect has written ({error!r}): remove it, or "
                        "collect the grid again from its runs"
                    ) from error
                place = f"{file}, line {number}"
                if run != runs.setdefault(run.key, run):
                    raise SetupError(
                        f"{run.key} stands in {places[run.key]} and, with other figures, in {place}: remove one of them"
                    )
                places.setdefault(run.key, place)
    return runs


def _run(line: str) -> Run:
    content = json.loads(line)
    key = CellKey(**{field.name: content.pop(field.name) for field in dataclasses.fields(CellKey)})
    run = Run(key, **content)
    lists: list[Any] = [run.epochs, run.rsum4, run.trained, run.scored, run.seconds, run.score_seconds]
    if not all(isinstance(one, list) and len(one) == len(run.epochs) > 0 for one in lists):
        raise ValueError("its lists are not of one length")
    numbers = [*(value for one in lists for value in one), *(v for one in run.final.values() for v in one.values())]
    numbers += [] if run.clean_share is None else [run.clean_share]
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers):
        raise ValueError("not all of its figures are numbers")
    for name, recalls in run.final.items():
        if set(recalls) != set(RECALLS):
            raise ValueError(f"the recalls on {name} are not {', '.join(RECALLS)}")
    return run


def check_recorded(grid: Grid, keys: Sequence[CellKey], recorded: Mapping[CellKey, Run]) -> None:
    """Check that recorded runs have the flags and the evaluation sets of the grid.

    Raises:
        SetupError: names the difference.
    """
    for key in keys:
        run = recorded.get(key)
        if run is None:
            continue
        if lacking := [name for name in grid.data_sets[key.data].val if name not in run.final]:
            raise SetupError(
                f"{grid.file}: {key} stands in a folder given with --from, but without {', '.join(lacking)}, which "
                "the grid evaluates on now: leave --from out, or the grid as it was"
            )
        now = grid.training_flags(key)
        if shlex.split(run.flags) == now:
            continue
        then = shlex.split(run.flags)
        words = (word for word in difflib.ndiff(then, now) if word[0] in "+-")
        raise SetupError(
            f"{grid.file}: {key} stands in a folder given with --from, but was run with other flags than the grid "
            f"has now ({' '.join(words)}; - was, + is): leave --from out, or the grid as it was"
        )

"""Finished runs as the lines of a collected grid, from wherever they were run."""

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
from experiments.grid import Grid
from experiments.metrics import RECALLS, Run
from experiments.point import Point


def read_earlier(folders: Iterable[Path]) -> dict[Point, Run]:
    """The runs in all ``*.jsonl`` of these folders, or of the folders in them when they hold none themselves.

    Raises:
        SetupError: a folder has no such file, a line is not one that was written by a collection, or a cell stands
            there twice with different figures.
    """
    runs: dict[Point, Run] = {}
    places: dict[Point, str] = {}
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
                        f"{file}: line {number} is not a run that --collect has written ({error!r}): take it out, or "
                        "collect the grid again where its runs are"
                    ) from error
                place = f"{file}, line {number}"
                if run != runs.setdefault(run.point, run):
                    raise SetupError(
                        f"{run.point} stands in {places[run.point]} and, with other figures, in {place}: take the one "
                        "that does not count out"
                    )
                places.setdefault(run.point, place)
    return runs


def _run(line: str) -> Run:
    content = json.loads(line)
    point = Point(**{field.name: content.pop(field.name) for field in dataclasses.fields(Point)})
    run = Run(point, **content)
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


def check_earlier(grid: Grid, points: Sequence[Point], earlier: Mapping[Point, Run]) -> None:
    """Stop where a run was made with other flags than the grid has now, or was evaluated on less.

    Raises:
        SetupError: with what differs.
    """
    for point in points:
        run = earlier.get(point)
        if run is None:
            continue
        if lacking := [name for name in grid.data_sets[point.data].val if name not in run.final]:
            raise SetupError(
                f"{grid.file}: {point} stands in a folder given with --from, but without {', '.join(lacking)}, which "
                "the grid evaluates on now: leave --from out, or the grid as it was"
            )
        now = grid.training_flags(point)
        if shlex.split(run.flags) == now:
            continue
        then = shlex.split(run.flags)
        words = (word for word in difflib.ndiff(then, now) if word[0] in "+-")
        raise SetupError(
            f"{grid.file}: {point} stands in a folder given with --from, but was run with other flags than the grid "
            f"has now ({' '.join(words)}; - was, + is): leave --from out, or the grid as it was"
        )

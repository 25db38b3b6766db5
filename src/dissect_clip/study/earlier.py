"""Finished runs as the lines of a collected grid, from wherever they were run."""

from __future__ import annotations

import dataclasses
import difflib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dissect_clip.errors import SetupError
from dissect_clip.study.grid import Grid
from dissect_clip.study.metrics import Run
from dissect_clip.study.point import Point


def read_earlier(folders: Iterable[Path]) -> dict[Point, Run]:
    """The runs in all ``*.jsonl`` of these folders; of one that stands in several places, the last.

    Raises:
        SetupError: a folder has no such file, or a line is not one that was written by a collection.
    """
    runs: dict[Point, Run] = {}
    for folder in folders:
        files = sorted(folder.glob("*.jsonl"))
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
                runs[run.point] = run
    return runs


def _run(line: str) -> Run:
    content = json.loads(line)
    point = Point(**{field.name: content.pop(field.name) for field in dataclasses.fields(Point)})
    return Run(point, **content)


def check_earlier(grid: Grid, points: Sequence[Point], earlier: Mapping[Point, Run]) -> None:
    """Stop where a run was made with other flags than the grid has now.

    Raises:
        SetupError: with the flags that differ.
    """
    for point in points:
        run = earlier.get(point)
        now = grid.training_flags(point)
        if run is None or shlex.split(run.flags) == now:
            continue
        then = shlex.split(run.flags)
        words = (word for word in difflib.ndiff(then, now) if word[0] in "+-")
        raise SetupError(
            f"{grid.file}: {point} stands in a folder given with --from, but was run with other flags than the grid "
            f"has now ({' '.join(words)}; - was, + is): leave --from out, or the grid as it was"
        )

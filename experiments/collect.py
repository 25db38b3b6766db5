"""From the run folders of a grid to its tables and plots."""

from __future__ import annotations

import csv
import io
import json
import shlex
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dissect_clip.errors import SetupError
from dissect_clip.selection.registry import STRATEGIES
from experiments.cells import CellKey, difference, read_results
from experiments.grid import Grid
from experiments.plots import draw
from experiments.published import Published, read_published
from experiments.results import RECALLS, Run, make_run
from experiments.tables import FORMATS, as_markdown, make_tables


def read_run(grid: Grid, key: CellKey, runs: Path) -> Run | None:
    """A finished cell, with its evaluations; None for any other.

    Raises:
        SetupError: it has no evaluation, or was run with other flags than the grid has now.
    """
    file = runs / f"{key.name}.json"
    note = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if note is None or note["status"] != 0:
        return None
    first, *others = grid.data_sets[key.data].val
    rows = _evaluations(runs / key.name)
    if not rows:
        raise SetupError(f"{runs / key.name}: no evaluation of retrieval: --val-frequency 0 leaves nothing to collect")
    found = {name: _evaluations(runs / key.name / "evaluation" / name) for name in others}
    last = {name: lines[-1] for name, lines in found.items() if lines}
    words = note["command"]
    flags, now = words[words.index("--val-data") + 2 :], grid.training_flags(key)  # data come before them
    if flags != now:
        raise SetupError(
            f"{file} is of other flags than {grid.file} has now: {difference(flags, now)}. Put them back, collect from "
            "another folder, or delete this file to run the cell again"
        )
    return make_run(key, rows, last, first, clean_share(grid, key, runs), shlex.join(flags))


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """Those of retrieval: lines of zero-shot classification alone have no recalls."""
    rows = read_results(folder / "checkpoints" / "results.jsonl")
    return [row for row in rows if all(name in row for name in RECALLS.values())]


def clean_share(grid: Grid, key: CellKey, runs: Path) -> float | None:
    """Percent of the pairs trained on after the warm-up that have their own caption, from ``--record``.

    A run on all data has the share of the data. None where nothing was recorded, all captions are right, or the shards
    with the wrong ones are not there any more.
    """
    shards = grid.shards(key, runs)
    if not key.noise or not shards.exists() or not shards.with_name(f"{shards.name}.json").exists():
        return None
    swapped = _swapped(shards)
    if key.rate is None:
        return round(100 * (1 - len(swapped) / _captions(shards)), 3)
    config = grid.config(key)
    selection = config.selection
    begin = STRATEGIES.warmup_epochs(selection.select_strategy, selection.options) if selection.select else 0
    clean = total = 0
    for file in sorted((runs / key.name / "record").glob("epoch_*.parquet")):
        if int(file.stem.removeprefix("epoch_")) < begin:
            continue
        table = pq.read_table(file, columns=["key", "selected"])
        keys = table["key"].filter(table["selected"])
        total += len(keys)
        clean += len(keys) - (pc.sum(pc.is_in(keys, value_set=swapped)).as_py() or 0)
    return round(100 * clean / total, 3) if total else None


def _swapped(shards: Path) -> pa.Array:
    """The keys with the caption of another, as noted when the shards were written."""
    note = shards.with_name(f"{shards.name}.json")
    _, text = json.loads(note.read_text(encoding="utf-8"))
    return pa.array([row[0] for row in csv.reader(io.StringIO(text)) if row][1:], pa.string())


def _captions(shards: Path) -> int:
    """How many pairs the shards hold, by their headers."""
    count = 0
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as tar:
            count += sum(member.name.endswith(".txt") for member in tar)
    return count


def published_figures(grid: Grid) -> dict[str, Published]:
    """The published tables that the grid names.

    Raises:
        SetupError: one cannot be read, or a name of the grid stands in none of those in their folders.
    """
    files = dict.fromkeys(table.published for table in grid.tables if table.published is not None)
    found = {file: read_published(grid.file.parent / file) for file in files}
    folders = {(grid.file.parent / file).parent for file in files}
    beside = [read_published(file) for folder in folders for file in sorted(folder.glob("*.csv"))]
    known = set().union(*(figures.methods for figures in beside))
    for name, method in grid.methods.items():
        if found and method.published and not known & set(method.published):
            raise SetupError(
                f"{grid.file}: methods: {name}: published: {', '.join(method.published)} stands in no table of "
                f"{', '.join(map(str, folders))}; there are {', '.join(sorted(known))}"
            )
    for table in grid.tables:
        for name in table.also:
            if table.published is not None and name not in found[table.published].methods:
                raise SetupError(
                    f"{grid.file}: table {table.title!r}: also: {name!r} does not stand in {table.published}"
                )
    return found


_READING = """\
Columns are the share of every batch that is trained on, and a metric; rows without a strategy train on all data and
are repeated at each rate. A figure is the mean over the seeds ± their deviation (none for one seed), of {seeds}.
`(2 of 3)` counts the seeds that have it, where some are missing or never get there; `missing` has no finished run, `–`
no figure. [In brackets: the published figure, and ours minus that.] Metrics are explained in docs/guides/reproduce.md.
"""


def page(grid: Grid, runs: Mapping[CellKey, Run], published: Mapping[str, Published], pictures: Sequence[Path]) -> str:
    """The Markdown page of a grid."""
    keys = list(grid.cell_keys())
    seeds = f"seed{'s' * (len(grid.seeds) > 1)} {', '.join(map(str, grid.seeds))}"
    parts = [
        f"# {grid.title}",
        f"{len(runs)} of {len(keys)} runs are finished.",
        _READING.format(seeds=seeds).strip(),
    ]
    for table in make_tables(grid, runs, published):
        parts += [f"## {table.title}", as_markdown(table)]
    if pictures:
        parts += ["## Plots", *(f"![{picture.stem}]({picture.name})" for picture in pictures)]
    return "\n\n".join(parts) + "\n"


def collect(grid: Grid, runs_folder: Path, out: Path, recorded: Mapping[CellKey, Run] | None = None) -> list[Path]:
    """Write runs, tables and plots of what is finished; returns the files.

    The same runs give the same text files. Cells that have no finished run in the folder may be ``recorded`` ones.

    Raises:
        SetupError: a published table cannot be read, or a finished run has no evaluation.
        OSError: a file cannot be written.
    """
    published = published_figures(grid)
    found = {
        key: (None if grid.is_retired(key) else read_run(grid, key, runs_folder)) or (recorded or {}).get(key)
        for key in grid.cell_keys()
    }
    runs = {key: run for key, run in found.items() if run is not None}
    out.mkdir(parents=True, exist_ok=True)
    texts = {f"{grid.name}.jsonl": "".join(json.dumps(run.to_json()) + "\n" for run in runs.values())}
    for table in make_tables(grid, runs, published):
        texts |= {f"{table.name}.{ending}": write(table) for ending, write in FORMATS.items()}
    pictures = draw(grid, runs, published, out)
    texts[f"{grid.name}.md"] = page(grid, runs, published, pictures)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [*(out / name for name in texts), *pictures]

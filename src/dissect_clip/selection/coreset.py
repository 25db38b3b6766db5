"""Part of a dataset, chosen by what a run recorded or by a model's scores, as a list for ``--train-keep``.

docs/guides/clean-a-dataset.md says what each method measures and keeps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dissect_clip.errors import SetupError
from dissect_clip.run.atomic import put_in_place

METADATA = b"dissect_clip.coreset"
"""Key of the list's metadata: how it was made, as JSON."""

_PIECE = 1 << 20
"""Samples that are looked at at a time, where places are needed."""

_EPOCH = re.compile(r"epoch_(\d+)\.parquet")

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Method:
    """What a method measures of a sample, and which end it keeps."""

    column: str  # of the record; empty where it looks at none, or at several
    largest: bool
    every_epoch: bool = False  # whether it looks at all epochs if --epochs does not say which


METHODS = {
    "random": Method("", True, every_epoch=True),
    "forgetting": Method("", True, every_epoch=True),
    "clipscore": Method("score", True),
    "cliploss": Method("loss", False),
    "differential": Method("", True),
}


@dataclass(frozen=True)
class CoresetOptions:
    """The flags of ``dissect-clip coreset``."""

    record: Path
    method: str
    output: Path
    rate: float | None = None
    threshold: float | None = None
    epochs: str | None = None
    reference_epoch: int | None = None
    learned_by: str = "loss"
    learned_at: float | None = None
    never_learned: str = "most"
    passes: int = 1
    seed: int = 0


# ---- reading a record


def find_epochs(folder: Path) -> dict[int, Path]:
    """The complete epochs of a record, rising.

    Raises:
        SetupError: there is none.
    """
    files = {int(match[1]): path for path in folder.glob("*") if (match := _EPOCH.fullmatch(path.name))}
    if not files:
        raise SetupError(f"{folder} holds no complete epoch of a record (epoch_00000.parquet): train with --record")
    return dict(sorted(files.items()))


def choose_epochs(found: dict[int, Path], text: str | None, method: Method) -> dict[int, Path]:
    """Those that ``--epochs`` names, or that the method looks at without it.

    Raises:
        SetupError: some are not there.
    """
    if text is None:
        return found if method.every_epoch else {max(found): found[max(found)]}
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None:
        raise SetupError(f"--epochs {text}: give one, as 7, or the first and the last, as 5:9")
    wanted = range(int(match[1]), int(match[2] or match[1]) + 1)
    missing = [epoch for epoch in wanted if epoch not in found]
    if missing or not wanted:
        raise SetupError(f"--epochs {text}: the record has {', '.join(map(str, found))}")
    return {epoch: found[epoch] for epoch in wanted}


def count_samples(files: Sequence[Path]) -> int:
    """The highest id in the files and one more, by the statistics that Parquet keeps of a column.

    Raises:
        SetupError: a file is none of a record.
    """
    highest = -1
    for path in files:
        metadata = pq.read_metadata(path)
        names = metadata.schema.to_arrow_schema().names
        if not {"sample_id", "shard", "key", "step", "rank"} <= set(names):
            raise SetupError(f"{path} is no file of a record: it has the columns {', '.join(names)}")
        place = names.index("sample_id")
        for group in range(metadata.num_row_groups):
            if metadata.row_group(group).num_rows:
                highest = max(highest, metadata.row_group(group).column(place).statistics.max)
    if highest < 0:
        raise SetupError("the record has no rows")
    return highest + 1


def row_groups(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of a file, a row group at a time. A row group holds whole steps.

    Raises:
        SetupError: a column is missing.
    """
    with pq.ParquetFile(path) as file:
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise SetupError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}. "
                "docs/guides/clean-a-dataset.md says which strategies record what"
            )
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=list(columns))


def _floats(table: pa.Table, name: str) -> Floats:
    numbers: Floats = table[name].to_numpy().astype(np.float32)  # null is NaN
    return numbers


def first_visits(path: Path, num_samples: int, columns: Sequence[str]) -> Iterator[tuple[pa.Table, NDArray[np.int64]]]:
    """Row groups of an epoch, and the places of the rows in which a sample is there for the first time."""
    seen = np.zeros(num_samples, bool)
    for table in row_groups(path, ["sample_id", "step", "rank", *columns]):
        ids, step, rank = (table[name].to_numpy() for name in ("sample_id", "step", "rank"))
        order = np.lexsort((rank, step, ids))
        rising = ids[order]
        first = np.ones(len(ids), bool)
        first[1:] = rising[1:] != rising[:-1]
        places = order[first & ~seen[rising]]
        seen[ids[places]] = True
        yield table, places


# ---- what is measured, [num_samples] float32; NaN where nothing is known


def mean_of(files: Sequence[Path], num_samples: int, measure: Callable[[pa.Table], Floats], *columns: str) -> Floats:
    """The mean over epochs of what is measured at a sample's first visit in each."""
    total = np.zeros(num_samples, np.float32)
    count = np.zeros(num_samples, np.uint16)
    for path in files:
        for table, places in first_visits(path, num_samples, columns):
            values = measure(table)[places]
            known = np.isfinite(values)
            ids = table["sample_id"].to_numpy()[places[known]]  # each is there once
            total[ids] += values[known]
            count[ids] += 1
    with np.errstate(invalid="ignore"):
        total /= count.astype(np.float32)
    return total


def drawn(files: Sequence[Path], num_samples: int, seed: int) -> Floats:
    """A number drawn for each sample that is in some epoch."""
    absent = np.ones(num_samples, bool)
    for path in files:
        for table in row_groups(path, ["sample_id"]):
            absent[table["sample_id"].to_numpy()] = False
    value = np.random.default_rng(seed).random(num_samples, np.float32)
    value[absent] = np.nan
    return value


def above_step(score: Floats, step: NDArray[np.int32], share: float) -> NDArray[np.bool_]:
    """[R] bool: whether a row's score is at least the ``share``-quantile of those of its step, over all ranks."""
    learned = np.zeros(len(score), bool)
    order = np.argsort(step, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(step[order])) + 1):
        scores = score[rows]
        if np.isfinite(scores).any():
            learned[rows] = scores >= np.nanquantile(scores, share)
    return learned


def forgetting_events(
    files: Sequence[Path], num_samples: int, by: str, at: float, never: str
) -> tuple[Floats, dict[str, int]]:
    """How often each sample was learned at one visit and not at the next (Toneva et al., 2019, section 3).

    ``by`` loss: learned is a loss of at most ``at`` nats. ``by`` score: a score of at least the ``at``-quantile of its
    step. A sample that never was learned has infinitely many events, as in the paper, or -1 where ``never`` is least.

    Returns:
        The events, and how many samples were never learned, and never forgotten after they were.
    """
    unseen, missed, learned, ever = 0, 1, 2, 4
    state = np.zeros(num_samples, np.uint8)
    events = np.zeros(num_samples, np.uint16)
    for path in files:
        for table, places in first_visits(path, num_samples, [by]):
            value = _floats(table, by)
            now = value <= at if by == "loss" else above_step(value, table["step"].to_numpy(), at)
            places = places[np.isfinite(value[places])]
            ids, now = table["sample_id"].to_numpy()[places], now[places]
            before = state[ids]
            events[ids[(before & learned > 0) & ~now]] += 1
            state[ids] = np.where(now, learned | ever, missed | (before & ever))
    result = events.astype(np.float32)
    never_learned = (state != unseen) & (state & ever == 0)
    result[never_learned] = math.inf if never == "most" else -1
    result[state == unseen] = np.nan
    unforgettable = (state & ever > 0) & (events == 0)
    return result, {"never_learned": int(never_learned.sum()), "never_forgotten": int(unforgettable.sum())}


def measure(args: CoresetOptions, epochs: dict[int, Path], found: dict[int, Path], num_samples: int) -> Any:
    """What the method measures of every sample, and what to tell of it."""
    files = list(epochs.values())
    if args.method == "random":
        return drawn(files, num_samples, args.seed), {}
    if args.method == "forgetting":
        at = args.learned_at if args.learned_at is not None else {"loss": math.log(2), "score": 0.5}[args.learned_by]
        value, told = forgetting_events(files, num_samples, args.learned_by, at, args.never_learned)
        return value, {"learned_by": args.learned_by, "learned_at": at, "never_learned_are": args.never_learned, **told}
    if args.method != "differential":
        column = METHODS[args.method].column
        return mean_of(files, num_samples, lambda table: _floats(table, column), column), {}
    if args.reference_epoch is None:
        fall = lambda table: _floats(table, "remembered_clip_score") - _floats(table, "score")  # noqa: E731
        return mean_of(files, num_samples, fall, "score", "remembered_clip_score"), {}
    score = lambda table: _floats(table, "score")  # noqa: E731
    before = choose_epochs(found, str(args.reference_epoch), METHODS[args.method])
    value = mean_of(list(before.values()), num_samples, score, "score")
    value -= mean_of(files, num_samples, score, "score")
    return value, {"reference_epoch": args.reference_epoch}


# ---- choosing and writing


def choose(value: Floats, largest: bool, rate: float | None, threshold: float | None, seed: int) -> NDArray[np.bool_]:
    """[num_samples] bool: the share ``rate`` of the known values, or those on the right side of ``threshold``.

    Of equal values at the edge a random part is taken. What is not known is not kept.
    """
    known = ~np.isnan(value)
    kept: NDArray[np.bool_]
    if threshold is not None:
        kept = value >= threshold if largest else value <= threshold
        return kept
    assert rate is not None
    rank = value[known] if largest else -value[known]
    count = max(1, round(rate * len(rank)))
    rank.partition(len(rank) - count)
    edge = rank[len(rank) - count] if largest else -rank[len(rank) - count]
    kept = value > edge if largest else value < edge
    ties = value == edge
    keep_some(ties, count - int(kept.sum()), np.random.default_rng(seed))
    kept |= ties
    return kept


def keep_some(marked: NDArray[np.bool_], count: int, generator: np.random.Generator) -> None:
    """Leave ``count`` of the marks, drawn uniformly; a piece at a time, since places of all would take 8 bytes each."""
    left = int(marked.sum())
    for begin in range(0, len(marked), _PIECE):
        piece = marked[begin : begin + _PIECE]
        places = np.flatnonzero(piece)
        left -= len(places)
        part = int(generator.hypergeometric(len(places), left, count))
        piece[:] = False
        piece[generator.choice(places, part, replace=False)] = True
        count -= part


_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("key", pa.string()),
        ("value", pa.float32()),
    ]
)


def write_list(
    output: Path, files: Sequence[Path], kept: NDArray[np.bool_], value: Floats, facts: dict[str, object]
) -> None:
    """Write the kept samples with the names that the record has for them; whole or not at all."""
    left = kept.copy()
    partial = output.with_name(f".{output.name}.tmp")
    try:
        schema = _SCHEMA.with_metadata({METADATA: json.dumps(facts).encode()})
        with pq.ParquetWriter(partial, schema, compression="zstd", use_dictionary=["shard"]) as writer:
            for path in reversed(files):
                if not left.any():
                    break
                for table in row_groups(path, ["sample_id", "shard", "key"]):
                    ids, first = np.unique(table["sample_id"].to_numpy(), return_index=True)
                    rows = np.sort(first[left[ids]])
                    if len(rows) == 0:
                        continue
                    part = table.take(pa.array(rows)).combine_chunks()
                    ids = part["sample_id"].to_numpy()
                    left[ids] = False
                    shard = pc.cast(part["shard"], _SCHEMA.field("shard").type)
                    columns = [part["sample_id"], shard, part["key"], pa.array(value[ids])]
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        put_in_place(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def make(args: CoresetOptions) -> None:
    """From a record to a list."""
    method = METHODS[args.method]
    found = find_epochs(args.record)
    epochs = choose_epochs(found, args.epochs, method)
    num_samples = count_samples(list(found.values()))
    check_loss(args)
    value, told = measure(args, epochs, found, num_samples)
    known = int((~np.isnan(value)).sum())
    if known == 0:
        raise SetupError(
            f"--method {args.method}: nothing that it looks at was recorded in epoch {', '.join(map(str, epochs))}. "
            "docs/guides/clean-a-dataset.md says which strategies record what"
        )
    kept = choose(value, method.largest, args.rate, args.threshold, args.seed)
    count = int(kept.sum())
    if count == 0:
        finite = value[~np.isnan(value)]
        raise SetupError(f"--threshold {args.threshold:g} keeps no sample: values are {finite.min()} to {finite.max()}")
    facts = {
        "method": args.method, "record": str(args.record), "epochs": list(epochs), "rate": args.rate,
        "threshold": args.threshold, "seed": args.seed, "samples": known, "kept": count, **told,
        **scored_with(args.record),
    }  # fmt: skip
    write_list(args.output, list(epochs.values()), kept, value, facts)
    print(f"kept {count} of {known} samples ({count / known:.1%}) by {args.method}, in {args.output}")
    for name, number in told.items():
        print(f"  {name.replace('_', ' ')}: {number}")


def scored_with(record: Path) -> dict[str, object]:
    """What a record was scored with, where it is not a training run's."""
    path = record / "_scored_with.json"  # a name that readers of data sets leave out
    return {"scored_with": json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def run_settings(args: CoresetOptions) -> dict[str, Any]:
    """Settings of the run that wrote the record, where they are beside it."""
    path = args.record.parent / "config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return settings


def check_loss(args: CoresetOptions) -> None:
    """See that ln 2 nats mean something for what the run recorded as its loss.

    Raises:
        SetupError: they do not.
    """
    if args.method != "forgetting" or args.learned_by != "loss" or args.learned_at is not None:
        return
    settings = run_settings(args)
    why = None
    if settings.get("siglip"):
        why = "SigLIP's loss adds up over the batch"
    elif settings.get("select") and settings.get("score_refresh", 1) < 1:
        why = "with --score-refresh below 1 the record holds minus the z-score instead of the loss"
    if why is not None:
        raise SetupError(f"--learned-by loss: ln 2 nats mean nothing here, since {why}: give --learned-at, or score")

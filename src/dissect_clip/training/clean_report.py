"""What a run's clean.parquet holds: the share of clean pairs, the keys of the samples, P(clean) against the truth."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dissect_clip.data.formats.urls import check_present, expand
from dissect_clip.data.sampling.shard_ids import index_shards
from dissect_clip.data.sampling.shard_sizes import recorded_sizes
from dissect_clip.data.sampling.subset import SampleNames, as_recorded
from dissect_clip.data.train_shards import sample_names
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.run.atomic import put_in_place
from dissect_clip.training.sample_report import METADATA

COLUMNS = ("sample_id", "shard", "p_clean", "p_clean_low", "p_clean_high", "visits")
BINS = 5

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def read_clean(path: Path) -> pa.Table:
    """The table.

    Raises:
        SetupError: it is none that a run with clean_posterior has written.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise SetupError(f"{path} cannot be read: {error}") from error
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise SetupError(f"{path} has no column {', '.join(missing)}: give the clean.parquet of a run")
    return table


def read_keys(names: SampleNames, table: pa.Table) -> list[str | None]:
    """The key of each row, None where the shard's headers end before it.

    Raises:
        SetupError: the table is of other shards.
    """
    shards = table["shard"].unique().to_pylist()
    filled = [shard for shard, size in zip(names.shards, names.sizes.tolist(), strict=True) if size]
    if table.num_rows != names.num_samples or shards != filled:
        raise SetupError(
            f"the table has {table.num_rows} samples of {', '.join(map(str, shards[:3]))}..., --train-data has "
            f"{names.num_samples} of {', '.join(names.shards[:3])}...: give the shards that the run had, in its order"
        )
    keys: list[str | None] = []
    for place, size in enumerate(names.sizes.tolist()):
        found: list[str | None] = [as_recorded(key) for _, key in zip(range(size), names.keys(place), strict=False)]
        keys += found + [None] * (size - len(found))
    return keys


def read_wrong(path: Path) -> set[str]:
    """The column ``key`` of a csv with a header, the first one where none is called that.

    Raises:
        SetupError: it cannot be read.
    """
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"--wrong {path} cannot be read: {error}") from error
    place = rows[0].index("key") if rows and "key" in rows[0] else 0
    return {row[place] for row in rows[1:] if len(row) > place}


def _numbers(table: pa.Table, name: str) -> Floats:
    numbers: Floats = table[name].to_numpy().astype(np.float64)  # null is NaN
    return numbers


def calibration(table: pa.Table, clean: Bools) -> dict[str, Any]:
    """How P(clean) of the rows that have one compares with the truth, ``clean`` [M].

    Bins are fifths of P. ``ece`` is the mean over the samples of how far the share of clean pairs in their bin is from
    the bin's mean P; ``brier`` the mean squared error, beside that of saying the share of all for each; ``auroc`` the
    chance that a clean pair has a higher P than a wrong one.
    """
    from sklearn.metrics import roc_auc_score

    p, low, high = (_numbers(table, name) for name in COLUMNS[2:5])
    known = np.isfinite(p)
    p, low, high, clean = p[known], low[known], high[known], clean[known]
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    bins = []
    for number in range(BINS):
        inside = place == number
        count = int(inside.sum())
        if count == 0:
            continue
        share = float(clean[inside].mean())
        bins.append(
            {
                "from": number / BINS,
                "to": (number + 1) / BINS,
                "samples": count,
                "p_clean": float(p[inside].mean()),
                "p_clean_low": float(low[inside].mean()),
                "p_clean_high": float(high[inside].mean()),
                "clean": share,
                "error": float(np.sqrt(share * (1 - share) / count)),
            }
        )
    share = float(clean.mean())
    return {
        "samples": len(p),
        "clean": share,
        "p_clean": float(p.mean()),
        "ece": float(sum(one["samples"] * abs(one["clean"] - one["p_clean"]) for one in bins) / len(p)),
        "brier": float(((p - clean) ** 2).mean()),
        "brier_of_the_share": share * (1 - share),
        "auroc": float(roc_auc_score(clean, p)) if 0 < share < 1 else None,
        "bins": bins,
    }


def summary(table: pa.Table) -> dict[str, Any]:
    """What the table says without a truth."""
    p, visits = _numbers(table, "p_clean"), _numbers(table, "visits")
    known = np.isfinite(p)
    about = (table.schema.metadata or {}).get(METADATA)
    return {
        "samples": table.num_rows,
        "with_p_clean": int(known.sum()),
        "never_visited": int((visits == 0).sum()),
        "mean_visits": float(visits.mean()),
        "p_clean": float(p[known].mean()) if known.any() else None,
        "below_0.5": int((p < 0.5).sum()),
        "decoys": int(table["is_decoy"].to_numpy().sum()) if "is_decoy" in table.column_names else 0,
        "run": None if about is None else json.loads(about),
    }


def as_text(report: dict[str, Any]) -> str:
    """For the terminal."""
    lines = [
        f"{report['samples']} samples, {report['never_visited']} never visited, {report['mean_visits']:.1f} visits on "
        "average",
    ]
    if report["with_p_clean"] == 0:
        return "\n".join([*lines, "P(clean) is not there: the run could not tell two parts apart"])
    lines.append(f"mean P(clean) {report['p_clean']:.3f}; {report['below_0.5']} samples are below 0.5")
    if report["decoys"]:
        lines.append(f"{report['decoys']} were decoys, of whose own captions nothing is known")
    truth = report.get("truth")
    if truth is not None:
        auroc = "-" if truth["auroc"] is None else f"{truth['auroc']:.3f}"
        lines += [
            "",
            f"against the truth: {100 * truth['clean']:.1f} % are clean; expected calibration error "
            f"{truth['ece']:.3f}, Brier score {truth['brier']:.3f} ({truth['brier_of_the_share']:.3f} by the share "
            f"alone), AUROC {auroc}",
            "",
            "P(clean)      samples   mean  -1 s.e.  +1 s.e.  clean in truth",
        ]
        lines += [
            f"{one['from']:.1f} to {one['to']:.1f} {one['samples']:10d}  {one['p_clean']:.3f}    "
            f"{one['p_clean_low']:.3f}    {one['p_clean_high']:.3f}   {one['clean']:.3f} ± {one['error']:.3f}"
            for one in truth["bins"]
        ]
    return "\n".join(lines)


def report_file(
    file: Path,
    pattern: str | None,
    wrong_file: Path | None,
    output: Path | None,
    json_file: Path | None,
    timeout: float,
) -> None:
    """Print the summary of a clean.parquet, and write what was asked for.

    Raises:
        SetupError: a file cannot be read, or the shards are not those of the run.
        OSError: a file cannot be written.
    """
    table = read_clean(file)
    report = summary(table)
    if pattern is not None:
        urls = [url for source in expand(pattern, "--train-data") for url in source]
        check_present(urls, "--train-data")
        recorded = recorded_sizes(urls, None, ask_remote=True, timeout=timeout)
        index = index_shards(urls, recorded, World(), None, timeout)
        keys = pa.array(read_keys(sample_names(index, timeout), table), pa.string())
        if wrong_file is not None:
            wrong = read_wrong(wrong_file)
            matched = pc.is_in(keys, value_set=pa.array(sorted(wrong), pa.string())).to_numpy(zero_copy_only=False)
            if matched.sum() == 0:
                such = f", such as {min(wrong)!r}," if wrong else ""
                raise SetupError(f"--wrong {wrong_file}: none of its {len(wrong)} keys{such} is in the shards")
            if report["with_p_clean"]:
                report["truth"] = calibration(table, ~matched)
        if output is not None:
            partial = output.with_name(f"{output.name}.tmp")
            pq.write_table(table.add_column(2, "key", keys), partial, compression="zstd", use_dictionary=["shard"])
            put_in_place(partial, output)
    print(as_text(report))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

"""What a strategy has found out about every sample, written at the end of a run: a Parquet file of the run folder.

Columns: ``sample_id``, ``shard``, then those of :meth:`dissect_clip.selection.mixins.ReportsSamples.sample_report`;
null for unknown values. A row for each sample of the dataset in the order of the ids, written a piece at a time.

Shapes: M samples in the data set, C columns of the store.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dissect_clip.errors import TrainingError
from dissect_clip.run.atomic import put_in_place
from dissect_clip.selection.mixins import ReportsSamples, SurveysAll, survey_names, survey_summary, with_survey
from dissect_clip.selection.strategy import Strategy

METADATA = b"dissect_clip.verdict"
"""Key of the file's metadata: the strategy, the epochs, and the numbers of its survey by name, as JSON."""

_PIECE = 1 << 20
"""Samples that are written at a time."""

_WHOLE = ("visits", "epoch")
_TRUTH = "is_"

log = logging.getLogger(__name__)


def write_verdict(
    path: Path,
    strategy: Strategy,
    memory: Tensor,
    epoch: int,
    shard_names: Sequence[str],
    locate: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int32]],
) -> None:
    """Write what ``strategy`` says by the whole store ``memory`` [M, C] after so many epochs. For rank 0.

    Raises:
        TrainingError: the file cannot be written.
    """
    survey = strategy.survey(memory, epoch) if isinstance(strategy, SurveysAll) else ()
    strategy = with_survey(strategy, survey)
    assert isinstance(strategy, ReportsSamples)
    about = {
        "strategy": strategy.run.select_strategy,
        "epochs": epoch,
        **dict(zip(survey_names(strategy), survey, strict=True)),
    }
    shards = pa.array(list(shard_names), pa.string())
    partial = path.with_name(path.name + ".tmp")
    writer: pq.ParquetWriter | None = None
    try:
        for first in range(0, len(memory), _PIECE):
            ids = np.arange(first, min(first + _PIECE, len(memory)), dtype=np.int64)
            columns: dict[str, pa.Array] = {
                "sample_id": pa.array(ids),
                "shard": pa.DictionaryArray.from_arrays(pa.array(locate(ids), pa.int32()), shards),
            }
            rows, places = memory[first : first + _PIECE], torch.from_numpy(ids).to(memory.device)
            for name, values in strategy.sample_report(rows, places, len(memory), epoch).items():
                if name.startswith(_TRUTH):
                    columns[name] = pa.array(values.cpu().numpy().astype(bool))
                    continue
                numbers = values.float().cpu().numpy()
                missing = np.isnan(numbers)
                kind = pa.int32() if name.endswith(_WHOLE) else pa.float32()
                filled = np.where(missing, 0, numbers).astype(kind.to_pandas_dtype())
                columns[name] = pa.array(filled, kind, mask=missing)
            table = pa.table(columns)
            if writer is None:
                schema = table.schema.with_metadata({METADATA: json.dumps(about)})
                writer = pq.ParquetWriter(partial, schema, compression="zstd", use_dictionary=["shard"])
            writer.write_table(table)
        if writer is not None:
            writer.close()
            put_in_place(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(
            f"{path} cannot be written: {error.strerror or error}. Training is complete and saved; make room and start "
            "the run again with --resume latest, which writes the file alone"
        ) from None
    if survey_summary(strategy):
        log.info("At the end: %s", survey_summary(strategy))
    log.info("What is known of every sample: %s", path)

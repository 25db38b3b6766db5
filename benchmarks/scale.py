#!/usr/bin/env python3
"""What selection, record and checkpoints cost with hundreds of millions of samples and hundreds of ranks.

One process does, for real, what one rank of such a run has to do: it holds the whole store, and gets what an all_gather
over all ranks would give it. What needs the other ranks is computed. docs/results/scale.md has the formulas.

    python benchmarks/scale.py [--samples 100000000 400000000] [--ranks 512] [--batch-sizes 1024 4096] [--folder DIR]
        [--parts store gather checkpoint loader record skipped lists]

`--folder` is where the files are written; it needs 8 bytes a sample, and the machine 20 bytes of memory a sample.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import report
from torch import Tensor

from dissect_clip.checkpoint import CheckpointWriter, Plan, Policy, load_checkpoint, pack
from dissect_clip.config.parser import parse_args
from dissect_clip.config.settings import Config
from dissect_clip.data.batch import Batch
from dissect_clip.data.sampling.bitmap import Bitmap, count_set, empty_bitmap, inverted, set_bits
from dissect_clip.data.sampling.plan import RemainderPlan, ShardSubset, SpanPlan, SubsetPlan
from dissect_clip.data.sampling.progress import WorkerProgress, pack_all, unpack_all
from dissect_clip.data.sampling.shard_ids import ShardIndex
from dissect_clip.data.sampling.subset import SampleNames, read_list
from dissect_clip.data.sampling.workers import WorkerInfo, count_batches
from dissect_clip.data.skip_log import SkipLog
from dissect_clip.data.skips import Skip, SkipRow, pack_rows
from dissect_clip.distributed.world import World
from dissect_clip.selection import STRATEGIES, Candidates, Choice
from dissect_clip.selection.state import SelectionState
from dissect_clip.selection.store import ScoreStore, last_occurrence
from dissect_clip.training.record import Recorder
from dissect_clip.training.step import Counters

SHARD = 10_000
"""Samples in a shard, as img2dataset makes them."""

COLUMN = ("clip_score",)
"""What DISSect's strategies remember."""


def seconds(work: Callable[..., object], *arguments: object, turns: int = 5) -> float:
    """The least of some turns: the machine may have other things to do."""
    spent = []
    for _ in range(turns):
        began = time.perf_counter()
        work(*arguments)
        spent.append(time.perf_counter() - began)
    return min(spent)


def once(work: Callable[..., object], *arguments: object) -> float:
    return seconds(work, *arguments, turns=1)


def peak_memory() -> int:
    """Bytes of main memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def draw_ids(samples: int, ranks: int, size: int, random: np.random.Generator) -> Tensor:
    """[ranks * size] int64: each rank reads a shard or two through a shuffle buffer."""
    window = max(SHARD, 2 * size)
    starts = random.integers(0, samples - window, ranks)
    return torch.from_numpy((starts[:, None] + random.integers(0, window, (ranks, size))).reshape(-1))


def world_with(gathered: Tensor, ranks: int) -> World:
    """A rank of many, whose all_gather gives ``gathered``."""

    class Simulated(World):
        def all_gather(self, rows: Tensor) -> Tensor:
            return gathered

    return Simulated(size=ranks)


def store(options: argparse.Namespace) -> None:
    """Allocation, and what a step does with the store on each rank."""
    random = np.random.default_rng(0)
    for samples in options.samples:
        allocate = seconds(ScoreStore, samples, COLUMN, World())
        table = ScoreStore(samples, COLUMN, World())
        for size in options.batch_sizes:
            ids = draw_ids(samples, options.ranks, size, random)
            scores = torch.rand(len(ids), len(COLUMN))
            table.world = world_with(packed(ids, scores), options.ranks)
            report(
                "scale_store",
                samples=samples,
                ranks=options.ranks,
                batch_size=size,
                bytes=table.scores.nbytes,
                allocate_seconds=round(allocate, 3),
                read_seconds=round(seconds(table.read, ids[:size]), 6),
                write_seconds=round(seconds(table.write, ids[:size], scores[:size]), 4),
                of_it_last_occurrence_seconds=round(seconds(last_occurrence, ids), 4),
                peak_memory_bytes=peak_memory(),
            )


def gather(options: argparse.Namespace) -> None:
    """The exchange of scores, computed: W * N * (2 + C) * 4 bytes on each rank and step."""
    for size in options.batch_sizes:
        received = options.ranks * size * (2 + len(COLUMN)) * 4
        kept = round(options.select_rate * size)
        features = options.ranks * kept * 2 * options.features * 4
        report(
            "scale_gather_computed",
            ranks=options.ranks,
            batch_size=size,
            bytes=received,
            seconds=round(received / options.bandwidth / 1e9, 5),
            bandwidth_gigabytes_per_second=options.bandwidth,
            loss_features_bytes=features,
            loss_features_dimensions=options.features,
            select_rate=options.select_rate,
        )


def packed(ids: Tensor, scores: Tensor) -> Tensor:
    """Rows as the store exchanges them."""
    return torch.cat([ids.view(torch.int32).reshape(-1, 2), scores.view(torch.int32)], dim=1)


def settings() -> Config:
    words = ["--dataset-type", "synthetic", "--train-num-samples", "1", "--save-every-n-steps", "1", "--epochs", "9"]
    return parse_args([*words, "--device", "cpu"], STRATEGIES)


def checkpoint(options: argparse.Namespace) -> None:
    """A step checkpoint without a model: how long it stops the training, and how long the file takes."""
    for samples in options.samples:
        table = ScoreStore(samples, COLUMN, World())
        content = pack(
            {"state_dict": {"w": torch.zeros(1)}, "selection": table.state_dict()},
            dict.fromkeys(("state_dict", "selection"), SelectionState(None, 0, Counters())),
            name="scale",
            model="none",
        )
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            writer = CheckpointWriter(Path(name), Policy(settings().checkpoint, epochs=9))
            stops, writes = [], []
            for step in range(1, 5):
                began = time.perf_counter()
                writer.save(Plan((f"epoch_0_step_{step}",), (0, step)), content)
                stops.append(time.perf_counter() - began)
                writes.append(once(writer.wait))
            writer.close()
            (scores,) = Path(name).glob("*.safetensors")
            (path,) = Path(name).glob("*.pt")
            report(
                "scale_checkpoint",
                samples=samples,
                scores_bytes=scores.stat().st_size,
                first_stop_seconds=round(stops[0], 3),
                stop_seconds=round(min(stops[1:]), 3),
                write_seconds=round(min(writes), 3),
                read_seconds=round(seconds(resume, table, path), 3),
                peak_memory_bytes=peak_memory(),
            )


def resume(table: ScoreStore, path: Path) -> None:
    table.load_state_dict(load_checkpoint(path).parts["selection"])


def loader(options: argparse.Namespace) -> None:
    """What a step checkpoint needs to know of the loaders, and what it costs to keep it."""
    random = np.random.default_rng(0)
    counts, position = (0,) * len(Skip), (1, 1, 1)
    stands = [WorkerProgress(number % 8, counts=counts, position=position) for number in range(8 * options.ranks)]
    progress = pack_all(stands)
    size = max(options.batch_sizes)
    place = WorkerInfo(rank=options.ranks // 2, world_size=options.ranks, worker=0, workers=8)
    for samples in options.samples:
        bits = empty_bitmap(samples)
        sizes = np.full(samples // SHARD, SHARD, np.int64)
        whole = SpanPlan(sizes, count_batches(samples, size, options.ranks), size, seed=0)
        rest = RemainderPlan(whole, bits, whole.num_batches)
        report(
            "scale_loader",
            samples=samples,
            ranks=options.ranks,
            batch_size=size,
            visited_bytes=bits.nbytes,
            mark_seconds=round(seconds(set_bits, bits, draw_ids(samples, 1, size, random).numpy()), 6),
            count_seconds=round(seconds(count_set, bits), 3),
            union_repack_seconds=round(seconds(repack, bits), 3),
            union_reduced_bytes_computed=8 * bits.nbytes,
            plan_seconds=round(seconds(whole.slices, place, 0, 0), 4),
            plan_of_the_rest_seconds=round(once(rest.slices, place, 0, 0), 3),
            workers=len(stands),
            workers_bytes=progress.nbytes,
            workers_unpack_seconds=round(seconds(unpack_all, progress), 3),
        )


def repack(bits: Bitmap) -> None:
    """What the ranks do to bring their flags together, but for the exchange; in parts, as they do."""
    for begin in range(0, len(bits), 1 << 20):
        np.packbits(np.unpackbits(bits[begin : begin + (1 << 20)]))


def recorded(samples: int, ids: Tensor) -> tuple[Batch, Choice]:
    """A batch with the names that img2dataset gives, and scores as a trained model has them."""
    digits = 10 ** torch.arange(8, -1, -1)
    key = (ids[:, None] // digits % 10 + ord("0")).to(torch.uint8)
    score = torch.randn(len(ids)) * 0.05 + 0.25
    memory = (score + torch.randn(len(ids)) * 0.02)[:, None] * 100
    candidates = Candidates(epoch=1, generator=torch.Generator(), memory=memory, similarity=score)
    kept = torch.randperm(len(ids))[: int(0.3 * len(ids))].sort().values
    return Batch(torch.empty(0), torch.empty(0), ids, key), Choice(kept, candidates=candidates)


def record(options: argparse.Namespace) -> None:
    """Rank 0's part of --record: the rows of all ranks to Parquet."""
    random = np.random.default_rng(0)
    samples = max(options.samples)
    names = [f"{number:05d}.tar" for number in range(samples // SHARD)]
    index = ShardIndex(tuple(names), np.full(len(names), SHARD, np.int64), "")
    size = min(options.batch_sizes)
    batches = [recorded(samples, draw_ids(samples, options.ranks, size, random)) for _ in range(6)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        # One rank with the rows of all: what comes after the gather is the same.
        recorder = Recorder(Path(folder), World(), names, index.locate, COLUMN)
        recorder.begin(0)
        spent = [once(recorder.append, *batch) for batch in batches]
        recorder.end()
        rows = sum(len(batch.sample_id) for batch, _ in batches)
        written = (Path(folder) / "epoch_00000.parquet").stat().st_size
    key = batches[0][0].key
    assert key is not None
    report(
        "scale_record",
        samples=samples,
        rows=rows,
        rows_per_second=round(rows / len(batches) / min(spent)),
        bytes_per_row=round(written / rows, 2),
        gathered_bytes_per_row_computed=8 + 1 + 4 * (2 + len(COLUMN)) + key.shape[1],
        peak_memory_bytes=peak_memory(),
    )


def skipped(options: argparse.Namespace) -> None:
    """Left-out samples: on the rank that meets them, and to the file on rank 0."""
    samples = 250_000
    reason = "its image is of no known format"
    rows = [SkipRow(int(Skip.BAD_IMAGE), f"{n // 500:05d}.tar", f"{n * 20:09d}", reason, 1) for n in range(samples)]
    packed = [pack_rows(rows[first : first + 200]) for first in range(0, samples, 200)]  # 5 % of batches of 4,096
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        log = SkipLog(Path(folder), World())
        adds, ends = [], []
        for epoch in range(3):
            log.begin(epoch)
            adds.append(sum(once(log.add, part) for part in packed))
            ends.append(once(log.end))
        written = (Path(folder) / "epoch_00000.parquet").stat().st_size
    report(
        "scale_skipped",
        rows=samples,
        waiting_bytes_per_row=round(sum(map(len, packed)) / samples, 1),
        add_seconds_per_row=round(min(adds) / samples, 8),
        write_seconds_per_row=round(min(ends) / samples, 8),
        file_bytes_per_row=round(written / samples, 2),
    )


def lists(options: argparse.Namespace) -> None:
    """What a list of a quarter of the samples costs at the start of a run, and in an epoch."""
    random = np.random.default_rng(0)
    size = max(options.batch_sizes)
    for samples in options.samples:
        sizes = np.full(samples // SHARD, SHARD, np.int64)
        names = SampleNames([f"{number:05d}.tar" for number in range(len(sizes))], sizes, lambda place: iter(()))
        ids = np.flatnonzero(random.random(samples, np.float32) < 0.25)
        for order in ("sorted", "random"):
            if order == "random":
                random.shuffle(ids)
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                path = Path(folder, "list.parquet")
                pq.write_table(pa.table({"sample_id": ids}), path)
                file_bytes, began = path.stat().st_size, time.perf_counter()
                left_out = inverted(read_list(str(path), names, "--train-keep"), samples)
                read_seconds = time.perf_counter() - began
            count_seconds = once(ShardSubset.of, sizes, left_out)
            kept = ShardSubset.of(sizes, left_out)
            plan = SubsetPlan(kept, count_batches(len(ids), size, options.ranks), size, seed=0)
            alone = SubsetPlan(kept, count_batches(len(ids), size, 1), size, seed=0)
            part = plan.slices(WorkerInfo(0, options.ranks, 0, 8), 0, 0)[0]
            report(
                "scale_lists",
                samples=samples,
                kept=len(ids),
                order=order,
                file_bytes=file_bytes,
                read_seconds=round(read_seconds, 2),
                bytes_on_every_rank=left_out.nbytes,
                count_seconds=round(count_seconds, 3),
                plan_seconds=round(seconds(plan.parts, WorkerInfo(0, options.ranks, 0, 8), 0, 0), 5),
                plan_of_8_workers_seconds=round(seconds(alone.parts, WorkerInfo(0, 1, 0, 8), 0, 0), 4),
                unpack_a_shard_seconds=round(seconds(list, part.ordinals), 6),
            )


PARTS = {part.__name__: part for part in (store, gather, checkpoint, loader, record, skipped, lists)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000_000, 400_000_000])
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--features", type=int, default=512, help="dimensions, for comparison with the loss's gather")
    parser.add_argument("--select-rate", type=float, default=0.3)
    parser.add_argument("--bandwidth", type=float, default=12.5, help="gigabytes a second into each rank")
    parser.add_argument("--folder", type=Path, help="where files are written (default: the system's temporary folder)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The score store and the step against the size of the data set: flat is the claim.

    python benchmarks/store.py [--samples 100000 1000000 10000000 100000000] [--large] [--batch-size 4096]
        [--ranks 1 8] [--processes 2] [--rates 0.3 1.0] [--parts store step]

`store`: seconds of reading a rank's batch and of writing what all ranks have scored, at a fixed batch. `exchange` says
where the other ranks' rows come from: `none` for a single rank, `simulated` for rows as an all_gather would give them
(all but the network), `gloo` for an all_gather among `--processes` real processes on this machine.

`step`: seconds of a whole training step of `--model` with DISSect, on batches drawn from data sets of each size, for
one process and for `--processes`, at each rate. The sizes take turns; `flat` is the largest size's step over the
smallest one's, turn by turn.

A store takes 4 bytes a sample and column on every rank; `--large` adds a billion samples. scale.py computes what 512
ranks need.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import in_turns, quartiles, ratios, report
from scale import COLUMN, draw_ids, packed, world_with
from step_cost import make_batch, make_state, step_seconds
from torch import Tensor

from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.selection.store import ScoreStore


def timed(work: Callable[..., object], *arguments: object) -> float:
    """Seconds."""
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def measure(
    options: argparse.Namespace, samples: int, world: World, exchange: str, batches: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Reading and writing with a store of some size; ``batches`` are ids and scores of all ranks, one for each turn."""
    table = ScoreStore(samples, COLUMN, world)
    size = options.batch_size
    own = slice(world.rank * size, (world.rank + 1) * size)
    reads, writes = [], []
    for ids, scores in batches:
        if exchange == "simulated":
            table.world = world_with(packed(ids, scores), len(ids) // size)
        reads.append(timed(table.read, ids[own]))
        writes.append(timed(table.write, ids[own], scores[own]))
    return {
        "bytes_per_sample": table.scores.nbytes / samples,
        "read_seconds": quartiles(reads[1:], 7),  # the first turn touches memory for the first time
        "write_seconds": quartiles(writes[1:], 7),
    }


def draw_batches(options: argparse.Namespace, samples: int, ranks: int) -> list[tuple[Tensor, Tensor]]:
    """The same on all processes: ids and scores of all ranks, for every turn and one more."""
    random = np.random.default_rng(0)
    drawn = [draw_ids(samples, ranks, options.batch_size, random) for _ in range(options.turns + 1)]
    return [(ids, torch.rand(len(ids), len(COLUMN))) for ids in drawn]


def report_store(options: argparse.Namespace, world: World, ranks: int, exchange: str) -> None:
    """Lines of all sizes. Collective where there are several processes."""
    for samples in options.samples:
        batches = draw_batches(options, samples, ranks)
        figures = measure(options, samples, world, exchange, batches)
        if world.is_main:
            common = {"batch_size": options.batch_size, "turns": options.turns}
            report("store", samples=samples, ranks=ranks, exchange=exchange, **common, **figures)


def report_step(options: argparse.Namespace, world: World) -> None:
    """Lines of all rates. Collective where there are several processes."""
    for rate in options.rates:
        state = make_state(options, "exact", rate, options.step_batch_size, world)
        state.counters.epoch = 1
        assert state.selection is not None
        state.selection.start_epoch(1)
        batch = make_batch(state, options.step_batch_size)
        stores = {samples: ScoreStore(samples, state.selection.store.columns, world) for samples in options.samples}
        works = {str(samples): stepper(state, batch, store) for samples, store in stores.items()}
        times = in_turns(works, options.turns, warm=2)
        if world.is_main:
            smallest, largest = (str(end(options.samples)) for end in (min, max))
            report(
                "step_size",
                model=options.model,
                batch_size=options.step_batch_size,
                processes=world.size,
                rate=rate,
                turns=options.turns,
                seconds={samples: quartiles(found, 5) for samples, found in times.items()},
                flat=quartiles(ratios(times[largest], times[smallest])),
            )


def stepper(state: Any, batch: Batch, store: ScoreStore) -> Callable[[], float]:
    """A step with a store of some size, on samples from all over it."""
    ids = torch.randint(len(store.scores), (len(batch),), generator=torch.Generator().manual_seed(0))
    here = Batch(batch.image, batch.text, ids.to(batch.image.device))

    def step() -> float:
        state.selection.store, state.selection.num_samples = store, len(store.scores)
        return step_seconds(state, here)

    return step


PARTS = ("store", "step")


def one_of_many(rank: int, options: argparse.Namespace, port: int) -> None:
    """What a process does that is one of several."""
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=options.processes)
    world = World(rank=rank, local_rank=rank, size=options.processes)
    if "store" in options.parts:
        report_store(options, world, world.size, "gloo")
    if "step" in options.parts:
        report_step(options, world)
    dist.destroy_process_group()


def free_port() -> int:
    """A port that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**5, 10**6, 10**7, 10**8])
    parser.add_argument("--large", action="store_true", help="10^9 samples, too: 4 GB for each process")
    parser.add_argument("--batch-size", type=int, default=4096, help="store: samples of a rank")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 8], help="store: worlds, simulated")
    parser.add_argument("--processes", type=int, default=2, help="real ones; 1 leaves them out")
    parser.add_argument("--model", default="RN-tiny", help="step")
    parser.add_argument("--step-batch-size", type=int, default=128, help="step: samples of a rank")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 1.0], help="step")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(argv)
    if options.large:
        options.samples.append(10**9)
    options.device, options.precision, options.cheap_flags = "cpu", "fp32", []
    torch.set_num_threads(options.threads)
    if "store" in options.parts:
        for ranks in options.ranks:
            report_store(options, World(), ranks, "none" if ranks == 1 else "simulated")
    if "step" in options.parts:
        report_step(options, World())
    if options.processes > 1:
        here = os.path.dirname(os.path.abspath(__file__))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        mp.spawn(one_of_many, (options, free_port()), nprocs=options.processes)


if __name__ == "__main__":
    main()

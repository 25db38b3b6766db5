#!/usr/bin/env python3
"""What checkpoints inside an epoch cost: wall clock of training with them over training without.

    python benchmarks/save_overhead.py [DATA] [--model RN-tiny] [--batch-size 128] [--every 50] [--turns 24]
                                       [--parameters 150000000] [--samples 12000000] [--folder FOLDER]

DATA is a pattern of shards; without it the pairs are synthetic. One process trains with a strategy that remembers, in
turns of as many epochs as take a save: in one turn it saves every `--every` steps, in the next never, and so on, so
that whatever else the machine does falls on both. The clock of a turn runs until its last checkpoint is on the disk.
`wall` is the ratio of the two, of which median and quartiles are reported. Other programs disturb that more than saving
does, so there are two shares of the time besides: `stopped`, for which saving stopped the step, and `background`, for
which the writing thread had a processor. Where all processors are busy their sum is what saving costs.

Then a state of `--parameters` parameters with two moments each and a score store of `--samples` samples and two columns
is saved alone: seconds that the step is stopped at the first save, which takes the memory, and at a later one; seconds
that the write takes in the background; and the longest that a loop in Python was held up meanwhile.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import report

from dissect_clip.checkpoint import CheckpointWriter, Plan, Policy, Saver, pack
from dissect_clip.cli.training_run import build_state, parts_of
from dissect_clip.config.parser import parse_args
from dissect_clip.config.settings import Config
from dissect_clip.data import TrainData, build_train
from dissect_clip.distributed.world import World
from dissect_clip.models.build import build_model
from dissect_clip.run.folder import RunFolder
from dissect_clip.run.remote_sync import NoSync
from dissect_clip.run.reporters import Reporters
from dissect_clip.selection import STRATEGIES
from dissect_clip.selection.state import SelectionState
from dissect_clip.selection.store import ScoreStore
from dissect_clip.training.epoch import train_epoch
from dissect_clip.training.step import Counters, TrainState


def make_config(options: argparse.Namespace) -> Config:
    source = ["--train-data", options.data]
    if options.data is None:
        source = ["--dataset-type", "synthetic", "--train-num-samples", "6400"]
    words = ["--model", options.model, "--batch-size", str(options.batch_size), "--workers", "1", "--device", "cpu"]
    words += ["--precision", "fp32", "--log-every-n-steps", "1000000", "--save-every-n-steps", str(options.every)]
    words += ["--save-frequency", "0", "--select", "--warmup-point", "1", "--epochs", "1000"]
    return parse_args([*source, *words], STRATEGIES)


class TimedSaver(Saver):
    """Counts its saves, and how long they stop the training."""

    stopped = 0.0
    saves = 0

    def save(self) -> None:
        began = time.perf_counter()
        super().save()
        self.stopped += time.perf_counter() - began
        self.saves += 1


class Run:
    """A run that trains a turn at a time."""

    def __init__(self, config: Config, folder: Path) -> None:
        world = World()
        model = build_model(config, world)
        self.data: TrainData = build_train(config, world, model.preprocess_train, model.tokenizer, folder)
        run = RunFolder(folder, "run", None)
        run.checkpoints.mkdir(parents=True)
        self.steps = self.data.num_batches // config.training.accum_freq
        self.state: TrainState = build_state(config, world, model, self.data, run, self.steps)
        parts = parts_of(self.state, self.data, self.steps)
        self.saver = TimedSaver(parts, self.state.counters, config, world, run, NoSync())
        assert self.saver.writer is not None
        self.writer = self.saver.writer
        self.epochs_per_turn = math.ceil(config.checkpoint.save_every_n_steps / self.steps)

    def train(self, saving: bool) -> float:
        """One turn; seconds."""
        began = time.perf_counter()
        for _ in range(self.epochs_per_turn):
            train_epoch(self.state, self.data, Reporters(), self.saver if saving else None)
            if saving:
                self.saver.after_epoch(stopping=False)
        self.writer.wait()
        return time.perf_counter() - began

    def written(self) -> float:
        """Seconds that the writing thread has had a processor."""
        return self.writer._thread.submit(time.thread_time).result()


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def measure_training(options: argparse.Namespace, folder: Path) -> None:
    run = Run(make_config(options), folder)
    run.train(True)  # what only the first time takes
    run.saver.stopped, run.saver.saves, written = 0.0, 0, run.written()
    turns = []
    for turn in range(options.turns):
        order = (True, False) if turn % 2 else (False, True)
        times = {saving: run.train(saving) for saving in order}
        turns.append((times[True], times[False]))
    seconds = sum(saving for saving, _ in turns)
    report(
        "save_overhead",
        data="shards" if options.data else "synthetic",
        model=options.model,
        batch_size=options.batch_size,
        every=options.every,
        steps=run.steps * run.epochs_per_turn * options.turns,
        saves=run.saver.saves,
        seconds=round(seconds, 1),
        wall=spread([saving / without for saving, without in turns]),
        stopped=round(run.saver.stopped / seconds, 5),
        background=round((run.written() - written) / seconds, 5),
        checkpoint_bytes=sum(path.stat().st_size for path in run.writer.folder.iterdir()),
    )
    run.writer.close()


def longest_gap(until: Callable[[], bool]) -> float:
    """The longest that a loop in Python stands still."""
    longest, last = 0.0, time.perf_counter()
    while not until():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def measure_saving(options: argparse.Namespace, folder: Path) -> None:
    matrices = max(1, options.parameters // 10**6)
    weights = {f"w{n}": torch.rand(options.parameters // matrices) for n in range(matrices)}
    moments = {n: {"exp_avg": w.clone(), "exp_avg_sq": w.clone()} for n, w in enumerate(weights.values())}
    store = ScoreStore(options.samples, ("score", "step"), World())
    content = pack(
        {"state_dict": weights, "optimizer": {"state": moments}, "selection": store.state_dict()},
        dict.fromkeys(("state_dict", "optimizer", "selection"), SelectionState(None, 0, Counters())),
        name="none",
        model="none",
    )
    writer = CheckpointWriter(folder, Policy(Config().checkpoint, epochs=9))
    stopped, written, gaps = [], [], []
    for step in range(3):
        began = time.perf_counter()
        writer.save(Plan((f"epoch_0_step_{step + 1}",), (0, step + 1)), content)
        stopped.append(time.perf_counter() - began)
        gaps.append(longest_gap(writer._pending.done))
        written.append(time.perf_counter() - began - stopped[-1])
    writer.close()
    report(
        "save_alone",
        parameters=options.parameters,
        samples=options.samples,
        bytes=sum(path.stat().st_size for path in folder.iterdir()),
        first_stop_seconds=round(stopped[0], 3),
        stop_seconds=round(min(stopped[1:]), 3),
        write_seconds=round(min(written[1:]), 2),
        longest_gap_seconds=round(min(gaps[1:]), 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--model", default="RN-tiny")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--parameters", type=int, default=150_000_000)
    parser.add_argument("--samples", type=int, default=12_000_000)
    parser.add_argument("--folder", help="of the disk to write to (default: that of temporary files)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure_training(options, Path(folder))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure_saving(options, Path(folder))


if __name__ == "__main__":
    main()

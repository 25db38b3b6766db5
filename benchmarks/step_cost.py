#!/usr/bin/env python3
"""What a step costs with selection, in units of a step on the whole batch, scoring included.

One process, data in memory: compute alone. For every rate the steps of all variants take turns, so that whatever else
the machine does falls on all of them; a ratio is taken within each turn, and its median and quartiles are reported.

    python benchmarks/step_cost.py [--model RN-tiny] [--batch-size 256] [--rates 0.1 0.3 0.5 0.7 1.0] [--device cuda]

For each rate: `selected` is a step with the scoring pass and selection (warmup_base_sampling past its warm-up), `given`
the same step with the choice given (random), both over `full`, a step on all samples. `limit` is the rate itself.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import report

from dissect_clip.batch import Batch
from dissect_clip.cli import build_state
from dissect_clip.clock import PhaseClock
from dissect_clip.config import Config, parse_args
from dissect_clip.dist import World
from dissect_clip.model import build_model
from dissect_clip.selection import summaries
from dissect_clip.train import TrainState, train_step


class MemoryData:
    """As much of TrainData as a state is built from."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples


def make_config(options: argparse.Namespace, *flags: str) -> Config:
    words = ["--dataset-type", "synthetic", "--train-num-samples", str(options.batch_size), "--model", options.model]
    words += ["--batch-size", str(options.batch_size), "--precision", options.precision, "--device", options.device]
    return parse_args([*words, "--logs", "none", *flags], summaries())


def make_state(options: argparse.Namespace, *flags: str) -> TrainState:
    config, world = make_config(options, *flags), World(device=torch.device(options.device))
    state = build_state(config, world, build_model(config, world), MemoryData(options.batch_size), None, 100)
    state.model.train()
    state.counters.epoch = 1  # after the warm-up
    return state


def make_batch(state: TrainState, size: int) -> Batch:
    side = state.module.visual.image_size
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    random = torch.Generator().manual_seed(0)
    text = torch.randint(1, 49000, (size, state.module.context_length), generator=random)
    text[:, -1] = 49407
    image = torch.randn(size, 3, height, width, generator=random)
    return Batch(image, text, torch.arange(size)).to(state.world.device, state.input_dtype)


def seconds(state: TrainState, batch: Batch) -> float:
    clock = PhaseClock(state.world.device)
    train_step(state, [batch], clock)
    return sum(clock.totals().values())


def ratios(turns: list[tuple[float, ...]], place: int) -> dict[str, float]:
    values = [turn[place] / turn[0] for turn in turns]
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="RN-tiny")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 1.0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    began = time.perf_counter()
    full = make_state(options)
    batch = make_batch(full, options.batch_size)
    for rate in options.rates:
        flags = ("--select", "--select-rate", str(rate))
        selected = make_state(options, *flags, "--warmup-point", "1")
        given = make_state(options, *flags, "--select-strategy", "random")
        states = (full, selected, given)
        turns = [tuple(seconds(state, batch) for state in states) for _ in range(options.turns + 2)][2:]
        report(
            "step_cost",
            model=options.model,
            batch_size=options.batch_size,
            precision=options.precision,
            rate=rate,
            limit=rate,
            selected=ratios(turns, 1),
            given=ratios(turns, 2),
            turns=options.turns,
        )
    print(f"# {time.perf_counter() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()

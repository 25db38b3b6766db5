#!/usr/bin/env python3
"""What a step costs with selection, in units of a step on the whole batch, scoring included.

    python benchmarks/step_cost.py [--model RN-tiny] [--batch-size 256] [--rates 0.1 0.3 0.5 0.7 1.0] [--device cuda]
    python benchmarks/step_cost.py --loading [--workers 1] [--image-side 256] [--steps 8]

For each rate the steps of all modes take turns, so that whatever else the machine does falls on all of them; a ratio is
taken within each turn, and its median and quartiles are reported. `cost` is over `full`, a step on all samples. `given`
is the same step with the choice given (random), and `overhead` a mode's cost minus that. `limit` is the rate itself.

Without `--loading` it is compute alone, one step a turn, with the batch in memory. With it a turn is a whole epoch of
`--steps` steps over shards that are made for it, loader workers and all; `seconds` has its phases, medians. An epoch
before the turns, in which everything is scored, does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import flags, in_turns, quartiles, ratios, report, write_shards

from dissect_clip.cli.training_run import build_state
from dissect_clip.config.parser import parse_args
from dissect_clip.config.settings import Config
from dissect_clip.data import build_train
from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.models.build import build_model
from dissect_clip.run.reporters import Reporters
from dissect_clip.selection import STRATEGIES
from dissect_clip.training.epoch import train_epoch
from dissect_clip.training.step import TrainState, train_step
from dissect_clip.training.timer import PHASES, PhaseClock

DISSECT = ("--select", "--select-strategy", "warmup_base_sampling", "--warmup-point", "1")

CLEAN = ("--select", "--select-strategy", "clean_posterior")

MODES: dict[str, tuple[str, ...]] = {
    "full": (),
    "given": ("--select", "--select-strategy", "random"),
    "exact": DISSECT,
    "cheap": DISSECT,
    "refresh 0.2": (*DISSECT, "--score-refresh", "0.2"),
    "refresh 0.1": (*DISSECT, "--score-refresh", "0.1"),
    "refresh 0": (*DISSECT, "--score-refresh", "0"),
    "before load": (*DISSECT, "--score-refresh", "0", "--select-before-load"),
    "clean posterior": (*CLEAN, "--warmup-point", "1", "--clean-decoys", "0.2"),
}
"""What is compared, and the flags of each; the rate comes besides, and for `cheap` the flags of CHEAP."""

CHEAP: dict[str, tuple[str, ...]] = {
    "ViT-tiny": ("--score-image-size", "16", "--score-context-length", "16"),
    "ViT-B-16": ("--score-image-size", "112", "--score-context-length", "32"),
    "RN50": ("--score-image-size", "128", "--score-context-length", "32"),
}
"""A cheaper scoring pass for a model; for any other ANY_CHEAP."""

ANY_CHEAP = ("--score-context-length", "16")


class MemoryData:
    """As much of TrainData as a state is built from."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = self.subset_size = num_samples

    def subset_ids(self, numbers: torch.Tensor) -> torch.Tensor:
        """The ids of samples by their numbers: all are trained on."""
        return numbers


def make_config(options: argparse.Namespace, mode: str, rate: float, **changes: Any) -> Config:
    """Settings of a run in a mode."""
    settings = {
        "model": options.model, "batch-size": options.batch_size, "precision": options.precision,
        "device": options.device, "logs": "none", "log-every-n-steps": 10**6, "epochs": 1000,
    }  # fmt: skip
    data = {"dataset-type": "synthetic", "train-num-samples": options.batch_size}
    words = flags(settings | (changes or data))
    own = [*MODES[mode], *(["--select-rate", str(rate)] if MODES[mode] else [])]
    if mode == "cheap":
        own += options.cheap_flags
    return parse_args([*words, *own], STRATEGIES)


def make_state(
    options: argparse.Namespace, mode: str, rate: float, num_samples: int, world: World | None = None
) -> TrainState:
    """A run that is ready to step, on data in memory."""
    config = make_config(options, mode, rate)
    world = World(device=torch.device(options.device)) if world is None else world
    state = build_state(config, world, build_model(config, world), MemoryData(num_samples), None, 100)
    state.model.train()
    if state.selection is not None:
        state.selection.start_epoch(0)
    return state


def image_shape(state: TrainState) -> tuple[int, int]:
    """Height and width of the model's images."""
    side = state.module.visual.image_size
    return tuple(side) if isinstance(side, (tuple, list)) else (side, side)


def make_text(state: TrainState, size: int, random: torch.Generator) -> torch.Tensor:
    """Captions ``[size, L]`` as long as the model takes: random tokens, and the last token of CLIP's vocabulary."""
    text = torch.randint(1, 49000, (size, state.module.context_length), generator=random)
    text[:, -1] = 49407
    return text


def make_batch(state: TrainState, size: int) -> Batch:
    """Noise, and captions as long as the model takes."""
    random = torch.Generator().manual_seed(0)
    text = make_text(state, size, random)
    image = torch.randn(size, 3, *image_shape(state), generator=random)
    return Batch(image, text, torch.arange(size)).to(state.world.device, state.input_dtype)


def as_loaded(state: TrainState, batch: Batch) -> Batch:
    """What a loader would give of a batch: with a choice before loading only what is worth it. Decoys are in it."""
    if state.selection is not None:
        batch = dataclasses.replace(batch, text=state.selection.swap_captions(batch.sample_id, batch.text))
    if state.preselector is None:
        return batch
    size = len(batch)
    choice = state.preselector(batch.sample_id.cpu(), torch.ones(size, dtype=torch.bool), state.counters.epoch, 0)
    part = batch.take(choice.order[: choice.count].to(batch.image.device))
    return dataclasses.replace(part, num_read=size)


def step_seconds(state: TrainState, batch: Batch) -> float:
    """Seconds of one step."""
    clock = PhaseClock(state.world.device)
    train_step(state, [batch], clock)
    return sum(clock.totals().values())


def stepper(options: argparse.Namespace, mode: str, rate: float, batch: Batch) -> Callable[[], float]:
    """A step after the warm-up, when every sample of the batch has been scored once."""
    state = make_state(options, mode, rate, options.batch_size)
    step_seconds(state, as_loaded(state, batch))
    state.counters.epoch = 1
    if state.selection is not None:
        state.selection.start_epoch(1)
    if state.preselector is not None and state.selection is not None:
        state.preselector.publish(state.selection.store.scores, state.selection.survey)
    loaded = as_loaded(state, batch)
    return lambda: step_seconds(state, loaded)


class EpochRun:
    """A run that trains an epoch at a time, loading included."""

    def __init__(self, options: argparse.Namespace, mode: str, rate: float, shards: str) -> None:
        config = make_config(options, mode, rate, **{"train-data": shards, "workers": options.workers})
        world = World(device=torch.device(options.device))
        model = build_model(config, world)
        self.data = build_train(config, world, model.preprocess_train, model.tokenizer, None)
        self.state = build_state(config, world, model, self.data, None, self.data.num_batches)
        self.data.stream.preselector = self.state.preselector
        self.phases: list[dict[str, float]] = []

    def __call__(self) -> float:
        """Seconds of an epoch."""
        before = dict(self.state.counters.seconds)
        began = time.perf_counter()
        train_epoch(self.state, self.data, Reporters())
        seconds = time.perf_counter() - began
        after = self.state.counters.seconds
        self.phases.append({phase: after[phase] - before[phase] for phase in PHASES})
        return seconds

    def medians(self, turns: int) -> dict[str, float]:
        """Seconds by phase, of the last turns."""
        last = self.phases[-turns:]
        return {phase: round(statistics.median(row[phase] for row in last), 4) for phase in PHASES}


def compare(times: dict[str, list[float]]) -> dict[str, Any]:
    """Costs over ``full``, and what is above ``given``; all turn by turn."""
    full, given = times["full"], times["given"]
    cost = {mode: ratios(found, full) for mode, found in times.items() if mode != "full"}
    above = {mode: ratios([a - b for a, b in zip(times[mode], given, strict=True)], full) for mode in cost}
    return {
        "cost": {mode: quartiles(found) for mode, found in cost.items()},
        "overhead": {mode: quartiles(found) for mode, found in above.items() if mode != "given"},
        "full_seconds": quartiles(full, 4),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="RN-tiny")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="besides full and given")
    parser.add_argument("--cheap-flags", type=shlex.split, help="of the mode `cheap` (default: by the model)")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--precision", default="amp_bf16" if on_gpu else "fp32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--loading", action="store_true", help="whole epochs, with the loader")
    parser.add_argument("--workers", type=int, default=1, help="--loading: loader processes")
    parser.add_argument("--steps", type=int, default=8, help="--loading: steps of an epoch")
    parser.add_argument("--image-side", type=int, default=256, help="--loading: pixels of the JPEGs")
    options = parser.parse_args(argv)
    if options.cheap_flags is None:
        options.cheap_flags = list(CHEAP.get(options.model, ANY_CHEAP))
    options.modes = list(dict.fromkeys(["full", "given", *options.modes]))
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    common = {name: getattr(options, name) for name in ("model", "batch_size", "precision", "turns", "cheap_flags")}
    began = time.perf_counter()
    if options.loading:
        with tempfile.TemporaryDirectory() as folder:
            shards = write_shards(Path(folder), options.batch_size * options.steps, options.image_side)
            for rate in options.rates:
                runs = {mode: EpochRun(options, mode, rate, shards) for mode in options.modes}
                found = compare(in_turns(dict(runs), options.turns, warm=2))
                phases = {mode: run.medians(options.turns) for mode, run in runs.items()}
                loading = {name: getattr(options, name) for name in ("workers", "steps", "image_side")}
                report("epoch_cost", **common, **loading, rate=rate, limit=rate, **found, seconds=phases)
    else:
        batch = make_batch(make_state(options, "full", 1.0, options.batch_size), options.batch_size)
        for rate in options.rates:
            works = {mode: stepper(options, mode, rate, batch) for mode in options.modes}
            found = compare(in_turns(works, options.turns, warm=2))
            report("step_cost", **common, rate=rate, limit=rate, **found)
    print(f"# {time.perf_counter() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()

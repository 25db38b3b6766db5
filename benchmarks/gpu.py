#!/usr/bin/env python3
"""A GPU's share of its peak, with and without selection: ViT-B/16 and RN50 at 224 pixels.

    python benchmarks/gpu.py [--models ViT-B-16 RN50] [--batch-size N] [--rate 0.3] [--modes full exact ...]

For each model the largest batch of a full step is searched (doubling, then halving the gap, until memory does not
suffice), and taken for all modes. The pairs are noise, as bytes in page-locked memory, and go to the GPU as the
training's do; no loader takes part. A line for each mode:

- `samples_per_second` read, medians and quartiles over turns of `--steps` steps, by the wall clock;
- `milliseconds` of a step by phase, from events on the GPU. `load` is what is left of the copy when the step begins;
- `flops_per_step` as torch counts them (matrix products, convolutions, attention), and `share_of_peak`: of what a large
  bf16 matrix product reached on this GPU just before;
- `syncs_per_step`: how often the host waited for the GPU inside a step, as torch's sync debug mode warns of them, and
  `first_sync`, where the mode `error` found one. Between two logs there should be none.

Without a GPU it says so and does nothing. `--device cpu` with a small model is for trying it out.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import quartiles, report
from step_cost import ANY_CHEAP, CHEAP, MODES, as_loaded, image_shape, make_state, make_text
from torch.utils.flop_counter import FlopCounterMode

from dissect_clip.data.batch import Batch
from dissect_clip.data.transfer import Transfer
from dissect_clip.training.step import TrainState, train_step
from dissect_clip.training.timer import PHASES, PhaseClock

COUNTED = 20
"""Pairs of the batch whose operations are counted; the rest is proportional, but for the loss's small part."""


# ---- searching and counting


def largest(fits: Callable[[int], bool], start: int, limit: int, step: int) -> int:
    """The largest multiple of ``step`` up to ``limit`` that fits, 0 if none does; what fits is taken to have no gaps.

    Doubles from ``start``, then halves the gap.
    """
    good, bad = 0, limit // step + 1  # in steps
    trial = max(1, start // step)
    while trial < bad:
        if fits(trial * step):
            good = trial
            trial = 2 * trial if 2 * trial < bad else bad
        else:
            bad = trial
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle * step):
            good = middle
        else:
            bad = middle
    return good * step


def matmul_flops_per_second(device: torch.device, size: int = 8192, repeats: int = 20, turns: int = 5) -> float:
    """What bf16 matrix products of [size, size] reach; the best of some turns."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for turn in range(turns + 1):
        clock = PhaseClock(device)
        for _ in range(repeats):
            left @ right
        clock.lap("train")
        seconds = clock.totals()["train"]
        if turn > 0:  # the first one chooses a kernel
            best = max(best, 2 * size**3 * repeats / seconds)
    return best


def count_flops(state: TrainState) -> float:
    """Floating point operations of a step, by pair read."""
    batch = Transfer(state.world.device, state.input_dtype)(host_batch(state, COUNTED))
    loaded = as_loaded(state, batch)
    with FlopCounterMode(display=False) as counter:
        train_step(state, [loaded], PhaseClock(state.world.device))
    return counter.get_total_flops() / COUNTED


# ---- stepping


def host_batch(state: TrainState, size: int) -> Batch:
    """Noise as bytes, and captions as long as the model takes; as a loader gives them."""
    random = torch.Generator().manual_seed(0)
    text = make_text(state, size, random)
    image = torch.randint(0, 256, (size, 3, *image_shape(state)), generator=random, dtype=torch.uint8)
    batch = Batch(image, text, torch.arange(size), normalization=torch.full((2, 3), 0.5))
    return batch.pin_memory() if state.world.device.type == "cuda" else batch


class Steps:
    """Steps of a run on one batch that comes from the host each time."""

    def __init__(self, state: TrainState, size: int) -> None:
        self.state = state
        self.clock = PhaseClock(state.world.device)
        self._transfer = Transfer(state.world.device, state.input_dtype)
        self._batch = as_loaded(state, host_batch(state, size))
        if state.world.device.type == "cuda":
            self._batch = self._batch.pin_memory()  # what was taken of it is not

    def __call__(self, count: int) -> None:
        """Take some steps, without waiting for the device."""
        for _ in range(count):
            batch = self._transfer(self._batch)
            self.clock.lap("load")
            train_step(self.state, [batch], self.clock)

    def timed(self, count: int) -> tuple[float, dict[str, float]]:
        """Seconds of some steps by the wall clock, and by phase."""
        before = self.clock.totals()
        self.clock.start()
        began = time.perf_counter()
        self(count)
        after = self.clock.totals()  # waits for the device
        seconds = time.perf_counter() - began
        return seconds, {phase: after[phase] - before[phase] for phase in PHASES}


def after_warmup(state: TrainState, size: int) -> Steps:
    """The run when every sample of the batch has been scored once."""
    Steps(state, size)(1)
    state.counters.epoch = 1
    if state.selection is not None:
        state.selection.start_epoch(1)
    if state.preselector is not None and state.selection is not None:
        state.preselector.publish(state.selection.store.scores, state.selection.survey)
    return Steps(state, size)


def free(device: torch.device) -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step_fits(options: argparse.Namespace, size: int) -> bool:
    """Whether memory suffices for full steps of so many pairs."""
    device = torch.device(options.device)
    try:
        Steps(make_state(options, "full", 1.0, size), size).timed(2)
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    free(device)  # outside of the handler, whose traceback holds the tensors
    return fits


def largest_batch(options: argparse.Namespace) -> int:
    """Pairs of the largest full step, with a twentieth of the memory to spare for what the other modes add."""
    torch.cuda.set_per_process_memory_fraction(0.95)
    try:
        return largest(lambda size: step_fits(options, size), 256, options.largest, 64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---- waiting for the device


def count_syncs(steps: Steps, count: int) -> dict[str, Any]:
    """How often the host waits for the GPU in some steps, and where it does first."""
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps(count)
        torch.cuda.set_sync_debug_mode("error")
        where = None
        try:
            steps(count)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"syncs_per_step": count_sync_warnings(caught) / count, "first_sync": where}


def count_sync_warnings(caught: Sequence[warnings.WarningMessage]) -> int:
    """Those of torch's sync debug mode."""
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


# ---- a mode


def measure(options: argparse.Namespace, mode: str, size: int, peak: float) -> dict[str, Any]:
    """The figures of a mode."""
    state = make_state(options, mode, options.rate, max(size, COUNTED))
    steps = after_warmup(state, size)
    operations = count_flops(state) * size
    steps.timed(options.warm)
    turns = [steps.timed(options.steps) for _ in range(options.turns)]
    seconds = [spent / options.steps for spent, _ in turns]
    on_gpu = state.world.device.type == "cuda"
    phases = {
        phase: round(1000 * statistics.median(found[phase] for _, found in turns) / options.steps, 3)
        for phase in PHASES
    }
    return {
        "samples_per_second": quartiles((size / spent for spent in seconds), 1),
        "milliseconds": phases,
        "flops_per_step": operations,
        "share_of_peak": round(operations / statistics.median(seconds) / peak, 4),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        **(count_syncs(steps, options.steps) if on_gpu else {"syncs_per_step": None, "first_sync": None}),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-16", "RN50"])
    modes = ["full", "given", "exact", "refresh 0.1", "refresh 0", "before load"]
    parser.add_argument("--modes", nargs="+", choices=MODES, default=modes)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--batch-size", type=int, help="pairs read in a step (default: as many as fit in a full step)")
    parser.add_argument("--largest", type=int, default=16384, help="where the search for a batch size ends")
    parser.add_argument("--precision", default="amp_bf16")
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--warm", type=int, default=5, help="steps before the turns")
    parser.add_argument("--matmul", type=int, default=8192, help="side of the matrices of which the peak is taken")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("# gpu.py: there is no CUDA device here, nothing was measured", flush=True)
        return
    if options.batch_size is None and not options.device.startswith("cuda"):
        parser.error("--batch-size is needed where there is no GPU memory to fill")
    device = torch.device(options.device)
    if device.type == "cuda":  # as the command line does
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    peak = matmul_flops_per_second(device, options.matmul)
    free(device)
    for model in options.models:
        options.model, options.cheap_flags = model, list(CHEAP.get(model, ANY_CHEAP))
        options.batch_size, wanted = 64, options.batch_size
        size = wanted or largest_batch(options)
        if size == 0:
            raise SystemExit(f"error: not even 64 pairs of {model} fit into the memory")
        for mode in options.modes:
            options.batch_size = size
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            figures = measure(options, mode, size, peak)
            free(device)
            about = {"model": model, "mode": mode, "rate": options.rate, "batch_size": size}
            report("gpu", **about, precision=options.precision, matmul_flops_per_second=peak, **figures)
        options.batch_size = wanted


if __name__ == "__main__":
    main()

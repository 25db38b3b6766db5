#!/usr/bin/env python3
"""Seconds to the quality that training on all data ends with, scoring and loading included.

    python benchmarks/time_to_quality.py --train-data 'shards/train-*.tar' --val-data 'shards/val-*.tar' --out study
        [--noise-list noise.csv] [--modes full random exact fast] [--seeds 0 1 2] [--epochs 40] [--select-rate 0.3]
        [--common-flags '--workers 2'] [--define NAME='--select --score-refresh 0.05']

Every mode is trained with every seed by the real command line, one process at a time, the seeds one after the other and
within a seed the modes. The clock is that of results.jsonl: what the training process spent waiting for batches and
moving them, scoring, training and updating. Evaluation, saving and start-up are left out.

The target of a run is the R@Sum (six recalls in percent, 0 to 600) that `full` with the same seed ends with. A run's
`seconds_to_target` are those at its first evaluation at or above the target, not interpolated; null where it never gets
there. `speedup` divides the seconds of `full`'s whole run by them, and `speedup_to_first` those to the evaluation at
which `full` itself got there for the first time, which may be before its end.

`--noise-list` is a csv with a header and two columns, a key and the key whose caption it gets instead; shards with
these captions are written to OUT/shards and trained on.

A run that is finished is not run again, one that failed or was cut off is. OUT then holds runs/, runs.jsonl, summary.md
and curves.png. `--collect` makes these of what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import ROOT, flags, markdown, quartiles, report

sys.path.insert(0, str(ROOT))

from dissect_clip.errors import SetupError
from dissect_clip.training.timer import PHASES
from experiments.cells import Busy, Cell, Interrupted, Runs, read_results
from experiments.noise import noisy_shards

_SELECT = ("--select", "--select-rate", "{rate}", "--select-strategy")
_DISSECT = (*_SELECT, "warmup_base_sampling", "--warmup-point", "{warmup}", "--warmup-select-rate", "{warmup_rate}")

MODES: dict[str, tuple[str, ...]] = {
    "full": (),
    "full, fewer epochs": ("--epochs", "{epochs_of_equal_pairs}"),
    "random": (*_SELECT, "random"),
    "random, equal pairs": ("--select", "--select-rate", "{equal_rate}", "--select-strategy", "random"),
    "exact": _DISSECT,
    "train mode": (*_DISSECT, "--select-score-mode", "train"),
    "all negatives": (*_DISSECT, "--select-score-mode", "train", "--select-negatives", "all"),
    "all negatives, eval": (*_DISSECT, "--select-negatives", "all"),
    "cheap": (*_DISSECT, "--score-context-length", "16"),
    "context 8": (*_DISSECT, "--score-context-length", "8"),
    "patch dropout 0.5": (*_DISSECT, "--score-patch-dropout", "0.5"),
    "images 24": (*_DISSECT, "--score-image-size", "24"),
    "refresh 0.2": (*_DISSECT, "--score-refresh", "0.2"),
    "refresh 0.1": (*_DISSECT, "--score-refresh", "0.1"),
    "refresh 0": (*_DISSECT, "--score-refresh", "0"),
    "fast": (*_DISSECT, "--select-preset", "fast"),
}
"""What is compared, and the flags of each. Braces are numbers of the command line. "Equal" modes train on as many
pairs as DISSect, its warm-up included; so does "full, fewer epochs", with a learning rate that falls to 0 by then."""

DEFAULT_MODES = ("full", "full, fewer epochs", "random", "exact", "fast")
"""The others need more hours, or a model of their own: a vision transformer for patches and smaller images."""

FULL = "full"


@dataclass(frozen=True)
class Study:
    """What is run. ``modes`` are flags by name, with numbers put in."""

    out: Path
    train_data: str
    val_data: str
    modes: dict[str, list[str]]
    seeds: list[int]
    common: list[str]

    def folder_name(self, mode: str, seed: int) -> str:
        """Of a run, inside OUT/runs."""
        plain = "".join(c if c.isalnum() or c == "." else "-" for c in mode)
        return f"{plain}-seed{seed}"

    def command(self, mode: str, seed: int) -> list[str]:
        """The command line of a run, after the name of the program; flags of a mode win over those in common."""
        own = ["--seed", str(seed), "--output-dir", str(self.out / "runs"), "--name", self.folder_name(mode, seed)]
        data = ["--train-data", self.train_data, "--val-data", self.val_data]
        return [*data, *self.common, *self.modes[mode], *own]

    @property
    def runs(self) -> Runs:
        """Where they are run, and by what."""
        return Runs(self.out / "runs", (sys.executable, str(ROOT / "src" / "main.py")), cwd=ROOT)

    def cell(self, mode: str, seed: int) -> Cell:
        """A run that is to be made."""
        return Cell(self.folder_name(mode, seed), f"{mode}, seed {seed}", tuple(self.command(mode, seed)))


@dataclass(frozen=True)
class Run:
    """A finished run."""

    mode: str
    seed: int
    epochs: list[int]  # at which it was evaluated
    rsum: list[float]
    seconds: list[float]  # of training until then
    trained: list[int]  # pairs trained on until then
    scored: list[int]  # pairs that had a scoring pass until then
    phases: dict[str, float]  # seconds in all
    process_seconds: float  # of the whole process, start-up, evaluation and saving included

    def seconds_to(self, target: float) -> float | None:
        """At the first evaluation at or above it."""
        reached = (spent for spent, rsum in zip(self.seconds, self.rsum, strict=True) if rsum >= target)
        return next(reached, None)


# ---- data


def noisy(train_data: str, noise_list: Path, out: Path) -> str:
    """The pattern of the shards in OUT/shards.

    Raises:
        SystemExit: a key of the list is in none of the shards.
    """
    try:
        return noisy_shards(train_data, noise_list, out / "shards")
    except SetupError as error:
        raise SystemExit(f"error: {error}") from error


# ---- running


def finish(study: Study, mode: str, seed: int) -> str | None:
    """Run what is not finished yet, from its start to its end; what went wrong, or None.

    Raises:
        SystemExit: a finished run of that name had other flags, or a signal asked for the end.
    """
    cell, runs = study.cell(mode, seed), study.runs
    try:
        runs.check_unchanged(cell)
        if runs.state(cell) == "done":
            return None
        print(f"# {cell.label}: {shlex.join(cell.command)}", flush=True)
        status = runs.run(cell, resume=False)
    except SetupError as error:
        raise SystemExit(f"error: {error}") from error
    except Busy:
        raise SystemExit(f"error: {cell.label}: another process runs it") from None
    except Interrupted:
        raise SystemExit(130) from None
    if status == 0:
        return None
    told = f"# {cell.label} failed with status {status}; see {runs.log(cell)}\n{runs.tail(cell)}"
    print(told, file=sys.stderr, flush=True)
    return f"status {status}"


def read_run(study: Study, mode: str, seed: int) -> Run | None:
    """A finished run; None for any other."""
    cell = study.cell(mode, seed)
    note = study.runs.note(cell)
    if note is None or note.status != 0:
        return None
    rows = read_results(study.runs.run_folder(cell) / "checkpoints" / "results.jsonl")
    spent = [{phase: row[f"{phase}_seconds"] for phase in PHASES} for row in rows]
    return Run(
        mode, seed, [row["epoch"] for row in rows], [row["rsum"] for row in rows],
        [round(sum(phases.values()), 3) for phases in spent], [row["trained"] for row in rows],
        [row["scored"] for row in rows], {phase: round(value, 3) for phase, value in spent[-1].items()},
        note.seconds,
    )  # fmt: skip


# ---- collecting


def mean_and_deviation(values: Sequence[float]) -> dict[str, float | None]:
    """The deviation is that of a sample, and None for a single value."""
    deviation = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(statistics.mean(values), 4), "deviation": deviation}


def targets_of(runs: Sequence[Run]) -> dict[int, float]:
    """The R@Sum that ``full`` ends with, by seed."""
    return {run.seed: run.rsum[-1] for run in runs if run.mode == FULL}


def shares_of_full(runs: Sequence[Run], mode: str, to_first: bool) -> list[float | None]:
    """Time to the target over that of ``full`` with the same seed, for each seed that ``full`` has, too.

    The time of ``full`` is that of its whole run, or ``to_first`` that to its own first evaluation at the target.
    """
    targets = targets_of(runs)
    full = {
        run.seed: (run.seconds_to(run.rsum[-1]) if to_first else None) or run.seconds[-1]
        for run in runs
        if run.mode == FULL
    }
    ours = [(run.seed, run.seconds_to(targets[run.seed])) for run in runs if run.mode == mode and run.seed in full]
    return [None if spent is None else spent / full[seed] for seed, spent in ours]


def median_of_times(times: Sequence[float | None]) -> float | None:
    """None, a run that never gets there, counts as the slowest; None if that is the median."""
    if not times:
        return None
    median = statistics.median(math.inf if spent is None else spent for spent in times)
    return None if math.isinf(median) else median


def summarise(runs: Sequence[Run], mode: str, failed: Sequence[int]) -> dict[str, Any]:
    """A mode over its seeds: medians of times, means of the rest."""
    own = [run for run in runs if run.mode == mode]
    line: dict[str, Any] = {"mode": mode, "seeds": [run.seed for run in own], "failed_seeds": list(failed)}
    if not own:
        return line
    line |= {
        "rsum": mean_and_deviation([run.rsum[-1] for run in own]),
        "seconds": quartiles((run.seconds[-1] for run in own), 2),
        "phases": {phase: round(statistics.median(run.phases[phase] for run in own), 2) for phase in PHASES},
        "trained": round(statistics.mean(run.trained[-1] for run in own)),
        "scored": round(statistics.mean(run.scored[-1] for run in own)),
    }
    targets = targets_of(runs)
    times = [run.seconds_to(targets[run.seed]) for run in own if run.seed in targets]
    if times:
        middle = median_of_times(times)
        line |= {
            "reached": sum(spent is not None for spent in times),
            "seconds_to_target": None if middle is None else round(middle, 2),
        }
        for name, to_first in (("speedup", False), ("speedup_to_first", True)):
            share = median_of_times(shares_of_full(runs, mode, to_first))
            line[name] = None if share is None else round(1 / share, 2)
    return line


def table(lines: Sequence[Mapping[str, Any]], targets: Mapping[int, float]) -> str:
    """The modes side by side, as Markdown."""
    header = [
        "mode", "seeds", "final R@Sum", "seconds in all", "load", "score", "train", "optimizer", "pairs trained on",
        "pairs scored", "reached the target", "seconds to it", "sooner than all data ends", "than it first gets there",
    ]  # fmt: skip
    rows = []
    for line in lines:
        count, failed = len(line["seeds"]), len(line["failed_seeds"])
        seeds = f"{count}" + (f", {failed} failed" if failed else "")
        if count == 0:
            rows.append([line["mode"], seeds, *["-"] * (len(header) - 2)])
            continue
        rsum, reached = line["rsum"], line.get("reached")
        deviation = "" if rsum["deviation"] is None else f" ± {rsum['deviation']:.1f}"
        to_target, speedups = line.get("seconds_to_target"), (line.get("speedup"), line.get("speedup_to_first"))
        rows.append(
            [
                line["mode"], seeds, f"{rsum['mean']:.1f}{deviation}", f"{line['seconds']['median']:.1f}",
                *(f"{line['phases'][phase]:.1f}" for phase in PHASES), f"{line['trained']:,}", f"{line['scored']:,}",
                "-" if reached is None else f"{reached} of {count}",
                "-" if to_target is None else f"{to_target:.1f}",
                *("-" if speedup is None else f"{speedup:.2f}" for speedup in speedups),
            ]
        )  # fmt: skip
    named = ", ".join(f"{target:.1f} with seed {seed}" for seed, target in sorted(targets.items()))
    told = f"Targets, where all data ends: R@Sum {named}." if targets else "No finished run on all data: no target."
    return f"{told}\n\n{markdown(header, rows)}\n"


def collect(study: Study) -> list[dict[str, Any]]:
    """Write runs.jsonl, summary.md and the plots of what is finished; the line of each mode."""
    from plot import draw_quality

    found = [read_run(study, mode, seed) for seed in study.seeds for mode in study.modes]
    runs = [run for run in found if run is not None]
    targets = targets_of(runs)
    with (study.out / "runs.jsonl").open("w", encoding="utf-8") as file:
        for run in runs:
            target = targets.get(run.seed)
            to_target = None if target is None else run.seconds_to(target)
            file.write(json.dumps({**asdict(run), "target": target, "seconds_to_target": to_target}) + "\n")
    failures = {
        mode: [seed for seed in study.seeds if study.runs.status(study.cell(mode, seed)) not in (0, None)]
        for mode in study.modes
    }
    lines = [summarise(runs, mode, failures[mode]) for mode in study.modes]
    text = table(lines, targets)
    (study.out / "summary.md").write_text(text, encoding="utf-8")
    for line in lines:
        report("time_to_quality", **line, targets=targets)
    print("\n".join(f"# {row}" for row in text.splitlines()), flush=True)
    if runs:
        drawn = [asdict(run) for run in runs]
        draw_quality(drawn, list(targets.values()), study.out / "curves.png")
        draw_quality(drawn, list(targets.values()), study.out / "seconds.png", against=("seconds",))
    return lines


# ---- the command line


def fill_in(words: Sequence[str], options: argparse.Namespace) -> list[str]:
    """A mode's flags with the numbers of the study."""
    selecting = options.epochs - options.warmup_point
    share = (options.warmup_point * options.warmup_select_rate + selecting * options.select_rate) / options.epochs
    numbers = {
        "rate": f"{options.select_rate:g}",
        "warmup": f"{options.warmup_point}",
        "warmup_rate": f"{options.warmup_select_rate:g}",
        "equal_rate": f"{share:.4f}",
        "epochs_of_equal_pairs": f"{max(1, round(share * options.epochs))}",
    }
    return [word.format(**numbers) if word.startswith("{") else word for word in words]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-data", required=True)
    parser.add_argument("--val-data", required=True)
    parser.add_argument("--noise-list", type=Path, help="csv of keys and of the keys whose captions they get")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--modes",
        nargs="+",
        default=None,
        help=f"of {', '.join(MODES)}, and of those defined; default: {', '.join(DEFAULT_MODES)}, and those defined",
    )
    parser.add_argument("--define", action="append", default=[], metavar="NAME=FLAGS", help="another mode")
    parser.add_argument("--common-flags", default="", help="for all runs, after the benchmark's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--select-rate", type=float, default=0.3)
    parser.add_argument("--warmup-point", type=int, default=8, help="DISSect: epochs before selection")
    parser.add_argument("--warmup-select-rate", type=float, default=1.0, help="DISSect: share trained on in these")
    parser.add_argument("--val-frequency", type=int, default=1, help="epochs from evaluation to evaluation")
    parser.add_argument("--model", default="RN-tiny")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    defined = {}
    for text in options.define:
        name, equals, words = text.partition("=")
        if not equals:
            parser.error(f"argument --define: {text!r} is not of the form NAME=FLAGS")
        defined[name] = tuple(shlex.split(words))
    options.known_modes = {**MODES, **defined}
    options.modes = options.modes or [*DEFAULT_MODES, *defined]
    if unknown := [mode for mode in options.modes if mode not in options.known_modes]:
        parser.error(f"argument --modes: {unknown[0]!r} is none of {', '.join(options.known_modes)}")
    return options


def make_study(options: argparse.Namespace) -> Study:
    """What the command line asks for; writes the shards with noise."""
    settings = {
        "model": options.model, "batch-size": options.batch_size, "epochs": options.epochs, "lr": options.lr,
        "warmup": 50, "precision": options.precision, "device": options.device, "workers": options.workers,
        "val-frequency": options.val_frequency, "save-frequency": 0, "log-every-n-steps": 10**6,
    }  # fmt: skip
    modes = {mode: fill_in(options.known_modes[mode], options) for mode in options.modes}
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    train_data = options.train_data
    if options.noise_list is not None:
        train_data = noisy(train_data, options.noise_list, out)
    common = [*flags(settings), *shlex.split(options.common_flags)]
    return Study(out, train_data, options.val_data, modes, options.seeds, common)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a run failed."""
    options = parse(argv)
    study = make_study(options)
    problems = []
    if not options.collect:
        for seed in study.seeds:
            problems += [finish(study, mode, seed) for mode in study.modes]
    collect(study)
    return 1 if any(problems) else 0


if __name__ == "__main__":
    sys.exit(main())

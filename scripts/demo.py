#!/usr/bin/env python3
"""Train five small CLIP models on drawn scenes with wrong captions among them, and compare them: `make demo`.

1. scripts/make_scenes.py draws the data set; 40 % of the training captions are those of other scenes.
2. src/main.py trains on all data, on random parts of the batches, with DISSect, with DISSect's fast preset, which has
   no scoring pass, and with clean_posterior, which has none either, one after the other on the CPU. The first epochs of
   the last three train on all data while they note the scores; random then trains on the same number of pairs, over
   the same epochs.
3. A table, five lines computed from it, and OUT/curves.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq
from make_scenes import make_dataset

ROOT = Path(__file__).resolve().parent.parent
IMAGE_SIZE = 64
PER_SHARD = 512
CONTEXT_LENGTH = 24  # tokens; the longest caption has 18
PHASES = ("load", "score", "train", "optimizer")
LEVEL = 4  # evaluations that are averaged
RECALLS = tuple(f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long. The lengths are as short as shows the effect on two cores in minutes."""

    train: int = 2560
    val: int = 1000
    mismatched: float = 0.4
    model: str = "RN-tiny"
    batch_size: int = 128
    lr: float = 1e-3
    epochs: int = 16
    warmup_point: int = 8
    select_rate: float = 0.4
    val_frequency: int = 2
    seed: int = 0

    @property
    def random_rate(self) -> float:
        """The share of every batch with which random trains on as many pairs as DISSect, warm-up included."""
        selecting = self.epochs - self.warmup_point
        return (self.warmup_point + selecting * self.select_rate) / self.epochs

    def runs(self) -> dict[str, list[str]]:
        """Each run's name and the flags that are its own."""
        random = ["--select-strategy", "random", "--select-rate", f"{self.random_rate:.4f}"]
        dissect = ["--select-strategy", "warmup_base_sampling", "--select-rate", str(self.select_rate)]
        dissect += ["--warmup-point", str(self.warmup_point), "--warmup-select-rate", "1.0"]
        posterior = ["--select-strategy", "clean_posterior", "--select-rate", str(self.select_rate)]
        posterior += ["--warmup-point", str(self.warmup_point), "--clean-decoys", "0.05"]
        return {
            "all data": [],
            "random": ["--select", *random, "--record"],
            "DISSect": ["--select", *dissect, "--record"],
            "DISSect fast": ["--select", *dissect, "--select-preset", "fast", "--record"],
            "clean posterior": ["--select", *posterior, "--record"],
        }

    def common_flags(self, data: Path, out: Path) -> list[str]:
        """Flags of src/main.py that all runs share. The learning rate stays constant: every point of a curve is then
        a model that could have been the end of a run, so that runs may be compared at equal pairs or seconds."""
        settings = {
            "train-data": data / "train-*.tar", "val-data": data / "val-*.tar", "output-dir": out, "model": self.model,
            "force-context-length": CONTEXT_LENGTH,
            "batch-size": self.batch_size, "epochs": self.epochs, "lr": self.lr, "warmup": 50, "wd": 0.1,
            "lr-scheduler": "const", "precision": "fp32", "device": "cpu", "workers": 1, "seed": self.seed,
            "val-frequency": self.val_frequency, "save-frequency": 0, "log-every-n-steps": 10**6,
        }  # fmt: skip
        # No random cuts: they could take away what the caption says.
        whole_images = ["--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)"]
        return [*(word for name, value in settings.items() for word in (f"--{name}", str(value))), *whole_images]


@dataclass(frozen=True)
class Point:
    """A run after some complete epochs. Seconds are those of training: without starting and without evaluation."""

    epoch: int
    rsum: float  # sum of R@1, R@5 and R@10 both ways in percent, 0 to 600
    recalls: tuple[float, ...]  # the six of them, as shares
    seen: int  # pairs loaded, and scored where the strategy scores
    trained: int
    seconds: dict[str, float]  # by phase

    @property
    def total_seconds(self) -> float:
        """Loading, scoring, training and optimizer."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    name: str
    points: list[Point]
    clean_share: dict[int, float]  # by 0-based epoch: of the pairs trained on, the share that is clean
    clean_after: float  # the same over all epochs after the warm-up

    @property
    def end(self) -> Point:
        """The run's last evaluation."""
        return self.points[-1]

    @property
    def best(self) -> Point:
        """The evaluation with the highest R@Sum, by hindsight."""
        return max(self.points, key=lambda point: point.rsum)


# ---- running


def announce(text: str) -> None:
    """A line at once, whether or not the output is a terminal."""
    print(text, flush=True)


def read_points(run: Path) -> list[Point]:
    """The evaluations of a run so far."""
    file = run / "checkpoints" / "results.jsonl"
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        Point(
            row["epoch"], row["rsum"], tuple(row[name] for name in RECALLS), row["seen"], row["trained"],
            {phase: row[f"{phase}_seconds"] for phase in PHASES},
        )
        for row in rows
    ]  # fmt: skip


def show_progress(run: Path, shown: int) -> int:
    """Print the evaluations after the first ``shown``; returns how many there are now."""
    points = read_points(run)
    for point in points[shown:]:
        announce(f"  epoch {point.epoch:>3}   R@Sum {point.rsum:5.1f}   {point.total_seconds:5.1f} s of training")
    return len(points)


def train(name: str, flags: Sequence[str], out: Path) -> Path:
    """Run src/main.py to its end; returns its run folder.

    Raises:
        SystemExit: with the end of its log, if it fails.
    """
    folder = name.replace(" ", "_")
    command = [sys.executable, str(ROOT / "src" / "main.py"), *flags, "--name", folder]
    log, run = out / f"{folder}.log", out / folder
    # Other programs on the cores would make threads that wait by spinning many times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    announce(f"\n{name}: {' '.join(flags)}")
    shown = 0
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                shown = show_progress(run, shown)
        finally:
            process.kill()
    show_progress(run, shown)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-30:])
        raise SystemExit(f"{tail}\nerror: the run `{name}` ended with status {process.returncode}; all of it in {log}")
    return run


# ---- the truth, and what was selected


def read_truth(data: Path) -> dict[str, bool]:
    """Of each training sample's key, whether the caption is its own."""
    truth = {}
    for shard in sorted(data.glob("train-*.tar")):
        with tarfile.open(shard) as members:
            for member in members:
                file = members.extractfile(member)
                if file is not None and member.name.endswith(".json"):
                    truth[member.name.removesuffix(".json")] = bool(json.load(file)["clean"])
    return truth


def count_clean(run: Path, truth: dict[str, bool]) -> dict[int, tuple[int, int]]:
    """By 0-based epoch: how many of the pairs trained on were clean, and how many there were."""
    counts = {}
    for file in sorted((run / "record").glob("epoch_*.parquet")):
        rows = pq.read_table(file, columns=["key", "selected"]).to_pydict()
        chosen = [truth[key] for key, selected in zip(rows["key"], rows["selected"], strict=True) if selected]
        counts[int(file.stem.removeprefix("epoch_"))] = (sum(chosen), len(chosen))
    return counts


def collect(name: str, run: Path, truth: dict[str, bool], plan: Plan) -> Result:
    """A finished run's result; a run without a record trained on everything."""
    everything = (sum(truth.values()), len(truth))
    counts = count_clean(run, truth) or dict.fromkeys(range(plan.epochs), everything)
    after = [counts[epoch] for epoch in counts if epoch >= plan.warmup_point]
    shares = {epoch: clean / total for epoch, (clean, total) in counts.items()}
    return Result(name, read_points(run), shares, sum(c for c, _ in after) / sum(n for _, n in after))


# ---- telling


def table(results: Sequence[Result]) -> str:
    """The runs side by side; R@Sum is the mean of the last evaluations, and the highest is known by hindsight only."""
    rows = [
        ("run", "R@Sum", "highest", "pairs", "pairs", "seconds", "load", "score", "train", "clean"),
        ("", f"last {LEVEL}", "(epoch)", "seen", "trained", "in all", "", "", "", "selected"),
    ]
    for result in results:
        end, best = result.end, result.best
        working = end.seconds["train"] + end.seconds["optimizer"]
        rows.append(
            (
                result.name, f"{level(result.points[-LEVEL:]):.1f}", f"{best.rsum:.1f} ({best.epoch})",
                f"{end.seen:,}", f"{end.trained:,}",
                f"{end.total_seconds:.1f}", f"{end.seconds['load']:.1f}", f"{end.seconds['score']:.1f}",
                f"{working:.1f}", f"{100 * result.clean_after:.1f} %",
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([*lines[:2], "-" * len(lines[0]), *lines[2:]])


def recent(result: Result, amount: float, quantity: str) -> list[Point]:
    """The last LEVEL evaluations of a run up to ``amount`` of "trained" or "total_seconds"; at least its first."""
    return [point for point in result.points if getattr(point, quantity) <= amount][-LEVEL:] or result.points[:1]


def level(points: Sequence[Point]) -> float:
    """R@Sum of a few evaluations together: one alone moves up and down with the last steps before it."""
    return float(np.mean([point.rsum for point in points]))


def doubt(ours: Sequence[Point], theirs: Sequence[Point], queries: int) -> float:
    """Differences of levels below this say nothing: 1.96 standard errors, from two sources.

    The choice of the validation scenes (two runs as if independent, the three recalls of a direction rising and
    falling together), and the scatter of each run's evaluations. Another seed may still differ by more.
    """
    p = np.mean([point.recalls for point in ours], axis=0)
    spread = 100 * np.sqrt(p * (1 - p) / queries)
    choice = 2 * (spread[:3].sum() ** 2 + spread[3:].sum() ** 2)
    several = (points for points in (ours, theirs) if len(points) > 1)
    scatter = sum(np.var([point.rsum for point in points], ddof=1) / len(points) for points in several)
    return float(1.96 * np.sqrt(choice + scatter))


def compare(dissect: Result, other: Result, quantity: str, queries: int) -> str:
    """As in "12.0 more than random (90.0)", with a word where the difference says nothing."""
    ours, theirs = dissect.points[-LEVEL:], recent(other, getattr(dissect.end, quantity), quantity)
    difference = level(ours) - level(theirs)
    word = "more" if difference >= 0 else "less"
    within = doubt(ours, theirs, queries)
    remark = f", too little to tell: {within:.0f} may be chance" if abs(difference) < within else ""
    return f"{abs(difference):.1f} {word} than {other.name} ({level(theirs):.1f}{remark})"


def without_pass(result: Result, dissect: Result, plan: Plan) -> str:
    """As in "85.0 % of what was ...": a run without a scoring pass beside DISSect's."""
    return (
        f"{100 * result.clean_after:.1f} % of what was trained on after the warm-up was clean; it was done after "
        f"{result.end.total_seconds:.0f} s against DISSect's {dissect.end.total_seconds:.0f} s, and its R@Sum of "
        f"{level(result.points[-LEVEL:]):.1f} is {compare(result, dissect, 'trained', plan.val)} after as many pairs."
    )


def verdicts(
    everything: Result, random: Result, dissect: Result, fast: Result, posterior: Result, plan: Plan
) -> list[str]:
    """Five lines: what was selected; equal pairs trained on; equal seconds; the two that score nothing."""
    end, rsum = dissect.end, level(dissect.points[-LEVEL:])
    gain = 100 * (dissect.clean_after - everything.clean_after)
    if gain > 1:
        found = "it found clean pairs"
    elif gain < -1:
        found = "it preferred mismatched pairs"
    else:
        found = "it did not tell clean pairs from mismatched ones"
    last = dissect.clean_share[max(dissect.clean_share)]
    pairs = [compare(dissect, other, "trained", plan.val) for other in (random, everything)]
    clock = [compare(dissect, other, "total_seconds", plan.val) for other in (random, everything)]
    score = 100 * end.seconds["score"] / end.total_seconds
    return [
        f"Selection: after the warm-up {100 * dissect.clean_after:.1f} % of what DISSect trained on was clean "
        f"({100 * last:.1f} % in the last epoch), against {100 * everything.clean_after:.1f} % of the data and "
        f"{100 * random.clean_after:.1f} % with random: {found}.",
        f"Equal pairs: after training on {end.trained:,} pairs, DISSect's R@Sum of {rsum:.1f} is "
        f"{' and '.join(pairs)}; all data ended at {level(everything.points[-LEVEL:]):.1f} after "
        f"{everything.end.trained:,} pairs. One seed.",
        f"Equal time: after {end.total_seconds:.0f} s, of which {score:.0f} % went into scoring, it is "
        f"{' and '.join(clock)}; random was done after {random.end.total_seconds:.0f} s, all data after "
        f"{everything.end.total_seconds:.0f} s.",
        f"Fast: by scores of earlier steps, without a scoring pass, {without_pass(fast, dissect, plan)}",
        f"Clean posterior: drawn by the probability of being clean, {without_pass(posterior, dissect, plan)}",
    ]


def draw(results: Sequence[Result], plan: Plan, file: Path) -> None:
    """The curves: R@Sum against pairs trained on and against seconds, and the clean share by epoch."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (by_pairs, by_seconds, by_epoch) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for result in results:
        rsum = [point.rsum for point in result.points]
        by_pairs.plot([point.trained for point in result.points], rsum, marker="o", markersize=3, label=result.name)
        by_seconds.plot([point.total_seconds for point in result.points], rsum, marker="o", markersize=3)
        by_epoch.plot([epoch + 1 for epoch in result.clean_share], [100 * s for s in result.clean_share.values()])
    by_pairs.set(xlabel="pairs trained on", ylabel="R@Sum on validation scenes", title="for equal training")
    by_seconds.set(xlabel="seconds, scoring included", ylabel="R@Sum on validation scenes", title="for equal time")
    by_epoch.set(xlabel="epoch", ylabel="clean among those trained on, %", title="what was selected")
    by_epoch.axvline(plan.warmup_point + 0.5, color="grey", linestyle=":", label="the warm-up ends")
    by_pairs.legend()
    by_epoch.legend()
    for axes in (by_pairs, by_seconds, by_epoch):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def parse_args() -> tuple[Plan, Path]:
    """The command line: every part of the plan, and the folder to work in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder to work in (default: %(default)s)")
    for name, default in vars(Plan()).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default, help="default: %(default)s")
    values = vars(parser.parse_args())
    out = values.pop("out").resolve()
    plan = Plan(**values)
    if not 0 < plan.warmup_point < plan.epochs:
        parser.error(f"--warmup-point {plan.warmup_point} must be at least 1 and below --epochs {plan.epochs}")
    return plan, out


def prepare(out: Path, plan: Plan) -> None:
    """An empty folder with the plan in it; what an earlier demo left there is removed.

    Raises:
        SystemExit: if the folder holds anything else.
    """
    if out.exists():
        if any(out.iterdir()) and not (out / "plan.json").exists():
            raise SystemExit(f"error: --out {out} is not empty and not of an earlier demo: give another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / "plan.json").write_text(json.dumps(vars(plan), indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Make the data, train, compare."""
    started = time.perf_counter()
    plan, out = parse_args()
    prepare(out, plan)
    data = out / "scenes"
    announce(f"Drawing {plan.train:,} training and {plan.val:,} validation scenes in {data}")
    make_dataset(data, plan.train, plan.val, plan.mismatched, IMAGE_SIZE, PER_SHARD, plan.seed)
    truth = read_truth(data)
    shared = plan.common_flags(data, out)
    results = [collect(name, train(name, [*shared, *own], out), truth, plan) for name, own in plan.runs().items()]
    announce(f"\n{table(results)}\n")
    for line in verdicts(*results, plan):
        announce(line)
    draw(results, plan, out / "curves.png")
    announce(f"\nCurves: {out / 'curves.png'}   ({time.perf_counter() - started:.0f} s in all)")


if __name__ == "__main__":
    main()

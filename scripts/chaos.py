#!/usr/bin/env python3
"""Kill runs at random moments, resume them, and compare what comes out with runs that nobody disturbed.

For training on all data and for every strategy: one undisturbed run of several processes, then the same run killed
again and again and gone on with by --resume latest. The moments are random; every third is one at which a checkpoint is
being written. What is killed is all processes with their loader workers (a node that is lost), one rank (the others
must end by themselves), or all of them politely with SIGTERM (a preemption, which saves before it exits).

Compared are, after every epoch, weights, optimizer, counters and scores; the choice and the scores of every sample in
every step (--record); the loss of every step; the evaluations; and the samples that were skipped. The last line counts:

    56 kills, 56 resumes, 0 differences

Exit status 1 if anything differs, or if a process does not end in time. Takes about 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from make_scenes import make_dataset
from safetensors.torch import load_file

from dissect_clip.selection import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
REQUEUE = 75  # exit status of a run that was asked to stop
PATIENCE = 90.0  # seconds for the other ranks to end, and for a polite end
BROKEN = 24  # samples of the data made here that cannot be used


@dataclass(frozen=True)
class Plan:
    """What is run and how often it is killed."""

    out: Path
    train_data: str
    val_data: str
    kills: int
    processes: int
    epochs: int
    batch_size: int
    workers: int
    seed: int
    strategies: tuple[str, ...]
    flags: tuple[str, ...]  # more of src/main.py

    def command(self, strategy: str, name: str) -> list[str]:
        """The command line of one rank."""
        chosen = ["--select", "--select-strategy", strategy, "--record"] if strategy != "none" else []
        if strategy in ("warmup_base_sampling", "learnability", "jest", "clean_posterior"):
            chosen += ["--warmup-point", "1"]
        if strategy == "scan":
            chosen += ["--scan-warmup", "0"]
        return [
            sys.executable, str(ROOT / "src" / "main.py"), "--output-dir", str(self.out / "runs"), "--name", name,
            "--train-data", self.train_data, "--val-data", self.val_data, "--model", "RN-tiny", "--device", "cpu",
            "--batch-size", str(self.batch_size), "--epochs", str(self.epochs), "--workers", str(self.workers),
            "--lr", "1e-3", "--warmup", "5", "--log-every-n-steps", "1", "--save-every-n-steps", "3",
            "--rank-timeout", "60", "--resume", "latest", "--seed", str(self.seed), *chosen, *self.flags,
        ]  # fmt: skip


@dataclass
class Score:
    """What happened so far."""

    kills: Counter[str] = field(default_factory=Counter)  # by kind
    resumes: int = 0  # starts after a kill that went on from a checkpoint
    anew: int = 0  # starts after a kill that found none yet
    differences: list[str] = field(default_factory=list)


# ---- data


def break_samples(path: Path) -> None:
    """A shard of samples that cannot be used: what is skipped must come out the same, too."""
    with tarfile.open(path, "w") as shard:
        for number in range(BROKEN):
            for suffix, content in (("jpg", b"not an image"), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"broken{number:03d}.{suffix}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))


def make_data(folder: Path) -> None:
    """Drawn scenes, and some broken samples."""
    if not folder.exists():
        make_dataset(folder, train=1536, val=256, mismatched=0.4, image_size=48, per_shard=256, seed=0)
        (folder / "sizes.json").unlink()  # counted by the first run
        break_samples(folder / "train-broken.tar")


# ---- processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """The processes of one start of a run. What they say goes to a file of its own for each start and rank."""

    def __init__(self, plan: Plan, strategy: str, name: str, start: int) -> None:
        self.run = plan.out / "runs" / name
        self.outputs = [plan.out / "output" / f"{name}-{start:02d}-rank{rank}.txt" for rank in range(plan.processes)]
        self.outputs[0].parent.mkdir(parents=True, exist_ok=True)
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(plan.processes), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port())}
        self.started = time.time()
        self.processes = []
        for rank, output in enumerate(self.outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if plan.processes > 1 else {}
            if plan.processes == 1:
                shared.pop("WORLD_SIZE", None)
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        plan.command(strategy, name), env=shared | own, stdout=file, stderr=file, start_new_session=True
                    )
                )

    def text(self) -> str:
        """What rank 0 has said."""
        return self.outputs[0].read_text(errors="replace")

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def wait(self, seconds: float) -> bool:
        """Whether all processes ended by themselves in this time."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.running()

    def kill_all(self) -> None:
        """All ranks and their loader workers, at once."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def statuses(self) -> list[int | None]:
        return [process.poll() for process in self.processes]


def is_writing(ranks: Ranks) -> bool:
    """Whether a file of a checkpoint is there that is not complete, and not a leftover of an earlier kill."""
    with contextlib.suppress(FileNotFoundError):  # complete by now
        return any(path.stat().st_mtime > ranks.started for path in (ranks.run / "checkpoints").glob("*.tmp"))
    return False


def steps_done(run: Path) -> int:
    """Lines in the log of training."""
    log = run / "train.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_moment(ranks: Ranks, draw: random.Random, longest: float) -> str | None:
    """Wait for the moment of the next kill; returns what it was, or None if the run was over before."""
    start = steps_done(ranks.run)
    while ranks.running() and steps_done(ranks.run) == start:
        time.sleep(0.01)
    deadline = time.monotonic() + draw.uniform(0, longest)
    writing = draw.random() < 1 / 3
    while ranks.running():
        if writing and time.monotonic() > deadline - longest / 2 and is_writing(ranks):
            return "while a checkpoint was written"
        if time.monotonic() > deadline and not writing:
            return "at a random moment"
        time.sleep(0.0005)
    return None


def disturb(ranks: Ranks, draw: random.Random) -> tuple[str, list[str]]:
    """Kill a run in one of the ways; returns the way, and what went wrong with it."""
    way = draw.choice(["all ranks", "all ranks", "one rank", "SIGTERM"])
    problems = []
    if way == "one rank" and len(ranks.processes) > 1:
        draw.choice(ranks.processes).kill()
        if not ranks.wait(PATIENCE):
            problems.append(f"the other ranks did not end within {PATIENCE:g} s")
    elif way == "SIGTERM":
        for process in ranks.processes:
            process.send_signal(signal.SIGTERM)
        if not ranks.wait(PATIENCE):
            problems.append(f"SIGTERM did not end the run within {PATIENCE:g} s")
        elif not set(ranks.statuses()) <= {REQUEUE, 0}:
            problems.append(f"SIGTERM ended with {ranks.statuses()} and not {REQUEUE}")
    ranks.kill_all()
    return way, problems


# ---- comparison


def last_lines(path: Path, key: str) -> dict[Any, dict[str, Any]]:
    """The objects of a file of JSON lines by one of their values, the last of each, without what the clock decides."""
    found = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        timed = ("_seconds", "_time", "_per_second", "_per_second_per_gpu")
        found[entry[key]] = {name: value for name, value in entry.items() if not name.endswith(timed)}
    return found


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value of nested containers with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from leaves(item, f"{name}.{place}")
    else:
        yield name, value


def is_equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and torch.equal(first.nan_to_num(-7), second.nan_to_num(-7))
    return bool(first == second)


OF_THE_RUN = (".name", ".dissect.token", ".dissect.scores_file", ".dissect.parts.progress.seconds")


def checkpoint(run: Path, epoch: int) -> dict[str, Any]:
    """All values of an epoch's checkpoint that should be equal in equal runs."""
    path = run / "checkpoints" / f"epoch_{epoch}.pt"
    content = dict(leaves(torch.load(path, weights_only=True)))
    values = {name: value for name, value in content.items() if not name.startswith(OF_THE_RUN)}
    scores = path.with_name(f"epoch_{epoch}.scores.safetensors")
    return values | {"scores": load_file(scores)["scores"] if scores.exists() else None}


def rows(path: Path) -> pa.Table:
    """All rows of a Parquet file or folder, in an order of their values."""
    table = pq.read_table(path)
    plain = pa.table({name: table[name].cast(pa.string()) for name in table.column_names})
    return plain.sort_by([(name, "ascending") for name in plain.column_names])


def named_differences(what: str, first: dict[Any, Any], second: dict[Any, Any]) -> Iterator[str]:
    for name in sorted({*first, *second}, key=str):
        if name not in first or name not in second or not is_equal(first[name], second[name]):
            yield f"{what} {name}"


def compare(undisturbed: Path, killed: Path, epochs: int) -> list[str]:
    """What differs between two runs, a line each."""
    found: list[str] = []
    for epoch in range(1, epochs + 1):
        found += named_differences(f"epoch_{epoch}.pt", checkpoint(undisturbed, epoch), checkpoint(killed, epoch))
    for file, key in (("train.jsonl", "step"), ("checkpoints/results.jsonl", "epoch")):
        found += named_differences(file, last_lines(undisturbed / file, key), last_lines(killed / file, key))
    for folder in ("record", "skipped.parquet", "clean.parquet"):
        if (undisturbed / folder).exists() != (killed / folder).exists():
            found.append(f"{folder} is in one run only")
        elif (undisturbed / folder).exists() and not rows(undisturbed / folder).equals(rows(killed / folder)):
            found.append(f"{folder} holds other rows")
    return found


# ---- the whole


def undisturbed(plan: Plan, strategy: str) -> tuple[Path, float]:
    """A run to the end; returns its folder and the seconds that its training took."""
    ranks = Ranks(plan, strategy, f"{strategy}-undisturbed", 0)
    while ranks.running() and steps_done(ranks.run) == 0:
        time.sleep(0.01)
    start = time.monotonic()
    ranks.wait(3600)
    if any(ranks.statuses()):
        sys.exit(f"error: the undisturbed run ended with {ranks.statuses()}:\n{ranks.text()}")
    return ranks.run, time.monotonic() - start


def killed_run(plan: Plan, strategy: str, number: int, quota: int, seconds: float, score: Score) -> Path:
    """A run to the end, killed ``quota`` times on the way, or fewer if it ends before."""
    name = f"{strategy}-killed-{number}"
    draw = random.Random(f"{plan.seed} {name}")
    kills = 0
    for start in range(10 * quota + 10):
        ranks = Ranks(plan, strategy, name, start)
        moment = None
        if kills < quota:
            moment = wait_for_moment(ranks, draw, 2 * seconds / (quota + 1))
        if moment is None:
            ranks.wait(3600)
        else:
            way, problems = disturb(ranks, draw)
            kills += 1
            score.kills[way] += 1
            score.differences += [f"{name}: {problem}" for problem in problems]
            print(f"  {name}: kill {kills} ({way}, {moment}) after {steps_done(ranks.run)} logged steps", flush=True)
        if start > 0:
            said = ranks.text()
            score.resumes += "Resumed from" in said
            score.anew += "starting anew" in said
        if moment is None:
            if any(ranks.statuses()):
                score.differences.append(f"{name}: ended with {ranks.statuses()}, see {ranks.outputs[0]}")
            return ranks.run
    sys.exit(f"error: {name} does not come to its end, see {plan.out / 'output'}")


def torment(plan: Plan, strategy: str, quota: int, score: Score) -> None:
    """One strategy: an undisturbed run, then killed ones until the quota is reached."""
    reference, seconds = undisturbed(plan, strategy)
    print(f"{strategy}: undisturbed run done, {seconds:.0f} s of training", flush=True)
    before = score.kills.total()
    number = 0
    while (left := quota - (score.kills.total() - before)) > 0:
        run = killed_run(plan, strategy, number, left, seconds, score)
        found = compare(reference, run, plan.epochs)
        score.differences += [f"{run.name}: {line}" for line in found]
        print(f"  {run.name}: {len(found)} differences", flush=True)
        number += 1


def parse_args() -> Plan:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "chaos", help="folder to work in (default: %(default)s)")
    parser.add_argument("--train-data", help="training shards (default: drawn scenes and some broken samples)")
    parser.add_argument("--val-data", help="validation shards, needed with --train-data")
    parser.add_argument("--kills", type=int, default=50, help="at least so many in all (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="of each run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="of each rank (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="loader workers of each rank (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and ways (default: %(default)s)")
    every = ("none", *STRATEGIES)
    parser.add_argument("--strategies", nargs="+", default=every, choices=every, help="none is training on all data")
    parser.add_argument("flags", nargs="*", help="more flags of src/main.py, after --")
    args = parser.parse_args()
    if (args.train_data is None) != (args.val_data is None):
        parser.error("--train-data and --val-data go together")
    out = args.out.resolve()
    data = out / "data"
    if args.train_data is None:
        make_data(data)
    return Plan(
        out=out,
        train_data=args.train_data or f"{data}/train-*.tar",
        val_data=args.val_data or f"{data}/val-*.tar",
        kills=args.kills,
        processes=args.processes,
        epochs=args.epochs,
        batch_size=args.batch_size,
        workers=args.workers,
        seed=args.seed,
        strategies=tuple(args.strategies),
        flags=tuple(args.flags),
    )


def main() -> int:
    plan = parse_args()
    for folder in ("runs", "output"):
        shutil.rmtree(plan.out / folder, ignore_errors=True)
    score = Score()
    quota = -(-plan.kills // len(plan.strategies))
    for strategy in plan.strategies:
        torment(plan, strategy, quota, score)
    for difference in score.differences:
        print(f"different: {difference}")
    print("killed: " + ", ".join(f"{count} times {way}" for way, count in score.kills.items()))
    if score.anew:
        print(f"{score.anew} of the resumes found no checkpoint yet and began anew")
    print(f"{score.kills.total()} kills, {score.resumes + score.anew} resumes, {len(score.differences)} differences")
    return int(bool(score.differences) or score.resumes + score.anew != score.kills.total())


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""The benchmarks of docs/results/performance.md one after the other, at sizes for a CPU: `make bench`.

loader.py and time_to_quality.py are not among them.

    python benchmarks/all.py [--out bench] [--only step_cost epoch_cost store trainer scale gpu]

Their JSON lines go to OUT/bench.jsonl as well, and OUT gets the plots. On two cores it takes some ten minutes; on a
machine with other work to do, figures are not worth keeping.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import read_lines
from plot import draw

HERE = Path(__file__).resolve().parent

COMMANDS: dict[str, list[str]] = {
    "step_cost": ["step_cost.py"],
    "epoch_cost": [
        "step_cost.py", "--loading", "--rates", "0.1", "0.3", "0.5", "--turns", "5", "--steps", "3",
        "--modes", "exact", "refresh 0", "before load",
    ],
    "store": ["store.py"],
    "trainer": ["trainer.py", "--turns", "3", "--steps", "30"],
    "scale": ["scale.py", "--samples", "100000000", "--parts", "store", "gather", "loader"],
    "gpu": ["gpu.py"],
}  # fmt: skip
"""What is run, by name."""


def run(words: Sequence[str], file: Path) -> int:
    """Run a benchmark, showing what it prints and adding it to a file; its exit status."""
    process = subprocess.Popen([sys.executable, str(HERE / words[0]), *words[1:]], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with file.open("a", encoding="utf-8") as kept:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                kept.write(line)
                kept.flush()
    return process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a benchmark failed; the others run all the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "bench.jsonl"
    file.write_text("", encoding="utf-8")
    failed = []
    for name in options.only:
        began = time.perf_counter()
        print(f"# {name}: {' '.join(COMMANDS[name])}", flush=True)
        if run(COMMANDS[name], file) != 0:
            failed.append(name)
        print(f"# {name}: {time.perf_counter() - began:.0f} s", flush=True)
    for picture in draw(read_lines(file), options.out):
        print(f"# {picture}")
    if failed:
        print(f"error: {', '.join(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Our trainer without selection beside OpenCLIP's own: pairs a second, with the same model, data and flags.

    python benchmarks/trainer.py [--model RN-tiny] [--batch-size 256] [--steps 40] [--turns 5] [--workers 1]
        [--shards] [--train-data 'shards/*.tar'] [--openclip-python /path/to/venv/bin/python]

One process each, in turns: what starts first changes. Of a run of `--steps` steps the first `--skip` do not count, in
which loaders and libraries start; of the others the time from the beginning of one step to the beginning of the next
counts, waiting for the loader included. Reported are pairs a second, and in each turn ours over OpenCLIP's: median and
quartiles.

By default the images are blank and the captions all alike (`--dataset-type synthetic`), which both have: the loaders
differ in that OpenCLIP keeps a decoded image, while ours decodes a PNG each time. `--shards` makes shards of JPEGs,
and `--train-data` takes some that are there. OpenCLIP 3.3.0 cannot read shards with the newest webdataset; make an
environment for it and give its Python:

    python -m venv oclip && oclip/bin/pip install 'open_clip_torch[training]==3.3.0' 'webdataset==0.2.86'

On a CPU a small model's time depends on whether glibc gives the memory of large gradients back after every step, which
is a matter of luck: `MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000` before the command keeps it
for both. The line of JSON says what was set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from common import flags, in_turns, quartiles, ratios, report, write_shards

DRIVER = Path(__file__).resolve().parent / "driver.py"


def command(options: argparse.Namespace, which: str, folder: str) -> list[str]:
    """The command line of one run; but for the Python the same for both."""
    settings = {
        "model": options.model, "batch-size": options.batch_size, "workers": options.workers, "epochs": 1,
        "train-num-samples": options.steps * options.batch_size, "precision": options.precision,
        "device": options.device, "warmup": 10, "save-frequency": 0, "log-every-n-steps": 20, "logs": folder,
        "name": "run",
    }  # fmt: skip
    data = ["--dataset-type", "synthetic"]
    if options.train_data is not None:
        # Drawing shards with replacement lets --train-num-samples be anything, for both.
        data = ["--dataset-type", "webdataset", "--train-data", options.train_data, "--dataset-resampled"]
    python = options.openclip_python if which == "openclip" else sys.executable
    return [python, str(DRIVER), which, *flags(settings), *data]


def pairs_a_second(options: argparse.Namespace, which: str) -> float:
    """Of one run.

    Raises:
        SystemExit: with the end of its output, if it fails.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command(options, which, folder), capture_output=True, text=True, env=environment, cwd=folder, check=False
        )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise SystemExit(f"{tail}\nerror: the trainer `{which}` ended with status {done.returncode}")
    steps = json.loads(done.stdout.splitlines()[-1])[options.skip :]
    return options.batch_size * len(steps) / sum(steps)


def main(argv: Sequence[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="RN-tiny")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--skip", type=int, default=5, help="steps at the beginning that do not count")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--precision", default="amp_bf16" if on_gpu else "fp32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--train-data", help="shards to read")
    parser.add_argument("--shards", action="store_true", help="make shards of JPEGs and read them")
    parser.add_argument("--image-side", type=int, default=256, help="--shards: pixels of the JPEGs")
    parser.add_argument("--openclip-python", default=sys.executable, help="the Python to run OpenCLIP's trainer in")
    options = parser.parse_args(argv)
    if options.steps < options.skip + 2:
        parser.error("--steps must be at least --skip + 2")
    works = {which: lambda which=which: pairs_a_second(options, which) for which in ("ours", "openclip")}
    with tempfile.TemporaryDirectory() as folder:
        if options.shards:
            options.train_data = write_shards(Path(folder), 8 * 256, options.image_side)
        found = in_turns(works, options.turns, warm=0)
    report(
        "trainer",
        data="synthetic" if options.train_data is None else "shards",
        **{name: getattr(options, name) for name in ("model", "batch_size", "workers", "precision", "device")},
        steps=options.steps - options.skip - 1,
        turns=options.turns,
        malloc={name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
        ours_per_second=quartiles(found["ours"], 1),
        openclip_per_second=quartiles(found["openclip"], 1),
        ratio=quartiles(ratios(found["ours"], found["openclip"])),
    )


if __name__ == "__main__":
    main()

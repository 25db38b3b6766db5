"""Runs of ``src/main.py`` for the golden values, many in one process, and what is read of their files.

Nothing of the package is imported: a run is its command line, and its values are those of the files that it leaves.
As a script, with a file of jobs, it is one rank that does all of them; see :func:`run_jobs`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import random
import runpy
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
MAIN = str(ROOT / "src" / "main.py")
SHARD_SIZES = (30, 22, 26, 18)
GLOBAL_BATCH = 16
EPOCHS = 3
BATCHES = sum(SHARD_SIZES) // GLOBAL_BATCH  # of an epoch

# The same kernels on every x86 machine, as far as the libraries let us choose.
KERNELS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1}
MODELS = {
    "golden-vit": {
        "embed_dim": 8,
        "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 16},
        "text_cfg": TEXT,
    },
    "golden-rn": {
        "embed_dim": 8,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
        "text_cfg": TEXT,
    },
}


# ---- what is trained on


def captions() -> list[str]:
    """A caption for each sample."""
    words = [("red", "dark", "small", "old"), ("cat", "house", "tree", "boat", "hill")]
    return [f"{words[0][i % 4]} {words[1][i % 5]} {i}" for i in range(sum(SHARD_SIZES))]


def make_data(folder: Path) -> Path:
    """Shards and models, the same bytes of pixels and captions each time; returns ``folder``."""
    folder.mkdir(parents=True)
    noise = random.Random(7)
    texts = iter(captions())
    number = 0
    for place, size in enumerate(SHARD_SIZES):
        with tarfile.open(folder / f"train-{place}.tar", "w") as tar:
            for _ in range(size):
                pixels = np.frombuffer(noise.randbytes(20 * 24 * 3), np.uint8).reshape(20, 24, 3) // 2
                pixels[..., number % 3] += 32 * (number % 4)
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "png")
                for suffix, content in (("png", png.getvalue()), ("txt", next(texts).encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
    for name, content in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# ---- command lines


@dataclass(frozen=True)
class Case:
    """A command line, but for the paths; and whether it also goes on from a checkpoint inside its second epoch."""

    name: str
    flags: dict[str, Any]
    ranks: int = 1
    resumes: bool = True
    kept: str = field(init=False)  # name of the step checkpoint

    def __post_init__(self) -> None:
        # The middle of the second epoch; no multiple of it lies inside another.
        step = 9 if self.flags.get("accum_freq", 1) == 1 else 5
        object.__setattr__(self, "kept", f"epoch_1_step_{step}")

    def words(self, data: Path, logs: Path, name: str, **changes: Any) -> list[str]:
        """The command line of a run ``logs/name``; True adds a switch."""
        flags: dict[str, Any] = {
            "train_data": data / f"train-{{0..{len(SHARD_SIZES) - 1}}}.tar", "model_config": data,
            "model": "golden-vit", "device": "cpu", "precision": "fp32", "workers": 0, "epochs": EPOCHS,
            "batch_size": GLOBAL_BATCH // self.ranks, "warmup": 2, "lr": 1e-3, "output_dir": logs, "name": name,
            "log_every_n_steps": 1, "save_frequency": 0, "rank_timeout": 120,
        }  # fmt: skip
        flags |= {"record": True} if "select" in self.flags else {}
        words = []
        for flag, value in (flags | self.flags | changes).items():
            words += ["--" + flag.replace("_", "-")] + ([] if value is True else [str(value)])
        return words


def jobs_of(case: Case, data: Path, logs: Path) -> list[dict[str, Any]]:
    """The runs of a case: the whole one, and the one that goes on from its step checkpoint."""
    if not case.resumes:
        return [{"name": case.name, "argv": case.words(data, logs, case.name)}]
    step = case.kept.rpartition("_")[2]
    whole = case.words(data, logs, case.name, save_every_n_steps=step)
    resume = logs / "kept" / case.name / f"{case.kept}.pt"
    rest = case.words(data, logs, f"{case.name}-resumed", resume=resume)
    return [
        {"name": case.name, "argv": whole, "keep": case.kept, "keep_in": str(resume.parent)},
        {"name": f"{case.name}-resumed", "argv": rest},
    ]


# ---- running


def run_jobs(folder: Path, jobs: Sequence[dict[str, Any]], ranks: int, seconds: float = 400) -> None:
    """Do the jobs one after another in as many processes as there are ranks; all of them write into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    outputs = [folder / f"rank{rank}.err" for rank in range(ranks)]
    processes = []
    for rank, output in enumerate(outputs):
        environment = os.environ | KERNELS | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment["MASTER_ADDR"] = "127.0.0.1"
        with output.open("wb") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, folder / "jobs.json"], env=environment, stdout=file, stderr=file
                )
            )
    deadline = time.monotonic() + seconds
    try:
        while (codes := [process.poll() for process in processes]).count(0) < ranks and time.monotonic() < deadline:
            if any(codes):  # the others notice within seconds, and say why they end
                time.sleep(5)
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = "\n".join(output.read_text(errors="replace")[-4000:] for output in outputs)
    assert codes == [0] * ranks, f"exit statuses {codes}, None for one that was ended:\n{said}"


def machine(folder: Path) -> dict[str, str]:
    """What the numbers of runs depend on beside their flags, as the processes of :func:`run_jobs` saw it."""
    found: dict[str, str] = json.loads((folder / "machine.json").read_text())
    return found


def _machine() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    cpu = {name.strip(): value.strip() for name, _, value in lines}
    packages = {name: version(name) for name in ("numpy", "open_clip_torch", "pillow", "timm", "scikit-learn")}
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "arch": platform.machine(),
        "system": platform.system(),
        "vendor": cpu.get("vendor_id", platform.processor()),
        "cpu": cpu.get("model name", "unknown"),
        **packages,
    }


def _meet(folder: Path, number: int) -> None:
    """A free port for this job, which the first rank finds."""
    path = folder / f"port{number}"
    if os.environ["RANK"] == "0":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            path.with_suffix(".tmp").write_text(str(probe.getsockname()[1]))
        path.with_suffix(".tmp").rename(path)
    while not path.exists():
        time.sleep(0.002)
    os.environ["MASTER_PORT"] = path.read_text()


def _work(jobs_file: Path) -> None:
    """Do the jobs of a file as one rank."""
    torch.set_num_threads(1)
    if os.environ.get("RANK", "0") == "0":
        jobs_file.with_name("machine.json").write_text(json.dumps(_machine()))
    keeping: dict[str, Any] = {}

    def keep(event: str, arguments: tuple[Any, ...]) -> None:
        """A step checkpoint is deleted when a newer one is there: it stays under another path."""
        if event != "os.remove" or "keep" not in keeping:
            return
        path = Path(os.fsdecode(arguments[0]))
        if path.name.partition(".")[0] == keeping["keep"]:
            target = Path(keeping["keep_in"])
            target.mkdir(parents=True, exist_ok=True)
            os.link(path, target / path.name)

    sys.addaudithook(keep)
    for number, job in enumerate(json.loads(jobs_file.read_text())):
        if "RANK" in os.environ:
            _meet(jobs_file.parent, number)
        keeping.clear()
        keeping.update(job)
        sys.argv = [MAIN, *job["argv"]]
        began = time.monotonic()
        try:
            runpy.run_path(MAIN, run_name="__main__")
        except SystemExit as end:
            if end.code:
                sys.exit(f"the run {job['name']} ended with status {end.code}")
        print(f"{job['name']} took {time.monotonic() - began:.2f} s", file=sys.stderr)


# ---- the values of a run


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:24]


def _bytes(values: np.ndarray[Any, Any]) -> bytes:
    """Of an array, every NaN the same."""
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), np.array(np.nan, values.dtype), values)
    return np.ascontiguousarray(values).tobytes()


def _recorded(run: Path, since: tuple[int, int]) -> dict[str, str]:
    """Of each epoch: a hash of the ids that were selected, and one of each column of numbers; batches by rank.

    ``since`` is the epoch, and the batch in it, from which on the rows count.
    """
    found = {}
    for path in sorted(run.glob("record/epoch_*.parquet")):
        epoch = int(path.stem.rpartition("_")[2])
        table = pq.read_table(path)
        columns = {
            name: table[name].to_numpy(zero_copy_only=False)
            for name in table.column_names
            if name not in ("shard", "key")
        }
        order = np.lexsort((columns["rank"], columns["step"]))  # stable
        order = order[columns["step"][order] >= (since[1] if epoch == since[0] else 0)]
        if epoch < since[0]:
            continue
        columns = {name: values[order] for name, values in columns.items()}
        chosen = columns.pop("selected").astype(bool)
        ids, steps, ranks = (columns.pop(name) for name in ("sample_id", "step", "rank"))
        place = [_bytes(values.astype(np.int64)) for values in (ids, steps, ranks)]
        found[f"epoch {epoch} samples"] = _digest(*place)
        found[f"epoch {epoch} selected"] = _digest(_bytes(ids[chosen].astype(np.int64)))
        for name, values in columns.items():
            found[f"epoch {epoch} {name}"] = _digest(_bytes(values.astype(np.float32)))
    return found


def values_of(run: Path, since: tuple[int, int] = (0, 0), first_step: int = 0) -> dict[str, Any]:
    """What a run is told by, of the steps after ``first_step``, which is where the batch ``since`` begins."""
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    (path,) = run.glob(f"checkpoints/epoch_{EPOCHS}.pt")
    weights = torch.load(path, weights_only=True)["state_dict"]
    parts = [
        part
        for name, value in sorted(weights.items())
        for part in (f"{name} {value.dtype} {tuple(value.shape)}".encode(), _bytes(value.numpy()))
    ]
    scores = path.with_suffix(".scores.safetensors")
    return {
        "losses": [float(line["loss"]).hex() for line in lines if line["step"] > first_step],
        "record": _recorded(run, since),
        "scores": _digest(_bytes(load_file(scores)["scores"].numpy())) if scores.exists() else None,
        "weights": _digest(*parts),
    }


if __name__ == "__main__":
    _work(Path(sys.argv[1]))

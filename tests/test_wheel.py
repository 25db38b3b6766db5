"""The wheel holds the package alone, and works from an environment and a folder that know nothing of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from benchmark_sets import retrieval_set

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--dataset-type", "synthetic", "--train-num-samples", "16", "--model", "RN-tiny", "--batch-size", "8",
    "--workers", "0", "--epochs", "1", "--warmup", "1", "--device", "cpu", "--precision", "fp32",
)  # fmt: skip

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path) -> str:
    """What a command prints, without the paths that the tests have."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves files in the folder that it builds from."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    flags = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *flags, copy, cwd=folder)
    (found,) = folder.glob("dissect_clip-*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """The folder of programs of an environment with the wheel and, from this one, what it depends on."""
    place = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=wheel.parent)
    (site,) = place.glob("lib/python*/site-packages")
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel, cwd=wheel.parent)
    # Behind the environment's own: of a package in both, the wheel's counts.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


def test_it_holds_the_package_its_models_and_its_types(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    ours = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "dissect_clip").rglob("*.py")}
    data = {f"dissect_clip/models/configs/{path.name}" for path in ROOT.glob("src/dissect_clip/models/configs/*.json")}
    assert {name for name in names if ".dist-info/" not in name} == ours | data | {"dissect_clip/py.typed"}
    assert len(data) >= 2


def test_it_trains_and_evaluates_outside_the_checkout(environment: Path, tmp_path: Path):
    where = "import dissect_clip; print(dissect_clip.__file__)"
    assert Path(run(environment / "python", "-c", where, cwd=tmp_path).strip()).is_relative_to(environment.parent)
    assert "--select-rate" in run(environment / "dissect-clip", "--help", cwd=tmp_path)
    run(environment / "dissect-clip", "train", *SMALL, "--select", "--select-strategy", "small_loss",
        "--select-rate", "0.5", "--logs", "logs", "--name", "run", cwd=tmp_path)  # fmt: skip
    lines = (tmp_path / "logs" / "run" / "train.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["trained"] == 8
    pairs = retrieval_set(tmp_path / "pairs")
    run(environment / "python", "-m", "dissect_clip", "evaluate", "--dataset", pairs, "--model", "RN-tiny",
        "--checkpoint", "logs/run/checkpoints/epoch_1.pt", "--device", "cpu", "--workers", "0",
        "--output", "{dataset}.json", "--summary", "table.md", cwd=tmp_path)  # fmt: skip
    assert "image_retrieval_recall@1" in json.loads((tmp_path / "pairs.json").read_text())["metrics"]

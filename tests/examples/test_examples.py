"""The examples run as they are printed, on a CPU, and say what they kept."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LINES = 60

KEPT = {
    "plain_pytorch.py": ["kept 76 of 256", "kept 76 of 256", "kept 76 of 256"],
    "ddp.py": ["kept 16 of 32"] * 4,
    "lightning_module.py": ["kept 152 of 512"],
    "huggingface_trainer.py": ["kept 256 of 512"],
    "image_classifier.py": ["kept 8592 of 10782", "kept 8957 of 10782"],
}
"""What each example prints."""

NEEDS = {"lightning_module.py": ("lightning",), "huggingface_trainer.py": ("transformers", "accelerate")}


def run(name: str, folder: Path) -> str:
    """Standard output of an example."""
    command = [sys.executable, str(EXAMPLES / name)]
    if name == "ddp.py":
        command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    path = os.pathsep.join([str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_an_example_runs_and_says_what_it_kept(name: str, tmp_path: Path):
    for module in NEEDS.get(name, ()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    assert sorted(re.findall(r"kept \d+ of \d+", run(name, tmp_path))) == sorted(KEPT[name])


@pytest.mark.parametrize("name", KEPT)
def test_an_example_is_short_and_tells_how_to_run_it(name: str):
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) <= LINES
    assert f"examples/{name}" in text.split('"""')[1]


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*KEPT, "pairs.py"}

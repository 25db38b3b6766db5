"""The commands: their help and their errors answer without heavy imports; they share words and exit statuses."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dissect_clip.cli import main
from dissect_clip.cli.exit_status import STATUSES
from dissect_clip.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]

HEAVY = {
    "torch", "torchvision", "open_clip", "open_clip_train", "timm", "transformers", "numpy", "pandas", "pyarrow",
    "sklearn", "matplotlib", "webdataset", "fsspec", "safetensors", "tqdm",
}  # fmt: skip
"""Imports that take long. With the longest, torch and transformers, an answer took seven seconds."""

ANSWER = """
import sys
from dissect_clip.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print("\\n", status, *sorted(name for name in sys.modules if "." not in name))
"""

WITH_FLAGS = [name for name in COMMANDS if name != "reproduce"]  # whose flags are those of the repository's grid runner


def answer(*words: str) -> tuple[int, str, set[str]]:
    """Exit status, output, and the top-level modules that were imported."""
    run = subprocess.run([sys.executable, "-c", ANSWER, *words], capture_output=True, text=True, cwd=ROOT, check=True)
    said, _, last = run.stdout.rstrip("\n").rpartition("\n")
    status, *modules = last.split()
    return int(status), said + run.stderr, set(modules)


@pytest.mark.parametrize("words", [["--help"], ["--help-all"], ["-h"], *([name, "--help"] for name in WITH_FLAGS)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    status, said, modules = answer(*words)
    assert status == 0
    assert said.startswith("usage: dissect-clip")
    assert modules & HEAVY == set()


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        (["--batch-sise", "3"], "--batch-size"),
        (["--batch-size", "0"], "at least 1"),
        (["--train-data", "x.tar", "--select-rate", "0.5"], "--select"),
        (["--select-strategy", "nonsense"], "warmup_base_sampling"),
        (["--torchscript"], "--torchscript"),
        (["train", "--epochs", "many"], "'many'"),
        (["evaluat", "--dataset", "x"], "evaluate"),
        (["evaluate", "--datasets", "x"], "--dataset"),
        (["evaluate"], "--dataset"),
        (["evaluate", "--dataset", "x", "--batch-size", "-1"], "at least 1"),
        (["index", "x.tar", "--workers", "0"], "--workers"),
        (["index", "x.tar", "--chek"], "--check"),
        (["score", "scores", "--passes", "0"], "--passes"),
        (["score", "scores", "--", "--train-date", "x"], "--train-data"),
        (["score", "scores", "--", "--train-data", "x.tar"], "--pretrained"),
        (["coreset", "record", "--method", "random", "--output", "x.parquet"], "--rate"),
        (
            ["coreset", "scores", "--method", "cliploss", "--rate", "0.3", "--output", "x.parquet", "--", "--modell"],
            "--model",
        ),
        (["export", "x.tar", "--keep", "k", "--output", "o", "--per-shard", "0"], "--per-shard"),
        (["clean-report", "clean.parquet", "--wrong", "w.csv"], "--train-data"),
    ],
    ids=" ".join,
)
def test_a_wrong_flag_is_refused_before_anything_heavy_is_imported(words: list[str], quoted: str) -> None:
    status, said, modules = answer(*words)
    assert status == 2
    assert re.search(r"^error: .*" + re.escape(quoted), said, re.MULTILINE)
    assert modules & HEAVY == set()


def test_the_table_of_commands_imports_no_command() -> None:
    code = "import sys, dissect_clip.cli; print(*sorted(n for n in sys.modules if n.startswith('dissect_clip.')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.split() == ["dissect_clip.cli", "dissect_clip.cli.main"]


@pytest.mark.parametrize("name", [name for name in WITH_FLAGS if name != "train"])
def test_each_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"\n  dissect-clip {name} " in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_of_training_says_what_each_exit_status_means(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([flag])
    said = capsys.readouterr().out
    for status, meaning in STATUSES.items():
        assert re.search(rf"^  {status} +{re.escape(meaning)}$", said, re.MULTILINE)


@pytest.mark.parametrize("start", [["-m", "dissect_clip"], ["src/main.py"], ["scripts/index_shards.py"]])
def test_ways_to_start(start: list[str]) -> None:
    """From a checkout, and for the scripts without an installed package."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "src" if start[0] == "-m" else ""}
    run = subprocess.run(
        [sys.executable, *start, "--help"], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("usage: dissect-clip")

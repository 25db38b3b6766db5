"""The shell scripts, with a torchrun in place of the real one that only writes down what it was called with."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from dissect_clip.config.parser import parse_args
from dissect_clip.config.settings import Config
from dissect_clip.selection import STRATEGIES

SCRIPTS = {"train_cc3m.sh": 40, "train_cc12m.sh": 20, "train_yfcc15m.sh": 20}
SBATCH = "scripts/slurm/train_multinode.sbatch"


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working folder with shards, and a folder of programs that stand in for those of a cluster."""
    for name in ("000.tar", "001.tar"):
        shard = tmp_path / "shards" / name
        shard.parent.mkdir(exist_ok=True)
        shard.touch()
    executable(tmp_path / "bin" / "torchrun", f'printf "%s\\n" "$@" > {tmp_path}/called')
    executable(tmp_path / "bin" / "nvidia-smi", 'echo "GPU 0: a"; echo "GPU 1: b"; echo "GPU 2: c"')
    executable(tmp_path / "bin" / "srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    requeue = f'[[ "$1" == requeue ]] && echo "$2" > {tmp_path}/requeued'
    executable(tmp_path / "bin" / "scontrol", f"{requeue}; echo node07; echo node08")
    return tmp_path


def start(place: Path, script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": f"{place}/bin:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", str(ROOT / script), *flags],
        cwd=place,
        env=base | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def called(place: Path, script: str, *flags: str, **environment: str) -> tuple[list[str], Config]:
    """torchrun's own arguments, and the settings that src/main.py would read from the rest."""
    done = start(place, script, *flags, **({"DATA": "shards/{000..001}.tar"} | environment))
    assert done.returncode == 0, done.stderr
    words = (place / "called").read_text().splitlines()
    main = words.index(str(ROOT / "src" / "main.py"))
    return words[:main], parse_args(words[main + 1 :], STRATEGIES)


@pytest.mark.parametrize(("script", "epochs"), SCRIPTS.items())
def test_the_defaults_are_the_published_settings(place: Path, script: str, epochs: int) -> None:
    launcher, config = called(place, script)
    assert launcher == ["--standalone", "--nproc_per_node=3"]
    assert (config.data.train_data, config.evaluation.val_data, config.run.name) == (
        "shards/{000..001}.tar",
        None,
        None,
    )
    assert (config.model.model, config.training.batch_size, config.training.epochs) == ("RN50", 1280, epochs)
    assert (
        config.training.lr,
        config.training.warmup,
        config.training.wd,
        config.training.precision,
        config.training.seed,
    ) == (2e-3, 10000, 0.1, "amp", 0)
    assert (config.training.opt, config.training.lr_scheduler) == ("adamw", "cosine")
    assert config.selection.select
    assert (config.selection.select_strategy, config.selection.select_rate, config.get("warmup_point")) == (
        "warmup_base_sampling",
        0.2,
        10,
    )
    assert config.data.train_num_samples is None, "the size comes from the shards"


def test_every_variable_arrives(place: Path) -> None:
    launcher, config = called(
        place, "train_cc3m.sh", GPUS="5", RATE="0.5", WARMUP_POINT="3", BATCH_SIZE="32", EPOCHS="7", MODEL="ViT-B-32",
        WORKERS="2", NAME="mine", OUTPUT_DIR="some where", VAL_DATA="shards/*.tar", DATA="shards/*.tar",
        TORCHRUN_ARGS="--nnodes=2 --rdzv_backend=c10d",
    )  # fmt: skip
    assert launcher == ["--nnodes=2", "--rdzv_backend=c10d", "--nproc_per_node=5"]
    assert (
        config.selection.select_rate,
        config.get("warmup_point"),
        config.training.batch_size,
        config.training.epochs,
    ) == (0.5, 3, 32, 7)
    assert (config.model.model, config.data.workers, config.run.name, config.run.logs) == (
        "ViT-B-32",
        2,
        "mine",
        "some where",
    )
    assert (config.data.train_data, config.evaluation.val_data) == ("shards/*.tar", "shards/*.tar")


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_strategy_may_be_chosen(place: Path, strategy: str) -> None:
    _, config = called(place, "train_cc3m.sh", STRATEGY=strategy)
    assert (config.selection.select, config.selection.select_strategy, config.selection.select_rate) == (
        True,
        strategy,
        0.2,
    )


@pytest.mark.parametrize(("strategy", "epochs"), [("learnability", 10), ("clean_posterior", 5)])
def test_warm_ups_last_as_long_as_the_usage_says(place: Path, strategy: str, epochs: int) -> None:
    assert called(place, "train_cc3m.sh", STRATEGY=strategy)[1].get("warmup_point") == epochs
    assert called(place, "train_cc3m.sh", STRATEGY=strategy, WARMUP_POINT="3")[1].get("warmup_point") == 3


def test_strategy_none_trains_on_everything(place: Path) -> None:
    assert not called(place, "train_cc3m.sh", STRATEGY="none")[1].selection.select


def test_flags_of_the_script_win(place: Path) -> None:
    _, config = called(place, "train_cc3m.sh", "--lr", "1e-4", "--aug-cfg", "scale=(0.5, 1.0)", "--batch-size", "8")
    assert (config.training.lr, config.training.batch_size, config.model.aug_cfg) == (1e-4, 8, {"scale": (0.5, 1.0)})


@pytest.mark.parametrize(("visible", "count"), [("0,3", 2), ("7", 1), ("", 1)])
def test_only_visible_gpus_are_used(place: Path, visible: str, count: int) -> None:
    launcher, _ = called(place, "train_cc3m.sh", CUDA_VISIBLE_DEVICES=visible)
    assert f"--nproc_per_node={count}" in launcher


def test_one_process_where_there_is_no_gpu(place: Path) -> None:
    executable(place / "bin" / "nvidia-smi", "echo 'No devices were found' >&2; exit 6")
    assert "--nproc_per_node=1" in called(place, "train_cc3m.sh")[0]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "data", ["", "elsewhere/{000..009}.tar", "elsewhere/*.tar", "shards/000.tar::elsewhere/{a,b}/{0..3}.tar"]
)
def test_missing_shards_stop_with_what_to_set(place: Path, script: str, data: str) -> None:
    done = start(place, script, DATA=data)
    missing = data.split("::")[-1] or f"data/{script[6:-3]}/*.tar"
    assert done.returncode == 2
    assert f"shards at {missing} " in done.stderr
    assert "Set DATA to where they are" in done.stderr
    assert script in done.stderr
    assert not (place / "called").exists()


def test_missing_validation_shards_stop_too(place: Path) -> None:
    done = start(place, "train_cc3m.sh", DATA="shards/*.tar", VAL_DATA="val/*.tar")
    assert done.returncode == 2
    assert "Set VAL_DATA" in done.stderr


@pytest.mark.parametrize(
    "data",
    [
        "https://somewhere/{00..99}.tar",
        "pipe:aws s3 cp s3://bucket/{00..99}.tar -",
        "shards/{000,001}.tar::shards/00[01].tar",
        "shards/{000.tar,00{1..9}.tar}",
        "./shards/00?.tar",
    ],
)
def test_data_that_is_there_or_not_on_this_machine_is_passed_on(place: Path, data: str) -> None:
    assert called(place, "train_cc3m.sh", DATA=data)[1].data.train_data == data


def test_shards_in_a_folder_with_a_space(place: Path) -> None:
    (place / "shards").rename(place / "my shards")
    assert (
        called(place, "train_cc3m.sh", DATA="my shards/{000..001}.tar")[1].data.train_data == "my shards/{000..001}.tar"
    )


def test_no_torchrun_is_said(place: Path) -> None:
    (place / "bin" / "torchrun").unlink()
    done = start(place, "train_cc3m.sh", DATA="shards/*.tar")
    assert done.returncode == 2
    assert "torchrun is not on the PATH" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_variables(place: Path, script: str, flag: str) -> None:
    done = start(place, script, flag)
    assert done.returncode == 0
    variables = "DATA VAL_DATA GPUS STRATEGY RATE WARMUP_POINT BATCH_SIZE EPOCHS MODEL WORKERS NAME OUTPUT_DIR"
    assert [name for name in variables.split() if f"  {name}=" not in done.stdout] == []
    assert f"EPOCHS={SCRIPTS[script]}" in done.stdout


def test_slurm_meets_at_the_first_node_and_can_be_requeued(place: Path) -> None:
    for script in SCRIPTS:
        (place / script).symlink_to(ROOT / script)
    (place / "scripts").symlink_to(ROOT / "scripts")
    (place / "src").symlink_to(ROOT / "src")
    job = {"SLURM_SUBMIT_DIR": str(place), "SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node[07-08]"}
    done = start(place, SBATCH, "--wd", "0.3", DATA="shards/*.tar", SLURM_JOB_NUM_NODES="2", **job)
    assert done.returncode == 0, done.stderr
    words = (place / "called").read_text().splitlines()
    assert words[:5] == [
        "--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=41234-0", "--rdzv_endpoint=node07:21234", "--nproc_per_node=3",
    ]  # fmt: skip
    config = parse_args(words[6:], STRATEGIES)
    assert (config.checkpoint.resume, config.run.name, config.training.wd) == ("latest", "train_cc3m-41234", 0.3)
    assert not (place / "requeued").exists()


@pytest.mark.parametrize("status", [0, 1])
def test_slurm_gives_the_status_of_the_training(place: Path, status: int) -> None:
    executable(place / "train.sh", f"exit {status}")
    job = {"SLURM_SUBMIT_DIR": str(place), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "1"}
    assert start(place, SBATCH, SCRIPT="train.sh", **job).returncode == status
    assert not (place / "requeued").exists()


def test_slurm_saves_and_requeues_before_the_time_limit(place: Path) -> None:
    """The stand-in for torchrun would die of USR1, the one for a training process saves and ends."""
    executable(place / "src" / "main.py", "")
    (place / "src" / "main.py").write_text(
        "import signal, sys, time\n"
        "def save(*_): open('saved', 'w').close(); sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, save)\n"
        "open('trains', 'w').close()\n"
        "time.sleep(60)\n"
    )
    python = shlex.quote(sys.executable)
    executable(place / "bin" / "torchrun", f'{python} -u "$@" || exit 1')
    executable(place / "train.sh", f'torchrun "{place}/src/main.py" --name "$NAME"')
    job = {"SLURM_SUBMIT_DIR": str(place), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "1"}
    environment = {"PATH": f"{place}/bin:/usr/bin:/bin", "SCRIPT": "train.sh", **job}
    with subprocess.Popen(["bash", str(ROOT / SBATCH)], cwd=place, env=environment) as batch:
        deadline = time.monotonic() + 30
        while not (place / "trains").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(30) == 0
    assert (place / "saved").exists()
    assert (place / "requeued").read_text() == "7\n"

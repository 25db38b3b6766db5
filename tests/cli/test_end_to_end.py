"""Whole runs on real images and captions, as a user starts them."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from processes import run_on_ranks
from runs import arguments, losses, record, results, selection, train
from safetensors.torch import load_file

from dissect_clip.cli import train as cli
from dissect_clip.cli import training_run
from dissect_clip.config.parser import parse_args
from dissect_clip.data import build_train
from dissect_clip.distributed.world import World
from dissect_clip.models.build import build_model
from dissect_clip.models.precision import autocast_for
from dissect_clip.selection import STRATEGIES
from dissect_clip.selection.strategy import kept
from dissect_clip.training.epoch import train_epoch
from dissect_clip.training.scoring import Scorer
from dissect_clip.training.step import TrainState

ROOT = Path(__file__).resolve().parents[2]
ALL = [None, *STRATEGIES]
MODES = {strategy or "none": selection(strategy) for strategy in ALL} | {
    "fast": selection("warmup_base_sampling", select_preset="fast"),
    "refreshed": selection("small_loss", score_refresh=0.3),
    "random before loading": selection("random", select_before_load=True),
}


@pytest.fixture
def data(pairs: Path) -> str:
    return str(pairs / "train-{0,1}.tar")  # ten steps of forty


def checkpoint(run: Path, epoch: int) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)
    return content


def scores(run: Path, epoch: int) -> torch.Tensor:
    return load_file(run / "checkpoints" / f"epoch_{epoch}.scores.safetensors")["scores"]


@pytest.mark.parametrize("strategy", ALL)
def test_trains_and_evaluates_and_repeats_itself(tmp_path: Path, pairs: Path, data: str, strategy: str | None):
    flags = selection(strategy) | {"val_data": pairs / "val.tar", "epochs": 2}
    flags |= {"record": True} if strategy else {}
    first, second = (train(tmp_path, data, name, **flags) for name in ("first", "second"))
    assert [line["epoch"] for line in results(first)] == [1, 2]
    assert results(first)[-1]["seen"] == 800
    # SCAN: of the candidates, 280 of 400, the second epoch leaves a quarter out.
    trained = {None: 800, "scan": 400 + 330, "clean_posterior": 400 + 120}
    assert results(first)[-1]["trained"] == trained.get(strategy, 240)
    assert 0 < results(first)[-1]["rsum"] <= 600
    assert losses(first) == losses(second)
    assert results(first) == results(second)
    if strategy:
        assert record(first, 1) == record(second, 1)


def test_another_seed_selects_otherwise(tmp_path: Path, data: str):
    flags = selection("random") | {"record": True, "epochs": 1}
    first, second = (train(tmp_path, data, f"seed{seed}", seed=seed, **flags) for seed in (0, 1))
    chosen = [{row["sample_id"] for row in record(run, 0) if row["selected"]} for run in (first, second)]
    assert chosen[0] != chosen[1]


def test_rate_one_equals_no_selection_bit_for_bit(tmp_path: Path, data: str):
    plain = train(tmp_path, data, "plain", epochs=2)
    for strategy, preset in [*((name, "exact") for name in STRATEGIES), ("small_loss", "fast"), ("random", "fast")]:
        flags = selection(strategy, select_rate=1.0, select_preset=preset, epochs=2)
        if strategy == "clean_posterior":
            flags["clean_decoys"] = 0  # their captions are others
        run = train(tmp_path, data, f"{strategy}-{preset}", **flags)
        assert losses(run) == losses(plain)
        ours, theirs = checkpoint(run, 2)["state_dict"], checkpoint(plain, 2)["state_dict"]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("accum_freq", [1, 2])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path, pairs: Path, data: str, strategy, accum_freq):
    flags = selection(strategy) | {"val_data": pairs / "val.tar", "accum_freq": accum_freq}
    flags |= {"force_patch_dropout": 0.3, "record": True if strategy else None}
    whole = train(tmp_path, data, "whole", **flags)
    stopped = shutil.copytree(whole, tmp_path / "logs" / "stopped")
    for path in (stopped / "checkpoints").glob("epoch_3.*"):
        path.unlink()
    (stopped / "train.jsonl").write_text("")
    evaluated = stopped / "checkpoints" / "results.jsonl"
    evaluated.write_text("".join(evaluated.read_text().splitlines(keepends=True)[:2]))
    train(tmp_path, data, "stopped", resume="latest", **flags)
    assert results(stopped) == results(whole)
    assert losses(stopped) == losses(whole)[-len(losses(stopped)) :]
    assert len(losses(stopped)) == 10 // accum_freq
    first, second = checkpoint(whole, 3), checkpoint(stopped, 3)
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    if strategy:
        assert record(stopped, 2) == record(whole, 2)
    if strategy is not None and STRATEGIES.class_of(strategy).remembers:
        assert torch.equal(scores(whole, 3).nan_to_num(-1), scores(stopped, 3).nan_to_num(-1))


def test_on_another_machine_a_run_goes_on_from_its_remote_copy(tmp_path: Path, data: str):
    flags = {"remote_sync": tmp_path / "there", "remote_sync_protocol": "fsspec", "save_frequency": 1}
    train(tmp_path, data, epochs=1, **flags)
    (tmp_path / "logs").rename(tmp_path / "first machine")
    run = train(tmp_path, data, epochs=2, resume="latest", **flags)
    assert len(losses(run)) == 2 * len(losses(tmp_path / "first machine" / "run"))
    for folder in (run, tmp_path / "there" / "run"):
        assert losses(folder) == losses(run)
        assert (folder / "out.log").read_text().count("Run run in") == 2
    assert (tmp_path / "there" / "run" / "checkpoints" / "epoch_2.pt").exists()


def test_resume_latest_finds_a_run_without_a_name(tmp_path: Path, data: str):
    flags = {"epochs": 2, "save_frequency": 1}
    assert cli.main(arguments(tmp_path, data, name=None, **flags)) == 0
    (run,) = (tmp_path / "logs").iterdir()
    for path in (run / "checkpoints").glob("epoch_2.*"):
        path.unlink()
    assert cli.main(arguments(tmp_path, data, name=None, resume="latest", **flags)) == 0
    assert list((tmp_path / "logs").iterdir()) == [run]
    assert (run / "checkpoints" / "epoch_2.pt").exists()


@pytest.mark.parametrize(("batch_size", "warned"), [(400, False), (401, True)])
def test_a_step_of_more_than_the_data_is_a_warning(tmp_path: Path, data: str, batch_size: int, warned: bool):
    run = train(tmp_path, data, batch_size=batch_size, epochs=0)
    said = f"A step takes {batch_size} samples of 400: some come more than once"
    assert (said in (run / "out.log").read_text()) == warned


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]):
    train(tmp_path, data, epochs=1)
    train(tmp_path, data, epochs=1, resume="latest")
    assert "All 1 epochs are done already" in capsys.readouterr().err


def test_evaluation_alone_gives_the_metrics_of_the_run(tmp_path: Path, emoji: Path, data: str):
    flags = {"val_data": emoji / "val-00000{0,1}.tar", "epochs": 1}
    run = train(tmp_path, data, **flags)
    alone = train(tmp_path, data, "alone", train_data=None, resume=run / "checkpoints" / "epoch_1.pt", **flags)
    expected = {name: value for name, value in results(run)[0].items() if name not in ("seen", "trained", "scored")}
    assert results(alone) == [expected]


def test_weights_go_on_in_another_run(tmp_path: Path, data: str):
    run = train(tmp_path, data, epochs=1)
    tuned = train(tmp_path, data, "tuned", epochs=1, pretrained=run / "checkpoints" / "epoch_1.pt")
    assert losses(tuned)[0] < losses(run)[0]


# ---- two ranks


def _all_modes(world: World, folder: str, data: str, validation: str) -> dict[str, Any]:
    """Train in every mode; after each epoch the ranks compare their stores."""
    shares: dict[str, list[float]] = {}
    name = ""

    def compare(state: TrainState, *rest: Any) -> str | None:
        signal = train_epoch(state, *rest)
        if state.selection is not None and state.selection.store.columns:
            mine = state.selection.store.scores.nan_to_num(-1)
            both = world.all_gather(mine[None])
            assert torch.equal(both[0], both[1]), f"{name}: the stores differ"
            shares[name].append((mine != -1).float().mean().item())
        return signal

    training_run.train_epoch = compare  # type: ignore[attr-defined]
    for name, mode in MODES.items():
        shares[name] = []
        flags = {"val_data": validation, "batch_size": 30, "workers": 1 if name in ("random", "fast") else 0}
        words = arguments(Path(folder), data, name, **flags, **mode)
        training_run.run(parse_args(words, STRATEGIES), world)
    return shares


@pytest.mark.dist
def test_every_mode_on_two_ranks(tmp_path: Path, pairs: Path):
    """On one shard: each rank reads a half of it."""
    data, validation = pairs / "train-0.tar", pairs / "val.tar"
    answers = run_on_ranks(2, _all_modes, str(tmp_path), str(data), str(validation))
    assert answers[0] == answers[1]
    for name in ("historical_base_sampling", "warmup_base_sampling", "fast", "refreshed"):
        assert answers[0][name] == [1.0, 1.0, 1.0]  # no sample without history after the first epoch
    for name in MODES:
        last = results(tmp_path / "logs" / name)[-1]
        assert last["epoch"] == 3
        assert last["seen"] == 3 * 240  # 200 rounded up to whole batches of both ranks
        assert last["rsum"] > 0


def torchrun(*words: str, processes: int = 2, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


@pytest.mark.dist
@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_from_the_command_line(tmp_path: Path, data: str, processes: int):
    words = arguments(tmp_path, data, epochs=2, **selection("warmup_base_sampling"))
    done = torchrun(str(ROOT / "src" / "main.py"), *words, processes=processes)
    assert done.returncode == 0, done.stderr
    assert checkpoint(tmp_path / "logs" / "run", 2)["dissect"]["parts"]["run"]["world_size"] == processes
    assert done.stderr.count("Saved") == 2


@pytest.mark.dist
def test_what_all_ranks_know_is_a_warning_of_one(tmp_path: Path, data: str):
    words = arguments(tmp_path, data, epochs=2, **selection("clean_posterior") | {"batch_size": 201})
    done = torchrun(str(ROOT / "src" / "main.py"), *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("some come more than once") == 1
    assert done.stderr.count("decoys are too few") == 1


@pytest.mark.dist
def test_openclips_own_logs_flag_works_behind_two_dashes(tmp_path: Path, data: str):
    words = arguments(tmp_path, data, epochs=1, output_dir=None, logs=tmp_path / "logs")
    done = torchrun("--", str(ROOT / "src" / "main.py"), *words, processes=1)
    assert done.returncode == 0, done.stderr


# ---- OpenCLIP's own smoke commands


SMOKE = (
    "--save-frequency 1 --zeroshot-frequency 1 --dataset-type synthetic --train-num-samples 16 --warmup 1 "
    "--batch-size 4 --lr 1e-3 --wd 0.1 --epochs 1 --workers 2"
)


def write_shallow_config(folder: Path, name: str) -> Path:
    """Write open_clip's model of this name with few blocks, so that a run takes seconds; returns the folder."""
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["layers"] = [1, 1, 1, 1] if name == "RN50" else 4
    for part in {"text_cfg", "multimodal_cfg"} & set(config):
        config[part]["layers"] = 1
    (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("model", "flags"),
    [("RN50", ""), ("coca_ViT-B-32", ""), ("ViT-B-32", "--lock-image --lock-image-unlocked-groups 5 --accum-freq 2")],
)
def test_openclips_smoke_commands(tmp_path: Path, model: str, flags: str):
    (tmp_path / "configs").mkdir()
    configs = write_shallow_config(tmp_path / "configs", model)
    words = f"{SMOKE} --model {model} {flags} --logs {tmp_path / 'logs'} --model-config {configs}".split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "src" / "main.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "logs").glob("*/checkpoints/epoch_1.pt"))) == 1


def test_torchscript_is_refused_with_a_reason(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*SMOKE.split(), "--model", "RN50", "--torchscript"])
    assert exit_info.value.code == 2
    assert "--torchcompile" in capsys.readouterr().err


# ---- precision


def test_bf16_scores_choose_what_fp32_scores_choose(tmp_path: Path, emoji: Path):
    """At least 95 % of the choices, in each of eight batches, on a model that has learned something."""
    pattern = str(emoji / "train-0000{00..07}.tar")
    run = train(tmp_path, pattern, model="RN-tiny", epochs=1, batch_size=128)
    words = arguments(tmp_path, pattern, model="RN-tiny", batch_size=256, pretrained=run / "checkpoints" / "epoch_1.pt")
    config = parse_args(words, STRATEGIES)
    model = build_model(config, World())
    data = build_train(config, World(), model.preprocess_train, model.tokenizer, tmp_path)
    scorers = [Scorer(model.module, autocast_for(p, torch.device("cpu")), "eval", False) for p in ("fp32", "amp_bf16")]
    for batch in itertools.islice(data.loader, 8):
        chosen = []
        for scorer in scorers:
            encoded = scorer(batch.to(torch.device("cpu")))
            similarity = (encoded.image_features * encoded.text_features).sum(dim=1)
            chosen.append(set(similarity.topk(kept(0.3, len(batch))).indices.tolist()))
        assert len(chosen[0] & chosen[1]) >= 0.95 * len(chosen[0])

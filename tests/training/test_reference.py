"""The reference model: what it is, when it is frozen, and that a restart finds it again."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from processes import run_on_ranks
from runs import arguments, selection
from torch import Tensor
from toy import make_config, make_module
from toy_training import STEPS, MemoryData, Reports, make_state, same, weights

from dissect_clip.cli import train as cli
from dissect_clip.cli import training_run
from dissect_clip.config.parser import parse_args
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.models.build import build_model, build_reference_model
from dissect_clip.selection import STRATEGIES
from dissect_clip.training import epoch as training
from dissect_clip.training.epoch import train_epoch
from dissect_clip.training.reference import digest
from dissect_clip.training.step import TrainState

FLAGS = {"select": True, "select_strategy": "learnability", "select_rate": 0.5, "warmup_point": 1}


def frozen(state: TrainState) -> dict[str, Tensor]:
    assert state.reference is not None
    return state.reference.scorer.module.state_dict()


def epoch(state: TrainState) -> None:
    data: Any = MemoryData(state.world)
    train_epoch(state, data, Reports())


def save_weights(folder: Path, seed: int = 5, **changes: Any) -> Path:
    """Weights as a file that open_clip loads."""
    path = folder / f"reference-{seed}.pt"
    torch.save(make_module(folder, seed=seed, **changes).state_dict(), path)
    return path


def test_the_model_is_frozen_when_its_warm_up_ends(tmp_path: Path):
    state = make_state(tmp_path, **FLAGS, epochs=3)
    assert state.reference is not None
    epoch(state)
    assert not state.reference.ready
    after = weights(state)
    for _ in range(2):
        epoch(state)
        assert same(frozen(state), after)
        assert not same(weights(state), after)


def test_nothing_is_scored_before_that(tmp_path: Path):
    state = make_state(tmp_path, **FLAGS)
    epoch(state)
    assert state.counters.scored == 0
    epoch(state)
    assert state.counters.scored == STEPS * 8


def test_only_strategies_that_need_one_have_one(tmp_path: Path):
    assert make_state(tmp_path, **FLAGS | {"select_strategy": "small_loss"}).reference is None
    assert make_state(tmp_path).reference is None


def test_a_reference_learns_nothing_and_takes_no_part_in_training(tmp_path: Path):
    state = make_state(tmp_path, **FLAGS, model="toy-rn", epochs=3)
    trained = {id(parameter) for group in state.optimizer.param_groups for parameter in group["params"]}
    assert state.reference is not None
    parameters = list(state.reference.scorer.module.parameters())
    assert not {id(parameter) for parameter in parameters} & trained
    assert not any(parameter.requires_grad for parameter in parameters)


def test_weights_of_a_file_are_used_from_the_first_step_and_stay(tmp_path: Path):
    path = save_weights(tmp_path)
    state = make_state(tmp_path, **FLAGS | {"select_reference": str(path), "warmup_select_rate": None})
    assert state.reference is not None
    given = torch.load(path, weights_only=True)
    assert same(frozen(state), given)
    epoch(state)
    assert state.counters.scored == STEPS * 8
    assert same(frozen(state), given)
    assert state.reference.state_dict()["weights"] is None


def test_a_reference_of_another_architecture(tmp_path: Path):
    path = save_weights(tmp_path, model="toy-coca")
    flags = {"select_reference": str(path), "select_reference_model": "toy-coca", "select_strategy": "jest"}
    state = make_state(tmp_path, **FLAGS | flags)
    epoch(state)
    assert state.counters.trained == STEPS * 4


@pytest.mark.parametrize("strategy", ["learnability", "jest"])
def test_with_the_sigmoid_loss(tmp_path: Path, strategy: str):
    path = save_weights(tmp_path)  # without a bias, which open_clip takes for 0
    state = make_state(tmp_path, **FLAGS | {"select_strategy": strategy, "select_reference": str(path)}, siglip=True)
    epoch(state)
    assert state.counters.trained == STEPS * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"select_reference": "missing.pt"}, ["--select-reference: --model toy-vit", "missing.pt"]),
        (
            {"select_reference": "FILE", "select_reference_model": "toy-vti"},
            ["--select-reference-model toy-vti is unk"],
        ),
        ({"select_reference": "FILE", "select_reference_model": "toy-rn"}, ["--select-reference-model toy-rn", "FILE"]),
        ({"select_reference": "FILE", "select_reference_model": "hf-hub:a/b"}, ["hf-hub:a/b brings its own weights"]),
    ],
)
def test_what_cannot_be_a_reference_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: list[str]):
    path = str(save_weights(tmp_path))
    changes = {name: path if value == "FILE" else value for name, value in changes.items()}
    with pytest.raises(SetupError) as refused:
        make_state(tmp_path, **FLAGS | changes)
    for word in words:
        assert word.replace("FILE", path) in str(refused.value)


def test_a_reference_that_reads_other_tokens_is_refused(tmp_path: Path):
    path = save_weights(tmp_path, model="ViT-tiny", force_image_size=(16,))
    with pytest.raises(
        SetupError, match=r"--select-reference-model ViT-tiny has another tokenizer, .* than --model toy-vit"
    ):
        make_state(tmp_path, **FLAGS | {"select_reference": str(path), "select_reference_model": "ViT-tiny"})


def test_a_reference_that_takes_other_pixels_is_refused(tmp_path: Path):
    path = save_weights(tmp_path)
    config = make_config(tmp_path, **FLAGS | {"select_reference": str(path)})
    model = build_model(config, World())
    model.module.visual.image_mean = (0.5, 0.5, 0.5)
    with pytest.raises(SetupError, match="give --image-mean and --image-std"):
        build_reference_model(config, str(path), None, World(), model.module, model.tokenizer)


def test_a_combination_has_the_reference_of_one_of_its_strategies(tmp_path: Path):
    state = make_state(tmp_path, **FLAGS | {"select_strategy": "clipscore:1+learnability:2"})
    epoch(state)
    after = weights(state)
    assert state.counters.scored == STEPS * 8  # CLIPScore alone ranks in the warm-up
    epoch(state)
    assert same(frozen(state), after)


# ---- checkpoints


def synthetic(folder: Path, name: str, **changes: Any) -> list[str]:
    """A command line of five steps an epoch on made-up pairs."""
    flags = {"dataset_type": "synthetic", "train_num_samples": 40, "batch_size": 8, "train_data": None}
    return arguments(folder, "", name, **selection("jest", select_rate=0.5) | flags | changes)


def saved(folder: Path, name: str, epoch: int) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(
        folder / "logs" / name / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True
    )
    return content


def reference(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = content["dissect"]["parts"]["reference"]["weights"]
    return weights


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a run of three epochs, of which the first is its warm-up."""
    assert cli.main(synthetic(tmp_path, "whole")) == 0
    return tmp_path


def test_checkpoints_hold_the_reference_once_there_is_one(run: Path):
    first, *later = (saved(run, "whole", epoch) for epoch in (1, 2, 3))
    assert first["dissect"]["parts"]["reference"] == {"digest": None, "weights": None, "epochs_begun": 1}
    for content in later:
        assert same(reference(content), first["state_dict"])


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_that_goes_on_elsewhere_has_the_same_reference(run: Path, epoch: int):
    path = run / "logs" / "whole" / "checkpoints" / f"epoch_{epoch}.pt"
    assert cli.main(synthetic(run, "elsewhere", resume=path)) == 0
    whole, elsewhere = (saved(run, name, 3) for name in ("whole", "elsewhere"))
    assert same(reference(whole), reference(elsewhere))
    assert same(whole["state_dict"], elsewhere["state_dict"])


def test_a_new_end_of_the_warm_up_is_a_new_reference(run: Path):
    path = run / "logs" / "whole" / "checkpoints" / "epoch_2.pt"
    assert cli.main(synthetic(run, "later", resume=path, warmup_point=2)) == 0
    assert same(reference(saved(run, "later", 3)), saved(run, "whole", 2)["state_dict"])


def test_a_checkpoint_without_a_reference_is_refused_where_one_is_due(run: Path, capsys: pytest.CaptureFixture[str]):
    reference = save_weights(run)
    given = {"select_reference": reference, "warmup_point": None}
    assert cli.main(synthetic(run, "given", **given)) == 0
    content = saved(run, "given", 3)["dissect"]["parts"]["reference"]
    assert content["weights"] is None
    path = run / "logs" / "given" / "checkpoints" / "epoch_2.pt"
    assert cli.main(synthetic(run, "without", resume=path)) == 2
    assert "it has no reference model, which the run has after --warmup-point 1 epochs" in capsys.readouterr().err


def test_other_weights_of_the_reference_are_named_in_a_warning(run: Path, capsys: pytest.CaptureFixture[str]):
    flags = {"warmup_point": None}
    first, second = save_weights(run, 5), save_weights(run, 6)
    assert cli.main(synthetic(run, "given", select_reference=first, epochs=1, **flags)) == 0
    words = synthetic(run, "given", select_reference=first, resume="latest", **flags)
    assert cli.main(words) == 0
    assert "another than the checkpoint's" not in capsys.readouterr().err
    words = synthetic(run, "given", select_reference=second, resume="latest", epochs=4, **flags)
    assert cli.main(words) == 0
    assert "The reference model is another than the checkpoint's: --select-reference" in capsys.readouterr().err


def _resume_on_rank(world: World, words: list[str]) -> str:
    frozen: list[str] = []
    real = training.train_epoch

    def spy(state: TrainState, *arguments: Any) -> str | None:
        signal = real(state, *arguments)
        assert state.reference is not None
        frozen.append(digest(state.reference.scorer.module))
        return signal

    with mock.patch.object(training_run, "train_epoch", spy):
        training_run.run(parse_args(words, STRATEGIES), world)
    return frozen[-1]


@pytest.mark.dist
def test_another_number_of_ranks_has_the_same_reference(run: Path):
    path = run / "logs" / "whole" / "checkpoints" / "epoch_2.pt"
    words = synthetic(run, "two", resume=path, batch_size=4)
    digests = run_on_ranks(2, _resume_on_rank, words)
    expected = make_module(run)
    expected.load_state_dict(saved(run, "whole", 1)["state_dict"])
    assert digests == [digest(expected)] * 2
    assert same(reference(saved(run, "two", 3)), expected.state_dict())


# ---- its state


def through_a_file(state: dict[str, Any], path: Path) -> dict[str, Any]:
    torch.save(state, path)
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def test_its_own_weights_come_back_from_a_file(tmp_path: Path):
    state, again = make_state(tmp_path, **FLAGS), make_state(tmp_path, **FLAGS | {"seed": 9})
    for _ in range(2):
        epoch(state)
    assert state.reference is not None
    assert again.reference is not None
    saved = through_a_file(state.reference.state_dict(), tmp_path / "state.pt")
    assert saved["epochs_begun"] == 2
    assert again.reference.misfits(saved) == []
    again.reference.load_state_dict(saved)
    assert same(frozen(again), frozen(state))
    assert again.reference.ready
    (missing,) = again.reference.misfits({**saved, "weights": None})
    assert "--warmup-point 1" in missing
    (other,) = again.reference.misfits({**saved, "weights": {"w": torch.ones(1)}})
    assert "--model" in other
    assert again.reference.misfits({**saved, "weights": {"w": 1}})
    assert again.reference.misfits({**saved, "epochs_begun": "2"})
    assert again.reference.misfits({"digest": None, "weights": None, "epochs_begun": 1}) == []

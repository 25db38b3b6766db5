"""Selection as a part of a checkpoint."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.selection import build_selection
from dissect_clip.selection.state import SelectionState

SAMPLES = 200


def make(strategy: str | None = "warmup_base_sampling", seed: int = 0, samples: int = SAMPLES, **flags: Any) -> Any:
    """The part of a run that is inside its fourth epoch."""
    selection = None
    if strategy is not None:
        config = Config.of(seed=seed, select=True, select_strategy=strategy, epochs=8, **flags)
        selection = build_selection(config, samples, World())
        assert selection is not None
        selection.draw_decoys(samples)
        selection.epoch, selection.step = 3, 40
    return SelectionState(selection, seed, SimpleNamespace(epoch_step=5, batch=40))


def through_a_file(state: dict[str, Any], path: Path) -> dict[str, Any]:
    torch.save(state, path / "state.pt")
    loaded: dict[str, Any] = torch.load(path / "state.pt", weights_only=True)
    return loaded


def test_scores_come_back_from_a_file(tmp_path: Path):
    first, second = make(), make()
    first.selection.store.scores[3:] = 0.25
    state = through_a_file(first.state_dict(), tmp_path)
    assert second.misfits(state) == []
    second.load_state_dict(state)
    assert torch.equal(first.selection.store.scores.nan_to_num(-1), second.selection.store.scores.nan_to_num(-1))


def test_the_survey_comes_back(tmp_path: Path):
    first, second = make("infobatch"), make("infobatch")
    first.selection._use_survey((2.5, 0.25))
    second.load_state_dict(through_a_file(first.state_dict(), tmp_path))
    assert second.selection.survey == (2.5, 0.25)


CLEAN: dict[str, Any] = {"clean_decoys": 0.1, "warmup_point": 5}


def test_captions_of_decoys_come_back(tmp_path: Path):
    first, second, other = (make("clean_posterior", seed, **CLEAN) for seed in (0, 0, 1))
    count = len(first.selection.decoys.ids)
    assert first.selection.decoys.load(torch.arange(3 * count + 3).reshape(-1, 3).int(), 1)
    state = through_a_file(first.state_dict(), tmp_path)
    second.load_state_dict(state)
    assert torch.equal(second.state_dict()["decoy_captions"], state["decoy_captions"])
    assert "--clean-decoys" in other.misfits(state)[0]
    # An old file does not say which decoys there were, but the seed of its run.
    old = {**state, "depends_on": None, "inside": False}
    assert other.misfits(old) == []
    other.load_state_dict(old)
    assert other.state_dict()["decoy_captions"] is None


def test_batches_are_counted_on_where_scores_are_used_again(tmp_path: Path):
    first, second = (make("clipscore", score_refresh=0.2) for _ in range(2))
    first.selection.store.scores[:] = 20.0
    second.counts.batch = 20  # of twice the size
    second.load_state_dict(through_a_file(first.state_dict(), tmp_path))
    assert second.selection.store.scores[0, -1] == 10.0


def test_without_selection_there_is_nothing(tmp_path: Path):
    state = through_a_file(make(None).state_dict(), tmp_path)
    assert make(None).misfits(state) == make(None).misfits(None) == []
    make(None).load_state_dict(state)


MISFITS: list[tuple[Any, Any, str]] = [
    (make(), make("big_loss"), "--select-strategy warmup_base_sampling, this run has big_loss"),
    (make(), make(None), "this run has no --select"),
    (make(None), make(), "trained without --select"),
    (make("clipscore"), make("clipscore", score_refresh=0.2), "--score-refresh needs last_score, last_batch"),
    (make("clean_posterior", **CLEAN), make("clean_posterior", **CLEAN | {"clean_decoys": 0.2}), "--clean-decoys 0.1"),
    (make(), make(samples=7), "trained on 200 samples"),
]  # fmt: skip


@pytest.mark.parametrize(("then", "now", "said"), MISFITS)
def test_another_selection_does_not_fit(then: Any, now: Any, said: str):
    (misfit, *_) = now.misfits(then.state_dict())
    assert said in misfit


def test_a_checkpoint_without_selection_or_scores_does_not_fit():
    assert "without --select" in make().misfits(None)[0]
    state = make().state_dict()
    del state["scores"]
    assert "it has no scores" in make().misfits(state)[0]


def with_survey(numbers: tuple[float, ...], of: str | None = None, inside: bool = True) -> dict[str, Any]:
    state: dict[str, Any] = make("infobatch").state_dict()
    return {**state, "survey": numbers, "survey_of": of, "inside": inside}


def test_another_survey_does_not_fit_inside_an_epoch():
    part = make("infobatch")
    for state, said in (
        (with_survey((1.0, 2.0, 3.0)), "holds 3 numbers"),
        (with_survey((1.0, 0.5), "--clean-model beta"), "holds 2 numbers by --clean-model beta"),
    ):
        first, second = part.misfits(state)
        assert said in first
        assert "from the end of an epoch" in second
    assert part.misfits(with_survey((1.0, 0.5), "")) == []


def test_between_epochs_another_survey_is_ignored():
    part, state = make("infobatch"), with_survey((1.0, 2.0, 3.0), inside=False)
    assert part.misfits(state) == []
    part.load_state_dict(state)
    assert part.selection.survey == ()


@pytest.mark.parametrize(
    "wrong", [{"columns": 5}, {"survey": ("a",)}, {"step": "1"}, {"decoy_captions": torch.ones(2)}, {"scores": 1}]
)
def test_what_is_not_of_its_type_is_damaged(wrong: dict[str, Any]):
    assert "damaged" in make().misfits({**make().state_dict(), **wrong})[0]

"""The model's weights as a part of a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dissect_clip.models.weights import ModelWeights, without_prefix


def make() -> torch.nn.Linear:
    return torch.nn.Linear(3, 2)


def test_prefixes_of_ddp_and_compile_are_taken_off():
    state = {"module._orig_mod.visual.module.w": torch.ones(1), "_orig_mod.b": torch.ones(1)}
    assert set(without_prefix(state)) == {"visual.module.w", "b"}


def test_they_come_back_from_a_file(tmp_path: Path):
    first, second = make(), make()
    torch.save(ModelWeights(first, "tiny").state_dict(), tmp_path / "state.pt")
    part, state = ModelWeights(second, "tiny"), torch.load(tmp_path / "state.pt", weights_only=True)
    assert part.misfits(state) == []
    part.load_state_dict(state)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"weight": torch.zeros(2, 3)}, "it lacks bias"),
    ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "scale": torch.zeros(1)}, "it has besides scale"),
    ({"weight": torch.zeros(4, 3), "bias": torch.zeros(2)}, "another shape weight ([4, 3] instead of [2, 3])"),
]


@pytest.mark.parametrize(("state", "said"), MISFITS)
def test_those_of_another_model_do_not_fit(state: dict[str, Any], said: str):
    (misfit,) = ModelWeights(make(), "tiny").misfits(state)
    assert "--model tiny" in misfit
    assert said in misfit

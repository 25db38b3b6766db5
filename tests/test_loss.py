"""Losses by sample against the training losses of open_clip."""

from pathlib import Path

import open_clip
import pytest
import torch
from distributed import run_on_ranks
from torch.nn.functional import normalize
from toy import make_config

from dissect_clip.dist import World
from dissect_clip.loss import SampleLoss, build_loss

SCALE, BIAS = torch.tensor(7.0), torch.tensor(-3.0)


def features(size: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    both = normalize(torch.randn(2, size, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return both[0], both[1]


def test_mean_of_infonce_is_the_clip_loss():
    image, text = features()
    by_sample = SampleLoss(World(), siglip=False)(image, text, SCALE, None)
    assert by_sample.mean().item() == pytest.approx(open_clip.loss.ClipLoss()(image, text, SCALE).item(), rel=1e-6)


def test_mean_of_sigmoid_is_the_siglip_loss():
    image, text = features()
    by_sample = SampleLoss(World(), siglip=True)(image, text, SCALE, BIAS)
    theirs = open_clip.loss.SigLipLoss()(image, text, SCALE, BIAS)
    assert by_sample.mean().item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "ClipLoss"),
        ({"siglip": True}, "SigLipLoss"),
        ({"model": "coca_toy"}, "CoCaLoss"),
        ({"distill_model": "a", "distill_pretrained": "b"}, "DistillClipLoss"),
    ],
)
def test_kind_of_training_loss(tmp_path: Path, settings: dict, kind: str):
    assert type(build_loss(make_config(tmp_path, **settings), World())).__name__ == kind


def _loss_on_rank(world: World, siglip: bool) -> list[float]:
    image, text = features(6)
    mine = slice(3 * world.rank, 3 * world.rank + 3)
    return SampleLoss(world, siglip)(image[mine], text[mine], SCALE, BIAS).tolist()


@pytest.mark.dist
@pytest.mark.parametrize("siglip", [False, True])
def test_two_ranks_give_the_losses_of_the_global_batch(siglip: bool):
    first, second = run_on_ranks(2, _loss_on_rank, siglip)
    whole = SampleLoss(World(), siglip)(*features(6), SCALE, BIAS).tolist()
    assert first + second == pytest.approx(whole, rel=1e-5)

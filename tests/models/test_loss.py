"""Losses by sample against the training losses of open_clip."""

from pathlib import Path

import open_clip
import pytest
import torch
from processes import run_on_ranks
from torch.nn.functional import normalize
from toy import make_config

from dissect_clip.distributed.world import World
from dissect_clip.models.loss import SampleLoss, build_loss, loss_against_all, weighted_loss

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


# ---- weights

MODES: dict[str, dict[str, bool]] = {
    "plain": {},
    "gathered with gradient": {"gather_with_grad": True},
    "local": {"local_loss": True},
    "local, gathered with gradient": {"local_loss": True, "gather_with_grad": True},
    "siglip": {"siglip": True},
}
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0, 0.25])


def by_hand(image: torch.Tensor, text: torch.Tensor, weight: torch.Tensor, siglip: bool) -> torch.Tensor:
    """The weighted loss of a whole batch, pair by pair."""
    logits = SCALE * image @ text.T
    total = torch.zeros(())
    for i in range(len(image)):
        if siglip:
            sign = 2 * torch.eye(len(image)) - 1
            terms = -torch.nn.functional.logsigmoid(sign * (logits + BIAS))
            pair = (terms[i].sum() + terms[:, i].sum()) / 2
        else:
            pair = (logits[i].logsumexp(0) + logits[:, i].logsumexp(0)) / 2 - logits[i, i]
        total = total + weight[i] * pair
    return total / len(image)


def gradients(loss: torch.Tensor, *features: torch.Tensor) -> list[list[list[float]]]:
    return [part.tolist() for part in torch.autograd.grad(loss, features)]


def _weighted_on_rank(world: World, folder: str) -> dict[str, list[tuple[float, list[list[list[float]]]]]]:
    """For each mode value and gradients: with weights, with weights of one, and of open_clip's loss."""
    results = {}
    mine = slice(6 // world.size * world.rank, 6 // world.size * (world.rank + 1))
    for name, mode in MODES.items():
        loss = build_loss(make_config(Path(folder), **mode), world)
        bias = {"logit_bias": BIAS} if "siglip" in mode else {}
        found = []
        for weight in (WEIGHT[mine], torch.ones(6 // world.size), None):
            image, text = (part[mine].clone().requires_grad_() for part in features(6))
            parts = {"image_features": image, "text_features": text, "logit_scale": SCALE, **bias}
            losses = loss(**parts, output_dict=True) if weight is None else weighted_loss(loss, world, weight, **parts)
            value = losses["contrastive_loss"]
            found.append((value.item(), gradients(value, image, text)))
        results[name] = found
    return results


@pytest.mark.parametrize("siglip", [False, True])
def test_weighted_loss_by_hand(tmp_path: Path, siglip: bool):
    name = "siglip" if siglip else "plain"
    weighted, _, _ = _weighted_on_rank(World(), str(tmp_path))[name]
    image, text = (part.clone().requires_grad_() for part in features(6))
    expected = by_hand(image, text, WEIGHT, siglip)
    assert weighted[0] == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.tensor(weighted[1]), torch.tensor(gradients(expected, image, text)))


@pytest.mark.dist
def test_weighted_loss_on_two_ranks(tmp_path: Path):
    """Its value is that of the whole batch. With weights of one, gradients are open_clip's, whatever is gathered how;
    where gradients flow through what is gathered, they are those of the whole batch on both ranks together."""
    first, second = run_on_ranks(2, _weighted_on_rank, str(tmp_path))
    for name, mode in MODES.items():
        image, text = (part.clone().requires_grad_() for part in features(6))
        expected = by_hand(image, text, WEIGHT, "siglip" in mode)
        values = [rank[name][0][0] for rank in (first, second)]
        assert sum(values) / 2 == pytest.approx(expected.item(), rel=1e-5), name
        ones, theirs = (first[name][place][0] + second[name][place][0] for place in (1, 2))
        assert ones == pytest.approx(theirs, rel=1e-5), name
        for rank in (first, second):
            torch.testing.assert_close(torch.tensor(rank[name][1][1]), torch.tensor(rank[name][2][1]), msg=name)
        if "gather_with_grad" in mode or "siglip" in mode:
            both = torch.cat([torch.tensor(rank[name][0][1]) for rank in (first, second)], dim=1)
            torch.testing.assert_close(both / 2, torch.tensor(gradients(expected, image, text)), msg=name)


# ---- against all pairs


def _against_all_on_rank(world: World) -> tuple[float, list[list[list[float]]]]:
    """Value and gradients of two pairs a rank, against all of these and the last two of six, shared out."""
    mine = slice(2 * world.rank, 2 * world.rank + 2)
    image, text = (part[mine].clone().requires_grad_() for part in features(6))
    others = torch.cat(features(6), dim=1)[4:].tensor_split(world.size)[world.rank]
    losses = loss_against_all(world, others, image_features=image, text_features=text, logit_scale=SCALE)
    value = losses["contrastive_loss"]
    return value.item(), gradients(value, image, text)


def anchored_by_hand(count: int, others: list[int]) -> tuple[torch.Tensor, list[list[list[float]]]]:
    """The loss of the first ``count`` of six pairs against each other and ``others``; only anchors move."""
    image, text = (part.clone().requires_grad_() for part in features(6))
    total = torch.zeros(())
    rows = [*range(count), *others]
    for i in range(count):
        by_image = SCALE * torch.stack([image[i] @ text[j].detach() for j in rows])
        by_text = SCALE * torch.stack([text[i] @ image[j].detach() for j in rows])
        total = total + (by_image.logsumexp(0) - by_image[i] + by_text.logsumexp(0) - by_text[i]) / 2
    loss = total / count
    return loss, gradients(loss, image, text)


def test_loss_against_all_by_hand():
    value, found = _against_all_on_rank(World())
    expected, gradient = anchored_by_hand(2, [4, 5])
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(gradient)[:, :2])


def test_loss_against_all_gives_every_parameter_a_gradient():
    image, text = features(4)
    bias = torch.zeros((), requires_grad=True)
    others = torch.cat(features(6), dim=1)[4:]
    losses = loss_against_all(
        World(), others, image_features=image, text_features=text, logit_scale=SCALE, logit_bias=bias
    )
    losses["contrastive_loss"].backward()
    assert bias.grad == 0


@pytest.mark.dist
def test_loss_against_all_is_that_of_all_ranks_together():
    results = run_on_ranks(2, _against_all_on_rank)
    expected, gradient = anchored_by_hand(4, [4, 5])
    assert sum(value for value, _ in results) / 2 == pytest.approx(expected.item(), rel=1e-5)
    both = torch.cat([torch.tensor(found) for _, found in results], dim=1)
    torch.testing.assert_close(both / 2, torch.tensor(gradient)[:, :4])

"""The scoring pass, and what may be left out of it."""

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy import CONFIGS, TEXT, VIT, make_config, make_module, random_pairs

from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.models.build import build_model
from dissect_clip.models.precision import autocast_for
from dissect_clip.training.scoring import (
    Scorer,
    Shortcuts,
    build_scorer,
    cut_captions,
    keep_patches,
    locked_towers,
    resize_positions,
)

CPU = torch.device("cpu")
IMAGE_SIZE = {"toy-vit": 32, "toy-rn": 64, "toy-timm": 64, "toy-coca": 32}
END = 49407
BUILT: dict[tuple[Any, ...], nn.Module] = {}
"""Toys of this file, which takes copies."""


def make_toy(folder: Path, model: str = "toy-vit", **changes: Any) -> nn.Module:
    """Images of twice the toy's own size, so that there is something to leave out."""
    key = (model, *sorted(changes.items()))
    if key not in BUILT:
        BUILT[key] = make_module(folder, model=model, force_image_size=(IMAGE_SIZE[model],), **changes)
    return copy.deepcopy(BUILT[key])


def make_batch(size: int = 6, model: str = "toy-vit", words: int = 6) -> Batch:
    """``words`` words in each caption of 8 tokens."""
    image, text = random_pairs(size, IMAGE_SIZE[model])
    text[:, words + 1] = END
    text[:, words + 2 :] = 0
    return Batch(image, text, torch.arange(size))


def make_scorer(module: nn.Module, mode: str = "eval", compiled: bool = False, **shortcuts: Any) -> Scorer:
    return Scorer(module, autocast_for("fp32", CPU), mode, compiled, Shortcuts(**shortcuts))


def features(scorer: Scorer, batch: Batch) -> Tensor:
    """[N, 2 D] of both towers."""
    encoded = scorer(batch)
    return torch.cat([encoded.image_features, encoded.text_features], dim=1)


def close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, atol=1e-5)


# ---- the default


@pytest.mark.parametrize("model", ["toy-vit", "toy-rn", "toy-timm", "toy-coca"])
def test_by_default_scores_are_bit_for_bit_the_models_own(tmp_path: Path, model: str):
    module, batch = make_toy(tmp_path, model).train(), make_batch(model=model)
    encoded = make_scorer(module)(batch)
    with torch.no_grad():
        module.eval()
        image, text = module.encode_image(batch.image, normalize=False), module.encode_text(batch.text, normalize=False)
    assert torch.equal(encoded.image_features, F.normalize(image, dim=-1))
    assert torch.equal(encoded.text_features, F.normalize(text, dim=-1))


SHORTCUTS: dict[str, dict[str, Any]] = {
    "batch": {"batch_size": 4},
    "image": {"image_size": 16},
    "patches": {"patch_dropout": 0.5},
    "context": {"context_length": 5},
    "all": {"batch_size": 4, "image_size": 16, "patch_dropout": 0.5, "context_length": 5},
}
SUPPORTED = [
    *(("toy-vit", name) for name in SHORTCUTS),
    *(("toy-coca", name) for name in SHORTCUTS),
    *((model, name) for model in ("toy-rn", "toy-timm") for name in ("batch", "image", "context")),
]


def shortcuts_for(model: str, name: str) -> dict[str, Any]:
    given = SHORTCUTS[name]
    return given | {"image_size": 32} if "image_size" in given and model in ("toy-rn", "toy-timm") else given


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("model", "name"), SUPPORTED)
def test_shortcuts_score_and_leave_model_and_generators_alone(tmp_path: Path, model: str, name: str, mode: str):
    module, batch = make_toy(tmp_path, model).train(), make_batch(model=model)
    before, state = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    scorer = make_scorer(module, mode, **shortcuts_for(model, name))
    scorer.try_out(batch.text[:2], None)
    encoded = scorer(batch)
    for part in (encoded.image_features, encoded.text_features):
        assert part.shape == (6, 16)
        assert part.dtype is torch.float32
        assert not part.requires_grad
        assert close(part.norm(dim=1), torch.ones(6))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(part.training for part in module.modules())
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())


@pytest.mark.parametrize("model", ["toy-vit", "toy-rn"])
def test_shortcuts_leave_training_as_it_was(tmp_path: Path, model: str):
    module, batch = make_toy(tmp_path, model).train(), make_batch(model=model)
    twin = copy.deepcopy(module)
    make_scorer(module, **shortcuts_for(model, "image" if model == "toy-rn" else "all"))(batch)
    for one in (module, twin):
        out = one(batch.image, batch.text)
        (out["image_features"] * out["text_features"]).sum().backward()
    pairs = zip(module.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(first.grad, second.grad) for first, second in pairs if second.grad is not None)


# ---- micro-batches


@pytest.mark.parametrize("model", ["toy-vit", "toy-rn", "toy-timm", "toy-coca"])
@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_micro_batches_give_the_same_scores(tmp_path: Path, model: str, size: int):
    module, batch = make_toy(tmp_path, model), make_batch(model=model)
    assert close(features(make_scorer(module, batch_size=size), batch), features(make_scorer(module), batch))


def test_micro_batches_are_small_and_even(tmp_path: Path):
    module, sizes = make_toy(tmp_path), []
    module.visual.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    make_scorer(module, batch_size=4)(make_batch(9))
    assert sizes == [3, 3, 3]


def test_micro_batches_draw_the_same_patches(tmp_path: Path):
    module, batch = make_toy(tmp_path), make_batch()
    small, whole = (make_scorer(module, patch_dropout=0.5, batch_size=size) for size in (2, None))
    assert close(features(small, batch), features(whole, batch))


# ---- image size


@pytest.mark.parametrize(("model", "size"), [("toy-vit", 16), ("toy-coca", 16), ("toy-rn", 32), ("toy-timm", 32)])
def test_small_images_are_scored_as_a_model_of_that_size_would(tmp_path: Path, model: str, size: int):
    module, batch = make_toy(tmp_path, model), make_batch(model=model)
    smaller = make_module(tmp_path, model=model, force_image_size=(size,))
    state = module.state_dict()
    name = "visual.attnpool.positional_embedding" if model == "toy-rn" else "visual.positional_embedding"
    if name in state:
        state[name] = open_clip_resized(state[name], smaller.state_dict()[name])
    smaller.load_state_dict(state)
    image = F.interpolate(batch.image, (size, size), mode="bicubic", antialias=True)
    expected = make_scorer(smaller)(Batch(image, batch.text, batch.sample_id))
    assert close(make_scorer(module, image_size=size)(batch).image_features, expected.image_features)


def open_clip_resized(positions: Tensor, like: Tensor) -> Tensor:
    """What open_clip's loader makes of positional embeddings, for ModifiedResNet's, too, which it does not know."""
    shape = nn.Module()
    shape.visual = nn.Module()
    shape.visual.grid_size = round((len(like) - 1) ** 0.5)
    state = {"visual.positional_embedding": positions}
    open_clip.model.resize_pos_embed(state, shape)
    return state["visual.positional_embedding"]


def test_positions_of_the_same_grid_stay(tmp_path: Path):
    positions = torch.randn(1 + 2 * 3, 5)
    assert close(resize_positions(positions, (2, 3), (2, 3)), positions)
    constant = torch.ones(1 + 4 * 2, 3) * torch.tensor([1.0, 2.0, 3.0])
    assert close(resize_positions(constant, (4, 2), (2, 1)), constant[:3])


def test_the_training_size_changes_nothing(tmp_path: Path):
    module, batch = make_toy(tmp_path), make_batch()
    assert torch.equal(features(make_scorer(module, image_size=32), batch), features(make_scorer(module), batch))


# ---- patches


def test_patches_are_those_of_the_sample(tmp_path: Path):
    module, batch = make_toy(tmp_path), make_batch()
    scorer = make_scorer(module, patch_dropout=0.5)
    first, turned = scorer(batch).image_features, scorer(batch.take(torch.arange(5, -1, -1))).image_features
    assert close(first, turned.flip(0))
    others = Batch(batch.image, batch.text, batch.sample_id + 100)
    assert not close(first, scorer(others).image_features)


def test_patches_of_a_run_are_drawn_from_its_seed(tmp_path: Path):
    seeds = []
    for seed in (0, 0, 1):
        config = make_config(tmp_path, select=True, score_patch_dropout=0.5, seed=seed)
        built = build_model(config, World())
        seeds.append(build_scorer(config, built.module, autocast_for("fp32", CPU), built.tokenizer).seed)
    assert seeds[0] == seeds[1] != seeds[2]


def test_patches_are_left_out_as_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module, batch = make_toy(tmp_path, force_patch_dropout=0.5), make_batch()
    kept = keep_patches(torch.arange(6), 16, 0.5, 0)
    places = torch.cat([torch.zeros(6, 1, dtype=torch.int64), kept + 1], dim=1)
    module.eval()
    monkeypatch.setattr(module.visual.patch_dropout, "forward", lambda x: x[torch.arange(6)[:, None], places])
    with torch.no_grad():
        expected = F.normalize(module.encode_image(batch.image), dim=-1)
    monkeypatch.undo()
    assert close(make_scorer(module, patch_dropout=0.5)(batch).image_features, expected)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_patches_are_even_and_unique(seed: int):
    ids = torch.arange(4_000_000_000, 4_000_002_000)
    kept = keep_patches(ids, 10, 0.75, seed)
    assert kept.shape == (2000, 2)
    assert (kept[:, 0] != kept[:, 1]).all()
    assert (kept.flatten().bincount(minlength=10) - 400).abs().max() < 80  # 4.5 standard deviations
    neighbours = (kept[:-1, :1] == kept[1:, :1]).float().mean()
    assert 0.06 < neighbours < 0.14  # 0.1 where they have nothing to do with each other
    assert not torch.equal(kept, keep_patches(ids, 10, 0.75, seed - 1))
    assert keep_patches(ids, 4, 0.999, seed).shape == (2000, 1)


# ---- captions

PADDED = [
    # tokens, where the end is the highest number; 0 is padding
    ([9, 1, 2, 99, 0, 0], [9, 1, 2, 99]),
    ([9, 1, 99, 0, 0, 0], [9, 1, 99, 0]),
    ([9, 1, 2, 3, 99, 0], [9, 1, 2, 99]),
    ([9, 1, 2, 3, 4, 99], [9, 1, 2, 99]),
]


@pytest.mark.parametrize(("pooling", "special"), [("argmax", 0), ("eos", 99), ("pad", 0)])
@pytest.mark.parametrize(("tokens", "expected"), PADDED)
def test_captions_keep_their_end(tokens: list[int], expected: list[int], pooling: str, special: int):
    text = torch.tensor([tokens])
    assert cut_captions(text, 4, pooling, special).tolist() == [expected]
    assert text.tolist() == [tokens]


TOWERS: dict[str, dict[str, Any]] = {
    "argmax": {},
    "eos": {"pool_type": "eos", "eos_id": END},
    "linear": {"proj_bias": True},
}


def write_tower(folder: Path, **text: Any) -> str:
    """A toy whose text tower is a module of its own; returns its name."""
    make_config(folder)
    name = "toy-" + "-".join(text) if text else "toy-text"
    content = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT | text, "custom_text": True}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return name


@pytest.mark.parametrize("tower", ["built-in", "coca", *TOWERS])
def test_captions_that_fit_score_as_in_full_length(tmp_path: Path, tower: str):
    model = {"built-in": "toy-vit", "coca": "toy-coca"}.get(tower) or write_tower(tmp_path, **TOWERS[tower])
    module = make_module(tmp_path, model=model, force_image_size=(32,))
    fitting, longer = make_batch(words=2), make_batch(words=4)
    whole, cut = make_scorer(module), make_scorer(module, context_length=5)
    assert close(cut(fitting).text_features, whole(fitting).text_features)
    assert not close(cut(longer).text_features, whole(longer).text_features)
    assert torch.equal(cut(longer).image_features, whole(longer).image_features)


def test_longer_captions_score_by_their_beginning(tmp_path: Path):
    module = make_toy(tmp_path)
    longer, beginning = make_batch(words=5), make_batch(words=3)
    assert torch.equal(longer.text[:, :4], beginning.text[:, :4])
    cut = make_scorer(module, context_length=5)(longer)
    assert close(cut.text_features, make_scorer(module)(beginning).text_features)


def test_the_length_of_training_changes_nothing(tmp_path: Path):
    module, batch = make_toy(tmp_path), make_batch()
    assert torch.equal(features(make_scorer(module, context_length=8), batch), features(make_scorer(module), batch))


# ---- what does not fit


def refusal(folder: Path, model: str, **changes: Any) -> str:
    config = make_config(folder, model=model, select=True, **changes)
    built = build_model(config, World())
    with pytest.raises(SetupError) as error:
        build_scorer(config, built.module, autocast_for("fp32", CPU), built.tokenizer)
    assert model in str(error.value)
    return str(error.value)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "patches of an image": ("toy-vit", {"score_image_size": 12}, "--score-image-size 12 is no multiple of 8"),
    "cells of a resnet": ("toy-rn", {"score_image_size": 16}, "--score-image-size 16 is no multiple of 32"),
    "larger images": ("toy-rn", {"score_image_size": 64}, "--score-image-size 64 is more than the 32 x 32 pixels"),
    "patches of a resnet": ("toy-rn", {"score_patch_dropout": 0.5}, "--score-patch-dropout is for"),
    "patches of timm": ("toy-timm", {"score_patch_dropout": 0.5}, "--score-patch-dropout is for"),
    "longer captions": ("toy-vit", {"score_context_length": 9}, "--score-context-length 9 is more than the 8 tokens"),
    "statistics of one": (
        "toy-rn", {"score_batch_size": 1, "select_score_mode": "train"}, "--score-batch-size 1 does not work",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_the_model_is_refused(tmp_path: Path, model: str, changes: dict[str, Any], message: str):
    assert message in refusal(tmp_path, model, **changes)


def test_a_timm_tower_of_one_size_is_refused(tmp_path: Path):
    make_config(tmp_path)
    vision = {"timm_model_name": "test_vit3", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    (tmp_path / "toy-timm-vit.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}))
    assert "--score-image-size 32 does not work" in refusal(tmp_path, "toy-timm-vit", score_image_size=32)


def test_a_tower_that_pools_its_last_token_is_refused(tmp_path: Path):
    assert "'last'" in refusal(tmp_path, write_tower(tmp_path, pool_type="last"), score_context_length=4)


def test_a_scorer_is_built_without_a_trial_where_nothing_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Scorer, "try_out", None)
    config = make_config(tmp_path, select=True)
    built = build_model(config, World())
    build_scorer(config, built.module, autocast_for("fp32", CPU), built.tokenizer)


# ---- locked towers


LOCKED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing": ({}, set()),
    "image": ({"lock_image": True}, {"image"}),
    "text": ({"lock_text": True}, {"text"}),
    "both": ({"lock_image": True, "lock_text": True}, {"image", "text"}),
    "image in part": ({"lock_image": True, "lock_image_unlocked_groups": 1}, set()),
    "text in part": ({"lock_text": True, "lock_text_unlocked_layers": 1}, set()),
    "patch dropout": ({"lock_image": True, "force_patch_dropout": 0.5}, set()),
    "resnet": ({"lock_image": True, "model": "toy-rn"}, set()),
    "frozen resnet": ({"lock_image": True, "lock_image_freeze_bn_stats": True, "model": "toy-rn"}, {"image"}),
    "timm, whose projection learns": ({"lock_image": True, "model": "toy-timm"}, set()),
    "text of its own": ({"lock_text": True, "lock_text_freeze_layer_norm": True, "force_custom_text": True}, {"text"}),
}


@pytest.mark.parametrize(("changes", "expected"), LOCKED.values(), ids=LOCKED)
def test_towers_are_locked_as_a_whole_or_not(tmp_path: Path, changes: dict[str, Any], expected: set[str]):
    assert locked_towers(make_module(tmp_path, **changes)) == expected


def test_coca_runs_both_towers():
    module = open_clip.CoCa(**{k: v for k, v in CONFIGS["toy-coca"].items() if k != "custom_text"})
    assert locked_towers(module.requires_grad_(False)) == set()


@pytest.mark.parametrize("model", ["toy-vit", "toy-rn"])
def test_features_of_locked_towers_are_those_of_training(tmp_path: Path, model: str):
    module = make_toy(tmp_path, model, lock_image=True, lock_image_freeze_bn_stats=True, lock_text=True).train()
    batch, index = make_batch(model=model), torch.tensor([1, 4])
    known = make_scorer(module)(batch).locked(index)
    out = module(batch.image[index], batch.text[index])
    assert set(known) == {"image_features", "text_features"}
    assert all(close(value, out[name]) for name, value in known.items())
    without = module(None, batch.text[index])
    assert without["image_features"] is None
    assert torch.equal(without["text_features"], out["text_features"])


def test_training_does_not_reuse_features_of_a_shortcut(tmp_path: Path):
    module, batch = make_toy(tmp_path, lock_image=True, lock_text=True), make_batch()
    expected = {"image_size": {"text"}, "patch_dropout": {"text"}, "context_length": {"image"}}
    values = {"image_size": 16, "patch_dropout": 0.5, "context_length": 5}
    for name, reusable in expected.items():
        assert make_scorer(module, **{name: values[name]})(batch).reusable == reusable
    assert make_scorer(module, batch_size=2)(batch).reusable == {"image", "text"}


# ---- compiled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", *SHORTCUTS])
def test_compiled_scores_agree_and_are_compiled_once(tmp_path: Path, name: str):
    module, batch = make_toy(tmp_path), make_batch()
    shortcuts = SHORTCUTS.get(name, {})
    compiled = make_scorer(module, compiled=True, **shortcuts)
    assert close(features(compiled, batch), features(make_scorer(module, **shortcuts), batch))
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            module.train()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter += 0.01
            found = features(compiled, batch)
            module.eval()  # as for an evaluation
            assert close(features(compiled, batch), found)
        assert close(found, features(make_scorer(module, **shortcuts), batch))

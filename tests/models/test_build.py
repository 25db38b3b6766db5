"""Models from settings, and the scoring pass."""

import copy
import pickle
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from processes import run_on_ranks
from torch import nn
from toy import make_config, make_module, random_pairs

from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.models.build import build_model
from dissect_clip.models.openclip_compat import BoundedCache
from dissect_clip.models.parallel import RunningBuffers, wrap_model
from dissect_clip.models.precision import autocast_for
from dissect_clip.training.scoring import Scorer

CPU = torch.device("cpu")


def make_batch(size: int = 6, image_size: int = 16) -> Batch:
    return Batch(*random_pairs(size, image_size), torch.arange(size))


def make_scorer(module: torch.nn.Module, mode: str = "eval", precision: str = "fp32") -> Scorer:
    return Scorer(module, autocast_for(precision, CPU), mode, compiled=False)


@pytest.mark.parametrize("model", ["toy-vit", "toy-rn", "toy-timm", "toy-coca"])
def test_every_kind_of_model_scores_without_gradient(tmp_path: Path, model: str):
    size = 16 if model in ("toy-vit", "toy-coca") else 32
    encoded = make_scorer(make_module(tmp_path, model=model))(make_batch(image_size=size))
    for features in (encoded.image_features, encoded.text_features):
        assert features.shape == (6, 16)
        assert features.dtype is torch.float32
        assert not features.requires_grad
        assert torch.allclose(features.norm(dim=1), torch.ones(6), atol=1e-5)


def test_scale_and_bias_of_a_scoring_pass_have_no_gradient(tmp_path: Path):
    encoded = make_scorer(make_module(tmp_path, siglip=True))(make_batch())
    assert encoded.logit_bias is not None
    assert not encoded.logit_bias.requires_grad
    assert not encoded.logit_scale.requires_grad


def test_scores_are_those_of_the_model_in_eval_mode(tmp_path: Path):
    module = make_module(tmp_path, force_patch_dropout=0.5)
    batch = make_batch()
    encoded = make_scorer(module.train())(batch)
    assert module.training
    with torch.no_grad():
        out = module.eval()(batch.image, batch.text)
    assert torch.equal(encoded.image_features, out["image_features"])
    assert torch.equal(encoded.logit_scale, out["logit_scale"])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_scoring_leaves_buffers_and_generators_alone(tmp_path: Path, mode: str):
    module = make_module(tmp_path, model="toy-rn").train()
    before, state = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    make_scorer(module, mode)(make_batch(image_size=32))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(part.training for part in module.modules())


def test_train_mode_keeps_patch_dropout_on(tmp_path: Path):
    module = make_module(tmp_path, force_patch_dropout=0.5).train()
    scorer, batch = make_scorer(module, "train"), make_batch()
    torch.manual_seed(0)
    first = scorer(batch).image_features
    torch.manual_seed(1)
    assert not torch.equal(first, scorer(batch).image_features)


def test_amp_on_a_cpu_is_bf16():
    with autocast_for("amp", CPU)():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


def test_the_same_seed_gives_the_same_weights(tmp_path: Path):
    first, second = (make_module(tmp_path, seed=seed).state_dict() for seed in (3, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["text_projection"], make_module(tmp_path, seed=4).state_dict()["text_projection"])


def test_all_of_a_coca_model_is_drawn_from_the_seed(tmp_path: Path):
    first, second = (make_module(tmp_path, model="toy-coca", seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert 0.1 < first["text_decoder.text_projection"].std() < 0.5  # width 16: 0.25


def test_siglip_models_have_a_bias(tmp_path: Path):
    module = make_module(tmp_path, siglip=True)
    assert module.logit_bias.item() == -10
    assert make_scorer(module)(make_batch()).logit_bias is not None


def test_locked_towers_have_no_gradient(tmp_path: Path):
    module = make_module(tmp_path, lock_image=True, lock_text=True, model="toy-timm")
    assert not any(p.requires_grad for p in module.visual.trunk.parameters())
    assert not any(p.requires_grad for p in module.transformer.parameters())


def test_the_text_tower_of_a_custom_clip_can_be_locked(tmp_path: Path):
    module = make_module(tmp_path, lock_text=True, force_custom_text=True)
    assert not any(p.requires_grad for p in module.text.transformer.parameters())


def test_weights_that_would_be_ignored_are_refused(tmp_path: Path):
    with pytest.raises(SetupError, match=r"--pretrained w\.pt has no effect with --model local-dir:x"):
        make_module(tmp_path, model="local-dir:x", pretrained="w.pt")


def test_locking_what_cannot_be_locked_says_so(tmp_path: Path):
    with pytest.raises(SetupError, match="--lock-image"):
        make_module(tmp_path, model="toy-coca", lock_image=True)


def test_an_unknown_model_names_similar_ones(tmp_path: Path):
    with pytest.raises(SetupError, match="ViT-B-32"):
        make_module(tmp_path, model="ViT-B-23")


def test_weights_that_are_not_there_say_so(tmp_path: Path):
    with pytest.raises(SetupError, match="nowhere"):
        make_module(tmp_path, pretrained="nowhere.pt")


def test_model_config_that_is_not_there_says_so():
    with pytest.raises(SetupError, match="--model-config"):
        build_model(make_config(Path("/tmp"), model_config="/nowhere/x.json"), World())


@pytest.mark.parametrize("content", ["{", "null"])
def test_model_config_that_is_broken_says_so(tmp_path: Path, content: str):
    config = make_config(tmp_path)
    (tmp_path / "broken.json").write_text(content)
    try:
        with pytest.raises(SetupError, match="--model-config"):
            build_model(config, World())
    finally:
        (tmp_path / "broken.json").write_text("{}")  # open_clip reads all folders that it was ever given


@pytest.mark.parametrize(("source", "name"), [("toy-coca", "toy-captioner"), ("toy-vit", "toy-vit-cocoa-and-coca")])
def test_a_name_that_stands_for_another_loss_is_refused_in_training(tmp_path: Path, source: str, name: str):
    config = make_config(tmp_path, model=name)
    (tmp_path / f"{name}.json").write_text((tmp_path / f"{source}.json").read_text())
    build_model(config, World())  # to be evaluated
    with pytest.raises(SetupError, match=f"--model {name} is .* rename its configuration"):
        build_model(config.replace(train_data="x.tar"), World())


def test_a_teacher_that_is_not_known_is_not_taken_for_the_model(tmp_path: Path):
    with pytest.raises(SetupError, match="--distill-model toy-vitt is unknown: did you mean one of toy-vit"):
        make_module(tmp_path, distill_model="toy-vitt", distill_pretrained="x.pt")


def test_distillation_brings_a_teacher_that_does_not_learn(tmp_path: Path):
    torch.save(make_module(tmp_path, seed=5).state_dict(), tmp_path / "teacher.pt")
    config = make_config(tmp_path, distill_model="toy-vit", distill_pretrained=str(tmp_path / "teacher.pt"))
    teacher = build_model(config, World()).teacher
    assert teacher is not None
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.slow
def test_compiled_scores_agree(tmp_path: Path):
    module, batch = make_module(tmp_path), make_batch()
    compiled = Scorer(module, autocast_for("fp32", CPU), "eval", compiled=True)(batch)
    assert torch.allclose(compiled.image_features, make_scorer(module)(batch).image_features, atol=1e-5)


def test_one_process_is_not_wrapped(tmp_path: Path):
    module = make_module(tmp_path)
    assert wrap_model(module, make_config(tmp_path), World()) == (module, module)


def test_running_statistics_stay_finite(tmp_path: Path):
    module = make_module(tmp_path, model="toy-rn")
    buffers = RunningBuffers(module, World())
    norm = next(part for part in module.modules() if isinstance(part, nn.BatchNorm2d))
    norm.running_mean += 1
    buffers.synchronise(torch.tensor(True))
    assert norm.running_mean.mean() == 1
    norm.running_mean[0] = torch.nan
    norm.running_var += 1
    buffers.synchronise(torch.tensor(True))
    assert norm.running_mean.mean() == 1
    assert norm.running_var.mean() == 1
    norm.running_var += 1
    buffers.synchronise(torch.tensor(False))
    assert norm.running_var.mean() == 1, "of a step that was not finite for another reason"


def test_models_without_running_statistics_have_nothing_to_settle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    buffers = RunningBuffers(make_module(tmp_path), World())
    monkeypatch.setattr(World, "copy_from_main", None)
    buffers.synchronise(torch.tensor(True))


def _settle(world: World, folder: str) -> list[float]:
    module = make_module(Path(folder), model="toy-rn")
    buffers = RunningBuffers(module, world)
    for buffer in module.buffers():
        buffer += world.rank
    buffers.synchronise(torch.tensor(True))
    return [buffer.double().sum().item() for name, buffer in module.named_buffers() if "running" in name]


@pytest.mark.dist
def test_running_statistics_are_those_of_rank_0(tmp_path: Path):
    first, second = run_on_ranks(2, _settle, str(tmp_path))
    assert first == second


def test_the_tokenizer_forgets_words_before_they_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BoundedCache, "limit", 10)
    bounded = build_model(make_config(tmp_path), World()).tokenizer
    texts = ["one two three four five six", "seven eight nine ten eleven twelve <end_of_text>", "one two"]
    for tokenizer in (bounded, pickle.loads(pickle.dumps(bounded))):
        assert torch.equal(torch.cat([tokenizer([text]) for text in texts]), open_clip.tokenize(texts, 8))
        assert len(tokenizer.cache) <= 10


def _wrap(world: World, folder: str) -> float:
    """A rank whose statistics are its own calls the wrapped model; they are still its own, but for this batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module, model = wrap_model(make_module(Path(folder), model="toy-rn"), make_config(Path(folder)), world)
    norm = next(part for part in module.modules() if isinstance(part, nn.BatchNorm2d))
    norm.running_mean.fill_(float(world.rank * 100))
    model(*random_pairs(4, image_size=32))
    return float(norm.running_mean.mean())


@pytest.mark.dist
def test_wrapping_neither_warns_nor_copies_statistics_before_a_forward_pass(tmp_path: Path):
    first, second = run_on_ranks(2, _wrap, str(tmp_path))
    assert second > 80 > first

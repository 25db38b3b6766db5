"""Models, transforms and tokenizers of open_clip, built from the settings.

Shapes: N captions, L tokens.
"""

from __future__ import annotations

import difflib
import importlib.resources
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from dissect_clip.config.settings import Config, ModelSettings
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.models.openclip_compat import (
    OpenClip,
    bound_tokenizer_cache,
    has_own_weights,
    initialise_coca_decoder,
    model_config,
)
from dissect_clip.seeding import seed_everything


@dataclass(frozen=True, slots=True)
class Model:
    """An open_clip model with what belongs to it."""

    module: nn.Module  # CLIP, CustomTextCLIP or CoCa on the device; neither wrapped nor compiled
    preprocess_train: Callable[[Any], Tensor]  # PIL image -> [3, H, W]
    preprocess_eval: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]  # N captions -> [N, L] int64
    teacher: nn.Module | None  # distillation only; in eval mode, without gradients


def register_model_configs(extra: str | None) -> None:
    """Make the package's small models, and those of ``--model-config``, known to open_clip by their file names.

    Raises:
        SetupError: ``extra`` is neither a file nor a folder, or holds broken JSON.
    """
    with importlib.resources.as_file(importlib.resources.files("dissect_clip.models") / "configs") as folder:
        open_clip.add_model_config(folder)
    if extra is None:
        return
    if not Path(extra).exists():
        raise SetupError(f"--model-config {extra} does not exist: give a JSON file, or a folder of them")
    try:
        open_clip.add_model_config(Path(extra))
    except (ValueError, TypeError) as error:  # broken JSON, or JSON that is a number alone
        raise SetupError(f"--model-config {extra}: one of its JSON files cannot be read ({error})") from error


def check_model_name(name: str, flag: str = "--model") -> None:
    """Raises:
    SetupError: open_clip does not know this model; the message names the flag and similar models.
    """
    models = open_clip.list_models()
    if ":" not in name and name.replace("/", "-") not in models:
        near = difflib.get_close_matches(name, models, n=3) or sorted(models)[:10]
        raise SetupError(
            f"{flag} {name} is unknown: did you mean one of {', '.join(near)}? "
            "Add a configuration with --model-config NAME.json; it has embed_dim, vision_cfg, text_cfg"
        )


# ---- creating a model


def _is_not_about_random_weights(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No pretrained weights loaded")


@contextmanager
def _weights_only() -> Iterator[None]:
    """Have torch read weights as data only, whichever library calls torch.load, and with whatever arguments."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _create(
    name: str, pretrained: str | None, config: Config, world: World, flag: str = "--model", **options: Any
) -> tuple[Any, Any, Any]:
    """The module and its transforms for training and evaluation."""
    check_model_name(name, flag)
    root = logging.getLogger()
    if pretrained is None:  # random weights were asked for, so open_clip's warning of them is left out
        root.addFilter(_is_not_about_random_weights)
    try:
        with _weights_only():
            created: tuple[Any, Any, Any] = open_clip.create_model_and_transforms(
                name,
                pretrained,
                precision=config.training.precision,
                device=world.device,
                output_dict=True,
                cache_dir=config.model.cache_dir,
                **options,
            )
    except UnpicklingError as error:
        raise SetupError(
            f"{flag} {name}: the weights {pretrained} are damaged, or hold more than tensors and plain values, which "
            "is not loaded because it could run code. If you trust the file, save its state dict as .safetensors"
        ) from error
    except Exception as error:  # from any library that builds a tower or reads a damaged file
        hint = (
            ". Give the model, and flags that shape it such as --siglip, as in the training of these weights"
            if pretrained and os.path.isfile(pretrained)
            else ""
        )
        raise SetupError(f"{flag} {name} (weights {pretrained or 'random'}) cannot be built: {error}{hint}") from error
    finally:
        root.removeFilter(_is_not_about_random_weights)
    return created


def _siglip_options(model: ModelSettings) -> dict[str, Any]:
    return {"init_logit_scale": math.log(10), "init_logit_bias": -10} if model.siglip else {}


def build_model(config: Config, world: World) -> Model:
    """The model of the settings, with the same random weights on every rank, and locked as asked.

    Raises:
        SetupError: open_clip does not know the model or cannot build it, or flags do not fit it.
    """
    model = config.model
    register_model_configs(model.model_config)
    seed_everything(config.training.seed)
    if model.pretrained and has_own_weights(model.model):  # open_clip would ignore it
        raise SetupError(
            f"--pretrained {model.pretrained} has no effect with --model {model.model}, which brings its own weights: "
            "leave it out, or continue from a checkpoint with --resume"
        )
    module, preprocess_train, preprocess_eval = _create(
        model.model,
        model.pretrained or None,
        config,
        world,
        force_quick_gelu=model.force_quick_gelu,
        force_custom_text=model.force_custom_text,
        force_patch_dropout=model.force_patch_dropout,
        force_image_size=model.image_size,
        force_context_length=model.force_context_length,
        image_mean=model.image_mean,
        image_std=model.image_std,
        image_interpolation=model.image_interpolation,
        image_resize_mode=model.image_resize_mode,
        aug_cfg=model.aug_cfg,
        pretrained_image=model.pretrained_image,
        **_siglip_options(model),
    )
    _refuse_remote_code(model.model, model.cache_dir)
    _check_coca_name(module, model.model, trains=config.data.trains)
    tokenizer = open_clip.get_tokenizer(
        model.model, cache_dir=model.cache_dir, context_length=model.force_context_length
    )
    bound_tokenizer_cache(tokenizer)
    if isinstance(module, open_clip.CoCa) and not model.pretrained and not has_own_weights(model.model):
        initialise_coca_decoder(module)
    if model.distill and module.logit_bias is not None:
        raise SetupError(
            f"--distill-model works with the CLIP loss only, and --model {model.model} has the bias of SigLIP's: use "
            "another --model"
        )
    lock_towers(module, model)
    if model.grad_checkpointing:
        module.set_grad_checkpointing()
    return Model(module, preprocess_train, preprocess_eval, tokenizer, _build_teacher(config, world))


def _check_coca_name(module: OpenClip, name: str, trains: bool) -> None:
    """open_clip's create_loss chooses CoCa's loss by the model's name, so that name and module must agree."""
    is_coca = isinstance(module, open_clip.CoCa)
    if trains and is_coca != ("coca" in name.lower()):
        raise SetupError(
            f"--model {name} is {'a' if is_coca else 'no'} CoCa model, but open_clip chooses CoCa's loss for names "
            "with coca in them: rename its configuration"
        )


def _refuse_remote_code(name: str, cache_dir: str | None) -> None:
    """Check that the model's configuration does not have transformers run a tokenizer's own code.

    Raises:
        SetupError: it does.
    """
    text = model_config(name, cache_dir).get("text_cfg", {})
    if "trust_remote_code" in text.get("tokenizer_kwargs", {}):
        raise SetupError(
            f"--model {name}: its configuration has trust_remote_code, which would run code that comes with its "
            "tokenizer. Use a tokenizer that transformers knows"
        )


def lock_towers(module: OpenClip, model: ModelSettings) -> None:
    """Freeze the towers as ``--lock-image``, ``--lock-text`` and their flags say.

    Raises:
        SetupError: the model's towers cannot be locked in this way.
    """
    try:
        if model.lock_image:
            module.lock_image_tower(
                unlocked_groups=model.lock_image_unlocked_groups,
                freeze_bn_stats=model.lock_image_freeze_bn_stats,
            )
        if model.lock_text:
            # The text towers of CLIP itself can only lock LayerNorm together with the layers it belongs to.
            own_tower = isinstance(module, open_clip.CLIP) or isinstance(module.text, TextTransformer)
            freeze = model.lock_text_freeze_layer_norm or own_tower
            module.lock_text_tower(unlocked_layers=model.lock_text_unlocked_layers, freeze_layer_norm=freeze)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise SetupError(f"--lock-image or --lock-text is not possible with --model {model.model}: {error}") from error


# ---- models beside the trained one


def _build_teacher(config: Config, world: World) -> nn.Module | None:
    if not config.model.distill:
        return None
    assert config.model.distill_model is not None
    teacher: nn.Module = _create(
        config.model.distill_model, config.model.distill_pretrained, config, world, flag="--distill-model"
    )[0]
    return teacher.eval().requires_grad_(False)


def build_reference_model(
    config: Config,
    weights: str,
    architecture: str | None,
    world: World,
    module: OpenClip,
    tokenizer: Callable[[list[str]], Tensor],
) -> nn.Module:
    """The model of ``--select-reference``, which gets the images and tokens of ``module``. In eval mode, frozen.

    Args:
        weights: a file, or a pretrained tag of OpenCLIP.
        architecture: its name; None for ``--model``.

    Raises:
        SetupError: it cannot be built, or was trained on other pixels or tokens than those it would get.
    """
    model = config.model
    name = architecture or model.model
    if ":" in name:
        raise SetupError(
            f"--select-reference {weights}: a model such as {name} brings its own weights. Give "
            "--select-reference-model the name of an architecture that OpenCLIP knows"
        )
    own = {"force_quick_gelu": model.force_quick_gelu, "force_custom_text": model.force_custom_text}
    reference: OpenClip = _create(
        name,
        weights,
        config,
        world,
        flag="--select-reference-model" if architecture else "--select-reference: --model",
        force_image_size=module.visual.image_size,
        force_context_length=model.force_context_length,
        image_mean=model.image_mean,
        image_std=model.image_std,
        **(own if name == model.model else {}),
        **_siglip_options(model),
    )[0]
    given, expected = ((tuple(m.visual.image_mean), tuple(m.visual.image_std)) for m in (module, reference))
    if given != expected:
        raise SetupError(
            f"--select-reference-model {name} takes images normalised with mean {expected[0]} and deviation "
            f"{expected[1]}, --model {model.model} with {given[0]} and {given[1]}: give --image-mean and --image-std"
        )
    if name != model.model:
        _check_tokens(name, model, tokenizer)
    frozen: nn.Module = reference.eval().requires_grad_(False)
    return frozen


def _check_tokens(name: str, model: ModelSettings, tokenizer: Callable[[list[str]], Tensor]) -> None:
    """Raises SetupError if the reference model ``name`` takes other tokens than ``tokenizer`` gives."""
    _refuse_remote_code(name, model.cache_dir)
    other = open_clip.get_tokenizer(name, cache_dir=model.cache_dir, context_length=model.force_context_length)
    captions = ["a photo of a cat", "Two words!"]
    if not torch.equal(tokenizer(captions), other(captions)):
        raise SetupError(
            f"--select-reference-model {name} has another tokenizer, or another context length, than --model "
            f"{model.model}: give a model with the same"
        )

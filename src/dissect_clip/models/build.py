"""Models, transforms and tokenizers of open_clip, built from the settings.

Shapes: N captions, L tokens.
"""

from __future__ import annotations

import difflib
import importlib.resources
import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from open_clip.factory import parse_model_name
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transformer import TextTransformer
from open_clip_train.precision import get_autocast
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.seeding import seed_everything

Autocast = Callable[[], AbstractContextManager[Any]]

_NO_COPIES: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}
"""Has DDP leave buffers alone in the forward pass, by the name that torch 2.15 asks for, or the one before."""

OpenClip = Any
"""CLIP, CustomTextCLIP or CoCa of open_clip, which has no types: encode_image, encode_text, logit_scale and so on."""


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
        SetupError: if ``extra`` is neither a file nor a folder, or holds broken JSON.
    """
    with importlib.resources.as_file(importlib.resources.files("dissect_clip.models") / "configs") as folder:
        open_clip.add_model_config(folder)
    if extra is None:
        return
    if not Path(extra).exists():
        raise SetupError(f"--model-config {extra} does not exist: give a JSON file, or a folder of them")
    try:
        open_clip.add_model_config(Path(extra))
    except (ValueError, TypeError) as error:  # of json, and where it holds a number alone
        raise SetupError(f"--model-config {extra}: not every JSON file in it can be read ({error})") from error


def check_model_name(name: str, flag: str = "--model") -> None:
    """Raises:
    SetupError: naming the flag and similar models, if open_clip does not know this one.
    """
    known = open_clip.list_models()
    if ":" not in name and name.replace("/", "-") not in known:
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:10]
        raise SetupError(
            f"{flag} {name} is unknown: did you mean one of {', '.join(near)}? "
            "A configuration of your own goes in with --model-config NAME.json; it has embed_dim, vision_cfg, text_cfg"
        )


def _drop_expected(record: logging.LogRecord) -> bool:
    """Leaves out open_clip's warning of random weights, where they are what was asked for."""
    return not record.getMessage().startswith("No pretrained weights loaded")


def _keep_all(record: logging.LogRecord) -> bool:
    return True


@contextmanager
def _without_code() -> Iterator[None]:
    """Have torch read weights as data only, whichever library calls torch.load, and however."""
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
    check_model_name(name, flag)
    expected = _drop_expected if pretrained is None else _keep_all
    logging.getLogger().addFilter(expected)
    try:
        with _without_code():
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
            "is not loaded because it could run code. Where you trust the file, save its state dict as .safetensors"
        ) from error
    except Exception as error:  # of whatever library builds the towers, or reads a damaged file
        hint = (
            ". Give the model, and flags that shape it such as --siglip, as in the training of these weights"
            if pretrained and os.path.isfile(pretrained)
            else ""
        )
        raise SetupError(f"{flag} {name} (weights {pretrained or 'random'}) cannot be built: {error}{hint}") from error
    finally:
        logging.getLogger().removeFilter(expected)
    return created


def _siglip(config: Config) -> dict[str, Any]:
    return {"init_logit_scale": math.log(10), "init_logit_bias": -10} if config.model.siglip else {}


def has_own_weights(name: str) -> bool:
    """Whether a model of this name, as ``hf-hub:org/model``, comes with weights, whatever ``--pretrained`` is."""
    return parse_model_name(name)[0] is not None


def build_model(config: Config, world: World) -> Model:
    """The model that the settings ask for, with the same random weights on every rank and locked where asked.

    Raises:
        SetupError: if open_clip does not know it or cannot build it.
    """
    register_model_configs(config.model.model_config)
    seed_everything(config.training.seed)
    if config.model.pretrained and has_own_weights(config.model.model):  # open_clip would ignore it
        raise SetupError(
            f"--pretrained {config.model.pretrained} has no effect with --model {config.model.model}, which "
            "brings its own "
            "weights: leave it out, or go on from a checkpoint with --resume"
        )
    module, preprocess_train, preprocess_eval = _create(
        config.model.model,
        config.model.pretrained or None,
        config,
        world,
        force_quick_gelu=config.model.force_quick_gelu,
        force_custom_text=config.model.force_custom_text,
        force_patch_dropout=config.model.force_patch_dropout,
        force_image_size=config.model.image_size,
        force_context_length=config.model.force_context_length,
        image_mean=config.model.image_mean,
        image_std=config.model.image_std,
        image_interpolation=config.model.image_interpolation,
        image_resize_mode=config.model.image_resize_mode,
        aug_cfg=config.model.aug_cfg,
        pretrained_image=config.model.pretrained_image,
        **_siglip(config),
    )
    _refuse_code(config)
    is_coca = isinstance(module, open_clip.CoCa)
    if config.data.trains and is_coca != ("coca" in config.model.model.lower()):
        raise SetupError(
            f"--model {config.model.model} is {'a' if is_coca else 'no'} CoCa model, and CoCa's loss goes by a "
            "name with "
            "coca in it: rename its configuration"
        )
    tokenizer = open_clip.get_tokenizer(
        config.model.model, cache_dir=config.model.cache_dir, context_length=config.model.force_context_length
    )
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        tokenizer.cache = KnownWords(tokenizer.cache)
    if is_coca and not config.model.pretrained and not has_own_weights(config.model.model):
        _initialise_decoder(module)
    if config.model.distill and module.logit_bias is not None:
        raise SetupError(
            f"--distill-model works with the CLIP loss only, and --model {config.model.model} has the bias of "
            "SigLIP's: use "
            "another --model"
        )
    _lock(module, config)
    if config.model.grad_checkpointing:
        module.set_grad_checkpointing()
    return Model(module, preprocess_train, preprocess_eval, tokenizer, _build_teacher(config, world))


class KnownWords(dict[str, str]):
    """The words that open_clip's tokenizer has met, which it keeps without end: gigabytes in each worker on web data.

    This forgets them at ``limit``, but for those that were there from the beginning, the special tokens.
    """

    limit = 1 << 19  # at some 200 bytes each

    def __init__(self, words: dict[str, str]) -> None:
        super().__init__(words)
        self.special = dict(words)

    def __setitem__(self, word: str, tokens: str) -> None:
        if len(self) >= self.limit:
            self.clear()
            self.update(self.special)
        super().__setitem__(word, tokens)


def _refuse_code(config: Config) -> None:
    """See that the model's configuration does not tell transformers to run a tokenizer's own code.

    Raises:
        SetupError: if it does.
    """
    kind, place = parse_model_name(config.model.model)
    if kind == "hf-hub":
        file = download_pretrained_from_hf(place, filename="open_clip_config.json", cache_dir=config.model.cache_dir)
        model = json.loads(Path(file).read_text(encoding="utf-8")).get("model_cfg", {})
    else:
        model = open_clip.get_model_config(config.model.model) or {}
    if "trust_remote_code" in model.get("text_cfg", {}).get("tokenizer_kwargs", {}):
        raise SetupError(
            f"--model {config.model.model}: its configuration has trust_remote_code, which would run code that "
            "comes with "
            "its tokenizer. Take a tokenizer that transformers knows"
        )


def _initialise_decoder(module: OpenClip) -> None:
    """Draw the one weight of CoCa's decoder that open_clip 3.3 leaves as uninitialised memory, as it means to.

    ``MultimodalTransformer.init_parameters`` does this and is never called.
    """
    projection = module.text_decoder.text_projection
    nn.init.normal_(projection, std=projection.shape[0] ** -0.5)


def _lock(module: OpenClip, config: Config) -> None:
    try:
        if config.model.lock_image:
            module.lock_image_tower(
                unlocked_groups=config.model.lock_image_unlocked_groups,
                freeze_bn_stats=config.model.lock_image_freeze_bn_stats,
            )
        if config.model.lock_text:
            # The text towers of CLIP itself know no other way than to lock LayerNorm with the layers it belongs to.
            own_tower = isinstance(module, open_clip.CLIP) or isinstance(module.text, TextTransformer)
            freeze = config.model.lock_text_freeze_layer_norm or own_tower
            module.lock_text_tower(unlocked_layers=config.model.lock_text_unlocked_layers, freeze_layer_norm=freeze)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise SetupError(
            f"--lock-image or --lock-text is not possible with --model {config.model.model}: {error}"
        ) from error


def _build_teacher(config: Config, world: World) -> nn.Module | None:
    if not config.model.distill:
        return None
    assert config.model.distill_model is not None
    teacher: nn.Module = _create(
        config.model.distill_model, config.model.distill_pretrained, config, world, flag="--distill-model"
    )[0]
    return teacher.eval().requires_grad_(False)


def build_reference_model(
    config: Config, world: World, module: OpenClip, tokenizer: Callable[[list[str]], Tensor]
) -> nn.Module:
    """The model of ``--select-reference``, which sees the images and tokens of ``module``. In eval mode, frozen.

    Raises:
        SetupError: if it cannot be built, or was trained on other pixels or tokens than those it would get.
    """
    assert config.selection.select_reference is not None
    name = config.selection.select_reference_model or config.model.model
    if ":" in name:
        raise SetupError(
            f"--select-reference {config.selection.select_reference}: a model such as {name} brings weights of "
            "its own. Give "
            "--select-reference-model the name of an architecture that OpenCLIP knows"
        )
    own = {"force_quick_gelu": config.model.force_quick_gelu, "force_custom_text": config.model.force_custom_text}
    reference: OpenClip = _create(
        name,
        config.selection.select_reference,
        config,
        world,
        flag="--select-reference-model" if config.selection.select_reference_model else "--select-reference: --model",
        force_image_size=module.visual.image_size,
        force_context_length=config.model.force_context_length,
        image_mean=config.model.image_mean,
        image_std=config.model.image_std,
        **(own if name == config.model.model else {}),
        **_siglip(config),
    )[0]
    seen, expected = ((tuple(m.visual.image_mean), tuple(m.visual.image_std)) for m in (module, reference))
    if seen != expected:
        raise SetupError(
            f"--select-reference-model {name} takes images normalised with mean {expected[0]} and deviation "
            f"{expected[1]}, --model {config.model.model} with {seen[0]} and {seen[1]}: give --image-mean and "
            "--image-std"
        )
    if name != config.model.model:
        _check_tokens(config, name, tokenizer)
    frozen: nn.Module = reference.eval().requires_grad_(False)
    return frozen


def _check_tokens(config: Config, name: str, tokenizer: Callable[[list[str]], Tensor]) -> None:
    """Raises SetupError if the model ``name`` takes other tokens than ``tokenizer`` gives."""
    _refuse_code(config.replace(model=name))
    other = open_clip.get_tokenizer(
        name, cache_dir=config.model.cache_dir, context_length=config.model.force_context_length
    )
    words = ["a photo of a cat", "Two words!"]
    if not torch.equal(tokenizer(words), other(words)):
        raise SetupError(
            f"--select-reference-model {name} has another tokenizer than --model {config.model.model}, or another "
            "context "
            "length: give a model with the same"
        )


def autocast_for(precision: str, device: torch.device) -> Autocast:
    """The autocast context of a precision. On a CPU ``amp`` is bf16: fp16 needs a gradient scaler there is none for."""
    if precision == "amp" and device.type == "cpu":
        precision = "amp_bf16"
    autocast: Autocast = get_autocast(precision, device_type=device.type)
    return autocast


def wrap_model(module: nn.Module, config: Config, world: World) -> tuple[nn.Module, nn.Module]:
    """(the module itself, what to call in training): memory format, synchronised BatchNorm, DDP, compilation as asked.

    The first shares its weights with the second, and its state dict has no prefixes.
    """
    if config.training.channels_last:
        module = module.to(memory_format=torch.channels_last)  # convolutions follow it
    if world.size > 1 and config.training.use_bn_sync:
        if world.device.type == "cpu":
            raise SetupError("--use-bn-sync needs GPUs: torch has no synchronised BatchNorm for the CPU")
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    model: nn.Module = module
    if world.size > 1:
        model = DistributedDataParallel(
            module,
            device_ids=None if world.device.type == "cpu" else [world.device],
            **_NO_COPIES,  # RunningBuffers does it after each step
            gradient_as_bucket_view=True,  # one copy of the gradients less, in time and in memory
            static_graph=config.distributed.ddp_static_graph,
        )
    if config.training.torchcompile:
        if config.model.grad_checkpointing and world.size > 1:
            # DDP's graph splitting does not work with checkpointed activations (as in OpenCLIP).
            torch._dynamo.config.optimize_ddp = False
        for name in ("torch._dynamo", "torch._inductor", "torch._functorch"):
            logging.getLogger(name).setLevel(logging.WARNING)
        model = torch.compile(model)  # type: ignore[assignment]
    return module, model


class RunningBuffers:
    """The buffers that training changes, BatchNorm's statistics: equal on all ranks between steps, and always finite.

    DDP copies rank 0's before each forward pass, so that the ranks would score with different ones, evaluate with
    different ones, and a resumed run, in which all ranks load rank 0's, would not go on as if it had never stopped.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        saved = module.state_dict()
        self._buffers = [
            buffer for name, buffer in module.named_buffers() if buffer.is_floating_point() and name in saved
        ]
        self._world = world
        self.snapshot()

    def _flat(self) -> Tensor:
        return torch.cat([buffer.reshape(-1) for buffer in self._buffers])

    def snapshot(self) -> None:
        """Take the present values for good ones, as after a checkpoint was loaded."""
        if self._buffers:
            self._last = self._flat()

    @torch.no_grad()
    def synchronise(self, good: Tensor) -> None:
        """Rank 0's values on all ranks after each step; the last ones where those are not finite, or the step is not.

        Args:
            good: scalar bool on the device, whether the step was finite; that of rank 0 counts.

        Collective where the module has such buffers: one broadcast. No device sync.
        """
        if not self._buffers:
            return
        flat = self._flat()
        sent = torch.cat([flat, good.to(flat.dtype)[None]])
        self._world.copy_from_main(sent)
        flat = sent[:-1]
        self._last = flat.where(flat.isfinite().all() & (sent[-1] > 0), self._last)
        parts = self._last.split([buffer.numel() for buffer in self._buffers])  # type: ignore[no-untyped-call]
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

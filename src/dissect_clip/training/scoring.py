"""The scoring pass: the features of a batch, without gradients, and what may be left out of it to make it cheaper.

Shapes: N pairs, K of them kept, D features, H x W pixels, P patches, Q of them used, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import PatchDropout, TextTransformer, VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dissect_clip.config.settings import Config
from dissect_clip.data.batch import Batch
from dissect_clip.errors import SetupError
from dissect_clip.models.openclip_compat import BatchNorm, Dropout, OpenClip, encode_patches
from dissect_clip.models.precision import Autocast
from dissect_clip.seeding import Stream, derive_seed

Forward = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

_RESNET_STRIDE = 32
"""Pixels to a cell of ModifiedResNet's last feature map, along a side."""

_MIX = tuple(number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""splitmix64's multipliers as int64."""

_NOT_TEXT = ("visual.", "logit_scale", "logit_bias")
"""How the names of CLIP's parameters begin that are not the text tower's."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The features of a batch."""

    image_features: Tensor  # [N, D] float32, unit norm
    text_features: Tensor  # [N, D] float32, unit norm
    logit_scale: Tensor  # scalar, the factor itself and not its logarithm
    logit_bias: Tensor | None  # scalar, SigLIP only
    reusable: frozenset[str] = frozenset()  # of "image" and "text": the towers that training need not run again

    def parts(self) -> dict[str, Tensor | None]:
        """All that :meth:`dissect_clip.Selection.choose` takes of them, by name."""
        return {
            "image_features": self.image_features,
            "text_features": self.text_features,
            "logit_scale": self.logit_scale,
            "logit_bias": self.logit_bias,
        }

    def locked(self, index: Tensor) -> dict[str, Tensor]:
        """What the training pass would compute again for the pairs at ``index`` [K]: features [K, D] by open_clip's
        names, ``image_features`` and ``text_features``, of the locked towers alone; equal up to rounding.
        """
        features = {"image": self.image_features, "text": self.text_features}
        return {f"{tower}_features": features[tower][index] for tower in sorted(self.reusable)}


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """What is left out of the scoring pass; by default nothing."""

    batch_size: int | None = None  # pairs at a time
    image_size: int | None = None  # pixels, of both sides
    patch_dropout: float = 0.0  # share of the patches, in [0, 1)
    context_length: int | None = None  # tokens

    @classmethod
    def of(cls, config: Config) -> Shortcuts:
        """Those of the settings."""
        return cls(
            config.selection.score_batch_size,
            config.selection.score_image_size,
            config.selection.score_patch_dropout,
            config.selection.score_context_length,
        )

    def __str__(self) -> str:
        flags = {
            "--score-batch-size": self.batch_size,
            "--score-image-size": self.image_size,
            "--score-patch-dropout": self.patch_dropout or None,
            "--score-context-length": self.context_length,
        }
        return " ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)


# ---- images


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def resize_images(image: Tensor, size: int) -> Tensor:
    """Images [N, 3, H, W] as [N, 3, size, size] of the same dtype: bicubic with antialiasing, in float32."""
    small = F.interpolate(image.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return small.to(image.dtype)


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positional embeddings [1 + P, D], the class token's first, for another grid of patches, rows by columns.

    Bicubic with antialiasing, as ``open_clip.model.resize_pos_embed`` does when it loads weights.
    """
    grid = positions[1:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1], grid.permute(0, 2, 3, 1).flatten(1, 2)[0].to(positions.dtype)])


def keep_patches(sample_id: Tensor, patches: int, share: float, seed: int) -> Tensor:
    """[N, Q] int64, which patches of the samples' images stay: Q = int((1 - share) * patches), but at least one.

    The same for a sample whenever it comes, so that its scores can be compared from epoch to epoch; drawn by mixing
    (seed, sample, patch) as splitmix64 does. No generator, no device sync.
    """
    mixed = sample_id[:, None] * patches + torch.arange(patches, device=sample_id.device)
    mixed = mixed * _MIX[0] + seed
    for shift, factor in zip((30, 27), _MIX[1:], strict=True):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (mixed ^ ((mixed >> 31) & ((1 << 33) - 1))).topk(max(1, int((1 - share) * patches))).indices


# ---- captions


def _end_of_text(text: Tensor, pooling: str, special: int) -> Tensor:
    """[N] int64, the place of each caption's last token."""
    if pooling == "argmax":  # the end-of-text token has the highest number
        return text.argmax(dim=1)
    if pooling == "eos":
        return text.eq(special).int().argmax(dim=1)
    return text.ne(special).sum(dim=1) - 1  # padding follows


def cut_captions(text: Tensor, length: int, pooling: str, special: int) -> Tensor:
    """Captions [N, L] as [N, length]; where a caption is longer, its last token takes the last place.

    ``pooling`` says how the end is found: ``argmax`` (the highest number), ``eos`` (``special`` is its number) or
    ``pad`` (``special`` is the number that follows it).
    """
    end = _end_of_text(text, pooling, special)
    cut = text[:, :length].clone()
    cut[:, -1] = torch.where(end >= length, text.gather(1, end[:, None])[:, 0], cut[:, -1])
    return cut


def text_pooling(clip: OpenClip) -> tuple[str, int]:
    """How the text tower finds a caption's end, as :func:`cut_captions` takes it.

    Raises:
        SetupError: if the tower relies on captions of full length.
    """
    if isinstance(clip, open_clip.CLIP):
        pooling, end = clip.text_pool_type, clip.text_eos_id
    elif isinstance(clip.text, HFTextEncoder):
        return "pad", clip.text.config.pad_token_id
    elif clip.text.cls_emb is not None or clip.text.pool_type == "first":
        return "pad", clip.text.pad_id
    else:
        pooling, end = clip.text.pool_type, clip.text.eos_id
    if pooling not in ("argmax", "eos"):
        raise SetupError(
            f"--score-context-length: the text tower pools by {pooling!r}, which is another token in a shorter caption"
        )
    return pooling, end


def _cut_positions(clip: OpenClip, length: int) -> dict[str, Tensor]:
    """The text tower's parameters and buffers that depend on the length of its input, by name in ``_Towers``."""
    tower, prefix = (clip, "clip.") if isinstance(clip, open_clip.CLIP) else (clip.text, "clip.text.")
    if isinstance(tower, HFTextEncoder):
        return {}
    positions = tower.positional_embedding
    if getattr(tower, "cls_emb", None) is not None:  # comes last and keeps its own; such a tower cuts its mask itself
        return {prefix + "positional_embedding": torch.cat([positions[:length], positions[-1:]])}
    cut = {prefix + "positional_embedding": positions[:length]}
    if tower.attn_mask is not None:
        cut[prefix + "attn_mask"] = tower.attn_mask[:length, :length]
    return cut


# ---- locked towers


def _is_fixed(part: nn.Module) -> bool:
    """Whether a layer does the same in training as in evaluation, and has nothing to learn."""
    if any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
        return False
    if isinstance(part, BatchNorm):
        return False
    if isinstance(part, Dropout):
        return bool(part.p == 0)
    if isinstance(part, nn.MultiheadAttention):
        return bool(part.dropout == 0)
    if isinstance(part, PatchDropout):
        return bool(part.prob == 0)
    return True


def locked_towers(clip: OpenClip) -> frozenset[str]:
    """Which of the towers ``image`` and ``text`` give a pair the same features in training as in the scoring pass.

    Those that are locked as a whole, have no BatchNorm that follows the batch, and no dropout. Of open_clip's own
    CLIP and CustomTextCLIP only, whose forward takes None for a part, and of towers whose layers are known.
    """
    if not isinstance(clip, open_clip.CLIP | open_clip.CustomTextCLIP):
        return frozenset()
    found = set()
    visual = clip.visual
    if isinstance(visual, VisionTransformer | ModifiedResNet) and all(map(_is_fixed, visual.modules())):
        found.add("image")
    if isinstance(clip, open_clip.CLIP):
        # Its text tower is spread over the model's own attributes.
        learns = (p.requires_grad for name, p in clip.named_parameters() if not name.startswith(_NOT_TEXT))
        if not any(learns) and all(map(_is_fixed, clip.transformer.modules())):
            found.add("text")
    elif isinstance(clip.text, TextTransformer) and all(map(_is_fixed, clip.text.modules())):
        found.add("text")
    return frozenset(found)


# ---- the pass


class _Towers(nn.Module):
    """A model whose call gives the features of both towers, not normalised; so that its parts can be replaced."""

    def __init__(self, clip: OpenClip) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, image: Tensor, text: Tensor, patches: Tensor | None) -> tuple[Tensor, Tensor]:
        if patches is None:
            image_features = self.clip.encode_image(image, normalize=False)
        else:
            image_features = encode_patches(self.clip.visual, image, patches)
        return image_features, self.clip.encode_text(text, normalize=False)


class Scorer:
    """The scoring pass: one forward without gradients through the unwrapped module.

    In the training run's autocast and, by default, in eval mode. BatchNorm statistics and the generators that
    training draws from stay untouched in both modes.

    Args:
        seed: from which ``--score-patch-dropout`` draws its patches.
    """

    def __init__(
        self,
        module: OpenClip,
        autocast: Autocast,
        mode: str,
        compiled: bool,
        shortcuts: Shortcuts | None = None,
        seed: int = 0,
    ) -> None:
        """Raises:
        SetupError: if a shortcut does not fit the model; its flag is named.
        """
        self.module = module
        self.autocast = autocast
        self.mode = mode
        self.shortcuts = shortcuts or Shortcuts()
        self.seed = seed
        self.batch_norms = [part for part in module.modules() if isinstance(part, BatchNorm)]
        self._towers = _Towers(module)
        self._check_image()
        self._pooling = None if self.shortcuts.context_length is None else text_pooling(module)
        changed = {
            "image": self.shortcuts.image_size is not None or self.shortcuts.patch_dropout > 0,
            "text": self.shortcuts.context_length is not None,
        }
        self.reusable = frozenset(tower for tower in locked_towers(module) if not changed[tower])
        self._forward: Forward = torch.compile(self._features) if compiled else self._features

    def _check_image(self) -> None:
        size, visual = self.shortcuts.image_size, self.module.visual
        if self.shortcuts.patch_dropout > 0 and not isinstance(visual, VisionTransformer):
            raise SetupError("--score-patch-dropout is for open_clip's vision transformers, whose input is patches")
        if size is None:
            return
        height, width = _pair(visual.image_size)
        if size > min(height, width):
            raise SetupError(f"--score-image-size {size} is more than the {height} x {width} pixels of training")
        for side in self._patch_size():
            if size % side:
                raise SetupError(f"--score-image-size {size} is no multiple of {side}, the pixels to a patch")

    def _patch_size(self) -> tuple[int, int]:
        """Pixels to a place in the image tower's positional embedding; (1, 1) where there is none."""
        visual = self.module.visual
        if isinstance(visual, VisionTransformer):
            return _pair(visual.patch_size)
        return (_RESNET_STRIDE, _RESNET_STRIDE) if isinstance(visual, ModifiedResNet) else (1, 1)

    def _resized_positions(self, size: int) -> dict[str, Tensor]:
        """The image tower's positional embedding for smaller images, by name in ``_Towers``."""
        visual = self.module.visual
        new = (size // self._patch_size()[0], size // self._patch_size()[1])
        if isinstance(visual, VisionTransformer):
            return {
                "clip.visual.positional_embedding": resize_positions(visual.positional_embedding, visual.grid_size, new)
            }
        if isinstance(visual, ModifiedResNet):
            positions = visual.attnpool.positional_embedding
            side = math.isqrt(len(positions) - 1)
            return {"clip.visual.attnpool.positional_embedding": resize_positions(positions, (side, side), new)}
        return {}

    def _features(
        self, replaced: dict[str, Tensor], image: Tensor, text: Tensor, patches: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not replaced:
            features: tuple[Tensor, Tensor] = self._towers(image, text, patches)
        else:
            features = functional_call(self._towers, replaced, (image, text, patches), tie_weights=False)
        return features

    def _patches(self, image: Tensor, sample_id: Tensor) -> Tensor | None:
        """Which patches of images [N, 3, H, W] are looked at."""
        if self.shortcuts.patch_dropout == 0:
            return None
        size = self.shortcuts.image_size
        height, width = image.shape[-2:] if size is None else (size, size)
        rows, columns = height // self._patch_size()[0], width // self._patch_size()[1]
        return keep_patches(sample_id, rows * columns, self.shortcuts.patch_dropout, self.seed)

    def _encode(self, batch: Batch, forward: Forward) -> tuple[Tensor, Tensor]:
        """Features [N, D] of a batch's images and captions, not normalised, some pairs at a time."""
        shortcuts = self.shortcuts
        image, text = batch.image, batch.text
        patches = self._patches(image, batch.sample_id)
        replaced: dict[str, Tensor] = {}
        size = shortcuts.image_size
        size = None if size is None or image.shape[-2:] == (size, size) else size
        if size is not None:
            replaced |= self._resized_positions(size)
        if shortcuts.context_length is not None and shortcuts.context_length < text.shape[1]:
            assert self._pooling is not None
            replaced |= _cut_positions(self.module, shortcuts.context_length)
            text = cut_captions(text, shortcuts.context_length, *self._pooling)
        count = -(-len(image) // shortcuts.batch_size) if shortcuts.batch_size is not None else 1
        images, texts = image.tensor_split(count), text.tensor_split(count)
        looked_at = [None] * count if patches is None else patches.tensor_split(count)
        parts = [
            forward(replaced, some if size is None else resize_images(some, size), captions, places)
            for some, captions, places in zip(images, texts, looked_at, strict=True)
        ]
        if count == 1:
            return parts[0]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()

    @contextmanager
    def _train_mode(self) -> Iterator[None]:
        for norm in self.batch_norms:
            norm.track_running_stats = False  # normalise with the batch's statistics, and leave the running ones
        devices = [self.module.logit_scale.device] if self.module.logit_scale.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):  # else dropout here would change dropout in training
                yield
        finally:
            for norm in self.batch_norms:
                norm.track_running_stats = True

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        mode = self._eval_mode() if self.mode == "eval" else self._train_mode()
        with torch.no_grad(), mode, self.autocast():
            yield

    def __call__(self, batch: Batch) -> Encoded:
        with self._scoring():
            image, text = self._encode(batch, self._forward)
            scale, bias = self.module.logit_scale.exp(), self.module.logit_bias
        # Normalised outside of autocast: in bf16 the rounding would move scores by as much again as the model's does.
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        # The bias is the parameter itself: strategies compute with it where gradients are on.
        return Encoded(image, text, scale.float(), None if bias is None else bias.detach().float(), self.reusable)

    def try_out(self, text: Tensor, dtype: torch.dtype | None) -> None:
        """Score black images of ``dtype`` with captions [N, L]. Leaves all generators alone, and compiles nothing.

        Raises:
            SetupError: if a tower does not take what the shortcuts make of them.
        """
        length, device = self.shortcuts.context_length, self.module.logit_scale.device
        if length is not None and length > text.shape[1]:
            raise SetupError(f"--score-context-length {length} is more than the {text.shape[1]} tokens of training")
        image = torch.zeros(len(text), 3, *_pair(self.module.visual.image_size), dtype=dtype, device=device)
        try:
            with self._scoring():
                self._encode(Batch(image, text.to(device), torch.arange(len(text), device=device)), self._features)
        except Exception as error:  # of whatever library the towers come from
            what = str(self.shortcuts) or "a scoring pass"
            raise SetupError(f"{what} does not work with its towers: {error}") from error


def build_scorer(
    config: Config,
    module: OpenClip,
    autocast: Autocast,
    tokenizer: Callable[[list[str]], Tensor],
    reference: bool = False,
) -> Scorer:
    """The scoring pass that the settings ask for, tried on two pairs where anything is left out of it.

    Args:
        reference: that of a reference model: in eval mode, and always tried.

    Raises:
        SetupError: if the model cannot be scored in that way.
    """
    shortcuts, seed = Shortcuts.of(config), derive_seed(config.training.seed, Stream.PATCHES)
    try:
        mode = "eval" if reference else config.selection.select_score_mode
        scorer = Scorer(module, autocast, mode, config.training.torchcompile, shortcuts, seed)
        if reference or shortcuts != Shortcuts():
            scorer.try_out(tokenizer(["one", "another"]), open_clip.get_input_dtype(config.training.precision))
    except SetupError as error:
        named = f"--model {config.model.model}"
        if reference and config.selection.options.get("select_reference") is not None:
            named = f"--select-reference {config.selection.options['select_reference']}"
        raise SetupError(f"{named}: {error}") from error
    return scorer

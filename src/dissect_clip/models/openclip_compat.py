"""Every private or undocumented API of open_clip and torch that this package uses, each with its version and reason.

Checked against open_clip_torch 3.3.0 and torch 2.15. When one of these libraries changes, this is the file to mend:
`tests/models/test_openclip_compat.py` holds that no other module touches a private name of theirs.

Shapes: N images, P patches of an image, Q patches kept, D features.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import parse_model_name
from open_clip.pretrained import download_pretrained_from_hf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

__all__ = [
    "DDP_WITHOUT_BUFFER_COPIES",
    "BatchNorm",  # the base classes of all BatchNorms and all dropouts have private names only (torch 2.15)
    "BoundedCache",
    "Dropout",
    "OpenClip",
    "bound_tokenizer_cache",
    "disable_ddp_graph_splitting",
    "encode_patches",
    "has_own_weights",
    "initialise_coca_decoder",
    "model_config",
    "shared_tensor",
    "shut_down_workers",
    "silence_compiler_logs",
    "uncompiled",
]

OpenClip = Any
"""CLIP, CustomTextCLIP or CoCa of open_clip, which has no types: encode_image, encode_text, logit_scale and so on."""

# ---- open_clip


def has_own_weights(name: str) -> bool:
    """Whether a model of this name, as ``hf-hub:org/model``, comes with weights, whatever ``--pretrained`` is.

    ``parse_model_name`` (3.3.0) is what ``create_model`` decides by, and is not exported.
    """
    return parse_model_name(name)[0] is not None


def model_config(name: str, cache_dir: str | None) -> Mapping[str, Any]:
    """The configuration of a model: embed_dim, vision_cfg, text_cfg; empty if open_clip has none.

    ``open_clip.get_model_config`` (3.3.0) knows no models of the Hugging Face hub, so their file is read here, by the
    download function that ``create_model`` uses and that is not exported.
    """
    schema, place = parse_model_name(name)
    if schema != "hf-hub":
        return open_clip.get_model_config(name) or {}
    file = download_pretrained_from_hf(place, filename="open_clip_config.json", cache_dir=cache_dir)
    config: Mapping[str, Any] = json.loads(Path(file).read_text(encoding="utf-8")).get("model_cfg", {})
    return config


class BoundedCache(dict[str, str]):
    """A word cache that is emptied at ``limit`` words, except for those it began with, the special tokens."""

    limit = 1 << 19  # at about 200 bytes each

    def __init__(self, words: dict[str, str]) -> None:
        super().__init__(words)
        self.special = dict(words)

    def __setitem__(self, word: str, tokens: str) -> None:
        if len(self) >= self.limit:
            self.clear()
            self.update(self.special)
        super().__setitem__(word, tokens)


def bound_tokenizer_cache(tokenizer: Callable[[list[str]], Tensor]) -> None:
    """Limit the memory of open_clip's own tokenizer; other tokenizers stay as they are.

    ``SimpleTokenizer.cache`` (3.3.0) keeps every word it meets: gigabytes in each loader worker on web data.
    """
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        tokenizer.cache = BoundedCache(tokenizer.cache)


def initialise_coca_decoder(module: OpenClip) -> None:
    """Draw the one weight of CoCa's decoder that open_clip 3.3.0 leaves as uninitialised memory.

    ``MultimodalTransformer.init_parameters`` does this, and is never called.
    """
    projection = module.text_decoder.text_projection
    nn.init.normal_(projection, std=projection.shape[0] ** -0.5)


def encode_patches(visual: OpenClip, image: Tensor, patches: Tensor) -> Tensor:
    """open_clip's VisionTransformer on some patches [N, Q] of each image, with its class token: [N, D].

    Patches are left out after ``ln_pre``, which works on each patch alone, so the result equals leaving them out before
    it, as open_clip does. ``VisionTransformer`` (3.3.0) has no public way between embedding and pooling.
    """
    tokens = visual._embeds(image)
    places = torch.cat([torch.zeros_like(patches[:, :1]), patches + 1], dim=1)
    tokens = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
    pooled: Tensor = visual._pool(visual.transformer(tokens))[0]
    return pooled if visual.proj is None else pooled @ visual.proj


# ---- torch: modules

DDP_WITHOUT_BUFFER_COPIES: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}
"""The argument with which DDP leaves buffers alone in the forward pass; torch 2.15 renamed it and warns of the old."""


def disable_ddp_graph_splitting() -> None:
    """Have torch.compile not split graphs at DDP's buckets, which fails with checkpointed activations (as in OpenCLIP).

    There is no public switch for it (torch 2.15).
    """
    torch._dynamo.config.optimize_ddp = False


def silence_compiler_logs() -> None:
    """Keep the information messages of torch.compile out of the run's log; its loggers have private names."""
    for name in ("torch._dynamo", "torch._inductor", "torch._functorch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside the wrapper that ``torch.compile`` returns (torch 2.15), or the module itself."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


# ---- torch: loaders


def shut_down_workers(loader: DataLoader[Any]) -> None:
    """End a loader's worker processes now, if it has any.

    torch (2.15) does so when the loader's iterator is deleted, which does not happen when Python exits on an error; the
    iterator of persistent workers is kept in a private attribute.
    """
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


def shared_tensor(shape: tuple[int, ...], dtype: torch.dtype, num_bytes: int) -> Tensor:
    """An uninitialised tensor in shared memory, which a loader worker hands over without a copy.

    ``share_memory_`` of an ordinary tensor would copy it; torch's own collation (2.15) does it in this way.
    """
    storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]

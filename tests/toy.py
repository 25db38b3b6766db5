"""Tiny models of every kind that open_clip builds, by configuration files, for tests of milliseconds."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.models.build import build_model

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "toy-vit": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "toy-rn": {
        "embed_dim": 16,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
        "text_cfg": TEXT,
    },
    "toy-timm": {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
        "text_cfg": TEXT,
    },
    "toy-coca": {
        "embed_dim": 16,
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {
            "context_length": 8,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
            "attn_pooler_heads": 2,
        },
        "custom_text": True,
    },
}


def write_configs(folder: Path) -> str:
    """Write the configurations, whole at once since several ranks do; returns the folder for ``--model-config``."""
    for name, content in CONFIGS.items():
        partial = folder / f"{name}.{os.getpid()}.tmp"
        partial.write_text(json.dumps(content))
        os.replace(partial, folder / f"{name}.json")
    return str(folder)


def make_config(folder: Path, **changes: Any) -> Config:
    """Settings for a toy model that need no data."""
    defaults = {
        "model": "toy-vit", "model_config": write_configs(folder), "precision": "fp32", "device": "cpu", "logs": "none",
        "lr": 1e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "warmup": 0, "workers": 0, "batch_size": 8,
    }  # fmt: skip
    return Config.of(**(defaults | changes))


def make_module(folder: Path, **changes: Any) -> nn.Module:
    """A toy model."""
    return build_model(make_config(folder, **changes), World()).module


def random_pairs(size: int, image_size: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, S, S] and texts [N, 8] that the tokenizer could have made."""
    random = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 49000, (size, 8), generator=random)
    text[:, 0], text[:, -1] = 49406, 49407
    return torch.randn(size, 3, image_size, image_size, generator=random), text

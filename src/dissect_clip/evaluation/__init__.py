"""Evaluation of a model between epochs or on its own: retrieval and zero-shot classification, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dissect_clip.distributed.world import World
from dissect_clip.evaluation.common import Encoder, eval_mode
from dissect_clip.evaluation.retrieval import RetrievalSet, evaluate_retrieval
from dissect_clip.evaluation.zeroshot import ClassificationSet, Tokenizer, evaluate_zeroshot


@torch.no_grad()
def evaluate(
    model: nn.Module,
    retrieval: RetrievalSet | None,
    classification: Sequence[ClassificationSet],
    *,
    world: World,
    autocast: Callable[[], AbstractContextManager[Any]],
    input_dtype: torch.dtype | None,
    tokenizer: Tokenizer,
    batch_size: int,
) -> dict[str, float]:
    """All metrics of a model, by name; empty without a set to evaluate on. Collective; equal on all ranks.

    Args:
        model: an open_clip model on ``world.device``, not wrapped in DDP. Runs in evaluation mode, without gradients;
            every submodule is left in the mode it was in.
        retrieval: this rank's share of the validation set.
        classification: this rank's share of each labelled set.
        autocast: opens the autocast context of the run.
        input_dtype: of the images; None leaves them as they are.
        tokenizer: class captions -> [T, L] int64.
        batch_size: pairs in a batch of ``clip_val_loss``.

    Raises:
        TrainingError: a set is empty, or features are not finite.
    """
    encoder = Encoder(model, autocast, input_dtype)
    metrics: dict[str, float] = {}
    with eval_mode(model):
        # no_grad, not inference_mode: a model may keep tensors made here, and a later backward could not use them.
        if classification:
            metrics |= evaluate_zeroshot(encoder, classification, tokenizer, world=world)
        if retrieval is not None:
            metrics |= evaluate_retrieval(encoder, retrieval, world=world, batch_size=batch_size)
    return metrics


__all__ = ["ClassificationSet", "RetrievalSet", "Tokenizer", "evaluate"]

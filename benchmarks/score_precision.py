#!/usr/bin/env python3
"""How often scores under bf16 autocast choose what fp32 scores choose.

    python benchmarks/score_precision.py --train-data 'shards/*.tar' --checkpoint epoch_8.pt [--model RN-tiny]

For each batch the `--rate` with the highest CLIPScore is chosen by both; printed is the share of the same choices, for
features normalised in float32 (as the scoring pass does) and inside autocast (as open_clip does).
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import torch
from common import report
from torch import Tensor

from dissect_clip.config import parse_args
from dissect_clip.data import build_train
from dissect_clip.dist import World
from dissect_clip.model import autocast_for, build_model
from dissect_clip.scorer import Scorer
from dissect_clip.selection import summaries
from dissect_clip.selection.selector import kept


def choice(image: Tensor, text: Tensor, rate: float) -> set[int]:
    similarity = (image.float() * text.float()).sum(dim=1)
    return set(similarity.topk(kept(rate, len(similarity))).indices.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--model", default="RN-tiny")
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    words = ["--train-data", options.train_data, "--model", options.model, "--pretrained", options.checkpoint]
    config = parse_args(
        [*words, "--batch-size", "256", "--workers", "0", "--logs", "none", "--device", "cpu"], summaries()
    )
    world = World()
    model = build_model(config, world)
    data = build_train(config, world, model.preprocess_train, model.tokenizer, None)
    exact, cheap = (Scorer(model.module, autocast_for(p, world.device), "eval", False) for p in ("fp32", "amp_bf16"))
    agreement: dict[str, list[float]] = {"normalised_in_float32": [], "normalised_in_autocast": []}
    for batch in (batch.to(world.device) for batch in itertools.islice(data.loader, options.batches)):
        reference = exact(batch)
        wanted = choice(reference.image_features, reference.text_features, options.rate)
        ours = cheap(batch)
        with torch.no_grad(), autocast_for("amp_bf16", world.device)():
            module = model.module.eval()
            image = module.encode_image(batch.image, normalize=True)
            text = module.encode_text(batch.text, normalize=True)
        for name, found in (
            ("normalised_in_float32", choice(ours.image_features, ours.text_features, options.rate)),
            ("normalised_in_autocast", choice(image, text, options.rate)),
        ):
            agreement[name].append(len(wanted & found) / len(wanted))
    means = {name: round(statistics.mean(values), 4) for name, values in agreement.items()}
    report(
        "score_precision", model=options.model, checkpoint=options.checkpoint.split("/")[-1], rate=options.rate, **means
    )


if __name__ == "__main__":
    main()
